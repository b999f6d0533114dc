"""`tree="auto"` is never slower than plain decoding, and what it does in whole generations.

Speed is told by a virtual clock: every forward and every lookup of a real generation advances it by
a given cost, so the decisions of the policy are real and their price is exact.
"""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from lossless_checks import KnowsOne
from tiny_models import VOCAB, tiny_config, tiny_pair
from transformers import AutoModelForCausalLM

import treespec.engine
from treespec import TreeSpeculator
from treespec.bench.clock import VirtualClock
from treespec.engine import Row
from treespec.sources import OneShotSource, Proposal
from treespec.tree import Growth

pytestmark = pytest.mark.usefixtures("ordinary_outlay")

PLAIN_MS, OVERHEAD_MS, MISS_MS, HIT_MS = 4.0, 0.3, 0.1, 0.5


# --- the virtual clock ---------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """A function that makes a speculator whose costs are given, and its clock."""
    clock = VirtualClock()
    for module in (treespec.engine, treespec.laps):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(Growth, "add_lookups", Growth.add_lookups)  # undone afterwards
    clock.charge(Growth, "add_lookups", lambda *_: HIT_MS)

    def make(target, draft, tree="auto", level_ms=0.8, node_ms=0.15):
        # recording depends on counts alone, and would only slow the test down
        spec = TreeSpeculator(target, draft, tree=tree, capture=False)

        def verify_ms(num_nodes):
            return PLAIN_MS + node_ms * (num_nodes - 1)

        clock.charge_rounds(spec, verify_ms, lambda _: OVERHEAD_MS, level_ms, 10.0, MISS_MS)
        return spec

    make.clock = clock
    return make


def milliseconds(timed, spec, ids, new_tokens: int, **options) -> float:
    """Virtual time per new token of one call."""
    before = timed.clock.ms
    options = {"do_sample": False, **options}
    found = spec.generate(ids, max_new_tokens=new_tokens, **options)
    assert found.shape[1] == ids.shape[1] + new_tokens
    return timed.clock.ms - before


@functools.cache
def unrelated_draft():
    """Random weights: hardly ever right."""
    torch.manual_seed(99)
    return AutoModelForCausalLM.from_config(tiny_config("llama", 1)).eval()


def adversary():
    """The target's own layers with its output turned upside down: sure of itself, and never
    right."""
    target, _ = tiny_pair("llama")
    torch.manual_seed(0)
    draft = AutoModelForCausalLM.from_config(target.config).eval()
    draft.load_state_dict(target.state_dict())
    with torch.no_grad():
        draft.lm_head.weight.neg_()
    return draft


def texts(count: int, length: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (1, length), generator=generator) for _ in range(count)]


class Wrong(OneShotSource):
    """Always finds a long match, which is never right."""

    name = "wrong"

    def propose(self, sequences, length):
        tokens = torch.full((len(sequences.lens), 1, length), VOCAB - 1)
        return Proposal(tokens, [8] * len(sequences.lens))


def speed(timed, draft, new_tokens=60, count=4, batch=1, level_ms=0.8, warm=2, **options) -> float:
    """How many times as fast as plain decoding auto is, over several texts, after `warm` more."""
    target, _ = tiny_pair("llama")
    auto = timed(target, draft, level_ms=level_ms)
    plain = timed(target, None)
    spent = {"auto": 0.0, "plain": 0.0}
    for turn, ids in enumerate(texts(count + warm)):
        ids = ids.repeat(batch, 1)
        for name, spec in (("auto", auto), ("plain", plain)):
            ms = milliseconds(timed, spec, ids, new_tokens, **options)
            spent[name] += ms if turn >= warm else 0.0
    return spent["plain"] / spent["auto"]


