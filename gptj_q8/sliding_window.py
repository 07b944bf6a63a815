"""A model's logits over a text that is longer than what it sees at once: by a sliding window.

Every token but the first is scored exactly once, and past the first window each with at least
`window - stride` tokens of context::

    window 0   [c c c c c c c c]         scores tokens 1 to 7
    window 1         . . . [c c c c]     scores tokens 8 to 10 (window 8, stride 3)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Progress = Callable[[int, int], None]
"""Called with (tokens scored so far, tokens to score)."""

DEFAULT_WINDOW = 2048  # GPT-J's context; models with more are scored at this unless told
# Short windows go through the model together up to this. More gains nothing: on a CPU, eight
# windows of 512 tokens a pass took a third longer than one or two (GPT-J of 6 layers of 256).
TOKENS_PER_PASS = 1024


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


def _positions(model: nn.Module) -> int | None:
    """The longest context that the model's configuration allows, None where it says nothing."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def plan_for(model: nn.Module, ids: Tensor, window: int | None, stride: int | None) -> list[Window]:
    """The windows for a text [T]; see `gptj_q8.evaluate.perplexity` for what None takes.

    ValueError for a window or stride out of range, and as `check_fits`.
    """
    if window is None:
        window = max(2, min(_positions(model) or DEFAULT_WINDOW, DEFAULT_WINDOW, ids.numel()))
    if stride is None:
        stride = max(1, window // 2)
    plan = windows(ids.numel(), window, stride)
    check_fits(model, ids, plan)
    return plan


def check_fits(model: nn.Module, ids: Tensor, plan: list[Window]) -> None:
    """ValueError for windows longer than the model's context, and for tokens that it lacks."""
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


def scored(
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
