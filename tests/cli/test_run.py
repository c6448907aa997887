# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge run`` from outside: a real guest, a real target, real faults."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bridge
from bridge.config import Settings, load
from bridge.errors import BootTimeoutError, GuestSetupError
from bridge.guest.guest_image import ProjectImage
from bridge.guest.images import Image
from bridge.results.kernel_export import read_blocks
from bridge.sources.guest_kernel import BLOCKS_FILE as KERNEL_BLOCKS_FILE
from bridge.sources.pcs import PC_BASE, BlockTable
from bridge.sources.symbolize import BLOCKS_FILE
from bridge.vm.accel import Accelerator
from bridge.vm.config import MachineConfig
from tests.support import COMMAND, ROOT, nothing_left, qemu_of, run, start, wait_until_gone
from tests.support.coverage_data import executed
from tests.support.programs import guest_image

pytestmark = pytest.mark.vm

PYTHON = ["--source", "python"]
QUICK = ["--target", "none", "--syscall-pcs", *PYTHON]
"""Where the guest's kernel is not the point: one that is not watched is up sooner."""


@pytest.fixture(scope="module")
def image() -> Image:
    return guest_image()


@pytest.fixture
def copied_image(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the image in a cache of its own, to be spoiled."""
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "cache" / "images" / image.name
    shutil.copytree(image.directory, copy)
    return copy


def summary(out: Path) -> dict[str, object]:
    data = json.loads((out / "summary.json").read_text())
    assert isinstance(data, dict)
    return data


def pcs(out: Path) -> list[int]:
    return [int(line, 16) for line in (out / "pcs.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(
    image: Image, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The default run, once."""
    out = tmp_path_factory.mktemp("default") / "run"
    return out, run(out)


class TestTheDefaultRun:
    def test_it_works(self, done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
        out, result = done
        assert result.returncode == 0, result.stderr
        assert "0 failed" in result.stdout
        values = summary(out)
        assert values["exit_status"] == 0
        assert values["accel"] in ("kvm", "tcg")
        assert values["target"] == "plan9"
        assert values["lost_pcs"] == values["guest_timeouts"] == values["source_failures"] == 0
        assert values["sources"] == (
            ["kernel", "python"] if values["accel"] == "tcg" else ["python"]
        )
        assert isinstance(values["boot_seconds"], float)
        assert values["kernel"] == guest_image().kernel_release
        assert "console" not in result.stderr

    def test_its_pcs_are_the_blocks_that_coverage_saw(
        self, done: tuple[Path, subprocess.CompletedProcess[str]]
    ) -> None:
        out, _ = done
        values, found = summary(out), pcs(out)
        table = BlockTable.load(out / BLOCKS_FILE)
        assert len(table) == values["blocks_total"]
        # kcov-doc sets word 0 to 0 after ENABLE and prints while it still traces, so some that
        # were appended are not listed.
        for key, listed, most in (("pcs", found, 0.05), ("pcs_unique", set(found), 0.01)):
            appended = values[key]
            assert isinstance(appended, int)
            assert 0 <= appended - len(listed) <= most * appended
        of_kernel = {pc for pc in found if pc < PC_BASE}
        found = [pc for pc in found if pc >= PC_BASE]
        if values["accel"] == "tcg":
            blocks = {block.start for block in read_blocks(out / KERNEL_BLOCKS_FILE)}
            assert len(blocks) == values["kernel_blocks_covered"]
            assert of_kernel <= blocks
            assert len(of_kernel) > 5000
        lines = {
            "pyroute2" + file.rpartition("/pyroute2")[2]: lines
            for file, lines in executed(out / ".coverage").items()
        }
        for pc in set(found):
            location = table.lookup(pc)
            assert location is not None
            block = table.file(location.file)
            assert block is not None
            covered = {block.line_pc(line) for line in lines[location.file]}
            assert pc in covered

    def test_its_results_are_for_others_to_read(
        self, done: tuple[Path, subprocess.CompletedProcess[str]]
    ) -> None:
        out, _ = done
        report = subprocess.run(
            [sys.executable, "-m", "coverage", "report", "--data-file", out / ".coverage"],
            capture_output=True,
            text=True,
            check=True,
            cwd=out,
        )
        assert "plan9/server.py" in report.stdout
        assert "plan9/server.py" in (out / "lcov.info").read_text()
        assert "server_py" in " ".join(path.name for path in (out / "html").iterdir())
        symbolized = subprocess.run(
            [*COMMAND, "symbolize", "--run", out],
            stdin=(out / "pcs.txt").open(),
            capture_output=True,
            text=True,
            check=True,
            cwd="/",
        ).stdout.splitlines()
        assert symbolized[::2] == [f"{pc:#x}" for pc in pcs(out)]
        patterns = (
            re.compile(r"pyroute2/plan9/\w+\.py:\d+\.\d+,\d+\.\d+"),
            re.compile(r"(\S+:\d+ )?[\w.]+\+0x[0-9a-f]+( \[\w+\])?"),
        )
        for number, place in set(zip(symbolized[::2], symbolized[1::2], strict=True)):
            pc = int(number, 16)
            assert patterns[pc < PC_BASE].fullmatch(place), (hex(pc), place)


class TestCommands:
    def test_the_exit_status_is_the_commands(self, image: Image, tmp_path: Path) -> None:
        result = run(tmp_path, *QUICK, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
        assert result.returncode == 7
        assert result.stdout == "out\n"
        assert "err\n" in result.stderr
        assert summary(tmp_path)["exit_status"] == 7
        found = pcs(tmp_path)
        assert len(found) > 20
        assert all(0xFFFFFFFFF0000000 <= pc < 0xFFFFFFFFFF000000 for pc in found)

    def test_a_command_that_is_not_there(self, image: Image, tmp_path: Path) -> None:
        result = run(tmp_path, *QUICK, "--", "no-such-command")
        assert result.returncode == 127
        assert "no-such-command" in result.stderr

    def test_stdin_is_the_commands_byte_for_byte(self, image: Image, tmp_path: Path) -> None:
        data = os.urandom(3 << 20)
        source = tmp_path / "data"
        source.write_bytes(data)
        with source.open("rb") as stdin:
            result = run(tmp_path / "run", *QUICK, "--", "sha256sum", stdin=stdin)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{hashlib.sha256(data).hexdigest()}  -\n"

    def test_stdin_is_a_terminal_that_stays_open_ends_with_the_command(
        self, image: Image, tmp_path: Path
    ) -> None:
        ours, terminal = pty.openpty()
        try:
            os.write(ours, b"hello\nleft unread\n")
            result = run(tmp_path, *QUICK, "--", "sh", "-c", "read x; echo $x", stdin=terminal)
        finally:
            os.close(terminal)
            os.close(ours)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "hello\n"

    def test_out_of_time(self, image: Image, tmp_path: Path) -> None:
        script = "cat /mnt/target/*; sleep 100"
        result = run(tmp_path, *PYTHON, "--timeout", "4", "--", "sh", "-c", script)
        assert result.returncode == 124
        assert f"did not end within 4 s: {shlex.join(('sh', '-c', script))}\n" in result.stderr
        assert summary(tmp_path)["exit_status"] == 124
        # What the shell had opened by then is there, though it never came to write it.
        assert pcs(tmp_path)
        assert (tmp_path / "lcov.info").is_file()

    def test_gvisor_personality(self, image: Image, tmp_path: Path) -> None:
        options = ["--target", "none", "--syscall-pcs", "--personality", "gvisor"]
        result = run(tmp_path, *options, "--", "true")
        assert result.returncode == 0, result.stderr
        assert summary(tmp_path)["sources"] == [], "by default not the kernel"
        assert pcs(tmp_path)
        assert summary(tmp_path)["personality"] == "gvisor"

    def test_the_kernel_alone_by_default_where_there_is_no_target(
        self, image: Image, tmp_path: Path
    ) -> None:
        result = run(tmp_path, "--accel", "tcg", "--target", "none", "--", "true")
        assert result.returncode == 0, result.stderr
        values = summary(tmp_path)
        assert values["sources"] == ["kernel"]
        assert values["lost_pcs"] == 0
        found = pcs(tmp_path)
        assert len(set(found)) == values["kernel_blocks_covered"]
        assert all(pc < PC_BASE for pc in found)
        assert "of the guest kernel" in result.stderr


class TestTheGuestGoesAway:
    def test_it_panics(self, image: Image, tmp_path: Path) -> None:
        script = "ls /mnt/target >/dev/null; cd /mnt/target; echo c >/proc/sysrq-trigger"
        result = run(tmp_path, "--", "sh", "-c", script)
        assert result.returncode == 123
        assert "panicked" in result.stderr
        assert "sysrq triggered crash" in result.stderr
        assert summary(tmp_path)["exit_status"] == 123
        assert pcs(tmp_path)
        assert "Kernel panic" in (tmp_path / "console.log").read_text()

    def test_it_is_switched_off(self, image: Image, tmp_path: Path) -> None:
        result = run(tmp_path, *QUICK, "--", "sh", "-c", "poweroff; sleep 60")
        assert result.returncode == 123
        assert "switched off from inside" in result.stderr

    def test_qemu_is_killed(self, image: Image, tmp_path: Path) -> None:
        with (
            nothing_left(tmp_path),
            start(tmp_path, *QUICK, "--", "sh", "-c", "echo go; sleep 100") as process,
        ):
            assert process.line() == "go\n"
            qemu = qemu_of(tmp_path)
            os.kill(qemu, signal.SIGKILL)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 123
        assert "SIGKILL" in stderr or "signal 9" in stderr
        assert pcs(tmp_path)


class TestInterrupted:
    @pytest.mark.parametrize(
        ("phase", "number", "options"),
        [
            ("accelerator", signal.SIGINT, PYTHON),
            ("starting", signal.SIGINT, []),
            ("starting", signal.SIGTERM, PYTHON),
            ("guest ready", signal.SIGINT, PYTHON),
            ("go", signal.SIGINT, PYTHON),
            ("go", signal.SIGTERM, []),
        ],
    )
    def test_at_each_phase(
        self,
        image: Image,
        tmp_path: Path,
        phase: str,
        number: signal.Signals,
        options: list[str],
    ) -> None:
        with (
            nothing_left(tmp_path),
            start(tmp_path, *options, "--", "sh", "-c", "echo go >&2; sleep 100") as process,
        ):
            assert process.stderr is not None
            for line in process.stderr:
                if phase in line:
                    break
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "interrupted" in stderr
        assert summary(tmp_path)["error"] == "interrupted"

    def test_killed_it_takes_qemu_along(self, image: Image, tmp_path: Path) -> None:
        with start(tmp_path, *QUICK, "--", "sh", "-c", "echo go; sleep 100") as process:
            assert process.line() == "go\n"
            assert qemu_of(tmp_path)
            process.kill()
        wait_until_gone(tmp_path)


class TestWhatIsMissing:
    def test_no_qemu(self, image: Image, tmp_path: Path) -> None:
        result = run(tmp_path, "--qemu", "/nowhere/qemu", *QUICK, "--", "true")
        assert result.returncode == 125
        assert "/nowhere/qemu" in result.stderr
        assert "kcov-bridge setup" in result.stderr
        assert summary(tmp_path)["exit_status"] == 125

    def test_a_qemu_without_the_device(self, image: Image, tmp_path: Path) -> None:
        # A QEMU that old is not to be had: a program that says what one says.
        old = tmp_path / "qemu-old"
        old.write_text(
            "#!/bin/sh\necho \"qemu: -device ivshmem-doorbell: 'ivshmem-doorbell' is not a valid "
            'device model name" >&2\nexit 1\n'
        )
        old.chmod(0o755)
        result = run(tmp_path / "run", "--qemu", str(old), *QUICK, "--", "true")
        assert result.returncode == 125
        assert "lacks a device" in result.stderr
        assert "7.2 or newer" in result.stderr

    def test_no_memory(self, image: Image, tmp_path: Path) -> None:
        for options in (QUICK, ["--target", "none", "--source", "kernel"]):
            result = run(tmp_path, "--memory", str(1 << 20), *options, "--", "true")
            assert result.returncode == 125
            assert "there are no 1048576 MiB for a guest; take less: --memory MIB" in result.stderr

    def test_a_broken_image(self, copied_image: Path, tmp_path: Path) -> None:
        with (copied_image / "root.squashfs").open("r+b") as file:
            file.truncate(1_000_000)
        result = run(tmp_path / "run", "--image", copied_image.name, *QUICK, "--", "true")
        assert result.returncode == 125
        assert "root.squashfs: 1000000 bytes instead of" in result.stderr
        assert "image rm" in result.stderr

    def test_a_root_that_is_garbage(self, copied_image: Path, tmp_path: Path) -> None:
        size = (copied_image / "root.squashfs").stat().st_size
        (copied_image / "root.squashfs").write_bytes(bytes(size))
        result = run(tmp_path / "run", "--image", copied_image.name, *QUICK, "--", "true")
        assert result.returncode in (123, 125)
        assert "  | " in result.stderr, "the console's end is the evidence"

    def test_a_kernel_without_the_module(self, image: Image, tmp_path: Path) -> None:
        class WithoutModule(ProjectImage):
            def machine_config(self, *arguments: object) -> MachineConfig:
                config = super().machine_config(*arguments)  # type: ignore[arg-type]
                words = f"{config.cmdline} module_blacklist=kcov_bridge"
                return MachineConfig(**{**config.__dict__, "cmdline": words})

        session = bridge.boot(target="none", source="python")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bridge.session.session.find_guest_image", lambda _: WithoutModule(image))
            with pytest.raises(GuestSetupError, match="module"), session:
                raise AssertionError("the session must not begin")

    def test_no_room_for_results(self, image: Image, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting a small file system takes root: run the tests as root")
        small = tmp_path / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
        try:
            result = run(small / "run", *PYTHON, "--", "ls", "-lR", "/mnt/target")
        finally:
            subprocess.run(["umount", small], check=True)
        assert result.returncode == 125
        assert "No space left" in result.stderr

    def test_a_place_for_results_that_is_none(self, image: Image, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("")
        for out in (file, file / "run"):
            result = run(out, *QUICK, "--", "true")
            assert result.returncode == 2
            assert f"{out} cannot be used: {file} is a file" in result.stderr

    def test_a_target_that_raises(self, image: Image, tmp_path: Path) -> None:
        (tmp_path / "broken_target.py").write_text(
            "class Target:\n"
            "    name = 'broken'\n"
            "    packages = ('http',)\n"
            "    endpoints = guest_modules = ()\n"
            "    guest_setup = guest_teardown = ''\n"
            "    def __init__(self, directory): pass\n"
            "    def start(self): raise RuntimeError('no such luck')\n"
            "    def stop(self): pass\n"
        )
        result = run(
            tmp_path / "run", "--target", "broken_target:Target", "--", "true", cwd=tmp_path
        )
        assert result.returncode == 125
        assert "raised RuntimeError on start: no such luck" in result.stderr
        assert "booting" not in result.stderr

    def test_no_workload_for_the_target(self, tmp_path: Path) -> None:
        result = run(tmp_path, "--target", "none")
        assert result.returncode == 2
        assert "-- CMD" in result.stderr

    def test_run_unknown_target_without_a_command_is_named(self, tmp_path: Path) -> None:
        result = run(tmp_path, "--target", "plan99")
        assert result.returncode == 2
        assert "there is no target plan99" in result.stderr
        assert "did you mean plan9?" in result.stderr


def test_a_target_of_ones_own(image: Image, tmp_path: Path) -> None:
    """The first target of docs/targets.md, used from a guest."""
    target, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/targets.md").read_text(), re.S)
    (tmp_path / "mytarget.py").write_text(target)
    (name,) = re.findall(r"^class (\w+):", target, re.M)
    request = "printf 'GET /mytarget.py HTTP/1.0\\r\\n\\r\\n' >&3"
    fetch = f"exec 3<>/dev/tcp/target/80; {request}; cat <&3"
    result = run(
        tmp_path / "run",
        *("--target", f"mytarget:{name}", *PYTHON, "--", "bash", "-c", fetch),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert f"class {name}:" in result.stdout
    assert summary(tmp_path / "run")["blocks_covered"] != 0
    assert pcs(tmp_path / "run")


def test_settings_are_checked_before_anything_is_done(tmp_path: Path) -> None:
    result = run(tmp_path, "--personality", "solaris", "--", "true")
    assert result.returncode == 2
    assert "linux or gvisor" in result.stderr
    assert load(directory=tmp_path).personality == "linux"


def test_a_kvm_that_boots_nothing(
    image: Image, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Chosen by the probe, noticed by the boot watchdog: the run goes on with TCG.

    A machine with a KVM of that kind is not to be had everywhere. The next best thing is a QEMU
    that never runs the guest, whichever accelerator it was told: ``-S`` stops the processors.
    """

    def stopped(self: ProjectImage, settings: Settings, accelerator: Accelerator) -> MachineConfig:
        config = original(self, settings, accelerator)
        if accelerator.name == "tcg":
            return config
        tcg = Accelerator("tcg", "stands for a KVM")
        return dataclasses.replace(config, accelerator=tcg, extra_args=("-S",), boot_timeout=2.0)

    original = ProjectImage.machine_config
    monkeypatch.setattr(ProjectImage, "machine_config", stopped)
    monkeypatch.setattr(
        "bridge.session.launcher.choose_accelerator", lambda _: Accelerator("kvm", "test")
    )
    with bridge.boot(target="none", accel="auto") as guest:
        assert guest.run("true").exit_status == 0
        assert guest.kernel is not None, "what the accelerator allows, again"
        assert guest.kernel.offset is not None
        assert guest.accelerator == Accelerator("tcg", "nothing booted under KVM")
    assert "once more with tcg" in caplog.text
    with pytest.raises(BootTimeoutError), bridge.boot(target="none", accel="kvm"):
        raise AssertionError("what was asked for must not be replaced")
