# SPDX-License-Identifier: Apache-2.0
"""The settings of a run, defined once.

Each field of :class:`Settings` carries its type, default, limits and help. From that one
definition come the flags of the command, the variables ``KCOV_BRIDGE_<NAME>`` of the environment,
and the keys of the TOML file: ``kcov-bridge.toml``, or the table ``[tool.kcov-bridge]`` of
``pyproject.toml`` where there is no such file. A flag beats the environment, the environment beats
the file, the file beats the default. Every wrong name or value is a
:class:`bridge.errors.UsageError` that says where it stands and what is allowed there.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import logging
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.errors import UsageError

__all__ = [
    "CONFIG_FILE",
    "ENVIRONMENT_PREFIX",
    "Kind",
    "Option",
    "Settings",
    "default_of",
    "find_file",
    "flag_of",
    "known_variables",
    "load",
    "options",
]

_log = logging.getLogger(__name__)

CONFIG_FILE = "kcov-bridge.toml"
_TABLE = "kcov-bridge"
"""The settings file looked for in the working directory."""

ENVIRONMENT_PREFIX = "KCOV_BRIDGE_"
"""What the name of every environment variable of the bridge begins with."""

_OTHER_VARIABLES = frozenset({"CACHE", "MIRROR", "PLAIN"})
"""Variables with the prefix that are no settings of a run: read by :mod:`bridge.guest.images` and
:mod:`bridge.device.fastpath`."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class Kind(enum.Enum):
    """How the value of a setting is written."""

    FLAG = "true or false"
    INTEGER = "a whole number"
    SECONDS = "a number of seconds"
    TEXT = "a text"
    PATH = "a path"
    NAME_OR_PATH = "a name or a path"
    """In a file, a relative path is told from a name by its ``/``."""


@dataclass(frozen=True)
class Option:
    """What there is to know about one setting besides its name, type and default.

    ``minimum`` and ``maximum`` are inclusive, in the unit that ``metavar`` names. ``file`` says of
    a name or path that a file of this name counts, ``/`` or not.
    """

    kind: Kind
    help: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    power_of_two: bool = False
    file: bool = False

    def allowed(self) -> str:
        """Describe the allowed values."""
        if self.choices:
            return " or ".join(self.choices)
        words = self.kind.value
        if self.power_of_two:
            words += ", a power of two"
        if self.minimum is not None and self.maximum is not None:
            words += f", {_in_full(self.minimum)} to {_in_full(self.maximum)}"
        elif self.minimum is not None:
            words += f", {_in_full(self.minimum)} or more"
        return words


def _in_full(number: float) -> str:
    """Write a number without an exponent if it is whole."""
    return f"{int(number)}" if number == int(number) else f"{number:g}"


def _about(kind: Kind, help: str, **limits: Any) -> dict[str, Option]:
    return {"option": Option(kind, help, **limits)}


