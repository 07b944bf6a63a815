"""The command line `gptj-q8`: parses, calls, prints. One file per command."""

from __future__ import annotations

from typing import Annotated

import typer

import gptj_q8
from gptj_q8.cli.bench import bench_command
from gptj_q8.cli.convert import convert_command
from gptj_q8.cli.demo import demo_command
from gptj_q8.cli.doctor import doctor_command
from gptj_q8.cli.errors import Settings, guarded
from gptj_q8.cli.evaluate import evaluate_command
from gptj_q8.cli.finetune import finetune_command
from gptj_q8.cli.generate import generate_command
from gptj_q8.cli.memory import memory_command
from gptj_q8.cli.merge import merge_command
from gptj_q8.cli.tune import tune_command

app = typer.Typer(
    name="gptj-q8",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(guarded(demo_command))
app.command("convert")(guarded(convert_command))
app.command("generate")(guarded(generate_command))
app.command("evaluate")(guarded(evaluate_command))
app.command("finetune")(guarded(finetune_command))
app.command("memory")(guarded(memory_command))
app.command("merge")(guarded(merge_command))
app.command("doctor")(guarded(doctor_command))
app.command("bench")(guarded(bench_command))
app.command("tune")(guarded(tune_command))


def _show_version(asked: bool) -> None:
    if asked:
        # Read from metadata: importing these packages would take seconds.
        from importlib.metadata import PackageNotFoundError, version

        typer.echo(f"gptj_q8 {gptj_q8.__version__}")
        for name in ("torch", "transformers"):
            try:
                typer.echo(f"{name} {version(name)}")
            except PackageNotFoundError:
                typer.echo(f"{name} not installed")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show the whole trace of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            help="Print the versions and exit.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """GPT-J in 8 bits: convert a model, measure what that costs, generate text, fine-tune it.

    Start with `gptj-q8 demo`, which shows all of it on a small model in two minutes.
    """
    Settings.debug = debug


def main() -> None:
    """Runs the command line."""
    app(prog_name="gptj-q8")
