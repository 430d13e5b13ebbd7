# SPDX-License-Identifier: Apache-2.0
"""Command-line entry point: parse settings, run one rank, map errors to exit statuses.

It only connects the parts. The order of events in a run is in train_loop.py.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, TextIO, Tuple

from mxresnet import config_parser, environment
from mxresnet.config import Config
from mxresnet.errors import ExitStatus, Interrupted, UserError, exit_now
from mxresnet.parallel.launched import launched_rank, launched_size
from mxresnet.parallel.world import (
    CollectiveUserError,
    World,
    catch_user_error,
    join,
    rank_seeds,
    start_horovod,
)
from mxresnet.standard_streams import check_output

# At run time these are imported when needed: MXNet takes seconds to load, and DALI must be
# loaded before Horovod.
if TYPE_CHECKING:
    from mxresnet.checkpoint.session import Session
    from mxresnet.data.dataset import DataSet
    from mxresnet.model.ops import PlainOps
    from mxresnet.progress import Progress
    from mxresnet.run_plan import Plan


def start_log(config: Config, rank: int) -> Optional[int]:
    """Write the header of the MLPerf log and init_start, before any work that takes time.

    Returns:
        When the process started, milliseconds since 1970, if nothing is written because the log may
        have these lines already, or be that of a running process: rank 0 has found an earlier run.
        Else None.

    Raises:
        UserError: --log-file, or without it standard output, cannot be written.
    """
    from mxresnet import mllog
    from mxresnet.checkpoint import opening

    if rank == 0:
        if opening.is_used(config):
            return int(time.time() * 1000)
        if config.log_file:
            mllog.open_file(config.log_file)
        mllog.header(config)
    mllog.init_start(to_file=bool(config.log_file))
    return None


def continue_log(config: Config, session: Session, start_ms: Optional[int], rank: int) -> None:
    """Write what start_log() has not written, unless the log has it already.

    Raises:
        UserError: the log cannot be written.
    """
    from mxresnet import mllog

    if rank != 0 or start_ms is None:
        return
    session.mark_replaced_log()
    if config.log_file:
        mllog.open_file(config.log_file)
    if not session.log_continues:
        mllog.header(config)
        mllog.init_start(to_file=bool(config.log_file), time_ms=start_ms)


def load_dataset_and_plan(config: Config, num_ranks: int) -> Tuple[DataSet, Plan]:
    """Check the number of ranks and the data set, without reading a record.

    Raises:
        UserError: a setting does not fit the ranks or the data set.
    """
    from mxresnet.data import dataset
    from mxresnet.run_plan import make_plan

    if config.expected_ranks not in (0, num_ranks):
        raise UserError(
            f"{num_ranks} ranks were started and EXPECTED_RANKS is {config.expected_ranks}: the "
            "launcher and MPI do not agree on the machines (mpirun --version: Open MPI 4 is needed)"
        )
    launched = launched_size()
    if launched not in (None, num_ranks):
        raise UserError(
            f"the launcher started {launched} ranks and MPI has connected {num_ranks}, so that "
            "each would train for itself: use mpirun of Open MPI 4, or srun --mpi=pmix"
        )
    data = dataset.describe(config)
    if config.top_k > data.classes:
        raise UserError(
            f"--top-k {config.top_k} is above the {data.classes} classes of the data set"
        )
    return data, make_plan(config, data.train_examples, num_ranks)


def data_notes(config: Config, data: DataSet, backend: str) -> List[str]:
    """Return one note for each way in which the input differs from the benchmark's."""
    notes = []
    if not data.has_manifests:
        notes.append(
            "the data set has no manifest (train.json, val.json): its counts are taken from the "
            "settings"
        )
    if not data.has_sums:
        notes.append(
            "a manifest of the data set (train.json, val.json) is of version 1, which has no sum "
            "of its own: not all damage in it can be noticed"
        )
    if backend == "synthetic":
        notes.append("random images (--synth-data): nothing is learned or evaluated")
    if backend == "image_record_iter":
        notes.append(
            "images come from MXNet's ImageRecordIter, not DALI: it resizes without antialiasing, "
            "which may change accuracy a little"
        )
    return notes


def start_progress(
    config: Config, data: DataSet, plan: Plan, world: World, device: Any, notes: List[str]
) -> Progress:
    """Open the progress output and describe the run in it.

    Raises:
        UserError: --log-file cannot be opened any more.
    """
    from mxresnet.progress import Progress

    streams: List[TextIO] = [sys.stderr]
    if config.log_file and world.rank == 0:
        try:
            # Open until the process ends.
            streams.append(open(config.log_file, "a"))  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"--log-file {config.log_file} cannot be written ({error.strerror}): its folder "
                "was moved, removed or changed"
            ) from None
    progress = Progress(
        plan,
        data.train_examples,
        config.batch_size * world.size,
        config.disp_batches,
        world.rank,
        streams,
    )
    progress.write_line(
        f"ResNet-{config.num_layers}, {world.size} x {device.device_type}, batch "
        f"{config.batch_size} a rank, seed {config.seed}: {data.train_examples:,} training and "
        f"{data.val_examples:,} validation images of {data.classes:,} classes, "
        f"{plan.steps_per_epoch:,} steps an epoch"
    )
    for note in notes:
        progress.write_line(f"note: {note}")
    return progress


