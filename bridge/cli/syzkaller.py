# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge syzkaller``: all that syzkaller's manager needs to fuzz a guest of ours."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import Final

from bridge.cli.arguments import add_settings, settings_of
from bridge.errors import UsageError

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Prepare a directory for syzkaller's manager: manager.cfg, and a stand-in for QEMU that starts our
guests. The checkout of syzkaller is your own, built by you, and stays unmodified. The line that is
printed starts the manager. What all guests covered together is in DIR/coverage.
"""

EPILOG = """\
examples:
  kcov-bridge syzkaller fuzz --syzkaller ~/syzkaller
  kcov-bridge syzkaller fuzz --syzkaller ~/syzkaller --count 2 --procs 8 --panic-on-warn
  kcov-bridge syzkaller fuzz --syzkaller ~/syzkaller --start
  kcov-bridge syzkaller fuzz --syzkaller ~/syzkaller --target plan9 --only-target

Build syzkaller's parts before: make manager executor execprog. The defaults here are those of the
stock kernel as the target: --image syzkaller --memory 1024 --target none. See docs/syzkaller.md.
"""

_ADDRESS: Final = re.compile(r"[^\s/]*:[0-9]{1,5}")
"""What the manager listens on: a name or an address of this machine, or none, and a port."""
_SETTINGS = (
    *("target", "target_dir", "target_timeout", "transport"),
    *("source", "comparisons", "isolate"),
    *("kernel_include", "kernel_exclude", "kernel_all", "vmlinux"),
    *("accel", "memory", "cpus", "cpu", "region", "image", "snapshot"),
    *("boot_timeout", "sandbox", "qemu"),
)
"""The settings of a run that make sense here."""

_DEFAULTS: Final = {
    "image": "syzkaller",
    "memory": 1024,
    "target": "none",
    "transport": "auto",
}
"""Settings that differ here from those of a run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting, and those of the command."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the directory to prepare")
    parser.add_argument(
        "--syzkaller",
        type=Path,
        required=True,
        metavar="CHECKOUT",
        help="the directory of syzkaller, which is built",
    )
    for flag, default, text in (
        ("--count", 1, "guests at a time"),
        ("--procs", 4, "programs at a time in each guest"),
        ("--loglevel", 7, "messages of the kernel up to this level are on the console"),
    ):
        parser.add_argument(
            flag, type=int, metavar="N", default=default, help=f"{text} (default {default})"
        )
    parser.add_argument(
        "--http",
        metavar="ADDRESS",
        default="127.0.0.1:56741",
        help="where the manager's page is (default 127.0.0.1:56741)",
    )
    parser.add_argument(
        "--panic-on-oops",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="an oops ends the guest (default: yes)",
    )
    parser.add_argument(
        "--panic-on-warn",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="a warning of the kernel ends the guest (default: no)",
    )
    parser.add_argument(
        "--only-target",
        action="store_true",
        help="keep to the calls that reach the target",
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help="programs mount disk images, too: seconds each under TCG, hundreds to begin with",
    )
    parser.add_argument(
        "--usb",
        action="store_true",
        help="programs emulate USB devices, too: up to 30 seconds each under TCG",
    )
    parser.add_argument("--start", action="store_true", help="start the manager at once")
    add_settings(parser, _SETTINGS, defaults=_DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Prepare the directory; print the line that starts the manager, or start it."""
    from bridge.cli.syzkaller_directory import Campaign, prepare
    from bridge.cli.syzkaller_trial import try_guest

    settings = settings_of(args, defaults=_DEFAULTS)
    for flag, value, least, most in (
        ("--count", args.count, 1, 1024),
        ("--procs", args.procs, 1, 64),
        ("--loglevel", args.loglevel, 1, 8),
    ):
        if not least <= value <= most:
            raise UsageError(
                f"{flag}: {value} is not allowed", hint=f"allowed is {least} to {most}"
            )
    if not _ADDRESS.fullmatch(args.http):
        raise UsageError(f"--http: {args.http} is no address", hint="an example is 127.0.0.1:56741")
    campaign = Campaign(
        settings,
        count=args.count,
        procs=args.procs,
        loglevel=args.loglevel,
        panic_on_oops=args.panic_on_oops,
        panic_on_warn=args.panic_on_warn,
        http=args.http,
        only_target=args.only_target,
        images=args.images,
        usb=args.usb,
    )
    words = prepare(args.directory, args.syzkaller, campaign, try_guest, start=args.start)
    if args.start:
        args.streams.err.flush()
        os.execv(words[0], words)
    args.streams.write_out(f"{shlex.join(words)}\n".encode())
    return 0
