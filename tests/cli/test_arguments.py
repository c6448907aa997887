# SPDX-License-Identifier: Apache-2.0
"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from bridge.cli.arguments import add_settings, settings_of
from bridge.config import ENVIRONMENT_PREFIX, Kind, Settings, options
from tests.support import ROOT


def test_settings_given_as_flags_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in options():
        monkeypatch.delenv(f"{ENVIRONMENT_PREFIX}{name.upper()}", raising=False)
    parser = argparse.ArgumentParser()
    add_settings(parser)
    words: list[str] = []
    for name, option in options().items():
        flag = "--" + name.replace("_", "-")
        assert flag in parser.format_help()
        if option.kind is Kind.FLAG:
            words.append(flag)
        elif option.choices:
            words += [flag, option.choices[-1]]
        elif option.kind is Kind.INTEGER:
            words += [flag, "64"]
        elif option.kind is Kind.SECONDS:
            words += [flag, "2.5"]
        else:
            words += [flag, "./some/thing"]
    settings = settings_of(parser.parse_args(words))
    assert settings.syscall_pcs is True
    assert settings.accel == "tcg"
    assert settings.timeout == 2.5
    assert settings.ssh_key == Path("some/thing").absolute()
    assert settings_of(parser.parse_args([])) == Settings()


def test_argparse_is_imported_in_cli_alone() -> None:
    # Scripts that are started by path, not imported, may read their own arguments.
    users = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "bridge").rglob("*.py"))
        if re.search(r"^\s*(import argparse|from argparse)", path.read_text(), re.MULTILINE)
    ]
    assert [name for name in users if not name.startswith("bridge/cli/")] == []
