"""Freed tensors give their memory back, in a process of its own: what is set holds for good."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Frees tensors of 16 MiB that lie between small ones still in use, once malloc has seen a larger
# one freed, and prints by how many MiB the anonymous memory is then larger than before.
HOLES = """
import re, sys
from pathlib import Path
import torch
from gptj_q8.lora.allocator import return_large_blocks

def resident():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

print(return_large_blocks() if sys.argv[1] == "set" else None)
torch.ones(31 * 2**18)
before = resident()
large, small = [], []
for _ in range(10):
    large.append(torch.ones(4 * 2**20))
    small.append(torch.ones(10 * 2**10))
assert resident() - before > 120
del large
print(resident() - before)
"""


def run(argument: str, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", HOLES, argument],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return result.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_holes_between_tensors_in_use_are_returned() -> None:
    said, held = run("set")
    assert said == "True"
    assert int(held) < 20
    assert int(run("leave")[1]) > 80  # else there was nothing to mend


def test_what_the_user_set_stays() -> None:
    assert run("set", MALLOC_MMAP_THRESHOLD_="33554432")[0] == "False"
    assert run("set", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=33554432")[0] == "False"
