"""Builds cpu_driver.cpp with the CPU kernels, without Python or PyTorch."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def build_settings() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("gptj_q8_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_driver(
    compiler: Sequence[str], isas: Sequence[str], folder: Path, flags: Sequence[str]
) -> str:
    """The path of the program, with the instruction sets `isas` and the portable code in it."""
    settings = build_settings()
    gates = {name: settings.INSTRUCTION_SETS[name][1].split() for name in isas}
    have = [f"-DQ8_HAVE_{name.upper()}" for name in isas]
    left_out = {"ops", "pool"} | (settings.INSTRUCTION_SETS.keys() - gates.keys())

    def compile_one(source: Path) -> str:
        gate = gates.get(source.stem.rpartition("_")[2], [])
        target = str(folder / f"{source.stem}.o")
        command = [*compiler, *settings.FLAGS.split(), *flags, *gate, *have]
        subprocess.run([*command, "-c", str(source), "-o", target], check=True)
        return target

    kernels = (ROOT / "csrc" / "cpu").glob("*.cpp")
    sources = [p for p in kernels if p.stem.rpartition("_")[2] not in left_out]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, [*sources, ROOT / "tests" / "cpu_driver.cpp"]))
    driver = str(folder / "driver")
    subprocess.run([*compiler, *flags, *objects, "-pthread", "-o", driver], check=True)
    return driver
