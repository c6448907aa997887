# SPDX-License-Identifier: Apache-2.0
"""What the host says to a guest: images, SSH."""
