# SPDX-License-Identifier: Apache-2.0
"""What a started target says of itself, read once and checked."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from bridge.errors import BridgeError, TargetError
from bridge.targets import (
    AnyEndpoint,
    Endpoint,
    GuestFile,
    QemuDevice,
    Target,
    UdpEndpoint,
    UnixEndpoint,
)
from bridge.targets.devices import check_device_name
from bridge.targets.thread import foreign

__all__ = ["Description", "describe", "member_of"]

T = TypeVar("T")

_MISSING: Any = object()

_ENDPOINTS: tuple[type[AnyEndpoint], ...] = (Endpoint, UdpEndpoint, UnixEndpoint)


@dataclass(frozen=True)
class Description:
    """The members of a :class:`bridge.targets.DeviceTarget` that are valid once it is started."""

    name: str = ""
    endpoints: tuple[AnyEndpoint, ...] = ()
    guest_modules: tuple[str, ...] = ()
    guest_setup: str = ""
    guest_teardown: str = ""
    devices: tuple[QemuDevice, ...] = ()
    guest_files: tuple[GuestFile, ...] = ()
    guest_packages: tuple[str, ...] = ()
    guest_setup_by_region: str = ""

    def by_region(self) -> Description:
        """Return the same target, which the guest connects to by the region."""
        return dataclasses.replace(self, guest_setup=self.guest_setup_by_region)

    @property
    def modules(self) -> tuple[str, ...]:
        """The kernel modules of the devices and of the target itself, each once."""
        wanted = [name for device in self.devices for name in device.guest_modules]
        return tuple(dict.fromkeys([*wanted, *self.guest_modules]))

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON can hold it."""
        values = dataclasses.asdict(self)
        values["endpoints"] = [
            {"kind": type(each).__name__, **{k: _plain(v) for k, v in vars(each).items()}}
            for each in self.endpoints
        ]
        for file in values["guest_files"]:
            file["content"] = base64.b64encode(file["content"]).decode()
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Description:
        """Return the description that :meth:`as_dict` was made of."""
        return Description(
            values["name"],
            tuple(_endpoint(each) for each in values["endpoints"]),
            tuple(values["guest_modules"]),
            values["guest_setup"],
            values["guest_teardown"],
            tuple(QemuDevice.from_dict(each) for each in values["devices"]),
            tuple(
                GuestFile(each["path"], base64.b64decode(each["content"]), each["mode"])
                for each in values["guest_files"]
            ),
            tuple(values["guest_packages"]),
            values["guest_setup_by_region"],
        )


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _endpoint(values: Mapping[str, Any]) -> AnyEndpoint:
    found = {kind.__name__: kind for kind in _ENDPOINTS}[values["kind"]]
    members = {name: value for name, value in values.items() if name != "kind"}
    if found is UnixEndpoint:
        members["host_path"] = Path(members["host_path"])
    return found(**members)


def member_of(target: Target, member: str, default: T) -> T:
    """Return a member that a target need not have, or ``default``; raise what the member raises."""
    # dir(), because getattr() with a default would hide an AttributeError of a property.
    return cast(T, getattr(target, member)) if member in dir(target) else default


class _Reader:
    """Reads and checks the members of one target."""

    def __init__(self, target: Target) -> None:
        with foreign("the target", "when asked for its name"):
            self.name = str(target.name)
        self._target = target

    def read(self, member: str, needed: str, check: Callable[[Any], T], default: T) -> T:
        """Return a member that ``check`` has accepted; ``default`` where there is none.

        Raises:
            TargetError: the member raises, or is not what is ``needed``.
        """
        with foreign(f"the target {self.name}", f"when asked for its {member}"):
            value = member_of(self._target, member, _MISSING)
            if value is _MISSING:
                return default
            try:
                return check(value)
            except (TypeError, ValueError) as error:
                raise TargetError(
                    f"target {self.name}: {member} is {value!r}", hint=f"it must be {needed}"
                ) from error
            except BridgeError as error:
                raise TargetError(
                    f"target {self.name}: {error.message}",
                    evidence=error.evidence,
                    hint=error.hint,
                ) from error


def describe(target: Target) -> Description:
    """Read what a target says of itself; to be called on the target's thread, after its start.

    Raises:
        TargetError: a member raises, or is not what the protocol says.
    """
    reader = _Reader(target)
    return Description(
        reader.name,
        reader.read("endpoints", "a tuple of bridge.Endpoint", _tuple_of(*_ENDPOINTS), ()),
        reader.read("guest_modules", 'a tuple of names such as ("9p",)', _tuple_of(str), ()),
        reader.read("guest_setup", "a shell script, as text", _text, ""),
        reader.read("guest_teardown", "a shell script, as text", _text, ""),
        reader.read("devices", "a tuple of devices such as bridge.SerialPort", _devices, ()),
        reader.read("guest_files", "a tuple of bridge.GuestFile", _files, ()),
        reader.read(
            "guest_packages", 'a tuple of Debian packages such as ("python3",)', _tuple_of(str), ()
        ),
        reader.read("guest_setup_by_region", "a shell script, as text", _text, ""),
    )


def _tuple_of(*kinds: type) -> Callable[[Any], tuple[Any, ...]]:
    def check(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str | bytes):
            raise TypeError("a text")
        members = tuple(value)
        if not all(isinstance(each, kinds) for each in members):
            raise TypeError("another kind of member")
        return members

    return check


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _devices(value: Any) -> tuple[QemuDevice, ...]:
    found: dict[str, QemuDevice] = {}
    for each in tuple(value):
        if not callable(getattr(each, "as_qemu", None)):
            raise TypeError("no device")
        device = each.as_qemu()
        if not isinstance(device, QemuDevice):
            raise TypeError("as_qemu() returned something else")
        name = check_device_name(device.name)
        if name in found:
            raise TargetError(f"two devices have the name {name!r}", hint="each needs its own")
        _check_device(device)
        found[name] = device
    return tuple(found.values())


def _check_device(device: QemuDevice) -> None:
    """Check what a target of one's own may have written into a :class:`QemuDevice`."""
    for member in ("arguments", "stand_in", "guest_modules", "kernel_arguments"):
        value = getattr(device, member)
        if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
            raise TargetError(
                f"{member} of the device {device.name!r} is {value!r}",
                hint="it must be a tuple of texts",
            )
    if not isinstance(device.guest_setup, str):
        raise TargetError(
            f"guest_setup of the device {device.name!r} is {device.guest_setup!r}",
            hint="it must be a shell script, as text",
        )
    for command in (*device.on_start, *device.on_reset):
        if not (
            isinstance(command, tuple)
            and len(command) == 2
            and isinstance(command[0], str)
            and isinstance(command[1], Mapping)
        ):
            raise TargetError(
                f"on_start or on_reset of the device {device.name!r} has {command!r}",
                hint='each is a QMP command with its arguments: ("chardev-change", {...})',
            )


def _files(value: Any) -> tuple[GuestFile, ...]:
    files = _tuple_of(GuestFile)(value)
    for file in files:
        if not isinstance(file.path, str) or not file.path.startswith("/"):
            raise TargetError(
                f"guest_files has the path {file.path!r}", hint="an absolute path is needed"
            )
        if not isinstance(file.content, bytes):
            raise TargetError(
                f"the content of guest file {file.path} is no bytes", hint="encode the text"
            )
    return files
