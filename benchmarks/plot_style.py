"""How every figure looks: colours, marks and names of systems, and how a file is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import OURS
from benchmarks.results import Results

# Okabe and Ito's, told apart by the colour-blind; in lines a mark tells as well. Ours is black.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
    "#56b4e9", "#999999", "#8c564b", "#f0e442",
)  # fmt: skip
MARKS = "sD^vPX*<>"
LIMIT_COLOUR = "#aa0000"
# What the short names of tables mean.
NAMES = {
    "bitsandbytes": "bitsandbytes: decode, then torch",
    "Linear8bitLt": "bitsandbytes Linear8bitLt, which rounds x to 8 bits too",
    "torch int8": "torch int8 weights, a scale a row",
    "torchao int8": "torchao int8 weights, a scale a row",
    "quanto int8": "quanto int8 weights, a scale a row",
}


def line_style(system: str, systems: Sequence[str]) -> dict[str, Any]:
    """Of a system among those of a figure, its name for the legend included."""
    if system == OURS:
        return {"label": OURS, "color": "black", "linewidth": 2.6, "marker": "o", "zorder": 5}
    if system.startswith(OURS):  # one backend of ours among several
        ours = [name for name in systems if name.startswith(OURS)]
        dashes = (0, (1 + 2 * ours.index(system), 2))
        return {"label": system, "color": "black", "linewidth": 1.4, "linestyle": dashes}
    place = [name for name in systems if not name.startswith(OURS)].index(system)
    return {
        "label": NAMES.get(system, system),
        "color": COLOURS[place % len(COLOURS)],
        "linewidth": 1.4,
        "marker": MARKS[place % len(MARKS)],
        "markersize": 5,
    }


def plain_numbers(*axes: Any) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written out, on logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    for axis in axes:
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def measured_on(results: Results) -> str:
    """Machine and date, for the second line of a title."""
    machine = results.machine
    return f"{machine.gpu or f'{machine.cpu}, {machine.threads} threads'}, {results.created[:10]}"


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")  # needs no screen
    from matplotlib import pyplot

    return pyplot


def write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
