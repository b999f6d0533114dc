"""Peak memory of a generation, treespec's beside `target.generate`'s, each in a process of its own.

python benchmarks/peak_memory.py --output benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

METHODS = ("loaded only", "transformers plain", "treespec plain", "treespec auto")


def run(method: str, dtype: str, new_tokens: int) -> None:
    """Generates in this process and prints its peak resident set in MiB."""
    from treespec import TreeSpeculator, load_demo_pair
    from treespec.demo import load_prompts

    target, draft, tokenizer = load_demo_pair(dtype=dtype)
    ids = tokenizer(load_prompts("dev")[0]["prompt"], return_tensors="pt").input_ids
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    if method == "transformers plain":
        target.generate(ids, **options)
    elif method == "treespec plain":
        TreeSpeculator(target, None).generate(ids, **options)
    elif method == "treespec auto":
        TreeSpeculator(target, draft).generate(ids, **options)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=500)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        run(args.method, args.dtype, args.new_tokens)
        return 0
    rows = {}
    for method in METHODS:
        command = [sys.executable, __file__, "--dtype", args.dtype, "--method", method]
        command += ["--new-tokens", str(args.new_tokens)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows[method] = float(printed.split()[-1])
        print(f"{method:20s} {rows[method]:7.0f} MiB")
    if args.output:
        record = {"dtype": args.dtype, "new_tokens": args.new_tokens, "peak_rss_mib": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
