"""The sdist and the wheel, from clean to use: `make test-packaging`, a few minutes.

Each test installs into an environment of its own, which sees the packages of the one that runs the
tests through links, but for gptj_q8 and what the test leaves out. Whole environments, with every
dependency downloaded, are what `make venv` proves.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
HELPERS = [
    "cases.py",
    "conftest.py",
    "cuda_emulation.py",
    "interpreter.py",
    "modules.py",
    "tiny.py",
]
NO_COMPILER = {"PATH": "", "CXX": "", "CUDA_HOME": "/nowhere"}
MATRIX = sorted(path.name for path in (ROOT / "tests").glob("test_ops_*.py"))
MODULES = ["test_nn.py", "test_nn_weight.py"]
# The tests of what needs no kernel of ours.
PURE = ["test_convert.py", *MODULES, "test_codebooks.py", "test_codebooks_fit.py"]


class Environment:
    """A virtual environment and a folder to work in that holds nothing of the clone."""

    def __init__(self, folder: Path, without: tuple[str, ...]) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        venv.create(folder / "venv", symlinks=True)
        self.bin = folder / "venv" / "bin"
        base = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
        self.site = Path(sysconfig.get_path("purelib", vars=base))
        left_out = ("gptj_q8", "__editable__", *without)
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.lower().startswith(left_out) and entry.suffix != ".pth":
                (self.site / entry.name).symlink_to(entry)

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs its Python in the folder, with these variables; PATH begins with its bin."""
        path = environment.pop("PATH", os.environ["PATH"])
        own = {"PATH": f"{self.bin}:{path}", "OMP_NUM_THREADS": "1", **environment}
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX")}
        return subprocess.run(
            [str(self.bin / "python"), *arguments],
            cwd=self.work,
            env=inherited | {k: v for k, v in own.items() if v},
            capture_output=True,
            text=True,
            check=False,
        )

    def install(self, what: str | Path, *options: str, **environment: str) -> str:
        """What pip and, by -v, the build say. Nothing is downloaded: --no-index."""
        pip = ("-m", "pip", "install", "--no-build-isolation", "--no-index", "-v", *options)
        done = self.python(*pip, str(what), **environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def run(self, code: str, **environment: str) -> str:
        done = self.python("-c", code, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def doctor(self, **environment: str) -> dict:
        done = self.python("-m", "gptj_q8", "doctor", "--json", **environment)
        report = json.loads(done.stdout)
        assert done.returncode == (0 if report["ok"] else 1)
        return report

    def test(self, files: list[str], *options: str, **environment: str) -> str:
        """Runs tests of the clone, copied so that they find the installed package alone."""
        tests = self.work / "tests"
        tests.mkdir()
        for name in [*HELPERS, *files]:
            shutil.copy(ROOT / "tests" / name, tests / name)
        shutil.copy(ROOT / "pyproject.toml", self.work)
        done = self.python("-m", "pytest", *options, *(f"tests/{f}" for f in files), **environment)
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Callable[..., Environment]:
    return lambda without=(): Environment(tmp_path / "environment", without)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git knows of this folder, and nothing that was built in it."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not in a git repository: what belongs to the clone is not known")
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, out], cwd=clone, capture_output=True, check=True)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which must therefore hold every source."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, "-v", "-w", out, sdist], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = out.iterdir()
    return path


