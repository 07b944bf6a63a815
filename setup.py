"""Builds the compiled parts. Metadata stands in pyproject.toml.

Each library is optional: where it cannot be built, the build says so in one sentence and carries
on, and the package works without it in plain PyTorch, slower. No library includes Python.h or
links to Python: they register operators with PyTorch's stable ABI and are loaded with
torch.ops.load_library, so one file serves Python 3.11 and newer and PyTorch 2.10 and newer.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent

# The oldest PyTorch that a library built here runs on: 2.10.
TORCH_TARGET = "0x020a000000000000"

# Flags of the files named *_<isa>.cpp: only these may contain the instructions of that set.
# isa.cpp chooses among the sets at run time. A new set is a line here and one in isa.cpp.
X86 = ("x86_64", "amd64")
ARM = ("aarch64", "arm64")
_AVX512BW = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mbmi2"
_AVX512 = f"{_AVX512BW} -mavx512vbmi -mavx512bf16"
INSTRUCTION_SETS = {
    "amx": (X86, f"{_AVX512} -mamx-tile -mamx-bf16"),
    "avx512": (X86, _AVX512),
    "avx512bw": (X86, _AVX512BW),
    "avx2": (X86, "-mavx2 -mfma -mf16c"),
    "neon": (ARM, ""),
}

# No -ffast-math, and no contraction of a * b + c: codes are the same, bit for bit, everywhere.
# Without -fno-trapping-math GCC leaves loops that choose between two results unvectorized.
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden"
    " -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra"
    f" -DTORCH_TARGET_VERSION={TORCH_TARGET}"
)


class NotBuiltError(Exception):
    """A library cannot be built here; the message says why."""


class Library(Extension):
    """A shared library that knows how to build itself. instead: what runs without it."""

    instead: str

    def __init__(self, name: str, folders: list[str]) -> None:
        files = [f for folder in folders for f in sorted((ROOT / folder).iterdir())]
        paths = [str(f.relative_to(ROOT)) for f in files if f.is_file()]
        super().__init__(
            name,
            sources=[p for p in paths if p.endswith((".cpp", ".cu"))],
            depends=[p for p in paths if p.endswith((".h", ".cuh"))] + ["setup.py"],
            py_limited_api=True,
            optional=True,
        )

    def build(self, folder: Path, target: Path) -> None:
        """Compiles in `folder` and links `target`, or raises NotBuiltError."""
        raise NotImplementedError


class CpuLibrary(Library):
    instead = "slower, in plain PyTorch"

    def build(self, folder: Path, target: Path) -> None:
        torch = torch_folder()
        machine = platform.machine().lower()
        usable = {isa: f for isa, (machines, f) in INSTRUCTION_SETS.items() if machine in machines}

        def compile_one(source: str, flags: str = "") -> str:
            built = folder / Path(source).with_suffix(".o").name
            includes = ["-isystem", str(torch / "include")]
            run(cxx(), *FLAGS.split(), *flags.split(), *includes, "-c", source, "-o", str(built))
            return str(built)

        def isa_of(source: str) -> str | None:
            return next((i for i in INSTRUCTION_SETS if source.endswith(f"_{i}.cpp")), None)

        chooser = next(s for s in self.sources if Path(s).name == "isa.cpp")
        plain = [s for s in self.sources if isa_of(s) is None and s != chooser]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            gated = {
                isa: [pool.submit(compile_one, s, f) for s in self.sources if isa_of(s) == isa]
                for isa, f in usable.items()
            }
            objects = list(pool.map(compile_one, plain))
        built = {}
        for isa, jobs in gated.items():
            try:
                built[isa] = [job.result() for job in jobs]
            except NotBuiltError as error:
                say(f"gptj_q8: the CPU library does without {isa}: {error}.")
        if "avx512" not in built and built.pop("amx", None):  # which calls its functions
            say("gptj_q8: the CPU library does without amx, which needs avx512.")
        objects += [built_object for of_isa in built.values() for built_object in of_isa]
        have = [f"-DQ8_HAVE_{isa.upper()}" for isa in built]
        objects.append(compile_one(chooser, " ".join(have)))
        # No path to PyTorch is stored: it is loaded already when the library is.
        run(cxx(), "-shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(target))


class CudaLibrary(Library):
    """Compiled for the architectures in GPTJ_Q8_CUDA_ARCHS, such as "75 80 90a" as nvcc names them
    after sm_; without that for the GPUs that PyTorch sees here, and not at all where it sees none.
    """

    instead = "on a GPU with Triton"

    def build(self, folder: Path, target: Path) -> None:
        nvcc = find_nvcc()
        archs = cuda_archs()
        torch = torch_folder()
        say(f"gptj_q8: compiling the CUDA library for {', '.join(f'sm_{arch}' for arch in archs)}.")
        host = f"-fPIC,-fvisibility=hidden,-DTORCH_TARGET_VERSION={TORCH_TARGET}"
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        # A newer GPU than all of these compiles what runs on any (90a runs on nothing else).
        newest = max((a for a in archs if a.isdigit()), key=int, default=None)
        if newest is not None:
            codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")

        def compile_one(source: str) -> str:
            built = str(folder / Path(source).with_suffix(".o").name)
            flags = [
                "-std=c++17",
                "-O3",
                "-Icsrc",
                "-Xcompiler",
                host,
                "-isystem",
                f"{torch}/include",
            ]
            run(
                [nvcc],
                *flags,
                *(codes if source.endswith(".cu") else []),
                "-c",
                source,
                "-o",
                built,
            )
            return built

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, self.sources))
        # PyTorch's CUDA part is named where it is here, so that the loader finds the stream there.
        cuda_part = ["-ltorch_cuda"] if (torch / "lib" / "libtorch_cuda.so").exists() else []
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", *cuda_part]
        run([nvcc], "-shared", "-cudart", "static", *objects, *libraries, "-o", str(target))


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        raise NotBuiltError(f"no nvcc on the PATH or in {home}/bin (CUDA_HOME chooses)")
    return found


def cuda_archs() -> list[str]:
    """From GPTJ_Q8_CUDA_ARCHS, else of the GPUs that PyTorch sees."""
    if chosen := os.environ.get("GPTJ_Q8_CUDA_ARCHS", "").replace(",", " ").split():
        wrong = [arch for arch in chosen if not re.fullmatch(r"\d{2,3}[a-z]?", arch)]
        if wrong:
            raise NotBuiltError(
                f"GPTJ_Q8_CUDA_ARCHS has {wrong[0]!r}; write numbers as in sm_90a: 75 80 90a"
            )
        return chosen
    question = (
        "import torch; n = torch.cuda.device_count() if torch.version.cuda else 0; "
        "print(*{'%d%d' % torch.cuda.get_device_capability(i) for i in range(n)})"
    )
    asked = subprocess.run(
        [sys.executable, "-c", question], text=True, capture_output=True, check=False
    )
    seen = sorted(asked.stdout.split(), key=int) if asked.returncode == 0 else []
    seen = ["90a" if arch == "90" else arch for arch in seen]  # with wgmma
    if not seen:
        raise NotBuiltError(
            'PyTorch sees no NVIDIA GPU here (GPTJ_Q8_CUDA_ARCHS="80 90a" builds for others)'
        )
    return seen


def cxx() -> list[str]:
    """CXX where it is set, else the compiler that Python was built with if it is here, else c++."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    pythons = shlex.split(sysconfig.get_config_var("CXX") or "")
    return pythons if pythons and shutil.which(pythons[0]) else ["c++"]


