# SPDX-License-Identifier: Apache-2.0
"""The settings of a virtual machine, and QEMU's command line for it.

Sockets are made before QEMU starts and QEMU inherits their descriptors, so there is no race, no
path in the file system, and nobody else can connect.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bridge.device.abi import VECTORS
from bridge.errors import UsageError
from bridge.targets import AnyEndpoint, QemuDevice
from bridge.vm.accel import Accelerator
from bridge.vm.channel import PORT_NAME
from bridge.vm.network import EpochWord, netdev_option
from bridge.vm.restorer import restorer_arguments

__all__ = [
    "DEFAULT_QEMU",
    "HUB",
    "NETWORK",
    "NETWORK_PORT",
    "STATES",
    "BackendFds",
    "MachineConfig",
    "MemoryFds",
    "WatchFds",
    "paste_command",
    "qemu_command",
    "user_network",
]

DEFAULT_QEMU = "qemu-system-x86_64"

NETWORK = "net"
"""QEMU's name for its user network."""
HUB = 0
NETWORK_PORT = "net-port"
"""The hub's port for :data:`NETWORK`."""
_CARD_PORT = "card-port"

STATES = "states-node"
"""QEMU's name for the disk of :attr:`MemoryFds.states`; that of a device must differ."""

_CPU = {"kvm": "host", "tcg": "max,la57=off"}
"""Five-level paging would cost TCG one more level on each page walk; a small guest needs four."""

_CODE_MIB = 64
"""Room for translated code that resets keep. QEMU's own limit is 1 GiB, which hundreds of resets
would fill; when it is full, QEMU translates again what still runs."""

_BOOT_SECONDS = {"kvm": 20.0, "tcg": 60.0}

_KERNEL_ARGUMENTS = {"console": "ttyS0", "panic": "-1"}
"""The console on the first serial port, and a reboot right after a panic, which ends QEMU. Each is
added unless ``cmdline`` sets it."""

_QCOW2_MAGIC = b"QFI\xfb"
"""``docs/interop/qcow2.txt`` in QEMU."""


_WIRING = {"wiring": True}
"""The metadata of the fields of :class:`MachineConfig` that are wiring."""


