"""adam_step_, on every backend, against float64 and PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    adam_moments,
    adam_state,
    random,
)

from gptj_q8 import ops

pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("numel", "block_size"), [(1, 32), (1000, 256), (20_001, 4096), (70, 64)])
def test_adam_step(
    numel: int,
    block_size: int,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
) -> None:
    state, tables = adam_state(numel, block_size, device)
    param = random(numel, dtype=dtype, device=device)
    grad = random(numel, dtype=grad_dtype, device=device, seed=2)
    grad[numel // 2 :] *= 1e-4
    if numel > 20:
        grad[3], grad[7], grad[11], grad[13] = 0, torch.nan, torch.inf, -torch.inf
    finite = grad.isfinite()
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    for step in (1, 2, 3):
        m, v = (decoded.double() for decoded in adam_moments(state, tables, block_size))
        g = torch.where(finite, grad.double(), 0.0)
        m = torch.where(finite, 0.9 * m + 0.1 * g, m)
        v = torch.where(finite, 0.99 * v + 0.01 * g * g, v)
        update = 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        expected = torch.where(finite, param.double() * (1 - 0.01 * 0.1) - update, param.double())
        ops.adam_step_(param, grad, *state, *tables, **settings, step=step, block_size=block_size)
        # The arithmetic is float32's; the parameter is then rounded once to its dtype.
        arithmetic = 4 * torch.finfo(torch.float32).eps * (expected.abs() + update.abs())
        rounding = 0.5 * torch.finfo(dtype).eps * expected.abs()
        assert ((param.double() - expected).abs() <= arithmetic + rounding).all()
        assert torch.equal(param[~finite].double(), expected[~finite])
        new_m, new_v = adam_moments(state, tables, block_size)
        for moment, decoded, table in ((m, new_m, tables[0]), (v, new_v, tables[1])):
            blocks = F.pad(moment, (0, -numel % block_size)).view(-1, block_size)
            scale = blocks.abs().amax(dim=1).repeat_interleave(block_size)[:numel]
            nearest = table.diff().max().item() / 2 * 1.0001
            assert ((decoded.double() - moment).abs() <= nearest * scale).all()
        assert (new_v[v > 1e-30] > 0).all(), "a second moment was rounded to 0"


def test_the_first_adam_step_is_pytorchs(device: torch.device) -> None:
    """From moments of zero nothing has been rounded to 8 bits yet."""
    weight = random(50, 30, dtype=torch.float32, device=device)
    grad = random(50, 30, dtype=torch.float32, device=device, seed=2)
    expected = weight.clone().requires_grad_()
    expected.grad = grad.clone()
    torch.optim.AdamW([expected], lr=0.01, weight_decay=0.1).step()
    state, tables = adam_state(weight.numel(), 256, device)
    ops.adam_step_(
        weight, grad, *state, *tables,
        lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1, block_size=256,
    )  # fmt: skip
    torch.testing.assert_close(weight, expected.detach(), rtol=1e-6, atol=1e-7)


def test_a_gradient_whose_square_overflows_spoils_no_block(device: torch.device) -> None:
    param = torch.ones(64, device=device)
    state, tables = adam_state(64, 64, device)
    grad = torch.full((64,), 0.5, device=device)
    grad[5] = -1e20
    for step in (1, 2, 3):
        ops.adam_step_(
            param, grad, *state, *tables,
            lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=step, block_size=64,
        )  # fmt: skip
    assert param[5] == 1
    others = param[torch.arange(64, device=device) != 5]
    torch.testing.assert_close(others, torch.full_like(others, 0.7), rtol=0.05, atol=0)
    assert all(moment.isfinite().all() for moment in adam_moments(state, tables, 64))


def test_adam_step_changes_a_strided_parameter(device: torch.device) -> None:
    param = random(30, 20, dtype=torch.float32, device=device).T
    contiguous, grad = param.contiguous(), random(20, 30, dtype=torch.float32, device=device)
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    for each in (param, contiguous):
        state, tables = adam_state(600, 256, device)
        ops.adam_step_(each, grad, *state, *tables, **settings, step=1, block_size=256)
    assert torch.equal(param, contiguous)
