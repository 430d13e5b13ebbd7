# SPDX-License-Identifier: Apache-2.0
"""Check the batch norms of a library against numpy in float64."""

import numpy as np
from batch_norm_library import (
    BN,
    BN_ADD_RELU,
    EPSILON,
    MOMENTUM,
    OPERATION_NAMES,
    BatchNormLayer,
)

from mxresnet.errors import UserError

# (n, h, w, c). Odd sizes, because kernels that work in tiles tend to fail there; the last six are
# sizes of ResNet-50.
CHECKED_SHAPES = [
    (1, 1, 2, 4),
    (2, 1, 1, 8),
    (2, 3, 5, 8),
    (3, 5, 7, 12),
    (1, 9, 2, 20),
    (5, 13, 17, 36),
    (31, 1, 1, 64),
    (2, 31, 33, 100),
    (3, 7, 7, 2048),
    (33, 7, 7, 512),
    (2, 14, 14, 1024),
    (5, 28, 28, 128),
    (3, 56, 56, 256),
    (2, 112, 112, 64),
    (71, 112, 112, 64),
]
MAX_SMALL_ELEMENTS = 500_000  # of the shapes for the CPU library and the sanitizer
CHANNEL_RESULTS = (
    *("dgamma", "dbeta", "saved_mean", "saved_inverse_std"),
    *("running_mean", "running_variance"),
)
AXES = (0, 1, 2)  # all but the channels


def random_inputs(operation, shape, dtype, seed):
    """Return random inputs by name, which dtype represents exactly.

    Each channel of x has its own mean and standard deviation.
    """
    random, c = np.random.RandomState(seed), shape[3]
    names = ("x", "dy", "z") if operation == BN_ADD_RELU else ("x", "dy")
    arrays = {name: random.randn(*shape).astype(np.float32) for name in names}
    arrays["x"] = arrays["x"] * (random.rand(c) * 3 + 0.2) + random.randn(c)
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    channels = {
        "gamma": random.randn(c),
        "beta": random.randn(c),
        "running_mean": random.randn(c),
        "running_variance": random.rand(c) + 0.5,
    }
    return {**arrays, **{name: array.astype(np.float32) for name, array in channels.items()}}


def _statistics(arrays, mean, variance, count):
    """Return {name: (expected, allowed error)} of the saved and running statistics."""
    inverse_std, std = 1 / np.sqrt(variance + EPSILON), np.sqrt(variance)
    running_mean, running_variance = arrays["running_mean"], arrays["running_variance"]
    unbiased = variance * count / (count - 1)
    return {
        "saved_mean": (mean, 1e-4 * (np.abs(mean) + std)),
        "saved_inverse_std": (inverse_std, 1e-4 * inverse_std),
        "running_mean": (
            MOMENTUM * running_mean + (1 - MOMENTUM) * mean,
            1e-5 * (np.abs(running_mean) + np.abs(mean) + std),
        ),
        "running_variance": (
            MOMENTUM * running_variance + (1 - MOMENTUM) * unbiased,
            1e-5 * (running_variance + variance),
        ),
    }


def _allowed_dx_error(dy, uncertain, passed_dy, normalized, normalized_error, rounding):
    """Return the allowed error of dx / (gamma * inverse_std).

    Args:
        dy: Gradient of the output.
        uncertain: Where rounding decides the sign of the ReLU's input.
        passed_dy: Gradient of the ReLU's input.
        normalized: (x - mean) * inverse_std.
        normalized_error: Its allowed error.
        rounding: Relative rounding error of the data type.
    """
    count = dy[..., 0].size
    dbeta, dgamma = passed_dy.sum(AXES), (passed_dy * normalized).sum(AXES)
    terms = np.abs(passed_dy) + np.abs(dbeta) / count + np.abs(normalized * dgamma) / count
    return (
        uncertain * np.abs(dy)
        + 2 * rounding * terms
        + normalized_error * np.abs(dgamma) / count
        + (normalized_error.max(AXES) * np.abs(dbeta) * np.abs(normalized)) / count
        + 1e-4 * rounding
    )


