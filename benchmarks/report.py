"""Results as tables on the terminal."""

import sys
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.results import Model, Results, Row

# Redirected output is as wide as the table; rich would take 80 columns.
WIDE = 1000


def finish(results: Results, json: Path | None) -> int:
    """Saves and prints what a benchmark found; its exit status: 1 if a check of ours failed.

    json: the file, None for none.
    """
    if json:
        results.write(json)
    print_results(results)
    return 1 if results.failed else 0


def print_results(results: Results) -> None:
    console = _console()
    machine = results.machine
    console.print(
        f"{machine.gpu or machine.cpu}, {machine.threads} CPU threads, "
        f"PyTorch {results.versions['torch']}. "
        "Median time of a call; in brackets how many times as fast as the baseline."
    )
    if machine.busy:
        console.print(
            f"The machine was busy: load {machine.load_average:.1f} on {machine.cores} cores. "
            "Times of CPU work are not to be trusted; ratios, a little."
        )
    for name, value in results.ceilings.items():
        console.print(f"{name} {value:.4g}")
    for (op, dtype, shape, n, k), rows in groupby(results.rows, _table_key):
        console.print(_table(f"{op} {shape} [{n}, {k}] {dtype}", list(rows)))
    for task, models in groupby(results.models, lambda model: model.task):
        console.print(_models_table(task, list(models)))
    for heading, notes in (("Skipped", results.skipped), ("FAILED", results.failed)):
        for note in notes:
            console.print(f"{heading}: {note.what}: {note.reason}", markup=False)


def print_parts(results: Results) -> None:
    """What became of each step of `make bench` or `make gpu`."""
    table = Table(title="Parts", title_justify="left", title_style="bold")
    for heading in ("part", "status", "s", "note"):
        table.add_column(heading, justify="right" if heading == "s" else "left")
    for part in results.parts:
        status = part.status.upper() if part.status == "failed" else part.status
        table.add_row(part.name, status, f"{part.seconds:.0f}", escape(part.note))
    _console().print(table)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def _table_key(row: Row) -> tuple[str, str, str, int, int]:
    return row.op, row.dtype, row.shape, row.n, row.k


def _table(title: str, rows: list[Row]) -> Table:
    """One line for each M, one column for each system."""
    table = Table(title=title, title_justify="left", title_style="bold")
    systems = list(dict.fromkeys(row.system for row in rows))
    baselines = {row.baseline for row in rows}
    table.add_column("M", justify="right")
    for system in systems:
        table.add_column(system + (" (baseline)" if system in baselines else ""), justify="right")
    for m, of_m in groupby(rows, lambda row: row.m):
        cells = {row.system: _cell(row) for row in of_m}
        table.add_row("" if m is None else str(m), *(cells.get(name, "") for name in systems))
    return table


def _models_table(task: str, models: list[Model]) -> Table:
    """One line for each figure, one column for each system."""
    table = Table(title=f"full model: {task}", title_justify="left", title_style="bold")
    table.add_column("")
    for model in models:
        table.add_column(model.system, justify="right")
    for name in dict.fromkeys(name for model in models for name in model.figures):
        found = [model.figures.get(name) for model in models]
        table.add_row(name, *("" if value is None else f"{value:.4g}" for value in found))
    return table


def _cell(row: Row) -> str:
    ratio = "" if row.ratio_to_baseline is None else f" ({row.ratio_to_baseline:.3g}x)"
    return f"{_duration(row.median_s)}{ratio}"


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError
