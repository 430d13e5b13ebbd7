# SPDX-License-Identifier: Apache-2.0
"""python -m mxresnet: run one rank of a training run."""

import os
import signal
import sys
import warnings

if __name__ == "__main__":
    # Until the streams are prepared, an interrupt ends the process without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # With PYTHONWARNINGS=error, a warning of a package would end the run.
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.simplefilter("default")

from mxresnet.bus_error import report_bus_errors
from mxresnet.environment import check_python_path, explain
from mxresnet.errors import ExitStatus, UserError, exit_now
from mxresnet.standard_streams import check_output, prepare_streams


def main() -> ExitStatus:
    """Import the program, run it and return its exit status."""
    try:
        check_python_path(os.environ)
        from mxresnet import cli

        try:
            return cli.main()
        except SystemExit:  # of --help
            check_output()
            return ExitStatus.SUCCESS
    except UserError as error:
        reason = str(error)
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        reason = explanation
    sys.stderr.write(f"mxresnet: {reason}\n")
    return ExitStatus.USER_ERROR


if __name__ == "__main__":
    prepare_streams()
    report_bus_errors()
    # All ranks have finalized MPI: nothing would end a rank that hangs in a library's cleanup.
    exit_now(main())
