"""What was found amiss, and for each what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gptj_q8.doctor.kernels import Backend
from gptj_q8.doctor.machine import Machine
from gptj_q8.doctor.packages import Package
from gptj_q8.doctor.selftest import Check

OLDEST_CAPABILITY = 7.5  # as in the Triton backend, and the oldest that nvcc 13 knows
"""The compute capability from which on kernels of ours exist: T4's."""


@dataclass(frozen=True)
class Advice:
    """What was found amiss, and what to do next, a sentence each.

    level: "problem" (something does not work), "slower" (it works, and could be faster) or
        "optional" (a part is missing that not everybody needs).
    """

    level: Literal["problem", "slower", "optional"]
    found: str
    do: str


def about_packages(packages: Sequence[Package]) -> Iterator[Advice]:
    """On packages that are missing or of another version; none at all: gptj_q8 is not installed."""
    if not packages:
        yield Advice(
            "optional",
            "gptj_q8 runs from its folder without being installed: what it needs was not checked.",
            "Run `pip install --no-build-isolation -e .` in the clone.",
        )
    for package in packages:
        if package.extra is None and not package.serves:
            has = f"has version {package.installed}" if package.installed else "is not installed"
            yield Advice(
                "problem",
                f"{package.name} {has}; gptj_q8 needs {package.name}{package.wanted}.",
                f"Run `{_pip_install([package])}`.",
            )
    for extra in dict.fromkeys(package.extra for package in packages if package.extra):
        lacking = [p for p in packages if p.extra == extra and not p.serves]
        if lacking:
            names = ", ".join(package.name for package in lacking)
            use = {"train": "`gptj-q8 finetune`", "bench": "the benchmarks"}[extra]
            yield Advice(
                "optional",
                f"{names} of the extra `{extra}` {'is' if len(lacking) == 1 else 'are'} not"
                f" installed; {use} can use {'it' if len(lacking) == 1 else 'them'}.",
                f"Run `{_pip_install(lacking)}` if you want that.",
            )


def about_machine(machine: Machine) -> Iterator[Advice]:
    """On GPUs that PyTorch cannot use, and on those for which there are no kernels."""
    if machine.nvidia_driver and not machine.gpus:
        if machine.built_for.startswith("CUDA"):
            yield Advice(
                "slower",
                f"There is an NVIDIA driver, but PyTorch (built for {machine.built_for}) finds no"
                " GPU that it can use.",
                "Run `nvidia-smi`: if it fails or shows an older CUDA version than PyTorch's,"
                " update the driver, or install a PyTorch built for that version.",
            )
        else:
            yield Advice(
                "slower",
                f"There is an NVIDIA driver, but this PyTorch was built for {machine.built_for}.",
                "Install a PyTorch built for CUDA (pytorch.org, Get started), then gptj_q8 anew.",
            )
    for gpu in machine.gpus:
        if machine.built_for.startswith("CUDA") and float(gpu.capability) < OLDEST_CAPABILITY:
            yield Advice(
                "slower",
                f"{gpu.name} has compute capability {gpu.capability}: neither nvcc 13 nor Triton"
                " compiles for Volta, Pascal and older, so it runs plain PyTorch.",
                "Compare with `--device cpu`, where our kernels run; a T4 or newer has kernels.",
            )


def about_kernels(
    machine: Machine, backends: Sequence[Backend], checks: Sequence[Check]
) -> Iterator[Advice]:
    """On wrong results, and on backends that could serve here and cannot."""
    for check in checks:
        if not check.ok:
            wrong = check.failure or f"its error is {check.error:.2g}, at most {check.bound:.2g}"
            yield Advice(
                "problem",
                f"{check.op} in {check.dtype} fails in {check.backend} on {check.device}: {wrong}.",
                "Please report it with the output of `gptj-q8 doctor --json`; until then"
                ' `with gptj_q8.backends.use("reference"):` computes it right, slowly.',
            )
    reasons = {backend.name: backend.reason for backend in backends}
    if reason := reasons["cpu"]:
        yield _about_cpu(machine, reason)
    else:
        yield from _about_instruction_sets(
            next(backend for backend in backends if backend.name == "cpu")
        )
    usable = [gpu for gpu in machine.gpus if _has_kernels(machine, gpu.capability)]
    if usable and machine.built_for.startswith("CUDA") and (reason := reasons["cuda"]):
        yield Advice(
            "slower",
            f"The CUDA library does not serve {usable[0].name}: {reason}.",
            "Install the CUDA toolkit (nvcc) of PyTorch's version,"
            f" {machine.built_for.removeprefix('CUDA ')}, then {_reinstall()}.",
        )
    if usable and (reason := reasons["triton"]):
        yield Advice(
            "slower",
            f"Triton does not serve {usable[0].name}: {reason}.",
            "Run `pip install 'triton>=3.6'` (Linux), in the version that your PyTorch asks for.",
        )


def _about_cpu(machine: Machine, reason: str) -> Advice:
    """On a CPU library that is missing (the reference serves), or is there and does not load."""
    if "does not load" in reason:
        return Advice(
            "problem",
            f"{reason[0].upper()}{reason[1:]}.",
            f"With the PyTorch that is installed now, {_reinstall()}.",
        )
    if not machine.system.startswith("Linux"):
        return Advice(
            "slower",
            f"On {machine.system} gptj_q8 runs in plain PyTorch: its kernels are built on Linux.",
            "For speed use Linux; on Windows that can be WSL.",
        )
    return Advice(
        "slower",
        f"The CPU runs plain PyTorch: {reason.partition(';')[0]}.",
        "Install a C++ compiler (Debian and Ubuntu: `apt-get install g++`; Fedora:"
        f" `dnf install gcc-c++`), then {_reinstall()}.",
    )


def _about_instruction_sets(cpu: Backend) -> Iterator[Advice]:
    """On AVX-512 or AVX2 that PyTorch sees here and this build of ours does without."""
    seen = torch.backends.cpu.get_cpu_capability().lower()  # "AVX512", "AVX2", "DEFAULT", ...
    if seen in ("avx512", "avx2") and not any(isa.startswith(seen) for isa in cpu.instruction_sets):
        yield Advice(
            "slower",
            f"This CPU has {seen.upper()}, and the CPU library was built without it.",
            f"Install a newer C++ compiler (GCC 11 knows all of them), then {_reinstall()}.",
        )


def _has_kernels(machine: Machine, capability: str) -> bool:
    return machine.built_for.startswith("ROCm") or float(capability) >= OLDEST_CAPABILITY


def _pip_install(packages: Sequence[Package]) -> str:
    return shlex.join(["pip", "install", *(package.name + package.wanted for package in packages)])


def _reinstall() -> str:
    """How to build gptj_q8 anew, from the folder that it was installed from if it lies there."""
    root = Path(__file__).parents[2]
    folder = str(root) if (root / "setup.py").exists() else "THE_CLONE_OR_SDIST"
    return (
        "run `pip install -v --no-build-isolation --no-deps --force-reinstall"
        f" {shlex.quote(folder)}`"
    )
