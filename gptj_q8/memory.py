"""What fine-tuning a GPT-J in 8 bits takes of memory, counted from its sizes.

For LoRA in float32, AdamW8bit, and all that `gptj_q8.save_memory` does, one activation kept for
each block and the rest computed again, or all kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gptj_q8.models import RULES
from gptj_q8.models.gptj_version import REWRITTEN
from gptj_q8.nn.loss import CHUNK_ROWS
from gptj_q8.optim import BLOCK_SIZE as OPTIMIZER_BLOCK

# Python, PyTorch, Transformers, PEFT and Trainer when imported: 0.37 GB of anonymous memory on a
# CPU (PyTorch 2.13). On a GPU the context and the libraries' handles: an estimate, not measured.
RUNTIME = {"cpu": 370 * 10**6, "cuda": 500 * 10**6}
WORD, HALF = 4, 2  # bytes of float32 and of bfloat16 or float16


@dataclass(frozen=True)
class Setting:
    """What to count for.

    tokens: of a sequence. batch: sequences at once. rank: of the adapters, on all matrices.
    checkpointing: whether activations are computed again. dropout: whether adapters have some.
    itemsize: bytes of an activation's number. device: whose libraries are counted.
    """

    tokens: int = 2048
    batch: int = 1
    rank: int = 16
    block_size: int = 256
    checkpointing: bool = True
    dropout: bool = False
    itemsize: int = HALF
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Estimate:
    """Bytes by part.

    standing: what is there all the time. passing: what comes and goes.
    moments: the sums of what is there at once, at three moments of a step.
    """

    standing: dict[str, int]
    passing: dict[str, int]
    moments: dict[str, int]

    @property
    def total(self) -> int:
        """The largest of `moments`: the peak, in bytes."""
        return max(self.moments.values())


def knows(config: Any) -> bool:
    """Whether `estimate` can count for a model of this configuration."""
    return getattr(config, "model_type", None) in RULES


def estimate(config: Any, setting: Setting) -> Estimate:
    """Counts for a model of Transformers' configuration `config`, without loading any.

    ValueError for a family other than GPT-J, for sizes below 1, and for more tokens than the
    model's context has.
    """
    _check(config, setting)
    wide, layers, words = config.n_embd, config.n_layer, config.vocab_size
    inner = config.n_inner or 4 * wide
    codes = 2 * words * wide + layers * (4 * wide**2 + 2 * wide * inner)
    adapters = layers * setting.rank * (4 * 2 * wide + 2 * (wide + inner))
    small = words + 2 * wide + layers * (inner + 3 * wide)
    tables = 1 if REWRITTEN else layers
    positions = tables * config.n_positions * (config.rotary_dim or wide)
    weights = {
        "codes": codes,
        "scales": WORD * codes // setting.block_size + (2 + 6 * layers) * 256 * WORD,
        "biases, norms, positions": setting.itemsize * small + WORD * positions,
    }
    return _count(config, setting, weights, adapters, WORD * adapters)


def estimate_loaded(model: Any, tokens: int, batch: int, checkpointing: bool) -> Estimate:
    """Counts for a model in 8 bits that is there, with the parameters that train in it.

    model: of Transformers, perhaps wrapped by PEFT. The rest as in `Setting`, as is the ValueError.
    """
    adapters = getattr(model, "peft_config", {}).values()
    setting = Setting(
        tokens,
        batch,
        checkpointing=checkpointing,
        dropout=any(getattr(config, "lora_dropout", 0) for config in adapters),
        itemsize=model.dtype.itemsize,
        device="cpu" if model.device.type == "cpu" else "cuda",
    )
    _check(model.config, setting)
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
    size = sum(tensor.nbytes for tensor in trained)
    weights = {"weights": sum(tensor.nbytes for tensor in tensors.values()) - size}
    return _count(model.config, setting, weights, sum(t.numel() for t in trained), size)


def _check(config: Any, setting: Setting) -> None:
    if not knows(config):
        raise ValueError(f"memory: knows {', '.join(RULES)}, not {config.model_type}")
    for name in ("tokens", "batch", "rank"):
        if getattr(setting, name) < 1:
            raise ValueError(f"memory: {name} must be positive, got {getattr(setting, name)}")
    if setting.tokens > config.n_positions:
        raise ValueError(
            f"memory: the model's context has {config.n_positions} tokens, got {setting.tokens}"
        )


def _count(
    config: Any, setting: Setting, weights: dict[str, int], trained: int, trained_bytes: int
) -> Estimate:
    """weights: bytes of what is frozen, by part. trained: how many numbers train."""
    wide, layers, item = config.n_embd, config.n_layer, setting.itemsize
    inner = config.n_inner or 4 * wide
    rows = setting.tokens * setting.batch
    # What a block keeps for its backward pass beside its input: the norm's output, q, k, v, what
    # attention gave; fc_in's output and its GELU; of dropped inputs, which elements are left.
    inside = rows * (5 * wide + 2 * inner) * item
    if setting.dropout:
        inside += rows * (5 * wide + inner)
    # Around the product of fc_out come the gradients from above and of the GELU to that.
    gradients_inside = rows * (wide + inner) * item
    # The input of each block and of the last norm, and the gradient of what the head is given.
    kept = (layers + 2) * rows * wide * item
    if setting.checkpointing:
        block = inside + gradients_inside
    else:
        kept += layers * inside
        block = gradients_inside
    # Logits, the same in float32, and their gradient; the gradient of the hidden states.
    chunk = min(rows, CHUNK_ROWS) * config.vocab_size * (item + WORD + item)
    loss = chunk + rows * wide * item
    standing = {
        "libraries": RUNTIME[setting.device],
        **weights,
        "adapters": trained_bytes,
        "optimizer state": 2 * trained + 2 * WORD * trained // OPTIMIZER_BLOCK,
    }
    passing = {
        "gradients": trained_bytes,
        "activations kept": kept,
        "backward of a block": block,
        "loss": loss,
    }
    always = sum(standing.values())
    first = block if setting.checkpointing else inside + block
    moments = {
        "the loss": always + kept + loss,
        "the last block's backward": always + kept + block,
        "the first block's backward": always + trained_bytes + first,
    }
    return Estimate(standing, passing, moments)
