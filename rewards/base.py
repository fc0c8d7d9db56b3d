"""What rewards share; a new one with a model is a description, ``_load`` and ``_score``, one without the last alone.

    class Sharpness(ModelReward):
        name, family, scale = "sharpness", "pixel", "probability that an image is sharp"
        range, licence, source, size = (0.0, 1.0), "MIT", "owner/sharpness", 86_000_000
        files = ("config.json", "model.safetensors")

        def __init__(self, model=None, *, crop=False, **options):
            self.crop = crop  # own options first: the base class may load
            super().__init__(model, **options)

        def _load(self):  # self.path holds the files; weights in self.dtype, a scoring head in float32
            module = Sharp.from_config(json.loads((self.path / "config.json").read_text()))
            load_strictly(module, read_state(self.path / "model.safetensors"), self.name)
            return module.to(self.dtype)

        def _score(self, images, prompts):  # uint8 (3, H, W) each, where the samples were
            pixels = torch.stack([self.preprocess(image) for image in images])
            return self.module(pixels.to(self.device, self.dtype))  # (n,), or Scores with reasons and components

        def _config(self):
            return {**super()._config(), "crop": self.crop}

Shapes: N samples of a call, n of a chunk.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visearch.protocols import Scores
from visearch.rewards.combine import Operators
from visearch.rewards.images import to_pixels, to_uint8
from visearch.rewards.loading import digest, locate

__all__ = ["BaseReward", "ModelReward", "texts_for"]

OFFLOADS = ("none", "cpu", "lazy")


class BaseReward(Operators):
    """A reward, see :class:`visearch.protocols.Reward`; ``a + 0.5 * b`` joins two of them.

    Class attributes describe it:

    Attributes:
        name: as in the registry.
        family: ``"clip"``, ``"blip"``, ``"vlm"``, ``"detector"``, ``"ocr"`` or ``"pixel"``; a judge that is held out
            should be of another family than the reward that guides.
        modality: ``"image"`` or ``"video"``.
        higher_is_better, range: of the published scale, which is what :meth:`score` gives.
        scale: the same in one sentence.
        licence: of code and weights.
        source: hub id of the published weights, or where else they are.
        training_data: what the weights were fitted to, with paper id.
        size: parameters.
        needs: see the protocol; needs_prompt: whether the score depends on the prompt.
        noise_aware: whether it was made for previews at a noise level.
        not_held_out_for: benchmarks whose judge or training labels it shares.
        batch_size: most samples that ``_score`` gets at once; ``None`` is all that a call brings.
    """

    name: str
    family: str
    modality: str = "image"
    higher_is_better: bool = True
    range: tuple[float, float] = (-math.inf, math.inf)
    scale: str
    licence: str
    source: str
    training_data: str = "none"
    size: int = 0
    needs: frozenset[str] = frozenset({"pixels"})
    needs_prompt: bool = True
    noise_aware: bool = False
    not_held_out_for: tuple[str, ...] = ()
    batch_size: int | None = None

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor | Scores:
        """Score n images (3, H, W), or videos (F, 3, H, W), uint8; prompts belong to them one by one.

        Returns:
            (n,), NaN for a sample that failed; or Scores, to give reasons and components.
        """
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        """Whatever a score depends on, JSON-able, for :attr:`config_hash`."""
        return {"reward": f"{type(self).__module__}:{type(self).__qualname__}"}

    @property
    def config_hash(self) -> str:
        """sha256 of options and any weights; equal hashes give equal scores for equal samples and prompts."""
        return hashlib.sha256(json.dumps(self._config(), sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def score(
        self,
        samples: Any,
        prompts: str | Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        """Score N samples on the published scale, in order, each independent of its companions.

        Args:
            samples: images (N, 3, H, W) or videos (N, F, 3, H, W), float in [0, 1] or uint8; or a list of N such
                tensors without the first axis, PIL images, or lists of PIL frames. Floats are rounded to uint8 first,
                so that a tensor and the PIL image that is made of it score the same.
            prompts: N texts, or one for all.
            noise_level, metadata: not read here; see the protocol.

        Returns:
            Scores; a sample that failed is NaN, with a reason.

        Raises:
            ValueError: no samples, another number of prompts, or samples of another kind, shape or range.
        """
        images, failed = self._images(samples)
        texts = texts_for(prompts, len(images))
        rows = [i for i in range(len(images)) if i not in failed]
        size = self.batch_size or max(len(rows), 1)
        with self.resident():
            parts = [
                (chunk, self._score([images[i] for i in chunk], [texts[i] for i in chunk]))
                for chunk in (rows[k : k + size] for k in range(0, len(rows), size))
            ]
        return _joined(len(images), parts, failed)

    def _images(self, samples: Any) -> tuple[list[Tensor], dict[int, str]]:
        """The samples as pixels, and why some cannot be scored."""
        images, failed = to_pixels(samples)
        axes = 4 if self.modality == "video" else 3
        wrong = next((image for image in images if image.ndim != axes), None)
        if wrong is not None:
            given, wanted = ("videos", "images") if axes == 3 else ("images", "videos")
            remedy = "wrap it as video-mean" if axes == 3 else "give lists of frames, or (N, F, 3, H, W)"
            raise ValueError(
                f"{self.name} scores {wanted}, and samples holds {given} of shape {tuple(wrong.shape)}; {remedy}"
            )
        return images, failed

    def resident(self) -> AbstractContextManager[None]:
        """What surrounds the calls of ``_score``, and by the driver those of ``score``."""
        return nullcontext()


class ModelReward(BaseReward):
    """A reward with a model.

    Class attributes beside those of :class:`BaseReward`:

    Attributes:
        files: what it reads from ``model``, each a glob, with alternatives as in ``"*.safetensors|*.bin"``.
        default_dtype: see ``dtype``.

    Args:
        model: hub id, local folder with ``files``, or the one file; default ``source``.
        device: where the model runs.
        dtype: of its weights and activations; default ``default_dtype``.
        offload: ``"none"`` loads at once; ``"cpu"`` keeps the model on the CPU between calls; ``"lazy"`` loads it at
            the first call. Files are located at once in any case.
        batch_size: most samples in the model at once; default all that a call brings.
        revision: commit of the hub id.

    Raises:
        FileNotFoundError: weights are missing; the text says what to download and where to put it.
        ValueError: a file that does not fit, or an option that does not exist.
    """

    files: tuple[str, ...] = ()
    default_dtype: ClassVar[torch.dtype] = torch.float32
    _resident = False

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        offload: str = "none",
        batch_size: int | None = None,
        revision: str | None = None,
    ) -> None:
        if offload not in OFFLOADS:
            raise ValueError(f"offload={offload!r} is unknown; give one of {', '.join(OFFLOADS)}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1; leave it out to score all at once")
        self.source = str(model or type(self).source)
        if self.files:
            published = type(self).source
            self.path = locate(self.source, self.files, needed_by=self.name, revision=revision, published=published)
        self.device, self.dtype = torch.device(device), dtype or self.default_dtype
        self.offload, self.batch_size = offload, batch_size
        if offload != "lazy":
            self.module.to("cpu" if offload == "cpu" else self.device)

    def _load(self) -> nn.Module:
        """The model with its weights, in ``self.dtype``."""
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "revision": self.revision, "dtype": str(self.dtype)}

    @cached_property
    def module(self) -> nn.Module:
        """The model, frozen; loaded when first asked for."""
        return self._load().eval().requires_grad_(False)

    @cached_property
    def revision(self) -> str:
        """sha256 of the files that were read: the same weights have the same one, wherever they lie."""
        return digest(self.path, self.files)

    def memory_estimate(self) -> int:
        """Bytes of the weights."""
        return self.size * self.dtype.itemsize

    def estimate(self, samples: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(N,) what :meth:`score` gives, on the model's device, with gradients to samples and to weights that ask.

        Samples that ask for gradients are not rounded to uint8, and are resized by torch instead of Pillow. All go
        through the model at once; with ``offload`` the backward pass, too, belongs inside :meth:`resident`.

        Args:
            samples: N of (3, H, W), or (F, 3, H, W) for a video, float in [0, 1] or uint8.
            prompts: N texts.

        Raises:
            ValueError: another number of prompts, or samples ask for gradients, which this reward has not, such as one
                that looks at PIL images.
        """
        texts = texts_for(prompts, len(samples))
        # floats of the scale that ``_score`` knows, as long as somebody needs to look through them
        pixels = [255 * sample if sample.requires_grad else to_uint8(sample) for sample in samples]
        with self.resident():
            found = self._score(pixels, texts)
        values = found.values if isinstance(found, Scores) else found
        if any(sample.requires_grad for sample in samples) and not values.requires_grad:
            raise ValueError(f"{self.name} has no gradient to its samples; give them detached, or use a CLIP")
        return values

    @contextmanager
    def resident(self) -> Iterator[None]:
        """The model is on its device meanwhile; of blocks within blocks, the outermost brings it and takes it away."""
        outermost, self._resident = not self._resident, True
        try:
            if outermost:
                self.module.to(self.device)
            yield
        finally:
            self._resident = not outermost
            if outermost and self.offload == "cpu":
                self.module.to("cpu")


def texts_for(prompts: str | Sequence[str], count: int) -> list[str]:
    """One text a sample.

    Raises:
        ValueError: another number of them.
    """
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count:
        raise ValueError(
            f"prompts has {len(texts)} texts for {count} samples; give one a sample, or one string for all"
        )
    return texts


def _joined(count: int, parts: Sequence[tuple[list[int], Tensor | Scores]], failed: Mapping[int, str]) -> Scores:
    """The scores of chunks, each with the rows that it holds, as those of ``count`` samples."""
    values, components, reasons = torch.full((count,), math.nan), {}, dict(failed)
    for rows, part in parts:
        scores = part if isinstance(part, Scores) else Scores(part)
        values[rows] = scores.values.detach().to("cpu", torch.float32)
        for name, component in scores.components.items():
            components.setdefault(name, torch.full((count,), math.nan))[rows] = component.detach().float().cpu()
        reasons |= {rows[i]: reason for i, reason in scores.reasons.items()}
    values[~values.isfinite()] = math.nan
    for row in values.isnan().nonzero().flatten().tolist():
        reasons.setdefault(row, "the model gave no finite number")
    return Scores(values, components, reasons)
