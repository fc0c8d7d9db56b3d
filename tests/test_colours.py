"""Who names GenEval's colours: what of an image it sees, what it is compared with, and which CLIPs are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from visearch import assets, geneval
from visearch.rewards.colours import ClipColors, clip_colors
from visearch.rewards.detection import Instance

BOX = (4.0, 6.0, 20.0, 30.0)


@pytest.fixture(scope="module")
def colors(quick_gelu_clip) -> ClipColors:
    return ClipColors(quick_gelu_clip)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def instance(seed: int = 0, box=BOX, masked: bool = True) -> Instance:
    mask = np.random.default_rng(seed).random((40, 32)) < 0.5
    return Instance(0, 0.9, box, mask if masked else None)


# --- what is seen -------------------------------------------------------------------------------------------------


def test_an_object_is_cut_out_of_a_flat_background(colors, image):
    one = instance()
    pixels = np.array(image)
    pixels[~one.mask] = 153
    assert np.array_equal(np.array(colors.cut_out(image, one)), pixels[6:30, 4:20])
    assert np.array_equal(np.array(colors.cut_out(image, instance(masked=False))), np.array(image)[6:30, 4:20])


def test_background_and_crop_are_options(quick_gelu_clip, image):
    one, pixels = instance(), np.array(image)
    kept = clip_colors("cpu", clip_model=quick_gelu_clip, bgcolor="original", crop="1")
    assert np.array_equal(np.array(kept.cut_out(image, one)), pixels[6:30, 4:20])
    whole = clip_colors("cpu", clip_model=quick_gelu_clip, bgcolor="red", crop="0")
    pixels[~one.mask] = (255, 0, 0)
    assert np.array_equal(np.array(whole.cut_out(image, one)), pixels)
    plain = clip_colors("cpu", clip_model=quick_gelu_clip)
    assert len({each.id for each in (kept, whole, plain)}) == 3, "verdicts of other options have another id"
    assert len({each.revision for each in (kept, whole, plain)}) == 1


# --- what is said -------------------------------------------------------------------------------------------------


def test_the_nearest_of_ten_mean_texts_is_named(quick_gelu_clip, colors, image):
    """Against open_clip's own transform and towers."""
    towers, transform = open_clip.create_model_from_pretrained(quick_gelu_clip)
    tokenizer, towers = open_clip.get_tokenizer(quick_gelu_clip), towers.eval()
    instances = [instance(seed, (x, 0.0, x + 14.0, 40.0)) for seed, x in enumerate((0.0, 5.0, 9.0, 18.0))]
    with torch.no_grad():
        texts = []
        for color in geneval.COLORS:
            prompts = [f"a photo of a {color} cow", f"a photo of a {color}-colored cow", f"a photo of a {color} object"]
            mean = F.normalize(towers.encode_text(tokenizer(prompts)), dim=-1).mean(0)
            texts.append(mean / mean.norm())
        crops = [transform(colors.cut_out(image, one)) for one in instances]
        logits = 100 * F.normalize(towers.encode_image(torch.stack(crops)), dim=-1) @ torch.stack(texts).T
    assert torch.allclose(colors._texts("cow"), torch.stack(texts), atol=1e-5)
    expected = [geneval.COLORS[index] for index in logits.argmax(1).tolist()]
    assert colors.classify(image, "cow", instances) == expected
    assert colors.classify(image, "cow", []) == []


def test_colours_of_plain_surfaces_are_told_apart(colors):
    """Weights that mean something: a wrong order of colours or templates would not pass."""
    whole = Instance(0, 0.9, (0.0, 0.0, 64.0, 64.0))
    named = {
        color: colors.classify(Image.new("RGB", (64, 64), color), "apple", [whole])[0] for color in ("red", "blue")
    }
    assert len(set(named.values())) == 2


# --- which model --------------------------------------------------------------------------------------------------


def test_clips_with_gelu_are_refused(tmp_path):
    """Upstream's name of the model, and any other way to one."""
    with pytest.raises(ValueError, match="give 'ViT-L-14-quickgelu'"):
        clip_colors("cpu", clip_model="ViT-L-14")
    with pytest.raises(ValueError, match=r"has GELU.*give ViT-L-14-quickgelu"):
        ClipColors(f"local-dir:{assets.path('emoji-64/clip')}")


def test_a_file_of_weights_may_be_given(tmp_path, monkeypatch):
    """Without a hub."""
    asked = []

    def load(model, pretrained):
        asked.append((model, pretrained))
        raise ValueError("enough")

    monkeypatch.setattr("visearch.rewards.clip.open_clip_towers", load)
    for model in ("ViT-L-14-quickgelu", f"ViT-L-14-quickgelu/{tmp_path}/w.safetensors"):
        with pytest.raises(ValueError, match="enough"):
            clip_colors("cpu", clip_model=model)
    assert asked == [("ViT-L-14-quickgelu", "openai"), ("ViT-L-14-quickgelu", f"{tmp_path}/w.safetensors")]


def test_missing_weights_say_what_to_put_where(quick_gelu_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "open_clip.factory.download_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("offline"))
    )
    with pytest.raises(ValueError, match=r"download .* of timm/vit_large_patch14_clip_224\.openai.*-quickgelu/FILE"):
        clip_colors("cpu")
    shutil.copytree(Path(quick_gelu_clip.removeprefix("local-dir:")), tmp_path / "empty")
    (tmp_path / "empty" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights"):
        ClipColors(f"local-dir:{tmp_path}/empty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"color": "red"}, "--options color: the detector takes clip_model, bgcolor and crop"),
        ({"crop": "yes"}, "crop=yes: give 0 or 1"),
        ({"bgcolor": "greyish"}, "greyish"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(options, message, monkeypatch):
    monkeypatch.setattr("visearch.rewards.colours.OpenClipReward", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        clip_colors("cpu", **options)
