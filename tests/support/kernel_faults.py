# SPDX-License-Identifier: Apache-2.0
"""A module that makes a guest's kernel complain."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bridge.guest.images import Image
from bridge.guest.images.builder import _Base, _BuildRoot, _recipe_lock
from bridge.guest.images.store import base_directory
from bridge.session.session import Session
from bridge.util.cache import cache_directory
from bridge.util.commands import Commands, Phases, print_progress
from tests.support.programs import guest_image

__all__ = ["SOURCES", "fault_module", "load_faults", "provoke"]

SOURCES = Path(__file__).resolve().parents[1] / "fuzz" / "kernel_faults"

_REMOTE = "/tmp/kernel_faults.ko"
_PROVOKE = "/sys/module/kernel_faults/parameters/provoke"


def fault_module(image: Image | None = None) -> Path:
    """Return ``kernel_faults.ko`` for the kernel of an image, compiled once and kept in the cache.

    Raises:
        ImageError: it does not compile; with the compiler's messages.
    """
    image = image or guest_image()
    base = _Base.load(base_directory(image.recipe, image.base_fingerprint), image.base_fingerprint)
    assert base is not None
    files = [SOURCES / name for name in ("Makefile", "kernel_faults.c")]
    made_of = hashlib.sha256(b"\0".join([base.fingerprint.encode(), *map(Path.read_bytes, files)]))
    folder = cache_directory() / "tests" / "programs"
    module = folder / f"kernel_faults-{made_of.hexdigest()[:16]}.ko"
    if module.is_file():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        fd = stack.enter_context(_recipe_lock(image.recipe, print_progress))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        commands = Commands(scratch / "log", Phases(print_progress), (fd,))
        build_root = _BuildRoot(base.build_root, commands)
        (tree,) = (build_root.root / "usr" / "src").glob("linux-headers-*-amd64")
        work = stack.enter_context(build_root.workspace())
        for file in files:
            shutil.copyfile(file, work / file.name)
        words = ["make", "-C", "/work", f"KDIR=/{tree.relative_to(build_root.root)}", "modules"]
        build_root.run(words, what="compiling kernel_faults.ko")
        made = scratch / module.name
        shutil.copyfile(work / "kernel_faults.ko", made)
        made.replace(module)
    return module


def load_faults(session: Session) -> None:
    """Load the module into a guest."""
    session.put(fault_module(), _REMOTE)
    session.guest.run(f"insmod {_REMOTE}", check=True, timeout=60)


def provoke(kind: str) -> str:
    """Return the line for the guest's shell that provokes a fault."""
    return f"echo {kind} >{_PROVOKE}"
