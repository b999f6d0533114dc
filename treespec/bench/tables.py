"""Tables of a record, in Markdown and LaTeX: rows with everything measured, the ablations, and the
suite by category. A row that lost is shown like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from treespec.bench import figures

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "τ": r"$\tau$",
}


def escape_latex(text: str) -> str:
    """Text as LaTeX sets it literally."""
    return "".join(_LATEX.get(character, character) for character in text)


def escape_markdown(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


@dataclass
class Table:
    """Title, columns, rows of text, and a note below; the first column is set to the left."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join("| " + " | ".join(map(escape_markdown, line)) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")

    def latex(self) -> str:
        """A `table` with a `tabular` of the package booktabs."""

        def line(cells: list[str]) -> str:
            return " & ".join(map(escape_latex, cells)) + r" \\"

        caption = self.title + (f". {self.note}" if self.note else "")
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{escape_latex(caption)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}", r"\toprule"]
        lines += [line(self.columns), r"\midrule", *map(line, self.rows)]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        return "\n".join(lines) + "\n"


def machine(record: dict[str, Any]) -> str:
    """Where a record was measured, in words."""
    found = record["environment"]
    cpu = f"{found['cpu']} ({found['capability']}), {found['threads']} of {found['cores']} cores"
    return f"{found['gpu']} ({cpu})" if found["gpu"] else f"{cpu}, no GPU"


def about(record: dict[str, Any]) -> str:
    """One paragraph: models, protocol, versions, and how often the run was cut or interrupted."""
    models, settings = record["models"], record["settings"]
    versions = record["environment"]["versions"]
    pair = f"{models['target']} ({models['target_parameters'] / 1e6:.1f} M)"
    pair += f" with {models['draft']} ({models['draft_parameters'] / 1e6:.1f} M)"
    parts = [f"{pair}, {models['dtype']} on {models['device']}"]
    if models["draft_weights"] != "trained":
        parts.append(f"draft weights {models['draft_weights']}")
    if settings["tuned"]:
        parts.append("auto starts from the file of `treespec tune`")
    if models["device"] == "cuda" and settings.get("cuda_graphs", False) is not False:
        parts.append("this library's rows on CUDA graphs where they can be captured")
    if settings.get("record_ahead"):
        took = sorted((record.get("warmup_s") or {}).values())
        seconds = f", in {took[0]:.1f} to {took[-1]:.1f} s each" if took else ""
        parts.append(f"forwards of this library's rows recorded ahead by warmup(){seconds}")
    parts.append(f"acceptance: {record['acceptance']}")
    parts.append(
        f"{settings['new_tokens']} new tokens, prompts {settings['prompts']}, "
        f"{settings['warm_ups']} warm-ups, end of text off"
    )
    parts.append(
        ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "treespec"))
    )
    if record["environment"]["commit"]:
        parts.append(f"commit {record['environment']['commit']}")
    if record["stopped_by"] == "minutes":
        ran = len({sample["task"] for sample in record["samples"]})
        parts.append(
            f"stopped by its budget of {settings['minutes']:g} minutes after {ran} of "
            f"{len(record['tasks'])} turns"
        )
    loaded = (record.get("peak_memory_mib") or {}).get("models loaded")
    if loaded:
        parts.append(f"a process that only loads the models peaks at {loaded:.0f} MiB")
    if record["sittings"] > 1:
        parts.append(f"measured in {record['sittings']} sittings")
    return "; ".join(parts) + "."


def _label(record: dict[str, Any]) -> str:
    """What every title says when the acceptance is not the models' own."""
    return " (simulated acceptance)" if record["models"]["simulated"] else ""


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def speedup_text(row: dict[str, Any]) -> str:
    """The ratio with its interval, if it has one."""
    return figures.Ratio(row["speedup"], row["speedup_low"], row["speedup_high"]).text()


