# SPDX-License-Identifier: Apache-2.0
"""A double of the operators of NVIDIA's MXNet: their names, inputs, attributes and outputs, computed by stock operators.

What comes of a batch norm's sums goes two ways in the real operators, and so it does here. Forward uses the equivalent scale
and bias. Backward uses gamma, beta, mean and inverse deviation, and hands the gradients of gamma and beta back through
BNStatsFinalize, which passes them on; what it would write for its other inputs is never read, and is NaN here. The sums of a
convolution are statistics: they take no gradient.

Different from the real ones: float64 on a CPU (they are float16, with float32 statistics, on a GPU), so that no rounding
hides a wrong wire and none flips a ReLU; and running variances are the biased ones of MXNet's BatchNorm on a CPU. With kinds
of float16 and float32, infer_type() answers as the real ones do.

Source: the operators' declarations in NVIDIA's MXNet (src/operator/nn: norm_convolution, normalized_convolution,
bn_stats_finalize, scale_bias_add_relu, batch_norm, batch_norm_add_relu, convolution, fully_connected).
"""

import inspect

import mxnet as mx
import numpy as np

REQUIRED = object()
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
STOCK = {name: getattr(mx.sym, name) for name in ("BatchNorm", "Convolution", "FullyConnected")}
MOMENTS = ("gamma", "beta", "moving_mean", "moving_var")
NORM = {
    "eps": 1e-3,
    "momentum": 0.9,
    "fix_gamma": True,
    "use_global_stats": False,
    "output_mean_var": False,
}
WINDOW = {
    "kernel": REQUIRED,
    "stride": (1, 1),
    "dilate": (1, 1),
    "pad": (0, 0),
    "num_filter": REQUIRED,
    "num_group": 1,
    "layout": None,
}


def error(text):
    return mx.base.MXNetError(text)


# ---- Batch norm in parts, as custom operators over numpy.


def _array(value, like):
    return mx.nd.array(value, dtype=like.dtype)


class _Finalize(mx.operator.CustomOp):
    def __init__(self, count, eps, momentum, with_data):
        super().__init__()
        self._count, self._eps, self._first = count, eps, with_data
        self._momentum = np.float64(np.float32(momentum))  # MXNet's operators hold it so

    def forward(self, is_train, req, in_data, out_data, aux):
        total, squares, gamma, beta = (
            array.asnumpy().astype(np.float64) for array in in_data[self._first :]
        )
        mean, variance = aux[0].asnumpy(), aux[1].asnumpy()
        if is_train:
            mean = total / self._count
            variance = squares / self._count - mean**2
            for running, new in zip(aux, (mean, variance)):
                running[:] = self._momentum * running + (1 - self._momentum) * _array(new, running)
        with np.errstate(invalid="ignore"):  # of a variance that a wrong wire made negative
            inverse = 1 / np.sqrt(variance + self._eps)
        scale = gamma * inverse
        saved = (mean, inverse) if is_train else (np.full_like(scale, np.nan),) * 2
        for index, value in enumerate((scale, beta - mean * scale, *saved)):
            self.assign(out_data[index], req[index], _array(value, out_data[index]))

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        for index, gradient in enumerate(in_grad):
            of_a_sum = index - self._first in (0, 1)
            self.assign(
                gradient,
                req[index],
                _array(np.full(gradient.shape, np.nan if of_a_sum else 0), gradient),
            )


@mx.operator.register("double_finalize")
class _FinalizeProperties(mx.operator.CustomOpProp):
    """With data, only its shape is used: the count of elements, where the attribute does not say it."""

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
        low, high = Registry.kinds
        assert in_type[self._with_data] == in_type[self._with_data + 1] == high, (
            "sums are as precise as statistics"
        )
        return in_type[: self._with_data] + [high] * 4, [low, low, high, high], [high] * 2

    def create_operator(self, ctx, in_shapes, in_dtypes):
        count = int(np.prod(in_shapes[0][:-1])) if self._with_data else self._count
        return _Finalize(count, self._eps, self._momentum, self._with_data)


