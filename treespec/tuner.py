"""Costs of one pair of models on one device: measured by rounds of the engine itself, kept in a
small file, used by `tree="auto"` from its first round.

A file is kept per pair and dtype. It also says on which device, with how many threads and with
which versions it was measured; where any of these is another, it is ignored and `explain()` says
why.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from treespec import environment
from treespec.costs import FRONTIER_WIDTH
from treespec.policy import Outcome, Policy
from treespec.sources.base import OneShotSource, Proposal
from treespec.whatif import RoundCosts

if TYPE_CHECKING:
    from treespec.model import TreeModel
    from treespec.speculator import TreeSpeculator

SCHEMA = 1
CACHE_VARIABLE = "TREESPEC_CACHE_DIR"
NODE_SIZES = (1, 4, 8, 12, 16, 32, 64)
_WIDTHS = (1, FRONTIER_WIDTH)
_PREFIX = 256
_DEEPEST = 5
_WARM_ROUNDS, _ROUNDS, _TURNS = 2, 3, 12


class TuningError(Exception):
    """A file that cannot be written or read; its message is one line."""


def cache_dir() -> Path:
    """Where tuning files are kept: `TREESPEC_CACHE_DIR`, else the user's cache directory."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "treespec"


@dataclass(frozen=True)
class Key:
    """What a measurement holds for.

    Attributes:
        pair: of the two models' configurations and dtypes, a hash.
        device: its name, and how many threads a CPU uses.
        versions: of torch, transformers and this package.
    """

    pair: str
    device: str
    versions: dict[str, str]

    @property
    def path(self) -> Path:
        return cache_dir() / f"tuning-{self.pair}.json"

    def mismatch(self, other: dict) -> str | None:
        """Why a file with the key `other` does not hold here; None if it does."""
        if other.get("pair") != self.pair:
            return "it is of another pair of models"
        if other.get("device") != self.device:
            return f"it was measured on {other.get('device')}, and this is {self.device}"
        if other.get("versions") != self.versions:
            found = other.get("versions")
            versions = found if isinstance(found, dict) else {}
            changed = [
                f"{name} {versions.get(name)}, now {version}"
                for name, version in self.versions.items()
                if versions.get(name) != version
            ]
            return f"it was measured with {'; '.join(changed) or 'other packages'}"
        return None


def make_key(target: TreeModel, draft: TreeModel | None) -> Key:
    """The key of a pair as it stands, with the present number of threads."""
    parts = []
    for model in (target, draft):
        if model is None:
            parts.append("none")
            continue
        config = {
            name: value
            for name, value in model.config.to_dict().items()
            # a path or a version says nothing about cost
            if not name.startswith("_") and name not in ("transformers_version", "dtype")
        }
        parts.append(json.dumps(config, sort_keys=True, default=str) + str(model.dtype))
        how = "captured" if model.on_graphs else "recorded"
        parts.append(how if model.recording_reason is None else "eager")
    pair = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    versions = environment.versions()
    wanted = {name: str(versions[name]) for name in ("torch", "transformers", "treespec")}
    return Key(pair, _device_name(target.device), wanted)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = environment.cpu_name() if device.type == "cpu" else device.type
    return f"{name}, {torch.get_num_threads()} threads"


def save(key: Key, costs: dict[int, RoundCosts]) -> Path:
    """Writes a tuning file, whole or not at all.

    Raises:
        TuningError: if the directory cannot be made or written.
    """
    data = {
        "schema": SCHEMA,
        "key": asdict(key),
        "costs": {str(rows): asdict(known) for rows, known in costs.items()},
    }
    path = key.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".tuning-")
    except OSError as error:
        raise TuningError(f"cannot write to {path.parent}: {error.strerror or error}") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
        os.replace(name, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise TuningError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def load(key: Key) -> tuple[dict[int, RoundCosts], str]:
    """The costs kept for a key, by rows, and where they come from or why there are none. Never
    raises for what a file holds."""
    path = key.path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, "measured in its own rounds; `treespec tune` would keep them in a file"
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return {}, f"measured in its own rounds; {path} cannot be read: {reason}"
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else None
            reason = f"its format is version {found}, and this package reads version {SCHEMA}"
            return {}, f"measured in its own rounds; {path} is ignored: {reason}"
        mismatch = key.mismatch(data["key"])
        if mismatch is not None:
            return {}, f"measured in its own rounds; {path} is ignored: {mismatch}"
        costs = {int(rows): _costs(known) for rows, known in data["costs"].items()}
        if not costs:
            raise ValueError("no costs")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}, (
            f"measured in its own rounds; {path} is damaged; `treespec tune` writes a new one"
        )
    return costs, f"from {path}, and followed since"


