"""What benchmarks show: plots, the memory of GPT-J-6B by part, `gptj-q8 bench`, `make bench`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from command_line import read_json, run
from tiny import gptj

from benchmarks import __main__ as everything
from benchmarks import (
    bench_convert,
    bench_memory,
    bench_old_checkpoint,
    finetune_memory,
    finetune_speed,
    plot_memory,
    plot_products,
    plots,
    quick,
)
from benchmarks.machine import new_results
from benchmarks.results import Model, Results, Row
from gptj_q8 import Q8Config, quantize_

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def row(system: str, m: int | None, seconds: float, op: str = "linear", size: int = 10**9) -> Row:
    """A row whose baseline is "torch bfloat16" with 1 second."""
    return Row(
        op=op, system=system, shape="fc_in", m=m, n=100, k=100, dtype="bfloat16",
        block_size=None, codebook=None,
        median_s=seconds, q25_s=seconds, q75_s=seconds, samples_s=[seconds] * 9, calls=1,
        mode="host", bytes=size, flops=10**12, gb_per_s=size / seconds / 1e9,
        tflop_per_s=1 / seconds, baseline="torch bfloat16", ratio_to_baseline=1 / seconds,
        ratio_q25=1 / seconds, ratio_q75=1 / seconds, error=0.0, error_bound=0.0,
    )  # fmt: skip


@pytest.fixture
def results() -> Results:
    made = new_results(CPU, "benchmarks", [])
    made.ceilings = {"read_gb_per_s": 20.0, "matmul_bfloat16_tflop_per_s": 4.0}
    for m in (1, 8):
        for system, seconds in (("gptj_q8", 0.5), ("torch bfloat16", 1.0), ("bitsandbytes", 9.0)):
            made.rows.append(row(system, m, seconds))
    made.models += bench_memory.models(gptj().config)
    return made


def test_the_limit_is_the_slower_of_memory_and_arithmetic(results: Results) -> None:
    # A GB at 20 GB/s takes 0.05 s, 10^12 operations at 4 TFLOP/s 0.25 s; the baseline 1 s.
    assert plot_products.limit_ratios(results.rows, results) == [(1, 4.0), (8, 4.0)]
    results.ceilings["read_gb_per_s"] = 2.0
    assert plot_products.limit_ratios(results.rows, results) == [(1, 2.0), (8, 2.0)]
    del results.ceilings["read_gb_per_s"]
    assert plot_products.limit_ratios(results.rows, results) == []


def test_plots_are_drawn_from_the_json_alone(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    results.write(path)
    assert plots.main([str(path), str(tmp_path / "plots")]) == 0
    drawn = sorted((tmp_path / "plots").iterdir())
    assert [each.name for each in drawn] == [
        "machine-memory.png",
        "machine-roofline.png",
        "machine-speed.png",
    ]
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in drawn)


def test_titles_claim_what_the_rows_hold(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours takes 0.5 s where PyTorch takes 1 s; on 8 tokens of a second shape 0.8 s."""
    slower = [row("gptj_q8", 8, 0.8), row("torch bfloat16", 8, 1.0)]
    for each in slower:
        each.shape = "fc_out"
    results.rows += slower
    results.models = [
        Model("memory running", "gptj_q8", {"weights_gb": 5.0}),
        Model("memory training", "gptj_q8", {"weights_gb": 7.0, "optimizer_gb": 1.5}),
    ]
    titles = []

    def keep(figure: Any, path: Path) -> None:
        titles.append(figure.get_suptitle().splitlines()[0])

    for module in (plot_products, plot_memory):
        monkeypatch.setattr(module, "write", keep)
    assert len(plots.draw_all(results, tmp_path, "m")) == 3
    assert titles == [
        "gptj_q8 is 2.0 to 2.0 times as fast as PyTorch on 1 token, 1.2 to 2.0 times on 8 tokens",
        "gptj_q8 reaches 50 to 50 % of the dashed line on 1 token, 31 to 50 % on 8 tokens; "
        "a point for each M",
        "GPT-J-6B with gptj_q8: running 5.0 GB and training 8.5 GB, within a card of 11 GB",
    ]


