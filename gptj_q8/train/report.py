"""How a run went."""

from __future__ import annotations

from dataclasses import dataclass

from gptj_q8.train.samples import Sample


@dataclass(frozen=True)
class Report:
    """How a run went.

    finished: whether it came to its end rather than being stopped. steps, of_steps: done, and in
    all. checkpoint: the last one's folder, to resume from. adapter: the folder with the result, ""
    where the run was stopped. trained, parameters: how many numbers train, and of how many.
    tokens: learned in each epoch. held_out_tokens: measured. rows: of tokens, in each epoch.
    packed: whether documents share rows. losses, held_out, learning_rates: (step, value), losses
    in nats a token. seconds: of this call's training. plot: the file, "" where none was drawn.
    """

    finished: bool
    steps: int
    of_steps: int
    checkpoint: str
    adapter: str
    trained: int
    parameters: int
    tokens: int
    held_out_tokens: int
    rows: int
    packed: bool
    losses: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    learning_rates: list[tuple[int, float]]
    seconds: float
    samples: list[Sample]
    plot: str
