"""What this installation can do on this machine, what it cannot, and what to do about it.

```python
report = gptj_q8.doctor.diagnose()
report.ok  # False where something does not work, as opposed to working slowly
report.advice  # what was found amiss, and for each what to do next
```
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import gptj_q8
from gptj_q8.doctor.advice import Advice, about_kernels, about_machine, about_packages
from gptj_q8.doctor.kernels import Backend, Served, describe_backends, served_on
from gptj_q8.doctor.machine import Machine, describe
from gptj_q8.doctor.packages import Package, required_packages
from gptj_q8.doctor.selftest import Check, run_checks

__all__ = ["Advice", "Backend", "Check", "Machine", "Package", "Report", "Served", "diagnose"]


@dataclass(frozen=True)
class Report:
    """All that `diagnose` found."""

    version: str
    machine: Machine
    packages: list[Package]
    backends: list[Backend]
    served: list[Served]
    checks: list[Check]
    advice: list[Advice]

    @property
    def ok(self) -> bool:
        """Whether everything works. What merely runs slowly, or is optional, does not count."""
        return not any(advice.level == "problem" for advice in self.advice)


def diagnose() -> Report:
    """Looks at machine, packages and kernels, and tests every op of every usable backend.

    Takes a few seconds on a CPU; on a GPU Triton compiles its kernels first. Raises nothing for
    what it finds amiss: that stands in the report.
    """
    machine = describe()
    packages = required_packages()
    backends = describe_backends()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    served = [entry for device in devices for entry in served_on(device)]
    checks = [check for device in devices for check in run_checks(torch.device(device), served)]
    advice = [
        *about_packages(packages),
        *about_machine(machine),
        *about_kernels(machine, backends, checks),
    ]
    return Report(gptj_q8.__version__, machine, packages, backends, served, checks, advice)
