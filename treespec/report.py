"""What a speculator can say of itself: which paths it takes and why, and whether it is lossless on
this very pair."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from treespec import hf
from treespec.engine import Engine
from treespec.policy import Policy
from treespec.shapes import MAX_NODES
from treespec.tree import ancestor_matrix

if TYPE_CHECKING:
    from treespec.model import TreeModel
    from treespec.speculator import TreeSpeculator

# Rounding allowed between a tree's logits and a sequence's, as a share of the largest logit.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.06, torch.float16: 0.02}


@dataclass
class SelfCheckReport:
    """The outcome of `TreeSpeculator.self_check`.

    Attributes:
        dtype: of the target.
        num_trees: random trees that were verified.
        logit_error: largest difference between a node's logits and the same tokens' in a sequence,
            as a share of the largest logit.
        logit_tolerance: what rounding explains at this dtype.
        tokens: per check ("greedy", "T=0.7", ...) tokens compared and the first position that
            differs, or None.
        ties: differing checks whose first difference is a tie within rounding.
    """

    dtype: torch.dtype
    num_trees: int
    logit_error: float
    logit_tolerance: float
    tokens: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    ties: set[str] = field(default_factory=set)

    @property
    def passed(self) -> bool:
        differing = {name for name, (_, position) in self.tokens.items() if position is not None}
        return self.logit_error <= self.logit_tolerance and differing <= self.ties

    def __str__(self) -> str:
        lines = [
            f"self-check ({str(self.dtype).removeprefix('torch.')}): "
            f"{'passed' if self.passed else 'FAILED'}",
            f"  logits of {self.num_trees} random trees: largest error {self.logit_error:.2g} of "
            "the largest logit "
            f"(rounding explains {self.logit_tolerance:.2g})",
        ]
        for name, (count, position) in self.tokens.items():
            if position is None:
                outcome = f"{count} tokens identical"
            else:
                outcome = f"differs at token {position} of {count}"
                outcome += ", a tie within rounding" if name in self.ties else ""
            lines.append(f"  {name}: {outcome}")
        return "\n".join(lines)


def explain(spec: TreeSpeculator) -> str:
    """The text of `TreeSpeculator.explain`."""
    target = spec._target
    lines = [f"target: {_model_line(target)}"]
    if spec._model is not None:
        lines.append(f"draft: {_model_line(spec._model)}")
    names = [source.name for source in spec._engine.sources]
    if not names:
        lines.append("sources: none")
    else:
        added = (
            "; lookup was added because it is free and tree is auto" if spec.lookup_added else ""
        )
        lines.append(f"sources, merged into one tree: {', '.join(names)}{added}")
    lines.append(f"shape: {spec._policy.describe()}")
    lines.append(f"sampling: {spec.sampling}; greedy when do_sample is off")
    lines.append(f"attention: {_attention_line(target)}")
    fused = "fused with the cache write" if target.rotary is not None else "the model's own"
    lines.append(f"rotary embedding: {fused} ({target.rotary_reason})")
    lines.append(f"recorded forwards: {_recording_line(target)}")
    lines.append(f"CUDA graphs: {_graphs_line(target, spec._model)}")
    limit = "none stated" if target.position_limit is None else f"{target.position_limit} positions"
    lines.append(
        f"limits: {limit}, {MAX_NODES} nodes a tree; beam search, recurrent and encoder-decoder "
        "models are refused"
    )
    return "\n".join(lines)


def _model_line(model: TreeModel) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.name}, {dtype} on {model.device}, verifies trees (checked at attachment)"


def _attention_line(model: TreeModel) -> str:
    if model.route == "interface":
        path = "Triton kernel" if model.kernel else "PyTorch"
        return (
            f"{path} ({model.attention_reason}), through transformers' attention interface, "
            "switched on for tree forwards only"
        )
    return "the model's own, with a dense mask, because its attention function cannot be replaced"


def _recording_line(model: TreeModel) -> str:
    if model.on_graphs:
        return "off: CUDA graphs take their place"
    if model.recording_reason is not None:
        return f"off: {model.recording_reason}"
    packed = model._packed.bytes >> 20 if model._packed is not None else 0
    return f"{_recorded_shapes(model)}; {packed} MiB of prepacked weights"


def _graphs_line(model: TreeModel, draft: TreeModel | None) -> str:
    if model.on_graphs and model.recording_reason is None:
        grown = [draft.grown] if draft is not None else []
        replayed = sum(steps.num_replayed for steps in (model.steps, *grown))
        reasons = [reason for steps in (model.steps, *grown) for reason in steps.refusals]
        between = f"{replayed} steps between forwards"
        refused = "".join(f"; not captured: {reason}" for reason in reasons)
        return f"{_recorded_shapes(model)}, {between}{refused}"
    if model.on_graphs:
        return f"off: {model.recording_reason}"
    if model.device.type == "cuda":
        return "off, by cuda_graphs=False"
    return "off, no GPU in use"


def _recorded_shapes(model: TreeModel) -> str:
    shapes = sorted({key[1] for key in model._recordings})
    return f"on; shapes so far: {shapes or 'none'} nodes"


@dataclass
class ProfileReport:
    """Where the time goes; all figures are milliseconds, medians where a step was repeated.

    Attributes:
        round_ms: of the parts of a mean round of a real generation: draft, verify, commit, and the
            rest.
        tokens_per_round: of that generation.
        verify_ms: of one target forward, by nodes.
        draft_ms: of one draft forward, by nodes; empty without a draft model.
    """

    round_ms: dict[str, float]
    tokens_per_round: float
    verify_ms: dict[int, float]
    draft_ms: dict[int, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {ms:.2f}" for name, ms in self.round_ms.items())
        lines = [f"a round, ms: {parts}; {self.tokens_per_round:.2f} tokens a round"]
        for name, times in (("verification", self.verify_ms), ("draft level", self.draft_ms)):
            if times:
                lines.append(
                    f"{name}, ms by nodes: "
                    + ", ".join(f"{n}: {ms:.2f}" for n, ms in times.items())
                )
        return "\n".join(lines)


def profile(spec: TreeSpeculator, input_ids: torch.Tensor, max_new_tokens: int) -> ProfileReport:
    """The work of `TreeSpeculator.profile`."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    spec.generate(input_ids, **options)
    spec.generate(input_ids, **options)
    stats = spec.stats
    rounds = max(stats.rounds, 1)
    parts = {"draft": stats.draft_ms, "verify": stats.verify_ms, "commit": stats.commit_ms}
    parts["rest"] = stats.total_ms - stats.prefill_ms - sum(parts.values())
    length = input_ids.shape[1]
    return ProfileReport(
        {name: ms / rounds for name, ms in parts.items()},
        stats.tokens_per_round,
        _forward_times(spec._target, length, (1, 8, 16, 24, 32, 64)),
        _forward_times(spec._model, length, (1, 4, 8)) if spec._model is not None else {},
    )