# --- never slower --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draft, options",
    {
        "random weights": (unrelated_draft, {}),
        "adversarial": (adversary, {}),
        "slow and random": (unrelated_draft, {"level_ms": 12.0}),
        "wrong lookups": (Wrong, {}),
        "random, sampled": (unrelated_draft, {"do_sample": True, "seed": 1}),
        "random, eight sequences": (unrelated_draft, {"batch": 8}),
        "random, eight tokens": (unrelated_draft, {"new_tokens": 8, "count": 16, "warm": 16}),
    }.values(),
    ids=lambda value: None,
)
def test_never_slower_than_plain(timed, draft, options):
    assert speed(timed, draft(), **options) >= 0.97


def test_a_good_draft_pays(timed):
    target, draft = tiny_pair("llama")
    assert speed(timed, copy.deepcopy(target), level_ms=0.4) >= 2.0
    assert speed(timed, draft, level_ms=0.4) >= 1.0


def test_a_draft_good_only_now_and_then_is_found_again(timed):
    """Texts that suit the draft and texts that do not, in turns: it is asked in the first and left
    alone in the second."""
    target, _ = tiny_pair("llama")
    fickle = copy.deepcopy(target)
    weights = {True: fickle.lm_head.weight.detach().clone()}
    weights[False] = -weights[True]
    auto, plain = timed(target, fickle, level_ms=0.4), timed(target, None)
    spent = {}
    for turn, ids in enumerate(texts(12)):
        good = turn % 2 == 0
        with torch.no_grad():
            fickle.lm_head.weight.copy_(weights[good])
        if turn >= 4:
            for name, spec in (("auto", auto), ("plain", plain)):
                ms = milliseconds(timed, spec, ids, 80)
                spent[name, good] = spent.get((name, good), 0.0) + ms
        else:
            milliseconds(timed, auto, ids, 80)
    assert spent["plain", True] / spent["auto", True] >= 1.8
    # a few rounds of every other text go into finding out
    assert spent["plain", False] / spent["auto", False] >= 0.8


def test_a_useless_draft_is_hardly_ever_asked(timed):
    target, _ = tiny_pair("llama")
    spec = timed(target, unrelated_draft())
    for ids in texts(4):
        spec.generate(ids, max_new_tokens=60, do_sample=False)
    forwards = spec._engine.drafts[0]
    asked, before = 0.0, timed.clock.ms
    for ids in texts(6):
        spec.generate(ids, max_new_tokens=100, do_sample=False)
        asked += 0.8 * forwards.forwards
    assert asked <= 0.02 * (timed.clock.ms - before)


# --- costs ----------------------------------------------------------------------------------------


def test_costs_of_few_and_many_rows_are_kept_apart(timed):
    """Eight sequences at a time cost more a round; one sequence after them is planned as before."""
    target, draft = tiny_pair("llama")
    spec = timed(target, draft, node_ms=0.5)
    (ids,) = texts(1)
    spec.generate(ids, max_new_tokens=60, do_sample=False)
    alone = spec._policy._costs_for(1).verify.at(1)
    spec.generate(ids.repeat(8, 1), max_new_tokens=60, do_sample=False)
    assert spec._policy._costs_for(1).verify.at(1) == pytest.approx(alone, rel=0.02)
    assert spec._policy._costs_for(8).verify.at(1) == pytest.approx(PLAIN_MS + 3.5, rel=0.05)


def test_predicted_and_measured_times_of_rounds(timed, monkeypatch):
    """After a warm-up the predictions that decisions rest on are within a tenth."""
    target, draft = tiny_pair("llama")
    spec = timed(target, draft)
    policy, errors = spec._policy, []
    observe = policy.observe

    def checked(outcome):
        looked = outcome.match_lengths is not None
        predicted = policy.predict_round_ms(outcome.num_nodes, outcome.draft_levels, looked)
        if predicted is not None:
            errors.append(abs(predicted / outcome.total_ms - 1))
        observe(outcome)

    monkeypatch.setattr(policy, "observe", checked)
    for ids in texts(5):
        del errors[:]
        spec.generate(ids, max_new_tokens=60, do_sample=False)
    assert sum(errors) / len(errors) <= 0.1
    assert "predicted times of rounds lately off by" in spec.explain()


