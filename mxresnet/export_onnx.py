# SPDX-License-Identifier: Apache-2.0
"""Write the network of a checkpoint as an ONNX file.

    python -m mxresnet.export_onnx CHECKPOINT FILE

CHECKPOINT is the folder of a checkpoint, or of the checkpoints of a run (then the best one is
used). The network has one input, data: float32 (N, 3, height, width), red, green and blue,
normalized as in an evaluation. Its output, softmax, is the probabilities (N, classes). The
properties of the file (metadata_props) hold the class names and how to preprocess an image.

MXNet's own exporter makes the file. It needs the package onnx (extra `export`). The exit status is
2 if the checkpoint cannot be used or the file cannot be written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from typing import Any, Dict, Optional, Sequence

import numpy as np

from mxresnet import saved_model
from mxresnet.atomic_write import write_atomically
from mxresnet.errors import ExitStatus, UserError, exit_now
from mxresnet.saved_model import FIRST_WEIGHT, SavedModel
from mxresnet.standard_streams import prepare_streams

INPUT, LOGITS, OUTPUT = "data", "fc1_output", "softmax"
# MXNet 1.9.1 translates its operators to those of opset 13, and marks the file with the newest
# opset of the installed package.
OPSET, IR_VERSION = 13, 8


def export(saved: SavedModel, path: str) -> None:
    """Write the ONNX file, which appears by rename.

    Raises:
        UserError: onnx is not installed, or the file cannot be written.
    """
    try:
        import onnx
    except ImportError:
        raise UserError(
            "the package onnx is not installed: pip install -c constraints.txt -e '.[export]'"
        ) from None
    model = _translate(saved, onnx)
    _clean(model, onnx)
    for key, value in _properties(saved).items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model, full_check=True)
    try:
        write_atomically(path, model.SerializeToString())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None


def _translate(saved: SavedModel, onnx: Any) -> Any:
    """Return the network, with softmax as its last operator, as MXNet's exporter translates it."""
    import mxnet as mx

    symbol = mx.sym.load(saved.symbol_path).get_internals()[LOGITS]
    symbol = mx.sym.softmax(symbol, axis=1, name=OUTPUT)
    arrays = {**saved.weights, **saved.statistics}
    first = arrays[FIRST_WEIGHT]
    # Without the fourth channel, which is always zero.
    arrays[FIRST_WEIGHT] = first[:, :3]
    parameters = {name: mx.nd.array(values) for name, values in arrays.items()}
    _, height, width = saved.config.image_shape
    with tempfile.TemporaryDirectory(prefix="mxresnet-") as folder:
        path = os.path.join(folder, "model.onnx")
        mx.onnx.export_model(
            symbol,
            parameters,
            [(1, 3, height, width)],
            np.float32,
            path,
            dynamic=True,
            dynamic_input_shapes=[("N", 3, height, width)],
        )
        return onnx.load(path)


def _clean(model: Any, onnx: Any) -> None:
    """Set the right opset; remove constants that nothing uses, and weights from the inputs."""
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    model.ir_version = IR_VERSION
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    inputs = [value for value in graph.input if value.name == INPUT]
    del graph.initializer[:], graph.input[:]
    graph.initializer.extend(kept)
    graph.input.extend(inputs)


def _properties(saved: SavedModel) -> Dict[str, str]:
    from mxresnet.data.dali_graph import MEAN, STD

    _, height, width = saved.config.image_shape
    return {
        "classes": json.dumps(saved.class_names),
        "resize_shorter_side": str(saved.config.resize),
        "crop": json.dumps([height, width]),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "checkpoint": os.path.basename(os.path.normpath(saved.path)),
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message} (python -m mxresnet.export_onnx --help)")


def main(argv: Optional[Sequence[str]] = None) -> ExitStatus:
    """Run the command line and return its exit status."""
    parser = _Parser(
        prog="python -m mxresnet.export_onnx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint or a run")
    parser.add_argument("file", metavar="FILE", help="ONNX file to write")
    try:
        arguments = parser.parse_args(argv)
        saved = saved_model.load(arguments.checkpoint)
        export(saved, arguments.file)
    except UserError as error:
        sys.stderr.write(f"mxresnet.export_onnx: {error}\n")
        return ExitStatus.USER_ERROR
    sys.stderr.write(f"{arguments.file}: {saved.classes} classes, from {saved.path}\n")
    return ExitStatus.SUCCESS


if __name__ == "__main__":
    prepare_streams()
    exit_now(main())
