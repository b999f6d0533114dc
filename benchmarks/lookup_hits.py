"""How often looked-up tokens are right, by match length and by place in the continuation.

    python benchmarks/lookup_hits.py --output benchmarks/results/NAME.json

The shares of docs/design/003-auto.md: the latest occurrence of every match in greedy text, and in
text at T = 1.0, which has no top-k.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import torch

from treespec import TreeSpeculator, load_demo_pair
from treespec.demo import load_prompts
from treespec.sources.base import Sequences
from treespec.sources.ngram import NgramSource

_NEW_TOKENS, _PER_CATEGORY, _PLACES = 160, 4, 12


def write(sampled: bool) -> list[tuple[int, torch.Tensor]]:
    """Prompt lengths and whole texts of the development prompts."""
    target, _, tokenizer = load_demo_pair()
    target.generation_config.eos_token_id = None
    spec = TreeSpeculator(target, "ngram")
    texts, seen = [], Counter()
    for number, prompt in enumerate(load_prompts("dev")):
        seen[prompt["category"]] += 1
        if seen[prompt["category"]] > _PER_CATEGORY:
            continue
        ids = tokenizer(prompt["prompt"], return_tensors="pt").input_ids[:, -512:]
        options = {"do_sample": True, "top_k": 0, "seed": number} if sampled else {}
        text = spec.generate(ids, max_new_tokens=_NEW_TOKENS, **options)
        texts.append((ids.shape[1], text))
    return texts


def right_tokens(text: torch.Tensor, upto: int, length: int) -> tuple[int, int]:
    """The match length of the first `upto` tokens of `[1, L]`, and how many tokens of its
    continuation are right."""
    proposal = NgramSource(num_matches=1).propose(Sequences(text, [upto]), length)
    following = text[0, upto : upto + length]
    same = proposal.continuations[0, 0, : len(following)] == following
    return proposal.match_lengths[0], int(same.long().cumprod(0).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for mode, sampled in (("greedy", False), ("T=1.0", True)):
        # of continuations that were right up to a place, whether they were right there
        found: dict[tuple[int, int], list[bool]] = defaultdict(list)
        for prompt, text in write(sampled):
            for upto in range(prompt, text.shape[1] - 1):
                match, right = right_tokens(text, upto, _PLACES)
                for place in range(min(right + 1, text.shape[1] - upto, _PLACES) if match else 0):
                    found[match, place].append(place < right)
        for match in sorted({match for match, _ in found}):
            cells = [found[match, place] for place in range(_PLACES)]
            row = {
                "mode": mode,
                "match_length": match,
                "looked_up": [len(cell) for cell in cells],
                "right": [sum(cell) / len(cell) if cell else None for cell in cells],
            }
            rows.append(row)
            print(row)
    if args.output:
        args.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
