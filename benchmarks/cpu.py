"""Our CPU kernels beside PyTorch, bitsandbytes and torchao, on all shapes of GPT-J.

    python -m benchmarks.cpu                    # what `make bench-cpu` runs: some 20 minutes
    python -m benchmarks.cpu --shapes attention --m 1 8 64 --dtype float32

One process; weights cold; a read loop beside each product. Prints tables of times and ratios and
writes out/<cpu>-<threads>.json and .png. Takes the options of benchmarks.bench_linear.
"""

import sys
from pathlib import Path

import torch

from benchmarks import bench_linear
from benchmarks.machine import slug
from benchmarks.parts import ROOT
from benchmarks.plot import plot
from benchmarks.results import Results
from benchmarks.shapes import M_ALL


def main(argv: list[str]) -> int:
    given = bench_linear.make_parser("benchmarks.cpu", __doc__).parse_args(argv)
    device = torch.device("cpu")
    threads = given.threads or torch.get_num_threads()
    path: Path = given.json or ROOT / "out" / f"{slug(device)}-{threads}.json"
    arguments = [*argv, "--device", "cpu", "--json", str(path)]
    if not given.dtype:
        arguments += ["--dtype", "bfloat16", "float32"]
    if not given.m and not given.tiny:
        arguments += ["--m", *map(str, M_ALL)]
    status = bench_linear.main(arguments)
    plot(Results.read(path), path.with_suffix(".png"))
    print(f"Written to {path.name} and {path.with_suffix('.png').name} in {path.parent.name}/")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
