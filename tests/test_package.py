# SPDX-License-Identifier: Apache-2.0
"""The wheel and the source distribution: what is in them, and that it is all that Python needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from bridge.guest.images import build
from bridge.guest.images.store import base_directory
from bridge.util.cache import cache_directory
from tests.support import ROOT, sources

pytestmark = pytest.mark.vm

COMPILED = re.compile(r"bridge/(?:\w+/)+compiled\..*\.so")


def _call(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command away from the checkout, without what this process's environment says."""
    outer = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV"}
    environment = {key: text for key, text in os.environ.items() if key not in outer}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def _copy_of_the_sources(to: Path) -> Path:
    for path in sources():
        target = to / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return to


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the source distribution, and the wheel that was built from it."""
    directory = tmp_path_factory.mktemp("package")
    tree = _copy_of_the_sources(directory / "tree")
    # With the tools of this environment; pip makes one of its own for `plain_wheel`.
    make = (sys.executable, "-m", "build", "--no-isolation", "--outdir", directory / "dist")
    # What the wheel holds is tested here, not how fast it is.
    _call(*make, tree, cwd=directory, env={"CFLAGS": "-O0"})
    return directory / "dist"


@pytest.fixture(scope="module")
def sdist(distributions: Path) -> Path:
    return next(distributions.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    return next(distributions.glob("*.whl"))


@pytest.fixture(scope="module")
def quick_start(wheel: Path, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """What the README's quick start prints in an empty directory, the wheel in the place of a
    package from a registry."""
    build()
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page.split("## Quick start as a command\n")[1]
    (block, *_) = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block.count("pip install kcov-bridge ") == 1
    block = block.replace("pip install kcov-bridge ", f"pip install --quiet {wheel} ")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return _call("bash", "-euo", "pipefail", "-c", block, cwd=elsewhere, env={"PATH": path})


@pytest.fixture(scope="module")
def programs(quick_start: object, elsewhere: Path) -> Path:
    """The ``bin`` of the fresh virtual environment into which it installs the wheel."""
    return elsewhere / "venv" / "bin"


def _tracked() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in sources()}


def test_sdist_holds_what_the_project_tracks(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - made == _tracked()


def test_wheel_holds_package_guest_and_images(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {name for name in _tracked() if name.startswith("bridge/")}
    expected |= {
        f"bridge/_data/{name}" for name in _tracked() if name.startswith(("guest/", "images/"))
    }
    held = {name for name in names if ".dist-info/" not in name and not COMPILED.fullmatch(name)}
    assert held == expected


def test_wheel_has_the_compiled_part_where_a_compiler_is(wheel: Path) -> None:
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("this Python has no headers: install its -dev package")
    with zipfile.ZipFile(wheel) as archive:
        assert any(COMPILED.fullmatch(name) for name in archive.namelist())
    assert wheel.name.endswith("linux_x86_64.whl")


@pytest.fixture(scope="module")
def plain_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip makes of the source distribution where no compiler works."""
    directory = tmp_path_factory.mktemp("plain")
    env = {"CC": "/bin/false", "LDSHARED": "/bin/false"}
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    _call(*pip, "wheel", "--no-deps", "--wheel-dir", directory, sdist, cwd=directory, env=env)
    return next(directory.glob("*.whl"))


def test_wheel_built_without_a_compiler_is_python_alone(plain_wheel: Path) -> None:
    with zipfile.ZipFile(plain_wheel) as archive:
        names = archive.namelist()
    assert "bridge/device/fastpath/plain.py" in names
    assert not any(COMPILED.fullmatch(name) for name in names)


