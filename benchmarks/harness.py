"""One case, measured: check every system's numbers, time those that are right, make rows.

A case is an op on a shape. A system is one way to compute it: ours, PyTorch's, a peer's. Files
`bench_<word>.py` make the cases of a selection, each with the makers of its systems;
`registry.py` lists them.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.results import Note, Results, Row
from benchmarks.timing import Call, Timing, clock_for, compare, speedup

OURS = "gptj_q8"  # begins the names of our own systems
DRY_SAMPLE = 1e-6  # seconds


class UnavailableError(Exception):
    """A system cannot run this case; the message says why, in words for the table."""


@dataclass(frozen=True)
class Check:
    """How far a result is from the exact one, relative in norm, and how far it may be."""

    error: float
    bound: float


@dataclass(frozen=True)
class System:
    """One way to compute a case.

    call: computes it once with the index-th copy of the large buffers, index in range(copies).
    bytes: least traffic of one call: weights as this system stores them, inputs and outputs, once.
    check: None where there is no result to check (a plain read).
    """

    call: Call
    copies: int
    bytes: int
    check: Callable[[], Check] | None = None
    block_size: int | None = None
    codebook: str | None = None


# Raises UnavailableError where the system cannot run the case.
Maker = Callable[[], System]


@dataclass(frozen=True)
class Selection:
    """Which cases to make; None is the op's own choice. Cases cost nothing until a maker is called.

    formats: codebook and block size of ours. backends: of ours, side by side; "auto" is what the
    dispatch table picks.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[str, ...] | None = None
    m: tuple[int, ...] | None = None
    formats: tuple[tuple[str, int], ...] = (("fitted", 256),)
    backends: tuple[str, ...] = ("auto",)
    tiny: bool = False

    def named_formats(self) -> list[tuple[str, int, str]]:
        """Codebook, block size, and what to add to a system's name where there are several."""
        several = len(self.formats) > 1
        return [(book, size, f" {book}/{size}" if several else "") for book, size in self.formats]


@dataclass(frozen=True)
class Case:
    """M, N, K as in `y[M, N] = x[M, K] @ w[N, K].T`; M is None for ops on a weight alone."""

    op: str
    shape: str
    m: int | None
    n: int
    k: int
    dtype: torch.dtype
    flops: int
    baseline: str  # name of the system that ratios refer to

    @property
    def label(self) -> str:
        m = "" if self.m is None else f" M={self.m}"
        return f"{self.op} {self.shape}{m} {dtype_name(self.dtype)}"


Cases = Iterator[tuple[Case, Mapping[str, Maker]]]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class Bench:
    """Runs cases on one device and collects what they give."""

    device: torch.device
    results: Results
    json: Path | None = None  # written anew after each case, so that a killed run leaves its rows
    seconds: float = float("inf")  # no case starts later than that
    only: list[str] | None = None  # systems, by name or its first word
    dry: bool = False  # samples too short to mean anything
    say: Callable[[str], None] = _to_stderr  # is told what is being measured
    started: float = field(default_factory=time.monotonic)

    def run(self, case: Case, makers: Mapping[str, Maker]) -> None:
        """Builds, checks and times the systems, and adds their rows to the results."""
        if time.monotonic() - self.started > self.seconds:
            _add(self.results.skipped, Note(case.label, f"{self.seconds:.0f} s were over"))
            return
        wanted = [
            name
            for name in makers
            if not self.only or name in self.only or name.split()[0] in self.only
        ]
        if self.only and not wanted:
            reason = f"no system is named {' or '.join(self.only)}: there are {', '.join(makers)}"
            _add(self.results.skipped, Note(case.op, reason))
            return
        self.say(f"{case.label} ...")
        with torch.no_grad():
            checked = {name: self._checked(case, name, makers[name]) for name in wanted}
            systems = {name: found for name, found in checked.items() if found}
            try:
                timings = compare(
                    {name: system.call for name, (system, _) in systems.items()},
                    copies={name: system.copies for name, (system, _) in systems.items()},
                    clock=clock_for(self.device),
                    least_sample=DRY_SAMPLE if self.dry else None,
                )
            except Exception as error:  # such as memory that ran out: the next case may fit
                _add(self.results.failed, Note(case.label, _first_line(error)))
                return
        self.results.rows += [
            _row(case, name, system, check, timings[name], timings.get(case.baseline))
            for name, (system, check) in systems.items()
        ]
        if self.json:
            self.results.write(self.json)

    def _checked(self, case: Case, name: str, make: Maker) -> tuple[System, Check | None] | None:
        """The system and its check if its numbers are right; else the reason is noted."""
        # A peer that is wrong or broken is left out; ours is a failure of this repository.
        notes = self.results.failed if name.startswith(OURS) else self.results.skipped
        try:
            system = make()
            check = system.check() if system.check else None
        except UnavailableError as error:
            # The same for every shape, so said once.
            _add(self.results.skipped, Note(f"{case.op} {name}", str(error)))
            return None
        except Exception as error:
            # One system's failure, an exhausted memory included, is no reason to lose the others.
            _add(notes, Note(f"{case.label} {name}", _first_line(error)))
            return None
        if check and not check.error <= check.bound:  # so written, a NaN does not pass
            reason = f"wrong result: error {check.error:.2g}, at most {check.bound:.2g} allowed"
            _add(notes, Note(f"{case.label} {name}", reason))
            return None
        return system, check


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """|got - exact| / |exact| in float64."""
    exact = exact.double()
    return float((got.double() - exact).norm() / exact.norm())


def _row(
    case: Case,
    name: str,
    system: System,
    check: Check | None,
    timing: Timing,
    baseline: Timing | None,
) -> Row:
    q25, q75 = timing.quartiles
    ratio = speedup(timing, baseline) if baseline else None
    return Row(
        op=case.op,
        system=name,
        shape=case.shape,
        m=case.m,
        n=case.n,
        k=case.k,
        dtype=dtype_name(case.dtype),
        block_size=system.block_size,
        codebook=system.codebook,
        median_s=timing.median,
        q25_s=q25,
        q75_s=q75,
        samples_s=list(timing.samples),
        calls=timing.calls,
        mode=timing.mode,
        bytes=system.bytes,
        flops=case.flops,
        gb_per_s=system.bytes / timing.median / 1e9,
        tflop_per_s=case.flops / timing.median / 1e12,
        baseline=case.baseline if ratio else None,
        ratio_to_baseline=ratio.median if ratio else None,
        ratio_q25=ratio.q25 if ratio else None,
        ratio_q75=ratio.q75 if ratio else None,
        error=check.error if check else None,
        error_bound=check.bound if check else None,
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _add(notes: list[Note], note: Note) -> None:
    if note not in notes:
        notes.append(note)


def _first_line(error: Exception) -> str:
    """What the table and the JSON say of an exception: its kind and first line, without paths."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {re.sub(r'(/[^/ :]+)+/', '', lines[0])}"[:200]
