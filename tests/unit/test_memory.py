# SPDX-License-Identifier: Apache-2.0
"""The estimate of the memory that a rank needs at least."""

import os
import resource
import subprocess
import sys

import pytest
from support.commands import ROOT, SMALL, python

from mxresnet import memory
from mxresnet.config import Config
from mxresnet.errors import UserError
from mxresnet.model import resnet
from mxresnet.model.select_ops import select_ops

GIB = 2**30
PHOTOGRAPHS = {"image_shape": (3, 224, 224), "resize": 256}


def check(memory_bytes=16 * GIB, classes=1000, **settings):
    config = Config(**{**PHOTOGRAPHS, **settings})
    network = resnet.build(select_ops(config, on_gpu=False), config, classes)
    memory.check_memory(config, network, memory_bytes)


def test_the_batches_of_the_published_configurations_fit():
    check(memory_bytes=40 * GIB, batch_size=408, dali_prefetch_queue=5)
    check(batch_size=102)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"batch_size": 1000}, "--batch-size 1000: a rank needs at least .* has 16.0 GiB"),
        ({"batch_size": 2**20}, "array of 841813590016 elements"),
        ({"batch_size": 64, "dali_prefetch_queue": 100000}, "--dali-prefetch-queue"),
        ({"batch_size": 64, "input_batch_multiplier": 1024}, "--input-batch-multiplier"),
        ({"batch_size": 64, "resize": 16384}, "--resize"),
        ({"batch_size": 8, "image_shape": (3, 4096, 4096), "resize": 4096}, "--batch-size 8"),
        ({"batch_size": 8, "classes": 2**24}, "array of 34359738368 elements"),
    ],
)
def test_what_cannot_fit_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        check(**settings)


def test_the_estimate_is_below_what_a_step_needs():
    """Compare the growth with the batch, from 32 to 128, to that of a process' peak memory."""
    script = """
import re
import mxnet as mx
from mxresnet import memory
from mxresnet.config import Config
from mxresnet.model import resnet
from mxresnet.model.select_ops import select_ops
from mxresnet.parallel.world import World
from mxresnet.run_plan import make_plan
from mxresnet.trainer import Trainer
for size in (32, 128):
    config = Config(image_shape=(3, 64, 64), resize=64, batch_size=size, num_layers=18)
    ops = select_ops(config, False)
    trainer = Trainer(config, make_plan(config, 640, 1), World(), 10, mx.cpu(), ops)
    trainer.initialize()
    trainer.warm_up()
    print(memory._network_size(config, resnet.build(ops, config, 10))[1])
    # Not ru_maxrss, which includes the peak of the process that started this one.
    print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024)
    del trainer
"""
    # Without threads, so that the peak does not depend on the order of what they do.
    done = python("-c", script, env={**os.environ, "MXNET_ENGINE_TYPE": "NaiveEngine"})
    assert done.returncode == 0, done.stderr
    first_estimate, first_peak, estimate, peak = map(int, done.stdout.split())
    assert 0.2 < (estimate - first_estimate) / (peak - first_peak) < 1.2, done.stdout


def test_ranks_share_the_memory_of_the_machine_and_limits_count():
    total = memory.memory_of_rank(1)
    assert 2**28 < total < 2**46
    assert memory.memory_of_rank(4) == total // 4
    script = "from mxresnet.memory import memory_of_rank; print(memory_of_rank(1))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        text=True,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)),
    )
    assert int(done.stdout) == min(2**30, total)


@pytest.mark.parametrize(
    "groups, files",
    [
        ("0::/a/b\n", {"a/b/memory.max": "1000\n", "a/memory.max": "max\n"}),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "1000\n"}),
        ("0::/\n", {"memory.max": "1000\n"}),
        ("4:cpu,memory:/a\n1:name=x:/y\n", {"memory/a/memory.limit_in_bytes": "1000\n"}),
    ],
)
def test_limits_of_control_groups(tmp_path, monkeypatch, groups, files):
    (tmp_path / "cgroup").write_text(groups)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(memory, "CGROUP_LIST", str(tmp_path / "cgroup"))
    monkeypatch.setattr(memory, "CGROUP_ROOT", str(tmp_path))
    assert memory.memory_of_rank(1) == 1000


def test_a_run_ends_with_one_line(digits):
    done = python("-m", "mxresnet", *SMALL, "--data-root", digits, "--batch-size", "1000000")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("mxresnet: ")]
    assert len(lines) == 1 and "--batch-size 1000000: " in lines[0]
    assert "Traceback" not in done.stderr
