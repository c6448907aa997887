# SPDX-License-Identifier: Apache-2.0
"""Data files of the package: ``guest/`` and ``images/``.

A checkout, and an editable installation of it, has them at its top. An installed package has a copy
in ``bridge/_data``, which ``setup.py`` makes.
"""

from __future__ import annotations

from pathlib import Path

from bridge.errors import InfrastructureError

__all__ = ["guest_directory", "images_directory", "source_root"]

_DATA = "_data"


def source_root() -> Path:
    """Return the directory that holds ``guest/`` and ``images/``.

    Raises:
        InfrastructureError: they are missing, so this installation is damaged.
    """
    # Compilers need real directories, so importlib.resources (which also takes 2 ms) is not used.
    package = Path(__file__).resolve().parents[1]
    for root in (package / _DATA, package.parent):
        if (root / "guest").is_dir() and (root / "images").is_dir():
            return root
    raise InfrastructureError(
        "the guest's sources and the image recipes are missing from this installation",
        evidence=f"looked for guest/ and images/ in {package / _DATA} and {package.parent}",
        hint="install the package again: pip install --force-reinstall kcov-bridge",
    )


def guest_directory() -> Path:
    """Return the directory of the guest's sources: ``agent/``, ``module/``, ``workload/``."""
    return source_root() / "guest"


def images_directory() -> Path:
    """Return the directory of the image recipes."""
    return source_root() / "images"
