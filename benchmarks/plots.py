"""Draws results: how many times as fast, what memory holds, how near the hardware's limits.

    python -m benchmarks.plots out/machine.json            # whatever can be drawn, beside it
    python -m benchmarks.plots out/machine.json FOLDER

From the JSON alone. Times of a system under load stand in the JSON as they were measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import OURS
from benchmarks.results import Model, Results, Row

# Readable in print and by the colour-blind; ours is black and thick.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
    "#56b4e9", "#999999", "#8c564b", "#f0e442",
)  # fmt: skip
LIMIT_COLOUR = "#aa0000"
# Not ways to compute the product, or what shows nothing beside the others.
LEFT_OUT = ("read loop", "torch float32")
PANEL = 4.6, 3.7  # inches
MEMORY_PANEL = 10.0, 4.8
CARDS = (8, 11, 24)


def draw_all(results: Results, folder: Path, stem: str) -> list[Path]:
    """Writes what there are figures for, as `<stem>-<kind>.png`; returns the files."""
    kinds: dict[str, Callable[[Results, Path], bool]] = {
        "speed": speed,
        "roofline": roofline,
        "memory": memory,
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{stem}-{name}.png" for name in kinds}
    return [paths[name] for name, draw in kinds.items() if draw(results, paths[name])]


def speed(results: Results, path: Path) -> bool:
    """How many times as fast as PyTorch in 16 bits over M, a panel for each op and shape."""
    rows = [row for row in _products(results) if row.ratio_to_baseline is not None]
    if not rows:
        return False
    grid = _Grid(rows)
    systems = [s for s in dict.fromkeys(row.system for row in rows) if s not in LEFT_OUT]
    for axis, panel in grid.panels():
        baseline = panel[0].baseline
        for system in systems:
            points = sorted((r for r in panel if r.system == system), key=lambda r: r.m or 0)
            if system == baseline or not points:
                continue
            m = [point.m for point in points]
            style = _style(system, systems)
            axis.plot(m, [p.ratio_to_baseline for p in points], label=system, **style)
            band = [[getattr(p, q) for p in points] for q in ("ratio_q25", "ratio_q75")]
            axis.fill_between(m, *band, color=style["color"], alpha=0.15, linewidth=0)
        _draw_limit(axis, panel, results)
        axis.axhline(1, color="#444444", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({row.m for row in panel if row.m})
        axis.set_xticks(ticks, [str(m) for m in ticks])
        _plain_numbers(axis.yaxis)
        axis.set_xlabel("M, tokens at once")
        axis.set_ylabel(f"times as fast as {baseline}")
    grid.save(path, results, "A layer's product: times as fast as PyTorch (higher is better)")
    return True


def roofline(results: Results, path: Path) -> bool:
    """Operations a second over operations a byte, under the roof that the machine sets."""
    rows = [row for row in _products(results) if row.flops and row.system not in LEFT_OUT]
    limits = {dtype: _limits(results, dtype) for dtype in {row.dtype for row in rows}}
    rows = [row for row in rows if limits[row.dtype]]
    if not rows:
        return False
    grid = _Grid(rows)
    systems = list(dict.fromkeys(row.system for row in rows))
    for axis, panel in grid.panels():
        for system in systems:
            points = sorted((r for r in panel if r.system == system), key=lambda r: r.m or 0)
            intensity = [p.flops / p.bytes for p in points]
            axis.plot(
                intensity,
                [p.tflop_per_s for p in points],
                label=system,
                **_style(system, systems),
            )
        gb_per_s, tflop_per_s = limits[panel[0].dtype] or (0.0, 0.0)
        most = max(row.flops / row.bytes for row in panel)
        least = min(row.flops / row.bytes for row in panel)
        ridge = tflop_per_s * 1e3 / gb_per_s
        xs = sorted({least, ridge, max(most, ridge)})
        roof = [min(x * gb_per_s / 1e3, tflop_per_s) for x in xs]
        axis.plot(xs, roof, color=LIMIT_COLOUR, linestyle="--", label="hardware limit")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("operations a byte of weights, input and output")
        axis.set_ylabel("TFLOP/s")
    grid.save(path, results, "Roofline: each point an M, from 1 at the left")
    return True


def memory(results: Results, path: Path) -> bool:
    """GPT-J-6B by part, a bar for each system, running beside training."""
    models = [model for model in results.models if model.task.startswith("memory ")]
    if not models:
        return False
    pyplot = _pyplot()
    tasks = list(dict.fromkeys(model.task for model in models))
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=MEMORY_PANEL, sharey=True, squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(name for model in models for name in model.figures))
    for axis, task in zip(axes.flat, tasks, strict=True):
        _stack(axis, [model for model in models if model.task == task], names)
        axis.set_title(f"GPT-J-6B {task.removeprefix('memory ')}, 2048 tokens")
        for size in CARDS:
            axis.axhline(size, color="#888888", linewidth=0.8, linestyle=":", zorder=0)
    axes[0][0].set_ylabel("GB (10^9 bytes), counted")
    for size in CARDS:
        at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
        axes[0][-1].annotate(f" {size} GB card", (1, size), **at)
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    _write(figure, path)
    return True


def _stack(axis: Any, models: Sequence[Model], names: Sequence[str]) -> None:
    bottoms = [0.0] * len(models)
    for i, name in enumerate(names):
        heights = [model.figures.get(name, 0.0) for model in models]
        label = name.removesuffix("_gb")
        axis.bar([m.system for m in models], heights, bottom=bottoms, color=COLOURS[i], label=label)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    for i, total in enumerate(bottoms):
        axis.annotate(f"{total:.1f}", (i, total), ha="center", va="bottom", fontweight="bold")
    axis.margins(y=0.08)
    axis.spines[["top", "right"]].set_visible(False)


def _products(results: Results) -> list[Row]:
    return [row for row in results.rows if row.m is not None and row.flops]


def _draw_limit(axis: Any, panel: Sequence[Row], results: Results) -> None:
    if points := limit_ratios(panel, results):
        m, ratios = zip(*points, strict=True)
        axis.plot(m, ratios, color=LIMIT_COLOUR, linestyle="--", label="hardware limit for 8 bits")


def limit_ratios(panel: Sequence[Row], results: Results) -> list[tuple[int, float]]:
    """M, and how many times as fast as the baseline the machine could be on our codes.

    It reads weights, input and output once at the speed of memory, or multiplies at the speed of
    PyTorch's largest product, whichever takes longer. Empty where the results hold no ceilings.
    """
    limits = _limits(results, panel[0].dtype)
    base = {r.m: r.median_s for r in panel if r.system == r.baseline}
    if limits is None:
        return []
    gb_per_s, tflop_per_s = limits
    return sorted(
        (row.m, base[row.m] / max(row.bytes / gb_per_s / 1e9, row.flops / tflop_per_s / 1e12))
        for row in panel
        if row.system == OURS and row.m is not None and row.m in base
    )


def _limits(results: Results, dtype: str) -> tuple[float, float] | None:
    """Memory's GB/s and the processor's TFLOP/s in a dtype, where the results hold them."""
    found = results.ceilings
    stream = found.get("read_gb_per_s", found.get("copy_gb_per_s"))
    peak = found.get(f"matmul_{dtype}_tflop_per_s")
    return (stream, peak) if stream and peak else None


class _Grid:
    """Panels: a line for each op and dtype, a column for each shape; of one line, two columns."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        lines = list(dict.fromkeys((row.op, row.dtype) for row in rows))
        shapes = list(dict.fromkeys((row.shape, row.n, row.k) for row in rows))
        self.cells = [(*line, *shape) for line in lines for shape in shapes]
        columns = min(len(shapes), 2) if len(lines) == 1 else len(shapes)
        high = -(-len(self.cells) // columns)
        size = PANEL[0] * columns, PANEL[1] * high + 0.9
        self.figure, self.axes = _pyplot().subplots(
            high, columns, figsize=size, squeeze=False, layout="constrained"
        )

    def panels(self) -> list[tuple[Any, list[Row]]]:
        found = []
        for axis in self.axes.flat[len(self.cells) :]:
            axis.set_axis_off()
        for axis, (op, dtype, shape, n, k) in zip(self.axes.flat, self.cells, strict=False):
            panel = [r for r in self.rows if (r.op, r.dtype, r.shape) == (op, dtype, shape)]
            axis.set_title(f"{op}, {shape} [{n}, {k}], {dtype}", fontsize=10)
            axis.grid(alpha=0.3)
            if panel:
                found.append((axis, panel))
            else:
                axis.set_axis_off()
        return found

    def save(self, path: Path, results: Results, title: str) -> None:
        machine = results.machine
        where = machine.gpu or f"{machine.cpu}, {machine.threads} threads"
        self.figure.suptitle(f"{title}\n{where}, {results.created[:10]}", fontsize=11)
        named: dict[str, Any] = {}
        for axis in self.axes.flat:
            named |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        self.figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=5, fontsize=9
        )
        _write(self.figure, path)


def _style(system: str, systems: Sequence[str]) -> dict[str, Any]:
    peers = [name for name in systems if not name.startswith(OURS)]
    if system == OURS:
        return {"color": "black", "linewidth": 2.6, "marker": "o", "markersize": 4, "zorder": 5}
    if system.startswith(OURS):  # one backend of ours among several
        ours = [name for name in systems if name.startswith(OURS)]
        dashes = (0, (1 + 2 * ours.index(system), 2))
        return {"color": "black", "linewidth": 1.4, "linestyle": dashes}
    colour = COLOURS[peers.index(system) % len(COLOURS)]
    return {"color": colour, "linewidth": 1.4, "marker": ".", "markersize": 5}


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")  # needs no screen
    from matplotlib import pyplot

    return pyplot


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)


def main(argv: list[str]) -> int:
    if len(argv) not in (1, 2):
        print("usage: python -m benchmarks.plots RESULTS.json [FOLDER]", file=sys.stderr)
        return 2
    source = Path(argv[0])
    folder = Path(argv[1]) if argv[1:] else source.parent
    drawn = draw_all(Results.read(source), folder, source.stem)
    print(*(path.name for path in drawn) if drawn else ["Nothing to draw."], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
