"""The state of AdamW8bit: what it holds; saved, loaded, copied, refused if it does not fit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES
from optimizers import LARGE, SMALL, parameters, run, same, tensors
from torch import nn

from gptj_q8.optim import AdamW8bit

pytestmark = pytest.mark.usefixtures("one_thread")


def reload(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state through a file, read as torch.load does by default."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_is_8_bit_for_large_tensors() -> None:
    params = parameters(LARGE, SMALL, LARGE, (4096,), (4095,))
    optimizer = AdamW8bit(
        [
            {"params": [params[0], params[1], params[3], params[4]]},
            {"params": [params[2]], "min_8bit_size": float("inf")},
        ]
    )
    run(optimizer, params, 1)
    expected = [True, False, False, True, False]
    assert ["m_codes" in optimizer.state[p] for p in params] == expected
    state = optimizer.state[params[0]]
    assert state["m_codes"].shape == state["v_codes"].shape == LARGE
    assert state["m_codes"].dtype == state["v_codes"].dtype == torch.uint8
    blocks = -(-7000 // 256)
    assert state["m_absmax"].shape == state["v_absmax"].shape == (blocks,)
    assert optimizer.state[params[1]]["m"].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_reloaded_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    params = parameters(LARGE, SMALL, (0, 3), dtype=dtype)
    optimizer = AdamW8bit(params, lr=0.1)
    run(optimizer, params, 1, 2)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = AdamW8bit(twins)
    twin.load_state_dict(reload(optimizer))
    assert twin.param_groups[0]["lr"] == 0.1
    assert same(optimizer, twin)
    run(optimizer, params, 3, 4)
    run(twin, twins, 3, 4)
    assert same(optimizer, twin)
    assert twin.state[twins[0]]["step"] == 4


def test_loading_copies() -> None:
    params, twins = parameters(LARGE, SMALL), parameters(LARGE, SMALL)
    optimizer, twin = AdamW8bit(params), AdamW8bit(twins)
    run(optimizer, params, 1)
    twin.load_state_dict(optimizer.state_dict())
    before = [t.clone() for t in tensors(optimizer)]
    run(twin, twins, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(optimizer), strict=True))


def test_hooks_see_a_plain_state() -> None:
    params, twins = parameters(LARGE), parameters(LARGE)
    optimizer, twin = AdamW8bit(params), AdamW8bit(twins)
    run(optimizer, params, 1)
    seen: list[Any] = []

    def before(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(state["state"][0]["m_codes"].dtype)
        changed = {0: {**state["state"][0], "step": 7}}
        return {**state, "state": changed}

    twin.register_load_state_dict_pre_hook(before)
    twin.register_load_state_dict_post_hook(lambda o: seen.append(o.state[twins[0]]["step"]))
    twin.load_state_dict(optimizer.state_dict())
    assert seen == [torch.uint8, 7]


def change(**parts: Any) -> Callable[[dict[str, Any]], object]:
    return lambda saved: saved["state"][0].update(parts)


# fmt: off
MISFITS = {
    "shape": (change(m_codes=torch.zeros(100, 70, dtype=torch.uint8)), ValueError,
              "AdamW8bit: m_codes of parameter 0 must have shape [70, 100], got [100, 70]"),
    "block": (change(v_absmax=torch.zeros(4)), ValueError,
              "AdamW8bit: v_absmax of parameter 0 must have shape [28], got [4]"),
    "dtype": (change(v_absmax=torch.zeros(28).half()), TypeError,
              "AdamW8bit: v_absmax of parameter 0 must be float32, got float16"),
    "keys": (lambda saved: saved["state"][0].pop("v_codes"), ValueError,
             "AdamW8bit: the state of parameter 0 must hold step, m_codes, m_absmax, v_codes, "
             "v_absmax, got step, m_codes, m_absmax, v_absmax"),
    "step": (change(step=0), ValueError,
             "AdamW8bit: step of parameter 0 must count from 1, got 0"),
    "group": (lambda saved: saved["param_groups"][0].update(amsgrad=True), ValueError,
              "AdamW8bit: amsgrad is not supported, got amsgrad=True"),
    "count": (lambda saved: saved["param_groups"][0]["params"].pop(), ValueError,
              "loaded state dict contains a parameter group"),
}
# fmt: on


@pytest.mark.parametrize("name", MISFITS)
def test_a_state_that_does_not_fit_is_refused(name: str) -> None:
    damage, error, message = MISFITS[name]
    params = parameters(LARGE, SMALL)
    optimizer = AdamW8bit(params)
    run(optimizer, params, 1)
    saved = reload(optimizer)
    damage(saved)
    before = copy.deepcopy(optimizer)
    with pytest.raises(error) as caught:
        optimizer.load_state_dict(saved)
    assert message in str(caught.value)
    assert same(before, optimizer)
    run(optimizer, params, 2)  # and it goes on


def test_a_state_of_pytorchs_adamw_is_refused() -> None:
    params = parameters(LARGE)
    theirs = torch.optim.AdamW(params)
    run(theirs, params, 1)
    with pytest.raises(ValueError, match=r"must hold step, m, v, got step, exp_avg, exp_avg_sq"):
        AdamW8bit(params).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_bit_for_bit(clone: Callable[[Any], Any]) -> None:
    params = parameters(LARGE, SMALL, dtype=torch.bfloat16)
    optimizer = AdamW8bit(params, lr=0.1)
    run(optimizer, params, 1, 2)
    twin = clone(optimizer)
    assert same(optimizer, twin)
    run(optimizer, params, 3)
    run(twin, twin.param_groups[0]["params"], 3)
    assert same(optimizer, twin)
