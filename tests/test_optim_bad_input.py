"""What AdamW8bit refuses or passes over, and that nothing has changed then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import LARGE, SMALL, give_gradients, parameters, run, tensors
from torch import nn

from gptj_q8.optim import Adam8bit, AdamW8bit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["8 bits", "float32"])
def test_bad_gradients_touch_only_their_elements(shape: tuple[int, ...]) -> None:
    bad, good = parameters(shape), parameters(shape)
    optimizers = AdamW8bit(bad, lr=0.1), AdamW8bit(good, lr=0.1)
    spoiled = torch.zeros(shape, dtype=torch.bool)
    spoiled.view(-1)[:4] = True
    start = bad[0].detach().clone()
    for step in range(3):
        for params in (bad, good):
            give_gradients(params, step)
            params[0].grad[spoiled] = 0
        bad[0].grad.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(bad[0][spoiled], start[spoiled])
    assert torch.equal(bad[0][~spoiled], good[0][~spoiled])
    assert all(t.isfinite().all() for t in tensors(optimizers[0]))


# fmt: off
BAD_SETTINGS = [
    ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
    ({"lr": float("nan")}, ValueError, "lr must be finite and not negative, got nan"),
    ({"lr": torch.ones(2)}, ValueError, "lr must have 1 element, got 2"),
    ({"betas": (0.9, 1.0)}, ValueError, "beta2 must be at least 0 and below 1, got 1.0"),
    ({"betas": (0.9,)}, ValueError, "betas must be two numbers, got (0.9,)"),
    ({"eps": -1e-8}, ValueError, "eps must be finite and not negative, got -1e-08"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and not negative, got -0.1"),
    ({"min_8bit_size": -1}, ValueError, "min_8bit_size must not be negative, got -1"),
    ({"amsgrad": True}, ValueError, "amsgrad is not supported, got amsgrad=True"),
    ({"foreach": True}, ValueError, "foreach is not supported, got foreach=True"),
    ({"fused": True}, ValueError, "fused is not supported, got fused=True"),
]
# fmt: on


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS, ids=str)
def test_bad_settings_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    params = parameters(LARGE)
    for make in (
        lambda: AdamW8bit(params, **settings),
        lambda: AdamW8bit([{"params": params, **settings}]),
    ):
        with pytest.raises(error) as caught:
            make()
        assert str(caught.value) == f"AdamW8bit: {message}"
    optimizer = AdamW8bit(params)
    optimizer.param_groups[0].update(settings)
    with pytest.raises(error):
        run(optimizer, params, 1)
    assert torch.equal(params[0], parameters(LARGE)[0])


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="Adam8bit: unexpected keyword argument 'is_paged'"):
        Adam8bit(parameters(LARGE), is_paged=True)
    AdamW8bit(parameters(LARGE), amsgrad=False, foreach=None, fused=None)  # they ask for nothing


def test_bad_tensors_are_refused_before_anything_changes() -> None:
    good = parameters(LARGE)[0]
    table = nn.Embedding(90, 50, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    double, whole = nn.Parameter(torch.ones(5000).double()), nn.Parameter(torch.ones(5000))
    double.grad = torch.ones_like(double)
    whole.grad = torch.ones_like(whole)
    for bad, error, message in (
        (table.weight, RuntimeError, r"sparse gradients are not supported, got one of shape \[90"),
        (double, TypeError, "the parameter must be float32 or bfloat16 or float16, got float64"),
    ):
        give_gradients([good], 1)
        optimizer = AdamW8bit([whole, good, bad])
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(good, parameters(LARGE)[0])
        assert not optimizer.state


def test_sharded_parameters_are_refused(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(distribute_tensor(torch.ones(LARGE), mesh, [Shard(0)]))
        p.sum().backward()
        with pytest.raises(NotImplementedError, match="sharded parameters are not supported"):
            AdamW8bit([p]).step()
    finally:
        distributed.destroy_process_group()
