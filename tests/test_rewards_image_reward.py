"""ImageReward on tiny random weights in the published layout, against a forward pass written out here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms import v2

from visearch.rewards import check
from visearch.rewards.image_reward import LENGTH, BlipReward, ImageReward, from_published
from visearch.rewards.loading import load_strictly

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "in", "the", "red", "green", "blue", "cow",
    "square",
]  # fmt: skip
SIDE, PATCH, HEADS, DEPTH = 32, 8, 4, 2


VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    "image_size": SIDE, "patch_size": PATCH, "layer_norm_eps": 1e-6,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    "vocab_size": len(WORDS) + 2,
}  # fmt: skip


class Tiny(ImageReward):
    vision, text = VISION, TEXT


def layout(vision: dict, text: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ``ImageReward.pt`` for models of these sizes, as its authors' code has them."""
    v, m, t, k = vision["hidden_size"], vision["intermediate_size"], text["hidden_size"], text["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {}

    def both(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    shapes["blip.visual_encoder.cls_token"] = (1, 1, v)
    shapes["blip.visual_encoder.pos_embed"] = (1, patches + 1, v)
    both("blip.visual_encoder.patch_embed.proj", v, 3, vision["patch_size"], vision["patch_size"])
    for i in range(vision["num_hidden_layers"]):
        block = f"blip.visual_encoder.blocks.{i}"
        for name, shape in (("norm1", (v,)), ("attn.qkv", (3 * v, v)), ("attn.proj", (v, v)), ("norm2", (v,)),
                            ("mlp.fc1", (m, v)), ("mlp.fc2", (v, m))):  # fmt: skip
            both(f"{block}.{name}", *shape)
    both("blip.visual_encoder.norm", v)
    shapes["blip.text_encoder.embeddings.position_ids"] = (1, 512)
    shapes["blip.text_encoder.embeddings.word_embeddings.weight"] = (text["vocab_size"], t)
    shapes["blip.text_encoder.embeddings.position_embeddings.weight"] = (512, t)
    both("blip.text_encoder.embeddings.LayerNorm", t)
    for i in range(text["num_hidden_layers"]):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for attention, width in (("attention", t), ("crossattention", v)):
            both(f"{layer}.{attention}.self.query", t, t)
            both(f"{layer}.{attention}.self.key", t, width)
            both(f"{layer}.{attention}.self.value", t, width)
            both(f"{layer}.{attention}.output.dense", t, t)
            both(f"{layer}.{attention}.output.LayerNorm", t)
        both(f"{layer}.intermediate.dense", k, t)
        both(f"{layer}.output.dense", t, k)
        both(f"{layer}.output.LayerNorm", t)
    both("blip.vision_proj", 256, v)
    both("blip.text_proj", 256, t)
    for i, (outputs, inputs) in zip((0, 2, 4, 6, 7), ((1024, t), (128, 1024), (64, 128), (16, 64), (1, 16))):
        both(f"mlp.layers.{i}", outputs, inputs)
    return shapes


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    made = {n: 0.15 * torch.randn(s, generator=random) for n, s in layout(VISION, TEXT).items()}
    return {n: w + 1 if "norm" in n.lower() and n.endswith("weight") else w for n, w in made.items()}


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("image-reward")
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


@pytest.fixture(scope="module")
def reward(folder) -> ImageReward:
    return Tiny(folder)


def pictures(count: int = 3) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(count)]


def reference(w: dict[str, Tensor], image: Image.Image, words: list[str]) -> float:
    """The published formula, one sample at a time, without padding."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v))
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)

    clip = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    bicubic = v2.Resize(SIDE, interpolation=v2.InterpolationMode.BICUBIC)
    prepare = v2.Compose([bicubic, v2.CenterCrop(SIDE), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    pixels = v2.functional.normalize(prepare(image), **clip)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(pixels[None], w[f"{see}.patch_embed.proj.weight"], w[f"{see}.patch_embed.proj.bias"], PATCH)
    x = torch.cat([w[f"{see}.cls_token"][0], patches[0].flatten(1).T]) + w[f"{see}.pos_embed"][0]
    for i in range(DEPTH):
        block = f"{see}.blocks.{i}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    x = norm(f"{see}.norm", x, 1e-6)

    ids = torch.tensor([WORDS.index(word) for word in ("[CLS]", *words, "[SEP]")])
    words_, places = (w[f"{read}.embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
    h = norm(f"{read}.embeddings.LayerNorm", words_[ids] + places[: len(ids)], 1e-12)
    for i in range(DEPTH):
        layer = f"{read}.encoder.layer.{i}"
        for attention, source in (("attention", None), ("crossattention", x)):
            own = f"{layer}.{attention}"
            k, v = (linear(f"{own}.self.{part}", h if source is None else source) for part in ("key", "value"))
            mixed = linear(f"{own}.output.dense", attend(linear(f"{own}.self.query", h), k, v))
            h = norm(f"{own}.output.LayerNorm", h + mixed, 1e-12)
        inner = F.gelu(linear(f"{layer}.intermediate.dense", h))
        h = norm(f"{layer}.output.LayerNorm", h + linear(f"{layer}.output.dense", inner), 1e-12)
    value = h[0]
    for i in (0, 2, 4, 6, 7):
        value = linear(f"mlp.layers.{i}", value)
    return (float(value) - 0.16717362830052426) / 1.0333394966054072


def test_scores_equal_the_published_formula(reward, weights):
    images, prompts = pictures(), ["a photo of a red cow", "Blue square", "green in the photo"]
    expected = [reference(weights, image, prompt.lower().split()) for image, prompt in zip(images, prompts)]
    scores = reward.score(images, prompts)
    assert scores.values.tolist() == pytest.approx(expected, abs=2e-6)
    assert max(expected) - min(expected) > 1e-2


def test_it_keeps_the_contract_of_rewards(reward):
    check(reward, tolerance=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_chunks_change_nothing(reward, folder, size):
    images = pictures()
    chunked = Tiny(folder, batch_size=size).score(images, "a red cow").values
    torch.testing.assert_close(chunked, reward.score(images, "a red cow").values, atol=1e-5, rtol=0)


def test_the_text_encoder_sees_the_whole_text_from_position_0(reward):
    """As a decoder, which is how transformers builds it, position 0 would see nothing of the text behind it."""
    patches = torch.randn(1, 17, VISION["hidden_size"], generator=torch.Generator().manual_seed(1))
    cow, square = (reward.tokenizer(f"a red {word}", return_tensors="pt") for word in ("cow", "square"))

    def first(tokens, is_decoder: bool) -> Tensor:
        text = reward.module.text(**tokens, encoder_hidden_states=patches, is_decoder=is_decoder)
        return text.last_hidden_state[:, 0]

    for tokens in (cow, square):
        del tokens["token_type_ids"]
    assert torch.equal(first(cow, is_decoder=True), first(square, is_decoder=True))
    assert not torch.allclose(first(cow, is_decoder=False), first(square, is_decoder=False), atol=1e-4)
    values = reward.score(pictures(1) * 2, ["a red cow", "a red square"]).values
    assert abs(values[0] - values[1]) > 1e-4


def test_padding_is_not_read(reward):
    pixels = reward.preprocess([torch.zeros(3, 40, 40, dtype=torch.uint8)])
    short = reward.tokenizer("a red cow", return_tensors="pt")
    long = reward.tokenizer("a red cow", return_tensors="pt", padding="max_length", max_length=LENGTH)
    values = [reward.module(pixels, tokens.input_ids, tokens.attention_mask) for tokens in (short, long)]
    torch.testing.assert_close(*values, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("value", "expected"), [(1.2005131249, 1.0), (0.1671736283, 0.0)])
def test_the_head_is_standardised(folder, value, expected):
    reward = Tiny(folder)
    with torch.no_grad():
        reward.module.head[-1].weight.zero_()
        reward.module.head[-1].bias.fill_(value)
    assert reward.score(pictures(1), "a cow").values.item() == pytest.approx(expected, abs=1e-6)


def test_the_full_model_takes_the_published_layout():
    shapes = layout(ImageReward.vision, ImageReward.text)
    assert shapes["blip.visual_encoder.pos_embed"] == (1, 197, 1024)
    assert shapes["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert shapes["blip.text_encoder.embeddings.word_embeddings.weight"] == (30524, 768)
    with torch.device("meta"):
        module = BlipReward()
        published = {name: torch.empty(shape) for name, shape in shapes.items()}
    load_strictly(module, from_published(published), "image-reward")
    assert (len(module.vision.state_dict()), len(module.text.state_dict()), len(module.head.state_dict())) == (
        294,
        316,
        10,
    )
    assert sum(p.numel() for p in module.parameters()) == ImageReward.size


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("mlp.layers.7.bias"), "missing: head.7.bias"),
        (lambda w: w.update({"blip.extra": torch.ones(1)}), "unknown: blip.extra"),
        (lambda w: w.update({"mlp.layers.0.weight": torch.ones(1024, 8)}), r"head.0.weight \(1024, 8\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(weights, folder, tmp_path, change, named):
    changed = dict(weights)
    change(changed)
    torch.save(changed, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=named):
        Tiny(tmp_path, tokenizer=folder)


def test_own_weights_load_from_safetensors(reward, folder, tmp_path):
    save_file(reward.module.state_dict(), tmp_path / "model.safetensors")
    again = Tiny(tmp_path, tokenizer=folder / "vocab.txt")
    assert torch.equal(again.score(pictures(), "a cow").values, reward.score(pictures(), "a cow").values)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer=.*vocab.txt.*tokenizer=FOLDER"):
        Tiny(folder, tokenizer=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ImageReward.pt"):
        Tiny(tmp_path, tokenizer=folder)
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "zebra"]))
    with pytest.raises(ValueError, match=rf"{len(WORDS) + 1} words, where the model knows {len(WORDS)}"):
        Tiny(folder, tokenizer=tmp_path)


def test_what_a_long_prompt_loses_is_said(reward):
    with pytest.warns(UserWarning, match=r"35 tokens .* not seen: 'blue cow'"):
        reward.score(pictures(1), "red " * 33 + "blue cow")


def test_every_linear_layer_can_be_trained(reward):
    module = BlipReward(VISION, TEXT).eval()
    module.load_state_dict(reward.module.state_dict())
    pixels, tokens = torch.rand(2, 3, SIDE, SIDE), reward.tokenizer(["a cow"] * 2, return_tensors="pt")
    module(pixels, tokens.input_ids, tokens.attention_mask).sum().backward()
    layers = {n: m for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(layers) == 4 * DEPTH + 10 * DEPTH + 5
    assert [name for name, layer in layers.items() if not layer.weight.grad.any()] == []


def test_half_precision_keeps_the_head_exact(folder, reward):
    half = Tiny(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.module.head.parameters()} == {torch.float32}
    assert {p.dtype for p in half.module.vision.parameters()} == {torch.bfloat16}
    assert half.config_hash != reward.config_hash
    torch.testing.assert_close(
        half.score(pictures(), "a cow").values, reward.score(pictures(), "a cow").values, atol=0.1, rtol=0
    )
