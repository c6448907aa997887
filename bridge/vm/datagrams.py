# SPDX-License-Identifier: Apache-2.0
"""Carry the guest's UDP datagrams to services of the host. Run as a script, by the bridge.

``datagrams.py SOCKET CONTROL ADDRESS QEMU [--epoch FILE OFFSET]``

SOCKET is the descriptor of a datagram socket on which QEMU sends the guest's Ethernet frames
(:mod:`bridge.vm.datagram_relay`), QEMU the path of the socket that takes frames for the guest,
CONTROL the descriptor of a stream on which a line comes for each reset of the guest: words
GUEST_PORT:HOST_PORT, or nothing for the ports of the last one. What the guest sends to ADDRESS goes
to 127.0.0.1, from a port of its own for each of the guest's ports; the answers go back. A refused
datagram becomes an ICMP message, so that the guest's program learns of it. Before an answer is
passed on, the coverage epoch changes, as in ``relay.py``.

QEMU's user network refuses UDP in its restricted mode, and reaches too much in any other. The guest
is not trusted: every field of a frame is checked, and what is kept for it is bounded.
"""

import contextlib
import ctypes
import select
import socket
import struct
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from types import ModuleType

LOCALHOST = "127.0.0.1"
FLOWS = 256
"""Ports of the guest that are remembered; the one unused for longest is forgotten."""

PARTIAL = 32
"""Datagrams in fragments that are kept until the rest comes."""

SEND_TIMEOUT = struct.pack("ll", 0, 200_000)
"""``struct timeval``: how long a full socket of QEMU is waited for."""

FRAME = 2048
MTU = 1500
HEADER, UDP_HEADER = 20, 8
PART = (MTU - HEADER) // 8 * 8
LARGEST = 65535 - HEADER - UDP_HEADER

ARP_TYPE, IP_TYPE = 0x0806, 0x0800
ARP = struct.Struct("!HHBBH6s4s6s4s")
ARP_ETHERNET_IP = (1, IP_TYPE, 6, 4)
ARP_REQUEST, ARP_REPLY = 1, 2
UDP, ICMP = 17, 1
IP = struct.Struct("!BBHHHBBH4s4s")
PORTS = struct.Struct("!HHHH")
MORE_FRAGMENTS, OFFSET_MASK = 0x2000, 0x1FFF
UNREACHABLE = (3, 3)
"""ICMP's type and code: destination unreachable, port unreachable."""

SO_ATTACH_FILTER = 26
"""``include/uapi/asm-generic/socket.h``."""

Flow = tuple[bytes, int, int]
"""The guest's address, its port, and the port of the service."""


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def attach_filter(sock: socket.socket, address: bytes) -> None:
    """Let the kernel drop all frames but ARP and UDP to ``address``, so that none wakes us up."""
    (wanted,) = struct.unpack("!I", address)
    load_half, load_byte, load_word, equal, give = 0x28, 0x30, 0x20, 0x15, 0x06
    program = (
        (load_half, 0, 0, 12),  # the frame's type
        (equal, 5, 0, ARP_TYPE),
        (equal, 0, 5, IP_TYPE),
        (load_byte, 0, 0, 14 + 9),  # the protocol
        (equal, 0, 3, UDP),
        (load_word, 0, 0, 14 + 16),  # the destination
        (equal, 0, 1, wanted),
        (give, 0, 0, FRAME),
        (give, 0, 0, 0),
    )
    code = b"".join(struct.pack("HBBI", *each) for each in program)
    buffer = ctypes.create_string_buffer(code)
    # struct sock_fprog
    place = struct.pack("HL", len(program), ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, place)


class Reassembly:
    """Puts the fragments of datagrams together."""

    def __init__(self) -> None:
        self._parts: dict[tuple[bytes, int], dict[int, tuple[bytes, bool]]] = {}

    def add(self, source: bytes, number: int, flags: int, data: bytes) -> bytes | None:
        """Return the datagram that this fragment completes, or None."""
        offset, more = (flags & OFFSET_MASK) * 8, bool(flags & MORE_FRAGMENTS)
        if offset == 0 and not more:
            return data
        if offset + len(data) > LARGEST + UDP_HEADER:
            return None
        key = source, number
        parts = self._parts.setdefault(key, {})
        parts[offset] = data, more
        whole, at = b"", 0
        while at in parts:
            piece, follows = parts[at]
            whole += piece
            if not follows:
                del self._parts[key]
                return whole
            if not piece:
                break
            at += len(piece)
        while len(self._parts) > PARTIAL:
            del self._parts[next(iter(self._parts))]
        return None


