# SPDX-License-Identifier: Apache-2.0
"""pyroute2's 9P server, driven by pyroute2's own client over a loopback connection."""

from __future__ import annotations

import asyncio
import socket


def main(rounds: int = 30) -> int:
    """Serve, and ask for files in several ways; returns how many bytes were read."""
    return asyncio.run(session(rounds))


async def session(rounds: int) -> int:
    """Server and client on one event loop, a socket pair between them."""
    from pyroute2.plan9.client import Plan9ClientSocket
    from pyroute2.plan9.server import Plan9ServerSocket

    ours, theirs = socket.socketpair()
    server = Plan9ServerSocket(use_socket=ours)
    inode = server.filesystem.create("greeting")
    inode.data.write(b"hello, world")
    server.filesystem.create("notes")
    serving = await server.async_run()
    client = Plan9ClientSocket(use_socket=theirs)
    await client.start_session()
    total = 0
    for number in range(rounds):
        fid = await client.fid("greeting")
        answer = await client.read(fid)
        total += len(answer["data"])
        await client.write(await client.fid("notes"), f"note {number}".encode())
        try:
            await client.walk(f"missing{number}")
        except Exception as error:
            # The client raises whatever class the server names.
            total += len(type(error).__name__)
    client.transport.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    return total
