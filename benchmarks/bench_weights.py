"""What is done to weights besides multiplying: quantize, fit, dequantize, embedding.

`fit` finds the fitted codebook of a weight (histogram and levels), `quantize` encodes with a
codebook at hand. The baseline is a cast between float and uint8 in PyTorch, which moves the same
bytes and computes next to nothing; for embedding it is PyTorch's own.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ours
from benchmarks.cold import copies_for
from benchmarks.harness import (
    Case,
    Cases,
    Check,
    Maker,
    Selection,
    System,
    UnavailableError,
    relative_error,
)
from benchmarks.inputs import random_generator, random_weight
from benchmarks.shapes import M_SHORT, M_TINY, SHAPES, Shape

# Every backend of ours encodes and decodes the same bits.
EXACT = 0.0
# DESIGN's bound for normal weights at block 4096; smaller blocks err less.
FIT_BOUND = 0.00635
# A peer's 8-bit maps are off by 1 to 2 % of a normal weight.
PEER_BOUND = 0.03
# Different rows for each call, so that the table's rows are cold.
ID_SETS = 64


def cases(op: str, selection: Selection) -> Cases:
    """op: a key of OPS."""
    found = OPS[op]
    own = ("tiny_odd",) if selection.tiny else (found.shape,)
    rows = selection.m or (M_TINY if selection.tiny else M_SHORT)
    for dtype in selection.dtypes:
        for shape in (SHAPES[name] for name in selection.shapes or own):
            data_of = functools.cache(partial(Data.of, shape, dtype=dtype, device=selection.device))
            for m in rows if op == "embedding" else [None]:
                makers: dict[str, Maker] = {}
                for codebook, block_size, suffix in selection.named_formats():
                    built = functools.cache(
                        lambda book=codebook, size=block_size, m=m, data_of=data_of: found.systems(
                            data_of(book, size), m or 0, selection.backends
                        )
                    )
                    for name in (*map(ours.system_name, selection.backends), *found.peers):
                        full = name if name == found.baseline else name + suffix
                        makers.setdefault(full, partial(_make, built, name))
                yield (
                    Case(op, shape.name, m, shape.n, shape.k, dtype, 0, found.baseline),
                    makers,
                )


def _make(built: Callable[[], dict[str, Maker]], name: str) -> System:
    return built()[name]()


@dataclass(frozen=True)
class Data:
    """A weight, and its codes and scales as the reference makes them."""

    weight: Tensor
    table: Tensor
    codes: Tensor
    absmax: Tensor
    codebook: str
    block_size: int

    @classmethod
    def of(
        cls,
        shape: Shape,
        codebook: str,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Data":
        weight = random_weight(shape, device).to(dtype)
        table = ours.codebook(codebook, weight, block_size)
        codes, absmax = ours.reference("quantize")(weight, table, block_size)
        return cls(weight, table, codes, absmax, codebook, block_size)

    @property
    def traffic(self) -> int:
        """Bytes of the weight in both forms."""
        return self.weight.nbytes + self.codes.nbytes + self.absmax.nbytes


def quantize_systems(data: Data, m: int, backends: Sequence[str]) -> dict[str, Maker]:
    weights = _copies(data.weight)

    def make(backend: str) -> System:
        op = partial(ours.op("quantize", backend), codebook=data.table, block_size=data.block_size)

        def check() -> Check:
            codes, absmax = op(data.weight)
            wrong = (codes != data.codes).double().mean() + (absmax != data.absmax).double().mean()
            return Check(float(wrong), EXACT)

        return _system(data, lambda i: op(weights[i]), len(weights), data.traffic, check)

    def bitsandbytes() -> System:
        functional = ours.peer("bitsandbytes.functional")
        op = partial(functional.quantize_blockwise, blocksize=data.block_size)
        check = partial(
            _peer_check, lambda: functional.dequantize_blockwise(*op(data.weight)), data.weight
        )
        return _system(data, lambda i: op(weights[i]), len(weights), data.traffic, check)

    return {
        **_of_ours(backends, make),
        "torch cast": partial(_cast, weights, torch.uint8),
        "bitsandbytes": bitsandbytes,
    }


def fit_systems(data: Data, m: int, backends: Sequence[str]) -> dict[str, Maker]:
    weights = _copies(data.weight)

    def make(backend: str) -> System:
        if backend != "auto":
            raise UnavailableError("the codebook is fitted by whatever backend serves")

        def fit(i: int) -> Tensor:
            return ours.codebook("fitted", weights[i], data.block_size)

        def check() -> Check:
            table, weight = fit(0), data.weight.float()
            codes, absmax = ours.reference("quantize")(weight, table, data.block_size)
            decoded = ours.reference("dequantize")(
                codes, absmax, table, data.block_size, torch.float32
            )
            return Check(relative_error(decoded, weight), FIT_BOUND)

        return _system(data, fit, len(weights), data.weight.nbytes, check)

    return {**_of_ours(backends, make), "torch cast": partial(_cast, weights, torch.uint8)}


def dequantize_systems(data: Data, m: int, backends: Sequence[str]) -> dict[str, Maker]:
    codes = _copies(data.codes)
    dtype = data.weight.dtype
    exact = ours.reference("dequantize")(
        data.codes, data.absmax, data.table, data.block_size, dtype
    )

    def make(backend: str) -> System:
        op = ours.op("dequantize", backend)

        def decode(i: int) -> Tensor:
            return op(codes[i], data.absmax, data.table, data.block_size, dtype)

        def check() -> Check:
            return Check(relative_error(decode(0), exact), EXACT)

        return _system(data, decode, len(codes), data.traffic, check)

    def bitsandbytes() -> System:
        functional = ours.peer("bitsandbytes.functional")
        own, state = functional.quantize_blockwise(data.weight, blocksize=data.block_size)
        owns = _copies(own)

        def decode(i: int) -> Tensor:
            return functional.dequantize_blockwise(owns[i], state)

        check = partial(_peer_check, partial(decode, 0), data.weight)
        return _system(data, decode, len(owns), data.traffic, check)

    return {
        **_of_ours(backends, make),
        "torch cast": partial(_cast, codes, dtype),
        "bitsandbytes": bitsandbytes,
    }


def embedding_systems(data: Data, m: int, backends: Sequence[str]) -> dict[str, Maker]:
    (n, k), device, dtype = data.weight.shape, data.weight.device, data.weight.dtype
    ids = torch.randint(0, n, (ID_SETS, m), generator=random_generator(device), device=device)
    stored = (data.codes, data.absmax, data.table, data.block_size, dtype)
    exact = ours.reference("embedding")(ids[0], *stored)

    def make(backend: str) -> System:
        op = ours.op("embedding", backend)

        def rows(i: int) -> Tensor:
            return op(ids[i], *stored)

        def check() -> Check:
            return Check(relative_error(rows(0), exact), EXACT)

        return _system(data, rows, ID_SETS, m * k * (1 + dtype.itemsize), check)

    def torch_embedding() -> System:
        return System(
            lambda i: F.embedding(ids[i], data.weight), ID_SETS, 2 * m * k * dtype.itemsize
        )

    return {**_of_ours(backends, make), "torch": torch_embedding}


@dataclass(frozen=True)
class _Op:
    """shape: that it is timed on. peers: the names of the systems that are not ours."""

    systems: Callable[[Data, int, Sequence[str]], dict[str, Maker]]
    shape: str
    peers: tuple[str, ...]

    @property
    def baseline(self) -> str:
        return self.peers[0]


OPS = {
    "quantize": _Op(quantize_systems, "attention", ("torch cast", "bitsandbytes")),
    "fit": _Op(fit_systems, "attention", ("torch cast",)),
    "dequantize": _Op(dequantize_systems, "attention", ("torch cast", "bitsandbytes")),
    "embedding": _Op(embedding_systems, "lm_head", ("torch",)),
}


def _of_ours(backends: Sequence[str], make: Callable[[str], System]) -> dict[str, Maker]:
    return {ours.system_name(backend): partial(make, backend) for backend in backends}


def _system(
    data: Data,
    call: Callable[[int], object],
    copies: int,
    traffic: int,
    check: Callable[[], Check],
) -> System:
    return System(call, copies, traffic, check, data.block_size, data.codebook)


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> System:
    traffic = tensors[0].nbytes + tensors[0].numel() * dtype.itemsize
    return System(lambda i: tensors[i].to(dtype), len(tensors), traffic)


def _copies(tensor: Tensor) -> list[Tensor]:
    return [tensor.clone() for _ in range(copies_for(tensor.nbytes, tensor.device))]


def _peer_check(decode: Callable[[], Tensor], weight: Tensor) -> Check:
    return Check(relative_error(decode(), weight), PEER_BOUND)
