"""Ancestor bits, depths and the best nodes: PyTorch and Triton against the reference, the reference
by
hand.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tree_cases import FAST, INTERPRETED, SHAPES, batches, binary, chain, same, star
from treespec.kernels import ops, reference

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])
ALL = pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
INF, NAN = float("inf"), float("nan")


def run(name, implementation, *arguments):
    if implementation == "reference":
        return getattr(reference, name)(*arguments)
    return getattr(ops, name)(*arguments, implementation=implementation)


@ALL
def test_bits_and_depths_by_hand(implementation):
    """0 -> 1, 2; 2 -> 3; the fifth node does not exist."""
    parents, num_nodes = torch.tensor([[-1, 0, 0, 2, 0]]), torch.tensor([4])
    bits = run("ancestor_bits", implementation, parents, num_nodes)
    assert bits.dtype == torch.int32
    assert bits[0, :, 0].tolist() == [0b0001, 0b0011, 0b0101, 0b1101, 0]
    assert run("node_depths", implementation, parents, num_nodes).tolist() == [[0, 1, 1, 2, 0]]


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_named_shapes(shape, implementation, device):
    if implementation == "triton" and device.type == "cpu" and shape == "chain_256":
        pytest.skip("32,896 interpreted steps take minutes; binary_256 has as many nodes")
    parents, num_nodes = torch.tensor([SHAPES[shape]]), torch.tensor([len(SHAPES[shape])])
    there = parents.to(device), num_nodes.to(device)
    same([ops.ancestor_bits(*there, implementation=implementation).cpu()],
         [reference.ancestor_bits(parents, num_nodes)])  # fmt: skip
    same([ops.node_depths(*there, implementation=implementation).cpu()],
         [reference.node_depths(parents, num_nodes)])  # fmt: skip


def test_the_sign_bit_is_a_node():
    bits = ops.ancestor_bits(torch.tensor([chain(33)]), torch.tensor([33]))
    assert bits[0, 31].tolist() == [-1, 0] and bits[0, 32].tolist() == [-1, 1]


@FAST
@given(batches(max_nodes=40))
def test_torch_ancestry_is_the_reference(batch):
    _, parents, num_nodes = batch
    same([ops.ancestor_bits(parents, num_nodes)], [reference.ancestor_bits(parents, num_nodes)])
    same([ops.node_depths(parents, num_nodes)], [reference.node_depths(parents, num_nodes)])


@INTERPRETED
@given(batches(max_nodes=12))
def test_triton_ancestry_is_the_reference(batch):
    _, parents, num_nodes = batch
    for name in ("ancestor_bits", "node_depths"):
        same(
            [run(name, "triton", parents, num_nodes)], [run(name, "reference", parents, num_nodes)]
        )


@ALL
def test_selection_by_hand(implementation):
    """Candidate 3 is good but hangs from a poor parent; 5 has no room; 4 does not exist."""
    scores = torch.tensor([[0.0, -1.0, -3.0, -0.5, -INF, -2.0]])
    parents = torch.tensor([[-1, 0, 0, 2, 1, 1]])
    nodes, new_parents, num_nodes = run("select_best_nodes", implementation, scores, parents, 4)
    assert nodes.tolist() == [[0, 1, 2, 5]] and new_parents.tolist() == [[-1, 0, 0, 1]]
    nodes, new_parents, num_nodes = run("select_best_nodes", implementation, scores, parents, 7)
    assert nodes.tolist() == [[0, 1, 2, 3, 5, -1, -1]] and num_nodes.tolist() == [5]
    assert new_parents.tolist() == [[-1, 0, 0, 2, 1, -1, -1]]


@st.composite
def candidates(draw, most=20):
    """Few distinct values, so that ties are common; some candidates missing or NaN; forests."""
    batch, count = draw(st.integers(1, 3)), draw(st.integers(1, most))
    value = st.sampled_from([0.0, -0.0, -0.5, -1.0, -2.0, -INF, NAN, 1.0])
    scores = [[draw(value) for _ in range(count)] for _ in range(batch)]
    parents = [[draw(st.integers(-1, node - 1)) for node in range(count)] for _ in range(batch)]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    return torch.tensor(scores, dtype=dtype), torch.tensor(parents), draw(st.integers(1, 25))


@FAST
@given(candidates())
def test_torch_selection_is_the_reference(case):
    same(ops.select_best_nodes(*case), reference.select_best_nodes(*case))


@INTERPRETED
@given(candidates())
def test_triton_selection_is_the_reference(case):
    same(run("select_best_nodes", "triton", *case), reference.select_best_nodes(*case))


@BOTH
def test_the_largest_selection(implementation):
    """256 of 2,048 candidates: a random tree whose values fall along every path."""
    generator = torch.Generator().manual_seed(0)
    count = 2048
    parents = torch.tensor(
        [
            [-1]
            + [
                int(torch.randint(max(0, n - 300), n, (1,), generator=generator))
                for n in range(1, count)
            ]
        ]
    )
    steps = -torch.rand(count, generator=generator)
    scores = torch.zeros(1, count)
    for node in range(1, count):
        scores[0, node] = scores[0, parents[0, node]] + steps[node]
    nodes, new_parents, num_nodes = ops.select_best_nodes(
        scores, parents, 256, implementation=implementation
    )
    assert num_nodes.item() == 256
    assert set(nodes[0].tolist()) == set(scores[0].topk(256).indices.tolist())
    kept = nodes[0].tolist()
    assert all(
        kept[above] == parents[0, node]
        for node, above in zip(kept[1:], new_parents[0, 1:].tolist())
    )


@pytest.mark.parametrize("change, message", [
    ({"parents": torch.tensor([[-1, 1, 0]])},
     "parents must be -1 or name an earlier candidate; got 1 for candidate 1"),
    ({"parents": torch.tensor([[-2, 0, 0]])}, "parents must be -1 or .* got -2 for candidate 0"),
    ({"parents": torch.tensor([[-1, 0]])}, r"parents must be .*\[1, 3\]"),
    ({"cum_logprobs": torch.zeros(3)}, r"cum_logprobs must be .*\[B, C\]; got float32 \[3\]"),
    ({"max_nodes": 0}, r"max_nodes must be an int in 1\.\.256; got 0"),
    ({"max_nodes": 257}, "max_nodes must be an int"),
    ({"cum_logprobs": torch.zeros(1, 2049),
     "parents": torch.tensor([star(2049)])}, "cum_logprobs must hold 1 to 2048"),
])  # fmt: skip
def test_selection_errors(change, message):
    inputs = {
        "cum_logprobs": torch.zeros(1, 3),
        "parents": torch.tensor([[-1, 0, 0]]),
        "max_nodes": 2,
    }
    with pytest.raises(ValueError, match=message):
        ops.select_best_nodes(**{**inputs, **change})


@pytest.mark.parametrize("name", ["ancestor_bits", "node_depths"])
def test_ancestry_errors(name):
    op = getattr(ops, name)
    with pytest.raises(
        ValueError, match=r"parents must name an earlier node .* got 1 for node 1 of row 0"
    ):
        op(torch.tensor([[-1, 1]]), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"num_nodes must lie in 0..2, the capacity N; got 3"):
        op(torch.tensor([[-1, 0]]), torch.tensor([3]))
    with pytest.raises(ValueError, match="parents must hold 1 to 256 nodes"):
        op(torch.tensor([binary(257)]), torch.tensor([3]))


@pytest.mark.parametrize("bad", [[[0, 0, 5, 3]], [[7, 7, 7, 7]], [[-1, -1, 1, 2]]])
def test_bad_parents_on_a_device_do_not_hang(bad):
    """A kernel cannot raise; it must end, and stay inside its buffers."""
    from treespec.kernels.tree_building import (
        launch_ancestor_bits,
        launch_node_depths,
        launch_select_best_nodes,
    )

    parents, num_nodes = torch.tensor(bad), torch.tensor([9])
    bits = launch_ancestor_bits(parents, num_nodes)
    assert bits.shape == (1, 4, 1) and bits[0, 0, 0] == 1
    assert launch_node_depths(parents, num_nodes).max() <= 3
    selection = launch_select_best_nodes(torch.zeros(1, 4), parents, 3)
    assert selection.nodes.tolist() == [[0, 1, 2]]
