"""Generates text with the time that it takes: the prompt's pass and the tokens after it.

Generation itself is Transformers' `model.generate`; this adds streaming to a callback and a
clock that tells the prompt (computed at once) from the decoding (one token at a time).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generation:
    """A text generated from a prompt, and its timing.

    text: what follows the prompt. prompt_tokens, new_tokens: counts.
    prompt_seconds: from the start to the first new token.
    decode_seconds: from the first new token to the last.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed; None when the first token was also the last."""
        if self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / self.decode_seconds


class _Clock(BaseStreamer):
    """Notes when each token arrives, then hands it on."""

    def __init__(self, then: BaseStreamer | None = None) -> None:
        self.then = then
        self.start = time.perf_counter()
        self.arrivals: list[float] = []
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        # `generate` puts the prompt first, then one token a call.
        if self.prompt_seen:
            self.arrivals.append(time.perf_counter())
        self.prompt_seen = True
        if self.then is not None:
            self.then.put(value)

    def end(self) -> None:
        if self.then is not None:
            self.then.end()


class _ToCallback(TextStreamer):
    """Transformers' streamer, which waits for whole words, with a callback for its `print`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float | None = 0.8,
    top_p: float = 0.95,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continues a prompt.

    model, tokenizer: a causal language model and its tokenizer.
    prompt: the text to continue; "" starts from the tokenizer's first token.
    max_new_tokens: an upper bound; the model's end token and the end of its context come first
        where they do.
    temperature: None takes the likeliest token each time.
    top_p: samples among the likeliest tokens that together have this probability.
    on_text(piece): called with each piece of text as it comes.
    """
    ids = encode(tokenizer, prompt)
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"token {max(ids)} is beyond the model's vocabulary of {model.config.vocab_size}: "
            "the tokenizer is another model's"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        if len(ids) >= positions:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; of the model's {positions} it may take "
                f"{positions - 1}"
            )
        max_new_tokens = min(max_new_tokens, positions - len(ids))
    sampling: dict[str, object] = {"do_sample": False}
    if temperature is not None:
        # top_k=0: only the two settings that were asked for act.
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}

    pieces: list[str] = []

    def receive(piece: str) -> None:
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)

    clock = _run(model, ids, _ToCallback(tokenizer, receive), max_new_tokens, **sampling)
    return Generation(
        text="".join(pieces),
        prompt_tokens=len(ids),
        new_tokens=len(clock.arrivals),
        prompt_seconds=clock.arrivals[0] - clock.start,
        decode_seconds=clock.arrivals[-1] - clock.arrivals[0],
    )


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's token ids, at least one.

    ValueError for half a character (a lone surrogate), and for an empty prompt where the tokenizer
    has no first token.
    """
    prompt.encode()  # raises it, where tokenizers raise a TypeError
    ids: list[int] = tokenizer(prompt).input_ids
    if not ids:
        if tokenizer.bos_token_id is None:
            raise ValueError("the prompt is empty and the tokenizer has no first token")
        ids = [tokenizer.bos_token_id]
    return ids


def decode_speeds(
    models: Sequence[PreTrainedModel],
    ids: Sequence[int],
    *,
    new_tokens: int = 64,
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Decoding speed of several models in tokens per second, medians over the rounds.

    Each round runs every model once, so that a busy moment of the machine does not count
    against one of them alone. One round before the first is not counted. ValueError for fewer
    than 2 new tokens: decoding is timed from the first to the last.
    """
    if new_tokens < 2:
        raise ValueError(f"decode_speeds: new_tokens must be at least 2, got {new_tokens}")
    speeds: list[list[float]] = [[] for _ in models]
    for i in range(rounds + 1):
        for model, found in zip(models, speeds, strict=True):
            clock = _run(model, ids, None, new_tokens, do_sample=False, min_new_tokens=new_tokens)
            found.append((new_tokens - 1) / (clock.arrivals[-1] - clock.arrivals[0]))
        if on_progress is not None:
            on_progress(i + 1, rounds + 1)
    return [statistics.median(found[1:]) for found in speeds]


def _run(
    model: PreTrainedModel,
    ids: Sequence[int],
    streamer: BaseStreamer | None,
    max_new_tokens: int,
    **sampling: object,
) -> _Clock:
    inputs = torch.tensor([list(ids)], device=model.device)
    clock = _Clock(streamer)
    model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        # One sequence has nothing to pad; naming a token keeps `generate` from warning.
        pad_token_id=_pad_token(model),
        streamer=clock,
        **sampling,
    )
    return clock


def _pad_token(model: PreTrainedModel) -> int:
    config = model.generation_config
    end = config.eos_token_id
    if isinstance(end, list):
        end = end[0]
    candidates = (config.pad_token_id, end)
    return next((token for token in candidates if token is not None), 0)
