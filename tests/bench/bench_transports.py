# SPDX-License-Identifier: Apache-2.0
"""How long one ``stat`` on a 9p mount takes through each transport.

    python tests/bench/bench_transports.py [--rounds N]

One guest has the same server mounted in several ways, and stats a file through each in turn. The
least of many small batches says most about a machine that does other things too.

* ``TCP, relay in Python``, ``TCP, relay in C``: QEMU's user network, a relay for each connection;
* ``virtio port``: a process in the guest between the port and a socket (``trans=fd``);
* ``virtio console``: ``trans=fd`` on the terminal ``/dev/hvc0``. No target gets one: QEMU drops
  what a console writes faster than the host reads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import bridge
from bridge.targets import TARGET_ADDRESS, AnyEndpoint, Endpoint, QemuDevice, VirtioPort
from bridge.targets.plan9 import GUEST_PORT, Plan9Target
from bridge.vm import network
from tests.support.endpoints import tcp_port
from tests.support.programs import guest_program

OPTIONS = "version=9p2000,noextend,cache=none"
PROGRAM = "/root/transports"
PLAIN_PORT = GUEST_PORT + 1
CONSOLE = ("-device", "virtio-serial-pci,id=bus", "-device", "virtconsole,bus=bus.0,chardev=it")
WAYS = {
    "TCP, relay in Python": "/mnt/plain",
    "TCP, relay in C": "/mnt/target",
    "virtio port": "/mnt/port",
    "virtio console": "/mnt/console",
}


class EveryWay(Plan9Target):
    """The 9p server with one way to it for each transport."""

    devices: tuple[QemuDevice | VirtioPort, ...] = ()

    def start(self) -> None:
        super().start()
        port = tcp_port(self._endpoints)
        self._endpoints += (Endpoint("plain", port, PLAIN_PORT),)
        chardev = ("-chardev", f"socket,id=it,host=127.0.0.1,port={port},nodelay=on")
        console = QemuDevice("console", (*chardev, *CONSOLE), ("-chardev", "null,id=it", *CONSOLE))
        self.devices = (VirtioPort("port", port), console)


SETUP = f"""set -e
mkdir -p {" ".join(WAYS.values())}
mount -t 9p -o trans=tcp,port={PLAIN_PORT},{OPTIONS} {TARGET_ADDRESS} /mnt/plain
{PROGRAM} join /dev/target/port mount -t 9p -o trans=fd,rfdno=3,wfdno=3,{OPTIONS} none /mnt/port
exec 3<>/dev/hvc0
stty raw -echo <&3
mount -t 9p -o trans=fd,rfdno=3,wfdno=3,{OPTIONS} none /mnt/console
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="The time of a stat through each transport.")
    parser.add_argument("--rounds", type=int, default=400)
    args = parser.parse_args()
    command_of = network.relay_command

    def relay_command(
        endpoint: AnyEndpoint,
        epoch: network.EpochWord | None = None,
        gate: Path | None = None,
        slot: tuple[Path, int] | None = None,
        program: Path | None = None,
    ) -> list[str]:
        program = None if endpoint.name == "plain" else program
        return command_of(endpoint, epoch, gate, slot, program)

    network.relay_command = relay_command
    with bridge.boot(target=f"{__name__}:EveryWay", source="python") as session:
        session.put(guest_program(Path(__file__).with_name("transports.c")), PROGRAM, 0o755)
        session.guest.run(SETUP, check=True)
        paths = [f"{mount}/README" for mount in WAYS.values()]
        words = [PROGRAM, "stat", str(args.rounds), *paths]
        output = session.guest.run(words, check=True, timeout=600).text
    times: list[list[float]] = [[] for _ in WAYS]
    for line in output.splitlines():
        way, time = line.split()
        times[int(way)].append(float(time))
    print(f"{'microseconds for a stat':<24}{'least':>8}{'10 %':>8}{'median':>8}")
    for name, of_way in zip(WAYS, times, strict=True):
        tenth = statistics.quantiles(of_way, n=10)[0]
        print(f"{name:<24}{min(of_way):>8.0f}{tenth:>8.0f}{statistics.median(of_way):>8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
