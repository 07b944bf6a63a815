"""The example script does what it shows."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from safetensors import safe_open

from gptj_q8.demo import model_dir

EXAMPLE = model_dir().parent / "example.py"


@pytest.mark.usefixtures("one_thread")
def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLE))
    losses = found["losses"]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    printed = capsys.readouterr().out.splitlines()
    said = dict(line.split(": ", 1) for line in printed if line.startswith(("after", "again")))
    assert said["again"] == said["after"], "the adapter came back as it was"
    out = tmp_path / "out" / "example"
    assert {path.name for path in out.iterdir()} == {"8bit", "adapter", "merged"}
    with safe_open(out / "merged" / "model.safetensors", "pt") as file:
        assert "lm_head.codes" in file.keys()  # noqa: SIM118 (safe_open is no dict)
    assert (out / "merged" / "tokenizer.json").exists()
    assert sum(line.startswith("# %% ") for line in EXAMPLE.read_text().splitlines()) == 6
