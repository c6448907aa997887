# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge run``: one command, or the default workload, in a guest under kcov."""

from __future__ import annotations

import argparse

from bridge.cli.arguments import add_settings, settings_of

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Boot a guest, start the target on this machine under coverage, mount it in the guest, and run a
command there under kcov. Without a command, run the target's workload: for the default one, file
work.
"""

EPILOG = """\
examples:
  kcov-bridge run
  kcov-bridge run --out build/ls -- ls -lR /mnt/target
  kcov-bridge run --source python -- cat /mnt/target/README
  kcov-bridge run --trace -- cat /mnt/target/README
  kcov-bridge run -- sh -s <script.sh
  kcov-bridge run --target none --syscall-pcs -- true
  kcov-bridge run --target mypackage.target:Server --timeout 60 -- sh -c 'cat /mnt/target/*'
  KCOV_BRIDGE_MEMORY=512 kcov-bridge run

The command gets the standard input of this one; in a loop that reads from it, give </dev/null.

The directory --out then holds summary.json, pcs.txt (one hex PC a line, in order), blocks.tsv,
.coverage, html/, lcov.info and console.log; `kcov-bridge symbolize <build/run/pcs.txt` says which
source each PC is.

The exit status is that of the command; 125: the bridge failed, 124: time-out, 123: the guest
was lost, 2: wrong usage.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting, and ``--trace``."""
    add_settings(parser)
    parser.add_argument(
        "--trace",
        nargs="?",
        const="-",
        metavar="FILE",
        help="trace the command's system calls: print them with the code that each reached, to "
        "stderr or to --trace=FILE, and leave trace.jsonl and trace.perfetto.json in --out",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``args.command``, or the default workload; return its exit status."""
    from bridge.cli import runner
    from bridge.cli.last_run import remember

    settings = settings_of(args)
    out = settings.out
    try:
        return runner.run(settings, args.command, args.streams, trace=args.trace)
    finally:
        remember(out)
