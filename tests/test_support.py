"""The table of measured pipeline classes, the probe of a loaded pipeline, and the command that shows both."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

from visearch import support as command
from visearch.cli import main
from visearch.pipelines import support
from visearch.pipelines.support import STRATEGIES, TOLERANCE, Support, measured_with, probe, support_table

CALL = {"prompt": "a photo of a cow", "num_inference_steps": 3}
SIZE = {"height": 32, "width": 32}
MEASURED = {
    "sd": {"output_type": "pt"} | SIZE,
    "sdxl": {"output_type": "pt"} | SIZE,
    "sd3": {"output_type": "pt"} | SIZE,
    "flux": {"output_type": "pt"} | SIZE,
    "cogview4": {"output_type": "pt"} | SIZE,
}


@pytest.fixture
def pipe():
    return tiny.build("sd", DDIMScheduler())


def test_the_table_loads_sorted_with_its_versions():
    table = support_table()
    assert len(table) > 150
    assert list(table) == sorted(table)
    assert all(row.pipeline == name and row.strategy in STRATEGIES for name, row in table.items())
    assert {"diffusers", "torch", "transformers", "date"} <= measured_with().keys()
    assert command.STRATEGIES == STRATEGIES


def test_what_the_table_calls_exact_keeps_the_limit():
    exact = [row for row in support_table().values() if row.verdict == "exact"]
    assert len(exact) > 150
    for row in exact:
        assert row.differences["one"] == row.differences["unchanged"] == 0
        assert any(k.startswith("shrink") for k in row.differences)
        assert any(k.startswith("grow") for k in row.differences)
        limited = {k: v for k, v in row.differences.items() if k not in ("apart", "kernels")}
        assert max(limited.values()) <= TOLERANCE or any(n.startswith("rounding:") for n in row.notes), row.pipeline


@pytest.mark.parametrize("name", MEASURED)
def test_a_fresh_probe_agrees_with_the_table(name):
    pipe = tiny.build(name)
    found = probe(pipe, CALL | MEASURED[name], exact=True)
    known = support_table()[type(pipe).__name__]
    assert (found.strategy, found.verdict) == (known.strategy, known.verdict) == (known.strategy, "exact")
    assert found.stages >= 3 and found.nfe >= found.stages and found.peak_rows >= 1
    assert found.decodes and found.preview and found.levels
    assert found.differences["one"] == 0 and found.differences["apart"] > 0


def test_a_probe_without_exact_runs_no_denoiser(pipe):
    rows = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: rows.append(1))
    found = probe(pipe, CALL | SIZE)
    assert rows == []
    assert found.strategy == "batch" and found.verdict == "unmeasured" and found.differences == {}


def test_a_mix_up_of_rows_is_found(pipe, monkeypatch):
    from visearch.pipelines.diffusion import DiffusionSampler

    real = DiffusionSampler.select
    monkeypatch.setattr(DiffusionSampler, "select", lambda self, p, index: real(self, p, list(index)[::-1]))
    found = probe(pipe, CALL | SIZE | {"output_type": "pt"}, exact=True)
    assert found.verdict == "wrong"
    assert found.differences["shrink@1"] > TOLERANCE


def test_an_error_on_the_way_is_reported_not_raised(pipe, monkeypatch):
    from visearch.pipelines.diffusion import DiffusionSampler

    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(DiffusionSampler, "output", broken)
    found = probe(pipe, CALL | SIZE, exact=True)
    assert found.verdict == "failed"
    assert "out of luck" in found.notes[0]


def test_differences_see_shapes_nans_and_eight_bits():
    a = [[torch.zeros(2, 2, dtype=torch.float64)]]
    assert support._worst(a, [[torch.zeros(2, 3, dtype=torch.float64)]]) == float("inf")
    assert support._worst(a, [[torch.full((2, 2), float("nan"), dtype=torch.float64)]]) == float("inf")
    nan = [[torch.full((2, 2), float("nan"), dtype=torch.float64)]]
    assert support._worst(nan, nan) == 0
    step = [[torch.full((2, 2), 1 / 255, dtype=torch.float64)]]
    assert support._worst(a, step) == 0
    assert support._worst(a, step, rounding=0.0) == pytest.approx(1 / 255)
    assert support._worst(a, [[torch.full((2, 2), 2 / 255, dtype=torch.float64)]]) > TOLERANCE


def test_arguments_that_the_pipeline_does_not_take_are_refused():
    with pytest.raises(TypeError, match="takes no argument sizes"):
        probe(tiny.build("flux"), CALL | {"sizes": 3})


def test_the_command_prints_the_table(capsys):
    assert main(["pipelines", "StableDiffusion3Pipeline"]) == 0
    out = capsys.readouterr().out
    assert "StableDiffusion3Pipeline" in out and "batch" in out and "1 classes" in out
    assert main(["pipelines", "--strategy", "rows", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["pipelines"]
    assert rows and {row["strategy"] for row in rows} == {"rows"}
    assert Support(**rows[0]).pipeline in support_table()


def test_the_command_probes_a_saved_pipeline(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    size = ["--height", "32", "--width", "32"]
    assert main(["pipelines", "--model", str(tmp_path / "model"), "--exact", "--device", "cpu", *size]) == 0
    out = capsys.readouterr().out
    assert "StableDiffusionPipeline: batch" in out and "exact" in out and "shrink@1" in out
    assert main(["pipelines", "--model", str(tmp_path / "model"), "--json", "--device", "cpu", *size]) == 0
    assert json.loads(capsys.readouterr().out)["strategy"] == "batch"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--exact"], "--exact needs --model"),
        (["NoSuchPipeline"], "no measured class matches NoSuchPipeline"),
        (["--model", "nowhere/at-all", "Flux"], "leave them out with --model"),
        (["--model", "emoji-64", "--prompt", " "], "is empty"),
    ],
)
def test_bad_input_is_refused(arguments, said, capsys):
    assert main(["pipelines", *arguments]) == 2
    assert said in capsys.readouterr().err
