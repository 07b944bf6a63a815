"""The loss in chunks of the vocabulary projection: values, gradients, memory, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from allocated import peak_allocated
from cases import DTYPES, relative_error
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from gptj_q8.nn import Q8Linear
from gptj_q8.nn.loss import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

K, VOCABULARY = 40, 301


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """hidden [2, 23, K] and labels [2, 23], some of which do not count."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 23, K).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (2, 23))
    labels[0, :9] = -100
    labels[1, 20:] = -100
    return hidden, labels


def float_head(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(1)
    head = nn.Linear(K, VOCABULARY)
    return head.to(dtype)


def heads(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Heads of every kind, and which of their parameters train."""
    frozen = Q8Linear.from_float(float_head(dtype), "dynamic", 32).requires_grad_(False)
    biased = Q8Linear.from_float(float_head(dtype), "dynamic", 32)
    adapted = nn.ModuleDict({"lm_head": copy.deepcopy(frozen)})
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    inject_adapter_in_model(config, adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return {
        "frozen": frozen,
        "bias": biased,
        "float": float_head(dtype),
        "lora": adapted["lm_head"],
    }


def trained(head: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


def in_float64(head: nn.Module) -> nn.Module:
    """The same head in float64: its weight decoded, its adapter as it is."""
    twin = copy.deepcopy(head)
    base = twin.base_layer if hasattr(twin, "base_layer") else twin
    if isinstance(base, Q8Linear):
        plain = nn.Linear(K, VOCABULARY)
        plain.weight = nn.Parameter(base.dequantize(), requires_grad=False)
        plain.bias = base.bias
        if base is twin:
            twin = plain
        else:
            twin.base_layer = plain
    return twin.double()


def reference(
    hidden: Tensor, head: nn.Module, labels: Tensor, **kwargs: object
) -> tuple[Tensor, list[Tensor]]:
    """Transformers' loss of all logits, and the gradients of hidden and of what trains."""
    logits = head(hidden)
    if hidden.dtype == torch.float64:  # Transformers would round to float32
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        loss = loss / (kwargs.get("num_items_in_batch") or (targets != -100).sum())
    else:
        loss = ForCausalLMLoss(logits, labels, VOCABULARY, **kwargs)
    return loss, list(torch.autograd.grad(loss, [hidden, *trained(head)]))


@pytest.mark.parametrize("chunk_rows", [1, 7, 10**6])
@pytest.mark.parametrize("kind", ["frozen", "bias", "float", "lora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_against_float64(dtype: torch.dtype, kind: str, chunk_rows: int) -> None:
    """No further from the truth than twice Transformers' own and half the dtype's resolution.

    The loss is in float32: its logarithm, difference, sum and quotient each may round.
    """
    slack = torch.finfo(dtype).eps / 2
    hidden, labels = example(dtype)
    head = heads(dtype)[kind]
    loss = linear_cross_entropy(hidden, head, labels, chunk_rows=chunk_rows)
    grads = torch.autograd.grad(loss, [hidden, *trained(head)])
    truth, true_grads = reference(
        hidden.detach().double().requires_grad_(), in_float64(head), labels
    )
    theirs, their_grads = reference(hidden, head, labels)

    assert loss.dtype == torch.float32
    roundings = 4 * torch.finfo(torch.float32).eps / 2
    assert relative_error(loss, truth) <= 2 * relative_error(theirs, truth) + slack + roundings
    assert len(grads) == len(true_grads) > (kind != "frozen")
    for grad, parameter in zip(grads, [hidden, *trained(head)], strict=True):
        assert grad.dtype == parameter.dtype
    for grad, their, true in zip(grads, their_grads, true_grads, strict=True):
        assert relative_error(grad, true) <= 2 * relative_error(their, true) + slack


@pytest.mark.parametrize("items", [100, torch.tensor(100)])
def test_num_items_in_batch_divides_the_sum(items: Tensor | int) -> None:
    hidden, labels = example()
    head = float_head()
    expected, grads = reference(hidden, head, labels, num_items_in_batch=items)
    loss = linear_cross_entropy(hidden, head, labels, num_items_in_batch=items)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], grads[0])


def test_labels_shifted_already_and_another_ignore_index() -> None:
    hidden, labels = example()
    head = float_head()
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    expected, _ = reference(hidden, head, labels)
    loss = linear_cross_entropy(hidden, head, labels, shift_labels=shifted)
    torch.testing.assert_close(loss, expected)
    fives = labels.masked_fill(labels == -100, 5)
    expected = ForCausalLMLoss(head(hidden), fives, VOCABULARY, ignore_index=5)
    loss = linear_cross_entropy(hidden, head, fives, ignore_index=5)
    torch.testing.assert_close(loss, expected)


def test_no_label_that_counts_is_nan_as_in_pytorch_and_zero_with_a_given_count() -> None:
    hidden, labels = example()
    nothing = torch.full_like(labels, -100)
    expected, _ = reference(hidden, float_head(), nothing)
    assert expected.isnan()
    assert linear_cross_entropy(hidden, float_head(), nothing).isnan()
    loss = linear_cross_entropy(hidden, float_head(), nothing, num_items_in_batch=8)
    assert loss == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_gradcheck() -> None:
    hidden, labels = example(torch.float64)
    head = float_head(torch.float64)
    short, targets = hidden[:, :4].detach().requires_grad_(), labels[:, 8:12]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: linear_cross_entropy(x, head, targets, chunk_rows=2),
        (short, head.weight, head.bias),
        fast_mode=True,
    )


def test_a_scaled_loss_in_float16_keeps_small_gradients() -> None:
    """What a GradScaler does; the mean over many tokens alone would underflow."""
    hidden, labels = example(torch.float16)
    head = heads(torch.float16)["frozen"]
    _, (truth,) = reference(hidden.detach().double().requires_grad_(), in_float64(head), labels)
    loss = linear_cross_entropy(hidden, head, labels, num_items_in_batch=10**6)
    (grad,) = torch.autograd.grad(loss * 2.0**16, hidden)
    counted = int((labels[:, 1:] != -100).sum())
    assert relative_error(grad.double() * 10**6 / 2.0**16 / counted, truth) < 2e-3


def test_the_backward_pass_twice_gives_the_same() -> None:
    hidden, labels = example()
    loss = linear_cross_entropy(hidden, float_head(), labels)
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (two,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(one, two)


def test_without_gradients_the_head_runs_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels = example()
    head = float_head()
    expected, _ = reference(hidden, head, labels)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, head, labels)
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad


def test_under_autocast() -> None:
    hidden, labels = example()
    head = heads(torch.float32)["lora"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, head, labels)
    grads = torch.autograd.grad(loss, [hidden, *trained(head)])
    truth, true_grads = reference(
        hidden.detach().double().requires_grad_(), in_float64(head), labels
    )
    assert relative_error(loss, truth) < 1e-3
    for grad, true in zip(grads, true_grads, strict=True):
        assert grad.dtype == torch.float32
        assert relative_error(grad, true) < 0.02


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_a_label_that_is_no_word(label: int) -> None:
    hidden, labels = example()
    labels[1, 3] = label
    with pytest.raises(IndexError, match=f"label {label} is none of the {VOCABULARY} words"):
        linear_cross_entropy(hidden, float_head(), labels)


def test_bad_arguments() -> None:
    hidden, labels = example()
    with pytest.raises(ValueError, match=r"labels \(2, 22\) do not fit hidden \(2, 23, 40\)"):
        linear_cross_entropy(hidden, float_head(), labels[:, 1:])
    with pytest.raises(ValueError, match="chunk_rows must be positive, got 0"):
        linear_cross_entropy(hidden, float_head(), labels, chunk_rows=0)
    with pytest.raises(TypeError, match="label_smoothing"):
        linear_cross_entropy(hidden, float_head(), labels, label_smoothing=0.1)  # type: ignore[call-arg]


def test_memory_is_that_of_a_chunk() -> None:
    """In float32 logits of all rows, 268 MB: a chunk is 1 / 32 of that.

    It takes two: logits and their gradient in bfloat16, and in float32 once.
    """
    rows, words = 2048, 32768
    head = nn.Linear(32, words).bfloat16().requires_grad_(False)
    hidden = torch.randn(1, rows, 32).bfloat16().requires_grad_()
    labels = torch.randint(words, (1, rows))

    def whole() -> None:
        ForCausalLMLoss(head(hidden), labels, words).backward()
        hidden.grad = None

    def chunks() -> None:
        linear_cross_entropy(hidden, head, labels, chunk_rows=64).backward()
        hidden.grad = None

    logits = 4 * rows * words
    assert peak_allocated(whole) > 2 * logits, "or this test would see nothing"
    assert peak_allocated(chunks) < 2.1 / 32 * logits
