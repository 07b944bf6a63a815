"""What a result was measured on: hardware, versions, date, commit; no host names, no paths."""

import functools
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.cold import last_level_cache
from benchmarks.results import Machine, Results
from gptj_q8.doctor.machine import cpu_model, usable_cores

PACKAGES = ("gptj_q8", "torch", "triton", "transformers", "bitsandbytes", "torchao")


def describe(device: torch.device) -> Machine:
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Machine(
        device=device.type,
        cpu=cpu_model(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        gpu=gpu.name if gpu else None,
        gpu_memory_bytes=gpu.total_memory if gpu else None,
        compute_capability=f"{gpu.major}.{gpu.minor}" if gpu else None,
        last_level_cache_bytes=last_level_cache(device),
    )


def new_results(device: torch.device, module: str, arguments: list[str]) -> Results:
    """Empty results of `python -m module arguments`."""
    return Results(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(["python", "-m", module, *map(_without_folder, arguments)]),
        commit=_commit(),
        machine=describe(device),
        versions=_versions(),
    )


def slug(device: torch.device) -> str:
    """The device's name as a file name: NVIDIA H100 80GB HBM3 is nvidia-h100-80gb-hbm3."""
    machine = describe(device)
    return re.sub(r"[^a-z0-9]+", "-", (machine.gpu or machine.cpu).lower()).strip("-")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.machine()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # The installed metadata says 2.11.0 where the build is 2.11.0+cu130.
    return versions | {"torch": torch.__version__} | ({"cuda": torch.version.cuda or "none"})


@functools.cache
def _commit() -> str | None:
    """The commit measured, marked "+" where files differ from it, or None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True)
        changes = subprocess.check_output(
            [*git, "status", "--porcelain", "--untracked-files=no"], text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")


def _without_folder(argument: str) -> str:
    return Path(argument).name if "/" in argument else argument
