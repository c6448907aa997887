# SPDX-License-Identifier: Apache-2.0
"""Programs that a stable Rust compiles with coverage: the example."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from bridge.sources.native.build import build_runtime
from bridge.sources.native.source import NativeSource
from bridge.targets.program import listens
from tests.support.native import CARGO, functions, needs_cargo

ROOT = Path(__file__).resolve().parents[3]

pytestmark = needs_cargo


@pytest.fixture(name="program", scope="module")
def _program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rust")
    shutil.copytree(
        ROOT / "examples" / "native_rust", directory / "lines", ignore=lambda *_: {"target"}
    )
    environment = {**os.environ, "RUSTFLAGS": " ".join(build_runtime().rust_flags)}
    environment["PATH"] = f"{Path(str(CARGO)).parent}:{environment['PATH']}"
    done = subprocess.run(
        [str(CARGO), "build", "--release", "--offline"],
        cwd=directory / "lines",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory / "lines" / "target" / "release" / "lines"


def test_rust_each_request_has_its_functions(program: Path) -> None:
    source = NativeSource()
    source.start()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with subprocess.Popen(
        [str(program), str(port)], env={**os.environ, **source.environment}
    ) as process:
        try:
            while not listens(port):
                assert process.poll() is None
                time.sleep(0.01)
            with socket.create_connection(("127.0.0.1", port)) as connection:
                answers = connection.makefile("r")
                connection.sendall(b"upper a\n")
                assert answers.readline() == "A\n"
                first = functions(source, source.consume())
                connection.sendall(b"add 20 22\n")
                assert answers.readline() == "42\n"
                second = functions(source, source.consume())
        finally:
            process.kill()
    source.stop()
    assert any("answer" in name for name in first & second)
    assert any("add" in name for name in second - first)
    assert not any(name.endswith("lines::add") for name in first)
