# SPDX-License-Identifier: Apache-2.0
"""The endpoints of targets in tests."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.targets import AnyEndpoint, Endpoint

__all__ = ["tcp_port"]


def tcp_port(endpoints: Sequence[AnyEndpoint]) -> int:
    """Return the host's port of the first endpoint, which must be one of TCP."""
    endpoint = endpoints[0]
    assert isinstance(endpoint, Endpoint)
    return endpoint.host_port
