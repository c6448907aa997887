# SPDX-License-Identifier: Apache-2.0
"""Images: recipes and fingerprints, archives, the cache, the lock, the command, and real builds."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.cli import image as image_command
from bridge.config import Settings, load
from bridge.errors import ImageError, MissingDependencyError, UsageError
from bridge.guest.guest_image import find_guest_image
from bridge.guest.images import (
    Image,
    build,
    compile_for_guest,
    find,
    list_images,
    remove,
)
from bridge.guest.images.archive import EPOCH, Entry, normalise_tar, write_newc
from bridge.guest.images.recipe import Recipe, Sources, is_recipe, recipes
from bridge.guest.images.store import (
    FILES,
    FileRecord,
    base_directory,
    remove_tree,
    resolve,
    sha256_of,
)
from bridge.util.cache import cache_directory, lock_file, locked

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))
    return cache_directory()


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """A copy of what images are made of, to be changed."""
    for part in ("images", "guest"):
        shutil.copytree(ROOT / part, tmp_path / "tree" / part)
    return Sources(tmp_path / "tree")


def fake_image(cache: Path, name: str = "bookworm-000000000000") -> Image:
    """Something that has all an image's files."""
    recipe, _, fingerprint = name.rpartition("-")
    directory = cache / "images" / name
    directory.mkdir(parents=True)
    for file in FILES:
        (directory / file).write_bytes(file.encode())
    image = Image(
        directory=directory,
        recipe=recipe,
        suite=recipe,
        fingerprint=fingerprint,
        base_fingerprint="1",
        agent_fingerprint="2",
        kernel_release="6.1.0-0-amd64",
        kernel_version="6.1.0-1",
        include=("file",),
        modules=("ext4",),
        packages={"file": "1"},
        files={f: FileRecord(len(f), sha256_of(directory / f)) for f in FILES},
    )
    (directory / "image.json").write_text(json.dumps(image.manifest()))
    return image


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    image_command.add_arguments(parser)
    return image_command.run(parser.parse_args(words))


# Recipes and fingerprints


def test_the_recipes_of_the_tree_can_be_read() -> None:
    names = recipes(ROOT / "images")
    assert "bookworm" in names
    for name in names:
        recipe = Recipe.load(name, ROOT / "images")
        assert "openssh-server" in recipe.packages
        assert "virtio_blk" in recipe.boot_modules


def test_an_unknown_recipe_names_those_that_exist() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load("potato", ROOT / "images")
    assert "bookworm" in caught.value.hint


def test_a_recipe_by_path_is_one_of_its_own(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (sources.recipes / "bookworm.toml").read_text()
    (tmp_path / "mine.toml").write_text(
        text.replace("boot_modules = [", 'boot_modules = [ "fuse",')
    )
    plain = Recipe.load("bookworm", sources.recipes)
    mine = Recipe.load(str(tmp_path / "mine.toml"), sources.recipes)
    assert (mine.name, mine.suite) == ("mine", "bookworm")
    assert mine.boot_modules == ("fuse", *plain.boot_modules)
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("./mine.toml", sources.recipes) == mine
    assert is_recipe("./mine.toml")
    # Found by its contents, in a cache that has none.
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))
    assert find("./mine.toml") is None
    assert load({"image": "mine.toml"}, environ={}).image == str(tmp_path / "mine.toml")


@pytest.mark.parametrize("name", ["missing.toml", "./dir.toml", "Odd Name.toml"])
def test_a_recipe_by_path_that_cannot_be_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir.toml").mkdir()
    (tmp_path / "Odd Name.toml").write_text("")
    with pytest.raises(UsageError):
        Recipe.load(name, ROOT / "images")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text + "\nextra = 1\n", "extra"),
        (lambda text: text.replace('suite = "bookworm"', ""), "suite"),
        (lambda text: text.replace('suite = "bookworm"', 'suite = ["bookworm"]'), "suite"),
        (lambda text: text.replace('suite = "bookworm"', "suite = 12"), "suite"),
        (lambda text: text + "\n]", "cannot be read"),
        (lambda text: text + '\nsource_modules = ["/etc/../passwd.c"]\n', "no file in C"),
        (lambda text: text + '\nsource_modules = ["drivers/x.c; reboot"]\n', "no file in C"),
    ],
)
def test_a_broken_recipe_is_an_error(
    sources: Sources, change: Callable[[str], str], said: str
) -> None:
    path = sources.recipes / "bookworm.toml"
    path.write_text(change(path.read_text()))
    with pytest.raises(ImageError, match=said):
        Recipe.load("bookworm", sources.recipes)


