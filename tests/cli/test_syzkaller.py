# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge syzkaller``: the directory, and guests driven as the manager drives them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridge.cli.main import main
from bridge.cli.syzkaller_claim import claim, manager_of
from bridge.cli.syzkaller_descriptions import (
    CONST_FILE,
    DESCRIPTION_FILE,
    Device,
    Offer,
    constants,
    description,
)
from bridge.cli.syzkaller_directory import (
    COVERAGE,
    Campaign,
    PinnedImage,
    _knows,
    _manager_config,
    public_key,
)
from bridge.cli.syzkaller_guest import GUESTS_FILE, _lost, _Machine
from bridge.cli.syzkaller_sandbox import INPUTS, mount_points, mounts_of, show_script
from bridge.cli.syzkaller_trial import KERNEL_OBJECT, _make_object
from bridge.config import Settings
from bridge.device.abi import KCOV_CMP_CONST, KCOV_CMP_SIZE
from bridge.errors import ImageError, InfrastructureError, UsageError
from bridge.guest.images.recipe import Sources
from bridge.session.session import Session
from bridge.session.stats import Stats
from bridge.sources.guest_kernel import BLOCKS_FILE
from bridge.sources.pcs import PC_BASE, SYSCALL_SLOTS, syscall_pc
from bridge.targets import TARGET_ADDRESS, Endpoint, UdpEndpoint
from bridge.targets.plan9 import GUEST_PORT
from tests.support.coverage_data import executed
from tests.support.programs import guest_image, guest_program

PCI_DEVICE = "/sys/bus/pci/drivers/kcov_bridge/0000:*"
_BUILT = ("bin/syz-manager", "bin/linux_amd64/syz-executor", "bin/linux_amd64/syz-execprog")


def checkout(directory: Path, *, built: bool = True) -> Path:
    """Make what looks like a checkout; nothing in it is run."""
    (directory / "syz-manager").mkdir(parents=True)
    for name in _BUILT if built else ():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch(mode=0o755)
    return directory


def test_syzkaller_checkout_cannot_be_used_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["syzkaller", str(tmp_path / "d"), "--syzkaller"]
    assert main([*command, str(tmp_path / "none")]) == 2
    assert "is no checkout of syzkaller" in capsys.readouterr().err
    old = checkout(tmp_path / "old")
    (old / "syz-fuzzer").mkdir()
    assert main([*command, str(old)]) == 2
    assert "too old" in capsys.readouterr().err
    assert main([*command, str(checkout(tmp_path / "source", built=False))]) == 2
    said = capsys.readouterr().err
    assert "bin/syz-manager" in said
    assert "make manager executor" in said
    assert not (tmp_path / "d").exists()


def test_syzkaller_directory_is_a_file_is_refused_before_an_image_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["--syzkaller", str(checkout(tmp_path / "s"))]
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["syzkaller", str(directory), *words]) == 2
        said = capsys.readouterr().err
        assert f"{directory} cannot be used: {tmp_path / 'file'} is a file" in said
        assert "give another DIR" in said


