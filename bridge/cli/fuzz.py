# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge fuzz``: campaigns, and what is done with their findings and results."""

from __future__ import annotations

import argparse
import functools
from importlib import import_module
from typing import Any

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Work with the cases, findings and results of fuzz campaigns.
"""

EPILOG = ""

_ACTIONS: dict[str, str] = {
    "report": "make a page of a campaign, for a browser",
    "compare": "compare groups of campaigns, with the statistics of evaluations",
    "text": "print a case of the harness files as text, or make one of text",
}
"""What each action does; ``bridge.cli.fuzz_NAME`` carries it out, with the names of a subcommand's
module."""


def _fill(name: str, parser: argparse.ArgumentParser) -> None:
    module = import_module(f"bridge.cli.fuzz_{name}")
    parser.description, parser.epilog = module.DESCRIPTION, module.EPILOG
    module.add_arguments(parser)
    parser.set_defaults(fuzz_function=module.run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions."""
    actions = parser.add_subparsers(dest="fuzz_action", metavar="ACTION", required=True)
    for name, text in _ACTIONS.items():
        # The parser of each subcommand fills itself when it is used.
        fill: dict[str, Any] = {"fill": functools.partial(_fill, name)}
        actions.add_parser(name, help=text, **fill)


def run(args: argparse.Namespace) -> int:
    """Carry the action out; return its exit status."""
    return int(args.fuzz_function(args))
