"""GenEval's verdict of a judge of the embedded world, as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from visearch.geneval.rules import Metadata, Verdict, judge, parse_prompt


def judge_images(detector: Any, images: Sequence[Any], metadata: Sequence[Metadata], **options: Any) -> list[Verdict]:
    """Verdicts of a detector with a colour classifier on N images.

    Args:
        detector: has ``detect(images) -> detections of each`` and ``classify_color(image, class name, boxes)``, such as
            :func:`visearch.rewards.detector.load_judge` returns.
        images: what the detector takes.
        metadata: N lines of a prompt file.
        options: of :func:`judge`.
    """
    found = detector.detect(images)
    return [
        judge(line, boxes, partial(detector.classify_color, image), **options)
        for image, line, boxes in zip(images, metadata, found, strict=True)
    ]


class VerdictReward:
    """GenEval's verdict of a detector as a reward: 1 for a correct image, else 0.

    Args:
        detector: see :func:`judge_images`.
    """

    family = "detector"
    modality = "image"
    higher_is_better = True
    range = (0.0, 1.0)
    scale = "1 where GenEval's rules call the image right, else 0"
    training_data = "see the judge's card"
    needs = frozenset({"pixels", "metadata"})
    not_held_out_for = ("GenEval",)
    checker = True

    def __init__(self, detector: Any) -> None:
        self.detector = detector
        self.name, self.licence, self.source = f"judge-{detector.name}", detector.licence, detector.source
        measured = getattr(detector, "error", {}).get("overall")
        self.note = f"itself wrong on {measured['rate']:.1%} of composed scenes" if measured else "own error unknown"

    def score(
        self,
        samples: Any,
        prompts: Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> Any:
        """Score N images; prompts without metadata must be in GenEval's wording.

        Raises:
            ValueError: a prompt in another wording, or with a class that the detector does not know.
        """
        import torch

        from visearch.protocols import Scores
        from visearch.rewards.images import to_pil

        lines = [
            line or parse_prompt(prompt)
            for line, prompt in zip(metadata or [None] * len(prompts), prompts, strict=True)
        ]
        for clause in (clause for line in lines for clause in line["include"]):
            if clause["class"] not in self.detector.class_names:
                raise ValueError(f"{self.name} does not know {clause['class']!r}; it knows {self.detector.class_names}")
        verdicts = judge_images(self.detector, to_pil(samples), lines)
        reasons = {i: v.reason for i, v in enumerate(verdicts) if not v.correct}
        return Scores(torch.tensor([float(v.correct) for v in verdicts]), reasons=reasons)


def _load_verdict(letter: str, device: Any = "cpu") -> VerdictReward:
    from visearch.rewards.detector import load_judge

    return VerdictReward(load_judge(letter, device))


judge_a, judge_b, judge_c = (partial(_load_verdict, letter) for letter in "abc")
