# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge serve`` from outside: a guest that is killed and comes back, a real ssh client."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bridge.cli.main import main
from bridge.cli.server import GUESTS_DIRECTORY, GuestFile, reserved_port
from bridge.errors import UsageError
from tests.support import Program, nothing_left, qemu_of, start
from tests.support.coverage_data import executed
from tests.support.programs import guest_image


def ssh(ready: dict[str, Any], command: str) -> str:
    """Run a command in the guest as a person would, by the words that were printed."""
    done = subprocess.run(
        [*ready["ssh_command"], command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def event(server: Program) -> dict[str, Any]:
    line = server.line()
    if not line:
        assert server.stderr is not None
        pytest.fail(server.stderr.read())
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


@pytest.mark.vm
def test_serve_guest_is_killed_comes_back_on_its_port_and_nothing_is_lost(tmp_path: Path) -> None:
    guest_image()
    out, tool, setup = tmp_path / "out", tmp_path / "tool", tmp_path / "setup"
    tool.write_text("#!/bin/sh\necho tool of $(cat /run/set-up)\n")
    tool.chmod(0o755)
    setup.write_text("test -x /opt/of/tool && lsmod | grep -q ^can_raw && hostname >/run/set-up\n")
    options = ["--json", "--put", f"{tool}:/opt/of/", "--guest-setup", str(setup)]
    options += ["--module", "can_raw", "--source", "python"]
    with nothing_left(out), start(out, *options, subcommand="serve") as server:
        first = event(server)
        assert (first["event"], first["starts"], first["pid"]) == ("ready", 1, server.pid)
        host = ssh(first, "hostname")
        assert ssh(first, "/opt/of/tool") == f"tool of {host}"
        assert "Files to read" in ssh(first, "cat /mnt/target/README")
        port = str(first["ssh_port"])
        assert main(["serve", "--out", str(tmp_path / "other"), "--ssh-port", port]) == 2

        os.kill(qemu_of(out), signal.SIGKILL)
        lost, second = event(server), event(server)
        assert lost["event"] == "lost"
        assert "signal 9" in lost["reason"] or "SIGKILL" in lost["reason"]
        assert second == {**first, "starts": 2}
        assert ssh(second, "/opt/of/tool; ls /mnt/target").splitlines()[0] == f"tool of {host[:-1]}"

        server.send_signal(signal.SIGTERM)
        _, stderr = server.communicate(timeout=120)
        assert server.returncode == 0, stderr
    values = json.loads((out / "summary.json").read_text())
    assert (values["exit_status"], values["error"]) == (0, "")
    assert 0 < values["blocks_covered"] < values["blocks_total"]
    # Only the first guest read a file.
    (path,) = (path for path in executed(out / ".coverage") if path.endswith("plan9/server.py"))
    source = Path(path).read_text().splitlines()
    lines = {source[line - 1].strip() for line in executed(out / ".coverage")[path]}
    assert any("Rread" in line or "TypeRread" in line or "t_read" in line for line in lines), lines
    assert "plan9/server.py" in (out / "lcov.info").read_text()
    consoles = sorted((out / GUESTS_DIRECTORY).glob("*/console.log"))
    assert [each.parent.name for each in consoles] == ["1", "2"]
    assert sorted(each.name for each in consoles[0].parent.iterdir()) == ["console.log"]
    for each in consoles:
        assert "Accepted publickey" not in each.read_text(errors="replace")


@pytest.mark.vm
def test_serve_results_cannot_be_kept_ends_all_the_same(tmp_path: Path) -> None:
    guest_image()
    out = tmp_path / "out"
    with (
        nothing_left(out),
        start(out, "--json", "--source", "python", subcommand="serve") as server,
    ):
        assert event(server)["event"] == "ready"
        (out / GUESTS_DIRECTORY / "1" / "blocks.tsv").mkdir()
        server.send_signal(signal.SIGTERM)
        stdout, stderr = server.communicate(timeout=120)
    assert (server.returncode, stdout) == (125, ""), stderr
    assert "blocks.tsv" in stderr
    assert "starting another" not in stderr


@pytest.mark.vm
def test_serve_what_a_guest_needs_fails_ends_with_the_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = guest_image()
    setup = tmp_path / "setup"
    setup.write_text("echo said; exit 3\n")
    words = ["serve", "--image", image.name, "--target", "none", "--source", "python"]
    words += ["--out", str(tmp_path / "out")]
    assert main([*words, "--guest-setup", str(setup)]) == 125
    said = capsys.readouterr().err
    assert f"{setup} failed in the guest (exit status 3)" in said
    # Once: it was shown as it came.
    assert said.count("said\n") == 1
    assert main([*words, "--module", "no_such"]) == 125
    said = capsys.readouterr().err
    assert "no kernel module no_such, which --module names" in said
    assert "kcov-bridge image build --module no_such" in said


@pytest.mark.parametrize("port", ["-1", "65536", "ssh"])
def test_serve_impossible_port_is_refused(
    port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", f"--ssh-port={port}", "--out", str(tmp_path / "out")]) == 2
    assert "a port is a number up to 65535" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_serve_port_in_use_is_refused_before_anything_boots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "--ssh-port", port, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"the SSH port {port} is taken by another program" in error
    assert "--ssh-port N names another" in error
    assert not (tmp_path / "out").exists()


def test_reserved_port_of_another_server_names_it() -> None:
    with (
        reserved_port(0) as port,
        pytest.raises(UsageError, match=rf"process {os.getpid()}\) has the SSH port {port}"),
        reserved_port(port),
    ):
        pass
    with reserved_port(port) as again:
        assert again == port


def test_serve_key_that_is_none_is_refused_before_anything_boots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, key = tmp_path / "disk", tmp_path / "key"
    disk.write_bytes(bytes(512))
    key.write_text("no key\n")
    words = ["serve", "--image", str(disk), "--ssh-key", str(key), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"the SSH key {key} cannot be used" in capsys.readouterr().err


def test_put_file_has_a_place_in_the_guest(tmp_path: Path) -> None:
    plain, program = tmp_path / "plain", tmp_path / "a:b"
    plain.write_text("")
    program.write_text("")
    program.chmod(0o700)
    assert GuestFile.parse(str(plain)) == GuestFile(plain, "/root/plain", 0o644)
    assert GuestFile.parse(f"{plain}:/opt/x") == GuestFile(plain, "/opt/x", 0o644)
    assert GuestFile.parse(f"{plain}:/opt/") == GuestFile(plain, "/opt/plain", 0o644)
    assert GuestFile.parse(str(program)) == GuestFile(program, "/root/a:b", 0o755)


@pytest.mark.parametrize("text", ["plain:relative", "missing", "missing:/x", ".", ":"])
def test_put_impossible_file_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_text("")
    with pytest.raises(UsageError, match=r"--put"):
        GuestFile.parse(text)


def test_serve_takes_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--", *shlex.split("ls /")]) == 2
    assert "takes no command after --" in capsys.readouterr().err
