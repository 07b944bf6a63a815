"""`gptj-q8 tune`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from gptj_q8.cli import load, options
from gptj_q8.cli.errors import CliError
from gptj_q8.cli.screen import open_screen


def tune_command(
    dtype: Annotated[
        Literal["float16", "bfloat16"],
        typer.Option(metavar="DTYPE", help="Arithmetic to tune for: float16 or bfloat16."),
    ] = "float16",
    device: options.Device = "auto",
    seconds: Annotated[
        float,
        typer.Option(metavar="S", min=0, help="Try no further tiles after so long."),
    ] = float("inf"),
    json: options.AsJson = False,
) -> None:
    """Find the fastest tiles of the Triton kernels on this GPU, and use them from now on.

    Takes some minutes, most of them for compiling. The winners are stored for this GPU's name in
    your cache directory; delete that file to have the built-in tiles again.
    """
    with open_screen(json) as screen:
        import torch

        from gptj_q8 import backends
        from gptj_q8.tune import tune

        on = load.device(device)
        reason = backends.unavailable("triton")
        if reason or on.type == "cpu":
            raise CliError(f"tune needs a GPU: {reason or 'the device is cpu'}")
        path = tune(on, dtype=getattr(torch, dtype), say=screen.note, seconds=seconds)
        screen.say(f"Stored in {path}")
        screen.result({"device": str(on), "dtype": dtype, "file": str(path)})
