"""How well a model predicts a text, and how far it is from its original.

`perplexity` scores a text under one model. `compare` runs two models over the same text and
adds what a perplexity cannot show: the Kullback-Leibler divergence of their predictions, how
often their first choices agree, and the change of perplexity with a *paired* standard error.

Both slide a window over the text. Every token but the first is scored exactly once, and past
the first window each with at least `window - stride` tokens of context:

    window 0   [c c c c c c c c]         scores tokens 1 to 7
    window 1         . . . [c c c c]     scores tokens 8 to 10 (window 8, stride 3)

A model is anything that maps ids [B, T] to logits [B, T, V], bare or as an output's `.logits`.
Softmax and sums are in float64: the divergences of interest are near 1e-5 nats, about where
float32's normalization error lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Progress = Callable[[int, int], None]
"""Called with (tokens scored so far, tokens to score)."""

DEFAULT_WINDOW = 2048  # GPT-J's context; models with more are scored at this unless told
# Short windows go through the model together up to this. More gains nothing: on a CPU, eight
# windows of 512 tokens a pass took a third longer than one or two (GPT-J of 6 layers of 256).
TOKENS_PER_PASS = 1024
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


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) go in; tokens [first, end) are scored."""

    begin: int
    first: int
    end: int


def windows(length: int, window: int, stride: int) -> list[Window]:
    """Covers tokens 1 to length - 1, each scored once.

    length: tokens in the text, at least 2. window: tokens per window, at least 2.
    stride: tokens from one window to the next, 1 to window - 1.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    if not 1 <= stride < window:
        raise ValueError(f"stride must be 1 to {window - 1} (window - 1), got {stride}")
    first_end = min(window, length)
    plan = [Window(0, 1, first_end)]
    while plan[-1].end < length:
        last = plan[-1]
        begin = last.begin + stride
        plan.append(Window(begin, last.end, min(begin + window, length)))
    return plan


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
    plan = _plan(model, tokens, window, stride)
    losses = [
        _nll(log_probs, chunk)
        for logits, targets in _scored(model, tokens, plan, on_progress)
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
    plan = _plan(model, tokens, window, stride)
    _check_fits(original, tokens, plan)
    losses, original_losses, divergences, agreements = [], [], [], []
    ours = _scored(model, tokens, plan, on_progress)
    theirs = _scored(original, tokens, plan, None)
    for (logits, targets), (original_logits, _) in zip(ours, theirs, strict=True):
        if logits.shape != original_logits.shape:
            raise ValueError(
                f"the models' vocabularies differ: {logits.shape[-1]} and "
                f"{original_logits.shape[-1]} tokens"
            )
        pairs = zip(_log_probs(logits, targets), _log_probs(original_logits, targets), strict=True)
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


def _positions(model: nn.Module) -> int | None:
    """The longest context that the model's configuration allows, None where it says nothing."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _plan(model: nn.Module, ids: Tensor, window: int | None, stride: int | None) -> list[Window]:
    if window is None:
        window = max(2, min(_positions(model) or DEFAULT_WINDOW, DEFAULT_WINDOW, ids.numel()))
    if stride is None:
        stride = max(1, window // 2)
    plan = windows(ids.numel(), window, stride)
    _check_fits(model, ids, plan)
    return plan


def _check_fits(model: nn.Module, ids: Tensor, plan: list[Window]) -> None:
    positions = _positions(model)
    longest = plan[0].end
    if positions is not None and longest > positions:
        raise ValueError(f"a window of {longest} tokens exceeds the model's {positions} positions")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    largest = int(ids.max())
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"token {largest} is beyond the model's vocabulary of {vocabulary}: "
            "the text was cut into tokens for another model"
        )


def _scored(
    model: nn.Module, ids: Tensor, plan: list[Window], on_progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, window by window in text order, (logits [n, V], targets [n]) of what it scores."""
    for batch in _batches(plan, max(1, TOKENS_PER_PASS // plan[0].end)):
        inputs = torch.stack([ids[w.begin : w.end] for w in batch])
        # Not around the yield: a generator's context would leak into the caller's code.
        with _evaluating(model), torch.inference_mode():
            logits = _forward(model, inputs)
        for row, w in zip(logits, batch, strict=True):
            # The logits at position t predict token t + 1.
            scored = row[w.first - 1 - w.begin : w.end - 1 - w.begin]
            yield scored, ids[w.first : w.end].to(scored.device)
            if on_progress is not None:
                on_progress(w.end - 1, ids.numel() - 1)


def _batches(plan: list[Window], size: int) -> Iterator[list[Window]]:
    """Groups neighbouring windows of equal length; only the last can be shorter."""
    full = [w for w in plan if w.end - w.begin == plan[0].end]
    for i in range(0, len(full), size):
        yield full[i : i + size]
    if len(full) < len(plan):
        yield plan[len(full) :]


def _forward(model: nn.Module, inputs: Tensor) -> Tensor:
    # Offloaded parameters are on the meta device until used; hooks then move the input.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    options: dict[str, Any] = {}
    if hasattr(getattr(model, "config", None), "use_cache"):
        options["use_cache"] = False  # nothing is generated: a cache would only cost memory
    output = model(inputs.to(device), **options)
    logits: Tensor = getattr(output, "logits", output)
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off, and leaves each module's training flag as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
