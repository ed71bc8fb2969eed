"""The directory of a submission: calls in, outcomes out.

One *pack* holds the calls of an array; an element finds its own by its index, and reads nothing else. One
*result* holds what came of a call: a version and a checksum stand before what is unpickled, so that a
file that was cut, or is another version's, is told from a good one.

The standard library only: nodes get this file as source.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

CALLS = "calls"
"""The name of the pack."""

_CALLS_MAGIC = b"aiohypertunity calls 1\n"
_RESULT_MAGIC = b"aiohypertunity result 1\n"
_SPAN = struct.Struct("<QQ")
_SUMS = struct.Struct("<IQQ")

SPOOL_FAILED, SPOOL_FULL = 76, 79
"""Exit codes of a node's Python that cannot write a result; the second for lack of space.

The log cannot be relied on to say so: it is on the same disk.
"""


class BadFile(Exception):
    """A file isn't whole, or not of this version; says in what way."""


class Packed(NamedTuple):
    """A call, as it goes into a pack. Files are named relative to the submission's directory.

    Attributes:
        function: The function blob.
        payload: The pickled arguments, or the file they are in.
    """

    function: bytes
    payload: bytes | str
    function_files: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def pack(calls: Sequence[Packed], surroundings: dict[str, Any]) -> bytes:
    """The pack of an array.

    Args:
        calls: In the order of their indices.
        surroundings: What the node is to know of where the calls come from: `python`, `sys_path`.
    """
    size = len(_CALLS_MAGIC) + _SPAN.size * (1 + len(calls))
    bodies: list[bytes] = []
    functions: dict[int, list[int]] = {}

    def add(body: bytes) -> list[int]:
        nonlocal size
        bodies.append(body)
        size += len(body)
        return [size - len(body), len(body)]

    spans = [add(json.dumps(surroundings).encode())]
    for call in calls:
        # One object stands for the function of all jobs of a dispatch.
        if id(call.function) not in functions:
            functions[id(call.function)] = add(call.function)
        parts = {
            "function": functions[id(call.function)],
            "function_files": call.function_files,
            "payload": call.payload if isinstance(call.payload, str) else add(call.payload),
            "files": call.files,
        }
        spans.append(add(json.dumps(parts).encode()))
    return b"".join((_CALLS_MAGIC, *(_SPAN.pack(*span) for span in spans), *bodies))


def read_call(directory: str, index: int) -> tuple[Packed, dict[str, Any]]:
    """An element's call, its files absolute, and the surroundings.

    Raises:
        BadFile: The pack isn't one of this version, or not whole.
    """
    with open(f"{directory}/{CALLS}", "rb") as file:
        if file.read(len(_CALLS_MAGIC)) != _CALLS_MAGIC:
            raise BadFile(f"{file.name} isn't a pack of this version's")

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            body = file.read(length)
            if len(body) != length:
                raise BadFile(f"{file.name} was cut")
            return body

        def read_json(number: int) -> dict[str, Any]:
            span = read(len(_CALLS_MAGIC) + number * _SPAN.size, _SPAN.size)
            parsed: dict[str, Any] = json.loads(read(*_SPAN.unpack(span)))
            return parsed

        parts = read_json(1 + index)
        payload = parts["payload"]
        call = Packed(
            read(*parts["function"]),
            f"{directory}/{payload}" if isinstance(payload, str) else read(*payload),
            tuple(f"{directory}/{name}" for name in parts["function_files"]),
            tuple(f"{directory}/{name}" for name in parts["files"]),
        )
        return call, read_json(0)


class Reply(NamedTuple):
    """What came of a call.

    Attributes:
        kind: As in `payloads`.
        blob: The pickle.
        files: Names of its large buffers, with their sizes.
        facts: `host`, `pid`, `started`, `finished`, `max_rss`, `python`.
    """

    kind: bytes
    blob: bytes
    files: tuple[tuple[str, int], ...]
    facts: dict[str, Any]


def format_result(reply: Reply) -> list[bytes]:
    """A result file, in pieces."""
    about = reply.facts | {"kind": reply.kind.decode(), "files": reply.files}
    header = json.dumps(about).encode()
    checksum = zlib.crc32(reply.blob, zlib.crc32(header))
    sums = _SUMS.pack(checksum, len(header), len(reply.blob))
    return [_RESULT_MAGIC, sums, header, reply.blob]


def parse_result(content: bytes) -> Reply:
    """A result file.

    Raises:
        BadFile: It isn't whole, or not of this version.
    """
    start = len(_RESULT_MAGIC) + _SUMS.size
    if content[: len(_RESULT_MAGIC)] != _RESULT_MAGIC:
        raise BadFile("it isn't a result of this version's")
    if len(content) < start:
        raise BadFile("it was cut")
    checksum, n_header, n_blob = _SUMS.unpack_from(content, len(_RESULT_MAGIC))
    if len(content) != start + n_header + n_blob:
        raise BadFile(f"it has {len(content)} bytes instead of {start + n_header + n_blob}")
    if zlib.crc32(memoryview(content)[start:]) != checksum:
        raise BadFile("its checksum is wrong")
    about = json.loads(content[start : start + n_header])
    files = tuple((str(name), int(size)) for name, size in about.pop("files"))
    return Reply(about.pop("kind").encode(), content[start + n_header :], files, about)


def write_whole(path: str, temporary: str, pieces: Sequence[bytes]) -> None:
    """Writes a file beside its place, syncs it, and puts it there.

    Raises:
        OSError: It can't be written; then nothing is left of it.
    """
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise
