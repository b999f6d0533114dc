"""Named ways to continue a prompt: transformers' own, other libraries', and every row of ours.

A method is built when it is first used, so that a list of them costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from treespec.bench.figures import BASE
from treespec.bench.models import Pair
from treespec.shapes import AdaptiveTree, BestFirstTree, Chain, FixedTree, Shape

if TYPE_CHECKING:
    from treespec.speculator import TreeSpeculator


@dataclass(frozen=True)
class Task:
    """One prompt, or one batch of them, to continue.

    Attributes:
        id: its name in the record.
        category: of its prompts.
        input_ids: int64 `[B, W]`, left-padded.
        attention_mask: int64 `[B, W]`.
        new_tokens: tokens to write; end of text is off.
        temperature: 0 is greedy.
        seed: of sampling.
    """

    id: str
    category: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    new_tokens: int
    temperature: float = 0.0
    seed: int = 0

    @property
    def batch(self) -> int:
        return self.input_ids.shape[0]

    def generate_options(self) -> dict[str, Any]:
        """Keywords of `target.generate`, and of `TreeSpeculator.generate`."""
        options: dict[str, Any] = {"attention_mask": self.attention_mask}
        options |= {"max_new_tokens": self.new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": 0}
        return options


@dataclass
class Continuation:
    """What a method wrote.

    Attributes:
        ids: int64 `[B, new]` on the CPU.
        row_rounds: target forwards, counted once for every row that took part; None if unknown.
        stats: counts and milliseconds of our engine; None for others.
    """

    ids: torch.Tensor
    row_rounds: int | None = None
    stats: dict[str, Any] | None = None


Run = Callable[[Task], Continuation]


@dataclass(frozen=True)
class Stepwise:
    """A way to continue that can be paused between rounds.

    Attributes:
        steps: yields after every round, returns the continuation.
        record: records the forwards of texts like a task's, before any is written.
    """

    steps: Callable[[Task], Generator[Any, None, Continuation]]
    record: Callable[[Task], None]

    def __call__(self, task: Task) -> Continuation:
        walk = self.steps(task)
        while True:
            try:
                next(walk)
            except StopIteration as end:
                return end.value


@dataclass
class Method:
    """A named way to continue a prompt.

    Attributes:
        name: in every table.
        make: builds `run`; it raises where the method cannot run here.
        family: rows of one idea, as "linear" or "peer".
        ours: its text must be the oracle's.
        shape: our row's shape; "auto", or None for plain decoding and others' methods.
        sources: "draft", "lookup" or "merged".
        prepare: called with a task and the oracle's text before the clock starts.
    """

    name: str
    make: Callable[[], Run]
    family: str = "peer"
    ours: bool = False
    shape: Shape | str | None = None
    sources: str | None = None
    prepare: Callable[[Task, torch.Tensor], None] | None = None

    @cached_property
    def run(self) -> Run:
        return self.make()

    def about(self) -> dict[str, Any]:
        """What a record says of it: name, family, sources, and the shape's own fields."""
        shape: Any = self.shape
        if isinstance(shape, Shape):
            shape = {"kind": type(shape).__name__, **dataclasses.asdict(shape)}  # type: ignore[call-overload]
        elif shape is not None:
            shape = {"kind": shape}
        return {
            "name": self.name,
            "family": self.family,
            "ours": self.ours,
            "sources": self.sources,
            "shape": shape,
        }


@contextlib.contextmanager
def _count_forwards(model) -> Iterator[list[int]]:
    """Row by row: a forward of a batch of 4 counts 4."""
    rows = [0]

    def count(_, args, kwargs) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows[0] += 1 if ids is None else ids.shape[0]

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


