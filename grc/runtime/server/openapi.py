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
    paths: dict[str, Any] = {
        "/v2": {"get": operation("The server's metadata")},
        "/v2/health/live": {"get": operation("Whether the server runs")},
        "/v2/health/ready": {"get": operation("Whether golden requests are answered rightly")},
        "/metrics": {"get": operation("Metrics in Prometheus' form")},
    }
    for version in versions:
        base = f"/v2/models/{version.name}"
        paths[base] = {"get": operation(f"Inputs and outputs of {version.name}")}
        paths[f"{base}/ready"] = {"get": operation(f"Whether {version.name} is ready")}
        paths[f"{base}/config"] = {"get": operation(f"The configuration of {version.name}")}
        paths[f"{base}/stats"] = {"get": operation(f"The statistics of {version.name}")}
        paths[f"{base}/infer"] = {"post": infer(version)}
        if version.recommends:
            paths[f"{base}/recommend"] = {"post": recommend(version)}
            forget = operation(f"Forget a user's features in {version.name}", code="204")
            user = {"name": "user", "in": "path", "required": True, "schema": {"type": "string"}}
            paths[f"{base}/users/{{user}}/features"] = {"delete": {**forget, "parameters": [user]}}
    return {"openapi": "3.1.0", "info": {"title": "grc serve", "version": VERSION}, "paths": paths}


def operation(summary: str, code: str = "200", schema: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"content": {"application/json": {"schema": schema}}} if schema else {}
    return {"summary": summary, "responses": {code: {"description": "Well", **content}}}


def answered(found: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": ERROR}}
    for code, text in (
        ("400", "The request does not fit; the message names the field"),
        ("503", "Too busy to answer in time; Retry-After says when to come back"),
    ):
        found["responses"][code] = {"description": text, "content": content}
    return found


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
    found = answered(operation(f"Tensors to tensors through {version.name}", schema=outputs))
    return {**found, "requestBody": {"required": True, "content": {"application/json": body}}}


def recommend(version: Version) -> dict[str, Any]:
    functions = version.processing().functions
    texts = {name: inspect.getdoc(getattr(function, "func", function)) or "" for name, function in functions.items()}
    found = answered(operation(f"Behaviours to recommendations through {version.name}", schema={"type": "object"}))
    found["description"] = texts.get("preprocess", "")
    found["responses"]["200"]["description"] = texts.get("postprocess") or "The model's answer"
    sent: dict[str, Any] = {"schema": {"type": "object"}}
    if version.example is not None:
        sent["example"] = version.example
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