class _Apply(mx.operator.CustomOp):
    def __init__(self, names, act_type):
        super().__init__()
        self._names, self._act_type = names, act_type

    def forward(self, is_train, req, in_data, out_data, aux):
        given = {name: array.asnumpy() for name, array in zip(self._names, in_data)}
        y = given["dataX"] * given["x_equiv_scale"] + given["x_equiv_bias"]
        if "z_equiv_scale" in given:
            y = y + given["dataZ"] * given["z_equiv_scale"] + given["z_equiv_bias"]
        elif "dataZ" in given:
            y = y + given["dataZ"]
        self.assign(out_data[0], req[0], _array(np.maximum(y, 0), out_data[0]))
        self.assign(out_data[1], req[1], _array(y > 0, out_data[1]))

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        given = {name: array.asnumpy() for name, array in zip(self._names, in_data)}
        dy = out_grad[0].asnumpy().astype(np.float64)
        gradients = {name: np.full(array.shape, np.nan) for name, array in given.items()}
        if "dataZ" in given:
            dy = gradients["dataZ"] = dy * out_data[1].asnumpy()
        elif self._act_type == "relu":  # it keeps no bit mask and finds the sign out again
            dy = dy * (self._normalized("x", given) * given["x_gamma"] + given["x_beta"] > 0)
        for which in ("x", "z"):
            if f"{which}_gamma" in given:
                gradients.update(self._batch_norm(which, given, dy))
        for index, name in enumerate(self._names):
            self.assign(in_grad[index], req[index], _array(gradients[name], in_grad[index]))

    def _normalized(self, which, given):
        return (given["data" + which.upper()].astype(np.float64) - given[f"{which}_mean"]) * given[
            f"{which}_invvar"
        ]

    def _batch_norm(self, which, given, dy):
        """The gradients through a batch norm over all axes but the last."""
        normalized, axes, count = self._normalized(which, given), (0, 1, 2), dy.size // dy.shape[-1]
        dbeta, dgamma = dy.sum(axis=axes), (dy * normalized).sum(axis=axes)
        dx = (
            given[f"{which}_gamma"]
            * given[f"{which}_invvar"]
            * (dy - dbeta / count - normalized * dgamma / count)
        )
        return {"data" + which.upper(): dx, f"{which}_gamma": dgamma, f"{which}_beta": dbeta}


@mx.operator.register("double_apply")
class _ApplyProperties(mx.operator.CustomOpProp):
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
            f"ScaleBiasAddRelu wants a multiple of 32 channels in the last axis: {data}"
        )
        return (
            [data if name.startswith("data") else [data[-1]] for name in self._names],
            [data, data],
            [],
        )

    def infer_type(self, in_type):
        low, high = Registry.kinds
        kinds = [
            low if name.startswith("data") or "equiv" in name else high for name in self._names
        ]
        assert all(found in (wanted, None) for found, wanted in zip(in_type, kinds)), dict(
            zip(self._names, in_type)
        )
        return kinds, [low, np.int32], []

    def create_operator(self, ctx, in_shapes, in_dtypes):
        return _Apply(self._names, self._act_type)


# ---- The operators, out of these parts and stock operators.


def _convolved(data, weight, name, a):
    if a["layout"] != "NHWC" or tuple(a["kernel"]) not in ((1, 1), (3, 3)):
        raise error(
            f"{name}: a convolution with sums wants NHWC and a kernel of 1 x 1 or 3 x 3, not {a['layout']}, {a['kernel']}"
        )
    y = STOCK["Convolution"](
        mx.sym.transpose(data, axes=TO_NCHW),
        mx.sym.transpose(weight, axes=TO_NCHW),
        name=name,
        no_bias=True,
        **{key: a[key] for key in ("kernel", "stride", "pad", "num_filter")},
    )
    y = mx.sym.transpose(y, axes=TO_NHWC)
    high = mx.sym.Cast(y, dtype=np.dtype(Registry.kinds[1]).name)
    sums = (mx.sym.sum(part, axis=(0, 1, 2)) for part in (high, mx.sym.square(high)))
    return mx.sym.Group([y, *(mx.sym.BlockGrad(total) for total in sums)])


def _normalized_convolution(i, name, a):
    if not a["no_equiv_scale_bias"]:
        raise NotImplementedError("no network here uses it so")
    return _convolved(i["data"], i["weight"], name, a)


def _norm_convolution(i, name, a):
    if a["no_norm"]:
        if a["act_type"]:
            raise error("Relu activation with no_norm not yet supported")
        return _convolved(i["data"], i["weight"], name, a)
    moments = {key: i[key] for key in MOMENTS}
    found = _finalized(
        data=i["data"],
        sum=i["in_sum"],
        sum_squares=i["in_sum_squares"],
        **moments,
        eps=a["eps"],
        momentum=a["momentum"],
        with_data=1,
    )
    y = _applied({"dataX": i["data"], **_named("x", found)}, a["act_type"])
    return _convolved(y[0], i["weight"], name, a)


