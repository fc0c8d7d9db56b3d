"""Previews by a cheaper decoder: what it is given, what it learns, how it is booked, and that results never see it."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
import torch.nn.functional as F
from contract.cases import PixelReward
from diffusers import AutoencoderKL, AutoencoderTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from visearch import Budget, Ledger, SearchPipeline, run_search
from visearch.memory import probe
from visearch.options import preview_arguments
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.previews import MODES, LinearMap, PreviewDecoder, Scale
from visearch.pipelines.taehv import TinyVideoDecoder
from visearch.protocols import Request
from visearch.search.successive_halving import SuccessiveHalving

CALL = {"num_inference_steps": 4, "height": 32, "width": 32}
HALVING = SuccessiveHalving(n=6, calls=(1, 2, 3), keep=(5, 4, 2), check_cost=0.0)
REQUEST = Request(("a photo of a cow",), seed=5)
SMALL = {"channels": (8, 8, 4, 4)}  # widths of a video decoder


def tiny_decoder(channels: int = 4, **options) -> AutoencoderTiny:
    """Twice as large as its latents, as the tiny pipelines' own decoders."""
    torch.manual_seed(1)
    return AutoencoderTiny(
        latent_channels=channels,
        decoder_block_out_channels=(8, 8),
        num_decoder_blocks=(1, 0),
        encoder_block_out_channels=(1,),
        num_encoder_blocks=(1,),
        **options,
    ).eval()


def previewed(pipe, mode: str = "full", decoder=None, **options) -> DiffusionSampler:
    return DiffusionSampler(pipe, CALL, previews=PreviewDecoder(pipe, mode, decoder), **options)


def begun(sampler: DiffusionSampler, rows: int = 2, stage: int = 2):
    return sampler.advance(sampler.init(REQUEST, REQUEST.seeds(0, rows)), stage)


def searched(sampler: DiffusionSampler, **options):
    """The rounds of a search that looks at previews three times."""
    return list(run_search(sampler, PixelReward(), HALVING, REQUEST, **options))


class Decoded:
    """Rows that reach the inside of the pipeline's own decoder."""

    def __init__(self, pipe) -> None:
        self.rows = 0
        pipe.vae.decoder.register_forward_pre_hook(self.count)

    def count(self, module, args) -> None:
        self.rows += len(args[0])


@pytest.fixture
def sd():
    return tiny.build("sd")


# --- what a tiny decoder is given -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shift"), [("sd", 0.0), ("sdxl", 0.0), ("flux", 0.2), ("cogview4", 0.0)])
@pytest.mark.filterwarnings("ignore:what AutoencoderTiny makes")
def test_a_tiny_preview_is_that_of_the_stock_pipeline_with_the_tiny_vae_put_in(name, shift):
    pipe, stock = tiny.build(name), tiny.build(name)
    if not shift:  # as in the published configurations of pipelines that know none
        pipe.vae.register_to_config(shift_factor=None)
    decoder = tiny_decoder(pipe.vae.config.latent_channels, scaling_factor=0.7, shift_factor=shift)
    sampler = previewed(pipe, "tiny", decoder)
    with torch.no_grad():
        preview = sampler.decode(sampler.predict_x0(begun(sampler)))
        stock.vae = decoder
        expected = DiffusionSampler(stock, CALL)
        torch.testing.assert_close(preview, expected.decode(expected.predict_x0(begun(expected))), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:what TinyVideoDecoder makes")
def test_latents_with_frames_come_to_a_video_decoder_as_the_denoiser_knows_them():
    pipe, call = tiny.build("wan"), {"num_inference_steps": 4, **tiny.FAMILIES["wan"].call}
    torch.manual_seed(1)
    decoder = TinyVideoDecoder(16, **SMALL).eval()
    sampler = DiffusionSampler(pipe, call, previews=PreviewDecoder(pipe, "tiny", decoder))
    with torch.no_grad():
        rows = sampler.predict_x0(begun(sampler))
        expected = decoder.decode(rows.state.tensors["out.0.prev_sample"]).sample / 2 + 0.5
        preview = sampler.decode(rows)
    torch.testing.assert_close(preview, expected.transpose(1, 2).clamp(0, 1), atol=1e-5, rtol=0)


def test_a_decoder_is_found_beside_the_vae_and_read_in_its_precision(sd, tmp_path):
    sd.vae.save_pretrained(tmp_path / "vae")
    tiny_decoder().save_pretrained(tmp_path / "vae_tiny")
    sd.vae = AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.float16)
    assert PreviewDecoder(sd, "auto").decoder.dtype == torch.float16
    assert PreviewDecoder(sd, "full").decoder is None


