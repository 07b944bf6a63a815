"""`gptj-q8 convert`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_q8.cli import load, options
from gptj_q8.cli.screen import Screen, bytes_text, open_screen

if TYPE_CHECKING:
    from gptj_q8.checkpoint import ConversionReport


def convert_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="The original: a folder, a Hugging Face id, or `demo`.",
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(metavar="DST", help="The folder for the 8-bit copy.", show_default=False),
    ],
    block_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Weights that share a scale: a power of two, 32 to 4096. "
            "Smaller is more exact and takes more room.",
        ),
    ] = 256,
    codebook: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The 256 levels: `fitted` to each weight, `dynamic` as bitsandbytes', or "
            "`linear` as int8's.",
        ),
    ] = "fitted",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Leave modules of this name as they are, such as lm_head; may be repeated.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        options.DtypeName,
        typer.Option(
            metavar="DTYPE",
            help="For what stays float: float32, bfloat16, float16, or `auto`, as it was.",
        ),
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Begin a new file after this much.")
    ] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace DST if it is there.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Write an 8-bit copy of a model.

    The weights pass through memory one at a time, so a model larger than memory converts too.

    Example: `gptj-q8 convert EleutherAI/gpt-j-6b out/gpt-j-8bit`
    """
    with open_screen(json) as screen:
        started = time.perf_counter()
        with screen.working("Starting ..."):
            load.quieten()
            import torch

            from gptj_q8.checkpoint import ADAPTER, convert_checkpoint
            from gptj_q8.config import Q8Config

            config = Q8Config(block_size, codebook, keep or None)
        with screen.progress(f"Converting {source}") as on_progress:
            report = convert_checkpoint(
                load.model_path(source),
                destination,
                config,
                dtype=None if dtype == "auto" else getattr(torch, dtype),
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                on_progress=on_progress,
            )
        seconds = time.perf_counter() - started
        say_report(screen, report)
        if report.adapters:
            screen.say()
            place = destination / ADAPTER
            screen.say(f"Its adapters are in {place}: generate and evaluate take them by --adapter")
        screen.say()
        screen.say(f"Saved in {destination} after {seconds:.1f} s.")
        screen.result(
            {
                "source": source,
                "destination": str(destination),
                "seconds": seconds,
                **asdict(report),
            }
        )


def say_report(screen: Screen, report: ConversionReport) -> None:
    """Prints the sizes before and after, and the error of each kind of layer."""
    share = report.bytes_after / report.bytes_before
    screen.say(
        f"{bytes_text(report.bytes_before)} before, {bytes_text(report.bytes_after)} after "
        f"({100 * share:.0f} %), {report.bits_per_weight:.2f} bits per weight"
    )
    screen.say()
    if report.rewritten:
        screen.say("Its 8-bit weights were kept.")
    rows = [
        (
            layer.kind,
            str(layer.tensors),
            f"{layer.weights:,}",
            "none new" if report.rewritten else f"{100 * layer.relative_rmse:.3f} %",
        )
        for layer in report.layers
    ]
    screen.table(("layer", "tensors", "weights", "error (RMS)"), rows)
    if report.kept:
        screen.say()
        screen.say(f"Left as they were: {', '.join(report.kept)}")
