# SPDX-License-Identifier: Apache-2.0
"""The QEMU of another Debian release, unpacked into the cache with the libraries it needs.

    KCOV_BRIDGE_QEMU=$(python -m tests.support.debian_qemu sid) make test ARGS=tests/system

Nothing of it is installed, and none of its libraries is used by anything else.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from bridge.util.cache import cache_folder, locked

__all__ = ["debian_qemu"]

_WRAPPER = """#!/bin/sh
exec {root}/usr/lib64/ld-linux-x86-64.so.2 --argv0 qemu-system-x86_64 \\
	--library-path {root}/usr/lib/x86_64-linux-gnu {root}/usr/bin/qemu-system-x86_64 \\
	-L {root}/usr/share/qemu -L {root}/usr/share/seabios -L {root}/usr/lib/ipxe/qemu "$@"
"""


def debian_qemu(release: str) -> Path:
    """Return a program that is the release's QEMU; the first time takes a minute at most.

    Args:
        release: a name or a suite: ``trixie``, ``sid``.

    Raises:
        subprocess.CalledProcessError: it cannot be downloaded or unpacked; stderr says why.
    """
    folder = cache_folder("tests")
    root = folder / f"qemu-{release}"
    program = root / "qemu-system-x86_64"
    with locked(folder / f"qemu-{release}.lock", f"the QEMU of {release}", print):
        if not program.exists():
            with tempfile.TemporaryDirectory(prefix=f".qemu-{release}-", dir=folder) as scratch:
                _unpack(release, Path(scratch))
                made = Path(scratch) / "root"
                made.rename(root)
            wrapper = root / "wrapper"
            wrapper.write_text(_WRAPPER.format(root=shlex.quote(str(root))))
            wrapper.chmod(0o755)
            wrapper.rename(program)
    return program


def _unpack(release: str, scratch: Path) -> None:
    scratch.chmod(0o755)  # a user namespace's root is another user
    archive, root = scratch / "packages.tar", scratch / "root"
    mirror = os.environ.get("KCOV_BRIDGE_MIRROR")
    subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--variant=extract", "--format=tar"),
            *("--include=qemu-system-x86", "--aptopt=APT::Install-Recommends false"),
            # A release that nobody publishes any more has an index that has expired.
            "--aptopt=Acquire::Check-Valid-Until false",
            *(release, str(archive)),
            *([mirror] if mirror else []),
        ],
        check=True,
        env={**os.environ, "TMPDIR": str(scratch), "LC_ALL": "C"},
        stdout=sys.stderr,
    )
    root.mkdir()
    subprocess.run(
        ["tar", "-xf", archive, "-C", root, "--no-same-owner", "./usr"],
        check=True,
        stdout=sys.stderr,
    )
    archive.unlink()


if __name__ == "__main__":
    print(debian_qemu(sys.argv[1]))
