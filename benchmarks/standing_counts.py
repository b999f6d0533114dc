"""In how many categories `auto` keeps up with its rivals, and in which it does not.

    python benchmarks/standing_counts.py benchmarks/results/*-never-slower-*.json

Counts over the files of `treespec bench suite` the cells of temperature, batch and category, for
each rival that the tables "Standing of auto" name, and those that lie below `--least` with their
whole 95 % interval; of one or two texts that says little. It lists the cells below, with what a
round's parts took there in milliseconds beyond plain decoding's in this engine. With `--same-text`
each rival is held against `auto` only on the texts that both wrote alike. Of runs with `--control`
it counts where a second row of plain decoding kept up with the first, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treespec.bench import figures


def cells(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every cell of temperature, batch and category."""
    for cell in figures.cells(record):
        for name in figures.categories(record):
            yield {**cell, "category": name}


def beyond_plain(record: dict[str, Any], cell: dict[str, Any]) -> str:
    """What a round of `auto` took beyond one of plain decoding, by part, in words."""
    by_family = {row["family"]: row for row in figures.rows(record, **cell)}
    auto, plain = by_family.get("auto"), by_family.get("engine")
    if auto is None or plain is None:
        return ""
    ours, theirs = auto["round_ms"], plain["round_ms"]
    more = [f"{part} {ours[part] - theirs[part]:+.2f}" for part in figures.PARTS]
    return f"{auto['tokens_per_round']:.2f} tokens a round, ms {', '.join(more)}"


def counted(ratios: list[figures.Ratio], least: float) -> str:
    """How many keep up, and how many do not with their whole interval."""
    kept = sum(ratio.value >= least for ratio in ratios)
    below = sum(ratio.lies_below(least) for ratio in ratios)
    return f"{kept} of {len(ratios)} at {least:g} or more, {below} wholly below"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="results of `treespec bench suite`")
    parser.add_argument("--least", type=float, default=0.97, help="what counts as keeping up")
    parser.add_argument("--same-text", action="store_true", help="only texts that both wrote alike")
    args = parser.parse_args()
    standing = figures.standing_on_same_texts if args.same_text else figures.standing
    standings, controls = [], []
    for path in args.files:
        record = json.loads(path.read_text(encoding="utf-8"))
        for cell in cells(record):
            place = f"T = {cell['temperature']:g}, batch {cell['batch']}, {cell['category']}"
            where = f"{path.stem}, {place}"
            standings.append((where, standing(record, **cell), record, cell))
            controls.append(figures.control(record, **cell))
    for rival in figures.RIVALS:
        ratios = [(of[rival], where, *about) for where, of, *about in standings if rival in of]
        if not ratios:
            continue
        print(f"over {rival}: {counted([ratio for ratio, *_ in ratios], args.least)}")
        below = [one for one in ratios if one[0].value < args.least]
        for ratio, where, record, cell in sorted(below, key=lambda one: (one[0].value, one[1])):
            print(f"  {ratio.text(3)}  {where}; {beyond_plain(record, cell)}")
    known = [ratio for ratio in controls if ratio is not None]
    if known:
        print(f"plain decoding again, over the first: {counted(known, args.least)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
