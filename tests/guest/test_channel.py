# SPDX-License-Identifier: Apache-2.0
"""Commands over the channel: the agent's own code, on this machine, with a socket as its port."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge.errors import (
    GuestLostError,
    GuestPanicError,
    GuestResetError,
    GuestSetupError,
    GuestStoppedError,
    RunTimeoutError,
    UsageError,
)
from bridge.guest.channel import ChannelGuest
from bridge.guest.ssh import SshGuest
from bridge.vm.channel import (
    COMMANDS,
    PAYLOAD_LIMIT,
    STDIN_WINDOW,
    BrokenChannel,
    ChannelPort,
    Frame,
    Kind,
)
from tests.support.watched import WatchedMachine

AGENT = Path(__file__).resolve().parents[2] / "guest" / "agent"


def no_ssh() -> SshGuest:
    raise AssertionError("nothing here needs SSH")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the commands' user."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    path = tmp_path_factory.mktemp("agent") / "agent_here"
    (passwd := path.with_name("passwd")).write_text(
        f"x:x:1:1::/:/bin/x\nroot:x:0:0::{home}:/bin/bash\n"
    )
    sources = [Path(__file__).with_name("agent_here.c")]
    sources += [AGENT / "init-command.c", AGENT / "init-util.c"]
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", f"-I{AGENT}"]
    flags.append(f'-DPASSWD="{passwd}"')
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, *sanitizers, "-o", path, *sources], check=True)
    return path


class Agent:
    """The running agent, and a port to it."""

    def __init__(self, program: Path) -> None:
        self.ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [program, str(theirs.fileno())], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
        )
        self.port = ChannelPort(self.ours, theirs)

    def greet(self) -> Frame:
        self.port.hello(set_clock=True)
        return self.hear(Kind.READY)

    def hear(self, kind: Kind) -> Frame:
        """Wait for a frame of this kind."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            self.port.wait(1.0)
            for frame in self.port.receive(self.port.session):
                if frame.kind is kind:
                    return frame
        raise AssertionError("the agent does not answer")

    def memory(self) -> int:
        """KiB that it has used at most. ASan keeps what is freed for a while."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+)", status)
        assert match is not None
        return int(match[1])

    def close(self) -> None:
        self.port.close()
        try:
            _, errors = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.returncode == 0, errors.decode()


@pytest.fixture
def agent(program: Path) -> Iterator[Agent]:
    agent = Agent(program)
    agent.greet()
    yield agent
    agent.close()


@pytest.fixture
def machine() -> WatchedMachine:
    return WatchedMachine()


@pytest.fixture
def guest(agent: Agent, machine: WatchedMachine) -> Iterator[ChannelGuest]:
    with ChannelGuest(agent.port, machine, ssh=no_ssh, ssh_command=("ssh",)) as guest:
        yield guest


def ends(pid: int) -> bool:
    """Whether a process is gone, or a zombie, within a few seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def in_parallel(*works: Callable[[], None]) -> None:
    """Run all at once; the first failure is raised."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


# Commands


def test_run_output_and_exit_status(guest: ChannelGuest) -> None:
    result = guest.run("echo out; echo err >&2; exit 3")
    assert (result.exit_status, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    assert not result.truncated
    assert result.seconds > 0


def test_run_words_are_not_for_the_shell(guest: ChannelGuest) -> None:
    for program in ("printf", "/usr/bin/printf"):
        words = [program, "%s|", "a b", "$HOME", "'", "*", ""]
        assert guest.run(words).stdout == b"a b|$HOME|'|*||"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["no-such-command"], 127),
        (["/no/such/command"], 127),
        (["/etc/passwd"], 126),
        (["/"], 126),
        ("no-such-command", 127),
        ("kill -9 $$", 128 + 9),
        (["sh", "-c", "kill -KILL $$"], 128 + 9),
        (["exit", "3"], 3),
        (["false"], 1),
        ("exit 255", 255),
    ],
)
def test_run_status_is_that_of_a_shell(
    guest: ChannelGuest, command: str | list[str], status: int
) -> None:
    assert guest.run(command).exit_status == status


def test_run_command_cannot_be_executed_stderr_says_why(guest: ChannelGuest) -> None:
    assert guest.run(["no-such-command"]).stderr == b"sh: 1: no-such-command: not found\n"
    assert guest.run(["/etc/passwd"]).stderr == b"sh: 1: /etc/passwd: Permission denied\n"


def test_run_script_without_interpreter_runs(guest: ChannelGuest, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo script $1\n")
    script.chmod(0o755)
    assert guest.run([str(script), "a"]).text == "script a\n"


def test_run_leader_is_no_part_of_the_command(guest: ChannelGuest) -> None:
    """As under sshd: not the command itself leads the session, so it gets no terminal."""
    text = guest.run("cat /proc/self/stat").text.rpartition(")")[2].split()
    parent, group, session = (int(text[field]) for field in (1, 2, 3))
    shell = guest.run("echo $$; cat /proc/$$/stat").text.split("\n")
    assert group == session != parent
    assert int(shell[0]) != int(shell[1].rpartition(")")[2].split()[3])


def test_run_environment_and_directory(guest: ChannelGuest) -> None:
    result = guest.run('echo "$MARK"; pwd; echo $PWD', env={"MARK": "a 'b'"}, cwd="/usr")
    assert result.stdout == b"a 'b'\n/usr\n/usr\n"
    failed = guest.run("true", cwd="/no/such/directory")
    assert failed.exit_status == 126
    assert b"can't cd to /no/such/directory" in failed.stderr
    assert guest.run(["env"]).text.count("\n") == len(guest.run("env").text.splitlines())
    with pytest.raises(UsageError, match="not a valid name"):
        guest.run("true", env={"a b": "c"})
    with pytest.raises(UsageError, match="NUL"):
        guest.run("true", cwd="a\0b")


def test_run_descriptors_are_the_three_streams(guest: ChannelGuest) -> None:
    """Another command's pipes would keep its streams open."""
    done: list[str] = []
    in_parallel(
        lambda: done.append(guest.run("sleep 2; echo slept").text),
        lambda: done.append(guest.run("sleep 0.5; ls /proc/self/fd").text),
    )
    assert sorted(done) == ["0\n1\n2\n3\n", "slept\n"]


