"""OpenAPI: what the server answers, for programs and, as one page without scripts, for people."""

from __future__ import annotations

import html
import inspect
from collections.abc import Sequence
from typing import Any

from grc.runtime.server import describe
from grc.runtime.server.version import Version
from grc.runtime.version import VERSION

TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string"},
        "data": {"type": "array", "items": {}},
    },
}
ERROR = {"type": "object", "properties": {"error": {"type": "string"}}}
ERRORS = {
    "400": "The request does not fit; the message names the field",
    "404": "The model, its version or the path is unknown",
    "405": "The path takes another method, which Allow names",
    "408": "The request did not come in time",
    "413": "The body is too large, or its JSON holds too many values",
    "415": "The body is packed in an unknown way",
    "431": "The request's line and headers are too long",
    "500": "The server's own fault, or postprocess raised",
    "503": "Too busy to answer in time; Retry-After says when to come back",
}
NUMBER = {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}
USER = [
    {"name": "x-user-id", "in": "header", "schema": {"type": "string"}, "description": "Whose features may be kept."},
    {
        "name": "x-features-version",
        "in": "header",
        "schema": {"type": "integer"},
        "description": "Grows with every change of the user's behaviours.",
    },
    {
        "name": "x-timeout-ms",
        "in": "header",
        "schema": {"type": "integer"},
        "description": "Refuse the request at once where it would take longer.",
    },
]


def document(versions: Sequence[Version]) -> dict[str, Any]:
    paths = {
        "/v2": {"get": operation("The server's metadata")},
        "/v2/health/live": {"get": operation("Whether the server runs")},
        "/v2/health/ready": {"get": operation("Whether golden requests are answered rightly")},
        "/v2/repository/index": {"post": operation("The models and their versions")},
        "/v2/models/stats": {"get": operation("The statistics of all models")},
        "/metrics": {"get": operation("Metrics in Prometheus' form")},
    }
    for version in versions:
        for action, (method, about) in actions(version).items():
            base = f"/v2/models/{version.name}"
            paths[base + action] = {method: about}
            numbered = {**about, "parameters": [NUMBER, *about.get("parameters", ())]}
            paths[f"{base}/versions/{{version}}{action}"] = {method: numbered}
    content = {"application/json": {"schema": ERROR}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "grc serve", "version": VERSION},
        "paths": paths,
        "components": {"responses": {c: {"description": text, "content": content} for c, text in ERRORS.items()}},
    }


def actions(version: Version) -> dict[str, tuple[str, dict[str, Any]]]:
    """What a model answers: the end of the path, its method, and what is said of it."""
    found = {
        "": ("get", operation(f"Inputs and outputs of {version.name}")),
        "/ready": ("get", operation(f"Whether {version.name} is ready")),
        "/config": ("get", operation(f"The configuration of {version.name}")),
        "/stats": ("get", operation(f"The statistics of {version.name}")),
        "/infer": ("post", infer(version)),
    }
    if version.recommends:
        forget = operation(f"Forget a user's features in {version.name}", code="204")
        user = {"name": "user", "in": "path", "required": True, "schema": {"type": "string"}}
        found["/recommend"] = ("post", recommend(version))
        found["/users/{user}/features"] = ("delete", {**forget, "parameters": [user]})
    return found


def operation(summary: str, code: str = "200", schema: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"content": {"application/json": {"schema": schema}}} if schema else {}
    errors = {code: {"$ref": f"#/components/responses/{code}"} for code in ERRORS}
    return {"summary": summary, "responses": {code: {"description": "Well", **content}, **errors}}


def schema_of(value: Any) -> dict[str, Any]:
    """The schema of JSON like this example, which says nothing of what else there may be."""
    if isinstance(value, dict):
        return {"type": "object", "properties": {key: schema_of(own) for key, own in value.items()}}
    if isinstance(value, list):
        kinds = [schema_of(own) for own in value]
        if {kind.get("type") for kind in kinds} == {"integer", "number"}:
            kinds = [{"type": "number"}]
        return {"type": "array", "items": kinds[0] if kinds and all(kind == kinds[0] for kind in kinds) else {}}
    names = {str: "string", bool: "boolean", int: "integer", float: "number"}
    return {"type": names[type(value)]} if value is not None else {}


def infer(version: Version) -> dict[str, Any]:
    inputs, _ = describe.tensors(version)
    request = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "items": TENSOR},
            "outputs": {"type": "array", "items": {"type": "object"}},
        },
    }
    example = {
        "inputs": [
            {"name": e["name"], "datatype": describe.datatype(e), "shape": list(t.shape), "data": t.flatten().tolist()}
            for e, t in zip(inputs, version.canary.inputs, strict=True)
            if t.numel() <= 64  # of a larger tensor nobody reads an example
        ]
    }
    outputs = {
        "type": "object",
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "outputs": {"type": "array", "items": TENSOR},
        },
    }
    body: dict[str, Any] = {"schema": request}
    if len(example["inputs"]) == len(inputs):
        body["example"] = example
    found = operation(f"Tensors to tensors through {version.name}", schema=outputs)
    return {**found, "requestBody": {"required": True, "content": {"application/json": body}}}


def recommend(version: Version) -> dict[str, Any]:
    functions = version.processing().functions
    texts = {name: inspect.getdoc(getattr(function, "func", function)) or "" for name, function in functions.items()}
    told = {"type": "object"} if version.example is None else schema_of(version.example_answer)
    found = operation(f"Behaviours to recommendations through {version.name}", schema=told)
    found["description"] = texts.get("preprocess", "")
    found["responses"]["200"]["description"] = texts.get("postprocess") or "The model's answer"
    sent: dict[str, Any] = {"schema": {"type": "object"}}
    if version.example is not None:
        sent = {"schema": schema_of(version.example), "example": version.example}
        found["responses"]["200"]["content"]["application/json"]["example"] = version.example_answer
    body = {"required": True, "content": {"application/json": sent}}
    return {**found, "parameters": USER, "requestBody": body}


def page(versions: Sequence[Version]) -> str:
    """The same document as a page: every path, what it does, and what it is sent."""
    rows = []
    for path, methods in document(versions)["paths"].items():
        for method, found in methods.items():
            about = html.escape(" ".join([found["summary"] + ".", found.get("description", "")]))
            rows.append(f"<tr><td>{method.upper()}<td><code>{html.escape(path)}</code><td>{about}")
    models = []
    for version in versions:
        tensors = "".join(
            f"<tr><td>{kind}<td><code>{html.escape(e['name'])}</code><td>{describe.datatype(e)}<td>{describe.shape(e)}"
            for kind, entries in zip(("input", "output"), describe.tensors(version), strict=True)
            for e in entries
        )
        models.append(f"<h2>{html.escape(version.name)}, version {version.number}</h2><table>{tensors}</table>")
    return (
        "<!doctype html><meta charset=utf-8><title>grc serve</title>"
        "<style>body{font:16px sans-serif;margin:2em;max-width:60em}td{padding:.2em 1em .2em 0;vertical-align:top}</style>"
        f"<h1>grc serve {VERSION}</h1><p>For programs: <a href=openapi.json>openapi.json</a></p>"
        f"<table>{''.join(rows)}</table>{''.join(models)}\n"
    )
