"""Cache rows of the accepted path move to their places and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tree_cases import FAST, INTERPRETED
from treespec.kernels import ops, reference

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_by_hand(implementation):
    """Prefix of 2; the path 0, 2, 3, 6 overlaps the rows it moves to."""
    cache = torch.arange(10.0).reshape(1, 1, 10, 1).repeat(1, 2, 1, 8)
    layers = [(cache.clone(), cache.clone() + 100)]
    path = torch.tensor([[0, 2, 3, 6, -1, -1, -1, -1]])
    arguments = layers, path, torch.tensor([3]), torch.tensor([2])
    if implementation == "reference":
        reference.compact_kv(*arguments)
    else:
        ops.compact_kv(*arguments, implementation=implementation)
    wanted = [0, 1, 2, 4, 5, 8, 6, 7, 8, 9]
    assert layers[0][0][0, 1, :, 7].tolist() == wanted
    assert layers[0][1][0, 0, :, 0].tolist() == [row + 100 for row in wanted]


@st.composite
def commits(draw, max_nodes=9):
    """path [B, P], accept_length [B], prefix_lens [B]: ascending paths, some of rows without a
    tree.
    """
    batch, capacity = draw(st.integers(1, 3)), draw(st.integers(1, max_nodes))
    paths, lengths = [], []
    for _ in range(batch):
        nodes = sorted({0, *draw(st.sets(st.integers(0, capacity - 1), max_size=capacity))})
        if draw(st.integers(0, 9)) == 0:
            nodes = []
        paths.append(nodes + [-1] * (capacity - len(nodes)))
        lengths.append(max(len(nodes) - 1, 0))
    prefixes = draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch))
    return torch.tensor(paths), torch.tensor(lengths), torch.tensor(prefixes)


LAYOUTS = {
    "bf16": [(torch.bfloat16, 2, 16, 16)] * 2,
    "layers_differ": [
        (torch.float32, 1, 8, 8),
        (torch.float32, 3, 4, 12),
        (torch.float32, 2, 16, 4),
    ],
    "odd_head": [(torch.float16, 2, 5, 5)],
    "four_bytes": [(torch.bfloat16, 2, 6, 6)],
    "int8": [(torch.int8, 2, 7, 32)],
    "head_80": [(torch.float16, 1, 80, 80)],
}


def caches(layout, batch, slots, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for dtype, heads, key_dim, value_dim in LAYOUTS[layout]:
        shapes = (batch, heads, slots, key_dim), (batch, heads, slots, value_dim)
        layers.append(
            tuple(torch.randn(shape, generator=generator).mul(20).to(dtype) for shape in shapes)
        )
    return layers


def check(layers, commit, implementation):
    wanted = [(keys.clone(), values.clone()) for keys, values in layers]
    addresses = [cache.data_ptr() for pair in layers for cache in pair]
    reference.compact_kv(wanted, *commit)
    ops.compact_kv(layers, *commit, implementation=implementation)
    assert [cache.data_ptr() for pair in layers for cache in pair] == addresses
    for got, right in zip(layers, wanted):
        assert torch.equal(got[0], right[0]) and torch.equal(got[1], right[1])


@FAST
@given(commits(), st.sampled_from(sorted(LAYOUTS)), st.integers(0, 9))
def test_torch_is_the_reference(commit, layout, seed):
    check(caches(layout, len(commit[0]), 15, seed), commit, "torch")


@INTERPRETED
@given(commits(), st.sampled_from(sorted(LAYOUTS)), st.integers(0, 9))
def test_triton_is_the_reference(commit, layout, seed):
    check(caches(layout, len(commit[0]), 15, seed), commit, "triton")


@BOTH
def test_a_path_of_more_rows_than_a_block(implementation):
    path = torch.arange(0, 64).mul(2)[None].clone()
    check(caches("bf16", 1, 140), (path, torch.tensor([63]), torch.tensor([3])), implementation)


@BOTH
@pytest.mark.parametrize("view", ["heads_last", "sliced_rows", "strided_dim", "unaligned"])
def test_strided_caches(view, implementation):
    make = {
        "heads_last": lambda: torch.randn(2, 12, 3, 8).transpose(1, 2),
        "sliced_rows": lambda: torch.randn(2, 3, 30, 8)[:, :, 4:16],
        "strided_dim": lambda: torch.randn(2, 3, 12, 16)[..., ::2],
        "unaligned": lambda: torch.randn(2 * 3 * 12 * 8 + 1)[1:].view(2, 3, 12, 8),
    }[view]
    commit = (
        torch.tensor([[0, 3, 5, -1, -1, -1], [0, 1, 2, 4, -1, -1]]),
        torch.tensor([2, 3]),
        torch.tensor([6, 0]),
    )
    check([(make(), make())], commit, implementation)


def test_a_table_is_kept_while_its_caches_stay_and_not_confused_after(monkeypatch):
    from treespec.kernels import compaction

    monkeypatch.setattr(compaction, "_MAX_TABLES", 4)
    layers = caches("layers_differ", 1, 12)
    arguments = torch.tensor([[0, 2, 3]]), torch.tensor([2]), torch.tensor([1])
    compaction._tables.clear()
    for _ in range(3):
        compaction.launch_compact_kv(layers, *arguments)
    assert len(compaction._tables) == 1
    kept = []
    for seed in range(12):
        kept.append(caches("bf16", 1, 12, seed))
        check(kept[-1], arguments, "triton")
    assert 1 <= len(compaction._tables) <= 4


@pytest.mark.parametrize("change, message", [
    ({"path": torch.tensor([[0, 9, -1]])}, "path must stay inside the 10 cache rows; got prefix 1"),
    ({"prefix_lens": torch.tensor([-1])}, "path must stay inside the 10 cache rows; got prefix -1"),
    ({"accept_length": torch.tensor([3])}, r"accept_length must lie in 0\.\.2"),
    ({"accept_length": torch.tensor([0, 0])}, r"accept_length must be .*\[B\] = \[1\]"),
    ({"path": torch.tensor([0, 1, 2])}, r"path must be .*\[B, P\]"),
    ({"layers": [(torch.zeros(2, 1, 10, 4),) * 2]}, "k_cache of layer 0 must be .* B = 1; got"),
    ({"layers": [(torch.zeros(1, 1, 10, 4), torch.zeros(10, 4))]}, "v_cache of layer 0 must be"),
])  # fmt: skip
def test_errors(change, message):
    cache = torch.zeros(1, 1, 10, 4)
    inputs = {"layers": [(cache, cache.clone())], "path": torch.tensor([[0, 1, -1]]),
                  "accept_length": torch.tensor([1]), "prefix_lens": torch.tensor([1])}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.compact_kv(**{**inputs, **change})


def test_no_layers_is_no_work():
    ops.compact_kv([], torch.tensor([[0]]), torch.tensor([0]), torch.tensor([0]))
