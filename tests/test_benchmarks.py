"""The benchmarks' own machinery: the timer, the schema of results, and a dry run of each."""

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import bench_adam, bench_linear, bench_weights, ceilings, cold, ops, registry
from benchmarks.harness import Bench, Case, Check, Selection, System, UnavailableError
from benchmarks.machine import new_results
from benchmarks.parts import ROOT
from benchmarks.results import Results
from benchmarks.timing import CudaClock, Timing, compare, speedup
from gptj_q8.ops import SCHEMAS

CPU = torch.device("cpu")
RESULTS = ROOT / "benchmarks" / "results"


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


def test_compare_interleaves_the_systems() -> None:
    clock, order = FakeClock(), []

    def call(name: str) -> Callable[[int], None]:
        def run(index: int) -> None:
            clock.now += 1.0
            order.append(name)

        return run

    compare({name: call(name) for name in "abc"}, clock=clock)
    rounds = ["".join(order[-27:])[i : i + 3] for i in range(0, 27, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert {each[0] for each in rounds} == {"a", "b", "c"}


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


def test_copies_outgrow_the_cache_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "last_level_cache", lambda device: 100)
    monkeypatch.setattr(cold, "free_memory", lambda device: 10_000)
    assert cold.copies_for(90, CPU) * 90 > 400
    assert cold.copies_for(5000, CPU) == 1
    monkeypatch.setattr(cold, "free_memory", lambda device: 800)
    assert cold.copies_for(90, CPU) == 2
    assert cold.copies_for(1, CPU) <= cold.MOST_COPIES


def test_this_machines_cache_is_found() -> None:
    assert 2**18 <= cold.last_level_cache(CPU) <= 2**34


def bench_one(tmp_path: Path, **makers: Callable[[], System]) -> Results:
    """The results of one tiny case, as its JSON file holds them."""
    path = tmp_path / "results.json"
    bench = Bench(CPU, new_results(CPU, "benchmarks.test", []), path, dry=True)
    case = Case("linear", "tiny", 1, 96, 64, torch.float32, 2 * 96 * 64, "torch")
    bench.run(case, makers)
    return Results.read(path)


def system(error: float = 0.0) -> System:
    return System(lambda i: sum(range(100)), 1, 1000, lambda: Check(error, 0.1))


def test_results_survive_the_file(tmp_path: Path) -> None:
    results = bench_one(tmp_path, gptj_q8=system, torch=system)
    again = tmp_path / "again.json"
    results.write(again)
    assert Results.read(again) == results
    ours, torchs = results.rows
    assert ours.baseline == "torch"
    assert torchs.ratio_to_baseline == 1.0
    assert ours.gb_per_s == pytest.approx(1000 / ours.median_s / 1e9, rel=1e-3)


def test_results_name_no_folder_and_no_host(tmp_path: Path) -> None:
    results = new_results(CPU, "benchmarks.x", ["--json", str(tmp_path / "out.json")])
    assert results.command == "python -m benchmarks.x --json out.json"
    assert "/" not in json.dumps(dataclasses.asdict(results))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"median_s": 1e9}, "in order"),
        ({"median_s": "fast"}, r"rows\[0\].median_s: expected float, got 'fast'"),
        ({"samples_s": [1.0]}, "nine"),
        ({"bytes": 10**15}, "gb_per_s"),
        ({"error": 0.5}, "failed check"),
        ({"error": float("nan")}, "failed check"),
        ({"baseline": None}, "stand together"),
        ({"surprise": 1}, "missing or unknown: surprise"),
    ],
)
def test_wrong_results_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    bench_one(tmp_path, gptj_q8=system, torch=system)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    content["rows"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Results.read(path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    bench_one(tmp_path, gptj_q8=system)
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ValueError, match="schema_version must be 1, got 2"):
        Results.read(path)


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_wrong_result_has_no_speed(tmp_path: Path, error: float) -> None:
    results = bench_one(tmp_path, gptj_q8=lambda: system(error), peer=lambda: system(error))
    assert results.rows == []
    assert [note.what for note in results.failed] == ["linear tiny M=1 float32 gptj_q8"]
    assert [note.what for note in results.skipped] == ["linear tiny M=1 float32 peer"]


def test_a_system_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def missing() -> System:
        raise UnavailableError("peer is not installed")

    def broken() -> System:
        raise RuntimeError(f"cannot open {tmp_path}/weights")

    results = bench_one(tmp_path, peer=missing, gptj_q8=broken, torch=system)
    assert [row.system for row in results.rows] == ["torch"]
    assert results.skipped[0].reason == "peer is not installed"
    assert results.failed[0].reason == "RuntimeError: cannot open weights"


@pytest.mark.parametrize(("load", "busy"), [(None, False), (1.0, False), (1.6, True)])
def test_a_busy_machine_is_told(load: float | None, busy: bool) -> None:
    machine = new_results(CPU, "benchmarks.test", []).machine
    assert dataclasses.replace(machine, load_average=load, cores=2).busy is busy


def test_committed_results_are_valid() -> None:
    for file in RESULTS.glob("*.json"):
        Results.read(file)


def test_every_op_has_a_benchmark() -> None:
    measured = set(registry.OPS) | {"histogram"}  # a part of `fit`
    assert measured >= set(SCHEMAS)


def test_cases_cost_nothing_until_a_maker_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def expensive(*args: object) -> None:
        raise MemoryError

    for module in (bench_linear, bench_weights, bench_adam):
        monkeypatch.setattr(module, "random_weight", expensive)
    chosen = Selection(CPU, (torch.bfloat16,), formats=(("fitted", 64), ("linear", 256)))
    found = list(registry.cases(list(registry.OPS), chosen))
    assert {case.op for case, _ in found} == set(registry.OPS)
    for case, makers in found:
        assert case.baseline in makers, case.label
        with pytest.raises(MemoryError):
            makers[case.baseline]()


def test_the_ops_run_dry(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    # Importing the peers takes longer than all of this.
    without_peers = ["--systems", "gptj_q8", "torch", "decode", "read"]
    dry = ["--device", "cpu", "--tiny", "--json", str(path), *without_peers]
    threads = torch.get_num_threads()
    try:
        assert ops.main(dry) == 0
    finally:
        torch.set_num_threads(threads)
    results = Results.read(path)
    assert {row.op for row in results.rows if row.system == "gptj_q8"} == set(registry.OPS)
    assert not results.failed


def test_pytest_benchmark_runs_the_same_cases() -> None:
    """In a process of its own: its options are not those of the tests."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--tiny", "-p", "no:cacheprovider"]
    chosen = ["--benchmark-max-time=0.001", "-k", "gptj_q8 or cast"]
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    for op in registry.OPS:
        assert f"benchmark '{op} tiny" in done.stdout


def test_ceilings_run_dry(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert ceilings.main(["--device", "cpu", "--tiny", "--json", str(path)]) == 0
    assert Results.read(path).ceilings.keys() >= {"read_gb_per_s", "copy_gb_per_s"}
