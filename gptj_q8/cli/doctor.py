"""`gptj-q8 doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from gptj_q8.cli import load, options
from gptj_q8.cli.screen import Row, Screen, bytes_text, open_screen

if TYPE_CHECKING:
    from gptj_q8.doctor import Advice, Backend, Check, Machine, Package, Report, Served

_STYLES = {"problem": "bold red", "slower": "yellow", "optional": None}
_FOR_GPUS = {
    "cuda": "for GPUs",
    "triton": "for GPUs",
    "slabs": "for GPUs: PyTorch's product of many rows, with decoded parts of the weight",
}


def doctor_command(json: options.AsJson = False) -> None:
    """Tell what works on this machine, test every kernel, and say what to do about the rest.

    Exits with 1 where something does not work, with 0 where it only runs slower than it could.
    """
    with open_screen(json) as screen:
        with screen.working("Testing every op of every backend ..."):
            load.quieten()
            from gptj_q8.doctor import diagnose

            report = diagnose()
        screen.say(f"gptj_q8 {report.version}", style="bold")
        _show_machine(screen, report.machine)
        _show_packages(screen, report.packages)
        _show_backends(screen, report.backends, bool(report.machine.gpus))
        _show_served(screen, report.served)
        _show_checks(screen, report.checks)
        _show_advice(screen, report.advice)
        _show_verdict(screen, report)
        screen.result({**asdict(report), "ok": report.ok})
    if not report.ok:
        raise typer.Exit(1)


def _show_machine(screen: Screen, machine: Machine) -> None:
    memory = f", {bytes_text(machine.memory_bytes)} of memory" if machine.memory_bytes else ""
    lines = [
        ("system", f"{machine.system}, Python {machine.python}"),
        ("CPU", f"{machine.cpu}: {machine.cores} cores{memory}"),
        ("PyTorch", f"{machine.torch}, built for {machine.built_for}; {machine.threads} threads"),
    ]
    for gpu in machine.gpus:
        size = bytes_text(gpu.memory_bytes)
        lines.append(("GPU", f"{gpu.name}: {size}, compute capability {gpu.capability}"))
    if not machine.gpus:
        lines.append(("GPU", "none that PyTorch can use"))
    screen.say()
    for name, text in lines:
        screen.say(f"{name:<9}{text}")


def _show_packages(screen: Screen, packages: list[Package]) -> None:
    if not packages:
        return
    screen.heading("Packages")
    rows = [
        (p.name, p.installed or "missing", p.wanted or "any", p.extra or "gptj_q8")
        for p in packages
    ]
    screen.table(("package", "installed", "wanted", "by"), rows, text_columns=4)


def _show_backends(screen: Screen, backends: list[Backend], has_gpu: bool) -> None:
    screen.heading("Kernels")
    for backend in backends:
        screen.say(f"{backend.name:<10}{_state(backend, has_gpu)}")


def _state(backend: Backend, has_gpu: bool) -> str:
    if backend.name in _FOR_GPUS and not has_gpu:
        return _FOR_GPUS[backend.name]
    if backend.name == "reference":
        return "plain PyTorch, where nothing else serves"
    sets = backend.instruction_sets
    also = f"; also has {', '.join(sets[1:])}" if sets[1:] else ""
    return backend.reason or (f"uses {sets[0]}{also}" if sets else "usable")


def _show_served(screen: Screen, served: list[Served]) -> None:
    """One line for each backend of a device, with the ops that it serves."""
    screen.heading("Who serves what")
    for device, name in dict.fromkeys((entry.device, entry.backend) for entry in served):
        ops: dict[str, list[str]] = {}
        for entry in served:
            if (entry.device, entry.backend) == (device, name):
                ops.setdefault(entry.op, []).extend([str(entry.rows)] if entry.rows else [])
        texts = [op + (f" (rows: {', '.join(rows)})" if rows else "") for op, rows in ops.items()]
        screen.say(f"{device} by {name}: {', '.join(texts)}")


def _show_checks(screen: Screen, checks: list[Check]) -> None:
    """A table for each device: errors, a column for each backend."""
    for device in dict.fromkeys(check.device for check in checks):
        here = [check for check in checks if check.device == device]
        names = list(dict.fromkeys(check.backend for check in here))
        screen.heading(f"Self-test on {device}: error against plain PyTorch in float32")
        cells = {(check.op, check.dtype, check.backend): _cell(check) for check in here}
        rows: list[Row] = [
            (
                f"{op} {dtype}",
                *(cells.get((op, dtype, name), "") for name in names),
                f"{bound:.0e}" if bound else "0",
            )
            for op, dtype, bound in dict.fromkeys((c.op, c.dtype, c.bound) for c in here)
        ]
        screen.table(("op", *(name.removeprefix("cpu:") for name in names), "allowed"), rows)


def _cell(check: Check) -> str:
    if check.failure:
        return "FAILS"
    return f"{check.error:.1e}{'' if check.ok else ' WRONG'}" if check.error else "0"


def _show_advice(screen: Screen, advice: list[Advice]) -> None:
    if advice:
        screen.heading("What to do")
    for item in advice:
        screen.say(f"{item.level}: {item.found}", style=_STYLES[item.level])
        screen.say(f"    {item.do}")


def _show_verdict(screen: Screen, report: Report) -> None:
    passed = sum(check.ok for check in report.checks)
    screen.say()
    screen.say(
        f"{passed} of {len(report.checks)} checks passed."
        + (" Everything works." if report.ok else " Something does not work: see above."),
        "bold green" if report.ok else "bold red",
    )
