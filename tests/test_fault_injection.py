"""The losslessness tests would notice: each fault, put in on purpose, makes the checks of the other
files fail.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from lossless_checks import (
    ROUNDING,
    commit_error,
    greedy_difference,
    plain_greedy,
    plain_sampled,
    random_parents,
    sampled_difference,
    speculator,
    tree_logits_error,
)
from tiny_models import prompts, tiny_pair

from treespec import acceptance, cache, engine, hf, sampling
from treespec import model as model_module
from treespec.model import TreeModel
from treespec.sources.model import ModelSource
from treespec.tree import ancestor_matrix

# A fault must stand out of rounding by far, not by luck.
OBVIOUS = 100 * ROUNDING
SAMPLED = {"seed": 1, "temperature": 1.0, "top_k": 0}


def leak_siblings(monkeypatch):
    """Every node sees all nodes before it, as under a plain causal mask."""
    bias = hf.Forward.bias

    def leaking(self, *args):
        if self.visible is not None:
            num_nodes, seen = self.visible.shape[1:]
            before = torch.ones(num_nodes, seen, dtype=torch.bool).tril_(seen - num_nodes)
            self.visible = before.expand_as(self.visible)
        return bias(self, *args)

    monkeypatch.setattr(hf.Forward, "bias", leaking)


def leak_one_sibling(monkeypatch):
    """Node 2 sees node 1, and no other node sees too much."""
    matrix = ancestor_matrix

    def leaking(parents, max_depth):
        visible = matrix(parents, max_depth)
        if visible.shape[1] > 2:
            visible[:, 2, 1] = True
        return visible

    for module in ("treespec.tree", "lossless_checks"):
        monkeypatch.setattr(f"{module}.ancestor_matrix", leaking)


def use_slot_positions(monkeypatch):
    """Node i stands at prefix + i, however deep it is."""
    forward = TreeModel.forward

    def slots(self, tokens, positions, visible, offset=0, *more, **keywords):
        rows = torch.arange(tokens.shape[1]) + offset
        positions = torch.tensor(self.cache.prefix_lens)[:, None] + rows
        return forward(self, tokens, positions, visible, offset, *more, **keywords)

    monkeypatch.setattr(TreeModel, "forward", slots)


def window_by_slot(monkeypatch):
    """A sliding window that counts rows of the cache rather than positions of the text."""

    def slots(self):
        return torch.arange(self.num_slots).repeat(len(self.cache.prefix_lens), 1)

    monkeypatch.setattr(hf.Forward, "_key_positions", slots)


def no_window(monkeypatch):
    bias = hf.Forward.bias
    monkeypatch.setattr(
        hf.Forward,
        "bias",
        lambda self, _, dtype: bias(self, model_module.hf.causal_mask_function, dtype),
    )


def no_softcap(monkeypatch):
    attend = hf.Forward.attend
    # query, key, value, bias and scale come before the cap
    monkeypatch.setattr(
        hf.Forward, "attend", lambda self, *args: attend(self, *args[:5], None, *args[6:])
    )


def first_rows_prefix_for_all(monkeypatch):
    """Every row of a batch writes its nodes where the first row's go."""

    def write(self, layer, keys, values):
        start = self.cache.prefix_lens[0] + self.offset
        self.cache.keys[layer][:, :, start : start + self.num_nodes] = keys
        self.cache.values[layer][:, :, start : start + self.num_nodes] = values

    monkeypatch.setattr(hf.Forward, "write", write)


def commit_first_rows(monkeypatch):
    """Keeps as many rows as the path has, but always the first ones."""
    commit = cache.TreeCache.commit
    monkeypatch.setattr(
        cache.TreeCache,
        "commit",
        lambda self, paths: commit(self, [list(range(len(path))) for path in paths]),
    )


