# SPDX-License-Identifier: Apache-2.0
"""Two jobs beside one: executions per second, and the processor time of the coordination.

    python -m tests.bench.bench_jobs [--turns N] [--seconds N] [--jobs N] [--out DIR]

Campaigns with one job and with several take turns, with the same harness, target and seed. A turn's
time begins when all VMs execute cases, so the start is not in it. The executions are those of
``progress.jsonl``. The processor time is that of the campaign's processes in the same time, from
/proc. *Coordination* is the campaign's own process: the hub, Dask's scheduler, the figures and the
directory. A worker's process is slot, job and Dask's worker in one; its part is printed by itself.

The harness writes to a virtual terminal of the guest, whose kernel is the source
(``terminal.c``): one system call a case. With as many VMs as cores or more, an engine and its VM
share a core, so the ratio says what the machine gives, too: the load at the beginning is printed.
The coordination takes about the same per second whatever the VMs get, so its part is too large on a
machine that other programs use.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import InfrastructureError
from bridge.fuzz.progress import PROGRESS_FILE, Progress, Sample, read_progress
from tests.bench.bench_feedback import terminal
from tests.support import COMMAND, MARK, ROOT, started_by

RATIO_AIM = 0.85
"""Of what the jobs would do if they did not share anything."""
COORDINATION_AIM = 0.03
COORDINATION = "coordination"
PARTS = (COORDINATION, "workers", "engines", "VMs", "other")
_READY_SECONDS = 600.0
_SETTLE_SECONDS = 5.0
"""From when all VMs are there to when the time begins: the engines look at the seed first."""
_END_SECONDS = 180.0
_LOOK_SECONDS = 1.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Turn:
    """What a campaign did in the time that counts.

    Attributes:
        rate: executions per second.
        cores: cores that each part had, by its name in :data:`PARTS`.
    """

    rate: float
    cores: dict[str, float]

    @property
    def share(self) -> float:
        """The coordination's part of the processor time."""
        return self.cores[COORDINATION] / sum(self.cores.values())


class ProcessorTime:
    """The processor time of the processes that a campaign has started.

    A process that ends between two calls of :meth:`look` loses what it took since the first one.
    """

    def __init__(self, out: Path, campaign: int) -> None:
        self._out = out
        self._campaign = campaign
        self._first: dict[tuple[int, int], float] = {}
        self._last: dict[tuple[int, int], float] = {}
        self._parts: dict[tuple[int, int], str] = {}
        self._began = time.monotonic()
        self._seconds = 0.0
        self.look()
        self._first = dict(self._last)

    def look(self) -> None:
        """Read the processor time of all of them."""
        for pid, name in started_by(self._out).items():
            with contextlib.suppress(OSError):
                # What follows the name, which may have spaces.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                key = (pid, int(fields[19]))
                self._last[key] = (int(fields[11]) + int(fields[12])) / _TICKS
                self._parts[key] = self._part(pid, name)
        self._seconds = time.monotonic() - self._began

    def _part(self, pid: int, name: str) -> str:
        if pid == self._campaign:
            return COORDINATION
        for beginning, part in (("qemu", "VMs"), ("afl-fuzz", "engines"), ("kcov-shim", "engines")):
            if name.startswith(beginning):
                return part
        return "workers" if name.startswith("python") else "other"

    def cores(self) -> dict[str, float]:
        """Return how many cores each part had, from the first look to the last one."""
        sums = dict.fromkeys(PARTS, 0.0)
        for key, seconds in self._last.items():
            sums[self._parts[key]] += seconds - self._first.get(key, 0.0)
        return {part: sums[part] / self._seconds for part in PARTS}


