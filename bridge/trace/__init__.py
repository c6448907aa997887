# SPDX-License-Identifier: Apache-2.0
"""The trace: system calls of a command's threads, and the code that each of them reached.

``call`` has the :class:`Call`, ``trace_file`` its file ``trace.jsonl``.
"""

from __future__ import annotations

from bridge.trace.call import Call, HostCode, HostThread
from bridge.trace.trace_file import TraceHeader, TraceReader, TraceWriter, read_traces

__all__ = [
    "Call",
    "HostCode",
    "HostThread",
    "TraceHeader",
    "TraceReader",
    "TraceWriter",
    "read_traces",
]
