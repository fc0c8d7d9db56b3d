"""How far derived seeds tell streams apart: what the docstring of ``stable_hash`` promises."""

from __future__ import annotations

import pytest
import torch

from visearch.protocols import Request


def test_a_cpu_generator_begins_from_the_low_32_bits_of_its_seed():
    first, same, other = (torch.Generator().manual_seed(seed) for seed in (5, 5 + (7 << 32), 5 + (1 << 31)))
    drawn, again, others = (torch.randn(64, generator=g) for g in (first, same, other))
    assert torch.equal(drawn, again) and not torch.equal(drawn, others)


def test_low_halves_of_derived_seeds_meet_as_rarely_as_random_numbers():
    """Among 2^17 of 2^32 values two meet (2^17)^2 / 2^33 = 2 times on average; 10 or more in 1 of 20,000 trials."""
    seeds = [seed.value for seed in Request(("a photo of a cow",), seed=3).seeds(1, 2**17 + 1)]
    assert len(set(seeds)) == 2**17
    assert len(seeds) - len({seed % 2**32 for seed in seeds}) < 10


def test_prompts_with_seeds_of_their_own_have_the_candidates_that_they_have_alone():
    together = Request(("a cow", "a car"), seed=9, prompt_ids=(5, 6), prompt_seeds=(3, 4))
    for prompt, (text, own, seed) in enumerate((("a cow", 5, 3), ("a car", 6, 4))):
        alone = Request((text,), seed=seed, prompt_ids=(own,))
        assert [together.seed_of(prompt, k) for k in range(4)] == [alone.seed_of(0, k) for k in range(4)]
        assert together.derive(prompt, "a draw", 7) == alone.derive(0, "a draw", 7)
    with pytest.raises(ValueError, match="prompt_seeds has 1 entries for 2 prompts"):
        Request(("a cow", "a car"), prompt_seeds=(3,))
