# SPDX-License-Identifier: Apache-2.0
"""A disk image of the user's: an ordinary Debian with systemd, a compiler and kernel headers."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import bridge
from bridge.cli.main import main
from bridge.config import Settings
from bridge.errors import GuestSetupError, KernelUnknownError, UsageError
from bridge.guest.guest_image import CustomImage, find_guest_image
from bridge.session.session import Session
from bridge.sources.guest_kernel.filters import KernelFilter
from bridge.sources.guest_kernel.running import read_kernel
from bridge.sources.pcs import PC_BASE
from bridge.util.cache import cache_directory
from bridge.vm.network import GUEST_ADDRESS

PROGRAM = Path(__file__).resolve().parents[2] / "tests" / "system" / "one_openat.c"
# The kernel that is the smaller one, and another than that of the project's image.
PACKAGES = (
    *("linux-image-cloud-amd64", "linux-headers-cloud-amd64", "gcc", "make", "libc6-dev", "kmod"),
    *("systemd-sysv", "udev", "dbus", "openssh-server"),
)
NETWORK = rf"[Match]\nName=en*\n[Network]\nAddress={GUEST_ADDRESS}/24\n"
CUSTOMIZE = f"""
set -e
mkdir -p -m 700 "$1/root/.ssh"
cp key.pub "$1/root/.ssh/authorized_keys"
printf '{NETWORK}' >"$1/etc/systemd/network/guest.network"
chroot "$1" systemctl enable systemd-networkd
cp "$1"/boot/vmlinuz-* vmlinuz
cp "$1"/boot/initrd.img-* initrd.img
"""
ARGUMENTS = [
    *("mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
    *('--aptopt=APT::Install-Recommends "false"', "--dpkgopt=path-exclude=/usr/share/doc/*"),
    *("--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*"),
    f"--customize-hook={CUSTOMIZE}",
    *("bookworm", "tree"),
]
BOOT_SECONDS = 900.0
"""On a machine that is busy with other things, too; alone it takes one minute."""


@pytest.fixture(scope="module")
def debian() -> Path:
    """A directory with disk.img, vmlinuz, initrd.img and key; made once, in a minute or two."""
    if os.geteuid() != 0:
        pytest.skip("making a disk image out of a tree takes root: run the tests as root")
    digest = hashlib.sha256(repr(ARGUMENTS).encode()).hexdigest()[:12]
    home = cache_directory() / "tests" / f"own-{digest}"
    if not (home / "disk.img").is_file():
        work = home.with_name(f".{home.name}-{os.getpid()}")
        work.mkdir(parents=True)
        with _removed_at_the_end(work):
            _make_key(work)
            disk = ["mke2fs", "-q", "-t", "ext4", "-d", "tree", "disk.img", "2500M"]
            for command in (ARGUMENTS, disk):
                subprocess.run(command, cwd=work, check=True, stdin=subprocess.DEVNULL)
            shutil.rmtree(work / "tree")
            work.rename(home)
    return home


def _make_key(directory: Path) -> None:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (directory / "key").write_bytes(private)
    (directory / "key").chmod(0o600)
    (directory / "key.pub").write_bytes(public + b"\n")


@contextmanager
def _removed_at_the_end(directory: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _settings(debian: Path) -> dict[str, Any]:
    return {
        "image": str(debian / "disk.img"),
        "ssh_key": debian / "key",
        "kernel": debian / "vmlinuz",
        "initrd": debian / "initrd.img",
        "append": "root=/dev/vda rw",
        "memory": 1024,
        "boot_timeout": BOOT_SECONDS,
        "target": "none",
        "source": "python",
        "syscall_pcs": True,
    }


@pytest.mark.vm
def test_own_image_boots_with_device_and_watched_kernel(
    debian: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (debian / "disk.img").stat().st_mtime_ns
    with bridge.boot(tmp_path, **{**_settings(debian), "source": "kernel"}) as guest:
        assert "systemd" in guest.run("cat /proc/1/comm").text
        result = guest.kcov(["sh", "-c", "ls / >/dev/null; exit 3"])
        assert result.exit_status == 3
        assert sum(pc >= PC_BASE for pc in result.pcs) > 20, "a PC for each kind of system call"
        pcs = [pc for pc in _one_openat(guest) if pc < PC_BASE]
        truth = _Truth(guest)
        _hide_symbols(guest)
        _take_headers_away(guest, tmp_path / "empty", monkeypatch)
    assert (debian / "disk.img").stat().st_mtime_ns == before, "the image is never written"

    # The run's directory says of them what the guest itself has there.
    text = "".join(f"{pc:#x}\n" for pc in pcs)
    (tmp_path / "pcs.txt").write_text(text)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["symbolize", "--run", str(tmp_path)]) == 0
    names = capsys.readouterr().out.splitlines()[1::2]
    assert len(names) == len(pcs) > 100
    for pc, name in zip(pcs, names, strict=True):
        assert name in truth.names(pc), hex(pc)
    # fs/open.c, fs/namei.c
    path = ["do_sys_openat2", "do_filp_open", "path_openat", "do_dentry_open"]
    functions = dict.fromkeys(name.partition("+")[0] for name in names)
    assert [name for name in functions if name in path] == path
    for form in ("rawcover", "drcov"):
        out = str(tmp_path / form)
        assert main(["export", "--run", str(tmp_path), "--format", form, "-o", out]) == 0
        assert (tmp_path / form).stat().st_size > 1000


def _one_openat(guest: Session) -> list[int]:
    """The PCs of one openat(2)."""
    guest.guest.put(PROGRAM, "/tmp/one_openat.c")
    guest.guest.run("gcc -O2 -o /tmp/one_openat /tmp/one_openat.c", check=True)
    assert guest.ready is not None
    found = guest.guest.run(f"/tmp/one_openat {guest.ready.device} /etc/hostname", check=True)
    return [int(word, 16) for word in found.text.split()]


class _Truth:
    """What a guest's own /proc/kallsyms says of addresses."""

    def __init__(self, guest: Session) -> None:
        kernel = guest.kernel
        assert kernel is not None
        assert kernel.offset is not None
        self._offset = kernel.offset
        self._modules = dict(kernel.code.modules)
        text = bytearray()
        guest.guest.run("cat /proc/kallsyms", stdout=text.extend, capture=4096)
        found: dict[int, list[str]] = {}
        for line in text.decode().splitlines():
            address, kind, *words = line.split()
            if kind in "tTwW":
                found.setdefault(int(address, 16), []).append(" ".join(words))
        self._addresses = sorted(found)
        self._names = found

    def names(self, pc: int) -> set[str]:
        """All that a canonical address may be called: ``function+0xoffset[ [module]]``."""
        moved = self._offset
        for place in self._modules.values():
            if place.canonical <= pc < place.canonical + place.size:
                moved = place.base - place.canonical
        start = self._addresses[bisect_right(self._addresses, pc + moved) - 1]
        return {
            f"{function}+{pc + moved - start:#x}{space}{module}"
            for function, space, module in (name.partition(" ") for name in self._names[start])
        }


