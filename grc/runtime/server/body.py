"""Bodies of requests: unpacked where they came packed, and bounded in size, in the values that they hold, and in depth."""

from __future__ import annotations

import zlib
from typing import Any

from grc.runtime.server.refusal import Refused, invalid

LARGE = 256 << 10  # bytes of a body that is read on a thread: the event loop reads a smaller one in milliseconds
VALUES = 1 << 20  # that JSON may hold in any case; read, each takes up to 64 bytes, whatever it took in the body
GZIP_OR_ZLIB = 47  # zlib's window bits for "either header, largest window"
PACKED = (b"gzip", b"deflate")


def unpacked(body: bytes, encoding: bytes | None, limit: int) -> bytes | None:
    """None where the body is larger than the limit. Raises Refused where it is not what its encoding says."""
    encoding = (encoding or b"identity").lower()
    if encoding == b"identity":
        return body if len(body) <= limit else None
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
        return None
    if not unpacker.eof:
        raise invalid(f"the body ends inside of its {encoding.decode()}", "truncated")
    return found


def check_values(body: bytes, end: int, max_body: int) -> None:
    """Raises Refused for JSON, up to `end`, that would take much more memory than the body, and hold up everything else while
    it is read: numbers and names count as one value each, lists and objects as four.
    """
    found = sum(count * body.count(sign, 0, end) for sign, count in ((b",", 1), (b":", 1), (b"[", 4), (b"{", 4)))
    limit = max(VALUES, max_body // 32)
    if found > limit:
        raise Refused(413, f"the JSON of the body holds {found} values; up to {limit} are read", "too_large")


def check_depth(value: Any, body: bytes, limit: int) -> None:
    """Raises Refused for JSON that nests deeper: the artifact's own functions may recurse into it."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return
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
