# SPDX-License-Identifier: Apache-2.0
"""Build the API reference from the docstrings: ``make docs``.

usage: python docs/api.py DIRECTORY
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pdoc
import pdoc.render

import bridge

MODULES = ("bridge", "bridge.targets", "bridge.config", "bridge.errors")
"""What is public. ``bridge`` has all names that programs use; the others have the details."""

_ROLE = re.compile(r":(?:class|meth|func|mod|data|attr|exc):`~?([^`]+)`")


def plain(docstring: str) -> str:
    """Return a docstring without Sphinx' roles: pdoc makes links of names between backticks."""
    return _ROLE.sub(r"`\1`", docstring).replace("``", "`").replace("::\n", ":\n")


def main(directory: str) -> int:
    """Write the pages; return the exit status."""
    # A name of __all__ is imported when it is first used, which pdoc would not see.
    for name in bridge.__all__:
        setattr(bridge, name, getattr(bridge, name))
    others = f"!bridge\\.(?!({'|'.join(name.partition('.')[2] for name in MODULES[1:])})$).*"
    pdoc.render.configure(docformat="google", show_source=False, search=True)
    usual: Callable[..., str] = pdoc.render.env.filters["to_markdown"]

    @jinja2.pass_context
    def to_markdown(context: Any, docstring: str) -> str:
        return usual(context, plain(docstring))

    pdoc.render.env.filters["to_markdown"] = to_markdown
    pdoc.pdoc(*MODULES, others, output_directory=Path(directory))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
