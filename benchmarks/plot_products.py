"""Figures of a layer's product over the number of tokens: beside PyTorch, and the roofline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import OURS
from benchmarks.plot_style import (
    LIMIT_COLOUR,
    line_style,
    measured_on,
    plain_numbers,
    pyplot,
    write,
)
from benchmarks.results import Results, Row

# Not ways to compute the product, or what shows nothing beside the others, unless they are measured
# by it.
LEFT_OUT = ("read loop", "torch float32", "decode + torch")
PANEL = 4.6, 3.7  # inches
# Two measurements of the same run, which a better kernel can pass.
LIMIT_STYLE = {"color": LIMIT_COLOUR, "linestyle": "--"}


def speed(results: Results, path: Path) -> bool:
    """How many times as fast as PyTorch in the same dtype over M, a panel for each op and shape.

    False, and no file, if no product was measured beside its baseline.
    """
    rows = [row for row in _products(results) if row.ratio_to_baseline is not None]
    if not rows:
        return False
    grid = _Grid(rows)
    systems = list(dict.fromkeys(row.system for row in rows))
    for axis, panel in grid.panels():
        baseline = panel[0].baseline
        for system, points in _lines(panel):
            if system == baseline:
                continue
            m = [point.m for point in points]
            style = line_style(system, systems)
            axis.plot(m, [p.ratio_to_baseline for p in points], **style)
            band = [[getattr(p, q) for p in points] for q in ("ratio_q25", "ratio_q75")]
            axis.fill_between(m, *band, color=style["color"], alpha=0.15, linewidth=0)
        if limit := limit_ratios(panel, results):
            label = f"8 bits at the speed of a {_stream(results)}, or of torch's largest product"
            axis.plot(*zip(*limit, strict=True), label=label, **LIMIT_STYLE)
        axis.axhline(1, color="#444444", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({row.m for row in panel if row.m})
        axis.set_xticks(ticks, [str(m) for m in ticks])
        plain_numbers(axis.yaxis)
        axis.set_xlabel("M, tokens at once")
        axis.set_ylabel(f"times as fast as {baseline}")
    times = ((row, row.ratio_to_baseline or 0.0) for row in rows)
    claim = _claim(times, "{:.1f} to {:.1f} times", "as fast as PyTorch")
    grid.save(path, results, f"{OURS} is {claim}" if claim else "Products")
    return True


def roofline(results: Results, path: Path) -> bool:
    """Operations a second over operations a byte, under the roof that the machine sets.

    False, and no file, without ceilings in the results.
    """
    products = _products(results)
    dtypes = {row.dtype for row in products}
    roofs = {dtype: roof for dtype in dtypes if (roof := _roof(results, dtype))}
    rows = [row for row in products if row.dtype in roofs]
    if not rows:
        return False
    grid = _Grid(rows)
    systems = list(dict.fromkeys(row.system for row in rows))
    for axis, panel in grid.panels():
        for system, points in _lines(panel):
            intensity = [p.intensity for p in points]
            axis.plot(intensity, [p.tflop_per_s for p in points], **line_style(system, systems))
        roof = roofs[panel[0].dtype]
        reached = [row.intensity for row in panel]
        xs = sorted({min(reached), roof.ridge, max(*reached, roof.ridge)})
        label = f"the speed of a {_stream(results)}, then of torch's largest product"
        axis.plot(xs, [roof.at(x) for x in xs], label=label, **LIMIT_STYLE)
        axis.set_xscale("log")
        axis.set_yscale("log")
        plain_numbers(axis.xaxis, axis.yaxis)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel("operations for each byte of weights, input and output")
        axis.set_ylabel("TFLOP/s")
    shares = ((row, 100 * row.tflop_per_s / roofs[row.dtype].at(row.intensity)) for row in rows)
    claim = _claim(shares, "{:.0f} to {:.0f} %", "of the dashed line")
    title = f"{OURS} reaches {claim}" if claim else "Roofline"
    grid.save(path, results, f"{title}; a point for each M")
    return True


def limit_ratios(panel: Sequence[Row], results: Results) -> list[tuple[int, float]]:
    """M, and how many times as fast as the baseline the machine could be on our codes.

    It reads weights, input and output once at the speed of the read loop (on a GPU of the copy),
    or multiplies at the speed of PyTorch's largest product, whichever takes longer. Empty where the
    results hold no ceilings.
    """
    roof = _roof(results, panel[0].dtype)
    base = {r.m: r.median_s for r in panel if r.system == r.baseline}
    if roof is None:
        return []
    gb_per_s, tflop_per_s = roof
    return sorted(
        (row.m, base[row.m] / max(row.bytes / gb_per_s / 1e9, row.flops / tflop_per_s / 1e12))
        for row in panel
        if row.system == OURS and row.m is not None and row.m in base
    )


def _stream(results: Results) -> str:
    """What memory's speed was measured by."""
    return "read loop" if "read_gb_per_s" in results.ceilings else "copy"


