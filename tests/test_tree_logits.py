"""Logits of every node of a tree are those of the same tokens in a plain sequence, on every model
type.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from lossless_checks import (
    ROUNDING,
    commit_error,
    paths_from_root,
    random_parents,
    tree_logits_error,
)
from tiny_models import prompts, tiny_pair

from treespec.model import TreeModel

# A recorded forward is trusted, and replayed, from its third call on.
REPLAYED = 4
TREES = [(1, 0.0), (2, 1.0), (5, 0.5), (16, 0.2), (31, 1.0), (33, 0.5), (64, 0.5), (64, 0.05)]


def prefixes(*lengths: int) -> list[torch.Tensor]:
    return [prompts(1, length, seed=length)[0] for length in lengths]


@pytest.fixture(params=[False, True], ids=["eager", "recorded"])
def ready(request, kind) -> TreeModel:
    return TreeModel(tiny_pair(kind)[0], "target", record=request.param)


@pytest.mark.parametrize(("num_nodes", "bushiness"), TREES)
def test_random_trees(ready, num_nodes, bushiness):
    parents = random_parents(num_nodes, bushiness, seed=num_nodes)
    repeats = REPLAYED if ready.recording_reason is None else 1
    assert (
        tree_logits_error(ready, prefixes(17), [parents], repeats=repeats, seed=num_nodes)
        < ROUNDING
    )


def test_ragged_batch(ready):
    """Two rows with trees of their own, one prefix longer than the other and than Gemma-2's
    window.
    """
    trees = [random_parents(24, 0.3, seed=1), random_parents(24, 0.8, seed=2)]
    repeats = REPLAYED if ready.recording_reason is None else 1
    assert tree_logits_error(ready, prefixes(29, 4), trees, repeats=repeats) < ROUNDING
    assert tree_logits_error(ready, prefixes(1, 30), trees, repeats=repeats) < ROUNDING


def test_chain_and_star(ready):
    for parents in ([-1, *range(20)], [-1] + [0] * 20):
        assert tree_logits_error(ready, prefixes(17), [parents]) < ROUNDING


def test_a_prefix_of_several_chunks(kind):
    ready = TreeModel(tiny_pair(kind)[0], "target")
    assert tree_logits_error(ready, prefixes(300), [random_parents(12, 0.5, seed=3)]) < ROUNDING


def test_more_nodes_than_are_recorded(kind):
    ready = TreeModel(tiny_pair(kind)[0], "target")
    assert tree_logits_error(ready, prefixes(9), [random_parents(100, 0.3, seed=4)]) < ROUNDING


@pytest.mark.parametrize("seed", range(4))
def test_a_committed_path_is_a_prefix(kind, seed):
    """After a commit the model continues as if it had read the path's tokens alone."""
    ready = TreeModel(tiny_pair(kind)[0], "target", record=False)
    parents = random_parents(20, 0.6, seed)
    paths = paths_from_root(parents)
    for path in (max(paths, key=len), paths[0], paths[-1], paths[10]):
        assert commit_error(ready, prefixes(15)[0], parents, path, seed) < ROUNDING


def test_a_draft_grows_level_by_level_like_a_whole_tree(kind):
    """Levels forwarded one by one, each past the rows of the ones before, give the logits of one
    forward.
    """
    ready = TreeModel(tiny_pair(kind)[1], "draft", record=False)
    prefix, tokens = prefixes(14)[0], prompts(1, 7, seed=5)
    parents = [-1, 0, 0, 1, 1, 2, 2]
    depths = torch.tensor([[0, 1, 1, 2, 2, 2, 2]])
    visible = torch.eye(7, dtype=torch.bool)
    for node, parent in enumerate(parents[1:], 1):
        visible[node] |= visible[parent]
    with torch.inference_mode():
        whole, levels = [], []
        for logits, cuts in ((whole, [0, 7]), (levels, [0, 1, 3, 7])):
            ready.allocate(1, 64)
            ready.ingest(prefix[None], [14])
            for start, end in itertools.pairwise(cuts):
                part = slice(start, end)
                call = (
                    tokens[:, part],
                    14 + depths[:, part],
                    visible[None, part, :end],
                    start,
                    14 + depths[:, :end],
                )
                logits.append(ready.forward(*call).clone())
    error = (torch.cat(levels, 1) - whole[0]).abs().max() / whole[0].std()
    assert error < ROUNDING
