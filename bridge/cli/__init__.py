# SPDX-License-Identifier: Apache-2.0
"""The command ``kcov-bridge``."""
