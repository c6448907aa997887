# SPDX-License-Identifier: Apache-2.0
"""How a guest starts, from a snapshot or by booting, what is tried next, and its reset."""

from __future__ import annotations

import dataclasses
import logging
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.config import Settings
from bridge.errors import (
    BridgeError,
    CacheError,
    ImageError,
    InfrastructureError,
    MissingDependencyError,
    QemuError,
    TargetError,
    UnwatchableError,
    UsageError,
)
from bridge.guest.guest_image import GuestImage
from bridge.session.device_host import DeviceHost
from bridge.session.kernel_watch import KernelWatch
from bridge.session.snapshots import ready_snapshot, remove_if_damaged
from bridge.session.stats import Stats
from bridge.targets import TARGET_ADDRESS, AnyEndpoint, QemuDevice, UdpEndpoint
from bridge.targets.description import Description
from bridge.targets.devices import QmpCommand
from bridge.util.laps import Laps
from bridge.vm.accel import Accelerator, choose_accelerator, next_accelerator
from bridge.vm.agent import Ready
from bridge.vm.config import MachineConfig, MemoryFds
from bridge.vm.datagram_relay import DatagramRelay
from bridge.vm.machine import Machine
from bridge.vm.network import EpochWord, HostAddresses, RelayGate, compiled_relay
from bridge.vm.restorer import Restored, compiled_restorer
from bridge.vm.snapshot import Loading, Snapshot, new_memory

if TYPE_CHECKING:
    # Imported while the guest goes on: it takes longest.
    from bridge.guest.guest import Guest
    from bridge.session.device_models import DeviceModels

__all__ = ["Attempt", "Launcher", "RunningGuest", "first_attempt", "next_attempt"]

logger = logging.getLogger(__name__)

_RESUME_SECONDS = 20.0

_BUSY = "is busy"
_BUSY_SECONDS = 5.0
_BUSY_POLL_SECONDS = 0.001

_NOT_CONNECTED = ("Failed to connect", "Connection refused", "Could not open")
"""What QEMU prints if it does not reach a target."""

_LISTENS_HINT = (
    "the target must listen at the address of each of its devices from start() to stop(), and "
    "accept a new connection at each reset of the guest"
)
_HANG_UP_SECONDS = 20.0
_HANG_UP_POLL_SECONDS = 0.002
_WAITS_FOR_GUEST = re.compile(r"TCP\[(SYN_RCVD|FIN_WAIT_1|FIN_WAIT_2|CLOSING|LAST_ACK|TIME_WAIT)\]")
"""A connection in QEMU's ``info usernet`` that only waits for the guest now, which is paused.

In ``SYN_RCVD`` it has no relay yet: libslirp starts one at the guest's acknowledgement.
"""


# ---- attempts


@dataclass(frozen=True)
class Attempt:
    """One way to start a session."""

    accelerator: Accelerator
    sources: frozenset[str]
    """Among ``python`` and ``kernel``."""


def first_attempt(settings: Settings) -> Attempt:
    """Return the best way to start; raises UsageError and MissingDependencyError."""
    accelerator = choose_accelerator(settings.accel)
    return Attempt(accelerator, settings.sources(accelerator.name))


def next_attempt(settings: Settings, attempt: Attempt, error: BridgeError) -> Attempt | None:
    """Return what to try when an attempt ended with this error, said in one line of the log.

    Returns:
        None where there is nothing more to try: the error is the answer.
    """
    for fall_back in _FALL_BACKS:
        following = fall_back(settings, attempt, error)
        if following is not None:
            return following
    return None


def _without_kernel(settings: Settings, attempt: Attempt, error: BridgeError) -> Attempt | None:
    """A QEMU that cannot watch the guest kernel; who asked for it by name gets the error."""
    if not isinstance(error, UnwatchableError) or settings.source != "auto":
        return None
    if "kernel" not in attempt.sources:
        return None
    logger.warning("the guest kernel is not recorded: %s (%s)", error.message, error.hint)
    return dataclasses.replace(attempt, sources=attempt.sources - {"kernel"})


def _other_accelerator(settings: Settings, attempt: Attempt, error: BridgeError) -> Attempt | None:
    """A KVM that opens and runs nothing; the processor's flags did not tell."""
    following = next_accelerator(
        attempt.accelerator, error, wanted=settings.accel, cpu=settings.cpu
    )
    if following is None:
        return None
    why = error.evidence.strip().partition("\n")[0] if isinstance(error, QemuError) else ""
    logger.warning("%s; once more with %s", f"{error.message} ({why})" if why else error, following)
    return Attempt(following, settings.sources(following.name))


