# SPDX-License-Identifier: Apache-2.0
"""A build that is killed while mmdebstrap has something mounted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MMDEBSTRAP = """#!/bin/sh
mount -t tmpfs none "$TMPDIR" && echo $$ >"$MOUNTED.new" && mv "$MOUNTED.new" "$MOUNTED"
exec sleep 60
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="without root mmdebstrap mounts in a namespace")
def test_build_killed_leaves_no_mount(tmp_path: Path) -> None:
    (tmp_path / "mmdebstrap").write_text(MMDEBSTRAP)
    (tmp_path / "mmdebstrap").chmod(0o755)
    mounted, cache = tmp_path / "mounted", tmp_path / "cache"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "KCOV_BRIDGE_CACHE": str(cache),
        "MOUNTED": str(mounted),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "bridge", "image", "build"], env=environment, stderr=subprocess.PIPE
    ) as build:
        deadline = time.monotonic() + 60
        while not mounted.exists():
            assert build.poll() is None, build.stderr
            assert time.monotonic() < deadline
            time.sleep(0.05)
        build.send_signal(signal.SIGKILL)
    os.kill(int(mounted.read_text()), signal.SIGKILL)  # it would end by itself, later
    assert str(cache) not in Path("/proc/self/mounts").read_text()
