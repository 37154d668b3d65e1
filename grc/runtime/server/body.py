"""Bodies of requests, bounded in size and in time, and unpacked where they came packed."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from grc.runtime.server.refusal import Refused, invalid

GZIP_OR_ZLIB = 47  # zlib's window bits for "either header, largest window"
PACKED = (b"gzip", b"deflate")


class Gone(Exception):
    """The client went away before its request was whole: there is nobody to answer."""


async def read_body(headers: dict[bytes, bytes], receive: Any, limit: int, seconds: float) -> bytes:
    """Raises Refused where the body is too large or too slow, and Gone where it was cut short."""
    length = headers.get(b"content-length")
    if length is not None and int(length) > limit:
        raise too_large(limit)
    message = await first(receive, seconds)
    body = message.get("body", b"")
    if message.get("more_body"):
        body = await rest(body, receive, limit, seconds)
    elif message["type"] == "http.disconnect":
        raise Gone
    if len(body) > limit:
        raise too_large(limit)
    encoding = headers.get(b"content-encoding")
    return unpacked(body, encoding, limit) if encoding and encoding != b"identity" else body


async def first(receive: Any, seconds: float) -> dict[str, Any]:
    try:
        async with asyncio.timeout(seconds):
            return await receive()
    except TimeoutError:
        raise too_slow(seconds) from None


async def rest(begun: bytes, receive: Any, limit: int, seconds: float) -> bytes:
    parts, size = [begun], len(begun)
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise too_large(limit)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise too_slow(seconds) from None


def unpacked(body: bytes, encoding: bytes, limit: int) -> bytes:
    if encoding not in PACKED:
        raise Refused(
            415, f"content-encoding {encoding.decode('latin-1')} is unknown; gzip and deflate are known", "body"
        )
    unpacker = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        found = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise invalid(f"the body is no {encoding.decode()}: {error}", "body") from None
    if len(found) > limit:
        raise too_large(limit)
    if not unpacker.eof:
        raise invalid(f"the body ends inside of its {encoding.decode()}", "truncated")
    return found


def too_large(limit: int) -> Refused:
    return Refused(413, f"the body is larger than {limit} bytes", "too_large")


def too_slow(seconds: float) -> Refused:
    return Refused(408, f"the body did not come within {seconds:g} s", "slow")


def check_depth(value: Any, limit: int) -> None:
    """Raises Refused for JSON that nests deeper: the artifact's own functions may recurse into it."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for entry in level
            if isinstance(entry, (dict, list))
            for child in (entry.values() if isinstance(entry, dict) else entry)
        ]
        if not level:
            return
    raise invalid(f"the request nests deeper than {limit} levels", "depth")