def test_the_sdist_holds_what_the_build_and_the_package_need(clone: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    needed = {
        str(path.relative_to(clone))
        for folder in ("csrc", "gptj_q8")
        for path in (clone / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert needed - held == set()
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= held


def test_the_wheel_holds_the_library_and_no_sources(wheel: Path) -> None:
    assert "-cp311-abi3-linux_" in wheel.name
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {"gptj_q8/_cpu.abi3.so", "gptj_q8/py.typed", "gptj_q8/cli/doctor.py"} <= held
    assert "gptj_q8/_benchmarks/registry.py" in held
    assert {name.split("/")[0].removesuffix(".dist-info") for name in held} == {
        "gptj_q8",
        wheel.name.split("-cp311")[0],
    }
    assert any(name.startswith("gptj_q8/demo/model/") for name in held)
    assert not any(name.endswith((".cpp", ".cu", ".h")) for name in held)


def test_the_wheel_works_without_a_compiler(
    wheel: Path, environment: Callable[..., Environment]
) -> None:
    env = environment()
    env.install(wheel, **NO_COMPILER)
    assert env.run("import shutil; print(shutil.which('c++'))", **NO_COMPILER) == "None"
    report = env.doctor(**NO_COMPILER)
    assert report["ok"]
    assert {entry["backend"] for entry in report["served"] if entry["device"] == "cpu"} == {"cpu"}
    assert not [item for item in report["advice"] if item["level"] != "optional"]
    assert {package["name"] for package in report["packages"]} >= {"torch", "transformers"}
    passed = env.test([*MODULES, *MATRIX], "-k", "cpu or nn", **NO_COMPILER)
    assert " passed" in passed
    for command in ("generate demo En -n 3", "bench --tiny"):
        done = env.python("-m", "gptj_q8", *command.split())
        assert done.returncode == 0, done.stderr


def test_without_a_compiler_the_sdist_installs_pure_python(
    sdist: Path, environment: Callable[..., Environment]
) -> None:
    """And without Triton, as on macOS and Windows."""
    env = environment(without=("triton",))
    said = env.install(sdist, "--no-deps", **NO_COMPILER)
    assert "gptj_q8._cpu was not built: there is no C++ compiler c++" in said
    assert not list(env.site.glob("gptj_q8/*.so"))
    assert env.run("import importlib.util as u; print(u.find_spec('triton'))") == "None"
    report = env.doctor(**NO_COMPILER)
    slower = [item for item in report["advice"] if item["level"] == "slower"]
    assert ["was not built" in item["found"] for item in slower] == [True]
    assert "g++" in slower[0]["do"]
    assert {entry["backend"] for entry in report["served"]} == {"reference"}
    # Triton is the one thing asked for on Linux that the doctor misses.
    problems = [item["found"] for item in report["advice"] if item["level"] == "problem"]
    assert len(problems) == (sys.platform == "linux")
    assert all(found.startswith("triton is not installed") for found in problems)
    assert " passed" in env.test(PURE, **NO_COMPILER)


def test_an_editable_install_with_extras_follows_the_clone(
    clone: Path, environment: Callable[..., Environment]
) -> None:
    env = environment()
    env.install(f"{clone}[bench]", "-e")
    where = env.run("import gptj_q8; print(gptj_q8.__file__)")
    assert Path(where) == clone / "gptj_q8" / "__init__.py"
    assert (clone / "gptj_q8" / "_cpu.abi3.so").exists()
    report = env.doctor()
    assert report["ok"]
    bench = {p["name"]: p["installed"] for p in report["packages"] if p["extra"] == "bench"}
    assert bench.keys() == {"pytest-benchmark", "bitsandbytes", "torchao"}
    assert all(bench.values())
    (clone / "gptj_q8" / "added.py").write_text("answer = 42\n")
    assert env.run("from gptj_q8.added import answer; print(answer)") == "42"


TYPED = """
import gptj_q8
from gptj_q8 import optim

reveal_type(gptj_q8.Q8Config())
reveal_type(gptj_q8.quantize_)
reveal_type(gptj_q8.ops.linear)
reveal_type(optim.AdamW8bit)
gptj_q8.Q8Config(block_size="wide")
"""


def test_users_see_types(wheel: Path, environment: Callable[..., Environment]) -> None:
    env = environment()
    env.install(wheel)
    (env.work / "use.py").write_text(TYPED)
    said = env.python("-m", "mypy", "--strict", "--ignore-missing-imports", "use.py").stdout
    lines = [line for line in said.splitlines() if line.startswith("use.py")]
    assert 'Revealed type is "gptj_q8.config.Q8Config"' in lines[0]
    assert "def (model: " in lines[1]
    assert "def (x: torch._tensor.Tensor, codes: torch._tensor.Tensor" in lines[2]
    assert "-> gptj_q8.optim.AdamW8bit" in lines[3]
    assert 'incompatible type "str"; expected "int"' in lines[4]
    assert len(lines) == 5, said