def _hide_symbols(guest: Session) -> None:
    """A guest that hides its symbols says so, and one that does not is read as before."""

    def shell(script: str, output: Callable[[bytes], object]) -> None:
        guest.guest.run(script, stdout=output, capture=4096)

    def hide(level: int) -> None:
        guest.guest.run(f"echo {level} >/proc/sys/kernel/kptr_restrict", check=True)

    hide(2)
    with pytest.raises(KernelUnknownError, match="hides the addresses"):
        read_kernel(shell, KernelFilter(), None)
    hide(1)
    assert guest.kernel is not None
    known = guest.kernel.code.symbols
    again = read_kernel(shell, KernelFilter(), None).symbols
    assert list(again) == [symbol for symbol in known if not symbol.module]


def _take_headers_away(guest: Session, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest without headers, in which nothing was built before, says what is missing."""
    image = guest.image
    assert isinstance(image, CustomImage)
    assert guest.ready is not None
    with monkeypatch.context() as patch:
        patch.setenv("KCOV_BRIDGE_CACHE", str(cache))
        patch.setattr("bridge.guest.guest_image._BUILD_TREE", "/nowhere/{kernel}")
        with pytest.raises(GuestSetupError, match="could not be built") as caught:
            image._install(guest.guest, guest.ready.kernel)
    assert "linux-headers-" in caught.value.hint
    assert "/nowhere/" in caught.value.evidence


def test_find_guest_image_disk_or_key_alone_is_a_usage_error(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"")
    with pytest.raises(UsageError, match="without an SSH key"):
        find_guest_image(Settings(image=str(disk)))
    with pytest.raises(UsageError, match="without a disk image"):
        find_guest_image(Settings(ssh_key=disk))
    with pytest.raises(UsageError, match="does not exist"):
        find_guest_image(Settings(image=str(tmp_path / "no.img"), ssh_key=disk))
    with pytest.raises(UsageError, match="there is no disk image"):
        find_guest_image(Settings(image=str(tmp_path / "no.img")))
    with pytest.raises(UsageError, match="there is no image 'no-such'") as caught:
        find_guest_image(Settings(image="no-such"))
    assert "the recipes are: bookworm" in caught.value.hint
    own = Settings(image=str(disk), ssh_key=disk)
    assert isinstance(find_guest_image(own), CustomImage)
    for without in (Settings(append="x"), own.replace(append="x")):
        with pytest.raises(UsageError, match="--append is given without --kernel"):
            find_guest_image(without)
    find_guest_image(own.replace(append="x", kernel=disk))