@dataclass(frozen=True)
class MachineConfig:
    """The settings of a virtual machine.

    Most fields are the machine's identity: a snapshot fits only a machine with the same values.
    The others are wiring: they differ between runs and are part of no device's state.

    Attributes:
        disk: a read-only image (virtio, ``/dev/vda``).
        image: a user's own raw or qcow2 disk (virtio). The guest gets a temporary copy-on-write
            view of it; the file is never written.
        cpu: QEMU's ``-cpu``; None for the accelerator's default.
        endpoints: the target's servers that the guest can reach.
        devices: the target's devices.
        connected: whether the devices are connected to the target; otherwise they are stand-ins.
        coverage_epoch: the word that the relays to ``endpoints`` change.
        relay: the compiled relay for TCP; None for the one in Python.
        datagrams: the directory of the relay for UDP
            (:class:`bridge.vm.datagram_relay.DatagramRelay`).
        gate: resets these relays (:class:`bridge.vm.network.RelayGate`).
        host_addresses: where these relays find the endpoints on the host
            (:class:`bridge.vm.network.HostAddresses`).
        channel: whether the guest's agent gets a port for commands (:mod:`bridge.vm.channel`).
        ssh_port: the port of 127.0.0.1 for SSH; 0 for a free one.
        boot_timeout: seconds; None for the accelerator's default.
        sandbox: False for a QEMU that was built without seccomp.
        plugin: watches the guest kernel (:mod:`bridge.sources.guest_kernel`).
        restorer: the plugin that restores the guest's memory (:mod:`bridge.vm.restorer`), with
            TCG; None to restore it from outside.
        environment: further variables for QEMU.

    Raises:
        UsageError: a value is impossible, or a file is missing.
    """

    accelerator: Accelerator
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    disk: Path | None = None
    image: Path | None = None
    memory_mib: int = 256
    cpus: int = 1
    cpu: str | None = None
    endpoints: tuple[AnyEndpoint, ...] = field(default=(), metadata=_WIRING)
    devices: tuple[QemuDevice, ...] = ()
    connected: bool = field(default=False, metadata=_WIRING)
    coverage_epoch: EpochWord | None = field(default=None, metadata=_WIRING)
    gate: Path | None = field(default=None, metadata=_WIRING)
    host_addresses: Path | None = field(default=None, metadata=_WIRING)
    datagrams: Path | None = field(default=None, metadata=_WIRING)
    relay: Path | None = field(default=None, metadata=_WIRING)
    network: bool = True
    channel: bool = True
    ssh_port: int = field(default=0, metadata=_WIRING)
    boot_timeout: float | None = field(default=None, metadata=_WIRING)
    qemu: str = DEFAULT_QEMU
    sandbox: bool = True
    plugin: Path | None = field(default=None, metadata=_WIRING)
    restorer: Path | None = field(default=None, metadata=_WIRING)
    environment: tuple[tuple[str, str], ...] = field(default=(), metadata=_WIRING)
    extra_args: tuple[str, ...] = ()
    name: str = field(default="kcov-bridge", metadata=_WIRING)

    def __post_init__(self) -> None:
        if self.memory_mib < 32:
            raise UsageError(
                f"{self.memory_mib} MiB of guest memory are too little", hint="32 MiB is the least"
            )
        if self.cpus < 1:
            raise UsageError(f"a machine needs at least one vCPU, not {self.cpus}")
        if self.initrd is not None and self.kernel is None:
            raise UsageError("an initrd needs a kernel")
        for what in ("kernel", "initrd", "disk", "image"):
            path = getattr(self, what)
            if path is not None and not path.is_file():
                raise UsageError(f"the {what} {path} does not exist, or is not a file")

    @property
    def identity(self) -> MachineConfig:
        """The same machine without its wiring."""
        wiring: dict[str, Any] = {
            each.name: each.default for each in fields(self) if each.metadata == _WIRING
        }
        return replace(self, **wiring)

    @property
    def cpu_model(self) -> str:
        """QEMU's ``-cpu``."""
        return self.cpu or self.accelerator.cpu or _CPU[self.accelerator.name]

    @property
    def boot_seconds(self) -> float:
        """How long the guest may take to report that it is ready."""
        if self.boot_timeout is not None:
            return self.boot_timeout
        return _BOOT_SECONDS[self.accelerator.name]

    @property
    def kernel_cmdline(self) -> str:
        """``cmdline``, with what the bridge and the devices need and ``cmdline`` does not set."""
        given = {word.partition("=")[0] for word in self.cmdline.split()}
        wanted = [f"{key}={value}" for key, value in _KERNEL_ARGUMENTS.items()]
        wanted += dict.fromkeys(word for each in self.devices for word in each.kernel_arguments)
        needed = [word for word in wanted if word.partition("=")[0] not in given]
        return " ".join([*needed, *self.cmdline.split()])


@dataclass(frozen=True)
class WatchFds:
    """The memory that the plugin in QEMU shares with the bridge."""

    plan: int
    region: int


@dataclass(frozen=True)
class MemoryFds:
    """The files of a machine that is saved to, or started from, a snapshot.

    A machine that starts from a snapshot gets the devices' state twice; without ``devices`` it
    boots and can be saved. See :mod:`bridge.vm.snapshot`.

    Attributes:
        ram: the guest's memory.
        states: a qcow2 with the devices' state, for each later reset.
        devices: a file or pipe with the devices' state, read once at the start.
        saved: the memory of the snapshot, for :attr:`MachineConfig.restorer`.
        keeps_code: whether ``states`` has :data:`bridge.vm.vmstate.KEEPING_CODE` too.
    """

    ram: int
    states: int | None = None
    devices: int | None = None
    saved: int | None = None
    keeps_code: bool = False


@dataclass(frozen=True)
class BackendFds:
    """QEMU's ends of the socket pairs.

    Without ``doorbell`` there is no ivshmem device, without ``channel`` no port for commands, and
    without ``restorer`` no plugin that restores the memory.
    """

    qmp: int
    console: int
    report: int
    doorbell: int | None = None
    watch: WatchFds | None = None
    memory: MemoryFds | None = None
    channel: int | None = None
    restorer: int | None = None

    @property
    def all(self) -> tuple[int, ...]:
        """The descriptors that QEMU must inherit."""
        fds = [self.qmp, self.console, self.report, self.doorbell, self.channel, self.restorer]
        if self.watch is not None:
            fds += [self.watch.plan, self.watch.region]
        if self.memory is not None:
            fds += [self.memory.ram, self.memory.states, self.memory.devices]
            if self.restorer is not None:
                fds.append(self.memory.saved)
        return tuple(fd for fd in fds if fd is not None)


