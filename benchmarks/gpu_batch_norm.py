# SPDX-License-Identifier: Apache-2.0
"""The GPU batch norms of mxresnet/model/cudnn_bn/csrc without MXNet: are they right, and how near are they to the memory's speed?

    python benchmarks/gpu_batch_norm.py [--batch-size 256] [--rounds 20] [--checks-only] [--sanitize] [--cuda DIR]
    python benchmarks/gpu_batch_norm.py --cpu       the same checks on the plain C++ library, to check the checks

Wants an NVIDIA GPU, PyTorch for it, numpy, g++, and cuDNN 8 with its headers, or 9, which has the same functions still (PyTorch's
wheels bring cuDNN; CUDA's own headers, of the same CUDA, come from a toolkit or NVIDIA's wheels). Builds batch_norm_cudnn.cc, the
file that MXNet's operators call, as a library of its own. Compares forward, backward and running statistics with numpy in float64
on many sizes and says whether a second run gives the same bits. Then times each batch norm of ResNet-50 in turn with PyTorch's
batch_norm, add and relu (channels last, float16, as they come) and with a copy. --sanitize runs the checks under compute-sanitizer, which must be installed.

NOT RUN on a GPU yet: there was none where this was written. Only the checks and the compilation have been.
"""

import argparse
import ctypes
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mxresnet.model.cudnn_bn import build as extension_build  # noqa: E402
from mxresnet.config import UserError  # noqa: E402

BN, BN_RELU, BN_ADD_RELU = range(3)
NAMES = {BN: "bn", BN_RELU: "bn+relu", BN_ADD_RELU: "bn+add+relu"}
EPSILON, MOMENTUM = 1e-5, 0.9
GUARD = 256  # bytes behind each output that must stay as they were

