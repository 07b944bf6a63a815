"""Tiny checkpoints in exactly the layout of hivemind/gpt-j-6B-8bit, and what they compute.

All of it is written from the layout's description, without the package: the quantizer, the decoder
and the old modules' forward pass, so that tests compare with an independent truth.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import IDS, gptj
from torch import Tensor, nn
from transformers import PreTrainedModel

BLOCK = 4096
RANK = 3
FORMS = ("bin", "safetensors", "bin-shards", "safetensors-shards")
CLOSE = 1e-6  # float32, as the old code was, against float64
ADAPTERS = ("none", "hivemind", "dropout", "attention")
"""None; on every module; with dropout in between (gustavecortal); on attention only (vetka925)."""


def dynamic_map() -> Tensor:
    """The signed dynamic map as bitsandbytes 0.26 left it on a CPU, with -1 in the first place."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        levels += [*middles, *-middles]
    table = torch.tensor(sorted(levels), dtype=torch.float32)
    table[0] = -1.0
    return table


def quantize(weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight. Any codes would do: the tests decode what is stored."""
    blocks = weight.detach().double().flatten().split(BLOCK)
    scales = torch.stack([block.abs().max() for block in blocks])
    codes = [
        (block[:, None] / scale - table.double()).abs().argmin(1).to(torch.uint8)
        for block, scale in zip(blocks, scales, strict=True)
    ]
    return torch.cat(codes).view(weight.shape), scales.float()


def decode(codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """The float32 weight: one product for each element, exact in float64 and rounded once."""
    scale = absmax.double().repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    return (table.double()[codes.long()] * scale).float()


def state_dict(
    table: Tensor | None = None,
    scales: torch.dtype = torch.float32,
    adapters: str = "none",
    floats: torch.dtype = torch.float32,
    model: PreTrainedModel | None = None,
) -> dict[str, Tensor]:
    """What `state_dict()` gave in the old code; model: the original, a tiny random one by default.

    floats: dtype of what is not quantized.
    """
    model = gptj() if model is None else model
    torch.manual_seed(7)
    table = dynamic_map() if table is None else table
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            state[f"{name}.weight"], absmax = quantize(module.weight, table)
            state[f"{name}.absmax"], state[f"{name}.code"] = absmax.to(scales), table.to(scales)
            state |= adapter(name, module.weight.shape, isinstance(module, nn.Embedding), adapters)
        elif getattr(module, "weight", None) is not None:  # a norm
            state[f"{name}.weight"] = module.weight.detach().to(floats)
        if getattr(module, "bias", None) is not None:
            state[f"{name}.bias"] = module.bias.detach().to(floats)
        if hasattr(module, "q_proj"):
            positions = model.config.max_position_embeddings
            mask = torch.ones(positions, positions, dtype=torch.uint8).tril()
            state[f"{name}.bias"] = mask.view(1, 1, positions, positions)
            state[f"{name}.masked_bias"] = torch.tensor(-1e9)
    return state


def adapter(name: str, shape: torch.Size, embeds: bool, kind: str) -> dict[str, Tensor]:
    if kind == "none" or (kind == "attention" and ".attn." not in name):
        return {}
    (rows, columns), second = shape, 2 if kind == "dropout" else 1
    a, b = ((rows, RANK), (columns, RANK)) if embeds else ((RANK, columns), (rows, RANK))
    return {
        f"{name}.adapter.0.weight": torch.randn(a) * 0.1,
        f"{name}.adapter.{second}.weight": torch.randn(b) * 0.1,
    }


def config(model: PreTrainedModel) -> dict[str, object]:
    """The config.json of such a checkpoint: nothing in it tells of 8 bits."""
    made = model.config.to_dict()
    made["architectures"] = [type(model).__name__]
    made.pop("dtype", None)
    return {**made, "torch_dtype": "float32", "transformers_version": "4.14.1"}


def write(
    directory: Path,
    state: Mapping[str, Tensor],
    form: str = "bin",
    model: PreTrainedModel | None = None,
) -> Path:
    """Write a checkpoint: a pickle, safetensors, or shards of either. model: for its config."""
    directory.mkdir(parents=True, exist_ok=True)
    made = config(gptj() if model is None else model)
    (directory / "config.json").write_text(json.dumps(made))
    ending = "bin" if form.startswith("bin") else "safetensors"
    stem = "pytorch_model" if ending == "bin" else "model"

    def save(tensors: Mapping[str, Tensor], name: str) -> None:
        if ending == "bin":
            torch.save(dict(tensors), directory / name)
        else:
            whole = {key: value.contiguous().clone() for key, value in tensors.items()}
            save_file(whole, directory / name, metadata={"format": "pt"})

    if not form.endswith("shards"):
        save(state, f"{stem}.{ending}")
        return directory
    names = list(state)
    weight_map = {}
    for i in range(3):
        file = f"{stem}-{i + 1:05d}-of-00003.{ending}"
        part = names[i * len(names) // 3 : (i + 1) * len(names) // 3]
        save({name: state[name] for name in part}, file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return directory


class OldLinear(nn.Module):
    """The old FrozenBNBLinear: decodes the whole weight, multiplies, adds the adapter."""

    def __init__(self, state: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        parts = (state[f"{name}.{part}"] for part in ("weight", "absmax", "code"))
        self.weight, self.bias = decode(*parts).double(), state.get(f"{name}.bias")
        self.matrices = [
            state[f"{name}.adapter.{i}.weight"].double()
            for i in range(3)
            if f"{name}.adapter.{i}.weight" in state
        ]

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias.double() if self.bias is not None else None)
        if self.matrices:
            a, b = self.matrices
            y = y + F.linear(F.linear(x, a), b)
        return y


class OldEmbedding(OldLinear):
    """The old FrozenBNBEmbedding."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        if self.matrices:
            a, b = self.matrices
            rows = rows + F.linear(F.embedding(ids, a), b)
        return rows


def old_model(
    state: Mapping[str, Tensor], original: PreTrainedModel | None = None
) -> PreTrainedModel:
    """GPT-J in float64 with the old modules in it. original: gives its shape, if not a tiny one."""
    model = (gptj() if original is None else copy.deepcopy(original)).double()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            old = OldLinear if isinstance(module, nn.Linear) else OldEmbedding
            model.set_submodule(name, old(state, name))
        elif getattr(module, "weight", None) is not None:
            module.weight.data = state[f"{name}.weight"].double()
            if getattr(module, "bias", None) is not None:
                module.bias.data = state[f"{name}.bias"].double()
    return model


def old_logits(state: Mapping[str, Tensor]) -> Tensor:
    """What the old code computes for IDS, in float64."""
    with torch.no_grad():
        logits: Tensor = old_model(state)(IDS).logits
    return logits


def assert_same_weights(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Every 8-bit layer has the codes, scales and table that are stored, and decodes to them."""
    stored = {name.removesuffix(".code") for name in state if name.endswith(".code")}
    modules: dict[str, Any] = dict(model.named_modules())
    found = {name: layer for name, layer in modules.items() if hasattr(layer, "codebook")}
    assert {name.removesuffix(".base_layer") for name in found} == stored
    for name, layer in found.items():
        weight, absmax, code = (
            state[f"{name.removesuffix('.base_layer')}.{part}"]
            for part in ("weight", "absmax", "code")
        )
        assert layer.block_size == 4096
        assert torch.equal(layer.codes, weight), name
        assert torch.equal(layer.absmax, absmax.float()), name
        assert torch.equal(layer.codebook, code.float()), name
        assert torch.equal(layer.dequantize(), decode(weight, absmax, code)), name
