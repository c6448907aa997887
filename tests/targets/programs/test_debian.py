# SPDX-License-Identifier: Apache-2.0
"""Source packages of Debian: what apt refuses is an error that says what to do.

That a package is fetched, and builds, is shown by tests/system/test_program_targets.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bridge.errors import TargetError
from bridge.targets.programs.debian import DebianSource
from bridge.util.commands import Commands, Phases

pytestmark = pytest.mark.skipif(
    shutil.which("apt-get") is None, reason="apt-get is missing: this is not Debian"
)

SOURCE = DebianSource("hello")


def fetch(directory: Path) -> tuple[Path, str]:
    commands = Commands(
        directory / "log", Phases(lambda line: None), product="hello", error=TargetError
    )
    (directory / "fetched").mkdir()
    return SOURCE.fetch(directory / "fetched", commands)


def test_fetch_unreachable_mirror_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCOV_BRIDGE_MIRROR", "http://127.0.0.1:1/debian")
    with pytest.raises(TargetError, match="the source of hello from Debian trixie") as caught:
        fetch(tmp_path)
    assert "127.0.0.1" in caught.value.evidence
    assert "KCOV_BRIDGE_MIRROR=URI" in caught.value.hint


def test_fetch_archive_that_nobody_signed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tmp_path / "debian" / "dists" / "trixie" / "Release"
    release.parent.mkdir(parents=True)
    release.write_text("Origin: Debian\nSuite: trixie\nCodename: trixie\nComponents: main\n")
    monkeypatch.setenv("KCOV_BRIDGE_MIRROR", f"file://{tmp_path / 'debian'}")
    with pytest.raises(TargetError) as caught:
        fetch(tmp_path)
    assert "is not signed" in caught.value.evidence


def test_fetch_without_any_archive_of_debian_says_how_to_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::SourceList "/dev/null"; Dir::Etc::SourceParts "{tmp_path / "none"}";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.delenv("KCOV_BRIDGE_MIRROR", raising=False)
    with pytest.raises(TargetError, match="apt knows none here") as caught:
        fetch(tmp_path)
    assert "KCOV_BRIDGE_MIRROR=URI" in caught.value.hint
