"""What a run tells while it goes on."""


class Listener:
    """Is told how a run goes; this one does nothing with it."""

    def stage(self, text: str) -> None:
        """A part of the run begins."""

    def prepared(self, summary: str) -> None:
        """The adapters are there; in a few lines what trains, and what that costs."""

    def step(self, step: int, steps: int, loss: float, rate: float, tokens: float) -> None:
        """An optimizer step is done: mean loss in nats, learning rate, tokens per second."""

    def held_out(self, step: int, loss: float) -> None:
        """The held-out loss was measured, in nats a token."""

    def stopping(self) -> None:
        """Someone asked for an end; the step in hand is finished first."""
