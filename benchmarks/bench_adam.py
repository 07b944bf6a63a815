"""A step of 8-bit AdamW beside PyTorch's fused AdamW and bitsandbytes' AdamW8bit."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.cold import copies_for
from benchmarks.harness import Case, Cases, Check, Maker, Selection, System, relative_error
from benchmarks.inputs import random_generator, random_weight
from benchmarks.shapes import SHAPES, Shape

LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 1e-3, 0.9, 0.999, 1e-8, 0.01
# The parameter after one step from zero state, relative in norm: rounding, and for half precision
# a few values that round to the other neighbour.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
# Of the first and the second moment.
CODEBOOKS = "dynamic", "dynamic_unsigned"


def cases(op: str, selection: Selection) -> Cases:
    """op: "adam_step_". Of the formats only the block size counts."""
    own = ("tiny_odd",) if selection.tiny else ("attention",)
    for dtype in selection.dtypes:
        for shape in (SHAPES[name] for name in selection.shapes or own):
            for block_size in dict.fromkeys(size for _, size in selection.formats):
                problem = cache(partial(_Problem, shape, dtype, block_size, selection.device))
                makers: dict[str, Maker] = {
                    ours.system_name(backend): partial(_make, problem, "ours", backend)
                    for backend in selection.backends
                }
                makers["torch AdamW fused"] = partial(_make, problem, "torch_fused")
                makers["bitsandbytes"] = partial(_make, problem, "bitsandbytes")
                yield (
                    Case(op, shape.name, None, shape.n, shape.k, dtype, 0, "torch AdamW fused"),
                    makers,
                )


def _make(problem: Callable[[], "_Problem"], kind: str, *arguments: str) -> System:
    """The problem's system of that kind, the problem made when first asked for."""
    system: System = getattr(problem(), kind)(*arguments)
    return system


class _Problem:
    """One parameter with its gradient, and the systems that step it."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.param = random_weight(shape, device).to(dtype)
        grad = torch.randn(self.param.shape, generator=random_generator(device), device=device)
        self.grad = grad.mul_(1e-3).to(dtype)
        zeros = torch.zeros_like(self.param)
        self.books = [ours.codebook(name, zeros, block_size) for name in CODEBOOKS]
        # codes and absmax of the first moment, then of the second
        self.zero_moments: list[Tensor] = []
        for book in self.books:
            self.zero_moments += ours.reference("quantize")(zeros, book, block_size)
        after_one_step = self._state()
        self._step("reference", after_one_step)
        self.exact = after_one_step[0]

    def ours(self, backend: str) -> System:
        ours.op("adam_step_", backend)  # says so if there is none
        return self._system(
            make=self._state,
            step=lambda state: self._step(backend, state),
            param_of=lambda state: state[0],
            # codes of two moments, and their scales
            state_bytes=2 * (1 + 4 / self.block_size),
            block_size=self.block_size,
        )

    def torch_fused(self) -> System:
        return self._optimizer(partial(torch.optim.AdamW, fused=True), state_bytes=8)

    def bitsandbytes(self) -> System:
        optim = ours.peer("bitsandbytes").optim
        return self._optimizer(optim.AdamW8bit, state_bytes=2 * (1 + 4 / 256))

    def _state(self) -> list[Tensor]:
        """The tensors that adam_step_ takes, before its first step."""
        moments = [tensor.clone() for tensor in self.zero_moments]
        return [self.param.clone(), self.grad, *moments, *self.books]

    def _step(self, backend: str, state: list[Tensor]) -> None:
        op = ours.op("adam_step_", backend)
        op(*state, LR, BETA1, BETA2, EPS, WEIGHT_DECAY, 1, self.block_size)

    def _optimizer(self, kind: Callable[..., Any], state_bytes: float) -> System:
        def make() -> torch.optim.Optimizer:
            param = torch.nn.Parameter(self.param.clone())
            param.grad = self.grad
            return kind([param], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY)

        return self._system(
            make=make,
            step=lambda optimizer: optimizer.step(),
            param_of=lambda optimizer: optimizer.param_groups[0]["params"][0],
            state_bytes=state_bytes,
        )

    def _system(
        self,
        make: Callable[[], Any],
        step: Callable[[Any], None],
        param_of: Callable[[Any], Tensor],
        state_bytes: float,
        block_size: int | None = None,
    ) -> System:
        """A system of rotating states. state_bytes: per weight; read and written in a step."""
        resident = self.param.nbytes + int(state_bytes * self.param.numel())
        states = [make() for _ in range(copies_for(resident, self.param.device))]

        def check() -> Check:
            state = make()
            step(state)
            error = relative_error(param_of(state).detach(), self.exact)
            return Check(error, BOUND[self.param.dtype])

        return System(
            call=lambda i: step(states[i]),
            copies=len(states),
            bytes=2 * resident + self.grad.nbytes,
            check=check,
            block_size=block_size,
            codebook=CODEBOOKS[0] if block_size else None,
        )
