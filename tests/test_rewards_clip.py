"""CLIPScore, PickScore, HPSv2, the aesthetic predictor and SigLIP 2: real classes at tiny random size, loaded from
folders, against formulas that are written out here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny.parts import clip_tokenizer
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from visearch.rewards import AestheticV2, CLIPScore, HPSv2, PickScore, SigLIP2, check, resolve
from visearch.rewards.encoders import check_quick_gelu, open_clip_preprocess
from visearch.rewards.heads import linear_head
from visearch.rewards.images import to_pil
from visearch.rewards.loading import load_strictly
from visearch.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, _resize, resize

SIDE, PATCH, WIDTH = 32, 8, 32
TOWER = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**TOWER, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
VISION = {**TOWER, "image_size": SIDE, "patch_size": PATCH}
PROMPTS = ["a red cat", "two cows", "a car left of a cat", "green", "a photo of three blue cars"]
# wide, high and square ones, an odd difference of sides among them
SHAPES = [(48, 64), (67, 41), (32, 32), (33, 50), (20, 21)]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Smooth random pictures, each of another shape."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)) for _ in SHAPES]
    return [image.resize((width, height), Image.Resampling.BICUBIC) for image, (height, width) in zip(coarse, SHAPES)]


# --- tiny checkpoints -----------------------------------------------------------------------------------------


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights at which features of different images differ much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
            elif "norm" not in name and weight.ndim:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def save_clip(folder: Path, activation: str = "quick_gelu", seed: int = 0) -> Path:
    act = {"hidden_act": activation}
    model = lively(CLIPModel(CLIPConfig(text_config=TEXT | act, vision_config=VISION | act, projection_dim=16)), seed)
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder


def save_head(folder: Path, width: int) -> Path:
    state = lively(linear_head(width), 1).state_dict()
    torch.save({f"layers.{k}": v for k, v in state.items()}, folder / AestheticV2.files[0])
    return folder


def save_siglip(folder: Path, naflex: bool = False, ended: bool = True) -> Path:
    text = {**TOWER, "vocab_size": 40, "projection_size": WIDTH, "max_position_embeddings": 24}
    if naflex:
        vision = {**TOWER, "num_patches": 16, "patch_size": PATCH}
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
        processor = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=16)
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
        half, size = [0.5] * 3, {"height": SIDE, "width": SIDE}
        processor = SiglipImageProcessorPil(size=size, resample=2, image_mean=half, image_std=half)
    with torch.no_grad():
        lively(model).logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-2.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    Siglip2Tokenizer(vocab=vocabulary, merges=[], add_eos_token=ended).save_pretrained(folder)
    return folder


class TinyHPS(HPSv2):
    architecture: ClassVar[str] = "tiny-hps"


@pytest.fixture(scope="module")
def hps_model(tmp_path_factory) -> nn.Module:
    """Registered with open_clip under the name that TinyHPS asks for."""
    folder = tmp_path_factory.mktemp("configs")
    vision = {"image_size": SIDE, "layers": 2, "width": WIDTH, "head_width": 8, "patch_size": PATCH}
    text = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return lively(open_clip.create_model("tiny-hps", load_weights=False))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, hps_model) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("openai", "laion", "hps", "siglip", "naflex")}
    save_head(save_clip(made["openai"]), 16)
    save_clip(made["laion"], "gelu")
    torch.save({"state_dict": hps_model.state_dict()}, made["hps"] / "HPS_v2.1_compressed.pt")
    save_siglip(made["siglip"])
    save_siglip(made["naflex"], naflex=True)
    return made


REWARDS = {
    "clip-score": (CLIPScore, "openai"),
    "pick-score": (PickScore, "laion"),
    "hps-v2.1": (TinyHPS, "hps"),
    "aesthetic": (AestheticV2, "openai"),
    "siglip2": (SigLIP2, "siglip"),
    "siglip2-naflex": (SigLIP2, "naflex"),
}


@pytest.fixture
def make(folders):
    """Builds a reward of this file by name."""

    def build(name: str, **options):
        kind, folder = REWARDS[name]
        return kind(folders[folder], **options)

    return build


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def clip_cosines(folder: Path, images: list[Image.Image], prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Cosines and image features by transformers' towers, one image and one text at a time."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), clip_tokenizer()
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    with torch.no_grad():
        seen = [model.vision_model(**processor(image, return_tensors="pt")).pooler_output for image in images]
        read = [model.text_model(tokenizer(p, return_tensors="pt").input_ids).pooler_output for p in prompts]
        image = unit(model.visual_projection(torch.cat(seen)))
        return (image * unit(model.text_projection(torch.cat(read)))).sum(-1), image


# --- each against its formula ---------------------------------------------------------------------------------


def test_clip_score(make, folders, images):
    cosine, _ = clip_cosines(folders["openai"], images, PROMPTS)
    assert cosine.max() - cosine.min() > 0.05
    expected = (100 * cosine).clamp(min=0)
    assert torch.allclose(make("clip-score").score(images, PROMPTS).values, expected, atol=1e-4, rtol=0)
    assert torch.allclose(make("clip-score", form="cosine").score(images, PROMPTS).values, cosine, atol=1e-6)
    cosine, _ = clip_cosines(folders["openai"], images, [f"A photo depicts {p}" for p in PROMPTS])
    values = make("clip-score", form="paper").score(images, PROMPTS).values
    assert torch.allclose(values, 2.5 * cosine.clamp(min=0), atol=1e-5)


def test_pick_score(make, folders, images):
    cosine, _ = clip_cosines(folders["laion"], images, PROMPTS)
    scale = math.exp(CLIPModel.from_pretrained(folders["laion"]).logit_scale.item())
    assert scale > 10
    assert torch.allclose(make("pick-score").score(images, PROMPTS).values, scale * cosine, atol=1e-4, rtol=1e-6)


def test_hps(make, hps_model, images):
    """Longest side to 32, no antialias, padding before the normalisation."""
    tokenizer, rows = open_clip.get_tokenizer("tiny-hps"), []
    for image, prompt in zip(images, PROMPTS):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        height, width = (round(side * SIDE / max(pixels.shape[-2:])) for side in pixels.shape[-2:])
        if (height, width) != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=False)
        square = torch.zeros(1, 3, SIDE, SIDE)
        top, left = (SIDE - height) // 2, (SIDE - width) // 2
        square[..., top : top + height, left : left + width] = pixels
        square = (square - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        with torch.no_grad():
            features = hps_model.encode_image(square), hps_model.encode_text(tokenizer([prompt]))
        rows.append((unit(features[0]) * unit(features[1])).sum())
    expected = torch.stack(rows)
    assert expected.max() - expected.min() > 0.05
    assert torch.allclose(make("hps-v2.1").score(images, PROMPTS).values, expected, atol=1e-6)
    assert (make("hps-v2.1", antialias=True).score(images, PROMPTS).values - expected).abs().max() > 1e-4


def test_aesthetic(make, folders, images):
    """A head without activations is one matrix."""
    state = torch.load(folders["openai"] / AestheticV2.files[0], weights_only=True)
    _, x = clip_cosines(folders["openai"], images, PROMPTS)
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    values = make("aesthetic").score(images, PROMPTS).values
    assert values.max() - values.min() > 0.01
    assert torch.allclose(values, x[:, 0], atol=1e-5)
    assert torch.equal(values, make("aesthetic").score(images, "anything else").values)


@pytest.mark.parametrize("name", ["siglip2", "siglip2-naflex"])
def test_siglip(make, folders, images, name):
    folder = folders[REWARDS[name][1]]
    kind, processing = (SiglipModel, SiglipImageProcessorPil)
    if "naflex" in name:
        kind, processing = (Siglip2Model, Siglip2ImageProcessorPil)
    model, processor = kind.from_pretrained(folder).eval(), processing.from_pretrained(folder)
    logits = []
    for image, prompt in zip(images, PROMPTS):
        letters = [5 if c == " " else 6 + ord(c) - ord("a") for c in prompt]
        ids = (letters[:23] + [1] + [0] * 24)[:24]  # end of text, then padding, on the right
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), **processor(image, return_tensors="pt"))
        logits.append(out.logits_per_image[0, 0])
    expected = torch.stack(logits)
    assert expected.max() - expected.min() > 0.1
    upper = [prompt.upper() for prompt in PROMPTS]
    with pytest.warns(UserWarning, match="not seen: 'ars'"):
        values = make(name).score(images, upper).values
    assert torch.allclose(values, expected.sigmoid(), atol=1e-6)
    assert torch.allclose(
        10 * make(name, form="cosine").score(images, [*PROMPTS[:4], "a"]).values[:4] - 2, expected[:4]
    )


@pytest.mark.parametrize(("cosine", "value"), [(-0.2, 0.0), (0.0, 0.0), (0.31, 31.0)])
def test_a_negative_cosine_is_clip_score_0(make, cosine, value):
    assert make("clip-score")._value(torch.tensor([cosine])).item() == pytest.approx(value)


def test_scale_and_bias_of_siglip(make):
    reward = make("siglip2")
    reward.encoder.scale, reward.encoder.bias = 10.0, -10.0
    assert reward._value(torch.ones(1)).item() == 0.5


# --- the contract ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_order_companions_chunks_and_forms_do_not_matter(make, images, name):
    reward = make(name)
    texts = [prompt[:20] for prompt in PROMPTS]
    reward.range = (-math.inf, math.inf)  # random weights rate outside of 1 to 10
    check(reward, images, texts, tolerance=1e-5)
    values = reward.score(images, texts).values
    for size in (1, 3):
        assert torch.allclose(make(name, batch_size=size).score(images, texts).values, values, atol=1e-5)
    squares = torch.stack([torch.from_numpy(np.array(image.resize((40, 36)))).permute(2, 0, 1) for image in images])
    expected = reward.score(to_pil(squares), texts).values
    for form in (squares, squares.float() / 255, list(squares)):
        assert torch.equal(reward.score(form, texts).values, expected)


@pytest.mark.parametrize("name", REWARDS)
def test_offload_and_lazy_loading_score_the_same(make, images, name):
    expected = make(name).score(images, "a cat").values
    for offload in ("cpu", "lazy"):
        assert torch.equal(make(name, offload=offload).score(images, "a cat").values, expected)


@pytest.mark.parametrize("name", REWARDS)
def test_features_are_of_length_1_and_of_the_image_alone(make, images, name):
    features = make(name).image_features(images)
    assert features.dtype == torch.float32 and len(features) == len(images)
    assert torch.allclose(features.norm(dim=-1), torch.ones(len(images)))
    assert torch.allclose(make(name).image_features(images[1:2]), features[1:2], atol=1e-5)


def test_config_hash_is_of_whatever_changes_a_score(make, folders, tmp_path):
    hashes = [
        make("clip-score").config_hash,
        make("clip-score", form="paper").config_hash,
        make("clip-score", dtype=torch.bfloat16).config_hash,
        CLIPScore(save_clip(tmp_path, seed=5)).config_hash,
        make("hps-v2.1").config_hash,
        make("hps-v2.1", antialias=True).config_hash,
        make("siglip2").config_hash,
        make("siglip2", form="cosine").config_hash,
        make("siglip2-naflex").config_hash,
        make("aesthetic").config_hash,
        AestheticV2(folders["openai"], encoder=tmp_path).config_hash,
    ]
    assert len(set(hashes)) == len(hashes)
    assert make("hps-v2.1").config_hash == hashes[4]


def test_half_precision_does_not_round_the_scale(make):
    assert make("pick-score", dtype=torch.bfloat16).encoder.scale == make("pick-score").encoder.scale


def test_by_name_with_a_folder(folders, images):
    reward = resolve(f"clip-score:{folders['openai']}")
    assert reward.name == "clip-score" and isinstance(reward, CLIPScore)
    reward = resolve({"class": "siglip2", "model": folders["siglip"], "form": "cosine"})
    assert reward.range == (-1, 1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (CLIPScore, {"form": "cos"}, "form='cos' is unknown; give one of torchmetrics, cosine, paper"),
        (SigLIP2, {"form": "logit"}, "form='logit' is unknown"),
        (HPSv2, {"version": "3"}, r"version='3' is unknown; give one of 2\.1, 2\.0"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind("nowhere", **options)


def test_a_long_prompt_is_warned_of_once_with_what_is_not_seen(make, images):
    reward = make("clip-score")
    long = "a" * 75 + "bcd"
    with pytest.warns(UserWarning, match="longer than the 77 tokens") as caught:
        reward.score(images, long)
        reward.score(images, long)
    assert len(caught) == 1 and str(caught[0].message).endswith("not seen: 'bcd'")


def test_a_tokenizer_that_does_not_end_texts_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="does not end a text as in training"):
        SigLIP2(save_siglip(tmp_path, ended=False))


def test_pick_score_takes_its_tokenizer_from_elsewhere(folders, tmp_path, images):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folders["laion"] / file).read_bytes())
    expected = PickScore(folders["laion"]).score(images, PROMPTS).values
    assert torch.equal(PickScore(tmp_path, tokenizer=folders["openai"]).score(images, PROMPTS).values, expected)
    with pytest.raises(FileNotFoundError, match=r"tokenizer=.*tokenizer\*\.json or vocab\.json"):
        PickScore(tmp_path)


# --- features that two rewards share --------------------------------------------------------------------------


@pytest.fixture
def counted(make, monkeypatch):
    """CLIPScore and the aesthetic predictor on one encoder, and how many images each of its forwards saw."""
    clip, aesthetic = make("clip-score"), make("aesthetic")
    assert clip.encoder is aesthetic.encoder
    clip.encoder._images.clear()  # of earlier tests
    seen, encode = [], clip.encoder.encode_images
    monkeypatch.setattr(
        clip.encoder, "encode_images", lambda pixel_values: seen.append(len(pixel_values)) or encode(pixel_values)
    )
    for reward in (clip, aesthetic):
        reward.score([Image.new("RGB", (4, 4))], "both are known from here on")
    seen.clear()
    return clip, aesthetic, seen


def test_an_image_is_encoded_once_for_both(counted, make, images):
    clip, aesthetic, seen = counted
    clip.score(images, PROMPTS)
    clip.batch_size = aesthetic.batch_size = 2
    assert torch.allclose(
        aesthetic.score(images, PROMPTS).values, make("aesthetic").score(images, PROMPTS).values, atol=1e-5
    )
    assert sum(seen[:1]) == 5
    seen.clear()
    aesthetic.score(images[:2], PROMPTS[:2])
    clip.score([images[1]], PROMPTS[:1])
    assert seen == [2]


def test_what_a_score_costs_does_not_hang_on_earlier_ones(counted, images):
    """Probes of memory and time, and checks of the order of scores, ask again for the same image."""
    clip, aesthetic, seen = counted
    for _ in range(3):
        clip.score(images[:1], "a")
    assert seen == [1, 1, 1]
    aesthetic.score(images[:1], "a")
    aesthetic.score(images[:1], "a")
    assert seen == [1, 1, 1, 1]


def test_features_of_changed_weights_are_not_passed_on(counted, images):
    clip, aesthetic, _ = counted
    expected = aesthetic.score(images, PROMPTS).values

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = clip.module

        def forward(self):
            return clip.score(images, PROMPTS).values

    plain = clip.score(images, PROMPTS).values
    weight = "module.model.visual_projection.weight"
    other = functional_call(Call(), {weight: -clip.encoder.model.visual_projection.weight}, ())
    assert not torch.allclose(other, plain)
    assert torch.allclose(aesthetic.score(images, PROMPTS).values, expected, atol=1e-5)


def test_one_changed_pixel_is_another_image(counted, images):
    clip, aesthetic, seen = counted
    pixels = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    clip.score(pixels, "a")
    pixels[0, 0, 0, 0] ^= 1
    aesthetic.score(pixels, "a")
    assert seen == [1, 1]


# --- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (48, 64)])
@pytest.mark.parametrize("name", ["pick-score", "hps-v2.1", "aesthetic", "siglip2"])
def test_gradients_to_images_are_those_of_finite_differences(make, name, shape):
    reward = make(name)
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.estimate([image], PROMPTS[:1]).sum(), image)
    step = 0.02 * gradient / gradient.norm()
    values = [reward.estimate([(image + way * step).detach().requires_grad_()], PROMPTS[:1]).item() for way in (1, -1)]
    torch.testing.assert_close((values[0] - values[1]) / 0.04, gradient.norm().item(), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["clip-score", "pick-score", "hps-v2.1", "aesthetic", "siglip2"])
def test_an_estimate_is_the_score(make, images, name):
    reward, pixels = make(name), [pil_to_tensor(image) for image in images]
    expected = reward.score(images, PROMPTS).values
    torch.testing.assert_close(reward.estimate(pixels, PROMPTS), expected)
    floats = [(image / 255).requires_grad_() for image in pixels]
    spread = (expected.max() - expected.min()).item()
    torch.testing.assert_close(reward.estimate(floats, PROMPTS).detach(), expected, rtol=0, atol=0.02 * spread)
    floats = [image.detach() + 0.4 / 255 for image in floats]  # rounded like those of ``score``
    torch.testing.assert_close(reward.estimate(floats, PROMPTS), expected)


def test_gradients_that_a_reward_has_not_are_refused(make):
    naflex, image = make("siglip2-naflex"), torch.rand(3, SIDE, SIDE)
    assert naflex.estimate([image], ["a"]).shape == (1,)
    with pytest.raises(ValueError, match="siglip2 has no gradient to its samples; give them detached, or use a CLIP"):
        naflex.estimate([image.requires_grad_()], ["a"])
    with pytest.raises(ValueError, match="2 texts for 1 samples"):
        naflex.estimate([image], ["a", "b"])


def test_features_with_gradients_are_not_passed_on(counted):
    """Shared, the graph of one reward would end up in another's."""
    clip, aesthetic, seen = counted
    image = torch.rand(3, SIDE, SIDE).requires_grad_()
    for reward in (clip, aesthetic):
        reward.estimate([image], ["a"])
    assert seen == [1, 1] and not any(row.requires_grad for row, _ in clip.encoder._images.values())


