# SPDX-License-Identifier: Apache-2.0
"""Helpers that several packages share: files, the cache, compiled programs, Debian packages.

They import only the standard library and :mod:`bridge.errors`.
"""
