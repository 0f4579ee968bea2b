"""Compare what two versions of together_fake.py answer, byte for byte.

    same.py OLD NEW [--draws N]    two files; N drawn requests of each inference route

Sent are the good request of every route, as the tests have it, and drawn ones: whole and streamed,
with every field that changes an answer. Clocks are masked, nothing else. Ends with 1 where an
answer differs, and prints the first differences.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import test_together_fake as tests  # noqa: E402

CLOCKS = re.compile(rb"\b1[78]\d{8}(\.\d+)?\b|\b20\d\d-\d\d-\d\dT[\d:.]+(Z|\+00:00)?|127.0.0.1:\d+")
UNCOMPARED = {"date", "x-api-received", "x-api-call-start", "x-api-call-end"}
WORDS = [
    "weather",
    "city",
    "red",
    "pie",
    "why",
    "apple",
    "sky",
    "code",
    "list",
    "train",
    "river",
    "seven",
    "lamp",
    "write",
    "sum",
]
SCHEMAS: list[dict[str, Any]] = [
    tests.CITY,
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
            "size": {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.5},
            "when": {"type": "string", "format": "date-time"},
        },
        "required": ["name", "tags", "size", "when"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "integer", "minimum": 2}, "minItems": 2},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
]
MODELS = [
    tests.LLAMA, tests.THINKER, tests.R1, tests.KIMI_CODE, tests.KIMI, tests.OTHER, tests.SEES,
    tests.SMALL_MODEL, "unknown/model", "unknown/model-Turbo",
]  # fmt: skip
CLIENTS = [tests.KEY, tests.OPENAI, tests.PY1, tests.PY3]
Ask = tuple[str, str, Any, "dict[str, str]"]


def draw_text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))


def draw_chat(draw: random.Random) -> dict[str, Any]:
    """Return a chat's body with a few of the fields that change an answer."""
    messages = [{"role": "user", "content": draw_text(draw)}]
    if draw.random() < 0.3:
        messages.insert(0, {"role": "system", "content": draw_text(draw)})
    if draw.random() < 0.2:
        messages += [
            {"role": "assistant", "content": draw_text(draw)},
            {"role": "user", "content": draw_text(draw)},
        ]
    body: dict[str, Any] = {"model": draw.choice(MODELS), "messages": messages}
    schema = draw.choice(SCHEMAS)
    fields: list[dict[str, Any]] = [
        {"n": draw.randint(1, 4)},
        {"seed": draw.randint(0, 9)},
        {"max_tokens": draw.randint(1, 60)},
        {"stop": draw.choice(WORDS)},
        {"logprobs": draw.choice([1, 3, True])},
        {"temperature": draw.random()},
        {"reasoning_effort": draw.choice(["low", "high"])},
        {"reasoning": {"enabled": draw.random() < 0.5}},
        {"tools": [tests.WEATHER], "tool_choice": draw.choice(["auto", "required", "none"])},
        {"tools": [tests.WEATHER, tests.FINAL], "tool_choice": tests.tool("get_weather")},
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema, "strict": True},
            }
        },
        {"response_format": {"type": "regex", "pattern": "(yes|no), [0-9]{3}"}},
        {"stream_options": {"include_usage": True}},
        {"echo": True},
    ]
    for field in draw.sample(fields, draw.randint(0, 3)):
        body.update(field)
    if draw.random() < 0.5:
        body["stream"] = True
    return body


