# SPDX-License-Identifier: Apache-2.0
"""Findings about what differs from the published systems of a kind, and about speed."""

from __future__ import annotations

import statistics
from typing import Iterator, List, Optional, Sequence

from mxresnet.results.finding import NOTICE, Finding, Subject, mean_of, named_runs
from mxresnet.results.published_round import ROUND, accuracy_band, same_batch
from mxresnet.results.run_figures import SETTINGS, RunFigures

MIN_BAND_RUNS = 5
MAX_DRIFT = 0.03
MIN_SHARE_OF_KIND = 0.97  # of the throughput of the slowest system of the kind
MAX_RATIO_TO_KIND = 1.5  # of evaluation and initialization times to the longest of the kind
MAX_SLOW_EPOCH = 0.9  # of the median throughput
MAX_RANK_RATIO = 1.05
MAX_INPUT_SHARE = 0.05

# Settings of published runs with the same batch: key of the log, column of the data.
_COMPARED = {
    "lars_opt_base_learning_rate": "base_lr",
    "lars_opt_weight_decay": "weight_decay",
    "lars_opt_momentum": "momentum",
    "lars_opt_learning_rate_warmup_epochs": "warmup_epochs",
    "model_bn_span": "bn_span",
}


def check_settings_of_round(subject: Subject) -> Iterator[Finding]:
    first = subject.runs[0]
    same = same_batch(first.number("global_batch_size"))
    if not same or not first.is_imagenet:
        return
    for key, column in _COMPARED.items():
        ours = first.number(key)
        theirs = sorted({float(system.settings[column]) for system in same})
        if ours is not None and theirs and ours not in theirs:
            listed = ", ".join(f"{value:g}" for value in theirs)
            yield Finding(
                NOTICE,
                f"The {SETTINGS[key]} is {ours:g}; no published system with this global batch "
                "has it.",
                f"{len(same)} systems of {ROUND} with batch {same[0].global_batch}: {listed}",
            )


def check_accuracy(subject: Subject) -> Iterator[Finding]:
    band = {
        point.epoch: point
        for point in accuracy_band(subject.runs[0].number("global_batch_size"))
        if point.runs >= MIN_BAND_RUNS
    }
    for run, name in zip(subject.runs, subject.names):
        off = []
        for one in run.evaluations if run.is_imagenet else []:
            point = band.get(one.epoch)
            if not point or point.low <= one.accuracy <= point.high:
                continue
            if abs(one.accuracy - point.mean) > 3 * point.sd:
                side = "below" if one.accuracy < point.mean else "above"
                off.append(
                    f"epoch {one.epoch}: {one.accuracy:.4f}, {side} {point.low:.4f} to "
                    f"{point.high:.4f} ({point.runs} runs)"
                )
        if off:
            yield Finding(
                NOTICE,
                "The accuracy is outside the band of published runs with this batch.",
                "; ".join(off[:4]),
                "Low from the start: check data and learning rate. Low at the end: weight decay.",
                name,
            )


def _later_speeds(run: RunFigures) -> List[float]:
    """Return the throughput of the epochs after the first."""
    return [epoch.images_per_second for epoch in run.epochs[1:] if epoch.images_per_second]


def check_drift(subject: Subject) -> Iterator[Finding]:
    for run, name in zip(subject.runs, subject.names):
        speeds = _later_speeds(run)
        if len(speeds) < 8 or not run.log_throughput_is_plausible:
            continue
        quarter = len(speeds) // 4
        first, last = (statistics.median(part) for part in (speeds[:quarter], speeds[-quarter:]))
        if abs(last / first - 1) > MAX_DRIFT:
            word = "falls" if last < first else "rises"
            yield Finding(
                NOTICE,
                f"Throughput {word} during the run.",
                f"by {abs(last / first - 1):.1%}, from {first:,.0f} images/s in the first quarter "
                f"to {last:,.0f} in the last",
                "Look at clocks and temperatures." if last < first else "",
                name,
            )
        middle = statistics.median(speeds)
        slow = [
            epoch
            for epoch in run.epochs[1:]
            if epoch.images_per_second and epoch.images_per_second < MAX_SLOW_EPOCH * middle
        ]
        if slow:
            listed = ", ".join(f"{e.epoch} ({e.images_per_second or 0:,.0f})" for e in slow[:6])
            yield Finding(
                NOTICE,
                "Epochs are more than 10 % slower than the median.",
                f"median {middle:,.0f} images/s; slow epochs: {listed}",
                "Look for other load, slow storage or a slow machine at that time.",
                name,
            )


