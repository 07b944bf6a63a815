"""The CPU kernels on CPUs that this machine is not: arm64, and x86-64 without AVX, under QEMU.

Slow, for QEMU: `make test-arm` runs them. It installs nothing; on Debian both tools come from
`apt-get install g++-aarch64-linux-gnu qemu-user`. The cases are those of cpu_driver.cpp, which the
sanitizers run too.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cpu_driver import build_driver, build_settings

pytestmark = pytest.mark.slow

ARM_COMPILER = "aarch64-linux-gnu-g++"


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(
                f"{tool} is not installed (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"
            )


def build_static(compiler: str, machine: str, folder: Path) -> str:
    """The driver with every instruction set of a machine, in one static program."""
    sets = build_settings().INSTRUCTION_SETS
    isas = [name for name, (machines, _) in sets.items() if machine in machines]
    return build_driver([compiler], isas, folder, ["-O2", "-static"])


def instruction_sets_that_passed(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^(\w+): 0 failures$", done.stdout, re.MULTILINE)


def test_arm64(tmp_path: Path) -> None:
    need(ARM_COMPILER, "qemu-aarch64")
    driver = build_static(ARM_COMPILER, "aarch64", tmp_path)
    assert instruction_sets_that_passed("qemu-aarch64", driver) == ["neon", "portable"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for x86-64 with its compiler")
def test_x86_without_avx_and_without_avx512(tmp_path: Path) -> None:
    need("qemu-x86_64")
    driver = build_static(build_settings().cxx()[0], "x86_64", tmp_path)
    # The first x86-64 there was, and one of 2013.
    for cpu, expected in (("qemu64", ["portable"]), ("Haswell", ["avx2", "portable"])):
        assert instruction_sets_that_passed("qemu-x86_64", "-cpu", cpu, driver) == expected
