# SPDX-License-Identifier: Apache-2.0
"""The loss of the network."""

from __future__ import annotations

from typing import Any

import mxnet as mx


def softmax_cross_entropy_loss(logits: Any, label_smoothing: float) -> Any:
    """Return the last layer: forward gives class probabilities, backward the loss's gradient.

    For logits x of K classes, label l and label smoothing a, the loss of one image is

        loss = -sum_k t_k log p_k,    p = softmax(x),    t_k = 1 - a if k = l else a / (K - 1)

    MXNet does not evaluate it: SoftmaxOutput returns p in the forward pass and d loss / d x = p - t
    in the backward pass, not divided by the batch size.

    Source: MXNet's documentation of SoftmaxOutput (smooth_alpha); label smoothing: Szegedy et al.,
    "Rethinking the Inception Architecture" (2016), which shares a among all K classes instead.

    Args:
        logits: Symbol of shape (batch, K), float32.
        label_smoothing: a, from 0 to 1.

    Returns:
        A symbol of shape (batch, K) named softmax; the labels are its input softmax_label.
    """
    return mx.sym.SoftmaxOutput(logits, smooth_alpha=label_smoothing, name="softmax")
