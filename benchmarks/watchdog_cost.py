#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure the CPU time of rank 0's watchdog for several numbers of other ranks.

    python benchmarks/watchdog_cost.py [--seconds 60] [RANKS ...]

A second process opens the connections of all other ranks over the loopback interface and sends
their heartbeats. Prints CPU seconds per minute.
"""

import argparse
import multiprocessing
import pathlib
import socket
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from mxresnet.config import Config  # noqa: E402
from mxresnet.parallel import watchdog  # noqa: E402


def run_other_ranks(address, ranks, seconds):
    """Open the connections of `ranks` ranks and send a heartbeat on each in every period."""
    connections = []
    for rank in range(1, ranks + 1):
        connection = socket.create_connection(address.endpoints[0])
        connection.sendall(f"{address.token} {rank} host\n".encode())
        connections.append(connection)
    end = time.monotonic() + seconds + 10
    while time.monotonic() < end:
        for connection in connections:
            connection.sendall(watchdog.HEARTBEAT)
            # Spread over the period, because real ranks do not send at the same moment.
            time.sleep(address.period_seconds / ranks)
    for connection in connections:
        connection.sendall(watchdog.GOODBYE)


def cpu_seconds_per_minute(ranks, seconds):
    """Return the CPU time of rank 0's watchdog per minute, measured over some seconds."""
    config = Config()
    rank_0 = watchdog.listen(
        ["127.0.0.1"], ranks + 1, config.watchdog_period, config.watchdog_limit
    )
    process = multiprocessing.get_context("spawn").Process(
        target=run_other_ranks, args=(rank_0.address, ranks, seconds), daemon=True
    )
    process.start()
    while rank_0.num_connected_ranks() < ranks:
        time.sleep(0.1)
    # The main thread sleeps, so all CPU time of this process is the watchdog's.
    before = time.process_time()
    time.sleep(seconds)
    used = time.process_time() - before
    assert rank_0.num_connected_ranks() == ranks, "some ranks were lost during the measurement"
    # Now the end of the connections ends the watchdog's thread, not this process.
    rank_0._closing = True
    process.terminate()
    return used * 60 / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ranks", nargs="*", type=int, default=[2, 8, 64])
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    for ranks in options.ranks:
        cost = cpu_seconds_per_minute(ranks, options.seconds)
        print(f"{ranks:4d} other ranks: {cost:.3f} CPU seconds per minute", flush=True)


if __name__ == "__main__":
    main()
