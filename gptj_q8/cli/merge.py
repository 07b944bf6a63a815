"""`gptj-q8 merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gptj_q8.cli import load, options
from gptj_q8.cli.screen import bytes_text, open_screen


def merge_command(
    model: options.Model,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The merged model's folder.", show_default=False
        ),
    ],
    to: Annotated[
        Literal["8bit", "float16", "bfloat16", "float32"],
        typer.Option(metavar="FORM", help="8bit, float16, bfloat16 or float32."),
    ] = "8bit",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace DIR if it is there.")
    ] = False,
    tokenizer: options.Tokenizer = None,
    json: options.AsJson = False,
) -> None:
    """Write MODEL with ADAPTER in its own weights: a model that needs no adapter.

    From an 8-bit MODEL each sum is taken in float32 and rounded once; a float MODEL is summed in
    its own dtype. Memory holds MODEL as it is stored.

    Example: `gptj-q8 merge demo out/proverbs --output out/merged`
    """
    output = output.expanduser()
    with open_screen(json) as screen:
        with screen.working(f"Merging {adapter} into {model} ..."):
            load.quieten()
            import torch

            from gptj_q8.lora import merge

            load.check_adapter(adapter)
            tokens = load.tokenizer(tokenizer) if tokenizer else None
            dtype = None if to == "8bit" else getattr(torch, to)
            merge(load.model_path(model), adapter, output, dtype=dtype, overwrite=overwrite)
            if tokens is not None:
                tokens.save_pretrained(output)
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        screen.say(f"The merged model is in {output}: {to}, {bytes_text(size)}.")
        screen.result(
            {
                "model": model,
                "adapter": str(adapter),
                "output": str(output),
                "form": to,
                "bytes": size,
            }
        )
