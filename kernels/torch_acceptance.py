"""The acceptance ops without Triton: batched PyTorch, and NumPy where it is the quicker on a host.

These run on a CPU and on devices Triton does not serve. Arguments are those of the namesakes in
``ops``, already checked. Logits are read only for the nodes a walk visits, so the cost grows with
the accepted path and not with the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .noise import (
    ACCEPT_STREAM,
    RESIDUAL_STREAM,
    SHARED_STREAM,
    gumbel_of_words,
    philox_words,
    token_words,
    uniform,
)
from .rejection import DraftTrees, traversal, without_replacement
from .verdict import Verdict
from .warpers import Warpers, warped_scores

# Up to this many numbers, one pass over all is quicker than the few rows a walk visits one by one.
_SMALL = 2**18
# Numbers of noise made at once.
_NOISE_CHUNK = 2**17


def verify_greedy(
    logits: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, num_nodes: torch.Tensor
) -> Verdict:
    """See ``ops.verify_greedy``."""
    logits = logits.detach()
    if logits.device.type == "cpu" and logits.numel() <= _SMALL:
        rows = logits.reshape(-1, logits.shape[2])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        choices = finite_argmax(rows.numpy()).reshape(tokens.shape).tolist()

        def choose(b: Sequence[int], nodes: Sequence[int]) -> list[int]:
            return [choices[row][node] for row, node in zip(b, nodes)]
    else:
        read = _row_reader(logits)

        def choose(b: Sequence[int], nodes: Sequence[int]) -> list[int]:
            return finite_argmax(read(b, nodes)).tolist()

    return _followed(choose, tokens, parents, num_nodes)


def verify_sampled(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    positions: torch.Tensor,
    draft_probs: torch.Tensor | None,
    rule: str,
    warpers: Warpers,
    seed: int | torch.Tensor,
    rows: torch.Tensor,
    noise: torch.Tensor | None,
) -> Verdict:
    """See ``ops.verify_sampled``."""
    read = _row_reader(logits.detach())
    warpers = Warpers(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in warpers))
    batch, _, vocab_size = logits.shape
    row_keys, places = _host(rows), _host(positions)
    seeds = np.broadcast_to(
        _host(seed) if isinstance(seed, torch.Tensor) else np.uint64(seed), batch
    )

    warps = any(warpers.active(name) for name in Warpers._fields)

    def scores_of(b: Sequence[int], nodes: Sequence[int]) -> np.ndarray:
        """Warped scores [K, V]."""
        values = read(b, nodes)
        if not warps:
            return values
        return warped_scores(torch.from_numpy(values), warpers.rows(b)).numpy()

    def made(b: Sequence[int], place: np.ndarray, stream) -> np.ndarray:
        """Noise [K, V]."""
        words = token_words(seeds[b], place, row_keys[b], stream, vocab_size)
        return gumbel_of_words(words).numpy()

    if rule in ("coupled", "target_only"):
        at_hand = None if noise is None else _row_reader(noise)

        def choose(b: Sequence[int], nodes: Sequence[int]) -> list[int]:
            here = places[b, nodes]
            if at_hand is None:
                shared = made(b, here + 1, SHARED_STREAM)
            else:
                shared = at_hand(b, here - places[b, 0])
            return finite_argmax(scores_of(b, nodes) + shared).tolist()

        return _followed(choose, tokens, parents, num_nodes)

    def target_probs(b: Sequence[int], nodes: Sequence[int]) -> np.ndarray:
        # Of nothing but -inf, or with NaN or inf, all are NaN.
        return torch.from_numpy(scores_of(b, nodes)).softmax(1).numpy()

    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    streams = 4 * places[:, 0]
    node_index = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    coins = philox_words(
        ([[0]], node_index, row_keys[:, None], streams[:, None] + ACCEPT_STREAM), seeds[:, None]
    )
    trees = DraftTrees(
        _host(tokens),
        _host(parents),
        _host(num_nodes),
        target_probs,
        _row_reader(draft_probs.detach(), dtype),
        uniform(coins[0]).astype(np.float64 if dtype == torch.float64 else np.float32),
        vocab_size,
    )
    outcome = (traversal if rule == "traversal" else without_replacement)(trees)
    bonus_token = np.full(batch, -1)
    done = np.flatnonzero(outcome.decided)
    if done.size:
        logprobs = torch.from_numpy(outcome.bonus_probs[done]).log().numpy()
        logprobs += made(done, outcome.last[done], streams[done] + RESIDUAL_STREAM)
        bonus_token[done] = logprobs.argmax(1)
    return _verdict(outcome.path, outcome.accept_length, bonus_token, tokens.device)


def gumbel_noise(
    seed: int | torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    vocab_size: int,
    stream: int | torch.Tensor,
) -> torch.Tensor:
    """See ``ops.gumbel_noise``."""
    keys = [
        np.broadcast_to(
            _host(key)[:, None] if isinstance(key, torch.Tensor) else key, positions.shape
        )
        .astype(np.uint64)
        .ravel()
        for key in (seed, rows, stream)
    ]
    places = _host(positions).ravel()
    noise = torch.empty(places.size, vocab_size)
    # A few positions at a time stay in the cache, and in memory that is at hand.
    step = max(1, _NOISE_CHUNK // vocab_size)
    for start in range(0, places.size, step):
        part = slice(start, start + step)
        seeds, row_keys, streams = (key[part] for key in keys)
        noise[part] = gumbel_of_words(
            token_words(seeds, places[part], row_keys, streams, vocab_size)
        )
    return noise.view(*positions.shape, vocab_size).to(positions.device)


def _host(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _row_reader(
    values: torch.Tensor, dtype: torch.dtype | None = None
) -> Callable[[Sequence[int], Sequence[int]], np.ndarray]:
    """A function of (rows [K], nodes [K]) that gives those rows of [B, N, V] as an array [K, V].

    float64 stays, everything else becomes float32, unless ``dtype`` says otherwise.
    """
    if dtype is None:
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if values.device.type == "cpu" and (values.dtype == dtype or values.numel() <= _SMALL):
        array = values.to(dtype).numpy()
        return lambda b, nodes: array[b, nodes]
    return lambda b, nodes: (
        values[torch.as_tensor(b), torch.as_tensor(nodes)].to(dtype).cpu().numpy()
    )


def finite_argmax(scores: np.ndarray) -> np.ndarray:
    """The lowest index of each row's greatest value; -1 where one is NaN or none is above -inf."""
    index = scores.argmax(1)
    return np.where(scores[np.arange(len(index)), index] > -np.inf, index, -1)


