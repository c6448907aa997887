# SPDX-License-Identifier: Apache-2.0
"""The cases of docs/campaign.md still lead to what it says, with the real targets and harnesses.

``tests/fuzz/data/campaign`` has the cases. A package that has mended a defect fails its test here:
then the case goes, and the page says up to which version the defect was there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.fuzz.harness import Harness
from bridge.fuzz.monitor import MachineMonitor
from bridge.fuzz.repro import CaseRunner, packages_of
from bridge.fuzz.slot import Slot
from bridge.session.target_host import TargetState
from tests.support import ROOT
from tests.support.programs import guest_program

pytestmark = pytest.mark.vm

CASES = Path(__file__).parent / "data" / "campaign"
EXAMPLES = ROOT / "examples" / "fuzz"
SECONDS = 60.0
"""For what takes milliseconds on a quiet machine."""
MEMORY = 256
"""MiB that a target may take."""

PLAN9 = {
    "9p-text-is-no-utf8": r"UnicodeDecodeError in decode_from \(pyroute2/plan9/__init__\.py\)",
    "9p-message-is-short": r"struct\.error in parse \(pyroute2/plan9/__init__\.py\)",
    "9p-flush": r"struct\.error in decode_from \(pyroute2/plan9/__init__\.py\)",
    "9p-answer-from-a-client": r"KeyError in parse \(pyroute2/plan9/__init__\.py\)",
    "9p-answer-ends-the-server": r"SystemExit in parse \(pyroute2/plan9/__init__\.py\)",
    "9p-write-far-away": rf"the target takes more memory than {MEMORY} MiB",
}
USB = {
    "usb-command-of-no-bytes": r"IndexError in _dispatch \(usbip/classes/device/msc\.py\)",
    "usb-inquiry-of-one-byte": r"IndexError in _dispatch \(usbip/classes/device/msc\.py\)",
    # Python 3.12 has no function of its own for a list display.
    "usb-properties-of-no-object": (
        r"KeyError in (<listcomp>|_object_prop_list) \(usbip/classes/device/mtp\.py\)"
    ),
    "usb-rename-to-nothing": r"IndexError in ptp_str_parse \(usbip/classes/device/mtp\.py\)",
    "usb-long-name": r"IndexError in ptp_str_parse \(usbip/classes/device/mtp\.py\)",
}
DNS = {"dns-names-in-a-circle": r"RecursionError in .* \(dnslib/.*\)"}


@contextlib.contextmanager
def running(target: str, source: str, directory: Path) -> Iterator[CaseRunner]:
    """A slot with a target and the harness from a source of the examples."""
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    harness = directory / "harness.so"
    harness.write_bytes(guest_program(EXAMPLES / source, flags=flags).read_bytes())
    with (
        MachineMonitor(memory=MEMORY) as monitor,
        Slot(
            Settings(target=target, source="python", diagnose=True),
            Harness.parse(str(harness)),
            directory / "slot",
            target_state=TargetState.FORK,
            monitor=monitor,
        ) as slot,
    ):
        # Each case leads to something, which ends the wait for it.
        yield CaseRunner(slot, timeout=SECONDS, packages=packages_of(slot), settle=SECONDS)


def check(runner: CaseRunner, package: str, measured: str, cases: dict[str, str]) -> None:
    """Run each case; say which of them did not lead to its title."""
    wrong = []
    for name, title in cases.items():
        attempt = runner.run((CASES / name).read_bytes())
        if not any(re.fullmatch(title, fault.title) for fault in attempt.faults):
            wrong.append((name, [fault.title for fault in attempt.faults]))
    version = importlib.metadata.version(package)
    assert wrong == [], (
        f"{package} {measured} was measured, this is {version}: see docs/campaign.md"
    )


def test_plan9_cases_of_the_campaign_lead_to_their_titles(tmp_path: Path) -> None:
    with running("plan9", "p9_bytes.c", tmp_path) as runner:
        check(runner, "pyroute2", "0.9.7", PLAN9)


def test_usb_cases_of_the_campaign_lead_to_their_titles(tmp_path: Path) -> None:
    target = "examples.fuzz.usb_target:UsbComposite"
    with running(target, "usb_requests.c", tmp_path) as runner:
        check(runner, "usbip", "0.7.0", USB)


def test_dns_cases_of_the_campaign_lead_to_their_titles(tmp_path: Path) -> None:
    with running("tests.system.stream_targets:DnsTarget", "udp_bytes.c", tmp_path) as runner:
        check(runner, "dnslib", "0.9.26", DNS)
