# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge serve``: a guest that others use over SSH, and that comes back after a crash."""

from __future__ import annotations

import argparse
from pathlib import Path

from bridge import config
from bridge.cli.arguments import add_settings, settings_of
from bridge.errors import UsageError

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Boot the same guest as `kcov-bridge run`, with its target, and hold it for other programs and for
people, who log in over SSH as root: a fuzzer that takes machines by their address, a script, a
debugger. If the guest is lost (a panic, a reboot, a QEMU that was killed), a new one starts on the
same port. SIGTERM or Ctrl-C ends it in order, with exit status 0.
"""

EPILOG = """\
examples:
  kcov-bridge serve                                  print the command to log in, and hold the guest
  kcov-bridge serve --ssh-port 10022 --json          a line of JSON when it is ready, for scripts
  kcov-bridge serve --put ./fuzzer:/root/fuzzer --module tun
                                                     with a program and a kernel module
  kcov-bridge serve --guest-setup setup.sh --target mypackage.target:Server

With --json, each line of stdout is an object. Its "event" is "ready" (with "ssh_host", "ssh_port",
"ssh_user", "ssh_key", "ssh_command", "starts", "kernel") or "lost" (with "reason"). The port and
the key stay the same; what was written in a guest that was lost is gone. Each new guest gets the
files, modules and set-up again, and its target starts anew.

In the guest, programs use /sys/kernel/debug/kcov, and `kcov-exec -u -- CMD` runs one under kcov.

The directory --out then holds what all guests covered together: summary.json, .coverage, html/,
lcov.info, blocks.tsv, kernel-blocks.tsv; it is brought up to date after each loss, too.
guests/N/console.log is the console of the Nth guest, while it runs, too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting, and those of the command."""
    parser.add_argument(
        "--ssh-port",
        metavar="N",
        default="0",
        help="port of 127.0.0.1 for SSH (default: a free one)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a line of JSON when the guest is ready, or lost"
    )
    parser.add_argument(
        "--put",
        action="append",
        default=[],
        metavar="FILE[:PATH]",
        help="put a file into each guest (default: into /root), executable if it is; repeatable",
    )
    parser.add_argument(
        "--guest-setup",
        type=Path,
        metavar="FILE",
        help="run a script in each guest before it is ready, after --put and --module",
    )
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="load a kernel module in each guest; repeatable",
    )
    # Nothing runs that could time out.
    add_settings(parser, [name for name in config.options() if name != "timeout"])


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes; return 0."""
    from bridge.cli.last_run import remember
    from bridge.cli.server import Provisions, serve

    try:
        port = int(args.ssh_port, 10)
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise UsageError(
            f'--ssh-port: "{args.ssh_port}" is not allowed', hint="a port is a number up to 65535"
        )
    settings = settings_of(args)
    provisions = Provisions.read(args.put, args.guest_setup, args.module)
    out = settings.out
    try:
        return serve(settings, provisions, args.streams, ssh_port=port, as_json=args.json)
    finally:
        remember(out)
