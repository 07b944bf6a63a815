"""The codebooks against bitsandbytes and closed forms, and the check of a table."""

import hashlib

import numpy as np
import pytest
import torch

from gptj_q8 import codebooks, ops
from gptj_q8.codebooks import CODEBOOKS, check_codebook

# The fixed tables


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("dynamic", "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        ("dynamic_unsigned", "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ],
)
def test_dynamic_maps_are_those_of_bitsandbytes(name: str, digest: str) -> None:
    """Digests of `create_dynamic_map` of bitsandbytes 0.50.2, PyTorch 2.13.0, x86-64 with AVX2."""
    table = getattr(codebooks, name)()
    assert hashlib.sha256(table.numpy().tobytes()).hexdigest() == digest


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="elsewhere torch.linspace, and so bitsandbytes' map, differs in the last bit",
)
def test_dynamic_maps_equal_the_installed_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebooks.dynamic(), functional.create_dynamic_map(signed=True))
    assert torch.equal(codebooks.dynamic_unsigned(), functional.create_dynamic_map(signed=False))


def test_dynamic_follows_its_closed_form() -> None:
    place = np.arange(256) - 127
    m = np.abs(place)
    exponent = np.floor(np.log2(np.maximum(m, 1)))
    value = np.sign(place) * 10 ** (exponent - 6) * (0.9 * (m + 0.5) / 2**exponent - 0.8)
    expected = torch.from_numpy(np.minimum(value, 1).astype(np.float32))
    table = codebooks.dynamic()
    torch.testing.assert_close(table, expected, rtol=2.0**-23, atol=0)
    assert torch.equal(table.half(), expected.half())
    assert torch.equal(table.bfloat16(), expected.bfloat16())


def test_dynamic_unsigned_follows_its_closed_form() -> None:
    x = np.arange(256) + 1
    exponent = np.floor(np.log2(x)) - 1
    value = 10 ** (exponent - 6) * (0.9 * (x + 0.5) / 2 ** (exponent + 1) - 0.8)
    value[[0, 255]] = 0, 1
    expected = torch.from_numpy(value.astype(np.float32))
    torch.testing.assert_close(codebooks.dynamic_unsigned(), expected, rtol=2.0**-22, atol=0)


def test_linear_is_int8() -> None:
    int8 = torch.arange(-128, 128).clamp(min=-127)
    assert torch.equal(codebooks.linear(), int8.float() / 127)


@pytest.mark.parametrize("name", codebooks.FOR_WEIGHTS)
def test_every_codebook_is_of_use_to_a_normal_weight(name: str) -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    table = CODEBOOKS[name](weight, 64)
    decoded = ops.dequantize(*ops.quantize(weight, table, 64), table, 64, torch.float32)
    assert (decoded - weight).norm() / weight.norm() < 0.02


@pytest.mark.parametrize("name", sorted(set(CODEBOOKS) - {"fitted"}))
def test_fixed_tables_are_valid_and_nobody_elses(name: str) -> None:
    weight = torch.empty(0)
    table = CODEBOOKS[name](weight, 64)
    check_codebook(table, "test")
    table[0] = 7
    check_codebook(CODEBOOKS[name](weight, 64), "test")
    assert CODEBOOKS[name](torch.empty(0, device="meta"), 64).device.type == "meta"


# Checking


def edited(entries: dict[int, float]) -> torch.Tensor:
    table = codebooks.linear()
    for index, value in entries.items():
        table[index] = value
    return table


def test_check_accepts_real_tables() -> None:
    """Checkpoints written by old bitsandbytes hold -1 at index 0; padded tables repeat a level."""
    old = codebooks.dynamic()
    old[0] = -1
    check_codebook(old, "test")
    check_codebook(torch.zeros(256), "test")
    check_codebook(edited({128: -0.0}), "test")


@pytest.mark.parametrize(
    ("codebook", "error", "message"),
    [
        (codebooks.linear().double(), TypeError, "must be float32, got torch.float64"),
        (codebooks.linear()[:255], ValueError, r"must have shape \(256,\), got \(255,\)"),
        (codebooks.linear()[None], ValueError, r"must have shape \(256,\), got \(1, 256\)"),
        (edited({3: float("nan")}), ValueError, r"lie in \[-1, 1\], but entry 3 is nan"),
        (edited({255: float("inf")}), ValueError, r"lie in \[-1, 1\], but entry 255 is inf"),
        (edited({0: -1.5}), ValueError, r"lie in \[-1, 1\], but entry 0 is -1.5"),
        (
            edited({17: 0.5, 18: 0.25}),
            ValueError,
            r"sorted ascending, but entry 17 \(0.5\) exceeds entry 18 \(0.25\)",
        ),
        (edited({128: 0.001}), ValueError, "must contain 0"),
    ],
)
def test_check_names_what_is_wrong(
    codebook: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^quantize: codebook .*{message}$"):
        check_codebook(codebook, "quantize")
