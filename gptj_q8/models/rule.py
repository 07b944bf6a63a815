"""The form of a family's rule."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A family of models.

    model_type: as config.json names it.
    matrices: the matrices of a block, in the order of the forward pass, named from the block.
    """

    model_type: str
    matrices: tuple[str, ...]
