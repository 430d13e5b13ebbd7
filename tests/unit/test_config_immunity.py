# SPDX-License-Identifier: Apache-2.0
"""Configurations in a polluted shell: nothing of the caller's changes a hyperparameter."""

import os
import re
import subprocess

import pytest
from support.commands import ROOT
from support.launchers import exported

from mxresnet.config import FIELDS
from mxresnet.launch.system_config import systems

SYSTEMS = systems()
ON_CPU = ["CPU", "CPU_digits"]
# Settings that are no hyperparameters: the caller chooses them.
OF_THE_CALLER = {
    *("DATA_TRAIN", "DATA_TRAIN_IDX", "DATA_VAL", "DATA_VAL_IDX", "NUMEXAMPLES", "NUMVALEXAMPLES"),
    *("GPUS", "SEED", "SYNTH_DATA", "PROFILE", "PROFILE_WORKER_SUFFIX", "TIME_TAGS", "NVTX_FLAG"),
    *("EPOCH_PROF", "LOG_FILE", "EXPECTED_RANKS", "WATCHDOG_PERIOD", "WATCHDOG_LIMIT"),
    *("SUBMISSION_ORG", "SUBMISSION_PLATFORM", "SUBMISSION_DIVISION", "SUBMISSION_STATUS"),
    *("CACHE_CLEARED", "DATAROOT", "DISP_BATCHES", "INIT_FROM", "EVALUATE"),
    *("CHECKPOINTS", "CHECKPOINT_DIR", "CHECKPOINT_MINUTES", "RESUME"),
}
# Variables that a configuration lets the caller choose, as in `export NAME=${NAME:-value}`.
ALLOWED = {
    **{system: {"NUMEPOCHS", "NCCL_DEBUG"} for system in SYSTEMS},
    "DGXA100_multi_527x8x16xgbn2_larsv2": {"NUMEPOCHS", "NCCL_DEBUG", "DGXNNODES"},
    "CPU": {"NUMEPOCHS", "NCCL_DEBUG", "DGXNGPU", "DGXNNODES", "OMP_NUM_THREADS"},
    "CPU_digits": {"NCCL_DEBUG", "DGXNGPU", "DGXNNODES", "OMP_NUM_THREADS", "DATAROOT"},
}
# The transport of MPI is the machine's; the CPU configurations do not set it.
NOT_SET_ON_CPU = {"OMPI_MCA_btl"}
TEXT = "".join(path.read_text() for path in ROOT.glob("config_*.sh"))
MENTIONED = {
    *re.findall(r"\bexport (\w+)=", TEXT),
    *" ".join(re.findall(r"^\s*unset (.*)", TEXT, re.MULTILINE)).split(),
}
CLEAN = {system: exported(system) for system in SYSTEMS}
# Every variable that a configuration sets, and every hyperparameter that a rank reads.
COMPLETE = sorted(
    {name for values in CLEAN.values() for name in values}
    | MENTIONED
    | {field.metadata["env"] for field in FIELDS.values()} - OF_THE_CALLER
)


def without(values, *groups):
    """Return the variables whose names are in none of the groups."""
    return {name: value for name, value in values.items() if not set().union(*groups) & {name}}


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_configuration_exports_every_hyperparameter(system):
    hyperparameters = {field.metadata["env"] for field in FIELDS.values()} - OF_THE_CALLER
    assert hyperparameters - CLEAN[system].keys() == set()


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("value", ["13", "junk of the caller", ""])
def test_nothing_of_a_polluted_environment_survives(system, value):
    assert {"MOM", "NCCL_GRAPH_REGISTER", "MALLOC_TRIM_THRESHOLD_", "WALLTIME"} <= set(COMPLETE)
    allowed = ALLOWED[system] | (NOT_SET_ON_CPU if system in ON_CPU else set())
    polluted = dict.fromkeys(set(COMPLETE) - allowed - OF_THE_CALLER, value)
    assert exported(system, **polluted) == CLEAN[system]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_variable_is_the_callers_only_where_the_configuration_lets_it(system):
    values = exported(system, **dict.fromkeys(ALLOWED[system], "3"))
    assert {name: values[name] for name in ALLOWED[system]} == dict.fromkeys(ALLOWED[system], "3")
    assert without(values, ALLOWED[system]) == without(CLEAN[system], ALLOWED[system])


def sourced_in_turn(first, second):
    """Return what the second configuration exports in a shell that has sourced the first."""
    script = f"set -euo pipefail; source ./config_{first}.sh; source ./config_{second}.sh; env -0"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={"PATH": os.environ["PATH"]},
        check=True,
    )
    values = dict(item.split("=", 1) for item in done.stdout.split("\0") if item)
    return without(values, {"PATH", "PWD", "SHLVL", "_", "OLDPWD"})


@pytest.mark.parametrize("first", ["DGXA100_multi_527x8x16xgbn2_larsv2", "A100-80GB_4gpu", *ON_CPU])
@pytest.mark.parametrize("second", SYSTEMS)
def test_a_configuration_that_was_sourced_before_leaves_nothing(first, second):
    """As after working in one shell: only what a caller may choose anyway is left of the first."""
    left = ALLOWED[second] | {"DATAROOT"} | (NOT_SET_ON_CPU if second in ON_CPU else set())
    assert without(sourced_in_turn(first, second), left) == without(CLEAN[second], left)
