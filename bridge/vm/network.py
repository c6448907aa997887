# SPDX-License-Identifier: Apache-2.0
"""The guest's network: QEMU's user network, open only for SSH and the targets.

``restrict=on`` cuts the guest off from the host and from the world, except for

* a port of 127.0.0.1 on the host, forwarded to the guest's sshd, and
* for each endpoint of a target, ``TARGET_ADDRESS:guest_port`` in the guest: QEMU starts a relay for
  each connection (:mod:`bridge.vm.relay`, or the same in C), which connects to
  ``127.0.0.1:host_port``, or to the endpoint's Unix socket.

Datagrams of UDP take another way: :mod:`bridge.vm.datagram_relay`.

QEMU can also forward a guest's connection to a chardev, without a program between. But a chardev
is one connection for the life of the VM, so a second client or a second mount would find it taken.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import BridgeError, QemuError, UsageError
from bridge.targets import (
    TARGET_ADDRESS,
    AnyEndpoint,
    Endpoint,
    QemuDevice,
    UdpEndpoint,
    UnixEndpoint,
)
from bridge.util.compile import CProgram
from bridge.vm.relay import SLOT

__all__ = [
    "EPOCH_HEADER",
    "GUEST_ADDRESS",
    "LOCALHOST",
    "SSH_GUEST_PORT",
    "EpochWord",
    "HostAddresses",
    "RelayGate",
    "compiled_relay",
    "find_ssh_port",
    "netdev_option",
    "served_devices",
    "silent_endpoints",
]

logger = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"

GUEST_ADDRESS = "10.0.2.15"
"""The guest's own address in QEMU's user network; the image's agent sets it."""

SSH_GUEST_PORT = 22

_PLAIN_RELAY = (sys.executable, "-I", "-S", str(Path(__file__).with_name("relay.py")))
EPOCH_HEADER = Path(__file__).with_name("epoch.h")
"""What each process that carries connections includes."""
_COMPILED_RELAY = CProgram(
    "the relay",
    Path(__file__).with_name("relay.c"),
    ("-O2", "-Wall", "-Wextra", "-Werror"),
    "relays",
    (EPOCH_HEADER,),
)
_LISTENS = {
    protocol: re.compile(
        rf"^ *[0-9]+: [0-9A-F]+:([0-9A-F]{{4}}) [0-9A-F]+:[0-9A-F]+ {state} ", re.MULTILINE
    )
    for protocol, state in (("tcp", "0A"), ("udp", "07"))
}
"""A socket that listens, and its port: Linux, net/ipv4/tcp_ipv4.c, get_tcp4_sock()."""
_HOST_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+(\S+)\s+(\d+)")


@dataclass(frozen=True)
class EpochWord:
    """The place of the region's coverage epoch: a file, and the word's offset in bytes."""

    file: str
    offset: int


class RelayGate:
    """Resets all relays at once, each with both of its connections.

    The relays are children of QEMU, unknown to this process. Each opens ``path``, a pipe of this
    process, and ends as soon as the pipe is readable. Nobody reads from it, so all relays see that.
    """

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._reading}")

    def reset_all(self) -> None:
        """Reset all current relays; new ones are unaffected."""
        reading, writing = os.pipe()
        os.write(self._writing, b"!")
        os.dup2(reading, self._reading, inheritable=False)
        os.close(reading)
        os.close(self._writing)
        self._writing = writing

    def close(self) -> None:
        """Close the pipe, which also ends the relays. Call it once."""
        os.close(self._writing)
        os.close(self._reading)


class HostAddresses:
    """Where endpoints are served now: relays read their address for each connection.

    QEMU's command line cannot change, and a target that is started again listens elsewhere. The
    addresses lie in a memfd of this process, :data:`bridge.vm.relay.SLOT` bytes each.
    """

    def __init__(self, endpoints: Sequence[AnyEndpoint]) -> None:
        self._fd = os.memfd_create("kcov-bridge-addresses", os.MFD_CLOEXEC)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._fd}")
        self.set(endpoints)

    def set(self, endpoints: Sequence[AnyEndpoint]) -> None:
        """Take the addresses of endpoints: as many as before, in the same order."""
        slots = (os.fsencode(_host_address(each)).ljust(SLOT, b"\0") for each in endpoints)
        os.pwrite(self._fd, b"".join(slots), 0)

    def close(self) -> None:
        """Close the memory: new connections fail from now on. Call it once."""
        os.close(self._fd)


def silent_endpoints(endpoints: Sequence[AnyEndpoint]) -> list[str]:
    """Return the names of those that nobody on the host listens on; nothing connects to them."""
    tcp, udp = (
        _unused({each.host_port for each in endpoints if isinstance(each, kind)}, protocol)
        for kind, protocol in ((Endpoint, "tcp"), (UdpEndpoint, "udp"))
    )

    def silent(endpoint: AnyEndpoint) -> bool:
        if isinstance(endpoint, UnixEndpoint):
            return not endpoint.host_path.exists()
        return endpoint.host_port in (udp if isinstance(endpoint, UdpEndpoint) else tcp)

    return [each.name for each in endpoints if silent(each)]


