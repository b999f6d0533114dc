"""Trees on the device: ancestor bits and depths, the best nodes closed under ancestors, and
continuations as a trie (docs/kernels/tree_building.md). One launch each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .drafting_rules import VOTES
from .round_tuning import next_power_of_two
from .verdict import NodeSelection


@triton.jit(do_not_specialize=["capacity", "width"])
def ancestry_kernel(
    parents_ptr, num_nodes_ptr, bits_ptr, depths_ptr,
    capacity, width,
    BITS: tl.constexpr, DEPTHS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One node climbs to its root; a parent has a lower index, so the climb ends."""
    # 1. The node, and whether it exists.
    pair = tl.program_id(0)
    b = pair // capacity
    count = tl.minimum(tl.load(num_nodes_ptr + b).to(tl.int32), capacity)
    node = pair % capacity
    word = tl.arange(0, BLOCK_W)
    bits = tl.zeros([BLOCK_W], tl.int32)
    depth = node * 0 - 1
    going = node < count
    # 2. The climb.
    while going:
        bits = bits | tl.where(word == node // 32, 1 << (node % 32), 0)
        depth += 1
        parent = tl.load(parents_ptr + b * capacity + node).to(tl.int32)
        going = (node > 0) & (parent >= 0) & (parent < node)
        node = tl.where(going, parent, node)
    # 3. The results.
    if BITS:
        tl.store(bits_ptr + pair * width + word, bits, mask=word < width)
    if DEPTHS:
        tl.store(depths_ptr + pair, tl.maximum(depth, 0).to(tl.int64))


@triton.jit(do_not_specialize=["candidates", "max_nodes"])
def select_kernel(
    scores_ptr, parents_ptr, nodes_ptr, new_parents_ptr, counts_ptr,
    candidates, max_nodes,
    DOUBLINGS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The best candidates of one row, one candidate a lane."""
    # 1. A candidate is worth no more than its least ancestor: the minimum by pointer doubling.
    b = tl.program_id(0)
    index = tl.arange(0, BLOCK_C)
    inside = index < candidates
    worth = tl.load(scores_ptr + b * candidates + index, mask=inside, other=-float("inf")).to(
        tl.float32
    )
    worth = tl.where(worth == worth, worth, -float("inf"))
    parents = tl.load(parents_ptr + b * candidates + index, mask=inside, other=-1).to(tl.int32)
    parents = tl.where(parents < index, parents, -1)
    # A candidate without parent points at itself.
    jump = tl.where(parents >= 0, parents, index)
    for _ in tl.static_range(DOUBLINGS):
        worth = tl.minimum(worth, tl.gather(worth, jump, 0))
        jump = tl.gather(jump, jump, 0)

    # 2. The max_nodes-th greatest worth, bit by bit on keys in the order of the worths (-0.0 is
    # 0.0).
    worth = worth + 0.0
    bits = worth.to(tl.uint32, bitcast=True)
    keys = tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)
    exists = worth > -float("inf")
    keys = tl.where(exists, keys, 0)
    key = tl.zeros([], tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        trial = key | bit
        bit = bit >> 1
        key = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= max_nodes, trial, key)

    # 3. All above it, and of its equals the lowest indices.
    above = exists & (keys > key)
    equal = exists & (keys == key)
    room = max_nodes - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    count = tl.sum(chosen.to(tl.int32), 0)
    new_parents = tl.where(parents >= 0, tl.gather(place, tl.maximum(parents, 0), 0), -1)

    # 4. The selection in ascending order, then its padding.
    row = b * max_nodes
    tl.store(nodes_ptr + row + place, index.to(tl.int64), mask=chosen)
    tl.store(new_parents_ptr + row + place, new_parents.to(tl.int64), mask=chosen)
    lane = tl.arange(0, BLOCK_N)
    padding = (lane >= count) & (lane < max_nodes)
    tl.store(nodes_ptr + row + lane, (lane * 0 - 1).to(tl.int64), mask=padding)
    tl.store(new_parents_ptr + row + lane, (lane * 0 - 1).to(tl.int64), mask=padding)
    tl.store(counts_ptr + b, count.to(tl.int64))


@triton.jit
def _vote_of(index, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
             FURTHER: tl.constexpr):  # fmt: skip
    further = tl.where(index == 2, THIRD, FURTHER)
    return tl.where(index == 0, FIRST, tl.where(index == 1, SECOND, further))


@triton.jit(do_not_specialize=["num", "length"])
def merge_kernel(
    continuations_ptr, parents_ptr, fresh_ptr, share_ptr,
    num, length,
    VOTE_0: tl.constexpr, VOTE_1: tl.constexpr, VOTE_2: tl.constexpr, VOTE_3: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The continuations of one row, a step at a time: ``same[m, j]`` says that m and j agree up to
    here.
    """
    # 1. Before the first step all that exist agree.
    b = tl.program_id(0)
    row = b.to(tl.int64) * num * length
    line, other = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_M)[None, :]
    same = (line < num) & (other < num)
    votes = _vote_of(other, VOTE_0, VOTE_1, VOTE_2, VOTE_3)
    begun = tl.load(continuations_ptr + row + other * length, mask=other < num, other=-1) >= 0
    # Where nothing is known the shares are 0 over this.
    total = tl.maximum(tl.sum(tl.where(begun, votes, 0.0), 1, keep_dims=True), 1e-9)
    first = line * 0

    # 2. Step after step.
    for step in range(length):
        here = row + step
        mine = tl.load(continuations_ptr + here + line * length, mask=line < num, other=-1)
        theirs = tl.load(continuations_ptr + here + other * length, mask=other < num, other=-1)
        same = same & (mine == theirs) & (mine >= 0)
        before = first
        first = tl.min(tl.where(same, other, BLOCK_M), 1, keep_dims=True)
        owner = first == line
        share = tl.sum(tl.where(same, votes, 0.0), 1, keep_dims=True)
        parent = tl.where(owner & (step > 0), before * length + step - 1, -1)
        place = here + line * length
        tl.store(parents_ptr + place, parent.to(tl.int64), mask=line < num)
        tl.store(fresh_ptr + place, owner.to(tl.int8), mask=line < num)
        tl.store(share_ptr + place, tl.div_rn(share, total), mask=line < num)


def launch_ancestor_bits(parents: torch.Tensor, num_nodes: torch.Tensor) -> torch.Tensor:
    """One launch, a program a node; arguments as in ``ops.ancestor_bits``."""
    batch, capacity = parents.shape
    width = triton.cdiv(capacity, 32)
    bits = torch.empty(batch, capacity, width, dtype=torch.int32, device=parents.device)
    _launch_ancestry(parents, num_nodes, bits, None)
    return bits


def launch_node_depths(parents: torch.Tensor, num_nodes: torch.Tensor) -> torch.Tensor:
    """One launch, a program a node; arguments as in ``ops.node_depths``."""
    depths = torch.empty(parents.shape, dtype=torch.int64, device=parents.device)
    _launch_ancestry(parents, num_nodes, None, depths)
    return depths


def _launch_ancestry(parents, num_nodes, bits, depths) -> None:
    batch, capacity = parents.shape
    width = triton.cdiv(capacity, 32)
    if batch:
        ancestry_kernel[(batch * capacity,)](
            parents.contiguous(), num_nodes, bits, depths,
            capacity, width,
            BITS=bits is not None, DEPTHS=depths is not None,
            BLOCK_W=next_power_of_two(width),
            num_warps=1,
        )  # fmt: skip


def launch_select_best_nodes(
    cum_logprobs: torch.Tensor, parents: torch.Tensor, max_nodes: int
) -> NodeSelection:
    """One launch, a program a row; arguments as in ``ops.select_best_nodes``."""
    batch, candidates = cum_logprobs.shape
    device = cum_logprobs.device
    selection = NodeSelection(
        torch.empty(batch, max_nodes, dtype=torch.int64, device=device),
        torch.empty(batch, max_nodes, dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.int64, device=device),
    )
    block = next_power_of_two(candidates)
    if batch:
        select_kernel[(batch,)](
            cum_logprobs.contiguous(), parents.contiguous(), *selection,
            candidates, max_nodes,
            DOUBLINGS=block.bit_length() - 1, BLOCK_C=block, BLOCK_N=next_power_of_two(max_nodes),
            num_warps=1 if block <= 128 else 4 if block <= 512 else 8,
        )  # fmt: skip
    return selection


def launch_merge_continuations(
    continuations: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch, a program a row; arguments as in ``ops.merge_continuations``."""
    batch, num, length = continuations.shape
    device = continuations.device
    parents = torch.empty(batch, num, length, dtype=torch.int64, device=device)
    fresh = torch.empty(batch, num, length, dtype=torch.bool, device=device)
    share = torch.empty(batch, num, length, dtype=torch.float32, device=device)
    if parents.numel():
        block = next_power_of_two(num)
        merge_kernel[(batch,)](
            continuations.contiguous(), parents, fresh.view(torch.int8), share,
            num, length,
            *VOTES,
            BLOCK_M=block,
            num_warps=1 if block <= 16 else 4,
        )  # fmt: skip
    return parents, fresh, share
