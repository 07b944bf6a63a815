"""Everything that only a GPU can show, in one command that ends within nine minutes.

    python -m benchmarks.gpu                          # what `make gpu` runs
    python -m benchmarks.gpu --only build tests       # some parts
    python -m benchmarks.gpu --device cpu --tiny      # dry run: what of it a CPU can run

Needs a GPU and its Python packages, and no network: it installs this package and nothing else.
Each part is a process of its own with a time limit, so one that fails or hangs costs the others
nothing; what it had measured by then is kept. Prints tables and writes <gpu>.json and, where
matplotlib is installed, <gpu>-*.png into benchmarks/results (a dry run: into out).
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

from benchmarks.parts import ROOT, Step, run_steps
from benchmarks.results import Results

MINUTES = 9.0
# Of the nine minutes, kept back for starting, for the summary, and for a part slow to die.
MARGIN_S = 20.0
# A file of tests that lacks a package here is no reason to run none of the others.
GO_ON = "--continue-on-collection-errors"
ROWS = "1 2 4 8 16 32 64 128 256 512 1024 2048 4096"


def steps(device: str, tiny: bool) -> list[Step]:
    """In order of worth: where time runs out, the last are cut.

    The limits are estimates for a machine with 16 cores, from what stands beside each; none was
    timed on a GPU. A benchmark stops by itself when three quarters of its limit are over.
    """
    at = f"--device {device}" + (" --tiny" if tiny else "")
    products = f"benchmarks.ops {at} --backend auto cuda triton slabs"
    tests = "tests/test_static_cache.py" if tiny else "tests"
    several = not tiny and importlib.util.find_spec("xdist") is not None
    workers = f"-n {min(12, os.cpu_count() or 1)}" if several else ""
    return [
        # nvcc takes 9 s for the largest file and one GPU, g++ 25 s, on one core; all at once.
        Step("build", _build(tiny), 60, 15),
        _backends(device),
        _benchmark("ceilings", f"benchmarks.ceilings {at}", 15),
        # Imports, some hundred tests, and about a second for each of some 600 kernels in Triton.
        Step("tests", _module(f"pytest {tests} {workers} {GO_ON} --device {device}"), 120, 30),
        # nvcc again, then some ten tiny products in each of two tools.
        Step("sanitizer", _module("benchmarks.sanitizer"), 45, 15),
        # 104 cases of eight systems: nine samples of 5 ms each, and half a second to compile.
        _benchmark(
            "linear",
            f"{products} --op linear --dtype float16 bfloat16" + ("" if tiny else f" --m {ROWS}"),
            80,
        ),
        # 16 such cases.
        _benchmark(
            "gradient",
            f"{products} --op linear_grad_input" + ("" if tiny else " --m 1 64 512 4096"),
            20,
        ),
        _benchmark("weights", f"benchmarks.ops {at} --op quantize fit dequantize embedding", 15),
        _benchmark("adam", f"benchmarks.ops {at} --op adam_step_ --dtype float32 bfloat16", 15),
        # For each of two systems 8 s of imports and 28 layers made; 64 tokens, of 20 ms at most.
        _benchmark("decode", f"benchmarks.full_size {at}", 35),
        # As many imports; 4 steps of 4 times 2048 tokens' products, half a second each.
        _benchmark("finetune", f"benchmarks.lora_step {at}", 35),
        # 28 layers through PyTorch's compiler.
        _benchmark("compiled", f"benchmarks.full_size {at} --systems compiled", 40),
        _tune(device),
    ]


def main(argv: list[str]) -> int:
    start = time.monotonic()
    options = _parse(argv)
    try:
        import torch
    except ImportError:
        print(
            f"make gpu: {sys.executable} has no PyTorch; name a Python that has one for this GPU "
            "with `make gpu PYTHON=...`",
            file=sys.stderr,
        )
        return 2
    from benchmarks.machine import new_results, slug
    from benchmarks.report import print_parts, print_results

    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print(
            f"make gpu: PyTorch {torch.__version__} sees no GPU here; run it on a machine with "
            "one, or try the parts with `python -m benchmarks.gpu --device cpu --tiny`.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    out = options.out or ROOT / ("benchmarks/results" if on_gpu and not options.tiny else "out")
    path = out / f"{slug(device)}.json"
    results = new_results(device, "benchmarks.gpu", argv)
    chosen = [
        step
        for step in steps(options.device, options.tiny)
        if step.name in (options.only or PARTS) and step.name not in options.skip
    ]
    run_steps(chosen, results, path, start + 60 * options.minutes - MARGIN_S)
    print_results(results)
    print_parts(results)
    print(f"Written to {os.path.relpath(path)}{_plot(results, path)}")
    return 1 if any(part.status == "failed" for part in results.parts) else 0


def _plot(results: Results, path: Path) -> str:
    """Draws what can be drawn; what to add to the last line."""
    from benchmarks.plots import draw_all

    try:
        drawn = draw_all(results, path.parent, path.stem)
    except Exception as error:  # a figure is no reason to lose the numbers
        return f"; no figure: {error}"
    return "".join(f", {each.name}" for each in drawn)


def _build(tiny: bool) -> tuple[str, ...]:
    """A dry run compiles in place and leaves the Python that runs it as it is."""
    if tiny:
        return ("setup.py", "build_ext", "--inplace")
    return _module("pip install --verbose --no-build-isolation --no-deps --no-index --editable .")


def _backends(device: str) -> Step:
    """Fails where one for this GPU cannot be used: its tests and benchmarks would be skipped."""
    if device == "cpu":
        return Step("backends", (), 0, 0, skip="are those of a GPU")
    code = (
        "import sys; from gptj_q8.backends import unavailable as why; "
        "sys.exit('; '.join(f'{b}: {why(b)}' for b in ('cuda', 'triton') if why(b)) or None)"
    )
    return Step("backends", ("-c", code), 20, 5)


def _tune(device: str) -> Step:
    if device == "cpu":
        return Step("tune", (), 0, 0, skip="finds the fastest tiles of Triton's kernels on a GPU")
    return Step("tune", _module("gptj_q8 tune --seconds 12"), 20, 10)


def _benchmark(name: str, module: str, limit_s: int) -> Step:
    """It stops by itself a little before it would be killed."""
    command = _module(f"{module} --seconds {limit_s * 3 // 4}")
    return Step(name, command, limit_s, least_s=limit_s / 4, measures=True)


def _module(arguments: str) -> tuple[str, ...]:
    return ("-m", *arguments.split())


PARTS = [step.name for step in steps("cuda", tiny=False)]


def _parse(argv: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--tiny", action="store_true", help="tiny shapes and models, a few tests")
    made.add_argument("--only", nargs="+", choices=PARTS, help="run these parts alone")
    made.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="leave these parts out")
    made.add_argument("--minutes", type=float, default=MINUTES, help="the whole may take")
    made.add_argument("--out", type=Path, help="folder of the JSON, benchmarks/results on a GPU")
    return made.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
