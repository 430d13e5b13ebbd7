# SPDX-License-Identifier: Apache-2.0
"""A fake of the operators of NVIDIA's MXNet.

They have the names, inputs, attributes and outputs of the real ones, and MXNet's own operators
compute them.

A batch norm from sums has two paths, as in the real operators. The forward pass uses the equivalent
scale and bias. The backward pass uses gamma, beta, mean and inverse standard deviation, and returns
the gradients of gamma and beta through BNStatsFinalize. The other gradients of that operator are
never read, and are NaN here. The sums of a convolution are statistics: they take no gradient.

Differences: the types are float64, on a CPU, so that no rounding hides a wrong input or changes the
sign before a ReLU (the real ones are float16, with float32 statistics, on a GPU). Running variances
are biased, as those of MXNet's BatchNorm on a CPU. With float16 data and float32 statistics,
infer_type() returns the types of the real operators.

Source: the operators' declarations in NVIDIA's MXNet (src/operator/nn: norm_convolution,
normalized_convolution, bn_stats_finalize, scale_bias_add_relu, batch_norm, batch_norm_add_relu,
convolution, fully_connected).
"""

import inspect

import mxnet as mx
import numpy as np
from mxnet.base import MXNetError

from support.fake_nvidia_batch_norm import Types

REQUIRED = object()
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
STOCK_OPERATORS = {
    name: getattr(mx.sym, name) for name in ("BatchNorm", "Convolution", "FullyConnected")
}
BN_INPUTS = ("gamma", "beta", "moving_mean", "moving_var")
BN_ATTRS = {
    "eps": 1e-3,
    "momentum": 0.9,
    "fix_gamma": True,
    "use_global_stats": False,
    "output_mean_var": False,
}
CONV_ATTRS = {
    "kernel": REQUIRED,
    "stride": (1, 1),
    "dilate": (1, 1),
    "pad": (0, 0),
    "num_filter": REQUIRED,
    "num_group": 1,
    "layout": None,
}


def _convolution_with_sums(data, weight, name, attrs):
    if attrs["layout"] != "NHWC" or tuple(attrs["kernel"]) not in ((1, 1), (3, 3)):
        raise MXNetError(
            f"{name}: a convolution with sums needs NHWC and a kernel of 1 x 1 or 3 x 3, "
            f"not {attrs['layout']}, {attrs['kernel']}"
        )
    y = STOCK_OPERATORS["Convolution"](
        mx.sym.transpose(data, axes=TO_NCHW),
        mx.sym.transpose(weight, axes=TO_NCHW),
        name=name,
        no_bias=True,
        **{key: attrs[key] for key in ("kernel", "stride", "pad", "num_filter")},
    )
    y = mx.sym.transpose(y, axes=TO_NHWC)
    high = mx.sym.Cast(y, dtype=np.dtype(Types.stats).name)
    sums = (mx.sym.sum(part, axis=(0, 1, 2)) for part in (high, mx.sym.square(high)))
    return mx.sym.Group([y, *(mx.sym.BlockGrad(total) for total in sums)])


def _normalized_convolution(inputs, name, attrs):
    if not attrs["no_equiv_scale_bias"]:
        raise NotImplementedError("not used by a network of this project")
    return _convolution_with_sums(inputs["data"], inputs["weight"], name, attrs)


def _norm_convolution(inputs, name, attrs):
    if attrs["no_norm"]:
        if attrs["act_type"]:
            raise MXNetError("Relu activation with no_norm not yet supported")
        return _convolution_with_sums(inputs["data"], inputs["weight"], name, attrs)
    bn_inputs = {key: inputs[key] for key in BN_INPUTS}
    found = _finalize(
        data=inputs["data"],
        sum=inputs["in_sum"],
        sum_squares=inputs["in_sum_squares"],
        **bn_inputs,
        eps=attrs["eps"],
        momentum=attrs["momentum"],
        with_data=1,
    )
    y = _apply({"dataX": inputs["data"], **_apply_arguments("x", found)}, attrs["act_type"])
    return _convolution_with_sums(y[0], inputs["weight"], name, attrs)


def _finalize(gamma, beta, **given):
    """Return the outputs of BNStatsFinalize.

    The last two are gamma and beta themselves, so that their gradients are passed on.
    """
    found = mx.sym.Custom(gamma=gamma, beta=beta, **given, op_type="fake_finalize")
    return mx.sym.Group([*found, mx.sym.identity(gamma), mx.sym.identity(beta)])


