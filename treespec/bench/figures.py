"""From samples to rows: rates, paired ratios with their intervals, and where the time goes. Pure
Python: a record read from JSON is all it needs."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

BASE = "transformers plain"
PARTS = ("draft", "verify", "commit")


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def rate(samples: list[dict]) -> float:
    """All tokens over all seconds."""
    tokens = sum(sample["new_tokens"] for sample in samples)
    return tokens / sum(sample["seconds"] for sample in samples)


class Ratio(NamedTuple):
    """The speed of one row over that of another on the same tasks, and the 2.5 % and 97.5 % points
    that other such tasks would lie between, which one task alone does not tell."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, digits: int = 2) -> str:
        """The ratio with its interval, if it has one."""
        interval = "" if self.low is None else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.value:.{digits}f}×{interval}"

    def lies_below(self, least: float) -> bool:
        """Whether the whole interval does; never for one task."""
        return self.high is not None and self.high < least


def paired_ratio(ours: list[dict], base: list[dict], draws: int = 2000) -> Ratio:
    """Tokens per second of one method over those of another on the same tasks.

    Args:
        ours, base: samples, task by task in the same order.
        draws: bootstrap draws, of tasks with both their samples, seeded.
    """

    def ratio(places: list[int]) -> float:
        return rate([ours[k] for k in places]) / rate([base[k] for k in places])

    count = len(ours)
    if count == 1:
        return Ratio(ratio([0]))
    generator = random.Random(0)
    drawn = [ratio(generator.choices(range(count), k=count)) for _ in range(draws)]
    return Ratio(ratio([*range(count)]), percentile(drawn, 0.025), percentile(drawn, 0.975))


def ranks(values: list[float]) -> list[float]:
    """Places from 1 for the largest; equal values share the mean of theirs."""
    return [
        1 + sum(other > value for other in values) + (values.count(value) - 1) / 2
        for value in values
    ]


def rank_correlation(first: list[float], second: list[float]) -> float | None:
    """Spearman's: 1 where both put everything in the same order; None for fewer than two values, or
    where all of one are equal."""
    try:
        return statistics.correlation(ranks(first), ranks(second))
    except statistics.StatisticsError:
        return None


def is_clearly_faster(ours: list[dict], theirs: list[dict]) -> bool:
    """Whether the 95 % interval of the ratio of two rows lies above 1; not for one task."""
    low = paired_ratio(ours, theirs)[1]
    return low is not None and low > 1.0


def row(method: dict[str, Any], samples: list[dict], base: list[dict]) -> dict[str, Any]:
    """One row: a method's samples beside those of plain generation on the same tasks.

    Args:
        method: `name`, `ours`, `family`, `sources` and `shape` as the record holds them.
        samples, base: task by task in the same order.
    """
    tokens = sum(sample["new_tokens"] for sample in samples)
    rates = [sample["new_tokens"] / sample["seconds"] for sample in samples]
    ratio, low, high = paired_ratio(samples, base)
    known = [sample["identical"] for sample in samples if sample["identical"] is not None]
    gaps = [sample["logit_gap"] for sample in samples if sample.get("logit_gap") is not None]
    figures = {
        **method,
        "samples": len(samples),
        "tokens_per_second": rate(samples),
        "median_tokens_per_second": statistics.median(rates),
        "p20_tokens_per_second": percentile(rates, 0.2),
        "p80_tokens_per_second": percentile(rates, 0.8),
        "speedup": ratio,
        "speedup_low": low,
        "speedup_high": high,
        "tokens_per_round": None,
        "efficiency": None,
        "acceptance_rate": None,
        "round_ms": None,
        "identical": sum(known) if known else None,
        "compared": len(known),
        "largest_logit_gap": max(gaps, default=None),
    }
    rounds = [sample["row_rounds"] for sample in samples]
    if None not in rounds and sum(rounds):
        figures["tokens_per_round"] = tokens / sum(rounds)
        figures["efficiency"] = ratio / figures["tokens_per_round"]
    stats = [sample["stats"] for sample in samples if sample["stats"]]
    if stats:
        drafted = sum(share["drafted_nodes"] for share in stats)
        accepted = sum(share["accepted"] for share in stats)
        forwards = sum(share["rounds"] for share in stats)
        figures["acceptance_rate"] = accepted / drafted if drafted else None
        figures["round_ms"] = {
            part: sum(share[f"{part}_ms"] for share in stats) / forwards for part in PARTS
        }
    return figures


def whole_turns(record: dict[str, Any], **cell: Any) -> dict[str, list[dict]]:
    """Every method's samples over the tasks of a cell, task by task in the same order.

    A turn that was cut short counts for none: every method stands on the same tasks.

    Args:
        record: of a run.
        **cell: what a task must have, as `temperature=0.7, batch=4, category="code"`; nothing for
            all tasks.
    """
    tasks = {
        task["id"] for task in record["tasks"] if all(task[key] == cell[key] for key in cell)
    }
    by_method: dict[str, dict[str, dict]] = {}
    for sample in record["samples"]:
        if sample["task"] in tasks:
            by_method.setdefault(sample["method"], {})[sample["task"]] = sample
    if BASE not in by_method:
        return {}
    whole = [task for task in by_method[BASE] if all(task in mine for mine in by_method.values())]
    return {name: [mine[task] for task in whole] for name, mine in by_method.items() if whole}


def rows(record: dict[str, Any], **cell: Any) -> list[dict[str, Any]]:
    """Every method's row over the tasks of a cell, in the record's order.

    Args:
        record: of a run.
        **cell: as of `whole_turns`.
    """
    samples = whole_turns(record, **cell)
    return [
        row(method, samples[method["name"]], samples[BASE])
        for method in record["methods"]
        if method["name"] in samples
    ]