def test_run_stdin_of_any_size_arrives(guest: ChannelGuest) -> None:
    data = os.urandom(3_000_000)
    assert guest.run("wc -c", stdin=data).stdout.strip() == b"3000000"
    assert guest.run("cat", stdin=data, capture=len(data)).stdout == data
    assert guest.run("cat").stdout == b""
    assert guest.run("head -c 1", stdin=data).exit_status == 0
    assert guest.run("sleep 1; cat", stdin=data, capture=len(data)).stdout == data


def test_run_stdin_is_sent_as_it_comes(guest: ChannelGuest) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stdin, os.fdopen(writing, "wb", 0) as us:
        us.write(b"one\n")
        result = guest.run("read line; echo got $line", stdin=stdin, timeout=20)
    assert result.text == "got one\n"


def test_run_stdin_cannot_be_read_kills_the_command(guest: ChannelGuest) -> None:
    came: list[bytes] = []
    started = time.monotonic()
    with (
        Path("/proc/self/mem").open("rb") as stdin,  # address 0 has no memory
        pytest.raises(UsageError, match="cannot be read: Input/output"),
    ):
        guest.run("echo $$; exec sleep 60", stdin=stdin, stdout=came.append)
    assert time.monotonic() - started < 30
    assert all(ends(int(pid)) for pid in b"".join(came).split())


def test_run_output_is_binary_and_only_its_beginning_is_kept(guest: ChannelGuest) -> None:
    sizes: list[int] = []
    result = guest.run(
        "printf 'a\\000\\377'; head -c 5000000 /dev/zero",
        stdout=lambda chunk: sizes.append(len(chunk)),
        capture=1000,
    )
    assert sum(sizes) == 5_000_003
    assert result.stdout == b"a\0\xff" + bytes(997)
    assert result.truncated


