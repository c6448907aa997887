# SPDX-License-Identifier: Apache-2.0
"""Fuzz campaigns: an existing engine's cases, executed in guests under kcov."""
