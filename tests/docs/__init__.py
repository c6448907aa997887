# SPDX-License-Identifier: Apache-2.0
"""Tests of the pages for users and developers."""
