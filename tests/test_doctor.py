"""`gptj-q8 doctor`: it finds what is wrong, says what to do, and exits with 1 for it alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run

from gptj_q8 import backends, doctor, ops
from gptj_q8.doctor import Backend, Check, advice, machine, packages
from gptj_q8.doctor.machine import Gpu

pytestmark = pytest.mark.usefixtures("one_thread")

REQUIRES = [
    "torch>=2.10",
    "transformers<6,>=5.17",
    "winonly>=1; platform_system == 'Windows'",
    'datasets; extra == "train"',
    'pytest; extra == "dev"',
]
HERE = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "datasets": "4.0"}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions that are installed; tests change them."""
    versions = dict(HERE)

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(packages.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(packages.metadata, "version", version)
    return versions


def diagnosed() -> tuple[int, dict[str, Any]]:
    """The exit status and the JSON."""
    result = run("doctor", "--json")
    return result.exit_code, json.loads(result.stdout)


def kernels() -> Any:
    """The CPU's kernels, which the test needs."""
    if reason := backends.unavailable("cpu"):
        pytest.skip(f"cpu: {reason}")
    return backends.load("cpu")


def test_every_op_of_every_instruction_set_passes_here() -> None:
    cpu = kernels()
    status, report = diagnosed()
    assert (status, report["ok"]) == (0, True)
    assert {(c["op"], c["dtype"], c["backend"]) for c in report["checks"]} >= {
        (op, dtype, f"cpu:{isa}")
        for op in ops.SCHEMAS
        for dtype in ("float32", "bfloat16", "float16")
        for isa in cpu.instruction_sets()
    }
    assert all(0 <= check["error"] <= check["bound"] for check in report["checks"])
    assert {entry["op"]: entry["backend"] for entry in report["served"]} == dict.fromkeys(
        ops.SCHEMAS, "cpu"
    )
    assert report["machine"]["torch"] == torch.__version__
    assert report["advice"] == []


def test_what_a_person_sees() -> None:
    kernels()
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "cpu by cpu: quantize, histogram, dequantize, linear," in result.stdout
    assert result.stdout.strip().endswith("checks passed. Everything works.")
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


@pytest.mark.parametrize("wrong", ["scaled", "nan", "raises", "late"])
@pytest.mark.parametrize("op", list(ops.SCHEMAS))
def test_a_wrong_kernel_is_a_problem(op: str, wrong: str, monkeypatch: Any) -> None:
    """late: right but for the last of several results, as a kernel for many rows alone may be."""
    right = getattr(kernels(), op)
    calls = 0

    def spoil(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = right(*args)
        if wrong == "raises":
            raise RuntimeError("illegal address\nat 0x0")
        if wrong == "late" and op in ("linear", "linear_grad_input") and args[0].shape[0] < 100:
            return result
        target = args[0] if op == "adam_step_" else result[0] if op == "quantize" else result
        if wrong == "nan" and target.is_floating_point():
            target.fill_(math.nan)
        else:
            target.mul_(2)
        return result

    monkeypatch.setattr(backends.load("cpu"), op, spoil)
    status, report = diagnosed()
    assert calls > 0
    assert (status, report["ok"]) == (1, False)
    assert {item["level"] for item in report["advice"]} == {"problem"}
    assert all(item["found"].startswith(f"{op} in ") for item in report["advice"])
    assert "reference" in report["advice"][0]["do"]
    if wrong == "raises":
        assert "fails in cpu:" in report["advice"][0]["found"]
        assert "RuntimeError: illegal address." in report["advice"][0]["found"]
    shown = run("doctor")
    assert shown.exit_code == 1
    assert "Something does not work" in shown.stdout


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    backends.unavailable.cache_clear()


def set_unavailable(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(backends.load("cpu"), "unavailable", lambda: reason)
    backends.unavailable.cache_clear()


def test_without_a_compiled_library_it_works_and_names_a_compiler(
    without_kernels: pytest.MonkeyPatch,
) -> None:
    set_unavailable(without_kernels, "the compiled library _cpu.abi3.so was not built; reinstall")
    status, report = diagnosed()
    assert (status, report["ok"]) == (0, True)
    (item,) = report["advice"]
    assert item["level"] == "slower"
    assert item["found"] == (
        "The CPU runs plain PyTorch: the compiled library _cpu.abi3.so was not built."
    )
    assert "g++" in item["do"]
    assert "pip install -v --no-build-isolation" in item["do"]
    assert {entry["backend"] for entry in report["served"]} == {"reference"}
    assert {check["backend"] for check in report["checks"]} == {"reference"}


def test_a_library_that_does_not_load_is_a_problem(without_kernels: pytest.MonkeyPatch) -> None:
    set_unavailable(without_kernels, "the compiled library _cpu.abi3.so does not load: bad magic")
    status, report = diagnosed()
    assert status == 1
    (item,) = report["advice"]
    assert item["level"] == "problem"
    assert "bad magic" in item["found"]


def test_memory_is_what_the_container_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CONTAINER_LIMITS", (limit, tmp_path / "absent"))
    whole = machine.host_memory()
    assert whole is not None
    for written, expected in (("max\n", whole), (f"{whole // 3}\n", whole // 3), ("9" * 19, whole)):
        limit.write_text(written)
        assert machine.host_memory() == expected


def test_packages_are_compared_with_what_is_asked_for(installed: dict[str, str]) -> None:
    assert list(advice.about_packages(packages.required_packages())) == []
    installed["transformers"] = "4.57.6"
    del installed["datasets"]
    old, missing = advice.about_packages(packages.required_packages())
    assert old.level == "problem"
    assert old.found == "transformers has version 4.57.6; gptj_q8 needs transformers<6,>=5.17."
    assert old.do == "Run `pip install 'transformers<6,>=5.17'`."
    assert missing.level == "optional"
    assert "datasets of the extra `train` is not installed" in missing.found
    installed.clear()
    levels = [item.level for item in advice.about_packages(packages.required_packages())]
    assert levels == ["problem", "problem", "optional"]
    assert diagnosed()[0] == 1


def test_a_folder_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "requires", requires)
    (item,) = advice.about_packages(packages.required_packages())
    assert item.level == "optional"
    assert "-e ." in item.do


P100, H100 = Gpu("Tesla P100", 16 << 30, "6.0"), Gpu("NVIDIA H100", 80 << 30, "9.0")
MI300 = Gpu("AMD Instinct MI300X", 192 << 30, "gfx942")


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"built_for": "CPU", "nvidia_driver": True}, "built for CPU"),
        ({"built_for": "CUDA 13.0", "nvidia_driver": True}, "nvidia-smi"),
        ({"built_for": "CUDA 12.6", "gpus": (P100,)}, "Volta, Pascal and older"),
        ({"built_for": "CUDA 13.0", "nvidia_driver": False}, None),
        ({"built_for": "CUDA 13.0", "gpus": (H100,)}, None),
        ({"built_for": "ROCm 6.4", "gpus": (MI300,)}, None),
    ],
)
def test_gpus_that_are_not_used_are_told(machine: dict[str, Any], words: str | None) -> None:
    this = dataclasses.replace(doctor.machine.describe(), **{"nvidia_driver": False, **machine})
    found = list(advice.about_machine(this))
    assert len(found) == (words is not None)
    assert all(words in item.found + item.do and item.level == "slower" for item in found)


