"""Q8Linear and Q8Embedding: what PyTorch code does with modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import decodes, embedding, linear
from torch import nn
from torch.nn.utils import parametrizations

from gptj_q8 import Q8Embedding, Q8Linear
from gptj_q8.nn.conv1d import Q8Conv1D
from gptj_q8.nn.quantized import FrozenCodes

# How a module keeps, moves or rebuilds: each must leave it as it was.
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "to cpu": lambda module: module.to("cpu"),
    "swap": lambda module: nn.Sequential(module)[0],
}


def test_linear_computes_with_the_quantized_weight() -> None:
    float_module, module = linear()
    x = torch.randn(2, 3, 100)
    decoded = module.dequantize()
    assert 0 < (decoded - float_module.weight).norm() / float_module.weight.norm() < 0.02
    torch.testing.assert_close(module(x), F.linear(x, decoded, float_module.bias))
    assert module.bias is float_module.bias
    assert Q8Linear.from_float(nn.Linear(8, 4, bias=False)).bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_embedding_gives_the_decoded_rows(dtype: torch.dtype) -> None:
    _, module = embedding(dtype)
    ids = torch.tensor([[0, 49], [3, 7]])
    assert torch.equal(module(ids), F.embedding(ids, module.dequantize()))
    assert module(ids).dtype == dtype
    with decodes() as calls:
        module(ids)
    assert not calls


def test_the_module_keeps_what_it_replaces_looked_like() -> None:
    _, module = linear(torch.bfloat16)
    assert isinstance(module, nn.Linear)
    assert str(module) == (
        "Q8Linear(in_features=100, out_features=70, bias=True, block_size=64, dtype=torch.bfloat16)"
    )
    _, table = embedding()
    assert isinstance(table, nn.Embedding)
    assert str(table) == "Q8Embedding(50, 40, padding_idx=3, block_size=32, dtype=torch.float32)"
    assert (table.norm_type, table.scale_grad_by_freq, table.sparse) == (2.0, False, False)
    assert not Q8Linear.from_float(nn.Linear(8, 8).eval()).training
    with pytest.raises(ValueError, match="max_norm changes the table"):
        Q8Embedding.from_float(nn.Embedding(5, 8, max_norm=1.0))


def test_a_bad_weight_is_refused() -> None:
    float_module = nn.Linear(100, 70)
    float_module.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="weight has 1 NaN or Inf values"):
        Q8Linear.from_float(float_module)
    for name in ("nf4", "dynamic_unsigned"):
        with pytest.raises(ValueError, match=f"Q8Linear: codebook must be one of .* got '{name}'"):
            Q8Linear.from_float(nn.Linear(4, 4), name)
    with pytest.raises(ValueError, match="block_size must be a power of two"):
        Q8Linear(4, 4, block_size=100)
    with pytest.raises(TypeError, match="Q8Linear: dtype must be float32 or"):
        Q8Linear(4, 4, dtype=torch.float64)


def test_only_a_conv1d_becomes_one_in_8_bits() -> None:
    with pytest.raises(TypeError, match="Q8Conv1D: must be made of a Conv1D, got a Linear"):
        Q8Conv1D.from_float(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        (Q8Linear, nn.Embedding(8, 8)),
        (Q8Linear, nn.LayerNorm(8)),
        (Q8Linear, nn.Conv2d(8, 8, 3)),
        (Q8Linear, nn.ReLU()),
        (Q8Linear, Q8Linear(8, 8)),
        (Q8Linear, parametrizations.weight_norm(nn.Linear(8, 8))),
        (Q8Embedding, nn.Linear(8, 8)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_a_module_of_another_kind_is_refused(kind: Any, module: nn.Module) -> None:
    message = (
        rf"{kind.__name__}: must be made of an nn\.\w+ whose .* got a \w*{type(module).__name__}"
    )
    with pytest.raises(TypeError, match=message):
        kind.from_float(module)


@pytest.mark.parametrize("keep", [COPIES["deepcopy"], COPIES["pickle"]], ids=["deepcopy", "pickle"])
def test_copies_of_tied_layers_are_tied(keep: Any) -> None:
    model = nn.Sequential(linear()[1], linear()[1])
    model[1].tie(model[0])
    copied = keep(model)
    assert copied[0].codes is copied[1].codes
    assert isinstance(copied[0].codes, FrozenCodes)
    assert len(list(copied.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("make", [linear, embedding])
@pytest.mark.parametrize("keep", COPIES.values(), ids=COPIES)
def test_copies_are_exact(keep: Any, make: Any) -> None:
    module = make()[1]
    copied = keep(module)
    assert isinstance(copied.codes, FrozenCodes)
    assert (copied.block_size, copied.dtype) == (module.block_size, module.dtype)
    for name, tensor in module.state_dict().items():
        assert torch.equal(copied.state_dict()[name], tensor)


def test_a_parameter_put_in_place_of_codes_keeps_its_marks() -> None:
    """As loaders do, which mark what they have initialized."""
    module = linear()[1]
    replacement = nn.Parameter(module.codes.data, requires_grad=False)
    replacement._is_hf_initialized = True
    module.codes = replacement
    assert isinstance(module.codes, FrozenCodes)
    assert module.codes._is_hf_initialized


@pytest.mark.parametrize("make", [linear, embedding])
def test_state_dict_round_trip(make: Any) -> None:
    module = make()[1]
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    assert {"codes", "absmax", "codebook"} <= set(stored) <= {"codes", "absmax", "codebook", "bias"}
    for assign in (False, True):
        fresh = copy.deepcopy(module)
        for tensor in fresh.state_dict().values():
            tensor.zero_()
        fresh.load_state_dict(stored, assign=assign)
        assert torch.equal(fresh.weight, module.weight)
        assert isinstance(fresh.codes, FrozenCodes)


def test_state_dict_without_data() -> None:
    module, stored = linear()[1], linear()[1].to("meta").state_dict()
    module.load_state_dict(stored, assign=True)
    assert module.codes.is_meta
    assert module.absmax.is_meta
    assert isinstance(module.codes, FrozenCodes)


def test_the_empty_weight_of_stored_models_is_passed_over() -> None:
    module = linear()[1]
    stored = {**module.state_dict(), "weight": torch.empty(0)}
    assert Q8Linear(100, 70, block_size=64).load_state_dict(stored) == ([], [])
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        module.load_state_dict({**module.state_dict(), "weight": torch.ones(70, 100)})


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("scales", [torch.float32, torch.float16], ids=str)
def test_the_seeds_names_load_too(scales: torch.dtype, assign: bool) -> None:
    module = linear()[1]
    old = {
        "weight": module.codes.data,
        "absmax": module.absmax.to(scales),
        "code": module.codebook.to(scales),
        "bias": module.bias.data,
    }
    fresh = Q8Linear(100, 70, block_size=64)
    fresh.load_state_dict(old, assign=assign)
    assert (fresh.absmax.dtype, fresh.codebook.dtype) == (torch.float32, torch.float32)
    assert torch.equal(fresh.codes, module.codes)
    assert torch.equal(fresh.absmax, module.absmax.to(scales).float())


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("0.codebook", lambda t: t.flip(0), "0: codebook must be sorted"),
        ("0.codebook", lambda t: t.index_fill(0, torch.tensor(9), torch.nan), "0: codebook"),
        (
            "0.absmax",
            lambda t: t.index_fill(0, torch.tensor(9), torch.inf),
            "0: absmax has 1 NaN or",
        ),
        ("0.absmax", lambda t: -t, "0: absmax must not be negative"),
        ("0.absmax", lambda t: t[:-1], "size mismatch for 0.absmax"),
        ("0.codes", lambda t: t.float(), "0: codes must be uint8, got float32"),
        ("0.codes", lambda t: t[:, :-1], "size mismatch for 0.codes"),
    ],
)
def test_bad_state_dicts_are_refused(key: str, change: Any, message: str) -> None:
    model = nn.Sequential(linear()[1])
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored[key] = change(stored[key])
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(stored)


def test_a_float_state_dict_is_refused() -> None:
    float_module, module = linear()
    message = "0: weight is float32 and this layer is in 8 bits; load it into the float model"
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(module).load_state_dict(nn.Sequential(float_module).state_dict())


def test_quantizing_that_fails_leaves_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    _, module = linear()
    before = module.dequantize()

    def full(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("gptj_q8.ops.quantize", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        module._quantize_parts(torch.randn(70, 100), "linear")
    assert torch.equal(module.dequantize(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("how", ["to", "type", "method"])
def test_scales_keep_their_dtype(dtype: torch.dtype, how: str) -> None:
    module = nn.Sequential(linear()[1])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if how == "method":
        short = {torch.bfloat16: "bfloat16", torch.float16: "half", torch.float32: "float"}[dtype]
        getattr(module, short)()
    else:
        getattr(module, how)(dtype)
    assert module[0].dtype == module[0].weight.dtype == module[0].bias.dtype == dtype
    for name in ("0.codes", "0.absmax", "0.codebook"):
        assert torch.equal(module.state_dict()[name], before[name])
        assert module.state_dict()[name].dtype == before[name].dtype


def test_float64_is_refused_and_changes_nothing() -> None:
    module = linear()[1]
    with pytest.raises(TypeError, match="Q8Linear: dtype must be"):
        module.double()
    assert module.bias.dtype == torch.float32


def test_requires_grad_reaches_the_bias_only() -> None:
    module = nn.Sequential(linear()[1]).requires_grad_(True)
    for parameter in module.parameters():
        parameter.requires_grad = True
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["0.bias"]


def test_meta_device_and_back() -> None:
    module = linear()[1]
    shell = copy.deepcopy(module).to("meta")
    assert isinstance(shell.codes, FrozenCodes)
    assert shell(torch.empty(5, 100, device="meta")).shape == (5, 70)
    loaded = shell.to_empty(device="cpu")
    loaded.load_state_dict(module.state_dict())
    x = torch.randn(5, 100)
    assert torch.equal(loaded(x), module(x))
    with torch.device("meta"):
        assert Q8Linear(4, 4).absmax.is_meta


def test_to_the_tests_device(device: torch.device) -> None:
    module, x = linear()[1], torch.randn(5, 100)
    expected = module(x)
    torch.testing.assert_close(module.to(device)(x.to(device)).cpu(), expected)
    assert module.absmax.device.type == device.type
