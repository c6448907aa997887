# SPDX-License-Identifier: Apache-2.0
"""Names of Rust functions, in both of rustc's forms."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bridge.sources.native.debug import NativeSymbols
from bridge.sources.native.rust import demangle_legacy, demangle_v0
from tests.support.native import CARGO, needs_cargo

CORE = "NtCsgEmfK2I1SDS_4core"
NAMES = {
    "_RNvCs6xxl1lAjzDf_1a4main": "a::main",
    "_RNvCs6xxl1lAjzDf_1au9gre_6ka8i": "a::größe",
    "_RNvMNtCs6xxl1lAjzDf_1a1mINtB2_1SmE3getB4_": "<a::m::S<u32>>::get",
    "_RNvXNtCs6xxl1lAjzDf_1a1mhNtB2_2Tr2go": "<u8 as a::m::Tr>::go",
    "_RNvXs_NtCs6xxl1lAjzDf_1a1mRSTaFmEbENtB4_2Tr2go": (
        "<&[(i8, fn(u32) -> bool)] as a::m::Tr>::go"
    ),
    "_RINvNtCs6xxl1lAjzDf_1a1m1cKj3_Kb1_Kc78_Kln5_EB4_": "a::m::c::<3, true, 'x', -5>",
    "_RINvCs6xxl1lAjzDf_1a3genFKCPhEzEB2_": 'a::gen::<extern "C" fn(*const u8) -> !>',
    "_RINvCs6xxl1lAjzDf_1a3genThReAnj3_EEB2_": "a::gen::<(u8, &str, [i128; 3])>",
    "_RINvCs6xxl1lAjzDf_1a3genTQhOhuEEB2_": "a::gen::<(&mut u8, *mut u8, ())>",
    "_RINvCs6xxl1lAjzDf_1a3genFG_RL0_eEB4_EB2_": None,
    "_RINvCs6xxl1lAjzDf_1a3genFG_RL0_eERL0_eEB2_": "a::gen::<for<'a> fn(&'a str) -> &'a str>",
    "_RINvCs6xxl1lAjzDf_1a3genFUKCThEEuEB2_": 'a::gen::<unsafe extern "C" fn((u8,))>',
    "_RINvCs6xxl1lAjzDf_1a1fNCNvB2_4main0EB2_": "a::f::<a::main::{closure#0}>",
    "_RINvCs6xxl1lAjzDf_1a1fNCNvB2_4mains0_0EB2_": "a::f::<a::main::{closure#2}>",
    f"_RINvCs6xxl1lAjzDf_1a3genRDG_INtNt{CORE}3ops8function2FnTRL0_eEEp6OutputmEL_EB2_": (
        "a::gen::<&dyn for<'a> core::ops::function::Fn<(&'a str,), Output = u32>>"
    ),
    f"_RINvCs6xxl1lAjzDf_1a3genRDNt{CORE}5CloneNtB6_4SendEL_EB2_": None,
    "_RNvCs6xxl1lAjzDf_1a4main.llvm.123": "a::main",
    "_RNvC": None,
    "_RNvC1a4mai": None,
    "_RNvC1a4mainX": None,
    "_ZN1a4mainE": None,
    "_R": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_demangle_v0_as_the_source_has_it(name: str) -> None:
    assert demangle_v0(name) == NAMES[name]


def test_demangle_v0_takes_whatever_it_is_given() -> None:
    for name in NAMES:
        for end in range(len(name)):
            demangle_v0(name[:end])
            demangle_v0(f"{name[:end]}B_{name[end + 1 :]}")
    # Long as the source is short: each pair has the one before twice.
    doubled = "TuuE"
    places = [0]
    for _ in range(40):
        doubled += "T" + f"B{_base62(places[-1] + 6)}" * 2 + "E"
        places.append(len(doubled))
    assert demangle_v0(f"_RIC1aT{doubled}EE") is None
    assert demangle_v0("_RIC1a" + "R" * 10000 + "uE") is None


def _base62(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    text = digits[(number - 1) % 62]
    return f"{digits[(number - 1) // 62]}{text}_" if number > 62 else f"{text}_"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a::gr$uf6$$udf$e::h049e2b6591d4ee39", "a::größe"),
        ("a::m::S$LT$T$GT$::get::h1c327d814e9a3c83", "a::m::S<T>::get"),
        ("_$LT$u8$u20$as$u20$a..m..Tr$GT$::go::hffd3060d47ef1057", "<u8 as a::m::Tr>::go"),
        ("a::dynf::_$u7b$$u7b$closure$u7d$$u7d$::h6c2846e97c05c85b", "a::dynf::{{closure}}"),
        (
            "core::ptr::drop$LT$$RF$mut$u20$$u5b$T$u5d$$GT$::h31408246bcedfb1f",
            "core::ptr::drop<&mut [T]>",
        ),
        ("of_c::plus_plus$LT$(int)", "of_c::plus_plus$LT$(int)"),
        ("a::$u110000$::h31408246bcedfb1f", "a::$u110000$"),
    ],
)
def test_demangle_legacy_without_hash_and_escapes(name: str, shown: str) -> None:
    assert demangle_legacy(name) == shown


@needs_cargo
@pytest.mark.parametrize("form", ["v0", "legacy"])
def test_functions_of_rust_have_their_names_in_both_forms(tmp_path: Path, form: str) -> None:
    source = tmp_path / "lines.rs"
    source.write_text(
        "mod kept { pub trait Run { fn run(&self) -> usize; } impl Run for [u16] {\n"
        "#[inline(never)] fn run(&self) -> usize { self.len() } } }\n"
        "fn main() { std::process::exit(kept::Run::run(&[1, 2][..]) as i32) }\n"
    )
    # The older form is the default, and not for the asking.
    flags = ["-g", "-Copt-level=0", *(["-Csymbol-mangling-version=v0"] if form == "v0" else [])]
    rustc = Path(str(CARGO)).with_name("rustc")
    subprocess.run([rustc, *flags, source, "-o", tmp_path / "lines"], check=True)
    names = subprocess.run(
        ["nm", "--defined-only", tmp_path / "lines"], capture_output=True, text=True, check=True
    ).stdout
    symbols = NativeSymbols(tmp_path / "lines")
    shown = set()
    for line in names.splitlines():
        place, kind, name = line.split()
        if kind in "tT" and name.startswith(("_R", "_ZN")):
            found = symbols.frames(int(place, 16))
            shown |= {frame.function for frame in found}
            assert not name.startswith("_R") or demangle_v0(name) is not None, name
    assert "<[u16] as lines::kept::Run>::run" in shown
    assert "lines::main" in shown
