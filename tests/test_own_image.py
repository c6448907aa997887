# SPDX-License-Identifier: Apache-2.0
"""A disk image of the user's: an ordinary Debian with systemd, a compiler and kernel headers."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import bridge
from bridge.config import Settings
from bridge.errors import GuestSetupError, UsageError
from bridge.guest_image import OwnImage, find_guest_image
from bridge.image import cache_directory
from bridge.vm.network import GUEST_ADDRESS

PACKAGES = (
    *("linux-image-amd64", "linux-headers-amd64", "gcc", "make", "libc6-dev", "kmod"),
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
BOOT_SECONDS = 240.0


@pytest.fixture(scope="module")
def debian() -> Path:
    """A directory with disk.img, vmlinuz, initrd.img and key; made once, in two minutes."""
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
        "syscall_pcs": True,
    }


@pytest.mark.vm
def test_it_boots_and_gets_the_device(debian: Path) -> None:
    before = (debian / "disk.img").stat().st_mtime_ns
    with bridge.boot(**_settings(debian)) as guest:
        assert "systemd" in guest.run("cat /proc/1/comm").text
        result = guest.kcov(["sh", "-c", "ls / >/dev/null; exit 3"])
        assert result.exit_status == 3
        assert len(result.pcs) > 50
    assert (debian / "disk.img").stat().st_mtime_ns == before, "the image is never written"


@pytest.mark.vm
def test_without_headers_it_says_what_is_missing(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path))  # where nothing has been built
    monkeypatch.setattr("bridge.guest_image._BUILD_TREE", "/nowhere/{kernel}")
    with (
        pytest.raises(GuestSetupError, match="could not be built") as caught,
        bridge.boot(**_settings(debian)),
    ):
        raise AssertionError("the session must not begin")
    assert "linux-headers-" in caught.value.hint
    assert "/nowhere/" in caught.value.evidence


def test_a_disk_and_a_key_belong_together(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"")
    with pytest.raises(UsageError, match="without a key"):
        find_guest_image(Settings(image=str(disk)))
    with pytest.raises(UsageError, match="without a disk image"):
        find_guest_image(Settings(ssh_key=disk))
    with pytest.raises(UsageError, match="is not there"):
        find_guest_image(Settings(image=str(tmp_path / "no.img"), ssh_key=disk))
    assert isinstance(find_guest_image(Settings(image=str(disk), ssh_key=disk)), OwnImage)
