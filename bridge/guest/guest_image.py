# SPDX-License-Identifier: Apache-2.0
"""The images that a guest boots from: the project's own, or the user's disk image.

The two differ in how the guest becomes ready. In the project's image the agent sets everything up
and reports. A user's disk image boots as usual. Once its sshd answers, the module and the programs
are built in it with its own kernel headers, or copied from the cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bridge.config import Settings
from bridge.errors import BootTimeoutError, CacheError, GuestSetupError, ImageError, UsageError
from bridge.guest.channel import ChannelGuest
from bridge.guest.guest import ssh_words
from bridge.guest.images import Image, find
from bridge.guest.images.recipe import DEFAULT_RECIPE, Sources, is_recipe
from bridge.guest.images.store import resolve
from bridge.util.cache import cache_directory, cache_errors, cache_folder
from bridge.util.files import atomic_output
from bridge.vm.accel import Accelerator
from bridge.vm.agent import Ready
from bridge.vm.config import MachineConfig
from bridge.vm.machine import Machine

if TYPE_CHECKING:
    # Imported late, because the guest's memory can be loaded meanwhile, or they are not used.
    from bridge.guest.guest import Guest
    from bridge.guest.ssh import SshGuest
    from bridge.sources.guest_kernel.code import KernelCode
    from bridge.sources.guest_kernel.filters import KernelFilter
    from bridge.sources.guest_kernel.lines import Lines

__all__ = [
    "BeforeModule",
    "CustomImage",
    "GuestImage",
    "ProjectImage",
    "find_guest_image",
    "lines_for",
]

logger = logging.getLogger(__name__)

_BUILT = "/tmp/kcov-bridge"
"""The directory in the guest where the module is built."""
_MODULE = "module/kcov_bridge.ko"
_PROGRAM = "agent/kcov-exec"
_LIBRARY = "agent/libkcovexec.so"
_LIBRARY_HOME = "/usr/lib/kcov-bridge"
_PROGRAM_HOME = "/usr/bin"
_BUILD_SECONDS = 900.0
_BUILD_TREE = "/lib/modules/{kernel}/build"
_EVIDENCE_LINES = 25

_STEADY_CLOCK = "tsc=unstable"
"""TCG's time-stamp counter belongs to QEMU's process and is not rewound with the guest
(``cpu_get_ticks`` in QEMU). The guest would see a jump into the future, and report its tasks as
locked up. The ACPI timer is rewound."""
_NO_TIMER_CHECK = "no_timer_check"
"""Linux counts the timer's interrupts while it boots, and panics ("IO-APIC + timer doesn't work")
where a busy host delays them: ``timer_irq_works`` in arch/x86/kernel/apic/io_apic.c. Under KVM it
leaves this out by itself."""


CORE_DUMPS = "/tmp/kcov-bridge.core."
"""In a guest with the setting ``diagnose``: the begin of the names of core dumps, which go on with
the number of the signal, the process id and the program, with ``.`` between them."""

_DIAGNOSE = (
    # A program that reads the dump needs no limit of the process to allow one. 4 MiB are enough
    # for the registers and the stack, which come first.
    f'"sysctl.kernel.core_pattern=|/bin/dd of={CORE_DUMPS}%s.%p.%e bs=64k count=64 '
    'iflag=fullblock status=none" '
    # Warnings on the console too, whose level "quiet" lowers; after the kernel has booted.
    "sysctl.kernel.hung_task_timeout_secs=20 sysctl.kernel.printk=7"
)
"""Linux' fs/coredump.c splits the pattern, of 127 characters at most, before it expands it."""


BeforeModule = Callable[["Guest", str], None]
"""Called with a guest that takes commands but has no kcov device yet, and its kernel's release."""


