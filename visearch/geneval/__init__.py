"""GenEval (arXiv 2310.11513): prompts, verdicts, summary, and the batch job ``visearch geneval``.

Importing it needs numpy alone; what makes or judges images is loaded by the commands.
"""

from visearch.assets.words import COLORS, RELATIONS, TAGS, class_names
from visearch.geneval.reward import VerdictReward, judge_a, judge_b, judge_c, judge_images
from visearch.geneval.rules import (
    Verdict,
    check_metadata,
    filter_detections,
    judge,
    load_prompts,
    parse_prompt,
    relations,
)
from visearch.geneval.summary import Summary, Task, summarize

__all__ = [
    "COLORS",
    "RELATIONS",
    "TAGS",
    "Summary",
    "Task",
    "Verdict",
    "VerdictReward",
    "check_metadata",
    "class_names",
    "filter_detections",
    "judge",
    "judge_a",
    "judge_b",
    "judge_c",
    "judge_images",
    "load_prompts",
    "parse_prompt",
    "relations",
    "summarize",
]
