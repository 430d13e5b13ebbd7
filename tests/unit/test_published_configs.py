# SPDX-License-Identifier: Apache-2.0
"""Published configurations: their values against the submitters' files and logs.

tests/golden/make_published_configs.py made the file of these from the public v2.1 results.
"""

import dataclasses
import json

import pytest
from support.commands import ROOT
from support.launchers import exported

from mxresnet.config import FIELDS
from mxresnet.config_parser import parse
from mxresnet.mllog import RunLog
from mxresnet.run_plan import make_plan

TRAIN_IMAGES = 1281167
PUBLISHED = json.loads((ROOT / "tests" / "golden" / "published_configs.json").read_text())
FIELD_OF = {field.metadata["env"]: name for name, field in FIELDS.items()}
# Steps of an epoch, warm-up and run; learning rates of some updates. Counted by hand.
STEPS = {
    "A30_1x2x204": (3141, 6282, 116217),
    "DGXA100_4gpu": (393, 786, 14541),
    "DGXA100": (393, 786, 14541),
    "DGXA100_multi_8x8x51": (393, 786, 14541),
    "DGXA100_multi_128x8x35": (36, 612, 2160),
    "DGXA100_multi_527x8x16xgbn2_larsv2": (19, 589, 1710),
    "A100-40GB_4gpu": (1252, 2504, 46324),
    "A100-40GB_8gpu": (786, 1572, 29082),
    "A100-80GB_4gpu": (786, 1572, 29082),
    "A100-PCIe-80GB_4gpu": (786, 1572, 29082),
}
RATES = {
    "DGXA100": {1: 0.013359, 13755: 0.034385},
    "A100-40GB_4gpu": {1: 0.002396, 43820: 0.019692},
}
# Variables of the submitters' files that describe their machines or start their own scripts.
NOT_COMPARED = {
    *("DGXNSOCKET", "DGXSOCKETCORES", "DGXHT", "WALLTIME", "RUN_NCCL_BW_TEST"),
    *("NCCL_SOCKET_IFNAME", "OMPI_MCA_btl_openib_if_include", "UCX_NET_DEVICES"),
}
# Deliberate differences from the files, each with its reason in the configuration.
DIFFERENT = {
    # The source is a pair of machines with four GPUs each.
    "A100-40GB_8gpu": {
        "DGXNNODES": "1",
        "DGXNGPU": "8",
        "NCCL_MAX_RINGS": None,
        "MXNET_DETERMINISTIC": None,
    },
    # Lenovo's file and log; the rings are Dell's. Lenovo's machine ran four ranks of a file for 8.
    "A100-40GB_4gpu": {"DGXNGPU": "4", "NCCL_MAX_RINGS": "4"},
}
# Variables that the submitters' files do not set, where NVIDIA's run_and_time.sh or Dockerfile has
# a constant or default, or this project a setting of its own.
CONSTANTS = {
    "NUM_LAYERS": 50,
    "DTYPE": "float16",
    "IMAGE_SHAPE": (4, 224, 224),
    "INPUT_LAYOUT": "NHWC",
    "CONV_LAYOUT": "NHWC",
    "BATCHNORM_LAYOUT": "NHWC",
    "POOLING_LAYOUT": "NHWC",
    "BATCHNORM_EPS": 1e-5,
    "BATCHNORM_MOM": 0.9,
    "FUSE_BN_RELU": 1,
    "FUSE_BN_ADD_RELU": 1,
    "CONV_ALGO": 1,
    "FORCE_TENSOR_CORE": 1,
    "MIN_RANDOM_AREA": 0.05,
    "MAX_RANDOM_AREA": 1,
    "THR": 0.759,
    "DISP_BATCHES": 20,
    "RESIZE": 256,
}
# Flags of the log that are no settings here: dead in the benchmark, its process numbers, or counts
# that this project takes from the manifest.
NOT_SETTINGS = {
    *("custom_bn_off", "dali_bytes_per_sample_hint", "epoch_size", "initializer", "log"),
    *("logging_dir", "model_prefix", "profile_server_suffix", "save_period", "local_rank"),
}
FROM_MANIFEST = {"num_classes", "num_examples", "num_val_examples"}
OF_THE_RUN = {"seed", "gpus", "data_train", "data_train_idx", "data_val", "data_val_idx"}
# The 22.05 container of these submitters parsed the variable to None: no graph of a whole step.
NONE_MEANS_ZERO = {"e2e_cuda_graphs"}


