"""Tree shapes: what a user asks the drafts to grow. Frozen, validated at construction, and free of
any tensor."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

MAX_NODES = 256
MAX_DEPTH = 64


def _check_int(owner: str, name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an integer; got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{owner}: {name} must be between {low} and {high}; got {value}")


def _check_fraction(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number; got {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{owner}: {name} must be in [0, 1); got {value}")


class Shape:
    """Base of all shapes. `depth` counts drafted levels, `max_nodes` counts nodes with the root."""

    if TYPE_CHECKING:

        @property
        def depth(self) -> int: ...

        @property
        def max_nodes(self) -> int: ...

    def __str__(self) -> str:
        values = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({values})"


@dataclass(frozen=True)
class Chain(Shape):
    """Linear speculation: one drafted token after another.

    Args:
        length: drafted tokens a round, 1 to 64.
    """

    length: int = 6

    def __post_init__(self) -> None:
        _check_int("Chain", "length", self.length, 1, MAX_DEPTH)

    @property
    def depth(self) -> int:
        return self.length

    @property
    def max_nodes(self) -> int:
        return self.length + 1


@dataclass(frozen=True)
class FixedTree(Shape):
    """Every node of a level gets the same number of children, except where its path is unlikely.

    With `first_branching=1` these are the trees of the DynaTree experiment, whose depth counts from
    0: its D=7, B=2 is `FixedTree(depth=8, branching=2, first_branching=1)`.

    Args:
        depth: drafted levels, 1 to 64.
        branching: children of an expanded node, 1 to 64.
        prune_threshold: cumulative draft probability under which a node is kept and verified but
            not expanded; in [0, 1), 0 turns pruning off.
        max_nodes: most nodes of a tree, root included, 2 to 256; the likeliest are kept.
        first_branching: children of the root; None takes `branching`.
    """

    depth: int = 7
    branching: int = 2
    prune_threshold: float = 0.05
    max_nodes: int = 64
    first_branching: int | None = None

    def __post_init__(self) -> None:
        _check_int("FixedTree", "depth", self.depth, 1, MAX_DEPTH)
        _check_int("FixedTree", "branching", self.branching, 1, 64)
        _check_fraction("FixedTree", "prune_threshold", self.prune_threshold)
        _check_int("FixedTree", "max_nodes", self.max_nodes, 2, MAX_NODES)
        if self.first_branching is not None:
            _check_int("FixedTree", "first_branching", self.first_branching, 1, 64)
        if self.max_nodes < self.depth + 1:
            raise ValueError(
                f"FixedTree: max_nodes must be at least depth + 1 = {self.depth + 1}; got "
                f"{self.max_nodes}"
            )


@dataclass(frozen=True)
class BestFirstTree(Shape):
    """The likeliest `max_nodes` nodes by cumulative draft probability, grown level by level
    (EAGLE-2, 2406.16858). When greedy, that probability is sharpened to what a pick, rather than a
    draw, deserves (docs/design/003-auto.md).

    Args:
        max_nodes: nodes verified a round, root included, 2 to 256.
        depth: drafted levels, 1 to 64.
        width: nodes expanded a level, and children of each, 1 to 64.
    """

    max_nodes: int = 32
    depth: int = 8
    width: int = 8

    def __post_init__(self) -> None:
        _check_int("BestFirstTree", "max_nodes", self.max_nodes, 2, MAX_NODES)
        _check_int("BestFirstTree", "depth", self.depth, 1, MAX_DEPTH)
        _check_int("BestFirstTree", "width", self.width, 1, 64)


@dataclass(frozen=True)
class AdaptiveTree(Shape):
    """DynaTree's adaptive rules: breadth by confidence, depth by path probability, and history.

    Breadth: an expanded node whose best child has draft probability above `high_confidence` gets 1
    child, below `low_confidence` it gets `max_branching`, else `branching`. Depth: a node is
    expanded while its path probability is at least `stop_threshold`; from `base_depth` on only
    while it is above `deepen_threshold`, and never beyond `max_depth`.
    History: over the last `window` rounds the mean share of the base depth that was accepted is
    held against `target_acceptance` +- `tolerance`; above it the base depth grows by one and both
    depth thresholds fall by `threshold_step`, below it the opposite.

    Args:
        base_depth: levels grown without a second thought, 1 to `max_depth`.
        max_depth: most levels, up to 64.
        branching: children at middling confidence.
        max_branching: children at low confidence.
        high_confidence, low_confidence: in [0, 1), low below high.
        stop_threshold, deepen_threshold: path probabilities in [0, 1).
        target_acceptance, tolerance, threshold_step: in [0, 1).
        window: rounds of history, 1 to 1000.
        max_nodes: most nodes, root included, 2 to 256.
    """

    base_depth: int = 5
    max_depth: int = 8
    branching: int = 2
    max_branching: int = 3
    high_confidence: float = 0.9
    low_confidence: float = 0.4
    stop_threshold: float = 0.1
    deepen_threshold: float = 0.5
    target_acceptance: float = 0.7
    tolerance: float = 0.1
    threshold_step: float = 0.05
    window: int = 10
    max_nodes: int = 64

    def __post_init__(self) -> None:
        _check_int("AdaptiveTree", "max_depth", self.max_depth, 1, MAX_DEPTH)
        _check_int("AdaptiveTree", "base_depth", self.base_depth, 1, self.max_depth)
        _check_int("AdaptiveTree", "max_branching", self.max_branching, 1, 64)
        _check_int("AdaptiveTree", "branching", self.branching, 1, self.max_branching)
        _check_int("AdaptiveTree", "window", self.window, 1, 1000)
        _check_int("AdaptiveTree", "max_nodes", self.max_nodes, 2, MAX_NODES)
        for name in (
            "high_confidence",
            "low_confidence",
            "stop_threshold",
            "deepen_threshold",
            "target_acceptance",
            "tolerance",
            "threshold_step",
        ):
            _check_fraction("AdaptiveTree", name, getattr(self, name))
        if self.low_confidence > self.high_confidence:
            raise ValueError(
                "AdaptiveTree: low_confidence must not exceed high_confidence; "
                f"got {self.low_confidence} > {self.high_confidence}"
            )

    @property
    def depth(self) -> int:
        return self.max_depth


def resolve_shape(tree: object) -> Shape | None:
    """The shape a `tree=` argument names; None stands for "auto".

    Raises:
        TypeError: for anything but a shape object or a string.
        ValueError: for a string other than "auto".
    """
    if isinstance(tree, Shape):
        return tree
    if isinstance(tree, str):
        if tree == "auto":
            return None
        raise ValueError(f'tree must be "auto" or a shape such as BestFirstTree(); got {tree!r}')
    raise TypeError(
        'tree must be "auto", Chain, FixedTree, BestFirstTree or AdaptiveTree; got '
        f"{type(tree).__name__}"
    )
