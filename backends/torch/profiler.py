"""Kernels and copies of a GPU, or ops of a CPU, with their times, from torch's profiler."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmrs.backends.base import KernelEvent


class TorchProfiler:
    """On a CPU an op includes the ops that it calls."""

    def __init__(self, device: torch.device, watch: Callable[[bool], None] = lambda on: None) -> None:
        """`watch`: called with whether it runs, so that a backend runs op by op meanwhile."""
        self.watch = watch
        self.device, self.asynchronous = device, device.type == "cuda"
        activity = torch.profiler.ProfilerActivity
        self.activity = activity.CUDA if self.asynchronous else activity.CPU
        self.running: Any = None

    def start(self) -> None:
        self._wait()
        self.watch(True)
        self.running = torch.profiler.profile(activities=[self.activity])
        self.running.start()

    def stop(self) -> list[KernelEvent]:
        self._wait()
        self.running.stop()
        self.watch(False)
        # raw events: torch's own tables take seconds for a workload
        events = self.running.profiler.kineto_results.events()
        kind = "CUDA" if self.asynchronous else "CPU"
        found = ran([(e.name(), e.start_ns(), e.duration_ns()) for e in events if e.device_type().name == kind])
        self.running = None
        return found if self.asynchronous else outermost(found)

    def _wait(self) -> None:
        if self.asynchronous:
            torch.cuda.synchronize(self.device)


def ran(events: Sequence[tuple[str, int, int]]) -> list[KernelEvent]:
    """From names, start times and durations in nanoseconds; seconds count from the first start."""
    first = min((begin for _, begin, _ in events), default=0)
    found = [KernelEvent(name, (at - first) * 1e-9, (at - first + lasts) * 1e-9) for name, at, lasts in events]
    return sorted(found, key=lambda r: (r.begin, -r.end))


def outermost(found: list[KernelEvent]) -> list[KernelEvent]:
    """Events that are not inside another one; the list is ordered by start."""
    kept: list[KernelEvent] = []
    for r in found:
        if not kept or r.begin >= kept[-1].end:
            kept.append(r)
    return kept