# --- what is decided from the first preview -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "tiny"])
def test_a_decoder_that_agrees_is_used_at_the_price_of_one_comparison(sd, mode):
    # a copy of the VAE agrees if latents come to it in its own scaling
    sampler, full = previewed(sd, mode, copy.deepcopy(sd.vae)), previewed(sd)
    sampler.meter = ledger = Ledger()
    with torch.no_grad():
        rows = sampler.predict_x0(begun(sampler, 3))
        torch.testing.assert_close(sampler.decode(rows), full.decode(full.predict_x0(begun(full, 3))))
    assert sampler.learned["agreement"] == pytest.approx(1, abs=1e-4)
    assert (ledger.decodes, ledger.previews) == (1, {"tiny": 3})


def test_auto_decodes_in_full_and_says_so_where_a_decoder_does_not_agree(sd):
    sampler, full = previewed(sd, "auto", tiny_decoder()), previewed(sd)
    sampler.meter = ledger = Ledger()
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"correlates .* previews are decoded in full; give a preview_decoder"):
            preview = sampler.decode(sampler.predict_x0(begun(sampler)))
        assert torch.equal(preview, full.decode(full.predict_x0(begun(full))))
        sampler.decode(sampler.predict_x0(begun(sampler, stage=3)))
    assert (ledger.decodes, ledger.previews) == (5, {})


def test_a_decoder_of_another_size_is_told_by_its_shapes(sd):
    larger = AutoencoderTiny(num_decoder_blocks=(1, 1, 0), decoder_block_out_channels=(8,) * 3)
    sampler = previewed(sd, "auto", larger)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"of shape \(1, 3, 64, 64\), not \(1, 3, 32, 32\)"):
        assert sampler.decode(sampler.predict_x0(begun(sampler))).shape == (2, 3, 32, 32)


# --- what a linear map learns ---------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), channels=st.integers(1, 5), space=st.integers(1, 4), video=st.booleans())
@settings(max_examples=25, deadline=None)
def test_an_affine_decoder_is_recovered(seed, channels, space, video):
    torch.manual_seed(seed)
    latents = torch.randn(4, channels, *([3] if video else []), 5, 6)
    scale = Scale(space, 4, True) if video else Scale(space)
    weights, constant = torch.randn(channels, 3), torch.randn(3)
    colours = torch.einsum("nc...,ck->nk...", latents, weights) + constant.reshape(-1, *[1] * (latents.ndim - 2))
    pictures = colours.repeat_interleave(space, -1).repeat_interleave(space, -2)
    pictures = pictures.repeat_interleave(4, 2)[:, :, 3:] if video else pictures
    assert Scale.between(latents, pictures) == scale
    known = sum(
        (LinearMap.of(*pair, scale) for pair in zip(latents[1:], pictures[1:])),
        start=LinearMap.of(latents[0], pictures[0], scale),
    )
    torch.testing.assert_close(known.weights.float(), torch.cat([weights, constant[None]]), atol=1e-3, rtol=1e-3)
    made = known(latents)
    assert made.shape == pictures.shape
    torch.testing.assert_close(scale.shrink(made).mean((-1, -2)), colours.mean((-1, -2)), atol=0.5, rtol=0)


@pytest.mark.parametrize(
    ("frames", "pictures", "time", "causal"),
    [(1, 1, 1, False), (1, 4, 4, False), (2, 9, 8, True), (3, 9, 4, True), (2, 8, 4, False), (5, 5, 1, False)],
)
def test_frames_are_related_as_decoders_do(frames, pictures, time, causal):
    latents, video = torch.zeros(1, 4, frames, 2, 2), torch.zeros(1, 3, pictures, 16, 16)
    scale = Scale.between(latents, video)
    assert scale == Scale(8, time, causal)
    assert scale.enlarge(scale.shrink(video)).shape == video.shape