# --- activations ----------------------------------------------------------------------------------------------


def test_activations_matter_and_are_checked(folders, tmp_path, images):
    quick = CLIPScore(folders["openai"])
    (tmp_path / "config.json").write_text(
        (folders["openai"] / "config.json").read_text().replace('"quick_gelu"', '"gelu"')
    )
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folders["openai"] / file).read_bytes())
    save_head(tmp_path, 16)
    other = CLIPScore(tmp_path, activation="gelu").image_features(images)
    assert (other - quick.image_features(images)).abs().max() > 1e-4
    for kind in (CLIPScore, AestheticV2):
        with pytest.raises(ValueError, match="hidden_act is 'gelu' and these weights were trained with 'quick_gelu'"):
            kind(tmp_path)
    with pytest.raises(ValueError, match="trained with 'gelu'; set it to"):
        PickScore(folders["openai"])


def test_open_clip_weights_are_refused_under_another_activation():
    with pytest.raises(ValueError, match="give 'ViT-L-14-quickgelu'"):
        resolve("open-clip:ViT-L-14/openai")
    check_quick_gelu("ViT-L-14-quickgelu", "openai")
    check_quick_gelu("ViT-H-14", "laion2b_s32b_b79k")


# --- layouts of the published weights -------------------------------------------------------------------------


