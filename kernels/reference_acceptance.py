"""Truth for the acceptance ops: one row, one node and one token at a time, in Python numbers (re-
exported by ``reference``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .verdict import Verdict


def verify_greedy(
    logits: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, num_nodes: torch.Tensor
) -> Verdict:
    """Walk down from the root while some child carries the argmax of the node it hangs from."""
    walks = []
    for b in range(tokens.shape[0]):
        path, token = [], -1
        node = 0 if num_nodes[b] > 0 else None
        while node is not None:
            path.append(node)
            token = _argmax(logits[b, node].tolist())
            children = _children(parents[b].tolist(), int(num_nodes[b]), node)
            node = next((child for child in children if int(tokens[b, child]) == token), None)
        walks.append((path, token))
    return _verdict(walks, tokens)


def verify_sampled(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    *,
    positions: torch.Tensor,
    draft_probs: torch.Tensor | None = None,
    rule: str = "coupled",
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    seed: int | torch.Tensor,
    rows: torch.Tensor | None = None,
) -> Verdict:
    """Each rule word for word, on Python lists in float64."""
    walks: list[tuple[list[int], int]] = []
    for b in range(tokens.shape[0]):
        count = int(num_nodes[b])
        tree = {node: (int(parents[b, node]), int(tokens[b, node])) for node in range(1, count)}
        settings = [_row_value(value, b) for value in (temperature, top_k, top_p, min_p)]
        p = {
            node: warped_probs(logits[b, node].double().tolist(), *settings)
            for node in range(count)
        }
        numbers = _Numbers(
            key=_row_value(seed, b),
            row=b if rows is None else int(rows[b]),
            positions=positions[b].tolist(),
        )
        if count == 0:
            walks.append(([], -1))
        elif rule in ("coupled", "target_only"):
            walks.append(_coupled(tree, p, numbers))
        else:
            q = {node: draft_probs[b, node].double().tolist() for node in range(count)}
            search = _without_replacement if rule == "without_replacement" else _traversal
            path, decided = search(tree, p, q, numbers.coin)
            walks.append((path, numbers.bonus(p[path[-1]], path[-1]) if decided else -1))
    return _verdict(walks, tokens)


class _Numbers(NamedTuple):
    """The random numbers of one row."""

    key: int
    row: int
    positions: list[int]

    def draw(self, probs: list[float], position: int, stream: int) -> int:
        """The Gumbel-max sample of ``probs``."""
        perturbed = [
            math.log(prob) + token_noise(self.key, self.row, position, token, stream)
            if prob > 0
            else -math.inf
            for token, prob in enumerate(probs)
        ]
        return perturbed.index(max(perturbed))

    def coin(self, node: int) -> float:
        """The uniform number a node is accepted by."""
        words = philox((0, node, self.row, 4 * self.positions[0] + 2), self.key)
        return float(uniform_of_word(words[0]))

    def bonus(self, probs: list[float], node: int) -> int:
        """The bonus token after a rejection rule's path."""
        return self.draw(probs, node, 4 * self.positions[0] + 3)


def _coupled(tree: dict, p: dict, numbers: _Numbers) -> tuple[list[int], int]:
    """Draw at each node with the noise of the next position; descend while a child was drawn."""
    node, path, token = 0, [], -1
    while node is not None:
        path.append(node)
        token = -1
        if p[node] is not None:
            token = numbers.draw(p[node], numbers.positions[node] + 1, 0)
        node = next((child for child, edge in tree.items() if edge == (node, token)), None)
    return path, token


