# SPDX-License-Identifier: Apache-2.0
"""TCP heartbeat between ranks: ends the job when a rank is stopped, lost or cut off the network.

MPI detects a rank whose process has ended. It would wait without end for a rank that is stopped, or
whose connections were cut without being closed. Every rank has a TCP connection to rank 0. A
thread at each end sends a byte in each period, also while the main thread is blocked, and ends its
process when nothing arrives from the other end for too long. This module does not use MPI.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence

from mxresnet.parallel.listener import MAX_STRANGERS, Endpoint, Listener

# Messages: this rank is running; it ends without an error; it has failed and printed the cause.
HEARTBEAT, GOODBYE, FAILED = b".", b"-", b"!"
# How long the launcher has to end all processes of a failed job; then the watchdog ends them.
LAUNCHER_GRACE_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 3.0
MAX_STAGGER_SECONDS = 10
LOADING_FACTOR = 8  # of the limit, while the ranks load their libraries
# While connections are accepted: time between two checks of their time limits.
LISTENING_CHECK_SECONDS = 0.5


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens, and the timing that all ranks use.

    Attributes:
        endpoints: rank 0's IPv4 addresses and ports; the first that answers is used.
        token: secret of this run; connections without it (port scanners, other runs) are closed.
        name: rank 0's host name, for messages.
        period_seconds: time between two heartbeats.
        limit_seconds: time without a heartbeat after which the job ends.
    """

    endpoints: List[Endpoint]
    token: str
    name: str
    period_seconds: float
    limit_seconds: float


@dataclass
class _Peer:
    """The other end of a connection; last_received is a time.monotonic() value in seconds."""

    connection: socket.socket
    last_received: float
    rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def send(self, message: bytes) -> None:
        # A broken or full connection is detected by the receiving code.
        with contextlib.suppress(OSError):
            self.connection.send(message)