@dataclass(frozen=True)
class Settings:
    """Everything that a run can be told, checked.

    Raises :class:`bridge.errors.UsageError` for a value out of its limits.
    """

    personality: str = field(
        default="linux",
        metadata=_about(
            Kind.TEXT, "whose kcov rules the device follows", choices=("linux", "gvisor")
        ),
    )
    syscall_pcs: bool = field(
        default=False,
        metadata=_about(
            Kind.FLAG,
            "append one PC for the number of each system call, so that every traced call has a PC",
        ),
    )
    attribution: str = field(
        default="call",
        metadata=_about(
            Kind.TEXT,
            "which coverage of the target a system call gets while several threads trace: call "
            "(what was covered during it), or all (what was covered since the thread's last call)",
            choices=("call", "all"),
        ),
    )
    source: str = field(
        default="auto",
        metadata=_about(
            Kind.TEXT,
            "where coverage comes from: python (the target on the host), kernel (the guest "
            "kernel, under TCG only), or both; auto uses what is available: both under TCG, "
            "python under KVM and with the personality gvisor",
            choices=("auto", "python", "kernel", "python,kernel", "kernel,python"),
        ),
    )
    comparisons: bool = field(
        default=False,
        metadata=_about(
            Kind.FLAG,
            "record what the target compares, for KCOV_TRACE_CMP; slows a target in Python",
        ),
    )
    syscall_comparisons: bool = field(
        default=False,
        metadata=_about(
            Kind.FLAG,
            "with KCOV_TRACE_CMP, append one comparison for the number of each system call, which "
            "also allows that mode without --comparisons",
        ),
    )
    kernel_include: str = field(
        default="",
        metadata=_about(
            Kind.TEXT,
            "record only these parts of the guest kernel: function patterns, module:NAME, "
            "file:PATH (with debug information) or addr:START-END, separated by spaces",
            metavar="TERMS",
        ),
    )
    kernel_exclude: str = field(
        default="",
        metadata=_about(
            Kind.TEXT, "leave these parts of the guest kernel out; terms as above", metavar="TERMS"
        ),
    )
    kernel_all: bool = field(
        default=False,
        metadata=_about(
            Kind.FLAG,
            "also record guest kernel code that a kernel with CONFIG_KCOV leaves out: "
            "entry code, the scheduler, locks",
        ),
    )
    vmlinux: Path | None = field(
        default=None,
        metadata=_about(
            Kind.PATH,
            "debug information of the guest kernel, for files and lines (default: that of "
            "Debian's -dbg package, if installed)",
            metavar="FILE",
        ),
    )
    accel: str = field(
        default="auto",
        metadata=_about(
            Kind.TEXT,
            "accelerator; auto uses KVM if it can boot a stock kernel, else TCG",
            choices=("auto", "kvm", "tcg"),
        ),
    )
    snapshot: bool = field(
        default=True,
        metadata=_about(
            Kind.FLAG,
            "start the guest from a snapshot instead of booting it; the first run makes the "
            "snapshot; disk images and kernels of your own are always booted",
        ),
    )
    memory: int = field(
        default=256,
        metadata=_about(Kind.INTEGER, "guest memory", metavar="MIB", minimum=64, maximum=1 << 20),
    )
    cpus: int = field(
        default=1,
        metadata=_about(
            Kind.INTEGER, "virtual CPUs of the guest", metavar="N", minimum=1, maximum=255
        ),
    )
    cpu: str = field(
        default="",
        metadata=_about(
            Kind.TEXT,
            "processor model and features, as QEMU's -cpu takes them, for example "
            "host,-arch-capabilities (default: depends on the accelerator)",
            metavar="MODEL",
        ),
    )
    region: int = field(
        default=1024,
        metadata=_about(
            Kind.INTEGER,
            "size of the memory shared with the guest, which holds all kcov areas; the host "
            "allocates only what is used; below 1024, a guest may have to map it uncached",
            metavar="MIB",
            minimum=1,
            maximum=1 << 16,
            power_of_two=True,
        ),
    )
    target: str = field(
        default="plan9",
        metadata=_about(
            Kind.TEXT,
            "the host service under test: a name that `target list` shows, or module:Class of "
            "your own",
            metavar="NAME",
        ),
    )
    target_dir: Path | None = field(
        default=None,
        metadata=_about(
            Kind.PATH,
            "directory whose copy a file server target serves (default: a small built-in tree)",
            metavar="DIR",
        ),
    )
    transport: str = field(
        default="network",
        metadata=_about(
            Kind.TEXT,
            "how the guest reaches the target: by its network, or by the region, the memory that "
            "it shares with the host, which is faster; auto uses the region where the target "
            "offers it, as plan9 does",
            choices=("auto", "network", "region"),
        ),
    )
    target_timeout: float = field(
        default=90.0,
        metadata=_about(
            Kind.SECONDS,
            "how long the target may take to start",
            metavar="SECONDS",
            minimum=0.001,
            maximum=1e9,
        ),
    )
    isolate: bool = field(
        default=False,
        metadata=_about(
            Kind.FLAG,
            "run the target in its own process, so that the device survives its crash or hang",
        ),
    )
    diagnose: bool = field(
        default=False,
        metadata=_about(
            Kind.FLAG,
            "have the guest keep core dumps in /tmp, and report tasks that hang for 20 s; tests "
            "do so by default",
        ),
    )
    image: str | None = field(
        default=None,
        metadata=_about(
            Kind.NAME_OR_PATH,
            "guest image: a recipe (`trixie`, or a file `./mine.toml`), whose image is built when "
            "it is missing, a name from `image list`, or a disk image file of your own, which "
            "needs --ssh-key",
            metavar="IMAGE",
            file=True,
        ),
    )
    ssh_key: Path | None = field(
        default=None,
        metadata=_about(
            Kind.PATH, "private key that root in your disk image accepts", metavar="FILE"
        ),
    )
    kernel: Path | None = field(
        default=None,
        metadata=_about(Kind.PATH, "kernel to boot instead of the image's", metavar="FILE"),
    )
    initrd: Path | None = field(
        default=None, metadata=_about(Kind.PATH, "initial RAM disk for --kernel", metavar="FILE")
    )
    append: str = field(
        default="",
        metadata=_about(
            Kind.TEXT,
            "kernel command line for --kernel with a disk image of your own",
            metavar="WORDS",
        ),
    )
    out: Path = field(
        default=Path("build/run"),
        metadata=_about(Kind.PATH, "directory for the results", metavar="DIR"),
    )
    timeout: float | None = field(
        default=None,
        metadata=_about(
            Kind.SECONDS,
            "end the workload after this time, with status 124 (default: no limit)",
            metavar="SECONDS",
            minimum=0.001,
            maximum=1e9,
        ),
    )
    boot_timeout: float | None = field(
        default=None,
        metadata=_about(
            Kind.SECONDS,
            "boot timeout (default: depends on the accelerator)",
            metavar="SECONDS",
            minimum=0.001,
            maximum=1e9,
        ),
    )
    awake: float = field(
        default=200e-6,
        metadata=_about(
            Kind.SECONDS,
            "keep polling for this time after a call that closely followed another, because "
            "waking up costs more than answering; 0 sleeps at once",
            metavar="SECONDS",
            minimum=0.0,
            maximum=60.0,
        ),
    )
    sandbox: bool = field(
        default=True,
        metadata=_about(
            Kind.FLAG,
            "run QEMU in its seccomp sandbox; --no-sandbox is for a QEMU built without seccomp",
        ),
    )
    qemu: str = field(
        default="qemu-system-x86_64",
        metadata=_about(Kind.NAME_OR_PATH, "the QEMU program to start", metavar="PROGRAM"),
    )
    qemu_devices: bool = field(
        default=False,
        metadata=_about(
            Kind.FLAG,
            "also record QEMU's own device models, of the QEMU that `make qemu-devices` builds "
            "(docs/native.md)",
        ),
    )

    def __post_init__(self) -> None:
        for name, option in options().items():
            value = _absolute(name, option, getattr(self, name), f"setting {name}")
            object.__setattr__(self, name, value)
            _check(name, option, value, f"setting {name}")
        if self.initrd is not None and self.kernel is None:
            raise UsageError(
                "an initrd is given without a kernel",
                hint="give both, --kernel FILE --initrd FILE, or neither",
            )

    def sources(self, accelerator: str) -> frozenset[str]:
        """Which sources there are under an accelerator ("tcg" or "kvm"): "python", "kernel".

        Raises :class:`bridge.errors.UsageError` for one that it does not allow.
        """
        named = frozenset(self.source.split(","))
        if "auto" in named:
            # gVisor's kcov shows what serves the guest's calls, each block once a call. Here that
            # is the target; and no KCOV_UNIQUE_ENABLE makes room for a kernel's millions.
            if accelerator != "tcg" or self.personality == "gvisor":
                return frozenset({"python"})
            return frozenset({"kernel", "python"})
        if "kernel" in named and accelerator != "tcg":
            raise UsageError(
                "the guest kernel cannot be watched under KVM: only TCG lets QEMU see its code",
                hint="choose --accel tcg, or leave the guest kernel out: --source python",
            )
        return named

    def changed(self) -> dict[str, Any]:
        """Return what differs from the defaults, as values of JSON; see :meth:`of`."""
        default = Settings()
        return {
            name: str(value) if isinstance(value, Path) else value
            for name in options()
            if (value := getattr(self, name)) != getattr(default, name)
        }

    @classmethod
    def of(cls, changed: Mapping[str, object]) -> Settings:
        """Return the settings that :meth:`changed` described, on whatever machine.

        Raises :class:`bridge.errors.UsageError`.
        """
        return load(changed, environ={}, directory=Path(os.devnull))

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some settings changed, and check it."""
        return dataclasses.replace(self, **changes)


def options() -> dict[str, Option]:
    """Return the settings by name, in the order of their definition."""
    return {each.name: each.metadata["option"] for each in dataclasses.fields(Settings)}


_DEFAULTS = {each.name: each.default for each in dataclasses.fields(Settings)}


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the nearest known name, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else "the names are: " + ", ".join(names)


def _wrong(where: str, value: object, option: Option) -> UsageError:
    shown = "nothing" if value is None else f'"{value}"' if isinstance(value, str) else f"{value}"
    hint = f"allowed is {option.allowed()}"
    if option.choices and isinstance(value, str):
        near = difflib.get_close_matches(value, option.choices, n=1)
        hint += f"; did you mean {near[0]}?" if near else ""
    return UsageError(f"{where}: {shown} is not allowed", hint=hint)


def _check(name: str, option: Option, value: object, where: str) -> None:
    """Limits of a value that already has its Python type."""
    if value is None:
        if _DEFAULTS[name] is not None:
            raise _wrong(where, None, option)
        return
    match option.kind:
        case Kind.FLAG:
            good = isinstance(value, bool)
        case Kind.INTEGER:
            good = isinstance(value, int) and not isinstance(value, bool)
        case Kind.SECONDS:
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            good = good and math.isfinite(float(value))  # type: ignore[arg-type]
        case Kind.TEXT | Kind.NAME_OR_PATH:
            good = isinstance(value, str) and "\0" not in value
            good = good and (value != "" or _DEFAULTS[name] == "")
        case Kind.PATH:
            good = isinstance(value, Path) and "\0" not in str(value)
    if good and option.choices:
        good = value in option.choices
    if good and isinstance(value, (int, float)) and not isinstance(value, bool):
        good = (option.minimum is None or value >= option.minimum) and (
            option.maximum is None or value <= option.maximum
        )
        if good and option.power_of_two:
            good = isinstance(value, int) and value & (value - 1) == 0
    if not good:
        raise _wrong(where, value, option)


def _absolute(name: str, option: Option, value: object, where: str) -> object:
    """Make a path absolute, because a target may change the working directory.

    Text is taken for a path, and a path for text, as the setting wants it.
    """
    if option.kind is Kind.PATH and isinstance(value, str) and value:
        value = Path(value)
    elif option.kind is Kind.NAME_OR_PATH and isinstance(value, os.PathLike):
        value = os.path.join(".", value)  # noqa: PTH118  # so that it is told from a name
    if isinstance(value, Path):
        relative, named = not value.is_absolute(), False
    elif option.kind is Kind.NAME_OR_PATH and isinstance(value, str):
        relative, named = not value.startswith("/"), "/" not in value
    else:
        return value
    # A file of one's own may be given by its bare name, too, but a program is looked for in PATH.
    if not relative or (named and not (option.file and Path(value).is_file())):
        return value
    try:
        path = Path.cwd() / value
    except OSError as error:
        raise UsageError(
            f"{where}: {value} is relative, and the working directory is gone",
            hint=f"change to a directory that exists, or give {flag_of(name)} a path from / on",
        ) from error
    return path if option.kind is Kind.PATH else str(path)


def _path(text: str) -> Path:
    """Replace the ``~`` or ``~user`` of a path if there is such a user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _from_text(name: str, option: Option, text: str, where: str) -> object:
    """Convert a value from a flag or an environment variable."""
    value: object
    try:
        match option.kind:
            case Kind.FLAG:
                word = text.strip().lower()
                if word not in _TRUE | _FALSE:
                    raise ValueError(text)
                value = word in _TRUE
            case Kind.INTEGER:
                value = int(text, 10)
            case Kind.SECONDS:
                value = float(text)
            case Kind.PATH:
                if text == "":
                    raise ValueError(text)
                value = _path(text)
            case Kind.TEXT | Kind.NAME_OR_PATH:
                value = text
    except ValueError:
        raise _wrong(where, text, option) from None
    _check(name, option, value, where)
    return value


