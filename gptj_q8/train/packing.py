"""Turns documents into rows of tokens, several to a row where they fit.

Documents in one row do not see each other. Their positions begin anew with each, which
Transformers' causal mask takes for the sign of another sequence; `keeps_apart` tries whether a
model heeds it. The first token of a document is no target, since what stands before it in the row
is another's. Where a document is cut to fit, the last token of a piece begins the next, so that
every token but the first is a target once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gptj_q8.train.texts import Document

IGNORED = -100  # the label of what is no target, for PyTorch's cross-entropy


@dataclass(frozen=True)
class Piece:
    """Tokens of one document, or of a part of one.

    ids: int32 [n], n at least 2. first_target: the first of them that is learned, at least 1.
    """

    ids: Tensor
    first_target: int

    @property
    def targets(self) -> int:
        """How many tokens are learned."""
        return len(self.ids) - self.first_target


def encode(
    tokenizer: Any, documents: Sequence[Document], length: int, vocabulary: int
) -> list[Piece]:
    """The tokens of documents in pieces of at most `length`.

    A tokenizer that begins its texts with a token does so here; its end token ends each document.
    Prompt and completion are encoded apart, as they are when the model is used.
    vocabulary: the model's number of tokens.

    ValueError for a token beyond the vocabulary, for a prompt with completion longer than `length`
    (a text is cut instead), and where nothing is left to learn.
    """
    begin = _begin(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[Piece] = []
    for document in documents:
        prompt, text = (
            tokenizer(part, add_special_tokens=False, verbose=False).input_ids
            for part in (document.prompt, document.text)
        )
        tokens = [*begin, *prompt, *text, *(end if document.ends else [])]
        if (largest := max(tokens, default=0)) >= vocabulary:
            raise ValueError(
                f"{document.where}: token {largest} is beyond the model's vocabulary of "
                f"{vocabulary}: the tokenizer is another model's"
            )
        first = max(1, len(begin) + len(prompt))
        if document.prompt and len(tokens) > length:
            raise ValueError(
                f"{document.where}: prompt and completion are {len(tokens)} tokens, and a sequence "
                f"has {length}"
            )
        pieces += _cut(torch.tensor(tokens, dtype=torch.int32), first, length)
    if not pieces:
        raise ValueError("there is nothing to learn: no document has a second token")
    return pieces


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text."""
    first: int | None = tokenizer.bos_token_id
    return [first] if first is not None and tokenizer("").input_ids[:1] == [first] else []


def _cut(ids: Tensor, first_target: int, length: int) -> list[Piece]:
    starts = range(0, max(len(ids) - 1, 0), length - 1)
    return [Piece(ids[i : i + length], first_target if i == 0 else 1) for i in starts]


class Rows(Dataset[list[Piece]]):
    """Pieces laid side by side in rows of `length` tokens.

    apart: whether the model keeps documents of a row apart; if not, each has a row of its own.
    """

    def __init__(self, pieces: Sequence[Piece], length: int, apart: bool) -> None:
        self.rows = _best_fit(pieces, length) if apart else [[piece] for piece in pieces]
        self.targets = sum(piece.targets for piece in pieces)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Piece]:
        return self.rows[index]


def _best_fit(pieces: Sequence[Piece], length: int) -> list[list[Piece]]:
    """The longest first, each into the fullest row that still has room for it."""
    rows: list[list[Piece]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # by free tokens
    has_rows = 0  # bit i: with_room[i] is not empty
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        size = len(piece.ids)
        fitting = has_rows >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = with_room[free].pop()
            if not with_room[free]:
                has_rows &= ~(1 << free)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        with_room[free - size].append(row)
        has_rows |= 1 << (free - size)
    return rows


def collate(rows: Sequence[Sequence[Piece]]) -> dict[str, Tensor]:
    """A batch of rows: `input_ids` and `labels`, int64 [B, T], T that of the longest row.

    `position_ids` come with them where a row holds more than one piece. Elsewhere a model counts
    them itself and may then take the quicker causal mask; what fills a row up needs no mask, for
    no earlier token sees it.
    """
    width = max(sum(len(piece.ids) for piece in row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    positions = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = 0
        for piece in row:
            end = place + len(piece.ids)
            ids[i, place:end] = piece.ids
            labels[i, place + piece.first_target : end] = piece.ids[piece.first_target :]
            positions[i, place:end] = torch.arange(len(piece.ids))
            place = end
        positions[i, place:] = torch.arange(width - place)
    batch = {"input_ids": ids, "labels": labels}
    if any(len(row) > 1 for row in rows):
        batch["position_ids"] = positions
    return batch


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether a model keeps two documents in one row apart when their positions begin anew.

    Tried on tokens: what is predicted in the second must not change by a bit with the first.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    second = torch.arange(5) % model.config.vocab_size
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None].to(model.device)
    seen = []
    for first in (torch.zeros(4), torch.full((4,), model.config.vocab_size - 1)):
        ids = torch.cat([first.long(), second])[None].to(model.device)
        out = model(input_ids=ids, position_ids=positions, use_cache=False)
        seen.append(out.logits[0, 4:])
    return torch.equal(*seen)
