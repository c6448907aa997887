# SPDX-License-Identifier: Apache-2.0
"""The module compiles for kernels that are configured in another way than Debian's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.guest.images.builder import _Base, _BuildRoot, _recipe_lock
from bridge.guest.images.recipe import Sources
from bridge.guest.images.store import base_directory
from bridge.util.commands import Commands, Phases
from tests.support.programs import guest_image

pytestmark = pytest.mark.vm  # no machine, but an image's build root

MODULE = Path(__file__).resolve().parents[2] / "guest" / "module"
_OPTION = re.compile(r"(CONFIG_\w+)=(.+)|# (CONFIG_\w+) is not set")


@pytest.fixture
def build_root(tmp_path: Path) -> Iterator[_BuildRoot]:
    """The build root of the tests' image, locked; its commands' output is in ``log``."""
    image = guest_image()
    base = _Base.load(base_directory(image.recipe, image.base_fingerprint), image.base_fingerprint)
    assert base is not None
    with _recipe_lock(image.recipe, print) as fd:
        yield _BuildRoot(base.build_root, Commands(tmp_path / "log", Phases(print), (fd,)))


def headers(build_root: _BuildRoot) -> Path:
    """The build tree of the guest's kernel, in the build root."""
    (tree,) = (build_root.root / "usr" / "src").glob("linux-headers-*-amd64")
    return tree


def configure(tree: Path, changes: dict[str, str | None]) -> None:
    """Give a build tree other options, in the two files that compiling a module reads."""
    for path, form in (
        (tree / "include/config/auto.conf", "{0}={1}"),
        (tree / "include/generated/autoconf.h", "#define {2} {3}"),
    ):
        kept = [
            line
            for line in path.read_text().splitlines()
            if not (found := re.search(r"CONFIG_\w+", line))
            or found[0].removesuffix("_MODULE") not in changes
        ]
        for name, value in changes.items():
            if value is not None:
                macro = f"{name}_MODULE" if value == "m" else name
                kept.append(form.format(name, value, macro, "1" if value in "ym" else value))
        path.write_text("\n".join(kept) + "\n")


def compile_module(
    build_root: _BuildRoot, changes: dict[str, str | None], out: Path, *arguments: str
) -> None:
    """Compile the module for the guest's kernel with other options; ``out`` gets its objects."""
    tree = headers(build_root)
    with build_root.workspace() as work:
        shutil.copytree(tree, work / "tree", symlinks=True)
        # Links of the tree lead out of it by relative paths.
        for link in (work / "tree").iterdir():
            if link.is_symlink():
                target = os.path.normpath(tree / link.readlink())
                link.unlink()
                link.symlink_to("/" + os.path.relpath(target, build_root.root))
        configure(work / "tree", changes)
        (work / "module").mkdir()
        for name, path in Sources.find().agent_files():
            if name.startswith("module/"):
                shutil.copyfile(path, work / name)
        # The kernel's list of symbols is the original one's, so some are missing: no error.
        words = ["make", "-C", "/work/tree", "M=/work/module", "KBUILD_MODPOST_WARN=1", "modules"]
        words += arguments
        build_root.run(words, what="compiling the module")
        shutil.copyfile(work / "module" / "kcov_bridge.o", out)


def test_module_without_smp_compiles_without_a_warning(
    build_root: _BuildRoot, tmp_path: Path
) -> None:
    changes: dict[str, str | None] = {}
    for line in Path(__file__).with_name("nosmp.config").read_text().splitlines():
        if found := _OPTION.fullmatch(line):
            changes[found[1] or found[3]] = found[2]
    assert changes["CONFIG_SMP"] is None
    objects = tmp_path / "module.o"
    compile_module(build_root, changes, objects)
    log = (tmp_path / "log").read_text()
    assert "CC [M]  /work/module/watch.o" in log
    assert not re.search(r"(?<!modpost: )warning:", log, re.IGNORECASE)
    symbols = subprocess.run(["nm", objects], check=True, capture_output=True, text=True).stdout
    # The table of all processors' numbers, which the module reads where there are several.
    assert "x86_cpu_to_apicid" not in symbols


def test_module_as_one_unit_compiles_without_a_warning(
    build_root: _BuildRoot, tmp_path: Path
) -> None:
    compile_module(build_root, {}, tmp_path / "module.o", "ONE_UNIT=1")
    log = (tmp_path / "log").read_text()
    assert re.findall(r"CC \[M\]  /work/module/(\w+)\.o", log) == ["unit"]
    assert not re.search(r"(?<!modpost: )warning:", log, re.IGNORECASE)
    sources = (MODULE / "unit.c").read_text()
    named = set(re.findall(r'#include "(\w+\.c)"', sources))
    assert named == {path.name for path in MODULE.glob("*.c")} - {"unit.c"}
