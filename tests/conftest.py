"""Options and fixtures that every test may use."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import EMULATED, backend_ids, forced, triton_is_interpreted

from gptj_q8 import backends

if TYPE_CHECKING:
    from transformers import GPTJForCausalLM

    from gptj_q8.train.report import Report

if backends.load("triton").interpreted():
    import interpreter

    interpreter.repair()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="of the tests' tensors; if not cpu, only tests that use it run",
    )
    parser.addoption("--slow", action="store_true", help="also run what takes minutes or gigabytes")


def pytest_configure(config: pytest.Config) -> None:
    """No test needs the network, and one that asks it would wait for its retries."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") != "cpu":  # the others would show nothing new
        others = [item for item in items if "device" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes or gigabytes: run with --slow"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(
    params=[] if backends.unavailable("cpu") else backends.load("cpu").instruction_sets()
)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the compiled CPU backend by turns, forced."""
    with backends.load("cpu").force_isa(request.param):
        yield request.param


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Makes torch.empty return NaN (or the largest integer), which exposes unwritten outputs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=backend_ids())
def each_backend(
    request: pytest.FixtureRequest, device: torch.device, poisoned_empty: None
) -> Iterator[str]:
    """Every backend by turns, forced; skips where it cannot serve the device."""
    if device.type != "cpu" and request.param.startswith("cpu"):
        pytest.skip(f"{request.param}: serves CPU tensors, the device is {device}")
    if device.type != "cpu" and request.param == EMULATED:
        pytest.skip(f"{EMULATED}: takes CPU tensors, the device is {device}")
    if device.type == "cpu" and request.param == "cuda":
        pytest.skip("cuda: serves a GPU's tensors, run with --device cuda")
    if device.type == "cpu" and request.param == "triton" and not triton_is_interpreted():
        pytest.skip("triton: runs on the CPU in a process of its own, which test_triton.py starts")
    threads = torch.get_num_threads()
    if request.param == "reference":
        torch.set_num_threads(1)  # its many small steps lose tenfold to threads on a busy machine
    try:
        with forced(request.param):
            yield request.param
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Runs PyTorch on one thread.

    Tiny models lose up to a hundredfold to threads that wait for each other on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Tiny checkpoints on disk. What makes them takes a second to import, so only their users pay.


@pytest.fixture(scope="session")
def float_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J in float16, in several shards."""
    from tiny import gptj

    path = tmp_path_factory.mktemp("float")
    gptj().half().save_pretrained(path, max_shard_size="50KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="session")
def stored_dir(float_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 8 bits, in several shards."""
    from tiny import load

    from gptj_q8.config import Q8Config

    path = tmp_path_factory.mktemp("stored")
    load(float_dir, quantization_config=Q8Config()).save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="session")
def eight_bit_gptj() -> GPTJForCausalLM:
    """In memory, in 8 bits, for adapters; to be copied, not changed."""
    from tiny import QUICK, gptj

    from gptj_q8.convert import quantize_

    return quantize_(gptj(), QUICK)


@pytest.fixture(scope="session")
def decoded_gptj(eight_bit_gptj: GPTJForCausalLM) -> GPTJForCausalLM:
    """The float model of the very same weights: what adapters must agree with."""
    from gptj_q8.convert import dequantize_

    return dequantize_(copy.deepcopy(eight_bit_gptj))


@pytest.fixture(scope="module")
def model() -> Iterator[GPTJForCausalLM]:
    """In 8 bits, with weights that make it prefer some tokens; a file's tests share and keep it."""
    from tiny import QUICK, gptj

    from gptj_q8.convert import quantize_
    from gptj_q8.hf import layers

    model = quantize_(gptj(initializer_range=0.2), QUICK)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield model
    assert len(list(layers(model))) == 14, "a test above has changed the shared model"
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.fixture(scope="module")
def decoded(model: GPTJForCausalLM) -> GPTJForCausalLM:
    """The float model of its weights, which Transformers alone runs."""
    from gptj_q8.convert import dequantize_

    return dequantize_(copy.deepcopy(model))


@pytest.fixture
def one_file(float_dir: Path, tmp_path: Path) -> Path:
    """The same in 8 bits in one file, to be damaged."""
    from tiny import QUICK, load

    load(float_dir, quantization_config=QUICK).save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


@pytest.fixture(scope="session")
def source(float_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one in float16 with a tokenizer beside it, to be converted from file to file."""
    path = tmp_path_factory.mktemp("source")
    shutil.copytree(float_dir, path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "LICENSE"):
        (path / name).write_text(f'{{"this is": "{name}"}}')
    (path / "optimizer.pt").write_text("none of ours")
    return path


@pytest.fixture(scope="session")
def byte_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J in float16 whose tokens are bytes, with its tokenizer; to be read, not changed."""
    from command_line import save_byte_gptj

    return save_byte_gptj(tmp_path_factory.mktemp("bytes"), seed=0)


@pytest.fixture(params=["load", "convert", "hivemind"])
def read_old(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Any]:
    """Each way to read a checkpoint of the hivemind family; a failed conversion leaves nothing."""
    import gptj_q8
    from gptj_q8 import hivemind

    def convert(path: Path) -> None:
        target = tmp_path / "place" / "new"
        target.parent.mkdir()
        try:
            gptj_q8.convert_checkpoint(path, target)
        finally:
            assert not list(target.parent.iterdir())

    return {
        "load": gptj_q8.from_pretrained,
        "convert": convert,
        "hivemind": hivemind.GPTJForCausalLM.from_pretrained,
    }[request.param]


@pytest.fixture(scope="session")
def byte_tokenizer(byte_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(byte_dir)


@pytest.fixture
def tune(byte_dir: Path, byte_tokenizer: Any, tmp_path: Path) -> Callable[..., Report]:
    """Fine-tunes a fresh model into `out`."""
    import finetuning

    def run(**changes: Any) -> Report:
        return finetuning.tune(byte_dir, byte_tokenizer, **{"output": tmp_path / "out", **changes})

    return run


@pytest.fixture(scope="module")
def whole_run(
    byte_dir: Path,
    byte_tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: None,
) -> tuple[Report, Path]:
    """A fine-tuning that nothing disturbed, and its folder."""
    import finetuning

    out = tmp_path_factory.mktemp("whole") / "out"
    return finetuning.tune(byte_dir, byte_tokenizer, output=out, prompts=["gato y"]), out


@pytest.fixture
def old_dir(tmp_path: Path) -> Path:
    """A tiny GPT-J as hivemind/gpt-j-6B-8bit is stored."""
    import hivemind_layout

    return hivemind_layout.write(tmp_path / "old", hivemind_layout.state_dict())
