# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge ssh``: a shell in a booted guest."""

from __future__ import annotations

import argparse

from bridge.cli.arguments import add_settings, settings_of

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Boot the same guest as `kcov-bridge run`, with its target mounted, and open a shell in it. The guest
is powered off when the shell ends.
"""

EPILOG = """\
examples:
  kcov-bridge ssh
  kcov-bridge ssh --target-dir ./files --memory 512

In the guest, `kcov-exec -u -- CMD` runs a command under kcov and prints each PC once; `kcov-exec`
alone prints its options.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting."""
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Open the shell; return its exit status."""
    from bridge.cli import runner

    return runner.shell(settings_of(args), args.streams)
