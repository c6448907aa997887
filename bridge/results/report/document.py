# SPDX-License-Identifier: Apache-2.0
"""A page for people: one HTML file, with its data, that needs no network.

Each kind of page has a program of its own, which shows the data with the parts of ``parts.js`` in
the frame of ``template.html``; ``style.css`` is the same for all.

The data is JSON in a ``script`` element, without any character that HTML knows; the program shows
it by ``textContent`` alone, so no text of a target, a test or a guest can become markup. A content
security policy allows this program and this style sheet, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import bridge

__all__ = ["link", "render_document"]

_OWN: Final = importlib.resources.files("bridge.results.report")


def render_document(
    title: str,
    data: Mapping[str, Any],
    program: str,
    style: str = "",
) -> str:
    """Return a page.

    Args:
        title: its heading.
        data: what the program finds in ``D``; JSON can hold it. ``links`` has text and ``href`` of
            each file beside the page that its head links to.
        program: JavaScript that declares the parts of the page and ends with ``start()``.
        style: rules that only this kind of page has.
    """
    whole = {
        "program": f"kcov-bridge {bridge.__version__}",
        "made": time.time(),
        "title": title,
        "links": [],
        **data,
    }
    script = "\n".join(['"use strict";', "(() => {", _read("parts.js"), program, "})();", ""])
    sheet = "\n".join([_read("style.css"), style])
    values = {
        "TITLE": _escape(f"{title} - kcov-bridge"),
        "STYLE_HASH": _hash(sheet),
        "STYLE": sheet,
        "SCRIPT_HASH": _hash(script),
        "SCRIPT": script,
        "DATA": _as_json(whole),
    }
    # In one pass: a value may look like a mark.
    return re.sub(r"%%([A-Z_]+)%%", lambda found: values[found[1]], _read("template.html"))


def link(path: Path, base: Path) -> str:
    """Return the address of a file, for a page in the directory ``base``."""
    return quote(os.path.relpath(path, base), errors="surrogateescape")


def _read(name: str) -> str:
    return _OWN.joinpath(name).read_text(encoding="utf-8")


def _escape(text: str) -> str:
    # A file name may contain what UTF-8 cannot encode.
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _as_json(data: object) -> str:
    """Encode data for a ``script`` element: ASCII, and nothing that could end it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
