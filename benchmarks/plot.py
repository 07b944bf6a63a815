"""Draws results: the time of a call over M, one line for each system.

python -m benchmarks.plot out/cpu.json out/cpu.png
"""

import sys
from itertools import groupby
from pathlib import Path

from benchmarks.harness import OURS
from benchmarks.results import Results, Row

PANEL_INCHES = 5.0, 4.0
# Readable in print and by the colour-blind; ours is black and thick.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")


def plot(results: Results, path: Path) -> None:
    """Writes a figure with a row for each op and dtype and a column for each shape."""
    import matplotlib

    matplotlib.use("agg")  # needs no screen
    from matplotlib import pyplot

    rows = [row for row in results.rows if row.m is not None]
    lines = list(dict.fromkeys((row.op, row.dtype) for row in rows))
    columns = list(dict.fromkeys((row.shape, row.n, row.k) for row in rows))
    if not rows:
        raise ValueError("plot: the results have no row with an M")
    size = PANEL_INCHES[0] * len(columns), PANEL_INCHES[1] * len(lines)
    figure, axes = pyplot.subplots(len(lines), len(columns), figsize=size, squeeze=False)
    systems = list(dict.fromkeys(row.system for row in rows))
    for i, (op, dtype) in enumerate(lines):
        for j, (shape, n, k) in enumerate(columns):
            panel = [r for r in rows if (r.op, r.dtype, r.shape) == (op, dtype, shape)]
            _draw(axes[i][j], panel, systems)
            axes[i][j].set_title(f"{op}, {shape} [{n}, {k}], {dtype}", fontsize=9)
    axes[0][0].legend(fontsize=7)
    machine = results.machine
    figure.suptitle(f"{machine.gpu or machine.cpu}, {machine.threads} CPU threads", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(axis: "matplotlib.axes.Axes", rows: list[Row], systems: list[str]) -> None:  # type: ignore[name-defined]  # noqa: F821
    """One panel: milliseconds over M, both logarithmic, quartiles as a band."""
    peers = [system for system in systems if not system.startswith(OURS)]
    for system, of_system in groupby(
        sorted(rows, key=lambda r: (systems.index(r.system), r.m or 0)), lambda r: r.system
    ):
        points = list(of_system)
        ours = system.startswith(OURS)
        colour = "black" if ours else COLOURS[peers.index(system) % len(COLOURS)]
        m = [point.m for point in points]
        axis.plot(
            m,
            [1e3 * point.median_s for point in points],
            label=system,
            color=colour,
            linewidth=2.5 if ours else 1.2,
            linestyle=":" if system == "read loop" else "-",
            marker="o" if ours else ".",
            markersize=4,
        )
        low, high = ([1e3 * getattr(p, q) for p in points] for q in ("q25_s", "q75_s"))
        axis.fill_between(m, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({row.m for row in rows if row.m is not None})
    axis.set_xticks(ticks, [str(m) for m in ticks], fontsize=7)
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(alpha=0.3)
    axis.set_xlabel("M (tokens)", fontsize=8)
    axis.set_ylabel("ms", fontsize=8)


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m benchmarks.plot RESULTS.json FIGURE.png", file=sys.stderr)
        return 2
    plot(Results.read(Path(argv[0])), Path(argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
