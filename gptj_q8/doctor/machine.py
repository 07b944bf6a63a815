"""The hardware, the system and PyTorch's view of them."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

# Where Linux keeps the limit of a container, of its newer and of its older control groups.
CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class Gpu:
    """A GPU that PyTorch sees. capability: NVIDIA's compute capability, or AMD's gfx name."""

    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True)
class Machine:
    """The machine, and PyTorch's view of it.

    memory_bytes: of the host, None where the system does not tell.
    built_for: what PyTorch was built for, "CUDA 13.0", "ROCm 6.4" or "CPU".
    nvidia_driver: whether one is installed.
    """

    system: str
    python: str
    cpu: str
    cores: int
    threads: int
    memory_bytes: int | None
    torch: str
    built_for: str
    nvidia_driver: bool
    gpus: tuple[Gpu, ...]


def describe() -> Machine:
    """Looks at this machine."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cpu=cpu_model(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=host_memory(),
        torch=torch.__version__,
        built_for=_built_for(),
        nvidia_driver=_has_nvidia_driver(),
        gpus=tuple(_gpu(index) for index in gpus),
    )


def cpu_model() -> str:
    """The processor's name, such as "AMD EPYC 9355"."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory() -> int | None:
    """Bytes of memory that the machine has, or that its container may use where that is less.

    None where the system does not tell.
    """
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            found.append(int(path.read_text()))
    return min(found, default=None)


def _built_for() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    capability = getattr(found, "gcnArchName", "") if torch.version.hip else ""
    return Gpu(found.name, found.total_memory, capability or f"{found.major}.{found.minor}")
