"""`make gpu`: its parts, tried on the CPU, and what becomes of one that fails."""

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import full_size, gpu, lora_step, registry
from benchmarks.machine import new_results
from benchmarks.parts import ROOT, Step, run_steps
from benchmarks.results import Model, Results
from gptj_q8 import ops

CPU = torch.device("cpu")
DRY = argparse.Namespace(
    device=CPU, tiny=True, layers=2, prompt=16, new_tokens=4, tokens=16, rank=4
)


def results_of(tmp_path: Path, steps: list[Step], deadline: float = float("inf")) -> Results:
    path = tmp_path / "results.json"
    run_steps(steps, new_results(CPU, "benchmarks.gpu", []), path, deadline)
    return Results.read(path)


def test_parts_go_on_past_failures(tmp_path: Path) -> None:
    def step(name: str, code: str, limit_s: float = 60, least_s: float = 0) -> Step:
        return Step(name, ("-c", code), limit_s, least_s)

    steps = [
        step("good", "print('=== 3 passed ===')"),
        step("bad", "print('lost in /some/where/file.py'); exit(3)"),
        step("hangs", "import time; print('begun', flush=True); time.sleep(60)", limit_s=1),
        step("late", "print('never')", least_s=1e6),
        step("cannot", "print('no such tool'); exit(77)"),
        dataclasses.replace(step("no use", "exit(1)"), skip="is for a GPU"),
    ]
    found = {part.name: (part.status, part.note) for part in results_of(tmp_path, steps).parts}
    assert found["good"] == ("passed", "3 passed")
    assert found["bad"] == ("failed", "exit status 3; lost in file.py")
    assert found["hangs"] == ("failed", "stopped after 1 s; begun")
    assert found["late"][0] == "passed"
    assert found["cannot"] == ("skipped", "no such tool")
    assert found["no use"] == ("skipped", "is for a GPU")
    (late,) = results_of(tmp_path, [step("too late", "")], deadline=0).parts
    assert late.status == "skipped"


def test_a_part_with_broken_results_costs_the_others_nothing(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[-1], 'w').write('{}')"
    steps = [Step("broken", ("-c", code), 60, 0, measures=True), Step("next", ("-c", ""), 60, 0)]
    broken, after = results_of(tmp_path, steps).parts
    assert broken.status == "failed"
    assert broken.note.startswith("its results are wrong: ")
    assert after.status == "passed"


def test_make_gpu_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "sees no GPU here" in capsys.readouterr().err


def test_help_needs_neither_a_gpu_nor_pytorch() -> None:
    """-S leaves out the installed packages."""
    command = [sys.executable, "-S", "-m", "benchmarks.gpu"]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in gpu.PARTS)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "has no PyTorch; name a Python that has one" in done.stderr


def test_make_gpu_fits_its_nine_minutes() -> None:
    limits = sum(step.limit_s for step in gpu.steps("cuda", tiny=False))
    assert limits <= gpu.MINUTES * 60 - gpu.MARGIN_S


