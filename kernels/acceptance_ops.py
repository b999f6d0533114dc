"""Public ops that decide which drafted tokens survive: signatures, checks and documentation
(re-exported by ``ops``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from . import torch_acceptance
from .checks import (
    ALL_FLOAT_DTYPES,
    INDEX_DTYPES,
    check_tensor,
    check_tokens,
    check_tree,
    runs_on_triton,
)
from .verdict import Verdict
from .warpers import Warpers

RULES = ("coupled", "target_only", "without_replacement", "traversal")
REJECTION_RULES = ("without_replacement", "traversal")
DRAFTINGS = ("deterministic", "coupled", "sampled")
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def verify_greedy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    *,
    implementation: str = "auto",
) -> Verdict:
    """Follow the child whose token is the target's argmax, from the root until no child is.

    Ties go to the lowest token, as in ``torch.argmax``; among equal siblings the lowest node is
    taken.

    Args:
        logits: float [B, N, V], the target's logits after each node; unit last stride on a GPU.
        tokens: int32 or int64 [B, N], the token of each node.
        parents: int32 or int64 [B, N]; node 0 is the root, and the parent of any other node has a
            lower index.
        num_nodes: int32 or int64 [B], the nodes of each tree, 0 to N; a row of 0 nodes gets no path
            and bonus -1.
        implementation: "auto", "triton" or "torch".

    Returns:
        Verdict(path[B, N], accept_length[B], bonus_token[B]), all int64. ``bonus_token`` is -1
        where the last node of the path has a row of logits with NaN or with nothing above -inf:
        nothing can be decided there.

    Raises:
        ValueError: a shape or dtype is wrong; or, on a CPU, a parent is out of order, a token lies
            outside the vocabulary or ``num_nodes`` exceeds N. On a GPU such nodes are never
            accepted.
    """
    _check_verify(logits, tokens, parents, num_nodes)
    if runs_on_triton(logits.device, implementation):
        from .verify import launch_verify_greedy

        return launch_verify_greedy(logits, tokens, parents, num_nodes)
    return torch_acceptance.verify_greedy(logits, tokens, parents, num_nodes)


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
    drafting: str | None = None,
    noise: torch.Tensor | None = None,
    implementation: str = "auto",
) -> Verdict:
    """Sample the target's tokens along the tree, exactly as the target alone would distribute them.

    The target's distribution at a node is ``softmax(logits / temperature)`` cut to the tokens that
    pass ``top_k``, ``top_p`` and ``min_p``, in this order, each on what the one before left, and
    renormalised. Tokens of equal logit pass or fail together.

    Rules (docs/kernels/verify_sampled.md has the proofs):
        coupled: the target's token at a node is ``argmax(warped logits + noise)``, the noise being
            that of ``gumbel_noise`` at position ``positions[b, n] + 1``; descend while a child
            carries it (Gumbel coupling, Daliri et al. 2024, algorithm 1). The text is that of plain
            decoding with the same seed, whatever the tree.
        target_only: the same draw; the tree comes from a draft that did not look at the noise.
        without_replacement: children, drawn from ``draft_probs[b, n]`` without replacement, are
            tried in the order of their indices; a child x passes with probability min(1,
            p(x)/q(x)), else p becomes norm(max(p - q, 0)) and q loses x (recursive rejection
            sampling, Jeon et al. 2024, algorithm 3; Sequoia, Chen et al. 2024, algorithm 2).
        traversal: leaves first, with the acceptance of whole paths (traversal verification, Weng et
            al. 2025, algorithm 2); the same demands on the tree.

    The rejection rules draw their own numbers, keyed on (seed, row, node, position of the root), so
    that no round sees a number twice. Children for them are drawn with ``gumbel_noise(seed, rows,
    parent node indices, V, stream=4 * positions[:, 0] + 1)``, or with any other independent
    numbers. Which children of one node were drawn may not decide which of them are kept.

    Args:
        logits: float [B, N, V], the target's logits after each node; unit last stride on a GPU.
        tokens: int32 or int64 [B, N].
        parents: int32 or int64 [B, N]; node 0 is the root, and the parent of any other node has a
            lower index.
        num_nodes: int32 or int64 [B], 0 to N.
        positions: int32 or int64 [B, N], the absolute position of each *node*, in the sequence
            without padding. The token drawn after node n has position ``positions[b, n] + 1``.
        draft_probs: float [B, N, V], the distribution the children of each node were drawn from;
            rejection rules only.
        rule: one of the above.
        temperature: positive, a number or float [B].
        top_k: 0 (off) or more, a number or int [B].
        top_p: in (0, 1], a number or float [B].
        min_p: in [0, 1], a number or float [B].
        seed: non-negative int below 2^64, or int64 [B].
        rows: int32 or int64 [B], the row keys of the noise; 0, 1, 2 ... when None.
        drafting: how the children were chosen, to have a mismatch refused: "deterministic" (top-k,
            lookups), "coupled" (top-k with the target's noise) or "sampled" (without replacement,
            with their own numbers). None: the caller vouches for it.
        noise: float32 [B, D, V], if at hand: the noise of rules "coupled" and "target_only" at
            positions ``positions[:, :1] + 1 + arange(D)``, as ``gumbel_noise(seed, rows, ...)``
            gives it, D more than the depth of any node. The PyTorch path then does not make it; the
            kernel always makes its own, in registers.
        implementation: "auto", "triton" or "torch".

    Returns:
        Verdict as of ``verify_greedy``; ``bonus_token`` is -1 where a row of logits or draft
        probabilities that the decision needs holds NaN, or a row of logits nothing above -inf.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value, ``draft_probs`` is missing where
            the rule needs it, or ``drafting`` does not fit the rule.
    """
    _check_verify(logits, tokens, parents, num_nodes)
    batch, capacity, vocab_size = logits.shape
    check_tensor("positions", positions, INDEX_DTYPES, "[B, N]", (batch, capacity), logits.device)
    check_seed(seed, positions)
    if rows is None:
        rows = torch.arange(batch, device=logits.device)
    check_tensor("rows", rows, INDEX_DTYPES, "[B]", (batch,), logits.device)
    warpers = check_warpers(temperature, top_k, top_p, min_p, batch)
    _check_rule(rule, drafting, draft_probs)
    if rule in REJECTION_RULES:
        check_tensor(
            "draft_probs",
            draft_probs,
            ALL_FLOAT_DTYPES,
            "[B, N, V]",
            (batch, capacity, vocab_size),
            logits.device,
        )
    if noise is not None:
        _check_noise(noise, positions, num_nodes, vocab_size)
    trees = (logits, tokens, parents, num_nodes, positions)
    how = (draft_probs, rule, warpers, seed, rows)
    if runs_on_triton(logits.device, implementation):
        from .verify_rejection import launch_verify_sampled

        return launch_verify_sampled(*trees, *how)
    return torch_acceptance.verify_sampled(*trees, *how, noise)


def gumbel_noise(
    seed: int | torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    vocab_size: int,
    *,
    stream: int | torch.Tensor = 0,
    implementation: str = "auto",
) -> torch.Tensor:
    """Standard Gumbel noise keyed on (seed, row, position, token): the same everywhere, in any
    order,
    for any vocabulary.

    Philox4x32-10 (Salmon et al. 2011) with key ``(seed & 0xffffffff, seed >> 32)`` and counter
    ``(c, position, row, stream)``; token t takes ``c = (t // 1024) * 256 + t % 256`` and output
    word ``(t // 256) % 4``. With ``v = word * 2^-32 + 2^-33`` in float32, at most ``1 - 2^-24``,
    the noise is ``-log(-log1p(-v))``, log1p computed by Kahan's correction of log.

    ``argmax(logits / T + noise)`` is an exact sample of ``softmax(logits / T)``.

    Args:
        seed: non-negative int below 2^64, or int64 [B], one a row (``rows`` is used still).
        rows: int32 or int64 [B], the row key of each sequence, in [0, 2^32).
        positions: int32 or int64 [B, P], the absolute position, in the sequence without padding, of
            the token to be drawn. A token drawn after a node at position p has position p + 1.
        vocab_size: V.
        stream: the fourth counter word, an int or int64 [B]. 0 is the noise that target and draft
            share.
        implementation: "auto", "triton" or "torch".

    Returns:
        float32 [B, P, V].

    Raises:
        ValueError: an argument has the wrong shape, dtype or range.
    """
    check_tensor("positions", positions, INDEX_DTYPES, "[B, P]", (None, None))
    check_tensor("rows", rows, INDEX_DTYPES, "[B]", (positions.shape[0],), positions.device)
    check_seed(seed, positions)
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"vocab_size must be a positive int; got {vocab_size!r}")
    if isinstance(stream, torch.Tensor):
        check_tensor(
            "stream", stream, (torch.int64,), "[B]", (positions.shape[0],), positions.device
        )
    elif not 0 <= stream < 2**32:
        raise ValueError(f"stream must lie in [0, 2^32); got {stream}")
    if runs_on_triton(positions.device, implementation):
        from .philox import launch_gumbel_noise

        return launch_gumbel_noise(seed, rows, positions, vocab_size, stream)
    return torch_acceptance.gumbel_noise(seed, rows, positions, vocab_size, stream)


def check_seed(seed: int | torch.Tensor, like: torch.Tensor) -> None:
    """A seed is an int in [0, 2^64) or an int64 tensor [B] on the device of ``like``."""
    if isinstance(seed, torch.Tensor):
        check_tensor("seed", seed, (torch.int64,), "[B]", (like.shape[0],), like.device)
    elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an int in [0, 2^64) or int64 [B]; got {seed!r}")


def check_warpers(temperature, top_k, top_p, min_p, batch: int) -> Warpers:
    """The four warpers of a batch, each a number or a tensor [B] in its range."""
    return Warpers(
        _warper("temperature", temperature, "positive", lambda x: 0 < x < float("inf"), batch),
        _warper("top_k", top_k, "0 (off) or more", lambda x: x >= 0, batch),
        _warper("top_p", top_p, "in (0, 1]", lambda x: 0 < x <= 1, batch),
        _warper("min_p", min_p, "in [0, 1]", lambda x: 0 <= x <= 1, batch),
    )


def _warper(name: str, value, expected: str, fits: Callable[[float], bool], batch: int):
    """A number, or a tensor [B] whose values are checked on a CPU; a tensor on a device is taken at
    its word.
    """
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        check_tensor(name, value, (*ALL_FLOAT_DTYPES, *INDEX_DTYPES), "[B]", (batch,))
        values = value.tolist() if value.device.type == "cpu" else []
    else:
        value = value.item() if isinstance(value, torch.Tensor) else value
        value = NEUTRAL[name] if value is None else value
        values = [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not fits(number):
            raise ValueError(f"{name} must be {expected}; got {number!r}")
    return value


def _check_rule(rule: str, drafting: str | None, draft_probs: torch.Tensor | None) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
    if drafting not in (None, *DRAFTINGS):
        raise ValueError(
            f"drafting must be None or one of {', '.join(DRAFTINGS)}; got {drafting!r}"
        )
    if rule not in REJECTION_RULES:
        return
    if drafting == "deterministic":
        raise ValueError(
            f'drafting must be "sampled" for rule {rule!r}: children picked by rank '
            "are not draws from draft_probs"
        )
    if drafting == "coupled":
        raise ValueError(
            f'drafting must be "sampled" for rule {rule!r}: noise shared with the target '
            "biases a rejection"
        )
    if draft_probs is None:
        raise ValueError(f"draft_probs must be given with rule {rule!r}; got None")


def _check_noise(noise, positions, num_nodes, vocab_size: int) -> None:
    """Noise at hand has a row for the depth of every node; depths are read on a CPU only."""
    batch, capacity = positions.shape
    check_tensor(
        "noise", noise, (torch.float32,), "[B, D, V]", (batch, None, vocab_size), positions.device
    )
    if positions.device.type != "cpu":
        return
    places = positions.numpy()
    depths = places - places[:, :1]
    depths = depths[np.arange(capacity) < num_nodes.numpy()[:, None]]
    if depths.size and not 0 <= depths.min() <= depths.max() < noise.shape[1]:
        raise ValueError(
            f"noise must hold positions up to that after the deepest node, D > {depths.max()}; "
            f"got {list(noise.shape)} and depths from {depths.min()} on"
        )


def _check_verify(logits, tokens, parents, num_nodes) -> None:
    check_tensor("logits", logits, ALL_FLOAT_DTYPES, "[B, N, V]", (None, None, None))
    batch, capacity, vocab_size = logits.shape
    check_tensor("tokens", tokens, INDEX_DTYPES, "[B, N]", (batch, capacity), logits.device)
    check_tree(parents, num_nodes, batch, capacity, logits.device)
    check_tokens(tokens, num_nodes, vocab_size)
