"""VQAScore (arXiv 2404.01291): how probably a vision-language model answers "Yes" when asked about the prompt.

The question is the one that linzhiqiu/t2v_metrics puts to Qwen-VL. One forward pass an image and no sampling: what
``generate`` reports may be bent by a checkpoint's own settings, and a repetition penalty would hit "Yes", which stands
in the question.

Shapes: n images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visearch.rewards.base import ModelReward
from visearch.rewards.function import path_of
from visearch.rewards.loading import pretrained

__all__ = ["YES", "VQAScore", "VisionLanguageReward"]

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'
YES = ("Yes", "yes", " Yes", " yes")  # the answers that GenEval 2 adds up
MEANS = ("geometric", "arithmetic")


class VisionLanguageReward(ModelReward):
    """A reward whose model, Qwen2.5-VL or Qwen3-VL, is shown an image and told something.

    Args:
        model: hub id or local folder of the model with its processor.
        min_pixels, max_pixels: to which images are resized; default the checkpoint's own.
        options: as for :class:`ModelReward`.

    Raises:
        FileNotFoundError, ValueError: as :class:`ModelReward`; a processor without a chat template.
    """

    family = "vlm"
    default_dtype = torch.bfloat16
    files = (
        "config.json",
        "model*.safetensors*",  # and the index of several
        "tokenizer*.json",
        "*preprocessor_config.json|processor_config.json",
        "chat_template*|tokenizer_config.json",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **options: Any,
    ) -> None:
        self.pixels = {k: v for k, v in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if v is not None}
        super().__init__(model, **options)
        self.processor = self._processor()

    def _load(self) -> nn.Module:
        from transformers import AutoModelForImageTextToText

        return pretrained(AutoModelForImageTextToText, self.path, self.name, self.dtype)

    def _processor(self) -> Any:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self.path, **self.pixels)
        if processor.chat_template is None:
            raise ValueError(f"{self.name}: {self.path} has no chat template; give an Instruct model")
        processor.tokenizer.padding_side = "left"  # so that all answers begin at the last position
        return processor

    def _inputs(self, images: Sequence[Tensor], texts: Sequence[str]) -> Any:
        """The model's inputs: a user's turn of one image and one text each, then the beginning of the answer.

        Raises:
            ValueError: a text that holds one of the tokenizer's own marks, which could end the turn.
        """
        marks = self.processor.tokenizer.all_special_tokens
        if found := [mark for mark in marks if any(mark in text for text in texts)]:
            raise ValueError(f"{self.name}: a prompt holds {found[0]!r}, which the model takes for a mark; remove it")
        turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
        chats = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.processor(text=chats, images=list(images), padding=True, return_tensors="pt").to(self.device)

    def _config(self) -> dict[str, Any]:
        shown = self.processor.image_processor
        size = {side: shown.size[side] for side in ("shortest_edge", "longest_edge")}
        return {**super()._config(), "image_processor": type(shown).__name__, "pixels": size}


class VQAScore(VisionLanguageReward):
    """Probability of the answer "Yes", over the whole vocabulary.

    Args:
        question: text with ``{prompt}`` in it.
        answers: texts of one token each, whose probabilities are added up; ``YES`` are those of GenEval 2.
        clauses: splits a prompt into statements that are asked one by one; default the whole prompt.
        mean: of the statements' probabilities, ``"geometric"`` or ``"arithmetic"``.
        model, options: as for :class:`VisionLanguageReward`.

    Raises:
        FileNotFoundError, ValueError: as :class:`VisionLanguageReward`; a question without ``{prompt}``, an answer of
            several tokens, an unknown mean.
    """

    name = "vqa-score"
    range = (0.0, 1.0)
    scale = 'probability that the first token of the answer is "Yes"'
    licence = "Apache-2.0 (weights of the 7B and of all Qwen3-VL; see the model's card)"
    source = "Qwen/Qwen2.5-VL-7B-Instruct"
    training_data = "general image and text data of Qwen2.5-VL (2502.13923), no scores of images"
    size = 8_292_166_656

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        question: str = QUESTION,
        answers: Sequence[str] = YES[:1],
        clauses: Callable[[str], Sequence[str]] | None = None,
        mean: str = "geometric",
        **options: Any,
    ) -> None:
        if "{prompt}" not in question:
            raise ValueError(f"question={question!r} must hold {{prompt}}, where the prompt goes")
        if mean not in MEANS:
            raise ValueError(f"mean={mean!r} is unknown; give one of {', '.join(MEANS)}")
        self.question, self.answers, self.clauses, self.mean = question, tuple(answers), clauses, mean
        super().__init__(model, **options)
        self.answer_tokens = self._answer_tokens()

    def _answer_tokens(self) -> list[int]:
        """Numbers of the answers in the vocabulary."""
        encoded = {a: self.processor.tokenizer.encode(a, add_special_tokens=False) for a in self.answers}
        if several := [answer for answer, tokens in encoded.items() if len(tokens) != 1]:
            raise ValueError(f"answers={self.answers}: {several[0]!r} is not one token to {self.source}; leave it out")
        return sorted({tokens[0] for tokens in encoded.values()})

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        parts = [[prompt] if self.clauses is None else list(self.clauses(prompt)) for prompt in prompts]
        shown = [image for image, asked in zip(images, parts, strict=True) for _ in asked]
        found = self.probabilities(shown, [text for asked in parts for text in asked])
        groups = found.split([len(asked) for asked in parts])
        return torch.stack([p.log().mean().exp() if self.mean == "geometric" else p.mean() for p in groups])

    def probabilities(self, images: Sequence[Tensor], statements: Sequence[str]) -> Tensor:
        """(n,) float32: how probably each image (3, H, W), uint8, is said to show its statement."""
        inputs = self._inputs(images, [self.question.replace("{prompt}", text) for text in statements])
        logits = self.module(**inputs, logits_to_keep=1).logits[:, -1].float()
        return logits.softmax(-1)[:, self.answer_tokens].sum(-1)

    def _config(self) -> dict[str, Any]:
        own = {"question": self.question, "answers": self.answer_tokens, "mean": self.mean}
        return {**super()._config(), **own, "clauses": self.clauses and path_of(self.clauses)}
