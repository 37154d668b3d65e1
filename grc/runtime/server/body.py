"""Bodies of requests: unpacked where they came packed, and bounded in size and in depth."""

from __future__ import annotations

import zlib
from typing import Any

from grc.runtime.server.refusal import Refused, invalid, too_large

GZIP_OR_ZLIB = 47  # zlib's window bits for "either header, largest window"
PACKED = (b"gzip", b"deflate")


def unpacked(body: bytes, encoding: bytes | None, limit: int) -> bytes:
    """Raises Refused where the body is not what its encoding says, or larger than the limit."""
    encoding = (encoding or b"identity").lower()
    if encoding == b"identity":
        return body
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
