# SPDX-License-Identifier: Apache-2.0
"""The log has the events of one run, also where its earlier part cannot be continued."""

from support.mlperf_log import log_lines
from support.resumable_run import Run, assert_same_result


def assert_log_of_one_run(run):
    keys = [line["key"] for line in log_lines(run.log.read_text())]
    for key in ("submission_org", "init_start", "seed", "run_start", "run_stop"):
        assert keys.count(key) == 1, key
    assert keys[0] == "submission_benchmark" and keys.count("eval_accuracy") == 2


def test_the_earlier_log_cannot_be_continued(few, tmp_path):
    """The run is killed before its first checkpoint, then after one; then its log is edited."""
    run = Run(tmp_path, few, "--seed", "3")
    run.killed("--checkpoint-minutes", "0", kill_step=2, KILL_WAIT="0")
    assert not run.resumed()
    run.killed(kill_step=9)
    run.log.write_text(run.log.read_text().replace("seed 3", "seed three"))
    run.finish()
    assert len(run.resumed()) == 1
    assert_log_of_one_run(run)
    whole = Run(tmp_path / "whole", few, "--seed", "3")
    whole.finish()
    assert_same_result(run, whole)
