"""Decoding with a static cache: one graph, with nothing in it that a CUDA graph could not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import QUICK, gptj
from transformers import CompileConfig, GPTJForCausalLM

from gptj_q8 import quantize_

PROMPT, NEW = 5, 8


def quantized(device: torch.device, dtype: torch.dtype = torch.float32) -> GPTJForCausalLM:
    model = gptj(bos_token_id=0, eos_token_id=None, pad_token_id=0).to(dtype)
    quantize_(model, QUICK)
    return model.to(device)


def generated(model: GPTJForCausalLM, **how: Any) -> torch.Tensor:
    ids = torch.arange(1, PROMPT + 1, device=model.device)[None]
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_generate_compiles_a_step_into_one_graph(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU through inductor into CUDA graphs (reduce-overhead); on a CPU traced."""
    model = quantized(device)
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True)  # its mode is reduce-overhead
    assert config.mode == "reduce-overhead"
    if device.type == "cpu":
        config = CompileConfig(fullgraph=True, backend=count, mode=None)
        config._compile_all_devices = True
    compiled = generated(model, cache_implementation="static", compile_config=config)
    plain = generated(model)
    for ours, truth in zip(compiled.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-4)
    assert torch.equal(compiled.sequences, plain.sequences)
    if device.type == "cpu":
        assert len(graphs) == 1, "every token of the decode uses the same graph"
        assert names_of_ours(graphs[0]) == {"linear": 2 * 6 + 1, "embedding": 1}


def names_of_ours(graph: torch.fx.GraphModule) -> dict[str, int]:
    """How often each op of ours stands in a graph."""
    found: dict[str, int] = {}
    for node in graph.graph.nodes:
        name = str(node.target)
        if name.startswith("gptj_q8."):
            op = name.split(".")[1]
            found[op] = found.get(op, 0) + 1
    return found
