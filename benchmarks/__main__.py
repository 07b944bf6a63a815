"""Everything that can be measured here: `make bench`. About an hour on two cores.

    python -m benchmarks                       # all parts
    python -m benchmarks --only linear decode  # some parts
    python -m benchmarks --tiny                # dry run on tiny shapes and models

Each part is a process of its own; one that fails costs the others nothing. Prints tables and
writes out/<machine>.json, and plots beside it. A part that needs more memory than is free says so.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks import registry
from benchmarks.machine import new_results, slug
from benchmarks.parts import ROOT, run_steps
from benchmarks.plots import draw_all
from benchmarks.report import print_parts, print_results


def main(argv: list[str]) -> int:
    options = _parse(argv)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    path = options.out / f"{slug(device)}-{torch.get_num_threads()}.json"
    results = new_results(device, "benchmarks", argv)
    steps = [
        step
        for step in registry.steps(options.device, options.tiny)
        if step.name in (options.only or registry.PARTS)
    ]
    run_steps(steps, results, path, time.monotonic() + 60 * options.minutes)
    print_results(results)
    print_parts(results)
    drawn = draw_all(results, path.parent, path.stem)
    print("Written to", ", ".join(os.path.relpath(each) for each in (path, *drawn)))
    return 1 if any(part.status == "failed" for part in results.parts) else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", choices=("cuda", "cpu"), default=default)
    made.add_argument("--tiny", action="store_true", help="tiny shapes and models")
    made.add_argument("--only", nargs="+", choices=registry.PARTS, help="run these parts alone")
    made.add_argument("--minutes", type=float, default=240, help="begin no part later than that")
    made.add_argument("--out", type=Path, default=ROOT / "out", help="folder of JSON and plots")
    return made.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