def _finalized(gamma, beta, **given):
    """The gradients of the gamma and beta handed out are those of the gamma and beta handed in."""
    found = mx.sym.Custom(gamma=gamma, beta=beta, **given, op_type="double_finalize")
    return mx.sym.Group([*found, mx.sym.identity(gamma), mx.sym.identity(beta)])


def _named(which, found):
    kinds = ("equiv_scale", "equiv_bias", "mean", "invvar", "gamma", "beta")
    return {f"{which}_{kind}": value for kind, value in zip(kinds, found)}


def _applied(inputs, act_type, name=None):
    return mx.sym.Custom(
        **inputs, names=",".join(inputs), act_type=str(act_type), op_type="double_apply", name=name
    )


def _bn_stats_finalize(i, name, a):
    if not a["output_mean_var"]:
        raise error("Expecting output_mean_var true on training graph")
    return _finalized(
        **i, name=name, eps=a["eps"], momentum=a["momentum"], elem_count=a["elem_count"]
    )


def _apply_names(a):
    sides = ("x", "z") if a["dual_scale_bias"] else ("x",)
    data = ["dataX", "dataZ"] if a["fused_add"] or a["dual_scale_bias"] else ["dataX"]
    equivalent = [f"{side}_equiv_{kind}" for side in sides for kind in ("scale", "bias")]
    return (
        data
        + equivalent
        + [f"{side}_{kind}" for side in sides for kind in ("gamma", "beta", "mean", "invvar")]
    )


def _scale_bias_add_relu(i, name, a):
    if a["layout"] != "NHWC" or not a["fused_relu"]:
        raise error("ScaleBiasAddRelu wants NHWC")
    return _applied(i, a["act_type"], name)


def _batch_norm(i, name, a):
    norm = {key: a[key] for key in (*NORM, "axis", "cudnn_off")}
    y = STOCK["BatchNorm"](**i, name=name, **norm)
    if a["act_type"] and a["axis"] not in (3, -1):
        raise error("Fused ReLU activation is only supported with float16 NHWC Batchnorm")
    return mx.sym.Activation(y, act_type=a["act_type"]) if a["act_type"] else y


def _batch_norm_add_relu(i, name, a):
    moments = {key: i[key] for key in MOMENTS}
    y = STOCK["BatchNorm"](
        i["data"], **moments, name=name, **{key: a[key] for key in (*NORM, "axis")}
    )
    return mx.sym.Activation(y + i["addend"], act_type="relu")


def _convolution(i, name, a):
    own = {key: a[key] for key in ("kernel", "stride", "pad", "num_filter", "workspace", "no_bias")}
    if a["layout"] != "NHWC":
        return STOCK["Convolution"](**i, name=name, **own)
    turned = {key: mx.sym.transpose(value, axes=TO_NCHW) for key, value in i.items()}
    return mx.sym.transpose(STOCK["Convolution"](**turned, name=name, **own), axes=TO_NHWC)


def _fully_connected(i, name, a):
    return STOCK["FullyConnected"](
        **i, name=name, **{key: a[key] for key in ("num_hidden", "no_bias", "flatten")}
    )


