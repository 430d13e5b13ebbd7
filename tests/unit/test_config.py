# SPDX-License-Identifier: Apache-2.0
"""Settings: precedence, refusals, help, and the flags of the reference benchmark."""

import ast
import json
import os

import pytest
from support.commands import ROOT, python
from support.locales import ASCII_ENVIRONMENT, latin1_environment

from mxresnet.config import FIELDS, Config, flag_of
from mxresnet.config_field import NVIDIA_MXNET
from mxresnet.config_parser import UNSUPPORTED_FLAGS, parse, to_markdown
from mxresnet.errors import UserError

# The options of the reference benchmark, from its help.
REFERENCE_FLAGS = [
    "verbose",
    "seed",
    "custom-bn-off",
    "fuse-bn-relu",
    "fuse-bn-add-relu",
    "input-layout",
    "conv-layout",
    "batchnorm-layout",
    "pooling-layout",
    "conv-algo",
    "force-tensor-core",
    "batchnorm-eps",
    "batchnorm-mom",
    "kv-store",
    "bn-group",
    "network",
    "num-layers",
    "gpus",
    "num-epochs",
    "lr",
    "lr-factor",
    "lr-step-epochs",
    "initializer",
    "label-smoothing",
    "optimizer",
    "lars-eps",
    "lars-eta",
    "mom",
    "wd",
    "batch-size",
    "disp-batches",
    "model-prefix",
    "save-period",
    "logging-dir",
    "log",
    "epoch-size",
    "eval-period",
    "eval-offset",
    "top-k",
    "dtype",
    "warmup-epochs",
    "warmup-strategy",
    "bn-gamma-init0",
    "profile-worker-suffix",
    "profile-server-suffix",
    "accuracy-threshold",
    "profile",
    "e2e-cuda-graphs",
    "data-train",
    "data-train-idx",
    "data-val",
    "data-val-idx",
    "use-dali",
    "min-random-area",
    "max-random-area",
    "min-random-aspect-ratio",
    "max-random-aspect-ratio",
    "input-batch-multiplier",
    "separ-val",
    "dali-threads",
    "image-shape",
    "num-examples",
    "num-val-examples",
    "dali-dont-use-mmap",
    "dali-bytes-per-sample-hint",
    "dali-tmp-buffer-hint",
    "dali-decoder-buffer-hint",
    "dali-crop-buffer-hint",
    "dali-normalize-buffer-hint",
    "dali-hw-decoder-load",
    "dali-prefetch-queue",
    "dali-nvjpeg-memory-padding",
    "dali-preallocate-width",
    "dali-preallocate-height",
    "dali-roi-decode",
    "dali-cache-size",
    "lazy_init_sanity",
]


def test_a_flag_beats_the_environment_beats_the_default():
    assert parse([], {})[0].lr == 0.6
    assert parse([], {"LR": "10.5"})[0].lr == 10.5
    assert parse(["--lr", "3"], {"LR": "10.5"})[0].lr == 3


def test_an_empty_variable_is_an_unset_one():
    assert parse([], {"LR": ""})[0].lr == 0.6


def test_a_switch_may_stand_alone_or_have_a_value():
    assert parse(["--bn-gamma-init0"], {})[0].bn_gamma_init0 is True
    assert (
        parse(["--dali-roi-decode", "0"], {"DALI_ROI_DECODE": "true"})[0].dali_roi_decode is False
    )


@pytest.mark.parametrize(
    "argv, environ, words",
    [
        (["--learning-rate", "3"], {}, ["--learning-rate"]),
        (["--lr", "-1"], {}, ["--lr", "-1", "from 1e-09 to 1e+09"]),
        (["--lr", "fast"], {}, ["--lr", "fast"]),
        ([], {"BATCHSIZE": "0"}, ["BATCHSIZE", "0", "from 1 to 1048576"]),
        (["--optimizer", "adam"], {}, ["--optimizer", "adam", "sgdwfastlars"]),
        (["--image-shape", "224,224"], {}, ["--image-shape", "224,224"]),
        (["--image-shape", "1,224,224"], {}, ["--image-shape", "3 or 4 channels"]),
        (["--resize", "100"], {}, ["--resize", "100", "224"]),
        (["--eval-period", "2", "--eval-offset", "2"], {}, ["--eval-offset", "2"]),
        (["--lr-step-epochs", "pow2", "--warmup-epochs", "90"], {}, ["--warmup-epochs", "90"]),
        (["--lr-step-epochs", "thirty"], {}, ["--lr-step-epochs", "thirty"]),
        (
            ["--min-random-area", "0.9", "--max-random-area", "0.5"],
            {},
            ["--min-random-area", "0.9", "0.5"],
        ),
        (["--seed", "-1"], {}, ["--seed", "-1"]),
        (["--lr"], {}, ["--lr"]),
        (["--gpus", "none"], {}, ["--gpus", "none"]),
        ([], {"GPUS": "0,x"}, ["GPUS", "0,x"]),
    ],
)
def test_a_user_error_is_one_line_that_names_the_setting_and_the_value(argv, environ, words):
    with pytest.raises(UserError) as caught:
        parse(argv, environ)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


