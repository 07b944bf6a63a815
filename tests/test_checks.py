"""Bad arguments: the right error, one sentence with names and numbers, and nothing changed."""

# ruff: noqa: E501 - a table, one case a line

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import TABLES, random_quantized

from gptj_q8 import ops

W = random_quantized(6, 40, 32)  # 240 elements in 8 blocks
X, DY = torch.ones(3, 40), torch.ones(3, 6)
TABLE = TABLES["dynamic"]()
IDS = torch.tensor([0, 5])


def linear(x: Any = X, codes: Any = W.codes, absmax: Any = W.absmax, **changed: Any) -> Any:
    arguments = {"codebook": TABLE, "bias": None, "block_size": 32} | changed
    return ops.linear(x, codes, absmax, **arguments)


def linear_grad_input(dy: Any = DY, **changed: Any) -> Any:
    arguments = {"absmax": W.absmax, "codebook": TABLE, "block_size": 32} | changed
    return ops.linear_grad_input(dy, arguments.pop("codes", W.codes), **arguments)


def embedding(ids: Any = IDS, dtype: Any = torch.float32, **changed: Any) -> Any:
    arguments = {"codes": W.codes, "absmax": W.absmax, "codebook": TABLE, "block_size": 32}
    return ops.embedding(ids, dtype=dtype, **(arguments | changed))


def dequantize(**changed: Any) -> Any:
    arguments = {"absmax": W.absmax, "codebook": TABLE, "block_size": 32, "dtype": torch.float32}
    return ops.dequantize(changed.pop("codes", W.codes), **(arguments | changed))


def quantize(weight: Any = X, codebook: Any = TABLE, block_size: int = 32) -> Any:
    return ops.quantize(weight, codebook, block_size)


def histogram(weight: Any = X, block_size: int = 32, bins: int = 8) -> Any:
    return ops.histogram(weight, block_size, bins)


def adam_step_(**changed: Any) -> Any:
    arguments = {
        "param": torch.ones(100), "grad": torch.ones(100),
        "m_codes": torch.zeros(100, dtype=torch.uint8), "m_absmax": torch.zeros(4),
        "v_codes": torch.zeros(100, dtype=torch.uint8), "v_absmax": torch.zeros(4),
        "m_codebook": TABLE, "v_codebook": TABLE, "lr": 0.1, "beta1": 0.9, "beta2": 0.99,
        "eps": 1e-8, "weight_decay": 0.0, "step": 1, "block_size": 32,
    }  # fmt: skip
    return ops.adam_step_(**(arguments | changed))


def edited(index: int, value: float) -> torch.Tensor:
    table = TABLE.clone()
    table[index] = value
    return table


