# SPDX-License-Identifier: Apache-2.0
"""Commands over the channel in a real guest: they see what commands of SSH see."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import GuestResetError, GuestStoppedError, RunTimeoutError
from bridge.guest.channel import ChannelGuest
from bridge.guest.guest_image import ProjectImage
from bridge.guest.ssh import SshGuest
from bridge.session.session import Session

pytestmark = [pytest.mark.vm, pytest.mark.guest(target="none", source="python", syscall_pcs=True)]


@pytest.fixture
def ssh(session: Session) -> Iterator[SshGuest]:
    assert isinstance(session.image, ProjectImage)
    image, machine = session.image.image, session.machine
    host_key = image.host_key.read_text()
    with SshGuest(machine.ssh_port, image.ssh_key, host_key, watched=machine) as ssh:
        ssh.connect(60)
        yield ssh


_SEEN = (
    "env | grep -v '^SSH_' | sort",
    "cat /proc/self/limits /proc/self/cgroup /proc/self/oom_score_adj /proc/self/loginuid "
    "/proc/self/sessionid /proc/self/timerslack_ns /proc/self/coredump_filter",
    "grep -E '^(Umask|Uid|Gid|Groups|NStgid|Sig|Shd|Cap|NoNew|Secc|Spec|Cpus|Mems|FDSize)' "
    "/proc/self/status | grep -v '^NStgid'",
    "ls -l /proc/self/fd | sed 's/.* \\([0-9]* -> [a-z]*\\).*/\\1/' | head -n 4",
    "cat /proc/self/mountinfo; readlink /proc/self/ns/*",
    "umask; pwd; nice; tty; readlink /proc/$$/exe",
    # group, session, terminal, nice value and policy of the shell
    "set -- $(sed 's/.*) //' /proc/$$/stat); [ $3 = $4 ] && [ $4 != $$ ] && echo $5 $6 ${17}",
    "no-such-command; /etc/passwd; cd /no/such/directory",
)


def test_run_command_sees_what_it_sees_over_ssh(session: Session, ssh: SshGuest) -> None:
    assert isinstance(session.guest, ChannelGuest)
    for command in _SEEN:
        ours, theirs = session.guest.run(command), ssh.run(command)
        assert (ours.exit_status, ours.stdout, ours.stderr) == (
            theirs.exit_status,
            theirs.stdout,
            theirs.stderr,
        ), command
    for words in (["no-such-command"], ["/etc/passwd"], ["/"], ["env"], ["exit", "3"], ["[", "a"]):
        results = [each.run(words) for each in (session.guest, ssh)]
        lines = [sorted(each.text.splitlines()) for each in results]
        assert lines[0] == [line for line in lines[1] if not line.startswith("SSH_")], words
        assert results[0].stderr == results[1].stderr, words
        assert results[0].exit_status == results[1].exit_status, words
    # Of such an end bash writes a line, which is no output of the command.
    assert session.guest.run("kill -KILL $$").exit_status == ssh.run("kill -KILL $$").exit_status
    env, cwd = {"A": "1 '", "PATH": "/bin"}, "/usr/bin"
    command = "env | grep -v ^SSH_ | sort; pwd"
    results = [each.run(command, env=env, cwd=cwd) for each in (session.guest, ssh)]
    assert results[0].stdout == results[1].stdout
    failed = [each.run("true", cwd="/no/such") for each in (session.guest, ssh)]
    assert failed[0].stderr == failed[1].stderr
    assert failed[0].exit_status == failed[1].exit_status == 126


def test_run_as_another_user_is_the_same_over_ssh(session: Session, ssh: SshGuest) -> None:
    for each in (session.guest, ssh):
        for cwd, where in ((None, "/usr/sbin"), ("/tmp", "/tmp")):
            seen = each.run(
                "id -un; id -Gn; pwd; echo $HOME $A", user="daemon", cwd=cwd, env={"A": "1"}
            )
            assert seen.text == f"daemon\ndaemon\n{where}\n/usr/sbin 1\n", seen.stderr
        assert each.run(["cat", "/etc/shadow"], user="daemon").exit_status == 1
        assert each.run(["echo", "$0 '"], user="daemon").text == "$0 '\n"
        assert each.run("kill -TERM $$", user="daemon").exit_status == 128 + 15
        missing = each.run("true", user="$(id)")
        assert missing.exit_status == 126
        assert missing.stderr == b"sh: 1: there is no user $(id)\n"
        with pytest.raises(RunTimeoutError):
            each.run("sleep 1000 & sleep 1000", user="daemon", timeout=3)
    assert session.run("pgrep sleep").text == ""


def test_look_has_what_it_has_over_ssh(session: Session, ssh: SshGuest) -> None:
    cores = "/tmp/some core."
    session.run(["touch", cores + "1.a b", cores + "2", "/tmp/other"])
    session.run("echo '<6>a line' >/dev/kmsg")
    ours, theirs = (each.look(cores, 30) for each in (session.guest, ssh))
    assert ours.exit_status == theirs.exit_status == 0
    assert ours.stderr == b""
    logs = [each.stdout.partition(b"\0")[0].splitlines() for each in (ours, theirs)]
    # dmesg gives the second line of a message spaces in place of the time.
    plain = [[re.sub(rb"^(\[ *[0-9.]+\])? +", b"", line) for line in log] for log in logs]
    assert plain[0] == plain[1]
    assert plain[0][0].isdigit()
    assert b"a line" in plain[0][-1]
    files = [sorted(each.stdout.partition(b"\0")[2].splitlines()) for each in (ours, theirs)]
    assert files[0] == files[1] == [cores.encode() + name for name in (b"1.a b", b"2")]
    none = session.guest.look("/no/such/directory/x", 30).stdout
    assert none.endswith(b"\0")


def test_run_start_up_file_has_the_effect_that_it_has_over_ssh(
    session: Session, ssh: SshGuest
) -> None:
    start_up = session.run("printf %s ~/.bashrc").text
    session.put(b"export MARK=1\necho out\necho err >&2\nulimit -n 100\n", start_up)
    command = "echo $MARK; ulimit -n"
    results = [each.run(command) for each in (session.guest, ssh)]
    assert results[0].stdout == results[1].stdout == b"1\n100\n"
    assert results[0].stderr == results[1].stderr == b"err\n"


def test_put_and_get_big_files_arrive_whole(session: Session, tmp_path: Path) -> None:
    data = os.urandom(20_000_000)
    session.put(data, "/tmp/file", 0o4711)
    about = session.run("stat -c '%a %s' /tmp/file; ls /tmp; sha256sum </tmp/file").text.split()
    assert about[:3] == ["4711", "20000000", "file"]
    session.get("/tmp/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    session.put(b"", "/tmp/file")
    session.get("/tmp/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b""


def test_run_processes_of_the_guest_are_all_killed_the_agent_goes_on(session: Session) -> None:
    assert session.run("kill -KILL -1; echo still here").text == "still here\n"
    assert session.run(["kill", "-KILL", "1"]).exit_status == 0
    assert session.run("echo and here").text == "and here\n"


def test_run_agent_does_not_answer_while_the_port_is_gone(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest may take the device away from its driver; reset gives it back."""
    monkeypatch.setattr("bridge.guest.channel.SILENCE_SECONDS", 6.0)
    device = "/sys/bus/virtio/drivers/virtio_console"
    with pytest.raises(GuestStoppedError, match="has not answered for 6 s"):
        session.run(f"for d in {device}/virtio*; do basename $d >{device}/unbind; done; sleep 60")
    session.reset()
    assert session.run("echo back").text == "back\n"


def test_reset_commands_in_flight_end_and_do_not_come_back(session: Session) -> None:
    for _ in range(3):
        with pytest.raises(RunTimeoutError):
            session.guest.run("yes | tee /dev/stderr", timeout=0.3, stdin=bytes(1_000_000))
        began = time.monotonic()

        def reset(_: bytes) -> None:
            session.reset()

        with pytest.raises(GuestResetError):
            session.guest.run("echo; yes", stdout=reset, stdin=bytes(1_000_000))
        assert session.run("pgrep -c yes; echo $?").text == "0\n1\n"
        assert time.monotonic() - began < 60