def choose_device_and_ops(config: Config, world: World) -> Tuple[Any, PlainOps, List[str]]:
    """Return this rank's device, the operator backend, and notes on settings without effect.

    Raises:
        UserError: a device cannot be used or does not fit the settings.
    """
    from mxresnet.device import check_device, choose_device, disable_unsupported_fusion
    from mxresnet.model import select_ops

    device = world.run_on_all_ranks(lambda: choose_device(config, world))
    on_gpu = device.device_type == "gpu"
    # The self-test of the batch norms runs in another process. It comes before anything else uses
    # the device, because a GPU in exclusive mode accepts one process at a time. Either all ranks
    # use these batch norms or none does.
    reasons = world.gather(select_ops.cudnn_bn_unavailable_reason(config, device))
    cudnn_bn_reason = world.broadcast(next(filter(None, reasons), None))
    world.run_on_all_ranks(lambda: check_device(device))
    ops = select_ops.select_ops(config, on_gpu, cudnn_bn_reason)
    notes = select_ops.ignored_settings(config, ops, on_gpu, cudnn_bn_reason)
    changes = [
        select_ops.disable_cuda_graphs(ops, on_gpu, os.environ),
        disable_unsupported_fusion(device, os.environ),
    ]
    return device, ops, [*notes, *filter(None, changes)]


def train(config: Config, world: World, start_ms: Optional[int] = None) -> Optional[bool]:
    """Run one rank; return whether it reached the target, None when nothing was evaluated.

    Args:
        config: the settings.
        world: the ranks.
        start_ms: what start_log() returned.

    Raises:
        Interrupted: SIGTERM came, and a checkpoint is written.
    """
    from mxresnet import mllog, profiling
    from mxresnet.checkpoint import opening
    from mxresnet.data import loader
    from mxresnet.evaluation import initial_weights
    from mxresnet.rank_agreement import check_agreement
    from mxresnet.train_loop import TrainLoop

    data, plan = world.run_on_all_ranks(lambda: load_dataset_and_plan(config, world.size))
    backend = loader.choose_backend(config)
    check_agreement(config, data, backend, world)
    data_backend = loader.load_backend(config)
    world = start_horovod(world)
    session = opening.open_session(config, data, world, backend)
    world.run_on_all_ranks(lambda: continue_log(config, session, start_ms, world.rank))
    init_from = "" if session.position else config.init_from  # a resumed run has weights
    initial = world.run_on_all_ranks(lambda: initial_weights(init_from, data, world.rank))
    seed = session.seed if config.seed is None else config.seed
    seed = world.broadcast(secrets.randbelow(2**16) if seed is None else seed)
    config = dataclasses.replace(config, seed=seed)
    rank_seed = rank_seeds(seed, world.size)[world.rank]
    from mxresnet.trainer import Trainer, seed_everything

    device, ops, ignored = choose_device_and_ops(config, world)
    world.end_loading()
    seed_everything(rank_seed)
    notes = [*data_notes(config, data, backend), *ignored, *session.notes, *initial.notes]
    progress = start_progress(config, data, plan, world, device, notes)
    trainer = world.run_on_all_ranks(
        lambda: Trainer(config, plan, world, data.classes, device, ops)
    )
    trainer.start_from(initial.saved, initial.new_head)
    log = mllog.RunLog(world.rank, has_start=session.log_continues)
    world.run_on_all_ranks(lambda: session.start(config, log, progress))
    data_loaders = loader.DataLoaders(
        data_backend, config, data, world, device, rank_seed, session.is_on, session.input_state
    )
    timing = profiling.Timing(config, trainer.wait)
    loop = TrainLoop(
        config, data, plan, world, log, progress, trainer, data_loaders, timing, session
    )
    try:
        reached, interrupted = loop.run(), None
    except Interrupted as stop:
        reached, interrupted = None, stop
    trainer.wait()
    world.shutdown()
    if interrupted:
        raise interrupted
    return reached


