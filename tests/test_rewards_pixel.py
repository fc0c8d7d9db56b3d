"""JPEG size and compressibility."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from visearch.rewards import check, resolve


def noise(side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_size_is_that_of_the_encoded_file():
    images = [noise(), Image.new("RGB", (32, 32), "teal"), noise(48)]
    expected = []
    for image in images:
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=95)
        expected.append(len(file.getvalue()) / 1000)
    sizes = resolve("jpeg-size").score(images, "whatever").values.tolist()
    assert sizes == pytest.approx(expected, rel=1e-6)
    assert sizes[2] > sizes[0] > sizes[1]
    negated = resolve("jpeg-compressibility").score(images, "whatever").values.tolist()
    assert negated == [-size for size in sizes]


@pytest.mark.parametrize("name", ["jpeg-size", "jpeg-compressibility"])
def test_they_keep_the_contract_of_rewards(name):
    check(name)
