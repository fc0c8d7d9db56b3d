"""What all rewards share: forms of samples, chunks, failures, bad input, and weights that must fit."""

from __future__ import annotations

import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from visearch.protocols import Scores
from visearch.rewards.base import BaseReward, ModelReward
from visearch.rewards.images import to_pil, to_pixels
from visearch.rewards.loading import digest, load_strictly, locate, read_state

PIXELS = torch.randint(0, 256, (5, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Mean(BaseReward):
    """Mean of the pixels, plus the length of the prompt."""

    name = "mean"

    def __init__(self, batch_size: int | None = None) -> None:
        self.batch_size, self.chunks = batch_size, []

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor | Scores:
        self.chunks.append(len(images))
        return torch.stack([i.double().mean() + len(p) for i, p in zip(images, prompts)])


# --- samples --------------------------------------------------------------------------------------------------


@given(arrays(np.uint8, (2, 3, 4, 5)))
def test_a_tensor_and_the_image_made_of_it_are_the_same_pixels(array):
    pixels = torch.from_numpy(array)
    for form in (pixels, pixels.float() / 255, (pixels.float() / 255).half().double(), to_pil(pixels), list(pixels)):
        assert torch.equal(torch.stack(to_pixels(form)[0]), pixels)


def test_images_may_differ_in_size_and_form():
    image, other = Image.new("RGB", (8, 6), "red"), torch.zeros(3, 2, 2)
    first, second = to_pixels([image, other])[0]
    assert first.shape == (3, 6, 8) and second.shape == (3, 2, 2)
    assert first.float().mean((1, 2)).tolist() == [255, 0, 0]


def test_grey_becomes_three_channels_and_exif_turns():
    assert to_pixels(torch.full((1, 1, 2, 4), 0.2))[0][0].unique().tolist() == [51]
    assert to_pixels([Image.new("L", (4, 2), 51)])[0][0].shape == (3, 2, 4)
    image = Image.new("RGB", (4, 2))
    image.getexif()[0x0112] = 6
    assert to_pixels([image])[0][0].shape == (3, 4, 2)


def test_values_just_beyond_the_range_are_clamped():
    assert to_pixels(torch.tensor([-0.02, 1.02]).expand(1, 3, 1, 2))[0][0][0].tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("samples", "prompts", "message"),
    [
        (PIXELS, ["a"] * 4, "4 texts for 5 samples"),
        (PIXELS[:0], [], "samples is empty"),
        ([], [], "samples is empty"),
        (PIXELS.float() / 127.5 - 1, "a", r"from -1 to 0.992; give float in \[0, 1\]"),
        (PIXELS.float(), "a", "from 0 to 254; give float"),
        (PIXELS.int(), "a", "torch.int32"),
        (PIXELS[:, :2], "a", r"shape \(2, 9, 7\)"),
        (PIXELS[..., :0], "a", r"shape \(3, 9, 0\)"),
        (PIXELS[0], "a", r"shape \(9, 7\)"),
        (PIXELS[None], "a", "scores images, and samples holds videos"),
        ([[Image.new("RGB", (2, 2))]], "a", "scores images, and samples holds videos"),
    ],
)
def test_bad_input_is_refused_before_any_compute(samples, prompts, message):
    reward = Mean()
    with pytest.raises(ValueError, match=message):
        reward.score(samples, prompts)
    assert reward.chunks == []


@pytest.mark.parametrize("samples", [None, 3, "photo.png", [None], ["photo.png"], [np.zeros((2, 2, 3))], [[]]])
def test_what_is_no_image_is_refused(samples):
    with pytest.raises(TypeError, match=r"samples (is|holds) a"):
        Mean().score(samples, "a")


def test_a_video_reward_refuses_images():
    class Video(Mean):
        modality = "video"

    assert Video().score(PIXELS[None], "a").values.shape == (1,)
    with pytest.raises(ValueError, match="scores videos, and samples holds images"):
        Video().score(PIXELS, "a")


# --- chunks and failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "chunks"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_chunks_keep_order_and_prompts(size, chunks):
    reward, texts = Mean(size), ["", "a", "bb", "ccc", "dddd"]
    values = reward.score(PIXELS, texts).values
    assert reward.chunks == chunks
    expected = PIXELS.double().mean((1, 2, 3)) + torch.arange(5)
    assert torch.equal(values, expected.float())


def test_one_prompt_is_for_all():
    assert torch.equal(Mean().score(PIXELS, "abc").values, Mean().score(PIXELS, ["abc"] * 5).values)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_sample_that_is_no_picture_fails_alone(bad):
    samples = PIXELS.float() / 255
    samples[1, 2, 3, 4] = bad
    reward = Mean(2)
    scores = reward.score(samples, "a")
    assert scores.values.isnan().tolist() == [False, True, False, False, False]
    assert scores.reasons == {1: "the sample holds NaN or infinity"}
    others = [0, 2, 3, 4]
    assert torch.equal(scores.values[others], Mean().score(PIXELS[others], "a").values)
    assert reward.chunks == [2, 2]


def test_if_all_fail_nothing_is_computed():
    reward = Mean()
    assert reward.score(torch.full((2, 3, 4, 4), torch.nan), "a").values.isnan().all()
    assert reward.chunks == []


def test_reasons_and_components_belong_to_their_rows():
    class Parts(Mean):
        def _score(self, images, prompts):
            values = torch.tensor([torch.nan if p == "bad" else float(p) for p in prompts])
            failed = {i: "bad prompt" for i, p in enumerate(prompts) if p == "bad"}
            return Scores(values, {"twice": 2 * values}, failed)

    scores = Parts(2).score(PIXELS, ["1", "2", "3", "bad", "5"])
    assert scores.reasons == {3: "bad prompt"}
    assert scores.values.isnan().nonzero().tolist() == [[3]]
    assert scores.components["twice"].nan_to_num(-1).tolist() == [2, 4, 6, -1, 10]


def test_infinity_is_a_failure():
    class Infinite(Mean):
        def _score(self, images, prompts):
            return torch.tensor([1.0, torch.inf])

    scores = Infinite().score(PIXELS[:2], "a")
    assert scores.values.isnan().tolist() == [False, True]
    assert scores.reasons == {1: "the model gave no finite number"}


# --- models ---------------------------------------------------------------------------------------------------


class Scale(ModelReward):
    """Mean pixel times one weight."""

    name, source, size, files = "scale", "owner/scale", 1, ("scale.safetensors",)
    loads: ClassVar[list[str]] = []

    def _load(self) -> nn.Module:
        self.loads.append(self.source)
        module = nn.Linear(1, 1, bias=False)
        load_strictly(module, read_state(self.path / self.files[0]), self.name)
        return module.to(self.dtype)

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        means = torch.stack([image.float().mean() for image in images])
        return self.module(means[:, None].to(self.dtype))[:, 0]


@pytest.fixture
def folder(tmp_path):
    save_file({"weight": torch.full((1, 1), 2.0)}, tmp_path / "scale.safetensors")
    Scale.loads.clear()
    return tmp_path


@pytest.mark.parametrize("offload", ["none", "cpu", "lazy"])
def test_offload_changes_when_not_what(folder, offload):
    reward = Scale(folder, offload=offload)
    assert len(Scale.loads) == (offload != "lazy")
    expected = 2 * PIXELS.float().mean((1, 2, 3))
    assert torch.allclose(reward.score(PIXELS, "a").values, expected)
    assert len(Scale.loads) == 1
    assert not any(p.requires_grad for p in reward.module.parameters()) and not reward.module.training


@pytest.mark.parametrize(
    ("options", "message"),
    [({"offload": "disk"}, "offload='disk' is unknown"), ({"batch_size": 0}, "batch_size=0 must be at least 1")],
)
def test_bad_options_are_refused_before_loading(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Scale(folder, **options)
    assert Scale.loads == []


def test_equal_weights_have_one_revision_wherever_they_lie(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("renamed")
    (other / "scale.safetensors").write_bytes((folder / "scale.safetensors").read_bytes())
    assert Scale(folder).config_hash == Scale(other).config_hash
    assert Scale(folder).config_hash != Scale(folder, dtype=torch.bfloat16).config_hash
    save_file({"weight": torch.full((1, 1), 3.0)}, other / "scale.safetensors")
    assert Scale(folder).config_hash != Scale(other).config_hash


# --- weights --------------------------------------------------------------------------------------------------


def test_missing_weights_say_what_to_download_and_where_to_put_it(tmp_path):
    for model in (tmp_path, None):
        with pytest.raises(FileNotFoundError, match=r"scale\.safetensors of owner/scale into a folder and give model="):
            Scale(model)


def test_alternatives_are_taken_in_order_of_preference(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"old")
    assert locate(str(tmp_path), ("*.safetensors|*.bin",), needed_by="a") == tmp_path
    before = digest(tmp_path, ("*.safetensors|*.bin",))
    (tmp_path / "weights.safetensors").write_bytes(b"new")
    assert digest(tmp_path, ("*.safetensors|*.bin",)) != before
    with pytest.raises(FileNotFoundError, match=r"has no \*\.json; download"):
        locate(str(tmp_path), ("*.safetensors|*.bin", "*.json"), needed_by="a")


def test_one_file_is_not_taken_for_a_folder(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"")
    assert locate(str(file), ("*.pt",), needed_by="a") == file
    with pytest.raises(FileNotFoundError, match="one file and not enough"):
        locate(str(file), ("*.pt", "*.json"), needed_by="a")


class Code:
    """Unpickling it runs code."""

    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"weight": torch.zeros(1), "code": Code()}, tmp_path / "weights.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Code(), protocol=2))
    for name in ("weights.pt", "plain.pkl"):
        with pytest.raises(ValueError, match="loading it could run code"):
            read_state(tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["torn.safetensors", "torn.pt"])
def test_a_torn_file_is_named(folder, name):
    whole = folder / ("scale.safetensors" if name.endswith("safetensors") else "scale.pt")
    torch.save({"weight": torch.zeros(9)}, folder / "scale.pt")
    (folder / name).write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is no whole weight file"):
        read_state(folder / name)


def test_weights_must_fit_exactly():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    whole = module.state_dict()
    load_strictly(module, {**whole, "embeddings.position_ids": torch.arange(3)}, "a")
    with pytest.raises(ValueError, match=r"missing: 0\.bias; unknown: zero\.bias"):
        load_strictly(module, {**{k: v for k, v in whole.items() if k != "0.bias"}, "zero.bias": whole["0.bias"]}, "a")
    with pytest.raises(ValueError, match=r"another shape: 1\.weight \(1, 4\) for \(1, 3\)"):
        load_strictly(module, {**whole, "1.weight": torch.zeros(1, 4)}, "a")
    with pytest.raises(ValueError, match=r"unknown: k0, k1, k2, k3 and 5 more"):
        load_strictly(module, {**whole, **{f"k{i}": torch.zeros(1) for i in range(9)}}, "a")
