"""Decoder of the tiny video autoencoders: TAEHV's checkpoint layout, which Wan's, Qwen's, Hunyuan's and LTX's share.

Its convolutions see one frame at a time; what links frames is a memory of the frame before, at each depth, and layers
that grow one frame into two. So frame t hangs on latents up to its own, never on later ones.

Shapes: B = videos, f and F = frames of latents and of pictures, C = latent channels.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from math import isqrt, prod
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["TinyVideoDecoder"]

_GROWS = (7, 13, 19)  # places of the layers that multiply frames
_DEPTHS = (1, 8, 14, 20)  # of the convolutions that set the width of each depth


class TinyVideoDecoder(ModelMixin, ConfigMixin):
    """Latents (B, C, f, h, w) of about unit variance to videos (B, 3, F, H, W) in [-1, 1].

    H = 8 p h for a patch of p pixels; F = g (f - 1) + 1 where the layers of ``grow`` multiply frames by g in all.

    Args:
        latent_channels: C.
        channels: width of each of four depths.
        grow: frames that each frame becomes at the first three depths.
        patch: p, side of the block of pixels that the last layer gives for each position.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        channels: tuple[int, int, int, int] = (256, 128, 64, 64),
        grow: tuple[int, int, int] = (1, 2, 2),
        patch: int = 1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Bound(), _conv(latent_channels, channels[0]), nn.ReLU()]
        for width, following, frames in zip(channels, channels[1:], grow, strict=False):
            layers += [*(_Memory(width) for _ in range(3)), nn.Upsample(scale_factor=2), _Grow(width, frames)]
            layers.append(_conv(width, following, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(channels[-1], 3 * patch**2))

    def decode(self, z: Tensor) -> DecoderOutput:
        """The whole video at once, each layer on all frames."""
        x = z.transpose(1, 2).flatten(0, 1)
        for layer in self.decoder:
            x = layer(x, len(z)) if isinstance(layer, _Memory) else layer(x)
        frames = F.pixel_shuffle(x, self.config.patch).unflatten(0, (len(z), -1))
        # the first latent frame stands for one picture, and its other offspring are made from empty memories
        frames = frames[:, prod(self.config.grow) - 1 :]
        return DecoderOutput(sample=frames.clamp(0, 1).mul(2).sub(1).transpose(1, 2))

    @classmethod
    def from_file(cls, file: str | Path) -> TinyVideoDecoder:
        """Read a checkpoint, .safetensors or .pth; sizes come from the shapes of its tensors, its encoder is left out.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds other things than tensors, or tensors of another layout.
        """
        weights = {k: v for k, v in _tensors(Path(file)).items() if not k.startswith("encoder.")}
        places = [*(f"decoder.{i}.weight" for i in (*_DEPTHS, 22)), *(f"decoder.{i}.conv.weight" for i in _GROWS)]
        shapes = [weights[k].shape if k in weights else (0, 0) for k in places]
        widths, last, grows = shapes[:4], shapes[4], shapes[5:]
        missing, extra = [k for k in places if k not in weights], []
        if not missing:
            made = cls(
                latent_channels=widths[0][1],
                channels=tuple(shape[0] for shape in widths),
                grow=tuple(shape[0] // shape[1] for shape in grows),
                patch=isqrt(last[0] // 3),
            )
            own = made.state_dict()
            missing = [k for k, v in own.items() if k not in weights or weights[k].shape != v.shape]
            extra = [k for k in weights if k not in own]
        if missing or extra:
            raise ValueError(
                f"preview decoder {str(file)!r} has not the layout of TAEHV: missing or of another shape "
                f"{missing[:3]}, unknown {extra[:3]}; give a file such as taew2_1.safetensors, or a folder of an "
                "AutoencoderTiny"
            )
        made.load_state_dict(weights)
        return made.eval().requires_grad_(False)


def _tensors(file: Path) -> Mapping[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"preview decoder {str(file)!r} does not exist; give the path of its weights")
    try:
        made = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(f"preview decoder {str(file)!r} cannot be read as tensors alone: {error}") from error
    if not isinstance(made, Mapping) or not all(torch.is_tensor(v) for v in made.values()):
        raise ValueError(f"preview decoder {str(file)!r} holds other things than named tensors")
    return made


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class _Bound(nn.Module):
    """Latents within (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class _Memory(nn.Module):
    """A residual block that reads each frame together with the one before it; before the first is nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, videos: int) -> Tensor:
        frames = x.unflatten(0, (videos, -1))
        before = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], 1).flatten(0, 1)
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class _Grow(nn.Module):
    """Each frame becomes several."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])
