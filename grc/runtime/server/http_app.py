"""HTTP: the protocol's paths as one plain ASGI application, without a framework between socket and model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from grc.runtime.server import describe, messages, openapi
from grc.runtime.server.body import Gone, check_depth, read_body
from grc.runtime.server.features import User
from grc.runtime.server.health import Health
from grc.runtime.server.logs import clean_id, request_id
from grc.runtime.server.models import Models
from grc.runtime.server.refusal import Refused, invalid
from grc.runtime.server.service import Call, Service, listed
from grc.runtime.server.settings import Settings
from grc.runtime.server.version import Version

JSON, BYTES, TEXT, PAGE = (
    b"application/json",
    b"application/octet-stream",
    b"text/plain; version=0.0.4; charset=utf-8",
    b"text/html; charset=utf-8",
)
HEADER_LENGTH = b"inference-header-content-length"
Headers = dict[bytes, bytes]
Answer = tuple[int, bytes, bytes, list[tuple[bytes, bytes]]]  # status, kind, body, further headers


class Http:
    def __init__(self, service: Service, models: Models, health: Health, settings: Settings):
        self.service, self.models, self.health, self.settings = service, models, health, settings
        self.posts: dict[str, Callable[[Call, Version, Headers, bytes], Awaitable[Answer]]] = {
            "infer": self.infer,
            "recommend": self.recommend,
        }
        self.gets: dict[str, Callable[[Version], Any]] = {
            "": describe.metadata,
            "config": describe.config,
            "stats": lambda version: {"model_stats": [version.statistics.json(version.name, version.number)]},
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers: Headers = dict(scope["headers"])
        given = clean_id(headers.get(b"x-request-id", b"").decode("latin-1"))
        call = Call(given or request_id(), "http", self.settings.timeout)
        try:
            status, kind, body, more = await self.answer(call, scope, headers, receive)
        except Gone:
            self.service.failed(call, Refused(499, "the client went away before its request was whole", "gone"))
            return
        except Exception as error:  # every error is some client's answer, and the server goes on
            status, kind, body, more = refused(self.service.failed(call, error))
        head = [
            (b"content-type", kind),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", call.id.encode()),
            *more,
        ]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": body})

    async def answer(self, call: Call, scope: Any, headers: Headers, receive: Any) -> Answer:
        method, path = scope["method"], scope["path"]
        parts = path.split("/")
        if parts[1:3] == ["v2", "models"] and len(parts) > 3:
            return await self.model(call, method, path, parts[3:], headers, receive)
        allowed, found = self.page(path)
        if found is None:
            raise Refused(404, f"there is nothing at {path}", "unknown_path")
        check_method(method, allowed, path)
        return found()

    def page(self, path: str) -> tuple[str, Callable[[], Answer] | None]:
        """What is not about one model: the method it takes, and what answers it."""
        ready = {model.name: self.health.model_ready(model.name) for model in self.models.all.values()}
        versions = list(self.models.versions())
        pages: dict[str, tuple[str, Callable[[], Answer]]] = {
            "/v2": ("GET", lambda: json(describe.server_metadata())),
            "/v2/": ("GET", lambda: json(describe.server_metadata())),
            "/v2/health/live": ("GET", lambda: (200, TEXT, b"", [])),
            "/v2/health/ready": ("GET", lambda: (200 if self.health.ready() else 503, TEXT, b"", [])),
            "/v2/repository/index": ("POST", lambda: json(describe.index(versions, ready))),
            "/metrics": ("GET", lambda: (200, TEXT, self.service.metrics.text(), [])),
            "/openapi.json": ("GET", lambda: json(openapi.document(versions))),
            "/docs": ("GET", lambda: (200, PAGE, openapi.page(versions).encode(), [])),
        }
        return pages.get(path, ("GET", None))

    async def model(
        self, call: Call, method: str, path: str, parts: list[str], headers: Headers, receive: Any
    ) -> Answer:
        """`/v2/models/NAME[/versions/V][/ACTION]`."""
        name, rest, number = call_name(call, parts[0]), parts[1:], None
        if rest[:1] == ["versions"] and len(rest) > 1:
            number, rest = rest[1], rest[2:]
        if name == "stats" and not rest and name not in self.models.all:
            check_method(method, "GET", path)
            return json({"model_stats": [v.statistics.json(v.name, v.number) for v in self.models.versions()]})
        action = "/".join(rest)
        post = self.posts.get(action)
        if post is not None:
            check_method(method, "POST", path)
            # The body first: a connection whose request was not read to its end can't be used for the next one.
            body = await read_body(headers, receive, self.settings.max_body, self.settings.body_timeout)
            version = call.version = self.models.find(name, number)
            found = await post(call, version, headers, body)
            self.service.succeeded(call)
            return found
        version = self.models.find(name, number)
        if action in self.gets:
            check_method(method, "GET", path)
            return json(self.gets[action](version))
        if action == "ready":
            check_method(method, "GET", path)
            return (200 if self.health.model_ready(name) else 503), TEXT, b"", []
        if len(rest) == 3 and rest[0] == "users" and rest[2] == "features":
            check_method(method, "DELETE", path)
            self.service.features.forget(name, rest[1])
            return 204, TEXT, b"", []
        raise Refused(404, f"there is nothing at {path}", "unknown_path")

    async def infer(self, call: Call, version: Version, headers: Headers, body: bytes) -> Answer:
        given = headers.get(HEADER_LENGTH)
        asked = messages.read(body, None if given is None else length(given), version)
        if asked.id and b"x-request-id" not in headers:
            call.id = clean_id(asked.id)
        if asked.seconds is not None:
            call.due(asked.seconds)
        answer = await self.service.infer(call, version, asked.inputs)
        text, header = messages.write(asked, answer, version)
        if header is None:
            return 200, JSON, text, []
        return 200, BYTES, text, [(HEADER_LENGTH, str(header).encode())]

    async def recommend(self, call: Call, version: Version, headers: Headers, body: bytes) -> Answer:
        if not version.recommends:
            raise Refused(
                404, f"model {version.name} has no preprocess and no postprocess: send tensors to infer", "unknown_path"
            )
        request = messages.read_json(body)
        check_depth(request, self.settings.max_depth)
        seconds = headers.get(b"x-timeout-ms")
        if seconds is not None:
            call.due(whole(seconds, "x-timeout-ms") / 1e3)
        found = await self.service.recommend(call, version, request, user_of(headers))
        option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
        try:
            return 200, JSON, orjson.dumps(found, default=listed, option=option), []
        except orjson.JSONEncodeError as error:
            raise Refused(500, str(error.__cause__ or error), "postprocess") from error


def call_name(call: Call, name: str) -> str:
    call.model = name
    return name


def user_of(headers: Headers) -> User | None:
    """Whose features may be kept, where the client says so."""
    name, version = headers.get(b"x-user-id"), headers.get(b"x-features-version")
    if name is None and version is None:
        return None
    if name is None or version is None:
        raise invalid("x-user-id and x-features-version belong together")
    return User(name.decode("latin-1"), whole(version, "x-features-version"))


def whole(text: bytes, name: str) -> int:
    if not text.isdigit() or len(text) > 18:
        raise invalid(f"{name} must be a whole number, not {text.decode('latin-1')}")
    return int(text)


def length(text: bytes) -> int:
    return whole(text, "Inference-Header-Content-Length")


def check_method(method: str, allowed: str, path: str) -> None:
    if method != allowed:
        raise Refused(405, f"{path} takes {allowed}, not {method}", "method")


def json(value: Any) -> Answer:
    return 200, JSON, orjson.dumps(value), []


def refused(error: Refused) -> Answer:
    more = [] if error.retry_after is None else [(b"retry-after", str(error.retry_after).encode())]
    if error.status in (408, 413):  # the rest of the body would be read as the next request
        more.append((b"connection", b"close"))
    return error.status, JSON, orjson.dumps({"error": error.message}), more
