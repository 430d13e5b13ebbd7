# SPDX-License-Identifier: Apache-2.0
"""Signs of life between ranks: one that is stopped, cut off or lost ends the run, for which MPI alone would wait for ever.

Every rank has a TCP connection to rank 0. A thread at either end sends a byte each period, whatever the rank's work is
waiting for, and ends its process when the other end is silent. Knows no MPI.
"""

from __future__ import annotations

import fcntl
import os
import resource
import secrets
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Dict, List, Optional

# What is sent: still here; leaving, and all is well; leaving, and the cause has been said.
ALIVE, BYE, TOLD = b".", b"-", b"!"
# Seconds that a launcher has to end the processes of a run that failed. After that the watchdog does.
GRACE = 5.0
_SIOCGIFADDR = 0x8915  # of <linux/sockios.h>: an interface's IPv4 address


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens. The token keeps strangers out, such as a port scanner or another run's rank."""

    hosts: List[str]
    port: int
    token: str
    name: str
    period: float
    limit: float


def own_addresses() -> List[str]:
    """IPv4 addresses of this machine's interfaces, loopback last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(
                    probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
                )
            except OSError:
                continue  # an interface without an address
            found.append(socket.inet_ntoa(answer[20:24]))
    return sorted(found, key=lambda address: address.startswith("127."))


@dataclass
class _Peer:
    """The other end of a connection; rank is -1 until it has said who it is."""

    connection: socket.socket
    heard: float
    rank: int = -1
    name: str = ""
    greeting: bytes = b""

    def send(self, what: bytes) -> None:
        try:
            self.connection.send(what)
        except OSError:
            pass  # that it is gone, or takes nothing more, is noticed where it is heard


class Watchdog:
    """One end; its thread starts at once. Every method may be called from any thread."""

    def __init__(self, rank: int, period: float, limit: float):
        self._rank, self._period = rank, period
        # When rank 0 is silent each rank notices. They speak one after the other: the first one's word ends the run.
        self._turn = min(max(rank - 1, 0), 10)
        self._limit = limit + self._turn
        self._peers: Dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._listener: Optional[socket.socket] = None
        self.address: Optional[Address] = None  # rank 0's, for the others
        self._ends_at: Optional[float] = None
        self._cause = ""
        self._lock = threading.RLock()
        self._leaving = False
        self._left = threading.Event()

    def _start(self) -> None:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        beat = last = time.monotonic()
        while True:
            ready = self._selector.select(max(0.0, beat + self._period - time.monotonic()))
            now = time.monotonic()
            with self._lock:
                if now - last > 2 * self._period:
                    # This process was stopped itself: what the others said meanwhile has yet to be heard.
                    for peer in self._peers.values():
                        peer.heard += now - last
                last = now
                for key, _ in ready:
                    self._accept() if key.fileobj is self._listener else self._hear(
                        self._peers[key.fileobj], now
                    )
                self._judge(now)
                if self._leaving and self._is_last():
                    self._left.set()
                    return
                if now >= beat + self._period:
                    beat = now
                    self._send_all(ALIVE)

    def _is_last(self) -> bool:
        return not any(peer.rank >= 0 for peer in self._peers.values())

    def _send_all(self, what: bytes) -> None:
        for peer in self._peers.values():
            if peer.rank >= 0:
                peer.send(what)

    def _add(self, connection: socket.socket, rank: int = -1, name: str = "") -> None:
        connection.setblocking(False)
        self._peers[connection] = _Peer(connection, time.monotonic(), rank, name)
        self._selector.register(connection, selectors.EVENT_READ)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        del self._peers[peer.connection]
        peer.connection.close()

    def _accept(self) -> None:
        try:
            self._add(self._listener.accept()[0])
        except OSError:
            pass  # it left before it was let in, or there are too many files; it will say that it was not heard

    def _hear(self, peer: _Peer, now: float) -> None:
        try:
            said = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        peer.heard = now
        if peer.rank < 0:
            self._greet(peer, said)
        elif TOLD in said:
            self._ends_at, self._cause = min(self._ends_at or now + GRACE, now + GRACE), ""
            self._drop(peer)
        elif BYE in said:
            self._drop(peer)
        elif not said:
            self._drop(peer)
            if self._ends_at is None:
                self._ends_at = now + GRACE + self._turn
                self._cause = f"rank {peer.rank} on {peer.name} ended without a word"

    def _greet(self, peer: _Peer, said: bytes) -> None:
        peer.greeting += said
        if said and b"\n" not in peer.greeting and len(peer.greeting) < 1000:
            return
        token, rank, name = (peer.greeting.decode(errors="replace").split() + ["", "", ""])[:3]
        if not said or not self.address or token != self.address.token:
            self._drop(peer)
            return
        peer.rank, peer.name = int(rank), name
        peer.send(ALIVE)

    def _judge(self, now: float) -> None:
        if self._ends_at is not None and now >= self._ends_at:
            self._end(self._cause)
        silent = sorted(
            (
                peer
                for peer in self._peers.values()
                if peer.rank >= 0 and now - peer.heard > self._limit
            ),
            key=lambda p: p.rank,
        )
        if silent:
            who = ", ".join(f"rank {peer.rank} on {peer.name}" for peer in silent)
            self._end(
                f"no sign of life of {who} for {self._limit:g} s: stopped, or cut off the network (--watchdog-limit)"
            )

    def _end(self, cause: str) -> None:
        if cause:
            # Not through sys.stderr, whose lock the main thread may hold.
            os.write(
                2,
                f"mxresnet: rank {self._rank} on {socket.gethostname()} ends the run: {cause}\n".encode(),
            )
        self._send_all(TOLD)
        os._exit(1)

    def wait_to_be_ended(self) -> None:
        """Another rank's end is why this one cannot go on. Returns when neither launcher nor watchdog have ended it in a while."""
        threading.Event().wait(2 * GRACE + self._turn)

    def told(self) -> None:
        """This rank has said why it cannot go on: let nobody else look for a cause, and end if the launcher does not."""
        with self._lock:
            self._ends_at, self._cause = time.monotonic() + GRACE, ""
            self._send_all(TOLD)

    def leave(self) -> None:
        """All is well and this rank is about to end. Returns when those that it watches say the same: until then one may be stopped."""
        with self._lock:
            self._leaving = True
            self._send_all(BYE)
            if self._is_last():
                return
        self._left.wait()


def listen(ranks: int, period: float, limit: float) -> Watchdog:
    """Start rank 0's watchdog; watchdog.address is for the others. Raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + ranks if hard == resource.RLIM_INFINITY else min(soft + ranks, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    dog = Watchdog(0, period, limit)
    dog._listener = socket.create_server(("", 0), backlog=ranks + 10)
    dog._listener.setblocking(False)
    dog._selector.register(dog._listener, selectors.EVENT_READ)
    dog.address = Address(
        own_addresses(),
        dog._listener.getsockname()[1],
        secrets.token_hex(16),
        socket.gethostname(),
        period,
        limit,
    )
    dog._start()
    return dog


def connect(rank: int, address: Address) -> Optional[Watchdog]:
    """Start another rank's watchdog, or return None when rank 0 cannot be reached."""
    for host in address.hosts:
        try:
            connection = socket.create_connection((host, address.port), timeout=3)
            connection.sendall(f"{address.token} {rank} {socket.gethostname()}\n".encode())
            welcome = connection.recv(1)
        except OSError:
            continue
        if welcome == ALIVE:
            dog = Watchdog(rank, address.period, address.limit)
            dog._add(connection, 0, address.name)
            dog._start()
            return dog
        connection.close()
    return None
