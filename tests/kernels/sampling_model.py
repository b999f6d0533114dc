"""A toy pair of models small enough to enumerate, and speculative decoding on it, many rows at
once.

Both models look at the last two tokens only, so a model is a table [V * V, V] of logits and every
continuation of three tokens has a probability that can be written out.
"""

from __future__ import annotations

import itertools

import torch
from treespec.kernels import ops
from treespec.kernels.reference_acceptance import warped_probs

VOCAB = 4
START = 0
LENGTH = 3
TREE = (-1, 0, 0, 0, 1, 1, 2, 2, 3, 3)
CHAIN = (-1, 0, 1, 2)


def tables(seed: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the target and of a draft that resembles it, float32 [V * V, V]."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(VOCAB * VOCAB, VOCAB, generator=generator) * 1.2
    return target, 0.6 * target + 0.8 * torch.randn(target.shape, generator=generator)


def exact_distribution(target: torch.Tensor, **warpers) -> torch.Tensor:
    """float64 [V ** LENGTH], the probability of every continuation under the target alone."""
    settings = [
        warpers.get(name, off)
        for name, off in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    ]
    table = [warped_probs(row.double().tolist(), *settings) for row in target]
    outcomes = []
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        state, probability = START, 1.0
        for token in tokens:
            probability *= table[state][token]
            state = next_state(state, token)
        outcomes.append(probability)
    return torch.tensor(outcomes, dtype=torch.float64)


def next_state(state, token):
    return state % VOCAB * VOCAB + token


def grow(draft, states, shape, drafting, seed, rows, positions, temperature):
    """Draft one tree a row.

    Returns:
        tokens [B, N], the state after each node [B, N], and draft_probs [B, N, V].
    """
    batch, size = states.shape[0], len(shape)
    tokens = torch.zeros(batch, size, dtype=torch.long)
    node_states = states[:, None].repeat(1, size)
    draft_probs = torch.full((batch, size, VOCAB), float("nan"))
    depth = [0] * size
    for node in range(size):
        children = [child for child in range(1, size) if shape[child] == node]
        if not children:
            continue
        scores = draft[node_states[:, node]] / temperature
        draft_probs[:, node] = scores.softmax(1)
        if drafting == "coupled":
            scores = (
                scores
                + ops.gumbel_noise(seed, rows, positions[:, None] + depth[node] + 1, VOCAB)[:, 0]
            )
        elif drafting == "sampled":
            nodes = torch.full_like(positions, node)[:, None]
            scores = (
                scores + ops.gumbel_noise(seed, rows, nodes, VOCAB, stream=4 * positions + 1)[:, 0]
            )
        best = scores.topk(len(children)).indices
        for place, child in enumerate(children):
            depth[child] = depth[node] + 1
            tokens[:, child] = best[:, place]
            node_states[:, child] = next_state(node_states[:, node], best[:, place])
    return tokens, node_states, draft_probs


def decode(shape, rule, drafting, samples, seed, *, draft_temperature=1.0, drafter=grow, **warpers):
    """Speculative decoding of LENGTH tokens after START, ``samples`` independent rows.

    Returns:
        the index of every row's continuation, int64 [samples], and the tokens a round.
    """
    target, draft = tables()
    rows = torch.arange(samples)
    text = torch.zeros(samples, LENGTH + len(shape), dtype=torch.long)
    lengths, states = torch.zeros(samples, dtype=torch.long), torch.full((samples,), START)
    parents = torch.tensor(shape)
    emitted, rounds = 0, 0
    depths = ops.node_depths(parents[None], torch.tensor([len(shape)]))
    while (active := torch.nonzero(lengths < LENGTH)[:, 0]).numel():
        at = states[active]
        positions = lengths[active] + 5
        tokens, node_states, draft_probs = drafter(
            draft, at, shape, drafting, seed, rows[active], positions, draft_temperature
        )
        verdict = ops.verify_sampled(
            target[node_states],
            tokens,
            parents.expand(len(active), -1).contiguous(),
            torch.full((len(active),), len(shape)),
            positions=positions[:, None] + depths,
            draft_probs=draft_probs if drafting == "sampled" else None,
            rule=rule,
            drafting=drafting,
            seed=seed,
            rows=rows[active],
            **warpers,
        )
        for place in range(1, len(shape)):
            node = verdict.path[:, place] if place < verdict.path.shape[1] else None
            took = node >= 0
            text[active[took], lengths[active[took]]] = tokens[took, node[took]]
            lengths[active[took]] += 1
        last = verdict.path.gather(1, verdict.accept_length[:, None])
        states[active] = next_state(node_states.gather(1, last)[:, 0], verdict.bonus_token)
        text[active, lengths[active]] = verdict.bonus_token
        lengths[active] += 1
        emitted += int(verdict.accept_length.sum()) + len(active)
        rounds += len(active)
    weights = VOCAB ** torch.arange(LENGTH - 1, -1, -1)
    return (text[:, :LENGTH] * weights).sum(1), emitted / rounds


def chi_square_p(outcomes: torch.Tensor, expected: torch.Tensor) -> float:
    """Probability of a fit this bad by chance; 0 where something impossible happened."""
    counts = torch.bincount(outcomes, minlength=len(expected)).double()
    possible = expected > 0
    if counts[~possible].any():
        return 0.0
    means = expected[possible] * len(outcomes)
    # Rare outcomes share one cell, so that every cell expects 5 or more.
    rare = means < 5
    cells = [(counts[possible][~rare], means[~rare])]
    if rare.any():
        cells.append((counts[possible][rare].sum()[None], means[rare].sum()[None]))
    observed, wanted = (torch.cat(parts) for parts in zip(*cells))
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
