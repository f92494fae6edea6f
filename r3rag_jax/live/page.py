"""The demo's pages: HTML with its own styles and scripts, and the headers that allow nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from r3rag_jax.reporting.rendering import environment

LIMITS = {"minimum": "from", "maximum": "to", "maxLength": "length up to"}  # of a JSON schema


class Page(NamedTuple):
    """A page and the headers that it is sent with."""

    html: str
    headers: Mapping[str, str]


@functools.cache
def demo_page() -> Page:
    """The page on which questions are asked; it fetches everything that depends on the run."""
    return _page("demo.html.j2", "demo.js", {})


def api_page(openapi: Mapping[str, Any]) -> Page:
    """The OpenAPI document, to read."""
    operations = [
        (method.upper(), path, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = openapi["components"]["schemas"]
    values = {"operations": operations, "schemas": schemas, "info": openapi["info"], "fields": fields}
    return _page("api.html.j2", None, values)


def fields(schema: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The properties of a JSON schema, for a table: name, values, and what they mean."""
    rows = []
    for name, field in schema["properties"].items():
        meaning = field.get("description", "")
        if "default" in field and "const" not in field:
            meaning = f"{meaning}{'; ' if meaning else ''}default: {json.dumps(field['default'])}"
        rows.append((name, _values(field), meaning))
    return rows


def _values(field: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    if "const" in field or "enum" in field:
        return " or ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(map(_values, field["anyOf"]))
    if field.get("type") == "array":
        return f"list of {_values(field['items'])}"
    limits = [f"{word} {field[key]}" for key, word in LIMITS.items() if key in field]
    return ", ".join([str(field.get("type", "value")), *limits])


def _page(template: str, script: str | None, values: Mapping[str, Any]) -> Page:
    templates = _templates()
    style = environment().get_template("style.css").render() + _source("demo.css")
    code = _source(script) if script else ""
    html = templates.get_template(template).render(style=Markup(style), script=Markup(code), **values)
    sources = {"style-src": _hash(style), "script-src": _hash(code) if code else "'none'"}
    policy = "; ".join([
        "default-src 'none'", *(f"{name} {source}" for name, source in sources.items()), "connect-src 'self'",
        "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'", "trusted-types 'none'",
    ])  # fmt: skip
    headers = {
        "content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }  # fmt: skip
    return Page(html, headers)


def _source(name: str) -> str:
    """A file as it stands."""
    loader = _templates().loader
    assert loader is not None
    return loader.get_source(_templates(), name)[0]


def _hash(source: str) -> str:
    """The expression by which a policy allows an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


@functools.cache
def _templates() -> jinja2.Environment:
    """Inserted text is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("r3rag_jax.live"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
