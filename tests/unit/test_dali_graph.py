# SPDX-License-Identifier: Apache-2.0
"""Arguments of the operators in DALI's GPU graph, which is defined here but not built."""

import dataclasses
import re
import subprocess
import sys

import pytest
from support.commands import ROOT

from mxresnet.config import Config
from mxresnet.data.dali_graph import define_pipeline
from mxresnet.data.shard import RecordShard

CONFIG = Config(
    dali_decoder_buffer_hint=101,
    dali_crop_buffer_hint=102,
    dali_tmp_buffer_hint=103,
    dali_normalize_buffer_hint=104,
    dali_nvjpeg_memory_padding=3,
    dali_preallocate_width=7,
    dali_preallocate_height=8,
    dali_hw_decoder_load=0.5,
)
SHARD = RecordShard(
    True, "/x.rec", "/x.idx", "x", rank=1, num_ranks=4, batch_size=8, seed=100, num_classes=3
)
HINTS = ("bytes_per_sample_hint", "temp_buffer_hint")
DECODER = {
    **{"bytes_per_sample_hint": "[101, ]", "device": "mixed", "hw_decoder_load": "0.500000"},
    **{"device_memory_padding": str(3 << 20), "host_memory_padding": str(3 << 20)},
    **{"preallocate_width_hint": "7", "preallocate_height_hint": "8", "affine": "False"},
}


def operators(device_id=0, training=True, **settings):
    """Return the arguments, as text, of each operator of a graph, by the operator's name."""
    config = dataclasses.replace(CONFIG, **settings)
    pipeline = define_pipeline(config, dataclasses.replace(SHARD, training=training), device_id)
    pipeline._build_graph()
    graph = {}
    for operator in pipeline._ops:
        name, _, arguments = str(operator.spec).partition("\n")
        values = re.findall(
            r"^    (\w+): (.*)$", arguments.partition("Arguments:")[2], re.MULTILINE
        )
        graph[name[len("OpSpec for ") : -1]] = dict(values)
    return graph


def hints(arguments):
    return {name: arguments[name] for name in HINTS if name in arguments}


def test_training_that_decodes_the_crop_has_no_scratch_hint_for_the_resize():
    graph = operators(dali_roi_decode=True)
    assert DECODER.items() <= graph["decoders__ImageRandomCrop"].items()
    assert hints(graph["Resize"]) == {"bytes_per_sample_hint": "[101, ]"}
    assert hints(graph["CropMirrorNormalize"]) == {"bytes_per_sample_hint": "[104, ]"}


def test_training_that_decodes_whole_images_has_hints_for_crop_and_scratch():
    graph = operators(dali_roi_decode=False)
    assert DECODER.items() <= graph["decoders__Image"].items()
    crop = {"bytes_per_sample_hint": "[102, ]", "temp_buffer_hint": "103"}
    assert hints(graph["RandomResizedCrop"]) == crop


def test_validation_has_hints_for_crop_and_scratch():
    graph = operators(training=False)
    assert DECODER.items() <= graph["decoders__Image"].items()
    crop = {"bytes_per_sample_hint": "[102, ]", "temp_buffer_hint": "103"}
    assert hints(graph["Resize"]) == crop
    assert hints(graph["CropMirrorNormalize"]) == {"bytes_per_sample_hint": "[104, ]"}


@pytest.mark.parametrize("training", [True, False])
def test_decoded_images_are_cached(training):
    cache = {"cache_size": "9", "cache_type": "threshold", "cache_threshold": "0"}
    graph = operators(training=training, dali_cache_size=9, dali_roi_decode=True)
    assert {**DECODER, **cache}.items() <= graph["decoders__Image"].items()
    reader = graph["readers__MXNet"]
    assert (reader["skip_cached_images"], reader["stick_to_shard"]) == ("True", "True")
    graph = operators(training=training, dali_cache_size=0, dali_roi_decode=False)
    assert not cache.keys() & graph["decoders__Image"].keys()
    assert graph["readers__MXNet"]["skip_cached_images"] == "False"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device_id, seed", [(None, 100), (0, 100), (3, 103)])
def test_the_seed_of_a_pipeline_is_that_of_the_rank_plus_the_gpu(training, device_id, seed):
    shard = dataclasses.replace(SHARD, training=training)
    assert define_pipeline(CONFIG, shard, device_id).seed == seed


@pytest.mark.parametrize("training", [True, False])
def test_a_cpu_graph_has_no_hints(training):
    for name, arguments in operators(device_id=None, training=training).items():
        assert hints(arguments) == {} and arguments.get("device", "cpu") == "cpu", name


def test_the_graph_needs_no_mxnet():
    """benchmarks/input.py runs it on GPUs that MXNet has no code for."""
    code = "import sys; sys.modules['mxnet'] = None; import mxresnet.data.dali_graph"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
