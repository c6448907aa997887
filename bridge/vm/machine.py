# SPDX-License-Identifier: Apache-2.0
"""A virtual machine from start to end: QEMU's process, its QMP connection, the guest's reports.

    with Machine(config, doorbell=server.connect(), console_path=path) as machine:
        machine.start()
        ready = machine.wait_ready()
        ...
        machine.powerdown()

The states of a machine are ``CREATED, STARTING, BOOTING, READY, STOPPING, CLOSED``, in this order.
It is ``LOST`` when QEMU or the guest ends or stops without a request. The reason is an error that
:meth:`Machine.check` raises and that each listener gets at once. :meth:`Machine.rewind` leads
through ``REWINDING`` back to ``READY``, also from ``LOST`` if QEMU is alive.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import os
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.errors import (
    BootTimeoutError,
    BridgeError,
    GuestLostError,
    GuestSetupError,
    GuestStoppedError,
    MissingDependencyError,
    QemuError,
    UnwatchableError,
    UsageError,
)
from bridge.vm.agent import Ready, Report, ReportReader, Unhealthy, parse_report
from bridge.vm.channel import SEED_BYTES, VERSION, BrokenChannel, ChannelPort, Kind, Restarted
from bridge.vm.config import (
    HUB,
    NETWORK,
    NETWORK_PORT,
    STATES,
    BackendFds,
    MachineConfig,
    MemoryFds,
    WatchFds,
    paste_command,
    qemu_command,
    user_network,
)
from bridge.vm.console import ConsoleLog
from bridge.vm.events import (
    FATEFUL,
    NEEDS_RESET,
    loss_by_channel,
    loss_by_event,
    loss_by_silence,
    loss_by_status,
)
from bridge.vm.network import find_ssh_port
from bridge.vm.process import Process, spawn
from bridge.vm.restorer import Restored, Restorer
from bridge.vm.vmstate import KEEPING_CODE, SNAPSHOT_NAME, StreamReader, devices_of

if TYPE_CHECKING:
    from qemu.qmp import Message

    from bridge.vm.qmp import EventLoopThread, Qmp

__all__ = ["PLUGIN_REMEDY", "Ending", "LossListener", "Machine", "State", "require_qemu"]

logger = logging.getLogger(__name__)

LossListener = Callable[[BridgeError], None]

PLUGIN_REMEDY = (
    "install a QEMU with TCG plugins, 7.2 or newer, or leave the kernel out: --source python"
)
"""The hint if QEMU does not load the plugin that watches the guest kernel."""

_GREETING_SECONDS = 30.0
_QUIT_SECONDS = 5.0
_DRAIN_SECONDS = 2.0
_EVIDENCE_LINES = 25
_EVENTS_KEPT = 256
_READ_SIZE = 64 * 1024
_DRAIN_CHUNKS = 64
_LOAD_SECONDS = 30.0
_LOAD_JOB = "load-states"
_SAVE_SECONDS = 60.0
_STATUS_POLL_SECONDS = 0.002
_REST_TRIES = 20
_REST_SECONDS = 0.02
"""How often a guest is looked at before it is saved, and the time between."""
_RESET_SECONDS = 10.0
_STDERR_SECONDS = 0.5
_SAVED = "saved"
_CHANNEL_SECONDS = 10.0
_WARNINGS = 10
"""How many reports of an unhealthy guest are logged."""


_DISK_ERROR = "BLOCK_IO_ERROR"


class State(enum.Enum):
    """The state of a machine."""

    CREATED = "created"
    STARTING = "starting"
    BOOTING = "booting"
    READY = "ready"
    REWINDING = "rewinding"
    STOPPING = "stopping"
    LOST = "lost"
    CLOSED = "closed"


class Ending(enum.Enum):
    """How a machine was stopped."""

    POWERDOWN = "powerdown"
    QUIT = "quit"
    KILL = "kill"
    GONE = "gone"


def require_qemu(program: str) -> None:
    """Raise :class:`bridge.errors.MissingDependencyError` if QEMU's program is missing."""
    if shutil.which(program) is None:
        raise MissingDependencyError(
            f"QEMU ({program}) is not installed, or not an executable file",
            hint="`kcov-bridge setup` installs Debian's; --qemu PROGRAM names another",
        )


