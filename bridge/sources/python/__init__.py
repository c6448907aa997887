# SPDX-License-Identifier: Apache-2.0
"""Coverage of Python code, measured by coverage.py."""
