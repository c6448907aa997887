# SPDX-License-Identifier: Apache-2.0
"""Programs whose sources are files of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.targets.programs import packaged
from bridge.targets.programs.gonfs import GONFS, Gonfs
from bridge.targets.programs.packaged import PackagedSource
from bridge.util.commands import Commands, Phases


def test_fetch_copies_the_files_alone(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log", Phases(print), product="gonfs")
    (tmp_path / "to").mkdir()
    top, version = GONFS.source.fetch(tmp_path / "to", commands)
    assert {each.name for each in top.iterdir()} == {"go.mod", "go.sum", "main.go"}
    assert f"github.com/willscott/go-nfs v{version}" in (top / "go.mod").read_text()


def test_source_another_text_is_another_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "_HERE", tmp_path)
    (tmp_path / "it").mkdir()
    texts = []
    for text in ("one", "two", "one"):
        (tmp_path / "it" / "main.go").write_text(text)
        texts.append(repr(PackagedSource("it", "1.0", ("main.go",))))
    assert texts[0] == texts[2] != texts[1]


def test_command_gonfs_serves_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gonfs, "built", property(lambda self: type("B", (), {"source": tmp_path})))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("text")
    target = Gonfs(tmp_path / "mine")
    program, _socket, tree = target.command()
    assert program == tmp_path / "gonfs"
    assert (Path(tree) / "file").read_text() == "text"
    (Path(tree) / "file").write_text("other")
    assert (tmp_path / "mine" / "file").read_text() == "text"
    target.stop()
