# SPDX-License-Identifier: Apache-2.0
"""QEMU's device models as a source: whether the running QEMU was built for that."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from bridge.errors import MissingDependencyError
from bridge.session.device_models import DeviceModels
from tests.support.native import build, needs_clang


@needs_clang
def test_check_finds_a_program_at_a_long_path(tmp_path: Path) -> None:
    directory = tmp_path.joinpath(*("a" * 100 for _ in range(3)))
    directory.mkdir(parents=True)
    source = tmp_path / "qemu.c"
    source.write_text(
        "#include <unistd.h>\nint main(void) { char c; return (int)read(0, &c, 1); }\n"
    )
    models = DeviceModels(None)
    models.native.start()
    try:
        for program, covered in ((build(directory / "qemu", source), True), ("cat", False)):
            with subprocess.Popen(
                [program], env={**os.environ, **models.environment}, stdin=subprocess.PIPE
            ) as running:
                if not covered:
                    with pytest.raises(MissingDependencyError, match="of some-qemu are not"):
                        models.check(running.pid, "some-qemu")
                    continue
                deadline = time.monotonic() + 60
                while not models.native.consume():
                    assert running.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                models.check(running.pid, "some-qemu")
    finally:
        models.close()
