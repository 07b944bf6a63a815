"""The documentation is there and true: docstrings, CONTRIBUTING's paths, commands and examples."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import DTYPES, random_quantized, relative_error

import gptj_q8
from gptj_q8 import backends, codebooks, ops
from gptj_q8.models import layers

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md"]


DOCS = runpy.run_path(str(ROOT / ".ci" / "docs.py"))
API = sorted({*DOCS["MODULES"], *(f"gptj_q8.{name}" for name in gptj_q8._MODULES)})


def public(module: ModuleType) -> dict[str, Any]:
    """What a module offers: what it lists, or else defines."""
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == gptj_q8.__version__


@pytest.mark.parametrize("name", API)
def test_what_is_public_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert public(module)
    for own_name, value in public(module).items():
        if inspect.ismodule(value) or not callable(value):
            continue
        assert value.__doc__, f"{name}.{own_name} has no docstring"
        # Of classes, methods that override one of PyTorch or Transformers do as that one says.
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            inherited = any(hasattr(base, method) for base in value.__mro__[1:])
            if inspect.isfunction(function) and not method.startswith("_") and not inherited:
                assert function.__doc__, f"{name}.{own_name}.{method} has no docstring"


def test_the_pages_of_the_api_are_made(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc is not installed")
    DOCS["write"](tmp_path)
    page = (tmp_path / "gptj_q8.html").read_text()
    modules = {name for name in gptj_q8.__all__ if inspect.ismodule(getattr(gptj_q8, name))}
    for name in set(gptj_q8.__all__) - modules:
        assert f'id="{name}"' in page, name
    pages = {
        str(path.relative_to(tmp_path).with_suffix("")).replace("/", ".")
        for path in tmp_path.rglob("*.html")
    } - {"index"}
    assert pages == {*DOCS["MODULES"], *(f"gptj_q8.{name}" for name in modules)}
    # The first page leads to all others.
    links = set(re.findall(r'href="([\w./]+)\.html', page))
    assert {name.replace(".", "/") for name in pages} - {"gptj_q8"} <= links
    for path in tmp_path.rglob("*.html"):
        # Of private bases pdoc makes links to nowhere.
        for link, anchor in re.findall(r'href="([\w./]*)(?:#([^_":][^":]*))?"', path.read_text()):
            target = path.parent / link if link else path
            assert target.exists(), (path.name, link)
            assert not anchor or f'id="{anchor}"' in target.read_text(), (path.name, link, anchor)


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        ("Sums.\n\nx, y: of one\n    shape. dtype: None\nfor theirs.",
         "Sums.\n\n- `x, y`: of one\n    shape.\n- `dtype`: None\nfor theirs."),
        ("Sums.\ntold(done, total): as it goes.", "Sums.\n\n- `told(done, total)`: as it goes."),
        ("A block: of code.\n\n    x: int = 1", "A block: of code.\n\n    x: int = 1"),
    ],
)  # fmt: skip
def test_parameters_become_a_list(docstring: str, markdown: str) -> None:
    assert DOCS["listed"](docstring) == markdown


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    paths = re.findall(r"(?<![\w./-])((?:csrc|gptj_q8|tests|benchmarks)/[\w./*-]*\w)", text)
    modules = re.findall(r"python3? -m (benchmarks[\w.]*)", text)
    assert paths
    missing = [path for path in paths if not any(ROOT.glob(path))]
    missing += [m for m in modules if importlib.util.find_spec(m) is None]
    assert not missing


def test_the_map_of_contributing_is_the_tree() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text().split("## The tree\n")[1].split("\n\n")[0]
    mapped: set[str] = set()
    for row in page.splitlines()[2:]:
        paths = re.findall(r"`([^`]+)`", row.split("|")[1])
        folder = paths[0].rstrip("/").rpartition("/")[0]
        mapped |= {paths[0], *(f"{folder}/{path}" for path in paths[1:])}
    files = [f"csrc/{path.name}/" for path in (ROOT / "csrc").iterdir()]
    files += [f"gptj_q8/{path.name}" for path in (ROOT / "gptj_q8").glob("*.py")]
    files += [f"gptj_q8/{path.parent.name}/" for path in (ROOT / "gptj_q8").glob("*/__init__.py")]
    entrances = {"gptj_q8/__init__.py", "gptj_q8/__main__.py"}
    others = {"gptj_q8/backends/triton/", "tests/", "benchmarks/", ".ci/"}
    assert mapped == set(files) - entrances | others


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_are_named_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def code_of(heading: str) -> str:
    """The first Python block of a part of CONTRIBUTING.md."""
    part = (ROOT / "CONTRIBUTING.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)[0]


def test_the_codebook_of_contributing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict(vars(codebooks))
    exec(code_of("Add a codebook"), names)
    table = names["squares"]
    monkeypatch.setitem(codebooks.CODEBOOKS, "squares", codebooks._fixed(table))
    monkeypatch.setattr(codebooks, "FOR_WEIGHTS", ("squares",))
    codebooks.check_codebook(table(), "squares")
    linear = torch.nn.Linear(64, 32)
    model = gptj_q8.quantize_(torch.nn.Sequential(linear), gptj_q8.Q8Config(64, "squares"))
    assert torch.equal(model[0].codebook, table())
    x = torch.randn(5, 64)
    assert (model(x) - linear(x)).norm() / linear(x).norm() < 0.02


def test_the_backend_of_contributing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("gptj_q8.backends.whole")
    exec(code_of("Add a backend"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "whole"))
    w = random_quantized(33, 130, 64)
    for dtype in DTYPES:
        x = torch.randn(7, 130).to(dtype)
        with backends.use("whole"):
            y = ops.linear(x, *w.parts, torch.ones(33, dtype=dtype), 64)
            with pytest.raises(NotImplementedError, match="the backend whole lacks it"):
                ops.dequantize(*w.parts, 64, dtype)
        assert y.dtype == dtype
        bound = max(1e-5, torch.finfo(dtype).eps)
        assert relative_error(y, x.double() @ w.truth.T + 1) < bound
    backends.load.cache_clear()
    backends.unavailable.cache_clear()


def test_the_family_of_contributing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of linear layers that nobody knows stays in float until it is named."""

    class TheirLinear(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), TheirLinear(64, 64))
    gptj_q8.quantize_(model)
    assert isinstance(model[1], TheirLinear)
    name = f"{TheirLinear.__module__}.{TheirLinear.__qualname__}"
    monkeypatch.setitem(layers._BY_NAME, name, gptj_q8.Q8Linear)
    gptj_q8.quantize_(model)
    assert isinstance(model[1], gptj_q8.Q8Linear)
