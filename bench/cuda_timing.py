"""Times CUDA calls against each other: each as a CUDA graph, all of them taking turns in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

Call = Callable[[], object]


def describe_device() -> str:
    """One line for the head of a table."""
    device = torch.cuda.get_device_properties(0)
    return (
        f"{device.name}, SM{device.major}{device.minor}, {device.multi_processor_count} multiprocessors, "
        f"CUDA {torch.version.cuda}, torch {torch.__version__}"
    )


def captured(call: Call, calls_per_graph: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls in a row; `call` must use the current stream and allocate nothing that it keeps."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, allocates, warms up
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls_per_graph):
            call()
    return graph


def microseconds(calls: dict[str, Call], *, calls_per_graph: int, rounds: int = 21) -> dict[str, list[float]]:
    """Microseconds per call of each, for every round; the order within a round changes."""
    graphs = {name: captured(call, calls_per_graph) for name, call in calls.items()}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for round_ in range(rounds + 3):  # the first three warm up
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            if round_ >= 3:
                found[name].append(start.elapsed_time(end) * 1000 / calls_per_graph)
    return found


def print_row(label: str, found: dict[str, list[float]]) -> None:
    """Median and range of each, and the first's advantage over the others."""
    medians = {name: statistics.median(times) for name, times in found.items()}
    first, *others = medians
    cells = [f"{name} {medians[name]:8.2f} ({min(times):.2f}-{max(times):.2f})" for name, times in found.items()]
    ratios = [f"{medians[name] / medians[first]:.2f}x {name}" for name in others]
    print(f"{label:>24}: {'  '.join(cells)}   {', '.join(ratios)}")