_FALL_BACKS: tuple[Callable[[Settings, Attempt, BridgeError], Attempt | None], ...] = (
    _without_kernel,
    _other_accelerator,
)
"""What is tried in place of an attempt that failed: the first that knows something."""


# ---- the guest


@dataclass(frozen=True)
class _Relays:
    """The processes between the guest and the endpoints of its target."""

    gate: RelayGate
    addresses: HostAddresses
    datagrams: DatagramRelay | None

    def reset(self) -> None:
        """Reset all connections, and drop all datagrams on the way."""
        self.gate.reset_all()
        if self.datagrams is not None:
            self.datagrams.reset()

    def set(self, endpoints: Sequence[AnyEndpoint]) -> None:
        """Take the endpoints' addresses of now: as many as before, in the same order."""
        self.addresses.set(endpoints)
        if self.datagrams is not None:
            self.datagrams.reset(_udp(endpoints))


def _udp(endpoints: Sequence[AnyEndpoint]) -> list[UdpEndpoint]:
    return [each for each in endpoints if isinstance(each, UdpEndpoint)]


class RunningGuest:
    """A machine whose guest takes commands; made by a :class:`Launcher`.

    Attributes:
        ready: what the guest's agent reported when it was ready the last time.
        reset_seconds: what the parts of the last reset took.
        restored: what QEMU restored of the memory at the last reset; None if that was done from
            outside.
        snapshot: what the guest was started from; None for one that was booted.
        resets: how often it was reset.
        endpoints: what the guest reaches now.
    """

    def __init__(
        self,
        machine: Machine,
        guest: Guest,
        ready: Ready,
        saved: tuple[Snapshot, int] | None,
        relays: _Relays,
        resources: ExitStack,
    ) -> None:
        self.machine = machine
        self.guest = guest
        self.ready = ready
        self.snapshot = saved[0] if saved is not None else None
        self.resets = 0
        self.reset_seconds: dict[str, float] = {}
        self.restored: Restored | None = None
        self._saved = saved
        self._relays = relays
        self._resources = resources
        self._mapping: mmap.mmap | None = None
        # As the target describes them now.
        self._devices, self.endpoints = machine.config.devices, machine.config.endpoints
        self._resetting = threading.Lock()  # held by resetting()

    @property
    def memory_fd(self) -> int:
        """The guest's memory, of a guest that was started from a snapshot."""
        return self._state()[1]

    def close(self, *, orderly: bool) -> None:
        """Power the guest down, or, if not ``orderly``, end QEMU at once."""
        with self._resources:
            if orderly:
                ending = self.machine.powerdown()
                logger.debug("the machine ended by %s", ending.value)

    @contextmanager
    def resetting(
        self, device: DeviceHost, renew: Callable[[], Description] | None = None
    ) -> Iterator[None]:
        """Reset the guest to its ready state, in the same QEMU; one reset at a time.

        Inside, the guest takes commands of this thread; those of other threads wait, and so does
        the next reset. A guest that had stopped running (GuestStoppedError) is rescued.

        Args:
            renew: called while the guest has no connection to its target; returns what the target
                says of itself from then on, which may differ in its addresses on the host.

        Raises:
            UsageError: the guest was booted.
            GuestLostError: the guest is lost for good.
        """
        self._state()
        laps = Laps()

        def restore_snapshot() -> None:
            """While the guest stands still: all that is not QEMU's own."""
            self.resets += 1
            self.guest.forget()
            device.reset()
            self._relays.reset()
            # Before the memory is restored, because a device may write into it.
            for each in self._devices:
                _execute(self.machine, each, each.on_reset)
            laps("devices")
            self._restore_memory()
            laps("memory")
            self._hang_up()
            laps("hang up")
            if renew is not None:
                target = renew()
                self._relays.set(target.endpoints)
                device.move_wires(target.endpoints)
                self._devices, self.endpoints = target.devices, target.endpoints
                laps("target")

        def connect() -> None:
            _connect(self.machine, self._devices)

        with self._resetting, self.guest.reserved():
            self.ready = self.machine.rewind(
                restore_snapshot, _RESUME_SECONDS, loaded=connect, lap=laps
            )
            yield
            laps("set up")
            self.reset_seconds = laps.seconds

    def _restore_memory(self) -> None:
        self.restored = self.machine.restore_memory()
        if self.restored is not None:
            logger.debug("the guest's memory: %s", self.restored)
            return
        snapshot, memory = self._state()
        if self._mapping is None:
            size = os.fstat(memory).st_size
            self._mapping = self._resources.enter_context(mmap.mmap(memory, size))
        snapshot.restore(memory, self._mapping)

    def _hang_up(self) -> None:
        """End the guest's connections to its target: it will take the same ports again."""
        deadline = time.monotonic() + _HANG_UP_SECONDS
        while open_now := [line for line in self.machine.connections if TARGET_ADDRESS in line]:
            if all(_WAITS_FOR_GUEST.match(line) for line in open_now):
                self.machine.replace_network()
                return
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    "connections of the guest to its target do not end",
                    evidence="\n".join(open_now),
                )
            time.sleep(_HANG_UP_POLL_SECONDS)
            # A relay that had just started opened the gate after the last reset.
            self._relays.gate.reset_all()

    def fill(self, stats: Stats) -> None:
        """As :class:`bridge.session.stats.Measured`."""
        stats.kernel = self.ready.kernel
        stats.boot_seconds = round(self.ready.boot_seconds, 3)
        stats.guest_memory_available_kib = self.ready.mem_available_kib
        stats.from_snapshot = self.snapshot is not None
        stats.resets = self.resets

    def _state(self) -> tuple[Snapshot, int]:
        if self._saved is None:
            raise UsageError(
                "the guest was booted, so there is no state to reset it to",
                hint="a guest of one of the project's images is started from a snapshot, unless "
                "--no-snapshot or --kernel is given",
            )
        return self._saved


