"""Turns what users can cause into one sentence and an exit code, and leaves bugs their trace."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# Named, not imported: importing torch or safetensors here would slow `--help` down.
EXPECTED_NAMES = {
    "DtypeError",
    "OutOfMemoryError",
    "SafetensorError",
    "StrictDataclassFieldValidationError",  # Transformers, of a config.json
}


class CliError(Exception):
    """An expected failure; its text is what the user reads."""


class Settings:
    """Set by the options before the command's name."""

    debug = False


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command so that expected errors end it with exit code 1 and Ctrl-C with 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            print("\nStopped.", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader (`| head`) has gone. Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if Settings.debug or not is_expected(error):
                raise
            print(f"gptj-q8: {sentence(error)}", file=sys.stderr)
            raise typer.Exit(1) from None

    return run


def is_expected(error: Exception) -> bool:
    """Whether a user's input, disk or memory explains the error, rather than a bug."""
    if isinstance(error, CliError | OSError | ValueError | MemoryError):
        return True
    if type(error) is RuntimeError and "can't allocate memory" in str(error):  # PyTorch's, on a CPU
        return True
    return type(error).__name__ in EXPECTED_NAMES


def sentence(error: Exception) -> str:
    """The first line of what an error says; Transformers' run over many."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if len(lines) > 1:
        return f"{lines[0]} (more with `gptj-q8 --debug ...`)"
    return lines[0]