def test_run_output_comes_while_the_command_runs(guest: ChannelGuest) -> None:
    came: list[float] = []
    guest.run("echo one; sleep 0.5; echo two", stdout=lambda _: came.append(time.monotonic()))
    assert came[1] - came[0] > 0.3


def test_run_timeout_kills_the_command_and_its_children(guest: ChannelGuest) -> None:
    """Also those that have left its process group."""
    own_group = "import os,time; os.setpgid(0,0); print(os.getpid(),flush=True); time.sleep(30)"
    script = f"echo before; sleep 30 & echo $!; python3 -c '{own_group}'; true"
    killed: list[bool] = []
    with pytest.raises(RunTimeoutError, match=r"within 4 s: ") as caught:
        guest.run(script, timeout=4, before_kill=lambda: killed.append(True))
    word, *children = caught.value.evidence.split()
    assert word == "before"
    assert len(children) == 2
    assert all(ends(int(child)) for child in children)
    assert killed == [True]
    assert guest.run("echo still here").text == "still here\n"


def test_run_interrupted_wait_kills_the_command(guest: ChannelGuest) -> None:
    children: list[int] = []

    def interrupt(chunk: bytes) -> None:
        children.append(int(chunk))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guest.run("sleep 30 & echo $!; wait", stdout=interrupt)
    assert ends(children[0])


def test_run_background_process_does_not_delay_the_result(guest: ChannelGuest) -> None:
    result = guest.run("(sleep 0.2; echo late; sleep 300) & echo $!")
    pid, late = result.text.split()
    assert late == "late"
    assert result.seconds < 20
    os.kill(int(pid), signal.SIGKILL)


def test_run_background_process_floods_does_not_delay_the_result(guest: ChannelGuest) -> None:
    result = guest.run("yes >&2 & echo $!")
    assert result.text.strip().isdigit()
    assert ends(int(result.text)), "its output is closed"


def test_run_check_makes_a_status_an_error(guest: ChannelGuest) -> None:
    with pytest.raises(GuestSetupError, match="status 32: ") as caught:
        guest.run("echo mount failed >&2; exit 32", check=True)
    assert "mount failed" in caught.value.evidence


def test_run_floods_neither_starve_others_nor_grow_the_agent(
    guest: ChannelGuest, agent: Agent
) -> None:
    over = threading.Event()
    before = agent.memory()
    slowest = 0.0

    def flood() -> None:
        # A reader that stands still: nothing of this may pile up.
        with pytest.raises(RunTimeoutError):
            guest.run("yes | tee /dev/stderr", stdout=lambda _: over.wait(0.05), timeout=4)

    def others() -> None:
        nonlocal slowest
        for number in range(20):
            started = time.monotonic()
            assert guest.run(f"echo {number}").text == f"{number}\n"
            slowest = max(slowest, time.monotonic() - started)
        over.set()

    in_parallel(flood, flood, flood, others)
    assert slowest < 3
    assert agent.memory() - before < 8 * 1024


def test_run_output_that_nobody_takes_stops_the_command_alone(guest: ChannelGuest) -> None:
    taking = threading.Event()
    sizes: list[int] = []

    def take(chunk: bytes) -> None:
        taking.wait(30)
        sizes.append(len(chunk))

    def flood() -> None:
        assert guest.run("head -c 20000000 /dev/zero", stdout=take).exit_status == 0

    def others() -> None:
        for _ in range(5):
            data = os.urandom(500_000)
            assert guest.run("cat", stdin=data, capture=len(data)).stdout == data
        taking.set()

    in_parallel(flood, others)
    assert sum(sizes) == 20_000_000


