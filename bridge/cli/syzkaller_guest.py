# SPDX-License-Identifier: Apache-2.0
"""One guest of a campaign of syzkaller's manager: ``syzkaller_guest DIR SSH_PORT``.

It serves until it is lost, or until stdin ends. The console goes to stdout. In the end what it
covered is added to what the other guests of the campaign covered.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bridge.cli.syzkaller_directory import COVERAGE, Campaign, locked, public_key
from bridge.cli.syzkaller_sandbox import lost_mount, mounts_of, show_script
from bridge.errors import BridgeError, GuestLostError, GuestSetupError, InfrastructureError
from bridge.results import summary as summaries
from bridge.results.merge import covered_blocks, merge_results, merge_stats
from bridge.session.session import Session
from bridge.session.stats import Stats
from bridge.util.files import cannot_write

__all__ = ["GUESTS_FILE", "main", "set_up"]

logger = logging.getLogger(__name__)

GUESTS_FILE = "guests.jsonl"
"""In the directory of the results: a line for each guest that ended."""

_PART = "guest-"
"""What the names of directories begin with that have what one guest left."""

_LAST_WORDS_SECONDS = 3.0
"""So long the manager may read what a guest said that was lost."""

_LOOK_SECONDS = 10.0
"""How often the guest is asked for the names of modules that programs loaded, and whether it still
has what programs need: the manager does not notice if they have no coverage, or reach no target."""

_LAST_LOOK_SECONDS = 2.0
"""So long the end waits for a look that is going on, because names that come while the results are
written would break them. A guest that no longer answers tells no names."""

_KCOV = "/sys/kernel/debug/kcov"
_KCOV_SECONDS = 30.0

_MODULES = (
    *("tun", "veth", "dummy", "vcan", "nlmon", "fuse", "loop", "binfmt_misc", "rfkill"),
    *("hci_vhci", "mac80211_hwsim", "mac802154_hwsim", "wireguard", "sctp", "nf_tables"),
    *("9p", "btrfs", "ext4", "f2fs", "vfat", "xfs", "exfat", "udf", "isofs", "overlay"),
    *("uinput", "uhid", "ppp_generic", "snd_seq", "snd_timer", "rdma_ucm", "ib_uverbs"),
    *("raw_gadget",),
)
"""What the executor configures, and what descriptions open or mount: nothing loads these in the
guest when they are looked for. Modules that have a name for modprobe load by themselves."""


_SWAP_FILE = """\
if modprobe -q zram; then
    echo 128M >/sys/block/zram0/disksize && >/swap-file && mount --bind /dev/zram0 /swap-file ||
        echo 'kcov-bridge: there is no swap area' >/dev/kmsg
