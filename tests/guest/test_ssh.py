# SPDX-License-Identifier: Apache-2.0
"""Running commands over SSH, against a real server (paramiko's) whose commands run here."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import paramiko
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    MSG_CHANNEL_SUCCESS,
    OPEN_FAILED_RESOURCE_SHORTAGE,
    OPEN_SUCCEEDED,
)

from bridge.errors import (
    GuestLostError,
    GuestPanicError,
    GuestSetupError,
    GuestStoppedError,
    ImageError,
    RunTimeoutError,
    UsageError,
)
from bridge.guest.ssh import SshGuest, _Marks, _Output
from tests.support.watched import WatchedMachine


def make_key(path: Path) -> paramiko.PKey:
    """A new ed25519 private key in OpenSSH's format."""
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    return paramiko.Ed25519Key.from_private_key_file(str(path))


def public_line(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.get_base64()} comment"


class Server:
    """An sshd in miniature: each exec request is a shell with a session of its own."""

    def __init__(self, host_key: paramiko.PKey, client_key: paramiko.PKey) -> None:
        self.host_key = host_key
        self.client_key = client_key
        self.greeting_seconds = 0.0
        self.stopped = threading.Event()
        """Set: it answers to nothing that is asked from then on."""
        self.refuses = False
        """It opens no session more."""
        self.replies = threading.Event()
        """Cleared: it does not answer a request to run a command."""
        self.replies.set()
        self.carries = threading.Event()
        """Cleared: it keeps the output of commands to itself."""
        self.carries.set()
        self.start_up = ""
        """What the user's shell does before it runs a command."""
        self.after_status: Callable[[paramiko.Channel], object] = lambda _: None
        """Called when it has sent a command's exit status."""
        self.sessions = 0
        self.processes: list[subprocess.Popen[bytes]] = []
        self.transports: list[paramiko.Transport] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            transport = Transport(connection)
            transport.add_server_key(self.host_key)
            self.transports.append(transport)
            time.sleep(self.greeting_seconds)
            with contextlib.suppress(paramiko.SSHException, EOFError):
                transport.start_server(threading.Event(), Session(self))

    def break_connections(self) -> None:
        """What a killed sshd, or a guest that is gone, does."""
        for transport in self.transports:
            transport.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.break_connections()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Transport(paramiko.Transport):
    """The server's end of a connection, which says when a request was answered.

    sshd starts a command once it has answered. Paramiko answers when the handler returns, so a
    short command could close its channel before.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._on_answer = threading.Condition()
        self._answered_channels: set[int] = set()

    def _send_user_message(self, data: paramiko.Message) -> None:
        super()._send_user_message(data)  # type: ignore[misc]
        message = data.asbytes()
        if message[0] == MSG_CHANNEL_SUCCESS:
            with self._on_answer:
                self._answered_channels.add(int.from_bytes(message[1:5], "big"))
                self._on_answer.notify_all()

    def wait_answered(self, channel: paramiko.Channel) -> None:
        """Wait until a request of the channel was answered, or the connection ends."""
        with self._on_answer:
            self._on_answer.wait_for(lambda: channel.remote_chanid in self._answered_channels, 30)


class Session(paramiko.ServerInterface):
    """One client of the server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def check_channel_request(self, kind: str, chanid: int) -> int:
        self._server.sessions += 1
        while self._server.stopped.is_set():
            time.sleep(0.02)
        return OPEN_FAILED_RESOURCE_SHORTAGE if self._server.refuses else OPEN_SUCCEEDED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        ours = key.asbytes() == self._server.client_key.asbytes()
        return AUTH_SUCCESSFUL if ours else AUTH_FAILED

    def check_channel_pty_request(self, *_: object) -> bool:
        return True

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self._server.replies.wait()
        process = subprocess.Popen(
            ["sh", "-c", self._server.start_up.encode() + command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._server.processes.append(process)
        threading.Thread(target=serve, args=(self._server, channel, process), daemon=True).start()
        return True

    def check_channel_shell_request(self, channel: paramiko.Channel) -> bool:
        return self.check_channel_exec_request(channel, b"exec sh")


def serve(server: Server, channel: paramiko.Channel, process: subprocess.Popen[bytes]) -> None:
    """Carry a process's three streams and its exit status."""
    assert isinstance(channel.transport, Transport)
    channel.transport.wait_answered(channel)

    def feed() -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError), process.stdin as stdin:
            while data := channel.recv(65536):
                stdin.write(data)
                stdin.flush()

    def carry(fd: int, send: Callable[[bytes], None]) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(fd, 65536):
                server.carries.wait()
                send(data)

    assert process.stdout is not None
    assert process.stderr is not None
    threading.Thread(target=feed, daemon=True).start()
    carriers = [
        threading.Thread(target=carry, args=(process.stdout.fileno(), channel.sendall)),
        threading.Thread(target=carry, args=(process.stderr.fileno(), channel.sendall_stderr)),
    ]
    for carrier in carriers:
        carrier.daemon = True
        carrier.start()
    status = process.wait()
    with contextlib.suppress(OSError, EOFError):
        if status < 0:
            # As sshd does: a death by signal has no exit status.
            channel.close()
            return
        channel.send_exit_status(status)
        server.after_status(channel)
        for carrier in carriers:
            carrier.join()
        channel.shutdown_write()
        channel.close()


def ends(pid: int) -> bool:
    """Whether a process is gone, or a zombie, within a few seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    make_key(path)
    return path


@pytest.fixture
def server(tmp_path: Path, key: Path) -> Iterator[Server]:
    client_key = paramiko.Ed25519Key.from_private_key_file(str(key))
    server = Server(make_key(tmp_path / "host_key"), client_key)
    yield server
    server.close()


@pytest.fixture
def machine() -> WatchedMachine:
    return WatchedMachine()


@pytest.fixture
def guest(server: Server, key: Path, machine: WatchedMachine) -> Iterator[SshGuest]:
    with SshGuest(server.port, key, public_line(server.host_key), watched=machine) as guest:
        guest.connect()
        yield guest


def test_output_and_exit_status(guest: SshGuest) -> None:
    result = guest.run("echo out; echo err >&2; exit 3")
    assert result.exit_status == 3
    assert result.stdout == b"out\n"
    assert result.stderr == b"err\n"
    assert not result.truncated
    assert result.text == "out\n"
    assert result.seconds > 0


def test_run_guest_answers_no_more_is_lost_with_the_machine(
    guest: SshGuest, server: Server, machine: WatchedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.guest.ssh.SILENCE_SECONDS", 2.0)

    def stop(_: bytes) -> None:
        server.stopped.set()

    try:
        with pytest.raises(GuestStoppedError, match="silent for 2 s"):
            guest.run("echo; exec sleep 1000", stdout=stop)
    finally:
        server.stopped.clear()
    assert isinstance(machine.loss, GuestStoppedError)


def test_run_silent_command_is_waited_for_while_the_guest_answers(
    guest: SshGuest, server: Server, machine: WatchedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.guest.ssh.SILENCE_SECONDS", 3.0)
    assert guest.run("sleep 7; echo end").text == "end\n"
    assert machine.loss is None
    assert server.sessions > 5


def test_words_are_not_for_the_shell(guest: SshGuest) -> None:
    words = ["printf", "%s|", "a b", "$HOME", "'", "*", ""]
    assert guest.run(words).stdout == b"a b|$HOME|'|*||"


def test_run_missing_command_is_status_127(guest: SshGuest) -> None:
    assert guest.run(["no-such-command"]).exit_status == 127


@pytest.mark.parametrize("command", ["kill -9 $$", ["sh", "-c", "kill -KILL $$"]])
def test_run_command_dies_of_a_signal_is_status_128_plus(
    guest: SshGuest, command: str | list[str]
) -> None:
    assert guest.run(command).exit_status == 128 + 9


def test_output_comes_while_the_command_runs(guest: SshGuest) -> None:
    came: list[tuple[bytes, float]] = []
    result = guest.run(
        "echo one; sleep 0.5; echo two; echo three >&2",
        stdout=lambda chunk: came.append((chunk, time.monotonic())),
        stderr=lambda chunk: came.append((chunk, time.monotonic())),
    )
    assert b"".join(chunk for chunk, _ in came if chunk != b"three\n") == b"one\ntwo\n"
    assert came[1][1] - came[0][1] > 0.3
    assert result.stdout == b"one\ntwo\n"


def test_output_is_binary_and_only_its_beginning_is_kept(guest: SshGuest) -> None:
    sizes: list[int] = []
    result = guest.run(
        "printf 'a\\000\\377'; head -c 5000000 /dev/zero",
        stdout=lambda chunk: sizes.append(len(chunk)),
        capture=1000,
    )
    assert sum(sizes) == 5_000_003
    assert result.stdout == b"a\0\xff" + bytes(997)
    assert result.truncated


def test_stdin_environment_and_directory(guest: SshGuest) -> None:
    data = os.urandom(3_000_000)
    assert guest.run("wc -c", stdin=data).stdout.strip() == b"3000000"
    assert guest.run("cat", stdin=data, capture=len(data)).stdout == data
    assert guest.run("head -c 1", stdin=data).exit_status == 0
    result = guest.run('echo "$MARK"; pwd', env={"MARK": "a 'b'"}, cwd="/usr")
    assert result.stdout == b"a 'b'\n/usr\n"
    assert guest.run("cat").stdout == b""
    assert guest.run("true", cwd="/no/such/directory").exit_status == 126
    with pytest.raises(UsageError, match="not a valid name"):
        guest.run("true", env={"a b": "c"})


def test_run_timeout_kills_the_command_and_its_children(guest: SshGuest) -> None:
    started = time.monotonic()
    with pytest.raises(RunTimeoutError, match=r"within 0\.5 s: ") as caught:
        guest.run("echo before; sleep 30 & echo $!; sleep 30; true", timeout=0.5)
    assert time.monotonic() - started < 5
    word, child = caught.value.evidence.split()
    assert word == "before"
    assert ends(int(child))
    assert guest.run("echo still here").text == "still here\n"


def test_run_interrupted_wait_kills_the_command(guest: SshGuest) -> None:
    children: list[int] = []

    def interrupt(chunk: bytes) -> None:
        children.append(int(chunk))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guest.run("sleep 30 & echo $!; wait", stdout=interrupt)
    assert ends(children[0])


def test_run_background_process_does_not_delay_the_result(guest: SshGuest) -> None:
    result = guest.run("sleep 30 & echo started")
    assert result.text == "started\n"
    assert result.seconds < 5


def test_check_makes_a_status_an_error(guest: SshGuest) -> None:
    with pytest.raises(GuestSetupError, match="status 32: ") as caught:
        guest.run("echo mount failed >&2; exit 32", check=True)
    assert "mount failed" in caught.value.evidence


def test_run_output_that_comes_long_after_the_exit_status_arrives(
    guest: SshGuest, server: Server
) -> None:
    server.carries.clear()
    server.after_status = lambda _: threading.Timer(2.5, server.carries.set).start()
    result = guest.run("echo out; echo err >&2; exit 3")
    assert (result.exit_status, result.stdout, result.stderr) == (3, b"out\n", b"err\n")


def test_get_connection_breaks_after_the_exit_status_leaves_no_file(
    guest: SshGuest, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(30_000))
    server.carries.clear()
    server.after_status = lambda channel: channel.get_transport().close()
    with pytest.raises(GuestLostError):
        guest.get(tmp_path / "file", tmp_path / "copy")
    server.carries.set()
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == []


def test_get_rest_never_comes_is_an_error(
    guest: SshGuest, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.guest.ssh._REST_SECONDS", 1.5)
    (tmp_path / "file").write_bytes(bytes(30_000))
    server.carries.clear()
    with pytest.raises(GuestSetupError, match="did not send all"):
        guest.get(tmp_path / "file", tmp_path / "copy")
    server.carries.set()
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == []


def test_put_file_that_cannot_be_read_is_an_error(guest: SshGuest, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"/proc/self/mem: .* cannot be read: "):
        guest.put("/proc/self/mem", tmp_path / "there")
    assert time.monotonic() - started < 20
    assert [path.name for path in tmp_path.iterdir() if "there" in path.name] == []


def test_run_stdin_cannot_be_read_kills_the_command(guest: SshGuest) -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, _: object) -> int:
            raise ValueError("no more")

    came: list[bytes] = []
    with pytest.raises(UsageError, match="input of the command cannot be read: no more"):
        guest.run("echo $$; cat; echo end", stdin=io.BufferedReader(Broken()), stdout=came.append)
    assert b"end" not in b"".join(came)


@pytest.fixture
def endless() -> Iterator[BinaryIO]:
    """A pipe that nobody writes to."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb"):
        yield os.fdopen(reading, "rb")


