# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge fuzz simulate``: what the coordinator of a campaign costs with many workers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bridge.errors import UsageError
from bridge.fuzz.simulation import RECORDED, Growth, Load, simulate_each

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = f"""\
Measure the coordinator of a campaign with simulated workers: messages, bytes, processor time and
memory. Merging, placement of jobs, the store and the messages are the campaign's own; what Dask's
scheduler does to carry messages is not part of it. What workers find comes from a model of how
coverage grows, fitted to a campaign of yours (--from), or to
{RECORDED.source}.
One worker vanishes every 30 simulated seconds.
"""

EPILOG = """\
examples:
  kcov-bridge fuzz simulate
  kcov-bridge fuzz simulate --workers 1000 --seconds 3600 --from build/campaign
  kcov-bridge fuzz simulate --json | jq '.[] | [.workers, .cpu_share]'
"""

_DEFAULT = (1, 10, 100, 1000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the action."""
    parser.add_argument(
        "--workers",
        type=int,
        action="append",
        metavar="N",
        help="how many workers, each with one VM; may be repeated (default: 1, 10, 100, 1000)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="simulated time (default: %(default)g)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=1000.0,
        metavar="R",
        help="executions per second of a worker (default: %(default)g)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="OUT",
        help="directory of a campaign whose cases the model is fitted to",
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of the dice (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Simulate, and print the figures; return 0.

    Raises:
        UsageError: the options make no sense, or there is nothing to fit the model to.
        InfrastructureError: the temporary directory cannot be written.
    """
    numbers = args.workers or _DEFAULT
    if min(numbers) < 1:
        raise UsageError("there is no campaign without workers", hint="--workers is 1 or more")
    if not (args.seconds >= 1 and args.rate > 0):
        raise UsageError(
            "nothing would happen in this time", hint="--seconds is 1 or more, --rate above 0"
        )
    growth = RECORDED if args.source is None else Growth.fitted(args.source)
    loads = list(
        simulate_each(
            numbers,
            growth,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
            seconds=args.seconds,
            rate=args.rate,
            seed=args.seed,
        )
    )
    if args.json:
        text = json.dumps([load.as_dict() for load in loads], indent=1, allow_nan=False)
    else:
        text = _table(loads, growth)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    return 0


_HEAD = ("workers", "cases", "repeated", "reports/s", "kB/s in", "kB/s out", "CPU", "memory")


def _table(loads: Sequence[Load], growth: Growth) -> str:
    rows = [
        (
            f"{load.workers:,}",
            f"{load.cases:,}",
            f"{load.repeated:,}",
            f"{load.reports / load.seconds:,.1f}",
            f"{load.bytes_in / load.seconds / 1e3:,.1f}",
            f"{load.bytes_out / load.seconds / 1e3:,.1f}",
            f"{100 * load.cpu_share:.2f} %",
            f"{load.memory / 2**20:,.0f} MiB",
        )
        for load in loads
    ]
    widths = [max(len(row[column]) for row in (_HEAD, *rows)) for column in range(len(_HEAD))]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in (_HEAD, *rows)]
    lines.append(
        f"{loads[0].seconds:g} simulated seconds; cases = {growth.factor:.3g} * executions ^ "
        f"{growth.exponent:.2g}, fitted to {growth.source}; CPU of one processor"
    )
    return "\n".join(lines)
