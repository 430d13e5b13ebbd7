# SPDX-License-Identifier: Apache-2.0
"""Count the CPUs that this process may use, and use threads where they save time."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, List, Optional, Sequence, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_WORKERS = 512  # threads; a conversion needs up to 16 MiB of memory for each
SWITCH_SECONDS = 1e-4  # Python's default is 5 ms
SAMPLE_CALLS = 4  # measured by parallel_map to decide whether threads help


def usable_cpus(
    cgroup_root: str = "/sys/fs/cgroup", membership_file: str = "/proc/self/cgroup"
) -> int:
    """Return how many CPUs this process may use, at least 1.

    This is the smallest of the size of its CPU affinity mask and the CPU quotas of its control
    groups. A container may have far fewer CPUs than the machine.

    Args:
        cgroup_root: where the control group file systems (version 1 or 2) are mounted.
        membership_file: lists the control groups of this process.
    """
    limits: List[float] = [len(os.sched_getaffinity(0))]
    try:
        with open(membership_file) as stream:
            lines = [line.rstrip("\n").split(":", 2) for line in stream]
    except OSError:
        lines = []
    for _, controllers, group in lines:
        if controllers == "":
            limits += cgroup_limits(cgroup_root, group, cgroup_v2_limit)
        elif "cpu" in controllers.split(","):
            for mount in ("cpu", controllers):
                limits += cgroup_limits(os.path.join(cgroup_root, mount), group, cgroup_v1_limit)
    return max(1, math.ceil(min(limits)))


def cgroup_limits(
    root: str, group: str, read_limit: Callable[[str], Optional[float]]
) -> List[float]:
    """Return the CPU limits of a control group and of all groups above it.

    In a container the own group is often mounted as the root: then only "/" of the path exists.
    """
    limits = []
    while True:
        limit = read_limit(os.path.join(root, group.strip("/")))
        if limit:
            limits.append(limit)
        if group in ("", "/"):
            return limits
        group = os.path.dirname(group)


def cgroup_v2_limit(folder: str) -> Optional[float]:
    """Return the limit in cpu.max as a number of CPUs, or None if there is no limit."""
    words = read_words(os.path.join(folder, "cpu.max"))
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def cgroup_v1_limit(folder: str) -> Optional[float]:
    """Return the CFS quota as a number of CPUs, or None if there is no limit."""
    quota = read_words(os.path.join(folder, "cpu.cfs_quota_us"))
    period = read_words(os.path.join(folder, "cpu.cfs_period_us"))
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def read_words(path: str) -> List[str]:
    """Return the words in a file; an empty list if it cannot be read."""
    try:
        with open(path) as stream:
            return stream.read().split()
    except OSError:
        return []


def default_workers() -> int:
    """Return how many threads to read with: enough to hide the latency of a network share."""
    return min(4 * usable_cpus(), MAX_WORKERS)


def worker_count(text: str) -> int:
    """Convert a command-line argument to a number of threads.

    Raises:
        argparse.ArgumentTypeError: the argument is not a whole number from 1 to MAX_WORKERS.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 1 to {MAX_WORKERS}, not {text!r}"
        )
    return number


def parallel_map(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> List[Result]:
    """Return [function(item) for item in items]; use threads if the first calls mostly wait.

    Threads hide the latency of network storage. Calls that mostly compute run in a loop instead,
    because Python's global lock would make threads slower.

    Args:
        function: called once for each item.
        items: the arguments.
        workers: number of threads.
    """
    wall_seconds, busy_seconds = time.monotonic(), thread_busy_seconds()
    results = [function(item) for item in items[:SAMPLE_CALLS]]
    wall_seconds, busy_seconds = (
        time.monotonic() - wall_seconds,
        thread_busy_seconds() - busy_seconds,
    )
    remaining = items[SAMPLE_CALLS:]
    if busy_seconds > wall_seconds / 2:
        return results + [function(item) for item in remaining]
    # Every read releases Python's global lock. If other threads compute, it waits this long for it.
    interval_seconds = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        with ThreadPoolExecutor(workers) as pool:
            return results + list(pool.map(function, remaining))
    finally:
        sys.setswitchinterval(interval_seconds)


def thread_busy_seconds(schedule_file: str = "/proc/thread-self/schedstat") -> float:
    """Return how long this thread has used a CPU, or waited for one that others used.

    Args:
        schedule_file: Linux's counters of the thread; its second number are the nanoseconds that
            it has waited for a CPU. Not every system has it.
    """
    try:
        with open(schedule_file) as stream:
            waited_nanoseconds = int(stream.read().split()[1])
    except (OSError, ValueError, IndexError):
        waited_nanoseconds = 0
    return time.thread_time() + waited_nanoseconds / 1e9
