# SPDX-License-Identifier: Apache-2.0
"""Running commands over SSH, against a real server (paramiko's) whose commands run here."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED

from bridge.errors import (
    BridgeError,
    GuestLostError,
    GuestPanicError,
    GuestSetupError,
    GuestStoppedError,
    ImageError,
    RunTimeoutError,
    UsageError,
)
from bridge.guest.ssh import Guest


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
            transport = paramiko.Transport(connection)
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


class Session(paramiko.ServerInterface):
    """One client of the server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def check_channel_request(self, kind: str, chanid: int) -> int:
        self._server.sessions += 1
        while self._server.stopped.is_set():
            time.sleep(0.02)
        return OPEN_SUCCEEDED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        ours = key.asbytes() == self._server.client_key.asbytes()
        return AUTH_SUCCESSFUL if ours else AUTH_FAILED

    def check_channel_pty_request(self, *_: object) -> bool:
        return True

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        process = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._server.processes.append(process)
        threading.Thread(target=serve, args=(channel, process), daemon=True).start()
        return True

    def check_channel_shell_request(self, channel: paramiko.Channel) -> bool:
        return self.check_channel_exec_request(channel, b"exec sh")


def serve(channel: paramiko.Channel, process: subprocess.Popen[bytes]) -> None:
    """Carry a process's three streams and its exit status."""

    def feed() -> None:
        assert process.stdin is not None
        with process.stdin as stdin, contextlib.suppress(OSError):
            while data := channel.recv(65536):
                stdin.write(data)
                stdin.flush()

    def carry(fd: int, send: Callable[[bytes], None]) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(fd, 65536):
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


