"""The cross-entropy of a vocabulary projection, in chunks: all logits never exist at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 256
"""Tokens projected at once. A row takes 8 bytes for each word: 103 MB for 256 rows of GPT-J's."""


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Mean cross-entropy of `head(hidden)` and labels, float32, without its [..., T, V] logits.

    The same as Transformers' loss of a causal language model: tokens before n predict n.

    hidden: [..., T, K], any float dtype. head: maps [rows, K] to logits [rows, V]; every one of
    its parameters that requires a gradient gets it, whether a weight, a bias or an adapter.
    labels: int64 [..., T]; `ignore_index` marks those that do not count.
    num_items_in_batch: what the sum is divided by; None means the labels that count.
    shift_labels: [..., T] labels that are shifted already, in place of `labels`.

    The gradients are computed with the loss, a chunk of rows at a time, so `head` runs forward and
    backward once. Rows that do not count are not projected. Has no second derivative. ValueError
    for shapes that do not fit, IndexError for labels that are no word.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: labels {tuple(shift_labels.shape)} do not fit "
            f"hidden {tuple(hidden.shape)}"
        )
    if chunk_rows < 1:
        raise ValueError(f"linear_cross_entropy: chunk_rows must be positive, got {chunk_rows}")
    targets = shift_labels.reshape(-1).to(hidden.device)
    rows = (targets != ignore_index).nonzero().squeeze(1)
    parameters = [p for p in head.parameters() if p.requires_grad]
    wanted = torch.is_grad_enabled()
    total: Tensor = _ChunkedLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]), head, targets, rows, chunk_rows, wanted, *parameters
    )
    if num_items_in_batch is None:
        return total / len(rows)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class _ChunkedLoss(torch.autograd.Function):
    """Sum over `rows` of the cross-entropy of head(hidden[row]) and targets[row].

    The gradient is kept as that of the sum, and divided in the backward pass in float32: divided
    by the number of tokens beforehand it would be too small for float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Module,
        targets: Tensor,
        rows: Tensor,
        chunk_rows: int,
        wanted: bool,
        *parameters: Tensor,
    ) -> Tensor:
        needs_hidden = wanted and ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=_sum_dtype(hidden), device=hidden.device)
        dhidden = torch.zeros_like(hidden) if needs_hidden else None
        sums: list[Tensor | None] = [None] * len(parameters)
        for chunk in rows.split(chunk_rows) if len(rows) else ():
            x = hidden[chunk].detach().requires_grad_(needs_hidden)
            inputs = [*([x] if needs_hidden else []), *(parameters if wanted else [])]
            loss, grads = _chunk(head, x, targets[chunk], inputs)
            total += loss
            if dhidden is not None:
                dhidden[chunk] = grads.pop(0)
            if grads:
                sums = [_add(one, other) for one, other in zip(sums, grads, strict=True)]
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.save_for_backward(dhidden, *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, *sums = ctx.saved_tensors
        dtypes = [dhidden.dtype if dhidden is not None else None, *ctx.dtypes]
        grads = [
            None if grad is None else (grad.to(dtotal.dtype) * dtotal).to(dtype)
            for grad, dtype in zip((dhidden, *sums), dtypes, strict=True)
        ]
        return grads[0], None, None, None, None, None, *grads[1:]


def _chunk(
    head: nn.Module, x: Tensor, targets: Tensor, inputs: list[Tensor]
) -> tuple[Tensor, list[Any]]:
    """Loss of the rows x and its gradients for `inputs`; nothing else outlives the call."""
    with torch.set_grad_enabled(bool(inputs)):
        logits = head(x)
    loss, dlogits = _loss_and_gradient(logits.detach(), targets, bool(inputs))
    if not inputs:
        return loss, []
    # The backward pass of a product must not be cast once more.
    with torch.autocast(x.device.type, enabled=False):
        return loss, list(torch.autograd.grad(logits, inputs, dlogits, allow_unused=True))


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the cross-entropies, and its gradient in the dtype of `logits` [rows, V]."""
    lowest, highest = (int(label) for label in targets.aminmax())
    if lowest < 0 or highest >= logits.shape[-1]:
        wrong = lowest if lowest < 0 else highest
        raise IndexError(
            f"linear_cross_entropy: label {wrong} is none of the {logits.shape[-1]} words"
        )
    column = targets[:, None]
    # In place wherever it can be: this is the largest tensor of a training step.
    p = logits.to(_sum_dtype(logits), copy=True)
    p -= p.amax(-1, keepdim=True)
    label = p.gather(-1, column)
    p.exp_()
    sums = p.sum(-1, keepdim=True)
    loss = (sums.log() - label).sum()
    if not wanted:
        return loss, None
    p /= sums
    p.scatter_add_(-1, column, torch.full_like(label, -1))
    return loss, p.to(logits.dtype)


def _add(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return total
    grad = grad.to(_sum_dtype(grad))
    return grad if total is None else total.add_(grad)