@pytest.mark.parametrize("address", ["here", "127.0.0.1", "http://here:80/", "a b:80", ":x"])
def test_syzkaller_http_is_no_address_is_refused(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["syzkaller", str(tmp_path / "d"), "--syzkaller", str(checkout(tmp_path / "s"))]
    assert main([*words, "--http", address]) == 2
    assert f"--http: {address} is no address" in capsys.readouterr().err


def test_syzkaller_more_guests_than_memory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["syzkaller", str(tmp_path / "d"), "--syzkaller", str(checkout(tmp_path / "s"))]
    assert main([*words, "--count", "1000"]) == 2
    assert "lower --count or --memory" in capsys.readouterr().err
    assert main([*words, "--procs", "0"]) == 2
    assert "--procs: 0 is not allowed" in capsys.readouterr().err
    assert main([*words, "--only-target"]) == 2
    assert "without a target" in capsys.readouterr().err
    for flag in ("--images", "--usb"):
        assert main([*words, "--target", "plan9", "--only-target", flag]) == 2
        assert "leaves out disk images and USB" in capsys.readouterr().err


def test_campaign_kernel_is_no_source_has_a_pc_for_each_call() -> None:
    pinned = PinnedImage(name="syzkaller-0123456789ab")
    settings = Campaign(Settings(accel="tcg", source="python"), pinned).machine_settings()
    assert settings.syscall_pcs
    assert settings.syscall_comparisons
    assert settings.image == pinned.name
    settings = Campaign(Settings(accel="tcg"), pinned).machine_settings()
    assert not settings.syscall_pcs
    assert settings.syscall_comparisons


def test_manager_leaves_out_slow_calls_and_waits_for_no_coverage_that_cannot_come(
    tmp_path: Path,
) -> None:
    def config(campaign: Campaign) -> dict[str, Any]:
        return _manager_config(tmp_path, tmp_path, campaign, "tcg")

    kernel = Campaign(Settings(target="none"))
    images = ["syz_mount_image", "syz_read_part_table"]
    assert config(kernel)["disable_syscalls"] == [*images, "syz_usb_*"]
    assert config(kernel)["experimental"] == {"remote_cover": False}
    assert config(replace(kernel, images=True))["disable_syscalls"] == ["syz_usb_*"]
    assert config(replace(kernel, usb=True))["disable_syscalls"] == images
    target = config(Campaign(Settings(target="plan9"), only_target=True))
    assert target["disable_syscalls"] == []
    assert target["experimental"] == {"remote_cover": True}


def test_key_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "id_ed25519").write_text("nonsense")
    with pytest.raises(UsageError, match="id_ed25519 cannot be used") as caught:
        public_key(tmp_path)
    assert "remove it" in caught.value.hint


ODD = ("a b", 'x"y', "`", "\n}", "$(reboot)", "'; reboot", "\udcff", "ü", "#", "x" * 255)


def offer(name: str) -> Offer:
    endpoints = (Endpoint(name, 1, 2), UdpEndpoint(name, 3, 4))
    devices = [Device("/dev/target/disk", "fd_block"), Device(f"/dev/target/{name}", "fd")]
    return Offer([f"{INPUTS}/target"], [f"{INPUTS}/target/{name}"], devices, endpoints)


@pytest.mark.parametrize("name", ODD)
def test_description_odd_names_are_strings_and_nothing_else(name: str) -> None:
    literal = re.compile(r'"([^"\n]*)"|`([0-9a-f]*)`')
    text = description(offer(name))
    assert literal.sub("", text) == literal.sub("", description(offer("plain")))
    strings = {
        plain or bytes.fromhex(digits).decode("utf-8", "surrogateescape")
        for plain, digits in literal.findall(text)
    }
    assert {f"{INPUTS}/target/{name}", f"/dev/target/{name}", f"{INPUTS}/target"} <= strings
    assert all(character.isprintable() or character in "\n\t" for character in text)


def test_description_names_no_constant_without_its_value() -> None:
    values = {line.partition(" = ")[0] for line in constants().splitlines()}
    text = description(offer("file"))
    named = set(re.findall(r"const\[([A-Z_]+)", text))
    calls = set(re.findall(r"^(\w+)\$", text, re.MULTILINE)) - {"syz_init_net_socket"}
    assert named | {f"__NR_{call}" for call in calls} == values - {"arches"}


def test_description_many_files_names_those_near_the_root() -> None:
    files = [f"{INPUTS}/target/deep/{number}" for number in range(1000)]
    text = description(Offer([f"{INPUTS}/target", f"{INPUTS}/target/deep"], files))
    assert "802 more paths are left out" in text
    (line,) = re.findall(r"^kcov_bridge_path = (.*)$", text, re.MULTILINE)
    assert line.startswith(f'"{INPUTS}/target", "{INPUTS}/target/deep", ')
    assert line.count(",") == 199


