# SPDX-License-Identifier: Apache-2.0
"""The launchers: start ranks on this machine, in a container, under Slurm or on Kubernetes."""
