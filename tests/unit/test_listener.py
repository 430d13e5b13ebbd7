# SPDX-License-Identifier: Apache-2.0
"""Where rank 0 listens for the other ranks, and strangers that connect to it: real sockets."""

import contextlib
import selectors
import socket
import subprocess
import sys
import threading
import time

import pytest
from support.commands import ROOT
from support.scripts import wait_for

from mxresnet.parallel import listener, watchdog
from mxresnet.parallel.listener import LOOPBACK

PERIOD, LIMIT = 0.05, 5.0
STRANGERS = 40
# A rank 0 that must not open another file; prints its CPU time of one second, then has a file more.
WITHOUT_FILES = """
import os, resource, sys, time
from mxresnet.parallel import watchdog
watchdog._raise_open_files_limit = lambda additional: None
dog = watchdog.listen(["127.0.0.1"], 2, 2.0, 40.0)
spare = os.open("/dev/null", os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, spare + 1))
print(dog.address.endpoints[0][1], dog.address.token, flush=True)
sys.stdin.readline()
before = time.process_time()
time.sleep(1)
print(time.process_time() - before, flush=True)
os.close(spare)
while not dog.num_connected_ranks():
    time.sleep(0.01)
print("connected", flush=True)
os._exit(0)
"""


@pytest.fixture
def rank_0():
    dog = watchdog.listen([LOOPBACK], 2, PERIOD, LIMIT)
    yield dog
    dog.stop_listening()


@pytest.fixture
def connect(rank_0):
    """Connect as a stranger."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection(rank_0.address.endpoints[0], 10))


def is_closed(connection):
    connection.settimeout(10)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def join(rank_0):
    """Connect as a rank, and leave; return whether it was accepted."""
    other = watchdog.connect(1, rank_0.address)
    if other is None:
        return False
    threading.Thread(target=rank_0.close_gracefully).start()
    other.close_gracefully()
    return True


def test_idle_strangers_are_limited_and_do_not_keep_a_rank_out(rank_0, connect):
    strangers = [connect() for _ in range(STRANGERS)]
    assert is_closed(strangers[0])
    wait_for(lambda: len(rank_0._listener._strangers) == 2 + listener.MAX_STRANGERS)
    assert join(rank_0)


def test_a_greeting_has_a_deadline(rank_0, connect, monkeypatch):
    """Also one that arrives byte by byte."""
    monkeypatch.setattr(listener, "GREETING_SECONDS", 0.5)
    idle, slow = connect(), connect()
    with contextlib.suppress(OSError):
        for byte in rank_0.address.token * 2:
            slow.sendall(byte.encode())
            time.sleep(0.05)
    assert is_closed(idle) and is_closed(slow)
    assert rank_0._listener._strangers == {}


def test_nobody_can_connect_when_all_ranks_have(rank_0, connect):
    waiting = connect()
    rank_0.stop_listening()
    assert is_closed(waiting)
    with pytest.raises(ConnectionRefusedError):
        connect()


def test_a_rank_0_without_files_waits_and_then_accepts():
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_FILES],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    port, token = process.stdout.readline().split()
    # The first takes the last file; a stranger is closed to make room for the next.
    connections = [socket.create_connection((LOOPBACK, int(port)), 10) for _ in range(3)]
    process.stdin.write("go\n")
    process.stdin.flush()
    assert float(process.stdout.readline()) < 0.3
    connections.append(socket.create_connection((LOOPBACK, int(port)), 10))
    connections[-1].sendall(f"{token} 1 host\n".encode())
    assert process.stdout.readline() == "connected\n"
    process.communicate(timeout=10)
    for connection in connections:
        connection.close()


def test_a_socket_that_cannot_be_made_leaves_nothing_open():
    selector = selectors.DefaultSelector()
    with pytest.raises(OSError):
        listener.Listener([LOOPBACK, "203.0.113.1"], "token", 2, selector)
    assert not selector.get_map()


def test_on_one_machine_rank_0_listens_on_loopback():
    environ = {"OMPI_MCA_btl_tcp_if_include": "eth0"}
    assert listener.choose_hosts([], environ) == [LOOPBACK]
    assert listener.choose_hosts([[], []], {}) == [LOOPBACK]


@pytest.fixture
def interfaces(monkeypatch):
    """Interfaces with addresses from the blocks for documentation."""
    addresses = {"eth0": "192.0.2.10", "ib0": "198.51.100.10", "docker0": "172.17.0.1"}
    monkeypatch.setattr(listener, "interface_addresses", lambda: addresses)


@pytest.mark.parametrize(
    "choice, hosts",
    [
        ("ib0", ["198.51.100.10"]),
        ("eth0,ib0", ["192.0.2.10", "198.51.100.10"]),
        ("198.51.100.0/24", ["198.51.100.10"]),
        ("docker", None),
    ],
)
def test_rank_0_listens_on_the_chosen_interfaces(interfaces, choice, hosts):
    others = [["192.0.2.11", "198.51.100.11"]]
    all_hosts = ["192.0.2.10", "198.51.100.10", "172.17.0.1"]
    found = listener.choose_hosts(others, {"OMPI_MCA_oob_tcp_if_include": choice})
    assert found == (hosts or all_hosts)


def test_without_a_choice_it_listens_where_the_other_machines_are(interfaces, monkeypatch):
    routes = {"192.0.2.11": "192.0.2.10", "172.18.0.1": "192.0.2.10", "172.17.0.1": "172.17.0.1"}
    monkeypatch.setattr(listener, "_source_address", routes.get)
    others = [["192.0.2.11", "172.17.0.1"], ["172.18.0.1", "203.0.113.9"]]
    assert listener.choose_hosts(others, {}) == ["192.0.2.10"]


def test_the_kernel_names_the_address_towards_another_machine():
    for address in listener.interface_addresses().values():
        assert listener._source_address(address) in (address, LOOPBACK)
    assert listener._source_address("127.0.0.5") == LOOPBACK
