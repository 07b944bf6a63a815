"""The ways to multiply by one weight matrix: ours, PyTorch's, and the peers that are installed.

Each holds its copies of one weight `w[N, K]`, and offers what it can of
`linear(x, i)`, `y = x @ w.T`, and `linear_grad_input(dy, i)`, `dx = dy @ w`, with the i-th copy.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ours
from benchmarks.ceilings import read_all
from benchmarks.cold import copies_for
from benchmarks.harness import UnavailableError
from benchmarks.ours import peer


class Weights:
    """One system's copies of a weight. A subclass fills `copies` and offers the products it has.

    bytes: of one copy, as the system stores it.
    """

    copies: list[Any]
    bytes: int
    block_size: int | None = None
    codebook: str | None = None

    def linear(self, x: Tensor, i: int) -> Tensor:
        raise UnavailableError("has no product with the transposed weight")

    def linear_grad_input(self, dy: Tensor, i: int) -> Tensor:
        raise UnavailableError("has no gradient for the input")

    def decoded(self) -> Tensor | None:
        """w[N, K] as this system means it; None where its results mean nothing."""
        raise NotImplementedError

    def _rotate(self, make: Callable[[], Any], nbytes: int, device: torch.device) -> None:
        self.bytes = nbytes
        self.copies = [make() for _ in range(copies_for(nbytes, device))]


class Quantized(Weights):
    """Our codes and scales, through the dispatch table ("auto") or straight into one backend."""

    def __init__(self, weight: Tensor, codebook: str, block_size: int, backend: str) -> None:
        self.backend = backend
        self.block_size, self.codebook = block_size, codebook
        self.table = ours.codebook(codebook, weight, block_size)
        # Each copy is quantized, not cloned: on huge pages then, as a model's weights are.
        make = functools.partial(ours.op("quantize"), weight, self.table, block_size)
        codes, absmax = make()
        self._rotate(make, codes.nbytes + absmax.nbytes, weight.device)

    def linear(self, x: Tensor, i: int) -> Tensor:
        codes, absmax = self.copies[i]
        return ours.op("linear", self.backend)(x, codes, absmax, self.table, None, self.block_size)

    def linear_grad_input(self, dy: Tensor, i: int) -> Tensor:
        codes, absmax = self.copies[i]
        return ours.op("linear_grad_input", self.backend)(
            dy, codes, absmax, self.table, self.block_size
        )

    def decoded(self) -> Tensor:
        codes, absmax = self.copies[0]
        return ours.reference("dequantize")(
            codes, absmax, self.table, self.block_size, torch.float32
        )


class _Matrix(Weights):
    """Systems that hand PyTorch a whole matrix."""

    def matrix(self, i: int, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def linear(self, x: Tensor, i: int) -> Tensor:
        return F.linear(x, self.matrix(i, x.dtype))

    def linear_grad_input(self, dy: Tensor, i: int) -> Tensor:
        return dy @ self.matrix(i, dy.dtype)

    def decoded(self) -> Tensor:
        return self.matrix(0, torch.float32)


class Dense(_Matrix):
    """PyTorch on the weight itself."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._rotate(
            lambda: weight.to(dtype, copy=True), weight.numel() * dtype.itemsize, weight.device
        )

    def matrix(self, i: int, dtype: torch.dtype) -> Tensor:
        return self.copies[i]

    def linear(self, x: Tensor, i: int) -> Tensor:
        return F.linear(x.to(self.copies[i].dtype), self.copies[i])

    def linear_grad_input(self, dy: Tensor, i: int) -> Tensor:
        return dy.to(self.copies[i].dtype) @ self.copies[i]


class DecodeThenMultiply(Quantized, _Matrix):
    """Our dequantize, then PyTorch: what fusing the two must beat."""

    linear = _Matrix.linear
    linear_grad_input = _Matrix.linear_grad_input

    def matrix(self, i: int, dtype: torch.dtype) -> Tensor:
        codes, absmax = self.copies[i]
        return ours.op("dequantize", self.backend)(
            codes, absmax, self.table, self.block_size, dtype
        )


