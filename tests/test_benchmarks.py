"""The benchmarks' schema of results, their checks, and a dry run of each."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import bench_adam, bench_linear, bench_weights, ceilings, ops, registry
from benchmarks.harness import Bench, Case, Check, Selection, System, UnavailableError
from benchmarks.machine import new_results
from benchmarks.parts import ROOT
from benchmarks.results import Results
from gptj_q8.ops import SCHEMAS

CPU = torch.device("cpu")
RESULTS = ROOT / "benchmarks" / "results"


CASE = Case("linear", "tiny", 1, 96, 64, torch.float32, 2 * 96 * 64, "torch")


def bench_one(tmp_path: Path, **makers: Callable[[], System]) -> Results:
    """The results of one tiny case, as its JSON file holds them."""
    path = tmp_path / "results.json"
    Bench(CPU, new_results(CPU, "benchmarks.test", []), path, dry=True).run(CASE, makers)
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


def test_names_of_no_system_are_told() -> None:
    results = new_results(CPU, "benchmarks.test", [])
    bench = Bench(CPU, results, only=["ours", "gptj_q8"], dry=True)
    bench.run(CASE, {"gptj_q8 cpu": system, "torch": system})
    assert [row.system for row in results.rows] == ["gptj_q8 cpu"]
    assert not results.skipped
    bench.only = ["ours", "PyTorch"]
    bench.run(CASE, {"gptj_q8": system, "torch": system})
    assert results.skipped[0].what == "linear"
    assert results.skipped[0].reason == (
        "no system is named ours or PyTorch: there are gptj_q8, torch"
    )


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_of_a_device_can_be_named(device: str) -> None:
    """And runs unasked: what is not named is left out."""
    assert {step.name for step in registry.steps(device, tiny=False)} <= set(registry.PARTS)


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