def clip_layout(text: tuple[int, int], vision: tuple[int, int], projected: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformers CLIP of 224 pixels and patches of 14; (width, layers) of each tower."""
    layout: dict[str, tuple[int, ...]] = {"logit_scale": ()}

    def linear(name: str, inputs: int, outputs: int) -> None:
        layout[f"{name}.weight"], layout[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        layout[f"{name}.weight"] = layout[f"{name}.bias"] = (width,)

    for tower, (width, layers) in (("text_model", text), ("vision_model", vision)):
        for i in range(layers):
            block = f"{tower}.encoder.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{block}.self_attn.{name}", width, width)
            linear(f"{block}.mlp.fc1", width, 4 * width)
            linear(f"{block}.mlp.fc2", 4 * width, width)
            norm(f"{block}.layer_norm1", width)
            norm(f"{block}.layer_norm2", width)
    layout["text_model.embeddings.token_embedding.weight"] = (49408, text[0])
    layout["text_model.embeddings.position_embedding.weight"] = (77, text[0])
    norm("text_model.final_layer_norm", text[0])
    layout["vision_model.embeddings.class_embedding"] = (vision[0],)
    layout["vision_model.embeddings.patch_embedding.weight"] = (vision[0], 3, 14, 14)
    layout["vision_model.embeddings.position_embedding.weight"] = (257, vision[0])
    norm("vision_model.pre_layrnorm", vision[0])
    norm("vision_model.post_layernorm", vision[0])
    layout["visual_projection.weight"] = (projected, vision[0])
    layout["text_projection.weight"] = (projected, text[0])
    return layout


POSITIONS = {"text_model.embeddings.position_ids": (1, 77), "vision_model.embeddings.position_ids": (1, 257)}


@pytest.mark.parametrize(
    ("text", "vision", "projected", "kind"),
    [((768, 12), (1024, 24), 768, CLIPScore), ((1024, 24), (1280, 32), 1024, PickScore)],
)
def test_published_clips_fit(text, vision, projected, kind):
    def tower(width: int, layers: int) -> dict[str, int]:
        heads = {"num_attention_heads": 16, "num_hidden_layers": layers}
        return {"hidden_size": width, "intermediate_size": 4 * width, **heads}

    layout = clip_layout(text, vision, projected)
    with torch.device("meta"):
        pixels = {"image_size": 224, "patch_size": 14}
        config = CLIPConfig(text_config=tower(*text), vision_config=tower(*vision) | pixels, projection_dim=projected)
        model = CLIPModel(config)
        state = {name: torch.empty(shape) for name, shape in (layout | POSITIONS).items()}
    load_strictly(model, state, "published")
    assert sum(math.prod(shape) for shape in layout.values()) == kind.size
    lost = state.pop("text_projection.weight")
    with pytest.raises(ValueError, match=r"missing: text_projection\.weight"):
        load_strictly(model, state, "published")
    with pytest.raises(ValueError, match=r"\(3, 3\) for"):
        load_strictly(model, state | {"text_projection.weight": lost.new_empty(3, 3)}, "published")


def test_the_clip_of_hps_has_686_tensors_and_plain_gelu():
    with torch.device("meta"):
        model = open_clip.create_model(HPSv2.architecture, load_weights=False, device="meta")
    assert len(model.state_dict()) == 686
    assert sum(p.numel() for p in model.parameters()) == HPSv2.size
    assert {type(m) for m in model.modules() if "GELU" in type(m).__name__} == {nn.GELU}
    assert model.visual.image_size == (224, 224)


def test_the_aesthetic_head_has_ten_tensors_and_no_activation():
    with torch.device("meta"):
        head = linear_head(768)
    shapes = [tuple(v.shape) for v in head.state_dict().values()]
    assert shapes == [(1024, 768), (1024,), (128, 1024), (128,), (64, 128), (64,), (16, 64), (16,), (1, 16), (1,)]
    assert {type(layer) for layer in head} == {nn.Linear, nn.Dropout}
    assert AestheticV2.size == CLIPScore.size + sum(math.prod(shape) for shape in shapes)


def test_checkpoints_that_do_not_fit_are_refused(folders, hps_model, tmp_path):
    state = hps_model.state_dict()
    state["another"] = state.pop("positional_embedding")
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"hps-v2\.1: .*missing: positional_embedding; unknown: another"):
        TinyHPS(tmp_path)
    torch.save(state, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"holds no 'state_dict'; give HPS_v2\.1_compressed\.pt of xswu/HPSv2"):
        TinyHPS(tmp_path)
    with pytest.raises(ValueError, match="aesthetic: weights of another shape"):
        save_head(tmp_path, 24)
        AestheticV2(tmp_path, encoder=folders["openai"])


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_transformers_checkpoint_that_does_not_fit_is_refused(folders, tmp_path, change):
    from safetensors.torch import load_file, save_file

    for file in folders["openai"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "model.safetensors")
    CLIPScore(tmp_path)
    if change == "missing":
        del state["visual_projection.weight"]
    else:
        state["vision_model.another.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors")
    named = "missing: visual_projection.weight" if change == "missing" else "unknown: vision_model.another.weight"
    with pytest.raises(ValueError, match=named):
        CLIPScore(tmp_path)


# --- pixels ---------------------------------------------------------------------------------------------------

sides = st.integers(1, 70)


@given(sides, sides, sides, sides, st.sampled_from(["bicubic", "bilinear"]), st.booleans(), st.integers(0, 2**32 - 1))
def test_resizing_on_an_accelerator_gives_pillows_bits(height, width, rows, columns, resample, extreme, seed):
    pixels = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(seed))
    pixels = (255 * (pixels > 127) if extreme else pixels).to(torch.uint8)
    # the float64 path of accelerators, run here on the CPU, against Pillow, which CPUs use
    assert torch.equal(_resize(pixels, rows, columns, resample), resize(pixels, rows, columns, resample))


@pytest.mark.parametrize("size", [(1024, 1024), (768, 1360)])
def test_full_size_images_too(size):
    pixels = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_resize(pixels, 224, 224, "bicubic"), resize(pixels, 224, 224, "bicubic"))


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_open_clips_transform(images, mode, interpolation):
    config = {"size": SIDE, "mode": "RGB", "mean": CLIP_MEAN, "std": CLIP_STD, "fill_color": 7}
    config |= {"interpolation": interpolation, "resize_mode": mode}
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**config), is_train=False)
    expected = torch.stack([transform(image) for image in images])
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    assert torch.equal(open_clip_preprocess(config)(pixels), expected)


def test_pixels_are_those_of_the_pil_processor_of_clip(images):
    expected = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)(images, return_tensors="pt")
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    assert torch.allclose(Preprocess(SIDE)(pixels), expected.pixel_values, atol=1e-6)


def test_letterbox_of_hps():
    """448 x 224 becomes 224 x 112, with 56 rows above and below that are black before the normalisation."""
    pixels = torch.randint(0, 256, (3, 224, 448), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    square = Preprocess(224, "pad", antialias=False)([pixels])[0]
    black = torch.tensor([-1.7923, -1.7521, -1.4802])[:, None, None]
    for rows in (square[:, :56], square[:, -56:]):
        assert torch.allclose(rows, black.expand_as(rows), atol=1e-4)
    assert (square[:, 56:-56] != black).any(0).all()
    odd = Preprocess(224, "pad", antialias=False)([pixels[:, :223]])[0]
    assert torch.allclose(odd[:, :56], black, atol=1e-4) and torch.allclose(odd[:, -56:], black, atol=1e-4)


def test_an_odd_pixel_of_padding_goes_right_and_below():
    white = torch.full((3, 5, 8), 255, dtype=torch.uint8)
    for image, (left, above, right, below) in ((white, (0, 1, 0, 2)), (white.mT, (1, 0, 2, 0))):
        shown = Preprocess(8, "pad", mean=(0, 0, 0), std=(1, 1, 1), antialias=False)([image])[0, 0]
        assert torch.equal(shown, F.pad(torch.ones(8 - above - below, 8 - left - right), (left, right, above, below)))


@pytest.mark.parametrize(
    ("options", "message"), [({"fit": "squash"}, "fit='squash'"), ({"resample": "box"}, "resample='box'")]
)
def test_unknown_preprocessing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(8, **options)
