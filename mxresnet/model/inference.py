# SPDX-License-Identifier: Apache-2.0
"""Class probabilities of a saved network, on a CPU and in float32."""

from __future__ import annotations

import mxnet as mx
import numpy as np

from mxresnet.errors import UserError
from mxresnet.saved_model import SavedModel

LABEL = "softmax_label"


class Network:
    """The network of a checkpoint, which classifies one image at a time."""

    def __init__(self, saved: SavedModel):
        """Load the network.

        Raises:
            UserError: its symbol does not fit its weights.
        """
        channels, height, width = saved.config.image_shape
        try:
            symbol = mx.sym.load(saved.symbol_path)
            self._module = mx.mod.Module(symbol, label_names=[LABEL], context=mx.cpu())
            self._module.bind(
                [("data", (1, channels, height, width))], [(LABEL, (1,))], for_training=False
            )
            weights, statistics = (
                {name: mx.nd.array(values) for name, values in arrays.items()}
                for arrays in (saved.weights, saved.statistics)
            )
            self._module.set_params(weights, statistics)
        except (mx.MXNetError, RuntimeError, ValueError) as error:
            line = str(error).strip().splitlines()[-1]
            raise UserError(f"checkpoint {saved.path} cannot be used: {line}") from None

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Return the probabilities (classes,) of an image (1, channels, height, width)."""
        self._module.forward(mx.io.DataBatch([mx.nd.array(image)]), is_train=False)
        return self._module.get_outputs()[0].asnumpy()[0]