def follow(
    choose: Callable[[Sequence[int], Sequence[int]], list[int]],
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
) -> tuple[list[list[int]], list[list[int]]]:
    """Level by level, descends to the child that carries ``choose(rows, nodes)`` while one does.

    Returns:
        The path of every row from the root on, and what was chosen at each of its nodes: the last
        is the bonus token, -1 where it could not be decided.
    """
    batch = len(tokens)
    # Filled backwards, so that the lowest of equal siblings stays.
    children = [
        {(above[node], carried[node]): node for node in range(count - 1, 0, -1)}
        for above, carried, count in zip(parents.tolist(), tokens.tolist(), num_nodes.tolist())
    ]
    path, chosen = [[] for _ in range(batch)], [[] for _ in range(batch)]
    active = [b for b, count in enumerate(num_nodes.tolist()) if count > 0]
    nodes = [0] * len(active)
    while active:
        choices = choose(active, nodes)
        still, below = [], []
        for b, node, choice in zip(active, nodes, choices):
            path[b].append(node)
            chosen[b].append(choice)
            # No child carries token -1, so a row that cannot be decided stops here.
            child = children[b].get((node, choice)) if choice >= 0 else None
            if child is not None:
                still.append(b)
                below.append(child)
        active, nodes = still, below
    return path, chosen


def _followed(choose, tokens, parents, num_nodes) -> Verdict:
    """The verdict of ``follow``."""
    path, chosen = follow(choose, tokens, parents, num_nodes)
    batch, capacity = tokens.shape
    padded = [nodes + [-1] * (capacity - len(nodes)) for nodes in path]
    accept_length = [max(len(nodes) - 1, 0) for nodes in path]
    results = (
        np.array(padded).reshape(batch, capacity),
        np.array(accept_length),
        np.array([of_row[-1] if of_row else -1 for of_row in chosen]),
    )
    return _verdict(*results, tokens.device)


def _verdict(path, accept_length, bonus_token, device: torch.device) -> Verdict:
    arrays = (path, accept_length, bonus_token)
    return Verdict(*(torch.from_numpy(array).to(device) for array in arrays))
