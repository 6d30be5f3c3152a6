"""Damage for files of a checkpoint: what a bad disk, a bad script or an ill-meaning person could make of them."""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

NUMBERS = (-1, 0, 1, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63))
FRACTIONS = (0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", " ", "x", "x" * 5000, "\x00", "\n\n", "../../etc/passwd", "/", "float32", "\ud800", "ünïcode", "[", "None")
OTHERS = (None, True, False, [], {}, [[]], [1, 2, 3], ["a", None], {"type": "default"}, {"a": {"b": {}}})
KEYS = ("", "type", "rope_type", "num_layers", "__metadata__", "dtype", "wings", "\x00", "a.b.c", "model_type")


def value(rng: random.Random) -> Any:
    """Something that may stand where something else should."""
    kind = rng.randrange(6)
    if kind == 5:
        nest: Any = []
        for _ in range(rng.choice((3, 50, 900))):
            nest = [nest] if rng.random() < 0.5 else {"a": nest}
        return nest
    choices = (NUMBERS, FRACTIONS, TEXTS, OTHERS, [rng.randrange(-10, 100) for _ in range(4)])[kind]
    return copy.deepcopy(rng.choice(choices))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every list and dictionary within a document with each of its keys."""
    places, waiting = [], [tree]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        places += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return places


def damage_tree(tree: Any, rng: random.Random) -> Any:
    """Change one value, key or item somewhere in a JSON document."""
    places = _places(tree) if isinstance(tree, dict | list) else []
    if not places or rng.random() < 0.02:
        return value(rng)
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(KEYS)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(KEYS)] = value(rng)
    elif kind == 3:
        other = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == 4 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((holder[key] * 2, holder[key] + 1, -holder[key], holder[key] / 2, str(holder[key])))
    elif kind == 5:
        holder[key] = [copy.deepcopy(holder[key]) for _ in range(rng.choice((1, 2, 200)))]
    else:
        holder[key] = value(rng)
    return tree


def damage_json(text: bytes, rng: random.Random) -> bytes:
    """A JSON document with some values changed; now and then with what a JSON writer would never write."""
    tree = json.loads(text)
    try:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            tree = damage_tree(tree, rng)
        written = json.dumps(tree).encode()
    except RecursionError:
        written = b"[" * 5000
    if rng.random() < 0.85:
        return written
    return rng.choice(_TEXT_DAMAGE)(written, rng)


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 64))) + data[at:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data) + 1)
    end = min(len(data), begin + rng.randrange(1, 200))
    return data[:end] + data[begin:end] + data[end:]


def _number(data: bytes, rng: random.Random) -> bytes:
    """A whole number, as a length or a count would be, anywhere."""
    code = rng.choice(("<Q", "<I"))
    size = struct.calcsize(code)
    if len(data) < size:
        return data
    at = rng.randrange(len(data) - size + 1)
    return data[:at] + struct.pack(code, rng.choice(NUMBERS) % (1 << 8 * size)) + data[at + size :]


def _nest(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b"[" * 990 + b"]" * 990, b"9" * 5000, b"1e999", b"-"))


def _twice(data: bytes, rng: random.Random) -> bytes:
    """The object's first members a second time: JSON forbids no name from standing there twice."""
    return b"{" + data.strip()[1:-1] + b"," + data.strip()[1:] if data.strip()[:1] == b"{" else data


_BYTE_DAMAGE: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _cut, _insert, _repeat, _number)
_TEXT_DAMAGE = (*_BYTE_DAMAGE, _nest, _twice)


def damage_bytes(data: bytes, rng: random.Random, head: int | None = None) -> bytes:
    """Bytes changed, lost, added or repeated among the first `head`."""
    head = len(data) if head is None else head
    return rng.choice(_BYTE_DAMAGE)(data[:head], rng) + data[head:]


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a damaged header, length, or body."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(10)
    if kind < 6:
        header = damage_json(header, rng)
        return struct.pack("<Q", len(header)) + header + body
    if kind == 6:
        return struct.pack("<Q", rng.choice(NUMBERS) % 2**64) + data[8:]
    if kind == 7:
        return data[: 8 + length] + damage_bytes(body, rng)
    return damage_bytes(data, rng, rng.choice((8, 8 + length, len(data))))
