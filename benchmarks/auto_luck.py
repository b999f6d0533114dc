"""How steadily `auto` decides: the bundled pair in a clock of given costs, process by process.

    python benchmarks/auto_luck.py --level-ms 1.6 --luck 0 0.5

Texts, acceptance and decisions are real. Times are *simulated*: every part of a round advances a
clock by what it is given to cost, times noise. A process is a speculator that has seen nothing; it
writes some development prompts of every short category, each with a seed of its own, and its speed
is over plain decoding in that clock. So two processes differ by luck alone: that of their seeds, of
the order of their texts and of the noise.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch

import treespec.engine
import treespec.laps
from treespec import TreeSpeculator, running_acceptance
from treespec.bench.clock import VirtualClock
from treespec.bench.models import Pair, load_pair
from treespec.bench.prompts import suite_tasks
from treespec.bench.results import environment
from treespec.tree import Growth

# What costs the draft most to begin with, and where the bundled one is of no use.
_LONG_PROMPTS = ("rag", "summarization")
_PREFILL_MS, _MISS_MS, _HIT_MS = 30.0, 0.1, 0.3
# Between the forwards of a round, by whether there is a tree.
_SINGLE_MS, _TREE_MS = 0.2, 0.4


def charged_auto(pair: Pair, clock: VirtualClock, args: argparse.Namespace) -> TreeSpeculator:
    """A speculator that has seen nothing, whose rounds advance the clock."""
    spec = TreeSpeculator(pair.target, pair.draft, capture=False)

    def verify_ms(num_nodes: int) -> float:
        wider = args.wide_ms + args.node_ms * (num_nodes - 1)
        return args.plain_ms + (wider if num_nodes > 1 else 0.0)

    def commit_ms(num_nodes: int) -> float:
        return _SINGLE_MS if num_nodes == 1 else _TREE_MS

    clock.charge_rounds(spec, verify_ms, commit_ms, args.level_ms, _PREFILL_MS, _MISS_MS)
    return spec


def speed(pair: Pair, clock: VirtualClock, process: int, args: argparse.Namespace) -> float:
    """Of one process, over plain decoding."""
    tasks = suite_tasks(pair, "dev", args.samples, args.new_tokens, args.temperature, 1)
    tasks = [task for task in tasks if task.category not in _LONG_PROMPTS]
    sampled = {"do_sample": True, "temperature": args.temperature}
    options = sampled if args.temperature else {"do_sample": False}
    spec, begun = charged_auto(pair, clock, args), clock.ms
    for k, task in enumerate(random.Random(process).sample(tasks, len(tasks))):
        seed = len(tasks) * process + k
        spec.generate(
            task.input_ids, max_new_tokens=args.new_tokens, eos_token_id=None, seed=seed, **options
        )
    # the mean of the noise
    plain_ms = _PREFILL_MS + args.new_tokens * (args.plain_ms + _SINGLE_MS)
    plain_ms *= math.exp(args.noise**2 / 2)
    return len(tasks) * plain_ms / (clock.ms - begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft-weights", default="trained")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--plain-ms", type=float, default=4.2, help="verifying one node")
    parser.add_argument("--wide-ms", type=float, default=1.0, help="verifying more, further")
    parser.add_argument("--node-ms", type=float, default=0.06, help="every further node, further")
    parser.add_argument("--level-ms", type=float, default=1.6, help="a level of the draft")
    parser.add_argument("--noise", type=float, default=0.15, help="of the logarithm of a time")
    parser.add_argument("--luck", type=float, nargs="+", default=[running_acceptance._LUCK])
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--samples", type=int, default=3, help="texts of every category")
    parser.add_argument("--new-tokens", type=int, default=120)
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    demo = {"target": "demo", "draft": "demo", "sized": None}
    pair = load_pair(demo | settings, torch.device("cpu"))
    clock = VirtualClock(args.noise)
    treespec.engine.time = treespec.laps.time = clock
    clock.charge(Growth, "add_lookups", lambda *_: _HIT_MS)
    speeds: dict[str, list[float]] = {}
    for luck in args.luck:
        running_acceptance._LUCK = luck
        found = [speed(pair, clock, process, args) for process in range(args.processes)]
        speeds[f"{luck:g}"] = found
        listed = " ".join(f"{value:.3f}" for value in found)
        print(f"luck {luck:g}: mean {sum(found) / len(found):.3f} (simulated times) {listed}")
    if args.output:
        report = {"environment": environment(), "settings": settings, "simulated_speed": speeds}
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
