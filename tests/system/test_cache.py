# SPDX-License-Identifier: Apache-2.0
"""A cache that can only be read, and runs that lack what others have: neither changes it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import COMMAND, ROOT
from tests.support.programs import add_guest_image

pytestmark = pytest.mark.vm

RUN = ("run", "--target", "none")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the image alone."""
    cache = tmp_path_factory.mktemp("cache")
    add_guest_image(cache)
    return cache


def bridge(cache: Path, *words: str, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """The command with this cache: its status, and what it said."""
    done = subprocess.run(
        [*prefix, *COMMAND, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "KCOV_BRIDGE_CACHE": str(cache), "KCOV_BRIDGE_SOURCE": "auto"},
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


def read_only(cache: Path) -> tuple[str, ...]:
    """What runs a command with the cache mounted read-only, for it alone."""
    mount = f"mount --bind {cache} {cache} && mount -o remount,bind,ro {cache}"
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    return ("unshare", *user, "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")


LITTLE = 1_600_000
"""Address space in KiB with which QEMU cannot run a guest."""


def limited(kib: int) -> tuple[str, ...]:
    """What runs a command with so much address space."""
    return ("sh", "-c", f'ulimit -v {kib} && exec "$@"', "sh")


def content(cache: Path) -> set[tuple[str, int, int]]:
    return {
        (str(path), path.stat().st_ino, path.stat().st_size)
        for path in cache.rglob("*")
        if path.is_file() and "locks" not in path.parts and path.name != "last-run"
    }


def test_cache_read_only_what_is_there_is_used(cache: Path, tmp_path: Path) -> None:
    # Nothing is there but the image.
    out = ("--out", str(tmp_path / "out"))
    before = content(cache)
    status, said = bridge(cache, *RUN, *out, "--", "true", prefix=read_only(cache))
    assert status == 0, said
    assert said.count("the guest is booted, not started from a snapshot: cannot write") == 1
    assert said.count("the guest kernel is not recorded: cannot write the plugin for QEMU") == 1
    assert content(cache) == before
    # With a source asked for by name there is nothing to leave out.
    words = (*RUN, *out, "--source", "kernel", "--", "true")
    status, said = bridge(cache, *words, prefix=read_only(cache))
    assert status == 125
    assert "Read-only file system" in said
    assert "--source python" in said
    status, said = bridge(cache, "doctor", prefix=read_only(cache))
    assert "cannot be written: what it holds is used, what it lacks is left out" in said
    assert "KCOV_BRIDGE_CACHE" in said

    # With all that a run makes.
    status, said = bridge(cache, *RUN, *out, "--", "true")
    assert status == 0, said
    before = content(cache)
    status, said = bridge(cache, *RUN, *out, "--", "true", prefix=read_only(cache))
    assert status == 0, said
    assert "(from a snapshot)" in said
    assert "cannot" not in said
    assert content(cache) == before


@pytest.mark.parametrize("kib", [LITTLE, 1_400_000])
def test_cache_one_run_lacks_memory_the_next_is_as_before(
    cache: Path, tmp_path: Path, kib: int
) -> None:
    words = (*RUN, "--out", str(tmp_path / "out"), "--source", "python", "--", "true")
    status, said = bridge(cache, *words)
    assert status == 0, said
    before = content(cache)
    for _ in range(2):
        status, said = bridge(cache, *words, prefix=limited(kib))
        assert status in (123, 125), said  # the bridge has no room for the snapshot, or QEMU
    assert content(cache) == before
    status, said = bridge(cache, *words)
    assert status == 0, said
    assert "(from a snapshot)" in said


def test_cache_no_snapshot_can_be_made_once_the_next_run_makes_one(
    cache: Path, tmp_path: Path
) -> None:
    shutil.rmtree(cache / "snapshots", ignore_errors=True)
    words = (*RUN, "--out", str(tmp_path / "out"), "--source", "python", "--", "true")
    for _ in range(2):
        status, said = bridge(cache, *words, prefix=limited(LITTLE))
        assert status in (123, 125), said
    status, said = bridge(cache, *words)
    assert status == 0, said
    assert "making a snapshot" in said
    assert "(from a snapshot)" in said
