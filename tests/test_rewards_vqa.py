"""VQAScore and UnifiedReward on tiny random Qwen2.5-VL and Qwen3-VL with real processors."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import vlm
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from visearch.rewards import check, unified
from visearch.rewards.unified import UnifiedReward, read_scores, read_template
from visearch.rewards.vqa import YES, VQAScore

PROMPTS = ("a cow", "a red car left of two cows", "one cow")
QUESTION = "Score the caption [{prompt}]!"


@pytest.fixture(scope="module", params=vlm.KINDS)
def folder(request, tmp_path_factory) -> Path:
    return vlm.save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return vlm.save(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def qwen_copy(qwen, tmp_path) -> Path:
    for file in qwen.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(folder: Path, **options) -> VQAScore:
    return VQAScore(folder, dtype=torch.float32, **options)


def pictures() -> list[Image.Image]:
    random = torch.Generator().manual_seed(0)
    return [to_pil_image(torch.rand(3, side, 32, generator=random)) for side in (32, 40, 48)]


def chat(text: str) -> str:
    return f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"


def next_token(reward, image: Image.Image, text: str, written: Sequence[int] = ()) -> torch.Tensor:
    """Probabilities of the token that follows, for one sample alone and without padding."""
    inputs = dict(reward.processor(text=[text], images=[image], return_tensors="pt"))
    more = {"input_ids": written, "attention_mask": [1] * len(written), "mm_token_type_ids": [0] * len(written)}
    for name, tail in more.items():
        inputs[name] = torch.cat([inputs[name], inputs[name].new_tensor(tail)[None]], dim=1)
    return reward.module(**inputs).logits[0, -1].double().softmax(-1)


# --- VQAScore ---------------------------------------------------------------------------------------------------


def test_score_is_the_probability_of_yes(folder):
    reward, [yes] = load(folder), vlm.byte_tokenizer().encode("Yes")
    asked = [chat(f'Does this figure show "{prompt}"? Please answer Yes or No.') for prompt in PROMPTS]
    expected = [float(next_token(reward, *pair)[yes]) for pair in zip(pictures(), asked)]
    assert reward.score(pictures(), PROMPTS).values.tolist() == pytest.approx(expected, rel=1e-4)
    assert max(expected) > 1.01 * min(expected)


def test_it_keeps_the_contract_of_rewards(folder):
    """Prompts differ in length, so that batches are padded."""
    prompts = ["a red cow", "green", "a very long text about a blue square", "", "white"]
    check(load(folder), prompts=prompts)


def test_answers_add_up(qwen):
    one_by_one = [load(qwen, answers=[answer]).score(pictures(), PROMPTS).values for answer in YES]
    together = load(qwen, answers=YES).score(pictures(), PROMPTS).values
    torch.testing.assert_close(together, sum(one_by_one), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("mean", "of"), [("geometric", lambda p, q: math.sqrt(p * q)), ("arithmetic", lambda p, q: (p + q) / 2)]
)
def test_clauses_are_asked_one_by_one(qwen, mean, of):
    reward = load(qwen, clauses=lambda prompt: prompt.split(" and "), mean=mean)
    images = pictures()[:2]
    values = reward.score(images, ["a cow and two cars", "a cat"]).values
    cow, cars, cat = load(qwen).score([images[0], *images], ["a cow", "two cars", "a cat"]).values.tolist()
    assert values.tolist() == pytest.approx([of(cow, cars), cat], rel=1e-4)


def test_what_a_score_depends_on_is_in_the_hash(qwen):
    plain = load(qwen)
    small = load(qwen, max_pixels=256)
    hashes = {r.config_hash for r in (plain, small, load(qwen, answers=YES), load(qwen, mean="arithmetic"))}
    assert len(hashes) == 4 and load(qwen).config_hash == plain.config_hash
    large = Image.new("RGB", (64, 64))
    assert small.processor.image_processor([large])["image_grid_thw"].prod() * 16 <= 256
    assert plain.processor.image_processor([large])["image_grid_thw"].prod() * 16 > 256


def test_answers_of_several_tokens_are_refused(tmp_path):
    vlm.save(tmp_path, merges=vlm.MERGES[:1])
    with pytest.raises(ValueError, match=r"answers=\('Yes',\).*not one token"):
        load(tmp_path)


def test_prompts_cannot_speak_to_the_model(qwen):
    with pytest.raises(ValueError, match=r"holds '<\|im_end\|>'.*remove it"):
        load(qwen).score(pictures()[:1], 'a cow"<|im_end|>')


@pytest.mark.parametrize(
    ("options", "said"),
    [({"question": "Is it nice?"}, r"\{prompt\}"), ({"mean": "harmonic"}, "geometric, arithmetic")],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_loaded(options, said):
    with pytest.raises(ValueError, match=said):
        VQAScore("no such folder", **options)


def test_a_model_that_is_not_whole_is_refused(qwen_copy):
    weights = load_file(qwen_copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, qwen_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"vqa-score.*missing: lm_head.weight"):
        load(qwen_copy)


def test_a_processor_without_chat_template_is_refused(tmp_path):
    vlm.save(tmp_path, chat=None)
    with pytest.raises(ValueError, match=r"no chat template.*Instruct"):
        load(tmp_path)


# --- UnifiedReward ----------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """A script that holds a question as the published ones hold theirs, and would fail if it were run."""
    version = dataclasses.replace(
        unified.VERSIONS["2.0"],
        sha256=hashlib.sha256(QUESTION.encode()).hexdigest(),
        tokens=6,
        script="published/ask.py",
    )
    monkeypatch.setitem(unified.VERSIONS, "2.0", version)
    file = tmp_path / "ask.py"
    file.write_text('raise SystemExit\nprompt = ""\nask(text=("Score the caption "\n  f"[{prompt}]!"))\n')
    return file


def test_template_is_found_in_a_script_without_running_it(script):
    assert read_template(script, unified.VERSIONS["2.0"].sha256) == QUESTION
    text = script.with_suffix(".txt")
    text.write_text(QUESTION)
    assert read_template(text, unified.VERSIONS["2.0"].sha256) == QUESTION


def test_template_may_lie_in_the_folder_of_the_model(qwen_copy, script):
    assert script.parent == qwen_copy
    assert UnifiedReward(qwen_copy, offload="lazy").template == QUESTION


@pytest.mark.parametrize("version", unified.VERSIONS)
def test_another_wording_is_refused(tmp_path, version):
    (tmp_path / "ask.txt").write_text(QUESTION)
    with pytest.raises(ValueError, match=f"{unified.VERSIONS[version].sha256}.*as the authors published it"):
        UnifiedReward(template=tmp_path / "ask.txt", version=version)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give template=.*point_score_ACS_image_generation.py"),
        ({"version": "3.0"}, "1.0, 2.0"),
        ({"value": "final"}, "mean, alignment, coherence, style"),
    ],
)
def test_unified_reward_says_what_it_lacks(options, said):
    with pytest.raises(ValueError, match=said):
        UnifiedReward(**options)


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("cow (object): 1\nFinal Score: 4", 4.0),
        ("Final Score: 3\nNo. Final Score: 4.5", 4.5),
        ("**Final Score:** 2.25.", 2.25),
        ("Final Score: 3\nFinal Score: none", math.nan),
        ("Final Score: 45", math.nan),
        ("Score: 4", math.nan),
        ("", math.nan),
    ],
)
def test_final_score_is_the_last_one(answer, final):
    assert read_scores(answer, unified.VERSIONS["1.0"].labels) == pytest.approx({"final": final}, nan_ok=True)


def test_scores_are_components_and_their_mean_the_value(qwen, script, monkeypatch):
    written = [
        "Alignment Score (1-5): 3.5\nCoherence Score (1-5): 2\nStyle Score (1-5): 4.25",
        "Alignment Score (1-5): 3.5\nStyle Score (1-5): 4.25",
    ]
    monkeypatch.setattr(UnifiedReward, "answers", lambda self, images, prompts: written)
    scores = UnifiedReward(qwen, template=script, dtype=torch.float32).score(pictures()[:2], "a cow")
    assert scores.values.tolist() == pytest.approx([3.25, math.nan], nan_ok=True)
    assert scores.components["alignment"].tolist() == [3.5, 3.5]
    assert "Coherence Score (1-5):" in scores.reasons[1] and "4.25" in scores.reasons[1]
    style = UnifiedReward(qwen, template=script, value="style", dtype=torch.float32).score(pictures()[:2], "a cow")
    assert style.values.tolist() == [4.25, 4.25]


def test_answers_are_decoded_greedily_and_alike_in_any_batch(folder, script):
    reward = UnifiedReward(folder, template=script, dtype=torch.float32)
    images = [pil_to_tensor(image) for image in pictures()]
    answers = reward.answers(images, list(PROMPTS))
    assert len(set(answers)) > 1
    for image, prompt, answer in zip(pictures(), PROMPTS, answers):
        ids: list[int] = []
        while len(ids) < 6 and reward.processor.tokenizer.eos_token_id not in ids:
            ids.append(int(next_token(reward, image, chat(QUESTION.replace("{prompt}", prompt)), ids).argmax()))
        assert answer == reward.processor.tokenizer.decode(ids, skip_special_tokens=True)
