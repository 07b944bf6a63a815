"""What a command shows: results on stdout, progress and remarks on stderr.

On a terminal both have colour and movement; in a pipe or a file they are plain lines; with
`--json` stdout carries one JSON object and nothing else.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Row = Sequence[str]


class Screen:
    """The two streams of one command."""

    def __init__(self, stdout: TextIO, as_json: bool) -> None:
        self.as_json = as_json
        self._stdout = stdout
        self._out = Console(file=stdout, highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def say(self, text: str = "", style: str | None = None) -> None:
        """Prints a line of the result, unless the result is JSON."""
        if not self.as_json:
            self._out.print(escape(text), style=style, soft_wrap=True)

    def prose(self, text: str) -> None:
        """Prints a paragraph of the result, its lines broken between words."""
        if not self.as_json:
            self._out.print(escape(text), width=min(100, self._out.width))

    def heading(self, text: str) -> None:
        """Prints the title of a part, set off by an empty line above and below."""
        self.say(f"\n{text}\n", style="bold")

    def stream(self, text: str) -> None:
        """Prints a piece of a line at once and as it is, unless the result is JSON."""
        if not self.as_json:
            self._stdout.write(text)
            self._stdout.flush()

    def note(self, text: str) -> None:
        """Prints a remark that is no part of the result."""
        self._err.print(escape(text), style="dim", soft_wrap=True)

    def table(self, head: Row, rows: Sequence[Row], *, text_columns: int = 1) -> None:
        """Prints a table: the first columns to the left, figures to the right."""
        if self.as_json:
            return
        pretty = self._out.is_terminal
        table = Table(
            box=box.SIMPLE_HEAD if pretty else None,
            header_style="bold",
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for i, name in enumerate(head):
            figures = i >= text_columns
            table.add_column(name, justify="right" if figures else "left", no_wrap=figures)
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        # A pipe has no width to respect; folded cells would be hard to read back.
        self._out.print(table, width=None if pretty else 1000)

    def result(self, value: dict[str, Any]) -> None:
        """Prints the JSON object, where that was asked for."""
        if self.as_json:
            self._stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Shows that something of unknown length is under way."""
        with self._err.status(text) if self._err.is_terminal else nullcontext():
            yield

    @property
    def moves(self) -> bool:
        """Whether progress is shown as a bar; where it is not, lines tell of it."""
        return self._err.is_terminal

    @contextmanager
    def progress(self, text: str) -> Iterator[Callable[..., None]]:
        """Shows a bar, moved by calling what is yielded with (done, total), or a new text too."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        hidden = not self._err.is_terminal
        with Progress(*columns, console=self._err, transient=True, disable=hidden) as bar:
            task = bar.add_task(text, total=None)

            def update(done: int, total: int, text: str | None = None) -> None:
                bar.update(task, completed=done, total=total, description=text and escape(text))

            yield update


@contextmanager
def open_screen(as_json: bool) -> Iterator[Screen]:
    """Gives a command its screen; under `--json` whatever else is printed goes to stderr."""
    screen = Screen(sys.stdout, as_json)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield screen


@dataclass(frozen=True)
class _Unit:
    size: int
    name: str


_UNITS = (_Unit(10**9, "GB"), _Unit(10**6, "MB"), _Unit(10**3, "kB"))


def bytes_text(count: int) -> str:
    """`12.10 GB`; GB is 10^9 bytes."""
    for unit in _UNITS:
        if count >= unit.size:
            return f"{count / unit.size:.2f} {unit.name}"
    return f"{count} B"


def with_error(value: float, error: float, digits: int = 2) -> str:
    """`12.34 ± 0.56`, or the value alone where the error is unknown."""
    if math.isnan(error):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