class Datagrams:
    """The guest's side as frames, and a socket of the host for each port of the guest."""

    def __init__(
        self,
        guest: socket.socket,
        qemu: str,
        address: bytes,
        change_epoch: Callable[[], object],
    ) -> None:
        self.guest = guest
        self.qemu = qemu
        self.address = address
        # As QEMU's user network forms it, which answers for the same address.
        self.hardware = b"\x52\x55" + address
        self.ports: dict[int, int] = {}
        self.change_epoch = change_epoch
        self.poll = select.poll()
        self.flows: dict[Flow, socket.socket] = {}
        self.flow_of: dict[int, Flow] = {}
        self.guest_hardware = b"\xff" * 6
        self.reassembly = Reassembly()
        self.number = 0
        self.taken = True  # the last frame that was sent

    def reset(self) -> None:
        """Forget the guest, and drop what it has sent and what is on the way to it."""
        for flow in list(self.flows):
            self.forget(flow)
        self.reassembly = Reassembly()
        with contextlib.suppress(OSError):
            while True:
                self.guest.recv(FRAME, socket.MSG_DONTWAIT)

    def forget(self, flow: Flow) -> None:
        sock = self.flows.pop(flow)
        del self.flow_of[sock.fileno()]
        self.poll.unregister(sock)
        sock.close()

    def from_guest(self) -> None:
        """Handle a frame of the guest."""
        try:
            frame = self.guest.recv(FRAME, socket.MSG_DONTWAIT)
        except OSError:
            return
        if len(frame) < 14:
            return
        (kind,) = struct.unpack_from("!H", frame, 12)
        if kind == ARP_TYPE and len(frame) >= 14 + ARP.size:
            self.arp(frame)
        elif kind == IP_TYPE and len(frame) >= 14 + HEADER:
            self.ip(frame)

    def arp(self, frame: bytes) -> None:
        *form, operation, sender, ip, _, wanted = ARP.unpack_from(frame, 14)
        if (*form, operation, wanted) != (*ARP_ETHERNET_IP, ARP_REQUEST, self.address):
            return
        answer = ARP.pack(*ARP_ETHERNET_IP, ARP_REPLY, self.hardware, self.address, sender, ip)
        self.send_frame(sender, ARP_TYPE, answer)

    def ip(self, frame: bytes) -> None:
        first, _, length, number, flags, _, protocol, _, source, wanted = IP.unpack_from(frame, 14)
        header = (first & 15) * 4
        packet = frame[14 : 14 + length]
        if first >> 4 != 4 or protocol != UDP or wanted != self.address:
            return
        if header < HEADER or len(packet) < length or length < header:
            return
        self.guest_hardware = frame[6:12]
        datagram = self.reassembly.add(source, number, flags, packet[header:])
        if datagram is None or len(datagram) < UDP_HEADER:
            return
        port, service, size, _ = PORTS.unpack_from(datagram)
        if not UDP_HEADER <= size <= len(datagram):
            return
        flow = source, port, service
        try:
            sock = self.flow(flow)
            if sock is not None:
                sock.send(datagram[UDP_HEADER:size])
                return
        except BlockingIOError:
            return  # as in any network that is full
        except OSError:
            pass
        self.refuse(flow)

    def flow(self, flow: Flow) -> socket.socket | None:
        """Return the host's socket of a flow; None if there is no such service."""
        sock = self.flows.pop(flow, None)
        if sock is None:
            if flow[2] not in self.ports:
                return None
            while len(self.flows) >= FLOWS:
                self.forget(next(iter(self.flows)))
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setblocking(False)
            try:
                sock.connect((LOCALHOST, self.ports[flow[2]]))
            except OSError:
                sock.close()
                raise
            self.flow_of[sock.fileno()] = flow
            self.poll.register(sock, select.POLLIN)
        # The last one of the dictionary is the one used last.
        self.flows[flow] = sock
        return sock

    def from_host(self, fd: int) -> None:
        """Handle what has come on the host's socket with this descriptor."""
        flow = self.flow_of.get(fd)
        if flow is None:
            return
        try:
            data = self.flows[flow].recv(LARGEST)
        except BlockingIOError:
            return
        except OSError:
            # The port is closed.
            self.change_epoch()
            self.refuse(flow)
            return
        self.change_epoch()
        source, port, service = flow
        self.send_ip(source, UDP, PORTS.pack(service, port, UDP_HEADER + len(data), 0) + data)

    def refuse(self, flow: Flow) -> None:
        """Tell the guest that nobody listens at the port."""
        source, port, service = flow
        sent = self.ip_header(source, self.address, UDP, UDP_HEADER, 0, 0)
        about = sent + PORTS.pack(port, service, UDP_HEADER, 0)
        message = struct.pack("!BBHI", *UNREACHABLE, 0, 0) + about
        message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]
        self.send_ip(source, ICMP, message)

    def ip_header(
        self, source: bytes, to: bytes, protocol: int, size: int, number: int, flags: int
    ) -> bytes:
        fields = (0x45, 0, HEADER + size, number, flags, 64, protocol)
        header = IP.pack(*fields, 0, source, to)
        return IP.pack(*fields, checksum(header), source, to)

    def send_ip(self, to: bytes, protocol: int, data: bytes) -> None:
        """Send a packet to the guest, in fragments if need be."""
        self.number = (self.number + 1) & 0xFFFF
        for at in range(0, len(data), PART):
            piece = data[at : at + PART]
            flags = at // 8 | (MORE_FRAGMENTS if at + PART < len(data) else 0)
            header = self.ip_header(self.address, to, protocol, len(piece), self.number, flags)
            if not self.send_frame(self.guest_hardware, IP_TYPE, header + piece):
                return

    def send_frame(self, to: bytes, kind: int, data: bytes) -> bool:
        """Send a frame; return whether QEMU has it.

        Its socket holds ten by default, so wait if it is full; but if that was in vain, the guest
        is paused, and the next frames are dropped at once.
        """
        frame = to + self.hardware + struct.pack("!H", kind) + data
        flags = 0 if self.taken else socket.MSG_DONTWAIT
        try:
            self.guest.sendto(frame.ljust(60, b"\0"), flags, self.qemu)
            self.taken = True
        except OSError:
            self.taken = False
        return self.taken


