# SPDX-License-Identifier: Apache-2.0
"""The service of fault_targets.py."""

from __future__ import annotations

import socketserver
import sys
import time


def answer(request: bytes) -> bytes:
    """Do what the request says."""
    if request == b"late":
        time.sleep(2.0)
        return after_a_while(request)
    if request == b"raise":
        raise ValueError("in the middle of a request")
    if request == b"exit":
        sys.exit(3)
    return request.upper()


def after_a_while(request: bytes) -> bytes:
    return request[::-1]


class Lines(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            if line == b"close\n":
                return
            self.wfile.write(answer(line.strip()) + b"\n")


class Datagrams(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(answer(self.rfile.read().strip()) + b"\n")