# n, h, w, c. The odd ones are where kernels that work in tiles go wrong; the rest are ResNet-50's.
CHECKED = [
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
SMALL = 500_000  # elements: what the plain library and the sanitizer are given

# operation, height and width, channels, how often in ResNet-50 at 224 x 224: 53 in all.
RESNET50 = [
    (BN_RELU, 112, 64, 1),
    (BN_RELU, 56, 64, 6),
    (BN_ADD_RELU, 56, 256, 3),
    (BN, 56, 256, 1),
    (BN_RELU, 56, 128, 1),
    (BN_RELU, 28, 128, 7),
    (BN_ADD_RELU, 28, 512, 4),
    (BN, 28, 512, 1),
    (BN_RELU, 28, 256, 1),
    (BN_RELU, 14, 256, 11),
    (BN_ADD_RELU, 14, 1024, 6),
    (BN, 14, 1024, 1),
    (BN_RELU, 14, 512, 1),
    (BN_RELU, 7, 512, 5),
    (BN_ADD_RELU, 7, 2048, 3),
    (BN, 7, 2048, 1),
]


class Call(ctypes.Structure):
    """MxresnetBatchNorm of batch_norm.h."""

    _fields_ = [
        ("operation", ctypes.c_int32),
        ("channel_last", ctypes.c_int32),
        *[(name, ctypes.c_int64) for name in ("n", "h", "w", "c")],
        ("epsilon", ctypes.c_double),
        ("momentum", ctypes.c_double),
        *[
            (name, ctypes.c_void_p)
            for name in (
                "stream",
                "x",
                "z",
                "y",
                "gamma",
                "beta",
                "running_mean",
                "running_variance",
                "saved_mean",
                "saved_inverse",
                "reserve",
            )
        ],
        ("reserve_bytes", ctypes.c_uint64),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        *[(name, ctypes.c_void_p) for name in ("dy", "dx", "dz", "dgamma", "dbeta")],
    ]


class Sizes(ctypes.Structure):
    """MxresnetSizes of batch_norm.h."""

    _fields_ = [
        (name, ctypes.c_uint64) for name in ("reserve", "forward_workspace", "backward_workspace")
    ]


class Host:
    """Memory for the plain library."""

    dtype, unit, tiny, stream, name = (
        np.dtype("float32"),
        2.0**-23,
        0,
        None,
        "the plain C++ library",
    )

    def put(self, array):
        return np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy()

    def get(self, memory):
        return memory

    def pointer(self, memory):
        return memory.ctypes.data


class Gpu:
    """Memory of the current GPU, by PyTorch, and its name."""

    dtype, unit, tiny = np.dtype("float16"), 2.0**-11, 2.0**-24

    def __init__(self, torch, library):
        self._torch, self.place = torch, {"device": "cuda", "dtype": torch.float16}
        self.stream = torch.cuda.current_stream().cuda_stream
        self.name = f"{torch.cuda.get_device_name()}, cuDNN {library.cudnnGetVersion()}, PyTorch {torch.__version__}"

    def put(self, array):
        return self._torch.from_numpy(Host().put(array)).cuda()

    def get(self, memory):
        return memory.cpu().numpy()

    def pointer(self, memory):
        return memory.data_ptr()


class Layer:
    """One batch norm with its memory: set() its inputs, forward() and backward() as often as wanted, get() what came out."""

    def __init__(self, library, device, operation, n, h, w, c):
        self._library, self._device, self._memory = library, device, {}
        self._call = Call(
            operation=operation,
            channel_last=1,
            n=n,
            h=h,
            w=w,
            c=c,
            epsilon=EPSILON,
            momentum=MOMENTUM,
            stream=device.stream,
        )
        sizes = Sizes()
        self._run(library.mxresnet_batch_norm_sizes, ctypes.byref(sizes))
        data = n * h * w * c * device.dtype.itemsize
        outputs = {
            "y": data,
            "dx": data,
            "dz": data if operation == BN_ADD_RELU else 0,
            "reserve": sizes.reserve,
        }
        outputs.update(workspace=max(sizes.forward_workspace, sizes.backward_workspace))
        outputs.update(dict.fromkeys(("saved_mean", "saved_inverse", "dgamma", "dbeta"), 4 * c))
        self._sizes = {name: int(size) for name, size in outputs.items()}
        for name, size in self._sizes.items():
            self._own(name, np.full(size + GUARD, 0xA5, np.uint8))
        self._call.reserve_bytes, self._call.workspace_bytes = (
            self._sizes["reserve"],
            self._sizes["workspace"],
        )

    def _run(self, function, *arguments):
        message = ctypes.create_string_buffer(512)
        if function(ctypes.byref(self._call), *arguments, message):
            raise UserError(message.value.decode())

    def _own(self, name, array):
        self._memory[name] = self._device.put(array)
        setattr(self._call, name, self._device.pointer(self._memory[name]))

    def set(self, arrays):
        for name, array in arrays.items():
            self._own(name, array.astype(self._device.dtype if array.ndim == 4 else np.float32))

    def forward(self):
        self._run(self._library.mxresnet_batch_norm_forward)

    def backward(self):
        self._run(self._library.mxresnet_batch_norm_backward)

    def get(self, name):
        """An array of n x h x w x c, or of c, in its own type."""
        raw = self._device.get(self._memory[name])[: self._sizes.get(name)]
        call = self._call
        return (
            raw.view(self._device.dtype).reshape(call.n, call.h, call.w, call.c)
            if name in ("x", "z", "y", "dx", "dz", "dy")
            else raw.view(np.float32)
        )

    def overrun(self):
        """The outputs that were written past their end."""
        return [
            name
            for name, size in self._sizes.items()
            if (self._device.get(self._memory[name])[size:] != 0xA5).any()
        ]


def inputs(operation, shape, dtype, seed):
    """Random inputs that dtype holds exactly, with a mean and a spread of their own in each channel."""
    random, c = np.random.RandomState(seed), shape[3]
    arrays = {
        name: random.randn(*shape).astype(np.float32)
        for name in ("x", "dy", "z")[: 3 if operation == BN_ADD_RELU else 2]
    }
    arrays["x"] = arrays["x"] * (random.rand(c) * 3 + 0.2) + random.randn(c)
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    arrays.update(
        gamma=random.randn(c),
        beta=random.randn(c),
        running_mean=random.randn(c),
        running_variance=random.rand(c) + 0.5,
    )
    return {
        name: array if array.ndim == 4 else array.astype(np.float32)
        for name, array in arrays.items()
    }


def compare(operation, arrays, found, unit, tiny):
    """{name: largest error in multiples of what is allowed} of a step, against float64.

    unit and tiny are the data type's rounding, as a fraction and near zero. Allowed are two roundings of each term that goes into an element, a few float32 roundings of the statistics it is made with,
    and 1e-4 of the sum of magnitudes where many elements are summed, in float32.
    """
    x, dy, gamma, beta = (arrays[name].astype(np.float64) for name in ("x", "dy", "gamma", "beta"))
    z = arrays["z"].astype(np.float64) if operation == BN_ADD_RELU else np.zeros(1)
    axes, count = (0, 1, 2), x[..., 0].size
    mean, variance = x.mean(axes), x.var(axes)
    inverse = 1 / np.sqrt(variance + EPSILON)
    normal = (x - mean) * inverse
    blur = 2.0**-21 * (np.abs(x) + np.abs(mean)) * inverse  # of normal, whose mean is float32
    before = normal * gamma + beta + z
    near = (
        2 * unit * (np.abs(normal * gamma) + np.abs(beta) + np.abs(z)) + blur * np.abs(gamma) + tiny
    )
    # Near 0 either is right, also in backward, which may compute it again with other roundings.
    unsure = (np.abs(before) <= near) & (operation != BN)
    passed = np.where(unsure, found["y"] > 0, before > 0) | (operation == BN)
    through = dy * passed
    sums, products = through.sum(axes), (through * normal).sum(axes)
    spread = np.sqrt(variance)
    expected = {
        "y": (before if operation == BN else np.maximum(before, 0), near),
        "dx": (
            gamma * inverse * (through - sums / count - normal * products / count),
            tiny
            + np.abs(gamma)
            * inverse
            * (
                unsure * np.abs(dy)
                + 2
                * unit
                * (np.abs(through) + np.abs(sums) / count + np.abs(normal * products) / count)
                + blur * np.abs(products) / count
                + (blur.max(axes) * np.abs(sums) * np.abs(normal)) / count
                + 1e-4 * unit
            ),
        ),
        "dgamma": (products, 1e-4 * (np.abs(through * normal).sum(axes) + 1)),
        "dbeta": (sums, 1e-4 * (np.abs(through).sum(axes) + 1)),
        "saved_mean": (mean, 1e-4 * (np.abs(mean) + spread)),
        "saved_inverse": (inverse, 1e-4 * inverse),
        "running_mean": (
            MOMENTUM * arrays["running_mean"] + (1 - MOMENTUM) * mean,
            1e-5 * (np.abs(arrays["running_mean"]) + np.abs(mean) + spread),
        ),
        "running_variance": (
            MOMENTUM * arrays["running_variance"] + (1 - MOMENTUM) * variance * count / (count - 1),
            1e-5 * (arrays["running_variance"] + variance),
        ),
    }
    if operation == BN_ADD_RELU:
        expected["dz"] = through, (unsure + 2 * unit) * np.abs(dy) + tiny
    errors = {
        name: np.abs(found[name].astype(np.float64) - value) / (allowed + 1e-30)
        for name, (value, allowed) in expected.items()
    }
    return {name: float(np.nan_to_num(error, nan=np.inf).max()) for name, error in errors.items()}


def check(library, device, operation, shape):
    """Run a step twice; returns (problems, whether both gave the same bits)."""
    arrays = inputs(operation, shape, device.dtype, seed=sum(shape))
    try:
        layer = Layer(library, device, operation, *shape)
        steps = [take_step(layer, arrays, operation) for _ in range(2)]
    except UserError as error:  # cuDNN refuses a size
        return [str(error)], True
    errors = compare(operation, arrays, steps[0], device.unit, device.tiny)
    problems = [
        f"{name} is off by {error:.3g} times what is allowed"
        for name, error in errors.items()
        if not error <= 1
    ]
    problems += [f"{name} was written past its end" for name in layer.overrun()]
    return problems, all((steps[0][name] == steps[1][name]).all() for name in steps[0])


def take_step(layer, arrays, operation):
    """All that comes out of a step, by name."""
    layer.set(arrays)
    layer.forward()
    layer.backward()
    names = [
        "y",
        "dx",
        "dgamma",
        "dbeta",
        "saved_mean",
        "saved_inverse",
        "running_mean",
        "running_variance",
    ]
    return {name: layer.get(name).copy() for name in names + ["dz"] * (operation == BN_ADD_RELU)}


def run_checks(library, device, small):
    """Print a line for each size; returns how many were wrong."""
    wrong = 0
    for shape in CHECKED:
        if small and np.prod(shape) > SMALL:
            continue
        for operation, name in NAMES.items():
            problems, same = check(library, device, operation, shape)
            wrong += bool(problems)
            print(
                f"{name:12} {' x '.join(map(str, shape)):20} {'; '.join(problems) or 'right'}{'' if same else ', other bits in a second run'}",
                flush=True,
            )
    print(f"{wrong} wrong on {device.name}")
    return wrong


def peer(torch, place, operation, shape):
    """PyTorch's step: (forward, backward) on memory of its own. place: its device and dtype."""
    n, h, w, c = shape
    x, z, dy = (
        torch.randn(n, c, h, w, **place).to(memory_format=torch.channels_last) for _ in range(3)
    )
    gamma, beta, mean, variance = (torch.ones(c, device=place["device"]) for _ in range(4))
    wanted = [
        tensor.requires_grad_()
        for tensor in ([x, z, gamma, beta] if operation == BN_ADD_RELU else [x, gamma, beta])
    ]
    kept = []

    def forward():
        y = torch.nn.functional.batch_norm(
            x, mean, variance, gamma, beta, training=True, momentum=1 - MOMENTUM, eps=EPSILON
        )
        kept[:] = [y if operation == BN else torch.relu(y + z if operation == BN_ADD_RELU else y)]

    return forward, lambda: torch.autograd.grad(kept[0], wanted, dy, retain_graph=True)


def measure(torch, run, repeats=5):
    """Milliseconds of one run, on the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(
        5_000_000
    )  # cycles in which Python gets ahead: else small layers show how fast it is
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def time_one(torch, library, device, operation, shape, rounds):
    """Median milliseconds by contender, taken in turn: copy of one tensor, and forward and backward of ours and of PyTorch."""
    layer = Layer(library, device, operation, *shape)
    few = inputs(
        operation, (4, *shape[1:]), device.dtype, seed=1
    )  # and again: numpy takes minutes for a whole batch
    layer.set(
        {name: np.resize(array, shape) if array.ndim == 4 else array for name, array in few.items()}
    )
    theirs = peer(torch, device.place, operation, shape)
    source = torch.zeros(shape, **device.place)
    target = torch.empty_like(source)
    runs = {
        "copy": lambda: target.copy_(source),
        "forward": layer.forward,
        "backward": layer.backward,
        "torch forward": theirs[0],
        "torch backward": theirs[1],
    }
    times = {name: [] for name in runs}
    for number in range(rounds + 3):
        for name, run in runs.items():
            taken = measure(torch, run)
            if number >= 3:  # the first ones warm up
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def run_timing(torch, library, device, batch, rounds):
    """The share of a copy's speed: of the least traffic (each tensor once), and of one that reads its inputs twice, as it must
    where they do not fit on the chip."""
    print(
        f"batch {batch}, {rounds} rounds: ms forward + backward, ours and PyTorch's; share of a copy's speed, tensors read once / twice"
    )
    total = dict.fromkeys(("ours", "torch", "once", "twice"), 0.0)
    for operation, size, channels, times in RESNET50:
        taken = time_one(torch, library, device, operation, (batch, size, size, channels), rounds)
        added = operation == BN_ADD_RELU
        tensor = taken["copy"] / 2  # a copy reads one and writes one
        once, twice = (
            tensor * (5 + 2 * added),
            tensor * (8 + 2 * added),
        )  # x y, x dy dx, and z dz; again x, x dy
        ours, theirs = (
            taken["forward"] + taken["backward"],
            taken["torch forward"] + taken["torch backward"],
        )
        print(
            f"{times:2} x {NAMES[operation]:12} {size:3} x {size:3} x {channels:4}: {taken['forward']:.3f} + {taken['backward']:.3f}, PyTorch "
            f"{taken['torch forward']:.3f} + {taken['torch backward']:.3f} ({theirs / ours:.2f} x); {once / ours:.2f} / {twice / ours:.2f}",
            flush=True,
        )
        for name, value in (("ours", ours), ("torch", theirs), ("once", once), ("twice", twice)):
            total[name] += times * value
    ours = total["ours"]
    print(
        f"all 53: {ours:.2f} ms, PyTorch {total['torch']:.2f} ms ({total['torch'] / ours:.2f} x); {total['once'] / ours:.2f} / {total['twice'] / ours:.2f}"
    )


def build(kind, folders, target):
    """The C part alone as a library. PyTorch's own cuDNN is taken where its wheel has it."""
    if kind == "cpu":
        extension_build.compile_library([extension_build.SOURCES / "batch_norm_cpu.cc"], target, [])
        return
    cuda = extension_build.CudaFiles(
        [
            *folders,
            *(path for path in sys.path if (pathlib.Path(path) / "nvidia" / "cudnn").is_dir()),
        ]
    )
    extension_build.compile_library(
        [extension_build.SOURCES / "batch_norm_cudnn.cc"], target, [*cuda.flags, *cuda.libraries]
    )


def load(path):
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(
            f"{error}: the CUDA and cuDNN that were found are not those of PyTorch; give the right ones with --cuda DIR"
        )


def find_gpu():
    try:
        import torch
    except ImportError:
        raise UserError(
            "PyTorch is not installed: it lends this benchmark the GPU's memory and is what it compares with"
        )
    if not torch.cuda.is_available():
        raise UserError(
            "no NVIDIA GPU that PyTorch can use: run this where there is one (--cpu checks the checks without)"
        )
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    return torch


def sanitize(options):
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if not tool:
        raise UserError(
            "compute-sanitizer is not installed: it comes with the CUDA toolkit (apt-get install cuda-sanitizer-11-8)"
        )
    again = [
        sys.executable,
        __file__,
        "--checks-only",
        "--small",
        *(word for folder in options.cuda for word in ("--cuda", folder)),
    ]
    tools = (
        ["memcheck", "--report-api-errors", "no"],
        ["racecheck"],
        ["initcheck"],
    )  # PyTorch asks for what a GPU may not have
    return max(
        subprocess.run([tool, "--error-exitcode", "9", "--tool", *name, *again]).returncode
        for name in tools
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--cpu", action="store_true", help="check the plain C++ library; no GPU, no timing"
    )
    parser.add_argument("--checks-only", action="store_true", help="no timing")
    parser.add_argument("--small", action="store_true", help="leave out the large sizes")
    parser.add_argument(
        "--sanitize", action="store_true", help="the small checks under compute-sanitizer"
    )
    parser.add_argument(
        "--cuda",
        action="append",
        default=[],
        metavar="DIR",
        help="where to look first for CUDA and cuDNN; may be repeated",
    )
    parser.add_argument(
        "--library", help="a library with batch_norm.h's functions, not to build one"
    )
    options = parser.parse_args()
    try:
        torch = None if options.cpu else find_gpu()
        if options.sanitize:
            return sanitize(options)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(options.library or f"{folder}/libbatch_norm.so")
            if not options.library:
                build("cpu" if options.cpu else "gpu", options.cuda, path)
            library = load(path.resolve())
            device = Host() if options.cpu else Gpu(torch, library)
            wrong = run_checks(library, device, options.small or options.cpu)
            if not (options.cpu or options.checks_only):
                run_timing(torch, library, device, options.batch_size, options.rounds)
        return 1 if wrong else 0
    except UserError as error:
        print(f"gpu_batch_norm.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