def test_target_is_known_to_a_checkout_that_was_built_with_its_description(tmp_path: Path) -> None:
    there = checkout(tmp_path / "s") / "sys" / "linux"
    there.mkdir(parents=True)
    for name in (DESCRIPTION_FILE, CONST_FILE):
        (tmp_path / name).write_text(name)
    assert not _knows(tmp_path / "s", tmp_path)
    for name in (DESCRIPTION_FILE, CONST_FILE):
        shutil.copy(tmp_path / name, there)
        os.utime(there / name, (1e9, 1e9))
    assert _knows(tmp_path / "s", tmp_path)
    os.utime(tmp_path / "s" / _BUILT[0], (1e8, 1e8))
    assert not _knows(tmp_path / "s", tmp_path)
    os.utime(tmp_path / "s" / _BUILT[0])
    (there / CONST_FILE).write_text("of another target")
    assert not _knows(tmp_path / "s", tmp_path)


def test_mounts_of_the_target_are_shown_in_order() -> None:
    head = "26 1 0:23 /"
    mountinfo = "\n".join(
        [
            rf"{head} /mnt/a\040b rw shared:1 - 9p target rw",
            f"{head} /mnt/a\\040b/'c rw - ext4 /dev/vdb rw",
            f"{head} /proc rw - proc proc rw",
            "",
        ]
    )
    mounts = mount_points(mountinfo)
    assert mounts == ["/mnt/a b", "/mnt/a b/'c"]
    script = show_script(mounts)
    assert "mount --bind '/mnt/a b' '/syz-inputs/a b'\n" in script
    assert script.index("'/mnt/a b' ") < script.index("""'/mnt/a b/'"'"'c' """)
    checked = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True)
    assert checked.stderr == ""
    assert show_script([]) == ""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A campaign's directory, and the command that prepared it."""
    place = tmp_path_factory.mktemp("prepared")
    directory = place / "campaign"
    words = ["syzkaller", str(directory), "--syzkaller", str(checkout(place / "s"))]
    words += ["--image", guest_image().name, "--memory", "256"]
    assert main(words) == 0
    return directory, words


