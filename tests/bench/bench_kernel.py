# SPDX-License-Identifier: Apache-2.0
"""What watching the guest kernel costs, against the same guest without the plugin.

    python -m tests.bench.bench_kernel [--rounds N] [--reference] [--kinds A,B,...]

Each round boots a guest of each kind in turn (A B C ...), all under TCG with one vCPU, and runs the
same work in it: a loop of 80,000 system calls (``loop.c``), file work (copying a tree in memory), a
shell script that starts many processes, and 2,000 reads from the disk past the cache. The guest
itself takes the time, after a tenth of the work that does not count: the first ENABLE has all code
translated anew. Printed are medians, the fastest and the slowest, and the ratio of the medians to
the guest without plugin; and what memory QEMU has at the end.

* "no plugin": the baseline;
* "idle": the plugin is there, and nobody traces;
* "callbacks": the work is traced, but the plugin's callback returns at once and records nothing:
  what QEMU's calls of a plugin cost, whatever it does;
* "traced": the work is traced, as by ``kcov-bridge run``: the host keeps the PCs, each once a
  process;
* "kcov-exec": the work is traced by a program in the guest (``kcov-exec -u -f``), which opens and
  maps a device for each process;
* "-d exec": QEMU's own log of executed blocks, to /dev/null, switched on after the boot, for
  comparison; a tenth of the work, and ten times the seconds, for it is that slow.

If the QEMU of ``make qemu-devices`` is built, there are two more kinds:

* "covered QEMU": traced, with this QEMU, whose devices are not recorded;
* "devices": traced, and its devices are.

``--reference`` does all this with the kernel of ``make reference`` without CONFIG_KCOV in place of
the stock image's, and adds the same kernel built with it: "kcov off", and "kcov on", traced by its
own kcov (each PC, as it has nothing else). What it takes to build these is said there.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bridge
from bridge.config import Settings
from bridge.guest.guest_image import ProjectImage
from bridge.guest.images import build, compile_for_guest
from bridge.session.session import Session
from bridge.sources.guest_kernel import plugin
from bridge.vm.accel import Accelerator
from bridge.vm.config import MachineConfig
from bridge.vm.device_models import QEMU, find_qemu
from tests.system import reference

WORK = {
    "system calls": ("/tmp/loop {}", 20_000),
    "files": ("for i in $(seq {}); do cp -r /etc /tmp/a; rm -r /tmp/a; done", 10),
    "processes": ("for i in $(seq {}); do /bin/true; done", 100),
    "disk": ("dd if=/dev/vda of=/dev/null bs=4096 count={} iflag=direct status=none", 2_000),
}
"""What the guest's shell does, and how many of it."""
_LOOP = Path(__file__).with_name("loop.c")
_MEMORY = "QEMU's memory"
_SPREAD = 1.0
"""Above this relative spread (slowest to fastest less 1) a ratio is marked as uncertain."""


@contextmanager
def _arguments(*extra: str) -> Iterator[None]:
    """More arguments for QEMU."""
    original = ProjectImage.machine_config

    def more(self: ProjectImage, settings: Settings, accelerator: Accelerator) -> MachineConfig:
        return dataclasses.replace(original(self, settings, accelerator), extra_args=extra)

    ProjectImage.machine_config = more  # type: ignore[method-assign]
    try:
        yield
    finally:
        ProjectImage.machine_config = original  # type: ignore[method-assign]


@contextmanager
def _recording_nothing() -> Iterator[None]:
    """A plugin whose callback does nothing."""
    original = plugin.build_plugin
    program = dataclasses.replace(plugin.PLUGIN, flags=(*plugin.PLUGIN.flags, "-DRECORD_NOTHING"))

    def build_empty(qemu: str) -> Path:
        return original(qemu, program=program)

    plugin.build_plugin = build_empty  # type: ignore[assignment]
    try:
        yield
    finally:
        plugin.build_plugin = original


