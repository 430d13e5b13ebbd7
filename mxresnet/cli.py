# SPDX-License-Identifier: Apache-2.0
"""The door: settings in, one rank of a run out, and what is said when something is wrong. Wires, does no work itself.

Exit status: 0 target reached, or nothing evaluated, 3 target missed, 2 a mistake in settings or data, 1 anything else.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import sys
import traceback
from typing import List, Optional, Sequence, Tuple

from mxresnet import config as settings
from mxresnet.config import Config
from mxresnet.errors import UserError
from mxresnet.parallel.world import (
    CollectiveUserError,
    World,
    catch_user_error,
    join,
    launched_rank,
    rank_seeds,
    start_horovod,
)

REACHED, FAILED, MISTAKE, MISSED = 0, 1, 2, 3


def start_log(config: Config, rank: int) -> None:
    """The lines that come before anything that takes time. Raises UserError when --log-file cannot be written."""
    from mxresnet import mllog

    if rank == 0:
        if config.log_file:
            mllog.open_file(config.log_file)
        mllog.header(config)
    mllog.init_start()


def notes(config: Config, has_manifests: bool, backend: str) -> List[str]:
    """What a reader of the result must know of where the images came from."""
    said = []
    if not has_manifests:
        said.append(
            "the data set has no manifest (train.json, val.json): its counts are taken from the settings"
        )
    if backend == "synthetic":
        said.append("random images (--synth-data): nothing is learned or evaluated")
    if backend == "image_record_iter":
        said.append(
            "images come from MXNet's ImageRecordIter, not DALI: it resizes without antialiasing, which may change accuracy a little"
        )
    return said


def train(config: Config, world: World) -> Optional[bool]:
    """One rank of a run, from before MXNet is loaded to the end; return whether the target was reached, or None."""
    from mxresnet import lr_schedule, mllog, profiling, progress, train_loop
    from mxresnet.data import dataset, loader

    def look() -> Tuple[dataset.DataSet, lr_schedule.Plan]:
        if config.expected_ranks not in (0, world.size):
            raise UserError(
                f"{world.size} ranks were started and EXPECTED_RANKS is {config.expected_ranks}: the launcher and MPI do not "
                "agree on the machines (mpirun --version: Open MPI 4 is needed)"
            )
        data = dataset.describe(config)
        if config.top_k > data.classes:
            raise UserError(
                f"--top-k {config.top_k} is above the {data.classes} classes of the data set"
            )
        return data, lr_schedule.make_plan(config, data.train_examples, world.size)

    data, plan = world.run_on_all_ranks(look)
    backend = loader.load_backend(config)
    world = start_horovod(world)
    seed = world.broadcast(secrets.randbelow(2**16) if config.seed is None else config.seed)
    config = dataclasses.replace(config, seed=seed)
    my_seed = rank_seeds(seed, world.size)[world.rank]

    from mxresnet.model.select_ops import cudnn_bn_unavailable_reason, ignored_settings
    from mxresnet.trainer import Trainer, check_device, choose_device, seed_everything

    device = world.run_on_all_ranks(lambda: choose_device(config, world))
    # Before the first draw: a device may be tried here, and by another process before this one has it for itself (a GPU in
    # exclusive mode). All ranks do what the first with a problem must.
    problems = world.gather(cudnn_bn_unavailable_reason(config, device))
    without_extension = world.broadcast(next(filter(None, problems), ""))
    world.run_on_all_ranks(lambda: check_device(device))
    seed_everything(my_seed)
    log_files = [open(config.log_file, "a")] if config.log_file and world.rank == 0 else []
    shown = progress.Progress(
        plan,
        data.train_examples,
        config.batch_size * world.size,
        config.disp_batches,
        world.rank,
        [sys.stderr, *log_files],
    )
    shown.say(
        f"ResNet-{config.num_layers}, {world.size} x {device.device_type}, batch {config.batch_size} a rank, seed {seed}: "
        f"{data.train_examples:,} training and {data.val_examples:,} validation images of {data.classes:,} classes, "
        f"{plan.steps_per_epoch:,} steps an epoch"
    )
    for text in notes(config, data.has_manifests, loader.choose_backend(config)) + ignored_settings(
        config, device.device_type == "gpu", without_extension
    ):
        shown.say(f"note: {text}")
    trainer = world.run_on_all_ranks(
        lambda: Trainer(config, plan, world, data.classes, device, without_extension)
    )
    pipelines = loader.DataLoaders(backend, config, data, world, device, my_seed)
    timer = profiling.Timing(config, trainer.wait)
    reached = train_loop.run(
        config, data, plan, world, mllog.RunLog(world.rank), shown, trainer, pipelines, timer
    )
    trainer.wait()
    world.shutdown()
    return reached


def main(argv: Optional[Sequence[str]] = None) -> int:
    parsed, problem = catch_user_error(
        lambda: settings.parse(sys.argv[1:] if argv is None else argv, os.environ)
    )
    config, only_print = parsed or (None, False)
    if only_print:
        print(settings.to_json(config))
        return REACHED
    if config:
        _, problem = catch_user_error(lambda: start_log(config, launched_rank() or 0))
    alive = config or Config()
    try:
        world = join(alive.watchdog_period, alive.watchdog_limit)
    except Exception:
        sys.stderr.write(
            f"mxresnet: rank {launched_rank()} failed to join the others:\n{traceback.format_exc()}"
        )
        sys.stderr.flush()
        os._exit(FAILED)  # not through MPI's own end, which may wait for the others
    try:
        world.raise_if_any_failed(problem)
        return MISSED if train(config, world) is False else REACHED
    except CollectiveUserError as error:
        # Without MPI's agreement every rank is the first of a world of its own; the launcher knows better.
        if not (launched_rank() or world.rank):
            sys.stderr.write(f"mxresnet: {error}\n")
            sys.stderr.flush()
        world.barrier()  # a launcher that sees another rank end may kill rank 0 before it has spoken
        world.stop_watchdog()
        return MISTAKE
    except UserError as error:
        sys.stderr.write(f"mxresnet: {error}\n")
        world.abort(MISTAKE)
        return MISTAKE
    except BaseException as error:
        world.wait_if_secondary_failure(error)
        sys.stderr.write(f"mxresnet: rank {world.rank} failed:\n{traceback.format_exc()}")
        world.abort(FAILED)
        return FAILED