def _apply_arguments(which, found):
    kinds = ("equiv_scale", "equiv_bias", "mean", "invvar", "gamma", "beta")
    return {f"{which}_{kind}": value for kind, value in zip(kinds, found)}


def _apply(inputs, act_type, name=None):
    return mx.sym.Custom(
        **inputs, names=",".join(inputs), act_type=str(act_type), op_type="fake_apply", name=name
    )


def _bn_stats_finalize(inputs, name, attrs):
    if not attrs["output_mean_var"]:
        raise MXNetError("Expecting output_mean_var true on training graph")
    return _finalize(
        **inputs,
        name=name,
        eps=attrs["eps"],
        momentum=attrs["momentum"],
        elem_count=attrs["elem_count"],
    )


def _apply_inputs(attrs):
    sides = ("x", "z") if attrs["dual_scale_bias"] else ("x",)
    data = ["dataX", "dataZ"] if attrs["fused_add"] or attrs["dual_scale_bias"] else ["dataX"]
    equivalent = [f"{side}_equiv_{kind}" for side in sides for kind in ("scale", "bias")]
    return (
        data
        + equivalent
        + [f"{side}_{kind}" for side in sides for kind in ("gamma", "beta", "mean", "invvar")]
    )


def _scale_bias_add_relu(inputs, name, attrs):
    if attrs["layout"] != "NHWC" or not attrs["fused_relu"]:
        raise MXNetError("ScaleBiasAddRelu needs NHWC")
    return _apply(inputs, attrs["act_type"], name)


def _batch_norm(inputs, name, attrs):
    norm = {key: attrs[key] for key in (*BN_ATTRS, "axis", "cudnn_off")}
    y = STOCK_OPERATORS["BatchNorm"](**inputs, name=name, **norm)
    if attrs["act_type"] and attrs["axis"] not in (3, -1):
        raise MXNetError("Fused ReLU activation is only supported with float16 NHWC Batchnorm")
    return mx.sym.Activation(y, act_type=attrs["act_type"]) if attrs["act_type"] else y


def _batch_norm_add_relu(inputs, name, attrs):
    bn_inputs = {key: inputs[key] for key in BN_INPUTS}
    y = STOCK_OPERATORS["BatchNorm"](
        inputs["data"], **bn_inputs, name=name, **{key: attrs[key] for key in (*BN_ATTRS, "axis")}
    )
    return mx.sym.Activation(y + inputs["addend"], act_type="relu")


def _convolution(inputs, name, attrs):
    own = {
        key: attrs[key] for key in ("kernel", "stride", "pad", "num_filter", "workspace", "no_bias")
    }
    if attrs["layout"] != "NHWC":
        return STOCK_OPERATORS["Convolution"](**inputs, name=name, **own)
    turned = {key: mx.sym.transpose(value, axes=TO_NCHW) for key, value in inputs.items()}
    return mx.sym.transpose(
        STOCK_OPERATORS["Convolution"](**turned, name=name, **own), axes=TO_NHWC
    )


def _fully_connected(inputs, name, attrs):
    return STOCK_OPERATORS["FullyConnected"](
        **inputs, name=name, **{key: attrs[key] for key in ("num_hidden", "no_bias", "flatten")}
    )