HOSTILE = [
    *("inf", "-inf", "nan", "1e12", "1e400", "1e-45", "-1e-320", "9" * 30, "-" + "9" * 30),
    *("9" * 5000, "-7", "abc", "1,5", "0x10", "1_000", "\u0663", "1\n2", "", " ", "1e", "--"),
]


@pytest.mark.parametrize("name", FIELDS)
def test_hostile_values_are_refused_or_within_the_bounds_of_the_setting(name):
    """Every numeric setting has a lower and an upper bound, and no infinity."""
    metadata = FIELDS[name].metadata
    for text in HOSTILE:
        try:
            value = getattr(parse([], {metadata["env"]: text})[0], name)
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 3000
            assert metadata["env"] in str(error) or flag_of(name) in str(error)
            continue
        if isinstance(value, (int, float)):
            assert abs(value) < 2**31 and (value == 0 or abs(value) > 1e-37), text


@pytest.mark.parametrize("name", FIELDS)
def test_numbers_have_bounds_that_fit_the_libraries(name):
    field = FIELDS[name]
    if type(field.default) in (int, float):
        is_valid, text = field.metadata["check"]
        assert not is_valid(2**31) and not is_valid(-(2**31)) and "must be " in text


def test_print_config_shows_the_effective_values_and_nothing_else():
    done = python("-m", "mxresnet", "--print-config", "--lr", "3")
    assert done.returncode == 0
    shown = json.loads(done.stdout)
    assert shown["lr"] == 3 and set(shown) == set(FIELDS)


def test_help_lists_every_flag_and_variable():
    text = python("-m", "mxresnet", "--help", env={**os.environ, "COLUMNS": "1000"}).stdout
    for name, field in FIELDS.items():
        assert flag_of(name) in text and field.metadata["env"] in text


def test_no_two_settings_share_a_variable():
    names = [field.metadata["env"] for field in FIELDS.values()]
    assert len(names) == len(set(names))


def test_every_setting_is_read_somewhere():
    read = set()
    for path in (ROOT / "mxresnet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    by_path = {"data_train", "data_train_idx", "data_val", "data_val_idx"}  # through Config.path
    reported = {  # by select_ops.ignored_settings
        name for name, field in FIELDS.items() if field.metadata["requires"] == NVIDIA_MXNET
    }
    assert set(FIELDS) - read - by_path - reported == set()


@pytest.mark.parametrize("flag", sorted(UNSUPPORTED_FLAGS))
def test_a_flag_that_the_reference_never_reads_is_refused_with_the_reason(flag):
    for argv in ([flag, "1"], [f"{flag}=1"]):
        with pytest.raises(UserError, match=f"{flag}.* does nothing in the reference"):
            parse(argv, {})


def test_every_flag_of_the_reference_is_known():
    assert len(REFERENCE_FLAGS) == 77
    known = {flag_of(name) for name in FIELDS} | set(UNSUPPORTED_FLAGS)
    assert {f"--{name}" for name in REFERENCE_FLAGS} <= known


@pytest.mark.parametrize("variable", ["TIME_TAGS", "NVTX_FLAG"])
def test_a_run_that_times_its_parts_is_short(variable):
    config, _ = parse(["--num-epochs", "90", "--warmup-epochs", "5"], {variable: "1"})
    assert (config.num_epochs, config.warmup_epochs) == (4, 2)


def test_the_table_of_settings_is_up_to_date():
    """python -m mxresnet.config_parser > docs/settings.md writes it."""
    printed = python("-m", "mxresnet.config_parser").stdout
    assert (ROOT / "docs" / "settings.md").read_text() == printed
    assert printed.endswith(to_markdown())


def test_batch_shape_follows_the_input_layout():
    assert Config(batch_size=8, image_shape=(4, 224, 192)).batch_shape == (8, 4, 224, 192)
    assert Config(batch_size=8, image_shape=(4, 224, 192), input_layout="NHWC").batch_shape == (
        8,
        224,
        192,
        4,
    )


@pytest.mark.parametrize("locale", ["utf-8", "latin1", "ascii"])
def test_texts_for_the_log_do_not_depend_on_the_locale(tmp_path, locale):
    environ = {"utf-8": {"LC_ALL": "C.UTF-8"}, "ascii": ASCII_ENVIRONMENT}.get(locale)
    environ = {
        **os.environ,
        **(environ or latin1_environment(tmp_path)),
        "SUBMISSION_ORG": "M\u00fc",
    }
    done = python("-m", "mxresnet", "--print-config", "--submission-platform=\u4e2d", env=environ)
    settings = json.loads(done.stdout)
    assert (settings["submission_org"], settings["submission_platform"]) == ("M\u00fc", "\u4e2d")


@pytest.mark.parametrize("name", ["a/b", "x" * 201])
def test_a_name_of_profiles_that_no_file_can_have_is_refused(name):
    """MXNet's profiler would write no file, and report nothing."""
    with pytest.raises(UserError, match="--profile-worker-suffix: "):
        parse(["--profile-worker-suffix", name], {})


@pytest.mark.parametrize("text", ["M\udcfc", "x" * 1001])
def test_a_text_that_the_log_cannot_have_is_refused(text):
    with pytest.raises(UserError, match="variable SUBMISSION_ORG: "):
        parse([], {"SUBMISSION_ORG": text})
