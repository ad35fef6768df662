"""Timing contenders side by side, so that what the machine does meanwhile hits all alike.

Contenders take turns: a round is one sample of each, in an order that rotates. On a CPU a turn
begins when this process is at rest: an engine's threads may look out for its next call for a while,
on the processors that the contender after it needs. Untimed calls come first, until threads are
awake and processors as fast as they are in the middle of work. Each contender is measured on two
kinds of memory:

*   ``warm``: one set of inputs, over and over; what fits into the caches stays there.
*   ``cold``: the inputs (and the results, which are kept) go round as many sets as exceed the last
    level of cache, so that every call finds its input in memory.

On a GPU a sample is the time between two events around the replay of a CUDA graph of several calls,
divided by their number: the kernels, without the launches. What cannot be captured is timed call by
call, launches and all, and ``Timing.method`` says so.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[Any], Any]
Sample = Callable[[], float]

_LEAST_ROUNDS = 7
_MOST_ROUNDS = 200
_MOST_SETS = 256
_GRAPH_CALLS = 20
_LOOK = 0.005
"""Seconds between two looks at what has run."""
_REST = 0.05
"""Of one processor, what is no more than looking takes."""
_LONGEST_WAIT = 0.5
_WARM_UP = 0.03
"""Seconds of untimed calls, at least."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call.

    Attributes:
        samples: every one, in order.
        method: how a sample was taken.
    """

    samples: tuple[float, ...]
    method: str

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The samples a quarter and three quarters of the way up."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: what the results call it.
        call: takes one set of inputs; what it returns is kept until the next call is through.
        inputs: sets of inputs, alike in everything but their memory.
        allocates: whether its memory is of PyTorch's allocator; else what it holds is not known.
        capturable: whether a CUDA graph of PyTorch's can hold its calls. What runs on streams of
            its own cannot be held; its results must make the current stream wait for them.
    """

    name: str
    call: Call
    inputs: Sequence[Any]
    allocates: bool = True
    capturable: bool = True


def sets_for_cold(bytes_a_call: int, cache_bytes: int, memory_bytes: int) -> int:
    """How many sets of inputs make every call cold: twice the cache, within the memory given."""
    wanted = -(-2 * cache_bytes // max(bytes_a_call, 1)) + 1
    affordable = memory_bytes // max(bytes_a_call, 1)
    return max(1, min(wanted, affordable, _MOST_SETS))


def measure(
    contenders: Sequence[Contender], device: torch.device, *, cold: bool, seconds: float
) -> dict[str, Timing]:
    """Times ``contenders`` in turns.

    Args:
        contenders: called at least once each before anything is timed.
        device: where they run.
        cold: go round all of a contender's inputs, instead of using the first again and again.
        seconds: about how long to sample, all contenders together.

    Returns:
        Each contender's timing by name.
    """
    samplers = {c.name: _sampler(c, device, cold) for c in contenders}
    estimate = 0.0
    for sample, _ in samplers.values():
        sample()
        began = time.perf_counter()
        sample()
        estimate += time.perf_counter() - began
    rounds = min(max(int(seconds / max(estimate, 1e-9)), _LEAST_ROUNDS), _MOST_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(samplers[name][0]())
    return {name: Timing(tuple(taken), samplers[name][1]) for name, taken in samples.items()}


def _sampler(contender: Contender, device: torch.device, cold: bool) -> tuple[Sample, str]:
    sets = list(contender.inputs) if cold else [contender.inputs[0]]
    if device.type == "cuda" and contender.capturable:
        return _cuda_graph_sampler(contender, device, sets)
    if device.type == "cuda":
        return _cuda_call_sampler(contender, device, sets, "its streams are its own")
    return _cpu_sampler(contender.call, sets)


def _wait_for_rest() -> None:
    """Waits until no thread of this process runs, but not forever: one may be meant to."""
    deadline = time.perf_counter() + _LONGEST_WAIT
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(_LOOK)
        if time.process_time() - used < _REST * _LOOK:
            return


def _cpu_sampler(call: Call, sets: Sequence[Any]) -> tuple[Sample, str]:
    turns = itertools.cycle(sets)

    def sample() -> float:
        _wait_for_rest()
        warm = time.perf_counter() + _WARM_UP
        while True:
            call(next(turns))
            if time.perf_counter() >= warm:
                break
        inputs = next(turns)
        began = time.perf_counter()
        result = call(inputs)
        took = time.perf_counter() - began
        del result
        return took

    return sample, f"one call after {_WARM_UP} s of others, {len(sets)} sets of inputs in turn"


def _cuda_graph_sampler(
    contender: Contender, device: torch.device, sets: Sequence[Any]
) -> tuple[Sample, str]:
    calls = [sets[i % len(sets)] for i in range(max(len(sets), _GRAPH_CALLS))]
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                contender.call(sets[0])
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        # Warm, the results share memory as they would in a model; cold, each has its own.
        with torch.cuda.graph(graph):
            kept = [contender.call(inputs) for inputs in calls] if len(sets) > 1 else None
            if kept is None:
                for inputs in calls:
                    contender.call(inputs)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        return _cuda_call_sampler(contender, device, sets, str(error).splitlines()[0])

    def sample() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / len(calls)

    # The results' memory belongs to the graph, so it outlives this call with the closure.
    return sample, f"CUDA graph of {len(calls)} calls, {len(sets)} sets of inputs"


def _cuda_call_sampler(
    contender: Contender, device: torch.device, sets: Sequence[Any], reason: str
) -> tuple[Sample, str]:
    turns = itertools.cycle(sets)
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(_GRAPH_CALLS):
            contender.call(next(turns))
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / _GRAPH_CALLS

    return sample, f"{_GRAPH_CALLS} calls with their launches (no CUDA graph: {reason})"


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of PyTorch's allocator that ``call`` holds at a time beyond those held before.

    Its result counts, memory that a library allocates for itself does not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    del result
    trace = profile.profiler.kineto_results
    held = most = 0
    changes = [(e.start_ns(), e.nbytes()) for e in trace.events() if e.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        most = max(most, held)
    return most