def commit_one_row_off(monkeypatch):
    commit = cache.TreeCache.commit

    def shifted(self, paths):
        commit(self, [[*path[:-1], path[-1] - 1] if len(path) > 1 else path for path in paths])

    monkeypatch.setattr(cache.TreeCache, "commit", shifted)


def accept_any_child(monkeypatch):
    """The first child is stepped on to, whatever token it carries."""
    decide = acceptance.decide

    def lenient(logits, tree, picker, rows):
        verdicts = decide(logits, tree, picker, rows)
        for row, verdict in enumerate(verdicts):
            node = verdict.path[-1]
            children = (tree.parents[row] == node).nonzero().flatten().tolist()
            if children and len(verdict.tokens) < rows[row].max_tokens:
                verdict.tokens[-1] = int(tree.tokens[row, children[0]])
                verdict.path.append(children[0])
                verdict.tokens.append(int(logits[row, children[0]].argmax()))
        return verdicts

    monkeypatch.setattr(engine, "decide", lenient)


def emit_wrong_bonus(monkeypatch):
    """The token after the path is picked from the root's logits."""
    decide = acceptance.decide

    def wrong(logits, tree, picker, rows):
        verdicts = decide(logits, tree, picker, rows)
        for row, verdict in enumerate(verdicts):
            if len(verdict.path) > 1:
                verdict.tokens[-1] = int(logits[row, 0].argmax())
        return verdicts

    monkeypatch.setattr(engine, "decide", wrong)


def noise_one_position_late(monkeypatch):
    at = sampling.CoupledNoise.at
    monkeypatch.setattr(
        sampling.CoupledNoise, "at", lambda self, row, position: at(self, row, position + 1)
    )


def noise_ignores_row(monkeypatch):
    at = sampling.CoupledNoise.at

    def first(self, row, position):
        kept, self.row_ids = self.row_ids, [0] * len(self.row_ids)
        try:
            return at(self, row, position)
        finally:
            self.row_ids = kept

    monkeypatch.setattr(sampling.CoupledNoise, "at", first)


def noise_by_place_among_active_rows(monkeypatch):
    """Noise follows a row's place in the shrinking batch rather than the row."""
    monkeypatch.setattr(sampling.CoupledNoise, "drop_row", lambda self, row: self.row_ids.pop())


def noise_by_step_of_the_round(monkeypatch):
    """All tokens of a round use the noise of its first position."""
    monkeypatch.setattr(sampling, "count", lambda: itertools.repeat(0))


# --- per-node logits -----------------------------------------------------------------------------


def logits_error(ready: TreeModel) -> float:
    trees = [random_parents(24, 0.6, seed=1), random_parents(24, 0.6, seed=2)]
    return tree_logits_error(ready, [prompts(1, 20, seed=1)[0], prompts(1, 9, seed=2)[0]], trees)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(
    "fault", [leak_siblings, leak_one_sibling, use_slot_positions, first_rows_prefix_for_all]
)
def test_logits_show_faults_of_every_model_type(monkeypatch, kind, fault, record):
    ready = TreeModel(tiny_pair(kind)[0], "target", record)
    assert logits_error(ready) < ROUNDING
    fault(monkeypatch)
    assert logits_error(TreeModelLike(ready)) > OBVIOUS


class TreeModelLike(TreeModel):
    """The same attached model without the recordings made before a fault."""

    def __init__(self, ready: TreeModel) -> None:
        self.__dict__.update(ready.__dict__)
        self._recordings.clear()


@pytest.mark.parametrize("fault", [window_by_slot, no_window, no_softcap])
def test_logits_show_faults_of_gemma2(monkeypatch, fault):
    ready = TreeModel(tiny_pair("gemma2")[0], "target", record=False)
    fault(monkeypatch)
    assert logits_error(ready) > OBVIOUS