def effective(system):
    """Return the settings of a configuration by field, and all that it exports."""
    values = exported(system)
    return dataclasses.asdict(parse([], values)[0]), values


def same(found, published):
    """Compare a value with the text in a submitter's file."""
    try:
        return float(found) == float(published)
    except (TypeError, ValueError):
        return str(found) == published


@pytest.mark.parametrize("system", PUBLISHED)
def test_every_exported_value_is_the_published_one(system):
    settings, values = effective(system)
    expected = {**PUBLISHED[system]["exports"], **DIFFERENT.get(system, {})}
    for name in expected.keys() - NOT_COMPARED:
        found = settings[FIELD_OF[name]] if name in FIELD_OF else values.get(name)
        assert same(found, expected[name]) or found is expected[name] is None, name


@pytest.mark.parametrize("system", PUBLISHED)
def test_constants_are_those_of_the_benchmark(system):
    settings, _ = effective(system)
    assert {name: settings[FIELD_OF[name]] for name in CONSTANTS} == CONSTANTS


@pytest.mark.parametrize("system", [name for name in PUBLISHED if PUBLISHED[name]["logs"]])
def test_every_logged_flag_is_the_setting_of_the_same_name(system):
    settings, _ = effective(system)
    settings["image_shape"] = ",".join(map(str, settings["image_shape"]))
    for log in PUBLISHED[system]["logs"]:
        skipped = NOT_SETTINGS | FROM_MANIFEST | OF_THE_RUN
        for name in log["flags"].keys() - skipped:
            value = log["flags"][name]
            if value is None and name in NONE_MEANS_ZERO:
                value = 0
            assert settings[name] == value, (log["file"], name)


class RecordingLog(RunLog):
    """A log that stores the keys and values of its lines."""

    def __init__(self):
        self.lines = []

    def write(self, kind, key, value, metadata, depth=0):
        self.lines.append([key, value])


@pytest.mark.parametrize("system", [name for name in PUBLISHED if PUBLISHED[name]["logs"]])
def test_logged_hyperparameters_have_the_published_order_and_values(system):
    config, _ = parse([], exported(system))
    facts = PUBLISHED[system]
    ranks = facts["nodes"] * facts["gpus"]
    log = RecordingLog()
    log.initialization(1, config.batch_size * config.bn_group, [])
    log.hyperparameters(config, make_plan(config, TRAIN_IMAGES, ranks), ranks)
    assert log.lines[0] == ["seed", 1]
    for published in facts["logs"]:
        assert log.lines[1:] == published["keys"], published["file"]


@pytest.mark.parametrize("system", PUBLISHED)
def test_epochs_and_learning_rates_are_the_published_ones(system):
    values, facts = exported(system), PUBLISHED[system]
    assert (int(values["DGXNNODES"]), int(values["DGXNGPU"])) == (facts["nodes"], facts["gpus"])
    config, _ = parse([], values)
    plan = make_plan(config, TRAIN_IMAGES, facts["nodes"] * facts["gpus"])
    assert (plan.steps_per_epoch, plan.schedule.warmup_steps, plan.total_steps) == STEPS[system]
    _, warm, total = STEPS[system]
    for update, rate in RATES.get(system, {}).items():
        assert plan.learning_rate(update) == pytest.approx(rate, abs=5e-7)
    assert plan.learning_rate(warm // 2) == pytest.approx(config.lr * (warm // 2) / warm, rel=1e-9)
    assert plan.learning_rate(warm) == pytest.approx(config.lr, rel=1e-9)
    middle = (warm + total) // 2
    left = (total - middle) / (total - warm)
    assert plan.learning_rate(middle) == pytest.approx(
        1e-4 + (config.lr - 1e-4) * left * left, rel=1e-9
    )
    assert plan.learning_rate(total) == pytest.approx(1e-4, rel=1e-9)
    evaluated = [block.last_epoch for block in plan.blocks if block.evaluated]
    for log in facts["logs"]:
        assert evaluated[: len(log["evaluated"])] == log["evaluated"]