def test_make_gpu_test_and_bench_share_out_the_parts() -> None:
    """Together they run every part; both build, and look at what was built."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    (tested,) = (x.split("--only ")[1].split(" $")[0].split() for x in lines if "--only" in x)
    (left_out,) = (x.split("--skip ")[1].split(" $")[0].split() for x in lines if "--skip" in x)
    assert tested == ["build", "backends", *left_out]
    assert set(tested) < set(gpu.PARTS)


def test_parts_are_chosen_by_name(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--only", "tune", "adam", "--skip", "adam"]) == 0
    (path,) = tmp_path.glob("*.json")
    (part,) = Results.read(path).parts
    assert (part.name, part.status) == ("tune", "skipped")
    assert gpu.main([*arguments, "--only", "adam", "--minutes", "0"]) == 0
    assert Results.read(path).parts[0].note.startswith("wants ")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_benchmark_takes_the_arguments_of_its_part(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to where it would measure."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for step in [*gpu.steps(device, tiny=False), *registry.steps(device, tiny=False)]:
        if not step.measures:
            continue
        module = importlib.import_module(step.command[1])
        for name in ("make_bench", "run_each", "set_threads", "new_results"):
            monkeypatch.setattr(module, name, parse_only, raising=False)
        with pytest.raises(InterruptedError):
            module.main([*step.command[2:], "--json", "x.json"])


def parse_only(first: object, *others: object) -> None:
    if isinstance(first, argparse.ArgumentParser):  # run_each parses
        first.parse_args(others[-1])  # type: ignore[arg-type]
    raise InterruptedError


@pytest.mark.parametrize("system", ["gptj_q8", "bfloat16", "compiled"])
def test_a_whole_model_decodes_dry(system: str, one_thread: None) -> None:
    figures = full_size.measure(system, DRY)
    assert figures["weights"] == 2 * 160 * 64 + 2 * 12 * 64 * 64
    assert figures["decode_tokens_per_s"] > 0
    assert figures["peak_rss_anon_gb"] > 0
    # Codes and a scale for 256 of them, or two bytes a weight, of all matrices but the embedding's.
    size = (1 + 4 / 256) if system != "bfloat16" else 2
    streamed = figures["streamed_gb_per_token"] * 1e9
    matrices = size * (160 * 64 + 2 * 12 * 64 * 64)
    assert matrices < streamed < 1.25 * matrices  # and biases, norms, tables of positions


def test_a_model_that_computes_wrongly_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *args: 1.1 * right(*args))
    with pytest.raises(RuntimeError, match=r"computes wrongly: error 0\.\d+, at most 0\.00"):
        full_size.measure("gptj_q8", DRY)


@pytest.mark.parametrize("system", lora_step.SYSTEMS)
def test_a_lora_step_runs_dry(system: str, one_thread: None) -> None:
    figures = lora_step.measure(system, DRY)
    # Of each block: q, k, v, out 64 -> 64; fc_in 64 -> 256; fc_out 256 -> 64.
    assert figures["trained"] == 2 * 4 * (4 * (64 + 64) + 2 * (64 + 256))
    assert figures["tokens_per_s"] == pytest.approx(16 / figures["step_s"])


@pytest.mark.parametrize("room", [True, False])
def test_a_step_is_tried_within_a_limit(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's limit stood in for, as no GPU is here: 7.5 of 80 GiB, and none of it afterwards."""
    fractions: list[float] = []
    has = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: has)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share)
    )

    def step() -> None:
        assert fractions == [7.5 / 80]
        if not room:
            raise torch.cuda.OutOfMemoryError

    assert lora_step.fits(lora_step.LIMIT, step, torch.device("cuda")) is room
    assert fractions == [7.5 / 80, 1.0]


def test_a_system_that_fails_or_does_not_fit_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "models.json"

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        failed = "bfloat16" in command
        return subprocess.CompletedProcess(command, int(failed), 'noise\n{"step_s": 0.5}\n')

    monkeypatch.setattr(subprocess, "run", run)
    dry = ["--device", "cpu", "--tiny", "--json", str(path)]
    assert full_size.main(dry) == 1
    results = Results.read(path)
    assert results.models == [Model("decode", "gptj_q8", {"step_s": 0.5})]
    assert [(note.what, note.reason) for note in results.failed] == [
        ("decode bfloat16", "exit status 1")
    ]
    monkeypatch.setattr(full_size, "free_memory", lambda device: 10**9)
    assert full_size.main(["--device", "cpu", "--json", str(path)]) == 0
    assert "GB of free memory" in Results.read(path).skipped[0].reason


def test_older_files_have_no_models(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    new_results(CPU, "benchmarks.x", []).write(path)
    content = json.loads(path.read_text())
    del content["models"]
    path.write_text(json.dumps(content))
    assert Results.read(path).models == []


@pytest.mark.slow  # starts some fifteen processes
def test_the_dry_run_runs_every_part(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    results = Results.read(path)
    status = {part.name: part.status for part in results.parts}
    assert list(status) == gpu.PARTS
    on_a_gpu = {"backends", "sanitizer", "tune"}
    assert {name for name, found in status.items() if found != "passed"} <= on_a_gpu, status
    assert {row.op for row in results.rows} >= {"linear", "linear_grad_input", "adam_step_"}
    assert {(model.task, model.system) for model in results.models} == {
        *(("decode", name) for name in ("gptj_q8", "bfloat16", "compiled")),
        *(("lora_step", name) for name in ("gptj_q8", "bfloat16")),
    }
    assert path.with_name(f"{path.stem}-speed.png").exists()
