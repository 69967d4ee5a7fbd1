"""Plain data out of a pickle, without the unpickler: some data sets come with nothing else.

A pickle is a program for a small machine, and what makes it dangerous is that some instructions import and call what
they name. Here the standard library lists the instructions (`pickletools.genops`, which runs none), and only those are
followed that put together numbers, texts, lists, tuples and dicts.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any


class NotPlain(ValueError):
    """A pickle that is damaged, or holds more than numbers, texts, lists, tuples and dicts."""


_VALUES = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    )
)
"""Instructions that push what is written in them."""
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUT = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_GET = frozenset(("GET", "BINGET", "LONG_BINGET"))
_IGNORED = frozenset(("PROTO", "FRAME"))
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


def read_plain_pickle(data: bytes) -> Any:
    """What `pickle.dumps` was given, of any protocol.

    Raises:
        NotPlain: It holds anything else, such as an array; the message names the instruction.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        argument: Any
        for instruction, argument, _ in pickletools.genops(data):
            name = instruction.name
            if name == "STOP":
                (value,) = _take(stack, 1)
                return value
            if name in _PUT:
                memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
            elif name in _GET:
                stack.append(memo[int(argument)])
            elif name in _VALUES:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name == "MARK":
                stack.append(_MARK)
            elif name not in _IGNORED:
                _combine(name, argument, stack)
    except NotPlain:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of `genops`, or of a stack in disorder
        raise NotPlain(f"is no pickle, or a damaged one: {error}") from error
    raise NotPlain("is no pickle, or a damaged one: has no end")


def _combine(name: str, argument: Any, stack: list[Any]) -> None:
    """Follow an instruction that makes or fills a container."""
    if name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name in _TUPLES:
        stack.append(tuple(_take(stack, _TUPLES[name])))
    elif name in ("LIST", "TUPLE", "DICT"):
        items = _since_mark(stack)
        stack.append(items if name == "LIST" else tuple(items) if name == "TUPLE" else _pairs(items))
    elif name == "APPEND":
        (item,) = _take(stack, 1)
        stack[-1].append(item)
    elif name == "APPENDS":
        items = _since_mark(stack)
        stack[-1].extend(items)
    elif name == "SETITEM":
        key, value = _take(stack, 2)
        stack[-1][key] = value
    elif name == "SETITEMS":
        items = _since_mark(stack)
        stack[-1].update(_pairs(items))
    else:
        what = f" {argument}" if isinstance(argument, str) else ""
        raise NotPlain(f"holds more than numbers, texts, lists, tuples and dicts ({name}{what})")


def _take(stack: list[Any], num: int) -> list[Any]:
    items = stack[-num:]
    if len(items) < num or _MARK in items:
        raise ValueError("too few values")
    del stack[-num:]
    return items


def _since_mark(stack: list[Any]) -> list[Any]:
    start = len(stack) - 1 - stack[::-1].index(_MARK)
    items = stack[start + 1 :]
    del stack[start:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))