def test_run_more_at_once_than_the_agent_takes_wait(guest: ChannelGuest) -> None:
    done: list[int] = []

    def work(number: int) -> Callable[[], None]:
        def run() -> None:
            assert guest.run(f"sleep 0.3; echo {number}").text == f"{number}\n"
            done.append(number)

        return run

    in_parallel(*(work(number) for number in range(COMMANDS + 16)))
    assert sorted(done) == list(range(COMMANDS + 16))


def test_run_long_words_arrive(guest: ChannelGuest) -> None:
    words = ["x" * 100_000] * 10
    assert guest.run(["sh", "-c", "echo $# ${#1}", "sh", *words]).text == "10 100000\n"
    with pytest.raises(UsageError, match="too long"):
        guest.run(["echo", "x" * 5_000_000])
    assert guest.run(["/bin/echo", "x" * 200_000]).exit_status == 126


@pytest.fixture
def start_up(home: Path) -> Iterator[Path]:
    """The start-up file of the user's shell."""
    path = home / ".bashrc"
    yield path
    path.unlink(missing_ok=True)


def test_run_start_up_file_runs_first_and_its_stdout_is_no_output(
    guest: ChannelGuest, home: Path, start_up: Path
) -> None:
    for nothing in ("", '[ -z "$PS1" ] && return\n', '[ -z "${PS1-}" ] && return # here\n'):
        start_up.write_text(f"# nothing\n\n  # to do\n{nothing}# more\n")
        assert f"HOME={home}" in guest.run(["env"]).text.splitlines()
        start_up.write_text(start_up.read_text() + "export MARK=1\n")
        assert ("MARK=1" in guest.run(["env"]).text) == (not nothing)
    start_up.write_text("# something\nexport MARK=1\necho out\necho err >&2\ncd /usr\n")
    result = guest.run("echo $MARK; pwd; ls /proc/self/fd; exit 3")
    assert result.stdout == b"1\n/usr\n0\n1\n2\n3\n"
    assert (result.exit_status, result.stderr) == (3, b"err\n")
    assert guest.run(["env"], env={"MARK2": "2"}, cwd="/").text.count("MARK") == 2


@pytest.mark.parametrize("line", ["echo no >&2; exit 0", "kill -9 $$", "sleep 300 & exit"])
def test_run_start_up_file_that_ends_the_shell_is_an_error(
    guest: ChannelGuest, start_up: Path, line: str
) -> None:
    start_up.write_text(f"{line}\n")
    with pytest.raises(GuestSetupError, match="before it ran the command: ") as caught:
        guest.run("true", timeout=30)
    assert ("no\n" in caught.value.evidence) == ("no" in line)


def test_run_command_stops_all_that_it_may_ends_nevertheless(
    guest: ChannelGuest, agent: Agent
) -> None:
    """Also the process that waits for it."""
    assert guest.run("kill -STOP $PPID; echo stopped", timeout=30).text == "stopped\n"


# The guest is lost, reset, silent


def test_run_guest_is_lost_ends_at_once(guest: ChannelGuest, machine: WatchedMachine) -> None:
    loss = GuestPanicError("the guest kernel panicked: test")
    threading.Timer(0.3, machine.lose, [loss]).start()
    started = time.monotonic()
    with pytest.raises(GuestPanicError, match="panicked: test"):
        guest.run("sleep 30")
    assert time.monotonic() - started < 5
    with pytest.raises(GuestPanicError):
        guest.run("true")


def test_run_guest_is_reset_fails_and_the_next_one_works(guest: ChannelGuest, agent: Agent) -> None:
    def reset() -> None:
        time.sleep(0.5)
        with guest.reserved():
            guest.forget()
            agent.port.restart()
            agent.greet()
            assert guest.run("echo new").text == "new\n"

    def cut_off() -> None:
        with pytest.raises(GuestResetError, match="reset while a command ran"):
            guest.run("echo $$; sleep 60")

    in_parallel(reset, cut_off, cut_off)
    assert guest.run("echo newer").text == "newer\n"