@contextlib.contextmanager
def running(out: Path, jobs: int, arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a campaign; end it with Ctrl-C, or at once after an error."""
    command = [*COMMAND, "fuzz", "--plain", "--out", str(out), "--jobs", str(jobs), *arguments]
    with out.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, MARK: str(out)},
            # Ctrl-C is for the bench, which ends the campaign.
            start_new_session=True,
        )
        try:
            yield process
            process.send_signal(signal.SIGINT)
            process.wait(_END_SECONDS)
        finally:
            process.kill()
            process.wait()


def samples(out: Path) -> tuple[Sample, ...]:
    """Return what the campaign has noted so far."""
    progress = Progress()
    with contextlib.suppress(InfrastructureError):
        progress = read_progress(out / PROGRESS_FILE)
    return progress.samples


def take(out: Path, jobs: int, seconds: float, arguments: list[str]) -> Turn:
    """Run a campaign and return its figures."""
    with running(out, jobs, arguments) as process:

        def last() -> Sample | None:
            if process.poll() is not None:
                raise SystemExit(
                    f"the campaign ended with status {process.returncode}:\n"
                    f"{out.with_suffix('.log').read_text(errors='replace')[-2000:]}"
                )
            return next(reversed(samples(out)), None)

        deadline = time.monotonic() + _READY_SECONDS
        while not (there := last()) or there.vms < jobs or not there.executions:
            if time.monotonic() > deadline:
                raise SystemExit(f"not all VMs of {out} are there after {_READY_SECONDS:g} s")
            time.sleep(_LOOK_SECONDS)
        time.sleep(_SETTLE_SECONDS)
        first = last()
        used = ProcessorTime(out, process.pid)
        assert first is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
            last()
            used.look()
        counted = [each for each in samples(out) if each.seconds >= first.seconds]
    if fewest := [each for each in counted if each.vms < jobs]:
        raise SystemExit(f"only {fewest[0].vms} of {jobs} VMs were there for a time: see {out}")
    if len(counted) < 2:
        raise SystemExit(f"the campaign noted no figures in {seconds:g} s: see {out}")
    done = counted[-1].executions - counted[0].executions
    return Turn(done / (counted[-1].seconds - counted[0].seconds), used.cores())


def table(turns: dict[int, list[Turn]]) -> str:
    """Return the medians of all turns."""
    lines = []

    def row(name: str, cells: Iterable[str]) -> None:
        lines.append(f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells))

    def figures(name: str, figure: Callable[[Turn], float], form: str) -> None:
        row(name, (format(statistics.median(map(figure, of)), form) for of in turns.values()))

    def cores(part: str) -> Callable[[Turn], float]:
        return lambda turn: 100 * turn.cores[part]

    row("", (f"jobs: {jobs}" for jobs in turns))
    figures("executions a second", lambda turn: turn.rate, ",.1f")
    for part in PARTS:
        figures(f"{part}, % of a core", cores(part), ".1f")
    figures("coordination, % of all", lambda turn: 100 * turn.share, ".2f")
    return "\n".join(lines)


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3, help="campaigns of each (default: 3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each (default: 60)")
    parser.add_argument("--jobs", type=int, default=2, help="beside one (default: 2)")
    parser.add_argument(
        "--reset-every", type=int, default=2000, help="as of kcov-bridge fuzz (default: 2000)"
    )
    parser.add_argument(
        "--case-time", type=float, default=30.0, help="seconds that a case may take (default: 30)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the campaigns' directories")
    args = parser.parse_args()
    if args.turns < 1 or args.jobs < 2 or args.seconds <= 0:
        parser.error("--turns is at least 1, --jobs at least 2, --seconds above 0")
    # So that the campaigns do not ignore it, whatever this process was started by.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    turns: dict[int, list[Turn]] = {1: [], args.jobs: []}
    print(f"load at the beginning: {os.getloadavg()[0]:.1f}, cores: {os.cpu_count()}")
    with contextlib.ExitStack() as stack:
        place = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        place = place.absolute()
        harness, seeds = terminal(place)
        arguments = ["--target", "none", "--source", "kernel", "--harness", str(harness)]
        arguments += ["--corpus", str(seeds), "--reset-every", str(args.reset_every)]
        arguments += ["--case-time", str(args.case_time)]
        for number in range(1, args.turns + 1):
            for jobs, done in turns.items():
                turn = take(place / f"{jobs}-{number}", jobs, args.seconds, arguments)
                done.append(turn)
                print(
                    f"turn {number} of {args.turns}, jobs: {jobs}, {turn.rate:,.1f} executions/s",
                    file=sys.stderr,
                    flush=True,
                )
    print(table(turns))
    ratios = [more.rate / one.rate for one, more in zip(*turns.values(), strict=True)]
    ratio, wanted = statistics.median(ratios), RATIO_AIM * args.jobs
    share = statistics.median(each.share for each in turns[args.jobs])
    for name, value, aim, met in (
        (f"{args.jobs} jobs to one", f"{ratio:.2f} x", f"{wanted:.1f} x", ratio >= wanted),
        (
            f"coordination, {args.jobs} jobs",
            f"{100 * share:.2f} %",
            f"at most {100 * COORDINATION_AIM:g} %",
            share <= COORDINATION_AIM,
        ),
    ):
        print(f"{name:<28}{value:>14}   aim {aim}: {'met' if met else 'missed'}")
    print(f"turns: {', '.join(f'{each:.2f}' for each in ratios)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
