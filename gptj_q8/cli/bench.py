"""`gptj-q8 bench`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import gptj_q8
from gptj_q8.cli import load, options
from gptj_q8.cli.errors import CliError
from gptj_q8.cli.screen import open_screen


def bench_command(
    device: options.Device = "auto",
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny", metavar="", help="Only try the command, on matrices too small to tell."
        ),
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Time the kernels on this machine beside PyTorch in 16 bits and bitsandbytes.

    Takes one to three minutes. Numbers are checked first: what computes wrongly gets no time.
    """
    with open_screen(json) as screen:
        load.quieten()
        on = load.device(device)
        quick = _benchmarks("quick")
        with screen.progress("Starting ...") as update:
            results = quick.measure(on, lambda label, done, of: update(done, of, label), tiny)
        machine = results.machine
        screen.say(f"{machine.gpu or machine.cpu}, {machine.threads} CPU threads", style="bold")
        screen.prose(
            "Weights come from memory, not from the cache. How many times as fast gptj_q8 is as:"
        )
        screen.say()
        lines = list(quick.compared(results, tiny))
        sixteen = "float16" if on.type == "cuda" else "bfloat16"
        screen.table(
            ("", "gptj_q8", sixteen, "bitsandbytes", "its LLM.int8"),
            [
                (
                    line.what,
                    _duration(line.seconds),
                    *map(_times, (line.over_16_bits, line.over_bitsandbytes, line.over_int8)),
                )
                for line in lines
            ],
        )
        screen.say()
        screen.prose(
            f"{sixteen} is PyTorch on the float weights (for AdamW, PyTorch's in float32);"
            " bitsandbytes decodes its blocks and multiplies, or is its AdamW8bit; LLM.int8 is its"
            " Linear8bitLt. A weight takes 8.125 bits here, 16 there."
        )
        if machine.busy:
            screen.note(
                f"The machine was busy (load {machine.load_average:.1f} on {machine.cores} cores):"
                " run this again when it is not."
            )
        for reason, what in {note.reason: note.what for note in results.skipped}.items():
            screen.note(f"Left out: {what}: {reason}")
        for note in results.failed:
            screen.say(f"WRONG: {note.what}: {note.reason}", style="bold red")
        screen.result(
            {
                "lines": [dataclasses.asdict(line) for line in lines],
                "results": dataclasses.asdict(results),
            }
        )
    if results.failed:
        raise typer.Exit(1)


def _benchmarks(module: str) -> Any:
    """A module of `benchmarks`: the clone's folder beside this package, or its copy in a wheel."""
    package = Path(gptj_q8.__file__).parent
    if "benchmarks" not in sys.modules:
        for folder in (package.parent / "benchmarks", package / "_benchmarks"):
            if (folder / "registry.py").exists():
                spec = importlib.util.spec_from_file_location(
                    "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
                )
                assert spec is not None
                assert spec.loader is not None
                sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules["benchmarks"])
                break
        else:
            raise CliError("bench: this installation has no benchmarks; install from the clone")
    return importlib.import_module(f"benchmarks.{module}")


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}x"
