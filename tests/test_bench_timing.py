"""The benchmarks' timer, by a clock that moves only where a call says so; cold copies."""

import contextlib
import itertools
from collections.abc import Callable

import pytest
import torch

from benchmarks import cold
from benchmarks.timing import CudaClock, Timing, compare, in_turns, speedup

CPU = torch.device("cpu")


class FakeClock:
    """Time passes only where a call says so."""

    mode = "events"
    least_sample = 0.1

    def __init__(self, graphs: bool = False) -> None:
        self.now = 0.0
        self.graphs = graphs

    def seconds(self, batch: Callable[[], object]) -> float:
        start = self.now
        batch()
        return self.now - start

    def capture(self, batch: Callable[[], object]) -> Callable[[], object] | None:
        return batch if self.graphs else None

    def call(self, seconds: float, log: list[int] | None = None) -> Callable[[int], object]:
        def run(index: int) -> None:
            self.now += seconds
            if log is not None:
                log.append(index)

        return run


def test_compare_times_each_system_per_call() -> None:
    clock = FakeClock()
    found = compare({"a": clock.call(1e-3), "b": clock.call(5.0)}, clock=clock)
    assert found["a"].median == pytest.approx(1e-3)
    assert found["b"].median == pytest.approx(5.0)
    assert len(found["a"].samples) == 9
    assert found["a"].calls * 1e-3 >= clock.least_sample
    assert found["b"].calls == 1
    assert found["a"].mode == "events"


@pytest.mark.parametrize("systems", ["ab", "abc", "abcd"])
def test_compare_interleaves_the_systems(systems: str) -> None:
    clock, order = FakeClock(), []

    def call(name: str) -> Callable[[int], None]:
        def run(index: int) -> None:
            clock.now += 1.0
            order.append(name)

        return run

    compare({name: call(name) for name in systems}, clock=clock)
    count = len(systems)
    timed = order[-9 * count :]
    rounds = ["".join(timed[i : i + count]) for i in range(0, len(timed), count)]
    assert all(sorted(each) == list(systems) for each in rounds)
    assert {each[0] for each in rounds} == {each[-1] for each in rounds} == set(systems)


@pytest.mark.parametrize("graphs", [False, True])
def test_compare_rotates_over_the_copies(graphs: bool) -> None:
    clock, log = FakeClock(graphs), []
    found = compare({"a": clock.call(0.03, log)}, copies={"a": 3}, clock=clock)["a"]
    assert set(log) == {0, 1, 2}
    in_samples = log[-9 * found.calls :]
    assert all(b == (a + 1) % 3 for a, b in itertools.pairwise(in_samples))
    assert found.mode == ("graph" if graphs else "events")
    assert found.calls % 3 == 0 or not graphs


class FakeCuda:
    """What CudaClock uses of torch.cuda, on a stream whose time is the fake clock's."""

    def __init__(self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.replays = clock, 0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self.Event(clock))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    class Event:
        def __init__(self, clock: FakeClock) -> None:
            self.clock = clock

        def record(self) -> None:
            self.at = self.clock.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "FakeCuda.Event") -> float:
            return (end.at - self.at) * 1e3

    def replay(self) -> None:
        self.replays += 1
        self.clock.now += 0.25


def test_cuda_times_replays_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    cuda = FakeCuda(clock, monkeypatch)
    timer = CudaClock(torch.device("cuda", 0))
    found = compare({"a": clock.call(1e-3)}, copies=4, clock=timer)["a"]
    assert (found.mode, found.calls) == ("graph", 8)  # 5 ms in whole rounds of 4
    assert found.median == pytest.approx(0.25 / 8)
    assert cuda.replays >= 9


def test_cuda_times_calls_that_no_graph_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    FakeCuda(clock, monkeypatch)

    def refuse(graph: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    found = compare({"a": clock.call(1e-3)}, clock=CudaClock(torch.device("cuda", 0)))["a"]
    assert (found.mode, found.calls) == ("events", 5)
    assert found.median == pytest.approx(1e-3)


def test_compare_wants_nine_pairs() -> None:
    with pytest.raises(ValueError, match="pairs must be at least 9, got 3"):
        compare({"a": lambda i: None}, pairs=3)


def test_speedup_pairs_the_samples_of_a_round() -> None:
    drift = [1.0, 2.0, 4.0, 1.0, 3.0, 1.0, 2.0, 5.0, 1.0]
    ours = Timing(tuple(drift), 1, "host")
    theirs = Timing(tuple(3 * t for t in drift), 1, "host")
    ratio = speedup(ours, theirs)
    assert (ratio.q25, ratio.median, ratio.q75) == (3.0, 3.0, 3.0)


def test_whole_models_take_turns_after_a_call_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, order = [0], []
    monkeypatch.setattr("time.perf_counter_ns", lambda: now[0])

    def call(name: str, seconds: int) -> Callable[[], None]:
        def run() -> None:
            now[0] += 10**9 * (seconds if name in order else 100)  # the first is slow
            order.append(name)

        return run

    found = in_turns({"a": call("a", 1), "b": call("b", 2)}, rounds=4)
    assert found == {"a": [1.0] * 4, "b": [2.0] * 4}
    rounds = ["".join(order[i : i + 2]) for i in range(2, 10, 2)]
    assert all(sorted(each) == ["a", "b"] for each in rounds)
    assert len(set(rounds)) == 2, "neither is always the first"


def test_copies_outgrow_the_cache_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "last_level_cache", lambda device: 100)
    monkeypatch.setattr(cold, "total_memory", lambda device: 10_000)
    monkeypatch.setattr(cold, "free_memory", lambda device: 10_000)
    assert cold.copies_for(90, CPU) * 90 > 400
    assert cold.copies_for(5000, CPU) == 1
    for free in (3300, 2500, 0):  # a quarter of all stays free
        monkeypatch.setattr(cold, "free_memory", lambda device, free=free: free)
        assert cold.copies_for(90, CPU) == (2 if free == 3300 else 1)
    assert cold.copies_for(1, CPU) <= cold.MOST_COPIES


def test_this_machines_cache_is_found() -> None:
    assert 2**18 <= cold.last_level_cache(CPU) <= 2**34
