"""Is text on this GPU the target's own? The bundled pair in float32, by both attention paths, and
captured as CUDA graphs.

    python benchmarks/lossless_on_gpu.py
    python benchmarks/lossless_on_gpu.py --ways graphs

A line for every way and shape: greedy texts identical to `target.generate`, sampled
texts identical to plain decoding of the same seed, a ragged batch, and `self_check`, which holds
the logits of random trees against those of sequences. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import time

import torch

from treespec import BestFirstTree, Chain, TreeSpeculator
from treespec.bench.methods import Task
from treespec.bench.models import load_pair
from treespec.bench.prompts import suite_tasks

_SETTINGS = {
    "target": "demo",
    "draft": "demo",
    "sized": None,
    "dtype": "float32",
    "draft_weights": "trained",
}
_NEW_TOKENS = 48
_WAYS = {
    "torch": {"attention": "torch", "cuda_graphs": False},
    "triton": {"attention": "triton", "cuda_graphs": False},
    "graphs": {"attention": "triton", "cuda_graphs": True},
}


def options(task: Task, **more) -> dict:
    found = {"attention_mask": task.attention_mask, "max_new_tokens": _NEW_TOKENS}
    return found | {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | more


class Truth:
    """What must be written: greedy by the target alone, sampled by plain decoding, no graphs."""

    def __init__(self, pair) -> None:
        self.tasks = suite_tasks(pair, "dev", 1, _NEW_TOKENS, 0.0, 1)[:4]
        self.several = suite_tasks(pair, "dev", 1, _NEW_TOKENS, 0.0, 4)[0]
        self.greedy = [self._greedy(pair.target, task) for task in self.tasks]
        self.batch = self._greedy(pair.target, self.several)
        plain = TreeSpeculator(pair.target, None, attention="torch", cuda_graphs=False)
        self.sampled = [plain.generate(task.input_ids, **self.drawn(task)) for task in self.tasks]

    @staticmethod
    def _greedy(target, task: Task) -> torch.Tensor:
        return target.generate(task.input_ids, **options(task))

    @staticmethod
    def drawn(task: Task) -> dict:
        return options(task, do_sample=True, temperature=1.0, top_k=0, seed=7)


def check(pair, truth: Truth, name: str, draft, tree, way: str) -> tuple[bool, str]:
    """Whether all texts were identical, and a line that says so."""
    spec = TreeSpeculator(pair.target, draft, tree, **_WAYS[way])
    tasks, several = truth.tasks, truth.several
    greedy = sampled = 0
    for task, text, drawn in zip(tasks, truth.greedy, truth.sampled):
        greedy += torch.equal(spec.generate(task.input_ids, **options(task)), text)
        sampled += torch.equal(spec.generate(task.input_ids, **truth.drawn(task)), drawn)
    batch = torch.equal(spec.generate(several.input_ids, **options(several)), truth.batch)
    passed = spec.self_check(tasks[-1].input_ids).passed if draft is not None else True
    line = (
        f"{way} {name}: greedy {greedy}/{len(tasks)}, sampled {sampled}/{len(tasks)}, "
        f"batch {batch}, self_check {passed}"
    )
    return greedy == sampled == len(tasks) and batch and passed, line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ways", nargs="+", choices=_WAYS, help="default: all, torch on a CPU")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    pair = load_pair(_SETTINGS, device)
    on_gpu = device.type == "cuda"
    print(torch.cuda.get_device_name() if on_gpu else device, torch.__version__)
    shapes = {
        "plain": (None, "auto"),
        "auto": (pair.draft, "auto"),
        "best-first 12/4/3": (pair.draft, BestFirstTree(12, 4, 3)),
        "lookup 24/10/8": ("ngram", BestFirstTree(24, 10, 8)),
        "linear K=4": (pair.draft, Chain(4)),
    }
    same, truth = True, Truth(pair)
    for way in arguments.ways or (_WAYS if on_gpu else ("torch",)):
        for name, (draft, tree) in shapes.items():
            started = time.perf_counter()
            passed, line = check(pair, truth, name, draft, tree, way)
            print(f"{line} ({time.perf_counter() - started:.0f} s)", flush=True)
            same &= passed
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