def test_run_command_ends_before_its_stdin_returns(guest: SshGuest, endless: BinaryIO) -> None:
    assert guest.run("exit 3", stdin=endless).exit_status == 3


def test_run_timeout_with_a_stdin_that_gives_nothing_applies(
    guest: SshGuest, endless: BinaryIO
) -> None:
    with pytest.raises(RunTimeoutError):
        guest.run("echo $$; exec sleep 60", stdin=endless, timeout=1)


def test_run_stdin_is_sent_as_it_comes(guest: SshGuest) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stdin, os.fdopen(writing, "wb", 0) as us:
        us.write(b"one\n")
        result = guest.run("read line; echo got $line", stdin=stdin, timeout=20)
    assert result.text == "got one\n"


def test_run_timeout_while_sshd_does_not_start_the_command_applies(
    guest: SshGuest, server: Server
) -> None:
    server.replies.clear()
    try:
        with pytest.raises(RunTimeoutError, match="within 1 s"):
            guest.run("true", timeout=1)
    finally:
        server.replies.set()


def test_run_sshd_refuses_another_session_says_so(guest: SshGuest, server: Server) -> None:
    server.refuses = True
    with pytest.raises(GuestSetupError, match="refuses another session") as caught:
        guest.run("true")
    assert "MaxSessions" in caught.value.hint
    server.refuses = False
    assert guest.run("true").exit_status == 0


