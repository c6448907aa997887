# SPDX-License-Identifier: Apache-2.0
"""A program of threads that executes the same lines however its threads are scheduled."""

from __future__ import annotations

import threading

from mill import stones, wheel


def main(rounds: int = 60) -> int:
    """Grind on eight threads; returns a number that depends on all of them."""
    results: list[int] = []
    threads = [threading.Thread(target=work, args=(rounds, results)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(set(results)) != 1:
        raise AssertionError(results)
    return results[0]


def work(rounds: int, results: list[int]) -> None:
    """The work of one thread; its frame lives through the whole run."""
    total = 0
    turning = wheel.turn()
    next(turning)
    for number in range(rounds):
        total += stones.grind(number)
        total += turning.send(number)
        if number % 20 == 0:
            total += wheel.flow(number)
            total += churn(2)
    turning.close()
    results.append(total)


def churn(depth: int) -> int:
    """Threads that begin and end while others are measured."""
    if depth == 0:
        return 1
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(churn(depth - 1)))
    thread.start()
    thread.join()
    return found[0] + 1
