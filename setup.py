# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: guest/ and images/ are copied into the package.

They stay at the top of the source tree, where people look for them. An editable installation
copies nothing. ``bridge/util/resources.py`` finds them in both places.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DATA = "bridge/_data"
"""Where they lie in the package; ``bridge.util.resources`` knows it too."""

TREES = ("guest", "images")

LEFT_BY_BUILDS = (".ko", ".o", ".so", ".mod", ".cmd", ".order", ".symvers", ".mod.c")
"""What a build in the source tree leaves there: no sources."""


def sources() -> list[Path]:
    """The files to copy, by their path from the top; the working directory is the top."""
    return sorted(
        path
        for tree in TREES
        for path in Path(tree).rglob("*")
        if path.is_file()
        and not path.name.endswith(LEFT_BY_BUILDS)
        and not any(part.startswith(".") for part in path.parts)
    )


class BuildWithSources(build_py):
    """``build_py``, and the guest's sources and the image recipes as data of the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._copies().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def _copies(self) -> dict[str, str]:
        to = Path(self.build_lib, DATA)
        return {str(path): str(to / path) for path in sources()}

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._copies().values()]

    def get_output_mapping(self) -> dict[str, str]:
        copies = {target: source for source, target in self._copies().items()}
        return {**super().get_output_mapping(), **copies}

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self._copies()]


setup(cmdclass={"build_py": BuildWithSources})
