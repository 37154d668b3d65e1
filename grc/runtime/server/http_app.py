"""HTTP: what the protocol's paths answer, without a framework between connection and model."""

from __future__ import annotations

import asyncio
import functools
import urllib.parse
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import httptools
import orjson
import torch

from grc.runtime.server import describe, messages, openapi
from grc.runtime.server.body import LARGE, check_depth, check_values, unpacked
from grc.runtime.server.exchange import Exchange
from grc.runtime.server.features import User
from grc.runtime.server.health import Health
from grc.runtime.server.logs import clean_id, request_id
from grc.runtime.server.models import Models
from grc.runtime.server.refusal import Refused, gone, invalid, too_large
from grc.runtime.server.service import Call, Service, body_digest
from grc.runtime.server.settings import Settings
from grc.runtime.server.version import Version

JSON, BYTES, TEXT, PAGE = (
    b"application/json",
    b"application/octet-stream",
    b"text/plain; version=0.0.4; charset=utf-8",
    b"text/html; charset=utf-8",
)
HEADER_LENGTH, CODING = b"inference-header-content-length", b"content-encoding"
Headers = dict[bytes, bytes]
Answer = tuple[int, bytes, bytes, list[tuple[bytes, bytes]]]  # status, kind, body, further headers


class Http:
    def __init__(self, service: Service, models: Models, health: Health, settings: Settings):
        self.service, self.models, self.health, self.settings = service, models, health, settings
        self.tasks: set[asyncio.Task[None]] = set()
        self.gets: dict[str, Callable[[Version], Any]] = {
            "": describe.metadata,
            "config": describe.config,
            "stats": lambda version: {"model_stats": [version.statistics.json(version.name, version.number)]},
        }

    def __call__(self, exchange: Exchange) -> None:
        given = exchange.headers.get(b"x-request-id")
        call = Call(clean_id(given.decode("latin-1")) if given else request_id(), "http", self.settings.timeout)
        try:
            self.route(call, exchange)
        except Exception as error:  # every error is some client's answer, and the server goes on
            self.refuse(call, exchange, error)

    def answer(self, call: Call, exchange: Exchange, answer: Answer) -> None:
        status, kind, body, more = answer
        exchange.answer(status, kind, body, call.id.encode(), more)

    def refuse(self, call: Call, exchange: Exchange, error: Exception) -> None:
        self.answer(call, exchange, refused(self.service.failed(call, error)))

    def cut_short(self) -> None:
        """A client left in the middle of its request: there is nobody to answer."""
        self.service.failed(Call(request_id(), "http", self.settings.timeout), gone("its request was whole"))

    def lost(self, call: Call, exchange: Exchange, reason: Refused) -> None:
        """Its client left while a request was being answered, or the server waits no longer."""
        call.gone = True
        self.refuse(call, exchange, reason)

    def route(self, call: Call, exchange: Exchange) -> None:
        if exchange.fault is not None:
            raise exchange.fault
        parts = parts_of(exchange.url)
        path = "/".join(parts)
        method = exchange.method.decode()
        if parts[1:3] == ("v2", "models") and len(parts) > 3:
            self.model(call, method, path, list(parts[3:]), exchange)
            return
        allowed, found = self.page(path)
        if found is None:
            raise Refused(404, f"there is nothing at {path}", "unknown_path")
        check_method(method, allowed, path)
        self.answer(call, exchange, found())

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

    def model(self, call: Call, method: str, path: str, parts: list[str], exchange: Exchange) -> None:
        """`/v2/models/NAME[/versions/V][/ACTION]`."""
        name, rest, number = parts[0], parts[1:], None
        call.model = name
        if rest[:1] == ["versions"] and len(rest) > 1:
            number, rest = rest[1], rest[2:]
        if name == "stats" and not rest and name not in self.models.all:
            check_method(method, "GET", path)
            stats = [v.statistics.json(v.name, v.number) for v in self.models.versions()]
            self.answer(call, exchange, json({"model_stats": stats}))
            return
        action = "/".join(rest)
        if action in ("infer", "recommend"):
            check_method(method, "POST", path)
            version = call.version = self.models.find(name, number)
            if action == "recommend" and not version.recommends:
                told = f"model {version.name} has no preprocess and no postprocess: send tensors to infer"
                raise Refused(404, told, "unknown_path")
            body = unpacked(exchange.body, exchange.headers.get(CODING), LARGE)
            if body is None:
                self.begin(call, exchange, self.read_large(call, version, exchange, action))
            elif action == "infer":
                self.infer(call, version, exchange, self.tensors(version, exchange, body))
            else:
                self.recommend(call, version, exchange, body, self.words(body))
            return
        version = self.models.find(name, number)
        if action in self.gets:
            check_method(method, "GET", path)
            self.answer(call, exchange, json(self.gets[action](version)))
        elif action == "ready":
            check_method(method, "GET", path)
            self.answer(call, exchange, ((200 if self.health.model_ready(name) else 503), TEXT, b"", []))
        elif len(rest) == 3 and rest[0] == "users" and rest[2] == "features":
            check_method(method, "DELETE", path)
            self.service.features.forget(name, rest[1])
            self.answer(call, exchange, (204, TEXT, b"", []))
        else:
            raise Refused(404, f"there is nothing at {path}", "unknown_path")

    def tensors(self, version: Version, exchange: Exchange, body: bytes, large: bool = False) -> messages.Asked:
        given = exchange.headers.get(HEADER_LENGTH)
        end = len(body) if given is None else whole(given, "Inference-Header-Content-Length")
        if large:
            check_values(body, end, self.settings.max_body)
        return messages.read(body, end, version, remember=not large)

    def words(self, body: bytes, large: bool = False) -> dict[str, Any]:
        if large:
            check_values(body, len(body), self.settings.max_body)
        request = messages.read_json(body)
        check_depth(request, body, self.settings.max_depth)
        return request

    async def read_large(self, call: Call, version: Version, exchange: Exchange, action: str) -> None:
        """A body that takes long to unpack and to read is read on a thread."""

        def read() -> tuple[bytes, Any]:
            body = unpacked(exchange.body, exchange.headers.get(CODING), self.settings.max_body)
            if body is None:
                raise too_large(self.settings.max_body)
            found = self.tensors(version, exchange, body, True) if action == "infer" else self.words(body, True)
            return body, found

        try:
            async with self.service.in_time(call, version):
                body, found = await self.service.loop.run_in_executor(self.service.reading, read)
            if action == "infer":
                self.infer(call, version, exchange, found)
            else:
                self.recommend(call, version, exchange, body, found)
        except Exception as error:  # as above
            self.refuse(call, exchange, error)

    def infer(self, call: Call, version: Version, exchange: Exchange, asked: messages.Asked) -> None:
        """Without a task: the scheduler settles an Inference as it would settle a future, and that writes the answer."""
        if asked.id and b"x-request-id" not in exchange.headers:
            call.id = clean_id(asked.id)
        call.asks(asked.seconds, asked.priority)
        self.service.start(call, version, asked.inputs, Inference(self, call, version, exchange, asked))

    def recommend(self, call: Call, version: Version, exchange: Exchange, body: bytes, request: dict[str, Any]) -> None:
        seconds = exchange.headers.get(b"x-timeout-ms")
        if seconds is not None:
            call.due(whole(seconds, "x-timeout-ms") / 1e3)
        user = user_of(exchange.headers, body)
        self.begin(call, exchange, self.recommended(call, version, exchange, body, request, user))

    def begin(self, call: Call, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        """Work for a request that takes more than one turn of the loop. It ends where nobody waits for it any more."""
        task = self.service.loop.create_task(work)

        def lost(reason: Refused) -> None:
            self.lost(call, exchange, reason)
            task.cancel()

        exchange.lost = lost
        self.tasks.add(task)  # the loop itself would not keep it alive
        task.add_done_callback(self.tasks.discard)

    async def recommended(
        self,
        call: Call,
        version: Version,
        exchange: Exchange,
        body: bytes,
        request: dict[str, Any],
        user: User | None,
    ) -> None:
        try:
            async with self.service.in_time(call, version):
                text = await self.service.recommend(call, version, body, request, user)
        except Exception as error:  # as above
            self.refuse(call, exchange, error)
            return
        self.service.succeeded(call)
        self.answer(call, exchange, (200, JSON, text, []))


class Inference:
    """A request to infer on its way, in a future's place: what becomes of it is written to its client at once."""

    __slots__ = ("asked", "call", "exchange", "http", "version")

    def __init__(self, http: Http, call: Call, version: Version, exchange: Exchange, asked: messages.Asked):
        self.http, self.call, self.version, self.exchange, self.asked = http, call, version, exchange, asked
        exchange.lost = functools.partial(http.lost, call, exchange)

    def done(self) -> bool:
        return self.exchange.gone

    cancelled = done

    def set_result(self, answer: Sequence[torch.Tensor]) -> None:
        try:
            text, header = messages.write(self.asked, answer, self.version)
        except Exception as error:  # as above
            self.set_exception(error)
            return
        self.http.service.succeeded(self.call)
        found = (200, JSON, text, []) if header is None else (200, BYTES, text, [(HEADER_LENGTH, b"%d" % header)])
        self.http.answer(self.call, self.exchange, found)

    def set_exception(self, error: Exception) -> None:
        self.http.refuse(self.call, self.exchange, error)


@functools.lru_cache(1024)
def parts_of(url: bytes) -> tuple[str, ...]:
    """The parts of its path, each of which may hold any character. Raises Refused for what is no URL."""
    try:
        path = httptools.parse_url(url).path or b""
    except httptools.HttpParserInvalidURLError:
        raise invalid("the request has no path", "http") from None
    return tuple(text_of(urllib.parse.unquote_to_bytes(part)) for part in path.split(b"/"))


def text_of(data: bytes) -> str:
    """UTF-8, as clients send it by now; what is none is latin-1, as HTTP once had it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def user_of(headers: Headers, body: bytes) -> User | None:
    """Whose features may be kept, where the client says so."""
    name, version = headers.get(b"x-user-id"), headers.get(b"x-features-version")
    if name is None and version is None:
        return None
    if name is None or version is None:
        raise invalid("x-user-id and x-features-version belong together")
    return User(text_of(name), whole(version, "x-features-version"), body_digest(body))


def whole(text: bytes, name: str) -> int:
    if not text.isdigit() or len(text) > 18:
        raise invalid(f"{name} must be a whole number, not {text.decode('latin-1')}")
    return int(text)


def check_method(method: str, allowed: str, path: str) -> None:
    """HEAD is answered as GET is, but for the body, which the exchange leaves out."""
    allow = "GET, HEAD" if allowed == "GET" else allowed
    if method not in allow.split(", "):
        raise Refused(405, f"{path} takes {allowed}, not {method}", "method", allow=allow)


def json(value: Any) -> Answer:
    return 200, JSON, orjson.dumps(value), []


def refused(error: Refused) -> Answer:
    more = [] if error.retry_after is None else [(b"retry-after", b"%d" % error.retry_after)]
    if error.allow:
        more.append((b"allow", error.allow.encode()))
    return error.status, JSON, orjson.dumps({"error": error.message}), more
