# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.system.reference [VARIANT ...]``: builds reference kernels and their images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bridge.errors import BridgeError
from tests.system.reference import VARIANTS, build


def main(argv: Sequence[str] | None = None) -> int:
    """The command: prints the directory of each image."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.system.reference", description="Builds reference kernels."
    )
    parser.add_argument(
        "variants", nargs="*", metavar="VARIANT", help=f"{', '.join(VARIANTS)}; all without"
    )
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.variants) - set(VARIANTS)):
        parser.error(f"no such variant: {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    for variant in arguments.variants or VARIANTS:
        try:
            print(build(variant).directory)
        except BridgeError as error:
            print(error.report(), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
