"""The tree ops without Triton: batched PyTorch, and NumPy where it is the quicker of the two on a
host.

These run on a CPU and on devices Triton does not serve. Arguments are those of the namesakes in
``ops``, already checked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from .drafting_rules import vote_of
from .verdict import NodeSelection


def host_array(values: torch.Tensor) -> np.ndarray:
    """``values`` as a NumPy array, without a copy where it lies in host memory."""
    return values.detach().cpu().numpy()


def ancestor_bits(parents: torch.Tensor, num_nodes: torch.Tensor) -> torch.Tensor:
    """See ``ops.ancestor_bits``; pointer doubling, so the passes are the logarithm of the depth."""
    parent_array, counts = host_array(parents), host_array(num_nodes)
    batch, capacity = parent_array.shape
    width = -(-capacity // 32)
    index = np.arange(capacity)
    present = index < counts[:, None]
    # One spare node without bits stands for "no parent".
    spare = batch * capacity
    bits = np.zeros((spare + 1, width), np.uint32)
    bits[:spare].reshape(batch, capacity, width)[:, index, index // 32] = np.where(
        present, np.uint32(1) << (index % 32).astype(np.uint32), np.uint32(0)
    )
    offsets = (np.arange(batch) * capacity)[:, None]
    jump = np.append(
        np.where(present & (parent_array >= 0), parent_array + offsets, spare).ravel(), spare
    )
    while jump.min() < spare:
        bits |= bits[jump]
        jump = jump[jump]
    words = bits[:spare].view(np.int32).reshape(batch, capacity, width)
    return torch.from_numpy(words).to(parents.device)


def node_depths(parents: torch.Tensor, num_nodes: torch.Tensor) -> torch.Tensor:
    """See ``ops.node_depths``; pointer doubling."""
    parent_array, counts = host_array(parents), host_array(num_nodes)
    batch, capacity = parent_array.shape
    present = np.arange(capacity) < counts[:, None]
    spare = batch * capacity
    offsets = (np.arange(batch) * capacity)[:, None]
    jump = np.append(
        np.where(present & (parent_array >= 0), parent_array + offsets, spare).ravel(), spare
    )
    depths = (jump < spare).astype(np.int64)
    while jump.min() < spare:
        depths += depths[jump]
        jump = jump[jump]
    return torch.from_numpy(depths[:spare].reshape(batch, capacity)).to(parents.device)


def select_best_nodes(
    cum_logprobs: torch.Tensor, parents: torch.Tensor, max_nodes: int
) -> NodeSelection:
    """See ``ops.select_best_nodes``."""
    parent_array = host_array(parents)
    batch, candidates = parent_array.shape
    rows = np.arange(batch)[:, None]
    # One spare candidate stands for "no parent": index -1 is the last.
    worth = np.full((batch, candidates + 1), np.inf, np.float32)
    worth[:, :candidates] = host_array(cum_logprobs.float())
    worth[np.isnan(worth)] = -np.inf
    above_of = np.full((batch, candidates + 1), -1)
    above_of[:, :candidates] = parent_array
    # A node is worth no more than its least ancestor: then the best N always contain their
    # ancestors.
    jump, above = above_of, worth[rows, above_of]
    if (above < worth)[:, :candidates].any():
        while (jump >= 0).any():
            worth = np.minimum(worth, worth[rows, jump])
            jump = jump[rows, jump]
    keep = min(max_nodes, candidates)
    order = np.argsort(-worth[:, :candidates], axis=1, kind="stable")[:, :keep]
    order[worth[rows, order] == -np.inf] = candidates
    order.sort(axis=1)
    chosen = order < candidates
    nodes, new_parents = np.full((2, batch, max_nodes), -1)
    nodes[:, :keep] = np.where(chosen, order, -1)
    # The place of every candidate in the selection; the spare one has none.
    place = np.empty((batch, candidates + 1), np.int64)
    place[rows, order] = np.arange(keep)
    place[:, candidates] = -1
    new_parents[:, :keep] = place[rows, above_of[rows, order]]
    results = nodes, new_parents, chosen.sum(axis=1)
    return NodeSelection(*(torch.from_numpy(x).to(parents.device) for x in results))


def compact_kv(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    path: torch.Tensor,
    accept_length: torch.Tensor,
    prefix_lens: torch.Tensor,
) -> None:
    """See ``ops.compact_kv``; moves only the rows that change place."""
    path_array, accepted = host_array(path), host_array(accept_length)
    place = np.arange(path_array.shape[1])
    moving = (place <= accepted[:, None]) & (path_array != place) & (path_array >= 0)
    batch_index, places = np.nonzero(moving)
    if batch_index.size == 0:
        return
    starts = host_array(prefix_lens)[batch_index]
    sources = torch.from_numpy(starts + path_array[batch_index, places])
    targets = torch.from_numpy(starts + places)
    # With one sequence a pair of index ops on a view is the shortest way; reading all rows first
    # makes overlaps safe.
    single = path_array.shape[0] == 1
    batches = torch.from_numpy(batch_index)
    devices: dict[torch.device, tuple[torch.Tensor, ...]] = {}
    for pair in layers:
        for cache in pair:
            if cache.device not in devices:
                devices[cache.device] = tuple(
                    x.to(cache.device) for x in (batches, sources, targets)
                )
            b, source, target = devices[cache.device]
            if single:
                view = cache[0]
                view.index_copy_(1, target, view.index_select(1, source))
            else:
                cache[b, :, target] = cache[b, :, source]


def match_ngrams(
    tokens: torch.Tensor,
    lens: torch.Tensor,
    max_ngram: int,
    num_matches: int,
    length: int,
    min_ngram: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.match_ngrams``; after the first comparison only places that match so far are
    looked at.
    """
    token_array, lengths = host_array(tokens), lens.tolist()
    continuations = np.full((len(lengths), num_matches, length), -1, np.int64)
    match_length = np.zeros(len(lengths), np.int64)
    for b, count in enumerate(lengths):
        history = token_array[b, :count]
        places, matched = _matching_places(history, max_ngram)
        if places.size == 0 or matched[-1] < (min_ngram or 1):
            continue
        match_length[b] = matched[-1]
        shortest = matched[-1] if min_ngram is None else min_ngram
        for slot, place in enumerate(places[: -num_matches - 1 : -1]):
            if matched[-1 - slot] < shortest:
                break
            following = history[place + 1 : place + 1 + length]
            continuations[b, slot, : following.size] = following
    device = tokens.device
    return torch.from_numpy(continuations).to(device), torch.from_numpy(match_length).to(device)