class Launcher:
    """Starts QEMU with a device, for a target that serves.

    Args:
        accelerator: QEMU's.
        coverage_epoch: what the relays to the target must write; None where they need not.
        out: where ``console.log`` goes; None for nowhere.
        ssh_port: the port of 127.0.0.1 for SSH; 0 for a free one.
        models: QEMU's device models, where they are a source.
    """

    def __init__(
        self,
        settings: Settings,
        image: GuestImage,
        accelerator: Accelerator,
        device: DeviceHost,
        watch: KernelWatch,
        target: Description,
        *,
        coverage_epoch: EpochWord | None = None,
        models: DeviceModels | None = None,
        out: Path | None = None,
        ssh_port: int = 0,
    ) -> None:
        self._settings = settings
        self._image = image
        self._device = device
        self._watch = watch
        self._target = target
        self._console = out / "console.log" if out is not None else None
        config = image.machine_config(settings, accelerator)
        self._models = models
        if models is not None:
            config = dataclasses.replace(
                config,
                extra_args=(*config.extra_args, *models.extra_args),
                environment=tuple(models.environment.items()),
            )
        with ExitStack() as stack:
            self._gate = RelayGate()
            stack.callback(self._gate.close)
            self._addresses = HostAddresses(target.endpoints)
            stack.callback(self._addresses.close)
            self._datagrams: DatagramRelay | None = None
            if udp := _udp(target.endpoints):
                self._datagrams = DatagramRelay(udp, coverage_epoch)
                stack.callback(self._datagrams.close)
            self._stack = stack.pop_all()
        self._config = dataclasses.replace(
            config,
            endpoints=target.endpoints,
            devices=target.devices,
            connected=True,
            coverage_epoch=coverage_epoch,
            gate=self._gate.path,
            host_addresses=self._addresses.path,
            relay=compiled_relay() if target.endpoints else None,
            datagrams=self._datagrams.directory if self._datagrams is not None else None,
            plugin=watch.plugin,
            restorer=_restorer(config),
            ssh_port=ssh_port,
        )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def launch(self) -> RunningGuest:
        """Start the guest from its snapshot, or boot it; return when it takes commands.

        Raises:
            BootTimeoutError: it was not ready in time.
            UnwatchableError: QEMU cannot watch its kernel.
            BridgeError: QEMU or the guest failed otherwise; nothing is left running.
        """
        snapshot = self._find_snapshot()
        if snapshot is not None:
            try:
                return self._start(snapshot)
            except (MissingDependencyError, TargetError, UnwatchableError, UsageError):
                raise
            except BridgeError as error:
                damaged = " (it was damaged, and is removed)" if remove_if_damaged(snapshot) else ""
                logger.warning(
                    "the guest does not start from its snapshot%s: %s", damaged, error.message
                )
                logger.debug("%s", error.report())
            self._device.reset()
        return self._start(None)

    def _find_snapshot(self) -> Snapshot | None:
        """Return the snapshot of the ready guest, or None, in which case the guest boots."""
        settings, image = self._settings, self._image
        if not settings.snapshot or not image.can_be_saved or settings.kernel is not None:
            return None
        for device in self._target.devices:
            if not device.can_be_saved:
                logger.info("the guest is booted: the device %r cannot be saved", device.name)
                return None
        try:
            return ready_snapshot(image, self._config, settings.region << 20, self._target.modules)
        except (CacheError, ImageError) as error:
            # Anything else would keep the guest from booting too.
            logger.warning("the guest is booted, not started from a snapshot: %s", error.message)
            logger.debug("%s", error.report())
            return None

    def _start(self, snapshot: Snapshot | None) -> RunningGuest:
        """Start QEMU, from a snapshot or by booting."""
        image, device, watch = self._image, self._device, self._watch
        logger.info("%s %s", "starting" if snapshot is not None else "booting", image.name)
        with ExitStack() as stack:
            memory: MemoryFds | None = None
            loading: Loading | None = None
            saved: tuple[Snapshot, int] | None = None
            if snapshot is not None:
                stack.callback(snapshot.close)
                ram, states = _memory(snapshot, self._config, stack)
                loading = stack.enter_context(snapshot.loading(ram))
                memory = MemoryFds(
                    ram, states, loading.devices, snapshot.memory, snapshot.keeps_code
                )
                saved = snapshot, ram
            doorbell = stack.enter_context(device.connect())
            machine = Machine(
                self._config,
                doorbell=doorbell,
                console_path=self._console,
                watch=watch.fds(device.region),
                memory=memory,
                channel=snapshot.channel if snapshot is not None else 0,
            )
            stack.callback(machine.close)
            try:
                machine.start()
                if self._models is not None:
                    # What it covers of itself when it starts is nobody's.
                    device.consume()
                    self._models.check(machine.pid, machine.config.qemu)
            except QemuError as error:
                if loading is not None:
                    loading.check()
                _check_connections(self._target, error)
                raise
            _connect(machine, self._config.devices)
            doorbell.close()
            if loading is not None:
                loading.end()
                machine.track_memory()
                machine.resume()
                machine.wait_ready(_RESUME_SECONDS)

            def read_kernel(guest: Guest, release: str) -> None:
                watch.read_kernel(guest, release, device.call)

            guest, ready = image.bring_up(machine, stack, read_kernel)
            logger.info(
                "guest ready after %.1f s%s: Linux %s",
                ready.boot_seconds,
                " (from a snapshot)" if snapshot is not None else "",
                ready.kernel,
            )
            relays = _Relays(self._gate, self._addresses, self._datagrams)
            return RunningGuest(machine, guest, ready, saved, relays, stack.pop_all())


