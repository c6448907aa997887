# SPDX-License-Identifier: Apache-2.0
"""Reports of finished runs: one HTML page for people; LCOV, Cobertura and JSON for programs.

``gather`` reads the directories of a run or of several, ``page`` makes the HTML page from the
template beside it, ``exports`` the other formats.
"""

from __future__ import annotations

from bridge.results.report.exports import EXPORTS
from bridge.results.report.gather import Report, gather
from bridge.results.report.page import render_page, write_report

__all__ = ["EXPORTS", "Report", "gather", "render_page", "write_report"]