def test_metadata_names_every_licence_and_ships_its_text(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        head = Parser().parsestr(archive.read(metadata).decode())
        texts = {
            name: archive.read(f"{metadata.removesuffix('METADATA')}licenses/{name}").decode()
            for name in head.get_all("License-File", [])
        }
    named = set(re.split(r" AND ", head["License-Expression"]))
    used = set()
    for path in sources():
        relative = path.relative_to(ROOT).as_posix()
        first = path.read_bytes()[:400].decode(errors="replace")
        match = re.search(r"SPDX-License-Identifier: ([\w.+-]+)", first)
        if match and relative.startswith(("bridge/", "guest/", "images/")):
            used.add("GPL-2.0-only" if match.group(1) == "GPL-2.0" else match.group(1))
    assert named == used
    for name in ("LICENSE", "guest/module/COPYING", "bridge/sources/guest_kernel/tcg/COPYING"):
        assert texts[name] == (ROOT / name).read_text()
    assert "Operating System :: POSIX :: Linux" in head.get_all("Classifier", [])


def test_readme_quick_start_works_in_an_empty_directory(
    quick_start: subprocess.CompletedProcess[str], elsewhere: Path
) -> None:
    summary = json.loads((elsewhere / "build" / "run" / "summary.json").read_text())
    assert summary["exit_status"] == 0, quick_start.stderr
    assert summary["pcs"] > 100
    assert summary["lost_pcs"] == 0
    places = quick_start.stdout.splitlines()[-10:]
    assert places[0].startswith("0x")
    assert re.search(r":\d+\.\d+,|\+0x", places[1])


def test_installed_wheel_finds_the_checkouts_image(programs: Path, elsewhere: Path) -> None:
    """The same sources have the same fingerprint, so nothing is built again."""
    path = _call(programs / "kcov-bridge", "image", "path", cwd=elsewhere).stdout.strip()
    assert Path(path) == build().directory


LIBRARY = """
import sys, bridge
with bridge.boot(source="python") as guest:
    result = guest.kcov(["cat", "/mnt/target/README"])
    assert result.pcs and guest.symbolize(result.pcs[0])
print(bridge.__file__)
"""


def test_installed_wheel_works_as_a_library(programs: Path, elsewhere: Path) -> None:
    done = _call(programs / "python", "-c", LIBRARY, cwd=elsewhere)
    assert Path(done.stdout.strip()).is_relative_to(elsewhere)


def test_installed_wheel_builds_an_image(programs: Path, elsewhere: Path, tmp_path: Path) -> None:
    """In a cache that has the packages (the slow part) already, and no image."""
    image = build()
    base = base_directory(image.recipe, image.base_fingerprint)
    kept = base.relative_to(cache_directory())
    (tmp_path / kept).parent.mkdir(parents=True)
    copy = ("cp", "--archive", "--reflink=auto", base, tmp_path / kept)
    _call(*copy, cwd=tmp_path)
    env = {"KCOV_BRIDGE_CACHE": str(tmp_path), "KCOV_BRIDGE_SNAPSHOT": "0"}
    done = _call(programs / "kcov-bridge", "image", "build", cwd=elsewhere, env=env)
    built = Path(done.stdout.strip())
    assert built.name == image.name
    assert (built / "kcov_bridge.ko").read_bytes() == (
        image.directory / "kcov_bridge.ko"
    ).read_bytes()


def test_installed_wheel_measures(programs: Path, elsewhere: Path) -> None:
    bench = (programs / "kcov-bridge", "bench", "--quick", "--only", "append")
    done = _call(*bench, "-o", elsewhere / "bench.json", cwd=elsewhere)
    assert "append" in done.stdout
    assert json.loads((elsewhere / "bench.json").read_text())["format"] == "kcov-bridge-bench"


def test_installed_sdist_has_what_the_wheel_has(
    programs: Path, plain_wheel: Path, tmp_path: Path
) -> None:
    """Beside the packages that it needs, which are installed with the other wheel."""
    site = tmp_path / "site"
    pip = (programs / "python", "-m", "pip", "--disable-pip-version-check")
    _call(*pip, "install", "--quiet", "--no-deps", "--target", site, plain_wheel, cwd=tmp_path)
    env = {"PYTHONPATH": str(site)}
    show = "import bridge.util.resources as r; print(r.source_root())"
    root = Path(_call(programs / "python", "-c", show, cwd=tmp_path, env=env).stdout.strip())
    assert root.is_relative_to(site)
    for name in _tracked():
        if name.startswith(("guest/", "images/")):
            assert (root / name).read_bytes() == (ROOT / name).read_bytes()
    assert (
        "kcov-bridge " in _call(site / "bin/kcov-bridge", "--version", cwd=tmp_path, env=env).stdout
    )
