# SPDX-License-Identifier: Apache-2.0
"""syzkaller's manager on the stock kernel and on a kernel that was built with CONFIG_KCOV, in turn.

    python -m tests.bench.bench_syzkaller --syzkaller CHECKOUT [--minutes N] [--kernels A,B,...]
        [-- FLAGS]

The checkout is your own, and built (docs/syzkaller.md). The kernels:

* ``stock``: that of the image ``syzkaller``, as the distribution ships it, recorded by QEMU;
* ``kcov``: the reference kernel with CONFIG_KCOV and its own ``/sys/kernel/debug/kcov``;
* ``plain``: the same without CONFIG_KCOV, recorded by QEMU.

Each has a directory of its own below ``--out``, made by ``kcov-bridge syzkaller`` with the same
flags (FLAGS among them, as ``--images --usb``), and begins without a corpus. The manager is the
same, and so are its settings, accelerator, memory and number of programs at a time. The reference
kernels have fewer drivers and file systems than the stock kernel, so programs on them have less to
do; ``plain`` beside ``kcov`` tells what recording costs. :mod:`tests.system.reference` says what it
takes to build the reference kernels.

The figures are the manager's own (its flag ``-bench``). Programs are those of the fuzzer ("exec
gen", "exec fuzz", "exec candidate" and so on), the time is that in which it fuzzes ("fuzzing"):
booting, and the manager's first look at a guest, do not count. On a machine with other work, the
programs in a minute of the guest's processor time tell more than those in a minute. The functions
are those of all PCs in the manager's corpus (its page ``/rawcover``); ``functions.tsv`` has each
one and its number of PCs for each kernel. On ``stock`` and ``plain`` each basic block is a PC; with
CONFIG_KCOV the compiler leaves out some. So functions can be compared better than PCs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bridge.errors import BridgeError, InfrastructureError
from bridge.guest.images.store import image_directory
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.guest_kernel.symbols import KernelSymbols
from tests.support import COMMAND
from tests.system import reference

KERNELS = ("stock", "kcov", "plain")
_HTTP = "127.0.0.1:56751"
_START_SECONDS = 900.0
"""Until the manager fuzzes: it boots a guest, and has the executor try each feature."""
_COVER_SECONDS = 300.0
"""The manager reads debug information before it answers."""
_END_SECONDS = 120.0
_LOOK_SECONDS = 5.0


_EXECUTIONS = (
    *("gen", "fuzz", "candidate", "triage", "minimize", "smash", "inject", "hints", "seeds"),
    "collide",
)
"""Kinds of executions, pkg/fuzzer/stats.go in syzkaller."""


@dataclass
class Turn:
    """What the manager did with one kernel.

    Attributes:
        figures: the manager's, by their names, at the end.
        samples: programs and processor seconds of the guest, each time the figures came.
        functions: the number of PCs in the corpus by function; empty if unknown.
        problem: why it is unknown.
    """

    figures: dict[str, int] = field(default_factory=dict)
    samples: list[tuple[int, float]] = field(default_factory=list)
    functions: Counter[str] = field(default_factory=Counter)
    problem: str = ""

    @property
    def seconds(self) -> float:
        """How long the manager has fuzzed."""
        return self.figures.get("fuzzing", 0) / 1e9

    @property
    def programs(self) -> int:
        """How many programs the fuzzer had executed."""
        return sum(self.figures.get(f"exec {kind}", 0) for kind in _EXECUTIONS)

    @property
    def rate(self) -> float:
        """Programs a minute."""
        return self.programs * 60 / max(1.0, self.seconds)

    @property
    def per_processor_minute(self) -> float:
        """Programs a minute of processor time, once the first figures have come."""
        if len(self.samples) < 2:
            return 0.0
        (first, before), (last, after) = self.samples[0], self.samples[-1]
        return (last - first) * 60 / max(1.0, after - before)


def processor_seconds(process: int) -> float:
    """Return the processor time of all that a process has started, itself left out."""
    ticks: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # proc(5): after the name ppid is the second field, utime the twelfth, and so on.
            fields = path.read_text().rpartition(")")[2].split()
            ticks[int(path.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    found, total = {process}, 0
    while more := {pid for pid, (parent, _) in ticks.items() if parent in found} - found:
        found |= more
        total += sum(ticks[pid][1] for pid in more)
    return total / os.sysconf("SC_CLK_TCK")


def last_figures(text: str) -> dict[str, int] | None:
    """Return the last whole object of what the manager's flag -bench writes, one each minute."""
    decoder = json.JSONDecoder()
    found = None
    for match in re.finditer(r"^\{", text, re.MULTILINE):
        with contextlib.suppress(ValueError):
            found, _ = decoder.raw_decode(text, match.start())
    return found


