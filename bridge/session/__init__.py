# SPDX-License-Identifier: Apache-2.0
"""A booted guest and all that stands behind it, put together."""