BLOCK_SIZE = "block_size must be a power of two from 32 to 4096, got"
NOT_FLOAT = "must be float32 or bfloat16 or float16, got"
BAD = [
    (linear, {"x": X.double()}, TypeError, f"linear: x {NOT_FLOAT} float64"),
    (linear, {"x": X.int()}, TypeError, f"linear: x {NOT_FLOAT} int32"),
    (linear, {"x": torch.ones(3, 39)}, ValueError, "linear: the last dimension of x must be K = 40, got shape [3, 39]"),
    (linear, {"x": torch.tensor(1.0)}, ValueError, "linear: the last dimension of x must be K = 40, got shape []"),
    (linear, {"codes": W.codes.int()}, TypeError, "linear: codes must be uint8, got int32"),
    (linear, {"codes": W.codes.view(-1)}, ValueError, "linear: codes must have 2 dimensions, got shape [240]"),
    (linear, {"absmax": W.absmax[:7]}, ValueError, "linear: absmax must have 8 blocks, got 7"),
    (linear, {"absmax": W.absmax[None]}, ValueError, "linear: absmax must have 1 dimension, got shape [1, 8]"),
    (linear, {"absmax": W.absmax.half()}, TypeError, "linear: absmax must be float32, got float16"),
    (linear, {"codebook": TABLE[:255]}, ValueError, "linear: codebook must have 256 entries, got 255"),
    (linear, {"codebook": TABLE.half()}, TypeError, "linear: codebook must be float32, got float16"),
    (linear, {"bias": torch.ones(5)}, ValueError, "linear: bias must have 6 entries, got 5"),
    (linear, {"bias": torch.ones(6).double()}, TypeError, f"linear: bias {NOT_FLOAT} float64"),
    (linear, {"x": X.to("meta")}, ValueError, "linear: codes must be on meta as x is, got cpu"),
    (linear_grad_input, {"dy": X}, ValueError, "linear_grad_input: the last dimension of dy must be N = 6, got shape [3, 40]"),
    (linear_grad_input, {"dy": X[:, :6].double()}, TypeError, f"linear_grad_input: dy {NOT_FLOAT} float64"),
    (linear_grad_input, {"absmax": W.absmax[:7]}, ValueError, "linear_grad_input: absmax must have 8 blocks, got 7"),
    (embedding, {"ids": X}, TypeError, "embedding: ids must be int64 or int32, got float32"),
    (embedding, {"dtype": torch.int8}, TypeError, f"embedding: dtype {NOT_FLOAT} int8"),
    (embedding, {"ids": torch.tensor([6])}, IndexError, "embedding: ids must be from 0 to 5, got 6"),
    (embedding, {"ids": torch.tensor([-1])}, IndexError, "embedding: ids must be from 0 to 5, got -1"),
    (dequantize, {"codebook": TABLE.double()}, TypeError, "dequantize: codebook must be float32, got float64"),
    (dequantize, {"dtype": torch.float64}, TypeError, f"dequantize: dtype {NOT_FLOAT} float64"),
    (quantize, {"weight": X.long()}, TypeError, f"quantize: weight {NOT_FLOAT} int64"),
    (quantize, {"codebook": TABLE.flip(0)}, ValueError, "quantize: codebook must be sorted ascending"),
    (quantize, {"codebook": edited(7, torch.nan)}, ValueError, "quantize: codebook"),
    (quantize, {"codebook": edited(255, 1.5)}, ValueError, "quantize: codebook"),
    (quantize, {"codebook": edited(127, 1e-9)}, ValueError, "quantize: codebook"),
    (histogram, {"bins": 100}, ValueError, "histogram: bins must be a power of two from 2 to 1048576, got 100"),
    (histogram, {"bins": 0}, ValueError, "histogram: bins must be a power of two from 2 to 1048576, got 0"),
    (adam_step_, {"grad": torch.ones(99)}, ValueError, "adam_step_: grad must have shape [100], got [99]"),
    (adam_step_, {"param": torch.ones(100).int()}, TypeError, f"adam_step_: param {NOT_FLOAT} int32"),
    (adam_step_, {"m_codes": torch.zeros(99, dtype=torch.uint8)}, ValueError, "adam_step_: m_codes must have 100 elements, got 99"),
    (adam_step_, {"v_codes": torch.zeros(100)}, TypeError, "adam_step_: v_codes must be uint8, got float32"),
    (adam_step_, {"v_absmax": torch.zeros(5)}, ValueError, "adam_step_: v_absmax must have 4 blocks, got 5"),
    (adam_step_, {"m_absmax": torch.zeros(8)[::2]}, ValueError, "adam_step_: m_absmax must be contiguous, it is changed in place"),
    (adam_step_, {"param": torch.ones(1).expand(100)}, ValueError, "adam_step_: param must not be expanded, it is changed in place"),
    (adam_step_, {"beta1": 1.0}, ValueError, "adam_step_: beta1 must be at least 0 and below 1, got 1.0"),
    (adam_step_, {"lr": -1.0}, ValueError, "adam_step_: lr must be finite and not negative, got -1.0"),
    (adam_step_, {"eps": float("nan")}, ValueError, "adam_step_: eps must be finite and not negative, got nan"),
    (adam_step_, {"step": 0}, ValueError, "adam_step_: step counts from 1, got 0"),
    *[
        (op, {"block_size": size}, ValueError, f"{op.__name__}: {BLOCK_SIZE} {size}")
        for op in (linear, linear_grad_input, embedding, dequantize, quantize, histogram, adam_step_)
        for size in (0, -32, 16, 48, 8192)
    ],
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    BAD,
    ids=[f"{op.__name__}: {message}" for op, _, _, message in BAD],
)
def test_bad_arguments(op: Any, arguments: Any, error: Any, message: str) -> None:
    op()  # is right without the change
    with pytest.raises(error) as raised:
        op(**arguments)
    assert str(raised.value).startswith(message)


def test_a_refused_adam_step_changes_nothing() -> None:
    param, codes = torch.ones(100), torch.zeros(100, dtype=torch.uint8)
    with pytest.raises(ValueError, match="step counts from 1"):
        adam_step_(param=param, m_codes=codes, step=0)
    assert (param == 1).all()
    assert (codes == 0).all()


def test_scales_that_require_gradients_are_refused() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="linear: codebook must not require a gradient"):
        linear(x=x, codebook=TABLE.clone().requires_grad_())
    with pytest.raises(ValueError, match="linear: absmax must not require a gradient"):
        linear(x=x, absmax=W.absmax.clone().requires_grad_())


def test_tracing_meets_the_same_errors() -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        x, codes, absmax, codebook = (mode.from_tensor(t) for t in (X, *W.parts))
        with pytest.raises(ValueError, match="linear: absmax must have 8 blocks, got 7"):
            ops.linear(x, codes, absmax[:7], codebook, None, 32)
