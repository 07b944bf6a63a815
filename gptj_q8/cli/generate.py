"""`gptj-q8 generate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from gptj_q8.cli import load, options
from gptj_q8.cli.screen import open_screen


def generate_command(
    model: options.Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue.", show_default=False)
    ],
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", "-n", min=1, metavar="N", help="Stop after so many tokens."
        ),
    ] = 100,
    greedy: Annotated[
        bool,
        typer.Option("--greedy", metavar="", help="Take the likeliest token each time."),
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, metavar="T", help="Below 1 safer, above 1 wilder, 0 as --greedy."),
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1.0,
            metavar="P",
            help="Choose among the likeliest tokens that have this probability together.",
        ),
    ] = 0.95,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**32 - 1,
            metavar="N",
            help="The same seed, the same text.",
            show_default="a new one",
        ),
    ] = None,
    dtype: Annotated[
        options.DtypeName,
        typer.Option(
            metavar="DTYPE",
            help="Arithmetic: float32, bfloat16, float16, or `auto`, the model's own.",
        ),
    ] = "auto",
    device: options.Device = "auto",
    tokenizer: options.Tokenizer = None,
    adapter: options.Adapter = None,
    json: options.AsJson = False,
) -> None:
    """Continue a text, word by word, and tell how fast that went.

    Example: `gptj-q8 generate demo "En el principio"`
    """
    with open_screen(json) as screen:
        with screen.working(f"Loading {model} ..."):
            load.quieten()
            import torch

            from gptj_q8.generate import generate

            on = load.device(device)
            tokens = load.tokenizer(tokenizer, model)
            network = load.model(model, dtype, on, adapter)
            load.spare_threads(network)
        if seed is None:
            seed = torch.seed() % 2**32
        torch.manual_seed(seed)

        greedy = greedy or temperature == 0
        said = False

        def say(piece: str) -> None:
            # The prompt comes with the first word: until then it may yet be refused.
            nonlocal said
            screen.stream(piece if said else prompt + piece)
            said = True

        made = generate(
            network,
            tokens,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=None if greedy else temperature,
            top_p=top_p,
            on_text=say,
        )
        if not said:
            screen.stream(prompt)
        screen.say()
        speed = made.tokens_per_second
        timing = [
            f"{made.new_tokens} tokens" + (f" at {speed:.1f} tokens/s" if speed else ""),
            f"prompt of {made.prompt_tokens} in {made.prompt_seconds:.2f} s",
        ]
        if not greedy:
            timing.append(f"seed {seed}")
        context = getattr(network.config, "max_position_embeddings", None)
        if made.new_tokens < max_new_tokens and made.prompt_tokens + made.new_tokens == context:
            timing.append(f"the context of {context} tokens is full")
        screen.note("\n" + ", ".join(timing))
        screen.result(
            {
                "model": model,
                "adapter": adapter and str(adapter),
                "prompt": prompt,
                **asdict(made),
                "tokens_per_second": speed,
                "seed": None if greedy else seed,
                "dtype": str(network.dtype).removeprefix("torch."),
                "device": str(on),
            }
        )
