"""Command-line options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import os
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visearch.pipelines import MODELS
from visearch.rewards import REWARDS

__all__ = [
    "REWARD",
    "STOPS",
    "add_command",
    "budget_arguments",
    "device_of",
    "dtype_of",
    "load",
    "model_arguments",
    "one_line",
    "preview_arguments",
    "reward_arguments",
    "stop_arguments",
]

REWARD = "emoji-clip"  # guides where none is named
STOPS = ("target", "patience", "min_gain")  # limits that end a prompt's candidates


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    examples: str = "",
) -> argparse.ArgumentParser:
    """Add ``visearch NAME`` to what ``add_subparsers`` gave; ``run`` takes its options and returns the exit status."""
    parser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, shutil.get_terminal_size().columns - 2),  # as argparse fills the rest
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def model_arguments(parser: argparse.ArgumentParser, default: str | None = "emoji-64") -> Any:
    """The model and the arguments of its call; returns their group."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default=default,
        metavar="NAME|PATH|HUB_ID",
        help=f"{', '.join(MODELS)}, a folder, or a hub id of a diffusers pipeline"
        + f" (default {default})" * bool(default),
    )
    model.add_argument("--steps", type=int, metavar="K", help="inference steps (default: the model's)")
    model.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: the model's)")
    model.add_argument("--negative-prompt", metavar="TEXT")
    model.add_argument("--height", type=int)
    model.add_argument("--width", type=int)
    model.add_argument("--device", help="cpu, cuda, mps ... (default: the best there is)")
    model.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: float32 on cpu)")
    model.add_argument("--offload", choices=["model", "sequential"], help="keep weights on the CPU between uses")
    model.add_argument("--rows", type=int, metavar="B", help="most candidates in one model call")
    return model


def preview_arguments(parser: Any) -> None:
    """``--preview`` and ``--preview-decoder``; ``parser`` may be a group of one."""
    parser.add_argument(
        "--preview",
        choices=["full", "auto", "tiny", "linear"],
        default="full",
        help="what decodes previews of unfinished candidates: the model's own VAE, a tiny decoder, a linear map fitted "
        "on this run's first images, or (auto) a tiny decoder that agrees with the VAE (default %(default)s)",
    )
    parser.add_argument(
        "--preview-decoder",
        metavar="PATH|HUB_ID",
        help="a folder or hub id of an AutoencoderTiny (TAESD), or a .safetensors or .pth file in TAEHV's layout "
        "(default: the folder vae_tiny beside the model's vae)",
    )


def reward_arguments(parser: Any, several: bool = False) -> None:
    """``--reward`` and ``--held-out``; ``parser`` may be a group of one.

    Args:
        several: rewards guide in turn: ``--reward`` may be repeated, and is ``None`` where it is not given;
            ``--held-out`` takes several names at once.
    """
    parser.add_argument(
        "--reward",
        metavar="NAME",
        help=f"guides: {', '.join(REWARDS)}, NAME:FOLDER with its weights, open-clip:MODEL/PRETRAINED, "
        "noise-aware:FOLDER, package.module:Name, or several as in 'a + 0.5 * b' or "
        f"'average-rank(a, b)'{'; repeated: one after the other' * several} (default {REWARD})",
        **({"action": "append"} if several else {"action": _Once, "default": REWARD}),
    )
    parser.add_argument(
        "--held-out",
        default=[],
        metavar="NAME",
        help="judges without guiding: a reward of another family than the guide's; may be repeated",
        **({"action": "extend", "nargs": "+"} if several else {"action": "append"}),
    )


class _Once(argparse.Action):
    """Refuses a second value, which would silently be the only one."""

    def __call__(self, parser: Any, options: argparse.Namespace, value: Any, flag: str | None = None) -> None:
        if getattr(options, self.dest) is not self.default:
            parser.error(f"{flag} is given twice; join them in one text, 'a + 0.5 * b' or 'average-rank(a, b)'")
        setattr(options, self.dest, value)


def budget_arguments(parser: argparse.ArgumentParser) -> None:
    """The limits of :class:`visearch.budget.Budget`."""
    limits = parser.add_argument_group("budget")
    limits.add_argument("--max-nfe", type=int, metavar="N", help="most model rows, both guidance branches counted")
    limits.add_argument("--max-images", type=float, metavar="N", help="most images, unfinished ones by their share")
    limits.add_argument("--max-seconds", type=float, metavar="S", help="most seconds; overrun by at most one operation")
    stop_arguments(limits)
    limits.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="most bytes beyond the weights, such as 8GiB: batches are cut to fit (default: 0.9 of a free CUDA device)",
    )


def stop_arguments(parser: Any) -> None:
    """When a prompt gets no more candidates; ``parser`` may be a group of one."""
    parser.add_argument("--target", type=float, metavar="R", help="stop once a finished candidate scores this much")
    parser.add_argument("--patience", type=int, metavar="K", help="stop after K finished candidates without a new best")
    parser.add_argument(
        "--min-gain", type=float, metavar="R", help="stop once one more candidate is expected to gain less than R"
    )


def device_of(name: str | None) -> str:
    import torch

    if name is None:
        cuda = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"  # one for each process
        return cuda if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not available here ({one_line(error)}); use --device cpu") from error
    return name


def dtype_of(name: str | None, device: str) -> str:
    return name or ("float32" if device == "cpu" else "float16")


def load(options: argparse.Namespace, device: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline on its device, and the arguments of its call."""
    import torch

    dtype = getattr(torch, dtype_of(options.dtype, device))
    call: dict[str, Any] = {}
    if options.model in MODELS:
        from visearch.pipelines import emoji

        pipe = MODELS.load(options.model)(dtype=dtype)
        call |= emoji.CALLS[options.model]
    else:
        pipe = _load_diffusers(options.model, dtype)
    if options.offload and device == "cpu":
        raise ValueError(f"--offload {options.offload} needs an accelerator; leave it out on the CPU")
    if options.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif options.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    given = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative_prompt,
        "height": options.height,
        "width": options.width,
    }
    return pipe, {**call, **{k: v for k, v in given.items() if v is not None}}


def _load_diffusers(model: str, dtype: Any) -> Any:
    from diffusers import DiffusionPipeline

    if not Path(model).is_dir() and "/" not in model:
        MODELS.load(model)  # says which names are near
    try:
        return DiffusionPipeline.from_pretrained(model, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"--model {model} could not be loaded ({one_line(error)}); give a folder or hub id of a diffusers "
            f"pipeline with safetensors weights, or one of: {', '.join(MODELS)}"
        ) from error


def one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
