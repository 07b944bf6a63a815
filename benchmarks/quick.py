"""What `gptj-q8 bench` shows: a few products and the optimizer, in about a minute.

Ratios to PyTorch in 16 bits and to bitsandbytes, on the machine at hand, by the same registry,
timer and checks as every other benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from benchmarks import registry
from benchmarks.harness import OURS, Bench, Selection, dtype_name
from benchmarks.machine import new_results
from benchmarks.results import Results, Row

SECONDS = 120.0
"""No case begins later."""
INT8 = "Linear8bitLt"
# How often GPT-J-6B multiplies by a matrix of each shape for one token.
USES = {"attention": 4 * 28, "fc_in": 28, "fc_out": 28, "lm_head": 1}


@dataclass(frozen=True)
class Line:
    """One line of the screen: a case, in words."""

    what: str
    op: str
    shape: str
    m: int | None


LINES = (
    Line("one token through attention", "linear", "attention", 1),
    Line("one token through fc_out", "linear", "fc_out", 1),
    Line("one token through lm_head", "linear", "lm_head", 1),
    Line("one token through fc_in", "linear", "fc_in", 1),
    Line("64 tokens through fc_in", "linear", "fc_in", 64),
    Line("512 tokens through fc_in", "linear", "fc_in", 512),
    Line("512 tokens back through fc_in", "linear_grad_input", "fc_in", 512),
    Line("AdamW, 16.8 million parameters", "adam_step_", "attention", None),
)


@dataclass(frozen=True)
class Compared:
    """A line measured: seconds of ours, and how many times as fast as each peer (None: no peer)."""

    what: str
    seconds: float
    over_16_bits: float | None
    over_bitsandbytes: float | None
    over_int8: float | None


def measure(
    device: torch.device, say: Callable[[str, int, int], None], tiny: bool = False
) -> Results:
    """Runs the lines. say: is told what is measured, how many lines are done, and of how many."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    systems = [OURS, f"torch {dtype_name(dtype)}", "bitsandbytes", INT8, "torch AdamW fused"]
    results = new_results(device, "gptj_q8", ["bench"])
    bench = Bench(device, results, seconds=SECONDS, only=systems, dry=tiny, say=lambda label: None)
    done = 0
    for (op, shape), lines in groupby(LINES, lambda line: (line.op, line.shape)):
        # Optimizers hold float32 parameters: adapters do.
        dtypes = (torch.float32 if op == "adam_step_" else dtype,)
        m = tuple(line.m or 1 for line in lines)
        shapes = ("tiny",) if tiny else (shape,)
        for case, makers in registry.cases([op], Selection(device, dtypes, shapes, m)):
            say(case.label, done, len(LINES))
            bench.run(case, makers)
            done += 1
    return bench.results


def compared(results: Results, tiny: bool = False) -> Iterator[Compared]:
    """The lines that were measured, and GPT-J-6B's token as the sum of its products."""
    tokens: dict[str, list[Row]] = {}
    for line in LINES:
        shape = "tiny" if tiny else line.shape
        rows = {
            row.system: row
            for row in results.rows
            if (row.op, row.shape, row.m) == (line.op, shape, line.m)
        }
        if OURS not in rows:
            continue
        yield _compare(line.what, {name: row.median_s for name, row in rows.items()})
        if line.m == 1 and not tiny:
            for name, row in rows.items():
                tokens.setdefault(name, []).append(row)
    if len(tokens.get(OURS, [])) == len(USES):
        yield _compare(
            "all products of a GPT-J-6B token",
            {
                name: sum(USES[row.shape] * row.median_s for row in rows)
                for name, rows in tokens.items()
                if len(rows) == len(USES)
            },
        )


def _compare(what: str, seconds: dict[str, float]) -> Compared:
    ours = seconds[OURS]
    plain = next((s for name, s in seconds.items() if name.startswith("torch ")), None)

    def times(other: float | None) -> float | None:
        return None if other is None else other / ours

    return Compared(
        what, ours, times(plain), times(seconds.get("bitsandbytes")), times(seconds.get(INT8))
    )
