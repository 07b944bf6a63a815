"""What a fine-tuning run is told, with its defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Settings:
    """How to fine-tune.

    Where LoRA's paper (Hu et al., arXiv 2106.09685) settles a default, that is the default.

    rank, alpha: of the adapters; they add alpha / rank * B A x (section 4.1). A rank of 16 is above
        what sufficed there (section 7.2), and costs little beside the frozen weights.
    dropout: of an adapter's input. The paper takes 0.1 for GPT-2 and none for GPT-3 (tables 11 and
        12); it costs memory, so none here.
    targets: "all" for every matrix of every block, or names of modules. At an equal number of
        parameters more matrices of a lower rank did better than fewer of a higher (section 7.1).
    train_1d: learn biases and LayerNorms, too.
    learning_rate: the peak; 2e-4 for GPT-2 and for GPT-3 (tables 11 and 12). It falls on a
        straight line (as there) to 0 at the end.
    warmup: share of the steps in which it rises on a straight line from 0 before that.
    weight_decay: of the trained matrices; 0.01 for GPT-2 (table 11).
    max_grad_norm: gradients longer than this are shortened to it.
    epochs: how often all of the data is read. max_steps: ends earlier, where given.
    batch_size: rows of tokens in an optimizer step; 8 for GPT-2 (table 11).
    sequence_length: tokens in a row; None takes the model's context, at most 2048.
    held_out: share of the data that only measures; 0 for none.
    save_every: steps from one checkpoint, and one look at the held-out loss, to the next; None
        takes a tenth of the run.
    seed: of the adapters' beginnings, of the order of the data and of what is held out; below
        2^32, as NumPy asks.

    ValueError that names whatever is out of its range.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all"
    train_1d: bool = False
    learning_rate: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    epochs: float = 3
    max_steps: int | None = None
    batch_size: int = 8
    sequence_length: int | None = None
    held_out: float = 0.05
    save_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("alpha", "learning_rate", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, "positive", value)
        for name in ("dropout", "warmup", "held_out"):
            value = getattr(self, name)
            _require(0 <= value < 1, name, "from 0 to below 1", value)
        _require(0 <= self.weight_decay < math.inf, "weight_decay", "0 or more", self.weight_decay)
        for name, least in (("max_steps", 1), ("save_every", 1), ("sequence_length", 2)):
            value = getattr(self, name)
            _require(value is None or value >= least, name, f"at least {least}", value)
        _require(bool(self.targets), "targets", "the names of modules", self.targets)
        _require(0 <= self.seed < 2**32, "seed", "from 0 to 2^32 - 1", self.seed)

    def length(self, context: int | None) -> int:
        """Tokens in a row for a model with this many positions (None: unknown).

        ValueError where more are asked for than the model has positions.
        """
        if self.sequence_length is None:
            return min(context or DEFAULT_LENGTH, DEFAULT_LENGTH)
        if context is not None and self.sequence_length > context:
            raise ValueError(
                f"sequence_length of {self.sequence_length} is beyond the model's context of "
                f"{context} tokens"
            )
        return self.sequence_length

    def steps(self, rows: int) -> int:
        """Optimizer steps of the whole run, for so many rows."""
        steps = math.ceil(math.ceil(rows / self.batch_size) * self.epochs)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def differences(self, other: Settings) -> list[str]:
        """What differs, in words: `rank (8, before 16)`."""
        return [
            f"{field.name} ({mine}, before {theirs})"
            for field in fields(self)
            if (mine := getattr(self, field.name)) != (theirs := getattr(other, field.name))
        ]


DEFAULT_LENGTH = 2048  # GPT-J's context


def _require(holds: bool, name: str, what: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, got {value}")
