# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge native``: the run time that native programs are linked with."""

from __future__ import annotations

import argparse
import shlex

from bridge.sources.native.build import build_runtime

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Compile the run time with which programs in C, C++ and Rust are linked to be covered, if it is not
in the cache, and print the flags for the linker. docs/native.md says how programs are compiled.
"""

EPILOG = """\
examples:
  clang -g -fsanitize-coverage=trace-pc-guard,pc-table server.c $(kcov-bridge native)
  RUSTFLAGS="$(kcov-bridge native --rust)" cargo build
  cc -I "$(kcov-bridge native --directory)" -c server.c
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--shared",
        action="store_true",
        help="print the flags for libkcovbridge.so: for a program with several shared objects",
    )
    kinds.add_argument(
        "--rust",
        action="store_true",
        help="print flags for rustc, which compile with coverage and link",
    )
    kinds.add_argument(
        "--directory",
        action="store_true",
        help="print the directory of libkcovbridge.a, libkcovbridge.so and kcov_bridge.h",
    )


def run(args: argparse.Namespace) -> int:
    """Print flags or a path; return 0.

    Raises:
        MissingDependencyError: there is no C compiler.
        InfrastructureError: the run time does not compile.
    """
    runtime = build_runtime()
    if args.shared:
        print(shlex.join(runtime.shared_flags))
    elif args.rust:
        print(" ".join(runtime.rust_flags))
    elif args.directory:
        print(runtime.directory)
    else:
        print(shlex.join(runtime.link_flags))
    return 0