def served_devices(devices: Sequence[QemuDevice]) -> frozenset[str]:
    """Return the names of those whose back end on the host has its socket.

    One that has bound it by another path is not among them.
    """
    if not any(each.back_end for each in devices):
        return frozenset()
    try:
        table = Path("/proc/net/unix").read_text(errors="surrogateescape")
    except OSError:
        return frozenset()
    # The socket of a connection has the path of the one that listened.
    used = {words[7] for line in table.splitlines() if len(words := line.split(maxsplit=7)) == 8}
    return frozenset(each.name for each in devices if each.back_end in used)


def _unused(ports: set[int], protocol: str) -> set[int]:
    """Return those ports that nobody on the host listens on."""
    for table in (protocol, f"{protocol}6") if ports else ():
        with contextlib.suppress(OSError):
            used = _LISTENS[protocol].findall(Path("/proc/net", table).read_text())
            ports = ports - {int(port, 16) for port in used}
    return ports


def _host_address(endpoint: AnyEndpoint) -> str:
    """Return an address as relays take it."""
    if isinstance(endpoint, UnixEndpoint):
        return str(endpoint.host_path.absolute())
    return str(endpoint.host_port)


def compiled_relay() -> Path | None:
    """Return the relay in C, compiled on first use; None where there is no compiler or cache."""
    if os.environ.get("KCOV_BRIDGE_PLAIN", "0") not in ("", "0"):
        return None
    try:
        return _COMPILED_RELAY.build()
    except BridgeError as error:
        logger.debug("the relays run in Python: %s", error.report())
        return None


def relay_command(
    endpoint: AnyEndpoint,
    epoch: EpochWord | None = None,
    gate: Path | None = None,
    slot: tuple[Path, int] | None = None,
    program: Path | None = None,
) -> list[str]:
    """Return the command that QEMU runs for each connection to an endpoint.

    Args:
        slot: a file, and the number of the endpoint's address in it (:class:`HostAddresses`).
        program: what :func:`compiled_relay` returns; None for the one in Python.
    """
    address = f"@{slot[0]}:{slot[1]}" if slot is not None else _host_address(endpoint)
    command = [*_PLAIN_RELAY, address] if program is None else [str(program), address]
    if gate is not None:
        command += ["--gate", str(gate)]
    if epoch is not None:
        command += ["--epoch", epoch.file, str(epoch.offset)]
    return command


def netdev_option(
    name: str,
    endpoints: Sequence[AnyEndpoint] = (),
    *,
    ssh_port: int = 0,
    ssh: bool = True,
    coverage_epoch: EpochWord | None = None,
    gate: Path | None = None,
    host_addresses: Path | None = None,
    relay: Path | None = None,
) -> str:
    """Return the value of QEMU's ``-netdev`` for a network called ``name``.

    Args:
        ssh_port: with 0 the kernel chooses a free port; see :func:`find_ssh_port`.
        coverage_epoch: the word that the relays change.
        gate: the pipe that resets the relays.
        host_addresses: the file of :class:`HostAddresses`; None for addresses that stay.
        relay: the compiled relay; None for the one in Python.

    Raises:
        UsageError: a port is impossible, or two endpoints have the same guest port.
    """
    parts = [f"user,id={name},restrict=on,ipv6=off"]
    if ssh:
        _check_port("the SSH port", ssh_port, lowest=0)
        parts.append(f"hostfwd=tcp:{LOCALHOST}:{ssh_port}-{GUEST_ADDRESS}:{SSH_GUEST_PORT}")
    taken: dict[tuple[bool, int], AnyEndpoint] = {}
    for number, endpoint in enumerate(endpoints):
        udp = isinstance(endpoint, UdpEndpoint)
        _check_port(f"the guest port of endpoint {endpoint.name!r}", endpoint.guest_port)
        if not isinstance(endpoint, UnixEndpoint):
            _check_port(f"the host port of endpoint {endpoint.name!r}", endpoint.host_port)
        if other := taken.get((udp, endpoint.guest_port)):
            raise UsageError(
                f"the endpoints {other.name!r} and {endpoint.name!r} have the same guest port "
                f"{endpoint.guest_port}"
            )
        taken[udp, endpoint.guest_port] = endpoint
        if udp:
            continue
        slot = (host_addresses, number) if host_addresses is not None else None
        words = relay_command(endpoint, coverage_epoch, gate, slot, relay)
        command = shlex.join(words).replace(",", ",,")
        parts.append(f"guestfwd=tcp:{TARGET_ADDRESS}:{endpoint.guest_port}-cmd:{command}")
    return ",".join(parts)


def _check_port(what: str, port: int, *, lowest: int = 1) -> None:
    if not lowest <= port <= 65535:
        raise UsageError(
            f"{what} cannot be {port}", hint=f"a port is a number from {lowest} to 65535"
        )


def find_ssh_port(info_usernet: str) -> int:
    """Return the host's port for SSH, from the answer to QEMU's ``info usernet``.

    Raises:
        QemuError: the answer has none.
    """
    for address, port, _, guest_port in _HOST_FORWARD.findall(info_usernet):
        if address == LOCALHOST and int(guest_port) == SSH_GUEST_PORT:
            return int(port)
    raise QemuError("QEMU does not report the port that it forwards to SSH", evidence=info_usernet)