@pytest.mark.parametrize(
    "noise", ["echo welcome", "printf kcov-bridge-", "head -c 300000 /dev/zero"]
)
def test_run_start_up_file_that_prints_is_no_output(
    guest: SshGuest, server: Server, noise: str
) -> None:
    server.start_up = f"{noise}; "
    assert guest.run("printf out").stdout == b"out"
    with pytest.raises(RunTimeoutError) as caught:
        guest.run("sleep 30 & echo $!; wait", timeout=1)
    child = re.search(r"(\d+)\n\Z", caught.value.evidence)
    assert child is not None
    assert ends(int(child[1]))


def test_run_start_up_file_that_ends_the_shell_is_an_error(guest: SshGuest, server: Server) -> None:
    server.start_up = "echo no; exit 0; "
    with pytest.raises(GuestSetupError, match="before it ran the command: ") as caught:
        guest.run("true")
    assert caught.value.evidence == "no\n"


def test_run_output_like_the_marks_arrives(guest: SshGuest) -> None:
    text = "kcov-bridge-0123456789abcdef. kcov-bridge-0123456789abcdef:12\nkcov-bridg"
    assert guest.run(["printf", "%s", text]).text == text
    assert guest.run(f"printf %s {text[:11]} >&2").stderr == text[:11].encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 29, 30, 31, 1000])
