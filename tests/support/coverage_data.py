# SPDX-License-Identifier: Apache-2.0
"""Reads coverage.py's files."""

from __future__ import annotations

from pathlib import Path

import coverage

__all__ = ["executed"]


def executed(data_file: Path | None) -> dict[str, list[int]]:
    """The lines in a coverage file."""
    assert data_file is not None
    data = coverage.CoverageData(basename=str(data_file))
    data.read()
    try:
        return {file: sorted(data.lines(file) or []) for file in data.measured_files()}
    finally:
        data.close(force=True)
