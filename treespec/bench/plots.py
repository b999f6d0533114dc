"""Pictures of a record, drawn by matplotlib from the JSON alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from treespec.bench import figures
from treespec.bench.tables import machine

_SOURCES = ("draft", "lookup", "merged")


class PlotError(ValueError):
    """matplotlib is missing, or the record has nothing to draw."""


def _new_figure(width: float, height: float):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError("plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(record: dict[str, Any], text: str) -> str:
    label = ", simulated acceptance" if record["models"]["simulated"] else ""
    return f"{text}{label}\n{record['models']['dtype']}, {machine(record)}"


def _levels(row: dict[str, Any]) -> int:
    shape = row["shape"]
    return shape["length"] if shape["kind"] == "Chain" else shape["depth"]


def _reach(row: dict[str, Any]) -> tuple[float, float]:
    """How far the interval reaches below and above the ratio."""
    if row["speedup_low"] is None:
        return 0.0, 0.0
    low, high = row["speedup"] - row["speedup_low"], row["speedup_high"] - row["speedup"]
    return max(low, 0.0), max(high, 0.0)


def speed_by_depth(record: dict[str, Any], rows: list[dict[str, Any]]):
    """Speedup against drafted levels: chains and pruned trees, by sources, with intervals."""
    figure = _new_figure(7, 4.5)
    axes = figure.add_subplot()
    for color, sources in enumerate(_SOURCES):
        for family, style in (("linear", "o--"), ("pruned", "s-"), ("unpruned", "^")):
            line = [r for r in rows if r["family"] == family and r["sources"] == sources]
            if not line:
                continue
            line.sort(key=_levels)
            ratios = [row["speedup"] for row in line]
            reach = [_reach(row) for row in line]
            label = {"linear": "linear", "pruned": "tree"}.get(family, "tree unpruned")
            axes.errorbar(
                [_levels(row) for row in line],
                ratios,
                yerr=[[low for low, _ in reach], [high for _, high in reach]],
                fmt=style,
                color=f"C{color}",
                capsize=2,
                label=f"{label}, {sources}",
            )
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_xlabel("drafted levels")
    axes.set_ylabel("speedup over plain generate")
    axes.set_title(_title(record, "Speed by depth"), fontsize=9)
    axes.legend(fontsize=7, ncols=3)
    return figure


def _bars(record: dict[str, Any], rows: list[dict[str, Any]], title: str, label: str):
    figure = _new_figure(8, 1.2 + 0.22 * len(rows))
    axes = figure.add_subplot()
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(_title(record, title), fontsize=9)
    return figure, axes


def tokens_per_round(record: dict[str, Any], rows: list[dict[str, Any]]):
    """New tokens of a target forward, row by row."""
    known = [row for row in rows if row["tokens_per_round"] is not None]
    figure, axes = _bars(record, known, "Tokens per round", "new tokens per target forward")
    axes.barh(range(len(known)), [row["tokens_per_round"] for row in known])
    return figure


def round_times(record: dict[str, Any], rows: list[dict[str, Any]]):
    """Milliseconds of a round by part, row by row."""
    known = [row for row in rows if row["round_ms"]]
    figure, axes = _bars(record, known, "Where a round's time goes", "milliseconds a round")
    left = [0.0] * len(known)
    for part in figures.PARTS:
        values = [row["round_ms"][part] for row in known]
        axes.barh(range(len(known)), values, left=left, label=part)
        left = [start + value for start, value in zip(left, values)]
    axes.legend(fontsize=7)
    return figure


PLOTS: dict[str, Callable] = {
    "speed-by-depth": speed_by_depth,
    "tokens-per-round": tokens_per_round,
    "round-times": round_times,
}


def draw(record: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Writes every plot of a finished record as PNG; a suite's are of its first cell, and have no
    depths to compare.

    Raises:
        PlotError: without matplotlib.
    """
    cell = figures.cells(record)[0] if record["kind"] == "suite" else {}
    rows = figures.rows(record, **cell)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, plot in PLOTS.items():
        if name == "speed-by-depth" and record["kind"] == "suite":
            continue
        path = folder / f"{stem}-{name}.png"
        plot(record, rows).savefig(path, dpi=150)
        paths.append(path)
    return paths
