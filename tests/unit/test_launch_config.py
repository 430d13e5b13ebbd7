# SPDX-License-Identifier: Apache-2.0
"""launch.system_config: how launchers read configurations, and which variables they forward."""

import os
import time

import pytest
from support.commands import ROOT
from support.launchers import exported

from mxresnet.errors import UserError
from mxresnet.launch import run, system_config


def clean(**more):
    return {"PATH": os.environ["PATH"], "HOME": "/nowhere", **more}


def test_every_file_of_a_system_is_listed_and_no_shared_one():
    names = {path.name[len("config_") : -len(".sh")] for path in ROOT.glob("config_*.sh")}
    shared = {name for name in names if name.endswith("common")}
    assert len(shared) >= 3 and system_config.systems() == sorted(names - shared)


@pytest.mark.parametrize("system", ["PDP11", "CPU_common", "common", "../CPU", ""])
def test_an_unknown_system_is_refused_with_the_list(system):
    with pytest.raises(UserError, match=rf"DGXSYSTEM={system} has no config_.* CPU_digits "):
        system_config.load_configuration(system, clean())


def test_the_result_is_what_bash_exports():
    before = clean(OTHER="two\nlines", SHLVL="7", NOT_UTF8="\udcff")
    after = system_config.load_configuration("CPU_digits", before)
    assert after == {**before, **exported("CPU_digits")}


def test_the_message_of_a_failed_configuration_is_reported():
    with pytest.raises(UserError, match="^DGXNGPU=0 ranks on each of DGXNNODES=1 machines: both"):
        system_config.load_configuration("CPU_digits", clean(DGXNGPU="0"))


def test_functions_of_the_caller_with_names_of_commands_are_not_used():
    """Other functions are kept: a configuration may call "module load"."""
    function = "() {  echo listing; }"
    functions = {f"BASH_FUNC_{name}%%": function for name in ("dirname", "env", "nproc", "grep")}
    module = {"BASH_FUNC_module%%": "() {  echo load\n}"}
    after = system_config.load_configuration("CPU_digits", clean(**functions, **module))
    assert after == {**clean(), **module, **exported("CPU_digits")}


def test_a_mark_that_a_configuration_is_loaded_needs_the_configuration():
    loaded = exported("CPU_digits")
    environ = {**clean(), **loaded, "DGXSYSTEM": "CPU_digits", "CONFIG_LOADED": "CPU_digits"}
    after, notes = run.configured_environment([], {**environ, "LR": "7"})
    assert (after["LR"], notes) == ("7", []) and "CONFIG_LOADED" not in after
    for name in ("DGXNGPU", "LR", "BATCHSIZE"):
        left_over = {key: value for key, value in environ.items() if key != name}
        with pytest.raises(UserError, match=f"^CONFIG_LOADED=CPU_digits is set, and {name} of"):
            run.configured_environment([], left_over)
    other = {**clean(), "DGXSYSTEM": "CPU_digits", "CONFIG_LOADED": "A30_1x2x204"}
    after, _ = run.configured_environment([], other)
    assert after["LR"] == loaded["LR"] and "CONFIG_LOADED" not in after


def test_messages_of_a_configuration_are_shown(tmp_path, monkeypatch, capfd):
    (tmp_path / "config_LOUD.sh").write_text("echo out; echo err >&2; export LR=5\n")
    monkeypatch.setattr(system_config, "PROJECT_FOLDER", tmp_path)
    assert system_config.load_configuration("LOUD", clean())["LR"] == "5"
    out, err = capfd.readouterr()
    assert (out, err) == ("", "out\nerr\n")


@pytest.mark.parametrize("text", ["exit 3", "false", "unset X; echo $X", "export LR=$(false)x; $Y"])
def test_a_configuration_is_strict(tmp_path, monkeypatch, text):
    (tmp_path / "config_BAD.sh").write_text(text + "\n")
    monkeypatch.setattr(system_config, "PROJECT_FOLDER", tmp_path)
    with pytest.raises(UserError):
        system_config.load_configuration("BAD", clean())


def test_a_configuration_that_exits_is_refused(tmp_path, monkeypatch):
    """Its settings are lost, and so is PATH: the run would make an environment of its own."""
    (tmp_path / "config_BAD.sh").write_text("export LR=5\nexit 0\n")
    monkeypatch.setattr(system_config, "PROJECT_FOLDER", tmp_path)
    with pytest.raises(UserError, match="config_BAD.sh exits"):
        system_config.load_configuration("BAD", clean())


def test_only_exported_variables_are_read(tmp_path, monkeypatch, capfd):
    text = "trap 'echo the end' EXIT\nexport LR=5\nthreads=6\nreturn 0\nexport LR=7\n"
    (tmp_path / "config_ODD.sh").write_text(text)
    monkeypatch.setattr(system_config, "PROJECT_FOLDER", tmp_path)
    assert system_config.load_configuration("ODD", clean()) == clean(LR="5")
    assert capfd.readouterr() == ("", "the end\n")