@pytest.mark.vm
def test_image_is_pinned(
    prepared: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = guest_image()
    directory, words = prepared
    directory = shutil.copytree(directory, tmp_path / "copy")
    words = [words[0], str(directory), *words[2:]]
    key = public_key(directory)
    pinned = Campaign.load(directory).image
    assert (pinned.name, pinned.release) == (image.name, image.kernel_release)
    pinned.find()
    with pytest.raises(UsageError, match="is gone"):
        replace(pinned, name="bookworm-000000000000").find()
    with monkeypatch.context() as patch:
        patch.setattr(Sources, "agent_fingerprint", lambda _: "0" * 12)
        with pytest.raises(UsageError, match="another version"):
            pinned.find()
    other = replace(pinned, kernel="0" * 64, release="6.0.0")
    with pytest.raises(ImageError, match=r"another kernel: .* in place of 6\.0\.0") as caught:
        other.find()
    assert "kcov-bridge syzkaller" in caught.value.hint
    # What is covered of one kernel is not added to what is covered of another.
    replace(Campaign.load(directory), image=other).save(directory)
    (directory / COVERAGE / BLOCKS_FILE).touch()
    capsys.readouterr()
    assert main(words) == 2
    assert "is of another kernel: 6.0.0" in capsys.readouterr().err
    (directory / COVERAGE).rename(directory / "moved")
    # Without the kernel's coverage its modules are not loaded, which takes longest.
    assert main([*words, "--source", "python"]) == 0
    assert Campaign.load(directory).image == pinned
    assert public_key(directory) == key


@pytest.fixture
def managers(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start processes that have the manager's name."""
    program = tmp_path / "syz-manager"
    shutil.copy("/bin/sleep", program)
    with contextlib.ExitStack() as stack:

        def start() -> subprocess.Popen[bytes]:
            process = subprocess.Popen([program, "600"])
            stack.callback(process.wait)
            stack.callback(process.kill)
            # The kernel names a process a moment after its parent goes on.
            name = Path(f"/proc/{process.pid}/comm")
            deadline = time.monotonic() + 30
            while name.read_text() != "syz-manager\n":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return process

        yield start


def test_second_manager_in_a_directory_is_refused_until_the_first_has_ended(
    tmp_path: Path,
    managers: Callable[[], subprocess.Popen[bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = managers(), managers()
    directory = tmp_path / "d"
    directory.mkdir()
    # Other programs that start guests are no managers.
    claim(directory, os.getpid())
    assert manager_of(directory) == 0
    for _ in range(2):
        claim(directory, first.pid)
    assert manager_of(directory) == first.pid
    with pytest.raises(UsageError, match=rf"another manager \(process {first.pid}\) runs in"):
        claim(directory, second.pid)
    words = ["syzkaller", str(directory), "--syzkaller", str(checkout(tmp_path / "s"))]
    assert main(words) == 2
    assert f"a manager (process {first.pid}) runs in {directory}" in capsys.readouterr().err
    first.kill()
    first.wait()
    assert manager_of(directory) == 0
    claim(directory, second.pid)
    assert manager_of(directory) == second.pid


def test_stand_in_tells_a_second_manager_where_it_prints(
    tmp_path: Path, managers: Callable[[], subprocess.Popen[bytes]]
) -> None:
    claim(tmp_path, managers().pid)
    # A manager that shows nothing of what its QEMU prints. A script's name is that of its process.
    second = tmp_path / "bin" / "syz-manager"
    second.parent.mkdir()
    second.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        f"words = [sys.executable, '-m', 'bridge.cli.syzkaller_machine', {str(tmp_path)!r}]\n"
        "done = subprocess.run([*words, '--version'], capture_output=True)\n"
        "sys.exit(done.returncode)\n"
    )
    second.chmod(0o755)
    done = subprocess.run([second], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "another manager (process" in done.stderr
    assert "make a directory for each" in done.stderr


def test_what_a_killed_guest_left_is_added_by_the_next_one(tmp_path: Path) -> None:
    results = tmp_path / COVERAGE
    killed, alive, own = (results / f"guest-{name}" for name in ("killed", "alive", "own"))
    for number, part in enumerate((killed, alive, own)):
        part.mkdir(parents=True)
        (part / BLOCKS_FILE).write_text(f"0xffffffff8100000{number}\t4\n")
    machine = _Machine(tmp_path, Campaign(Settings(), PinnedImage(name="any")), 0)
    with contextlib.ExitStack() as stack:
        descriptor = os.open(alive, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        machine._keep(Stats(returns=3), own, results, time.time(), "the manager ended the guest")
        assert sorted(results.glob("guest-*")) == [alive]
    assert (results / BLOCKS_FILE).read_text().split()[::2] == [
        "0xffffffff81000000",
        "0xffffffff81000002",
    ]
    assert json.loads((results / "summary.json").read_text())["returns"] == 3


def test_full_disk_keeps_what_the_guest_left_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results = tmp_path / COVERAGE
    part = results / "guest-own"
    part.mkdir(parents=True)
    (part / BLOCKS_FILE).write_text("0xffffffff81000000\t4\n")
    (results / BLOCKS_FILE).write_text("0xffffffff81000001\t4\n")

    def full(*_: object, **__: object) -> None:
        raise InfrastructureError("cannot write: No space left on device")

    machine = _Machine(tmp_path, Campaign(Settings(), PinnedImage(name="any")), 0)
    with monkeypatch.context() as patch:
        patch.setattr("bridge.cli.syzkaller_guest.merge_results", full)
        machine._keep(Stats(), part, results, time.time(), "")
    assert f"what the guest covered stays in {part}" in caplog.text
    assert (part / BLOCKS_FILE).exists()
    other = results / "guest-other"
    other.mkdir()
    machine._keep(Stats(), other, results, time.time(), "")
    assert len((results / BLOCKS_FILE).read_text().splitlines()) == 2


def test_kernel_object_symbols_were_not_saved_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InfrastructureError, match=r"kernel-symbols.tsv was not saved"):
        _make_object(tmp_path, tmp_path / KERNEL_OBJECT, kernel=True)
    assert _make_object(tmp_path, tmp_path / KERNEL_OBJECT, kernel=False) is None
    assert "/cover will show nothing" in caplog.text


class Manager:
    """The manager's side of the door: it starts what stands in for QEMU, and kills it."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "manager.cfg").read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        forward = f"user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22"
        words = [self.config["vm"]["qemu"], "-m", "256", "-smp", "1", "-serial", "stdio"]
        words += ["-no-reboot", "-name", "VM-0", "-accel", "tcg", "-netdev", forward]
        self.machine = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.console = b""

    def ssh(self, command: str, data: bytes = b"") -> subprocess.CompletedProcess[str]:
        words = ["ssh", "-p", str(self.port), "-F", "/dev/null", "-i", self.config["sshkey"]]
        for option in ("UserKnownHostsFile=/dev/null", "IdentitiesOnly=yes", "BatchMode=yes"):
            words += ["-o", option]
        words += ["-o", "StrictHostKeyChecking=no", "-o", "ConnectTimeout=10", "root@localhost"]
        done = subprocess.run([*words, command], input=data, capture_output=True, timeout=120)
        said = (each.decode(errors="replace") for each in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(done.args, done.returncode, *said)

    def wait_ssh(self) -> None:
        deadline = time.monotonic() + 240
        while self.ssh("pwd").returncode:
            assert self.machine.poll() is None, self.read(0)
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def read(self, seconds: float, until: bytes = b"\0") -> str:
        """Read the console until some bytes come, or the end, or for so long."""
        assert self.machine.stdout is not None
        descriptor, deadline = self.machine.stdout.fileno(), time.monotonic() + seconds
        while until not in self.console:
            left = max(0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], left)[0]:
                break
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                break
            self.console += chunk
        return self.console.decode(errors="replace")

    def check_sandbox(self) -> None:
        """See what a program of the executor has of the target plan9."""
        program = guest_program(Path(__file__).parent / "sandbox.c")
        words = f"./sandbox {INPUTS}/target/README {TARGET_ADDRESS} {GUEST_PORT}"
        copy = f"cat >sandbox && chmod +x sandbox && {words}"
        done = self.ssh(copy, program.read_bytes())
        assert done.returncode == 0, done.stderr
        found: dict[str, list[list[int]]] = {}
        for line in done.stdout.splitlines():
            word, *numbers = line.split()
            found.setdefault(word, []).append([int(each, 0) for each in numbers])
        assert found["read"][0][0] > 0
        # Beside the PCs of the three calls.
        assert len([pc for (pc,) in found["pc"] if pc >= PC_BASE + SYSCALL_SLOTS * 16]) > 10
        # One for getpid(), and what is before and after it.
        kind, constant, other, pc = next(each for each in found["cmp"] if each[1] == 39 + 1)
        assert (kind, pc) == (KCOV_CMP_CONST | KCOV_CMP_SIZE(3), syscall_pc(39))
        assert other not in (0, constant)
        assert found["unreachable"] == [[errno.ENETUNREACH]]
        assert found["version"][0][0] > 7

    def kill(self) -> None:
        self.machine.kill()
        self.machine.wait()
        assert self.machine.stdout is not None
        self.machine.stdout.close()


def guests(results: Path, count: int) -> list[dict[str, object]]:
    """Wait until so many guests have ended in order."""
    deadline = time.monotonic() + 120
    while True:
        file = results / GUESTS_FILE
        found = file.read_text().splitlines() if file.exists() else []
        # The summary is the last that a guest writes.
        if len(found) >= count and not list(results.glob("guest-*")):
            return [json.loads(line) for line in found]
        assert time.monotonic() < deadline, sorted(results.iterdir())
        time.sleep(0.2)


@pytest.mark.vm
def test_syzkaller_guests_are_killed_and_panic_results_of_all_are_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = guest_image()
    directory = tmp_path / "campaign"
    words = ["syzkaller", str(directory), "--syzkaller", str(checkout(tmp_path / "s"))]
    words += ["--image", image.name, "--source", "python", "--target", "plan9", "--memory", "256"]
    assert main([*words, "--panic-on-warn", "--only-target"]) == 0
    said = capsys.readouterr()
    started = said.out.split()
    assert started == [f"{tmp_path}/s/bin/syz-manager", f"-config={directory}/manager.cfg"]
    way = f"cp {directory}/kcov_bridge.txt* {tmp_path}/s/sys/linux"
    assert way in said.err
    assert main([*words, "--panic-on-warn", "--only-target", "--start"]) == 2
    assert way in capsys.readouterr().err
    offered = (directory / DESCRIPTION_FILE).read_text()
    assert '"/syz-inputs/target/README"' in offered
    assert f"port\tconst[{GUEST_PORT}, int16be]" in offered
    results = directory / COVERAGE
    # The manager finds the target's lines before any guest of its own has started.
    shown = json.loads((directory / "manager.cfg").read_text())["kernel_obj"]
    symbols = subprocess.run(["nm", f"{shown}/vmlinux"], capture_output=True, text=True).stdout
    assert re.search(r"^f{8,9}[0-9a-f]+ t pyroute2\.plan9\.", symbols, re.M), symbols[:2000]

    first = Manager(directory)
    try:
        first.wait_ssh()
        done = first.ssh(
            "cat /proc/sys/kernel/panic_on_warn; cat /proc/sys/kernel/printk;"
            "mkdir /mnt/target/made; kcov-doc /etc/hostname; echo '<4>a warning' >/dev/kmsg"
        )
        panic, printk, *pcs = done.stdout.splitlines()
        assert (panic, printk.split()[0]) == ("1", "7"), done.stderr
        # The kernel is no source, and yet the calls on a file of the guest have PCs.
        assert any(re.match(r"0xffffffff[0-9a-f]{8}\b", each) for each in pcs), repr(done.stderr)
        assert "a warning" in first.read(30, b"a warning")
        enabled = first.config["enable_syscalls"]
        assert {"read$kcov_bridge", "connect$kcov_bridge0", "close"} <= set(enabled)
        first.check_sandbox()
    finally:
        first.kill()
    assert guests(results, 1)[0]["end"] == "the manager ended the guest"

    second = Manager(directory)
    try:
        second.wait_ssh()
        second.ssh("cat /mnt/target/README")
        second.ssh("echo 1 >/proc/sys/kernel/sysrq; (sleep 0.5; echo c >/proc/sysrq-trigger) &")
        assert "Kernel panic - not syncing: sysrq triggered crash" in second.read(60)
        assert second.machine.wait(60) == 0
    finally:
        second.kill()
    ended = guests(results, 2)
    assert "panicked" in str(ended[1]["end"])
    # Only the first guest tried to make a directory, only the second one read a file.
    (path,) = (each for each in executed(results / ".coverage") if each.endswith("plan9/server.py"))
    source = Path(path).read_text().splitlines()
    lines = {source[line - 1].strip() for line in executed(results / ".coverage")[path]}
    assert any("permission_denied" in line for line in lines), lines
    assert any("msg_rread" in line for line in lines), lines
    deadline = time.monotonic() + 30
    while True:
        summary = json.loads((results / "summary.json").read_text())
        if summary["returns"] >= sum(each["stats"]["returns"] for each in ended):  # type: ignore[index]
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert 0 < summary["blocks_covered"] < summary["blocks_total"]


@pytest.mark.vm
def test_syzkaller_machine_is_killed_while_it_starts_leaves_no_process(
    prepared: tuple[Path, list[str]],
) -> None:
    directory, _ = prepared
    manager = Manager(directory)
    time.sleep(1)
    (child,) = map(
        int,
        Path(f"/proc/{manager.machine.pid}/task/{manager.machine.pid}/children")
        .read_text()
        .split(),
    )
    manager.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(child, signal.SIGCONT)


@pytest.mark.vm
@pytest.mark.guest(target="plan9", source="python")
@pytest.mark.parametrize(
    ("script", "lost"),
    [
        ("exec 3</mnt/target; umount -f /mnt/target", "cannot statx '/mnt/target'"),
        ("umount /mnt/target", "/mnt/target was unmounted"),
        (
            f"for each in {PCI_DEVICE}; do echo 1 >$each/remove; done",
            "/sys/kernel/debug/kcov is gone",
        ),
    ],
    ids=["force", "unmount", "device"],
)
def test_guest_that_lost_what_programs_need_says_what(
    session: Session, script: str, lost: str
) -> None:
    mounts = mounts_of(session.guest)
    assert _lost(session, mounts) == ""
    session.guest.run(script)
    assert lost in _lost(session, mounts)
