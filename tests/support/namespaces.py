# SPDX-License-Identifier: Apache-2.0
"""Network namespaces on one bridge: several machines, as far as their network goes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from types import TracebackType
from typing import Self

__all__ = ["Namespaces"]


class Namespaces:
    """Namespaces with an address each, and this one; a context manager that removes all of them.

    It takes root's rights.

    Attributes:
        host: the address of this namespace on the bridge.
        names: of the namespaces.
        addresses: of the namespaces.
    """

    def __init__(self, count: int) -> None:
        """Make them.

        Raises:
            subprocess.CalledProcessError: ``ip`` cannot; it says why.
        """
        # A name of an interface has 15 characters at most.
        self._prefix = f"kb{os.getpid()}"
        network = f"10.213.{os.getpid() % 256}"
        self.host = f"{network}.254"
        self.names = [f"{self._prefix}n{number}" for number in range(count)]
        self.addresses = [f"{network}.{number + 1}" for number in range(count)]
        bridge = f"{self._prefix}b"
        with contextlib.ExitStack() as stack:
            _ip(f"link add {bridge} type bridge")
            stack.callback(_ip, f"link del {bridge}")
            _ip(f"addr add {self.host}/24 dev {bridge}")
            _ip(f"link set {bridge} up")
            for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
                _ip(f"netns add {name}")
                # Its end of the pair goes with it, and the other one with that.
                stack.callback(_ip, f"netns del {name}")
                _ip(f"link add {self._prefix}v{number} type veth peer name eth0 netns {name}")
                _ip(f"link set {self._prefix}v{number} master {bridge} up")
                _ip(f"-n {name} link set lo up")
                _ip(f"-n {name} addr add {address}/24 dev eth0")
                _ip(f"-n {name} link set eth0 up")
            self._stack = stack.pop_all()

    def enter(self, number: int) -> tuple[str, ...]:
        """Return the words before a command that run it in a namespace."""
        return ("ip", "netns", "exec", self.names[number])

    def left(self) -> list[str]:
        """Return what of it is still there: namespaces and interfaces."""
        found = [each["name"] for each in json.loads(_ip("-j netns list") or "[]")]
        found += [each["ifname"] for each in json.loads(_ip("-j link show"))]
        return [name for name in found if name.startswith(self._prefix)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def _ip(words: str) -> str:
    return subprocess.run(
        ["ip", *words.split()], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