def warped_probs(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> list[float] | None:
    """The target's distribution: scaled, then cut by each filter in turn, every cut on what the one
    before left.
    """
    if _argmax(logits) < 0:
        return None
    greatest = max(logits)
    probs = _normalised([math.exp((value - greatest) / temperature) for value in logits])
    if top_k > 0:
        probs = _normalised(
            [prob if sum(other > prob for other in probs) < top_k else 0.0 for prob in probs]
        )
    if top_p < 1:
        probs = _normalised(
            [
                prob if sum(other for other in probs if other > prob) < top_p else 0.0
                for prob in probs
            ]
        )
    if min_p > 0:
        least = min_p * max(probs)
        probs = _normalised([prob if prob >= least else 0.0 for prob in probs])
    return probs


def _without_replacement(tree: dict, p: dict, q: dict, coin) -> tuple[list[int], bool]:
    """Children in turn; leaves in ``p`` the distribution the bonus token of the last node comes
    from.

    Returns the path, and whether all it needed were numbers.
    """
    node, path = 0, []
    while node is not None:
        path.append(node)
        accepted = None
        children = [child for child, (parent, _) in tree.items() if parent == node]
        if not _numbers(p[node], q[node] if children else []):
            return path, False
        for child in children:
            x = tree[child][1]
            if q[node][x] <= 0:
                continue
            if coin(child) < p[node][x] / q[node][x]:
                accepted = child
                break
            p[node] = _normalised([max(a - b, 0.0) for a, b in zip(p[node], q[node])])
            q[node] = _normalised([0.0 if token == x else b for token, b in enumerate(q[node])])
        node = accepted
    return path, True


def _traversal(tree: dict, p: dict, q: dict, coin) -> tuple[list[int], bool]:
    """Take the first leaf, accept its path or delete it, until a path is accepted; the bare root
    always is.
    """
    alive = dict(tree)
    rate = {0: 1.0}
    while True:
        path = [0]
        while True:
            node = path[-1]
            has_children = any(parent == node for parent, _ in tree.values())
            if not _numbers(p[node], q[node] if has_children else []):
                return path, False
            for child, (parent, x) in list(alive.items()):
                if parent == node and q[node][x] <= 0:
                    alive = _without_subtree(alive, child)
            child = next((child for child, (parent, _) in alive.items() if parent == node), None)
            if child is None:
                break
            x = alive[child][1]
            if child not in rate:
                rate[child] = min(1.0, rate[node] * p[node][x] / q[node][x])
            path.append(child)
        leaf = path[-1]
        if leaf == 0 or coin(leaf) < rate[leaf]:
            return path, True
        parent, x = alive.pop(leaf)
        leftover = [max(rate[parent] * a - b, 0.0) for a, b in zip(p[parent], q[parent])]
        mass = sum(leftover)
        if mass > 0:
            p[parent] = _normalised(leftover)
        if parent != 0:
            rate[parent] = mass / (mass + 1 - rate[parent]) if mass > 0 else 0.0
        q[parent] = _normalised([0.0 if token == x else b for token, b in enumerate(q[parent])])


def _without_subtree(tree: dict, top: int) -> dict:
    gone = {top}
    for child, (parent, _) in tree.items():
        if parent in gone:
            gone.add(child)
    return {child: edge for child, edge in tree.items() if child not in gone}


def _numbers(p: list[float] | None, q: list[float]) -> bool:
    return p is not None and all(math.isfinite(value) for value in q)


def _normalised(values: list[float]) -> list[float]:
    total = sum(values)
    return [value / total for value in values] if total > 0 else values


def philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011, section 4.3) in Python integers."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def uniform_of_word(word: int) -> torch.Tensor:
    """A word as float32 in (0, 1)."""
    value = torch.tensor(word).to(torch.float32) * 2.0**-32 + 2.0**-33
    return value.clamp(max=1 - 2.0**-24)


def gumbel_noise(
    seed: int | torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    vocab_size: int,
    *,
    stream: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Token by token, with the logarithms in float64: ``-log(-log1p(-v))``."""
    noise = torch.empty(*positions.shape, vocab_size)
    for b in range(positions.shape[0]):
        for i in range(positions.shape[1]):
            for token in range(vocab_size):
                noise[b, i, token] = token_noise(
                    _row_value(seed, b),
                    int(rows[b]),
                    int(positions[b, i]),
                    token,
                    _row_value(stream, b),
                )
    return noise


def token_noise(seed: int, row: int, position: int, token: int, stream: int) -> float:
    """The noise of one token, as a float64 number."""
    count = (token // 1024) * 256 + token % 256
    word = philox((count, position, row, stream), seed)[(token // 256) % 4]
    return -math.log(-math.log1p(-float(uniform_of_word(word))))


def _row_value(value, row: int):
    return value[row].item() if isinstance(value, torch.Tensor) else value


def _argmax(values: list[float]) -> int:
    """The lowest index of the greatest value, or -1 when a value is NaN or none is above -inf."""
    if any(math.isnan(value) for value in values) or max(values) == -math.inf:
        return -1
    return values.index(max(values))


def _children(parents: list[int], num_nodes: int, node: int) -> list[int]:
    return [child for child in range(1, num_nodes) if parents[child] == node]


def _verdict(walks: list[tuple[list[int], int]], tokens: torch.Tensor) -> Verdict:
    """Pad the paths with -1; ``walks`` holds (path, bonus token) of every row."""
    capacity = tokens.shape[1]
    path = torch.tensor(
        [nodes + [-1] * (capacity - len(nodes)) for nodes, _ in walks], dtype=torch.long
    )
    accept_length = torch.tensor([max(len(nodes) - 1, 0) for nodes, _ in walks])
    bonus_token = torch.tensor([token for _, token in walks])
    return Verdict(path.reshape(-1, capacity), accept_length, bonus_token)
