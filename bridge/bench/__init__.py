# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what the bridge costs, each figure beside a baseline of the same run.

``measurement.py`` has what a measurement is and how turns are taken, ``stats.py`` the arithmetic,
``table.py``, ``document.py`` and ``plot.py`` what people and programs get to see; every other
module is one measurement, or a program that one needs.
"""