def evaluate(config: Config, world: World) -> Optional[bool]:
    """Evaluate a checkpoint on all ranks, and print its accuracy on rank 0; write no MLPerf log."""
    from mxresnet import evaluation
    from mxresnet.data import loader
    from mxresnet.rank_agreement import check_agreement

    data, plan = world.run_on_all_ranks(lambda: load_dataset_and_plan(config, world.size))
    check_agreement(config, data, loader.choose_backend(config), world)
    saved = world.run_on_all_ranks(lambda: evaluation.load(config.evaluate, data, world.rank))
    data_backend = loader.load_backend(config)
    world = start_horovod(world)

    from mxresnet.device import has_gpu
    from mxresnet.trainer import Trainer

    config, notes = (config, []) if has_gpu() else evaluation.without_gpu(config)
    device, ops, _ = choose_device_and_ops(config, world)
    world.end_loading()
    if world.rank == 0:
        sys.stderr.write("".join(f"note: {note}\n" for note in notes))
    trainer = world.run_on_all_ranks(
        lambda: Trainer(config, plan, world, data.classes, device, ops)
    )
    trainer.start_from(saved, new_head=False)
    trainer.initialize()
    loaders = loader.DataLoaders(data_backend, config, data, world, device, seed=0)
    _, val_loader = world.run_on_all_ranks(loaders.open)
    score = trainer.evaluate(val_loader.batches(), averages_statistics=False)
    world.run_on_all_ranks(lambda: evaluation.check_score(score, data))
    if saved:
        sys.stdout.write(evaluation.describe_score(saved, score, config.top_k))
        check_output()
    trainer.wait()
    world.shutdown()
    return None


def join_or_exit(config: Config, config_error: Optional[UserError]) -> World:
    """Return this rank's World. When MPI cannot start, end the process."""
    try:
        return join(config.watchdog_period, config.watchdog_limit)
    except Exception as error:
        reason = config_error or environment.explain(error)
        if reason:
            sys.stderr.write(f"mxresnet: {reason}\n")
        else:
            sys.stderr.write(
                f"mxresnet: rank {launched_rank()} failed to join the others:\n"
                f"{traceback.format_exc()}"
            )
        # Without MPI's cleanup, which may wait for the other ranks.
        exit_now(ExitStatus.USER_ERROR if reason else ExitStatus.FAILURE)


def run_rank(
    config: Config,
    config_error: Optional[UserError],
    world: World,
    work: Optional[Callable[[Config, World], Optional[bool]]] = None,
) -> ExitStatus:
    """Do the work of a rank and return the exit status; on an error, print it and end all ranks.

    Args:
        config: the settings.
        config_error: what is wrong with the settings of this rank.
        world: the ranks.
        work: returns False when the target was missed. Default: train().
    """
    try:
        world.raise_if_any_failed(config_error)
        missed = (work or train)(config, world) is False
        return ExitStatus.TARGET_MISSED if missed else ExitStatus.SUCCESS
    except Interrupted:
        return ExitStatus.TERMINATED
    except CollectiveUserError as error:
        # Every rank gets this error; only rank 0 prints it. When MPI has not connected the ranks,
        # each of them is rank 0 of its own World, so the launcher's rank number is checked too.
        if not (launched_rank() or world.rank):
            sys.stderr.write(f"mxresnet: {error}\n")
            sys.stderr.flush()
        world.barrier()  # if another rank ended first, the launcher might kill rank 0 too early
        world.stop_watchdog()
        return ExitStatus.USER_ERROR
    except UserError as error:
        sys.stderr.write(f"mxresnet: {error}\n")
        world.abort(ExitStatus.USER_ERROR)
        return ExitStatus.USER_ERROR
    except BaseException as error:
        world.wait_if_secondary_failure(error)
        reason = environment.explain(error)
        if reason:
            sys.stderr.write(f"mxresnet: rank {world.rank}: {reason}\n")
            world.abort(ExitStatus.USER_ERROR)
            return ExitStatus.USER_ERROR
        sys.stderr.write(f"mxresnet: rank {world.rank} failed:\n{traceback.format_exc()}")
        world.abort(ExitStatus.FAILURE)
        return ExitStatus.FAILURE


def main(argv: Optional[Sequence[str]] = None) -> ExitStatus:
    """Run the command line and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    parsed, config_error = catch_user_error(lambda: config_parser.parse(arguments, os.environ))
    if config_error is None:
        _, config_error = catch_user_error(lambda: environment.check_environment(os.environ))
    # A rank with wrong settings still joins the others, so that all ranks end together.
    config, only_print = parsed or (Config(), False)
    if config.evaluate and config_error is None:
        from mxresnet.saved_model import evaluation_config

        found, config_error = catch_user_error(
            lambda: evaluation_config(arguments, config.evaluate)
        )
        config = found or config
    if only_print and config_error is None:
        print(config_parser.to_json(config))
        check_output()
        return ExitStatus.SUCCESS
    if config.evaluate:
        return run_rank(config, config_error, join_or_exit(config, config_error), evaluate)
    start_ms = None
    if config_error is None:
        start_ms, config_error = catch_user_error(lambda: start_log(config, launched_rank() or 0))
    world = join_or_exit(config, config_error)
    return run_rank(
        config, config_error, world, lambda config, world: train(config, world, start_ms)
    )
