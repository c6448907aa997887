# SPDX-License-Identifier: Apache-2.0
"""What several packages need and none of them owns: files, the cache, compiled helpers.

Imports the standard library and :mod:`bridge.errors`, nothing else.
"""