@pytest.mark.parametrize("name", ["", "-x", "a b", "UPPER", "a;b", "a,b"])
def test_what_is_no_package_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Recipe.load("bookworm", ROOT / "images").extended([name])
    with pytest.raises(UsageError, match="kernel module"):
        Recipe.load("bookworm", ROOT / "images").extended(modules=[f"{name}/"])


def test_a_base_of_an_earlier_format_is_not_used(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load("bookworm", sources.recipes)
    now = sources.base_fingerprint(recipe)
    monkeypatch.setattr("bridge.guest.images.recipe.BASE_FORMAT", 1)
    assert sources.base_fingerprint(recipe) != now


def test_fingerprints_have_two_levels(sources: Sources) -> None:
    recipe = Recipe.load("bookworm", sources.recipes)
    base, agent = sources.base_fingerprint(recipe), sources.agent_fingerprint()
    whole = sources.fingerprint(recipe)
    assert len({base, agent, whole}) == 3

    with (sources.root / "guest" / "agent" / "init.c").open("a") as file:
        file.write("\n")
    assert sources.base_fingerprint(recipe) == base
    assert sources.agent_fingerprint() != agent
    assert sources.fingerprint(recipe) != whole

    agent = sources.agent_fingerprint()
    with (sources.root_files / "etc" / "hosts").open("a") as file:
        file.write("\n")
    assert sources.base_fingerprint(recipe) != base
    assert sources.agent_fingerprint() == agent

    base = sources.base_fingerprint(recipe)
    # A key that a recipe leaves out does not count.
    assert recipe.source_modules == ()
    path = sources.recipes / "bookworm.toml"
    path.write_text(path.read_text() + '\nsource_modules = ["drivers/usb/raw.c"]\n')
    assert sources.base_fingerprint(Recipe.load("bookworm", sources.recipes)) != base
    assert sources.base_fingerprint(recipe.extended(["file"])) != base
    assert sources.base_fingerprint(recipe.extended(modules=["xfs"])) != base
    # An included package that is there anyway changes nothing.
    assert sources.base_fingerprint(recipe.extended(["kmod"], ["nbd"])) == base


def test_what_compilers_leave_behind_does_not_count(sources: Sources) -> None:
    before = sources.agent_fingerprint()
    for name in ("kcov_bridge.o", "kcov_bridge.ko", "kcov_bridge.mod.c", ".kcov_bridge.o.cmd"):
        (sources.root / "guest" / "module" / name).write_text("x")
    assert sources.agent_fingerprint() == before


# Archives


def read_newc(data: bytes) -> list[list[tuple[str, int, bytes]]]:
    """The archives in an initramfs, read as the kernel's buffer-format document says."""
    archives: list[list[tuple[str, int, bytes]]] = [[]]
    at = 0
    while at < len(data):
        assert data[at : at + 6] == b"070701", at
        field = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = field[1], field[6], field[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at += 110 + name_size + -(110 + name_size) % 4
        if name == b"TRAILER!!!\0":
            archives.append([])
        else:
            archives[-1].append((name[:-1].decode(), mode, data[at : at + size]))
        at += size + -size % 4
    assert at == len(data)
    assert archives.pop() == []
    return archives


def test_newc_archives_can_be_joined() -> None:
    out = io.BytesIO()
    write_newc(out, [Entry.file("a/b/odd", b"12345", 0o755), Entry.link("a/link", "b/odd")])
    write_newc(out, [Entry.file("second", b"2", 0o600), Entry.directory("d", 0o700)])
    first, second = read_newc(out.getvalue())
    assert first == [
        ("a", 0o040755, b""),
        ("a/b", 0o040755, b""),
        ("a/b/odd", 0o100755, b"12345"),
        ("a/link", 0o120777, b"b/odd"),
    ]
    assert second == [("d", 0o040700, b""), ("second", 0o100600, b"2")]


def test_newc_is_the_same_in_any_order() -> None:
    entries = [Entry.file("b", b"1"), Entry.file("a/c", b"2"), Entry.directory("a")]
    one, other = io.BytesIO(), io.BytesIO()
    write_newc(one, entries)
    write_newc(other, reversed(entries))
    assert one.getvalue() == other.getvalue()


def make_tar(order: int, mtime: int) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        infos = []
        for name in ("./bin", "./etc/shadow", "./etc/keep", "./var/log/x", "./z"):
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            infos.append(info)
        infos[0].type, infos[0].linkname = tarfile.SYMTYPE, "usr/bin"
        for info in infos[1:4]:
            info.size = 4
        infos[3].mode = 0o640
        for info in infos[:4][::order]:
            tar.addfile(info, io.BytesIO(b"data"))
        infos[4].type, infos[4].linkname = tarfile.LNKTYPE, "./etc/keep"
        tar.addfile(infos[4])
        first = tarfile.TarInfo("./a")
        first.type, first.linkname = tarfile.LNKTYPE, "./etc/keep"
        tar.addfile(first)
    out.seek(0)
    return out


def test_tar_archives_come_out_sorted_and_without_what_differs() -> None:
    results = []
    for order, mtime in ((1, 5), (-1, 7)):
        out = io.BytesIO()
        normalise_tar(
            make_tar(order, mtime),
            out,
            exclude=["var/log/*"],
            replace=[Entry.file("bin/tool", b"#!"), Entry.directory("bin"), Entry.file("new", b"")],
            edit={"etc/shadow": bytes.upper},
        )
        results.append(out.getvalue())
    assert results[0] == results[1]
    with tarfile.open(fileobj=io.BytesIO(results[0])) as tar:
        members = {member.name: member for member in tar}
        assert list(members) == sorted(members)
        assert {member.mtime for member in members.values()} == {EPOCH}
        assert "var/log/x" not in members
        assert members["bin"].issym(), "an existing link is not replaced by a directory"
        shadow = tar.extractfile("etc/shadow")
        assert shadow is not None
        assert shadow.read() == b"DATA"
        # The first name in order has the data, whatever the first one was before.
        assert members["a"].isreg()
        assert [members[name].linkname for name in ("etc/keep", "z")] == ["a", "a"]


# The cache


def test_a_manifest_comes_back_as_it_was_written(cache: Path) -> None:
    image = fake_image(cache)
    image.check(contents=True)
    assert Image.load(image.directory) == image
    assert [found.name for found in list_images()] == [image.name]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', "\0", '{"format": 1, "files": 3}', "null"]
)
def test_a_broken_manifest_is_an_error_and_is_not_listed(cache: Path, text: str) -> None:
    image = fake_image(cache)
    (image.directory / "image.json").write_text(text)
    with pytest.raises(ImageError, match="no readable manifest"):
        Image.load(image.directory)
    assert list_images() == []


def test_an_image_of_another_format_is_an_error(cache: Path) -> None:
    image = fake_image(cache)
    (image.directory / "image.json").write_text('{"format": 999}')
    with pytest.raises(ImageError, match="format 999"):
        Image.load(image.directory)


def test_check_names_every_wrong_file(cache: Path) -> None:
    image = fake_image(cache)
    image.root.write_bytes(b"short")
    image.kernel.unlink()
    same_size = bytes(len("System.map"))
    image.system_map.write_bytes(same_size)
    with pytest.raises(ImageError) as caught:
        image.check()
    assert "root.squashfs: 5 bytes instead of 13" in caught.value.evidence
    assert "vmlinux: No such file" in caught.value.evidence
    assert "System.map" not in caught.value.evidence
    with pytest.raises(ImageError) as caught:
        image.check(contents=True)
    assert "System.map: the content has changed" in caught.value.evidence


def test_find_builds_nothing(cache: Path) -> None:
    assert find() is None
    assert not cache.exists()
    with pytest.raises(UsageError):
        find("no-such-recipe")


def test_images_are_named_in_full_or_by_their_beginning(cache: Path) -> None:
    one, two = fake_image(cache, "bookworm-aaa111"), fake_image(cache, "bookworm-aab222")
    assert resolve("bookworm-aaa") == one.directory
    assert resolve("bookworm-aab222") == two.directory
    with pytest.raises(UsageError, match="could be any of"):
        resolve("bookworm-aa")
    with pytest.raises(UsageError, match="there is no image"):
        resolve("trixie")
    with pytest.raises(UsageError, match="there is no image"):
        resolve("../images")


def test_remove_takes_one_image_and_leaves_the_others(cache: Path) -> None:
    one, two = fake_image(cache, "bookworm-a"), fake_image(cache, "bookworm-b")
    assert remove("bookworm-a") == one.directory
    assert [p.name for p in (cache / "images").iterdir()] == [two.name]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount; run the tests as root")
def test_what_has_something_mounted_in_it_is_not_removed(cache: Path) -> None:
    """Removing a tree with the host's /dev bound into it would be a disaster."""
    image = fake_image(cache)
    point = image.directory / "point"
    point.mkdir()
    script = (
        'mount --bind "$1" "$2" && exec "$3" -c '
        '"import sys; from bridge.guest.images import remove; remove(sys.argv[1])" "$4"'
    )
    words = ["unshare", "--mount", "sh", "-c", script, "sh", str(ROOT / "docs"), str(point)]
    result = subprocess.run(
        [*words, sys.executable, image.name], capture_output=True, text=True, cwd=ROOT
    )
    assert "something is mounted in it" in result.stderr
    assert image.kernel.exists()
    assert (ROOT / "docs").is_dir()


def test_remove_tree_of_what_is_gone_is_no_error(cache: Path) -> None:
    remove_tree(cache / "images" / "nothing")


# The command


def test_image_list_path_and_rm(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("list") == 0
    image = fake_image(cache)
    (cache / "images" / "half").mkdir()
    capsys.readouterr()
    assert command("list") == 0
    out = capsys.readouterr().out
    assert f"  {image.name}  6.1.0-0-amd64" in out
    assert "+ file" in out
    assert "! half  broken" in out
    assert command("list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["current"]) for row in rows] == [(image.name, False)]

    assert command("path", "bookworm-0") == 0
    assert capsys.readouterr().out == f"{image.directory}\n"
    with pytest.raises(UsageError, match="not built") as caught:
        command("path")
    assert "kcov-bridge image build" in caught.value.hint

    with pytest.raises(UsageError):
        command("rm")
    with pytest.raises(UsageError):
        command("rm", "--all", image.name)
    assert command("rm", image.name) == 0
    assert not image.directory.exists()
    assert command("rm", "--all") == 0
    assert list((cache / "images").iterdir()) == []


def test_image_named_as_a_recipe_is_its_current_image(cache: Path) -> None:
    sources = Sources.find()
    recipe = Recipe.load("trixie", sources.recipes)
    fake_image(cache, "trixie-000000000000")
    current = fake_image(cache, f"trixie-{sources.fingerprint(recipe)}")
    assert find_guest_image(Settings(image="trixie")).name == current.name
    assert find_guest_image(Settings(image="trixie-000000")).name == "trixie-000000000000"


def test_image_path_follows_the_setting(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = Sources.find()
    made = {
        name: fake_image(
            cache, f"{name}-{sources.fingerprint(Recipe.load(name, sources.recipes))}"
        ).directory
        for name in recipes(sources.recipes)
    }
    for name, directory in made.items():
        monkeypatch.setenv("KCOV_BRIDGE_IMAGE", name)
        assert command("path") == 0
        assert capsys.readouterr().out == f"{directory}\n"
        assert command("list") == 0
        assert f"* {directory.name} " in capsys.readouterr().out


def test_image_build_refuses_before_it_works(cache: Path) -> None:
    with pytest.raises(UsageError):
        command("build", "--recipe", "no-such-recipe")
    with pytest.raises(UsageError):
        command("build", "--include", "file,not a package")
    assert not cache.exists()


def test_no_room_says_how_much_is_needed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.guest.images.builder._BASE_BYTES", 1 << 60)
    with pytest.raises(ImageError) as caught:
        build(progress=lambda line: None)
    assert "1099511627776 MiB are needed" in caught.value.message
    assert "KCOV_BRIDGE_CACHE" in caught.value.hint


def test_a_missing_program_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingDependencyError) as caught:
        build(progress=lambda line: None)
    assert "mmdebstrap" in caught.value.message
    assert "kcov-bridge setup" in caught.value.hint
    assert not list(cache.rglob(".bookworm-*"))


# Real builds


@pytest.fixture(scope="module")
def copied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a copy of the user's base, so that only the agent is built."""
    image = build()
    base = base_directory(image.recipe, image.base_fingerprint)
    copied = tmp_path_factory.mktemp("cache")
    (copied / "bases").mkdir()
    command = ["cp", "--archive", "--reflink=auto", str(base), str(copied / "bases")]
    # Builds of other tests work in the base.
    with locked(lock_file(image.recipe), f"the image {image.recipe}", print):
        subprocess.run(command, check=True)
    return copied


@pytest.fixture
def cache_with_any_image(copied_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That cache, with an image that an earlier test may have built in it."""
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(copied_base))
    return cache_directory()


@pytest.fixture
def cache_with_base(cache_with_any_image: Path) -> Path:
    """That cache without an image."""
    shutil.rmtree(cache_with_any_image / "images", ignore_errors=True)
    return cache_with_any_image


BUILDER = "from bridge.guest.images import build; print(build().directory)"


def start_builder() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.vm
def test_two_builds_at_once_build_once(cache_with_base: Path) -> None:
    builders = [start_builder(), start_builder()]
    outcomes = [builder.communicate(timeout=300) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], outcomes
    assert outcomes[0][0] == outcomes[1][0]
    said = [error for _, error in outcomes]
    assert sum("which is making the image" in text for text in said) == 1
    assert sum("compiling the module" in text for text in said) == 1
    assert [p.name for p in (cache_with_base / "images").iterdir()] == [find_name()]


def find_name() -> str:
    image = find()
    assert image is not None
    return image.name


@pytest.mark.vm
def test_an_interrupted_build_leaves_nothing(cache_with_base: Path) -> None:
    builder = start_builder()
    assert builder.stderr is not None
    assert "compiling the module" in builder.stderr.readline()
    time.sleep(0.5)
    builder.send_signal(signal.SIGINT)
    builder.communicate(timeout=60)
    assert builder.returncode != 0
    assert list((cache_with_base / "images").iterdir()) == []
    base = next((cache_with_base / "bases").iterdir())
    assert not (base / "build-root" / "work").exists()


@pytest.mark.vm
def test_all_but_the_keys_is_reproducible(cache_with_base: Path) -> None:
    """Two agent layers over one base; images/README.md says how to compare bases."""
    dead = cache_with_base / "images" / ".bookworm-0123456789ab.x_dead"
    dead.mkdir(parents=True)
    another = dead.with_name(".bookworm-slim-0123456789ab.x_busy")
    another.mkdir()
    first = build()
    assert not dead.exists(), "what a dead build left is removed"
    assert another.exists(), "but not what belongs to another recipe"
    copy = cache_with_base / "first"
    shutil.copytree(first.directory, copy)
    remove(first.name)
    second = build()
    second.check(contents=True)
    assert second.directory == first.directory
    keys = {"id_ed25519", "id_ed25519.pub", "ssh_host_ed25519_key.pub"}
    for name in sorted(set(FILES) - keys - {"initrd.img"}):
        assert (copy / name).read_bytes() == (second.directory / name).read_bytes(), name
    for name in keys:
        assert (copy / name).read_bytes() != (second.directory / name).read_bytes(), name
    # The keys are the last of the three archives that the initramfs is made of.
    old, new = (
        read_newc((directory / "initrd.img").read_bytes()) for directory in (copy, second.directory)
    )
    assert len(old) == len(new) == 3
    assert old[:2] == new[:2]
    assert old[2] != new[2]


@pytest.mark.vm
def test_the_image_is_small_private_and_whole() -> None:
    image = build()
    image.check(contents=True)
    assert image.size < 150_000_000
    for path in (image.ssh_key, image.initrd):
        assert path.stat().st_mode & 0o077 == 0, path
    assert b" T do_syscall_64\n" in image.system_map.read_bytes()
    assert image.kernel_release in image.vmlinuz.read_bytes().decode("latin-1")
    assert {"openssh-server", "coreutils"} <= set(image.packages)
    assert "perl" not in image.packages


@pytest.mark.vm
def test_a_broken_image_is_built_again(cache_with_any_image: Path) -> None:
    image = build()
    (image.directory / "initrd.img").unlink()
    with pytest.raises(ImageError):
        find()
    build().check(contents=True)


@pytest.mark.vm
def test_a_source_that_does_not_compile_is_shown_with_the_compilers_words(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text("int main(void) { return nonsense; }\n")
    with pytest.raises(ImageError) as caught:
        compile_for_guest(build(), source, tmp_path / "bad")
    assert "nonsense" in caught.value.evidence
    assert not (tmp_path / "bad").exists()
