# SPDX-License-Identifier: Apache-2.0
"""Arguments that several subcommands share, each defined once.

Flags for settings come from :class:`bridge.config.Settings`; ``--run`` and ``--vmlinux`` name a run
directory and the debug information of its kernel.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from bridge import config

__all__ = [
    "add_run_directory",
    "add_settings",
    "add_vmlinux",
    "duration",
    "settings_of",
]

_UNITS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
"""Seconds in a unit of time."""


def duration(text: str) -> float:
    """Read a time above 0: a number of seconds, or one with ms, s, m, h or d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|[smhd]?)", text.strip())
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s, 5m, 4h or 500ms")
    return float(found[1]) * _UNITS[found[2]]


def add_settings(
    parser: argparse._ActionsContainer,
    names: Iterable[str] | None = None,
    *,
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Add ``--config`` and one flag for each setting; a flag that is not given is None.

    Args:
        parser: a parser, or a group of its arguments.
        names: the settings to add; all when None.
        defaults: those of the command, where they differ from the general ones.
    """
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings file (default: kcov-bridge.toml here, or the table [tool.kcov-bridge] of "
        "pyproject.toml)",
    )
    chosen = None if names is None else set(names)
    own = defaults or {}
    for name, option in config.options().items():
        if chosen is not None and name not in chosen:
            continue
        default = own[name] if name in own else config.default_of(name)
        text = option.help
        if default not in (None, "") and option.kind is not config.Kind.FLAG:
            text += f" (default {default})"
        flag, text = config.flag_of(name), text.replace("%", "%%")
        if option.kind is config.Kind.FLAG:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=None, help=text)
        else:
            metavar = "|".join(option.choices) if option.choices else option.metavar
            parser.add_argument(flag, metavar=metavar, default=None, help=text)


def settings_of(
    args: argparse.Namespace, *, defaults: Mapping[str, object] | None = None
) -> config.Settings:
    """Load the settings: defaults, file, environment, and the flags among parsed arguments.

    Args:
        args: the parsed arguments.
        defaults: as for :func:`add_settings`.

    Raises:
        UsageError: a setting has a wrong name or value.
    """
    given = vars(args)
    flags = {name: given[name] for name in config.options() if given.get(name) is not None}
    return config.load(flags, file=given.get("config"), defaults=defaults)


def add_run_directory(parser: argparse.ArgumentParser) -> None:
    """Add ``--run``; :func:`bridge.cli.last_run.find_run` finds one that is not given."""
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="directory of the run (default: the run that the file on stdin belongs to, else the "
        "last run, else build/run)",
    )


def add_vmlinux(parser: argparse.ArgumentParser) -> None:
    """Add ``--vmlinux``."""
    parser.add_argument(
        "--vmlinux",
        type=Path,
        metavar="FILE",
        help="debug information of the guest kernel, for files and lines (default: that of "
        "Debian's package linux-image-…-dbg, if installed)",
    )