def _run(
    session: Session, before: str = "", share: int = 1, traced: bool = False
) -> dict[str, float]:
    """Seconds of each work, by the guest's clock, and QEMU's memory in MiB.

    ``before`` is put in front of the shell. ``share``: only so small a part is done, and its time
    multiplied. ``traced``: as by ``kcov-bridge run``.
    """
    with tempfile.TemporaryDirectory(prefix="kcov-bridge-") as directory:
        loop = compile_for_guest(build(), _LOOP, Path(directory) / "loop")
        session.put(loop, "/tmp/loop", 0o755)
    seconds = {}
    for name, (command, count) in WORK.items():
        work = command.format(count // share)
        # The shell itself is traced, so that its loop is; its children follow.
        warm = command.format(count // share // 10)
        script = f"{warm}; date +%s%N >&2; {work}; date +%s%N >&2"
        run = session.kcov if traced else session.run
        result = run(f"{before} sh -c {script!r}", timeout=1800)
        assert result.exit_status == 0, result.stderr.decode()
        lines = result.stderr.decode().split("\n")
        start, end = (int(line) for line in lines if line.isdigit())
        seconds[name] = (end - start) / 1e9 * share
    status = Path(f"/proc/{session.machine.pid}/status").read_text()
    seconds[_MEMORY] = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024
    return seconds


def _kinds(with_reference: bool) -> dict[str, Callable[[], dict[str, float]]]:
    image = reference.build("plain").name if with_reference else None

    def boot(source: str, image: str | None = image, **settings: Any) -> Session:
        return bridge.boot(
            **settings,
            target="none",
            accel="tcg",
            source=source,
            memory=512,
            image=image,
            boot_timeout=300,
        )

    def plain(
        source: str, before: str = "", traced: bool = False, **settings: Any
    ) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            with boot(source, **settings) as session:
                return _run(session, before, traced=traced)

        return run

    def callbacks() -> dict[str, float]:
        with _recording_nothing(), boot("kernel") as session:
            return _run(session, traced=True)

    def logged() -> dict[str, float]:
        with (
            _arguments("-D", "/dev/null"),
            boot("python") as session,
        ):
            log: dict[str, object] = {"command-line": "log exec,nochain"}
            session.machine.execute("human-monitor-command", log)
            return _run(session, share=10)

    def own(before: str) -> Callable[[], dict[str, float]]:
        image = reference.build("kcov").name

        def run() -> dict[str, float]:
            with boot("python", image) as session:
                return _run(session, before)

        return run

    kinds = {
        "no plugin": plain("python"),
        "idle": plain("kernel"),
        "callbacks": callbacks,
        "traced": plain("kernel", traced=True),
        "kcov-exec": plain("kernel", "kcov-exec -u -f --"),
        "-d exec": logged,
    }
    if QEMU.find() is not None:
        kinds["covered QEMU"] = plain("kernel", traced=True, qemu=str(find_qemu()))
        kinds["devices"] = plain("kernel", traced=True, qemu_devices=True)
    if with_reference:
        kinds["kcov off"] = own("")
        kinds["kcov on"] = own("KCOV_EXEC_DEVICE=/sys/kernel/debug/kcov kcov-exec -f --")
    return kinds


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each kind (default: 3)")
    parser.add_argument("--reference", action="store_true", help="the kernel with CONFIG_KCOV too")
    parser.add_argument("--kinds", metavar="A,B,...", help='these alone, beside "no plugin"')
    arguments = parser.parse_args()
    kinds = _kinds(arguments.reference)
    if arguments.kinds:
        wanted = {"no plugin", *arguments.kinds.split(",")}
        if unknown := wanted - kinds.keys():
            parser.error(f"no such kind: {', '.join(unknown)}; there are {', '.join(kinds)}")
        kinds = {name: run for name, run in kinds.items() if name in wanted}
    taken: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(arguments.rounds):
        for kind, run in kinds.items():
            print(f"round {number + 1} of {arguments.rounds}: {kind}", file=sys.stderr)
            for work, once in run().items():
                taken[work][kind].append(once)
    for work, found in taken.items():
        base = statistics.median(found["no plugin"])
        unit = "MiB" if work == _MEMORY else "s"
        print(f"{work:<14}{'median ' + unit:>10}{'min':>8}{'max':>8}{'ratio':>9}")
        for kind, seconds in found.items():
            median = statistics.median(seconds)
            doubt = "?" if max(seconds) / min(seconds) - 1 > _SPREAD else " "
            print(
                f"  {kind:<12}{median:>10.3f}{min(seconds):>8.3f}{max(seconds):>8.3f}"
                f"{median / base:>8.2f}x{doubt}"
            )
        if "kcov on" in found and work != _MEMORY:
            on = statistics.median(found["kcov on"])
            for kind, name in (("kcov off", "its kernel with kcov off"), ("traced", "traced")):
                if kind in found:
                    print(f"  kcov on is {on / statistics.median(found[kind]):.2f}x {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