def qemu_command(config: MachineConfig, fds: BackendFds) -> list[str]:
    """Return the command that starts the machine. Reads the first bytes of ``image``."""
    chardevs = [
        *("-chardev", f"socket,id=qmp,fd={fds.qmp}", "-qmp", "chardev:qmp"),
        *("-chardev", f"socket,id=console,fd={fds.console}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=report,fd={fds.report}", "-serial", "chardev:report"),
    ]
    if fds.doorbell is not None:
        # The device forbids snapshots unless it is master=on.
        chardevs += ["-chardev", f"socket,id=kcov,fd={fds.doorbell}"]
        chardevs += ["-device", f"ivshmem-doorbell,chardev=kcov,vectors={VECTORS},master=on"]
    if fds.watch is not None:
        assert config.plugin is not None
        given = f"plan={fds.watch.plan},region={fds.watch.region}"
        chardevs += ["-plugin", f"file={_escaped(config.plugin)},{given}"]
    if fds.memory is not None:
        if fds.memory.devices is not None:
            # The saved memory already holds what would be loaded from them.
            config = replace(config, kernel=None, initrd=None)
        chardevs += _memory(config, fds.memory)
        if fds.restorer is not None:
            assert config.restorer is not None
            assert fds.memory.saved is not None
            given = restorer_arguments(
                fds.memory.ram, fds.memory.saved, fds.restorer, config.memory_mib
            )
            chardevs += ["-plugin", f"file={_escaped(config.restorer)},{given}"]
    else:
        chardevs += _shared_memory(config)
    return [
        *_machine(config, bounded_code=fds.restorer is not None),
        *chardevs,
        *_disks(config),
        *_network(config),
        *_channel(fds.channel),
        # After the rest, whose places on the bus stay the same.
        *_devices(config),
        *config.extra_args,
    ]


def _channel(fd: int | None) -> list[str]:
    """Return the options for the port over which the agent takes commands."""
    if fd is None:
        return []
    return [
        *("-chardev", f"socket,id=agent,fd={fd}", "-device", "virtio-serial-pci,id=agent-ports"),
        *("-device", f"virtserialport,bus=agent-ports.0,chardev=agent,name={PORT_NAME}"),
    ]


def _memory(config: MachineConfig, fds: MemoryFds) -> list[str]:
    """Return the options for the guest's memory, a file of ours, and for the devices' state."""
    ram = f"memory-backend-file,id=ram,size={config.memory_mib}M,share=on"
    command = [
        *("-object", f"{ram},mem-path=/proc/self/fd/{fds.ram}"),
        # Leave out the description of the state that follows it, for debuggers.
        *("-machine", "memory-backend=ram,suppress-vmdesc=on"),
        # Leave out the machine's description before it: the snapshot's name has that.
        *("-global", "migration.send-configuration=off"),
    ]
    if fds.states is not None:
        states = f"if=none,id=states,node-name={STATES},format=qcow2,file.locking=off"
        command += ["-drive", f"{states},file.filename=/proc/self/fd/{fds.states}"]
    if fds.devices is not None:
        command += ["-S", "-incoming", f"fd:{fds.devices}"]
    return command


def _shared_memory(config: MachineConfig) -> list[str]:
    """Return the options for a memory that a device's back end can map, if one needs that."""
    if not any(device.shared_memory for device in config.devices):
        return []
    ram = f"memory-backend-memfd,id=ram,size={config.memory_mib}M,share=on"
    return ["-object", ram, "-machine", "memory-backend=ram"]


def paste_command(config: MachineConfig) -> str:
    """Return the command to paste into a shell.

    The console is on the terminal, there is no kcov device, and the target's devices are stand-ins.
    """
    console = ["-serial", "mon:stdio", "-serial", "null"]
    stand_ins = _devices(replace(config, connected=False))
    return shlex.join(
        [
            *_machine(config),
            *_shared_memory(config),
            *console,
            *_disks(config),
            *_network(config),
            *stand_ins,
            *config.extra_args,
        ]
    )


