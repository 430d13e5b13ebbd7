# SPDX-License-Identifier: Apache-2.0
"""This project's batch-norm operators for public MXNet on a GPU.

The folder is optional: without it MXNet's own operators are used.
csrc/ has the operators, build.py compiles them, runtime.py loads them and creates their symbols,
and self_test.py compares them with MXNet's own operators.
"""