class BitsAndBytes(_Matrix):
    """bitsandbytes' block-wise dequantize, then PyTorch: it has no fused 8-bit product."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, block_size: int) -> None:
        functional = peer("bitsandbytes.functional")
        self.dequantize = functional.dequantize_blockwise
        self.block_size, self.codebook = block_size, "dynamic"
        codes, state = functional.quantize_blockwise(weight.to(dtype), blocksize=block_size)
        self._rotate(
            lambda: (codes.clone(), copy.deepcopy(state)),
            codes.nbytes + state.absmax.nbytes,
            weight.device,
        )

    def matrix(self, i: int, dtype: torch.dtype) -> Tensor:
        return self.dequantize(*self.copies[i])


class TorchInt8(Weights):
    """PyTorch's own int8 weight-only product: uniform levels, one scale for each row."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        if not (weight.device.type == "cpu" and dtype == torch.bfloat16):
            raise UnavailableError("torch._weight_int8pack_mm is used for bfloat16 on a CPU only")
        _refuse_odd_shapes(weight)
        scale = weight.abs().amax(dim=1).div(127).to(dtype)
        codes = weight.div(scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self._rotate(
            lambda: (codes.clone(), scale.clone()), codes.nbytes + scale.nbytes, weight.device
        )

    def linear(self, x: Tensor, i: int) -> Tensor:
        return torch._weight_int8pack_mm(x, *self.copies[i])

    def decoded(self) -> Tensor:
        codes, scale = self.copies[0]
        return codes.float() * scale.float()[:, None]


def _refuse_odd_shapes(weight: Tensor) -> None:
    """For torch._weight_int8pack_mm: PyTorch 2.13 dies of a segmentation fault on some of these."""
    if weight.shape[0] % 32 or weight.shape[1] % 32:
        raise UnavailableError("torch._weight_int8pack_mm wants multiples of 32")


class TorchAo(Weights):
    """torchao's int8 weight-only linear layer."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        quantization = peer("torchao.quantization")
        n, k = weight.shape
        layer = torch.nn.Linear(k, n, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
        self._rotate(lambda: copy.deepcopy(layer), n * k + n * dtype.itemsize, weight.device)

    def linear(self, x: Tensor, i: int) -> Tensor:
        return self.copies[i](x)

    def decoded(self) -> Tensor:
        return self.copies[0].weight.dequantize().float()


class Linear8bitLt(Weights):
    """bitsandbytes' LLM.int8: a scale for each row of w, and of x, which is rounded to int8 too."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        n, k = weight.shape
        layer = peer("bitsandbytes").nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": weight.to("cpu", dtype)})
        layer = layer.to(weight.device).eval()  # which quantizes
        self._rotate(lambda: copy.deepcopy(layer), n * k + 4 * n, weight.device)

    def linear(self, x: Tensor, i: int) -> Tensor:
        return self.copies[i](x)

    def decoded(self) -> Tensor:
        weight = self.copies[0].weight
        return weight.data.float() * (weight.SCB.float() / 127)[:, None]


class Quanto(Weights):
    """optimum-quanto's int8 weights, with a scale for each row."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        quanto = peer("optimum.quanto")
        _refuse_odd_shapes(weight)
        n, k = weight.shape

        def make() -> torch.nn.Module:  # anew for each copy: it refuses to be copied
            layer = torch.nn.Linear(k, n, bias=False, device="meta")
            layer.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
            model = torch.nn.Sequential(layer)
            quanto.quantize(model, weights=quanto.qint8)
            quanto.freeze(model)
            return model

        self._rotate(make, n * k + n * dtype.itemsize, weight.device)

    def linear(self, x: Tensor, i: int) -> Tensor:
        return self.copies[i](x)

    def decoded(self) -> Tensor:
        return self.copies[0][0].weight.dequantize().float()


class ReadLoop(Weights):
    """Reads the codes of our own copies, and does nothing with them."""

    def __init__(self, weight: Tensor) -> None:
        if weight.device.type != "cpu":
            raise UnavailableError("a GPU's ceiling is its copy bandwidth, see ceilings")
        words = weight.numel() // 4 * 4
        ours_in_memory = Quantized(weight, "dynamic", 256, "auto").copies
        self.copies = [codes.flatten()[:words] for codes, _ in ours_in_memory]
        self.bytes = words

    def linear(self, x: Tensor, i: int) -> Tensor:
        return read_all(self.copies[i])

    def linear_grad_input(self, dy: Tensor, i: int) -> Tensor:
        return read_all(self.copies[i])

    def decoded(self) -> None:
        return None