def draw_completion(draw: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {"model": draw.choice(MODELS), "prompt": draw_text(draw)}
    fields: list[dict[str, Any]] = [
        {"n": draw.randint(1, 3)},
        {"max_tokens": draw.randint(1, 60)},
        {"echo": True},
        {"logprobs": 2},
        {"stop": [draw.choice(WORDS)]},
        {"stream": True},
    ]
    for field in draw.sample(fields, draw.randint(0, 3)):
        body.update(field)
    return body


def draw_response(draw: random.Random) -> dict[str, Any]:
    chat = draw_chat(draw)
    body: dict[str, Any] = {"model": chat["model"], "input": chat["messages"]}
    function = tests.WEATHER["function"]
    flat = {"type": "function", **function}
    text_format = {"type": "json_schema", "name": "x", "schema": draw.choice(SCHEMAS)}
    fields: list[dict[str, Any]] = [
        {"instructions": draw_text(draw)},
        {"max_output_tokens": draw.randint(16, 80)},
        {"tools": [flat], "tool_choice": draw.choice(["auto", "required"])},
        {"text": {"format": text_format}},
        {"reasoning": {"effort": "low", "summary": "auto"}},
        {"temperature": 0.5, "metadata": {"a": "b"}},
    ]
    for field in draw.sample(fields, draw.randint(0, 3)):
        body.update(field)
    if draw.random() < 0.5:
        body["stream"] = True
    return body


def draw_embedding(draw: random.Random) -> dict[str, Any]:
    text = draw_text(draw)
    body: dict[str, Any] = {"model": draw.choice([*MODELS, "BAAI/bge-base-en-v1.5"])}
    body["input"] = draw.choice([text, [text, draw_text(draw)], [1, 2, 3]])
    if draw.random() < 0.3:
        body["encoding_format"] = "base64"
    if draw.random() < 0.3:
        body["dimensions"] = 64
    return body


def draw_rerank(draw: random.Random) -> dict[str, Any]:
    documents = [draw_text(draw) for _ in range(draw.randint(1, 6))]
    body = {"model": tests.RERANKER, "query": draw_text(draw), "documents": documents}
    return {**body, **draw.choice([{}, {"top_n": 2}, {"return_documents": True}])}


def draw_image(draw: random.Random) -> dict[str, Any]:
    body = {"model": tests.FLUX, "prompt": draw_text(draw), "width": 64, "height": 96}
    options: list[dict[str, Any]] = [{}, {"n": 2}, {"seed": 3}, {"response_format": "base64"}]
    return {**body, **draw.choice(options)}


def draw_speech(draw: random.Random) -> dict[str, Any]:
    body = {**tests.SPEECH, "input": draw_text(draw)}
    options: list[dict[str, Any]] = [
        {}, {"response_format": "mp3"}, {"stream": True, "response_format": "raw"},
    ]  # fmt: skip
    return {**body, **draw.choice(options)}


DRAWN = {
    "/v1/chat/completions": draw_chat,
    "/v1/responses": draw_response,
    "/v1/completions": draw_completion,
    "/v1/embeddings": draw_embedding,
    "/v1/rerank": draw_rerank,
    "/v1/images/generations": draw_image,
    "/v1/audio/speech": draw_speech,
}


def list_requests(draws: int) -> Iterator[Ask]:
    """Yield what is sent to both; a path that is None puts the server into its first state."""
    for route in tests.fake.ROUTES:
        name = tests.name_of(route)
        if route.path.startswith("/__parlel") or route.path in ("/", "/health"):
            continue
        path = tests.PATHS.get(name, re.sub(r"{\w+}", "id", route.path))
        body = tests.VALID.get(name, {} if route.body else None)
        for client in CLIENTS:
            yield "RESET", "", None, {}
            yield route.method, path, body, client
            if route.body and "stream" in route.body:
                yield route.method, path, {**body, "stream": True}, client
    yield "RESET", "", None, {}
    for path, draw_body in DRAWN.items():
        draw = random.Random(path)
        for _ in range(draws):
            yield "POST", path, draw_body(draw), draw.choice(CLIENTS)


@contextmanager
def serve(file: str, *options: str) -> Iterator[http.client.HTTPConnection]:
    """Run one version and connect to it."""
    command = [sys.executable, file, "--port", "0", "--quiet", *options]
    env = {name: value for name, value in os.environ.items() if not name.startswith("TOGETHER")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as program:
        try:
            assert program.stdout
            found = re.search(r"http://127.0.0.1:(\d+)", program.stdout.readline())
            assert found
            yield http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        finally:
            program.terminate()


def send(connection: http.client.HTTPConnection, ask: Ask) -> tuple[Any, ...]:
    """Send one request and return all of its answer but the time."""
    method, path, body, headers = ask
    if method == "RESET":
        send(connection, ("POST", "/__parlel/reset", None, {}))
        method, path, body = "POST", "/__parlel/seed", tests.SEEDS
    if isinstance(body, (dict, list)):
        if path.startswith("/v1/") and any(
            isinstance(value, bytes) for value in dict(body).values()
        ):
            fields = {name: value for name, value in body.items() if name != "file"}
            body, headers = tests.write_form(fields, body.get("file")), {**headers, **tests.FORM}
        else:
            body, headers = (
                json.dumps(body, default=bytes.decode),
                {**headers, "Content-Type": "application/json"},
            )
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    shown = [(name.lower(), value) for name, value in response.getheaders()]
    raw = response.read()
    kept = [
        (name, CLOCKS.sub(b"T", value.encode()))
        for name, value in shown
        if name not in UNCOMPARED
        and not (name == "content-length" and CLOCKS.search(raw))
        and name != "etag"
    ]
    return response.status, sorted(kept), CLOCKS.sub(b"T", raw)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--draws", type=int, default=150)
    args = parser.parse_args()
    differing = count = 0
    for options in ([], ["--strict"]):
        with serve(args.old, *options) as old, serve(args.new, *options) as new:
            for ask in list_requests(args.draws):
                first, second = send(old, ask), send(new, ask)
                count += 1
                if first != second:
                    differing += 1
                    if differing <= 5:
                        print("differs", options, json.dumps(ask)[:600])
                        print("  old", str(first)[:1500])
                        print("  new", str(second)[:1500])
    print(f"{count} answers compared, {differing} differ")
    return differing > 0


if __name__ == "__main__":
    sys.exit(main())