def test_output_marks_in_pieces_are_taken_out(size: int) -> None:
    marks = _Marks()
    output = _Output(marks, begins=True)
    half = marks.end[:9]
    command = b"a" + half + b"b" + half + half
    sent = b"noise" + half + marks.begin + b"123\n" + command + marks.end + b"later" + half
    came = [output.strip(sent[at : at + size]) for at in range(0, len(sent), size)]
    assert b"".join(came) + output.finish() == command + b"later" + half
    assert (output.process_group, output.before) == (123, b"noise" + half)
    assert output.complete


def test_liveness_question_that_fails_is_asked_again(
    guest: SshGuest, machine: WatchedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """paramiko measures time-outs by the wall clock, which a suspended host sets forward."""
    monkeypatch.setattr("bridge.guest.ssh.SILENCE_SECONDS", 6.0)
    transport = guest._transport
    assert transport is not None
    asked: list[float] = []
    opens = transport.open_session

    def open_session(timeout: float) -> paramiko.Channel:
        asked.append(timeout)
        if len(asked) == 2:
            raise paramiko.SSHException("Timeout opening channel.")
        return opens(timeout=timeout)

    monkeypatch.setattr(transport, "open_session", open_session)
    assert guest.run("sleep 9; echo end").text == "end\n"
    assert machine.loss is None
    assert len(asked) > 3


def test_reserved_other_threads_wait_or_run_out_of_time(guest: SshGuest) -> None:
    statuses: list[int] = []
    errors: list[RunTimeoutError] = []

    def in_time() -> None:
        statuses.append(guest.run("exit 3").exit_status)

    def too_late() -> None:
        try:
            guest.run("exit 4", timeout=0.3)
        except RunTimeoutError as error:
            errors.append(error)

    threads = [threading.Thread(target=each) for each in (in_time, too_late)]
    with guest.reserved():
        for thread in threads:
            thread.start()
        threads[1].join(20)
        assert guest.run("exit 5").exit_status == 5
        assert statuses == []
    threads[0].join(20)
    assert statuses == [3]
    assert len(errors) == 1


def test_run_many_commands_at_once_works(guest: SshGuest) -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = guest.run(f"sleep 0.1; echo {number}").text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number}\n" for number in range(8)}


