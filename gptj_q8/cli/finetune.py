"""`gptj-q8 finetune`."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_q8.cli import load, options
from gptj_q8.cli.errors import INTERRUPTED
from gptj_q8.cli.screen import Screen, open_screen
from gptj_q8.train.listener import Listener
from gptj_q8.train.settings import Settings

if TYPE_CHECKING:
    from gptj_q8.train.report import Report

_USUAL = Settings()
_LINES = 20  # of progress, where no bar can be shown
FEW_STEPS = 50  # below which adapters at the usual learning rate hardly move a model


def finetune_command(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="A file of plain text; `.jsonl` with `text`, or with `prompt` and `completion` "
            "(only the completion is learned); a folder of both; the name of a Hugging Face "
            "dataset; or `demo`: Spanish proverbs that come along.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="The run's folder.", show_default=False),
    ],
    rank: Annotated[int, typer.Option(metavar="R", help="Rank of the adapters.")] = _USUAL.rank,
    alpha: Annotated[
        float, typer.Option(metavar="A", help="They are scaled by A / R.")
    ] = _USUAL.alpha,
    dropout: Annotated[
        float, typer.Option(metavar="P", help="Dropout on their input.")
    ] = _USUAL.dropout,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A module to adapt, such as `q_proj`; may be repeated.",
            show_default="all matrices of all blocks",
        ),
    ] = None,
    train_1d: Annotated[
        bool, typer.Option("--train-1d", metavar="", help="Train biases and norms, too.")
    ] = False,
    learning_rate: Annotated[
        float,
        typer.Option("--learning-rate", "--lr", metavar="LR", help="At its peak."),
    ] = _USUAL.learning_rate,
    epochs: Annotated[
        float, typer.Option(metavar="N", help="How often to read the data.")
    ] = _USUAL.epochs,
    max_steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Stop after so many steps.", show_default="all epochs"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Sequences in a step.")
    ] = _USUAL.batch_size,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens in a sequence.", show_default="MODEL's context, up to 2048"
        ),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Share of the data that only measures; 0 for none."),
    ] = _USUAL.held_out,
    save_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps from one checkpoint to the next.",
            show_default="a tenth of the run",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Continue this before and after; may be repeated. With --resume: as at the start.",
            show_default="from held-out text",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed, the same run.")] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume", metavar="", help="Go on with the run in DIR where it was saved."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the run in DIR.")
    ] = False,
    dtype: Annotated[
        options.DtypeName,
        typer.Option(
            metavar="DTYPE",
            help="Arithmetic: float32, bfloat16, float16, or `auto`, what suits the device.",
        ),
    ] = "auto",
    device: options.Device = "auto",
    tokenizer: options.Tokenizer = None,
    json: options.AsJson = False,
) -> None:
    """Teach a model a text: LoRA adapters on frozen 8-bit weights.

    MODEL may be in float; its weights are then quantized as they are read. Ctrl-C saves, and
    --resume goes on from there.

    Example: `gptj-q8 finetune demo --data demo --output out/proverbs --lr 4e-3`
    """
    settings = Settings(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=tuple(target) if target else "all",
        train_1d=train_1d,
        learning_rate=learning_rate,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        held_out=held_out,
        save_every=save_every,
        seed=seed,
    )
    output = output.expanduser()
    with open_screen(json) as screen:
        with screen.working(f"Loading {model} ..."):
            load.quieten()

            from gptj_q8.train import folder
            from gptj_q8.train.device import best_dtype
            from gptj_q8.train.run import finetune

            # What can be refused at once is, before a model is loaded for minutes.
            folder.check(output, resume, overwrite)
            documents = load.documents(data)
            on = load.device(device)
            tokens = load.tokenizer(tokenizer, model)
            chosen = str(best_dtype(on)).removeprefix("torch.") if dtype == "auto" else dtype
            network = load.trainable_model(model, chosen, on)
            load.spare_threads(network)
        with screen.progress("Encoding") as update:
            report = finetune(
                network,
                tokens,
                documents,
                output,
                settings,
                name=model,
                resume=resume,
                overwrite=overwrite,
                prompts=prompt or (),
                listener=ScreenListener(screen, update),
            )
        say_report(screen, report)
        screen.result(
            {"model": model, "data": data, "dtype": chosen, "device": str(on), **asdict(report)}
        )
        if not report.finished:
            words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
            screen.note(
                f"\nStopped after step {report.steps} of {report.of_steps}; saved in "
                f"{report.checkpoint}.\nTo go on: {shlex.join(['gptj-q8', *words, '--resume'])}"
            )
            raise typer.Exit(INTERRUPTED)
        screen.say()
        screen.say("Try it:")
        screen.say()
        words = ["gptj-q8", "generate", model, report.samples[0].prompt]
        words += ["--adapter", report.adapter, *(["--tokenizer", tokenizer] if tokenizer else [])]
        screen.say(f"    {shlex.join(words)}")


class ScreenListener(Listener):
    """Shows how a run goes: a bar where the screen moves, a line now and then where not."""

    def __init__(self, screen: Screen, update: Callable[..., None]) -> None:
        self._screen = screen
        self._update = update
        self._done = (0, 1)
        self._began: tuple[float, int] | None = None

    def stage(self, text: str) -> None:
        self._update(*self._done, text)

    def prepared(self, summary: str) -> None:
        self._screen.note(summary)

    def step(self, step: int, steps: int, loss: float, rate: float, tokens: float) -> None:
        self._done = (step, steps)
        state = f"loss {loss:.3f}, learning rate {rate:.1e}, {tokens:,.0f} tokens/s"
        self._update(step, steps, f"Step {step} of {steps}: {state}")
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step)
        if not self._screen.moves and (step % math.ceil(steps / _LINES) == 0 or step == steps):
            began, first = self._began
            left = ""
            if step > first:
                left = f", {(now - began) / (step - first) * (steps - step):.0f} s left"
            self._screen.note(f"Step {step} of {steps}: {state}{left}")

    def held_out(self, step: int, loss: float) -> None:
        self._screen.note(f"After step {step}: held-out loss {loss:.3f}")

    def stopping(self) -> None:
        self._screen.note(
            "Stopping after this step, with a checkpoint; Ctrl-C again stops at once."
        )


def say_report(screen: Screen, report: Report) -> None:
    """Prints what was trained on what, the losses, and what the model writes before and after."""
    share = 100 * report.trained / report.parameters
    screen.say(
        f"{report.steps} steps in {report.seconds:.0f} s; {report.trained:,} numbers trained, "
        f"{share:.1f} % of the model's; {report.tokens:,} tokens an epoch, in {report.rows:,} "
        "sequences"
    )
    if report.held_out:
        screen.say()
        say_losses(screen, report)
    say_samples(screen, report)
    if report.finished:
        screen.say()
        drawn = f"; {report.plot} shows the run" if report.plot else ""
        screen.say(f"The adapter is in {report.adapter}{drawn}.")
        if not report.plot:
            screen.note("No plot was drawn: it needs matplotlib (pip install gptj_q8[train]).")


def say_losses(screen: Screen, report: Report) -> None:
    """Prints the held-out loss before and after, and what may make it lower."""
    before, after = report.held_out[0][1], report.held_out[-1][1]
    change = 100 * (after / before - 1)
    rows = [
        ("loss, nats a token", f"{before:.3f}", f"{after:.3f}", f"{change:+.1f} %"),
        ("perplexity", f"{math.exp(before):.1f}", f"{math.exp(after):.1f}", ""),
    ]
    screen.table((f"{report.held_out_tokens:,} held-out tokens", "before", "after", ""), rows)
    step, lowest = min(report.held_out, key=lambda point: point[1])
    if report.finished and lowest < 0.999 * after:
        screen.note(
            f"It was lowest, {lowest:.3f}, after step {step} of {report.steps}: fewer steps or a "
            "lower learning rate may do better."
        )
    elif report.finished and report.steps < FEW_STEPS:
        screen.note(
            f"{report.steps} steps are few: more of them (--epochs, or a lower --sequence-length) "
            "or a higher --lr may do better."
        )


def say_samples(screen: Screen, report: Report) -> None:
    """Prints what the model made of each prompt before and after."""
    for sample in report.samples:
        for when, text in (("Before", sample.before), ("After", sample.after)):
            screen.say()
            screen.say(f"{when}:", style="bold")
            screen.say((sample.prompt + text).strip())