class Machine:
    """What the guest is watched by: lost when the test says so."""

    def __init__(self) -> None:
        self.loss: BridgeError | None = None
        self.listeners: list[Callable[[BridgeError], None]] = []

    def check(self) -> None:
        if self.loss is not None:
            raise self.loss

    def add_loss_listener(self, listener: Callable[[BridgeError], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def lose_silent(self, seconds: float) -> None:
        self.lose(GuestStoppedError(f"silent for {seconds:g} s"))

    def lose(self, loss: BridgeError | None = None) -> None:
        self.loss = loss or GuestPanicError("the guest kernel panicked: test")
        for listener in list(self.listeners):
            listener(self.loss)


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
def machine() -> Machine:
    return Machine()


@pytest.fixture
def guest(server: Server, key: Path, machine: Machine) -> Iterator[Guest]:
    with Guest(server.port, key, public_line(server.host_key), watched=machine) as guest:
        guest.connect()
        yield guest


def test_output_and_exit_status(guest: Guest) -> None:
    result = guest.run("echo out; echo err >&2; exit 3")
    assert result.exit_status == 3
    assert result.stdout == b"out\n"
    assert result.stderr == b"err\n"
    assert not result.truncated
    assert result.text == "out\n"
    assert result.seconds > 0


def test_run_guest_answers_no_more_is_lost_with_the_machine(
    guest: Guest, server: Server, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.guest.ssh._SILENCE_SECONDS", 2.0)

    def stop(_: bytes) -> None:
        server.stopped.set()

    try:
        with pytest.raises(GuestStoppedError, match="silent for 2 s"):
            guest.run("echo; exec sleep 1000", stdout=stop)
    finally:
        server.stopped.clear()
    assert isinstance(machine.loss, GuestStoppedError)


def test_run_silent_command_is_waited_for_while_the_guest_answers(
    guest: Guest, server: Server, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.guest.ssh._SILENCE_SECONDS", 3.0)
    assert guest.run("sleep 7; echo end").text == "end\n"
    assert machine.loss is None
    assert server.sessions > 5


def test_words_are_not_for_the_shell(guest: Guest) -> None:
    words = ["printf", "%s|", "a b", "$HOME", "'", "*", ""]
    assert guest.run(words).stdout == b"a b|$HOME|'|*||"


def test_run_missing_command_is_status_127(guest: Guest) -> None:
    assert guest.run(["no-such-command"]).exit_status == 127


@pytest.mark.parametrize("command", ["kill -9 $$", ["sh", "-c", "kill -KILL $$"]])
def test_run_command_dies_of_a_signal_is_status_128_plus(
    guest: Guest, command: str | list[str]
) -> None:
    assert guest.run(command).exit_status == 128 + 9


def test_output_comes_while_the_command_runs(guest: Guest) -> None:
    came: list[tuple[bytes, float]] = []
    result = guest.run(
        "echo one; sleep 0.5; echo two; echo three >&2",
        stdout=lambda chunk: came.append((chunk, time.monotonic())),
        stderr=lambda chunk: came.append((chunk, time.monotonic())),
    )
    assert b"".join(chunk for chunk, _ in came if chunk != b"three\n") == b"one\ntwo\n"
    assert came[1][1] - came[0][1] > 0.3
    assert result.stdout == b"one\ntwo\n"


def test_output_is_binary_and_only_its_beginning_is_kept(guest: Guest) -> None:
    sizes: list[int] = []
    result = guest.run(
        "printf 'a\\000\\377'; head -c 5000000 /dev/zero",
        stdout=lambda chunk: sizes.append(len(chunk)),
        capture=1000,
    )
    assert sum(sizes) == 5_000_003
    assert result.stdout == b"a\0\xff" + bytes(997)
    assert result.truncated


def test_stdin_environment_and_directory(guest: Guest) -> None:
    data = os.urandom(3_000_000)
    assert guest.run("wc -c", stdin=data).stdout.strip() == b"3000000"
    assert guest.run("cat", stdin=data, capture=len(data)).stdout == data
    assert guest.run("head -c 1", stdin=data).exit_status == 0
    result = guest.run('echo "$MARK"; pwd', env={"MARK": "a 'b'"}, cwd="/usr")
    assert result.stdout == b"a 'b'\n/usr\n"
    assert guest.run("cat").stdout == b""
    assert guest.run("true", cwd="/no/such/directory").exit_status == 126
    with pytest.raises(UsageError, match="no name"):
        guest.run("true", env={"a b": "c"})


def test_run_timeout_kills_the_command_and_its_children(guest: Guest) -> None:
    started = time.monotonic()
    with pytest.raises(RunTimeoutError, match=r"within 0\.5 s: ") as caught:
        guest.run("echo before; sleep 30 & echo $!; sleep 30; true", timeout=0.5)
    assert time.monotonic() - started < 5
    word, child = caught.value.evidence.split()
    assert word == "before"
    assert ends(int(child))
    assert guest.run("echo still here").text == "still here\n"


def test_run_interrupted_wait_kills_the_command(guest: Guest) -> None:
    children: list[int] = []

    def interrupt(chunk: bytes) -> None:
        children.append(int(chunk))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guest.run("sleep 30 & echo $!; wait", stdout=interrupt)
    assert ends(children[0])


def test_run_background_process_does_not_delay_the_result(guest: Guest) -> None:
    result = guest.run("sleep 30 & echo started")
    assert result.text == "started\n"
    assert result.seconds < 5


def test_check_makes_a_status_an_error(guest: Guest) -> None:
    with pytest.raises(GuestSetupError, match="status 32: ") as caught:
        guest.run("echo mount failed >&2; exit 32", check=True)
    assert "mount failed" in caught.value.evidence


def test_run_many_commands_at_once_works(guest: Guest) -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = guest.run(f"sleep 0.1; echo {number}").text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number}\n" for number in range(8)}


def test_run_guest_is_lost_ends_at_once(guest: Guest, machine: Machine) -> None:
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
    guest: Guest, server: Server, machine: Machine
) -> None:
    threading.Timer(0.2, server.break_connections).start()
    threading.Timer(0.7, machine.lose).start()
    with pytest.raises(GuestPanicError):
        guest.run("sleep 30")


def test_run_connection_to_a_live_guest_breaks_is_an_error(guest: Guest, server: Server) -> None:
    threading.Timer(0.2, server.break_connections).start()
    with pytest.raises(GuestLostError, match="SSH connection to the guest broke"):
        guest.run("sleep 30")


def test_files_come_and_go_whole(guest: Guest, tmp_path: Path) -> None:
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


def test_files_that_cannot_be(guest: Guest, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("alive", [True, False])
def test_connect_dialed_connection_is_used_if_good(server: Server, key: Path, alive: bool) -> None:
    dialed = socket.create_connection(("127.0.0.1", server.port))
    ours = dialed.getsockname()
    if not alive:
        # As where nothing listens in the guest yet: QEMU accepts and drops us.
        dialed, other = socket.socketpair()
        other.close()
    with Guest(server.port, key, public_line(server.host_key), dialed=dialed) as guest:
        guest.connect()
        assert guest.run(["true"]).exit_status == 0
        transport = guest._transport
        assert transport is not None
        assert isinstance(transport.sock, socket.socket)
        assert (transport.sock.getsockname() == ours) == alive


def test_run_while_another_thread_logs_in_waits_for_it(server: Server, key: Path) -> None:
    with Guest(server.port, key, public_line(server.host_key)) as guest:
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
        Guest(server.port, other, public_line(server.host_key)) as guest,
        pytest.raises(GuestSetupError, match="refuses the key"),
    ):
        guest.connect()


def test_connect_wrong_host_key_is_refused(server: Server, key: Path, tmp_path: Path) -> None:
    expected = make_key(tmp_path / "expected")
    with Guest(server.port, key, public_line(expected)) as guest:
        with pytest.raises(GuestSetupError, match="host key mismatch") as caught:
            guest.connect()
        assert caught.value.evidence.count("SHA256:") == 2
        with pytest.raises(UsageError, match="no connection"):
            guest.run("true")


def test_connect_unknown_host_key_is_pinned_at_the_first_login(
    server: Server, key: Path, tmp_path: Path
) -> None:
    with Guest(server.port, key, None) as guest:
        guest.connect()
        assert guest.run("true").exit_status == 0
        server.host_key = make_key(tmp_path / "other")
        with pytest.raises(GuestSetupError, match="host key mismatch"):
            guest.connect()


def test_nobody_answers(key: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Guest(port, key, None) as guest, pytest.raises(GuestSetupError, match="does not answer"):
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
        with Guest(port, key, public_line(host_key)) as guest:
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
        Guest(1, tmp_path / "none", None)
    rubbish = tmp_path / "rubbish"
    rubbish.write_text("rubbish")
    with pytest.raises(UsageError, match="cannot be used"):
        Guest(1, rubbish, None)
    for line in ("", "ssh-ed25519", "ssh-ed25519 ????", "no-such-kind AAAA"):
        with pytest.raises(ImageError, match="host key is none"):
            Guest(1, key, line)


def test_shell_on_a_terminal_works(guest: Guest, capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as terminal, os.fdopen(ours, "wb", 0) as us:
        threading.Timer(0.3, us.write, (b"echo $((6*7)); exit 9\n",)).start()
        assert guest.shell(stdin=terminal.fileno()) == 9
    assert "42" in capfd.readouterr().out


def test_shell_with_a_pipe_as_stdin_works(guest: Guest, capfd: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"echo $((6*7))\necho oops >&2\nexit 4\n")
    os.close(writing)
    with os.fdopen(reading) as stdin:
        assert guest.shell(stdin=stdin.fileno()) == 4
    out, err = capfd.readouterr()
    assert (out, err) == ("42\n", "oops\n")
