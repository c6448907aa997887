# SPDX-License-Identifier: Apache-2.0
"""What the host's tables of sockets say of a target."""

from __future__ import annotations

import socket
from pathlib import Path

from bridge.targets import QemuDevice, VhostUserFs
from bridge.vm.network import served_devices


def test_served_devices_have_a_socket_that_listens_or_is_connected(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    devices = [
        QemuDevice("files", (), back_end=str(path)),
        QemuDevice("other", (), back_end=str(tmp_path / "other")),
        QemuDevice("none", ()),
    ]
    assert not served_devices(devices)
    with socket.socket(socket.AF_UNIX) as listens, socket.socket(socket.AF_UNIX) as machine:
        listens.bind(str(path))
        listens.listen()
        assert VhostUserFs("files", path).as_qemu().back_end == str(path)
        assert served_devices(devices) == {"files"}
        machine.connect(str(path))
        connected, _ = listens.accept()
        listens.close()
        path.unlink()
        assert served_devices(devices) == {"files"}
        connected.close()
        assert not served_devices(devices), "the machine's own end has no path"