def _machine(config: MachineConfig, *, bounded_code: bool = False) -> list[str]:
    room = f",tb-size={_CODE_MIB}" if bounded_code else ""
    command = [
        config.qemu,
        *("-name", f"{_escaped(config.name)},debug-threads=on"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        # Unused devices cost boot time, because the firmware probes each one.
        *("-machine", "q35,hpet=off,sata=off,smbus=off,vmport=off,usb=off"),
        *("-accel", config.accelerator.name + room),
        *("-cpu", config.cpu_model),
        *("-m", str(config.memory_mib), "-smp", str(config.cpus)),
        # QEMU ends, and reports why, when the guest panics, reboots or powers off.
        *("-action", "panic=shutdown,reboot=shutdown,shutdown=poweroff"),
        *("-device", "pvpanic-pci", "-device", "virtio-rng-pci"),
    ]
    if config.sandbox:
        # Relays are children of QEMU. libslirp calls setsid() for them, which the sandbox counts as
        # elevating privileges; no_new_privs (launch.py) forbids what else it would forbid.
        relays = config.network and config.endpoints
        allowed = "allow" if relays else "deny"
        denied = "obsolete=deny,resourcecontrol=deny"
        command += ["-sandbox", f"on,{denied},elevateprivileges={allowed},spawn={allowed}"]
    if config.kernel is not None:
        command += ["-kernel", str(config.kernel), "-append", config.kernel_cmdline]
    if config.initrd is not None:
        command += ["-initrd", str(config.initrd)]
    return command


def _disks(config: MachineConfig) -> list[str]:
    command: list[str] = []
    if config.disk is not None:
        drive = f"if=none,id=disk,format=raw,readonly=on,file={_escaped(config.disk)}"
        command += ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]
    if config.image is not None:
        form = _image_format(config.image)
        drive = f"if=none,id=image,format={form},snapshot=on,file={_escaped(config.image)}"
        command += ["-drive", drive, "-device", "virtio-blk-pci,drive=image"]
    return command


def _devices(config: MachineConfig) -> list[str]:
    return [
        option for each in config.devices for option in each.options(connected=config.connected)
    ]


def _network(config: MachineConfig) -> list[str]:
    if not config.network:
        return ["-nic", "none"]
    # A hub between them, so that a reset can replace the network below the card.
    return [
        *("-netdev", user_network(config, config.ssh_port)),
        *("-netdev", f"hubport,id={NETWORK_PORT},hubid={HUB},netdev={NETWORK}"),
        *("-netdev", f"hubport,id={_CARD_PORT},hubid={HUB}"),
        *_datagrams(config),
        # With an empty romfile the firmware has no boot ROM to copy and run.
        *("-device", f"virtio-net-pci,netdev={_CARD_PORT},romfile="),
    ]


def _datagrams(config: MachineConfig) -> list[str]:
    """Return the options for a second network at the hub, on which the relay for UDP answers."""
    if config.datagrams is None:
        return []
    sockets = ",".join(
        f"{side}.type=unix,{side}.path={_escaped(config.datagrams / name)}"
        for side, name in (("local", "qemu"), ("remote", "relay"))
    )
    return [
        *("-netdev", f"dgram,id=datagrams,{sockets}"),
        *("-netdev", f"hubport,id=datagrams-port,hubid={HUB},netdev=datagrams"),
    ]


def user_network(config: MachineConfig, ssh_port: int) -> str:
    """Return the value of ``-netdev`` for the machine's network."""
    return netdev_option(
        NETWORK,
        config.endpoints,
        ssh_port=ssh_port,
        coverage_epoch=config.coverage_epoch,
        gate=config.gate,
        host_addresses=config.host_addresses,
        relay=config.relay,
    )


def _image_format(image: Path) -> str:
    with image.open("rb") as file:
        return "qcow2" if file.read(len(_QCOW2_MAGIC)) == _QCOW2_MAGIC else "raw"


def _escaped(value: str | Path) -> str:
    """Escape a value inside one of QEMU's comma-separated options."""
    return str(value).replace(",", ",,")