@contextlib.contextmanager
def scikit_learn(visible: bool) -> Iterator[None]:
    """Lets transformers' assisted generation see scikit-learn or not.

    With it, the confidence under which the draft stops is moved after every round, by the ROC curve
    of the rounds so far; without it, it stays where it began. transformers asks
    `is_sklearn_available` in that module each time, so the answer is replaced there for a call.
    """
    from transformers.generation import candidate_generator

    asked = candidate_generator.is_sklearn_available
    candidate_generator.is_sklearn_available = lambda: visible
    try:
        yield
    finally:
        candidate_generator.is_sklearn_available = asked


@contextlib.contextmanager
def tuning_file(used: bool) -> Iterator[None]:
    """Lets `auto` start from what `treespec tune` kept on this machine, or from nothing."""
    if used:
        yield
        return
    from treespec.tuner import CACHE_VARIABLE

    before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory() as empty:
        os.environ[CACHE_VARIABLE] = empty
        try:
            yield
        finally:
            if before is None:
                del os.environ[CACHE_VARIABLE]
            else:
                os.environ[CACHE_VARIABLE] = before


def _transformers(pair: Pair, count: bool = True, **extra: Any) -> Run:
    def run(task: Task) -> Continuation:
        torch.manual_seed(task.seed)
        with _count_forwards(pair.target) if count else contextlib.nullcontext([0]) as rows:
            ids = pair.target.generate(task.input_ids, **task.generate_options(), **extra)
        new = ids[:, task.input_ids.shape[1] :].cpu()
        return Continuation(new, rows[0] if count else task.batch * new.shape[1])

    return run


def _assisted(pair: Pair, with_scikit_learn: bool) -> Run:
    if with_scikit_learn and importlib.util.find_spec("sklearn") is None:
        raise ModuleNotFoundError("scikit-learn is not installed")
    run = _transformers(pair, assistant_model=pair.draft)

    def hidden_or_not(task: Task) -> Continuation:
        with scikit_learn(with_scikit_learn):
            return run(task)

    return hidden_or_not


def transformers_methods(pair: Pair, batch: int = 1) -> list[Method]:
    """`target.generate`, plain first, in every way it has for one model or for this pair."""
    on_cuda = pair.target.device.type == "cuda"
    # a compiled forward cannot be counted from outside, and writes one token anyway
    static: dict[str, Any] = {"cache_implementation": "static", "disable_compile": not on_cuda}
    methods = [
        Method(BASE, lambda: _transformers(pair), "plain"),
        Method(
            f"transformers static cache ({'compiled' if on_cuda else 'not compiled'})",
            lambda: _transformers(pair, count=False, **static),
        ),
    ]
    if batch > 1:
        return methods
    return [
        *methods,
        Method("transformers assisted (scikit-learn)", lambda: _assisted(pair, True)),
        Method("transformers assisted (no scikit-learn)", lambda: _assisted(pair, False)),
        Method(
            "transformers prompt lookup", lambda: _transformers(pair, prompt_lookup_num_tokens=10)
        ),
    ]


def _flashspec(pair: Pair, temperature: float) -> Run:
    from flashspec import FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine import HuggingFaceDrafter, TargetModel

    device, dtype = pair.target.device, pair.target.dtype
    drafter = HuggingFaceDrafter("draft", device, dtype, temperature=temperature, model=pair.draft)
    sampling = SamplingConfig(temperature=temperature, seed=1)
    engine = SpeculativeEngine(
        FlashSpecConfig(device=str(device), sampling=sampling),
        [drafter],
        TargetModel("target", device, dtype, model=pair.target),
    )

    def run(task: Task) -> Continuation:
        with _count_forwards(pair.target) as rows:
            result = engine.generate(
                task.input_ids, max_new_tokens=task.new_tokens, eos_token_ids=()
            )
        ids = result if isinstance(result, torch.Tensor) else result.output_ids
        return Continuation(ids[:, -task.new_tokens :].cpu(), rows[0] or None)

    return run