def _matching_places(history: np.ndarray, max_ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """Places before the last one whose token equals the last, and how many tokens up to each equal
    the last ones; by that number and then by place, ascending.
    """
    last = history.size - 1
    alive = np.flatnonzero(history[:-1] == history[-1]) if last > 0 else np.empty(0, np.int64)
    # Those that match further and further; the ones left behind come before them.
    groups: list[np.ndarray] = []
    for back in range(1, max_ngram):
        if alive.size == 0:
            break
        # A place before the beginning would count from the end.
        same = (history[alive - back] == history[last - back]) & (alive >= back)
        groups.append(alive[~same])
        alive = alive[same]
    groups.append(alive)
    matched = np.repeat(np.arange(1, len(groups) + 1), [group.size for group in groups])
    return np.concatenate(groups), matched


def merge_continuations(
    continuations: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``ops.merge_continuations``."""
    lines = host_array(continuations)
    batch, num, length = lines.shape
    # What follows a -1 is not known either.
    known = np.logical_and.accumulate(lines >= 0, axis=2)
    if num == 1:
        parents = np.where(known, np.arange(-1, length - 1), -1)
        return _on_device_of(continuations, parents, known, known.astype(np.float32))
    equal = (lines[:, :, None] == lines[:, None]) & known[:, None]
    same = np.logical_and.accumulate(equal, axis=3)
    # The first continuation that begins the same way owns the node.
    first = same.argmax(2)
    fresh = (first == np.arange(num)[:, None]) & known
    parents = np.full((batch, num, length), -1)
    place = first * length + np.arange(length)
    parents[..., 1:] = np.where(fresh[..., 1:], place[..., :-1], -1)
    votes = _votes(num)
    total = np.maximum(known.any(2) @ votes, 1e-9)
    share = (votes @ same) / total[:, None, None]
    return _on_device_of(continuations, parents, fresh, share.astype(np.float32))


@functools.cache
def _votes(num: int) -> np.ndarray:
    return np.array([vote_of(m) for m in range(num)], np.float32)


def _on_device_of(like: torch.Tensor, *results: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(result).to(like.device) for result in results)


def append_rotary(
    q, k, v, cos, sin, k_cache, v_cache, prefix_lens, interleaved: bool
) -> torch.Tensor:
    """See ``ops.append_rotary``."""
    num_nodes = q.shape[2]
    slots = prefix_lens.long()[:, None] + torch.arange(num_nodes, device=q.device)
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    # Advanced indices around a slice come first: [B, N, Hkv, D].
    k_cache[rows, :, slots] = _rotate(k, cos, sin, interleaved).transpose(1, 2)
    v_cache[rows, :, slots] = v.transpose(1, 2)
    return _rotate(q, cos, sin, interleaved)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The first ``cos.shape[2]`` columns rotated in float32 or wider, then rounded once."""
    rotary_dim = cos.shape[2]
    turned = x[..., :rotary_dim].to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        partner = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        partner = torch.cat([-second, first], -1)
    turned = turned * cos[:, None] + partner * sin[:, None]
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], -1)
