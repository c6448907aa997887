# SPDX-License-Identifier: Apache-2.0
"""Programs in Rust that are crates, which cargo fetches and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bridge.targets.programs.build import Step
from bridge.util.commands import Commands

__all__ = ["Crate"]


@dataclass(frozen=True)
class Crate:
    """A crate with a program. Its source is in cargo's own cache, that of the build is empty.

    Attributes:
        name: the crate.
        version: exactly this one, with the dependencies of its own ``Cargo.lock``.
    """

    name: str
    version: str

    @property
    def tools(self) -> Mapping[str, str]:
        """As :class:`bridge.targets.programs.build.Source`."""
        return {"cargo": "cargo"}

    def fetch(self, directory: Path, commands: Commands) -> tuple[Path, str]:
        """As :class:`bridge.targets.programs.build.Source`."""
        top = directory / self.name
        top.mkdir()
        return top, self.version

    def steps(self) -> tuple[Step, ...]:
        """Return the steps that build its program as ``bin/NAME``."""
        install = (
            *("cargo", "install", "--locked", "--version", self.version),
            *("--root", "{source}", "--target-dir", "target", self.name),
        )
        profile = {
            # With coverage, optimising over all crates at once takes many times as long.
            "CARGO_PROFILE_RELEASE_LTO": "off",
            "CARGO_PROFILE_RELEASE_OPT_LEVEL": "1",
            "CARGO_PROFILE_RELEASE_DEBUG": "line-tables-only",
        }
        environment = (("RUSTFLAGS", "{rust}"), *profile.items())
        return (
            Step("compiling the program and its crates", install, environment=environment),
            Step("removing what only the build needs", ("rm", "-r", "target")),
        )
