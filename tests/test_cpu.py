"""What is particular to the compiled CPU backend: instruction sets, threads, memory, bindings."""

from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import DTYPES, NEEDS_CPU_KERNELS, TABLES, random_quantized
from torch import Tensor

from gptj_q8.backends import cpu

ROOT = Path(__file__).parent.parent

pytestmark = NEEDS_CPU_KERNELS


def every_op(
    m: int, n: int, k: int, block_size: int, dtype: torch.dtype, name: str
) -> list[Tensor]:
    """The results of all ops on one fixed random case, larger than one thread's share of work."""
    generator = torch.Generator().manual_seed(0)
    table = TABLES[name]()
    weight = torch.randn(n, k, generator=generator).to(dtype)
    x = torch.randn(m, k, generator=generator).to(dtype)
    dy = torch.randn(m, n, generator=generator).to(dtype)
    codes, absmax = cpu.quantize(weight, table, block_size)
    v_codes = torch.randint(128, 256, codes.shape, generator=generator, dtype=torch.uint8)
    param, m_state, v_state = weight.clone(), [codes.clone(), absmax.clone()], [v_codes, absmax + 1]
    cpu.adam_step_(
        param, weight, *m_state, *v_state, table, table, 1e-3, 0.9, 0.999, 1e-8, 0.1, 2, block_size
    )
    return [
        codes,
        absmax,
        cpu.histogram(weight, block_size, 1024),
        cpu.dequantize(codes, absmax, table, block_size, dtype),
        cpu.embedding(torch.arange(n), codes, absmax, table, block_size, dtype),
        cpu.linear(x, codes, absmax, table, None, block_size),
        cpu.linear_grad_input(dy, codes, absmax, table, block_size),
        param,
        *m_state,
        *v_state,
    ]


def test_an_instruction_set_can_be_forced() -> None:
    before = cpu.instruction_set()
    assert before == cpu.instruction_sets()[0]
    assert "portable" in cpu.instruction_sets()
    with cpu.force_isa("portable"):
        assert cpu.instruction_set() == "portable"
    assert cpu.instruction_set() == before
    with pytest.raises(RuntimeError, match="no instruction set z80"), cpu.force_isa("z80"):
        pass


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "table"),
    [
        (1, 1300, 200, "arbitrary"),
        (4, 1300, 192, "arbitrary"),
        (11, 800, 333, "arbitrary"),
        (1, 1022, 1024, "gaussian"),
        (70, 606, 256, "gaussian"),
        (150, 606, 384, "gaussian"),
        (150, 606, 512, "gaussian"),
    ],
)
@pytest.mark.parametrize("block_size", [64, 256])
def test_thread_count_changes_no_bit(
    m: int, n: int, k: int, table: str, block_size: int, dtype: torch.dtype, isa: str
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = every_op(m, n, k, block_size, dtype, table)
        for count in (2, 3):
            torch.set_num_threads(count)
            several = every_op(m, n, k, block_size, dtype, table)
            assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))
    finally:
        torch.set_num_threads(threads)


class GuardedPages:
    """Copies of tensors that end exactly where unreadable memory begins."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []
        self._libc = ctypes.CDLL(None, use_errno=True)

    def copy(self, t: Tensor) -> Tensor:
        size = t.numel() * t.element_size()
        room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, room + mmap.PAGESIZE)
        self._maps.append(pages)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        if self._libc.mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
        copied = torch.frombuffer(pages, dtype=t.dtype, count=t.numel(), offset=room - size)
        return copied.view(t.shape).copy_(t)


@pytest.mark.skipif(sys.platform != "linux", reason="uses mprotect as Linux has it")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 6, 192), (3, 5, 77), (4, 7, 4160), (6, 67, 129), (17, 66, 320), (17, 67, 384)],
)
def test_nothing_is_read_past_the_end(m: int, n: int, k: int, dtype: torch.dtype, isa: str) -> None:
    pages = GuardedPages()
    for block_size, table in ((32, "arbitrary"), (256, "arbitrary"), (256, "gaussian")):
        w = random_quantized(n, k, block_size, table)
        parts = [pages.copy(part) for part in w.parts]
        x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        weight = torch.randn(n, k).to(dtype)
        y = cpu.linear(pages.copy(x), *parts, pages.copy(torch.ones(n)), block_size)
        assert torch.equal(y, cpu.linear(x, *w.parts, torch.ones(n), block_size))
        dx = cpu.linear_grad_input(pages.copy(dy), *parts, block_size)
        assert torch.equal(dx, cpu.linear_grad_input(dy, *w.parts, block_size))
        decoded = cpu.dequantize(*parts, block_size, dtype)
        assert torch.equal(decoded, w.truth.float().to(dtype))
        assert torch.equal(cpu.embedding(torch.arange(n), *parts, block_size, dtype), decoded)
        guarded = pages.copy(weight)
        codes, absmax = cpu.quantize(guarded, parts[2], block_size)
        assert torch.equal(codes, cpu.quantize(weight, w.codebook, block_size)[0])
        assert cpu.histogram(guarded, block_size, 64).sum() > 0
        state = [pages.copy(s) for s in (codes, absmax, codes, absmax)]
        cpu.adam_step_(
            guarded, guarded.clone(), *state, parts[2], parts[2], 1e-3, 0.9, 0.9, 1e-8, 0, 1,
            block_size,
        )  # fmt: skip


def memory(key: str) -> int:
    """Bytes of this process as Linux counts them: "VmRSS" now, "VmHWM" at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts memory so")
