"""The form of a family's rule."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A family of models.

    model_type: as config.json names it.
    matrices: the matrices of a block, in the order of the forward pass, named from the block.
    leftovers: patterns of tensors in old checkpoints that today's model has no use for.
    """

    model_type: str
    matrices: tuple[str, ...]
    leftovers: tuple[str, ...] = ()
