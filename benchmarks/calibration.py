"""How sure a draft should be that a token is the target's pick: loss by factor on its logits.

    python benchmarks/calibration.py --output benchmarks/results/NAME.json

The table of docs/design/003-auto.md: greedy text, and text at T = 1.0 with noise known to both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from treespec.kernels import ops

from treespec import load_demo_pair
from treespec.demo import load_prompts

FACTORS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


@torch.no_grad()
def collect(sampled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The draft's scores at every new position, and the target's picks there."""
    target, draft, tokenizer = load_demo_pair()
    scores, picks = [], []
    options = {"max_new_tokens": 100, "do_sample": sampled}
    options |= {"temperature": 1.0, "top_k": 0} if sampled else {}
    torch.manual_seed(0)
    for row, prompt in enumerate(load_prompts("dev")[::10]):
        ids = tokenizer(prompt["prompt"], return_tensors="pt").input_ids[:, -200:]
        text = target.generate(ids, **options)
        new = slice(ids.shape[1] - 1, text.shape[1] - 1)
        ours, theirs = draft(text).logits[0, new], target(text).logits[0, new]
        if sampled:
            positions = torch.arange(new.start + 1, new.stop + 1)[None]
            noise = ops.gumbel_noise(0, torch.tensor([row]), positions, ours.shape[-1])[0]
            ours, theirs = ours + noise, theirs + noise
        scores.append(ours)
        picks.append(theirs.argmax(-1))
    return torch.cat(scores), torch.cat(picks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for mode, sampled in (("greedy", False), ("T=1.0 coupled", True)):
        scores, picks = collect(sampled)
        right = (scores.argmax(-1) == picks).float().mean()
        in_four = (scores.topk(4).indices == picks[:, None]).any(-1).float().mean()
        for factor in FACTORS:
            logprobs = (scores * factor).log_softmax(-1)
            row = {
                "mode": mode,
                "positions": len(picks),
                "factor": factor,
                "loss": float(-logprobs.gather(1, picks[:, None]).mean()),
                "top1_said": float(logprobs.amax(-1).exp().mean()),
                "top1_true": float(right),
                "top4_true": float(in_four),
            }
            rows.append(row)
            print(row)
    if args.output:
        args.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
