# SPDX-License-Identifier: Apache-2.0
"""Settings: one definition, three places to give them, one order between those."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.config import Settings, find_file, load, options
from bridge.errors import UsageError


def toml(directory: Path, text: str, name: str = "kcov-bridge.toml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_need_no_file(tmp_path: Path) -> None:
    settings = load(environ={}, directory=tmp_path)
    assert settings == Settings()
    assert (settings.personality, settings.accel, settings.target) == ("linux", "auto", "plan9")
    assert (settings.memory, settings.cpus, settings.region) == (256, 1, 1024)
    assert settings.out == Path.cwd() / "build/run"


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    toml(tmp_path, "memory = 300\ncpus = 3\nregion = 64\n")
    environ = {"KCOV_BRIDGE_MEMORY": "400", "KCOV_BRIDGE_CPUS": "4"}
    settings = load({"memory": "500", "cpus": None}, environ=environ, directory=tmp_path)
    assert settings.memory == 500
    assert settings.cpus == 4
    assert settings.region == 64
    assert settings.accel == "auto"


def test_pyproject_table_is_read_and_own_file_comes_first(tmp_path: Path) -> None:
    toml(tmp_path, "[tool.kcov-bridge]\nsyscall-pcs = true\n", "pyproject.toml")
    assert load(environ={}, directory=tmp_path).syscall_pcs is True
    toml(tmp_path, "cpus = 2\n")
    settings = load(environ={}, directory=tmp_path)
    assert (settings.cpus, settings.syscall_pcs) == (2, False)
    found = find_file(tmp_path)
    assert found is not None
    assert found.name == "kcov-bridge.toml"


def test_pyproject_without_the_table_changes_nothing(tmp_path: Path) -> None:
    toml(tmp_path, "[tool.other]\ncpus = 2\n", "pyproject.toml")
    assert load(environ={}, directory=tmp_path) == Settings()


def test_load_pyproject_with_a_misspelt_table_warns(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = toml(tmp_path, "[tool.kcov_bridge]\ncpus = 2\n[tool.ruff]\n", "pyproject.toml")
    with caplog.at_level(logging.WARNING, logger="bridge.config"):
        assert load(environ={}, directory=tmp_path) == Settings()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: [tool.kcov_bridge] is not read; did you mean [tool.kcov-bridge]?"
    ]


def test_relative_paths_of_a_file_start_at_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, 'out = "there"\nimage = "disks/a.qcow2"\nqemu = "qemu-kvm"\n')
    settings = load(environ={}, directory=Path("/"), file=path)
    assert settings.out == tmp_path / "there"
    assert settings.image == str(tmp_path / "disks/a.qcow2")
    assert settings.qemu == "qemu-kvm"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memroy = 1\n", ["unknown key memroy", "did you mean memory?"]),
        ("zzz = 1\n", ["unknown key zzz", "the names are: personality"]),
        ('memory = "256"\n', ["memory", '"256" is not allowed', "a whole number"]),
        ("memory = true\n", ["memory: True is not allowed"]),
        ("memory = 1\n", ["memory: 1 is not allowed", "a whole number, 64 to 1048576"]),
        ("[kcov-bridge]\nmemory = 256\n", ["unknown key kcov-bridge", "outside of any table"]),
        ("region = 100\n", ["region: 100", "power of two"]),
        ('accel = "kvn"\n', ["auto or kvm or tcg", "did you mean kvm?"]),
        ("syscall_pcs = 1\n", ["syscall_pcs: 1", "true or false"]),
        ("timeout = nan\n", ["timeout: nan"]),
        ("out = 3\n", ["out: 3", "a path"]),
        ('out = ""\n', ["out", "a path"]),
        ("[memory]\na = 1\n", ["memory: {'a': 1}"]),
        ("memory = \n", ["not valid TOML"]),
    ],
)
def test_load_wrong_file_error_names_what_is_allowed(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load(environ={}, directory=tmp_path)
    report = caught.value.report()
    assert str(path) in report
    for word in words:
        assert word in report


def test_wrong_flag_and_variable_are_named() -> None:
    with pytest.raises(UsageError, match="--accel") as flag:
        load({"accel": "tgc"}, environ={})
    assert "did you mean tcg?" in flag.value.hint
    with pytest.raises(UsageError, match="KCOV_BRIDGE_CPUS"):
        load(environ={"KCOV_BRIDGE_CPUS": "many"})
    with pytest.raises(UsageError, match="--boot-timeout"):
        load({"boot_timeout": "-1"}, environ={})
    with pytest.raises(UsageError, match="unknown setting cpuz"):
        load({"cpuz": "1"}, environ={})


def test_missing_config_file_and_unreadable_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(environ={}, file=tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not valid TOML"):
        load(environ={}, file=tmp_path / "bad.toml")


def test_tool_table_of_the_wrong_type(tmp_path: Path) -> None:
    toml(tmp_path, "[tool]\nkcov-bridge = 3\n", "pyproject.toml")
    with pytest.raises(UsageError, match="not a table"):
        load(environ={}, directory=tmp_path)


@pytest.mark.parametrize(("text", "value"), [("1", True), ("Yes", True), ("off", False)])
def test_flags_in_the_environment(text: str, value: bool, tmp_path: Path) -> None:
    settings = load(environ={"KCOV_BRIDGE_SYSCALL_PCS": text}, directory=tmp_path)
    assert settings.syscall_pcs is value


def test_load_misspelt_variable_is_warned_of(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    environ = {"KCOV_BRIDGE_MEMROY": "1", "KCOV_BRIDGE_CACHE": "/x", "KCOV_BRIDGE_OF_OTHERS": "1"}
    with caplog.at_level(logging.WARNING, logger="bridge.config"):
        load(environ=environ, directory=tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "KCOV_BRIDGE_MEMROY is no setting; did you mean KCOV_BRIDGE_MEMORY?"
    ]


def test_load_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load({"out": "~/there"}, environ={}).out == tmp_path / "there"
    toml(tmp_path, 'ssh_key = "~/key"\nout = "~no-such-user/x"\n')
    settings = load(environ={}, directory=tmp_path)
    assert settings.ssh_key == tmp_path / "key"
    assert settings.out == tmp_path / "~no-such-user/x"


def test_settings_with_relative_paths_do_not_move_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.qcow2").write_text("")
    toml(tmp_path, 'vmlinux = "debug/vmlinux"\n')
    monkeypatch.chdir(tmp_path)
    settings = load(
        {
            "out": "here",
            "image": "disk.qcow2",
            "ssh_key": "key",
            "kernel": "../bzImage",
            "initrd": "initrd",
            "target_dir": "files",
            "qemu": "./qemu",
        },
        environ={},
    )
    again = settings.replace(memory=300)
    monkeypatch.chdir("/")
    for each in (settings, again):
        assert each.out == tmp_path / "here"
        assert each.image == str(tmp_path / "disk.qcow2")
        assert each.ssh_key == tmp_path / "key"
        assert each.kernel == tmp_path / "../bzImage"
        assert each.initrd == tmp_path / "initrd"
        assert each.target_dir == tmp_path / "files"
        assert each.vmlinux == tmp_path / "debug/vmlinux"
        assert each.qemu == str(tmp_path / "qemu")


def test_settings_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qemu-kvm").write_text("")
    monkeypatch.chdir(tmp_path)
    settings = Settings(image="bookworm", qemu="qemu-kvm")
    assert (settings.image, settings.qemu) == ("bookworm", "qemu-kvm")


def test_settings_take_text_and_paths_alike(tmp_path: Path) -> None:
    mixed: dict[str, Any] = {"out": str(tmp_path / "out"), "image": tmp_path / "disk"}
    settings = Settings(**mixed)
    assert settings.out == tmp_path / "out"
    assert settings.image == str(tmp_path / "disk")
    assert load({"image": Path("disk"), "out": tmp_path}, environ={}).image == str(
        Path.cwd() / "disk"
    )


def test_settings_in_a_directory_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match="setting out: build/run is relative"):
        Settings()
    assert Settings(out=tmp_path).out == tmp_path


def test_settings_made_by_hand_are_checked() -> None:
    with pytest.raises(UsageError, match="setting region"):
        Settings(region=3)
    with pytest.raises(UsageError, match="setting memory"):
        Settings().replace(memory="256")
    with pytest.raises(UsageError, match="setting accel: nothing"):
        Settings().replace(accel=None)
    with pytest.raises(UsageError, match="initrd is given without a kernel"):
        Settings(initrd=Path("initrd.img"))


@given(st.sampled_from(sorted(options())), st.text())
def test_any_text_is_taken_or_refused_with_a_usage_error(name: str, text: str) -> None:
    try:
        settings = load({name: text}, environ={}, directory=Path("/nonexistent"))
    except UsageError as error:
        assert error.hint  # noqa: PT017
    else:
        assert isinstance(settings, Settings)


def test_source_auto_depends_on_accelerator_and_personality() -> None:
    assert Settings().sources("tcg") == {"kernel", "python"}
    assert Settings().sources("kvm") == {"python"}
    # gVisor's kcov knows no KCOV_UNIQUE_ENABLE, and shows what serves the guest.
    assert Settings(personality="gvisor").sources("tcg") == {"python"}
    assert Settings(personality="gvisor", source="kernel").sources("tcg") == {"kernel"}
    assert Settings(source="python").sources("tcg") == {"python"}


def test_settings_of_what_changed_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCOV_BRIDGE_MEMORY", "999")
    assert Settings().changed() == {}
    settings = Settings(memory=512, vmlinux=tmp_path / "vmlinux", source="kernel", timeout=1.5)
    changed = json.loads(json.dumps(settings.changed()))
    assert changed.keys() == {"memory", "vmlinux", "source", "timeout"}
    assert Settings.of(changed) == settings
    with pytest.raises(UsageError):
        Settings.of({"memory": 1})
