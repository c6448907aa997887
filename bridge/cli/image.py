# SPDX-License-Identifier: Apache-2.0
"""The command ``kcov-bridge image``: build, list, path, rm."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from bridge import config
from bridge.errors import BridgeError, ImageError, UsageError
from bridge.guest.guest_image import ProjectImage
from bridge.guest.images import Image, build, find, list_images
from bridge.guest.images.recipe import DEFAULT_RECIPE, is_recipe
from bridge.guest.images.store import (
    base_directories,
    broken_images,
    disk_usage,
    remove_tree,
    resolve,
)
from bridge.session.snapshots import prune_snapshots, ready_snapshot
from bridge.targets.description import member_of
from bridge.targets.registry import create as create_target
from bridge.vm.accel import choose_accelerator

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Build, list and remove guest images. The cache keeps them, with the snapshots made from them. `run`
builds a missing image by itself.
"""

EPILOG = """\
examples:
  kcov-bridge image build
  kcov-bridge image build --include strace
  kcov-bridge image build --recipe ./mine.toml
  kcov-bridge image build --recipe trixie --module ext4 --module sctp
  kcov-bridge image list
  ls -l "$(kcov-bridge image path)"
  kcov-bridge image rm --all
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of ``image``."""
    commands = parser.add_subparsers(dest="image_action", metavar="ACTION", required=True)

    command = commands.add_parser(
        "build",
        help="build an image, if it is not built yet",
        description="Build a guest image, if it is not built yet, and print its directory.\n"
        "The first build takes minutes; layers that did not change are used again.",
    )
    _add_recipe(command)
    command.add_argument(
        "--force", action="store_true", help="build all layers again, with the newest packages"
    )
    command.add_argument(
        "--mirror",
        metavar="URI",
        help="where Debian packages come from, in mmdebstrap's form (or KCOV_BRIDGE_MIRROR)",
    )
    command.set_defaults(image_function=_build)

    command = commands.add_parser(
        "list",
        help="list the images that are built",
        description="List the images that are built; * marks the one that a run boots.",
    )
    command.add_argument("--json", action="store_true", help="print one JSON array")
    command.set_defaults(image_function=_list)

    command = commands.add_parser(
        "path", help="print an image's directory", description="Print an image's directory."
    )
    command.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="image, or the beginning of its name (default: the current one)",
    )
    command.add_argument("--recipe", help=argparse.SUPPRESS)
    command.set_defaults(image_function=_path)

    command = commands.add_parser(
        "rm", help="remove images", description="Remove images, and the snapshots made from them."
    )
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="image, or the beginning of its name"
    )
    command.add_argument(
        "--all",
        action="store_true",
        help="remove all images, and the build roots kept for new ones",
    )
    command.set_defaults(image_function=_rm)


def run(args: argparse.Namespace) -> int:
    """Do what the parsed arguments say; return the exit status."""
    function: Callable[[argparse.Namespace], int] = args.image_function
    return function(args)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--recipe",
        "--suite",
        metavar="RECIPE",
        help="recipe to build the image from: bookworm, trixie, sid, syzkaller, or a file "
        "PATH.toml of your own (default: the recipe that "
        f"the setting `image` names, or {DEFAULT_RECIPE})",
    )
    command.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="add a Debian package to the guest; may be repeated",
    )
    command.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="MODULE",
        help="add a module of the guest kernel and its dependencies, for modprobe; may be repeated",
    )


def _build(args: argparse.Namespace) -> int:
    image = build(
        args.recipe or _recipe(),
        force=args.force,
        include=_names(args.include),
        modules=_names(args.module),
        mirror=args.mirror,
    )
    _make_snapshot(image)
    print(image.directory)
    return 0


def _names(values: list[str]) -> list[str]:
    """The names in values that each may have several, with commas."""
    return [name for names in values for name in names.split(",") if name]


def _recipe() -> str:
    """The recipe of the image that a run with the present settings boots."""
    name = config.load().image or DEFAULT_RECIPE
    return name if is_recipe(name) else DEFAULT_RECIPE


def _make_snapshot(image: Image) -> None:
    """Make a snapshot for the machine of the settings; an image without one is good as well."""
    try:
        settings = config.load()
        if settings.snapshot:
            guest = ProjectImage(image)
            machine = guest.machine_config(settings, choose_accelerator(settings.accel))
            target = create_target(settings.target, settings.target_dir)
            modules = member_of(target, "guest_modules", ())
            ready_snapshot(guest, machine, settings.region << 20, modules).close()
    except BridgeError as error:
        logger.warning("no snapshot could be made, so guests boot: %s", error.report())


def _list(args: argparse.Namespace) -> int:
    images = list_images()
    try:
        current = find(_recipe())
    except ImageError:
        current = None  # broken, which the list shows, or installed without sources
    if args.json:
        rows = [
            {
                "name": image.name,
                "directory": str(image.directory),
                "kernel_release": image.kernel_release,
                "include": list(image.include),
                "modules": list(image.modules),
                "bytes": image.size,
                "current": current is not None and image.name == current.name,
            }
            for image in images
        ]
        print(json.dumps(rows, indent=1))
        return 0
    for image in images:
        mark = "*" if current is not None and image.name == current.name else " "
        more = (*image.include, *image.modules)
        extra = f"  + {', '.join(more)}" if more else ""
        print(f"{mark} {image.name}  {image.kernel_release}  {_megabytes(image.size)}{extra}")
    for directory in broken_images():
        print(f"! {directory.name}  broken")
    kept = base_directories()
    if kept:
        size = sum(disk_usage(directory) for directory in kept)
        print(
            f"and {_megabytes(size)} in {len(kept)} build root(s), kept for quick rebuilds",
            file=sys.stderr,
        )
    return 0


def _path(args: argparse.Namespace) -> int:
    if args.name:
        image = Image.load(resolve(args.name))
        image.check()
        print(image.directory)
        return 0
    current = find(args.recipe or _recipe())
    if current is None:
        raise UsageError(
            "the current image is not built: it never was, or guest/ or images/ changed since",
            hint="build it: kcov-bridge image build",
        )
    print(current.directory)
    return 0


def _rm(args: argparse.Namespace) -> int:
    if args.all == bool(args.names):
        raise UsageError(
            "`image rm` needs the name of an image" if not args.all else "--all takes no names",
            hint="`kcov-bridge image list` shows the names; --all removes all",
        )
    directories: list[Path] = [resolve(name) for name in args.names]
    if args.all:
        directories = [image.directory for image in list_images()]
        directories += [*broken_images(), *base_directories()]
    for directory in directories:
        remove_tree(directory)
        print(f"removed {directory}")
    prune_snapshots()
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