class _Roof(NamedTuple):
    """What a machine allows in one dtype: two measurements of it."""

    gb_per_s: float
    tflop_per_s: float

    @property
    def ridge(self) -> float:
        """The operations for each byte from which on memory no longer limits."""
        return self.tflop_per_s * 1e3 / self.gb_per_s

    def at(self, intensity: float) -> float:
        """TFLOP/s for so many operations for each byte."""
        return min(intensity * self.gb_per_s / 1e3, self.tflop_per_s)


def _roof(results: Results, dtype: str) -> _Roof | None:
    """Memory's speed and PyTorch's largest product in a dtype, where the results hold them."""
    found = results.ceilings
    stream = found.get("read_gb_per_s", found.get("copy_gb_per_s"))
    peak = found.get(f"matmul_{dtype}_tflop_per_s")
    return _Roof(stream, peak) if stream and peak else None


def _claim(values: Iterable[tuple[Row, float]], spread: str, what: str) -> str:
    """Such as "5.0 to 7.0 times as fast as PyTorch on 1 token, 1.0 to 1.1 times on 2048 tokens".

    spread: formats the least and the largest value. Empty without rows of ours.
    """
    ends = _ends(values)
    return ", ".join(
        f"{spread.format(low, high)} {'' if i else f'{what} '}{on}"
        for i, (on, low, high) in enumerate(ends)
    )


def _ends(values: Iterable[tuple[Row, float]]) -> list[tuple[str, float, float]]:
    """Of ours at the least and at the largest M: "on 1 token", the least and the largest value."""
    of_m: dict[int, list[float]] = {}
    for row, value in values:
        if row.system == OURS:
            of_m.setdefault(row.m or 0, []).append(value)
    ends = dict.fromkeys((min(of_m), max(of_m)) if of_m else ())
    words = {m: f"on {m} token{'s' if m > 1 else ''}" for m in ends}
    return [(words[m], min(of_m[m]), max(of_m[m])) for m in ends]


def _products(results: Results) -> list[Row]:
    return [
        row
        for row in results.rows
        if row.m is not None
        and row.flops
        and (row.system not in LEFT_OUT or row.system == row.baseline)
    ]


def _lines(panel: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Each system with its rows in the order of M."""
    for system in dict.fromkeys(row.system for row in panel):
        yield system, sorted((r for r in panel if r.system == system), key=lambda r: r.m or 0)


class _Grid:
    """Panels: a line for each op and dtype, a column for each shape; of one line, two columns."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        lines = list(dict.fromkeys((row.op, row.dtype) for row in rows))
        shapes = list(dict.fromkeys((row.shape, row.n, row.k) for row in rows))
        self.cells = [(*line, *shape) for line in lines for shape in shapes]
        columns = min(len(shapes), 2) if len(lines) == 1 else len(shapes)
        high = -(-len(self.cells) // columns)
        size = PANEL[0] * columns, PANEL[1] * high + 1.1
        self.figure, self.axes = pyplot().subplots(
            high, columns, figsize=size, squeeze=False, sharey=True, layout="constrained"
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
        for axis in self.axes.flat:
            axis.label_outer()
        self.figure.suptitle(f"{title}\n{measured_on(results)}", fontsize=11)
        named: dict[str, Any] = {}
        for axis in self.axes.flat:
            named |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        where = {"loc": "outside lower center", "ncols": 2, "fontsize": 9}
        self.figure.legend(named.values(), named.keys(), **where)
        write(self.figure, path)