@pytest.mark.parametrize(
    "shapes", [((1, 4, 3, 3), (1, 3, 7, 6)), ((1, 4, 9), (1, 2, 72)), ((1, 4, 2, 2, 2), (1, 3, 7, 4, 4))]
)
def test_outputs_that_are_no_enlarged_latents_are_left_to_the_decoder(shapes):
    assert Scale.between(*(torch.zeros(s) for s in shapes)) is None


def test_a_picture_that_is_not_finite_teaches_nothing():
    bad = LinearMap.of(torch.full((4, 2, 2), torch.nan), torch.zeros(3, 4, 4), Scale(2))
    assert not bad.normal.any()


@pytest.mark.parametrize("name", ["sd", "flux", "qwen-image", "wan"])
def test_linear_previews_begin_with_the_second_round_and_beat_a_plain_colour(name):
    pipe, call = tiny.build(name), {**tiny.FAMILIES[name].call, **CALL}
    call |= {"num_frames": 9} if name == "wan" else {}  # of few positions none is fitted
    sampler = DiffusionSampler(pipe, call, previews=PreviewDecoder(pipe, "linear"))
    own = sampler.view(previews=PreviewDecoder(pipe))
    sampler.meter = ledger = Ledger()
    with torch.no_grad():
        first = begun(sampler, 4)
        assert torch.equal(sampler.decode(sampler.predict_x0(first)), own.decode(own.predict_x0(first)))
        assert (ledger.decodes, ledger.previews) == (4, {})
        rows = sampler.advance(first, 3)
        preview, full = sampler.decode(sampler.predict_x0(rows)), own.decode(own.predict_x0(rows))
    assert (ledger.decodes, ledger.previews) == (4, {"linear": 4})
    assert preview.shape == full.shape
    axes = [i for i in range(full.ndim) if i != full.ndim - 3]
    assert F.mse_loss(preview, full) < F.mse_loss(full.mean(axes, keepdim=True).expand_as(full), full)


# --- a whole search -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["tiny", "linear"])
@pytest.mark.filterwarnings("ignore:what AutoencoderTiny makes")
def test_results_are_decoded_by_the_pipelines_own_vae_and_the_ledger_tells_both(sd, mode):
    inside, sampler = Decoded(sd), previewed(sd, mode, tiny_decoder() if mode == "tiny" else None)
    last = searched(sampler)[-1].result
    cheap = {"tiny": 6 + 5 + 4, "linear": 5 + 4}[mode]
    assert last.ledger.previews == {mode: cheap}
    assert last.ledger.decodes == inside.rows == {"tiny": 1, "linear": 6}[mode] + 2
    assert last.ledger.seconds["preview"] > 0 and last.ledger.seconds["decode"] > 0
    own = previewed(sd)
    own.request = REQUEST
    with torch.no_grad():
        images = own.decode(last.finished)
    kept = torch.stack([last.samples[0, name] for name in last.finished.id])
    assert torch.equal(kept, images)


@pytest.mark.parametrize("mode", ["tiny", "linear"])
@pytest.mark.filterwarnings("ignore:what AutoencoderTiny makes")
def test_a_search_is_the_same_in_any_split_and_when_repeated(sd, mode):
    sampler = previewed(sd, mode, tiny_decoder() if mode == "tiny" else None)
    whole, again, split = (searched(sampler, **o)[-1].result for o in ({}, {}, {"decode_rows": 1, "rows": 4}))
    assert again.ranking == whole.ranking and again.pruned == whole.pruned
    for mine, theirs in zip([*whole.ranking, *whole.pruned], [*split.ranking, *split.pruned], strict=True):
        assert mine["id"] == theirs["id"] and mine["score"] == pytest.approx(theirs["score"], abs=1e-2)


