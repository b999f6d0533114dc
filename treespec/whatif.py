"""What a chain or a tree would bring for given costs and acceptance: plain arithmetic, no model.

Acceptance is a list `[a1, a2, ...]`: the chance that the target's token is the draft's likeliest,
second likeliest, ... child of a node, the same at every node. Costs are milliseconds of the parts
of a round. `treespec bench whatif` and `explain()` print these predictions; `AutoPolicy` decides by
the same costs and by the draft's own probabilities.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RoundCosts:
    """Milliseconds of the parts of a round, for one number of rows.

    Attributes:
        verify_ms: of a verification, by its number of nodes.
        root_ms: of the draft's first level, which also takes in the text since the last one.
        level_ms: of a further level of the draft, by the number of nodes it forwards.
        lookup_ms: of asking the lookups.
        overhead_ms: of everything else: selection, acceptance, commit.
    """

    verify_ms: dict[int, float]
    root_ms: float = 0.0
    level_ms: dict[int, float] | None = None
    lookup_ms: float = 0.0
    overhead_ms: float = 0.0

    @property
    def plain_ms(self) -> float:
        """A round of plain decoding."""
        return self.overhead_ms + self.verify(1)

    def verify(self, num_nodes: int) -> float:
        """A verification of so many nodes; between and beyond what is known, on straight lines."""
        return CostCurve(self.verify_ms).at(num_nodes)

    def level(self, width: int) -> float:
        """A further level of the draft that forwards `width` nodes."""
        return CostCurve(self.level_ms).at(width) if self.level_ms else 0.0

    def predict_round_ms(
        self, num_nodes: int, levels: int = 0, width: int = 1, lookup: bool = False
    ) -> float:
        """A whole round.

        Args:
            num_nodes: nodes that are verified, root included.
            levels: draft levels; 0 where the draft is not asked.
            width: nodes that a level after the first forwards.
            lookup: lookups are asked.
        """
        draft = self.root_ms + (levels - 1) * self.level(width) if levels else 0.0
        lookups = self.lookup_ms if lookup else 0.0
        return self.overhead_ms + lookups + draft + self.verify(num_nodes)


class CostCurve:
    """A cost by size: on straight lines between what is known, never falling with size, and beyond
    the largest size on by the mean slope.

    Args:
        known: milliseconds by size, of at least one size.
    """

    def __init__(self, known: dict[int, float]) -> None:
        self._sizes = sorted(known)
        # noise may say that a larger size is cheaper
        self._values = list(itertools.accumulate((known[size] for size in self._sizes), max))

    def at(self, size: int) -> float:
        sizes, values = self._sizes, self._values
        if size <= sizes[0]:
            return values[0]
        if size >= sizes[-1]:
            width = sizes[-1] - sizes[0]
            slope = (values[-1] - values[0]) / width if width else 0.0
            return values[-1] + slope * (size - sizes[-1])
        right = bisect.bisect_left(sizes, size)
        left = right - 1
        share = (size - sizes[left]) / (sizes[right] - sizes[left])
        return values[left] + share * (values[right] - values[left])


@dataclass(frozen=True)
class Prediction:
    """A shape, and what a round of it would bring.

    Attributes:
        name: "plain", "chain of 4", "tree of 12 nodes, 3 levels".
        num_nodes: verified nodes, root included.
        levels: draft levels.
        tokens: expected tokens of a round.
        round_ms: its milliseconds.
    """

    name: str
    num_nodes: int
    levels: int
    tokens: float
    round_ms: float

    @property
    def tokens_per_ms(self) -> float:
        return self.tokens / self.round_ms


def chain_tokens(acceptance: float, length: int) -> float:
    """Expected tokens of a round with a chain of `length`: `sum of a^i, i = 0 .. length`
    (Leviathan et al., 2211.17192, equation 1)."""
    return float(sum(acceptance**i for i in range(length + 1)))


def best_nodes(
    acceptance: Sequence[float], num_nodes: int, depth: int
) -> Iterator[tuple[float, int]]:
    """The likeliest nodes below the root of the infinite tree with this acceptance, as `(chance,
    depth)`, the likeliest first: at most `num_nodes - 1`, at most `depth` deep.

    A child is never likelier than its parent, so any beginning of this order is a tree, and no tree
    of its size expects more tokens (Sequoia, 2402.12374, section 3.1, for equal subtrees).
    """
    ranks = sorted((chance for chance in acceptance if chance > 0), reverse=True)
    waiting = [(-chance, 1) for chance in ranks] if depth > 0 else []
    heapq.heapify(waiting)
    for _ in range(num_nodes - 1):
        if not waiting:
            return
        chance, level = heapq.heappop(waiting)
        yield -chance, level
        if level < depth:
            for rank in ranks:
                heapq.heappush(waiting, (chance * rank, level + 1))


def plain(costs: RoundCosts) -> Prediction:
    """Plain decoding."""
    return Prediction("plain", 1, 0, 1.0, costs.plain_ms)


def chains(costs: RoundCosts, acceptance: float, max_depth: int) -> list[Prediction]:
    """Chains of every length up to `max_depth`."""
    return [
        Prediction(
            f"chain of {length}",
            length + 1,
            length,
            chain_tokens(acceptance, length),
            costs.predict_round_ms(length + 1, length),
        )
        for length in range(1, max_depth + 1)
    ]


def trees(
    costs: RoundCosts,
    acceptance: Sequence[float],
    max_depth: int,
    sizes: Sequence[int],
    width: int = 4,
) -> list[Prediction]:
    """The best tree of every depth up to `max_depth` and every size."""
    predictions = []
    for depth in range(1, max_depth + 1):
        nodes = list(best_nodes(acceptance, max(sizes), depth))
        for size in sizes:
            chosen = nodes[: size - 1]
            # a smaller tree, or one that has no node on the last level, is listed elsewhere
            if len(chosen) < size - 1 or all(level < depth for _, level in chosen):
                continue
            tokens = 1.0 + sum(chance for chance, _ in chosen)
            name = f"tree of {size} nodes, {depth} level{'s' if depth > 1 else ''}"
            round_ms = costs.predict_round_ms(size, depth, width)
            predictions.append(Prediction(name, size, depth, tokens, round_ms))
    return predictions


def fastest(predictions: Sequence[Prediction]) -> Prediction:
    """The one with the most tokens per millisecond; the first of equals."""
    return max(predictions, key=lambda prediction: prediction.tokens_per_ms)


def add_whatif_parser(subparsers, **kwargs) -> argparse.ArgumentParser:
    """Adds `whatif` to a command's subparsers; `kwargs` go to `add_parser`."""
    parser = subparsers.add_parser(
        "whatif",
        help="predict the speedup for given costs and acceptance",
        description="Predicts tokens per round, milliseconds and speedup over plain decoding for "
        "chains and trees, from costs and acceptance alone. No model is loaded.",
        epilog="Example: treespec bench whatif --verify-ms 1:6.6,24:8.7 --level-ms 1.3 "
        "--acceptance 0.6,0.15,0.07 --depth 6",
        **kwargs,
    )
    parser.add_argument(
        "--verify-ms",
        required=True,
        metavar="N:MS,...",
        help="milliseconds of a target forward by its number of nodes, as in 1:6.6,24:8.7",
    )
    parser.add_argument(
        "--level-ms",
        required=True,
        metavar="MS | N:MS,...",
        help="milliseconds of a draft level, or by the number of nodes it forwards",
    )
    parser.add_argument(
        "--acceptance",
        required=True,
        metavar="A1,A2,...",
        help="chance that the draft's likeliest token is right, its second likeliest, ...",
    )
    parser.add_argument(
        "--depth", type=int, default=8, metavar="D", help="most draft levels (default: 8)"
    )
    parser.add_argument(
        "--nodes",
        default="4,8,12,16,24,32,48,64",
        metavar="N,...",
        help="sizes of trees, root included (default: 4,8,12,16,24,32,48,64)",
    )
    parser.add_argument(
        "--branching",
        type=int,
        default=4,
        metavar="W",
        help="nodes that a draft level forwards (default: 4)",
    )
    parser.add_argument(
        "--plain-ms",
        type=float,
        metavar="MS",
        help="a round of plain decoding (default: a verification of one node)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_whatif)
    return parser


def run_whatif(arguments: argparse.Namespace) -> int:
    """`treespec bench whatif`; prints a table, or JSON.

    Raises:
        ValueError: for a value that is no cost, no chance or no size; the message names the option.
    """
    import json

    from treespec import console

    verify = _numbers("--verify-ms", arguments.verify_ms)
    if 1 not in verify:
        raise ValueError(f"--verify-ms must tell the cost of 1 node; got {arguments.verify_ms!r}")
    level = _numbers("--level-ms", arguments.level_ms)
    acceptance = _acceptance(arguments.acceptance)
    sizes = _sizes(arguments.nodes)
    for option, value in (("--depth", arguments.depth), ("--branching", arguments.branching)):
        if not 1 <= value <= 64:
            raise ValueError(f"{option} must be from 1 to 64; got {value}")
    costs = RoundCosts(verify, CostCurve(level).at(1), level)
    plain_ms = costs.plain_ms if arguments.plain_ms is None else arguments.plain_ms
    if plain_ms <= 0:
        raise ValueError(f"--plain-ms must be above 0; got {plain_ms}")
    # what plain decoding costs beyond its forward, every round costs
    overhead = max(0.0, plain_ms - costs.verify(1))
    costs = RoundCosts(verify, costs.root_ms, level, overhead_ms=overhead)
    listed = [
        Prediction("plain", 1, 0, 1.0, plain_ms),
        *chains(costs, acceptance[0], arguments.depth),
    ]
    grown = trees(costs, acceptance, arguments.depth, sizes, arguments.branching)
    for size in sizes:
        of_size = [prediction for prediction in grown if prediction.num_nodes == size]
        listed += [fastest(of_size)] if of_size else []
    best = fastest(listed)
    if arguments.json:
        predictions = [{**vars(p), "speedup": p.tokens_per_ms * plain_ms} for p in listed]
        print(json.dumps({"best": best.name, "predictions": predictions}))
        return 0
    rows = [
        (p.name, f"{p.tokens:.2f}", f"{p.round_ms:.2f}", f"{p.tokens_per_ms * plain_ms:.2f}x")
        for p in listed
    ]
    console.print_table(
        "predicted", ("shape", "tokens per round", "ms per round", "speedup"), rows
    )
    print(f"best: {best.name}, {best.tokens_per_ms * plain_ms:.2f}x plain decoding")
    return 0


def _numbers(option: str, text: str) -> dict[int, float]:
    """`1:6.6,24:8.7`, or one number, which holds for every size."""
    try:
        if ":" not in text:
            known = {1: float(text)}
        else:
            pairs = [item.split(":") for item in text.split(",")]
            known = {int(size): float(cost) for size, cost in pairs}
    except ValueError:
        known = {}
    if not known or min(known) < 1 or not all(0 < cost < float("inf") for cost in known.values()):
        raise ValueError(f"{option} must be like 1:6.6,24:8.7, all above 0; got {text!r}")
    return known


def _acceptance(text: str) -> list[float]:
    try:
        chances = [float(item) for item in text.split(",")]
    except ValueError:
        chances = []
    if not chances or not all(0 <= chance <= 1 for chance in chances) or sum(chances) > 1 + 1e-9:
        raise ValueError(
            "--acceptance must be chances like 0.6,0.15,0.07 that add up to 1 at most; "
            f"got {text!r}"
        )
    return chances


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(item) for item in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or not 2 <= sizes[0] <= sizes[-1] <= 1024:
        raise ValueError(f"--nodes must be sizes from 2 to 1024, like 8,16,24; got {text!r}")
    return sizes