def _economize(pair: Pair, sampled: bool) -> Run:
    import logging

    import economize
    from economize.techniques.draft_model import DraftModelConfig

    # it loads the draft itself, from a directory
    logging.getLogger("economize").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        pair.draft.save_pretrained(folder)
        model = economize.apply(pair.target, DraftModelConfig(model=folder))
    verifier = "rejection" if sampled else None
    decoding = economize.DecodeConfig(cycle_length=4, verifier=verifier)

    def run(task: Task) -> Continuation:
        torch.manual_seed(task.seed)
        with _count_forwards(pair.target) as rows:
            ids = model.generate(task.input_ids, decoding=decoding, **task.generate_options())
        return Continuation(ids[:, task.input_ids.shape[1] :].cpu(), rows[0] or None)

    return run


def peer_methods(pair: Pair, temperature: float = 0.0, batch: int = 1) -> list[Method]:
    """Other libraries. flashspec takes no attention mask, so it has one prompt at a time."""
    economize = Method("economize", lambda: _economize(pair, temperature > 0))
    if batch > 1:
        return [economize]
    return [Method("flashspec", lambda: _flashspec(pair, temperature)), economize]


def draft_argument(pair: Pair, sources: str | None) -> Any:
    """The `draft=` of a speculator: a model, lookup, both, or None."""
    return {
        None: None,
        "draft": pair.draft,
        "lookup": "ngram",
        "merged": [pair.draft, "ngram"],
    }[sources]


def stats_of(stats) -> dict[str, Any]:
    """Counts and milliseconds of a call as a sample keeps them."""
    return {
        "rounds": stats.rounds,
        "draft_forwards": stats.draft_forwards,
        "drafted_nodes": stats.drafted_nodes,
        "accepted": sum(length * times for length, times in stats.accept_lengths.items()),
        "prefill_ms": stats.prefill_ms,
        "draft_ms": stats.draft_ms,
        "verify_ms": stats.verify_ms,
        "commit_ms": stats.commit_ms,
        "total_ms": stats.total_ms,
    }


def _speculator(pair: Pair, shape: Shape | str | None, sources: str | None) -> Run:
    from treespec import TreeSpeculator

    draft, graphs = draft_argument(pair, sources), pair.cuda_graphs
    return stepwise(TreeSpeculator(pair.target, draft, shape or "auto", cuda_graphs=graphs))


def stepwise(spec: TreeSpeculator) -> Stepwise:
    """A speculator as a way to continue that can be paused between rounds."""

    def steps(task: Task) -> Generator[Any, None, Continuation]:
        options = task.generate_options()
        mask, seed = options.pop("attention_mask"), task.seed if task.temperature > 0 else None
        request, config = spec._prepare(task.input_ids, mask, seed, None, options)
        yield from spec._engine.run(request)
        ids = spec._output(request, config)
        rounds = sum(row.rounds for row in spec.stats.per_row)
        return Continuation(ids[:, task.input_ids.shape[1] :].cpu(), rounds, stats_of(spec.stats))

    def record(task: Task) -> None:
        options = task.generate_options()
        del options["attention_mask"], options["max_new_tokens"]
        spec.warmup(task.batch, task.input_ids.shape[1] + task.new_tokens, **options)

    return Stepwise(steps, record)


def our_method(
    pair: Pair, name: str, family: str, shape: Shape | str | None, sources: str | None
) -> Method:
    """A row of this library."""
    full = f"treespec {name} ({sources})" if sources else f"treespec {name}"
    return Method(full, lambda: _speculator(pair, shape, sources), family, True, shape, sources)


def dynatree(depth: int, prune_threshold: float, max_nodes: int) -> FixedTree:
    """A tree of the DynaTree experiment, which counts depth from 0 and does not branch at its
    first level."""
    return FixedTree(depth + 1, 2, prune_threshold, max_nodes, first_branching=1)