@pytest.mark.parametrize(
    ("built_for", "gpu", "named"),
    [
        ("CUDA 13.0", H100, ["CUDA library", "Triton"]),
        ("CUDA 13.0", P100, []),
        ("ROCm 6.4", MI300, ["Triton"]),
    ],
)
def test_kernels_that_a_gpu_lacks_are_told(built_for: str, gpu: Gpu, named: list[str]) -> None:
    this = dataclasses.replace(doctor.machine.describe(), built_for=built_for, gpus=(gpu,))
    cpu = Backend("cpu", None, ("avx512", "avx2", "neon"))
    missing = [cpu, *(Backend(name, "it is not there") for name in ("cuda", "triton"))]
    found = list(advice.about_kernels(this, missing, []))
    assert len(found) == len(named)
    assert all(name in item.found for name, item in zip(named, found, strict=True))


def test_an_instruction_set_that_the_build_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    cpu = Backend("cpu", None, ("avx2", "portable"))
    others = [Backend(name, "it is not there") for name in ("cuda", "triton")]
    this = dataclasses.replace(doctor.machine.describe(), gpus=())
    (item,) = advice.about_kernels(this, [cpu, *others], [])
    assert "AVX512" in item.found


@pytest.mark.parametrize("error", [math.nan, 1.0, None])
def test_a_check_passes_within_its_bound_only(error: float | None) -> None:
    check = Check("linear", "cpu", "cpu", "float32", error, 0.5)
    assert not check.ok
    assert dataclasses.replace(check, error=0.5).ok