def expected_results(operation, arrays, found_y, rounding, smallest):
    """Return {name: (expected, allowed error)} of one step, in float64.

    The allowed error of an element is two roundings of each of its terms, and a few float32
    roundings of the statistics that it is computed from. Where many elements are summed in float32,
    it is 1e-4 of the sum of their magnitudes.

    Args:
        operation: BN, BN_RELU or BN_ADD_RELU.
        arrays: Inputs by name.
        found_y: Output of the step. Where the ReLU's input is so close to 0 that rounding decides
            its sign, the expected results follow this output.
        rounding: Relative rounding error of the data type.
        smallest: Smallest positive number of the data type.
    """
    x, dy, gamma, beta = (arrays[name].astype(np.float64) for name in ("x", "dy", "gamma", "beta"))
    z = arrays["z"].astype(np.float64) if operation == BN_ADD_RELU else np.zeros(1)
    count = x[..., 0].size
    mean, variance = x.mean(AXES), x.var(AXES)
    inverse_std = 1 / np.sqrt(variance + EPSILON)
    normalized = (x - mean) * inverse_std
    normalized_error = 2.0**-21 * (np.abs(x) + np.abs(mean)) * inverse_std  # the mean is float32
    before_relu = normalized * gamma + beta + z
    y_error = (
        2 * rounding * (np.abs(normalized * gamma) + np.abs(beta) + np.abs(z))
        + normalized_error * np.abs(gamma)
        + smallest
    )
    # Near 0 both signs are allowed. Backward may compute the value again and round differently, so
    # they are allowed there too.
    uncertain = (np.abs(before_relu) <= y_error) & (operation != BN)
    passed = np.where(uncertain, found_y > 0, before_relu > 0) | (operation == BN)
    passed_dy = dy * passed
    dbeta, dgamma = passed_dy.sum(AXES), (passed_dy * normalized).sum(AXES)
    dx_error = _allowed_dx_error(dy, uncertain, passed_dy, normalized, normalized_error, rounding)
    results = {
        "y": (before_relu if operation == BN else np.maximum(before_relu, 0), y_error),
        "dx": (
            gamma * inverse_std * (passed_dy - dbeta / count - normalized * dgamma / count),
            smallest + np.abs(gamma) * inverse_std * dx_error,
        ),
        "dgamma": (dgamma, 1e-4 * (np.abs(passed_dy * normalized).sum(AXES) + 1)),
        "dbeta": (dbeta, 1e-4 * (np.abs(passed_dy).sum(AXES) + 1)),
        **_statistics(arrays, mean, variance, count),
    }
    if operation == BN_ADD_RELU:
        results["dz"] = passed_dy, (uncertain + 2 * rounding) * np.abs(dy) + smallest
    return results


def expected_evaluation(operation, arrays, rounding, smallest):
    """Return (expected y, allowed error) of an evaluation with the running statistics, in float64.

    The allowed error is two roundings of each term. The arguments are those of expected_results().
    """
    x, mean, variance, gamma, beta = (
        arrays[name].astype(np.float64)
        for name in ("x", "running_mean", "running_variance", "gamma", "beta")
    )
    z = arrays["z"].astype(np.float64) if operation == BN_ADD_RELU else np.zeros(1)
    inverse_std = 1 / np.sqrt(variance + EPSILON)
    scaled = gamma * inverse_std * (x - mean)
    y = scaled + beta + z
    scaled_error = 2.0**-21 * np.abs(gamma) * inverse_std * (np.abs(x) + np.abs(mean))
    y_error = 2 * rounding * (np.abs(scaled) + np.abs(beta) + np.abs(z)) + scaled_error + smallest
    return y if operation == BN else np.maximum(y, 0), y_error


def error_ratios(operation, arrays, found, rounding, smallest):
    """Return {name: largest error as a multiple of the allowed error} of the results of a step."""
    expected = expected_results(operation, arrays, found["y"], rounding, smallest)
    expected["evaluated_y"] = expected_evaluation(operation, arrays, rounding, smallest)
    errors = {
        name: np.abs(found[name].astype(np.float64) - value) / (allowed + 1e-30)
        for name, (value, allowed) in expected.items()
    }
    return {name: float(np.nan_to_num(error, nan=np.inf).max()) for name, error in errors.items()}


def run_step(layer, arrays, operation):
    """Run forward, backward and an evaluation; return all results by name.

    The evaluation starts from the given running statistics, as the training step does.
    """
    layer.set(arrays)
    layer.forward()
    layer.backward()
    names = ["y", "dx", *CHANNEL_RESULTS]
    if operation == BN_ADD_RELU:
        names.append("dz")
    results = {name: layer.get(name).copy() for name in names}
    layer.set(arrays)
    layer.evaluate()
    return {**results, "evaluated_y": layer.get("y").copy()}


def check_shape(library, memory, operation, shape):
    """Run a step twice.

    Returns:
        (the errors found, whether both runs returned the same bits).
    """
    arrays = random_inputs(operation, shape, memory.dtype, seed=sum(shape))
    try:
        layer = BatchNormLayer(library, memory, operation, *shape)
        first, second = (run_step(layer, arrays, operation) for _ in range(2))
    except UserError as error:  # the library rejects the shape
        return [str(error)], True
    ratios = error_ratios(operation, arrays, first, memory.rounding, memory.smallest)
    errors = [
        f"{name} is off by {ratio:.3g} times the allowed error"
        for name, ratio in ratios.items()
        if not ratio <= 1
    ]
    errors += [f"{name} was written past its end" for name in layer.overrun_outputs()]
    return errors, all((first[name] == second[name]).all() for name in first)


def run_checks(library, memory, small):
    """Check and print each shape; return the number of failures.

    Args:
        library: Library with the functions of batch_norm.h.
        memory: HostMemory or GpuMemory.
        small: Whether to leave out the large shapes.
    """
    failures = 0
    for shape in CHECKED_SHAPES:
        if small and np.prod(shape) > MAX_SMALL_ELEMENTS:
            continue
        for operation, name in OPERATION_NAMES.items():
            errors, reproducible = check_shape(library, memory, operation, shape)
            failures += bool(errors)
            result = "; ".join(errors) or "right"
            if not reproducible:
                result += ", other bits in a second run"
            print(f"{name:12} {' x '.join(map(str, shape)):20} {result}", flush=True)
    print(f"{failures} wrong on {memory.name}")
    return failures
