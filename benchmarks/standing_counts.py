"""In how many categories `auto` keeps up with its rivals, and in which it does not.

    python benchmarks/standing_counts.py benchmarks/results/*-never-slower-*.json

Counts over the files of `treespec bench suite` the cells of temperature, batch and category, for
each rival that the tables "Standing of auto" name, and lists the cells below `--least`, with what a
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
        below = sorted((one for one in ratios if one[0] < args.least), key=lambda one: one[:2])
        kept = f"{len(ratios) - len(below)} of {len(ratios)}"
        print(f"over {rival}: {kept} at {args.least:g} or more")
        for ratio, where, record, cell in below:
            print(f"  {ratio:.3f}  {where}; {beyond_plain(record, cell)}")
    known = [ratio for ratio in controls if ratio is not None]
    if known:
        kept = f"{sum(ratio >= args.least for ratio in known)} of {len(known)}"
        print(f"plain decoding again, over the first: {kept} at {args.least:g} or more")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
