"""The results of `docs/benchmarks.md`, written between two markers from the files of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from treespec.bench import results, tables

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


class PageError(ValueError):
    """A page without the markers, or a folder that is not there."""


def find_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished runs of a folder by file name; files of other benchmarks are passed over.

    Raises:
        PageError: if there is no such folder.
        ResultsError: for a run that is unfinished, failed, or of another schema version.
    """
    if not folder.is_dir():
        raise PageError(f"--results: no folder {str(folder)!r}")
    found = {}
    for path in sorted(folder.glob("**/*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise results.ResultsError(f"{str(path)!r} is not JSON") from None
        if isinstance(content, dict) and content.get("schema") == results.SCHEMA:
            found[path.relative_to(folder).as_posix()] = results.load_finished(path)
    return found


def results_text(records: dict[str, dict[str, Any]]) -> str:
    """Sections by machine, then by file."""
    machines: dict[str, list[str]] = {}
    for name, record in records.items():
        machines.setdefault(tables.machine(record), []).append(name)
    parts = []
    for machine, names in machines.items():
        parts.append(f"### {machine}")
        for name in names:
            body = tables.markdown(records[name]).removeprefix(f"{machine}. ")
            parts += [f"#### {name}", body.rstrip()]
    return "\n\n".join(parts) or "No results yet."


def rewrite(page: str, records: dict[str, dict[str, Any]]) -> str:
    """A page with what lies between its markers written anew.

    Raises:
        PageError: if the markers are not there, once each and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise PageError(f"--page: the markers {BEGIN} and {END} must be there once, in this order")
    return f"{before}{BEGIN}\n\n{results_text(records)}\n\n{END}{after}"
