# SPDX-License-Identifier: Apache-2.0
"""The parts of a batch norm of fake_nvidia_ops.py, as custom operators on numpy."""

import mxnet as mx
import numpy as np


class Types:
    """Types that infer_type() returns.

    Attributes:
        data: Of activations, weights, scales and biases.
        stats: Of statistics, gamma and beta.
    """

    data = stats = np.float64


def _array(value, like):
    return mx.nd.array(value, dtype=like.dtype)


class _FinalizeStats(mx.operator.CustomOp):
    """BNStatsFinalize: from the sums of a batch norm to its scale and bias."""

    def __init__(self, count, eps, momentum, with_data):
        super().__init__()
        self._count, self._eps, self._first_input = count, eps, with_data
        self._momentum = np.float64(np.float32(momentum))  # MXNet keeps it as float32

    def forward(self, is_train, req, in_data, out_data, aux):
        total, squares, gamma, beta = (
            array.asnumpy().astype(np.float64) for array in in_data[self._first_input :]
        )
        mean, variance = aux[0].asnumpy(), aux[1].asnumpy()
        if is_train:
            mean = total / self._count
            variance = squares / self._count - mean**2
            for running, new in zip(aux, (mean, variance)):
                running[:] = self._momentum * running + (1 - self._momentum) * _array(new, running)
        with np.errstate(invalid="ignore"):  # a wrong input may make the variance negative
            inverse = 1 / np.sqrt(variance + self._eps)
        scale = gamma * inverse
        saved = (mean, inverse) if is_train else (np.full_like(scale, np.nan),) * 2
        for index, value in enumerate((scale, beta - mean * scale, *saved)):
            self.assign(out_data[index], req[index], _array(value, out_data[index]))

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        for index, gradient in enumerate(in_grad):
            is_sum = index - self._first_input in (0, 1)
            self.assign(
                gradient,
                req[index],
                _array(np.full(gradient.shape, np.nan if is_sum else 0), gradient),
            )


@mx.operator.register("fake_finalize")
class _FinalizeStatsProperties(mx.operator.CustomOpProp):
    """Inputs, outputs, shapes and types of _FinalizeStats.

    With the input data, the number of elements is taken from its shape, else from elem_count.
    """

    def __init__(self, eps, momentum, elem_count="0", with_data="0"):
        super().__init__(need_top_grad=True)
        self._eps, self._momentum, self._count, self._with_data = (
            float(eps),
            float(momentum),
            int(elem_count),
            int(with_data),
        )

    def list_arguments(self):
        return ["data"] * self._with_data + ["sum", "sum_squares", "gamma", "beta"]

    def list_auxiliary_states(self):
        return ["moving_mean", "moving_var"]

    def list_outputs(self):
        return ["equiv_scale", "equiv_bias", "mean", "var"]

    def infer_shape(self, in_shape):
        channels = in_shape[self._with_data]
        return in_shape[: self._with_data] + [channels] * 4, [channels] * 4, [channels] * 2

    def infer_type(self, in_type):
        data_type, stats_type = Types.data, Types.stats
        assert in_type[self._with_data] == in_type[self._with_data + 1] == stats_type, (
            "sums must have the type of statistics"
        )
        return (
            in_type[: self._with_data] + [stats_type] * 4,
            [data_type, data_type, stats_type, stats_type],
            [stats_type] * 2,
        )

    def create_operator(self, ctx, in_shapes, in_dtypes):
        count = int(np.prod(in_shapes[0][:-1])) if self._with_data else self._count
        return _FinalizeStats(count, self._eps, self._momentum, self._with_data)


class _ScaleBiasAddRelu(mx.operator.CustomOp):
    """ScaleBiasAddRelu: apply scale and bias of one or two batch norms, add, apply ReLU."""

    def __init__(self, names, act_type):
        super().__init__()
        self._names, self._act_type = names, act_type

    def forward(self, is_train, req, in_data, out_data, aux):
        inputs = {name: array.asnumpy() for name, array in zip(self._names, in_data)}
        y = inputs["dataX"] * inputs["x_equiv_scale"] + inputs["x_equiv_bias"]
        if "z_equiv_scale" in inputs:
            y = y + inputs["dataZ"] * inputs["z_equiv_scale"] + inputs["z_equiv_bias"]
        elif "dataZ" in inputs:
            y = y + inputs["dataZ"]
        self.assign(out_data[0], req[0], _array(np.maximum(y, 0), out_data[0]))
        self.assign(out_data[1], req[1], _array(y > 0, out_data[1]))

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        inputs = {name: array.asnumpy() for name, array in zip(self._names, in_data)}
        dy = out_grad[0].asnumpy().astype(np.float64)
        gradients = {name: np.full(array.shape, np.nan) for name, array in inputs.items()}
        if "dataZ" in inputs:
            dy = gradients["dataZ"] = dy * out_data[1].asnumpy()
        elif (
            self._act_type == "relu"
        ):  # without an addend there is no bit mask: compute the sign again
            dy = dy * (self._normalized("x", inputs) * inputs["x_gamma"] + inputs["x_beta"] > 0)
        for side in ("x", "z"):
            if f"{side}_gamma" in inputs:
                gradients.update(self._batch_norm(side, inputs, dy))
        for index, name in enumerate(self._names):
            self.assign(in_grad[index], req[index], _array(gradients[name], in_grad[index]))

    def _normalized(self, side, inputs):
        return (inputs["data" + side.upper()].astype(np.float64) - inputs[f"{side}_mean"]) * inputs[
            f"{side}_invvar"
        ]

    def _batch_norm(self, side, inputs, dy):
        """Return the gradients of a batch norm over all axes but the last."""
        normalized, axes, count = self._normalized(side, inputs), (0, 1, 2), dy.size // dy.shape[-1]
        dbeta, dgamma = dy.sum(axis=axes), (dy * normalized).sum(axis=axes)
        dx = (
            inputs[f"{side}_gamma"]
            * inputs[f"{side}_invvar"]
            * (dy - dbeta / count - normalized * dgamma / count)
        )
        return {"data" + side.upper(): dx, f"{side}_gamma": dgamma, f"{side}_beta": dbeta}


@mx.operator.register("fake_apply")
class _ScaleBiasAddReluProperties(mx.operator.CustomOpProp):
    """Inputs, outputs, shapes and types of _ScaleBiasAddRelu."""

    def __init__(self, names, act_type):
        super().__init__(need_top_grad=True)
        self._names, self._act_type = names.split(","), act_type

    def list_arguments(self):
        return self._names

    def list_outputs(self):
        return ["output", "bitmask"]

    def infer_shape(self, in_shape):
        data = in_shape[0]
        assert len(data) == 4 and data[-1] % 32 == 0, (
            f"ScaleBiasAddRelu needs a multiple of 32 channels in the last axis: {data}"
        )
        return (
            [data if name.startswith("data") else [data[-1]] for name in self._names],
            [data, data],
            [],
        )

    def infer_type(self, in_type):
        data_type, stats_type = Types.data, Types.stats
        types = [
            data_type if name.startswith("data") or "equiv" in name else stats_type
            for name in self._names
        ]
        assert all(found in (expected, None) for found, expected in zip(in_type, types)), dict(
            zip(self._names, in_type)
        )
        return types, [data_type, np.int32], []

    def create_operator(self, ctx, in_shapes, in_dtypes):
        return _ScaleBiasAddRelu(self._names, self._act_type)
