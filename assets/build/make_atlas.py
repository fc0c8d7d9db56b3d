"""Rasterise the emoji sprites of emoji-64 into one RGBA atlas.

Sources are the SVG bodies in three npm packages: ``@iconify-json/noto`` (Apache-2.0),
``@iconify-json/fluent-emoji-flat`` (MIT) and ``@iconify-json/twemoji`` (CC-BY 4.0).

    npm install --prefix ICONS @iconify-json/noto @iconify-json/fluent-emoji-flat @iconify-json/twemoji
    python assets/build/make_atlas.py --icons ICONS/node_modules/@iconify-json
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

CELL = 48
STYLES = {"noto": "noto", "fluent": "fluent-emoji-flat", "twemoji": "twemoji"}
ICONS = {
    "apple": "red-apple",
    "boat": "sailboat",
    "book": "closed-book",
    "bus": "bus",
    "car": "automobile",
    "carrot": "carrot",
    "cell phone": "mobile-phone",
    "chair": "chair",
    "clock": "alarm-clock",
    "computer keyboard": "keyboard",
    "cow": "cow",
    "giraffe": "giraffe",
    "handbag": "handbag",
    "hot dog": "hot-dog",
    "laptop": "laptop",
    "orange": "tangerine",
    "pizza": "pizza",
    "potted plant": "potted-plant",
    "stop sign": "stop-sign",
    "suitcase": "luggage",
    "toilet": "toilet",
    "toothbrush": "toothbrush",
    "tv": "television",
    "wine glass": "wine-glass",
}


def rasterise(collection: dict, name: str) -> Image.Image:
    """The icon trimmed to its opaque pixels, longest side ``CELL``, centred in a ``CELL`` x ``CELL`` RGBA image."""
    icon = collection["icons"][name]
    width = icon.get("width", collection.get("width", 16))
    height = icon.get("height", collection.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    large = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=512, height=512)))).convert("RGBA")
    trimmed = large.crop(large.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox())
    scale = CELL / max(trimmed.size)
    size = tuple(max(1, round(side * scale)) for side in trimmed.size)
    # premultiplied, so that transparent pixels do not darken the rim
    sprite = trimmed.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(sprite, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True, help="folder with noto/, fluent-emoji-flat/, twemoji/")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "emoji-64")
    args = parser.parse_args()
    atlas = Image.new("RGBA", (CELL * len(ICONS), CELL * len(STYLES)))
    for row, folder in enumerate(STYLES.values()):
        collection = json.loads((args.icons / folder / "icons.json").read_text())
        for column, icon in enumerate(ICONS.values()):
            atlas.paste(rasterise(collection, icon), (CELL * column, CELL * row))
    pixels = np.asarray(atlas).copy()
    pixels[pixels[..., 3] == 0] = 0
    Image.fromarray(pixels).save(args.out / "atlas.png", optimize=True)
    index = {"cell": CELL, "columns": list(ICONS), "rows": list(STYLES), "icons": ICONS}
    (args.out / "atlas.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
