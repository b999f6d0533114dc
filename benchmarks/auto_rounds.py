"""Where `auto` wins and loses: its rounds by what they drafted, beside plain decoding.

    python benchmarks/auto_rounds.py --dtype bfloat16 --temperature 1 --samples 2

Both write the same texts side by side. A kind of round gains the time that plain decoding would
have taken for its tokens, less its own, as a share of all of auto's time. Of the draft's further
levels, the last of them with all deeper ones, and of candidates by their place among all, likeliest
first, it prints how many right tokens a round their probabilities promised and how many they had.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass

import torch

from treespec import TreeSpeculator
from treespec.beliefs import Belief
from treespec.bench.methods import Method, stepwise
from treespec.bench.models import load_pair
from treespec.bench.prompts import suite_tasks
from treespec.bench.protocol import identical, timed
from treespec.policy import Outcome
from treespec.promises import PLACES

_WARM_UPS = 2


@dataclass
class Kind:
    """Rounds of one kind, added up."""

    rounds: int = 0
    milliseconds: float = 0.0
    tokens: float = 0.0
    levels: int = 0
    nodes: int = 0

    def add(self, outcome: Outcome) -> None:
        self.rounds += 1
        self.milliseconds += outcome.total_ms
        self.tokens += outcome.new_tokens / len(outcome.paths)
        self.levels += outcome.draft_levels
        self.nodes += outcome.num_nodes


def kind_of(outcome: Outcome) -> str:
    """What a round drafted, and whether some of its forwards were not recorded yet."""
    if outcome.draft_levels:
        kind = "draft"
    elif outcome.num_nodes > 1:
        kind = "lookup"
    else:
        kind = "plain" if outcome.match_lengths is None else "looked in vain"
    unrecorded = outcome.draft_extra_ms + outcome.verify_extra_ms > 0
    return kind + (", unrecorded" if unrecorded or not outcome.settled else "")


def watch_promises(spec: TreeSpeculator) -> dict[str, list[float]]:
    """By draft level and by place among the candidates, from here on: rounds, and the tokens that
    were promised and kept in them; without levels that were cut off when the nodes to verify were
    chosen."""
    rows: dict[str, list[float]] = {}
    promises = spec._policy.promises

    def watched(name: str, belief: Belief) -> None:
        row, add = rows.setdefault(name, [0, 0.0, 0.0]), belief.add

        def added(kept: float, promised: float) -> None:
            row[:] = row[0] + 1, row[1] + promised, row[2] + kept * promised
            add(kept, promised)

        belief.add = added

    for found, beliefs in zip(("", " beside lookups"), promises.by_level):
        for level, belief in enumerate(beliefs, 2):
            watched(f"level {level}{found}", belief)
    for places, belief in zip(PLACES, promises.by_place):
        watched(f"places {places.start + 1:2} to {places.stop:2}", belief)
    return rows


def watch(spec: TreeSpeculator) -> dict[str, Kind]:
    """Adds up a speculator's rounds from here on."""
    kinds: dict[str, Kind] = defaultdict(Kind)
    observe = spec._policy.observe

    def observed(outcome: Outcome) -> None:
        kinds[kind_of(outcome)].add(outcome)
        observe(outcome)

    spec._policy.observe = observed
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft-weights", default="trained")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2, help="batches of every category")
    parser.add_argument("--new-tokens", type=int, default=160)
    args = parser.parse_args()
    settings = {"target": "demo", "draft": "demo", "sized": None} | vars(args)
    pair = load_pair(settings, torch.device("cpu"))
    specs = {
        "plain": TreeSpeculator(pair.target, None),
        "auto": TreeSpeculator(pair.target, pair.draft),
    }
    methods = [Method(name, lambda spec=spec: stepwise(spec)) for name, spec in specs.items()]
    tasks = suite_tasks(pair, "dev", args.samples, args.new_tokens, args.temperature, args.batch)
    for task in tasks[:_WARM_UPS]:
        list(timed(methods, task))
    plain, auto = (watch(specs[name]) for name in ("plain", "auto"))
    promises = watch_promises(specs["auto"])
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    same = 0
    for task in tasks:
        texts = {}
        for method, found, spent in timed(methods, task):
            texts[method.name] = found.ids
            for category in (task.category, "all"):
                seconds[category][method.name] += spent
        same += identical(texts["auto"], texts["plain"])
    if pair.exact and same < len(tasks):
        print(f"{len(tasks) - same} texts differ from plain decoding's")
        return 1
    print(f"identical to plain decoding: {same} of {len(tasks)} texts")
    for category, spent in seconds.items():
        print(f"{category:14} {spent['plain'] / spent['auto']:.3f} of plain decoding's speed")
    usual = sum(k.milliseconds for k in plain.values()) / sum(k.rounds for k in plain.values())
    total = sum(kind.milliseconds for kind in auto.values())
    print(f"{'rounds':27} count     ms tokens levels nodes    time   gain")
    for name, kind in sorted(auto.items(), key=lambda item: -item[1].milliseconds):
        n = kind.rounds
        gain = (kind.tokens * usual - kind.milliseconds) / total
        print(
            f"{name:27} {n:5} {kind.milliseconds / n:6.2f} {kind.tokens / n:6.2f} "
            f"{kind.levels / n:6.1f} {kind.nodes / n:5.1f} {kind.milliseconds / total:7.1%} "
            f"{gain:+6.1%}"
        )
    print(f"{'promises of':24} rounds promised   kept")
    for name, (count, promised, kept) in promises.items():
        if count:
            print(f"{name:24} {count:6} {promised / count:8.2f} {kept / count:6.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
