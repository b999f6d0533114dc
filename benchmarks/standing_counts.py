"""In how many categories `auto` keeps up with its rivals, and in which it does not.

    python benchmarks/standing_counts.py benchmarks/results/*-never-slower-*.json

Counts over the files of `treespec bench suite` the cells of temperature, batch and category, for
each rival that the tables "Standing of auto" name, and those that lie below `--least` with their
whole 95 % interval; of one or two texts that says little. It lists the cells below, with what a
round's parts took there in milliseconds beyond plain decoding's in this engine. With `--same-text`
each rival is held against `auto` only on the texts that both wrote alike. Of runs with `--control`
it counts where a second row of plain decoding kept up with the first, too, and where `auto` did
with both together, which says more of it than either.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treespec.bench import figures

BOTH = "over both rows of plain decoding"
AGAIN = "plain decoding again, over the first"
# A ratio, its file, the record, and the cell.
Cell = tuple[figures.Ratio, str, dict[str, Any], dict[str, Any]]


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


def report(title: str, found: list[Cell], least: float) -> None:
    """Prints how many cells keep up, how many do not with their whole interval, and those below."""
    below = sorted((one for one in found if one[0].value < least), key=lambda one: one[0].value)
    wholly = sum(ratio.lies_below(least) for ratio, *_ in below)
    kept = f"{len(found) - len(below)} of {len(found)}"
    print(f"{title}: {kept} at {least:g} or more, {wholly} wholly below")
    for ratio, name, record, cell in below if title != AGAIN else ():
        place = f"T = {cell['temperature']:g}, batch {cell['batch']}, {cell['category']}"
        print(f"  {ratio.text(3)}  {name}, {place}; {beyond_plain(record, cell)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="results of `treespec bench suite`")
    parser.add_argument("--least", type=float, default=0.97, help="what counts as keeping up")
    parser.add_argument("--same-text", action="store_true", help="only texts that both wrote alike")
    args = parser.parse_args()
    standing = figures.standing_on_same_texts if args.same_text else figures.standing
    found: dict[str, list[Cell]] = {}
    for path in args.files:
        record = json.loads(path.read_text(encoding="utf-8"))
        for cell in cells(record):
            ratios = {f"over {rival}": ratio for rival, ratio in standing(record, **cell).items()}
            ratios[BOTH] = figures.standing_over_both(record, **cell)
            ratios[AGAIN] = figures.control(record, **cell)
            for title, ratio in ratios.items():
                if ratio is not None:
                    found.setdefault(title, []).append((ratio, path.stem, record, cell))
    for title in (*(f"over {rival}" for rival in figures.RIVALS), BOTH, AGAIN):
        if title in found:
            report(title, found[title], args.least)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