class GuestImage(Protocol):
    """An image that a machine can boot."""

    name: str
    can_be_saved: bool
    """Whether a ready machine can be saved with everything that the guest has written."""

    @property
    def ssh_key(self) -> Path:
        """The private key that root in the guest accepts."""

    def check_key(self) -> None:
        """Raise UsageError or ImageError if the key cannot be used."""

    def machine_config(self, settings: Settings, accelerator: Accelerator) -> MachineConfig:
        """Return the machine to boot it in, without endpoints."""

    def kernel_code(self, wanted: KernelFilter, vmlinux: Path | None) -> KernelCode | None:
        """Return the kernel's code as known before it runs; None if it is unknown.

        Args:
            wanted: what to record of the kernel.
            vmlinux: the kernel with debug information.

        Raises:
            UsageError: the filter is not valid.
        """

    def bring_up(
        self, machine: Machine, stack: ExitStack, before_module: BeforeModule
    ) -> tuple[Guest, Ready]:
        """Wait until the started machine has its kcov device and can run commands.

        Args:
            stack: gets the callbacks that close it.
            before_module: called before the device exists if :meth:`kernel_code` returned None,
                to ask the running kernel. It may raise.

        Raises the errors of :meth:`bridge.vm.machine.Machine.wait_ready` and
        :meth:`bridge.guest.ssh.SshGuest.connect`.
        """


def find_guest_image(settings: Settings) -> GuestImage:
    """Return the image that the settings name; a recipe's is built if it is missing.

    Raises:
        UsageError: there is no such image.
        ImageError: the image is broken, or cannot be built.
    """
    own = settings.image is not None and settings.ssh_key is not None
    if settings.append and not (own and settings.kernel):
        raise UsageError(
            "--append is given without --kernel and a disk image of your own",
            hint="leave --append out: only a disk image of your own takes a kernel command line",
        )
    if settings.image is not None and settings.ssh_key is not None:
        return CustomImage(Path(settings.image), settings.ssh_key)
    if settings.ssh_key is not None:
        raise UsageError(
            "--ssh-key is given without a disk image of your own",
            hint="give both, --image FILE --ssh-key FILE",
        )
    name = settings.image or DEFAULT_RECIPE
    if is_recipe(name):
        return ProjectImage(_current_image(name))
    if Path(name).is_file():
        raise UsageError(
            f"the disk image {name} is given without an SSH key",
            hint="--ssh-key FILE names the private key that root in the image accepts",
        )
    if "/" in name:
        raise UsageError(
            f"there is no disk image {name}",
            hint="--image takes a file, a recipe, or a name from `kcov-bridge image list`",
        )
    found = Image.load(resolve(name, recipes=True))
    found.check()
    return ProjectImage(found)


def _current_image(recipe: str) -> Image:
    """Return the image of a recipe's current sources, built if it is missing."""
    with contextlib.suppress(ImageError):
        if (image := find(recipe)) is not None:
            return image
    from bridge.guest.images.builder import build

    return build(recipe)


def _machine(settings: Settings, accelerator: Accelerator) -> MachineConfig:
    """Return the settings that do not depend on the image."""
    return MachineConfig(
        accelerator=accelerator,
        memory_mib=settings.memory,
        cpus=settings.cpus,
        cpu=settings.cpu or None,
        boot_timeout=settings.boot_timeout,
        qemu=settings.qemu,
        sandbox=settings.sandbox,
    )


def lines_for(wanted: KernelFilter, release: str, vmlinux: Path | None) -> Lines | None:
    """Return the kernel's debug information if the filter needs it and it is found."""
    from bridge.sources.guest_kernel.lines import Lines, find_modules, find_vmlinux

    found = find_vmlinux(release, vmlinux) if wanted.needs_lines else None
    return Lines(found, modules=find_modules(release, found)) if found is not None else None


