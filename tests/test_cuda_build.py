"""Building the CUDA library: what it is built for, and what it needs of PyTorch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cpu_driver import build_settings

from gptj_q8 import backends


def test_architectures_are_chosen_or_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = build_settings()
    monkeypatch.setenv("GPTJ_Q8_CUDA_ARCHS", "75, 90a")
    assert settings.cuda_archs() == ["75", "90a"]
    monkeypatch.setenv("GPTJ_Q8_CUDA_ARCHS", "80 sm_90")
    with pytest.raises(settings.NotBuiltError, match="GPTJ_Q8_CUDA_ARCHS has 'sm_90'"):
        settings.cuda_archs()
    monkeypatch.delenv("GPTJ_Q8_CUDA_ARCHS")
    if not torch.cuda.is_available():
        with pytest.raises(settings.NotBuiltError, match="PyTorch sees no NVIDIA GPU here"):
            settings.cuda_archs()


def test_hopper_is_built_with_what_only_hopper_has(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = build_settings()
    monkeypatch.delenv("GPTJ_Q8_CUDA_ARCHS", raising=False)
    seen = subprocess.CompletedProcess([], 0, "90 80 120\n")
    monkeypatch.setattr(settings.subprocess, "run", lambda *args, **options: seen)
    assert settings.cuda_archs() == ["80", "90a", "120"]


def test_without_nvcc_the_build_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = build_settings()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(settings.NotBuiltError, match="no nvcc on the PATH or in /nowhere/bin"):
        settings.find_nvcc()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_forcing_what_is_not_there_is_one_sentence() -> None:
    with pytest.raises(RuntimeError, match="backends: cuda is unavailable: ") as caught:
        backends.use("cuda").__enter__()
    assert "\n" not in str(caught.value)


def shim_of_oldest_torch() -> set[str]:
    """Functions that PyTorch's C headers declare for 2.10, the CUDA ones too."""
    settings = build_settings()
    include = Path(torch.__file__).parent / "include"
    text = "#define USE_CUDA\n#include <torch/csrc/stable/c/shim.h>\n"
    target = f"-DTORCH_TARGET_VERSION={settings.TORCH_TARGET}"
    done = subprocess.run(
        ["g++", "-E", "-P", "-x", "c++", "-std=c++17", "-I", str(include), target, "-"],
        input=text, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", done.stdout))


def test_the_library_links_and_needs_pytorch_2_10_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needed in ("nvcc", "g++", "nm"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not on the PATH: the CUDA library is not built")
    settings = build_settings()
    monkeypatch.setenv("GPTJ_Q8_CUDA_ARCHS", "75")
    library = next(each for each in settings.LIBRARIES if each.name == "gptj_q8._cuda")
    built = tmp_path / "_cuda.abi3.so"
    library.build(tmp_path, built)
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(built)], capture_output=True, text=True, check=True
    ).stdout
    undefined = {line.split()[-1] for line in symbols.splitlines()}
    runtime = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_ITM_|^__gmon_start__$")
    ours = {symbol for symbol in undefined if not runtime.search(symbol)}
    assert "aoti_torch_get_current_cuda_stream" in ours
    assert ours <= shim_of_oldest_torch()
