"""Command-line options that every benchmark shares."""

import argparse
from pathlib import Path

import torch

from benchmarks.harness import Bench, Selection
from benchmarks.machine import new_results
from benchmarks.shapes import M_SHORT, SHAPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the module's docstring and knows what benchmarks of any device do."""
    made = cpu_parser(module, doc)
    made.add_argument(
        "--device",
        type=_device,
        default=_device("cuda" if torch.cuda.is_available() else "cpu"),
        help="cpu or cuda; a GPU if there is one",
    )
    made.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="start no further case after so many seconds",
    )
    return made


def cpu_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """The same for a benchmark that runs on the CPU, to its end, on some number of threads."""
    made = bare_parser(module, doc)
    made.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice unless given")
    return made


def bare_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """The same without --threads, for one that counts, or whose work is done in other processes."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--tiny", action="store_true", help="dry run on tiny shapes: checks, no news")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return made


def add_system_options(made: argparse.ArgumentParser) -> None:
    """--shapes, --m, --dtype, --systems, and for ours --backend, --codebook, --block-size."""
    made.add_argument("--shapes", nargs="+", choices=SHAPES, help="the op's own unless given")
    made.add_argument("--m", nargs="+", type=int, help=f"rows of x, tokens; {M_SHORT} unless given")
    made.add_argument(
        "--systems", nargs="+", metavar="NAME", help="only these, by name or its first word"
    )
    made.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help="of the activations; float16 on a GPU, bfloat16 on a CPU",
    )
    made.add_argument("--block-size", nargs="+", type=int, default=[256])
    made.add_argument("--codebook", nargs="+", default=["fitted"])
    made.add_argument(
        "--backend",
        nargs="+",
        default=["auto"],
        help="backends of ours to time side by side; auto is what the dispatch table picks",
    )


def set_threads(options: argparse.Namespace) -> None:
    if options.threads or options.tiny:
        # A tiny product on two threads is a wait for the second one, long on a busy machine.
        torch.set_num_threads(options.threads or 1)


def make_bench(module: str, options: argparse.Namespace, argv: list[str]) -> Bench:
    set_threads(options)
    results = new_results(options.device, module, argv)
    return Bench(
        device=options.device,
        results=results,
        json=options.json,
        seconds=options.seconds,
        only=options.systems,
        dry=options.tiny,
    )


def selection(options: argparse.Namespace) -> Selection:
    default = ["float16" if options.device.type == "cuda" else "bfloat16"]
    return Selection(
        device=options.device,
        dtypes=tuple(DTYPES[name] for name in options.dtype or default),
        shapes=tuple(options.shapes) if options.shapes else None,
        m=tuple(options.m) if options.m else None,
        formats=tuple((book, size) for book in options.codebook for size in options.block_size),
        backends=tuple(options.backend),
        tiny=options.tiny,
    )


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"PyTorch {torch.__version__} sees no GPU here")
    # An index, since two devices "cuda" and "cuda:0" do not compare equal.
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
