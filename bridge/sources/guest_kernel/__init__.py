# SPDX-License-Identifier: Apache-2.0
"""Coverage of the unmodified guest kernel, watched by a plugin in QEMU; docs/guest-kernel.md."""
