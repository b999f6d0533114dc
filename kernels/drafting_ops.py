"""The public op that proposes children from a draft's logits: signature, checks and documentation
(re-exported by ``ops``).
"""

from __future__ import annotations

import math

import torch

from . import torch_drafting
from .acceptance_ops import check_seed, check_warpers
from .checks import ALL_FLOAT_DTYPES, INDEX_DTYPES, check_tensor, runs_on_triton
from .drafting_rules import DRAFTINGS

MAX_CHILDREN = 64


def draft_children(
    logits: torch.Tensor,
    cum_logprobs: torch.Tensor,
    num_children: int,
    *,
    drafting: str = "top",
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    sharpness: float | torch.Tensor = 1.0,
    breadth: torch.Tensor | None = None,
    min_logprob: float = -math.inf,
    seed: int | torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    nodes: torch.Tensor | None = None,
    root_positions: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The children of every node of a frontier, and their cumulative log-probabilities.

    With ``x`` the logits divided by ``temperature`` and cut by ``top_k``, ``top_p`` and ``min_p``
    as in ``verify_sampled``, and ``g`` Gumbel noise, a draft's log-probabilities are
    ``log_softmax(sharpness * x)``, or of ``sharpness * (x + g)`` where it knows the target's noise.

    Draftings (docs/kernels/drafting.md):
        top: the likeliest tokens.
        coupled: the likeliest to be the target's pick under rule "coupled" of ``verify_sampled``: g
            is the noise that decides it (Daliri et al. 2024, algorithm 1).
        sampled: draws without replacement, in the order drawn: the top of the log-probabilities
            plus the noise of a stream of its own, which the rejection rules of ``verify_sampled``
            do not use (Gumbel top-k, Kool et al. 2019, section 3). The noise is
            ``gumbel_noise(seed, rows, nodes, V, stream=4 * root_positions + 1)``; the
            log-probabilities returned are without it.

    Ties go to the lower token. Tokens of a probability below e^-103, which float32 does not hold,
    are not proposed. A parent whose logits hold NaN or +inf, or nothing above -inf, has no
    children. Scores are float32 whatever the logits are.

    Args:
        logits: float [B, F, V], the draft's logits after each node of the frontier; any strides,
            unit last stride on a GPU.
        cum_logprobs: float [B, F], of the nodes themselves; -inf or NaN marks a place without a
            node, which gets no children.
        num_children: K, 1 to 64.
        drafting: one of the above.
        temperature: positive, a number or float [B].
        top_k: 0 (off) or more, a number or int [B].
        top_p: in (0, 1], a number or float [B].
        min_p: in [0, 1], a number or float [B].
        sharpness: positive factor on the scores, a number or float [B].
        breadth: int32 or int64 [B, F], the most children of each node; K when None. Under "sampled"
            it may not depend on what is drawn here.
        min_logprob: a node whose cumulative log-probability is below gets no children; its logits
            are not read by the kernel. The logarithm of a ``prune_threshold``.
        seed: non-negative int below 2^64, or int64 [B]; for "coupled" and "sampled".
        rows: int32 or int64 [B], the row keys of the noise; 0, 1, 2 ... when None.
        positions: int32 or int64 [B, F], for "coupled": the absolute position, in the sequence
            without padding, of the tokens to be proposed; that of their parent plus 1.
        nodes: int32 or int64 [B, F], for "sampled": a number of each node that no other node of the
            round has, its index in the tree.
        root_positions: int32 or int64 [B], for "sampled": the absolute position of the root.
        noise: float32 [B, F, V], the noise named above, if at hand; or, for "coupled" with one
            position a row, [B, 1, V]. The PyTorch path then does not make it; the kernel always
            makes its own, in registers.
        implementation: "auto", "triton" or "torch".

    Returns:
        ``(tokens, logprobs)``: int64 and float32 [B, F, K]. Absent children have token -1 and
        -inf, and come last but for drawn tokens of no probability.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value, or is missing where ``drafting``
            needs it.
    """
    check_tensor("logits", logits, ALL_FLOAT_DTYPES, "[B, F, V]", (None, None, None))
    batch, frontier, vocab_size = logits.shape
    device = logits.device
    if vocab_size < 1:
        raise ValueError(f"logits must have no empty vocabulary; got {list(logits.shape)}")
    shape = (batch, frontier)
    check_tensor("cum_logprobs", cum_logprobs, ALL_FLOAT_DTYPES, "[B, F]", shape, device)
    if (
        not isinstance(num_children, int)
        or isinstance(num_children, bool)
        or not 1 <= num_children <= MAX_CHILDREN
    ):
        raise ValueError(f"num_children must be an int in 1..{MAX_CHILDREN}; got {num_children!r}")
    if drafting not in DRAFTINGS:
        raise ValueError(f"drafting must be one of {', '.join(DRAFTINGS)}; got {drafting!r}")
    if isinstance(sharpness, torch.Tensor):
        check_tensor("sharpness", sharpness, ALL_FLOAT_DTYPES, "[B]", (batch,), device)
    elif not 0.0 < sharpness < math.inf:
        raise ValueError(f"sharpness must be positive and finite; got {sharpness!r}")
    if min_logprob != min_logprob:
        raise ValueError(f"min_logprob must be a number; got {min_logprob!r}")
    if breadth is not None:
        check_tensor("breadth", breadth, INDEX_DTYPES, "[B, F]", shape, device)
    warpers = check_warpers(temperature, top_k, top_p, min_p, batch)
    places = None
    if drafting != "top":
        places = _noise_places(drafting, shape, device, seed, positions, nodes, root_positions)
        if rows is None:
            rows = torch.arange(batch, device=device)
        check_tensor("rows", rows, INDEX_DTYPES, "[B]", (batch,), device)
        if noise is not None:
            shared = drafting == "coupled" and noise.dim() == 3 and noise.shape[1] == 1
            sizes = (batch, 1 if shared else frontier, vocab_size)
            layout = "[B, F, V] or, coupled, [B, 1, V]"
            check_tensor("noise", noise, (torch.float32,), layout, sizes, device)
    if runs_on_triton(device, implementation):
        from .drafting import launch_draft_children as run
    else:
        run = torch_drafting.draft_children
    return run(
        logits,
        cum_logprobs,
        num_children,
        drafting,
        warpers,
        sharpness,
        breadth,
        float(min_logprob),
        seed,
        rows,
        places,
        root_positions,
        noise,
    )


def _noise_places(
    drafting: str,
    shape: tuple[int, int],
    device: torch.device,
    seed,
    positions,
    nodes,
    root_positions,
) -> torch.Tensor:
    """The keys of the noise of each node, positions or indices, with all that goes with them."""
    needed = {"positions": positions}
    if drafting == "sampled":
        needed = {"nodes": nodes, "root_positions": root_positions}
    for name, value in {"seed": seed, **needed}.items():
        if value is None:
            raise ValueError(f"{name} must be given with drafting {drafting!r}; got None")
    for name, value in needed.items():
        if name == "root_positions":
            check_tensor(name, value, INDEX_DTYPES, "[B]", shape[:1], device)
        else:
            check_tensor(name, value, INDEX_DTYPES, "[B, F]", shape, device)
            places = value
    check_seed(seed, places)
    return places
