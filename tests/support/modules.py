# SPDX-License-Identifier: Apache-2.0
"""Kernel modules of the guests of tests."""

from __future__ import annotations

__all__ = ["NETWORK_MODULES"]

NETWORK_MODULES = (
    *("nbd", "ext4", "usbip_core", "vhci_hcd", "usb_storage", "sd_mod", "cifs"),
    *("usbhid", "hid_generic"),
)
"""For the targets that the guest reaches by its network alone: with the same modules, their guests
start from the same snapshot, which takes longest to make."""
