"""The most memory that a process holds: anonymous memory (RssAnon, polled), or a GPU's.

Pages of mapped files are no anonymous memory: the kernel takes them back when it needs to.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

# A reading takes 0.1 ms. Tensors of GPT-J's size live for a second.
WATCH_S = 0.002


def anonymous_memory(process: int | str = "self") -> int:
    """Bytes of anonymous memory of a process; 0 once it is gone, or where nobody counts."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """The most bytes held inside: of anonymous memory, or of what PyTorch allocated on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    with peak_anonymous_memory() as peak:
        yield peak


@contextmanager
def peak_anonymous_memory(every_s: float = 0.02) -> Iterator[Callable[[], int]]:
    """The most bytes of anonymous memory that this process held inside."""
    peak, stop = [anonymous_memory()], threading.Event()

    def poll() -> None:
        while not stop.wait(every_s):
            peak[0] = max(peak[0], anonymous_memory())

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield lambda: peak[0]
    finally:
        stop.set()
        thread.join()


class Watched(NamedTuple):
    """What a process printed last, as JSON; how long it ran after its imports; its anonymous memory
    in bytes, at most and after its imports."""

    answer: Any
    seconds: float
    peak: int
    imports: int


def watch(code: str, *arguments: Path) -> Watched:
    """Runs code in a process of its own and watches its memory.

    code: imports all that it needs, prints "ready", and waits for a line; then works, and prints
    its answer as JSON. RuntimeError where it fails.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ready = process.stdout.readline()
        if ready != "ready\n":
            raise RuntimeError(f"watch: the process did not start, it said {ready!r}")
        imports = peak = anonymous_memory(process.pid)
        start = time.perf_counter()
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(WATCH_S)
        seconds = time.perf_counter() - start
        answer = process.stdout.read()
    if process.returncode != 0:
        raise RuntimeError(f"watch: exit status {process.returncode} of {code.strip()}")
    return Watched(json.loads(answer.splitlines()[-1]), seconds, peak, imports)
