# SPDX-License-Identifier: Apache-2.0
"""Guests that do not go on in the middle of a command: named at once, never a hang."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pytest_plugin.test_guest import Run, cache, run  # noqa: F401
from tests.support.programs import guest_program

pytestmark = pytest.mark.vm

pytest_plugins = ["pytester"]

SUSPEND = Path(__file__).parents[1] / "system" / "suspend.c"


def test_guest_that_stops_in_a_command_is_a_failure_of_the_machine(run: Run) -> None:  # noqa: F811
    result = run(
        f"""
        import threading, time
        import pytest

        @pytest.fixture(autouse=True)
        def at_once(guest):
            began = time.monotonic()
            yield
            assert time.monotonic() - began < 60

        def test_processor(guest):
            # As a person would at QEMU's monitor.
            stop = guest.session.machine._qmp.execute
            timer = threading.Timer(1, stop, ["stop"])
            timer.start()
            try:
                guest.run("sleep 500", timeout=400)
            finally:
                timer.join()

        def test_suspended(guest):
            guest.put({str(guest_program(SUSPEND))!r}, "/tmp/suspend", mode=0o755)
            guest.run("/tmp/suspend", timeout=400)

        def test_suspended_while_it_waits(guest):
            guest.put({str(guest_program(SUSPEND))!r}, "/tmp/suspend", mode=0o755)
            guest.run("(sleep 1; exec /tmp/suspend) >/dev/null 2>&1 &")
            guest.wait_for_file("/tmp/never", timeout=400)

        def test_well(guest):
            guest.fail("test -e /tmp/suspend")
        """
    )
    result.assert_outcomes(passed=1, failed=3)
    text = result.stdout.str()
    machine = "the machine failed, not an assertion of the test: "
    assert f"{machine}the processor of the guest stopped without a request of the bridge" in text
    # Whole lines: where the variable CI is set, the summary's lines end with the message too.
    suspended = f"{machine}the guest suspended itself to memory (ACPI S3)"
    assert text.splitlines().count(suspended) == 2
    assert not re.search("SSH|channel|broke", text)


def test_guest_task_that_hangs_makes_the_test_fail(
    run: Run,  # noqa: F811
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    result = run(
        """
        import pytest

        # A write to a file system that is frozen sleeps, and no signal wakes it.
        HANG = '''
            echo 1 >/proc/sys/kernel/hung_task_timeout_secs
            fsfreeze --freeze /mnt/disk
            sh -c 'echo text >/mnt/disk/new' &
            until dmesg | grep -q 'blocked for more than'; do sleep 0.2; done
            fsfreeze --unfreeze /mnt/disk
            wait
            '''

        @pytest.mark.target("tests.system.disk_targets:RamDisk")
        class Test:
            def test_hangs(self, guest):
                guest.succeed(HANG)
                assert guest.succeed("cat /mnt/disk/new") == "text\\n"

            @pytest.mark.guest(ignore="task sh:.* blocked")
            def test_hangs_as_expected(self, guest):
                guest.succeed(HANG)
        """
    )
    result.assert_outcomes(passed=1, failed=1)
    assert re.search(
        r"the guest's kernel: .*INFO: task sh:\d+ blocked for more than 1 seconds",
        result.stdout.str(),
    )
