"""The one timer of the benchmarks: systems side by side, round by round, on cold buffers.

Why it looks as it does:

- Machines are shared and drift. `compare` therefore takes one sample of every system in each
  round, and `speedup` pairs the samples of a round, so that what slows a whole round cancels.
- Weights of a real model are cold: between two uses of a matrix all the others pass through the
  cache. So each call gets the index of the copy of its buffers that it shall use, and
  `benchmarks.cold.copies_for` says how many copies outgrow the cache.
- A GPU runs behind the host. There samples come from events on the stream, and calls are captured
  in a CUDA graph where possible, so that a kernel of 10 microseconds is not timed as the Python
  that launches it.

All times are in seconds per call.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[int], object]
Batch = Callable[[], object]

LEAST_PAIRS = 9
# Bounds a sample of a call too short to measure (and the size of a CUDA graph).
MOST_CALLS = 4096


@dataclass(frozen=True)
class Timing:
    """The samples of one system, one per round, each the mean over `calls` calls."""

    samples: tuple[float, ...]
    calls: int
    mode: str  # "host", "events" or "graph"

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        return _quartiles(self.samples)


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as a baseline: ratio of medians, quartiles of the paired ratios."""

    median: float
    q25: float
    q75: float


def speedup(timing: Timing, baseline: Timing) -> Speedup:
    """Both from one `compare`, so that sample i of each was taken in the same round."""
    paired = [b / t for t, b in zip(timing.samples, baseline.samples, strict=True)]
    return Speedup(baseline.median / timing.median, *_quartiles(paired))


def compare(
    systems: Mapping[str, Call],
    *,
    copies: int | Mapping[str, int] = 1,
    pairs: int = LEAST_PAIRS,
    clock: "Clock | None" = None,
    least_sample: float | None = None,
) -> dict[str, Timing]:
    """Times the systems against one another.

    systems: name to a function of the index of the buffers to use, in range(copies).
    copies: how many copies of its buffers a system has; one number for all, or one for each.
    pairs: rounds, and so samples of each system; at least nine.
    clock: HostClock() unless given; CudaClock(device) for a GPU.
    least_sample: seconds that a sample lasts at least; by default what the clock needs.
    """
    if pairs < LEAST_PAIRS:
        raise ValueError(f"compare: pairs must be at least {LEAST_PAIRS}, got {pairs}")
    if not systems:
        return {}
    clock = clock or HostClock()
    least = clock.least_sample if least_sample is None else least_sample
    count = {name: copies if isinstance(copies, int) else copies[name] for name in systems}
    runners = {name: _Runner(call, count[name], clock) for name, call in systems.items()}
    samples: dict[str, list[float]] = {name: [] for name in systems}
    with _no_garbage_collection():
        for runner in runners.values():
            runner.prepare(least)
        for turn in range(pairs):
            for name in _order(list(systems), turn):
                samples[name].append(runners[name].sample())
    return {
        name: Timing(tuple(samples[name]), runner.calls, runner.mode)
        for name, runner in runners.items()
    }


def in_turns(systems: Mapping[str, Batch], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call of work that takes seconds, such as a step of a whole model.

    One call of each in every round, in the order of `compare`, after one that wakes threads and
    fills caches. A call must end with its work done: on a GPU it waits.
    """
    samples: dict[str, list[float]] = {name: [] for name in systems}
    clock = HostClock()
    for name in systems:
        systems[name]()
    for turn in range(rounds):
        for name in _order(list(systems), turn):
            samples[name].append(clock.seconds(systems[name]))
    return samples


class Clock(Protocol):
    """Measures how long a batch of calls takes, and may replace it by something faster to start."""

    least_sample: float
    mode: str

    def seconds(self, batch: Batch) -> float: ...

    def capture(self, batch: Batch) -> Batch | None:
        """The same work, started at once, or None where that cannot be had."""
        ...


class HostClock:
    """The host's monotonic clock: for work that is done when the call returns."""

    least_sample = 10e-3  # long beside a scheduler's tick of 1 to 4 ms
    mode = "host"

    def seconds(self, batch: Batch) -> float:
        start = time.perf_counter_ns()
        batch()
        return (time.perf_counter_ns() - start) * 1e-9

    def capture(self, batch: Batch) -> Batch | None:
        return None


class CudaClock:
    """Events on a GPU's current stream, around a CUDA graph of the batch where it can be captured.

    graphs=False times calls as Python issues them, which a user without graphs also waits for.
    """

    least_sample = 5e-3  # long beside the 10 microseconds in which a graph starts
    mode = "events"

    def __init__(self, device: torch.device, graphs: bool = True) -> None:
        self.device = device
        self.graphs = graphs

    def seconds(self, batch: Batch) -> float:
        with torch.cuda.device(self.device):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            batch()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def capture(self, batch: Batch) -> Batch | None:
        if not self.graphs:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                batch()
        except RuntimeError:  # the batch waits for the GPU somewhere, which a graph cannot hold
            torch.cuda.synchronize(self.device)
            return None
        return graph.replay


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


class _Runner:
    """One system: how many calls make a sample, and which copy of the buffers is next."""

    def __init__(self, call: Call, copies: int, clock: Clock) -> None:
        self.call = call
        self.copies = copies
        self.clock = clock
        self.calls = 1
        self.next = 0
        self.mode = clock.mode
        self.run: Batch = self._batch

    def prepare(self, least_sample: float) -> None:
        """Warms up, finds how many calls last `least_sample`, and captures them if possible."""
        self._batch()  # compiles, allocates, creates handles
        while self._too_short(least_sample):
            pass
        eager_calls = self.calls
        while self._capture():
            if not self._too_short(least_sample):  # without Python between them, calls are shorter
                return
        self.run, self.mode = self._batch, self.clock.mode
        self.calls, self.next = eager_calls, 0

    def _too_short(self, least_sample: float) -> bool:
        """Whether a sample was too short to trust; if so, raises the calls in it."""
        # The faster of two, since one interruption would pass a single call off as long enough.
        took = min(self.clock.seconds(self.run) for _ in range(2))
        if took >= least_sample or self.calls >= MOST_CALLS:
            return False
        wanted = self.calls * least_sample / took if took > 0 else MOST_CALLS
        self.calls = min(MOST_CALLS, max(2 * self.calls, math.ceil(wanted)))
        return True

    def _capture(self) -> bool:
        # A graph starts over at its first copy, so it must go all the way round.
        self.calls = math.ceil(self.calls / self.copies) * self.copies
        self.next = 0
        captured = self.clock.capture(self._batch)
        if captured is None:
            return False
        captured()  # the first replay also uploads the graph
        self.run, self.mode = captured, "graph"
        return True

    def sample(self) -> float:
        return self.clock.seconds(self.run) / self.calls

    def _batch(self) -> None:
        for _ in range(self.calls):
            self.call(self.next)
            self.next = (self.next + 1) % self.copies


def _order(names: list[str], turn: int) -> list[str]:
    """Every second round is the one before it backwards; then another system is the first."""
    first = turn // 2 % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if turn % 2 else order


def _quartiles(values: list[float] | tuple[float, ...]) -> tuple[float, float]:
    q25, _, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return q25, q75


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
