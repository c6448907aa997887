# SPDX-License-Identifier: Apache-2.0
"""Does feedback help? Campaigns with feedback and with blind mutation, in turns, compared.

    python -m tests.bench.bench_feedback [--trials N] [--executions N] [--out DIR]
    python -m tests.bench.bench_feedback --harness files --target plan9 [--source SOURCE]

Same target, same seeds, same number of executions, one job each. A blind campaign sees and records
the same coverage, but its engine is shown the same map for each case, so it keeps nothing. Prints
what ``kcov-bridge fuzz compare`` prints; leaves figures and curves in DIR. Called again, it goes
on with the trials that are missing.

Without --harness the target is the kernel of the guest, and in it what looks for escape sequences
in the output to a virtual terminal (``terminal.c``): a parser with many states, quick enough for
many executions. The seed is plain text.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from bridge.config import Settings
from bridge.fuzz.campaign import Campaign, run_campaign
from bridge.fuzz.campaign_job import Plan
from bridge.fuzz.evaluate import DRAWING_FILE, evaluate

SOURCE = Path(__file__).with_name("terminal.c")
SEED = b"Hello, world.\nThe second line\twith a tab.\n"


def terminal(directory: Path) -> tuple[Path, Path]:
    """Compile the harness, and write its seed; return the harness and the directory of seeds."""
    corpus = directory / "seeds"
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "text").write_bytes(SEED)
    harness = directory / "terminal.so"
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    subprocess.run(["cc", *flags, "-o", harness, SOURCE], check=True)
    return harness.absolute(), corpus


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10, help="of each side (default: 10)")
    parser.add_argument("--executions", type=int, default=20_000, help="of each trial")
    parser.add_argument("--target", default="", help="as of kcov-bridge run")
    parser.add_argument("--source", default="", help="as of kcov-bridge run")
    parser.add_argument("--harness", default="", help="as of kcov-bridge fuzz")
    parser.add_argument("--corpus", type=Path, help="seeds (default: those of the harness)")
    parser.add_argument(
        "--reset-every",
        type=int,
        default=0,
        help="as of kcov-bridge fuzz (default: 0, as a reset takes long on a busy machine)",
    )
    parser.add_argument(
        "--case-time", type=float, default=30.0, help="seconds that a case may take (default: 30)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/feedback"), metavar="DIR")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    harness, corpus = args.harness, args.corpus
    chosen: dict[str, Any] = {
        name: getattr(args, name) for name in ("target", "source") if getattr(args, name)
    }
    if not harness:
        built, seeds = terminal(args.out)
        harness, corpus = str(built), corpus or seeds
        chosen |= {"target": "none", "source": "kernel"}
    settings = Settings(**chosen).changed()

    def said(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def run(out: Path, *, feedback: bool, executions: int, seed: int) -> None:
        plan = Plan(
            settings,
            harness=harness,
            feedback=feedback,
            random_seed=seed,
            reset_every=args.reset_every,
            case_seconds=args.case_time,
        )
        campaign = Campaign(out, plan, corpus=corpus, jobs=1, executions=executions)
        end = run_campaign(campaign, said=said)
        if end.interrupted is not None:
            raise end.interrupted

    comparison = evaluate(args.out, run, executions=args.executions, trials=args.trials, said=said)
    print(comparison.render())
    print(f"curves: {args.out / DRAWING_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
