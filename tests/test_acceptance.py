"""Trees are decided in lists as one op decides them."""

from __future__ import annotations

import pytest
import torch
from lossless_checks import random_parents
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from treespec.kernels import ops

from treespec.acceptance import RowText, decide
from treespec.sampling import TokenPicker
from treespec.tree import Tree, ancestor_matrix

VOCAB, LENS = 3, [9, 30, 4]
WARPERS = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(2), TopPLogitsWarper(0.9)]


def trees(nodes: int, dtype: torch.dtype, drafted: bool) -> tuple[torch.Tensor, Tree]:
    """Three trees, the last a smaller one, of so few tokens that paths are long; and logits."""
    generator = torch.Generator().manual_seed(nodes + 3)
    parents = torch.tensor([random_parents(nodes, 0.8, seed=seed) for seed in range(3)])
    counts = torch.tensor([nodes, nodes, max(nodes - 9, 1)])
    logits = torch.randn(3, nodes, VOCAB, generator=generator).to(dtype)
    tree = Tree(
        tokens=torch.randint(VOCAB, (3, nodes), generator=generator),
        parents=parents,
        depths=ops.node_depths(parents, counts),
        visible=ancestor_matrix(parents, nodes),
        num_nodes=counts,
        scores=torch.zeros(3, nodes),
        draft_rows=torch.randint(-1, 9, (3, nodes), generator=generator) if drafted else None,
    )
    return logits, tree


def decided(logits: torch.Tensor, tree: Tree, implementation: str, sampled: bool, warpers: list):
    """The verdicts, or the error there was."""
    picker = TokenPicker(
        warpers, sampled, 5, [0, 3, 7], VOCAB, torch.device("cpu"), "coupled", implementation
    )
    text = torch.zeros(1, 99)
    rows = [RowText(text, n, n, 5, lambda token, _: token == 2, read=False) for n in LENS]
    assert picker.follows(tree) == (implementation == "torch")
    try:
        return decide(logits, tree, picker, rows)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("nodes, drafted", [(1, False), (24, False), (24, True)])
@pytest.mark.parametrize("sampled, warpers", [(False, []), (True, []), (True, WARPERS)])
def test_trees_are_decided_as_by_one_op(nodes, drafted, sampled, warpers, dtype):
    logits, tree = trees(nodes, dtype, drafted)
    found = decided(logits, tree, "torch", sampled, warpers)
    assert found == decided(logits, tree, "auto", sampled, warpers)
    assert nodes == 1 or max(len(verdict.path) for verdict in found) >= 3


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("value, nodes", [("nan", 24), ("nan", 1), ("-inf", 24), ("-inf", 1)])
def test_what_cannot_be_decided_is_told_as_by_one_op(value, nodes, sampled):
    logits, tree = trees(nodes, torch.float32, False)
    logits[1, 0] = float(value)
    found = decided(logits, tree, "torch", sampled, [])
    assert found == decided(logits, tree, "auto", sampled, [])
    assert found is None if (value, nodes) == ("nan", 24) else "no token can be picked" in found