def _costs(data: dict) -> RoundCosts:
    """Costs from JSON.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: for anything but positive numbers.
    """

    def table(values: dict) -> dict[int, float]:
        return {int(size): number(ms, above=0.0) for size, ms in values.items()}

    def number(value: float, above: float = -1.0) -> float:
        value = float(value)
        if not above < value < 1e7:
            raise ValueError(value)
        return value

    verify = table(data["verify_ms"])
    if 1 not in verify:
        raise ValueError("no cost of one node")
    return RoundCosts(
        verify,
        number(data["root_ms"]),
        table(data["level_ms"]) if data["level_ms"] else None,
        number(data["lookup_ms"]),
        number(data["overhead_ms"]),
    )


@dataclass(frozen=True)
class Shape:
    """A shape whose rounds are timed: nodes verified, draft levels, nodes a level forwards, and
    whether lookups are asked."""

    num_nodes: int
    levels: int = 0
    width: int = 1
    lookup: bool = False

    def __str__(self) -> str:
        parts = [f"{self.num_nodes} nodes"]
        if self.levels:
            parts.append(f"{self.levels} levels of {self.width}")
        if self.lookup:
            parts.append("lookup")
        return ", ".join(parts)

    @property
    def continuation(self) -> int:
        """Tokens of a looked-up continuation; of a filler's where there are no draft levels."""
        return 10 if self.lookup else 4 if self.num_nodes > 1 and not self.levels else 0


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a round: growing, verifying, the rest, and all of it; and the nodes it
    verified, which are fewer than asked for where the sources propose fewer."""

    draft_ms: float
    verify_ms: float
    rest_ms: float
    total_ms: float
    num_nodes: float

    @property
    def beside_ms(self) -> float:
        """All but the verification."""
        return self.draft_ms + self.rest_ms

    @classmethod
    def of(cls, outcomes: list[Outcome]) -> Timing:
        """The medians of rounds of one shape."""
        rest = [o.total_ms - o.draft_ms - o.verify_ms for o in outcomes]
        return cls(
            statistics.median(o.draft_ms for o in outcomes),
            statistics.median(o.verify_ms for o in outcomes),
            statistics.median(rest),
            statistics.median(o.total_ms for o in outcomes),
            statistics.median(o.num_nodes for o in outcomes),
        )


class _Filler(OneShotSource):
    """Proposes tokens that are hardly ever right, as many as are wanted: makes trees of a given
    size."""

    name = "filler"

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.num_nodes = 1

    def propose(self, sequences, length):
        rows = len(sequences.lens)
        paths, steps = -(-self.num_nodes // 4), min(4, length)
        # every path has a first token of its own, so none merge
        tokens = torch.arange(paths * steps).view(paths, steps) * 7 % self._vocab_size
        tokens = tokens.expand(rows, -1, -1).to(sequences.tokens.device)
        return Proposal(tokens.contiguous(), [8] * rows)


class _ProbePolicy(Policy):
    """Draws a given shape and keeps the last round's times."""

    max_nodes = max(NODE_SIZES)
    node_sizes = NODE_SIZES
    max_rows = max(_WIDTHS) * _DEEPEST + 1

    def __init__(self) -> None:
        self.draw(Shape(1))

    def draw(self, shape: Shape) -> None:
        """From now on draws this shape."""
        self._shape = shape
        self.max_depth, self.lookup_length = shape.levels, shape.continuation

    def begin_round(self, left):
        self.left = min(left)
        return True

    def wants_draft(self, lookup_scores):
        self._more = self._shape.levels - 1
        return self._shape.levels > 0

    def children(self, depth):
        return 4

    def frontier(self, depth):
        return self._shape.width, float("-inf")

    def levels_ahead(self):
        return self._shape.levels

    def worth_expanding(self, scores):
        # called once a level after the first
        self._more -= 1
        return self._more >= 0

    def nodes_to_verify(self, scores):
        return self._shape.num_nodes

    def observe(self, outcome):
        self.last = outcome