COLUMNS = [
    "method",
    "tokens/s (p20 to p80)",
    "speedup [95 %]",
    "tokens/round",
    "accepted",
    "efficiency",
    "draft + verify + commit ms",
    "identical",
]


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["p20_tokens_per_second"], row["p80_tokens_per_second"]
    parts, compared = row["round_ms"], row["compared"]
    identical = f"{row['identical']}/{compared}" if compared else "-"
    if row["largest_logit_gap"] is not None:
        identical += f" (gap {row['largest_logit_gap']:.2g})"
    return [
        row["name"],
        f"{row['median_tokens_per_second']:.1f} ({low:.1f} to {high:.1f})",
        speedup_text(row),
        _number(row["tokens_per_round"]),
        "-" if row["acceptance_rate"] is None else f"{100 * row['acceptance_rate']:.0f} %",
        _number(row["efficiency"]),
        " + ".join(f"{parts[part]:.2f}" for part in figures.PARTS) if parts else "-",
        identical,
    ]


def full_table(record: dict[str, Any], **cell: Any) -> Table:
    """Every row with everything measured, over the tasks of a cell."""
    rows = figures.rows(record, **cell)
    memory = record.get("peak_memory_mib") or {}
    columns, lines = list(COLUMNS), [_cells(row) for row in rows]
    if memory:
        columns.append("peak MiB")
        for line, row in zip(lines, rows):
            line.append(_number(memory.get(row["name"]), ".0f"))
    count = max((row["samples"] for row in rows), default=0)
    title = f"{record['kind'].capitalize()}{_cell_name(cell)}, {count} samples a row"
    return Table(title + _label(record), columns, lines)


def _cell_name(cell: dict[str, Any]) -> str:
    if not cell:
        return ""
    return f", T = {cell['temperature']:g}, batch {cell['batch']}"


# The steps of an ablation: what is added, and the row without its sources.
ABLATIONS: dict[int, tuple[tuple[str, str], ...]] = {
    3: (("plain", "plain"), ("linear", "linear K=6"), ("tree", "tree D=7 pruned")),
    4: (
        ("plain", "plain"),
        ("linear", "linear K=6"),
        ("tree", "tree D=7 unpruned"),
        ("pruning", "tree D=7 pruned"),
    ),
    5: (
        ("plain", "plain"),
        ("linear", "linear K=6"),
        ("tree", "tree D=4 unpruned"),
        ("pruning", "tree D=4 pruned"),
        ("depth", "tree D=7 pruned"),
    ),
}


def ablation_table(record: dict[str, Any], steps: int, sources: str) -> Table | None:
    """Step by step from plain decoding in this engine; None unless every row was run."""
    rows = {row["name"]: row for row in figures.rows(record)}
    lines, before = [], None
    for step, name in ABLATIONS[steps]:
        full = "treespec plain" if name == "plain" else f"treespec {name} ({sources})"
        row = rows.get(full)
        if row is None:
            return None
        gain = "-" if before is None else f"{row['speedup'] / before:.2f}×"
        before = row["speedup"]
        lines.append([step, name, speedup_text(row), gain, _number(row["tokens_per_round"])])
    columns = ["step", "row", "speedup [95 %]", "over the step before", "tokens/round"]
    return Table(f"{steps} steps, {sources}{_label(record)}", columns, lines)


def category_table(record: dict[str, Any], **cell: Any) -> Table:
    """Speedups of a cell by category, and over all."""
    overall = figures.rows(record, **cell)
    names = figures.categories(record)
    by_category = {
        name: {row["name"]: row for row in figures.rows(record, **cell, category=name)}
        for name in names
    }
    lines = []
    for row in overall:
        shares = [by_category[name].get(row["name"]) for name in names]
        line = [row["name"], *(f"{share['speedup']:.2f}×" if share else "-" for share in shares)]
        lines.append([*line, speedup_text(row)])
    title = f"Speedup by category{_cell_name(cell)}{_label(record)}"
    return Table(title, ["method", *names, "overall [95 %]"], lines)


def standing_table(record: dict[str, Any], **cell: Any) -> Table | None:
    """`auto` over its rivals of a cell, by category and over all, and below how far two rows of
    plain decoding are apart, where there are two; None without `auto` or without rivals."""
    table = _standing_table("Standing of auto", figures.standing, record, cell)
    controls = [figures.control(record, **place) for place in _places(record, cell)]
    if table is not None and controls[-1] is not None:
        ratios = ["-" if ratio is None else ratio.text() for ratio in controls]
        table.rows.append(["(plain decoding again, over the first)", *ratios])
    return table


