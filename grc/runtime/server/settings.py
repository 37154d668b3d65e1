"""Settings: what a server may be told. Every field is also a flag of `grc serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How to listen, how much to accept, and what to keep."""

    host: str = "127.0.0.1"
    """Loopback unless told otherwise: the protocol knows no passwords."""
    port: int = 8000
    """HTTP; 0 takes a free one."""
    grpc_port: int | None = 8001
    """gRPC; 0 takes a free one, None does not listen."""
    engine: str | None = None
    """One of the artifact's parts, instead of the artifact's own choice."""
    workers: int = 1
    """Batches that are computed at once, over all models."""
    threads: int = 0
    """Threads that compute a batch; 0 shares all cores but one, which the event loop needs, among the workers."""
    max_rows: int = 256
    """Rows of a merged batch; a single request may have as many as its artifact takes."""
    max_queue: int = 1024
    """Requests of one model that may wait; more are refused."""
    timeout: float = 10.0
    """Seconds that a request may take where it names no time of its own."""
    max_body: int = 64 << 20
    """Bytes of a request, also after it is unpacked."""
    max_head: int = 64 << 10
    """Bytes of a request's line and headers."""
    max_connections: int = 4096
    """Connections over HTTP, and calls at once over gRPC; further ones are refused."""
    max_depth: int = 32
    """How deep the JSON of a request for recommendations may nest."""
    body_timeout: float = 10.0
    """Seconds in which a request must have come."""
    feature_cache: int = 0
    """Bytes for the features of users; 0 keeps none."""
    feature_ttl: float = 60.0
    """Seconds that a user's features are used for."""
    answer_cache: int = 0
    """Bytes for answers to identical requests; 0 keeps none."""
    answer_ttl: float = 60.0
    """Seconds that an answer is given again for."""
    watch: float = 2.0
    """Seconds between looks for new versions on disk; 0 never looks."""
    canary: float = 10.0
    """Seconds between golden requests that are sent through the whole server while it runs."""
    drain: float = 30.0
    """Seconds that requests in flight get to finish after SIGTERM."""
    access_log: bool = False
    """A line of log for each request, not only for those that fail."""

    def threads_of_a_batch(self) -> int:
        return self.threads or max(1, (len(os.sched_getaffinity(0)) - 1) // self.workers)
