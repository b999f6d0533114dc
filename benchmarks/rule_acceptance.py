"""Tokens a round under every acceptance rule, on equal trees.

    python benchmarks/rule_acceptance.py --output benchmarks/results/NAME.json

Every rule gets trees of one form: the root has 4 children, the 4 likeliest nodes of a level have 3
each, 6 levels deep, and nothing is pruned; beside them chains of 4 and of 6. Draws differ between
the rules, so that the likeliest nodes differ too. Acceptance is counted, time is not measured.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import transformers

from treespec import BestFirstTree, TreeSpeculator, load_demo_pair
from treespec.demo import load_prompts
from treespec.policy import Policy
from treespec.sampling import RULES

TEMPERATURES = (0.3, 0.7, 1.0)
SHAPES = {"tree of 6 levels": (6, 4, 3, 4), "chain of 4": (4, 1, 1, 1), "chain of 6": (6, 1, 1, 1)}


class EqualTrees(Policy):
    """Trees of one form whatever is drafted.

    Args:
        depth: levels.
        first: children of the root.
        later: children of every other expanded node.
        width: nodes expanded a level.
    """

    def __init__(self, depth: int, first: int, later: int, width: int) -> None:
        self.max_depth, self.first, self.later, self.width = depth, first, later, width
        self.max_nodes = 1 + first + (depth - 1) * width * later
        self.max_rows = 1 + (depth - 1) * width

    def children(self, depth):
        return self.later if depth else self.first

    def frontier(self, depth):
        return self.width, float("-inf")

    def node_budget(self):
        # drawn trees are bounded by their form, and no level is cut short
        return self.max_depth * self.max_nodes


def tokens_per_round(target, draft, rule: str, shape: tuple, prompts: list, options: dict) -> list:
    """(new tokens, rounds) of every prompt."""
    spec = TreeSpeculator(target, draft, BestFirstTree(64, shape[0], 4), sampling=rule)
    spec._policy = spec._engine.policy = EqualTrees(*shape)
    counts = []
    for seed, ids in enumerate(prompts):
        spec.generate(ids, do_sample=True, top_k=0, seed=seed, **options)
        counts.append((spec.stats.new_tokens, spec.stats.rounds))
    return counts


def interval(ours: list, theirs: list | None = None, draws: int = 2000) -> dict:
    """Tokens a round, or its ratio to another rule's, with a 95 % bootstrap interval over
    prompts."""

    def mean(counts: list, chosen: list[int]) -> float:
        return sum(counts[k][0] for k in chosen) / sum(counts[k][1] for k in chosen)

    def value(chosen: list[int]) -> float:
        return mean(ours, chosen) / (mean(theirs, chosen) if theirs else 1.0)

    generator = random.Random(0)
    everything = list(range(len(ours)))
    values = sorted(value(generator.choices(everything, k=len(ours))) for _ in range(draws))
    low, high = values[int(0.025 * draws)], values[int(0.975 * draws)]
    return {"value": value(everything), "low": low, "high": high}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--stride", type=int, default=3, help="take every n-th prompt")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    target, draft, tokenizer = load_demo_pair()
    prompts = [
        tokenizer(prompt["prompt"], return_tensors="pt").input_ids[:, -256:]
        for prompt in load_prompts("dev")[:: args.stride]
    ]
    rows = []
    for name, shape in SHAPES.items():
        for temperature in TEMPERATURES:
            options = {
                "temperature": temperature,
                "max_new_tokens": args.new_tokens,
                "eos_token_id": None,
            }
            counts = {
                rule: tokens_per_round(target, draft, rule, shape, prompts, options)
                for rule in RULES
            }
            for rule in RULES:
                rows.append(
                    {
                        "shape": name,
                        "temperature": temperature,
                        "rule": rule,
                        "tokens_per_round": interval(counts[rule]),
                        "over_without_replacement": interval(
                            counts[rule], counts["without_replacement"]
                        ),
                    }
                )
                both = [rows[-1]["tokens_per_round"], rows[-1]["over_without_replacement"]]
                figures = "  ".join(
                    f"{x['value']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" for x in both
                )
                print(f"{name:18s} T={temperature}  {rule:20s} {figures}", flush=True)
    if args.output:
        record = {
            "pair": "demo, float32",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "prompts": len(prompts),
            "new_tokens": args.new_tokens,
            "rows": rows,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {args.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