# The ablation: (name, family, shape). 32 nodes is the experiment's own cap; D=4 without pruning is
# complete with 32, D=7 with 256.
REFERENCE_SHAPES: tuple[tuple[str, str, Shape], ...] = (
    *((f"linear K={length}", "linear", Chain(length)) for length in range(4, 9)),
    *((f"tree D={depth} pruned", "pruned", dynatree(depth, 0.05, 32)) for depth in range(4, 8)),
    ("tree D=4 unpruned", "unpruned", dynatree(4, 0.0, 32)),
    ("tree D=7 unpruned", "unpruned", dynatree(7, 0.0, 256)),
    ("best-first 32/8/8", "best-first", BestFirstTree()),
    ("best-first 12/4/3", "best-first", BestFirstTree(12, 4, 3)),
    ("adaptive", "adaptive", AdaptiveTree()),
)
SOURCES = ("draft", "lookup", "merged")


def reference_methods(
    pair: Pair, more: list[tuple[str, Shape | str]]
) -> tuple[list[Method], dict[str, str]]:
    """Rows of the ablation, and what is left out and why.

    Args:
        pair: the models.
        more: further shapes as (name, shape or "auto").
    """
    methods = [*transformers_methods(pair), *peer_methods(pair)]
    methods.append(our_method(pair, "plain", "engine", None, None))
    shapes = [*REFERENCE_SHAPES, *((name, "own", shape) for name, shape in more)]
    for name, family, shape in shapes:
        if shape != "auto":
            methods += [our_method(pair, name, family, shape, sources) for sources in SOURCES]
    # auto adds lookup to a draft by itself, so "draft" alone is not a row of its own
    methods += [our_method(pair, "auto", "auto", "auto", sources) for sources in SOURCES[1:]]
    return methods, {"treespec auto (draft)": 'tree="auto" adds lookup by itself: see merged'}


def suite_methods(
    pair: Pair, more: list[tuple[str, Shape | str]], control: bool = False
) -> Callable[[float, int], tuple[list[Method], dict[str, str]]]:
    """Rows of the suite by temperature and batch; our speculators serve all of them.

    Args:
        pair: the models.
        more: further shapes as (name, shape or "auto").
        control: plain decoding a second time.
    """
    ours = [
        our_method(pair, "plain", "engine", None, None),
        our_method(pair, "linear K=4", "linear", Chain(4), "draft"),
        our_method(pair, "best-first 12/4/3", "best-first", BestFirstTree(12, 4, 3), "draft"),
        our_method(pair, "best-first 24/10/8", "best-first", BestFirstTree(24, 10, 8), "lookup"),
        our_method(pair, "best-first 64/40/4", "best-first", BestFirstTree(64, 40, 4), "lookup"),
        our_method(pair, "best-first 24/3/4", "best-first", BestFirstTree(24, 3, 4), "merged"),
        *(our_method(pair, name, "own", shape, "merged") for name, shape in more),
        our_method(pair, "auto", "auto", "auto", "merged"),
        *([our_method(pair, "plain again", "control", None, None)] if control else []),
    ]

    def methods(temperature: float, batch: int) -> tuple[list[Method], dict[str, str]]:
        not_run = {}
        if batch > 1:
            names = ("transformers assisted", "transformers prompt lookup", "flashspec")
            not_run = {f"{name}, batch {batch}": "one prompt at a time only" for name in names}
        theirs = [*transformers_methods(pair, batch), *peer_methods(pair, temperature, batch)]
        kept = [method for method in theirs if "static cache" not in method.name]
        return [*kept, *ours], not_run

    return methods


def make_oracle(pair: Pair) -> Callable[[Task], torch.Tensor]:
    """What our rows must write: greedy, the target's own text; sampled, the engine's plain text of
    the same seed."""
    greedy = Method("oracle", lambda: _transformers(pair))
    sampled = our_method(pair, "oracle", "engine", None, None)
    return lambda task: (sampled if task.temperature > 0 else greedy).run(task).ids
