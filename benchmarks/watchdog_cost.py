#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What the watchdog costs rank 0: CPU seconds of its thread in a minute, with so many other ranks on the same machine's loopback.

    python benchmarks/watchdog_cost.py [--seconds 60] [RANKS ...]

The other ranks are threads of a second process that say what a rank says.
"""

import argparse
import multiprocessing
import pathlib
import socket
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from mxresnet.parallel import watchdog  # noqa: E402
from mxresnet.config import Config  # noqa: E402


def others(address, ranks, seconds):
    """Connections as ranks open them; each says every period that it is alive."""
    connections = []
    for rank in range(1, ranks + 1):
        connection = socket.create_connection(("127.0.0.1", address.port))
        connection.sendall(f"{address.token} {rank} host\n".encode())
        connections.append(connection)
    end = time.monotonic() + seconds + 10
    while time.monotonic() < end:
        for connection in connections:
            connection.sendall(watchdog.ALIVE)
            time.sleep(address.period / ranks)  # ranks do not speak at the same moment
    for connection in connections:
        connection.sendall(watchdog.BYE)


def cost(ranks, seconds):
    config = Config()
    dog = watchdog.listen(ranks + 1, config.watchdog_period, config.watchdog_limit)
    process = multiprocessing.get_context("spawn").Process(
        target=others, args=(dog.address, ranks, seconds), daemon=True
    )
    process.start()
    while sum(peer.rank > 0 for peer in list(dog._peers.values())) < ranks:
        time.sleep(0.1)
    before = (
        time.process_time()
    )  # the main thread sleeps: all that this process uses is the watchdog's
    time.sleep(seconds)
    used = time.process_time() - before
    assert sum(peer.rank > 0 for peer in list(dog._peers.values())) == ranks, (
        "some ranks were lost meanwhile"
    )
    process.terminate()
    dog._leaving = True
    return used * 60 / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ranks", nargs="*", type=int, default=[2, 8, 64])
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    for ranks in options.ranks:
        print(
            f"{ranks:4d} other ranks: {cost(ranks, options.seconds):.3f} CPU seconds a minute",
            flush=True,
        )


if __name__ == "__main__":
    main()