def _from_toml(name: str, option: Option, value: object, where: str, directory: Path) -> object:
    """Convert a value from the file, where a relative path starts at the file's directory."""
    if option.kind is Kind.PATH and isinstance(value, str) and value != "":
        value = directory / _path(value)
    elif option.kind is Kind.NAME_OR_PATH and isinstance(value, str) and "/" in value:
        value = str(directory / _path(value))
    elif option.kind is Kind.SECONDS and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    _check(name, option, value, where)
    return value


def find_file(directory: Path) -> Path | None:
    """Find the settings file of a directory: ``kcov-bridge.toml``, else ``pyproject.toml``."""
    for name in (CONFIG_FILE, "pyproject.toml"):
        path = directory / name
        if path.is_file():
            return path
    return None


def _read_file(path: Path) -> dict[str, object]:
    """Read the table of settings in a TOML file.

    Raises :class:`UsageError` where the file can't be read, is no TOML or has no such table.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"the settings file {path} cannot be read: {error.strerror}",
            hint="--config FILE names another",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML", evidence=str(error)) from error
    if path.name != "pyproject.toml":
        return document
    tool = document.get("tool", {})
    if not isinstance(tool, dict):
        return {}
    if _TABLE not in tool:
        for near in difflib.get_close_matches(_TABLE, tool, n=1, cutoff=0.8):
            # No error: it may be the table of another program.
            _log.warning("%s: [tool.%s] is not read; did you mean [tool.%s]?", path, near, _TABLE)
    table = tool.get(_TABLE, {})
    if not isinstance(table, dict):
        raise UsageError(f"{path}: tool.{_TABLE} is not a table")
    return table


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
    file: Path | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Settings:
    """Gather the settings: defaults, then the file, then the environment, then the flags.

    ``flags`` are texts or values by setting name, ``None`` for one that was not given.
    ``environ`` is the process's environment and ``directory`` (where the file is looked for) the
    working directory when not given; ``file`` names the file instead of looking for one.
    ``defaults`` take the place of the general ones.

    Raises :class:`bridge.errors.UsageError`.
    """
    environ = os.environ if environ is None else environ
    known = options()
    values: dict[str, object] = dict(defaults or {})

    path = file if file is not None else find_file(Path() if directory is None else directory)
    if path is not None:
        for key, value in _read_file(path).items():
            name = key.replace("-", "_")
            if name not in known:
                hint = _nearest(name, known)
                if isinstance(value, dict) and path.name != "pyproject.toml":
                    hint = "settings stand at the top level of this file, outside of any table"
                raise UsageError(f"{path}: unknown key {key}", hint=hint)
            values[name] = _from_toml(name, known[name], value, f"{path}: {key}", path.parent)

    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name in known:
            values[name] = _from_text(name, known[name], text, variable)
        elif name.upper() not in _OTHER_VARIABLES and (
            near := difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        ):
            # No error: other programs may use the prefix for variables of their own.
            meant = ENVIRONMENT_PREFIX + near[0].upper()
            _log.warning("%s is no setting; did you mean %s?", variable, meant)

    for name, flag in (flags or {}).items():
        if flag is None:
            continue
        if name not in known:
            raise UsageError(f"unknown setting {name}", hint=_nearest(name, known))
        where = flag_of(name)
        if isinstance(flag, str):
            values[name] = _from_text(name, known[name], flag, where)
        else:
            value = _absolute(name, known[name], flag, where)
            _check(name, known[name], value, where)
            values[name] = value
    return Settings(**values)  # type: ignore[arg-type]


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def known_variables() -> frozenset[str]:
    """Return the names of all environment variables that the bridge reads."""
    names = {name.upper() for name in options()} | _OTHER_VARIABLES
    return frozenset(ENVIRONMENT_PREFIX + name for name in names)


def default_of(name: str) -> object:
    """Return the default of a setting."""
    return _DEFAULTS[name]
