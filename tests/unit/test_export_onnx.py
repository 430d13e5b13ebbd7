# SPDX-License-Identifier: Apache-2.0
"""python -m mxresnet.export_onnx, compared with onnxruntime."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from support import checkpoints

from mxresnet import export_onnx, saved_model
from mxresnet.model.inference import Network

NAMES = [f"digit_{number}" for number in range(checkpoints.CLASSES)]


@pytest.mark.parametrize("layers, channels", [(18, 4), pytest.param(50, 3, marks=pytest.mark.slow)])
def test_onnxruntime_computes_the_same_probabilities(tmp_path, capfd, layers, channels):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    shape = (channels, 64, 64)
    config = dataclasses.replace(
        checkpoints.CONFIG, num_layers=layers, image_shape=shape, resize=72
    )
    path = checkpoints.publish_model(tmp_path, config, class_names=NAMES)
    file = str(tmp_path / "model.onnx")
    assert export_onnx.main([path, file]) == 0
    assert f"{file}: 10 classes" in capfd.readouterr().err
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("data", ["N", 3, 64, 64])]
    network = Network(saved_model.load(path))
    images = np.random.RandomState(0).randn(3, 3, 64, 64).astype("f4")
    (found,) = session.run(["softmax"], {"data": images})
    assert found.shape == (3, 10) and 0 < found.max() < 1
    for image, probabilities in zip(images, found):
        padded = np.zeros((1, *shape), "f4")
        padded[0, :3] = image
        expected = network.probabilities(padded)
        np.testing.assert_allclose(probabilities, expected, rtol=1e-3, atol=1e-6)
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["classes"]) == NAMES and properties["resize_shorter_side"] == "72"


def test_without_onnx_one_line_names_the_extra(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    path = checkpoints.publish_model(tmp_path)
    assert export_onnx.main([path, str(tmp_path / "model.onnx")]) == 2
    assert "pip install -c constraints.txt -e '.[export]'" in capfd.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path, capfd):
    pytest.importorskip("onnx", reason="onnx is not installed")
    path = checkpoints.publish_model(tmp_path)
    assert export_onnx.main([path, str(tmp_path / "no" / "folder.onnx")]) == 2
    assert "cannot be written (No such file or directory)" in capfd.readouterr().err
    (tmp_path / "folder.onnx").mkdir()
    assert export_onnx.main([path, str(tmp_path / "folder.onnx")]) == 2
    assert not list(tmp_path.glob("*.part"))
