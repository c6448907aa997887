# SPDX-License-Identifier: Apache-2.0
"""Harnesses: what runs a test case in the guest.

A harness is named on the command line: ``files``, ``PATH.so`` or ``PATH.a`` with
``LLVMFuzzerTestOneInput``, ``python:MODULE:FUNCTION``, or a command after ``--``.
:meth:`Harness.parse` checks everything about it that can be known without a guest. The other half
of each form is a file ``guest/agent/harness-*.c``, which the runner in the guest consists of.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.config import Settings
from bridge.errors import UsageError
from bridge.fuzz.files_text import load_encoding, to_bytes, to_text
from bridge.fuzz.objects import SharedObject, check_archive, closure
from bridge.fuzz.python_module import find_function
from bridge.guest.guest_image import ProjectImage, find_guest_image
from bridge.guest.images import Image
from bridge.targets import MOUNT_POINT
from bridge.util.cache import cache_directory, cache_errors
from bridge.util.compile import COMPILER_REMEDY
from bridge.util.files import atomic_output, write_atomically
from bridge.util.resources import guest_directory

__all__ = ["GUEST_DIRECTORY", "RUNNER", "Harness", "HarnessFile"]

RUNNER = "kcov-runner"
"""The runner with the bundled harnesses; every image has it."""

GUEST_DIRECTORY = "/var/lib/kcov-bridge/harness"
"""Where the files of a harness lie in the guest. Not in /tmp, which each case has for itself."""

_FORMS = "it is files, PATH.so, PATH.a, python:MODULE:FUNCTION, or left out with a command after --"

_LINKED_SOURCES = ("kcov-runner.c", "harness-llvm.c", "scratch.c", "sweep.c")
"""Of ``guest/agent``: what an archive is linked with."""

_SEEDS = (
    "open f0 a rw|creat 0644\nwrite f0 100 7\nlseek f0 0 set\nread f0 200\nfstat f0\nclose f0\n",
    'mkdir d 0755\nopen f0 d/a rw|creat|excl 0600\nput f0 "text"\nrename d e replace\n',
    "open f0 a rw|creat 0644\nftruncate f0 65536\nmwrite f0 4096 100 1\nmsync f0 0 100 2\n",
    "open f0 a rw|creat 0644\nlink a b\nsymlink a c\nreadlink c\nunlink a\nstat b\nchmod b 0444\n",
    "open f0 a rw|creat 0644\nparallel\n0: write f0 65535 1\n1: truncate a 5\n2: stat a\njoin\n",
    "open f0 a r 0644\npread f0 4096 0\ngetdents f0\nsetxattr a user.a 10 1 set\nlistxattr a 99\n",
)
"""Of ``files``, for a campaign without a corpus. Without ``list``, which takes 50 times as long as
others: the engine executes each seed about ten times before it makes the first case."""

_SANITIZERS = ("libasan.so", "libclang_rt.asan", "libtsan.so", "libubsan.so")
"""Libraries that must be loaded before all others."""

_SANITIZER_OPTIONS = {
    # A finding is a signal then, and nothing is checked for leaks at the end of a persistent run.
    "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0",
    "UBSAN_OPTIONS": "abort_on_error=1:halt_on_error=1",
}


@dataclass(frozen=True)
class HarnessFile:
    """A file that a harness needs in the guest."""

    source: Path
    guest_path: str
    mode: int = 0o644


@dataclass(frozen=True)
class _Options:
    """What the forms can be told; :meth:`Harness.parse` describes them."""

    directory: str
    differential: bool
    ignore: tuple[str, ...]
    libraries: tuple[Path, ...]
    exit_status: bool


@dataclass(frozen=True)
class Harness:
    """What runs test cases in the guest: a :class:`bridge.fuzz.slot_events.SlotHarness`.

    Attributes:
        name: as on the command line, for people.
        arguments: the runner's, after the number of the lane.
        runner: the runner's program in the guest.
        files: to be put into the guest before the runner is started.
        readable: makes a case readable; None if its bytes are all that is known.
        seeds: cases to begin with where there is no corpus.
        tokens: pieces that cases consist of, for the engine's dictionary.
    """

    name: str
    arguments: tuple[str, ...]
    runner: str = RUNNER
    files: tuple[HarnessFile, ...] = ()
    readable: Callable[[bytes], str] | None = None
    seeds: tuple[bytes, ...] = ()
    tokens: tuple[bytes, ...] = ()

    @classmethod
    def parse(
        cls,
        spec: str | None,
        command: Sequence[str] = (),
        *,
        differential: bool = False,
        ignore: Sequence[str] = (),
        directory: str = MOUNT_POINT,
        libraries: Sequence[Path] = (),
        exit_status: bool = False,
        settings: Settings | None = None,
        image: Image | None = None,
    ) -> Harness:
        """Make a harness of what the command line says.

        Args:
            spec: the value of ``--harness``; None or empty for a command.
            command: the words after ``--``.
            differential: of ``files``: compare with a local file system.
            ignore: of ``files``: differences that are known (``CALL``, ``CALL.FIELD``,
                ``CALL=ERRNO``).
            directory: of ``files``: where the target is mounted.
            libraries: of ``PATH.so``: libraries, or directories of them, that it needs.
            exit_status: of a command: one that exits with a status other than 0 is a finding.
            settings: of the session; the image that they name is compared with what the harness
                needs.
            image: in place of the one of the settings. Without both, and for a disk image of the
                user's, less is known beforehand.

        Raises:
            UsageError: there is no such harness, or it cannot work in the guest.
            MissingDependencyError: a program or package for it is not installed.
            InfrastructureError: it could not be linked.
        """
        options = _Options(directory, differential, tuple(ignore), tuple(libraries), exit_status)
        if not spec:
            if not command:
                raise UsageError("there is no harness", hint=f"--harness: {_FORMS}")
            return _of_command(command, options)
        if command:
            raise UsageError(
                f"--harness {spec} and a command after -- are two harnesses",
                hint="leave out --harness: a command is a harness by itself",
            )
        if spec == "files":
            return _of_files(options)
        if options.differential or options.ignore:
            raise UsageError(
                "--differential and --ignore are only for the harness files",
                hint="leave them out, or take --harness files",
            )
        if spec.startswith("python:"):
            return _of_python(spec, image or _image_of(settings))
        path = Path(spec)
        if path.suffix not in (".so", ".a") and ".so." not in path.name:
            raise UsageError(f"{spec} is not a harness", hint=f"--harness: {_FORMS}")
        if not path.is_file():
            raise UsageError(f"{spec} is not a file", hint="compile it first, or check the path")
        if path.suffix == ".a":
            return _of_archive(path)
        return _of_shared_object(path, image or _image_of(settings), options)


def _image_of(settings: Settings | None) -> Image | None:
    if settings is None:
        return None
    image = find_guest_image(settings)
    return image.image if isinstance(image, ProjectImage) else None


def _of_files(options: _Options) -> Harness:
    words = ["files", options.directory]
    if options.differential:
        words.append("--differential")
    elif options.ignore:
        raise UsageError("--ignore is for --differential", hint="add --differential")
    for what in options.ignore:
        words += ["--ignore", what]
    encoding = load_encoding()
    separator = bytes([encoding.numbers["SEPARATOR"]])
    tokens = tuple(separator + bytes([number]) for number in range(len(encoding.calls)))
    return Harness(
        "files",
        tuple(words),
        readable=to_text,
        seeds=tuple(map(to_bytes, _SEEDS)),
        tokens=tokens,
    )


def _of_command(command: Sequence[str], options: _Options) -> Harness:
    if not command[0]:
        raise UsageError("the command after -- is empty", hint="write a program of the guest")
    strict = ("-e",) if options.exit_status else ()
    if command[0] == "-e":
        raise UsageError("-e is not a program", hint="write the program of the guest after --")
    return Harness("command", ("command", *strict, *command))


def _of_python(spec: str, image: Image | None) -> Harness:
    words = spec.split(":")
    if len(words) != 3 or not all(words):
        raise UsageError(f"{spec} does not name a function", hint="write python:MODULE:FUNCTION")
    _, module, function = words
    if image is not None and not {"python3", "python3-minimal"} & set(image.packages):
        raise UsageError(
            f"the guest image {image.name} has no python3, which {spec} needs",
            hint="build one that has it: kcov-bridge image build --include python3",
        )
    script = "harness_python.py"
    files = [HarnessFile(guest_directory() / "agent" / script, f"{GUEST_DIRECTORY}/{script}")]
    for path, name in find_function(module, function):
        files.append(HarnessFile(path, f"{GUEST_DIRECTORY}/modules/{name}"))
    arguments = ("python", "python3", f"{GUEST_DIRECTORY}/{script}", module, function)
    return Harness(spec, arguments, files=tuple(files))


def _of_shared_object(path: Path, image: Image | None, options: _Options) -> Harness:
    harness = SharedObject.load(path)
    harness.require_symbol("LLVMFuzzerTestOneInput")
    libraries = closure(harness, options.libraries)
    if image is not None:
        for item in (harness, *libraries):
            item.require_libc(image.packages.get("libc6", ""), image.name)
    files = tuple(
        HarnessFile(item.path, f"{GUEST_DIRECTORY}/{name}", 0o755)
        for name, item in ((path.name, harness), *((item.name, item) for item in libraries))
    )
    runner = RUNNER
    if libraries:
        runner = f"{GUEST_DIRECTORY}/runner"
        first = [item.name for item in libraries if item.name.startswith(_SANITIZERS)]
        files += (HarnessFile(_wrapper(first), runner, 0o755),)
    return Harness(str(path), ("llvm", f"{GUEST_DIRECTORY}/{path.name}"), runner, files)


def _wrapper(first: Sequence[str]) -> Path:
    """Return a script that runs the runner with the harness's own libraries.

    Args:
        first: the libraries that are loaded before all others.
    """
    lines = ["#!/bin/sh", f"export LD_LIBRARY_PATH={GUEST_DIRECTORY}"]
    if first:
        lines += [f"export {name}={value}" for name, value in _SANITIZER_OPTIONS.items()]
        preload = ":".join(f"{GUEST_DIRECTORY}/{name}" for name in first)
        lines.append(f"export LD_PRELOAD={preload}")
    text = "\n".join((*lines, f'exec {RUNNER} "$@"\n'))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_directory() / "harnesses" / f"runner-{digest}"
    if not path.is_file():
        with cache_errors("the runner of the harness"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    return path


def _of_archive(path: Path) -> Harness:
    check_archive(path, "LLVMFuzzerTestOneInput")
    runner = f"{GUEST_DIRECTORY}/runner"
    return Harness(str(path), ("llvm",), runner, (HarnessFile(_linked(path), runner, 0o755),))


def _linked(archive: Path) -> Path:
    """Return the runner with an archive's harness, from the cache if both are the same."""
    agent = guest_directory() / "agent"
    sources = [agent / name for name in _LINKED_SOURCES]
    digest = hashlib.sha256(archive.read_bytes())
    for file in (*sources, *sorted(agent.glob("*.h"))):
        digest.update(file.read_bytes())
    output = cache_directory() / "harnesses" / f"{archive.stem}-{digest.hexdigest()[:16]}"
    if output.is_file():
        return output
    with cache_errors("the runner of the harness"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(output) as part:
            _link(archive, sources, part)
    return output


def _link(archive: Path, sources: Sequence[Path], output: Path) -> None:
    # Static: the guest's C library may be older than the one of this machine.
    flags = ("-O2", "-std=gnu11", "-static", "-pthread", "-DHARNESS_LINKED")
    evidence = ""
    for libraries in (("-lm",), ("-lstdc++", "-lm")):
        try:
            done = subprocess.run(
                ["cc", *flags, "-o", output, *sources, archive, *libraries],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except FileNotFoundError as error:
            raise UsageError(
                f"{archive} cannot be linked: this machine has no C compiler", hint=COMPILER_REMEDY
            ) from error
        if done.returncode == 0:
            return
        evidence = evidence or done.stderr
    raise UsageError(
        f"{archive} cannot be linked with the runner",
        evidence=evidence[-4096:],
        hint="put the objects that it needs into the archive (ar), or make a shared object",
    )
