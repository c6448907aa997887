# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge status``: what the running bridges do."""

from __future__ import annotations

import argparse
import json
from typing import Any

from bridge.session.stats import Stats
from bridge.session.status import ask_all

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Show the figures of each of your running bridges (returns, PCs, lost PCs) and its kcov instances.
"""

EPILOG = """\
examples:
  kcov-bridge status
  kcov-bridge status --json | jq .lost_pcs

The exit status is 1 if no bridge is running.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object for each bridge")


def run(args: argparse.Namespace) -> int:
    """Print the status of each running bridge; return 1 if there is none, else 0."""
    answers = ask_all()
    for answer in answers:
        print(json.dumps(answer) if args.json else _text(answer))
    if not answers and not args.json:
        print("no bridge is running")
    return 0 if answers else 1


def _text(status: dict[str, Any]) -> str:
    if "error" in status:
        return f"a bridge that does not answer: {status['error']}"
    # A bridge of another version may leave figures out.
    status = Stats().as_dict() | status
    lines = [
        f"bridge {status['pid']}: target {status['target']}, {status['accel']}, "
        f"Linux {status['kernel'] or '(booting)'}",
        f"  {status['returns']:,} returns, {status['pcs']:,} PCs, {status['lost_pcs']:,} lost, "
        f"{status['guest_timeouts']} time-outs, {status['guest_skipped']} skipped, "
        f"{status['source_failures']} failures of sources, "
        f"{status['tracer_faults']} faults of the tracer",
    ]
    if status["problem"]:
        lines.append(f"  some figures are old or missing: {status['problem']}")
    if status["instances"]:
        lines.append("  slot   owner  mode          words    appended     dropped")
    lines += [
        f"  {each['slot']:>4} {each['owner'] or '-':>7}  {each['mode']:<9} {each['words']:>9,} "
        f"{each['appended']:>11,} {each['dropped']:>11,}"
        for each in status["instances"]
    ]
    return "\n".join(lines)