class ProjectImage:
    """An image that ``kcov-bridge image build`` made."""

    can_be_saved = True

    def __init__(self, image: Image) -> None:
        self.name = image.name
        self._image = image

    @property
    def image(self) -> Image:
        """The image itself."""
        return self._image

    @property
    def ssh_key(self) -> Path:
        """See :class:`GuestImage`."""
        return self._image.ssh_key

    def check_key(self) -> None:
        """See :class:`GuestImage`."""
        try:
            with self.ssh_key.open("rb"):
                return
        except OSError as error:
            raise ImageError(
                f"the SSH key {self.ssh_key} of the image cannot be read: {error.strerror}",
                hint="does the cache belong to another user? KCOV_BRIDGE_CACHE names another",
            ) from error

    def machine_config(self, settings: Settings, accelerator: Accelerator) -> MachineConfig:
        """See :class:`GuestImage`. ``settings.kernel`` replaces the image's kernel."""
        image = self._image
        cmdline = image.cmdline
        if accelerator.name == "tcg":
            cmdline = f"{cmdline} {_NO_TIMER_CHECK}"
        if settings.snapshot and accelerator.name == "tcg":
            cmdline = f"{cmdline} {_STEADY_CLOCK}"
        if settings.diagnose:
            cmdline = f"{cmdline} {_DIAGNOSE}"
        return replace(
            _machine(settings, accelerator),
            kernel=settings.kernel or image.kernel,
            initrd=settings.initrd or image.initrd,
            cmdline=cmdline,
            disk=image.root,
        )

    def kernel_code(self, wanted: KernelFilter, vmlinux: Path | None) -> KernelCode:
        """See :class:`GuestImage`."""
        from bridge.sources.guest_kernel.code import KernelCode

        return KernelCode.from_system_map(
            self._image.system_map,
            self._image.modules_list,
            wanted,
            lines_for(wanted, self._image.kernel_release, vmlinux),
        )

    def bring_up(
        self, machine: Machine, stack: ExitStack, before_module: BeforeModule
    ) -> tuple[Guest, Ready]:
        """See :class:`GuestImage`."""
        ready = machine.wait_ready()
        port = machine.open_channel()
        if port is None:
            ssh = self._ssh(machine)
            stack.callback(ssh.close)
            ssh.connect()
            return ssh, ready
        words = ssh_words(self._image.ssh_key, machine.ssh_port)
        ssh_later = functools.partial(self._ssh, machine)
        guest = ChannelGuest(port, machine, ssh=ssh_later, ssh_command=words)
        stack.callback(guest.close)
        return guest, ready

    def _ssh(self, machine: Machine) -> SshGuest:
        from bridge.guest.ssh import SshGuest

        host_key = self._image.host_key.read_text(encoding="utf-8")
        return SshGuest(
            machine.ssh_port,
            self._image.ssh_key,
            host_key,
            watched=machine,
        )


