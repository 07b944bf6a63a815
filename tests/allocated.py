"""The most bytes that tensors on the CPU take at once, exactly and the same in every run.

A process's own memory, when polled, differs by a tenth from run to run: it holds what libraries
keep for themselves, and a reading may miss a tensor that lives for less than a millisecond.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_allocated(run: Callable[[], object]) -> int:
    """The peak while `run` works, above what was allocated before; `run` may keep nothing."""
    gc.collect()  # or what others left might be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = found.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    sums = list(accumulate(e.nbytes() for e in sorted(memory, key=lambda e: e.start_ns())))
    assert sums[-1] == 0, "what was allocated is freed again, or the peak means nothing"
    return max(sums)