@torch.inference_mode()
def _forward_times(
    model: TreeModel, prefix: int, sizes: tuple[int, ...], repeats: int = 9
) -> dict[int, float]:
    """Median milliseconds of a forward of that many nodes behind `prefix` rows."""
    model.begin()
    model.allocate(1, prefix + max(sizes))
    model.ingest(torch.zeros(1, prefix, dtype=torch.long, device=model.device), [prefix])
    times = {}
    for size in sizes:
        tokens = torch.zeros(1, size, dtype=torch.long, device=model.device)
        positions = prefix + torch.arange(size, device=model.device)[None]
        visible = torch.ones(1, size, size, dtype=torch.bool, device=model.device).tril()
        samples = []
        # the first calls of a shape record and check it
        for repeat in range(repeats + 4):
            _synchronize(model.device)
            start = time.perf_counter()
            model.forward(tokens, positions, visible)
            _synchronize(model.device)
            if repeat >= 4:
                samples.append(1e3 * (time.perf_counter() - start))
        times[size] = statistics.median(samples)
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def self_check(
    spec: TreeSpeculator, input_ids: torch.Tensor, num_nodes: int, new_tokens: int, seed: int
) -> SelfCheckReport:
    """The work of `TreeSpeculator.self_check`."""
    request, _ = spec._prepare(
        input_ids, None, 0, None, {"max_new_tokens": new_tokens, "do_sample": False}
    )
    ids = request.input_ids[:1]
    if ids.shape[1] < 2:
        raise ValueError(
            f"input_ids must hold at least 2 tokens for a self-check; got {ids.shape[1]}"
        )
    dtype = spec._target.dtype
    sizes = sorted({1, 2, max(3, num_nodes // 4), num_nodes})
    errors = [_tree_error(spec._target, ids, size, seed + k) for k, size in enumerate(sizes)]
    report = SelfCheckReport(
        dtype, len(sizes), max(errors), _ROUNDING.get(dtype, _ROUNDING[torch.bfloat16])
    )
    plain = Engine(spec._target, [], Policy())
    for name, temperature in {"greedy": 0.0, "T=0.7": 0.7, "T=1.0": 1.0}.items():
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0}
        if temperature:
            options["temperature"] = temperature
        expected = _tokens(spec, plain, ids, seed, options)
        found = _tokens(spec, spec._engine, ids, seed, options)
        different = next(
            (k for k, pair in enumerate(zip(expected, found)) if pair[0] != pair[1]), None
        )
        if different is None and len(expected) != len(found):
            different = min(len(expected), len(found))
        report.tokens[name] = (len(expected), different)
        if different is not None and _is_tie(
            spec, ids, expected, found, different, seed, options, report.logit_tolerance
        ):
            report.ties.add(name)
    return report


def _tokens(
    spec: TreeSpeculator, engine: Engine, ids: torch.Tensor, seed: int, options: dict
) -> list[int]:
    request, _ = spec._prepare(ids, None, seed, None, dict(options))
    for _ in engine.run(request):
        pass
    return engine.rows[0].new_tokens


@torch.inference_mode()
def _tree_error(target: TreeModel, ids: torch.Tensor, num_nodes: int, seed: int) -> float:
    """Largest logit difference between a random tree and its paths forwarded as sequences by the
    untouched model."""
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [
        int(torch.randint(node, (1,), generator=generator)) for node in range(1, num_nodes)
    ]
    tokens = torch.randint(target.vocab_size, (1, num_nodes), generator=generator).to(ids.device)
    visible = ancestor_matrix(torch.tensor([parents], device=ids.device), num_nodes)
    depths = visible.sum(2) - 1
    prefix = ids.shape[1]
    target.begin()
    target.allocate(1, prefix + num_nodes)
    target.ingest(ids, [prefix])
    found = target.forward(tokens, prefix + depths, visible)[0].float()
    worst = 0.0
    for node in range(num_nodes):
        path = visible[0, node].nonzero().squeeze(1)
        sequence = torch.cat([ids, tokens[:, path]], dim=1)
        with hf.evaluation_mode(target.training_modules):
            expected = target.model(input_ids=sequence).logits[0, -1].float()
        worst = max(worst, float((found[node] - expected).abs().max() / expected.abs().max()))
    return worst


@torch.inference_mode()
def _is_tie(spec, ids, expected, found, position, seed, options, tolerance) -> bool:
    """Whether both tokens at the first difference have scores within rounding of each other."""
    if position >= min(len(expected), len(found)):
        return False
    target = spec._target
    text = torch.cat(
        [ids, torch.tensor([expected[:position]], device=ids.device, dtype=ids.dtype)], dim=1
    )
    request, _ = spec._prepare(text, None, seed, None, {**options, "max_new_tokens": 1})
    target.begin()
    target.allocate(1, text.shape[1] + 1)
    logits = target.forward_chain(text)[0, -1]
    _, scores = request.picker.pick(text, logits, 0, text.shape[1])
    scores = scores[0].float()
    if request.picker.noise is not None:
        scores = scores + request.picker.noise.at(0, text.shape[1])
    gap = float((scores[expected[position]] - scores[found[position]]).abs())
    return gap <= 2 * tolerance * float(logits.float().abs().max())