class Watchdog:
    """Sends this rank's heartbeats, and ends the process when those of another rank stop.

    Rank 0 has a connection to every other rank, and each other rank has one to rank 0.

    Every public method may be called from any thread. Create it with listen() or connect().

    Args:
        rank: this process's rank.
        period_seconds: time between two heartbeats.
        limit_seconds: time without a heartbeat after which this process ends. Until end_loading()
            is called it is LOADING_FACTOR times as long: Python loads a library without releasing
            its lock, so that no other thread runs, and MXNet with CUDA has gigabytes of them.
    """

    def __init__(self, rank: int, period_seconds: float, limit_seconds: float):
        self._rank = rank
        self._period_seconds = period_seconds
        # When rank 0 sends nothing, every other rank detects it. They end at different times, so
        # that only the first prints the cause: after its end the launcher ends the others.
        self._stagger_seconds = min(max(rank - 1, 0), MAX_STAGGER_SECONDS)
        self._given_limit_seconds = limit_seconds
        self._loading = True
        self.address: Optional[Address] = None  # on rank 0 the address for the other ranks
        self._listener: Optional[Listener] = None
        self._selector = selectors.DefaultSelector()
        self._peers: Dict[socket.socket, _Peer] = {}
        self._lock = threading.RLock()
        # Once another rank has failed: when to end this process (time.monotonic()), and the
        # cause to print then, or None when another rank has printed it.
        self._exit_at: Optional[float] = None
        self._exit_cause: Optional[str] = None
        self._closing = False
        self._all_closed = threading.Event()

    def start(self) -> None:
        """Start the thread that sends and receives heartbeats."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def num_connected_ranks(self) -> int:
        """Return the number of ranks that are connected now."""
        with self._lock:
            return len(self._peers)

    def listen(self, hosts: Sequence[str], num_ranks: int) -> None:
        """Accept the connections of the other ranks until stop_listening(); set `address`.

        Call this before start().

        Raises:
            OSError: a socket cannot be created.
        """
        token = secrets.token_hex(16)
        self._listener = Listener(hosts, token, num_ranks, self._selector)
        self.address = Address(
            endpoints=self._listener.endpoints,
            token=token,
            name=socket.gethostname(),
            period_seconds=self._period_seconds,
            limit_seconds=self._given_limit_seconds,
        )

    def stop_listening(self) -> None:
        """Accept no more connections: all ranks have connected, or could not."""
        with self._lock:
            if self._listener:
                self._listener.close()
                self._listener = None

    def add_peer(self, connection: socket.socket, rank: int, host: str) -> None:
        """Watch the connection of a rank."""
        connection.setblocking(False)
        peer = _Peer(connection, time.monotonic(), rank, host)
        with self._lock:
            self._peers[connection] = peer
            self._selector.register(connection, selectors.EVENT_READ, data=peer)

    @property
    def _limit_seconds(self) -> float:
        factor = LOADING_FACTOR if self._loading else 1
        return factor * self._given_limit_seconds + self._stagger_seconds

    def end_loading(self) -> None:
        """Apply the limit itself from now on. All ranks must have loaded their libraries."""
        with self._lock:
            self._loading = False
            for peer in self._peers.values():
                peer.last_received = time.monotonic()

    def wait_for_abort(self) -> None:
        """Wait for this process to be ended, after a failure that another rank has caused.

        Returns when neither the launcher nor the watchdog has ended the process in that time.
        """
        threading.Event().wait(2 * LAUNCHER_GRACE_SECONDS + self._stagger_seconds)

    def announce_failure(self) -> None:
        """Send FAILED to the other ranks: this rank has failed and printed the cause.

        The other ranks then print no cause. This process ends after the grace period if the
        launcher does not end it earlier.
        """
        with self._lock:
            self._exit_at = time.monotonic() + LAUNCHER_GRACE_SECONDS
            self._exit_cause = None
            self._send_to_all(FAILED)

    def close_gracefully(self) -> None:
        """Send GOODBYE and wait until all connected ranks have closed their connections too.

        Until then a connected rank may still be stopped or lost, and this rank watches it.
        """
        with self._lock:
            self._closing = True
            self._send_to_all(GOODBYE)
            if not self._peers:
                return
        self._all_closed.wait()

    def _run(self) -> None:
        """Send and receive until all peers are gone after close_gracefully(): the thread's body."""
        last_heartbeat = last_iteration = time.monotonic()
        while True:
            next_heartbeat = last_heartbeat + self._period_seconds
            wait = next_heartbeat - time.monotonic()
            if self._listener:
                wait = min(wait, LISTENING_CHECK_SECONDS)
            ready = self._selector.select(max(0.0, wait))
            now = time.monotonic()
            with self._lock:
                if now - last_iteration > 2 * self._period_seconds:
                    # This process itself was stopped, and has not yet received the data that
                    # arrived meanwhile. So that time does not count towards the limit.
                    for peer in self._peers.values():
                        peer.last_received += now - last_iteration
                last_iteration = now
                for key, _ in ready:
                    if isinstance(key.data, _Peer):
                        self._on_readable(key.data, now)
                    elif self._listener:
                        self._on_new_connection(self._listener, key.fileobj, now)
                if self._listener:
                    self._listener.check_times(now)
                self._check_timeouts(now)
                if self._closing and not self._peers:
                    self._all_closed.set()
                    return
                if now >= next_heartbeat:
                    last_heartbeat = now
                    self._send_to_all(HEARTBEAT)

    def _send_to_all(self, message: bytes) -> None:
        for peer in self._peers.values():
            peer.send(message)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        del self._peers[peer.connection]
        peer.connection.close()

    def _on_new_connection(self, listener: Listener, connection: object, now: float) -> None:
        """Handle a socket of the listener; watch the rank whose greeting is complete."""
        if isinstance(connection, socket.socket):
            greeted = listener.on_readable(connection, now)
            if greeted:
                self.add_peer(greeted.connection, greeted.rank, greeted.host)
                self._peers[greeted.connection].send(HEARTBEAT)

    def _on_readable(self, peer: _Peer, now: float) -> None:
        """Receive from a peer; empty data means that it has closed its connection."""
        try:
            received = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        peer.last_received = now
        if FAILED in received:
            exit_at = now + LAUNCHER_GRACE_SECONDS
            self._exit_at = min(self._exit_at or exit_at, exit_at)
            self._exit_cause = None
            self._drop(peer)
        elif GOODBYE in received:
            self._drop(peer)
        elif not received:
            self._drop(peer)
            if self._exit_at is None:
                self._exit_at = now + LAUNCHER_GRACE_SECONDS + self._stagger_seconds
                self._exit_cause = f"{peer} closed its connection unexpectedly"

    def _check_timeouts(self, now: float) -> None:
        """End this process at _exit_at, or when a connected rank sent nothing for too long."""
        if self._exit_at is not None and now >= self._exit_at:
            self._end_process(self._exit_cause)
        silent = [
            peer for peer in self._peers.values() if now - peer.last_received > self._limit_seconds
        ]
        if silent:
            names = ", ".join(map(str, sorted(silent, key=lambda peer: peer.rank)))
            self._end_process(
                f"no heartbeat from {names} for {self._limit_seconds:g} s (--watchdog-limit): the "
                "process was stopped or its network was cut"
            )

    def _end_process(self, cause: Optional[str]) -> None:
        """Print the cause unless it is None, send FAILED to the peers, and exit with status 1."""
        if cause:
            text = f"mxresnet: rank {self._rank} on {socket.gethostname()} ends the run: {cause}\n"
            # Not sys.stderr: the main thread may hold its lock. An error must not end this thread.
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
        self._send_to_all(FAILED)
        os._exit(1)


def listen(
    hosts: Sequence[str], num_ranks: int, period_seconds: float, limit_seconds: float
) -> Watchdog:
    """Start rank 0's watchdog and return it; its `address` is for the other ranks.

    Raises:
        OSError: a socket cannot be created, or the limit of open files cannot be raised.
    """
    _raise_open_files_limit(num_ranks + MAX_STRANGERS)
    watchdog = Watchdog(0, period_seconds, limit_seconds)
    watchdog.listen(hosts, num_ranks)
    watchdog.start()
    return watchdog


def _raise_open_files_limit(additional: int) -> None:
    """Raise this process's soft limit of open files, up to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + additional
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def connect(rank: int, address: Address) -> Optional[Watchdog]:
    """Start the watchdog of a rank above 0; return None when rank 0 cannot be reached."""
    for endpoint in address.endpoints:
        try:
            connection = socket.create_connection(endpoint, timeout=CONNECT_TIMEOUT_SECONDS)
            connection.sendall(f"{address.token} {rank} {socket.gethostname()}\n".encode())
            answer = connection.recv(1)
        except OSError:
            continue
        if answer == HEARTBEAT:
            watchdog = Watchdog(rank, address.period_seconds, address.limit_seconds)
            watchdog.add_peer(connection, 0, address.name)
            watchdog.start()
            return watchdog
        connection.close()
    return None
