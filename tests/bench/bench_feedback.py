# SPDX-License-Identifier: Apache-2.0
"""Does feedback help? Campaigns with feedback and with blind mutation, in turns, compared.

    python -m tests.bench.bench_feedback [--trials N] [--executions N] [--harness SPEC] [--out DIR]

Same target, same seeds, same number of executions, one job each. A blind campaign sees and records
the same coverage, but its engine is shown the same map for each case, so it keeps nothing. Prints
what ``kcov-bridge fuzz compare`` prints; leaves figures and curves in DIR. Called again, it goes
on with the trials that are missing.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from bridge.config import Settings
from bridge.fuzz.campaign import Campaign, run_campaign
from bridge.fuzz.campaign_job import Plan
from bridge.fuzz.evaluate import DRAWING_FILE, evaluate


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10, help="of each side (default: 10)")
    parser.add_argument("--executions", type=int, default=20_000, help="of each trial")
    parser.add_argument("--target", default="", help="as of kcov-bridge run")
    parser.add_argument("--source", default="", help="as of kcov-bridge run")
    parser.add_argument("--harness", default="files", help="as of kcov-bridge fuzz")
    parser.add_argument("--corpus", type=Path, help="seeds (default: those of the harness)")
    parser.add_argument("--out", type=Path, default=Path("build/feedback"), metavar="DIR")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    chosen: dict[str, Any] = {
        name: getattr(args, name) for name in ("target", "source") if getattr(args, name)
    }
    settings = Settings(**chosen).changed()

    def said(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def run(out: Path, *, feedback: bool, executions: int, seed: int) -> None:
        plan = Plan(settings, harness=args.harness, feedback=feedback, random_seed=seed)
        campaign = Campaign(out, plan, corpus=args.corpus, jobs=1, executions=executions)
        end = run_campaign(campaign, said=said)
        if end.interrupted is not None:
            raise end.interrupted

    comparison = evaluate(args.out, run, executions=args.executions, trials=args.trials, said=said)
    print(comparison.render())
    print(f"curves: {args.out / DRAWING_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