class Bench:
    """Times rounds of given shapes with a speculator's own models.

    Args:
        spec: its target, draft and recordings are used; it must not be generating.
        rows: sequences at a time.
    """

    def __init__(self, spec: TreeSpeculator, rows: int) -> None:
        from treespec.engine import Engine

        self._spec = spec
        self._lookups = spec._engine.lookups
        target = spec._target
        limit = target.position_limit or 1 << 30
        if spec._model is not None and spec._model.position_limit is not None:
            limit = min(limit, spec._model.position_limit)
        self._budget = min(256, limit // 2)
        prefix = min(_PREFIX, limit - self._budget)
        # without 0, which may pad
        pattern = 1 + torch.arange(prefix) * 11 % min(97, target.vocab_size - 1)
        self._ids = pattern.repeat(rows, 1)
        self._policy, self._filler = _ProbePolicy(), _Filler(target.vocab_size)
        sources = [self._filler, *self._lookups, *spec._engine.drafts]
        self._engine = Engine(target, sources, self._policy)

    def time_all(
        self,
        listed: list[Shape],
        advance: Callable[[str], None] | None = None,
        turns: int | None = None,
    ) -> dict[Shape, Timing]:
        """Times all shapes in turns of a few rounds, many times over: a busy spell hits them
        all."""
        turns = turns or _TURNS
        outcomes: dict[Shape, list[Outcome]] = {shape: [] for shape in listed}
        with contextlib.closing(self._rounds()) as running:
            for turn in range(turns):
                for shape in random.Random(turn).sample(listed, len(listed)):
                    self._draw(shape)
                    # after another shape the caches are cold, and a draft has tokens to take in
                    found = list(itertools.islice(running, _WARM_ROUNDS + _ROUNDS))
                    outcomes[shape] += found[_WARM_ROUNDS:]
                    if advance and turn == turns - 1:
                        advance(str(shape))
        return {shape: Timing.of(found) for shape, found in outcomes.items()}

    def _draw(self, shape: Shape) -> None:
        self._policy.draw(shape)
        self._filler.num_nodes = shape.num_nodes
        self._engine.lookups = self._lookups if shape.lookup else [self._filler]

    def _rounds(self) -> Generator[Outcome, None, None]:
        """Rounds of all rows without end, of one text after another."""
        options = {"max_new_tokens": self._budget, "do_sample": False}
        while True:
            mask = torch.ones_like(self._ids)
            request, _ = self._spec._prepare(self._ids, mask, None, None, options)
            request.eos_ids, request.stop, request.warming = frozenset(), None, True
            with contextlib.closing(_closable(self._engine.run(request))) as running:
                for _ in running:
                    # the last rounds of a text have no room for all levels
                    if self._policy.left < self._budget // 8:
                        break
                    yield self._policy.last


def _closable(generation: Iterator) -> Generator:
    yield from generation


def shapes(spec: TreeSpeculator) -> list[Shape]:
    """The shapes that `measure` times."""
    listed = [Shape(size) for size in NODE_SIZES]
    if spec._model is not None:
        listed += [Shape(4, 1), *(Shape(4, 3, width) for width in _WIDTHS)]
    if spec._engine.lookups:
        listed.append(Shape(8, lookup=True))
    return listed


def record(spec: TreeSpeculator, rows: int) -> None:
    """Makes the forwards of every shape often enough that they are recorded and checked."""
    Bench(spec, rows).time_all(shapes(spec), turns=2)


def measure(
    spec: TreeSpeculator, rows: int = 1, advance: Callable[[str], None] | None = None
) -> RoundCosts:
    """Measures the parts of a round.

    Args:
        spec: the pair; its models are used, its policy is left alone.
        rows: sequences at a time.
        advance: called with the name of every shape that was timed.
    """
    return _costs_of(spec, Bench(spec, rows).time_all(shapes(spec), advance))


def _costs_of(spec: TreeSpeculator, timed: dict[Shape, Timing]) -> RoundCosts:
    plain = timed[Shape(1)]
    root, levels = 0.0, {}
    if spec._model is not None:
        first = timed[Shape(4, 1)]
        root = max(first.beside_ms - plain.beside_ms, 0.0)
        for width in _WIDTHS:
            deep = timed[Shape(4, 3, width)]
            levels[width] = max((deep.draft_ms - first.draft_ms) / 2, 0.02 * first.draft_ms)
    lookup = 0.0
    if spec._engine.lookups:
        lookup = max(timed[Shape(8, lookup=True)].beside_ms - plain.beside_ms, 0.0)
    return RoundCosts(
        {size: timed[Shape(size)].verify_ms for size in NODE_SIZES},
        root,
        levels or None,
        lookup,
        plain.beside_ms,
    )


def check_shapes(spec: TreeSpeculator) -> list[Shape]:
    """Shapes to hold predicted against measured times, none of them timed by `measure`."""
    shapes = []
    if spec._engine.lookups:
        shapes += [Shape(12, lookup=True), Shape(24, lookup=True)]
    if spec._model is not None:
        deep = ((8, 2), (16, 4), (24, _DEEPEST))
        shapes += [Shape(4, 2), *(Shape(nodes, levels, FRONTIER_WIDTH) for nodes, levels in deep)]
    return shapes


def measure_and_check(
    spec: TreeSpeculator, rows: int = 1, advance: Callable[[str], None] | None = None
) -> tuple[RoundCosts, list[tuple[Shape, float, float]]]:
    """As `measure`, and per shape of `check_shapes` the predicted and the measured milliseconds of
    a round. All are timed in turns, so that a machine's changing pace is no error of prediction."""
    checked = check_shapes(spec)
    timed = Bench(spec, rows).time_all([*shapes(spec), *checked], advance)
    costs = _costs_of(spec, timed)

    def predicted(shape: Shape) -> float:
        num_nodes = round(timed[shape].num_nodes)
        return costs.predict_round_ms(num_nodes, shape.levels, shape.width, shape.lookup)

    return costs, [(shape, predicted(shape), timed[shape].total_ms) for shape in checked]
