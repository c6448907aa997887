# SPDX-License-Identifier: Apache-2.0
"""The kcov device: the shared region, the state machine of each instance, the doorbell."""
