"""Arrows point one way, from the command line down to the compiled code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gptj_q8

PACKAGE = Path(gptj_q8.__file__).parent
# From the ground up. A module may import from its own floor and from those below it.
FLOORS = [
    {"codebooks", "backends"},
    {"checks"},
    {"ops"},
    {"_register", "config", "nn", "models", "sliding_window"},
    {"convert"},
    {"checkpoint"},
    {"tied"},
    {
        "hf",
        "pretrained",
        "lora",
        "optim",
        "evaluate",
        "train",
        "generate",
        "memory",
        "tune",
        "doctor",
        "hivemind",
    },
    {"demo", "cli", "__main__"},
]
# Free for all: it imports nothing but _register when loaded, the rest when asked.
ROOT = "__init__"


def floor_of(module: str) -> int:
    for height, floor in enumerate(FLOORS):
        if module in floor:
            return height
    raise AssertionError(f"gptj_q8.{module} stands on no floor: add it to FLOORS")


def imported_modules(path: Path) -> set[str]:
    """The modules of gptj_q8 that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("gptj_q8.")}
    return {
        name for name in found if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()
    }


def test_imports_point_down() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == ROOT:
            continue
        for imported in imported_modules(path):
            if imported != module and floor_of(imported) > floor_of(module):
                wrong.append(f"{path.relative_to(PACKAGE)} imports gptj_q8.{imported}, above it")
    assert not wrong


def test_only_the_files_for_gptj_name_it() -> None:
    allowed = {"models", "demo", "hivemind.py", "cli"}
    naming = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if re.search(r"GPTJ(?!_Q8)|modeling_gptj|transformers\.models\.gptj", path.read_text())
    }
    assert naming <= allowed


def in_a_new_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_the_package_is_light() -> None:
    """It must not pull in what only some commands need, nor PyTorch, which `--help` needs not."""
    heavy = {"torch", "numpy", "transformers", "peft", "accelerate", "datasets", "typer", "rich"}
    loaded = in_a_new_process("import sys, gptj_q8; print(*sys.modules)")
    assert not heavy & set(loaded.split())


# Those that the ops import: they are half loaded when PyTorch, and so the ops, are.
@pytest.mark.parametrize("first", ["gptj_q8", "gptj_q8.checks", "gptj_q8.codebooks", "torch"])
def test_the_ops_are_there_whatever_is_imported_first(first: str) -> None:
    code = f"import {first}, gptj_q8, torch; print(torch.ops.gptj_q8.linear.default)"
    assert in_a_new_process(code) == "gptj_q8.linear.default"


@pytest.mark.parametrize("other", ["import torch", "gptj_q8.Q8Linear"])
@pytest.mark.parametrize("one", ["gptj_q8.codebooks", "gptj_q8.ops", "from gptj_q8 import nn"])
def test_threads_may_be_the_first_to_use_it(one: str, other: str) -> None:
    code = f"""
import threading, gptj_q8
begin, failed = threading.Barrier(2), []
def use(statement):
    begin.wait()
    try:
        exec(statement)
    except BaseException as error:
        failed.append(repr(error))
threads = [threading.Thread(target=use, args=[each]) for each in ({one!r}, {other!r})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
import torch
print(failed, torch.ops.gptj_q8.linear.default)"""
    assert in_a_new_process(code) == "[] gptj_q8.linear.default"


def test_it_can_be_loaded_again_before_pytorch() -> None:
    code = """
import sys, gptj_q8
for name in [name for name in sys.modules if name.startswith("gptj_q8")]:
    del sys.modules[name]
import gptj_q8, torch
print(torch.ops.gptj_q8.linear.default)"""
    assert in_a_new_process(code) == "gptj_q8.linear.default"


def test_modules_come_when_asked_for() -> None:
    named = sorted(set(re.findall(r"`gptj_q8\.(\w+)`", gptj_q8.__doc__)) | set(gptj_q8._MODULES))
    code = f"import gptj_q8; print(*(getattr(gptj_q8, name).__name__ for name in {named}))"
    assert in_a_new_process(code).split() == [f"gptj_q8.{name}" for name in named]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gptj_q8.nothing  # noqa: B018
