# SPDX-License-Identifier: Apache-2.0
"""The heartbeat between ranks over real sockets in one process; ending the process is faked."""

import contextlib
import queue
import socket
import time
import types

import pytest

from mxresnet.parallel import watchdog
from mxresnet.parallel.listener import LOOPBACK

# The fake end of a process ends the watchdog's thread with SystemExit.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
PERIOD, LIMIT = 0.05, 1.0
PATIENCE_SECONDS = 20


@pytest.fixture
def exits(monkeypatch):
    """A queue of what watchdogs print when they end their process; "" for nothing."""
    ends, printed = queue.Queue(), []

    def fake_exit(status):
        assert status == 1
        ends.put("".join(printed))
        raise SystemExit  # ends the watchdog's thread only

    fake_os = types.SimpleNamespace(
        write=lambda descriptor, text: printed.append(text.decode()), _exit=fake_exit
    )
    monkeypatch.setattr(watchdog, "os", fake_os)
    monkeypatch.setattr(watchdog, "LAUNCHER_GRACE_SECONDS", 0.2)
    return ends


@pytest.fixture
def rank_0():
    dog = watchdog.listen([LOOPBACK], 3, PERIOD, LIMIT)
    dog.end_loading()
    yield dog
    dog.stop_listening()


def fake_rank(rank_0, rank, token=None):
    """Return a connection to rank 0 after the handshake of another rank."""
    connection = socket.create_connection(rank_0.address.endpoints[0], PATIENCE_SECONDS)
    connection.sendall(f"{token or rank_0.address.token} {rank} fakehost\n".encode())
    return connection


def wait_until(condition):
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_rank_is_accepted_and_gets_heartbeats(rank_0):
    connection = fake_rank(rank_0, 1)
    received = b"".join(connection.recv(1) for _ in range(3))
    assert received == 3 * watchdog.HEARTBEAT and rank_0.num_connected_ranks() == 1
    connection.sendall(watchdog.GOODBYE)
    wait_until(lambda: rank_0.num_connected_ranks() == 0)


@pytest.mark.parametrize(
    "line",
    [b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 2000, b"wrong 1 host\n"],
    ids=["http", "long line", "wrong token"],
)
def test_a_connection_that_is_not_from_a_rank_is_closed(rank_0, line, exits):
    connection = socket.create_connection(rank_0.address.endpoints[0], PATIENCE_SECONDS)
    connection.sendall(line)
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""
    assert rank_0.num_connected_ranks() == 0 and exits.empty()


def test_silent_ranks_end_the_run_and_are_named(exits, rank_0):
    connections = [fake_rank(rank_0, rank) for rank in (2, 1)]
    message = exits.get(timeout=PATIENCE_SECONDS)
    assert message.startswith("mxresnet: rank 0 on ") and message.endswith("\n")
    assert (
        "ends the run: no heartbeat from rank 1 on fakehost, rank 2 on fakehost for 1 s" in message
    )
    assert watchdog.FAILED in connections[0].recv(4096)


def test_a_rank_may_be_silent_while_it_loads_its_libraries(exits):
    loading = watchdog.listen([LOOPBACK], 2, PERIOD, LIMIT)
    connection = fake_rank(loading, 1)
    wait_until(lambda: loading.num_connected_ranks() == 1)
    time.sleep(1.5 * LIMIT)
    assert exits.empty() and loading.num_connected_ranks() == 1
    loading.end_loading()
    assert "for 1 s" in exits.get(timeout=PATIENCE_SECONDS)
    connection.close()
    loading.stop_listening()


def test_a_rank_that_sends_heartbeats_is_not_silent(exits, rank_0):
    connection = fake_rank(rank_0, 1)
    for _ in range(30):
        connection.sendall(watchdog.HEARTBEAT)
        time.sleep(2 * LIMIT / 30)
    assert exits.empty() and rank_0.num_connected_ranks() == 1
    connection.sendall(watchdog.GOODBYE)


def test_a_rank_that_closes_its_connection_ends_the_run(exits, rank_0):
    fake_rank(rank_0, 1).close()
    message = exits.get(timeout=PATIENCE_SECONDS)
    assert "ends the run: rank 1 on fakehost closed its connection unexpectedly" in message


def test_a_watchdog_without_standard_error_ends_the_run(exits, rank_0, monkeypatch):
    def fail(descriptor, text):
        raise BrokenPipeError

    monkeypatch.setattr(watchdog.os, "write", fail)
    fake_rank(rank_0, 1).close()
    assert exits.get(timeout=PATIENCE_SECONDS) == ""


def test_a_rank_that_announced_its_failure_is_ended_without_another_cause(exits, rank_0):
    connection = fake_rank(rank_0, 1)
    connection.recv(1)
    connection.sendall(watchdog.FAILED)
    connection.close()
    assert exits.get(timeout=PATIENCE_SECONDS) == ""


def test_an_announced_failure_reaches_the_other_ranks(exits, rank_0):
    other = watchdog.connect(1, rank_0.address)
    other.announce_failure()
    assert [exits.get(timeout=PATIENCE_SECONDS) for _ in range(2)] == ["", ""]


def test_ranks_close_together(exits, rank_0):
    others = [watchdog.connect(rank, rank_0.address) for rank in (1, 2)]
    wait_until(lambda: rank_0.num_connected_ranks() == 2)
    for dog in (*others, rank_0):
        dog.close_gracefully()
    assert rank_0.num_connected_ranks() == 0 and exits.empty()


def test_rank_0_that_cannot_be_reached_leaves_a_rank_without_a_watchdog():
    with socket.create_server((LOOPBACK, 0)) as unused:
        port = unused.getsockname()[1]
    address = watchdog.Address([(LOOPBACK, port)], "token", "host", PERIOD, LIMIT)
    assert watchdog.connect(1, address) is None


def test_ranks_detect_a_silent_rank_0_one_after_another():
    dogs = [watchdog.Watchdog(rank, 2, 40) for rank in (0, 1, 2, 11, 500)]
    assert [dog._limit_seconds for dog in dogs] == [320, 320, 321, 330, 330]
    for dog in dogs:
        dog.end_loading()
    assert [dog._limit_seconds for dog in dogs] == [40, 40, 41, 50, 50]
