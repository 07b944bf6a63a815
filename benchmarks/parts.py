"""Runs steps as processes under time limits and one budget, and collects what they measured."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.results import Part, Results

ROOT = Path(__file__).resolve().parent.parent
# Nothing may wait for the network or for an answer.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PYTHONUNBUFFERED": "1",
}
# Seconds that a process over its limit gets: pytest, to tell what has failed so far, then any to
# clean up before it is killed.
GRACE_S = {signal.SIGINT: 8.0, signal.SIGTERM: 3.0, signal.SIGKILL: 3.0}
NOTE_LENGTH = 160
# A process that cannot do its part here ends with it, and says why in its last line.
SKIPPED = 77


@dataclass(frozen=True)
class Step:
    """A part of a run.

    command: arguments for Python; exit status SKIPPED means that it cannot run here.
    limit_s: seconds it may take; least_s: it is not begun with fewer left.
    measures: it takes --json FILE and leaves results there.
    skip: why it is known not to run here, if it is.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float
    measures: bool = False
    skip: str = ""


def run_steps(steps: list[Step], results: Results, path: Path, deadline: float) -> None:
    """Runs the steps into `results`, written to `path` after each. deadline: of time.monotonic."""
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            measured = Path(folder) / f"{step.name}.json"
            part = _run_step(step, measured, deadline - time.monotonic())
            results.parts.append(part)
            if measured.exists():  # also where the step failed later
                try:
                    results.extend(Results.read(measured))
                except ValueError as error:
                    part.status, part.note = "failed", f"its results are wrong: {error}"
            results.write(path)


def _run_step(step: Step, measured: Path, left_s: float) -> Part:
    print(f"\n== {step.name} ==", flush=True)
    note = step.skip
    if left_s < step.least_s:
        note = f"wants {step.least_s:.0f} s, {max(left_s, 0):.0f} s were left"
    if note:
        print(f"skipped: {note}", flush=True)
        return Part(step.name, "skipped", 0.0, note)
    command = [sys.executable, *step.command]
    command += ["--json", str(measured)] if step.measures else []
    limit = min(step.limit_s, left_s)
    begun = time.monotonic()
    status, last_line = _run_process(command, limit)
    seconds = time.monotonic() - begun
    if status is None:
        return Part(step.name, "failed", seconds, f"stopped after {limit:.0f} s; {last_line}")
    if status == SKIPPED:
        return Part(step.name, "skipped", seconds, last_line)
    if status:
        return Part(step.name, "failed", seconds, f"exit status {status}; {last_line}")
    return Part(step.name, "passed", seconds, "" if step.measures else last_line)


def _run_process(command: list[str], limit_s: float) -> tuple[int | None, str]:
    """Its exit status and the last line it printed; over the limit None, and the last by then."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its children end with it
    )
    last = [""]
    assert process.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(process.stdout, last), daemon=True)
    reader.start()
    by_then = None
    try:
        status: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        status, by_then = None, last[0]
    finally:  # an interrupt from the keyboard does not reach another process group
        _end_group(process)
    reader.join(GRACE_S[signal.SIGKILL])
    return status, last[0] if by_then is None else by_then


def _pass_on(stream: IO[str], last: list[str]) -> None:
    """Prints every line, and keeps the last one that says something, without folders."""
    for line in stream:
        print(line, end="", flush=True)
        if words := line.strip(" =\n"):
            last[0] = re.sub(r"(/[^/\s:]+)+/", "", words)[:NOTE_LENGTH]


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ends the process, if it still runs, and whatever it left running."""
    for end, grace in GRACE_S.items():
        try:
            os.killpg(process.pid, end)
            process.wait(grace)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