def on_shared_tasks(
    record: dict[str, Any], other: dict[str, Any], **cell: Any
) -> list[dict[str, Any]]:
    """Two records with no samples but those of a cell's tasks whose turns both finished."""
    both = (record, other)
    first, second = (
        {sample["task"] for sample in whole_turns(each, **cell).get(BASE, [])} for each in both
    )
    return [
        {**each, "samples": [one for one in each["samples"] if one["task"] in first & second]}
        for each in both
    ]


def order_changes(
    record: dict[str, Any], other: dict[str, Any], **cell: Any
) -> dict[tuple[str, str], bool]:
    """Pairs of the rows that two records share, the faster one in the first record being the slower
    one in the other: with whether both records tell them clearly apart, and so contradict each
    other."""
    first, second = whole_turns(record, **cell), whole_turns(other, **cell)
    changes = {}
    for one, another in itertools.combinations([name for name in first if name in second], 2):
        if rate(first[one]) < rate(first[another]):
            one, another = another, one
        if rate(second[one]) < rate(second[another]):
            apart = is_clearly_faster(first[one], first[another])
            changes[one, another] = apart and is_clearly_faster(second[another], second[one])
    return changes


def cells(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The (temperature, batch) cells of a record that hold samples, in order."""
    found: list[dict[str, Any]] = []
    with_samples = {sample["task"] for sample in record["samples"]}
    for task in record["tasks"]:
        cell = {"temperature": task["temperature"], "batch": task["batch"]}
        if task["id"] in with_samples and cell not in found:
            found.append(cell)
    return found


def categories(record: dict[str, Any]) -> list[str]:
    """The categories of the tasks, in order."""
    return list(dict.fromkeys(task["category"] for task in record["tasks"]))


# What `auto` is held against, and whether a row counts.
RIVALS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "plain decoding in this engine": lambda row: row["family"] == "engine",
    "the fastest shape picked by hand": lambda row: row["ours"]
    and row["family"] not in ("engine", "control", "auto"),
    "the fastest other library": lambda row: not row["ours"] and row["name"] != BASE,
}


def _of_rows(
    record: dict[str, Any], samples: dict[str, list[dict]], counts: Callable[[dict[str, Any]], bool]
) -> list[list[dict]]:
    """The samples of every row that counts."""
    names = [row["name"] for row in record["methods"] if counts(row)]
    return [samples[name] for name in names if name in samples]


def _fastest(
    record: dict[str, Any], samples: dict[str, list[dict]], counts: Callable[[dict[str, Any]], bool]
) -> list[dict] | None:
    """The samples of the fastest row that counts; None where there is none."""
    return max(_of_rows(record, samples, counts), key=rate, default=None)


def _is_auto(row: dict[str, Any]) -> bool:
    return row["family"] == "auto"


def standing(record: dict[str, Any], **cell: Any) -> dict[str, Ratio]:
    """The speed of `auto` over that of each of `RIVALS` that has rows in a cell; empty without
    `auto`. The fastest is picked by the very samples it is then judged by."""
    samples = whole_turns(record, **cell)
    auto = _fastest(record, samples, _is_auto)
    rivals = {title: _fastest(record, samples, counts) for title, counts in RIVALS.items()}
    return {title: paired_ratio(auto, of) for title, of in rivals.items() if auto and of}


def control(record: dict[str, Any], **cell: Any) -> Ratio | None:
    """The speed of a second row of plain decoding over that of the first: how far two rows that do
    the same are apart. None without `--control`."""
    samples = whole_turns(record, **cell)
    again = _fastest(record, samples, lambda row: row["family"] == "control")
    alone = _fastest(record, samples, lambda row: row["family"] == "engine")
    return paired_ratio(again, alone) if again and alone else None


def standing_over_both(record: dict[str, Any], **cell: Any) -> Ratio | None:
    """The speed of `auto` over that of both rows of plain decoding together, which are one method
    measured twice. None without `--control`."""
    samples = whole_turns(record, **cell)
    auto = _fastest(record, samples, _is_auto)
    plain = _of_rows(record, samples, lambda row: row["family"] in ("engine", "control"))
    if auto is None or len(plain) < 2:
        return None
    both = [
        {key: sum(one[key] for one in task) for key in ("new_tokens", "seconds")}
        for task in zip(*plain)
    ]
    return paired_ratio(auto, both)


def standing_on_same_texts(record: dict[str, Any], **cell: Any) -> dict[str, Ratio]:
    """`standing`, every rival on the texts that it and `auto` wrote alike. In 16 bits rounding
    decides ties, and a text that goes on otherwise may repeat itself more or less; empty for a
    record that does not tell texts apart."""
    samples = whole_turns(record, **cell)
    auto = next((row["name"] for row in record["methods"] if _is_auto(row)), "")
    found: dict[str, list[Ratio]] = {}
    for method in record["methods"]:
        pairs = zip(samples.get(auto, ()), samples.get(method["name"], ()))
        same = [(a, b) for a, b in pairs if "text" in a and a["text"] == b.get("text")]
        for title in (title for title, counts in RIVALS.items() if same and counts(method)):
            ours, theirs = zip(*same)
            found.setdefault(title, []).append(paired_ratio([*ours], [*theirs]))
    return {title: min(ratios, key=lambda ratio: ratio.value) for title, ratios in found.items()}


def all_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows a finished record keeps: one per method and cell, and for more than one category one
    per category too."""
    names = categories(record)
    found = []
    for cell in cells(record):
        for category in [None, *(names if len(names) > 1 else [])]:
            place = {**cell, "category": category} if category else cell
            found += [{**place, "category": category, **one} for one in rows(record, **place)]
    return found
