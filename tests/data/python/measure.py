# SPDX-License-Identifier: Apache-2.0
"""Run ``main()`` of a module under plain coverage.py, or consumed all the while; print a summary.

Usage: measure.py plain|consumed DATA_FILE PACKAGE MODULE
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from pathlib import Path

import coverage


def plain(data_file: str, package: str, module: str) -> dict[str, object]:
    """As ``coverage run --source=PACKAGE`` does it, with the C tracer."""
    measurement = coverage.Coverage(data_file=data_file, source_pkgs=[package], config_file=False)
    measurement.set_option("run:core", "ctrace")
    measurement.start()
    importlib.import_module(module).main()
    measurement.stop()
    measurement.save()
    return {}


def consumed(data_file: str, package: str, module: str) -> dict[str, object]:
    """Consumed by two threads without a pause, while threads take turns as fast as they can."""
    from bridge.sources.python.source import PythonSource

    source = PythonSource([package], data_file=Path(data_file))
    done = threading.Event()
    pcs: set[int] = set()
    consumes = [0, 0]

    def consume(index: int) -> None:
        while not done.is_set():
            pcs.update(source.consume())
            consumes[index] += 1

    consumers = [threading.Thread(target=consume, args=(n,)) for n in (0, 1)]
    for thread in consumers:
        thread.start()
    try:
        source.start()
        sys.setswitchinterval(1e-6)
        importlib.import_module(module).main()
    finally:
        sys.setswitchinterval(0.005)
        done.set()
        for thread in consumers:
            thread.join()
    source.stop()
    pcs.update(source.consume())
    if source.consume():
        raise AssertionError("the rest was given twice")
    places = sorted(str(source.table.lookup(pc)) for pc in pcs)
    return {
        "places": places,
        "total": source.blocks_total,
        "covered": source.blocks_covered,
        "consumes": sum(consumes),
    }


if __name__ == "__main__":
    print(json.dumps({"plain": plain, "consumed": consumed}[sys.argv[1]](*sys.argv[2:])))