@pytest.mark.parametrize("fault", [commit_first_rows, commit_one_row_off])
def test_logits_after_a_commit_show_wrong_rows(monkeypatch, kind, fault):
    ready = TreeModel(tiny_pair(kind)[0], "target", record=False)
    case = (ready, prompts(1, 15)[0], [-1, 0, 0, 2, 2, 4], [0, 2, 4, 5])
    assert commit_error(*case) < ROUNDING
    fault(monkeypatch)
    assert commit_error(*case) > OBVIOUS


@pytest.mark.parametrize("fault", [leak_siblings, use_slot_positions])
def test_attachment_refuses_a_model_that_would_be_wrong(monkeypatch, kind, fault):
    fault(monkeypatch)
    with pytest.raises(
        NotImplementedError, match=r"^target \(.*\) cannot verify a tree .*logits differ by"
    ):
        TreeModel(tiny_pair(kind)[0], "target")


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["draft", "merged"])
@pytest.mark.parametrize(
    "fault",
    [
        leak_siblings,
        use_slot_positions,
        first_rows_prefix_for_all,
        commit_first_rows,
        commit_one_row_off,
        accept_any_child,
        emit_wrong_bonus,
    ],
)
def test_greedy_text_shows_faults(monkeypatch, fault, source):
    spec = speculator("llama", "best_first", source)
    plain_greedy("llama", 4, 64)
    fault(monkeypatch)
    assert greedy_difference(spec, "llama", 4, 64) is not None


@pytest.mark.parametrize("fault", [window_by_slot, no_window, no_softcap])
def test_greedy_text_of_gemma2_shows_faults(monkeypatch, fault):
    spec = speculator("gemma2", "best_first", "merged")
    plain_greedy("gemma2", 4, 64)
    fault(monkeypatch)
    assert greedy_difference(spec, "gemma2", 4, 64) is not None


@pytest.mark.parametrize(
    "fault",
    [
        leak_siblings,
        use_slot_positions,
        commit_first_rows,
        accept_any_child,
        emit_wrong_bonus,
        noise_one_position_late,
        noise_ignores_row,
        noise_by_step_of_the_round,
    ],
)
def test_sampled_text_shows_faults(monkeypatch, fault):
    spec = speculator("llama", "best_first", "merged")
    plain_sampled("llama", 4, 64, **SAMPLED)
    fault(monkeypatch)
    assert sampled_difference(spec, "llama", 4, 64, **SAMPLED) is not None


def test_sampled_text_shows_noise_that_follows_places(monkeypatch):
    options = {**SAMPLED, "eos_token_id": 9, "pad_token_id": 0}
    spec = speculator("llama", "best_first", "merged")
    expected = plain_sampled("llama", 4, 96, **options)
    lengths = (expected != 0).sum(1)
    assert lengths[:-1].min() < lengths[-1], (
        "a row finishes before the last one, which takes its place"
    )
    assert sampled_difference(spec, "llama", 4, **options) is None
    noise_by_place_among_active_rows(monkeypatch)
    assert sampled_difference(spec, "llama", 4, **options) is not None


# --- faults that must not matter -----------------------------------------------------------------


def test_a_broken_draft_costs_time_never_text(monkeypatch):
    """Whatever a draft's forwards give, the text stays; only fewer tokens are kept a round."""
    spec = speculator("llama", "best_first", "draft")
    assert greedy_difference(spec, "llama", 4, 64) is None
    kept = spec.stats.tokens_per_round
    for name in ("root_logits", "level_logits"):
        method = getattr(ModelSource, name)

        def shuffled(self, *args, method=method):
            out = method(self, *args)
            if isinstance(out, tuple):
                return out[0].flip(-1), *out[1:]
            return out.flip(-1)

        monkeypatch.setattr(ModelSource, name, shuffled)
    monkeypatch.setattr(
        ModelSource, "commit", lambda self, paths: self.model.cache.commit([[0] for _ in paths])
    )
    assert greedy_difference(spec, "llama", 4, 64) is None
    assert sampled_difference(spec, "llama", 4, 64, **SAMPLED) is None
    assert spec.stats.tokens_per_round < kept
