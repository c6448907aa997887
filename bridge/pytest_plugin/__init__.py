# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: tests that run in a guest, reset before each.

    def test_hostname(guest):
        assert guest.succeed("hostname").strip() == "kcov-bridge"

pytest loads :mod:`.plugin` by its entry point. That module imports only pytest and the standard
library; the rest is imported by the first test that asks for a guest, so that a coverage
measurement of the user's own code sees all of its imports.
"""
