"""Searches as text: what can be written is read back as an equal search, and what cannot is said to be so."""

from __future__ import annotations

import math

import pytest
from contract.cases import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch import BestOfN, SuccessiveHalving
from visearch.diversity import Keep
from visearch.protocols import EtaStep
from visearch.search import SEARCHES, describe, parse
from visearch.search.cached_drafts import CachedDrafts
from visearch.search.conformal import ConformalHalving
from visearch.search.paths import SearchOverPaths
from visearch.search.refine import Refine
from visearch.search.ses import LowFrequencyCrossEntropy
from visearch.search.smc import SequentialMonteCarlo
from visearch.search.zero_order import ZeroOrder

COUNTS, SHARES = st.integers(1, 99), st.floats(0.01, 0.99)
SIMPLE = st.one_of(
    st.builds(BestOfN, n=COUNTS, batch=COUNTS),
    st.builds(ZeroOrder, n=COUNTS, k=st.integers(0, 9), tau=SHARES),
    st.builds(SearchOverPaths, n=COUNTS, m=COUNTS, sigma=SHARES, rounds=st.none() | COUNTS),
    st.builds(LowFrequencyCrossEntropy, n=COUNTS, levels=st.integers(1, 5), floor=SHARES),
    st.builds(SuccessiveHalving, n=st.none() | COUNTS, preset=st.sampled_from(["auto", "psp", "ttsnap"])),
    st.lists(st.tuples(SHARES, SHARES | COUNTS), max_size=3).map(
        lambda checks: SuccessiveHalving(calls=tuple(c for c, _ in checks), keep=tuple(k for _, k in checks))
    ),
    st.builds(SuccessiveHalving, rule=st.builds(Keep, weight=SHARES) | st.sampled_from(["coverage", "dpp"])),
    st.builds(SequentialMonteCarlo, transition=st.sampled_from(["sde:0.5", "eta:1"]) | st.builds(EtaStep, SHARES)),
)
NESTED = st.recursive(
    SIMPLE,
    lambda inner: (
        st.builds(Refine, first=inner, then=st.builds(ZeroOrder, n=COUNTS) | st.none(), share=SHARES)
        | st.builds(CachedDrafts, search=inner, cache=st.just({"every": 2}) | st.just("auto"))
    ),
    max_leaves=3,
)


@settings(deadline=None, max_examples=150)
@given(NESTED)
def test_what_is_written_is_read_back(search):
    text = describe(search)
    assert parse(text) == search
    assert describe(parse(text)) == text


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_every_search_has_a_text(name):
    search = SEARCHES.load(name)(**SMALL.get(name, {}))
    assert parse(describe(search)) == search
    assert describe(SEARCHES.load(name)()) == name and parse(name) == SEARCHES.load(name)()


@pytest.mark.parametrize(
    ("text", "search"),
    [
        ("halving", SuccessiveHalving()),
        (" best-of-n() ", BestOfN()),
        ("halving(n=16, preset='psp')", SuccessiveHalving(n=16, preset="psp")),
        (
            'halving(n=None, calls=(.4, .7), keep=(.5, 2), preset="explicit")',
            SuccessiveHalving(n=None, calls=(0.4, 0.7), keep=(0.5, 2)),
        ),
        ("halving(check-cost=1e-3)", SuccessiveHalving(check_cost=1e-3)),
        ("refine(first=halving(n=12), then=zero-order(k=4))", Refine(SuccessiveHalving(n=12), ZeroOrder(k=4))),
        ("refine(first=best-of-n, then=ses)", Refine(BestOfN(), LowFrequencyCrossEntropy())),
        ("cached-drafts(search=halving(n=16), m=1)", CachedDrafts(SuccessiveHalving(n=16), m=1)),
        ("halving(rule=keep(method='dpp', weight=2.0))", SuccessiveHalving(rule=Keep("dpp", 2.0))),
        ("smc(transition='eta:0.5')", SequentialMonteCarlo(transition="eta:0.5")),
        ("conformal(calls=(0.4,), margins=(1e999,))", ConformalHalving(calls=(0.4,), margins=(math.inf,))),
    ],
)
def test_texts(text, search):
    assert parse(text) == search


@pytest.mark.parametrize(
    ("search", "text"),
    [
        (SuccessiveHalving(), "halving"),
        (SuccessiveHalving(n=None, calls=(0.4,), keep=(0.5,)), "halving(n=None, calls=(0.4,), keep=(0.5,))"),
        (Refine(BestOfN(n=4), ZeroOrder(n=2)), "refine(first=best-of-n(n=4), then=zero-order(n=2))"),
        (SuccessiveHalving(rule="dpp"), "halving(rule=keep)"),
        (SuccessiveHalving(rule="coverage"), "halving(rule=keep(method='coverage'))"),
        (ConformalHalving(calls=(0.4,), margins=(math.inf,)), "conformal(calls=(0.4,), margins=(1e999,))"),
    ],
)
def test_only_what_differs_from_the_defaults_is_written(search, text):
    assert describe(search) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("halving(n=3", "cannot be read"),
        ("halving(n=3, n=4)", "halving is given n twice"),
        ("halvin", "did you mean 'halving'"),
        ("halvin(n=3)", "did you mean 'halving'"),
        ("keep", "unknown search 'keep'"),
        ("halving(16)", r"give the fields of halving by name, such as halving\(n=8\)"),
        ("halving(**x)", "by name"),
        ("halving(prest='psp')", "halving has no field 'prest'; did you mean preset?"),
        ("halving(zzz=1)", "halving has no field 'zzz'; it has n, preset"),
        (
            "halving(preset=psp)",
            r"halving\(preset=...\): psp is no search; did you mean paths. text stands in quotes: 'psp'",
        ),
        ("halving(preset='psp', rule=xyz)", "rule=.*xyz is no search; text stands in quotes: 'xyz'"),
        ("refine(first=halvin)", r"refine\(first=...\): halvin is no search; did you mean halving"),
        ("refine(first=halving(m=1))", "halving has no field 'm'"),
        ("halving(n=0)", "n=0"),
        ("best-of-n(n='x')", "best-of-n"),
        ("best-of-n(n=__import__('os').getpid())", "is no search"),
        ("os.system('true')", "is no search"),
        ("[best-of-n]", "is no search"),
        ("best-of-n(n=[c for c in 'abc'])", "neither a literal nor a search"),
        ("best-of-n(n=-0x0 or 3)", "neither a literal nor a search"),
    ],
)
def test_refusals_name_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert repr(text) in str(error.value)


def test_what_has_no_text_is_refused():
    with pytest.raises(ValueError, match="not registered"):
        describe(type("Own", (BestOfN,), {})())
    with pytest.raises(ValueError, match=r"cache=.*has no text"):
        describe(CachedDrafts(BestOfN(), cache={"on": {1, 2}.__iter__()}))