def test_restart_bytes_in_flight_never_arrive(program: Path, tmp_path: Path) -> None:
    agent = Agent(program)
    agent.greet()
    agent.process.send_signal(signal.SIGSTOP)
    witness = tmp_path / "witness"
    words = b"a/bin/touch\0a" + os.fsencode(witness) + b"\0"
    start = b"".join(number.to_bytes(4, "little") for number in (1, 100, 100))
    session = agent.port.session
    agent.port.send(session, 1, [(Kind.SPEC, words), (Kind.START, start), (Kind.STDIN_END, b"")])
    agent.port.restart()
    agent.process.send_signal(signal.SIGCONT)
    agent.greet()
    with ChannelGuest(agent.port, WatchedMachine(), ssh=no_ssh, ssh_command=()) as guest:
        assert guest.run("echo new").text == "new\n"
    assert not witness.exists()
    agent.close()


def test_run_guest_answers_no_more_is_lost(
    guest: ChannelGuest, agent: Agent, machine: WatchedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.guest.channel.SILENCE_SECONDS", 3.0)
    assert guest.run("sleep 5; echo end").text == "end\n"
    try:
        with pytest.raises(GuestStoppedError, match="silent for 3 s"):
            guest.run(
                "echo; exec sleep 30", stdout=lambda _: agent.process.send_signal(signal.SIGSTOP)
            )
    finally:
        agent.process.send_signal(signal.SIGCONT)
    assert isinstance(machine.loss, GuestStoppedError)


def test_run_after_close_is_an_error(guest: ChannelGuest) -> None:
    threading.Timer(0.5, guest.close).start()
    with pytest.raises(GuestLostError, match="closed"):
        guest.run("sleep 30")
    with pytest.raises(UsageError, match="no connection"):
        guest.run("true")


def test_reserved_other_threads_wait_or_run_out_of_time(guest: ChannelGuest) -> None:
    statuses: list[int] = []

    def too_late() -> None:
        with pytest.raises(RunTimeoutError):
            guest.run("exit 4", timeout=0.3)

    with guest.reserved():
        waiting = threading.Thread(target=lambda: statuses.append(guest.run("exit 3").exit_status))
        waiting.start()
        in_parallel(too_late)
        assert guest.run("exit 5").exit_status == 5
        assert statuses == []
    waiting.join(20)
    assert statuses == [3]


# Files


def test_files_come_and_go_whole(guest: ChannelGuest, tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    local, remote, back = (tmp_path / name for name in ("local", "re mote'$", "back"))
    local.write_bytes(data)
    guest.put(local, str(remote), mode=0o4750)
    assert remote.read_bytes() == data
    assert remote.stat().st_mode & 0o7777 == 0o4750
    guest.get(str(remote), back)
    assert back.read_bytes() == data
    guest.put(b"", remote)
    assert remote.read_bytes() == b""
    assert remote.stat().st_mode & 0o7777 == 0o644
    assert sorted(tmp_path.iterdir()) == [back, local, remote]


def test_put_onto_a_directory_or_a_link_to_one_is_an_error(
    guest: ChannelGuest, tmp_path: Path
) -> None:
    (remote := tmp_path / "remote").mkdir()
    (link := tmp_path / "link").symlink_to(remote)
    for path in (remote, link):
        with pytest.raises(GuestSetupError, match="cannot write") as caught:
            guest.put(b"x", path)
        assert "is a directory" in caught.value.evidence
    assert sorted(tmp_path.iterdir()) == [link, remote]
    assert not list(remote.iterdir())


def test_put_disk_is_full_leaves_the_old_file(guest: ChannelGuest, tmp_path: Path) -> None:
    for path, part in ((Path("/dev/full"), ""), (tmp_path / "none" / "file", "No such file")):
        with pytest.raises(GuestSetupError, match="cannot write") as caught:
            guest.put(bytes(100_000), path if part else path / "file")
        assert part in caught.value.evidence != ""


def test_files_that_cannot_be(guest: ChannelGuest, tmp_path: Path) -> None:
    with pytest.raises(GuestSetupError, match="cannot read /no/such/file") as caught:
        guest.get("/no/such/file", tmp_path / "back")
    assert "No such file" in caught.value.evidence
    with pytest.raises(GuestSetupError, match="cannot read /usr") as caught:
        guest.get("/usr", tmp_path / "back")
    assert "Is a directory" in caught.value.evidence
    assert not [*tmp_path.glob("back"), *tmp_path.glob(".back*")]
    with pytest.raises(UsageError, match="cannot be read"):
        guest.put(tmp_path / "none", "/tmp/x")
    with pytest.raises(UsageError, match="cannot be written"):
        guest.get("/etc/hostname", tmp_path / "none" / "back")


def test_put_many_at_once_of_one_path_each_arrives_whole(
    guest: ChannelGuest, tmp_path: Path
) -> None:
    remote = tmp_path / "remote"
    contents = [bytes([letter]) * 300_000 for letter in b"abcd"]

    def put(content: bytes) -> Callable[[], None]:
        def work() -> None:
            for _ in range(4):
                guest.put(content, remote)
                assert remote.read_bytes() in contents

        return work

    in_parallel(*map(put, contents))
    assert list(tmp_path.glob("remote*")) == [remote]


# What makes no sense


def frame(kind: int, command: int, payload: bytes, session: int, size: int | None = None) -> bytes:
    numbers = (len(payload) if size is None else size, session, command, kind)
    return b"".join(number.to_bytes(4, "little") for number in numbers) + payload


@pytest.mark.parametrize(
    "wrong",
    [
        frame(99, 1, b"", 1),
        frame(Kind.STDIN, 1, b"", 1, size=PAYLOAD_LIMIT + 1),
        frame(Kind.STDIN, 1, b"", 1, size=0xFFFFFFFF),
        frame(Kind.START, 1, bytes(12), 1),
        frame(Kind.SPEC, 7, b"atrue\0", 1) + frame(Kind.START, 7, bytes(8), 1),
        frame(Kind.SPEC, 7, b"atrue\0", 1) + frame(Kind.STDIN, 7, b"x", 1),
        b"".join(frame(Kind.SPEC, number, b"a", 1) for number in range(1, COMMANDS + 2)),
        b"".join(frame(Kind.SPEC, 7, bytes(PAYLOAD_LIMIT), 1) for _ in range(200)),
        frame(Kind.SPEC, 7, b"asleep\0a9\0", 1)
        + frame(Kind.START, 7, bytes([1, 0, 0, 0]) + bytes(8), 1)
        + frame(Kind.STDIN, 7, bytes(30_000), 1) * (STDIN_WINDOW * 3 // 30_000),
        frame(Kind.SPEC, 7, b"asleep\0a9\0", 1)
        + frame(Kind.START, 7, bytes([1, 0, 0, 0]) + b"\xff" * 8, 1)
        + frame(Kind.CREDIT, 7, b"\xff" * 8, 1),
    ],
    ids=range(10),
)
def test_agent_frames_that_make_no_sense_break_the_channel_until_a_hello(
    agent: Agent, wrong: bytes
) -> None:
    agent.ours.setblocking(True)
    agent.ours.sendall(wrong)
    with pytest.raises(BrokenChannel, match="lost track"):
        agent.hear(Kind.BROKEN)
    agent.ours.setblocking(False)
    agent.port.restart()
    agent.greet()
    with ChannelGuest(agent.port, WatchedMachine(), ssh=no_ssh, ssh_command=()) as guest:
        assert guest.run("echo new").text == "new\n"


@pytest.mark.parametrize(
    "spec", [b"a", b"atrue", b"\0", b"e=\0", b"cdirectory\0", b"xyz\0", b"atrue\0zz\0"]
)
def test_agent_specification_that_makes_no_sense_fails_alone(agent: Agent, spec: bytes) -> None:
    session = agent.port.session
    start = b"".join(number.to_bytes(4, "little") for number in (1, 100, 100))
    agent.port.send(session, 5, [(Kind.SPEC, spec), (Kind.START, start)])
    agent.port.wait(20)
    (failed,) = agent.port.receive(session)
    assert (failed.kind, failed.command) == (Kind.FAILED, 5)
    assert failed.number > 0


def test_agent_random_frames_do_no_harm(agent: Agent) -> None:
    """The sanitizers end the agent where it goes wrong; a HELLO must always be answered."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    agent.ours.setblocking(True)
    pieces = (b"atrue\0", b"acat\0", b"esc=1\0", b"c/\0", b"")
    for _ in range(30):
        for _ in range(100):
            kind = chance.choice([*range(2, 10), chance.randrange(1 << 32)])
            payload = chance.choice(
                [
                    chance.randbytes(chance.choice((0, 4, 8, 12, 300))),
                    b"".join(chance.choices(pieces, k=3)),
                    bytes([chance.randrange(1, 4), 0, 0, 0]) + b"\xff\0\0\0" * 2,
                ]
            )
            if kind == Kind.SIGNAL and chance.random() < 0.9:
                payload = b"\x0f\0\0\0"
            size = chance.choice([None] * 20 + [chance.randrange(1 << 32)])
            data = frame(kind, chance.randrange(5), payload, agent.port.session, size)
            agent.ours.sendall(data[: len(data) if chance.random() < 0.98 else 9])
            agent.ours.setblocking(False)
            try:
                while agent.ours.recv(65536):
                    pass
            except BlockingIOError:
                pass
            agent.ours.setblocking(True)
        agent.ours.setblocking(False)
        agent.port.restart()
        # What was cut short above may swallow the beginning of the first.
        agent.ours.send(bytes(PAYLOAD_LIMIT + 16))
        agent.greet()
        agent.ours.setblocking(True)
    assert agent.process.poll() is None


def hostile(data: bytes) -> tuple[ChannelPort, socket.socket]:
    """A port whose guest sends this in answer to anything."""
    ours, theirs = socket.socketpair()
    port = ChannelPort(ours, theirs.dup())
    theirs.setblocking(True)

    def answer() -> None:
        theirs.recv(1)
        theirs.sendall(data)

    threading.Thread(target=answer, daemon=True).start()
    return port, theirs


@pytest.mark.parametrize(
    "wrong",
    [
        bytes(1000),
        b"\xff" * 1000,
        frame(Kind.STDOUT, 1, b"", 1, size=PAYLOAD_LIMIT + 1),
        frame(Kind.HELLO, 1, bytes(56), 1),
        frame(Kind.EXIT, 1, b"12345", 1),
        frame(Kind.TAKEN, 1, b"", 1),
        frame(Kind.BROKEN, 0, b"", 1),
    ],
    ids=range(7),
)
def test_host_frames_that_make_no_sense_lose_the_guest(wrong: bytes) -> None:
    port, theirs = hostile(wrong)
    machine = WatchedMachine()
    with ChannelGuest(port, machine, ssh=no_ssh, ssh_command=()) as guest:
        for _ in range(2):
            with pytest.raises(GuestStoppedError, match="broken: "):
                guest.run("true", timeout=20)
    port.close()
    theirs.close()


def test_host_frames_of_another_session_or_command_are_dropped() -> None:
    data = frame(Kind.EXIT, 1, bytes(4), 2) + frame(Kind.EXIT, 9, bytes(4), 1)
    data += frame(Kind.COMPLETE, 1, b"", 1) + frame(Kind.END, 1, b"", 1)
    data += frame(Kind.EXIT, 1, b"\x07\0\0\0", 1) + frame(Kind.END, 1, b"", 1)
    port, theirs = hostile(data)
    with ChannelGuest(port, WatchedMachine(), ssh=no_ssh, ssh_command=()) as guest:
        assert guest.run("true", timeout=20).exit_status == 7
    port.close()
    theirs.close()
