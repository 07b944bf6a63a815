"""What there is to measure: the ops, each with the file that makes its cases, and whole models.

To add an op, a system or a part, see "Add a benchmark" in CONTRIBUTING.md.
"""

from collections.abc import Callable, Sequence

from benchmarks import bench_adam, bench_linear, bench_weights
from benchmarks.harness import Cases, Selection
from benchmarks.parts import Step
from benchmarks.shapes import M_ALL

OPS: dict[str, Callable[[str, Selection], Cases]] = {
    "linear": bench_linear.cases,
    "linear_grad_input": bench_linear.cases,
    **dict.fromkeys(bench_weights.OPS, bench_weights.cases),
    "adam_step_": bench_adam.cases,
}

_ROWS = " ".join(map(str, M_ALL))
_DTYPES = {"cpu": "bfloat16 float32", "cuda": "float16 bfloat16"}


def cases(ops: Sequence[str], selection: Selection) -> Cases:
    """The cases of these ops, in the order in which tables and figures show them."""
    for op in ops:
        yield from OPS[op](op, selection)


def steps(device: str, tiny: bool) -> list[Step]:
    """The parts of `make bench`: each a module that takes --json FILE and writes `Results`."""
    at = f"--device {device}"
    rows = "" if tiny else f" --m {_ROWS}"
    products = f"{at} --dtype {_DTYPES[device]}{rows}"
    commands = {
        "ceilings": f"ceilings {at}",
        "linear": f"ops --op linear {products}",
        "gradient": f"ops --op linear_grad_input {products}",
        "weights": f"ops --op {' '.join(bench_weights.OPS)} {at}",
        "adam": f"ops --op adam_step_ {at} --dtype float32 bfloat16",
        "memory": "bench_memory",
        "convert": "bench_convert",
        "old checkpoint": "bench_old_checkpoint",
        "decode": f"full_size {at}",
        "finetune": f"lora_step {at}",
        "finetune memory": "finetune_memory",
        "finetune speed": "finetune_speed",
    }
    if device == "cuda":  # lora_step measures both there
        del commands["finetune memory"], commands["finetune speed"]
    else:
        del commands["finetune"]
    return [
        Step(
            name,
            ("-m", *f"benchmarks.{command}{' --tiny' if tiny else ''}".split()),
            limit_s=3600,
            least_s=0,
            measures=True,
        )
        for name, command in commands.items()
    ]


PARTS = list(dict.fromkeys(step.name for device in _DTYPES for step in steps(device, tiny=False)))
"""Of either device."""
