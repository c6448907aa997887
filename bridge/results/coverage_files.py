# SPDX-License-Identifier: Apache-2.0
"""HTML and LCOV reports, made by coverage.py from a run's ``.coverage`` data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.errors import InfrastructureError
from bridge.util.files import atomic_output

# coverage.py is imported where it is used: a run without coverage of Python does without.
if TYPE_CHECKING:
    import coverage

__all__ = ["HTML_DIRECTORY", "LCOV_FILE", "make_html", "make_lcov", "with_absolute_path"]

_log = logging.getLogger(__name__)

HTML_DIRECTORY = "html"
"""Name of the directory of HTML pages in a run's directory."""

LCOV_FILE = "lcov.info"
"""Name of the LCOV file in a run's directory."""


def _loaded(data_file: Path) -> coverage.Coverage:
    """Open the data with settings of our own; a configuration file of the user is ignored.

    Raises :class:`InfrastructureError` where the file is missing or no coverage data.
    """
    import coverage
    from coverage.exceptions import CoverageException

    if not data_file.is_file():
        raise InfrastructureError(f"there is no coverage data in {data_file}")
    # The paths in the data are absolute: the files are found from any working directory.
    measured = coverage.Coverage(data_file=str(data_file), config_file=False, messages=False)
    try:
        measured.load()
    except CoverageException as error:
        raise InfrastructureError(
            f"{data_file} cannot be read as coverage data", evidence=str(error)
        ) from error
    return measured


def _make(what: str, data_file: Path, destination: Path, make: Callable[[Path], object]) -> None:
    """Make a report beside its destination and move it there; a half-made one is deleted."""
    from coverage.exceptions import CoverageException, CoverageWarning, NoDataError

    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(destination) as made:
            with warnings.catch_warnings(record=True) as left_out:
                warnings.simplefilter("always", CoverageWarning)
                make(made)
            for warning in left_out:
                _log.warning("%s: %s", what, warning.message)
    except NoDataError as error:
        raise InfrastructureError(
            f"no {what} from {data_file}: nothing was measured", evidence=str(error)
        ) from error
    except (CoverageException, OSError) as error:
        raise InfrastructureError(
            f"no {what} from {data_file}: {type(error).__name__}", evidence=str(error)
        ) from error


def make_html(data_file: Path, directory: Path, *, contexts: bool = False) -> None:
    """Replace ``directory`` with HTML pages made from coverage data.

    A source file that is gone or cannot be parsed is left out with a warning.

    Args:
        contexts: show the contexts of each line.

    Raises:
        InfrastructureError: the report cannot be made; ``directory`` is as it was.
    """
    measured = _loaded(data_file)
    _make(
        "HTML report",
        data_file,
        directory,
        lambda made: measured.html_report(
            directory=str(made), ignore_errors=True, show_contexts=contexts
        ),
    )


def make_lcov(data_file: Path, file: Path) -> None:
    """Replace ``file`` with an LCOV report of absolute paths; raises as :func:`make_html`."""
    measured = _loaded(data_file)

    def make(made: Path) -> None:
        measured.lcov_report(outfile=str(made), ignore_errors=True)
        # coverage.py names files below the working directory from there; a reader of the file
        # may stand elsewhere.
        lines = made.read_text(encoding="utf-8").splitlines(keepends=True)
        made.write_text("".join(map(with_absolute_path, lines)), encoding="utf-8")

    _make("LCOV report", data_file, file, make)


def with_absolute_path(line: str) -> str:
    """Return a line of an LCOV file; one that names a source names it by its absolute path."""
    if not line.startswith("SF:"):
        return line
    return f"SF:{Path(line.removeprefix('SF:').rstrip()).absolute()}\n"