def test_run_guest_is_lost_ends_at_once(guest: SshGuest, machine: WatchedMachine) -> None:
    threading.Timer(0.3, machine.lose).start()
    started = time.monotonic()
    with pytest.raises(GuestPanicError, match="panicked: test"):
        guest.run("sleep 30")
    assert time.monotonic() - started < 2
    with pytest.raises(GuestPanicError):
        guest.run("true")
    with pytest.raises(GuestPanicError):
        guest.connect()


def test_run_connection_breaks_before_the_loss_raises_the_loss(
    guest: SshGuest, server: Server, machine: WatchedMachine
) -> None:
    threading.Timer(0.2, server.break_connections).start()
    threading.Timer(0.7, machine.lose).start()
    with pytest.raises(GuestPanicError):
        guest.run("sleep 30")


def test_run_connection_to_a_live_guest_breaks_is_an_error(guest: SshGuest, server: Server) -> None:
    threading.Timer(0.2, server.break_connections).start()
    with pytest.raises(GuestLostError, match="SSH connection to the guest broke"):
        guest.run("sleep 30")


def test_files_come_and_go_whole(guest: SshGuest, tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    local, remote, back = (tmp_path / name for name in ("local", "re mote'$", "back"))
    local.write_bytes(data)
    guest.put(local, str(remote), mode=0o750)
    assert remote.read_bytes() == data
    assert remote.stat().st_mode & 0o777 == 0o750
    guest.get(str(remote), back)
    assert back.read_bytes() == data
    guest.put(b"", str(remote))
    assert remote.read_bytes() == b""
    assert not list(tmp_path.glob(".back*"))


def test_put_two_at_once_of_one_path_each_arrives_whole(guest: SshGuest, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    contents = [bytes([letter]) * 300_000 for letter in b"abcd"]
    failures: list[BaseException] = []

    def put(content: bytes) -> None:
        try:
            for _ in range(4):
                guest.put(content, remote)
                assert remote.read_bytes() in contents
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=put, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(tmp_path.glob("remote*")) == [remote]


def test_put_onto_a_directory_is_an_error(guest: SshGuest, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    remote.mkdir()
    with pytest.raises(GuestSetupError, match="cannot write") as caught:
        guest.put(b"x", remote)
    assert "is a directory" in caught.value.evidence
    assert list(tmp_path.glob("remote*")) == [remote]
    assert not list(remote.iterdir())


def test_files_that_cannot_be(guest: SshGuest, tmp_path: Path) -> None:
    with pytest.raises(GuestSetupError, match="cannot write /no/such/file") as caught:
        guest.put(b"x", "/no/such/file")
    assert caught.value.evidence
    with pytest.raises(GuestSetupError, match="cannot read /no/such/file") as caught:
        guest.get("/no/such/file", tmp_path / "back")
    assert "No such file" in caught.value.evidence
    assert not [*tmp_path.glob("back"), *tmp_path.glob(".back*")]
    with pytest.raises(UsageError, match="cannot be read"):
        guest.put(tmp_path / "none", "/tmp/x")
    with pytest.raises(UsageError, match="cannot be written"):
        guest.get("/etc/hostname", tmp_path / "none" / "back")


def test_run_while_another_thread_logs_in_waits_for_it(server: Server, key: Path) -> None:
    with SshGuest(server.port, key, public_line(server.host_key)) as guest:
        guest.connect()
        guest.forget()
        server.greeting_seconds = 0.5
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(guest.run("exit 3").exit_status))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.1)  # the first one is within its login when the next one comes
        for thread in threads:
            thread.join(20)
        assert statuses == [3] * 4
        assert len(server.transports) == 2


def test_connect_wrong_key_is_refused(server: Server, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_key(other)
    with (
        SshGuest(server.port, other, public_line(server.host_key)) as guest,
        pytest.raises(GuestSetupError, match="refuses the key"),
    ):
        guest.connect()


def test_connect_wrong_host_key_is_refused(server: Server, key: Path, tmp_path: Path) -> None:
    expected = make_key(tmp_path / "expected")
    with SshGuest(server.port, key, public_line(expected)) as guest:
        with pytest.raises(GuestSetupError, match="host key mismatch") as caught:
            guest.connect()
        assert caught.value.evidence.count("SHA256:") == 2
        with pytest.raises(UsageError, match="no connection"):
            guest.run("true")


def test_connect_unknown_host_key_is_pinned_at_the_first_login(
    server: Server, key: Path, tmp_path: Path
) -> None:
    with SshGuest(server.port, key, None) as guest:
        guest.connect()
        assert guest.run("true").exit_status == 0
        server.host_key = make_key(tmp_path / "other")
        with pytest.raises(GuestSetupError, match="host key mismatch"):
            guest.connect()


def test_nobody_answers(key: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        SshGuest(port, key, None) as guest,
        pytest.raises(GuestSetupError, match="does not answer"),
    ):
        guest.connect(0.5)


def test_connect_server_starts_later_succeeds(key: Path, tmp_path: Path) -> None:
    client_key = paramiko.Ed25519Key.from_private_key_file(str(key))
    host_key = make_key(tmp_path / "host_key")
    with contextlib.ExitStack() as stack:
        # QEMU takes connections before there is an sshd, and drops them.
        early = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = early.getsockname()[1]

        def drop_three_then_serve() -> None:
            for _ in range(3):
                early.accept()[0].close()
            server = Server(host_key, client_key)
            stack.callback(server.close)
            connection, _ = early.accept()
            with socket.create_connection(("127.0.0.1", server.port)) as onward:
                copiers = [
                    threading.Thread(target=copy, args=pair)
                    for pair in ((connection, onward), (onward, connection))
                ]
                for copier in copiers:
                    copier.start()
                for copier in copiers:
                    copier.join()

        thread = threading.Thread(target=drop_three_then_serve)
        thread.start()
        with SshGuest(port, key, public_line(host_key)) as guest:
            guest.connect(20)
            assert guest.run("echo up").text == "up\n"
        thread.join()


def copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def test_keys_that_are_none(tmp_path: Path, key: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        SshGuest(1, tmp_path / "none", None)
    rubbish = tmp_path / "rubbish"
    rubbish.write_text("rubbish")
    with pytest.raises(UsageError, match="cannot be used"):
        SshGuest(1, rubbish, None)
    for line in ("", "ssh-ed25519", "ssh-ed25519 ????", "no-such-kind AAAA"):
        with pytest.raises(ImageError, match="host key is not a public key"):
            SshGuest(1, key, line)


def test_shell_on_a_terminal_works(guest: SshGuest, capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as terminal, os.fdopen(ours, "wb", 0) as us:
        threading.Timer(0.3, us.write, (b"echo $((6*7)); exit 9\n",)).start()
        assert guest.shell(stdin=terminal.fileno()) == 9
    assert "42" in capfd.readouterr().out


def test_shell_with_a_pipe_as_stdin_works(
    guest: SshGuest, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"echo $((6*7))\necho oops >&2\nexit 4\n")
    os.close(writing)
    with os.fdopen(reading) as stdin:
        assert guest.shell(stdin=stdin.fileno()) == 4
    out, err = capfd.readouterr()
    assert (out, err) == ("42\n", "oops\n")


def test_shell_command_writes_much_before_it_reads_on_works(
    guest: SshGuest, tmp_path: Path
) -> None:
    """More than a window each way: whoever waits to send must read meanwhile."""
    (tmp_path / "in").write_bytes(b"0123456789abcde\n" * 160_000)
    came = bytearray()
    twenty = ";".join(["p"] * 19)
    with (tmp_path / "in").open("rb") as stdin:
        status = guest.shell(f"sleep 1; sed '{twenty}'", stdin=stdin.fileno(), stdout=came.extend)
    assert status == 0
    assert len(came) == 20 * 16 * 160_000


def test_shell_process_left_behind_does_not_hold_it(guest: SshGuest) -> None:
    with Path("/dev/null").open("rb") as stdin:
        started = time.monotonic()
        assert guest.shell("sleep 300 & exit 3", stdin=stdin.fileno()) == 3
    assert time.monotonic() - started < 60
