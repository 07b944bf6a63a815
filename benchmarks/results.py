"""The results of a benchmark as JSON: one schema for every benchmark, read back strictly.

`Results.write` and `Results.read` validate, so a file in benchmarks/results/ is either right or
refused with a sentence. Times are seconds per call, GB is 10^9 bytes, TFLOP is 10^12 operations.
"""

import json
import math
import os
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self

SCHEMA_VERSION = 1
GIGA = 1e9
BUSY = 0.75  # load for each core
DIGITS = 5  # of a stored measurement; machines are noisier than that


@dataclass
class Machine:
    device: str  # "cpu" or "cuda"
    cpu: str
    cpu_capability: str  # instruction set PyTorch chose, such as AVX512
    cores: int | None  # that this process may use
    threads: int  # of PyTorch's pool
    load_average: float | None  # processes at work in the minute before
    gpu: str | None
    gpu_memory_bytes: int | None
    compute_capability: str | None
    last_level_cache_bytes: int

    @property
    def busy(self) -> bool:
        """Whether somebody else was at work, which CPU timings show."""
        return (self.load_average or 0) > BUSY * (self.cores or 1)


@dataclass
class Row:
    """One system on one case. M, N, K as in `y[M, N] = x[M, K] @ w[N, K].T`."""

    op: str
    system: str
    shape: str
    m: int | None
    n: int
    k: int
    dtype: str
    block_size: int | None
    codebook: str | None
    median_s: float
    q25_s: float
    q75_s: float
    samples_s: list[float]  # one per round, in the order of the rounds
    calls: int  # in each sample
    mode: str  # "host", "events" or "graph": see timing.py
    bytes: int  # least traffic: the weights as the system stores them, inputs and outputs, once
    flops: int
    gb_per_s: float
    tflop_per_s: float
    baseline: str | None
    ratio_to_baseline: float | None  # how many times as fast: ratio of medians
    ratio_q25: float | None  # of the ratios within each round
    ratio_q75: float | None
    error: float | None  # |result - exact| / |exact|, exact for the system's own decoded weights
    error_bound: float | None

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Note:
    """Something that gave no row: a system not installed, a check that failed."""

    what: str
    reason: str


@dataclass
class Model:
    """A whole model at work. task: such as "decode". A figure's name ends in its unit."""

    task: str
    system: str
    figures: dict[str, float]


@dataclass
class Part:
    """One step of `make bench` or `make gpu`."""

    name: str
    status: str  # "passed", "failed" or "skipped"
    seconds: float
    note: str


@dataclass
class Results:
    created: str  # ISO 8601, UTC
    command: str
    commit: str | None  # "+" at its end: files differed from it
    machine: Machine
    versions: dict[str, str]
    ceilings: dict[str, float] = field(default_factory=dict)  # see ceilings.py
    rows: list[Row] = field(default_factory=list)
    skipped: list[Note] = field(default_factory=list)
    failed: list[Note] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def extend(self, other: Self) -> None:
        """Takes over what another benchmark of the same run measured."""
        self.ceilings |= other.ceilings
        self.rows += other.rows
        self.models += other.models
        self.skipped += [note for note in other.skipped if note not in self.skipped]
        self.failed += other.failed

    def validate(self) -> None:
        """ValueError where a value contradicts another or cannot be."""
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"results: schema_version must be {SCHEMA_VERSION}, got {self.schema_version}"
            )
        for row in self.rows:
            _validate_row(row)
        for part in self.parts:
            if part.status not in ("passed", "failed", "skipped"):
                raise ValueError(f"results: part {part.name} has unknown status {part.status}")

    def write(self, path: Path) -> None:
        """Replaces the file at once, so that a reader (or a killed run) never sees half of it."""
        self.validate()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n")
        os.replace(draft, path)

    @classmethod
    def read(cls, path: Path) -> Self:
        results = _parse(cls, json.loads(path.read_text()), "results")
        results.validate()
        return results


def _validate_row(row: Row) -> None:
    where = f"results: {row.op} {row.shape} M={row.m} {row.system}"
    quartiles = (row.q25_s, row.median_s, row.q75_s)
    if not 0 < quartiles[0] <= quartiles[1] <= quartiles[2]:
        raise ValueError(f"{where}: quartiles must be positive and in order, got {quartiles}")
    if len(row.samples_s) < 9 or min(row.samples_s) <= 0:
        raise ValueError(f"{where}: needs nine positive samples, got {row.samples_s}")
    if not math.isclose(row.gb_per_s, row.bytes / row.median_s / 1e9, rel_tol=1e-3, abs_tol=1e-9):
        raise ValueError(f"{where}: gb_per_s {row.gb_per_s} is not bytes / median_s")
    if (row.baseline is None) != (row.ratio_to_baseline is None):
        raise ValueError(f"{where}: baseline and ratio_to_baseline must stand together")
    if row.error is not None and (row.error_bound is None or not row.error <= row.error_bound):
        raise ValueError(f"{where}: a time must not stand beside a failed check")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _parse(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, dataclasses field by field; ValueError names what misfits."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _parse(arguments[0], value, where)
    if origin is list and isinstance(value, list):
        return [_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        # Files written before there was such a list lack it.
        value = {f.name: [] for f in fields(hint) if f.name == "models"} | value
        if unmatched := sorted(hints.keys() ^ value.keys()):
            raise ValueError(f"{where}: fields missing or unknown: {', '.join(unmatched)}")
        return hint(**{key: _parse(hints[key], value[key], f"{where}.{key}") for key in hints})
    if hint is float and type(value) in (float, int):
        return float(value)
    if hint in (int, str) and type(value) is hint:
        return value
    raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
