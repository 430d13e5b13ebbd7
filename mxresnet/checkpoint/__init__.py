# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: what is in one, which one a run resumes from, and when one is written."""