_BATCH_NORM_INPUTS = ["data", *BN_INPUTS]
_GROUP_ATTRS = {"bn_group": 1, "xbuf_ptr": 0}
# Operator: (inputs as a function of its attributes, attributes with defaults, implementation)
OPERATORS = {
    "Convolution": (
        lambda attrs: ["data", "weight"] + ["bias"] * (not attrs["no_bias"]),
        {
            **CONV_ATTRS,
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
        lambda attrs: ["data", "weight"] + ["bias"] * (not attrs["no_bias"]),
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
        lambda attrs: _BATCH_NORM_INPUTS,
        {
            **BN_ATTRS,
            "axis": 1,
            "cudnn_off": False,
            "min_calib_range": None,
            "max_calib_range": None,
            "act_type": None,
            **_GROUP_ATTRS,
        },
        _batch_norm,
    ),
    "BatchNormAddRelu": (
        lambda attrs: [*_BATCH_NORM_INPUTS, "addend"],
        {**BN_ATTRS, "axis": 1, "cudnn_off": False, **_GROUP_ATTRS},
        _batch_norm_add_relu,
    ),
    "NormalizedConvolution": (
        lambda attrs: (
            ["data", "weight"]
            if attrs["no_equiv_scale_bias"]
            else ["data", "equiv_scale", "equiv_bias", "mean", "var", "gamma", "beta", "weight"]
        ),
        {**CONV_ATTRS, "act_type": None, "no_equiv_scale_bias": False},
        _normalized_convolution,
    ),
    "NormConvolution": (
        lambda attrs: (
            ["data", "weight"]
            if attrs["no_norm"]
            else ["data", "in_sum", "in_sum_squares", *BN_INPUTS, "weight"]
        ),
        {
            **CONV_ATTRS,
            "act_type": None,
            "no_norm": False,
            **BN_ATTRS,
            "output_equiv_scale_bias": False,
        },
        _norm_convolution,
    ),
    "BNStatsFinalize": (
        lambda attrs: ["sum", "sum_squares", *BN_INPUTS],
        {**BN_ATTRS, "elem_count": REQUIRED},
        _bn_stats_finalize,
    ),
    "ScaleBiasAddRelu": (
        _apply_inputs,
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


def _parse_attribute(operator, name, value, default):
    """Return the value in the type of the default: MXNet passes attributes as text."""
    if isinstance(default, bool):
        if str(value).lower() not in ("true", "false", "1", "0"):
            raise MXNetError(f"{operator}: {name} must be a bool, not {value!r}")
        return str(value).lower() in ("true", "1")
    if isinstance(default, (int, float)) and isinstance(value, bool):
        raise MXNetError(f"{operator}: {name} must be a number, not {value!r}")
    return value if default is None or default is REQUIRED else type(default)(value)


def _split_attributes(operator, declared, arguments):
    """Return (attributes with defaults, input symbols) of the keyword arguments of an operator."""
    attrs = {key: value for key, value in declared.items() if value is not REQUIRED}
    inputs = {}
    for key, value in arguments.items():
        if isinstance(value, mx.sym.Symbol):
            inputs[key] = value
        elif key in declared:
            attrs[key] = _parse_attribute(operator, key, value, declared[key])
        else:
            names = ", ".join(declared)
            raise MXNetError(
                f"Cannot find argument '{key}', Possible Arguments: {names} ({operator})"
            )
    if set(attrs) != set(declared):
        missing = set(declared) - set(attrs)
        raise MXNetError(f"{operator}: required parameter {missing} is not presented")
    return attrs, inputs


def _complete_inputs(operator, name, input_names, positional, keywords):
    """Return all inputs by name, with new variables for those that were not passed."""
    inputs = {**dict(zip(input_names, positional)), **keywords}
    too_many = len(positional) > len(input_names)
    passed_twice = len(inputs) != len(positional) + len(keywords)
    if too_many or passed_twice or not set(inputs) <= set(input_names):
        raise MXNetError(
            f"{operator}: inputs {sorted(keywords)} after {len(positional)}; "
            f"candidates: {input_names}"
        )
    if any(len(symbol.list_outputs()) != 1 for symbol in inputs.values()):
        raise MXNetError(f"{operator}: an input is a tuple, single value is required")
    init = {"moving_mean": mx.init.Zero(), "moving_var": mx.init.One()}
    return {
        key: inputs[key] if key in inputs else mx.sym.var(f"{name}_{key}", init=init.get(key))
        for key in input_names
    }


class Registry:
    """The fake operators.

    Attributes:
        calls: (operator, layer name, attributes) of each layer made, in order.
    """

    def __init__(self):
        self.calls = []

    def make_operator(self, operator):
        """Return the function that replaces the operator in mx.sym."""
        inputs_of, declared, compute = OPERATORS[operator]

        def fake_operator(*data, name, **arguments):
            attrs, keywords = _split_attributes(operator, declared, arguments)
            inputs = _complete_inputs(operator, name, inputs_of(attrs), data, keywords)
            self.calls.append((operator, name, attrs))
            return compute(inputs, name, attrs)

        parameters = ["data", *declared, "name"]
        fake_operator.__signature__ = inspect.Signature(
            [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in parameters]
        )
        return fake_operator


def install(monkeypatch, without=(), data_type=np.float64, stats_type=np.float64):
    """Give mx.sym the operators of NVIDIA's MXNet, except some; return the registry."""
    registry = Registry()
    monkeypatch.setattr(Types, "data", data_type)
    monkeypatch.setattr(Types, "stats", stats_type)
    for operator in OPERATORS:
        if operator not in without:
            monkeypatch.setattr(mx.sym, operator, registry.make_operator(operator), raising=False)
    return registry
