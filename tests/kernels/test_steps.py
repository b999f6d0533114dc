"""Steps between forwards, captured as graphs: they do what the same functions do when called. On a
GPU the graphs are CUDA's; elsewhere they are emulated, over kernels in the interpreter."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from test_captured_forwards import small_model

from treespec import (
    BestFirstTree,
    Chain,
    FixedTree,
    TreeSpeculator,
    auto,
    graphs,
    rehearsal,
    steps,
)

pytestmark = pytest.mark.usefixtures("made")

CALLS = steps.CALLS_BEFORE + 4


class Pile:
    """Attributes that are changed in place, replaced, and counted."""

    def __init__(self, first: torch.Tensor) -> None:
        self.total = first.clone()
        self.last = first
        self.count = 1

    def put(self, value: torch.Tensor, factor: float) -> torch.Tensor:
        self.total += factor * value
        self.last = value + 1
        self.count += 1
        return self.total * 2


@torch.inference_mode()
def test_owners_attributes_are_changed_as_by_calls(device):
    replayed, called = steps.Steps(captures=True), steps.Steps()
    for turn in range(CALLS):
        first, second = (torch.full((3,), float(k + turn), device=device) for k in (1, 5))
        piles = [one.make(Pile, first) for one in (replayed, called)]
        for value, factor in ((first, 2.0), (second, 2.0), (second, 0.5)):
            both = zip((replayed, called), piles)
            found = [one.on(pile, Pile.put, value, factor) for one, pile in both]
            assert torch.equal(*found), (turn, factor)
            for name, expected in vars(piles[1]).items():
                other = vars(piles[0])[name]
                assert torch.equal(torch.as_tensor(other), torch.as_tensor(expected))
    assert replayed.first_ms > 0.0 and replayed.capture_ms > 0.0 and replayed.num_replayed == 4
    assert called.first_ms == called.capture_ms == called.num_replayed == 0
    replayed.start_round()
    replayed.on(replayed.make(Pile, first), Pile.put, second, 2.0)
    assert replayed.first_ms == replayed.extra_ms == replayed.capture_ms == 0.0


@torch.inference_mode()
def test_inputs_that_changed_places(device):
    """What one step returns may come as another argument than it did when that was captured."""
    one = steps.Steps(captures=True)

    def split(x):
        return x + 1, x + 2

    def difference(x, y):
        return x - y

    for turn in range(CALLS):
        low, high = one(split, torch.full((2,), float(turn), device=device))
        assert one(difference, low, high).tolist() == [-1.0, -1.0]
    assert one(difference, high, low).tolist() == [1.0, 1.0]
    assert one(difference, high, high).tolist() == [0.0, 0.0]


@torch.inference_mode()
def test_a_step_that_reads_on_the_host_is_called(device):
    one = steps.Steps(captures=True)

    def doubled(x):
        return x * (2 if float(x.sum()) > 0 else -2)

    for turn in range(-3, CALLS):
        x = torch.full((2,), float(turn), device=device)
        assert one(doubled, x).tolist() == x.abs().mul(2).tolist()
    assert len(one.refusals) == 1 and "doubled" in one.refusals[0]
    assert "not permitted when stream is capturing" in one.refusals[0]
    # and others still are captured
    for turn in range(CALLS):
        assert one(torch.neg, torch.full((2,), float(turn), device=device)).tolist() == [-turn] * 2
    assert one.num_replayed == 1


@torch.inference_mode()
def test_a_replay_that_differs_from_the_call_is_dropped(device, monkeypatch):
    """And what was asked for comes all the same, though the replay has spoiled its arguments."""
    one = steps.Steps(captures=True)
    capture = graphs.capture_graph

    def broken(function, *rest):
        replay, result = capture(function, *rest)
        total = pile.total

        def spoiled():
            replay()
            total.fill_(99.0)

        return spoiled, result

    pile = one.make(Pile, torch.ones(2, device=device))
    value = torch.full((2,), 3.0, device=device)
    monkeypatch.setattr(graphs, "capture_graph", broken)
    for turn in range(CALLS):
        pile.total, pile.count = one.hold(torch.full((2,), float(turn), device=device)), 1
        assert one.on(pile, Pile.put, value, 2.0).tolist() == [2.0 * (turn + 6)] * 2
        assert pile.total.tolist() == [turn + 6.0] * 2
    assert one.refusals == ["Pile.put: 0% of its replay is what a call gives"]


def test_agreement_of_tokens_is_exact():
    found, others = torch.tensor([100_000, 7]), torch.tensor([100_001, 7])
    assert steps._agreement((found, None), (others, None)) == 0.5
    assert steps._agreement({"a": found}, {"a": found.clone()}) == 1.0
    rounded = torch.tensor([1.0, -torch.inf, torch.nan])
    assert steps._agreement(rounded + 1e-4, rounded) == 1.0


@torch.inference_mode()
def test_a_buffer_that_is_gone_is_held_no_more(device):
    one = steps.Steps(captures=True)
    buffer = one.hold(torch.ones(3, device=device))
    assert one._lies_still(buffer) and one._lies_still(buffer[:2])
    held = dict(one._held)
    del buffer
    assert [ref() for ref in held.values()] == [None]


def trees_of(spec: TreeSpeculator, ids, **options) -> tuple[list, torch.Tensor]:
    """The trees of all rounds, and the text."""
    trees, observe = [], spec._policy.observe

    def listen(outcome) -> None:
        fields = {name: x for name, x in vars(outcome.tree).items() if x is not None}
        # of what is padded to a width, the nodes
        here = torch.arange(outcome.num_nodes, device=ids.device) < outcome.tree.num_nodes[:, None]
        # which rows a draft's nodes have depends on how far it lags behind
        if "draft_rows" in fields:
            fields["draft_rows"] = fields["draft_rows"] >= 0
        kept = {n: x.clone()[here].tolist() for n, x in fields.items() if x.shape == here.shape}
        trees.append((kept, outcome.paths))
        observe(outcome)

    spec._policy.observe = listen
    text = spec.generate(ids, do_sample="seed" in options, pad_token_id=0, **options)
    spec._policy.observe = observe
    return trees, text


def same(found, expected) -> None:
    (kept, paths), (other, other_paths) = found, expected
    assert paths == other_paths and kept.keys() == other.keys()
    for name, values in kept.items():
        assert values == pytest.approx(other[name], abs=1e-4), name


GREEDY = {}
SAMPLED = {"seed": 3, "temperature": 0.8, "top_k": 0}
@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 3, 39 * 39, 513])
def test_agreement_of_the_same_is_complete(size, device):
    values = torch.arange(size, device=device)
    assert steps._agreement((values, values > 3), (values.clone(), values > 3)) == 1.0


CASES = [
    (BestFirstTree(6, 2, 2), [GREEDY, SAMPLED]),
    (FixedTree(2, 2, 0.02, 8), [GREEDY]),
    (Chain(2), [SAMPLED]),
]


@pytest.mark.parametrize(("shape", "ways"), CASES, ids=["best-first", "pruned", "chain"])
def test_rounds_grow_the_trees_of_called_steps(shape, ways, device):
    """Drafts and lookups, greedy and sampled, round by round."""
    target = small_model("llama", device)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        draft.lm_head.weight += 0.4 * torch.randn(draft.lm_head.weight.shape).to(device)
    captured, called = (
        TreeSpeculator(target, [draft, "ngram"], shape, attention="triton", cuda_graphs=on)
        for on in (True, False)
    )
    ids = torch.randint(2, 128, (1, 7), generator=torch.Generator().manual_seed(1)).to(device)
    ids = torch.cat([ids, ids], dim=1)
    for way in ways:
        options = {**way, "max_new_tokens": 14}
        (found, text), (expected, other) = (
            trees_of(spec, ids, **options) for spec in (captured, called)
        )
        assert torch.equal(text, other)
        written = compared = 0
        for now, then in zip(found, expected):
            # the last rounds of a text grow less where nothing is captured
            if written + 4 > options["max_new_tokens"]:
                break
            same(now, then)
            written += len(then[1][0])
            compared += 1
        assert compared >= steps.CALLS_BEFORE + 2
    rest, grown = captured._target.steps, captured._model.grown
    assert not rest.refusals and not grown.refusals
    # a pruned level is looked at before the next, all others are one step
    assert rest.num_replayed > 3 and (grown.num_replayed > 0) is captured._policy.looks_at_nothing


def few_scenes(monkeypatch) -> None:
    """The interpreter takes its time for every shape."""
    few = {"LEVELS_AHEAD": (2,), "FEW_NODE_SIZES": (1, 8), "LOOKUP_LENGTHS": (5,)}
    for module in (auto, rehearsal):
        for name, values in few.items():
            monkeypatch.setattr(module, name, values)
    monkeypatch.setattr(rehearsal.Rehearsal, "node_sizes", (1, 8))
    monkeypatch.setattr(rehearsal.Rehearsal, "max_depth", 2)


def chooses(monkeypatch, policy, levels: int, lookup: bool) -> list:
    """Lets auto draw one shape; what it will observe."""
    seen, observe, begin = [], policy.observe, policy.begin_round

    def listen(outcome) -> None:
        seen.append(outcome)
        observe(outcome)

    monkeypatch.setattr(policy, "observe", listen)
    monkeypatch.setattr(policy, "begin_round", lambda left: begin(left) or True)
    monkeypatch.setattr(policy, "wants_lookup", lambda: lookup)
    monkeypatch.setattr(policy, "wants_matches", lambda match_lengths: True)
    monkeypatch.setattr(policy, "wants_draft", lambda scores: levels > 0)
    monkeypatch.setattr(policy, "levels_ahead", lambda: levels)
    monkeypatch.setattr(policy, "nodes_to_verify", lambda scores: 8)
    return seen


def test_a_draft_that_lags_catches_up_in_captured_forwards(device, monkeypatch):
    """Asked now and then, it grows the trees of one that takes them in by a prefill. What it
    enters a round with is captured before."""
    monkeypatch.setattr("treespec.sources.model._LONGEST_CATCH_UP", 8)
    target = small_model("llama", device)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        draft.lm_head.weight += 0.4 * torch.randn(draft.lm_head.weight.shape).to(device)
    ids = torch.randint(2, 128, (1, 7), generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for graphs_on in (True, False):
        options = {"attention": "triton", "cuda_graphs": graphs_on}
        spec = TreeSpeculator(target, draft, FixedTree(2, 2, 0.02, 8), **options)
        turns = itertools.count()
        wants = functools.partial(lambda turns, scores: next(turns) % 16 < 3, turns)
        monkeypatch.setattr(spec._policy, "wants_draft", wants)
        found.append(trees_of(spec, ids, max_new_tokens=28))
        assert spec._model.cache.prefix_lens[0] > 24 and spec.stats.draft_forwards > 3
    (trees, text), (others, other_text) = found
    assert torch.equal(text, other_text) and len(trees) == len(others) > 17
    for now, then in zip(trees, others):
        same(now, then)


def test_auto_after_a_warm_up_captures_nothing_more(device, monkeypatch):
    """Levels planned ahead, with and without lookups; the text is plain decoding's."""
    few_scenes(monkeypatch)
    target = small_model("llama", device)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        draft.lm_head.weight += 0.4 * torch.randn(draft.lm_head.weight.shape).to(device)
    spec = TreeSpeculator(target, draft, attention="triton", cuda_graphs=True)
    plain = TreeSpeculator(target, None, attention="triton", cuda_graphs=False)
    picks = {"do_sample": True, **SAMPLED}
    spec.warmup(max_length=48, **{name: picks[name] for name in picks if name != "seed"})
    engine, grown = spec._engine, spec._model.grown
    assert engine.policy is spec._policy and not engine.steps.refusals and not grown.refusals
    # with and without lookups, and perhaps what auto itself chose at first
    captured = grown.num_replayed
    assert captured >= 2
    ids = torch.randint(2, 128, (1, 7), generator=torch.Generator().manual_seed(1)).to(device)
    ids = torch.cat([ids, ids], dim=1)
    written = {**picks, "max_new_tokens": 10, "pad_token_id": 0}
    expected = plain.generate(ids, **written)
    for levels, lookup in ((0, True), (2, False), (2, True)):
        with monkeypatch.context() as patch:
            seen = chooses(patch, spec._policy, levels, lookup)
            assert torch.equal(spec.generate(ids, **written), expected)
        assert {outcome.draft_levels for outcome in seen} <= {0, levels}
        wide = [outcome for outcome in seen if outcome.num_nodes == 8]
        assert len(wide) >= 2 and all(outcome.tree.parents.is_cpu for outcome in wide)
        # the text's first round lets the draft take in the prompt
        assert not any(outcome.recording_ms for outcome in wide[1:])
        if levels:
            assert len(spec._policy.promises.levels) == 1
    assert grown.num_replayed == captured and not grown.refusals and not engine.steps.refusals