def test_plain_decoding_is_measured_first(timed):
    """Nothing may be held against a guess of what plain decoding costs: here a further node costs
    as much as the first, which wider verifications alone do not tell."""
    target, draft = tiny_pair("llama")
    spec = timed(target, draft, node_ms=PLAIN_MS)
    sizes = []
    observe = spec._policy.observe
    spec._policy.observe = lambda outcome: sizes.append(outcome.num_nodes) or observe(outcome)
    (ids,) = texts(1)
    spec.generate(ids, max_new_tokens=20, do_sample=False)
    assert sizes[0] == 1
    assert spec._policy.now.verify.at(1) == pytest.approx(PLAIN_MS)


def test_a_batch_is_not_slowed_down_for_the_sake_of_one_sequence(timed):
    target, _ = tiny_pair("llama")
    batches = [torch.cat(texts(4, length)) for length in (30, 40, 50)]
    spent = {"auto": 0.0, "plain": 0.0}
    source = KnowsOne(torch.zeros(0))
    specs = {"auto": timed(target, source), "plain": timed(target, None)}
    for ids in batches:
        source.text = target.generate(ids[:1], max_new_tokens=120, do_sample=False)[0]
        for name, spec in specs.items():
            spent[name] += milliseconds(timed, spec, ids, 120)
    assert spent["plain"] / spent["auto"] >= 0.97


def test_text_that_repeats_itself_is_taken_in_long_strides(timed):
    """Tokens that are all the same: every lookup is right."""
    forever = copy.deepcopy(tiny_pair("llama")[0])
    with torch.no_grad():
        forever.lm_head.weight.zero_()
    spec = timed(forever, "ngram")
    ids = torch.ones(1, 20, dtype=torch.long)
    for _ in range(2):
        milliseconds(timed, spec, ids, 200)
    assert max(spec.stats.accept_lengths) > 40
    assert spec.stats.rounds < 200 / 11


# --- recording -----------------------------------------------------------------------------------


def recorded(spec) -> int:
    return sum(r.replay is not None for r in spec._target._recordings.values())


@pytest.fixture
def recordings_cost(monkeypatch):
    """As much as a dozen calls save, as ever outside the tests."""
    monkeypatch.setattr("treespec.model._CALLS_THAT_PAY", 12)


def test_short_texts_do_not_pay_for_recordings(recordings_cost):
    """A text of eight tokens is not recorded, one of sixty is, and so are many of eight."""
    target, _ = tiny_pair("llama")
    (ids,) = texts(1)
    short, long = (TreeSpeculator(target, None) for _ in range(2))
    short.generate(ids, max_new_tokens=8, do_sample=False)
    long.generate(ids, max_new_tokens=60, do_sample=False)
    assert recorded(short) == 0 and recorded(long) == 1
    for _ in range(3):
        short.generate(ids, max_new_tokens=8, do_sample=False)
    assert recorded(short) == 1


def test_shapes_of_a_batch_are_of_use_until_its_fastest_sequence_ends():
    target, _ = tiny_pair("llama")
    engine = TreeSpeculator(target, None)._engine
    engine._request = SimpleNamespace(max_new_tokens=20, warming=False)
    engine._active = [Row(0, [1] * 15), Row(1, [1] * 2)]
    assert engine._rounds_ahead() == 5


def test_warming_up_records_at_once(recordings_cost):
    target, _ = tiny_pair("llama")
    spec = TreeSpeculator(target, None)
    spec.warmup(max_length=16)
    assert recorded(spec) == 1


def test_the_draft_reads_the_prompt_only_when_asked(monkeypatch):
    target, draft = tiny_pair("llama")
    spec = TreeSpeculator(target, draft)
    (ids,) = texts(1)
    monkeypatch.setattr(spec._policy, "wants_draft", lambda scores: False)
    spec.generate(ids, max_new_tokens=20, do_sample=False)
    assert spec._model.cache.prefix_lens == [0]
