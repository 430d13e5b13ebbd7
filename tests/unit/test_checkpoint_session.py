# SPDX-License-Identifier: Apache-2.0
"""When checkpoints are written, and what happens when one cannot be; one rank, a tiny network."""

import io
import os
import resource
import shutil
import signal

import numpy as np
import pytest

from mxresnet import mllog
from mxresnet.checkpoint import opening, store
from mxresnet.checkpoint.manifest import Position
from mxresnet.checkpoint.state import InputState, NetworkState, OwnState
from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.errors import Interrupted
from mxresnet.parallel.world import World
from mxresnet.progress import Progress
from mxresnet.run_plan import make_plan

DATA = DataSet(20, 8, 10, has_manifests=True)


class TinyTrainer:
    """A network of one large weight."""

    has_channel_last_weights = False

    def __init__(self, size=1000):
        self.weights = {"w": np.zeros(size, "f4")}
        self.restored = None

    def symbol_json(self):
        return "{}"

    def network_state(self):
        return NetworkState({"w": self.weights["w"].copy()}, {}, updates=4)

    def own_state(self):
        return OwnState({"m": np.ones(1, "f4")}, (1.5, 2))

    def restore(self, network, own):
        self.restored = network, own

    def wait(self):
        pass


@pytest.fixture
def make(tmp_path):
    """Return a function that opens a session, with its trainer and progress output."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    locks = []

    def open_session(size=1000, **settings):
        while locks:
            locks.pop().close()
        settings = {"checkpoint_dir": str(tmp_path / "run"), "checkpoint_minutes": 0, **settings}
        config = Config(synth_data=1, seed=3, batch_size=4, **settings)
        session = opening.open_session(config, DATA, World(), "synthetic")
        text = io.StringIO()
        plan = make_plan(config, 20, 1)
        session.start(config, mllog.RunLog(1), Progress(plan, 20, 4, 0, 0, [text]))
        locks.append(session._choice.lock)
        return session, TinyTrainer(size), text

    yield open_session
    for number, handler in handlers.items():
        signal.signal(number, handler)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("lock", "run.json"))


def test_written_resumed_and_finished(make, tmp_path):
    session, trainer, _ = make()
    assert session.resumed is None and not session.due(can_save=True)
    for epoch, accuracy in ((1, 0.5), (2, 0.3), (3, 0.4), (4, 0.1)):
        position = Position(epoch, 5, evaluated=True)
        session.save(position, trainer, InputState({"iterator": {}, "cut": 0}), accuracy)
    session._report(wait=True)
    kept = [f"epoch_00{epoch}_step_000005" for epoch in (1, 3, 4)]  # the best, and the last two
    assert names(tmp_path / "run") == kept
    again, trainer, _ = make()
    assert again.position == Position(4, 5, evaluated=True) and again.accuracy == 0.1
    again.restore(trainer)
    network, own = trainer.restored
    assert network.updates == 4 and own.loss == (1.5, 2)
    again.finish("aborted")
    assert names(tmp_path / "run") == [kept[0], kept[2]]
    assert store.read_run(str(tmp_path / "run")).outcome == "aborted"
    anew, _, _ = make()
    assert anew.resumed is None and anew._choice.folder == str(tmp_path / "run" / "run_2")


def test_new_checkpoints_are_kept_beside_damaged_ones_of_later_positions(make, tmp_path):
    session, trainer, _ = make()
    for step in (1, 8, 9):
        session.save(Position(1, step), trainer, InputState())
        session._report(wait=True)
        if step == 1:
            (tmp_path / "run" / "epoch_001_step_000001").rename(tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / "run" / "epoch_001_step_000001")
    for step in (8, 9):
        (tmp_path / "run" / f"epoch_001_step_00000{step}" / "optimizer.npz").write_bytes(b"")
    for steps in ((2,), (3, 4), (5,)):
        session, trainer, _ = make()
        assert session.position == Position(1, steps[0] - 1)
        for step in steps:
            session.save(Position(1, step), trainer, InputState())
        session._report(wait=True)
    assert names(tmp_path / "run") == [f"epoch_001_step_00000{step}" for step in (4, 5, 8, 9)]
    session.finish("success")
    assert names(tmp_path / "run")[0] == "epoch_001_step_000005"


def test_checkpoints_that_were_removed_meanwhile_do_not_end_the_run(make, tmp_path):
    session, trainer, text = make()
    session.save(Position(1, 5), trainer, InputState())
    session._report(wait=True)
    (name,) = names(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / name)
    session.finish("success")
    assert store.read_run(str(tmp_path / "run")).outcome == "success" and text.getvalue() == ""


def test_sigterm_writes_a_checkpoint_and_ends_the_run(make, tmp_path):
    session, trainer, text = make()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not session.due(can_save=False)  # amid a result of the input
    assert session.due(can_save=True)
    with pytest.raises(Interrupted):
        session.save(Position(1, 2), trainer, InputState())
    assert names(tmp_path / "run") == ["epoch_001_step_000002"]
    assert "stopped by SIGTERM" in text.getvalue()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends it at once


def test_sigterm_where_the_input_cannot_be_saved(make):
    session, _, _ = make()
    os.kill(os.getpid(), signal.SIGUSR2)
    with pytest.raises(Interrupted):
        session.due(can_save=False, can_save_soon=False)


def test_a_file_that_cannot_be_written_leaves_one_warning_and_nothing_else(make, tmp_path):
    """The size of a file is limited, which is an error in the middle of a checkpoint."""
    session, trainer, text = make(size=1 << 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        session.save(Position(1, 1), trainer, InputState())
        session._report(wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = text.getvalue().splitlines()
    assert line.startswith("warning: checkpoint epoch_001_step_000001 could not be written (")
    assert names(tmp_path / "run") == []
    session.save(Position(1, 2), trainer, InputState())
    session._report(wait=True)
    assert names(tmp_path / "run") == ["epoch_001_step_000002"]


def test_the_log_is_on_the_disk_before_the_checkpoint_is(make, tmp_path, monkeypatch):
    """After a crash of the machine, the log has at least what it had at the checkpoint."""
    log, written, fsync = tmp_path / "run.log", [], os.fsync
    log.write_text("epoch 1\n")
    session, trainer, _ = make(log_file=str(log))

    def note(descriptor):
        written.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    session.save(Position(1, 1), trainer, InputState())
    session._report(wait=True)
    (manifest,) = [path for path in written if path.endswith("manifest.json.part")]
    assert written.index(str(log)) < written.index(manifest)


def test_a_full_disk_is_noticed_before(make, tmp_path, monkeypatch):
    session, trainer, text = make()
    full = os.statvfs_result([4096, 4096, 10, 10, 10, 0, 0, 0, 0, 255])
    monkeypatch.setattr(store.os, "statvfs", lambda path: full)
    session.save(Position(1, 1), trainer, InputState())
    session._report(wait=True)
    assert "0 MiB free" in text.getvalue() and names(tmp_path / "run") == []


def test_the_time_makes_a_checkpoint_due(make):
    session, _, _ = make(checkpoint_minutes=10)
    assert not session.due(can_save=True)
    session._last_time -= 601
    assert session.due(can_save=True)


class OtherRanksRequestNothing:
    """The part of a communicator of mpi4py that the exchange of requests uses."""

    def Iallreduce(self, sent, sums):  # noqa: N802 (mpi4py's name)
        sums[:] = sent
        return self

    def Wait(self):  # noqa: N802 (mpi4py's name)
        pass


@pytest.mark.parametrize("save_of_the_epoch", [False, True])
def test_of_several_ranks_a_request_makes_one_checkpoint(make, save_of_the_epoch):
    """A request takes a step to arrive, and the next one is under way by then."""
    session, trainer, _ = make(checkpoint_minutes=10)
    session._requests._communicator = OtherRanksRequestNothing()
    session._last_time -= 601
    saved = []
    for step in range(1, 7):
        due = session.due(can_save=True)
        if due or (save_of_the_epoch and step == 1):
            session.save(Position(1, step), trainer, InputState())
            saved.append(step)
    assert saved == ([1] if save_of_the_epoch else [2])
    session._report(wait=True)
    session._last_time -= 601
    assert [session.due(can_save=True) for _ in range(2)] == [False, True]


@pytest.mark.slow
def test_memory_does_not_grow_over_200_checkpoints(make):
    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    session, trainer, _ = make(size=4 << 20)
    sizes = []
    for step in range(200):
        session.save(Position(1, step + 1), trainer, InputState())
        sizes.append(resident_bytes())
    session._report(wait=True)
    assert max(sizes[-20:]) < max(sizes[10:30]) + (8 << 20)
