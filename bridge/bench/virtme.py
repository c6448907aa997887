# SPDX-License-Identifier: Apache-2.0
"""The baseline of "ready": virtme-ng, which boots a kernel on a copy of the host's system.

It boots the image's own kernel and modules, under the same accelerator and with as much memory. It
is an extra (``pip install 'kcov-bridge[bench]'``), and needs the host's packages of the kind
"bench" in ``debian-packages.txt``. Without udev its guest finds no port to answer on: the answer
is lost on the console, and ``vng`` ends with status 255.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO

from bridge.bench.commands import seconds_to_answer
from bridge.errors import InfrastructureError, MissingDependencyError
from bridge.guest.images import Image
from bridge.session.session import Session
from bridge.util.packages import debian_packages, found

__all__ = ["Virtme"]

_ANSWER = "answered-by-virtme"
_SECONDS = 240.0
_MODULES = "/usr/lib/modules"


class Virtme:
    """virtme-ng, ready to boot a session's kernel any number of times; a context manager.

    Entering it reads the modules from the session's guest.

    Raises:
        MissingDependencyError: virtme-ng, or a package that it needs, is missing.
    """

    def __init__(self, session: Session, image: Image) -> None:
        beside = Path(sys.executable).with_name("vng")
        program = str(beside) if beside.is_file() else shutil.which("vng")
        if program is None:
            raise MissingDependencyError(
                "virtme-ng is not installed", hint="pip install 'kcov-bridge[bench]'"
            )
        missing = [each for each in debian_packages("bench") if found(each.probe) is None]
        if missing:
            names = ", ".join(each.name for each in missing)
            raise MissingDependencyError(
                f"virtme-ng needs Debian packages that are missing: {names}",
                hint="kcov-bridge setup --bench",
            )
        self._program = program
        self._session = session
        self._image = image
        self._stack = ExitStack()
        self._kernel: Path

    def __enter__(self) -> Virtme:
        with ExitStack() as stack:
            tree = Path(stack.enter_context(TemporaryDirectory(prefix="kcov-bridge-bench-")))
            (tree / "boot").mkdir()
            # virtme-ng finds the modules beside the kernel, and the release in the kernel's name.
            self._kernel = tree / "boot" / f"vmlinuz-{self._image.kernel_release}"
            shutil.copyfile(self._image.vmlinuz, self._kernel)
            with TemporaryFile() as archive:
                self._session.guest.run(
                    ["tar", "-C", _MODULES, "-cf", "-", self._image.kernel_release],
                    stdout=archive.write,
                    capture=0,
                    check=True,
                )
                archive.seek(0)
                _unpack(archive, tree / "lib" / "modules")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def boot(self) -> float:
        """Return the seconds from the start of virtme-ng until a command in the guest answers.

        Raises:
            InfrastructureError: there is no answer.
        """
        accelerator, settings = self._session.accelerator, self._session.settings
        assert accelerator is not None
        command = [
            *(self._program, "--run", str(self._kernel), "--user", "root"),
            *("--cpus", str(settings.cpus), "--memory", f"{settings.memory}M"),
            *([] if accelerator.name == "kvm" else ["--disable-kvm"]),
            *("--exec", f"echo {_ANSWER}"),
        ]
        path = os.pathsep.join([str(Path(self._program).parent), os.environ.get("PATH", "")])
        try:
            return seconds_to_answer(
                command, _ANSWER.encode(), timeout=_SECONDS, env={**os.environ, "PATH": path}
            )
        except InfrastructureError as error:
            raise InfrastructureError(
                "virtme-ng did not boot the kernel", evidence=error.report()
            ) from error


def _unpack(archive: IO[bytes], to: Path) -> None:
    """Unpack the plain files of an archive that a guest made, only below ``to``."""
    with tarfile.open(fileobj=archive) as tar:
        for member in tar:
            path = Path(os.path.normpath(to / member.name))
            data = tar.extractfile(member) if member.isfile() else None
            if data is None:
                continue
            if not path.is_relative_to(to):
                raise InfrastructureError(f"the guest sent a file with the name {member.name!r}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(data, file)