_NORM_INPUTS = ["data", *MOMENTS]
_GROUP = {"bn_group": 1, "xbuf_ptr": 0}
# Operator: (its inputs, by its attributes; attributes and their defaults; what computes it)
OPERATORS = {
    "Convolution": (
        lambda a: ["data", "weight"] + ["bias"] * (not a["no_bias"]),
        {
            **WINDOW,
            "workspace": 1024,
            "no_bias": False,
            "cudnn_tune": None,
            "cudnn_off": False,
            "cudnn_tensor_core": None,
            "cudnn_tensor_core_only": False,
            "cudnn_algo_verbose": False,
            "cudnn_algo_fwd": -1,
            "cudnn_algo_bwd_data": -1,
            "cudnn_algo_bwd_filter": -1,
            "cudnn_algo_fwd_prec": None,
            "cudnn_algo_bwd_prec": None,
        },
        _convolution,
    ),
    "FullyConnected": (
        lambda a: ["data", "weight"] + ["bias"] * (not a["no_bias"]),
        {
            "num_hidden": REQUIRED,
            "no_bias": False,
            "cublas_algo_verbose": False,
            "cublas_off": False,
            "cublas_tensor_core": None,
            "cublas_algo_fwd": None,
            "cublas_algo_bwd_data": None,
            "cublas_algo_bwd_weights": None,
            "cublas_algo_fwd_prec": None,
            "cublas_algo_bwd_prec": None,
            "flatten": True,
        },
        _fully_connected,
    ),
    "BatchNorm": (
        lambda a: _NORM_INPUTS,
        {
            **NORM,
            "axis": 1,
            "cudnn_off": False,
            "min_calib_range": None,
            "max_calib_range": None,
            "act_type": None,
            **_GROUP,
        },
        _batch_norm,
    ),
    "BatchNormAddRelu": (
        lambda a: [*_NORM_INPUTS, "addend"],
        {**NORM, "axis": 1, "cudnn_off": False, **_GROUP},
        _batch_norm_add_relu,
    ),
    "NormalizedConvolution": (
        lambda a: (
            ["data", "weight"]
            if a["no_equiv_scale_bias"]
            else ["data", "equiv_scale", "equiv_bias", "mean", "var", "gamma", "beta", "weight"]
        ),
        {**WINDOW, "act_type": None, "no_equiv_scale_bias": False},
        _normalized_convolution,
    ),
    "NormConvolution": (
        lambda a: (
            ["data", "weight"]
            if a["no_norm"]
            else ["data", "in_sum", "in_sum_squares", *MOMENTS, "weight"]
        ),
        {**WINDOW, "act_type": None, "no_norm": False, **NORM, "output_equiv_scale_bias": False},
        _norm_convolution,
    ),
    "BNStatsFinalize": (
        lambda a: ["sum", "sum_squares", *MOMENTS],
        {**NORM, "elem_count": REQUIRED},
        _bn_stats_finalize,
    ),
    "ScaleBiasAddRelu": (
        _apply_names,
        {
            "eps": 1e-3,
            "dual_scale_bias": True,
            "fused_add": True,
            "fused_relu": True,
            "layout": None,
            "act_type": None,
        },
        _scale_bias_add_relu,
    ),
}


def _read(operator, name, value, default):
    """The value, of the default's type. MXNet reads text."""
    if isinstance(default, bool):
        if str(value).lower() not in ("true", "false", "1", "0"):
            raise error(f"{operator}: {name} is a switch, not {value!r}")
        return str(value).lower() in ("true", "1")
    if isinstance(default, (int, float)) and isinstance(value, bool):
        raise error(f"{operator}: {name} is a number, not {value!r}")
    return value if default is None or default is REQUIRED else type(default)(value)


class Registry:
    """What was composed, in order: (operator, its name, its attributes)."""

    kinds = None  # types of activations, weights, scales and biases; of statistics, gamma and beta

    def __init__(self):
        self.composed = []

    def operator(self, operator):
        inputs_of, declared, compute = OPERATORS[operator]

        def compose(*data, name, **given):
            a = {key: value for key, value in declared.items() if value is not REQUIRED}
            for key in [
                key for key, value in given.items() if not isinstance(value, mx.sym.Symbol)
            ]:
                if key not in declared:
                    raise error(
                        f"Cannot find argument '{key}', Possible Arguments: {', '.join(declared)} ({operator})"
                    )
                a[key] = _read(operator, key, given.pop(key), declared[key])
            if set(a) != set(declared):
                raise error(
                    f"{operator}: required parameter {set(declared) - set(a)} is not presented"
                )
            names = inputs_of(a)
            i = {**dict(zip(names, data)), **given}
            if (
                len(data) > len(names)
                or not set(i) <= set(names)
                or len(i) != len(data) + len(given)
            ):
                raise error(
                    f"{operator}: inputs {sorted(given)} after {len(data)}; candidates: {names}"
                )
            if any(len(value.list_outputs()) != 1 for value in i.values()):
                raise error(f"{operator}: an input is a tuple, single value is required")
            first = {"moving_mean": mx.init.Zero(), "moving_var": mx.init.One()}
            i = {
                key: i[key] if key in i else mx.sym.var(f"{name}_{key}", init=first.get(key))
                for key in names
            }
            self.composed.append((operator, name, a))
            return compute(i, name, a)

        parameters = ["data", *declared, "name"]
        compose.__signature__ = inspect.Signature(
            [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in parameters]
        )
        return compose


def install(monkeypatch, without=(), kinds=(np.float64, np.float64)):
    """Make mx.sym that of NVIDIA's MXNet, but for some operators; return the registry."""
    registry = Registry()
    monkeypatch.setattr(Registry, "kinds", kinds)
    for operator in OPERATORS:
        if operator not in without:
            monkeypatch.setattr(mx.sym, operator, registry.operator(operator), raising=False)
    return registry
