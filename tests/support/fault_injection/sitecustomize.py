# SPDX-License-Identifier: Apache-2.0
"""Inject a fault into one rank. Python imports this file if its folder is on PYTHONPATH.

NCCL_FAULT_INJECTION=<module>/<function or class.method>:<rank>:<action> wraps that function: its
third call (the first call of a function that a run calls only a few times) carries out the action.
The action is "raise", "exit", or the name of a signal that the rank sends to itself. The name of
the variable begins with NCCL_ because launchers forward such variables to the ranks.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import signal
import sys

FAULTY_CALL = 3
CALLED_A_FEW_TIMES = ("join", "warm_up", "evaluate")

target, rank, action = os.environ.get("NCCL_FAULT_INJECTION", "::").split(":")
module_name, _, path = target.partition("/")


def inject() -> None:
    os.write(2, b"FAULT INJECTED\n")
    if action == "raise":
        raise RuntimeError("injected fault")
    if action == "exit":
        os._exit(0)
    os.kill(os.getpid(), getattr(signal, action))


def with_fault(function):
    """Return a function that injects the fault and otherwise calls the given one."""
    faulty_call = 1 if function.__name__ in CALLED_A_FEW_TIMES else FAULTY_CALL
    calls = 0

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == faulty_call:
            inject()
        return function(*args, **kwargs)

    return wrapper


class Finder(importlib.abc.MetaPathFinder):
    """Import the module of the fault, then wrap its function."""

    def find_spec(self, name, search_path, target=None):
        if name != module_name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, search_path, target)
        exec_module = spec.loader.exec_module

        def exec_module_and_wrap(module):
            exec_module(module)
            *parents, last = path.split(".")
            owner = functools.reduce(getattr, parents, module)
            setattr(owner, last, with_fault(getattr(owner, last)))

        spec.loader.exec_module = exec_module_and_wrap
        return spec


if module_name and os.environ.get("OMPI_COMM_WORLD_RANK") == rank:
    sys.meta_path.insert(0, Finder())