def _restorer(config: MachineConfig) -> Path | None:
    """Return the plugin that restores the guest's memory inside QEMU, where that is right."""
    if config.accelerator.name != "tcg":
        return None
    options = [*config.extra_args, *(each for one in config.devices for each in one.arguments)]
    if any("vhost-user" in each for each in options):
        # Another process writes the guest's memory, which Linux does not note for QEMU's.
        return None
    return compiled_restorer(config.qemu)


def _connect(machine: Machine, devices: Sequence[QemuDevice]) -> None:
    """Connect the devices to the target, before the guest runs."""
    for each in devices:
        _execute(machine, each, each.on_start)


def _execute(machine: Machine, device: QemuDevice, commands: Sequence[QmpCommand]) -> None:
    """Execute a device's commands of QMP.

    Raises:
        TargetError: one fails; nearly always the target does not listen.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    for command, arguments in commands:
        while True:
            try:
                machine.execute(command, dict(arguments))
                break
            except QemuError as error:
                # QEMU frees what a removed device held a moment later.
                if _BUSY in error.message and time.monotonic() < deadline:
                    time.sleep(_BUSY_POLL_SECONDS)
                    continue
                raise TargetError(
                    f"the device {device.name!r} cannot be connected to its target",
                    evidence=error.report(),
                    hint=_LISTENS_HINT,
                ) from error


def _check_connections(target: Description, error: QemuError) -> None:
    """Raise TargetError if QEMU did not start because it could not connect to the target."""
    if target.devices and any(words in error.evidence for words in _NOT_CONNECTED):
        raise TargetError(
            f"QEMU cannot connect a device to the target {target.name}",
            evidence=error.evidence,
            hint=_LISTENS_HINT,
        ) from error


def _memory(snapshot: Snapshot, config: MachineConfig, stack: ExitStack) -> tuple[int, int]:
    """Make the memory and the states of a machine that starts from the snapshot."""
    try:
        ram = new_memory(config.memory_mib << 20)
        stack.callback(os.close, ram)
        states = snapshot.states()
        stack.callback(os.close, states)
    except OSError as error:
        raise InfrastructureError(f"no memory for the guest: {error.strerror}") from error
    return ram, states
