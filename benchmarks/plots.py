"""Draws results: how many times as fast, what memory holds, how near the machine's speed.

    python -m benchmarks.plots out/machine.json            # whatever can be drawn, beside it
    python -m benchmarks.plots out/machine.json FOLDER

From the JSON alone. Times of a system under load stand in the JSON as they were measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.plot_memory import memory
from benchmarks.plot_products import roofline, speed
from benchmarks.results import Results

KINDS: dict[str, Callable[[Results, Path], bool]] = {
    "speed": speed,
    "roofline": roofline,
    "memory": memory,
}


def draw_all(results: Results, folder: Path, stem: str) -> list[Path]:
    """Writes what there are figures for, as `<stem>-<kind>.png`; returns the files."""
    paths = {name: folder / f"{stem}-{name}.png" for name in KINDS}
    return [paths[name] for name, draw in KINDS.items() if draw(results, paths[name])]


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
