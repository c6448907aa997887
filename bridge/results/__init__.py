# SPDX-License-Identifier: Apache-2.0
"""What runs leave behind: figures, coverage, the record of tests, and reports of them."""

from __future__ import annotations

from typing import Final

__all__ = ["REPORT_FILE"]

# Defined here, so that a run need not import what makes reports.
REPORT_FILE: Final = "report.html"
"""Name of the HTML report in the directory of a run."""
