# SPDX-License-Identifier: Apache-2.0
# A program of awkward layout: input of the tests of bridge.sources.python.blocks, run by them under
# a tracer. No statement in it raises but the last of its block. The .blocks file beside it holds
# the blocks; tests/sources/python/test_blocks.py says how to make it again.
"""Docstring of the module,
over two lines."""
from __future__ import annotations

import asyncio, contextlib
import functools; x = 1; y = 2

LONG = """a string
of three lines
ends here"""; z = 3

total = sum(
    n
    for n in range(3)
    if n
)

# The bytes of this line are more than its characters:
größe = "ä"; after = 1


def one_liner(a): return a + 1


def both(a):
    if a: b = 1
    else: b = 2
    return b


def deep(a):
    """Only a docstring before the loop."""
    while a:
        a -= 1
        if a == 2: continue
        elif a == 1:
            break

        else:

            # a comment above the suite
            a = a
    else:
        return "exhausted"
    for i in range(a): a += i
    else: a += 1
    for j in (
        1,
        2,
    ):
        a += j
    return a


def declarations():
    global x
    note: int
    for x in range(2):
        pass
    def inner(
        first=LONG,
        *rest,
        last: int = (
            3
        ),
    ) -> int:
        nonlocal_free: int = 1

        return nonlocal_free + last
    return inner()


def plain(f):
    return f


@plain
@functools.lru_cache(
    maxsize=None
)
def decorated(
    a,
    b=2,
):  # a comment on the header
    # and one below

    return a + b


@(
    plain
)
class Thing(
    object,
    metaclass=type,
):
    """Docstring of a class."""

    attribute: int
    value: int = 3; other = 4

    def method(self):
        return self.value

    @property
    def size(self): return 1

    class Inner: kind = "inner"

    if value:
        kind = 1
    else:
        kind = 2


def tries(how):
    log = []
    try:
        log.append(1)
        if how == "value":
            raise ValueError(how)
        elif how == "key": raise KeyError(how)
        log.append(2)
    except ValueError: log.append(3)
    except (
        KeyError,
        IndexError,
    ) as error:
        log.append(4)
        del error
    except:
        log.append(5)
    else:
        log.append(6)
    finally:

        # late
        log.append(7)
    try: log.append(8)
    finally: log.append(9)
    try:
        return log
    finally:
        log.append(10)


def groups(error):
    try:
        raise error
    except* ValueError as group:
        caught = len(group.exceptions)
    except* (TypeError, KeyError):
        caught = -1
    return caught


def matches(value):
    match value:
        case 0 | 1:
            return "small"
        case int(n) if n > 100 and (
            n < 1000
        ):
            return "medium"
        # between
        case [first, *rest] | (
            first, rest
        ):
            result = first
        case {"key": str() as text}: result = text
        case Thing(
            value=v
        ):
            result = v
        case _:
            result = None
    match value, 1:
        case (a, b): result = (a, b)
    match = 1
    case = match
    return result, case


def contexts():
    with contextlib.nullcontext(1) as a, contextlib.nullcontext(2) as b:
        c = a + b
    with (
        contextlib.nullcontext(1),
        contextlib.nullcontext(2) as d,
    ):
        c += d; e = 1
    with contextlib.suppress(ValueError): raise ValueError
    return c + e


def walrus(items):
    if (n := len(items)) > 2 and \
            n < 10:
        n += 1
    while (m := n - 1) > 3: n = m
    assert (
        n
    ), "a message"
    key = lambda a: (
        a
        + 1
    )
    table = {
        k: [
            key(v)
            for v in range(k)
        ]
        for k in range(3)
    }
    return (
        n
        if n
        else table
    )


def generator(n):
    got = yield
    while n:
        n -= 1
        got = yield (
            n,
            got,
        )
    yield from range(2)


async def asynchronous():
    async def numbers():
        for n in range(3):
            yield n
            await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def context():
        yield 1

    found = [n async for n in numbers()]
    async with context() as c:
        found.append(c)
    async for n in numbers():
        if n == 1: break
        found.append(n)
    else:
        found.append(None)
    return found


def nothing():
    """A function that is a docstring."""


def dots(): ...


def nested_else(a, b):
    if a:
        if b: c = 1
        else: c = 2
    elif b:
        c = 3
    else:
        while b: b -= 1
        else: c = 4
        c = 5
    return c


def recursive(n):
    if not n: return 0
    return 1 + recursive(n - 1)


def dead():
    return 1
    unreachable = 2


def main():
    one_liner(1)
    for a in (0, 1):
        both(a)
    deep(5), deep(0)
    declarations()
    decorated(1)
    thing = Thing()
    thing.method(), thing.size
    for how in ("value", "key", "none"):
        tries(how)
    groups(ExceptionGroup("both", [ValueError(1), KeyError(2)]))
    for value in (0, 500, [1, 2], {"key": "text"}, thing, None):
        matches(value)
    contexts()
    walrus([1, 2, 3, 4, 5, 6])
    g = generator(2)
    for _ in g:
        pass
    asyncio.run(asynchronous())
    nothing()
    dots()
    for a, b in ((1, 0), (1, 1), (0, 1), (0, 0)):
        nested_else(a, b)
    recursive(5)
    dead()


if x:
    main()
else:
    raise SystemExit(
        1
    )
