"""`gptj-q8 evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_q8.cli import load, options
from gptj_q8.cli.screen import Screen, open_screen, with_error

if TYPE_CHECKING:
    from gptj_q8.evaluate import Divergence


def evaluate_command(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="A UTF-8 file, also .gz, .bz2 or .xz; `-` for stdin; `demo` for the Spanish text "
            "that the demo's model has not seen.",
        ),
    ] = load.DEMO,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL", help="Measure also how far MODEL is from this.", show_default=False
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Tokens seen at once.", show_default="MODEL's, up to 2048"
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens from window to window.", show_default="half a window"
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Stop after so many tokens.", show_default="all"),
    ] = None,
    dtype: Annotated[
        options.DtypeName,
        typer.Option(
            metavar="DTYPE", help="Arithmetic of MODEL: float32, bfloat16, float16, auto."
        ),
    ] = "float32",
    against_dtype: Annotated[
        options.DtypeName, typer.Option(metavar="DTYPE", help="Arithmetic of ORIGINAL.")
    ] = "float32",
    device: options.Device = "auto",
    tokenizer: options.Tokenizer = None,
    adapter: options.Adapter = None,
    json: options.AsJson = False,
) -> None:
    """Measure how well a model predicts a text, and how far it is from its original.

    Perplexity is the effective number of tokens that the model hesitates between: lower is
    better. KL divergence is the information, in nats per token, that the model's predictions
    lose against the original's: 0 is identical.

    Example: `gptj-q8 evaluate out/demo-8bit --against demo`
    """
    with open_screen(json) as screen:
        with screen.working(f"Loading {model} ..."):
            load.quieten()
            from gptj_q8.evaluate import compare, perplexity

            on = load.device(device)
            content = load.text(data)
            tokens = load.tokenizer(tokenizer, model, against)
            ids = load.token_ids(tokens, content, max_tokens)
            network = load.model(model, dtype, on, adapter)
            load.spare_threads(network)
            original = load.model(against, against_dtype, on) if against is not None else None

        about = {
            "model": model,
            "adapter": adapter and str(adapter),
            "data": data,
            "dtype": dtype,
            "device": str(on),
        }
        with screen.progress("Evaluating") as on_progress:
            if original is None:
                alone = perplexity(
                    network, ids, window=window, stride=stride, on_progress=on_progress
                )
            else:
                both = compare(
                    network, original, ids, window=window, stride=stride, on_progress=on_progress
                )
        source = "the demo's unseen text" if load.is_demo(data) else data
        measured = model if adapter is None else f"{model} with {adapter}"
        if original is None:
            screen.say(f"{measured} on {alone.tokens:,} tokens of {source}")
            screen.say()
            screen.say(f"perplexity  {with_error(alone.value, alone.standard_error)}")
            screen.result({**about, "perplexity": asdict(alone)})
        else:
            screen.say(f"{measured} against {against}, on {both.tokens:,} tokens of {source}")
            screen.say()
            _say_divergence(screen, both)
            about |= {"against": str(against), "against_dtype": against_dtype}
            screen.result({**about, **asdict(both)})


def _say_divergence(screen: Screen, found: Divergence) -> None:
    ours, theirs = found.perplexity, found.original_perplexity
    change, change_error = found.perplexity_change, found.perplexity_change_standard_error
    screen.say(f"perplexity         {with_error(ours.value, ours.standard_error)}")
    screen.say(f"  of the original  {with_error(theirs.value, theirs.standard_error)}")
    screen.say(f"  change           {100 * change:+.3f} % ± {100 * change_error:.3f} %")
    screen.say(
        f"KL divergence      {found.kl:.2e} ± {found.kl_standard_error:.0e} nats per token, "
        f"at most {found.kl_max:.2e}"
    )
    screen.say(f"same first choice  {100 * found.top1_agreement:.2f} % of tokens")
