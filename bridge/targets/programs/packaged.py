# SPDX-License-Identifier: Apache-2.0
"""Small programs on modules of others: their sources are files of this package."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bridge.util.commands import Commands

__all__ = ["PackagedSource"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class PackagedSource:
    """The sources of a program, which come with the bridge; what they use is fetched by the build.

    Attributes:
        package: a directory beside this file.
        version: what the program is called by: that of the module that it is about.
        files: the names of the files.
        digest: of their contents, so that a change is another program.
    """

    package: str
    version: str
    files: tuple[str, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for name in self.files:
            digest.update((_HERE / self.package / name).read_bytes())
        object.__setattr__(self, "digest", digest.hexdigest())

    @property
    def tools(self) -> Mapping[str, str]:
        """As :class:`bridge.targets.programs.build.Source`."""
        return {}

    def fetch(self, directory: Path, commands: Commands) -> tuple[Path, str]:
        """As :class:`bridge.targets.programs.build.Source`."""
        top = directory / self.package
        top.mkdir()
        for name in self.files:
            shutil.copyfile(_HERE / self.package / name, top / name)
        return top, self.version
