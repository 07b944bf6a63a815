"""Everything that only a GPU can show, in one command that ends within nine minutes.

    python -m benchmarks.gpu                          # what `make gpu` runs
    python -m benchmarks.gpu --only build tests       # some parts
    python -m benchmarks.gpu --device cpu             # dry run: the same steps, tiny, on the CPU

Needs a GPU and its Python packages, and no network: it installs this package and nothing else.
Each part is a process of its own with a time limit, so one that fails or hangs costs the others
nothing; what it had measured by then is kept. Results go to benchmarks/results/<gpu>.json.
"""

import argparse
import os
import sys
import time
from pathlib import Path

try:
    import torch
except ImportError:
    sys.exit(
        f"make gpu: {sys.executable} has no PyTorch; name a Python that has one for this GPU "
        "with `make gpu PYTHON=...`"
    )

from benchmarks.machine import new_results, slug
from benchmarks.parts import ROOT, Step, run_steps
from benchmarks.report import print_parts, print_results

MINUTES = 9.0
# Of the nine minutes, kept back for starting, for the summary, and for a part slow to die.
MARGIN_S = 20.0


def steps(device: str) -> list[Step]:
    """In order of worth: where time runs out, the last are cut."""
    at = f"--device {device}" + (" --tiny" if device == "cpu" else "")
    return [
        _step("build", "pip install --no-build-isolation --no-deps --no-index --editable .", 130),
        _step("ceilings", f"benchmarks.ceilings {at}", 30),
        _step("tests", f"pytest tests -p no:cacheprovider --device {device}", 180),
        _step("linear", f"benchmarks.bench_linear {at} --dtype float16 bfloat16", 80),
        _step("gradient", f"benchmarks.bench_linear {at} --op linear_grad_input", 40),
        _step("weights", f"benchmarks.bench_weights {at}", 30),
        _step("adam", f"benchmarks.bench_adam {at} --dtype float32 bfloat16", 30),
    ]


def main(argv: list[str]) -> int:
    start = time.monotonic()
    options = _parse(argv)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print(
            f"make gpu: PyTorch {torch.__version__} sees no GPU here; run it on a machine with "
            "one, or try the steps with `python -m benchmarks.gpu --device cpu`.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    out = options.out or ROOT / ("benchmarks/results" if on_gpu else "out")
    path = out / f"{slug(device)}.json"
    results = new_results(device, "benchmarks.gpu", argv)
    chosen = [s for s in steps(options.device) if not options.only or s.name in options.only]
    run_steps(chosen, results, path, start + 60 * options.minutes - MARGIN_S)
    print_results(results)
    print_parts(results)
    print(f"Written to {os.path.relpath(path)}")
    return 1 if any(part.status == "failed" for part in results.parts) else 0


def _step(name: str, module: str, limit_s: int) -> Step:
    """`python -m module`; a benchmark stops by itself a little before it would be killed."""
    command = ("-m", *module.split())
    measures = module.startswith("benchmarks.")
    if measures:
        command += ("--seconds", str(limit_s * 3 // 4))
    return Step(name, command, limit_s, least_s=limit_s / 4, measures=measures)


def _parse(argv: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [step.name for step in steps("cuda")]
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--only", nargs="+", choices=names, help="run these parts alone")
    made.add_argument("--minutes", type=float, default=MINUTES, help="the whole may take")
    made.add_argument("--out", type=Path, help="folder of the JSON, benchmarks/results on a GPU")
    return made.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
