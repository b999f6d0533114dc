"""Truth for the ops on trees, histories and cache rows: plain loops (re-exported by
``reference``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .drafting_rules import vote_of
from .verdict import NodeSelection


def ancestor_bits(parents: torch.Tensor, num_nodes: torch.Tensor) -> torch.Tensor:
    """Climb from every node to the root and set a bit on the way."""
    batch, capacity = parents.shape
    width = (capacity + 31) // 32
    words = [[[0] * width for _ in range(capacity)] for _ in range(batch)]
    for b in range(batch):
        for node in range(int(num_nodes[b])):
            ancestor = node
            while ancestor >= 0:
                words[b][node][ancestor // 32] |= 1 << (ancestor % 32)
                ancestor = int(parents[b, ancestor]) if ancestor > 0 else -1
    bits = torch.tensor(words, dtype=torch.long).reshape(batch, capacity, width)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


def node_depths(parents: torch.Tensor, num_nodes: torch.Tensor) -> torch.Tensor:
    """One more than the depth of the parent."""
    depths = torch.zeros(parents.shape, dtype=torch.long)
    for b in range(parents.shape[0]):
        for node in range(1, int(num_nodes[b])):
            depths[b, node] = depths[b, int(parents[b, node])] + 1
    return depths


def select_best_nodes(
    cum_logprobs: torch.Tensor, parents: torch.Tensor, max_nodes: int
) -> NodeSelection:
    """Grow the selection best first: again and again the most valuable candidate whose parent is in
    already.
    """
    batch, candidates = cum_logprobs.shape
    nodes = torch.full((batch, max_nodes), -1)
    new_parents = torch.full((batch, max_nodes), -1)
    counts = torch.zeros(batch, dtype=torch.long)
    for b in range(batch):
        above = parents[b].tolist()
        worth: list[float] = []
        for node, value in enumerate(cum_logprobs[b].float().tolist()):
            own = value if value == value else -float("inf")
            worth.append(own if above[node] < 0 else min(own, worth[above[node]]))
        chosen: set[int] = set()
        while len(chosen) < max_nodes:
            ready = [
                node
                for node in range(candidates)
                if node not in chosen
                and worth[node] > -float("inf")
                and (above[node] < 0 or above[node] in chosen)
            ]
            if not ready:
                break
            chosen.add(max(ready, key=lambda node: (worth[node], -node)))
        for place, node in enumerate(sorted(chosen)):
            nodes[b, place] = node
            new_parents[b, place] = -1 if above[node] < 0 else sorted(chosen).index(above[node])
        counts[b] = len(chosen)
    return NodeSelection(nodes, new_parents, counts)


def match_ngrams(
    tokens: torch.Tensor,
    lens: torch.Tensor,
    *,
    max_ngram: int,
    num_matches: int,
    length: int,
    min_ngram: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the tail of the history with every earlier place, the longest tail first, the latest
    place first.
    """
    batch = tokens.shape[0]
    continuations = torch.full((batch, num_matches, length), -1)
    match_length = torch.zeros(batch, dtype=torch.long)
    for b in range(batch):
        history = tokens[b, : int(lens[b])].tolist()
        places: list[int] = []
        for size in range(min(max_ngram, len(history)), 0, -1):
            if places and (min_ngram is None or size < min_ngram):
                break
            if min_ngram is not None and size < min_ngram:
                break
            for end in range(len(history) - 2, size - 2, -1):
                if end not in places and history[end - size + 1 : end + 1] == history[-size:]:
                    places.append(end)
                    match_length[b] = max(int(match_length[b]), size)
        for slot, end in enumerate(places[:num_matches]):
            following = history[end + 1 : end + 1 + length]
            continuations[b, slot, : len(following)] = torch.tensor(following)
    return continuations, match_length


def merge_continuations(
    continuations: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put every beginning of a continuation into a dictionary; the first to be there owns the
    node.
    """
    batch, num, length = continuations.shape
    parents = torch.full((batch, num, length), -1)
    fresh = torch.zeros(batch, num, length, dtype=torch.bool)
    share = torch.zeros(batch, num, length)
    for b in range(batch):
        lines = [_known_part(line) for line in continuations[b].tolist()]
        votes = [vote_of(m) for m in range(num)]
        total = sum(vote for vote, line in zip(votes, lines) if line)
        places: dict[tuple[int, ...], int] = {(): -1}
        for m, line in enumerate(lines):
            for step in range(len(line)):
                beginning = line[: step + 1]
                if beginning not in places:
                    places[beginning] = m * length + step
                    fresh[b, m, step] = True
                    parents[b, m, step] = places[beginning[:-1]]
                through = [v for v, other in zip(votes, lines) if other[: step + 1] == beginning]
                share[b, m, step] = sum(through) / total
    return parents, fresh, share


def _known_part(line: list[int]) -> tuple[int, ...]:
    """A continuation ends before its first -1."""
    return tuple(line[: next((at for at, token in enumerate(line) if token < 0), len(line))])


def compact_kv(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    path: torch.Tensor,
    accept_length: torch.Tensor,
    prefix_lens: torch.Tensor,
) -> None:
    """Copy each cache, then write the rows of the path one by one."""
    for pair in layers:
        for cache in pair:
            before = cache.clone()
            for b in range(path.shape[0]):
                start = int(prefix_lens[b])
                for place in range(int(accept_length[b]) + 1):
                    if path[b, place] >= 0:
                        cache[b, :, start + place] = before[b, :, start + int(path[b, place])]


def append_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """Turn pair after pair of columns: (a, b) becomes (a cos - b sin, b cos + a sin)."""
    rotary_dim = cos.shape[2]
    half = rotary_dim // 2

    def turned(vector: torch.Tensor, b: int, node: int) -> torch.Tensor:
        result = vector.double().clone()
        for pair in range(half):
            i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
            result[i] = (
                vector[i].double() * cos[b, node, i].double()
                - vector[j].double() * sin[b, node, i].double()
            )
            result[j] = (
                vector[j].double() * cos[b, node, j].double()
                + vector[i].double() * sin[b, node, j].double()
            )
        return result.to(vector.dtype)

    out = q.clone()
    for b in range(q.shape[0]):
        for node in range(q.shape[2]):
            slot = int(prefix_lens[b]) + node
            for head in range(q.shape[1]):
                out[b, head, node] = turned(q[b, head, node], b, node)
            for head in range(k.shape[1]):
                k_cache[b, head, slot] = turned(k[b, head, node], b, node)
                v_cache[b, head, slot] = v[b, head, node]
    return out