def test_what_was_not_measured_is_not_drawn(results: Results, tmp_path: Path) -> None:
    results.models = []
    results.ceilings = {}
    assert [path.name for path in plots.draw_all(results, tmp_path, "m")] == ["m-speed.png"]
    results.rows = []
    assert plots.draw_all(results, tmp_path, "m") == []


@pytest.mark.parametrize(("system", "dtype"), [("float32", torch.float32), ("float16", torch.half)])
def test_counted_weights_are_those_of_a_model(system: str, dtype: torch.dtype) -> None:
    model = gptj().to(dtype)
    counted = bench_memory.count(model.config, system, training=False)
    matrices = sum(p.nbytes for p in model.parameters() if p.dim() == 2)
    assert counted["weights_gb"] * 1e9 == matrices
    cache = model(torch.arange(model.config.n_positions)[None], use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert counted["keys and values_gb"] * 1e9 == held


def test_counted_codes_are_those_of_a_quantized_model() -> None:
    model = gptj().half()
    config = model.config
    quantize_(model, Q8Config())
    counted = bench_memory.count(config, "gptj_q8", training=True)
    codes = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("codes"))
    assert counted["weights_gb"] * 1e9 == codes


def test_lines_of_the_screen_are_ratios_of_medians() -> None:
    made = new_results(CPU, "gptj_q8", ["bench"])
    for op, shape, m in ((line.op, line.shape, line.m) for line in quick.LINES):
        for system, seconds in (("gptj_q8", 0.5), ("torch bfloat16", 1.0), ("Linear8bitLt", 2.0)):
            made.rows.append(row(system, m, seconds, op))
            made.rows[-1].shape = shape
    *lines, token = quick.compared(made)
    assert [line.what for line in lines] == [line.what for line in quick.LINES]
    assert {(line.over_16_bits, line.over_bitsandbytes, line.over_int8) for line in lines} == {
        (2.0, None, 4.0)
    }
    assert token.seconds == (4 * 28 + 28 + 28 + 1) * 0.5
    made.rows = [row for row in made.rows if row.shape != "lm_head"]
    assert len(list(quick.compared(made))) == len(quick.LINES) - 1


def test_bench_shows_what_it_measured() -> None:
    found = read_json(run("bench", "--tiny", "--json", "--device", "cpu"))
    assert [line["what"] for line in found["lines"]] == [line.what for line in quick.LINES]
    assert all(line["seconds"] > 0 and line["over_16_bits"] > 0 for line in found["lines"])
    assert found["results"]["failed"] == []


def test_a_wrong_kernel_gets_no_time_and_exit_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptj_q8 import backends

    if reason := backends.unavailable("cpu"):
        pytest.skip(f"cpu: {reason}")
    right = backends.load("cpu").linear
    monkeypatch.setattr(backends.load("cpu"), "linear", lambda *args: right(*args) * 1.1)
    result = run("bench", "--tiny", "--json", "--device", "cpu")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not any("one token" in line["what"] for line in found["lines"])
    assert "wrong result" in found["results"]["failed"][0]["reason"]


def test_make_bench_writes_json_and_plots(tmp_path: Path) -> None:
    chosen = ["--device", "cpu", "--tiny", "--only", "ceilings", "memory", "--out", str(tmp_path)]
    assert everything.main(chosen) == 0
    (path,) = tmp_path.glob("*.json")
    found = Results.read(path)
    assert {part.name: part.status for part in found.parts} == {
        "ceilings": "passed",
        "memory": "passed",
    }
    assert found.ceilings["copy_gb_per_s"] > 0
    assert [each.name for each in tmp_path.glob("*.png")] == [f"{path.stem}-memory.png"]


@pytest.mark.slow  # some processes each
@pytest.mark.parametrize(
    ("benchmark_of", "tasks"),
    [
        (bench_convert, {"convert", "generate"}),
        (bench_old_checkpoint, {"old checkpoint"}),
        (finetune_memory, {"finetune_memory"}),
        (finetune_speed, {"finetune_speed, 16 tokens"}),
    ],
)
def test_whole_models_run_dry(
    benchmark_of: ModuleType, tasks: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert benchmark_of.main(["--tiny", "--json", str(path)]) == 0
    models = Results.read(path).models
    assert all(value > 0 for model in models for value in model.figures.values())
    assert {model.task for model in models} == tasks
    assert list(tmp_path.iterdir()) == [path], "checkpoints are left behind"
