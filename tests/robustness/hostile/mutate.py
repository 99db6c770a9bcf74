"""Files that someone may hand over: valid networks with one thing or several changed, and plain garbage.

Everything is drawn from a `random.Random`, so a seed gives the same file on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import onnx

NUMBERS = (0, 1, -1, 2, 3, 7, 127, 255, 2**31 - 1, -(2**31), 2**31, 2**40, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    "x",
    "y",
    "r",
    "w0",
    "Conv",
    "If",
    "ai.onnx.ml",
    "../../etc/passwd",
    "\0",
    "é" * 40,
    "a" * 3000,
)
Draw = random.Random


def truncated(data: bytes, draw: Draw) -> bytes:
    return data[: draw.randrange(len(data))]


def flipped(data: bytes, draw: Draw) -> bytes:
    """One to eight bits are turned."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def spliced(data: bytes, draw: Draw) -> bytes:
    """A piece is cut out, doubled, or replaced by another or by noise."""
    at, length = draw.randrange(len(data)), draw.choice((1, 2, 8, 64, 512))
    other = draw.randrange(len(data))
    piece = draw.choice(
        (b"", data[at : at + length] * 2, data[other : other + length], draw.randbytes(length))
    )
    return data[:at] + piece + data[at + length :]


def noise(data: bytes, draw: Draw) -> bytes:
    return draw.randbytes(draw.choice((1, 10, 100, 1000)))


def garbled(data: bytes, draw: Draw) -> bytes:
    """One to three fields of the messages inside are set to something else, doubled or removed."""
    proto = onnx.ModelProto.FromString(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        message = draw.choice(list(_messages(proto)))
        _change(message, draw)
    return bytes(proto.SerializeToString())


def invented(data: bytes, draw: Draw) -> bytes:
    """A ModelProto with random fields all through."""
    proto = onnx.ModelProto()
    _fill(proto, draw, depth=0)
    return bytes(proto.SerializeToString())


BYTES: dict[str, Callable[[bytes, Draw], bytes]] = {
    "truncated": truncated, "bits flipped": flipped, "spliced": spliced, "noise": noise,
    "fields garbled": garbled, "random protobuf": invented,
}  # fmt: skip
"""Kind -> what makes such a file of a valid one."""


def _messages(message: Any) -> Iterator[Any]:
    """The message and all inside it; graphs and nodes more often than they come."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for one in value if _repeated(field) else (value,):
                yield from _messages(one)


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated)


def _change(message: Any, draw: Draw) -> None:
    field = draw.choice(message.DESCRIPTOR.fields)
    present = [f for f, _ in message.ListFields()]
    if present and draw.random() < 0.8:
        field = draw.choice(present)
    what = draw.choice(("set", "set", "clear", "double"))
    if what == "clear":
        message.ClearField(field.name)
    elif field.type == field.TYPE_MESSAGE:
        if not _repeated(field):
            _fill(getattr(message, field.name), draw, depth=4)
        elif what == "double" and getattr(message, field.name):
            values = getattr(message, field.name)
            values.add().CopyFrom(draw.choice(list(values)))
        else:
            _fill(getattr(message, field.name).add(), draw, depth=4)
    elif _repeated(field):
        values = getattr(message, field.name)
        if values and draw.random() < 0.7:
            values[draw.randrange(len(values))] = _scalar(field, draw, message)
        else:
            values.append(_scalar(field, draw, message))
    else:
        setattr(message, field.name, _scalar(field, draw, message))


def _fill(message: Any, draw: Draw, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        if draw.random() < (0.4 if depth else 0.9):
            for _ in range(draw.choice((1, 1, 2, 5)) if _repeated(field) else 1):
                if field.type != field.TYPE_MESSAGE:
                    value = _scalar(field, draw, message)
                    if _repeated(field):
                        getattr(message, field.name).append(value)
                    else:
                        setattr(message, field.name, value)
                elif depth < 6:
                    inner = getattr(message, field.name)
                    _fill(inner.add() if _repeated(field) else inner, draw, depth + 1)


def _scalar(field: Any, draw: Draw, message: Any) -> Any:
    if field.type == field.TYPE_STRING:
        return draw.choice(TEXTS)
    if field.type == field.TYPE_BYTES:
        return draw.choice((b"", b"\xff\xfe", b"SAME_UPPER", draw.randbytes(draw.choice((3, 16, 2000)))))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return draw.choice(FLOATS)
    if field.type == field.TYPE_ENUM:
        return draw.choice([value.number for value in field.enum_type.values])
    bits = {field.TYPE_INT32: 31, field.TYPE_UINT64: 64}.get(field.type, 63)
    low = 0 if field.type == field.TYPE_UINT64 else -(2**bits)
    return min(max(draw.choice(NUMBERS), low), 2**bits - 1)
