"""UnifiedReward (arXiv 2503.05236): a vision-language model that writes down scores from 1 to 5.

The model was fitted to answers to one wording, so only that one is asked. It belongs to the published code
(github.com/CodeGoat24/UnifiedReward, MIT), which this package holds no part of: you give the script that it stands in,
and its sha256 is compared. Nothing of the script is run.
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visearch.protocols import Scores
from visearch.rewards.vqa import VisionLanguageReward

__all__ = ["VERSIONS", "UnifiedReward", "Version", "read_scores", "read_template"]

MEAN = "mean"


@dataclass(frozen=True)
class Version:
    """A published form of the reward.

    Args:
        source: hub id of its weights.
        script: file of the published code that holds its question.
        sha256: of the question, with ``{prompt}`` where the prompt goes.
        labels: component -> what the model writes before its score.
        tokens: most that an answer may have.
    """

    source: str
    script: str
    sha256: str
    labels: dict[str, str]
    tokens: int


VERSIONS = {
    "1.0": Version(
        source="CodeGoat24/UnifiedReward-qwen-7b",
        script="inference_qwen/image_generation/qwen_point_score_image_generation.py",
        sha256="f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b",
        labels={"final": "Final Score:"},
        tokens=512,
    ),
    "2.0": Version(
        source="CodeGoat24/UnifiedReward-2.0-qwen-7b",
        script="inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py",
        sha256="75d52d3ae771f89b682db3b74cdaca1c7bde373a39162bc1c9dabd63cdc9b851",
        labels={name.lower(): f"{name} Score (1-5):" for name in ("Alignment", "Coherence", "Style")},
        tokens=4096,
    ),
}


def read_template(file: str | Path, sha256: str) -> str:
    """The question that a file holds: the whole text, or a string literal of a Python file, which is not run.

    Args:
        file: f-strings in it count with their expressions left as they are, in braces.
        sha256: of the wanted text in UTF-8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: nothing in it has this sha256.
    """
    text = Path(file).read_text(encoding="utf-8")
    for candidate in (text, *(_literals(text) if Path(file).suffix == ".py" else ())):
        if hashlib.sha256(candidate.encode()).hexdigest() == sha256:
            return candidate
    raise ValueError(
        f"template={str(file)!r} does not hold the published question, whose sha256 is {sha256}; give the file as the "
        "authors published it: another wording gives other scores"
    )


def _literals(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                p.value if isinstance(p, ast.Constant) else f"{{{ast.unparse(p.value)}}}" for p in node.values
            )


def read_scores(answer: str, labels: dict[str, str]) -> dict[str, float]:
    """Component -> the number that follows the last occurrence of its label; NaN where there is none from 1 to 5."""
    scores = {}
    for name, label in labels.items():
        _, found, rest = answer.rpartition(label)
        number = re.match(r"[\s*]*(\d+(?:\.\d+)?)", rest) if found else None
        score = float(number[1]) if number else math.nan
        scores[name] = score if 1 <= score <= 5 else math.nan
    return scores


class UnifiedReward(VisionLanguageReward):
    """Scores that the model writes down, decoded greedily; NaN where it wrote none. Each is a component.

    Images go in as they are, where the published client of 2.0 sends them as JPEG of quality 95.

    Args:
        model: hub id or local folder; default the published one of ``version``.
        template: your copy of ``VERSIONS[version].script``, or a text file of the question alone; default the script
            in the folder ``model``.
        version: ``"2.0"`` (alignment, coherence and style) or ``"1.0"`` (one final score).
        value: ``"mean"`` of the scores, or the name of one of them.
        options: as for :class:`VisionLanguageReward`.

    Raises:
        ValueError: an unknown version or value, no template, or one with another sha256.
    """

    name = "unified-reward"
    range = (1.0, 5.0)
    scale = "mean of the scores from 1 to 5 that the model writes down"
    licence = "MIT (code and weights)"
    source = VERSIONS["2.0"].source
    training_data = "236 000 judgements of images and videos, from public preference sets (2503.05236)"
    size = 8_292_166_656
    files = (*VisionLanguageReward.files, "generation_config.json")

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        template: str | Path | None = None,
        version: str = "2.0",
        value: str = MEAN,
        **options: Any,
    ) -> None:
        if version not in VERSIONS:
            raise ValueError(f"version={version!r} is unknown; give one of {', '.join(VERSIONS)}")
        self.version, self.value = VERSIONS[version], value
        if value not in (MEAN, *self.version.labels):
            raise ValueError(f"value={value!r} is unknown; give one of {', '.join((MEAN, *self.version.labels))}")
        script = Path(self.version.script)
        beside = None if model is None else Path(model).expanduser() / script.name
        if template is None and not (beside and beside.is_file()):
            raise ValueError(
                f"{self.name} asks the authors' own question, which is not in this package; give template=, your copy "
                f"of {script} from github.com/CodeGoat24/UnifiedReward (MIT), or put it into the folder of the model"
            )
        self.template = read_template(template or beside, self.version.sha256)
        super().__init__(model or self.version.source, **options)

    def _score(self, images: list[Tensor], prompts: list[str]) -> Scores:
        answers = self.answers(images, prompts)
        rows = [read_scores(answer, self.version.labels) for answer in answers]
        components = {name: torch.tensor([row[name] for row in rows]) for name in self.version.labels}
        values = torch.stack(list(components.values())).mean(0) if self.value == MEAN else components[self.value]
        wanted = " and ".join(self.version.labels.values())
        failed = values.isnan().nonzero().flatten().tolist()
        reasons = {i: f"no number from 1 to 5 after {wanted} in {answers[i][-200:]!r}" for i in failed}
        return Scores(values, components, reasons)

    def answers(self, images: list[Tensor], prompts: list[str]) -> list[str]:
        """What the model writes about each image, decoded greedily."""
        inputs = self._inputs(images, [self.template.replace("{prompt}", prompt) for prompt in prompts])
        written = self.module.generate(**inputs, do_sample=False, max_new_tokens=self.version.tokens)
        return self.processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "template": self.version.sha256, "value": self.value}
