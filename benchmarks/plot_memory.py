"""GPT-J-6B's memory by part, a bar for each system, running beside training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import OURS
from benchmarks.plot_style import COLOURS, pyplot, write
from benchmarks.results import Model, Results

PANEL = 10.0, 5.0  # inches
CARDS = (8, 11, 24)  # GB of common ones


def memory(results: Results, path: Path) -> bool:
    """Draws what bench_memory has counted; False if there is nothing of it."""
    models = [model for model in results.models if model.task.startswith("memory ")]
    if not models:
        return False
    tasks = list(dict.fromkeys(model.task for model in models))
    figure, axes = pyplot().subplots(
        1, len(tasks), figsize=PANEL, sharey=True, squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(name for model in models for name in model.figures))
    for axis, task in zip(axes.flat, tasks, strict=True):
        _stack(axis, [model for model in models if model.task == task], names)
        axis.set_title(task.removeprefix("memory "))
        for size in CARDS:
            axis.axhline(size, color="#888888", linewidth=0.8, linestyle=":", zorder=0)
    axes[0][0].set_ylabel("GB (10^9 bytes)")
    for size in CARDS:
        at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
        axes[0][-1].annotate(f" {size} GB card", (1, size), **at)
    figure.suptitle(f"{_claim(models)}\ncounted part by part, 2048 tokens, {results.created[:10]}")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    write(figure, path)
    return True


def _claim(models: Sequence[Model]) -> str:
    """The title: what ours takes, and the smallest card that holds all of it."""
    totals = {m.task.removeprefix("memory "): _total(m) for m in models if m.system == OURS}
    if not totals:
        return "GPT-J-6B's memory"
    what = " and ".join(f"{task} {total:.1f} GB" for task, total in totals.items())
    card = next((size for size in CARDS if size > max(totals.values())), None)
    return f"GPT-J-6B with {OURS}: {what}" + (f", within a card of {card} GB" if card else "")


def _total(model: Model) -> float:
    return sum(model.figures.values())


def _stack(axis: Any, models: Sequence[Model], names: Sequence[str]) -> None:
    bottoms = [0.0] * len(models)
    for i, name in enumerate(names):
        heights = [model.figures.get(name, 0.0) for model in models]
        look = {"color": COLOURS[i], "edgecolor": "white", "linewidth": 0.4}
        label = name.removesuffix("_gb")
        axis.bar([m.system for m in models], heights, bottom=bottoms, label=label, **look)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    for i, total in enumerate(bottoms):
        on_white = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        where = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axis.annotate(f"{total:.1f}", (i, total), fontweight="bold", bbox=on_white, **where)
    axis.margins(y=0.08)
    axis.spines[["top", "right"]].set_visible(False)
