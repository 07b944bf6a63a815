"""AdamW8bit and Adam8bit: their steps beside PyTorch's and bitsandbytes'."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import DTYPES
from optimizers import LARGE, SMALL, give_gradients, parameters, run, same
from torch import Tensor, nn

from gptj_q8.optim import Adam8bit, AdamW8bit

pytestmark = pytest.mark.usefixtures("one_thread")


def test_float32_moments_are_pytorchs() -> None:
    """With every tensor below min_8bit_size nothing is rounded: ten steps, five settings."""
    settings: list[dict[str, Any]] = [
        {},
        {"lr": 0.1, "betas": (0.8, 0.95)},
        {"eps": 1e-2, "weight_decay": 0.3},
        {"maximize": True},
        {"lr": torch.tensor(0.05)},
    ]
    ours, theirs = (parameters(*[(20, 30)] * len(settings)) for _ in range(2))
    groups = [
        [{"params": [p], **each} for p, each in zip(params, settings, strict=True)]
        for params in (ours, theirs)
    ]
    run(AdamW8bit(groups[0], lr=0.01), ours, *range(10))
    run(torch.optim.AdamW(groups[1], lr=0.01), theirs, *range(10))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_step_is_pytorchs(dtype: torch.dtype) -> None:
    """From moments of zero the first step meets no rounding to 8 bits."""
    ours, theirs = (parameters(LARGE, SMALL, (3, 50, 40), dtype=dtype) for _ in range(2))
    for p in theirs:
        p.data = p.data.float()  # rounded once at the end, as ours are
    give_gradients(ours, 1)
    for a, b in zip(ours, theirs, strict=True):
        b.grad = a.grad.float()
    AdamW8bit(ours, lr=0.01, weight_decay=0.1).step()
    torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1).step()
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        # Half a unit in the last place, and float32's own rounding.
        bound = 0.5 * torch.finfo(dtype).eps + 1e-6
        torch.testing.assert_close(a.float(), b, rtol=bound, atol=1e-7)


def test_eight_bits_stay_near_float32() -> None:
    """After 30 noisy steps the parameters are within 3 % of the way that they have gone."""
    ours, theirs = parameters(LARGE), parameters(LARGE)
    start = ours[0].detach().clone()
    run(AdamW8bit(ours, lr=0.01), ours, *range(30))
    run(torch.optim.AdamW(theirs, lr=0.01), theirs, *range(30))
    gone = (theirs[0] - start).norm()
    assert (ours[0] - theirs[0]).norm() < 0.03 * gone


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("ours", [Adam8bit, AdamW8bit])
def test_decay_is_as_bitsandbytes_has_it(ours: type[torch.optim.Optimizer], decay: float) -> None:
    peer = getattr(pytest.importorskip("bitsandbytes").optim, ours.__name__)
    a, b = parameters((64, 256)), parameters((64, 256))
    start = a[0].detach().clone()
    run(ours(a, lr=0.1, weight_decay=decay), a, 1, 2, 3)
    run(peer(b, lr=0.1, weight_decay=decay), b, 1, 2, 3)
    gone = (b[0] - start).norm()
    # 0.2 % apart: its CPU kernel finds codes on a coarse grid. Added to the gradient, as in
    # torch.optim.Adam, a decay of 0.3 would make 38 %.
    assert (a[0] - b[0]).norm() < 0.01 * gone


def test_adam8bit_differs_by_its_default_decay_alone() -> None:
    for kind, decay in ((Adam8bit, 0.0), (AdamW8bit, 1e-2)):
        assert kind(parameters(LARGE)).defaults["weight_decay"] == decay
    a, b = parameters(LARGE, SMALL), parameters(LARGE, SMALL)
    first, second = Adam8bit(a, weight_decay=0.1), AdamW8bit(b, weight_decay=0.1)
    run(first, a, 1, 2)
    run(second, b, 1, 2)
    assert same(first, second)


def test_layout_of_memory_changes_no_bit() -> None:
    plain = parameters((8, 30, 40), (90, 80), (50, 100))
    odd = [
        nn.Parameter(plain[0].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)),
        nn.Parameter(plain[1].detach().T.contiguous().T),
        nn.Parameter(torch.zeros(50, 200)[:, ::2].copy_(plain[2].detach())),
    ]
    assert not any(p.is_contiguous() for p in odd)
    a, b = AdamW8bit(plain), AdamW8bit(odd)
    run(a, plain, 1, 2, 3)
    run(b, odd, 1, 2, 3)
    assert same(a, b)


def test_empty_scalar_and_frozen_parameters() -> None:
    params = parameters((0, 5), (), (1,), LARGE)
    codes = nn.Parameter(torch.zeros(9, dtype=torch.uint8), requires_grad=False)
    for smallest in (4096, 0):
        optimizer = AdamW8bit([*params, codes], min_8bit_size=smallest)
        before = [p.detach().clone() for p in params]
        run(optimizer, params, 1, 2)
        assert codes not in optimizer.state
        for p, old in zip(params[1:], before[1:], strict=True):
            assert (p != old).all()


def test_parameters_without_gradient_keep_still() -> None:
    params = parameters(LARGE, LARGE)
    optimizer = AdamW8bit(params)
    run(optimizer, params[:1], 1, 2)
    assert torch.equal(params[1], parameters(LARGE, LARGE)[1])
    run(optimizer, params, 3)
    assert [optimizer.state[p]["step"] for p in params] == [3, 1]


def test_groups_added_later() -> None:
    first, second = parameters(LARGE), parameters(LARGE, seed=1)
    optimizer = AdamW8bit(first, lr=0.1)
    run(optimizer, first, 1)
    optimizer.add_param_group({"params": second, "lr": 0.0, "weight_decay": 0.5})
    run(optimizer, first + second, 2)
    assert torch.equal(second[0], parameters(LARGE, seed=1)[0]), "its learning rate is 0"
    assert [optimizer.state[p]["step"] for p in first + second] == [2, 1]
    with pytest.raises(ValueError, match="AdamW8bit: lr must be finite and not negative, got -1"):
        optimizer.add_param_group({"params": parameters(SMALL), "lr": -1})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_schedulers(rate: float | Tensor) -> None:
    ours, theirs = parameters(SMALL), parameters(SMALL)
    for kind, params in ((AdamW8bit, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(params, lr=copy.deepcopy(rate))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            run(optimizer, params, step)
            scheduler.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    cycle = AdamW8bit(parameters(LARGE))
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(cycle, max_lr=0.1, total_steps=3)
    run(cycle, cycle.param_groups[0]["params"], 1)
    one_cycle.step()
    assert cycle.param_groups[0]["betas"][0] < 0.95, "it cycles the momentum too"


def test_a_closure_runs_with_gradients() -> None:
    (p,) = parameters(LARGE)
    optimizer = AdamW8bit([p])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first, second = (optimizer.step(closure) for _ in range(2))
    assert second < first