def check_throughput(subject: Subject) -> Iterator[Finding]:
    speed = mean_of([run.images_per_second for run in subject.runs])
    each = [peer.images_per_second_each for peer in subject.peers]
    known = [value for value in each if value is not None]
    if speed is None or not subject.accelerators or not known:
        return
    ours = speed / subject.accelerators
    if ours < MIN_SHARE_OF_KIND * min(known):
        yield Finding(
            NOTICE,
            f"Throughput is {1 - ours / min(known):.0%} below the slowest published system of this "
            "kind.",
            f"{ours:,.0f} images/s per accelerator; {ROUND}: {min(known):,.0f} to "
            f"{max(known):,.0f}",
            "Compare step times and input waits, clocks, and links between the accelerators.",
        )


def _longer(
    subject: Subject, what: str, ours: Optional[float], theirs: Sequence[float]
) -> Iterator[Finding]:
    if ours is not None and theirs and ours > MAX_RATIO_TO_KIND * max(theirs):
        yield Finding(
            NOTICE,
            f"{what} takes {ours / max(theirs):.1f} x the longest of its kind.",
            f"{ours:,.1f} s; {ROUND}: {min(theirs):,.1f} to {max(theirs):,.1f} s",
        )


def check_evaluation(subject: Subject) -> Iterator[Finding]:
    seconds = [one.seconds for run in subject.runs for one in run.evaluations]
    theirs = [peer.eval_seconds for peer in subject.peers]
    yield from _longer(subject, "An evaluation", mean_of(seconds), theirs)


def check_initialization(subject: Subject) -> Iterator[Finding]:
    seconds = [run.init_to_run_seconds for run in subject.runs]
    theirs = [peer.init_seconds for peer in subject.peers]
    yield from _longer(subject, "Initialization", mean_of(seconds), theirs)


def check_ranks(subject: Subject) -> Iterator[Finding]:
    for run, name in zip(subject.runs, subject.names):
        times = run.step_times
        slowest, middle, waiting = times.slowest, times.median_p50_ms, times.longest_wait
        if slowest and middle and slowest.p50_ms > MAX_RANK_RATIO * middle:
            yield Finding(
                NOTICE,
                "One rank is slower than the others, which wait for it.",
                f"rank {slowest.rank}: median step {slowest.p50_ms:.1f} ms, "
                f"{slowest.p50_ms / middle - 1:.0%} above the median rank's {middle:.1f} ms",
                "Look at the clock, temperature and CPUs of its accelerator.",
                name,
            )
        if waiting and run.train_seconds:
            share = waiting.input_wait_seconds / run.train_seconds
            if share > MAX_INPUT_SHARE:
                yield Finding(
                    NOTICE,
                    "Training waits for images.",
                    f"{share:.0%} of the training time: rank {waiting.rank} waits "
                    f"{waiting.input_wait_seconds:.0f} s of {run.train_seconds:.0f} s",
                    "More DALI threads, faster storage, or the data in the page cache.",
                    name,
                )


def check_log_throughput(subject: Subject) -> Iterator[Finding]:
    odd = named_runs(subject, lambda run: not run.log_throughput_is_plausible)
    if odd:
        run = next(run for run in subject.runs if not run.log_throughput_is_plausible)
        yield Finding(
            NOTICE,
            "The throughput in the log contradicts the run's time.",
            f"{odd}: {run.images_per_second or 0:,.0f} images/s logged, "
            f"{run.effective_images_per_second or 0:,.0f} from images and time",
            "The clock of rank 0 runs ahead of the device; use the second number.",
        )
