# SPDX-License-Identifier: Apache-2.0
"""Places where trials can run, behind one interface (base.Backend)."""
