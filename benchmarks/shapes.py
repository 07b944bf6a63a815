"""The weight matrices of GPT-J-6B, and tiny ones for a dry run.

N, K for `y[M, N] = x[M, K] @ w[N, K].T`; M is the number of tokens in hand.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    name: str
    n: int
    k: int

    @property
    def numel(self) -> int:
        return self.n * self.k


GPTJ = (
    Shape("attention", 4096, 4096),  # q_proj, k_proj, v_proj and out_proj
    Shape("fc_in", 16384, 4096),
    Shape("fc_out", 4096, 16384),
    Shape("lm_head", 50400, 4096),  # wte has the same shape
)
# Odd on purpose: rows that are no multiple of a block, of a vector or of a tile.
TINY = (Shape("tiny", 96, 64), Shape("tiny_odd", 37, 200))

SHAPES = {shape.name: shape for shape in GPTJ + TINY}

# Decoding one token, a few sequences at once, and prompts.
M_ALL = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
M_SHORT = (1, 8, 64, 512)
M_TINY = (1, 5)
