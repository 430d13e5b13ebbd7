# SPDX-License-Identifier: Apache-2.0
"""How many workers: what the user says, or how many CPUs this process may really use; and when more than one helps."""

import argparse
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

TRIED = 4  # calls by which run_all decides


def usable_cpus(root="/sys/fs/cgroup", membership="/proc/self/cgroup"):
    """Returns at least 1. In a container the machine's CPU count says little."""
    limits = [len(os.sched_getaffinity(0))]
    try:
        with open(membership) as stream:
            lines = [line.rstrip("\n").split(":", 2) for line in stream]
    except OSError:
        lines = []
    for _, controllers, path in lines:
        if controllers == "":
            limits += group_limits(root, path, v2_limit)
        elif "cpu" in controllers.split(","):
            limits += group_limits(os.path.join(root, "cpu"), path, v1_limit)
            limits += group_limits(os.path.join(root, controllers), path, v1_limit)
    return max(1, math.ceil(min(limits)))


def group_limits(root, path, read):
    """The limits of a group and of all above it; a container often sees its own group as the top."""
    limits = []
    while True:
        limit = read(os.path.join(root, path.strip("/")))
        if limit:
            limits.append(limit)
        if path in ("", "/"):
            return limits
        path = os.path.dirname(path)


def v2_limit(folder):
    """CPUs of time per second that cpu.max grants, or None."""
    words = read_words(os.path.join(folder, "cpu.max"))
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def v1_limit(folder):
    quota = read_words(os.path.join(folder, "cpu.cfs_quota_us"))
    period = read_words(os.path.join(folder, "cpu.cfs_period_us"))
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def read_words(path):
    try:
        with open(path) as stream:
            return stream.read().split()
    except OSError:
        return []


def positive(text):
    """The type of a command line argument that is a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError("must be a whole number above 0, not %r" % text)
    return number


def run_all(step, items, workers):
    """Returns [step(item) for item in items], on up to `workers` threads if the first calls mostly wait.

    So it is on network storage. Where calls mostly compute, threads would only stand in each other's way.
    """
    wall, cpu = time.monotonic(), time.thread_time()
    found = [step(item) for item in items[:TRIED]]
    if time.thread_time() - cpu > (time.monotonic() - wall) / 2:
        return found + [step(item) for item in items[TRIED:]]
    with ThreadPoolExecutor(workers) as pool:
        return found + list(pool.map(step, items[TRIED:]))
