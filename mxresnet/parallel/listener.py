# SPDX-License-Identifier: Apache-2.0
"""Rank 0's side of the start of the heartbeat: where it listens, and which connections it accepts.

Connections of strangers (port scanners, other runs) must not harm a run: rank 0 listens only where
the other ranks come from, only until all have connected, to a limited number of connections that
have not yet sent the secret of the run, and to each of them only for a limited time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import ipaddress
import selectors
import socket
import struct
from dataclasses import dataclass
from typing import Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

LOOPBACK = "127.0.0.1"
# Connections that have not sent their greeting, in addition to those of all ranks.
MAX_STRANGERS = 16
# A rank waits CONNECT_TIMEOUT_SECONDS of watchdog.py for the answer to its greeting.
GREETING_SECONDS = 5.0
MAX_GREETING_BYTES = 1000
# How long no connection is accepted after this process had no file descriptor for one.
PAUSE_SECONDS = 0.5
# Variables of Open MPI with the interfaces between the machines: names, or networks as in
# 10.0.0.0/8. The launcher of an MPIJob sets them.
_INTERFACE_VARIABLES = ("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include")
_DISCARD_PORT = 9  # any port: connecting a UDP socket sends nothing
_SIOCGIFADDR = 0x8915  # ioctl of <linux/sockios.h>: get an interface's IPv4 address

Endpoint = Tuple[str, int]  # IPv4 address and port


def interface_addresses() -> Dict[str, str]:
    """Return the IPv4 address of each interface of this machine, without loopback addresses."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an address
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                addresses[name] = address
    return addresses


def _is_chosen(name: str, address: str, choice: str) -> bool:
    """Return whether an interface is in a list of names and networks."""
    for word in choice.split(","):
        if word == name:
            return True
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(address) in ipaddress.ip_network(word, strict=False):
                return True
    return False


def _source_address(destination: str) -> Optional[str]:
    """Return the address of this machine that the kernel uses towards another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((destination, _DISCARD_PORT))
        return str(probe.getsockname()[0])
    return None


def choose_hosts(others: Iterable[Sequence[str]], environ: Mapping[str, str]) -> List[str]:
    """Return the addresses of this machine on which rank 0 listens.

    They are those of the interfaces that Open MPI is told to use; without such a choice, those from
    which the kernel reaches the other machines.

    Args:
        others: Addresses of each other machine; empty if all ranks run on this one.
        environ: Variables of this process.
    """
    machines = [addresses for addresses in others if addresses]
    if not machines:
        return [LOOPBACK]
    own = interface_addresses()
    for variable in _INTERFACE_VARIABLES:
        choice = environ.get(variable, "")
        chosen = [address for name, address in own.items() if _is_chosen(name, address, choice)]
        if chosen:
            return chosen
    # An address that this machine has too, such as that of a bridge for containers, is not a way to
    # another machine.
    targets = {address for addresses in machines for address in addresses} - set(own.values())
    sources = {_source_address(target) for target in targets} & set(own.values())
    return [address for address in own.values() if address in sources] or list(own.values())


@dataclass
class _Stranger:
    """A connection whose greeting is not complete."""

    connection: socket.socket
    deadline: float  # time.monotonic(), seconds
    greeting: bytes = b""


@dataclass(frozen=True)
class Greeted:
    """A connection that has sent the secret of the run."""

    connection: socket.socket
    rank: int
    host: str


class Listener:
    """Listening sockets, and the connections whose greeting "token rank host" is not complete.

    Not thread-safe: the watchdog calls it with its lock.

    Args:
        hosts: IPv4 addresses to listen on.
        token: Secret of the run.
        num_ranks: Number of ranks, of which all but one will connect.
        selector: Of the watchdog. This class registers its sockets with itself as data.

    Raises:
        OSError: A socket cannot be created.
    """

    def __init__(
        self, hosts: Sequence[str], token: str, num_ranks: int, selector: selectors.BaseSelector
    ) -> None:
        self._token, self._selector = token, selector
        self._max_strangers = num_ranks + MAX_STRANGERS
        self._sockets: List[socket.socket] = []
        self._strangers: Dict[socket.socket, _Stranger] = {}
        self._paused_until: Optional[float] = None
        try:
            for host in hosts:
                self._sockets.append(socket.create_server((host, 0), backlog=self._max_strangers))
        except OSError:
            self.close()
            raise
        for listening in self._sockets:
            listening.setblocking(False)
            selector.register(listening, selectors.EVENT_READ, data=self)

    @property
    def endpoints(self) -> List[Endpoint]:
        """The addresses and ports of the listening sockets."""
        return [listening.getsockname()[:2] for listening in self._sockets]

    def close(self) -> None:
        """Stop listening, and close the connections whose greeting is not complete."""
        for connection in list(self._strangers):
            self._drop(connection)
        self._stop_accepting()
        for listening in self._sockets:
            listening.close()
        self._sockets = []

    def _stop_accepting(self) -> None:
        for listening in self._sockets:
            with contextlib.suppress(KeyError):
                self._selector.unregister(listening)

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._strangers[connection]

    def _drop(self, connection: socket.socket) -> None:
        self._forget(connection)
        connection.close()

    def check_times(self, now: float) -> None:
        """Close connections whose time is over, and accept again after a pause."""
        for connection, stranger in list(self._strangers.items()):
            if now > stranger.deadline:
                self._drop(connection)
        if self._paused_until is not None and now >= self._paused_until:
            self._paused_until = None
            for listening in self._sockets:
                self._selector.register(listening, selectors.EVENT_READ, data=self)

    def on_readable(self, connection: socket.socket, now: float) -> Optional[Greeted]:
        """Handle a socket of this class that is readable; return a rank that has connected."""
        if connection in self._strangers:
            return self._receive(self._strangers[connection])
        if connection in self._sockets:
            self._accept(connection, now)
        return None

    def _accept(self, listening: socket.socket, now: float) -> None:
        try:
            connection = listening.accept()[0]
        except (BlockingIOError, ConnectionError):
            return  # it was closed in the meantime
        except OSError:
            # No file descriptor is left. The socket stays readable: waiting for it would not wait.
            if self._strangers:
                self._drop(next(iter(self._strangers)))
                return
            self._paused_until = now + PAUSE_SECONDS
            self._stop_accepting()
            return
        if len(self._strangers) >= self._max_strangers:
            self._drop(next(iter(self._strangers)))  # the oldest: ranks send their greeting at once
        connection.setblocking(False)
        self._strangers[connection] = _Stranger(connection, now + GREETING_SECONDS)
        self._selector.register(connection, selectors.EVENT_READ, data=self)

    def _receive(self, stranger: _Stranger) -> Optional[Greeted]:
        try:
            received = stranger.connection.recv(MAX_GREETING_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            received = b""
        stranger.greeting += received
        is_complete = b"\n" in stranger.greeting or len(stranger.greeting) >= MAX_GREETING_BYTES
        if received and not is_complete:
            return None
        fields = stranger.greeting.decode(errors="replace").split() + ["", "", ""]
        token, rank, host = fields[:3]
        if not received or not hmac.compare_digest(token.encode(), self._token.encode()):
            self._drop(stranger.connection)
            return None
        self._forget(stranger.connection)
        return Greeted(stranger.connection, int(rank), host)
