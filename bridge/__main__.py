# SPDX-License-Identifier: Apache-2.0
"""``python -m bridge`` is ``kcov-bridge``."""

from bridge.cli.main import entry

entry()
