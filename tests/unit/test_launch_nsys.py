# SPDX-License-Identifier: Apache-2.0
"""launch.nsys: which ranks run under Nsight Systems, and with which options."""

import os
import subprocess
import sys

import pytest
from support.commands import ROOT

from mxresnet.errors import UserError
from mxresnet.launch import nsys

SETTINGS = {
    **{"LOGDIR": "/logs", "NETWORK": "resnet-v1b-fl", "BATCHSIZE": "51", "DATESTAMP": "today"},
    **{"DGXNNODES": "2", "DGXNGPU": "4"},
}


def rank(number, local, **more):
    variables = {"OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_LOCAL_RANK": str(local)}
    return {**SETTINGS, **variables, **more}


def test_profile_is_of_the_first_rank_between_start_and_stop_of_the_profiler():
    assert nsys.command_prefix(rank(0, 0, PROFILE="1")) == [
        *("nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop"),
        *("--sample=cpu", "--trace=cuda,nvtx", "--force-overwrite=true", "--export=sqlite"),
        "--output=/logs/resnet-v1b-fl_b51_%h_0_0.nsys-rep",
    ]


@pytest.mark.parametrize(
    "number, local, every, profiled",
    [(1, 1, "", False), (1, 1, "1", True), (4, 0, "1", False), (5, 1, "1", False)],
)
def test_other_ranks_of_the_first_machine_are_profiled_only_when_asked(
    number, local, every, profiled
):
    environ = rank(number, local, PROFILE="1", PROFILE_ALL_LOCAL_RANKS=every)
    assert bool(nsys.command_prefix(environ)) is profiled


def test_ranks_of_slurm_are_known():
    environ = {**SETTINGS, "PROFILE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert nsys.command_prefix(environ)
    assert not nsys.command_prefix({**environ, "SLURM_PROCID": "4"})


def test_nvtx_flag_profiles_every_rank_from_start_to_end():
    assert nsys.command_prefix(rank(5, 1, NVTX_FLAG="1")) == [
        *("nsys", "profile", "--sample=none", "--cpuctxsw=none", "--trace=cuda,nvtx"),
        "--force-overwrite=true",
        "--output=/logs/image_classification_mxnet_2x4x51_today_5_0.nsys-rep",
    ]


@pytest.mark.parametrize("more", [{}, {"PROFILE": "0", "NVTX_FLAG": ""}])
def test_no_rank_is_profiled_by_default(more):
    assert not nsys.is_wanted(more) and nsys.command_prefix(rank(0, 0, **more)) == []
    nsys.check({"PATH": "/nowhere", **more})


@pytest.mark.parametrize("name, flag", [("PROFILE", "--profile"), ("NVTX_FLAG", "--nvtx-flag")])
def test_without_nsys_one_line_names_the_flag_that_does_without(tmp_path, name, flag):
    with pytest.raises(UserError, match=f"^{name}=2 .* nsys.* {flag} 2,"):
        nsys.check({"PATH": str(tmp_path), name: "2"})


def test_the_module_runs_the_command_under_nsys(tmp_path):
    (tmp_path / "nsys").write_text('#!/bin/sh\nwhile [ "$1" != echo ]; do shift; done\n"$@" nsys\n')
    (tmp_path / "nsys").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(**variables):
        command = [sys.executable, "-m", "mxresnet.launch.nsys", "echo", "done"]
        done = subprocess.run(
            command, cwd=ROOT, env={**environ, **variables}, text=True, capture_output=True
        )
        return done.returncode, done.stdout, done.stderr

    assert run(**rank(0, 0, PROFILE="1")) == (0, "done nsys\n", "")
    assert run(**rank(1, 1, PROFILE="1")) == (0, "done\n", "")
    (tmp_path / "nsys").unlink()
    status, stdout, stderr = run(**rank(0, 0, PROFILE="1"))
    assert (status, stdout, stderr.count("\n")) == (2, "", 1)