def _prepare(kernel: str, directory: Path, arguments: argparse.Namespace) -> list[str]:
    """Make the directory of a kernel; return the manager's command."""
    flags = ["--source", "kernel"]
    debug = None
    if kernel != "stock":
        image = reference.build(kernel)
        if kernel == "kcov":
            debug = image_directory(image.name) / "vmlinux.debug"
        flags = ["--image", image.name, "--source", "python" if kernel == "kcov" else "kernel"]
    flags += ["--syzkaller", str(arguments.syzkaller), "--procs", str(arguments.procs)]
    flags += ["--memory", str(arguments.memory), "--cpus", str(arguments.cpus)]
    flags += ["--accel", "tcg", "--http", _HTTP, *arguments.flags]
    done = subprocess.run(
        [*COMMAND, "syzkaller", str(directory), *flags], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise InfrastructureError(f"kcov-bridge syzkaller ended with status {done.returncode}")
    if debug is not None and debug.is_file():
        # Its calls of kcov tell the manager which PCs there are. The others have an object of ours.
        objects = directory / "reference_obj"
        objects.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (objects / "vmlinux").symlink_to(debug)
        path = directory / "manager.cfg"
        config = json.loads(path.read_text()) | {"kernel_obj": str(objects)}
        path.write_text(json.dumps(config, indent=1) + "\n")
    return done.stdout.split()


@contextlib.contextmanager
def _manager(command: list[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (directory / "manager.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"-bench={directory / 'bench.json'}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _pcs() -> list[int]:
    try:
        with urllib.request.urlopen(f"http://{_HTTP}/rawcover", timeout=_COVER_SECONDS) as answer:
            text = answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()
        raise InfrastructureError(f"the manager's /rawcover says: {said}") from error
    except OSError as error:
        raise InfrastructureError(f"the manager's /rawcover does not answer: {error}") from error
    return [int(pc, 16) for pc in re.findall(r"^0x([0-9a-f]{1,16})$", text, re.MULTILINE)]


def _turn(kernel: str, directory: Path, arguments: argparse.Namespace) -> Turn:
    """Let the manager work, and look at what it did."""
    command = _prepare(kernel, directory, arguments)
    turn = Turn()
    pcs: list[int] = []
    began = time.monotonic()
    with _manager(command, directory) as process:
        deadline = began + _START_SECONDS
        while turn.seconds < arguments.minutes * 60:
            time.sleep(_LOOK_SECONDS)
            if process.poll() is not None:
                raise InfrastructureError(
                    f"the manager ended with status {process.returncode}",
                    hint=f"it says why in {directory / 'manager.log'}",
                )
            if not turn.seconds and time.monotonic() > deadline:
                raise InfrastructureError(
                    f"the manager does not fuzz after {_START_SECONDS:.0f} s",
                    hint=f"it says why in {directory / 'manager.log'}",
                )
            with contextlib.suppress(OSError):
                figures = last_figures((directory / "bench.json").read_text())
                if figures is not None and figures != turn.figures:
                    turn.figures = figures
                    if turn.seconds:
                        sample = turn.programs, processor_seconds(process.pid)
                        turn.samples.append(sample)
                    row = ", ".join(f"{name} {figures.get(name, 0)}" for name in _PRINTED)
                    print(
                        f"{kernel}: {turn.seconds:.0f} s, {turn.programs} programs, {row}",
                        file=sys.stderr,
                        flush=True,
                    )
        try:
            pcs = _pcs()
        except InfrastructureError as error:
            turn.problem = error.message
    if pcs:
        symbols = _symbols(kernel, directory)
        for pc in pcs:
            symbol = symbols.lookup(pc)
            turn.functions[symbol.name if symbol else "?"] += 1
    return turn


_PRINTED = ("corpus", "coverage", "crashes", "vm restarts")


def _symbols(kernel: str, directory: Path) -> KernelSymbols:
    if kernel == "kcov":
        # A kernel that is entered at vmlinux is where it was linked.
        image = reference.build(kernel)
        return KernelSymbols.from_system_map(image_directory(image.name) / "System.map")
    path = directory / "coverage" / SYMBOLS_FILE
    deadline = time.monotonic() + _END_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        # The guest's process adds its results once the manager is gone.
        time.sleep(1)
    return KernelSymbols.load(path)


def _report(turns: dict[str, Turn], out: Path) -> None:
    names = list(turns)
    rows: dict[str, list[str]] = {
        "programs a minute": [f"{turn.rate:.1f}" for turn in turns.values()],
        "... of processor": [f"{turn.per_processor_minute:.1f}" for turn in turns.values()],
        "programs": [str(turn.programs) for turn in turns.values()],
        "seconds of fuzzing": [f"{turn.seconds:.0f}" for turn in turns.values()],
        **{
            label: [str(turn.figures.get(name, 0)) for turn in turns.values()]
            for label, name in (
                ("corpus", "corpus"),
                ("coverage", "coverage"),
                ("crashes", "crashes"),
                ("starts of a VM", "vm restarts"),
            )
        },
        "functions": [str(len(turn.functions) or "unknown") for turn in turns.values()],
    }
    print(f"{'':20}" + "".join(f"{name:>12}" for name in names))
    for label, values in rows.items():
        print(f"{label:20}" + "".join(f"{value:>12}" for value in values))
    for name, turn in turns.items():
        if turn.problem:
            print(f"the functions of {name} are unknown: {turn.problem}")
    for name in names:
        if name == "kcov" or "kcov" not in turns:
            continue
        ours, kcov = turns[name], turns["kcov"]
        print(
            f"{name} has {ours.rate / max(kcov.rate, 1e-9):.2f} times the programs of kcov, "
            f"{ours.per_processor_minute / max(kcov.per_processor_minute, 1e-9):.2f} times those "
            "of a processor's minute"
        )
        if ours.functions and kcov.functions:
            both = len(ours.functions.keys() & kcov.functions.keys())
            print(
                f"functions of {name} and kcov: {both} in both, "
                f"{len(ours.functions) - both} in {name} only, "
                f"{len(kcov.functions) - both} in kcov only"
            )
    found = sorted(set().union(*(turn.functions for turn in turns.values())))
    lines = ["\t".join(["function", *names])]
    lines += ["\t".join([f, *(str(t.functions[f]) for t in turns.values())]) for f in found]
    (out / "functions.tsv").write_text("\n".join(lines) + "\n")


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--syzkaller", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument(
        "--minutes", type=float, default=20, metavar="N", help="of fuzzing, for each kernel (20)"
    )
    parser.add_argument(
        "--kernels", default="stock,kcov", metavar="A,B,...", help=f"of {', '.join(KERNELS)}"
    )
    parser.add_argument("--procs", type=int, default=4, metavar="N", help="programs at a time (4)")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="(1024)")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="vCPUs (1)")
    parser.add_argument("--out", type=Path, default=Path("build/bench_syzkaller"), metavar="DIR")
    parser.add_argument("flags", nargs="*", metavar="FLAGS", help="of kcov-bridge syzkaller")
    arguments = parser.parse_args()
    kernels = arguments.kernels.split(",")
    if unknown := set(kernels) - set(KERNELS):
        parser.error(f"no such kernel: {', '.join(sorted(unknown))}")
    out = arguments.out.absolute() / time.strftime("%Y%m%d-%H%M%S")
    turns: dict[str, Turn] = {}
    print(f"load {os.getloadavg()[0]:.2f}; results in {out}", file=sys.stderr)
    try:
        for kernel in kernels:
            directory = out / kernel
            directory.mkdir(parents=True)
            turns[kernel] = _turn(kernel, directory, arguments)
    except BridgeError as error:
        print(error.report(), file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    if turns:
        _report(turns, out)
    return 0 if len(turns) == len(kernels) else 1


if __name__ == "__main__":
    sys.exit(main())
