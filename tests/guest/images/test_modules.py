# SPDX-License-Identifier: Apache-2.0
"""Which files a list of modules takes, by the files that depmod writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.errors import ImageError
from bridge.guest.images.builder import _Modules

DEP = """\
kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/lib/crc16.ko
kernel/fs/jbd2/jbd2.ko:
kernel/lib/crc16.ko:
kernel/fs/xfs/xfs.ko: kernel/lib/libcrc32c.ko
kernel/lib/libcrc32c.ko:
kernel/crypto/crc32c_generic.ko:
kernel/arch/crc32c-intel.ko:
kernel/net/nf_tables.ko: kernel/net/nfnetlink.ko
kernel/net/nfnetlink.ko:
kernel/net/nft_chain.ko: kernel/net/nf_tables.ko
"""
SOFTDEP = """\
# Soft dependencies extracted from modules themselves.
softdep ext4 pre: crc32c
softdep libcrc32c pre: crypto-crc32c
softdep nf_tables pre: no_such nfnetlink post: nft_chain
softdep nft_chain pre: nf_tables
"""
ALIAS = """\
# Aliases extracted from modules themselves.
alias crc32c crc32c_intel
alias crypto-crc32c crc32c_intel
alias crc32c crc32c_generic
alias crypto-crc32c crc32c_generic
"""


@pytest.fixture
def modules(tmp_path: Path) -> _Modules:
    for name, text in {
        "modules.dep": DEP,
        "modules.softdep": SOFTDEP,
        "modules.alias": ALIAS,
        "modules.builtin": "kernel/drivers/button.ko\n",
    }.items():
        (tmp_path / name).write_text(text)
    return _Modules(tmp_path)


def names(modules: _Modules, *wanted: str) -> list[str]:
    return [path.stem for path in modules.closure(wanted)]


def test_closure_has_what_a_module_asks_for_softly_before_it(modules: _Modules) -> None:
    assert names(modules, "ext4") == ["crc32c-intel", "crc32c_generic", "crc16", "jbd2", "ext4"]


def test_closure_has_what_its_needs_ask_for_softly(modules: _Modules) -> None:
    assert names(modules, "xfs") == ["crc32c-intel", "crc32c_generic", "libcrc32c", "xfs"]


def test_closure_of_modules_that_ask_for_each_other_ends(modules: _Modules) -> None:
    assert names(modules, "nf_tables") == ["nfnetlink", "nf_tables", "nft_chain"]


def test_closure_leaves_out_what_is_built_in(modules: _Modules) -> None:
    assert names(modules, "button", "jbd2") == ["jbd2"]


def test_require_names_all_that_is_missing(modules: _Modules) -> None:
    with pytest.raises(ImageError, match=r"no module one, two$") as caught:
        modules.require(["ext4", "one", "button", "two"])
    assert "recipe" in caught.value.hint
    with pytest.raises(ImageError, match=r"no module one, two$"):
        modules.closure(["one", "ext4", "two"])
