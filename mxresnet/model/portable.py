# SPDX-License-Identifier: Apache-2.0
"""The network of a run for programs other than this one: MXNet's stock operators, float32, NCHW."""

from __future__ import annotations

import dataclasses
import json

from mxresnet.config import Config
from mxresnet.model import resnet
from mxresnet.model.ops import PlainOps, channel_first

# Attributes that only NVIDIA's MXNet has, and public MXNet refuses to load.
_VENDOR_ATTRIBUTES = ("cudnn_algo_", "cudnn_tensor_core_only", "cublas_algo_verbose")


def symbol_json(config: Config, num_classes: int) -> str:
    """Return the network as the JSON text of an MXNet symbol, which any build of MXNet can load.

    Its inputs are data, float32 (batch, channels, height, width), and softmax_label; its output is
    the class probabilities. Its parameters have the names of every other backend.
    """
    portable = dataclasses.replace(channel_first(config), dtype="float32", input_layout="NCHW")
    symbol = resnet.build(PlainOps(portable), portable, num_classes)
    graph = json.loads(symbol.tojson())
    for node in graph["nodes"]:
        attributes = node.get("attrs", {})
        for name in [name for name in attributes if name.startswith(_VENDOR_ATTRIBUTES)]:
            del attributes[name]
    return json.dumps(graph, indent=1) + "\n"
