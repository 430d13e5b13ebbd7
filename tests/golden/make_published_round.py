#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the CSV files of mxresnet/results/published from the logs of MLPerf Training v2.1.

v2.1_resnet.csv has one row for each ResNet result of the round, v2.1_resnet_accuracy.csv the
accuracies of all its successful runs by global batch and epoch.

    git clone https://github.com/mlcommons/training_results_v2.1
    python tests/golden/make_published_round.py training_results_v2.1 mxresnet/results/published
"""

import collections
import csv
import glob
import json
import os
import statistics
import sys

from mxresnet.results.official import judge
from mxresnet.results.run_figures import read_figures

COMMENT = (
    "# From the ResNet logs of MLPerf Training v2.1, https://github.com/mlcommons/"
    "training_results_v2.1 (Apache-2.0), by tests/golden/make_published_round.py"
)
ACCURACY_COLUMNS = ["global_batch", "epoch", "runs", "mean", "sd", "min", "max"]


def mean(values):
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def rounded(value, digits):
    return "" if value is None else f"{value:.{digits}f}"


def system_row(folder, runs, verdict):
    """Return the row of one result."""
    parts = folder.split(os.sep)
    submitter, system = parts[-4], parts[-2]
    description = os.path.join(folder, "..", "..", "..", "systems", f"{system}.json")
    with open(description, encoding="utf-8") as file:
        facts = json.load(file)
    nodes, each = int(facts["number_of_nodes"]), int(facts["accelerators_per_node"] or 0)
    reached = [run for run in runs if run.reached]
    first = reached[0]
    later = [run.images_per_second for run in reached]
    if first.epochs and first.epochs[0].source == "block time":
        later = [None]
    return {
        "submitter": submitter,
        "system": system,
        "nodes": nodes,
        "accelerators": nodes * each,
        "accelerator": facts["accelerator_model_name"],
        "framework": facts["framework"],
        "availability": facts["status"],
        "division": first.submission.get("division"),
        "network": first.settings.get("s_network", ""),
        "global_batch": first.settings["global_batch_size"],
        "bn_span": first.settings["model_bn_span"],
        "base_lr": first.settings["lars_opt_base_learning_rate"],
        "warmup_epochs": first.settings["lars_opt_learning_rate_warmup_epochs"],
        "weight_decay": first.settings["lars_opt_weight_decay"],
        "momentum": first.settings["lars_opt_momentum"],
        "decay_steps": first.settings["lars_opt_learning_rate_decay_steps"],
        "failed_runs": len(runs) - len(reached),
        "run_minutes": " ".join(rounded(run.run_seconds / 60, 3) for run in reached),
        "scaling": rounded(verdict.scaling, 7),
        "score_minutes": rounded(verdict.score_minutes, 4),
        "epochs": " ".join(str(run.final_evaluation.epoch) for run in reached),
        "images_per_s": rounded(mean(later), 0),
        "effective_images_per_s": rounded(
            mean([run.effective_images_per_second for run in reached]), 0
        ),
        "eval_seconds": rounded(
            mean([run.eval_seconds / len(run.evaluations) for run in reached]), 3
        ),
        "init_seconds": rounded(mean([run.init_to_run_seconds for run in runs]), 1),
    }


def accuracy_rows(all_runs):
    """Yield a row for each global batch and epoch."""
    found = collections.defaultdict(list)
    for run in all_runs:
        if run.reached:
            for one in run.evaluations:
                found[run.settings["global_batch_size"], one.epoch].append(one.accuracy)
    for (batch, epoch), values in sorted(found.items()):
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        numbers = [statistics.mean(values), spread, min(values), max(values)]
        yield [batch, epoch, len(values), *(f"{number:.5f}" for number in numbers)]


def main(source, target):
    folders = sorted(glob.glob(os.path.join(source, "*", "results", "*", "resnet")))
    series = [
        [read_figures(path) for path in sorted(glob.glob(f"{folder}/result_*.txt"))]
        for folder in folders
    ]
    verdicts = judge(series, ["2.1.0"] * len(series))
    rows = [system_row(*one) for one in zip(folders, series, verdicts)]
    with open(os.path.join(target, "v2.1_resnet.csv"), "w", encoding="utf-8", newline="") as file:
        file.write(COMMENT + "\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path = os.path.join(target, "v2.1_resnet_accuracy.csv")
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(COMMENT + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(ACCURACY_COLUMNS)
        writer.writerows(accuracy_rows([run for runs in series for run in runs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
