# SPDX-License-Identifier: Apache-2.0
"""Trace training steps. Python imports this file if its folder is on PYTHONPATH.

After each step every rank prints a hash of all parameters. A different momentum changes the hash of
the next step.
"""

import hashlib
import importlib.abc
import importlib.machinery
import os
import sys


class Finder(importlib.abc.MetaPathFinder):
    """Import mxresnet.trainer, then wrap Trainer.update."""

    def find_spec(self, name, search_path, target=None):
        if name != "mxresnet.trainer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, search_path, target)
        exec_module = spec.loader.exec_module

        def exec_module_and_wrap(module):
            exec_module(module)
            update = module.Trainer.update

            def update_and_trace(self):
                update(self)
                module.mx.nd.waitall()
                digest = hashlib.sha256()
                for arrays in self._module._exec_group.param_arrays:
                    digest.update(arrays[0].asnumpy().tobytes())
                rank = os.environ["OMPI_COMM_WORLD_RANK"]
                os.write(2, f"STEP of rank {rank}: {digest.hexdigest()}\n".encode())

            module.Trainer.update = update_and_trace

        spec.loader.exec_module = exec_module_and_wrap
        return spec


sys.meta_path.insert(0, Finder())
