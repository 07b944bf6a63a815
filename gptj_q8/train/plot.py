"""Draws how a run went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LONGEST = 80  # characters of a title; of a longer one the end is shown
Curve = Sequence[tuple[int, float]]


def plot_run(title: str, losses: Curve, held_out: Curve, rates: Curve, file: Path) -> None:
    """Draws loss, held-out loss and learning rate over the steps, as a PNG.

    ImportError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, values = zip(*losses, strict=True)
    above.plot(steps, values, ".", color="#b9c8de", markersize=4, label="a step's loss")
    smooth = smoothed(values)
    above.plot(steps, smooth, color="#4a6fa5", linewidth=2, label="smoothed")
    if held_out:
        first, last = held_out[0][1], held_out[-1][1]
        label = f"held out: {first:.2f}"
        if len(held_out) > 1:
            label += f" to {last:.2f} ({100 * (last / first - 1):+.0f} %)"
        above.plot(*zip(*held_out, strict=True), "o-", color="#b03a2e", linewidth=2, label=label)
    above.set_title(title if len(title) <= LONGEST else f"…{title[1 - LONGEST :]}")
    above.set_ylabel("loss (nats a token)")
    above.legend(frameon=False)
    below.plot(*zip(*rates, strict=True), color="#555555", linewidth=1.5)
    below.set_ylabel("learning rate")
    below.set_xlabel("optimizer step")
    below.set_ylim(0)
    peak = max(rate for _, rate in rates)
    if peak > 0:
        below.set_yticks([0, peak], ["0", f"{peak:.1e}"])
    below.set_xlim(0)
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png")


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over the neighbourhood, a twentieth of all the values wide."""
    half = max(1, len(values) // 40)
    return [
        sum(near) / len(near)
        for i in range(len(values))
        for near in [values[max(0, i - half) : i + half + 1]]
    ]