class CustomImage:
    """A user's disk image, raw or qcow2, with an sshd, a compiler and kernel headers.

    It is never written, because the guest works on a temporary copy. The cache keeps the module and
    programs by kernel and sources, so that the next boot only copies them.
    """

    can_be_saved = False

    def __init__(self, path: Path, key: Path) -> None:
        for what, file in (("disk image", path), ("SSH key", key)):
            if not file.is_file():
                raise UsageError(f"the {what} {file} does not exist, or is not a file")
        self.name = path.name
        self._path = path
        self._key = key

    def kernel_code(self, wanted: KernelFilter, vmlinux: Path | None) -> None:
        """See :class:`GuestImage`. The kernel is inside the image, which cannot be read."""

    @property
    def ssh_key(self) -> Path:
        """See :class:`GuestImage`."""
        return self._key

    def check_key(self) -> None:
        """See :class:`GuestImage`."""
        from bridge.guest.ssh import private_key

        private_key(self._key)

    def machine_config(self, settings: Settings, accelerator: Accelerator) -> MachineConfig:
        """See :class:`GuestImage`."""
        return replace(
            _machine(settings, accelerator),
            kernel=settings.kernel,
            initrd=settings.initrd,
            cmdline=settings.append,
            image=self._path,
            channel=False,
        )

    def bring_up(
        self, machine: Machine, stack: ExitStack, before_module: BeforeModule
    ) -> tuple[Guest, Ready]:
        """See :class:`GuestImage`. For a new kernel it builds the module, which takes a while."""
        from bridge.guest.ssh import SshGuest

        started = time.monotonic()
        guest = SshGuest(machine.ssh_port, self._key, None, watched=machine)
        stack.callback(guest.close)
        seconds = machine.config.boot_seconds
        try:
            guest.connect(timeout=seconds)
        except GuestSetupError as error:
            machine.check()
            raise BootTimeoutError(
                f"the guest's sshd was not usable after {seconds:g} s: {error.message}",
                evidence=machine.console.tail(_EVIDENCE_LINES) or "(the console is empty)",
                hint="allow more time with --boot-timeout SECONDS; the image needs sshd, and a "
                "console on ttyS0",
            ) from error
        kernel = guest.run(["uname", "-r"], check=True).text.strip()
        self._install(guest, kernel)
        before_module(guest, kernel)
        self._load(guest, kernel)
        device = self._device(guest)
        uptime, memory = self._figures(guest)
        ready = Ready(kernel, device, uptime, memory, time.monotonic() - started)
        machine.adopt_ready(ready)
        return guest, ready

    def _install(self, guest: Guest, kernel: str) -> None:
        sources = Sources.find()
        version = guest.run(["uname", "-v", "-m"], check=True).text.strip()
        digest = hashlib.sha256(f"{kernel} {version}".encode())
        files = sources.agent_files()
        for name, path in files:
            digest.update(name.encode() + b"\0" + path.read_bytes())
        cached = cache_directory() / "guests" / f"{kernel}-{digest.hexdigest()[:16]}"
        guest.run(["mkdir", "-p", _LIBRARY_HOME, "/run/kcov-bridge"], check=True)
        made = (
            (_MODULE, "/tmp", 0o600),
            (_PROGRAM, _PROGRAM_HOME, 0o755),
            (_LIBRARY, _LIBRARY_HOME, 0o644),
        )
        if all((cached / Path(name).name).is_file() for name, _, _ in made):
            for name, home, mode in made:
                base = Path(name).name
                guest.put(cached / base, f"{home}/{base}", mode)
            return
        self._build(guest, kernel, files)
        for name, home, mode in made:
            guest.run(["install", "-m", f"{mode:o}", f"{_BUILT}/{name}", home], check=True)
        try:
            cache_folder(cached.parent.name)
            with cache_errors("the guest's module"), atomic_output(cached) as part:
                part.mkdir()
                for name, _, _ in made:
                    guest.get(f"{_BUILT}/{name}", part / Path(name).name)
        except (CacheError, UsageError) as error:
            logger.warning("cannot cache the module, so each guest builds it: %s", error.message)

    @staticmethod
    def _load(guest: Guest, kernel: str) -> None:
        loaded = guest.run(["insmod", f"/tmp/{Path(_MODULE).name}"])
        if loaded.exit_status:
            said = guest.run("dmesg | tail -n 8").stdout
            raise GuestSetupError(
                f"the module cannot be loaded into the guest's kernel {kernel}",
                evidence=(loaded.stderr + said).decode(errors="replace"),
            )

    @staticmethod
    def _build(guest: Guest, kernel: str, files: list[tuple[str, Path]]) -> None:
        logger.info("building the module for %s in the guest, once", kernel)
        guest.run(f"mkdir -p {_BUILT}/agent {_BUILT}/module", check=True)
        for name, path in files:
            guest.put(path, f"{_BUILT}/{name}")
        tree = shlex.quote(_BUILD_TREE.format(kernel=kernel))
        script = (
            f"cd {_BUILT} && "
            f"make -C module KDIR={tree} ONE_UNIT=1 modules && "
            "make -C agent kcov-exec libkcovexec.so"
        )
        result = guest.run(script, timeout=_BUILD_SECONDS)
        if result.exit_status:
            raise GuestSetupError(
                f"the module could not be built in the guest for its kernel {kernel}",
                evidence=(result.stdout + result.stderr)[-4096:].decode(errors="replace"),
                hint=f"the image needs make, gcc, libc6-dev and linux-headers-{kernel}",
            )

    @staticmethod
    def _device(guest: Guest) -> str:
        script = (
            "[ -e /sys/kernel/debug/tracing ] || mount -t debugfs debugfs /sys/kernel/debug; "
            "for f in /sys/kernel/debug/kcov_bridge /sys/kernel/debug/kcov /dev/kcov; do "
            '[ -e "$f" ] && echo "$f" && exit 0; done; exit 1'
        )
        try:
            return guest.run(script, check=True).text.strip()
        except GuestSetupError as error:
            raise GuestSetupError("the module made no kcov device in the guest") from error

    @staticmethod
    def _figures(guest: Guest) -> tuple[int, int]:
        """Return the uptime in milliseconds and the available memory in KiB."""
        text = guest.run("cat /proc/uptime; grep MemAvailable /proc/meminfo").text.split()
        try:
            return int(float(text[0]) * 1000), int(text[text.index("MemAvailable:") + 1])
        except (ValueError, IndexError):
            return 0, 0
