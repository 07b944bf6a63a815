"""How the compiled CPU library is built: its instructions, its sources, sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import NEEDS_CPU_KERNELS
from cpu_driver import ROOT, build_driver, build_settings
from setuptools import Distribution

from gptj_q8.backends import cpu

LIBRARY = ROOT / "gptj_q8" / "_cpu.abi3.so"
EMULATED_TILES = f'-DQ8_TILES="{ROOT / "tests" / "tiles_on_cpu.h"}"'

pytestmark = NEEDS_CPU_KERNELS


# What only the functions of an instruction set may contain, beside what those before it may.
GATED = {
    "avx2": r"%ymm|\tv[a-z]",
    "avx512bw": (
        r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]\b"
        r"|\t(pext|pdep|bzhi|mulx|rorx|sarx|shlx|shrx)\b"  # BMI2
    ),
    "avx512": r"\t(vperm[it]?2?b|vpmultishiftqb|vdpbf16ps|vcvtne\w*bf16\w*)\b",
    "amx": r"\t(t(dp|ile)|ldtile|sttile)",
}
# Nobody has these: gathers are slow, and half-precision arithmetic is not chosen at all.
NEVER = r"\tvp?gather|\tv\w+(ph|sh)\b(?<!\tvcvtps2ph)(?<!\tvcvtph2ps)"


def test_only_gated_files_hold_gated_instructions() -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "x86-64" not in listing:
        pytest.skip("the gated instructions are those of x86-64")
    function, isa = "", "portable"
    found: dict[str, set[str]] = {name: set() for name in GATED}
    for line in listing.splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = heading[1]
            named = re.search(r"\b(avx\w+|amx)::", function)
            isa = named[1] if named else "portable"
            continue
        instruction = line.partition("#")[0].partition("<")[0]
        allowed = {name: i for i, name in enumerate(["portable", *GATED])}[isa]
        for rank, (name, pattern) in enumerate(GATED.items(), 1):
            if re.search(pattern, instruction):
                assert rank <= allowed, f"{function} holds an instruction of {name}: {line}"
                found[name].add(isa)
        if "\tv" in instruction:  # most are not, and this loop is long
            assert not re.search(NEVER, instruction), f"{function}: {line}"
    for name in set(cpu.instruction_sets()) & set(GATED):
        assert name in found[name], f"{name} uses none of its own instructions"


def test_a_source_edited_during_a_build_is_built_again(tmp_path: Path) -> None:
    settings = build_settings()
    source, builds = tmp_path / "kernel.cpp", []

    class Edited(settings.Extension):
        def build(self, folder: Path, target: Path) -> None:
            builds.append(target)
            if len(builds) == 1:
                source.write_text("edited")
                # Clocks step back at times, and a file system's lags by milliseconds.
                os.utime(source, (begun, begun))
            target.write_text("library")

    source.write_text("first")
    begun = source.stat().st_mtime + 1e-3
    command = settings.BuildLibraries(Distribution())
    command.initialize_options()
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.finalize_options()
    for expected in (1, 2, 2):
        command.build_extension(Edited("edited", [str(source)], depends=[]))
        assert len(builds) == expected
        time.sleep(0.02)


def test_the_compiler_is_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = build_settings()
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert settings.cxx() == ["ccache", "g++", "-m64"]
    monkeypatch.delenv("CXX")
    # Python may have been built elsewhere, with a compiler that this machine lacks.
    for name, expected in (
        (f"{sys.executable} -pthread", [sys.executable, "-pthread"]),
        ("no-such-compiler -pthread", ["c++"]),
        (None, ["c++"]),
    ):
        monkeypatch.setattr(settings.sysconfig, "get_config_var", lambda _, name=name: name)
        assert settings.cxx() == expected


def test_amx_kernels_on_a_cpu_without_amx(tmp_path: Path) -> None:
    """Their tile instructions done by tiles_on_cpu.h."""
    settings, isas = build_settings(), cpu.instruction_sets()
    if "amx" in isas:
        pytest.skip("this CPU has AMX, and the matrix of ops tests it")
    if "avx512" not in isas:
        pytest.skip("the AMX kernels also need AVX-512 with VBMI and BF16")
    if shutil.which(settings.cxx()[0]) is None:
        pytest.skip(f"no compiler {settings.cxx()[0]}")
    driver = build_driver(settings.cxx(), ["amx", "avx512"], tmp_path, ["-O1", EMULATED_TILES])
    done = subprocess.run([driver, "amx"], capture_output=True, text=True, check=False)
    assert "amx: 0 failures" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    settings = build_settings()
    if shutil.which(settings.cxx()[0]) is None:
        pytest.skip(f"no compiler {settings.cxx()[0]}")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Werror"]
    isas = [name for name in cpu.instruction_sets() if name not in ("portable", "amx")]
    if "avx512" in isas:
        isas.append("amx")  # emulated, for sanitizers do not see what tile instructions touch
        flags.append(EMULATED_TILES)
    subprocess.run([build_driver(settings.cxx(), isas, tmp_path, flags)], check=True)