def load(name: str, path: str) -> ModuleType:
    """Load a module by its path, without its package."""
    module = ModuleType(name)
    module.__file__ = path
    SourceFileLoader(name, path).exec_module(module)
    return module


def main(argv: list[str]) -> int:
    guest = socket.socket(fileno=int(argv[1]))
    control = socket.socket(fileno=int(argv[2]))
    address = socket.inet_aton(argv[3])
    change_epoch: Callable[[], object] = int
    if argv[5:6] == ["--epoch"]:
        relay = load("relay", __file__.rpartition("/")[0] + "/relay.py")
        change_epoch = relay.epoch_writer(argv[6], int(argv[7]))
    attach_filter(guest, address)
    guest.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SEND_TIMEOUT)
    datagrams = Datagrams(guest, argv[4], address, change_epoch)
    datagrams.poll.register(guest, select.POLLIN)
    datagrams.poll.register(control, select.POLLIN)
    while True:
        for fd, _ in datagrams.poll.poll():
            if fd == control.fileno():
                line = control.recv(1 << 16)
                if not line:
                    return 0
                datagrams.reset()
                if words := line.split():
                    pairs = (word.partition(b":") for word in words)
                    datagrams.ports = {int(port): int(host) for port, _, host in pairs}
                control.send(b".")
                break  # the other descriptors may be closed
            if fd == guest.fileno():
                datagrams.from_guest()
            else:
                datagrams.from_host(fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
