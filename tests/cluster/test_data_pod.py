# SPDX-License-Identifier: Apache-2.0
"""k8s/prepare_data.sh, the program of the data pod: waiting, records, bad archives, signals."""

import os
import shutil
import subprocess

import pytest
from support.commands import ROOT

K8S = ROOT / "k8s"


def test_data_pod_waits_converts_verifies_and_accepts_finished_records(few, tmp_path):
    archives, records = tmp_path / "archives", tmp_path / "records"
    shutil.copytree(few.parent / "images", archives)
    command = [str(K8S / "prepare_data.sh"), str(archives), str(records)]
    waiting = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert "waiting for" in waiting.stdout.readline() and waiting.poll() is None
    (archives / "complete").touch()
    out = waiting.communicate(timeout=120)[0]
    assert waiting.returncode == 0 and "are complete" in out, out
    shutil.rmtree(archives)
    # Through a symlink, with relative paths.
    (tmp_path / "link").symlink_to(command[0])
    command = ["./link", "archives", "records"]
    again = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert again.returncode == 0 and "are complete" in again.stdout, again.stderr


def start_script(script, archives, records, **options):
    return subprocess.Popen(
        [str(script), str(archives), str(records)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def read_until(pod, words):
    """Return the output of the pod up to a line with these words; fail if there is none."""
    lines = []
    while not lines or words not in lines[-1]:
        lines.append(pod.stdout.readline())
        assert lines[-1], lines
    return lines


def test_data_pod_keeps_running_after_bad_archives(few, tmp_path):
    archives, records = tmp_path / "archives", tmp_path / "records"
    shutil.copytree(few.parent / "images", archives)
    bad = next((archives / "train").glob("*/*"))
    good = bad.read_bytes()
    bad.write_bytes(good[:-9])
    (archives / "complete").touch()
    pod = start_script(K8S / "prepare_data.sh", archives, records)
    *lines, last = read_until(pod, "fix the errors above")
    assert f"{archives}/complete" in last and any(f"{bad}: truncated" in line for line in lines)
    assert "waiting for" in pod.stdout.readline() and not (archives / "complete").exists()
    bad.write_bytes(good)
    (archives / "complete").touch()
    out = pod.communicate(timeout=120)[0]
    assert pod.returncode == 0 and "are complete" in out, out


@pytest.fixture
def start_pod(tmp_path):
    """Return start() -> a data pod with short waits and a fake python.

    Each prepare.imagenet ends with the next status in the file `statuses`, then with 0.
    """
    programs = {
        "k8s/prepare_data.sh": (K8S / "prepare_data.sh").read_text(),
        "setup_env.sh": f"#!/bin/sh\necho {tmp_path}/bin/python\n",
        "bin/sleep": "#!/bin/sh\nexec /bin/sleep 0.05\n",
        "bin/python": f"""#!/bin/sh
echo "$*"
[ "$2" = prepare.imagenet ] || exit 0
status=$(head -n 1 {tmp_path}/statuses)
sed -i 1d {tmp_path}/statuses
exit $((status))
""",
    }
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "statuses").touch()
    for folder in ("archives", "records"):
        (tmp_path / folder).mkdir()
    command = [tmp_path / "k8s" / "prepare_data.sh", tmp_path / "archives", tmp_path / "records"]
    environ = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    pods = []
    yield lambda: pods.append(start_script(*command, env=environ)) or pods[-1]
    for pod in pods:
        pod.kill()
        pod.communicate()


@pytest.mark.parametrize("status", [1, 2, 3])
def test_data_pod_waits_after_an_error_that_a_new_pod_would_repeat(start_pod, tmp_path, status):
    (tmp_path / "statuses").write_text(f"{status}\n")
    for name in (
        "archives/complete",
        "records/train.json",
        "records/val.json",
    ):  # the records are of other archives, as with status 3
        (tmp_path / name).touch()
    pod = start_pod()
    assert not any("prepare.verify" in line for line in read_until(pod, "waiting for"))
    assert not (tmp_path / "archives" / "complete").exists() and pod.poll() is None
    (tmp_path / "archives" / "complete").touch()
    out = pod.communicate(timeout=60)[0]
    assert pod.returncode == 0 and "prepare.imagenet" in out and "prepare.verify" in out


@pytest.mark.parametrize("status", [4, 130, 137])
def test_data_pod_ends_after_an_error_that_a_new_pod_may_not_repeat(start_pod, tmp_path, status):
    (tmp_path / "statuses").write_text(f"{status}\n")
    (tmp_path / "archives" / "complete").touch()
    pod = start_pod()
    out = pod.communicate(timeout=60)[0]
    assert (
        pod.returncode == status
        and "fix the errors above" not in out
        and (tmp_path / "archives" / "complete").exists()
    )


def test_a_data_pod_waits_for_the_one_that_it_replaces(start_pod, tmp_path):
    last = start_pod()
    read_until(last, "waiting for")
    next_one = start_pod()
    assert "another data pod" in next_one.stdout.readline()
    (tmp_path / "archives" / "complete").touch()
    assert last.wait(timeout=60) == 0
    assert "prepare.verify" in next_one.communicate(timeout=60)[0] and next_one.returncode == 0
    # A pod that receives SIGTERM while it waits ends at once, and the next pod gets the lock.
    (tmp_path / "archives" / "complete").unlink()
    last = start_pod()
    read_until(last, "waiting for")
    next_one = start_pod()
    read_until(next_one, "another data pod")
    last.terminate()
    assert last.wait(timeout=60) == 143
    read_until(next_one, "waiting for /")
    next_one.terminate()
    assert next_one.wait(timeout=60) == 143
