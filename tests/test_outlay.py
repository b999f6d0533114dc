"""What `tree="auto"` spends on forwards that were never made before, against plain decoding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lossless_checks import KnowsOne
from tiny_models import tiny_pair

import treespec.engine
from treespec import TreeSpeculator
from treespec.outlay import Outlay

pytestmark = pytest.mark.usefixtures("ordinary_outlay")

PLAIN_MS, RECORDING_MS = 4.0, 40.0
PROMPT = torch.arange(1, 41)[None]


def a_round(num_nodes=8, total_ms=6.0, recording_ms=0.0, draft_levels=0):
    return SimpleNamespace(
        num_nodes=num_nodes,
        total_ms=total_ms,
        recording_ms=recording_ms,
        draft_levels=draft_levels,
    )


def test_one_more_recording_must_be_a_small_part_of_the_time():
    outlay = Outlay()
    assert outlay.allows(0.0)
    outlay.pass_time(a_round(1, PLAIN_MS, recording_ms=RECORDING_MS))
    assert not outlay.allows(90.0)
    assert outlay.allows(110.0)  # two fifths of what is still to come
    for _ in range(400):
        outlay.pass_time(a_round(1, PLAIN_MS))
    assert outlay.allows(0.0)  # and three hundredths of what has passed


def test_what_drafts_gain_pays_for_recordings_and_what_they_lose_does_not():
    gaining, losing = Outlay(), Outlay()
    for outlay, behind_ms in ((gaining, -5.0), (losing, 5.0)):
        outlay.pass_time(a_round(1, PLAIN_MS, recording_ms=RECORDING_MS))
        for _ in range(9):
            outlay.pay(a_round(), behind_ms)
    assert gaining.allows(0.0)
    assert not losing.allows(200.0)


def test_recordings_are_part_of_the_balance():
    outlay = Outlay()
    outlay.pay(a_round(recording_ms=RECORDING_MS), 0.0)
    assert not outlay.allows(90.0)
    assert outlay.allows(110.0)


def test_what_was_made_ahead_is_begun():
    outlay = Outlay()
    outlay.prepared((1, 8, 64))
    assert outlay.begun((1, 4, 8, 16, 64)) == (1, 8, 64) and outlay.draft_begun
    assert outlay.allows(0.0)


def test_widths_once_begun_stay_open():
    outlay = Outlay()
    outlay.pay(a_round(8, recording_ms=RECORDING_MS), 2.0)
    assert outlay.begun((1, 4, 8, 16)) == (1, 8)
    assert not outlay.draft_begun
    outlay.pay(a_round(4, draft_levels=2), 2.0)
    assert outlay.begun((1, 4, 8, 16)) == (1, 4, 8)
    assert outlay.draft_begun


# --- in the engine, on a clock of its own --------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """A function that makes a speculator of a new process: a forward of a shape that it has not
    made yet takes `RECORDING_MS` longer. Beside it the clock."""
    clock = SimpleNamespace(ms=0.0)
    clock.perf_counter = lambda: clock.ms / 1e3
    for module in (treespec.engine, treespec.laps):
        monkeypatch.setattr(module, "time", clock)

    target, _ = tiny_pair("llama")
    text = target.generate(PROMPT, max_new_tokens=440, do_sample=False)[0]

    def make(draft=None):
        spec = TreeSpeculator(target, draft or KnowsOne(text), capture=False)
        model, forward, seen = spec._target, spec._target.forward, set()

        def charged(tokens, *arguments, **keywords):
            recording_ms = 0.0 if tokens.shape in seen else RECORDING_MS
            seen.add(tokens.shape)
            model.recording_ms += recording_ms
            clock.ms += PLAIN_MS + 0.1 * (tokens.shape[1] - 1) + recording_ms
            return forward(tokens, *arguments, **keywords)

        model.forward = charged
        spec.shapes_made = seen
        return spec

    return make, clock


def written(spec, clock, new_tokens: int) -> float:
    """Milliseconds of the text that the lookup knows."""
    before = clock.ms
    spec.generate(PROMPT, max_new_tokens=new_tokens, do_sample=False)
    return clock.ms - before


def test_short_texts_never_bring_a_process_far_behind_and_gain_in_the_end(fresh):
    make, clock = fresh
    spec, behind = make(), []
    usual = taken = 0.0
    for text in range(60):
        usual += 16 * PLAIN_MS + (RECORDING_MS if text == 0 else 0.0)
        taken += written(spec, clock, 16)
        behind.append(taken / usual - 1.0)
    assert max(behind) < 0.05, behind
    assert any(nodes > 1 for _, nodes in spec.shapes_made)
    assert written(spec, clock, 16) < 0.7 * 16 * PLAIN_MS


def test_a_long_text_pays_for_its_own_recordings(fresh):
    make, clock = fresh
    spec = make()
    assert written(spec, clock, 400) < 0.7 * 400 * PLAIN_MS


def test_after_a_warm_up_the_first_short_text_drafts(fresh):
    make, clock = fresh
    spec = make()
    spec.warmup(max_length=64)
    assert written(spec, clock, 16) < 0.7 * 16 * PLAIN_MS


def test_a_warm_up_of_several_sequences_says_nothing_of_one(fresh):
    make, clock = fresh
    spec = make()
    spec.warmup(batch_sizes=2, max_length=64)
    assert written(spec, clock, 16) <= 1.05 * (16 * PLAIN_MS + RECORDING_MS)


def test_a_short_text_asks_no_draft_that_was_never_asked(fresh):
    make, clock = fresh
    spec = make(tiny_pair("llama")[1])
    written(spec, clock, 16)
    assert spec.stats.draft_forwards == 0
    written(spec, clock, 400)
    assert spec.stats.draft_forwards > 0


@pytest.mark.parametrize("share, recorded", [(0.0, False), (1e6, True)])
def test_where_a_recording_may_be_made_it_is_made_at_once(monkeypatch, share, recorded):
    """However few tokens are left."""
    monkeypatch.setattr("treespec.model._CALLS_THAT_PAY", 12)
    monkeypatch.setattr("treespec.outlay._OF_PASSED", share)
    target, draft = tiny_pair("llama")
    spec = TreeSpeculator(target, [draft, "ngram"])
    for _ in range(8):
        spec.generate(PROMPT, max_new_tokens=10, do_sample=False)
    made = {
        model.role: [key for key, one in model._recordings.items() if one.replay is not None]
        for model in (spec._target, spec._model)
    }
    assert any(nodes > 1 for _, nodes, _ in made["target"]) == recorded
    assert bool(made["draft"]) == recorded


def test_a_text_of_a_few_tokens_records_nothing(monkeypatch):
    monkeypatch.setattr("treespec.model._CALLS_THAT_PAY", 12)
    spec = TreeSpeculator(tiny_pair("llama")[0], "ngram")
    spec.generate(PROMPT, max_new_tokens=6, do_sample=False)
    assert not any(one.replay is not None for one in spec._target._recordings.values())
