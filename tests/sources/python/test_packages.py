# SPDX-License-Identifier: Apache-2.0
"""Where packages lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bridge.errors import SourceError
from bridge.sources.python.packages import find_packages
from bridge.sources.python.source import PythonSource
from tests.sources.python.support import TargetThread, places
from tests.support.coverage_data import executed


@pytest.fixture
def corp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``corp.net.proto`` in two namespace packages, and a part of ``corp`` somewhere else."""
    for file, text in {
        "one/corp/net/proto/__init__.py": "a = 1\n",
        "one/corp/net/proto/wire.py": "def f():\n    return 1\n",
        "one/corp/net/other.py": "b = 1\n",
        "two/corp/tools/__init__.py": "c = 1\n",
    }.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for part in ("one", "two"):
        monkeypatch.syspath_prepend(tmp_path / part)
    return tmp_path


def test_packages_below_namespace_packages_are_found(corp: Path) -> None:
    found = find_packages(["corp.net.proto", "corp.tools", "corp.net.other"])
    assert found.names == {
        str(corp / "one/corp/net/proto/__init__.py"): "corp/net/proto/__init__.py",
        str(corp / "one/corp/net/proto/wire.py"): "corp/net/proto/wire.py",
        str(corp / "two/corp/tools/__init__.py"): "corp/tools/__init__.py",
        str(corp / "one/corp/net/other.py"): "corp/net/other.py",
    }
    assert "corp" not in sys.modules
    with pytest.raises(SourceError, match=r"no module named corp\.net\.nothing"):
        find_packages(["corp.net.nothing"])


def test_a_package_below_namespace_packages_is_covered_as_coverage_does(
    corp: Path, on_target: TargetThread
) -> None:
    source = PythonSource(["corp.net.proto"], data_file=corp / "ours")

    def use() -> None:
        import corp.net.other  # type: ignore[import-not-found]
        import corp.net.proto.wire  # type: ignore[import-not-found]

        assert corp.net.proto.wire.f() == 1

    on_target(source.start)
    try:
        on_target(use)
        assert places(source) == ["__init__:1", "wire:1", "wire:2"]
    finally:
        on_target(source.stop)
        for module in [name for name in sys.modules if name.partition(".")[0] == "corp"]:
            del sys.modules[module]
    script = "import corp.net.other, corp.net.proto.wire as w; w.f()"
    (corp / "script.py").write_text(
        f"import sys; sys.path.insert(0, {str(corp / 'one')!r}); {script}"
    )
    subprocess.run(
        [
            *(sys.executable, "-m", "coverage", "run", "--source=corp.net.proto"),
            *(f"--data-file={corp / 'theirs'}", str(corp / "script.py")),
        ],
        check=True,
        timeout=60,
        cwd=corp / "one",
    )
    assert executed(corp / "ours") == executed(corp / "theirs")