class Machine:
    """One QEMU and the guest in it.

    After the constructor and :meth:`start`, any thread may call any method. Descriptors and sockets
    that are passed in remain the caller's.

    Args:
        doorbell: the socket for QEMU's ivshmem device. The caller sends the handshake before
            :meth:`start`, and may close the socket afterwards.
        console_path: the file for the console's output.
        watch: the memory that the plugin ``config.plugin`` shares with the bridge.
        memory: makes it possible to save the guest (:meth:`save`), and to return a guest that was
            started from a snapshot to it (:meth:`rewind`).
        channel: as in :class:`bridge.vm.agent.Ready`, of the guest that is loaded from a snapshot.
    """

    def __init__(
        self,
        config: MachineConfig,
        *,
        doorbell: socket.socket | None = None,
        console_path: Path | None = None,
        watch: WatchFds | None = None,
        memory: MemoryFds | None = None,
        channel: int = 0,
    ) -> None:
        self.config = config
        self._memory = memory
        self._watch = watch
        self._doorbell = doorbell
        self._console_path = console_path
        self._changed = threading.Condition()
        # All guarded by _changed:
        self._state = State.CREATED
        self._ready: Ready | None = None
        self._channel_version = channel
        self._unhealthy: Unhealthy | None = None
        self._loss: BridgeError | None = None
        self._listeners: dict[int, LossListener] = {}
        self._next_listener = 0
        self._events: deque[Message] = deque(maxlen=_EVENTS_KEPT)
        # Whether the bridge has paused the guest. A loaded guest is paused until resume().
        self._paused = memory is not None and memory.devices is not None
        # Set by start(), before another thread knows the machine:
        self._started_at = 0.0
        self._ssh_port: int | None = None
        self._loop: EventLoopThread
        self._qmp: Qmp
        self._process: Process
        self._console: ConsoleLog
        self._console_socket: socket.socket
        self._report_socket: socket.socket
        self._port: ChannelPort | None = None
        self._restorer: Restorer | None = None
        # The thread that rewinds only:
        self._code_is_valid = False  # what QEMU has translated fits the memory that was restored
        self._translate_again = False  # the guest was lost, maybe by a fault of QEMU
        self._greeting = False  # whether the agent has to answer a HELLO
        self._greeted = False  # whether it has answered one
        self._stack = contextlib.ExitStack()
        self._closing = threading.Lock()  # held by close(), so that the second caller waits
        # The loop's thread only:
        self._reports = ReportReader()
        self._warnings = 0

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Properties

    @property
    def state(self) -> State:
        """The machine's state."""
        with self._changed:
            return self._state

    @property
    def loss(self) -> BridgeError | None:
        """Why the machine was lost; None if it was not."""
        with self._changed:
            return self._loss

    @property
    def events(self) -> tuple[Message, ...]:
        """The last events of QEMU."""
        with self._changed:
            return tuple(self._events)

    @property
    def ssh_port(self) -> int:
        """The port of 127.0.0.1 that leads to the guest's sshd."""
        if self._ssh_port is None:
            raise UsageError("the machine has no network, or has not been started")
        return self._ssh_port

    @property
    def pid(self) -> int:
        """The id of QEMU's process."""
        self._require_started()
        return self._process.pid

    @property
    def stderr(self) -> str:
        """QEMU's stderr so far."""
        self._require_started()
        return self._process.stderr_text

    @property
    def console(self) -> ConsoleLog:
        """The guest's console output."""
        self._require_started()
        return self._console

    @property
    def channel_version(self) -> int:
        """As :attr:`bridge.vm.agent.Ready.channel`, also before and between reports."""
        with self._changed:
            return self._channel_version

    @property
    def channel(self) -> ChannelPort | None:
        """The port over which the guest's agent takes commands; None if it does not."""
        return self._port if self.channel_version == VERSION else None

    @property
    def ignored_reports(self) -> int:
        """How many lines on the report port were no report."""
        return self._reports.ignored

    # Start, save, rewind, stop

    def start(self) -> None:
        """Start QEMU. Afterwards the guest boots, or is paused where it was saved.

        If this fails, nothing is left running.

        Raises:
            MissingDependencyError: QEMU is not installed, or lacks a device.
            UnwatchableError: QEMU cannot load the plugin.
            UsageError: the SSH port is taken, or the machine was started before.
            QemuError: QEMU ended by itself.
        """
        if self.state is not State.CREATED:
            raise UsageError("a machine can be started only once")
        self._enter(State.STARTING)
        try:
            with contextlib.ExitStack() as stack:
                self._start(stack)
                self._stack = stack.pop_all()
        except BaseException:
            self._enter(State.CLOSED)
            raise

    def _start(self, stack: contextlib.ExitStack) -> None:
        self._console = ConsoleLog(self._console_path)
        stack.callback(self._console.close)
        qmp, qemu_qmp = socket.socketpair()
        console, qemu_console = socket.socketpair()
        report, qemu_report = socket.socketpair()
        ours = [qmp, console, report]
        theirs = [qemu_qmp, qemu_console, qemu_report]
        qemu_channel: socket.socket | None = None
        if self.config.channel:
            channel, qemu_channel = socket.socketpair()
            theirs.append(qemu_channel)
            self._port = ChannelPort(channel, qemu_channel.dup())
            stack.callback(self._port.close)
        qemu_restorer: socket.socket | None = None
        if self.config.restorer is not None and self._memory and self._memory.saved is not None:
            restorer, qemu_restorer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.append(restorer)
            theirs.append(qemu_restorer)
            self._restorer = Restorer(restorer)
        for sock in (*ours, *theirs):
            stack.callback(sock.close)
        doorbell = self._doorbell.fileno() if self._doorbell is not None else None
        fds = BackendFds(
            qemu_qmp.fileno(),
            qemu_console.fileno(),
            qemu_report.fileno(),
            doorbell,
            self._watch,
            self._memory,
            qemu_channel.fileno() if qemu_channel is not None else None,
            qemu_restorer.fileno() if qemu_restorer is not None else None,
        )

        require_qemu(self.config.qemu)
        self._started_at = time.monotonic()
        self._process = spawn(
            qemu_command(self.config, fds),
            name="QEMU",
            pass_fds=fds.all,
            env={**os.environ, **dict(self.config.environment)},
            on_end=self._on_process_end,
        )
        stack.callback(self._process.kill)
        # Only QEMU may hold its ends, so that we read the end of file when it dies.
        for sock in theirs:
            sock.close()
        # Imported now, while QEMU starts: importing asyncio takes as long.
        from bridge.vm.qmp import EventLoopThread, Qmp

        self._loop = EventLoopThread(f"{self.config.name}-loop")
        stack.callback(self._loop.stop)
        self._qmp = Qmp(self._loop, self.config.name, self._on_event)
        self._console_socket, self._report_socket = console, report
        for sock in (console, report):
            sock.setblocking(False)
            self._loop.watch(sock, functools.partial(self._read, sock))

        stack.callback(self._qmp.disconnect)
        try:
            self._qmp.connect(qmp, _GREETING_SECONDS)
            if self.config.network:
                answer = self._qmp.execute(
                    "human-monitor-command", {"command-line": "info usernet"}
                )
                self._ssh_port = find_ssh_port(str(answer))
            if self._memory is not None:
                self._await_load()
        except QemuError as error:
            raise self._why_it_did_not_start(error) from error
        self._enter(State.BOOTING)
        if not self._process.running:
            # It ended before the line above, in a state in which the loss is not recorded.
            self._lose(self._why_it_ended())

    def _await_load(self) -> None:
        """Wait until QEMU has loaded the devices' state, if there is one."""
        deadline = time.monotonic() + _LOAD_SECONDS
        while self._status() == "inmigrate":
            if time.monotonic() > deadline:
                raise QemuError(f"QEMU did not load the devices' state within {_LOAD_SECONDS:g} s")
            time.sleep(_STATUS_POLL_SECONDS)

    def _status(self) -> str:
        """Ask QEMU for the guest's run state."""
        return _run_state(self._qmp.execute("query-status"))

    def save(self, on_progress: Callable[[], object] = lambda: None) -> bytes:
        """Pause the guest, so that its memory can be copied, and return the devices' state.

        Args:
            on_progress: see :func:`bridge.vm.vmstate.devices_of`.

        Returns:
            The state that a machine starts from, also for :func:`bridge.vm.vmstate.state_disk`.

        Raises:
            QemuError: QEMU refuses, or its state is not understood. And what :meth:`execute`
                raises.
        """
        self._stop_at_rest()
        # The guest's memory is a file, so it is left out. The region is none: newer QEMUs send it.
        capability = {"capability": "x-ignore-shared", "state": True}
        self.execute("migrate-set-capabilities", {"capabilities": [capability]})
        reading, writing = os.pipe()
        with StreamReader(reading, _SAVE_SECONDS) as stream:
            try:
                self._qmp.send_fd(writing, _SAVED)
            finally:
                # QEMU then has the only writing end, so closing it ends the stream.
                os.close(writing)
            self.execute("migrate", {"uri": f"fd:{_SAVED}"})
            try:
                return devices_of(stream, addresses=True, on_progress=on_progress)
            except QemuError as error:
                answer = self.execute("query-migrate")
                raise QemuError(error.message, evidence=str(answer), hint=error.hint) from error

    def _stop_at_rest(self) -> None:
        """Pause the guest; with TCG, if possible, when all its processors are halted.

        Others can be saved too, but not :func:`bridge.vm.vmstate.keeping_code`.
        """
        for left in reversed(range(_REST_TRIES if self.config.accelerator.name == "tcg" else 1)):
            self.execute("stop")
            if left == 0 or self._monitor("info registers -a").count("HLT=1") == self.config.cpus:
                return
            self.execute("cont")
            time.sleep(_REST_SECONDS)

    def resume(self) -> None:
        """Continue a loaded guest; :meth:`wait_ready` returns when it can be used.

        The agent gets the time and random bytes, so that guests from one snapshot differ in both.
        """
        port = self.channel
        if port is not None:
            # Before the guest runs, so that it is the first that the agent does.
            self._greeting = True
            port.hello(set_clock=True)
            self.execute("cont")
            return
        self.execute("cont")
        seconds, rest = divmod(time.time_ns(), 10**9)
        seed = os.urandom(SEED_BYTES).hex()
        # QEMU reads from the socket, so there is room for a few bytes.
        self._report_socket.send(f"resume {seconds} {rest} {seed}\n".encode())

    def greet(self, timeout: float = _CHANNEL_SECONDS) -> None:
        """Have the agent do again what it does first after a reset; ends all commands.

        Raises:
            UsageError: the agent takes no commands.
            BootTimeoutError: it does not answer.
        """
        port = self.channel
        if port is None:
            raise UsageError("the guest's agent takes no commands")
        self._greeting = True
        port.hello(set_clock=True)
        self._await_answer(port, time.monotonic() + timeout)
        if self._greeting:
            self.check()
            raise self._not_ready(timeout)

    def open_channel(self, timeout: float = _CHANNEL_SECONDS) -> ChannelPort | None:
        """Return the port over which a guest that has booted takes commands, once it does.

        Raises:
            BootTimeoutError: the agent does not answer on it.
        """
        port = self.channel
        if port is not None and not self._greeted:
            self._greeting = True
            port.hello(set_clock=False)
            self._await_answer(port, time.monotonic() + timeout)
            if self._greeting:
                raise self._not_ready(timeout)
        return port

    def _await_answer(self, port: ChannelPort, deadline: float) -> None:
        """Wait for the agent's answer to a HELLO, which says that the guest is ready."""
        while self._greeting and (left := deadline - time.monotonic()) > 0:
            with self._changed:
                if self._unhealthy or self._loss or self._state is State.CLOSED:
                    return
            port.wait(left)
            try:
                frames = port.receive(port.session)
            except Restarted:
                continue
            except BrokenChannel as error:
                self.lose_channel(str(error))
                return
            for frame in frames:
                report = parse_report(frame.payload) if frame.kind is Kind.READY else None
                if isinstance(report, Ready):
                    self._greeting, self._greeted = False, True
                    self._take_report(report)

    def rewind(
        self,
        restore: Callable[[], object],
        timeout: float | None = None,
        *,
        loaded: Callable[[], object] = lambda: None,
        lap: Callable[[str], object] = lambda part: None,
    ) -> Ready:
        """Return the guest to ``memory.states``, and wait until it is ready again.

        If this fails, the guest is lost.

        Args:
            restore: restores the guest's memory, with :meth:`restore_memory` if that can; called
                while the guest is paused.
            timeout: as for :meth:`wait_ready`.
            loaded: called when the devices' state is loaded, before the guest runs.
            lap: called after each part with its name: "stop", "loadvm", "continue", "guest".

        Raises:
            UsageError: the machine has no ``memory``, or is not ready. And what
                :meth:`wait_ready` raises.
        """
        if self._memory is None:
            raise UsageError("this machine cannot be rewound: it was not started from a snapshot")
        started = time.monotonic()
        self._translate_again = self._enter_rewinding()
        self._code_is_valid = False
        if self._port is not None:
            # Before the guest stops, after which QEMU takes nothing from the port any more.
            self._port.restart()
        try:
            if self._status() in NEEDS_RESET:
                self._system_reset()
            else:
                self.execute("stop")
            lap("stop")
            restore()
            self._load_states()
            lap("loadvm")
            self._loop.run(self._forget(started))
            loaded()
            self.resume()
            lap("continue")
        except BaseException as error:
            self._lose(GuestLostError(f"the guest could not be reset: {error}"))
            raise
        ready = self.wait_ready(timeout)
        lap("guest")
        return ready

    def track_memory(self) -> None:
        """Have the first :meth:`restore_memory` take as long as later ones.

        To be called before the guest runs, when its memory is as it was saved.

        Raises:
            QemuError: QEMU has ended, or does not answer.
        """
        if self._restorer is not None:
            try:
                done = self._restorer.track()
            except QemuError:
                self.check()
                raise
            logger.debug("the guest's memory: %s", done)

    def restore_memory(self) -> Restored | None:
        """Restore the guest's memory inside QEMU, which keeps its translated code; in ``restore``.

        Returns:
            None where this is not possible: the caller restores it from outside.

        Raises:
            QemuError: QEMU has ended, or does not answer.
        """
        if self._restorer is None:
            return None
        try:
            done = self._restorer.restore()
        except QemuError:
            self.check()
            raise
        if done.error:
            logger.warning(
                "QEMU cannot restore the guest's memory itself (%s); resets take longer",
                os.strerror(done.error),
            )
            self._restorer = None
            return None
        # What QEMU was not told of may be code. Without tracking it is not told of pages that were
        # written twice, which matters with several vCPUs: see restore_page() in restorer.c.
        told = not done.hidden and bool(done.tracked or self.config.cpus == 1)
        self._code_is_valid = told and not self._translate_again
        return done

    def _enter_rewinding(self) -> bool:
        """Enter REWINDING from READY, or from LOST if a reset can help; return whether it was."""
        with self._changed:
            loss = self._loss
            if isinstance(loss, GuestStoppedError) and self._process.running:
                logger.info("resetting the guest, which was lost: %s", loss)
            else:
                self.check()
                if self._state is not State.READY:
                    raise UsageError("the machine is not ready")
            self._loss = None
            self._paused = True
            self._set_state(State.REWINDING)
            return loss is not None

    def _system_reset(self) -> None:
        """Reset the guest, so that QEMU can continue it later; it remains paused."""
        # Otherwise a reset ends QEMU: see qemu_command().
        self.execute("set-action", {"reboot": "reset"})
        try:
            self.execute("system_reset")
            deadline = time.monotonic() + _RESET_SECONDS
            while self._status() in NEEDS_RESET:
                if time.monotonic() > deadline:
                    raise QemuError(f"QEMU did not reset the guest within {_RESET_SECONDS:g} s")
                time.sleep(_STATUS_POLL_SECONDS)
        finally:
            self.execute("set-action", {"reboot": "shutdown"})

    def _load_states(self) -> None:
        """Load the devices' state from ``memory.states``."""
        assert self._memory is not None
        keeps = self._code_is_valid and self._memory.keeps_code
        name = KEEPING_CODE if keeps else SNAPSHOT_NAME
        if not self.config.devices:
            self._monitor(f"loadvm {name}")
            return
        # loadvm refuses where a disk can be written that keeps no snapshots. This job names the
        # disks that it is about; it works in the background.
        job = {"job-id": _LOAD_JOB, "tag": name, "vmstate": STATES, "devices": [STATES]}
        self.execute("snapshot-load", dict(job))
        deadline = time.monotonic() + _LOAD_SECONDS
        while (found := self._load_job()).get("status") != "concluded":
            if time.monotonic() > deadline:
                raise QemuError(f"QEMU did not load the devices' state within {_LOAD_SECONDS:g} s")
            time.sleep(_STATUS_POLL_SECONDS)
        self.execute("job-dismiss", {"id": _LOAD_JOB})
        if "error" in found:
            raise QemuError("QEMU failed to load the devices' state", evidence=str(found["error"]))

    def _load_job(self) -> dict[str, object]:
        jobs = self.execute("query-jobs")
        assert isinstance(jobs, list)
        return next((dict(each) for each in jobs if each["id"] == _LOAD_JOB), {})

    async def _forget(self, started: float) -> None:
        """Discard, on the loop, what the guest sent before it was rewound."""
        self._drain(self._console_socket)
        self._drain(self._report_socket)
        with self._changed:
            self._reports.forget()
            self._started_at = started
            self._ready = self._unhealthy = None
            if self._state in (State.READY, State.REWINDING):
                self._set_state(State.BOOTING)

    def _monitor(self, command: str) -> str:
        """Execute a command of the human monitor. Raises QemuError if its answer is an error."""
        answer = str(self.execute("human-monitor-command", {"command-line": command}, timeout=60.0))
        if "Error" in answer:
            raise QemuError(f"QEMU failed to carry out {command!r}", evidence=answer)
        return answer

    @property
    def connections(self) -> list[str]:
        """The current connections of the guest's network, each a line of ``info usernet``."""
        if not self.config.network:
            return []
        lines = self._monitor("info usernet").splitlines()
        return [line.strip() for line in lines if "[" in line and "HOST_FORWARD" not in line]

    def replace_network(self) -> None:
        """Give the guest's card a new network, which knows no connection of the old one.

        The host's port for SSH stays the same. To be called while the guest is paused. A network
        keeps a connection that waits for the guest to end it, and a rewound guest, which takes the
        same ports again, would be refused there.
        """
        self.execute("netdev_del", {"id": NETWORK_PORT})
        self.execute("netdev_del", {"id": NETWORK})
        network = user_network(self.config, self.ssh_port)
        quoted = network.replace("\\", "\\\\").replace('"', '\\"')
        if answer := self._monitor(f'netdev_add "{quoted}"').strip():
            raise QemuError("QEMU did not make the guest's network anew", evidence=answer)
        port = {"type": "hubport", "id": NETWORK_PORT, "hubid": HUB, "netdev": NETWORK}
        self.execute("netdev_add", port)

    def wait_ready(self, timeout: float | None = None) -> Ready:
        """Wait until the guest's agent reports that the guest is ready.

        Args:
            timeout: seconds from now; None for ``config.boot_seconds`` from QEMU's start.

        Raises:
            BootTimeoutError: there was no report in time; the evidence is the end of the console.
            GuestSetupError: the agent reports that something failed. And, at once, what
                :meth:`check` raises if the machine is lost meanwhile.
        """
        seconds = self.config.boot_seconds if timeout is None else timeout
        deadline = self._started_at + seconds if timeout is None else time.monotonic() + seconds
        if self._greeting and self._port is not None:
            self._await_answer(self._port, deadline)
            deadline = time.monotonic()
        with self._changed:
            self._changed.wait_for(
                lambda: self._ready or self._unhealthy or self._loss or self._state is State.CLOSED,
                max(0.0, deadline - time.monotonic()),
            )
            ready, unhealthy = self._ready, self._unhealthy
        if ready is not None and self.state is State.READY:
            return ready
        self.check()
        if unhealthy is not None:
            raise GuestSetupError(
                f"the guest could not be set up: {unhealthy.what}: {unhealthy.why}",
                evidence=self._console.tail(_EVIDENCE_LINES),
            )
        raise self._not_ready(seconds)

    def _not_ready(self, seconds: float) -> BootTimeoutError:
        accelerator = self.config.accelerator
        return BootTimeoutError(
            f"the guest was not ready after {seconds:g} s under {accelerator.name}",
            evidence=self._console.tail(_EVIDENCE_LINES) or "(the console is empty)",
            hint="allow more time with --boot-timeout SECONDS, or run without KVM: --accel tcg"
            if accelerator.name == "kvm"
            else "allow more time with --boot-timeout SECONDS; the console shows what the guest "
            "waits for",
        )

    def adopt_ready(self, ready: Ready) -> None:
        """Declare the guest ready; for guests without the agent."""
        with self._changed:
            self._ready = ready
            if self._state is State.BOOTING:
                self._set_state(State.READY)

    def check(self) -> None:
        """Raise the reason if the machine was lost; otherwise do nothing.

        Raises:
            GuestPanicError: the guest kernel panicked.
            GuestPoweredOffError: the guest was powered off or reset from inside.
            GuestStoppedError: the guest stopped and cannot continue.
            GuestLostError: QEMU ended while the guest was ready.
            QemuError: QEMU ended before the guest was ready.
            UsageError: the machine has not been started, or is closed.
        """
        with self._changed:
            loss, state = self._loss, self._state
        if loss is not None:
            # Each caller gets a new exception, because a raised one carries its traceback.
            raise type(loss)(loss.message, evidence=loss.evidence, hint=loss.hint)
        if state in (State.CREATED, State.CLOSED):
            raise UsageError(f"the machine is {state.value}")

    def lose_silent(self, seconds: float) -> None:
        """Declare the guest lost, because it has not answered for ``seconds``."""
        self._lose(loss_by_silence(seconds, self._console))

    def lose_channel(self, why: str) -> None:
        """Declare the guest lost, because what its agent sends cannot be understood."""
        self._lose(loss_by_channel(why, self._console))

    def add_loss_listener(self, listener: LossListener) -> Callable[[], None]:
        """Call ``listener`` with the reason whenever the machine is lost; at once if it was.

        The call comes on another thread, once for each loss (a rewound machine can be lost again),
        and must not block. Returns a function that removes the listener.
        """
        with self._changed:
            key = self._next_listener
            self._next_listener += 1
            self._listeners[key] = listener
            loss = self._loss
        if loss is not None:
            listener(loss)

        def remove() -> None:
            with self._changed:
                self._listeners.pop(key, None)

        return remove

    def execute(
        self, command: str, arguments: dict[str, object] | None = None, *, timeout: float = 10.0
    ) -> object:
        """Execute a QMP command. Raises what :meth:`check` raises, and QemuError if it fails."""
        self.check()
        self._require_started()
        if command in ("stop", "cont"):
            with self._changed:
                self._paused = command == "stop"
        try:
            return self._qmp.execute(command, arguments, timeout=timeout)
        except QemuError:
            self.check()
            raise

    def powerdown(self, timeout: float = 15.0) -> Ending:
        """Stop the machine in the gentlest way that works, and return which it was.

        A ready guest is asked to power off within ``timeout`` seconds. If that fails, QEMU is asked
        to quit, and finally killed.
        """
        with self._changed:
            state = self._state
            if state in (State.CREATED, State.CLOSED):
                return Ending.GONE
            if state is not State.LOST:
                self._set_state(State.STOPPING)
        if not self._process.running:
            return Ending.GONE
        if state is State.READY and self._tell("system_powerdown") and self._process.wait(timeout):
            return Ending.POWERDOWN
        return self._quit()

    def _quit(self) -> Ending:
        if self._tell("quit") and self._process.wait(_QUIT_SECONDS):
            return Ending.QUIT
        self._process.kill()
        return Ending.KILL

    def _tell(self, command: str) -> bool:
        try:
            self._qmp.execute(command, timeout=2.0)
        except QemuError as error:
            logger.debug("%s", error)
            # QEMU may have ended before it answered, which is what was wanted.
            return self._process.wait(0.1)
        return True

    def close(self) -> None:
        """End QEMU and release everything. Safe to call at any time, and more than once."""
        with self._closing:
            if self.state is State.CLOSED:
                return
            with self._changed:
                started = self._state is not State.CREATED
                if self._state is not State.LOST:
                    self._set_state(State.STOPPING)
            try:
                if started and self._process.running:
                    self._quit()
            finally:
                try:
                    self._stack.close()
                finally:
                    self._enter(State.CLOSED)

    # One setter for the state

    def _enter(self, state: State) -> None:
        with self._changed:
            self._set_state(state)

    def _set_state(self, state: State) -> None:
        """Must be called with _changed held."""
        if state is not self._state:
            logger.debug("%s: %s -> %s", self.config.name, self._state.value, state.value)
            self._state = state
            self._notify()

    def _notify(self) -> None:
        """Must be called with _changed held."""
        self._changed.notify_all()
        if self._port is not None and self._state is not State.CLOSED:
            self._port.wake()

    def _require_started(self) -> None:
        if not hasattr(self, "_process"):
            raise UsageError("the machine has not been started")

    # Events and reports, on the loop's thread

    def _read(self, sock: socket.socket) -> bool:
        """Read a chunk of what the guest sent. Returns whether there may be more."""
        try:
            chunk = sock.recv(_READ_SIZE)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self._loop.unwatch(sock)
            return False
        if sock is self._console_socket:
            self._console.feed(chunk)
        else:
            self._on_report(chunk)
        return True

    def _drain(self, sock: socket.socket) -> None:
        # The limit keeps a guest that never stops writing from blocking the loop.
        for _ in range(_DRAIN_CHUNKS):
            if not self._read(sock):
                break

    def _on_report(self, chunk: bytes) -> None:
        for report in self._reports.feed(chunk):
            self._take_report(report)

    def _take_report(self, report: Report) -> None:
        with self._changed:
            if isinstance(report, Ready):
                if self._ready is None:
                    seconds = time.monotonic() - self._started_at
                    self._ready = replace(report, boot_seconds=seconds)
                    self._channel_version = report.channel if self._port is not None else 0
                self._unhealthy = None
                if self._state is State.BOOTING:
                    self._set_state(State.READY)
            else:
                self._unhealthy = report
                if self._warnings < _WARNINGS:
                    self._warnings += 1
                    logger.warning("the guest reports: %s: %s", report.what, report.why)
            self._notify()

    def _on_event(self, event: Message) -> None:
        name, data = str(event["event"]), event.get("data")
        data = data if isinstance(data, dict) else {}
        logger.debug("QEMU's event %s %s", name, data)
        with self._changed:
            self._events.append(event)
            if self._state not in (State.BOOTING, State.READY):
                return  # while rewinding: an event of the guest from before
            asked = self._paused
        if name in FATEFUL:
            # The guest's last output is in the socket by now, and says more than the event.
            self._drain(self._console_socket)
            error = loss_by_event(name, data, self._console)
            if error is not None:
                self._lose(error)
        elif name == "STOP":
            self._loop.submit(self._on_stop(asked))

    async def _on_stop(self, asked: bool) -> None:
        """Find out, on the loop, why QEMU stopped the guest, and whether it is lost."""
        try:
            status = _run_state(await self._qmp.execute_on_loop("query-status"))
        except QemuError as error:
            logger.debug("%s", error)  # QEMU ends, which _on_process_end() handles
            return
        if status == "internal-error":
            # QEMU dumps the processor's state to its stderr, which another thread reads.
            await self._loop.until(lambda: self._process.stderr_text != "", _STDERR_SECONDS)
        with self._changed:
            if self._state not in (State.BOOTING, State.READY):
                return
            found = (each.get("data") for each in self._events if each["event"] == _DISK_ERROR)
            disk_errors = [data for data in found if isinstance(data, dict)]
        loss = loss_by_status(
            status, asked=asked, stderr=self._process.stderr_text, disk_errors=disk_errors
        )
        if loss is not None:
            self._lose(loss)

    def _on_process_end(self, process: Process) -> None:
        async def tell() -> None:
            # QEMU's last events explain its end, so handle them first.
            await self._qmp.drained(_DRAIN_SECONDS)
            self._drain(self._console_socket)
            self._drain(self._report_socket)
            self._lose(self._why_it_ended())

        with self._changed:
            if self._state in (State.STARTING, State.STOPPING, State.CLOSED, State.LOST):
                return
        with contextlib.suppress(RuntimeError):  # close() has stopped the loop
            self._loop.submit(tell())

    def _lose(self, error: BridgeError) -> None:
        with self._changed:
            if self._state not in (State.BOOTING, State.READY, State.REWINDING):
                return
            self._loss = error
            self._set_state(State.LOST)
            listeners = list(self._listeners.values())
        logger.debug("%s: lost: %s", self.config.name, error.message)
        for listener in listeners:
            try:
                listener(error)
            except Exception:
                logger.exception("a listener to the machine's loss failed")

    def _why_it_ended(self) -> BridgeError:
        process = self._process
        evidence = process.stderr_text or self._console.tail(_EVIDENCE_LINES)
        if self.state is State.READY:
            return GuestLostError(f"QEMU {process.how_it_ended}", evidence=evidence)
        return QemuError(
            f"QEMU {process.how_it_ended} while the guest booted",
            evidence=f"{evidence}\n{self._by_hand}",
            hint="the last line is the command that starts the same machine by hand",
        )

    @property
    def _by_hand(self) -> str:
        return f"$ {paste_command(self.config)}"

    def _why_it_did_not_start(self, error: QemuError) -> BridgeError:
        if not self._process.wait(_DRAIN_SECONDS):
            return error
        said = self._process.stderr_text
        if self.config.ssh_port and "Could not set up host forwarding rule" in said:
            return UsageError(
                f"the SSH port {self.config.ssh_port} is taken",
                evidence=said,
                hint="name another port; 0 stands for a free one",
            )
        if "is not a valid device model name" in said and not self.config.extra_args:
            return MissingDependencyError(
                "this QEMU lacks a device that the machine needs",
                evidence=said,
                hint="install a complete QEMU, 7.2 or newer",
            )
        if self.config.plugin is not None and "plugin" in said and "restorer:" not in said:
            return UnwatchableError(
                "this QEMU cannot load the plugin that watches the guest kernel",
                evidence=said,
                hint=PLUGIN_REMEDY,
            )
        hint = "the last line is the command that starts the same machine by hand"
        if "cannot set up guest memory" in said or "phys-bits too low" in said:
            hint = f"there are no {self.config.memory_mib} MiB for a guest; take less: --memory MIB"
        elif self.config.sandbox and "-sandbox" in said:
            hint = "this QEMU was built without seccomp; run it without its sandbox: --no-sandbox"
        return QemuError(
            f"QEMU {self._process.how_it_ended}", evidence=f"{said}\n{self._by_hand}", hint=hint
        )


def _run_state(answer: object) -> str:
    """Return the status from the answer to ``query-status``."""
    return str(answer.get("status")) if isinstance(answer, dict) else ""
