# SPDX-License-Identifier: Apache-2.0
"""Build or test this project's batch-norm operators.

    python -m mxresnet.model.cudnn_bn build --gpu | --cpu      build the library
    python -m mxresnet.model.cudnn_bn test --gpu [N] | --cpu   compare it with MXNet's own operators

The library is built for the installed MXNet. The GPU library is for training in float16, NHWC. The
CPU library (float32) is for tests of everything except cuDNN's kernels; it is slower than MXNet's
own operators.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn, Optional, Sequence

from mxresnet.errors import UserError
from mxresnet.model.cudnn_bn import build, self_test
from mxresnet.model.cudnn_bn.runtime import UnavailableError
from mxresnet.process_guard import end_with_parent


def _parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mxresnet.model.cudnn_bn", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build_command = commands.add_parser("build", help="build the library")
    test_command = commands.add_parser("test", help="compare the operators with MXNet's own")
    for command in (build_command, test_command):
        kind = command.add_mutually_exclusive_group(required=True)
        kind.add_argument("--cpu", action="store_true", help="the library for tests: float32, C++")
        if command is build_command:
            kind.add_argument(
                "--gpu", action="store_true", help="the library for training: float16, NHWC, cuDNN"
            )
        else:
            kind.add_argument("--gpu", type=int, nargs="?", const=0, metavar="N", help="use GPU N")
    build_command.add_argument(
        "--cuda",
        action="append",
        default=[],
        metavar="DIR",
        help="folder to search first for CUDA 11 and cuDNN 8: a toolkit, or the target of pip "
        "install --target DIR with NVIDIA's wheels; may be repeated",
    )
    test_command.add_argument(
        "--batch-size",
        type=int,
        default=0,
        metavar="N",
        help="also test ResNet-50's largest and smallest feature maps with N images",
    )
    return parser.parse_args(argv)


def _test(options: argparse.Namespace) -> NoReturn:
    """Run the self-test in this process and end the process: status 0, or 1 if it failed.

    MXNet 1.9.1 may crash when it releases a GPU at the end of a process (apache/mxnet pull requests
    20998 and 21182). The process therefore ends without that.
    """
    # The kernel kills this process when its parent ends: a test that hangs must not outlive a rank.
    end_with_parent()
    import mxnet as mx

    try:
        self_test.run(mx.cpu() if options.cpu else mx.gpu(options.gpu), options.batch_size)
    except UnavailableError as error:
        message, status = str(error), 1
    else:
        message, status = "all operators agree with MXNet's own", 0
    print(message, flush=True)
    os._exit(status)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 success, 1 the self-test failed, 2 the library could not be built.
    """
    options = _parse(argv)
    if options.command == "test":
        _test(options)
    try:
        print(build.build_library("cpu" if options.cpu else "gpu", options.cuda))
    except UserError as error:
        print(f"mxresnet: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