fi
"""
"""The executor makes /swap-file a swap area. Files of the guest are in its memory, and can be none;
so a device stands for that file, which compresses what is written to it and keeps it in memory."""


def main(argv: Sequence[str]) -> int:
    """Serve the guest."""
    logging.basicConfig(level=logging.WARNING, format="kcov-bridge: %(message)s")
    # A manager that a script starts in the background inherits and passes on that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    directory, port = Path(argv[0]), int(argv[1])
    try:
        return _Machine(directory, Campaign.load(directory), port).run()
    except BridgeError as error:
        logger.error("%s", error.report())
        return error.exit_status
    except OSError as error:
        # No room on the disk, most likely.
        logger.error("%s", cannot_write(directory / COVERAGE, error).report())
        return InfrastructureError.exit_status
    except KeyboardInterrupt:
        return 130


class _Machine:
    """A guest, from its start to the line about it in the results."""

    def __init__(self, directory: Path, campaign: Campaign, port: int) -> None:
        self._directory = directory
        self._campaign = campaign
        self._port = port
        self._ended = threading.Event()
        self._ready = False
        self._guard = threading.Lock()  # of _ready
        # Set once, before _ended is.
        self._lost = ""

    def run(self) -> int:
        """Serve until the guest is lost, or stdin ends; return the exit status."""
        threading.Thread(target=self._watch_manager, daemon=True).start()
        self._campaign.image.find()
        settings = self._campaign.machine_settings()
        results = self._directory / COVERAGE
        results.mkdir(exist_ok=True)
        part = self._claimed_part(results)
        session = Session(settings, part, ssh_port=self._port)
        began, why = time.time(), ""
        try:
            with session:
                session.machine.console.listen(_write)
                session.machine.add_loss_listener(lambda _: self._ended.set())
                # Before any program of the manager runs.
                mounts = mounts_of(session.guest)
                set_up(session, self._campaign, public_key(self._directory))
                with self._guard:
                    self._ready = True
                looks = threading.Thread(target=self._look, args=(session, mounts), daemon=True)
                looks.start()
                self._ended.wait()
                looks.join(_LAST_LOOK_SECONDS)
                # The guest is not powered down: nobody needs what it has not yet written.
                raise session.machine.loss or GuestLostError(
                    self._lost or "the manager ended the guest"
                )
        except BridgeError as error:
            why = error.message
            if not self._ready:
                raise
            time.sleep(_LAST_WORDS_SECONDS if session.machine.loss is not None else 0)
            return 0
        except KeyboardInterrupt:
            why = "the manager ended the guest before it was ready"
            raise
        finally:
            # Whoever sent the first one is gone; the results are still to be written.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._keep(session.stats(), part, results, began, why)

    def _claimed_part(self, results: Path) -> Path:
        """Make the directory for what this guest leaves; it is locked while this process lives."""
        with locked(results):
            part = Path(tempfile.mkdtemp(prefix=_PART, dir=results))
            self._part_lock = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._part_lock, fcntl.LOCK_EX)
        return part

    def _look(self, session: Session, mounts: Sequence[str]) -> None:
        """Look at the guest until the end, which does not wait for a guest that does not answer."""
        before = ""
        while not self._ended.wait(_LOOK_SECONDS):
            _name_modules(session)
            lost = _lost(session, mounts)
            # What passes by itself is not found at two looks.
            if lost and lost == before:
                _write(f"kcov-bridge: {lost}; the guest ends\n".encode())
                self._lost = lost
                self._ended.set()
            before = lost

    def _watch_manager(self) -> None:
        """Wait for the end of stdin, which is the end of what the manager started."""
        while os.read(0, 1024):
            pass
        self._ended.set()
        with self._guard:
            if not self._ready:
                os.kill(os.getpid(), signal.SIGINT)

    def _keep(self, stats: Stats, part: Path, results: Path, began: float, why: str) -> None:
        """Add what this guest covered to the results of all."""
        with locked(results):
            _merge(part, results)
            for left in sorted(results.glob(f"{_PART}*")):
                # Of a guest whose process was killed, or that found no room on the disk.
                if left != part and not _is_locked(left):
                    _merge(left, results)
            seconds = round(time.time() - began, 3)
            stats.instances = []
            line = {"began": began, "seconds": seconds, "end": why, "stats": stats.as_dict()}
            try:
                with (results / GUESTS_FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                _write_summary(results)
            except (BridgeError, OSError) as error:
                what = error.report() if isinstance(error, BridgeError) else error.strerror
                logger.error("the figures of all guests are not up to date: %s", what)


def _merge(part: Path, results: Path) -> None:
    """Add what one guest left to the results; it stays where it is if that fails."""
    try:
        merge_results(part, results)
    except BridgeError as error:
        logger.error("what the guest covered stays in %s: %s", part, error.report())
    else:
        shutil.rmtree(part, ignore_errors=True)


def _is_locked(part: Path) -> bool:
    """Whether the process lives that :meth:`_Machine._claimed_part` made a directory for."""
    try:
        descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def set_up(session: Session, campaign: Campaign, key: str) -> None:
    """Make a guest ready for the manager: limits of the console, modules, and who may log in.

    Raises:
        GuestSetupError: it could not be.
    """
    values = {
        # The console's level is the first of four.
        "printk": f"{campaign.loglevel} 4 1 7",
        "panic_on_warn": f"{campaign.panic_on_warn:d}",
        "panic_on_oops": f"{campaign.panic_on_oops:d}",
    }
    lines = [f"echo {value} > /proc/sys/kernel/{name}\n" for name, value in values.items()]
    # An image of one's own may lack some: their features are off then.
    lines += [f"modprobe -q {module} || true\n" for module in _MODULES]
    # Each program that calls syz_usb_connect uses its own controller; there are 32 at most.
    lines += [f"modprobe -q dummy_hcd num={min(campaign.procs, 32)} || true\n"]
    # All of a kernel's own is built in: it need not start modprobe for each name.
    lines += ["[ -d /lib/modules/$(uname -r)/kernel ] || echo >/proc/sys/kernel/modprobe\n"]
    lines += [_SWAP_FILE]
    lines += [show_script(mounts_of(session.guest))]
    # Last: the manager begins when it can log in.
    lines += [f"echo '{key}' >>~root/.ssh/authorized_keys\n"]
    done = session.guest.run("".join(["set -e\n", *lines]), timeout=300)
    if done.exit_status:
        raise GuestSetupError(
            f"the guest could not be set up for syzkaller (exit status {done.exit_status})",
            evidence=(done.stdout + done.stderr).decode(errors="replace"),
        )
    session.load_symbols()


def _name_modules(session: Session) -> None:
    """Have names for the functions of modules that programs loaded, as far as the guest answers."""
    with contextlib.suppress(BridgeError):
        session.load_symbols()


def _lost(session: Session, mounts: Sequence[str]) -> str:
    """Return what programs need and the guest has no more; "" if it has all, or does not say."""
    with contextlib.suppress(BridgeError):
        if session.guest.run(["test", "-e", _KCOV], timeout=_KCOV_SECONDS).exit_status == 1:
            return f"{_KCOV} is gone from the guest"
        if lost := lost_mount(session.guest, mounts):
            return f"a mount of the target is lost: {lost}"
    # If it is gone, the session knows.
    return ""


def _write_summary(results: Path) -> None:
    guests = []
    seconds = 0.0
    for line in (results / GUESTS_FILE).read_text(encoding="utf-8").splitlines():
        # One that was cut off by a full disk is left out.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            guests.append(Stats(**values["stats"]))
            seconds += values["seconds"]
    stats = merge_stats(guests)
    blocks = covered_blocks(results)
    stats.blocks_covered, stats.blocks_total = blocks.covered, blocks.total
    stats.kernel_blocks_covered = blocks.kernel
    found = summaries.Summary(
        stats, exit_status=0, command=("syzkaller",), run_seconds=round(seconds, 3)
    )
    summaries.write(found, results / "summary.json")


def _write(chunk: bytes) -> None:
    """Pass the console on; whoever read it may be gone."""
    with contextlib.suppress(OSError):
        while chunk:
            chunk = chunk[os.write(1, chunk) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
