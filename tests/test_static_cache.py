"""Decoding with a static cache: one graph, with nothing in it that a CUDA graph could not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import QUICK, gptj
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from transformers import CompileConfig, GPTJForCausalLM, StaticCache

from gptj_q8 import backends, ops, quantize_
from gptj_q8.codebooks import dynamic

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


def test_ops_run_in_a_cuda_graph(device: torch.device) -> None:
    """Captured once and replayed on other values, it gives what it gives outside.

    But for adam_step_: its number of the step is no tensor, so a graph would repeat it. Ops that
    look at values first are called past that look, which no graph allows.
    """
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs a GPU: `make gpu-test` runs this")
    n, k, block = 96, 256, 256
    book = dynamic().to(device)
    weight = torch.randn(n, k, device=device)
    codes, absmax = ops.quantize(weight, book, block)
    x, dy = torch.randn(4, k, device=device).half(), torch.randn(4, n, device=device).half()
    ids = torch.arange(4, device=device)
    calls = {
        "quantize": lambda: backends.call("quantize", "cuda", (weight, book, block)),
        "histogram": lambda: backends.call("histogram", "cuda", (weight, block, 64)),
        "dequantize": lambda: ops.dequantize(codes, absmax, book, block, torch.float16),
        "embedding": lambda: ops.embedding(ids, codes, absmax, book, block, torch.float16),
        "linear": lambda: ops.linear(x, codes, absmax, book, None, block),
        "linear_grad_input": lambda: ops.linear_grad_input(dy, codes, absmax, book, block),
    }
    assert {*calls, "adam_step_"} == set(ops.SCHEMAS)
    for name, call in calls.items():
        call()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for values in (weight, x, dy):
            values.mul_(-1.5)
        ids.copy_(ids.flip(0))
        graph.replay()
        torch.testing.assert_close(captured, call(), rtol=0, atol=0, msg=name)


def names_of_ours(graph: torch.fx.GraphModule) -> dict[str, int]:
    """How often each op of ours stands in a graph."""
    found: dict[str, int] = {}
    for node in graph.graph.nodes:
        name = str(node.target)
        if name.startswith("gptj_q8."):
            op = name.split(".")[1]
            found[op] = found.get(op, 0) + 1
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_is_traced_for_a_gpu_that_is_not_here(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fake tensors on a fake CUDA device, as inductor would have it.

    Whatever waits for the GPU (an item, a shape that depends on values, a copy to the CPU) ends
    the trace with an error.
    """
    monkeypatch.setattr(FakeTensor, "__getitem__", index)
    model = quantized(torch.device("cpu"), dtype)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    logits = fake_step(model, torch.compile(model.forward, fullgraph=True, backend=keep))
    assert logits.device.type == "cuda"
    assert logits.shape == (1, 1, model.config.vocab_size)
    assert len(graphs) == 1
    assert names_of_ours(graphs[0]) == {"linear": 2 * 6 + 1, "embedding": 1}
    calls = {str(node.target) for node in graphs[0].graph.nodes if node.op != "placeholder"}
    waits = {"item", "cpu", "numpy", "tolist", "nonzero"}
    assert not waits & calls


def test_the_trace_ends_where_a_step_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTensor, "__getitem__", index)
    model = quantized(torch.device("cpu"))

    def waits(**inputs: Any) -> Any:
        out = model(**inputs)
        out.logits += out.logits.sum().item()
        return out

    with pytest.raises(DataDependentOutputException):
        fake_step(model, torch.compile(waits, fullgraph=True, backend="eager"))


def fake_step(model: GPTJForCausalLM, step: Any) -> torch.Tensor:
    """The logits of a step with a static cache, all on a fake GPU; leaves the model there."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = on_fake_gpu(tensor, mode)
        cache = StaticCache(config=model.config, max_cache_len=16)
        heads, width = model.config.n_head, model.config.n_embd // model.config.n_head
        cache.early_initialization(1, heads, width, model.dtype, torch.device("cuda"))
        ids = torch.ones(1, 1, dtype=torch.long, device="cuda")
        where = torch.full((1, 1), PROMPT, device="cuda")
        return step(input_ids=ids, past_key_values=cache, position_ids=where).logits


def index(tensor: torch.Tensor, where: Any) -> torch.Tensor:
    """tensor[where] for slices, None, whole numbers and a tensor of them.

    PyTorch's own asks CUDA for the device first, even for fake tensors and where there is no CUDA.
    """
    where, dim = where if isinstance(where, tuple) else (where,), 0
    if Ellipsis in where:
        at = where.index(Ellipsis)
        missing = tensor.dim() - sum(part is not None for part in where) + 1
        where = (*where[:at], *[slice(None)] * missing, *where[at + 1 :])
    for part in where:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, torch.Tensor):
            tensor = torch.ops.aten.index(tensor, [*[None] * dim, part])
            dim += part.dim() - 1
        elif isinstance(part, int):
            tensor, dim = tensor.select(dim, part), dim - 1
        else:
            start, end, step = part.indices(tensor.shape[dim])
            tensor = torch.ops.aten.slice(tensor, dim, start, end, step)
        dim += 1
    return tensor


def on_fake_gpu(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(fake, requires_grad=False)
    return fake
