"""The description of the API, as `/openapi.json` and as a page that needs no other site."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from ssod_edge.serve.limits import Limits

#: What the page of `/docs` may load and run: itself, and the API.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: Status -> what it says, of the answers that hold no verdict.
REFUSALS = {
    400: "An empty body, or a form that is none or holds no file",
    401: "A token is required",
    403: "A page of another site asks",
    404: "No such model",
    408: "The body took too long",
    413: "Too many bytes, pixels or images",
    415: "Another type of body",
    421: "Another Host than one of this machine's own names",
    422: "The image cannot be read",
    429: "Too many images are waiting; Retry-After says when to come again",
    500: "The server failed",
    503: "It took too long, or the model gives no answer",
}


def docs() -> bytes:
    """The page."""
    return files("ssod_edge.serve").joinpath("docs.html").read_bytes()


def _nullable(kind: str, text: str, **more: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], "description": text, **more}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


#: The fields of `ssod_edge.runtime.predict.Verdict`.
VERDICT = _object(
    {
        "image": {"type": "string", "description": "The file's name in a form, else 'bytes'"},
        "class_index": _nullable("integer", "The likeliest class", minimum=0),
        "class_name": _nullable("string", "Its name"),
        "confidence": _nullable("number", "Its probability", minimum=0, maximum=1),
        "ood_score": _nullable("number", "Larger: more likely unknown"),
        "threshold": _nullable("number", "Up to this score an image is known"),
        "known": _nullable("boolean", "Whether the model knows such images; null without a threshold"),
        "p_known": _nullable("number", "Share of known images with such a score or a higher one", minimum=0, maximum=1),
        "engine": {"type": "string"},
        "precision": {"type": "string"},
        "image_warning": _nullable("string", "What is damaged in a picture that could be read"),
        "error": _nullable("string", "Why there is no verdict on this image"),
    }
)
#: What `ssod_edge.serve.models.Model.facts` says.
MODEL = _object(
    {
        "name": {"type": "string"},
        "version": {"type": "integer"},
        "classes": {"type": "array", "items": {"type": "string"}},
        "backbone": {"type": "string"},
        "input_size": {"type": "integer"},
        "score": {"type": "string"},
        "threshold": _nullable("number", "Up to this score an image is known"),
        "target_tpr": _nullable("number", "Share of known images that it keeps known"),
        "artifact": {"type": "string"},
        "engine": {"type": "string"},
        "precision": {"type": "string"},
        "since": {"type": "string", "format": "date-time", "description": "When this export began to answer"},
        "ready": {"type": "boolean"},
        "problem": _nullable("string", "Why the export that is in its place does not answer"),
    }
)


def _answers(name: str, text: str, refusals: tuple[int, ...] = ()) -> dict[str, Any]:
    """The responses of a page: a JSON answer of a schema, and refusals."""
    found: dict[str, Any] = {"200": {"description": text, "content": _json({"$ref": f"#/components/schemas/{name}"})}}
    for status in refusals:
        found[str(status)] = {"description": REFUSALS[status], "content": _json({"$ref": "#/components/schemas/Error"})}
    return found


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


#: The pages that a token opens, where there is one.
BEHIND_TOKEN = ("/v1/predict", "/v1/models/{name}/predict", "/v1/models", "/metrics")
#: What every page may answer, whatever it is for.
GUARDED = (401, 403, 421)


def openapi(limits: Limits, with_token: bool) -> dict[str, Any]:
    """The description of the API, as OpenAPI 3.1."""
    text = {"description": "Prometheus's format", "content": {"text/plain": {"schema": {"type": "string"}}}}
    paths: dict[str, Any] = {
        **_predict(limits),
        "/v1/models": {"get": {"summary": "The models", "responses": _answers("Models", "All of them", GUARDED)}},
        "/healthz": {"get": {"summary": "The process lives", "responses": _answers("Status", "It does", GUARDED)}},
        "/readyz": {"get": {"summary": "Models answer", "responses": _answers("Status", "Each does", (*GUARDED, 503))}},
        "/metrics": {"get": {"summary": "Counts", "responses": {**_answers("Status", "", GUARDED), "200": text}}},
    }
    verdicts = _object(
        {
            "model": {"type": "string"},
            "version": {"type": "integer", "description": "Of the export that answered"},
            "verdicts": {"type": "array", "items": {"$ref": "#/components/schemas/Verdict"}},
        }
    )
    models = _object({"models": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}})
    words = {name: _object({name.lower(): {"type": "string"}}) for name in ("Status", "Error")}
    schemas = {"Verdicts": verdicts, "Verdict": VERDICT, "Models": models, "Model": MODEL, **words}
    components: dict[str, Any] = {"schemas": schemas}
    if with_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for operation in (found for path in BEHIND_TOKEN for found in paths[path].values()):
            operation["security"] = [{"token": []}]
    info = {"title": "ssod-edge serve", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _predict(limits: Limits) -> dict[str, Any]:
    """The two pages that judge."""
    image = {"type": "string", "contentMediaType": "application/octet-stream", "maxLength": limits.body}
    form = {
        "type": "object",
        "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}},
        "required": ["image"],
    }
    kinds = {kind: {"schema": image} for kind in ("application/octet-stream", "image/jpeg", "image/png")}
    predict = {
        "summary": "Verdicts on one image, or on the files of a form",
        "requestBody": {"required": True, "content": {**kinds, "multipart/form-data": {"schema": form}}},
        "responses": _answers("Verdicts", "A verdict for each image, in order", tuple(REFUSALS)),
    }
    name = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]+$"},
    }
    return {
        "/v1/predict": {"post": {**predict, "operationId": "predict", "description": "Where there is one model"}},
        "/v1/models/{name}/predict": {"post": {**predict, "operationId": "predictBy", "parameters": [name]}},
    }
