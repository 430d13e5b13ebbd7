# SPDX-License-Identifier: Apache-2.0
"""bus_error: a file that is cut off while it is mapped into memory."""

import signal

import pytest
from support.commands import python

# memchr is called without Python's lock, as DALI's threads read.
READ = """
import ctypes, mmap, os, sys
from mxresnet.bus_error import report_bus_errors
report_bus_errors()
file = os.memfd_create("records")
os.ftruncate(file, 8192)
records = mmap.mmap(file, 8192)
place = ctypes.addressof(ctypes.c_char.from_buffer(records)) + 4096
os.ftruncate(file, 0)
memchr = ctypes.CDLL(None).memchr
memchr(ctypes.c_void_p(place), 1, 1)
"""


def test_a_file_that_was_cut_off_is_reported_in_one_line():
    done = python("-c", READ)
    assert done.returncode == 2 and done.stderr.startswith("mxresnet: SIGBUS: a file was cut off")
    assert done.stderr.count("\n") == 1


def test_faulthandler_of_the_user_is_kept():
    done = python("-X", "faulthandler", "-c", READ)
    assert done.returncode == -signal.SIGBUS and "Fatal Python error: Bus error" in done.stderr


def test_other_signals_end_the_process_as_before():
    done = python("-c", READ.replace("memchr(", "os.kill(os.getpid(), 11); memchr("))
    assert done.returncode == -signal.SIGSEGV and done.stderr == ""


@pytest.mark.slow  # 7 seconds of sleep
def test_a_thread_with_pythons_lock_does_not_hang():
    done = python("-c", READ.replace("memchr(", "records[5000]; memchr("))
    assert done.returncode == -signal.SIGBUS
