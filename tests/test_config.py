# SPDX-License-Identifier: Apache-2.0
import ast
import json

import pytest
from conftest import ROOT, python

from mxresnet.config import FIELDS, Config, UserError, parse


def test_a_flag_beats_the_environment_beats_the_default():
    assert parse([], {})[0].lr == 0.6
    assert parse([], {"LR": "10.5"})[0].lr == 10.5
    assert parse(["--lr", "3"], {"LR": "10.5"})[0].lr == 3


def test_an_empty_variable_is_an_unset_one():
    assert parse([], {"LR": ""})[0].lr == 0.6


def test_a_switch_may_stand_alone_or_have_a_value():
    assert parse(["--bn-gamma-init0"], {})[0].bn_gamma_init0 is True
    assert parse(["--dali-roi-decode", "0"], {"DALI_ROI_DECODE": "true"})[0].dali_roi_decode is False


@pytest.mark.parametrize("argv, environ, words", [
    (["--learning-rate", "3"], {}, ["--learning-rate"]),
    (["--lr", "-1"], {}, ["--lr", "-1", "above 0"]),
    (["--lr", "fast"], {}, ["--lr", "fast"]),
    ([], {"BATCHSIZE": "0"}, ["BATCHSIZE", "0", "at least 1"]),
    (["--optimizer", "adam"], {}, ["--optimizer", "adam", "sgdwfastlars"]),
    (["--image-shape", "224,224"], {}, ["--image-shape", "224,224"]),
    (["--image-shape", "1,224,224"], {}, ["--image-shape", "3 or 4 channels"]),
    (["--resize", "100"], {}, ["--resize", "100", "224"]),
    (["--eval-period", "2", "--eval-offset", "2"], {}, ["--eval-offset", "2"]),
    (["--lr-step-epochs", "pow2", "--warmup-epochs", "90"], {}, ["--warmup-epochs", "90"]),
    (["--lr-step-epochs", "thirty"], {}, ["--lr-step-epochs", "thirty"]),
    (["--min-random-area", "0.9", "--max-random-area", "0.5"], {}, ["--min-random-area", "0.9", "0.5"]),
    (["--seed", "-1"], {}, ["--seed", "-1"]),
    (["--lr"], {}, ["--lr"]),
])
def test_a_mistake_is_one_line_that_names_the_setting_and_the_value(argv, environ, words):
    with pytest.raises(UserError) as caught:
        parse(argv, environ)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_print_config_shows_the_effective_values_and_nothing_else():
    done = python("-m", "mxresnet", "--print-config", "--lr", "3")
    assert done.returncode == 0
    shown = json.loads(done.stdout)
    assert shown["lr"] == 3 and set(shown) == set(FIELDS)


def test_help_lists_every_flag_and_variable():
    text = python("-m", "mxresnet", "--help").stdout
    for name, field in FIELDS.items():
        assert "--" + name.replace("_", "-") in text and field.metadata["env"] in text


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
    assert set(FIELDS) - read - by_path == set()


def test_batch_shape_follows_the_input_layout():
    assert Config(batch_size=8, image_shape=(4, 224, 192)).batch_shape == (8, 4, 224, 192)
    assert Config(batch_size=8, image_shape=(4, 224, 192), input_layout="NHWC").batch_shape == (8, 224, 192, 4)
