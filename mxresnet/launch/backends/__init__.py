# SPDX-License-Identifier: Apache-2.0
"""Where trials run: on this machine, in a container or under Slurm. Interface: base.Backend."""
