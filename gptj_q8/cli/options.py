"""Arguments and options that several commands share, each worded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a Hugging Face id, or `demo`: the small Spanish GPT-J that comes along.",
        show_default=False,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", metavar="", help="Print one JSON object, and nothing else, on stdout."),
]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="`cpu`, `cuda`, ...; `auto` takes a GPU if it can.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Take the tokenizer from elsewhere.", show_default="MODEL's own"
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Add the adapter in this folder to MODEL.", show_default=False
    ),
]
