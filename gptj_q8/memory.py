"""What fine-tuning a GPT-J in 8 bits takes of memory, counted from its sizes.

For LoRA in float32 on the six matrices of each block, AdamW8bit, 16-bit arithmetic, one activation
kept for each block, and all that `gptj_q8.save_memory` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gptj_q8.models import RULES
from gptj_q8.nn.loss import CHUNK_ROWS
from gptj_q8.optim import BLOCK_SIZE as OPTIMIZER_BLOCK

# Python, PyTorch, Transformers, PEFT and Trainer when imported: 0.37 GB of anonymous memory on a
# CPU (PyTorch 2.13). On a GPU the context and the libraries' handles: an estimate, not measured.
RUNTIME = {"cpu": 370 * 10**6, "cuda": 500 * 10**6}
WORD, HALF = 4, 2  # bytes of float32 and of bfloat16 or float16


@dataclass(frozen=True)
class Setting:
    """tokens: of a sequence. batch: sequences at once. rank: of the adapters.

    device: whose libraries are counted.
    """

    tokens: int = 2048
    batch: int = 1
    rank: int = 16
    block_size: int = 256
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Estimate:
    """Bytes. `standing` is there all the time; of `passing` some parts are there at once.

    total: the largest sum of what is there at once, over the three moments in `moments`.
    """

    standing: dict[str, int]
    passing: dict[str, int]
    moments: dict[str, int]

    @property
    def total(self) -> int:
        return max(self.moments.values())


def estimate(config: Any, setting: Setting) -> Estimate:
    """Counts for a model of Transformers' configuration `config`.

    ValueError for a family other than GPT-J, for sizes below 1, and for more tokens than the
    model's context has.
    """
    if config.model_type not in RULES:
        raise ValueError(f"memory: knows {', '.join(RULES)}, not {config.model_type}")
    for name in ("tokens", "batch", "rank"):
        if getattr(setting, name) < 1:
            raise ValueError(f"memory: {name} must be positive, got {getattr(setting, name)}")
    if setting.tokens > config.n_positions:
        raise ValueError(
            f"memory: the model's context has {config.n_positions} tokens, got {setting.tokens}"
        )
    wide, layers, words = config.n_embd, config.n_layer, config.vocab_size
    inner = config.n_inner or 4 * wide
    rows = setting.tokens * setting.batch
    codes = 2 * words * wide + layers * (4 * wide**2 + 2 * wide * inner)
    adapters = layers * setting.rank * (4 * 2 * wide + 2 * (wide + inner))
    small = words + 2 * wide + layers * (inner + 3 * wide)
    positions = layers * config.n_positions * (config.rotary_dim or wide)
    standing = {
        "libraries": RUNTIME[setting.device],
        "codes": codes,
        "scales": WORD * codes // setting.block_size + (2 + 6 * layers) * 256 * WORD,
        "biases, norms, positions": HALF * small + WORD * positions,
        "adapters": WORD * adapters,
        "optimizer state": 2 * adapters + 2 * WORD * adapters // OPTIMIZER_BLOCK,
    }
    kept = (layers + 2) * rows * wide * HALF
    # Around the product of fc_out: the norm's output, q, k, v, what attention gave and the gradient
    # from above, each as wide as the model; fc_in's output, its GELU and that one's gradient.
    block = rows * (6 * wide + 3 * inner) * HALF
    # Logits in 16 bits, in float32, and their gradient; the gradient of the hidden states.
    loss = min(rows, CHUNK_ROWS) * words * (HALF + WORD + HALF) + rows * wide * HALF
    passing = {
        "gradients": WORD * adapters,
        "activations kept": kept,
        "backward of a block": block,
        "loss": loss,
    }
    always = sum(standing.values())
    moments = {
        "the loss": always + kept + loss,
        "the last block's backward": always + kept + block,
        "the first block's backward": always + passing["gradients"] + block,
    }
    return Estimate(standing, passing, moments)
