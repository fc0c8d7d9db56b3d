"""What a run leaves in its folder: the winner, the baseline, every candidate on one sheet, and result.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from visearch.journal import replace_text

__all__ = [
    "check_folder",
    "contact_sheet",
    "markdown_table",
    "side_by_side",
    "versions",
    "write_image",
    "write_json",
]

INK, PAPER, MUTED, ACCENT = "#1b1f24", "#ffffff", "#667085", "#0a7d4f"


def check_folder(folder: str | Path) -> Path:
    """Create the output folder and write to it once, before anything is computed.

    Raises:
        ValueError: it cannot be written; the message says why.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".visearch-{os.getpid()}"
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot write there ({error.strerror}); choose another folder") from error
    return folder


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; bars within cells are escaped."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def write_json(path: Path, content: Any) -> None:
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=True) + "\n")


def write_image(path: Path, image: Image.Image) -> None:
    part = path.with_suffix(".part")
    image.save(part, format="PNG")
    os.replace(part, path)


def versions() -> dict[str, str]:
    """Of everything that decides what a seed draws."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("visearch", "torch", "diffusers", "transformers", "open_clip_torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], title: str, marked: int = -1, columns: int = 4
) -> Image.Image:
    """All images on one sheet, each with a caption of up to two lines; number ``marked`` is framed."""
    side, gap, head, foot = 256, 16, 56, 48
    whole = gap + columns * (side + gap)
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    # a few images must not cut the title short
    width = max(gap + columns * (side + gap), min(whole, 2 * gap + round(_font(20).getlength(title)) + 1))
    sheet = Image.new("RGB", (width, head + lines * (side + foot + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), _shorten(draw, title, sheet.width - 2 * gap, _font(20)), INK, font=_font(20))
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * (side + gap), head + i // columns * (side + foot + gap)
        sheet.paste(_fit(image, side), (x, y))
        if i == marked:
            draw.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), outline=ACCENT, width=4)
        for j, line in enumerate(caption.split("\n")[:2]):
            ink = (ACCENT if i == marked else INK) if j == 0 else MUTED
            draw.text((x, y + side + 4 + 20 * j), _shorten(draw, line, side, _font(16)), ink, font=_font(16))
    return sheet


def side_by_side(rows: Sequence[tuple[str, Image.Image, str, Image.Image, str]]) -> Image.Image:
    """One line a prompt: title, then left image with caption beside right image with caption."""
    side, gap, head, foot = 256, 24, 44, 36
    sheet = Image.new("RGB", (gap + len(rows) * (2 * side + 8 + gap), gap + head + side + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (title, left, left_caption, right, right_caption) in enumerate(rows):
        x, y = gap + i * (2 * side + 8 + gap), gap + head
        draw.text((x, gap), _shorten(draw, title, 2 * side, _font(20)), INK, font=_font(20))
        pairs = ((left, left_caption, MUTED), (right, right_caption, ACCENT))
        for j, (image, caption, ink) in enumerate(pairs):
            left_edge = x + j * (side + 8)
            sheet.paste(_fit(image, side), (left_edge, y))
            draw.text((left_edge, y + side + 6), _shorten(draw, caption, side, _font(16)), ink, font=_font(16))
    return sheet


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    small = image.convert("RGB").resize(tuple(max(1, round(s * scale)) for s in image.size), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), "#eef0f3")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def _shorten(draw: ImageDraw.ImageDraw, text: str, width: int, font: Any) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