def run(compiler: list[str], *arguments: str) -> None:
    try:
        done = subprocess.run(
            [*compiler, *arguments], cwd=ROOT, text=True, capture_output=True, check=False
        )
    except FileNotFoundError:
        raise NotBuiltError(f"there is no C++ compiler {compiler[0]} (CXX chooses)") from None
    if done.stdout or done.stderr:
        say(done.stdout + done.stderr)
    if done.returncode != 0:
        source = next((a for a in arguments if a.endswith((".cpp", ".cu"))), "linking")
        raise NotBuiltError(f"{compiler[0]} failed ({source}; its message stands above)")


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuiltError(
            "PyTorch is not installed where the build runs (pip: use --no-build-isolation)"
        )
    return Path(spec.origin).parent


def edit_times(sources: list[str]) -> list[int]:
    return [(ROOT / source).stat().st_mtime_ns for source in sources]


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


class BuildLibraries(build_ext):
    def build_extension(self, ext: Library) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        sources = [*ext.sources, *ext.depends]
        edited = edit_times(sources)
        if not self.force and target.exists() and target.stat().st_mtime_ns > max(edited):
            return
        folder = Path(self.build_temp).resolve() / ext.name
        for path in (folder, target.parent):
            path.mkdir(parents=True, exist_ok=True)
        try:
            if not sys.platform.startswith("linux"):
                raise NotBuiltError("the kernels were never tried outside Linux")
            ext.build(folder, target.resolve())
            if edit_times(sources) != edited:  # meanwhile: the next build compiles it
                os.utime(target, ns=(max(edited), max(edited)))
        except (NotBuiltError, OSError) as error:
            # A library of older sources would be worse than none.
            for stale in (target, ROOT / "gptj_q8" / target.name):
                stale.unlink(missing_ok=True)
            say(
                f"gptj_q8: {ext.name} was not built: {error}."
                f" The package works without it, {ext.instead}."
            )


LIBRARIES = [
    CpuLibrary("gptj_q8._cpu", ["csrc/common", "csrc/cpu"]),
    CudaLibrary("gptj_q8._cuda", ["csrc/common", "csrc/cuda"]),
]

if __name__ == "__main__":
    setup(
        # What `gptj-q8 bench` runs lies beside the package in a clone, and inside it in a wheel.
        packages=[*find_packages(include=["gptj_q8*"]), "gptj_q8._benchmarks"],
        package_dir={"gptj_q8._benchmarks": "benchmarks"},
        ext_modules=LIBRARIES,
        cmdclass={"build_ext": BuildLibraries},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