def test_a_resumed_search_knows_its_linear_map(sd, tmp_path):
    sampler = previewed(sd, "linear")
    whole = searched(sampler)[-1].result
    rounds = run_search(sampler, PixelReward(), HALVING, REQUEST, checkpoint=tmp_path)
    next(rounds)  # the first round of previews, from which the map is fitted
    rounds.close()
    resumed = searched(sampler, checkpoint=tmp_path)[-1].result
    assert resumed.ranking == whole.ranking and resumed.pruned == whole.pruned
    assert resumed.ledger.previews == whole.ledger.previews


def test_memory_is_planned_for_the_pipelines_own_decoder(sd):
    inside, reward = Decoded(sd), PixelReward()
    probe(previewed(sd, "tiny", tiny_decoder()), reward, REQUEST, ledger := Ledger())
    assert inside.rows == ledger.probes["decodes"] == 1 + 2 + 3


def test_a_wrapped_pipeline_takes_the_choice(sd):
    options = {"preview": "tiny", "preview_decoder": copy.deepcopy(sd.vae)}
    pipe = SearchPipeline(sd, PixelReward(), HALVING, Budget(max_nfe=200), **options)
    ledger = pipe("a photo of a cow", **CALL).search.ledger
    assert ledger.previews == {"tiny": 15} and ledger.decodes == 4  # a comparison, two finals, the winner as output


