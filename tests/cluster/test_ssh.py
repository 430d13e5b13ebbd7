# SPDX-License-Identifier: Apache-2.0
"""ssh between the pods of a job: host keys, what sshd permits, which hosts are not checked."""

import subprocess

import pytest
from support import network_hosts
from support.commands import ROOT

pytestmark = pytest.mark.skipif(
    bool(network_hosts.unavailable_reason()), reason=str(network_hosts.unavailable_reason())
)
IMAGE = ROOT / "k8s" / "image"
WORKERS = [f"{network_hosts.JOB}-worker-{i}.{network_hosts.JOB}.default.svc" for i in range(2)]


def client_options(host):
    """Return the effective options of ssh for a host."""
    command = ["ssh", "-G", "-F", IMAGE / "ssh_config", host]
    output = subprocess.check_output(command, text=True)
    return dict(line.split(" ", 1) for line in output.splitlines() if " " in line)


@pytest.mark.parametrize("host", [*WORKERS, "job-worker-12.job-worker"])
def test_the_keys_of_workers_are_not_checked(host):
    options = client_options(host)
    assert options["stricthostkeychecking"] == "false"
    assert options["userknownhostsfile"] == "/dev/null"
    assert options["port"] == "2222"


@pytest.mark.parametrize("host", ["github.com", "worker.example.com", "job-launcher.job"])
def test_the_keys_of_other_hosts_are_checked(host):
    options = client_options(host)
    assert options["stricthostkeychecking"] in ("ask", "true")
    assert "/dev/null" not in options["userknownhostsfile"]
    assert options["port"] == "22"


@pytest.mark.parametrize("user", ["root", "mxresnet"])
def test_a_worker_has_a_host_key_of_its_own_and_permits_commands_only(tmp_path, user):
    """Also for a user with no capabilities: the container needs no root."""
    script = f"""
        ls /etc/ssh/ssh_host_* 2>&1
        for worker in {" ".join(WORKERS)}; do
            until ssh -o BatchMode=yes $worker true; do sleep 0.1; done 2>/dev/null
            ssh-keyscan -p 2222 $worker 2>/dev/null
        done
        echo "=== user"
        ssh -o BatchMode=yes {WORKERS[0]} 'id -un; grep -E "CapBnd|NoNewPrivs" /proc/self/status'
        echo "=== forwarding"
        ssh -o BatchMode=yes -W localhost:22 {WORKERS[0]} </dev/null 2>&1
        ssh -o BatchMode=yes -A -X {WORKERS[0]} 'echo "agent=$SSH_AUTH_SOCK display=$DISPLAY"' 2>&1
        echo "=== login without the key"
        ssh -o BatchMode=yes -o IdentityFile=/dev/null -o IdentitiesOnly=yes {WORKERS[0]} true 2>&1
        echo "=== options"
        ssh -o BatchMode=yes {WORKERS[0]} /usr/sbin/sshd -T
    """
    with network_hosts.Cluster(tmp_path, user=user) as cluster:
        agent = {"SSH_AUTH_SOCK": "/nowhere", "DISPLAY": ":0"}
        command = ["timeout", "40", "sh", "-c", script]
        process = cluster.launch(command, agent, stdout=subprocess.PIPE)
        out, _ = process.communicate(timeout=60)
    keys, who, forwarding, login, options = out.split("\n=== ")
    assert "cannot access" in keys  # the image has no host keys
    found = [
        line.split()[1:] for line in keys.splitlines() if line.startswith(f"[{network_hosts.JOB}")
    ]
    assert [kind for kind, _ in found] == ["ssh-ed25519"] * 2
    assert found[0] != found[1]
    assert who.split()[1] == user
    assert user == "root" or who.split()[2:] == ["CapBnd:", "0" * 16, "NoNewPrivs:", "1"]
    assert "stdio forwarding failed" in forwarding
    assert "X11 forwarding request failed" in forwarding and "agent= display=" in forwarding
    assert "Permission denied (publickey)" in login
    effective = options.splitlines()
    for line in (
        *("strictmodes yes", "disableforwarding yes", "maxstartups 10:30:100"),
        *("permitrootlogin without-password", "passwordauthentication no"),
        "authenticationmethods publickey",
    ):
        assert line in effective, line