def test_settings_that_a_configuration_does_not_export_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(system_config, "PROJECT_FOLDER", tmp_path)
    config = tmp_path / "config_MINE.sh"
    config.write_text("export DGXNGPU=1\nLR=7; BATCHSIZE=4\nNCCL_DEBUG=INFO; BIND=(a b); x=1\n")
    with pytest.raises(UserError, match="config_MINE.sh sets BATCHSIZE, BIND, LR, NCCL_DEBUG with"):
        system_config.load_configuration("MINE", clean())
    config.write_text("for LR in 1 2; do :; done; export BATCHSIZE; return\n")
    with pytest.raises(UserError, match="config_MINE.sh sets LR without export, .* get it: write"):
        system_config.load_configuration("MINE", clean())
    # A variable that the caller exports stays exported.
    config.write_text("LR=7; BATCHSIZE=4; unset BATCHSIZE\n")
    assert system_config.load_configuration("MINE", clean(LR="3")) == clean(LR="7")


def test_a_process_that_a_configuration_leaves_behind_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "config_ODD.sh").write_text("sleep 20 & export LR=5\n")
    monkeypatch.setattr(system_config, "PROJECT_FOLDER", tmp_path)
    started = time.monotonic()
    assert system_config.load_configuration("ODD", clean())["LR"] == "5"
    assert time.monotonic() - started < 15


def test_bashrc_does_not_change_a_configuration(tmp_path):
    """As on a worker: bash -c under sshd would read the user's .bashrc."""
    (tmp_path / ".bashrc").write_text("export LR=9 PATH=/elsewhere:$PATH\n")
    before = {**clean(SSH_CLIENT="10.0.0.1 1 22", SHLVL="0"), "HOME": str(tmp_path)}
    after = system_config.load_configuration("CPU_digits", before)
    assert after["LR"] == "4" and after["PATH"] == before["PATH"]


def notes(flags=(), system="CPU_digits", **variables):
    before = clean(**variables)
    after = system_config.load_configuration(system, before)
    return system_config.overridden_settings(system, before, after, flags)


def test_a_setting_that_a_configuration_overrides_is_reported_with_its_flag():
    assert notes(LR="3", NUMEPOCHS="2 ") == [
        "note: LR=3 from the environment is overridden by config_CPU_digits.sh (LR=4): use --lr 3",
        "note: NUMEPOCHS=2  from the environment is overridden by config_CPU_digits.sh "
        f"(NUMEPOCHS={exported('CPU_digits')['NUMEPOCHS']}): use --num-epochs '2 '",
    ]


def test_a_variable_without_a_flag_is_reported_without():
    (note,) = notes(MXNET_ENGINE_TYPE="ThreadedEngine")
    assert note.endswith("config_CPU_digits.sh (MXNET_ENGINE_TYPE=NaiveEngine): change it there")


def test_epochs_of_the_caller_that_replace_those_of_a_configuration_are_reported():
    """They may be left of another configuration that was sourced in the same shell."""
    note = "note: NUMEPOCHS=90 from the environment replaces NUMEPOCHS=37 of config_DGXA100.sh"
    assert notes(system="DGXA100", NUMEPOCHS="90") == [note]
    assert not notes(system="DGXA100", NUMEPOCHS="37")
    assert not notes(["--num-epochs", "9"], system="DGXA100", NUMEPOCHS="90")


def test_a_variable_that_a_configuration_unsets_is_reported():
    (note,) = notes(system="DGXA100", NCCL_GRAPH_REGISTER="1")
    assert "config_DGXA100.sh (unset NCCL_GRAPH_REGISTER): change it there" in note


def test_what_is_not_overridden_is_not_reported():
    assert not notes(LR="4", DGXNGPU="1", DATAROOT="/x", SEED="3", THR="", OMP_NUM_THREADS="1")
    assert not notes(["--lr", "5"], LR="3") and not notes(["--lr=5"], LR="3")
    assert not notes(SHELL="/bin/sh", PWD="/tmp", SHLVL="9", OMPI_MCA_mpi_yield_when_idle="0")


def test_a_rank_gets_settings_and_library_variables_and_nothing_else():
    environ = {
        **clean(SECRET_TOKEN="x", KUBERNETES_PORT="y", LD_LIBRARY_PATH="z", WALLTIME="9"),
        **{"LR": "4", "DGXSYSTEM": "CPU", "TRIAL": "2", "BIND": "", "SUBMISSION_ORG": "Us"},
        **{"NCCL_DEBUG": "INFO", "MXNET_HOME": "/m", "MALLOC_ARENA_MAX": "1"},
    }
    names = ["BIND", "DGXSYSTEM", "LR", "MALLOC_ARENA_MAX", "MXNET_HOME", "NCCL_DEBUG"]
    names += ["SUBMISSION_ORG", "TRIAL"]
    assert system_config.forwarded_env(environ) == names
    assert system_config.forwarded_env(environ, ["PATH", "ABSENT"]) == sorted([*names, "PATH"])


@pytest.mark.parametrize(
    "flags, environ",
    [(["--log-file", "x"], {}), (["--log-file=x"], {}), ([], {"LOG_FILE": "x"})],
)
def test_another_log_file_is_refused(flags, environ):
    with pytest.raises(UserError, match="LOGDIR"):
        system_config.reject_log_file(flags, environ)
    system_config.reject_log_file(["--log-files"], {"LOG_FILE": ""})


def test_ranks_of_a_configuration():
    assert system_config.number_of_ranks({"DGXNGPU": "8", "DGXNNODES": "2"}) == 16
    assert system_config.number_of_ranks({"DGXNGPU": "8"}) == 8
    with pytest.raises(UserError, match="DGXNGPU= ranks"):
        system_config.number_of_ranks({})