def test_the_command_line_names_the_same_modes():
    class Parser:
        choices: tuple = ()

        def add_argument(self, name, choices=None, **_):
            self.choices = choices or self.choices

    preview_arguments(parser := Parser())
    assert set(parser.choices) == set(MODES)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "decoder", "message"),
    [
        ("sd", "tinny", None, "preview='tinny' is unknown; use full, auto, tiny or linear"),
        ("sd", "tiny", None, r"needs a decoder: pass preview_decoder=.*or use preview='linear'"),
        ("sd", "linear", tiny_decoder, "preview='linear' takes no preview_decoder"),
        ("sd", "tiny", lambda: tiny_decoder(16), "decodes 16 latent channels, the AutoencoderKL .* has 4; give"),
        ("sd", "auto", lambda: TinyVideoDecoder(4, **SMALL), "decodes videos, the AutoencoderKL .* images; give"),
        ("wan", "tiny", lambda: tiny_decoder(16), "decodes images, the AutoencoderKLWan of this .* videos; give"),
        ("sd", "tiny", lambda: torch.nn.Linear(2, 2), "preview_decoder is a Linear; give an AutoencoderTiny"),
        ("sd", "tiny", lambda: "/no/such", "preview_decoder='/no/such' could not be loaded .*give a folder or hub id"),
        ("flux2-klein", "tiny", lambda: tiny_decoder(4), "statistics of batches.*use preview='linear' or 'full'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(name, mode, decoder, message):
    with pytest.raises(ValueError, match=message):
        PreviewDecoder(tiny.build(name), mode, decoder and decoder())


def test_a_folder_of_another_model_is_refused(sd, tmp_path):
    sd.vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"could not be loaded \(it holds a AutoencoderKL"):
        PreviewDecoder(sd, "tiny", tmp_path)


def test_a_folder_that_lacks_weights_is_refused(sd, tmp_path):
    tiny_decoder().save_pretrained(tmp_path)
    kept = load_file(file := tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({k: v for k, v in kept.items() if k != "decoder.layers.0.weight"}, file)
    with pytest.raises(ValueError, match=r"could not be loaded .*decoder\.layers\.0\.weight"):
        PreviewDecoder(sd, "tiny", tmp_path)


# --- TAEHV's layout -------------------------------------------------------------------------------------------


def layout(latents=16, widths=(256, 128, 64, 64), grows=(1, 2, 2), last=3) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint's decoder, written out place by place."""
    shapes = {"1.weight": (widths[0], latents, 3, 3), "1.bias": (widths[0],)}
    for depth, first in enumerate((3, 9, 15)):
        width = widths[depth]
        for block in range(first, first + 3):
            for place, inputs in ((0, 2 * width), (2, width), (4, width)):
                shapes |= {
                    f"{block}.conv.{place}.weight": (width, inputs, 3, 3),
                    f"{block}.conv.{place}.bias": (width,),
                }
        shapes[f"{first + 4}.conv.weight"] = (width * grows[depth], width, 1, 1)
        shapes[f"{first + 5}.weight"] = (widths[depth + 1], width, 3, 3)
    shapes |= {"22.weight": (last, widths[3], 3, 3), "22.bias": (last,)}
    return {f"decoder.{name}": shape for name, shape in shapes.items()}


def weights(**options) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {k: 0.2 * torch.randn(shape, generator=generator) for k, shape in layout(**options).items()}
    return made | {"encoder.0.weight": torch.zeros(4, 3, 3, 3)}


VARIANTS = {  # of the published kinds, narrower: Wan 2.1 and Qwen, Wan 2.2, LTX 2
    "one pixel": ({"last": 3}, 8, 4),
    "patches": ({"latents": 48, "last": 12}, 16, 4),
    "eight frames": ({"latents": 128, "grows": (2, 2, 2), "last": 48}, 32, 8),
}


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_in_the_layout_is_read_whatever_its_sizes(tmp_path, variant, ending):
    options, space, time = VARIANTS[variant]
    saved = weights(widths=(8, 8, 4, 4), **options)
    (save_file if ending == "safetensors" else torch.save)(saved, file := tmp_path / f"tiny.{ending}")
    decoder = TinyVideoDecoder.from_file(file)
    assert {k: tuple(v.shape) for k, v in decoder.state_dict().items()} == layout(widths=(8, 8, 4, 4), **options)
    video = decoder.decode(torch.randn(2, options.get("latents", 16), 3, 2, 2)).sample
    assert video.shape == (2, 3, 2 * time + 1, 2 * space, 2 * space)
    assert -1 <= video.min() < video.max() <= 1


def test_the_published_sizes_are_the_default():
    with torch.device("meta"):
        made = {k: tuple(v.shape) for k, v in TinyVideoDecoder().state_dict().items()}
    assert made == layout()


def one_by_one(decoder: TinyVideoDecoder, latents: torch.Tensor) -> torch.Tensor:
    """Frame after frame, each layer with what it saw last: (B, 3, F, H, W) in [0, 1], the first frames not cut."""
    past, made = {}, []
    for frame in latents.unbind(2):
        frames = [frame]
        for place, layer in enumerate(decoder.decoder):
            if place in (7, 13, 19):
                frames = [part for x in frames for part in layer.conv(x).chunk(decoder.config.grow[place // 6 - 1], 1)]
            elif hasattr(layer, "conv"):
                for i, x in enumerate(frames):
                    before, past[place] = past.get(place, torch.zeros_like(x)), x
                    frames[i] = F.relu(layer.conv(torch.cat([x, before], 1)) + x)
            else:
                frames = [layer(x) for x in frames]
        made += frames
    return torch.stack(made, 2).clamp(0, 1)


def test_frames_hang_on_earlier_ones_alone(tmp_path):
    save_file(weights(widths=(8, 8, 4, 4)), file := tmp_path / "tiny.safetensors")
    decoder, latents = (
        TinyVideoDecoder.from_file(file),
        torch.randn(2, 16, 4, 3, 3, generator=torch.Generator().manual_seed(2)),
    )
    video = decoder.decode(latents).sample
    torch.testing.assert_close(video / 2 + 0.5, one_by_one(decoder, latents)[:, :, 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(decoder.decode(latents[:, :, :2]).sample, video[:, :, :5])
    assert not torch.allclose(decoder.decode(latents[:, :, 1:]).sample[:, :, -1], video[:, :, -1])


def test_files_that_do_not_fit_are_refused_by_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TinyVideoDecoder.from_file(tmp_path / "none.pth")
    wide = weights(widths=(8, 8, 4, 4)) | {"decoder.3.conv.6.weight": torch.zeros(1)}
    save_file(wide, file := tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"not the layout of TAEHV.*unknown \['decoder.3.conv.6.weight'\]"):
        TinyVideoDecoder.from_file(file)
    save_file({"1.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"missing or of another shape \['decoder.1.weight'"):
        TinyVideoDecoder.from_file(file)
    file = tmp_path / "code.pth"
    file.write_bytes(pickle.dumps(Decoded, protocol=2))
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        TinyVideoDecoder.from_file(file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="holds other things than named tensors"):
        TinyVideoDecoder.from_file(file)
