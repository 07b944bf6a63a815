"""How well a model predicts a text, and how far it is from its original.

`perplexity` scores a text under one model. `compare` runs two models over the same text and
adds what a perplexity cannot show: the Kullback-Leibler divergence of their predictions, how
often their first choices agree, and the change of perplexity with a *paired* standard error.

Both slide a window over the text (`gptj_q8.sliding_window`).
A model is anything that maps ids [B, T] to logits [B, T, V], bare or as an output's `.logits`.
Softmax and sums are in float64: the divergences of interest are near 1e-5 nats, about where
float32's normalization error lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptj_q8.sliding_window import Progress, check_fits, plan_for, scored

LOGITS_PER_CHUNK = 2**20  # 8 MiB for each float64 temporary


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text.

    value: exp(nll). nll: mean negative log-likelihood, nats per token.
    standard_error: of `value` (divide by `value` for the one of `nll`), NaN below 3 tokens.
    tokens: how many tokens were scored.
    """

    value: float
    nll: float
    standard_error: float
    tokens: int


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its original on a text.

    kl: mean KL(original || model), nats per token. kl_standard_error: of `kl`.
    kl_max: the largest divergence at any token.
    top1_agreement: share of tokens at which both models have the same first choice.
    tokens: how many predictions were compared.
    perplexity: the model's. original_perplexity: the original's.
    perplexity_change: perplexity / original_perplexity - 1.
    perplexity_change_standard_error: from the differences token by token. Both models meet the
        same hard and easy tokens, so this is far below either perplexity's own error.
    """

    kl: float
    kl_standard_error: float
    kl_max: float
    top1_agreement: float
    tokens: int
    perplexity: Perplexity
    original_perplexity: Perplexity
    perplexity_change: float
    perplexity_change_standard_error: float


def perplexity(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    on_progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a text under a sliding window.

    model: ids [B, T] to logits [B, T, V]. ids: the text's token ids, [T] or [1, T].
    window: tokens the model sees at once; None takes its number of positions, at most 2048.
    stride: tokens from one window to the next; smaller gives every token more context and costs
        more passes; None takes half the window.
    on_progress: called with (tokens scored, tokens to score).

    The standard error is that of batch means: the token losses, in text order, are cut into
    about sqrt(n) stretches of about sqrt(n) tokens, and the spread of the stretches' means
    gives it. Neighbouring losses are correlated (a hard passage is hard for many tokens), which
    the plain standard deviation / sqrt(n) ignores; correlation over more than sqrt(n) tokens
    still escapes. It speaks of this kind of text, not of others.
    """
    tokens = _check_ids(ids)
    plan = plan_for(model, tokens, window, stride)
    losses = [
        _nll(log_probs, chunk)
        for logits, targets in scored(model, tokens, plan, on_progress)
        for log_probs, chunk in _log_probs(logits, targets)
    ]
    return _summarize(_checked(torch.cat(losses), "the model"))


def compare(
    model: nn.Module,
    original: nn.Module,
    ids: Tensor | Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    on_progress: Progress | None = None,
) -> Divergence:
    """Divergence of a model from its original, over a text.

    model: ids [B, T] to logits [B, T, V].
    original: the same, taken as the truth; run it in float32 where memory allows.
    ids, window, stride, on_progress: as for `perplexity`, whose remarks on the standard error
        hold for each error here.
    """
    tokens = _check_ids(ids)
    plan = plan_for(model, tokens, window, stride)
    check_fits(original, tokens, plan)
    losses, original_losses, divergences, agreements = [], [], [], []
    ours = scored(model, tokens, plan, on_progress)
    theirs = scored(original, tokens, plan, None)
    for (logits, targets), (original_logits, same_targets) in zip(ours, theirs, strict=True):
        if logits.shape != original_logits.shape:
            raise ValueError(
                f"the models' vocabularies differ: {logits.shape[-1]} and "
                f"{original_logits.shape[-1]} tokens"
            )
        pairs = zip(
            _log_probs(logits, targets), _log_probs(original_logits, same_targets), strict=True
        )
        for (log_q, chunk), (log_p, original_chunk) in pairs:
            losses.append(_nll(log_q, chunk))
            original_losses.append(_nll(log_p, original_chunk))
            log_p = log_p.to(log_q.device)
            divergences.append(_kl(log_p, log_q).cpu())
            agreements.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu())
    loss = _checked(torch.cat(losses), "the model")
    original_loss = _checked(torch.cat(original_losses), "the original")
    kl = torch.cat(divergences)
    ratio = math.exp(min(700.0, float((loss - original_loss).mean())))
    return Divergence(
        kl=float(kl.mean()),
        kl_standard_error=_standard_error(kl),
        kl_max=float(kl.max()),
        top1_agreement=float(torch.cat(agreements).double().mean()),
        tokens=kl.numel(),
        perplexity=_summarize(loss),
        original_perplexity=_summarize(original_loss),
        perplexity_change=ratio - 1,
        perplexity_change_standard_error=ratio * _standard_error(loss - original_loss),
    )


def _check_ids(ids: Tensor | Sequence[int]) -> Tensor:
    tokens = torch.as_tensor(ids)
    if tokens.dim() == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.dim() != 1:
        raise ValueError(f"ids must be [T] or [1, T], got {list(tokens.shape)}")
    if tokens.numel() < 2:
        raise ValueError(f"a text needs at least 2 tokens to be scored, got {tokens.numel()}")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"ids must be integers, got {tokens.dtype}")
    return tokens.long()


def _log_probs(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (log probabilities float64 [n, V], targets [n]) a few rows at a time."""
    rows = max(1, LOGITS_PER_CHUNK // logits.shape[-1])
    for chunk, target in zip(logits.split(rows), targets.split(rows), strict=True):
        yield F.log_softmax(chunk.double(), dim=-1), target


def _nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs.gather(-1, targets[:, None])[:, 0].cpu()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row. A token that p excludes adds nothing, whatever q says."""
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sum(-1).clamp_min(0.0)  # rounding alone can fall below 0


def _checked(losses: Tensor, name: str) -> Tensor:
    bad = torch.isnan(losses)
    if bad.any():
        raise ValueError(
            f"{name} predicts NaN at {int(bad.sum())} of {losses.numel()} tokens, "
            f"first at token {int(bad.nonzero()[0]) + 1}: its weights or activations overflow"
        )
    return losses


def _summarize(losses: Tensor) -> Perplexity:
    nll = losses.mean()
    value = float(nll.exp())
    return Perplexity(value, float(nll), value * _standard_error(losses), losses.numel())


def _standard_error(series: Tensor) -> float:
    """Standard error of the mean of a correlated series, by batch means (see `perplexity`)."""
    length = max(1, round(math.sqrt(series.numel())))
    stretches = series.numel() // length
    if stretches < 2:
        return math.nan
    means = torch.stack([stretch.mean() for stretch in series.tensor_split(stretches)])
    return float(means.std() / math.sqrt(stretches))
