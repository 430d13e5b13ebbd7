# SPDX-License-Identifier: Apache-2.0
"""Call libraries with the C interface of mxresnet/model/cudnn_bn/csrc/batch_norm.h from Python."""

import ctypes

import numpy as np

from mxresnet.errors import UserError

BN, BN_RELU, BN_ADD_RELU = range(3)  # MxresnetOperation of batch_norm.h
OPERATION_NAMES = {BN: "bn", BN_RELU: "bn+relu", BN_ADD_RELU: "bn+add+relu"}
EPSILON, MOMENTUM = 1e-5, 0.9
MESSAGE_BYTES = 512
GUARD_BYTES = 256  # after each output; a layer must not change them
GUARD = 0xA5  # value of each of these bytes
DATA_ARRAYS = ("x", "z", "y", "dx", "dz", "dy")  # of n x h x w x c elements


def _pointers(*names):
    return [(name, ctypes.c_void_p) for name in names]


class CallStruct(ctypes.Structure):
    """MxresnetBatchNorm of batch_norm.h."""

    _fields_ = [
        ("operation", ctypes.c_int32),
        ("channel_last", ctypes.c_int32),
        *[(name, ctypes.c_int64) for name in ("n", "h", "w", "c")],
        ("epsilon", ctypes.c_double),
        ("momentum", ctypes.c_double),
        *_pointers("stream", "x", "z", "y", "gamma", "beta", "running_mean", "running_variance"),
        *_pointers("saved_mean", "saved_inverse_std", "reserve"),
        ("reserve_bytes", ctypes.c_uint64),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        *_pointers("dy", "dx", "dz", "dgamma", "dbeta"),
    ]


class SizesStruct(ctypes.Structure):
    """MxresnetSizes of batch_norm.h."""

    _fields_ = [
        (name, ctypes.c_uint64) for name in ("reserve", "forward_workspace", "backward_workspace")
    ]


class HostMemory:
    """Memory for the CPU library.

    Attributes:
        dtype: Type of the data.
        rounding: Relative rounding error of the type.
        smallest: Smallest positive number of the type; 0 where it is negligible.
        stream: CUDA stream of the calls.
        name: Device and library, for messages.
    """

    dtype = np.dtype("float32")
    rounding = 2.0**-23
    smallest = 0
    stream = None
    name = "the C++ library on the CPU"

    def put(self, array):
        """Return a copy of an array in this memory, as bytes."""
        return np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy()

    def get(self, memory):
        """Return the bytes of what put() returned, on the host."""
        return memory

    def pointer(self, memory):
        """Return the address of what put() returned."""
        return memory.ctypes.data


class GpuMemory:
    """Memory of the current GPU, allocated by PyTorch; the attributes are those of HostMemory."""

    dtype = np.dtype("float16")
    rounding = 2.0**-11
    smallest = 2.0**-24

    def __init__(self, torch, library):
        self._torch = torch
        self.tensor_options = {"device": "cuda", "dtype": torch.float16}
        self.stream = torch.cuda.current_stream().cuda_stream
        cudnn = library.cudnnGetVersion()
        self.name = f"{torch.cuda.get_device_name()}, cuDNN {cudnn}, PyTorch {torch.__version__}"

    def put(self, array):
        return self._torch.from_numpy(HostMemory().put(array)).cuda()

    def get(self, memory):
        return memory.cpu().numpy()

    def pointer(self, memory):
        return memory.data_ptr()


class BatchNormLayer:
    """One batch norm with its memory.

    Call set() with the inputs, then forward(), backward() and evaluate() any number of times, then
    get(). evaluate() overwrites the y of forward().
    """

    def __init__(self, library, memory, operation, n, h, w, c):
        """Allocate the memory.

        Raises:
            UserError: The library rejects the sizes.
        """
        self._library, self._memory, self._buffers = library, memory, {}
        self.call = CallStruct(
            operation=operation,
            channel_last=1,
            n=n,
            h=h,
            w=w,
            c=c,
            epsilon=EPSILON,
            momentum=MOMENTUM,
            stream=memory.stream,
        )
        sizes, self._plan = SizesStruct(), ctypes.c_void_p()
        pointers = map(ctypes.byref, (self.call, self._plan, sizes))
        self._run(library.mxresnet_plan_create, *pointers)
        data_bytes = n * h * w * c * memory.dtype.itemsize
        output_bytes = {
            "y": data_bytes,
            "dx": data_bytes,
            "dz": data_bytes if operation == BN_ADD_RELU else 0,
            "reserve": sizes.reserve,
            "workspace": max(sizes.forward_workspace, sizes.backward_workspace),
            **dict.fromkeys(("saved_mean", "saved_inverse_std", "dgamma", "dbeta"), 4 * c),
        }
        self._output_bytes = {name: int(size) for name, size in output_bytes.items()}
        for name, size in self._output_bytes.items():
            self._allocate(name, np.full(size + GUARD_BYTES, GUARD, np.uint8))
        self.call.reserve_bytes = self._output_bytes["reserve"]
        self.call.workspace_bytes = self._output_bytes["workspace"]

    def __del__(self):
        self._library.mxresnet_plan_destroy(self._plan)

    def _run(self, function, *arguments):
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        if function(*arguments, message):
            raise UserError(message.value.decode())

    def _run_pass(self, function):
        self._run(function, self._plan, ctypes.byref(self.call))

    def _allocate(self, name, array):
        self._buffers[name] = self._memory.put(array)
        setattr(self.call, name, self._memory.pointer(self._buffers[name]))

    def set(self, arrays):
        for name, array in arrays.items():
            dtype = self._memory.dtype if array.ndim == 4 else np.float32
            self._allocate(name, array.astype(dtype))

    def forward(self):
        self._run_pass(self._library.mxresnet_batch_norm_forward)

    def backward(self):
        self._run_pass(self._library.mxresnet_batch_norm_backward)

    def evaluate(self):
        self._run_pass(self._library.mxresnet_batch_norm_evaluate)

    def get(self, name):
        """Return an array of shape (n, h, w, c) in the data type, or of shape (c,) in float32."""
        raw = self._memory.get(self._buffers[name])[: self._output_bytes.get(name)]
        if name not in DATA_ARRAYS:
            return raw.view(np.float32)
        call = self.call
        return raw.view(self._memory.dtype).reshape(call.n, call.h, call.w, call.c)

    def overrun_outputs(self):
        """Return the names of the outputs that were written past their end."""
        return [
            name
            for name, size in self._output_bytes.items()
            if (self._memory.get(self._buffers[name])[size:] != GUARD).any()
        ]
