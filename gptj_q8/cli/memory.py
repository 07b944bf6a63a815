"""`gptj-q8 memory`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

import typer

from gptj_q8.cli import load, options
from gptj_q8.cli.screen import bytes_text, open_screen

FULL_SIZE = "gpt-j-6b"
GB = 10**9
LONGEST = 2048  # GPT-J's context


def memory_command(
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="`gpt-j-6b`, or a folder or id with a config.json."),
    ] = FULL_SIZE,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Length of a sequence.",
            show_default="MODEL's context, up to 2048",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at once.")] = 1,
    rank: Annotated[int, typer.Option(min=1, metavar="R", help="Rank of the adapters.")] = 16,
    device_memory: Annotated[
        float,
        typer.Option(min=0.1, max=1e6, metavar="GB", help="What the device has, in 10^9 bytes."),
    ] = 8.0,
    device: Annotated[
        Literal["cuda", "cpu"],
        typer.Option(metavar="DEVICE", help="Whose libraries to count: `cuda` or `cpu`."),
    ] = "cuda",
    json: options.AsJson = False,
) -> None:
    """Tell what fine-tuning takes of memory, part by part, and whether it fits.

    Example: `gptj-q8 memory --tokens 2048 --device-memory 8`
    """
    with open_screen(json) as screen:
        with screen.working("Counting ..."):
            load.quieten()
            from gptj_q8.memory import Setting, estimate

            config = _config(model)
            tokens = tokens or min(getattr(config, "n_positions", LONGEST), LONGEST)
            setting = Setting(tokens=tokens, batch=batch, rank=rank, device=device)
            found = estimate(config, setting)
        room = round(device_memory * GB)
        fits = found.total <= room
        place = "a GPU (--device cpu: on a CPU)" if device == "cuda" else "a CPU"
        screen.heading(f"{model}: {batch} x {tokens} tokens, rank {rank}, on {place}")
        parts = [
            *((name, size, "all the time") for name, size in found.standing.items()),
            *((name, size, "in passing") for name, size in found.passing.items()),
        ]
        screen.table(
            ("part", "there", "size"),
            [(name, when, bytes_text(size)) for name, size, when in parts],
            text_columns=2,
        )
        screen.heading("At its fullest")
        screen.table(
            ("during", "in use"), [(name, bytes_text(size)) for name, size in found.moments.items()]
        )
        screen.heading("Other lengths")
        lengths = _lengths(config.n_positions)
        rows = []
        for n in lengths:
            sizes = [
                estimate(config, replace(setting, tokens=n, checkpointing=again)).total
                for again in (True, False)
            ]
            rows.append(
                (str(n), *(f"{bytes_text(s)}, {_verdict(s, room)}" for s in sizes)),
            )
        screen.table(("tokens", "in use", "if no activation is computed again"), rows)
        difference = bytes_text(abs(room - found.total))
        screen.say()
        screen.say(
            f"Fits: {bytes_text(found.total)} of {bytes_text(room)}, {difference} to spare."
            if fits
            else f"Too much: {bytes_text(found.total)}, {difference} more than {bytes_text(room)}.",
            "bold green" if fits else "bold red",
        )
        if device == "cuda":
            screen.note("Not yet compared with a run on a GPU.")
        screen.result(
            {
                "model": model,
                **asdict(setting),
                **asdict(found),
                "total": found.total,
                "device_memory": room,
                "fits": fits,
            }
        )


def _config(name: str) -> Any:
    from transformers import GPTJConfig

    if name == FULL_SIZE:
        return GPTJConfig()  # whose defaults are those of EleutherAI/gpt-j-6b
    return load.config(name)


def _verdict(size: int, room: int) -> str:
    return "fits" if size <= room else "too much"


def _lengths(context: int) -> list[int]:
    return [context // part for part in (8, 4, 2, 1) if context // part]
