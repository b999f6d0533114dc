"""How far two rows are apart that did the same work: the noise floor of a comparison.

    python benchmarks/same_work.py benchmarks/results/*-never-slower-*.json

Takes the texts of `treespec bench suite` that `auto` wrote without the draft and in nearly as many
rounds as plain decoding did, side by side with it, and holds the milliseconds of their
verifications against each other: nearly all of them are the same forward.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

_AUTO, _PLAIN = "treespec auto (merged)", "treespec plain"
# Rounds of auto as a share of plain decoding's.
_LEAST_ROUNDS = 0.97


def ratios(record: dict) -> list[float]:
    """Milliseconds of a round's verification, auto's over plain decoding's, of every such text."""
    stats: dict[str, dict[str, dict]] = {}
    for sample in record["samples"]:
        stats.setdefault(sample["task"], {})[sample["method"]] = sample["stats"]
    found = []
    for by_method in stats.values():
        auto, plain = by_method.get(_AUTO), by_method.get(_PLAIN)
        if auto is None or plain is None or auto["draft_forwards"]:
            continue
        if auto["rounds"] >= _LEAST_ROUNDS * plain["rounds"]:
            usual = plain["verify_ms"] / plain["rounds"]
            found.append(auto["verify_ms"] / auto["rounds"] / usual)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="results of `treespec bench suite`")
    found: list[float] = []
    for path in parser.parse_args().files:
        found += ratios(json.loads(path.read_text(encoding="utf-8")))
    if not found:
        print("no text was written by plain decoding in both rows")
        return 1
    low, middle, high = np.percentile(found, (10, 50, 90))
    print(f"{len(found)} texts: median {middle:.3f}, one in ten below {low:.3f}, above {high:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