def test_products_make_no_copy_of_the_weights(isa: str) -> None:
    """8 MB of codes: decoded they would be 17 MB or 34."""
    w = random_quantized(512, 16384, 256, "arbitrary")
    for dtype in DTYPES:
        for m in (1, 4, 40):
            x, dy = torch.ones(m, 16384, dtype=dtype), torch.ones(m, 512, dtype=dtype)
            small = random_quantized(16, 256, 256, "arbitrary").parts
            for product, arguments, tiny in (
                (cpu.linear, (x, *w.parts, None, 256), (x[:, :256].clone(), *small, None, 256)),
                (cpu.linear_grad_input, (dy, *w.parts, 256), (dy[:, :16].clone(), *small, 256)),
            ):
                product(*tiny)  # wakes threads; a large one would leave memory to be used again
                before = memory("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
                product(*arguments)
                assert memory("VmHWM") - before < 8e6, (product, m, dtype)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages"
)
def test_fresh_codes_ask_for_huge_pages() -> None:
    codes, _ = cpu.quantize(torch.randn(2048, 4096), TABLES["arbitrary"](), 256)
    inside, flags = False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(area[1], 16) <= codes.data_ptr() < int(area[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert "hg" in flags.split()


def test_bindings_refuse_what_would_be_unsafe() -> None:
    w = random_quantized(6, 40, 32)
    x = torch.randn(2, 40)
    codes, absmax, table = w.parts
    for arguments, message in [
        ((x, codes, absmax[:-1].contiguous(), table, None, 32), "absmax must have 8 blocks, got 7"),
        ((x, codes, absmax, table[:-1].contiguous(), None, 32), "codebook must have 256 levels"),
        ((x, codes, absmax, table, None, 48), "block_size must be a power of two"),
        ((x[:, :-1].contiguous(), codes, absmax, table, None, 32), "x must have 40 values"),
        ((x, codes, absmax.double(), table, None, 32), "absmax has the wrong dtype"),
        ((x.double(), codes, absmax, table, None, 32), "x must be float32"),
        ((x, codes.t(), absmax, table, None, 32), "codes must be contiguous"),
        ((x, codes, absmax, table, torch.ones(5), 32), "bias must have 6 elements, got 5"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cpu.linear(*arguments)
    with pytest.raises(RuntimeError, match="id 6 is out of range for 6 rows"):
        cpu.embedding(torch.tensor([0, 6]), codes, absmax, table, 32, torch.float32)


def test_freed_memory_is_refused() -> None:
    """FSDP frees parameters between uses; PyTorch's own ops refuse such tensors too."""
    w = random_quantized(6, 40, 32)
    for offset in (0, 40):
        x = torch.ones(offset + 80)[offset:].view(2, 40)
        x.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="linear: the memory of x has been freed"):
            cpu.linear(x, *w.parts, None, 32)


def test_concurrent_callers_with_different_codebooks() -> None:
    cases = [random_quantized(200, 300, 64, name, seed) for seed, name in enumerate(TABLES)]
    x = torch.randn(3, 300)
    expected = [cpu.linear(x, *w.parts, None, 64) for w in cases]
    start = threading.Barrier(len(cases))

    def call(i: int) -> bool:
        start.wait()
        results = [cpu.linear(x, *cases[i].parts, None, 64) for _ in range(50)]
        return all(torch.equal(y, expected[i]) for y in results)

    with ThreadPoolExecutor(len(cases)) as pool:
        assert all(pool.map(call, range(len(cases))))


FORKED_CHILD = """
import os, signal, sys, torch
from gptj_q8 import ops
torch.set_num_threads(3)
table = torch.linspace(-1, 1, 255)
table = torch.cat([table, table.new_zeros(1)]).sort().values
weight, x = torch.randn(512, 512), torch.randn(80, 512)
bias = torch.zeros(50400, dtype=torch.bfloat16)
ids = torch.arange(512, dtype=torch.int32).repeat(200)
head = torch.zeros(50400, 32, dtype=torch.uint8), torch.ones(50400)
zeros = torch.zeros(512 * 512 // 64)

def results():
    codes, absmax = ops.quantize(weight, table, 64)
    quantized = codes, absmax, table
    addend = torch.zeros(512, requires_grad=True)
    (dbias,) = torch.autograd.grad(ops.linear(x, *quantized, addend, 64), addend, x)
    # Copied by NumPy: PyTorch's own copy may hang in the child.
    strided = torch.from_numpy(weight.numpy().T.copy()).T
    state = [torch.from_numpy(t.numpy().copy()) for t in (codes, absmax, codes, zeros)]
    ops.adam_step_(strided, weight, *state, table, table, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8,
                   weight_decay=0.0, step=1, block_size=64)
    return [each.detach().numpy() for each in (
        codes,
        ops.histogram(weight, 64, 65536),
        ops.dequantize(*quantized, 64, torch.float32),
        ops.embedding(ids, *quantized, 64, torch.float32),
        ops.linear(strided, *quantized, None, 64),
        ops.linear_grad_input(strided, *quantized, 64),
        ops.linear(x[:, :32], *head, table, bias, 32),
        dbias,
        strided,
    )]

before = results()  # starts the threads that a fork loses
child = os.fork()
if child == 0:
    signal.alarm(30)  # a hang ends here, as a failure
    # Compared by NumPy: PyTorch's own comparison may hang here.
    same = all((a == b).all() for a, b in zip(before, results()))
    os._exit(0 if same and torch.get_num_threads() == 3 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_a_forked_child_computes_and_does_not_hang() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED_CHILD], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0
