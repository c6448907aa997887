# SPDX-License-Identifier: Apache-2.0
"""Which plugin a QEMU gets, by what it says of the first one."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.sources.guest_kernel import plugin

LOADS = "kcov_tcg: plan=FD,region=FD is missing; kcov-bridge passes it"
REFUSES = (
    "qemu: Could not load plugin x.so: plugin requires API version 6, "
    "but this QEMU supports only a minimum version of {}"
)


class FakeQemu:
    """A program that counts its starts and answers with these lines, the last one from then on."""

    def __init__(self, directory: Path, *answers: str) -> None:
        self.path = directory / "qemu"
        self._starts = directory / "starts"
        self.answer(*answers)

    def answer(self, *answers: str) -> None:
        cases = "".join(f"{n}) echo '{text}' >&2;; " for n, text in enumerate(answers[:-1], 1))
        self._starts.write_text("")
        self.path.write_text(
            f'#!/bin/sh\necho "$@" >>{self._starts}\n'
            f"case $(wc -l <{self._starts}) in {cases} *) echo '{answers[-1]}' >&2;; esac\nexit 1\n"
        )
        self.path.chmod(0o755)

    @property
    def starts(self) -> list[str]:
        return self._starts.read_text().splitlines()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plugins"


def test_build_plugin_for_a_qemu_that_loads_it_asks_once(tmp_path: Path) -> None:
    qemu = FakeQemu(tmp_path, LOADS)
    built = plugin.build_plugin(str(qemu.path))
    assert plugin.build_plugin(str(qemu.path)) == built
    assert plugin.why_not_loaded(str(qemu.path), built) is None
    assert len(qemu.starts) == 1


def test_build_plugin_for_a_newer_api_makes_another_and_asks_once(tmp_path: Path) -> None:
    first = plugin.build_plugin(str(FakeQemu(tmp_path, LOADS).path))
    qemu = FakeQemu(tmp_path, REFUSES.format(7), LOADS)
    built = plugin.build_plugin(str(qemu.path))
    assert built != first
    for _ in range(2):
        assert plugin.build_plugin(str(qemu.path)) == built
        assert plugin.why_not_loaded(str(qemu.path), built) is None
    assert len(qemu.starts) == 2
    assert str(built) in qemu.starts[1]


def test_build_plugin_for_an_unknown_api_is_refused_by_qemu(tmp_path: Path) -> None:
    qemu = FakeQemu(tmp_path, REFUSES.format(8))
    built = plugin.build_plugin(str(qemu.path))
    assert "minimum version of 8" in str(plugin.why_not_loaded(str(qemu.path), built))
    assert len(qemu.starts) == 1


def test_why_not_loaded_asks_again_for_what_may_pass(tmp_path: Path) -> None:
    qemu = FakeQemu(tmp_path, "no memory")
    built = plugin.build_plugin(str(qemu.path))
    assert plugin.why_not_loaded(str(qemu.path), built) == "no memory"
    assert len(qemu.starts) == 2


def test_why_not_loaded_asks_a_qemu_that_was_replaced(tmp_path: Path) -> None:
    qemu = FakeQemu(tmp_path, LOADS)
    built = plugin.build_plugin(str(qemu.path))
    qemu.answer("plugin interface not enabled in this build")
    assert "not enabled" in str(plugin.why_not_loaded(str(qemu.path), built))


def test_build_plugin_beside_the_cache_leaves_it_alone(tmp_path: Path, cache: Path) -> None:
    spare = tmp_path / "spare"
    spare.mkdir()
    built = plugin.build_plugin(str(FakeQemu(tmp_path, LOADS).path), spare)
    assert built.parent == spare
    assert not cache.exists()


def test_the_plugin_for_each_api_compiles_without_a_warning(tmp_path: Path) -> None:
    for flags in ((), ("-DPLUGIN_API=7",)):
        plugin.PLUGIN.compile(tmp_path / "plugin.so", "-Werror", *flags)
