"""AdamW8bit and Adam8bit: their steps beside PyTorch's, their state, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES
from torch import Tensor, nn

from gptj_q8.optim import Adam8bit, AdamW8bit

pytestmark = pytest.mark.usefixtures("one_thread")

LARGE, SMALL = (70, 100), (33,)  # on either side of min_8bit_size


def parameters(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], *steps: int) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters, and the state of each in the order of its names."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params]
    moments = [s[k] for s in states for k in sorted(s) if isinstance(s[k], Tensor)]
    return [*(p.detach() for p in params), *moments]


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def reload(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state through a file, read as torch.load does by default."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
