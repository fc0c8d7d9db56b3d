"""How previews are decoded: by the pipeline's own decoder, or by a cheaper one that answers in its place.

A preview is decoded as a result is, by replay (:mod:`visearch.pipelines.replay`): the pipeline unpacks, denormalises
and post-processes its latents itself, and only the call of its VAE's ``decode`` is answered by something cheaper, so
this holds for every pipeline. Results are always decoded by the pipeline's own VAE.

Shapes: N = entries of one call of ``decode`` (images, videos, or frames), C = latent channels, K = channels of what it
gives (3), f and F = frames of latents and of pictures.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from visearch.pipelines import components
from visearch.pipelines.taehv import TinyVideoDecoder

__all__ = ["MODES", "Decode", "LinearMap", "PreviewDecoder"]

MODES = ("full", "auto", "tiny", "linear")
FITS = 0.8
"""Least correlation of a tiny decoder's pixels with the pipeline's own, on the run's first preview."""
ENOUGH = 8
"""Positions for each unknown of a colour channel from which on a linear map is fitted."""
BESIDE = "vae_tiny"
"""Folder beside that of the pipeline's VAE where a tiny decoder is looked for."""

Decode = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Answers a call of ``decode``: gets the component's name, its own method, and the arguments."""


class PreviewDecoder:
    """Which decoder makes the previews of one run, and what it learned in it.

    - ``"full"``: the pipeline's own.
    - ``"tiny"``: an ``AutoencoderTiny``, or a :class:`~visearch.pipelines.taehv.TinyVideoDecoder` where latents have
      frames. The first preview of a run is decoded by both, and a warning says when they do not agree.
    - ``"linear"``: an affine map from latent channels to colours, least squares on all pictures that this run decoded
      in full before its second round of previews; until there are enough, full.
    - ``"auto"``: a tiny decoder if one is given or lies beside the VAE, and agrees; else full.

    Args:
        pipe: a diffusers pipeline.
        mode: one of the above.
        decoder: for ``"tiny"`` and ``"auto"``: a module, a folder or hub id of an ``AutoencoderTiny``, or a file in
            TAEHV's layout. Default: the folder ``vae_tiny`` beside that of the pipeline's VAE, if there is one.

    Raises:
        ValueError: an unknown mode; a decoder that is missing, not wanted, or made for other latents.
        FileNotFoundError: the file of a decoder does not exist.
    """

    def __init__(self, pipe: Any, mode: str = "full", decoder: nn.Module | str | Path | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f"preview={mode!r} is unknown; use {', '.join(MODES[:-1])} or {MODES[-1]}")
        wants = mode in ("tiny", "auto")
        if decoder is not None and not wants:
            raise ValueError(f"preview={mode!r} takes no preview_decoder; use preview='tiny' or leave it out")
        self.mode, self.decoder = mode, None
        self.name, self.vae = _vae(pipe)
        if wants:
            self.decoder = _load_decoder(self._beside() if decoder is None else decoder, self.vae)
        if self.decoder is not None:
            _check_fit(self.decoder, self.vae, type(pipe).__name__)
        elif mode == "tiny":
            raise ValueError(
                "preview='tiny' needs a decoder: pass preview_decoder=, such as "
                "AutoencoderTiny.from_pretrained('madebyollin/taesdxl'), or use preview='linear', which needs none"
            )
        self.learned = None

    def _beside(self) -> Path | None:
        source = getattr(getattr(self.vae, "config", None), "_name_or_path", "")
        folder = Path(source).parent / BESIDE
        return folder if source and folder.is_dir() else None

    @property
    def learned(self) -> dict[str, Any]:
        """What this run found out so far, JSON-able; ``None`` begins another run.

        Raises:
            ValueError: set to what was found in another mode.
        """
        maps = {name: known.as_dict() for name, known in self.maps.items()}
        return {"mode": self.mode, "agreement": self.agreement, "fitted": self.fitted, "maps": maps}

    @learned.setter
    def learned(self, saved: Mapping[str, Any] | None) -> None:
        saved = saved or {"mode": self.mode, "agreement": None, "fitted": False, "maps": {}}
        if saved["mode"] != self.mode:
            raise ValueError(f"this run began with preview={saved['mode']!r}; go on with it, not with {self.mode!r}")
        self.agreement, self.fitted = saved["agreement"], saved["fitted"]
        self.maps = {name: LinearMap.from_dict(known) for name, known in saved["maps"].items()}

    def in_full(self) -> PreviewDecoder:
        """The same of mode ``"full"``."""
        made = copy.copy(self)
        made.mode, made.decoder, made.learned = "full", None, None
        return made

    # --- which decoder ---

    def choose(self) -> str:
        """For all previews of a population at once, so that it does not hang on how their rows are split."""
        if self.mode == "linear":
            self.fitted = self.fitted or any(known.enough for known in self.maps.values())
        return self.settled("linear" if self.mode == "linear" else "tiny")

    def settled(self, kind: str) -> str:
        """The choice, after the first preview was compared; full where this run lacks what the choice needs."""
        refused = self.mode == "auto" and self.agreement is not None and not self.agreement >= FITS
        usable = {"tiny": self.decoder is not None and not refused, "linear": self.fitted}
        return kind if usable.get(kind) else "full"

    def unproved(self, kind: str) -> bool:
        """Whether a first preview has to be decoded as ``"compare"`` before others as ``kind``."""
        return self.settled(kind) == "tiny" and self.agreement is None

    def decode(self, kind: str, seen: list[tuple[str, LinearMap]]) -> Decode | None:
        """What answers calls of ``decode``: ``kind`` is a choice, or ``"compare"``; ``None`` leaves them alone.

        What there is to learn from the answers goes to ``seen``; pass it to :meth:`learn` once they were of use.
        """
        if kind == "full" and self.mode == "linear" and not self.fitted:
            return lambda name, real, args, kwargs: self._watched(seen, name, real, args, kwargs)
        return {"linear": self._linear, "tiny": self._tiny, "compare": self._compared}.get(kind)

    def learn(self, seen: list[tuple[str, LinearMap]]) -> None:
        """Take pictures that were decoded in full to what a linear map is fitted on."""
        for name, found in seen:
            self.maps[name] = self.maps[name] + found if name in self.maps else found

    # --- answers ---

    def _watched(self, seen: list, name: str, real: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        output = real(*args, **kwargs)
        latents, picture = _latents(args, kwargs), _picture(output)
        scale = Scale.between(latents, picture)
        if scale is not None:  # one by one, so that the sum is the same however pictures are split over calls
            seen += [(name, LinearMap.of(*pair, scale)) for pair in zip(latents, picture, strict=True)]
        return output

    def _linear(self, name: str, real: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        known = self.maps.get(name)
        return real(*args, **kwargs) if known is None else _answer(known(_latents(args, kwargs)), kwargs)

    def _tiny(self, name: str, real: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        return _answer(self._cheap(_latents(args, kwargs)), kwargs) if name == self.name else real(*args, **kwargs)

    def _cheap(self, latents: Tensor) -> Tensor:
        first, config = next(self.decoder.parameters()), self.decoder.config
        if first.device != latents.device:
            self.decoder.to(latents.device)
        scale, shift = getattr(config, "scaling_factor", None), getattr(config, "shift_factor", None)
        own = _normalised(latents, self.vae) / (scale or 1.0) + (shift or 0.0)
        return self.decoder.decode(own.to(first.dtype)).sample.to(latents.dtype)

    def _compared(self, name: str, real: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        output = real(*args, **kwargs)
        if name == self.name:
            self._judge(_picture(output), self._cheap(_latents(args, kwargs)))
        return output

    def _judge(self, full: Tensor, tiny: Tensor) -> None:
        self.agreement, why = -1.0, f"is of shape {tuple(tiny.shape)}, not {tuple(full.shape)}, as"
        if full.shape == tiny.shape:
            both = torch.stack([full, tiny]).float().clamp(-1, 1).flatten(1)
            self.agreement = float(torch.corrcoef(both)[0, 1].nan_to_num(-1.0))  # NaN, of a plain picture, is no JSON
            why = f"correlates {self.agreement:.2f} with"
        if self.agreement >= FITS:
            return
        then = "previews are decoded in full" if self.mode == "auto" else "its previews may mislead the search"
        warnings.warn(
            f"what {type(self.decoder).__name__} makes of the first preview {why} what {type(self.vae).__name__} makes "
            f"of it, so {then}; give a preview_decoder made for this model, or use preview='linear'",
            stacklevel=2,
        )


# --- tiny decoders --------------------------------------------------------------------------------------------


def _load_decoder(source: nn.Module | str | Path | None, vae: Any) -> nn.Module | None:
    """A tiny decoder in the precision of ``vae``; modules pass as they are.

    Raises:
        ValueError: no decoder, or one that cannot be loaded.
        FileNotFoundError: a file that does not exist.
    """
    if source is None or isinstance(source, nn.Module):
        return source
    if Path(source).suffix in (".safetensors", ".pth"):
        made = TinyVideoDecoder.from_file(source)
    else:
        made = _load_folder(source)
    return made.to(getattr(vae, "dtype", torch.float32)).eval().requires_grad_(False)


def _load_folder(source: str | Path) -> AutoencoderTiny:
    try:
        kind = AutoencoderTiny.load_config(source).get("_class_name")
        if kind != "AutoencoderTiny":
            raise ValueError(f"it holds a {kind}")
        made, info = AutoencoderTiny.from_pretrained(source, use_safetensors=True, output_loading_info=True)
        lacking = [k for k in info["missing_keys"] if k.startswith("decoder.")]
        if lacking:
            raise ValueError(f"its weights lack {lacking[:3]}")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"preview_decoder={str(source)!r} could not be loaded ({reason}); give a folder or hub id of an "
            "AutoencoderTiny, or a .safetensors or .pth file in TAEHV's layout"
        ) from error
    return made


def _vae(pipe: Any) -> tuple[str, Any]:
    """The component that turns latents into pictures, and its name."""
    modules = {k: m for k, m in components(pipe).items() if isinstance(m, nn.Module)}
    able = {k: m for k, m in modules.items() if hasattr(m, "encode") and hasattr(m, "decode")}
    if "vae" in able:
        return "vae", able["vae"]
    return next(iter(able.items())) if len(able) == 1 else ("", None)


def _check_fit(decoder: nn.Module, vae: Any, pipe: str) -> None:
    """Refuse a decoder of other latents, before anything runs."""
    remedy = "give the one made for this model (taesdxl, taef1, taew2_1 ...), or use preview='linear'"
    takes, kind = _channels(decoder), type(decoder).__name__
    if takes is None or not hasattr(decoder, "decode"):
        raise ValueError(f"preview_decoder is a {kind}; give an AutoencoderTiny or a TinyVideoDecoder")
    if vae is None or isinstance(getattr(vae, "bn", None), nn.Module):
        what = "no single VAE" if vae is None else "latents normalised by the statistics of batches"
        raise ValueError(f"{pipe} has {what}, which no tiny decoder fits; use preview='linear' or 'full'")
    given, name = _channels(vae), type(vae).__name__
    if given is not None and takes != given:
        raise ValueError(f"{kind} decodes {takes} latent channels, the {name} of this {pipe} has {given}; {remedy}")
    frames = _axes(vae) == 5
    if frames != isinstance(decoder, TinyVideoDecoder):
        kinds = ("images", "videos") if frames else ("videos", "images")
        raise ValueError(f"{kind} decodes {kinds[0]}, the {name} of this {pipe} {kinds[1]}; {remedy}")


def _channels(module: Any) -> int | None:
    config = getattr(module, "config", None)
    return next((getattr(config, n) for n in ("latent_channels", "z_dim") if getattr(config, n, None)), None)


def _axes(vae: Any) -> int | None:
    """Of the latents that a decoder takes: 4, or 5 with frames, as its first convolution has them."""
    weights = getattr(vae, "decoder", vae).parameters()
    return next((p.ndim for p in weights if p.ndim >= 4), None)


def _normalised(latents: Tensor, vae: Any) -> Tensor:
    """What ``vae.decode`` is given, as the denoiser knows it: of about unit variance, which tiny decoders expect."""
    buffers = dict(vae.named_buffers(recurse=False))  # where LTX keeps its own

    def constant(name: str, otherwise: float) -> Tensor:
        value = getattr(vae.config, name, None)
        value = buffers.get(name, otherwise) if value is None else value
        made = torch.as_tensor(value).to(latents.device, torch.float32)
        return made.reshape(-1, *[1] * (latents.ndim - 2))

    centre = constant("latents_mean", 0.0) + constant("shift_factor", 0.0)
    return (latents.float() - centre) * constant("scaling_factor", 1.0) / constant("latents_std", 1.0)


# --- the linear map -------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """How many times larger pictures are than latents; ``causal`` where the first latent frame gives one picture."""

    space: int
    time: int = 1
    causal: bool = False

    @classmethod
    def between(cls, latents: Tensor, picture: Tensor) -> Scale | None:
        """``None`` where they are not related like that."""
        if latents.ndim not in (4, 5) or picture.ndim != latents.ndim:
            return None
        ratios = {large / small for small, large in zip(latents.shape[-2:], picture.shape[-2:], strict=True)}
        space = ratios.pop()
        if ratios or not space.is_integer() or space < 1:
            return None
        if latents.ndim == 4:
            return cls(int(space))
        few, many = latents.shape[2], picture.shape[2]
        ratios = [(many / few, False)] + ([((many - 1) / (few - 1), True)] if few > 1 else [])
        # 9 frames of 3 may be three of each, or four of each but the first: decoders double, so powers of 2
        fits = [(int(r), causal) for r, causal in ratios if r >= 1 and r.is_integer() and int(r).bit_count() == 1]
        return cls(int(space), *fits[0]) if fits else None

    def shrink(self, picture: Tensor) -> Tensor:
        """Means over the pixels and frames of each latent position."""
        if picture.ndim == 4:
            return F.avg_pool2d(picture, self.space)
        if self.causal:
            picture = torch.cat([picture[:, :, :1]] * (self.time - 1) + [picture], 2)
        return F.avg_pool3d(picture, (self.time, self.space, self.space))

    def enlarge(self, colours: Tensor) -> Tensor:
        """Bilinear in space, constant in time; the inverse in shape."""
        if colours.ndim == 4:
            return F.interpolate(colours, scale_factor=self.space, mode="bilinear")
        frames = colours.repeat_interleave(self.time, 2)[:, :, (self.time - 1) * self.causal :]
        large = F.interpolate(frames.transpose(1, 2).flatten(0, 1), scale_factor=self.space, mode="bilinear")
        return large.unflatten(0, (len(colours), -1)).transpose(1, 2)


@dataclass(frozen=True)
class LinearMap:
    """Least squares from latent channels to colours, position by position.

    Args:
        normal: (C + 1, C + 1 + K) float64, sums over positions of x xᵀ and x yᵀ, where x is a latent and a 1 and y the
            mean colour of its pixels: sums over pictures, so that no picture has to be kept.
        scale: of the decoder.
    """

    normal: Tensor
    scale: Scale

    @classmethod
    def of(cls, latents: Tensor, picture: Tensor, scale: Scale) -> LinearMap:
        """From one picture (K, ...) and its latents (C, ...); nothing, where they are not finite."""
        inputs = torch.cat([latents.float(), torch.ones_like(latents[:1]).float()]).flatten(1).cpu().double()
        colours = scale.shrink(picture[None].float())[0].flatten(1).cpu().double()
        normal = inputs @ torch.cat([inputs, colours]).T
        return cls(normal if normal.isfinite().all() else torch.zeros_like(normal), scale)

    def __add__(self, other: LinearMap) -> LinearMap:
        return LinearMap(self.normal + other.normal, self.scale)

    @property
    def enough(self) -> bool:
        """Whether many more positions than unknowns were seen."""
        unknowns = len(self.normal)
        return bool(self.normal[-1, unknowns - 1] >= ENOUGH * unknowns)

    @property
    def weights(self) -> Tensor:
        """(C + 1, K) float64, the last row the constant."""
        unknowns = len(self.normal)
        gram, cross = self.normal[:, :unknowns], self.normal[:, unknowns:]
        ridge = 1e-6 * gram.diagonal().mean()  # channels that never vary
        return torch.linalg.solve(gram + ridge * torch.eye(unknowns, dtype=torch.float64), cross)

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures (N, K, ...) as large as the decoder's own."""
        weights = self.weights.to(torch.float32).to(latents.device)
        colours = torch.einsum("nc...,ck->nk...", latents.float(), weights[:-1])
        constant = weights[-1].reshape(-1, *[1] * (latents.ndim - 2))
        return self.scale.enlarge(colours + constant).to(latents.dtype)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"normal": self.normal.tolist(), "scale": list(self.scale)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> LinearMap:
        return cls(torch.tensor(saved["normal"], dtype=torch.float64), Scale(*saved["scale"]))


# --- the call of decode ---------------------------------------------------------------------------------------


def _latents(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v))


def _picture(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output["sample"]


def _answer(picture: Tensor, kwargs: Mapping[str, Any]) -> Any:
    return DecoderOutput(sample=picture) if kwargs.get("return_dict", True) else (picture,)
