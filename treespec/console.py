"""What the command line draws: tables, progress and live text. `rich` draws them where it is
installed, plain text elsewhere.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def _rich_installed() -> bool:
    return importlib.util.find_spec("rich") is not None


def format_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1
) -> str:
    """A plain table; the first `text_columns` columns are set to the left, the others, figures, to
    the right.
    """
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, rows)])


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1
) -> None:
    """Prints a table on stdout, drawn by rich where it is installed and stdout is a terminal."""
    if _rich_installed() and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < text_columns else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    print(f"{title}\n{format_table(columns, rows, text_columns)}", flush=True)


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, shown only on a terminal.

    Args:
        description: what is going on.
        total: steps to come; None for a spinner.

    Yields:
        A function `advance(steps=1, note="")`.
    """
    if not sys.stderr.isatty():
        yield lambda steps=1, note="": None
        return
    if not _rich_installed():
        from tqdm import tqdm

        with tqdm(total=total, desc=description, leave=False) as bar:

            def advance(steps: int = 1, note: str = "") -> None:
                bar.set_postfix_str(note, refresh=False)
                bar.update(steps)

            yield advance
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    if total is not None:
        columns[2:2] = [BarColumn(), MofNCompleteColumn()]
    columns.append(TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(description, total=total, note="")
        yield lambda steps=1, note="": display.update(task, advance=steps, note=note)


class LiveText:
    """Decodes token ids as they come and writes the text that is certain, so that no half character
    is shown.

    Args:
        decode: from a list of ids to text. It always gets all ids: what a token reads as can depend
            on those before it.
        write: takes each new piece of text.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]):
        self._decode = decode
        self._write = write
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token_ids: list[int]) -> None:
        """Takes further ids and writes what they complete."""
        self._ids += token_ids
        text = self._decode(self._ids)
        # A trailing replacement character is the first part of a character still to come.
        if not text.endswith("\ufffd"):
            self._emit(text)

    def end(self) -> None:
        """Writes what is left, complete or not."""
        self._emit(self._decode(self._ids))

    def _emit(self, text: str) -> None:
        self._write(text[len(self._shown) :])
        self._shown = text