def same_text_table(record: dict[str, Any], **cell: Any) -> Table | None:
    """The same on texts that both wrote alike; None where all rows of ours wrote all alike."""
    ours = [method["name"] for method in record["methods"] if method["ours"]]
    samples = figures.whole_turns(record, **cell)
    told = [[one.get("text") for one in samples[name]] for name in ours if name in samples]
    if all(texts == told[0] for texts in told):
        return None
    title = "Standing of auto on texts that both wrote alike"
    return _standing_table(title, figures.standing_on_same_texts, record, cell)


def _places(record: dict[str, Any], cell: dict[str, Any]) -> list[dict[str, Any]]:
    """A cell's categories, and the cell."""
    names = figures.categories(record)
    return [{**cell, "category": name} for name in names if len(names) > 1] + [cell]


def _standing_table(
    title: str, standing: Callable, record: dict[str, Any], cell: dict[str, Any]
) -> Table | None:
    places = _places(record, cell)
    standings = [standing(record, **place) for place in places]
    lines = [
        [rival, *(of[rival].text() if rival in of else "-" for of in standings)]
        for rival in figures.RIVALS
        if any(rival in of for of in standings)
    ]
    if not lines:
        return None
    columns = ["auto over [95 %]", *(place.get("category", "overall") for place in places)]
    return Table(f"{title}{_cell_name(cell)}{_label(record)}", columns, lines)


def rerun_table(record: dict[str, Any], other: dict[str, Any], **cell: Any) -> Table | None:
    """Speedups and places of the rows that two records share, on the tasks that both finished; None
    where there are none."""
    record, other = figures.on_shared_tasks(record, other, **cell)
    theirs = {row["name"]: row["speedup"] for row in figures.rows(other, **cell)}
    ours = {
        row["name"]: row["speedup"]
        for row in figures.rows(record, **cell)
        if row["name"] in theirs
    }
    if not ours:
        return None
    first, second = list(ours.values()), [theirs[name] for name in ours]
    lines = [
        [name, f"{a:.2f}×", f"{b:.2f}×", f"{place:g}", f"{place_there:g}"]
        for name, a, b, place, place_there in zip(
            ours, first, second, figures.ranks(first), figures.ranks(second)
        )
    ]
    commits = [each["environment"]["commit"] for each in (record, other)]
    changes = figures.order_changes(record, other, **cell)
    pairs = len(ours) * (len(ours) - 1) // 2
    clear = [f"{one} and {another}" for (one, another), is_clear in changes.items() if is_clear]
    return Table(
        f"Twice the same table{_cell_name(cell)}{_label(record)}",
        ["method", "speedup", "speedup of the other", "place", "place of the other"],
        lines,
        f"Spearman's rank correlation {_number(figures.rank_correlation(first, second))} over "
        f"{len(ours)} rows; {len(changes)} of {pairs} pairs in another order, {len(clear)} of "
        f"which both runs tell apart (95 % interval of their ratio){_listed(clear)}; commits "
        f"{commits[0]} and {commits[1]}.",
    )


def _listed(names: list[str]) -> str:
    return f": {', '.join(names)}" if names else ""


def not_run_note(record: dict[str, Any]) -> str:
    """What was left out and why, a line each."""
    return "\n".join(f"- not run: {name}: {why}" for name, why in record["not_run"].items())


def all_tables(record: dict[str, Any]) -> list[Table]:
    """Every table of a finished record."""
    if record["kind"] == "suite":
        cells = figures.cells(record)
        made = [
            make(record, **cell)
            for cell in cells
            for make in (full_table, category_table, standing_table, same_text_table)
        ]
        return [table for table in made if table is not None]
    ablations = [
        ablation_table(record, steps, sources)
        for sources in ("draft", "lookup", "merged")
        for steps in ABLATIONS
    ]
    return [full_table(record), *(table for table in ablations if table is not None)]


def markdown(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    parts = [f"{machine(record)}. {about(record)}", *(t.markdown() for t in all_tables(record))]
    if record["not_run"]:
        parts.append(not_run_note(record))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def latex(record: dict[str, Any]) -> str:
    """The record as LaTeX tables, for `\\usepackage{booktabs}`."""
    head = f"% {machine(record)}. {about(record)}\n"
    left_out = [f"% {line}\n" for line in not_run_note(record).splitlines()]
    return "\n".join([head, *(table.latex() for table in all_tables(record)), *left_out])
