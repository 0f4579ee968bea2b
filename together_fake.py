# together_fake 0.7.0: a stand-in for the Together AI HTTP API, to be copied into a repository.
# SPDX-License-Identifier: MIT
# From the repository together_fake. To renew it, copy a newer together_fake.py over this file;
# `python -m together_fake --version` says whether this one was changed since it was released.
"""A local, repeatable stand-in for the Together AI HTTP API, in one file without dependencies.

An unmodified Together or OpenAI client that is pointed here behaves as it does in production,
except that every answer is a repeatable function of the request, costs nothing and arrives at
once. No model runs: texts are made from word lists, vectors from hashed words, images from
shapes.

Answers change only with the minor version, which is the second number.

Copied into a repository and started by a test:

    with TogetherAiServer(port=0) as server:
        client = OpenAI(base_url=server.base_url, api_key="parlel-together")
        ...
        server.requests[-1].body["messages"]  # what the program really sent

Run by itself: `python together_fake.py`. Used by any program through the variables
TOGETHER_BASE_URL and TOGETHER_API_KEY, set before the program builds its client.

The sections, each of which uses only those above it; a star marks what touches more than memory:

    Settings       imports, every default
    Messages       a request, a reply, a stream; the JSON that goes out
    Errors         the table of errors, and their JSON
    Checks         tables of fields; JSON, forms and multipart bodies
    Randomness     repeatable choices from a hash
    Text           prose, tokens, logprobs
    Vectors        embeddings, and how alike they are
    Media          images, sound, videos
    Schemas        texts for a pattern, values for a JSON schema
    Prompts        the form that a prompt asks its answer in
    Catalogue      the models
    Dialects       where clients need different bodies
    Collections    stored objects, the record of calls
    WebSocket      the frames of a socket, and how a session travels in them
    Fixtures *     scripted answers; reads the files it is given
    Faults         how a scripted reply goes wrong on its way
    Routes         the table of operations
    Inference endpoints     chat, responses, completions, embeddings, rerank
    File and job endpoints  files, batches, fine-tuning, evaluations, dedicated endpoints
    Media endpoints         images, speech, transcription, videos
    Realtime endpoints      speech to text, and text to speech, over a socket
    Account endpoints       models, projects
    Recording *    fixtures made from answers; writes the file they are kept in
    Verdict        what a client did wrong, told from the record
    Page           what a browser shows of the record
    Control        routes that look after the server
    HTTP *         the grammar of requests; reads from and writes to one client's socket
    Sockets *      listens, and the threads that answer
    Upstream *     another server that answers what no fixture does
    Warnings       what production would never take or say
    Server *       TogetherAiServer: options, state, the pipeline, life cycle
    Command line * main(): standard output, standard error, signals, the command of --run
    Test runners   pytest's fixtures, unittest's TestCase: each imported when it asks

To add an endpoint: in a section of endpoints, declare its fields, write a function that takes the
server and the request and returns JSON, a `Reply` or `Events`, and put
`@route("POST /v1/path", body=fields)` above it. Its cases in the tests, its line in `--routes` and
its 405s follow by themselves.

PYTEST_DONT_REWRITE: nothing here is an assertion of a test.
"""

# === Settings ===

from __future__ import annotations

import base64
import bisect
import codecs
import contextlib
import copy
import errno
import functools
import hashlib
import heapq
import http.client
import http.server
import io
import itertools
import json
import math
import operator
import os
import queue
import re
import select
import selectors
import socket
import socketserver
import string
import struct
import sys
import threading
import time
import weakref
import zlib
from collections import defaultdict, deque
from email.utils import formatdate, parsedate_to_datetime
from urllib.parse import parse_qsl, quote, unquote, urljoin

TYPE_CHECKING = False  # as in typing, whose import would cost a cold start 4 ms
if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Generator,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from typing import Any, AnyStr, TypeAlias, Union

    Item = dict[str, Any]  # a JSON object
    Server: TypeAlias = "TogetherAiServer"  # what the endpoints serve
    TextMatch = Union[str, re.Pattern[str], Mapping[str, str]]  # a text, or a pattern

__all__ = ["FAULTS", "ApiError", "Call", "TogetherAiServer", "main"]
__version__ = "0.7.0"
# pragma: allowlist nextline secret - the digest of this file without it; .ci/stamp.py
RELEASED = "55516a4a6d73cd54a2e223e8ac8857847689e9cb51b53024f9e5b5fdc740cee4"

DEFAULT_PORT = 4863
DEFAULT_RECORD_LIMIT = 1000  # calls
DEFAULT_KEY = "parlel-together"
CREATED = 1700000000  # the clock of every generated answer, in Unix seconds


class BoundedDict(dict):  # type: ignore[type-arg]
    """Keeps the newest `limit` values; the oldest go."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > self.limit:
            del self[next(iter(self))]


class Regex:
    """What a `LazyRegex` becomes: its methods are found without a detour."""


REGEX_METHODS = ("findall", "finditer", "fullmatch", "match", "search", "split", "sub", "subn")


class LazyRegex:
    """A regular expression that is compiled at its first use: compiling all takes 5 ms."""

    def __init__(self, source: Any, flags: int) -> None:
        self.source = (source, flags)

    def __getattr__(self, name: str) -> Any:
        pattern = re.compile(*self.source)
        vars(self).update((each, getattr(pattern, each)) for each in REGEX_METHODS)
        self.__class__ = Regex  # type: ignore[assignment]  # it needs this method no more
        return getattr(pattern, name)


def lazy_regex(source: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """Return what `re.compile()` does, compiled when it is first used."""
    return LazyRegex(source, flags)  # type: ignore[return-value]


# === Messages ===

SECRET_NAME = lazy_regex(  # of a header, or in a query
    r"auth|key|token|secret|cookie|passw|passphrase|pwd|jwt|bearer|credential|signature|session"
    r"|(?<![a-z])sig(?![a-z])",
    re.IGNORECASE,
)
SECRET_FIELD = lazy_regex(  # of a body: `hf_token` is one; `tokens`, `max_token` are none
    r"(?:(?:^|[^a-z]|(?-i:[a-z](?=[A-Z])))(?:auth|authorization|authz|bearer|jwt|credentials?"
    r"|(?<!cache)(?<!cache.)key)|(?:api|access|secret|private|auth)[-_]?keys?|passphrase|passwd"
    r"|passwords?|secrets?|(?<!max.)(?<!eos.)(?<!bos.)(?<!pad.)token|cookies?)"
    r"(?:value|string|text|pem|header|[^a-z])*\Z",
    re.IGNORECASE,
)
URL = lazy_regex(r"[A-Za-z][\w+.-]*://[^\s\"'<>`]+")
URL_SECRET = lazy_regex(r"(?<=://)[^/?#]*@|(?<=[?&;])([^=&;#]+)=[^&;#]*")
MIN_KEY_LENGTH = 20  # characters of a real key; "test" and the like may stand in a text
NAME_WORD = lazy_regex(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
KEY_PROTOCOL = lazy_regex(r"(?<=openai-insecure-api-key\.)[^\s,]+")  # of a page's socket
# A JSON schema names what it describes, secrets too, and holds none.
SCHEMA_WORDS = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
TYPES = ("string", "number", "integer", "object", "array", "boolean", "null")


@functools.lru_cache(maxsize=1000)  # names come again with each request
def is_secret_header(name: str) -> bool:
    return SECRET_NAME.search(name) is not None


def hide_in_url(url: str) -> str:
    """Hide who logs in with a URL, and the keys in its query."""

    def hide(found: re.Match[str]) -> str:
        if found[1] is None:
            return "***@"
        return f"{found[1]}=***" if is_secret_header(unquote(found[1])) else found[0]

    return URL_SECRET.sub(hide, url)


def hide_in_text(text: str) -> str:
    text = KEY_PROTOCOL.sub("***", text) if "key." in text else text
    return URL.sub(lambda found: hide_in_url(found[0]), text) if "://" in text else text


def is_secret(name: str) -> bool:
    return SECRET_FIELD.search(name[-200:]) is not None


def is_schema(value: Item) -> bool:
    kind = value.get("type")
    return kind in TYPES if type(kind) is str else not SCHEMA_WORDS.isdisjoint(value)


def make_encoder(**options: Any) -> Callable[[Any], str]:
    """Return a writer of compact JSON; `JSONEncoder.encode` sets one up for every value."""
    encoder = json.JSONEncoder(separators=(",", ":"), check_circular=False, **options)
    make = vars(json.encoder).get("c_make_encoder")
    if make is None:  # not CPython
        return encoder.encode
    escape = "encode_basestring" + ("_ascii" if encoder.ensure_ascii else "")
    write = make(
        *(None, encoder.default, getattr(json.encoder, escape), None, ":", ","),
        *(encoder.sort_keys, False, True),
    )
    return lambda value: "".join(write(value, 0))


# JSON with letters of every alphabet as they are.
ENCODE = make_encoder(ensure_ascii=False)
# The same for every order of keys: what draws are made from.
CANONICAL = make_encoder(sort_keys=True)
QUOTE = json.encoder.encode_basestring  # of a string alone
DONE = b"data: [DONE]\n\n"  # the last event of every stream of chunks
KEEPALIVE = b": keepalive\n\n"  # a comment between the events of some


def escape_unprintable(text: str) -> str:
    return "".join(
        letter if letter.isprintable() or letter == "\n" else f"\\x{ord(letter):02x}"
        for letter in text
    )


def complain(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError, MemoryError):
        sys.stderr.write(escape_unprintable(text))


def format_time(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03}Z"


def complain_of_bug() -> str:
    """Write where the exception that is handled came from; return that."""
    try:
        import traceback

        told = traceback.format_exc()
    except MemoryError:
        told = "MemoryError\n"
    complain(told)
    return told


def mask(value: str) -> str:
    """Keep the scheme of a header that holds a key, never the key."""
    scheme, space, _ = value.partition(" ")
    return f"{scheme} ***" if space and scheme.lower() in ("basic", "bearer") else "***"


class RecordedHeaders(dict):  # type: ignore[type-arg]
    """Header fields that are found by their names in any case."""

    def __getitem__(self, name: str) -> str:
        return str(super().__getitem__(name.lower()))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


class Headers(dict):  # type: ignore[type-arg]
    """Header fields by name in lower case; the requests of one connection mostly share them."""

    @functools.cached_property
    def masked(self) -> RecordedHeaders:
        """The fields without any key, for the record."""
        shown = {
            name: mask(value) if is_secret_header(name) else hide_in_text(value)
            for name, value in self.items()
        }
        return RecordedHeaders(shown)

    @functools.cached_property
    def secrets(self) -> set[str]:
        values = [self[name] for name in self if is_secret_header(name)]
        words = [word for value in values for word in re.split("[ ,;=]", value)]
        return {word for word in words if len(word) >= MIN_KEY_LENGTH}

    @property
    def agent(self) -> str:
        return str(self.get("user-agent", ""))

    @functools.cached_property
    def is_page(self) -> bool:
        return "origin" in self or "sec-fetch-site" in self or "Mozilla/" in self.agent

    @functools.cached_property
    def has_key(self) -> bool:
        scheme, _, key = self.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and bool(key.strip())


class Request:
    """One request, from HTTP, a test or the line of a batch."""

    client: Any = None  # the connection on whose behalf a worker answers
    id = ""  # of the answer, once it is drawn
    script: Item | None = None  # what a fixture says instead of the generators
    form = ""  # of the answer, as the prompt asks for it
    batch = ""  # the job whose line this is
    turn: Any = None  # of a socket: its handler, instead of the route's
    call: Any = None  # its place in the record
    route: Any = None  # once it is found and the body is read
    answers = 1  # that its body is worth, see `Route.count_answers()`
    peer: Any = (None, 0)  # the client's address, and how many other connections are open
    chunk_sizes: Sequence[int] = ()  # characters in the chunks of a stream, where scripted

    def __init__(
        self,
        method: str,
        path: str,
        body: Any = b"",
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        origin: str = "",
    ) -> None:
        self.method = method
        self.path = path  # percent-encoded, without the query
        self.query = query  # as received
        self.headers = headers if type(headers) is Headers else Headers(headers or {})
        self.raw: bytes = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.origin = origin  # "http://host:port", for URLs that point back here
        self.body: Item = {}  # parsed and checked by answer()
        self.args: Item = {}  # the query, in the types of the route's table
        self.params: dict[str, str] = {}  # the path's parameters


class Upload:
    """A file that came as a part of a multipart body."""

    def __init__(self, filename: str, content_type: str, data: bytes) -> None:
        self.filename = filename
        self.content_type = content_type
        self.data = data

    def __str__(self) -> str:
        return f"the file {self.filename}"


def redact(value: Any, secret: bool = False) -> Any:
    """Return JSON as it may be shown: files as their size, secrets as stars, also in URLs.

    secret  the value stands under a name that says so
    """
    if type(value) is Upload:
        kind = value.content_type
        return {"filename": value.filename, "content_type": kind, "bytes": len(value.data)}
    if type(value) is dict:
        hidden = secret and not is_schema(value)
        return {name: redact(inner, hidden or is_secret(name)) for name, inner in value.items()}
    if type(value) is list:
        return [redact(item, secret) for item in value]
    if secret and type(value) in (str, int, float):
        return "***"
    return hide_in_text(value) if type(value) is str else value


class Cut(Exception):
    """Raised by a stream to cut its connection."""

    outcome = "cut"


class Left(Cut):
    """Raised by a stream whose client has left."""

    outcome = "left"


class Reply:
    """A whole answer: bytes with a status, or a stream of events."""

    handler: Any = None  # takes the connection over, see `Connection.hand_over()`
    waits = False  # somebody else sends the events: each is sent when it is drawn
    id = ""  # of the answer, for the headers that name it
    reader = "*"  # the origin whose pages may read it; "" is none

    def __init__(
        self,
        body: bytes = b"",
        status: int = 200,
        content_type: str = "application/json; charset=utf-8",
        headers: Mapping[str, str] | None = None,
        events: Any = None,
    ) -> None:
        self.body = body
        self.status = status
        self.content_type = content_type
        self.headers = headers or {}
        # Encoded events, and between them seconds to pause; the body is then not sent.
        self.events = events

    def read(self) -> bytes:
        """Return all that is sent, as far as it comes."""
        if self.events is None:
            return self.body
        pieces: list[bytes] = []
        with contextlib.suppress(Cut):
            pieces.extend(piece for piece in self.events if type(piece) is bytes)
        return b"".join(pieces)


class Events:
    """A handler's stream: JSON values or JSON text, one an event; `data: [DONE]` follows.

    encoded  they are events already, as bytes, and nothing follows
    """

    def __init__(self, chunks: Iterable[Any], encoded: bool = False) -> None:
        self.chunks = chunks
        self.encoded = encoded


# === Errors ===

# Name, status and message, by how they are known; between them, what else is not as usual in the
# envelope. Production has one vague message for several: it names neither field nor reason.
ERROR_TABLE = """\
# recorded
empty_prompt 400: Prompt cannot be empty
unauthorized 401: Unauthorized
too_long_turbo 400: Input validation error: `inputs` tokens + `max_new_tokens` must be <= {room}. \
Given: {prompt} `inputs` tokens and {asked} `max_new_tokens`
no_media 400: Input validation error
no_eyes 400: {model} is not a multimodal model None
no_grammar 422: Input validation error: grammar is not valid: failed to compile grammar
no_parameter 400: Parameter '{parameter}' is not supported for the selected model configuration. \
Please remove this parameter from your request.
retired 400 code=model_not_available: Unable to access non-serverless model {model}. Please visit \
https://api.together.ai/models/{model} to create and start a new dedicated endpoint for the model.
not_running 400 code=dedicated_endpoint_not_running: The dedicated endpoint for {model} is not \
running. Please start it before you send requests to it.
bad_key 401 code=invalid_api_key: Invalid API key provided. You can find your API key at \
https://api.together.ai/settings/api-keys.
no_model 404 code=model_not_available: Unable to access model {model}. Please visit \
https://api.together.ai/models to view the list of supported models.
streaming_required 400 code=streaming_required: This model only supports streaming. Set "stream": \
true.
forced_while_thinking 400: <400> InternalError.Algo.InvalidParameter: The tool_choice parameter \
does not support being set to required or object in thinking mode
sockets_only 400: This model only supports WebSocket streaming.
unknown_role 400: {role} is not one of ['system', 'assistant', 'user', 'tool', 'function']
# reported by users
too_long_prompt 400: The input ({prompt} tokens) is longer than the model's context length \
({room} tokens).
too_long 400: Requested token count exceeds the model's maximum context length of {room} tokens. \
You requested a total of {total} tokens: {prompt} tokens from the input messages and {asked} \
tokens for the completion. Please reduce the number of tokens in the input messages or the \
completion to fit within the limit.
# known by their code alone, or in part
no_new_endpoints 403 code=endpoints_v1_create_access_disabled: Endpoints cannot be created by \
this version of the API.
no_hardware 404: No GPU configurations were found for the model {model}.
# chosen: production says "Input validation error" alone, or its words are unknown
missing 400 vague=1: Missing required field: {param}.
invalid 400 vague=1: Input validation error: {param} {reason}.
bad_json 400 vague=1: The body is not valid JSON: {reason}.
bad_body 400: The body cannot be read: {reason}.
bad_http 400: The HTTP request is malformed: {reason}.
no_route 404: Unknown endpoint {path}.{reason}
no_object 404: {noun} {id} was not found.
no_response 404: Response with id '{id}' not found.
bad_method 405: {path} does not answer {method}; it answers {allow}.
slow_request 408: The request did not arrive whole within {seconds:g} seconds.
too_large 413 type=request_too_large: The body has {size} bytes; at most {limit} are accepted.
headers_too_large 431: The request's head has more than 64 KB or 100 fields.
foreign_page 403: {who} may not use this route: it is for programs, for pages of this machine, \
and for those that allow_origin and allow_host name.
bad_file 400: {param}: file {id} cannot be used: {reason}.
bad_state 400: {noun} {id} is {status}: it is too early for this, or too late.
storage_full 413 type=request_too_large: The files would take {size} bytes; this server keeps at \
most {limit}. Delete some, or raise max_stored_bytes.
no_upgrade 426: {path} is a WebSocket: ask for an upgrade, with version 13.
bad_range 416: The range lies outside of {size} bytes.
bug 500: Internal server error: {reason}
no_memory 503 type=service_unavailable: Service unavailable: no memory is left
bad_upstream 502: The upstream {url} does not answer: {reason}.
unknown_encoding 415: Content-Encoding {coding!r} is not known: send bodies as they are.
unknown_coding 501: Transfer-Encoding {coding!r} is not known; only chunked is.
bad_fixture 400: The fixture was refused: {reason}
no_fixture 404: No fixture matches {method} {path}.{reason}
script_failed 500: The script of this test failed: {reason}
warned 500: This call has warnings, which are errors here: {reason}.
# what a scripted status sends: recorded (400, 429, 500, 503), reported by users (402), chosen
status_400 400: Input validation error
status_402 402 type=credit_limit: Credit limit exceeded, please [add \
credits](https://api.together.ai/settings/billing). If you've already made a payment, please wait \
up to 5 minutes for balances to update and try again.
status_403 403: This request is not permitted
status_408 408: Request timed out
status_409 409: The resource already exists
status_413 413 type=request_too_large: Request entity too large
status_422 422: The parameters are malformed
status_429 429 type=rate_limit: Request was rejected due to request rate limiting. Your rate \
limits are {rpm:g} RPM ({qps:g} QPS) and {tpm} TPM ({tps:g} TPS). See details: \
https://docs.together.ai/docs/rate-limits
model_rate_limit 429 type=model_rate_limit: You have reached the rate limit specific to this \
model {model}. The maximum rate limit for this model is {rpm:.1f} queries and {tpm} tokens per \
minute.
status_500 500: Internal server error
status_503 503 type=service_unavailable: Service unavailable
status_504 504: Gateway timeout
status_4503 4503 type=service_unavailable_error code=no_healthy_workers: No healthy workers can \
serve this model
status_529 529: The service is overloaded
other_status 500 type=server_error: The request failed with status {status}"""


def read_errors(table: str) -> dict[str, tuple[int, str, dict[str, str]]]:
    """Return status, message and what is unusual of each error, by name."""
    errors = {}
    for row in table.splitlines():
        head, _, message = row.partition(": ")
        if row[0] != "#":
            name, status, *unusual = head.split()
            errors[name] = (int(status), message, dict(pair.split("=") for pair in unusual))
    return errors


ERRORS = read_errors(ERROR_TABLE)


class ApiError(Exception):
    """An error the client shall see, by its row in `ERRORS`: `ApiError("missing", param="model")`.

    `param` is the field's place (`messages[0].role`); other keywords fill the row's message.
    """

    def __init__(self, name: str, *, param: str | None = None, **facts: Any) -> None:
        self.name = name
        self.status, template, unusual = ERRORS[name]
        self.param = param
        self.facts = facts
        self.headers = {"Retry-After": "1"} if name == "no_memory" else {}
        message = template.format(param=param, **facts)
        self.message = message.encode("utf-8", "replace").decode()  # it may quote bad input
        self.unusual: Item = dict(unusual)  # members of the envelope
        super().__init__(self.message)

    def inside(self, place: str) -> ApiError:
        """Return the error of a field inside of another: `messages`, `[0].`."""
        return ApiError(self.name, param=f"{place}{self.param}", **self.facts)

    def as_reply(self, recorded: bool = False, id: str = "") -> Reply:
        named = {"id": id} if id and self.name != "unauthorized" else {}
        body = {**named, "error": self.envelope(recorded)}
        reply = Reply(ENCODE(body).encode(), self.status, headers=self.headers)
        reply.id = id
        return reply

    def envelope(self, recorded: bool = False) -> Item:
        """Return what clients read, where `recorded` in production's own words."""
        if self.name == "unauthorized":
            return {"message": self.message}
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        envelope: Item = {"message": self.message, "type": usual, "param": self.param, "code": None}
        envelope.update(self.unusual)
        if envelope.pop("vague", "") and recorded:
            is_empty = (self.name, self.param) == ("missing", "messages")
            words = "Input required" if is_empty else "Input validation error"
            envelope.update(message=words, param=None)
        if self.name == "no_eyes":  # an engine's own error, which is passed on whole
            message = {"message": self.message, "type": "BadRequestError", "param": None}
            envelope["message"] = {**message, "code": 400}
        return envelope


# === Checks ===

MAX_JSON_BYTES = 32 * 2**20  # a JSON or form body
MAX_JSON_DEPTH = 200  # brackets inside brackets
# Of a body: an item of an array has 1, a key, object or array 10. Meanwhile, some 0.1 s, no other
# thread runs.
MAX_JSON_WEIGHT = 1_200_000
MAX_COUNTED_BYTES = 2**16  # at once, so that others get their turns
MAX_FORM_FIELDS = 1000  # of one form, query or multipart body
MAX_PART_HEAD_BYTES = 16384  # the headers of one multipart part

KIND_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
    Upload: "a file",
}
COUNTED = {str, list, dict}


def preview(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def refuse_value(place: str, rule: str, value: Any) -> ApiError:
    """Name the place, the rule and the value that broke it, cut to a readable length."""
    shown = preview(redact(value))
    return ApiError("invalid", param=place, reason=f"{rule}, not {shown}")


def succeeds(read: Callable[[Any], Any], value: Any) -> bool:
    try:
        read(value)
    except (TypeError, ValueError, re.error, OverflowError, RecursionError):
        return False
    return True


def suggest(name: str, names: Iterable[str]) -> str:
    """Write the nearest valid name, or all of them, as the end of an error's sentence."""
    import difflib  # only for such a sentence

    known = list(names)
    near = difflib.get_close_matches(name, known, 1)
    return f", did you mean {near[0]}?" if near else f"; valid here: {', '.join(known)}"


class Field:
    """One row of a table of fields: what a value must be, by a name that ends in `!` if needed."""

    low, high = -math.inf, math.inf  # of a number, or the length of a string, array or object
    choices: Sequence[Any] = ()  # the values allowed, of their types
    test: tuple[str, Callable[[Any], Any]] | None = None  # what a string shall be; it raises else
    each: Field | None = None  # of every item of an array, or value of an object without fields
    fields: Fields | None = None  # of a nested object

    def __init__(self, name: str, *kinds: type, **rules: Any) -> None:
        self.name = name.rstrip("!")
        self.required = name[-1:] == "!"
        self.kinds = kinds  # an integer is a number, `True` is not an integer
        self.types = frozenset(kinds)
        vars(self).update(rules)
        self.chosen = set(map(type, self.choices))
        self.bounded = "low" in rules or "high" in rules
        # The types of which every value passes, or that within bounds: most cost one look-up.
        self.sized = frozenset() if self.choices or self.test else self.types - {list, dict}
        self.free = frozenset() if self.bounded else self.sized

    def check(self, value: Any) -> Any:
        """Return the value in its declared type; raise ApiError naming the place inside of it."""
        kind = type(value)
        if kind not in self.types:
            value = self.convert(value)
            kind = type(value)
        if self.bounded:
            size = len(value) if kind in COUNTED else value
            if not self.low <= size <= self.high:
                raise self.refuse_size(size, kind)
        if kind in self.chosen and value not in self.choices:
            allowed = ", ".join(map(str, self.choices))
            shown = "***" if is_secret(self.name) else value
            raise refuse_value("", f"must be one of {allowed}", shown)
        if kind is str:
            if self.test is not None and not succeeds(self.test[1], value):
                raise refuse_value("", f"must be {self.test[0]}", value)
        elif kind is dict and self.fields is not None:
            self.fields.check(value, ".")
        elif self.each is not None and kind in (list, dict):
            self.check_items(value, self.each)
        return value

    def check_items(self, value: Any, each: Field) -> None:
        """Check what a list or an object of free names holds, in place."""
        for key, item in enumerate(value) if type(value) is list else value.items():
            if (kind := type(item)) not in each.free:
                try:
                    if kind is dict and each.fields:
                        each.fields.check(item, ".")
                    else:
                        value[key] = each.check(item)
                except ApiError as error:
                    raise error.inside(f"[{key}]") from None

    def convert(self, value: Any) -> Any:
        """Take an integer as a number and 3.0 as the integer 3; refuse every other foreign type."""
        if type(value) is int and float in self.types and abs(value) < 2**1000:
            return float(value)
        if type(value) is float and int in self.types and value.is_integer():
            return int(value)
        kinds = [kind for kind in self.kinds if kind is not int or float not in self.types]
        names = " or ".join(KIND_NAMES[kind] for kind in kinds)
        raise refuse_value("", f"must be {names}", "***" if is_secret(self.name) else value)

    def refuse_size(self, size: Any, kind: type) -> ApiError:
        verb = "have" if kind in COUNTED else "be"
        unit = "" if verb == "be" else " characters" if kind is str else " items"
        rule = f"at least {self.low}" if size < self.low else f"at most {self.high}"
        return refuse_value("", f"must {verb} {rule}{unit}", size)


KIND_WORDS = {kind.__name__: kind for kind in KIND_NAMES}


def read_word(word: str, fields: Fields | None) -> list[Field]:
    """Return the rows that a word tells of, see `Fields`."""
    if word.isidentifier() and fields is None:  # most are, and an import reads 600
        return [Field(word, str)]
    head, _, inner = word.partition("[")
    inner, _, tail = inner.rpartition("]")
    rest, _, choices = (head + tail).partition("=")
    names, *more = rest.split(":")
    kinds = "str"
    rules: Item = {"choices": tuple(choices.split("|"))} if choices else {}
    for rule in more:
        if ".." in rule:
            for side, bound in zip(("low", "high"), rule.split("..")):
                if bound:
                    rules[side] = float(bound) if "." in bound or "e" in bound else int(bound)
        else:
            kinds = rule
    if inner:
        rules["each"] = read_word(f"item:{inner}", None)[0]
    elif fields and "list" in kinds:
        rules["each"] = Field("", dict, fields=fields)
    elif fields is not None:
        rules["fields"] = fields
    types = [KIND_WORDS[kind] for kind in kinds.split("|")]
    names = names.replace(",", ",-" if word[0] == "-" else ",")
    return [Field(name, *types, **rules) for name in names.split(",")]


class Fields(dict):  # type: ignore[type-arg]
    """A table of `Field` rows by name; a string has such rows in words.

    A word is a name, or several with commas, then types, then bounds, then choices, such as
    `model! seed,n:int:1..128 stop:str|list[str] size=small|large`, or with `-` names that are left
    alone. Indented below a line are the rows of the object that its last word is, or of each of a
    list; those below `@TYPE` are for objects of that type, of which the first is the default.

    closed   names without a row are refused, with the nearest one that has a row
    """

    def __init__(self, *given: Field | str, closed: bool = False) -> None:
        rows: list[Field] = []
        for each in given:
            rows += self.read_rows(each, closed) if isinstance(each, str) else [each]
        self.ignored = frozenset(row.name[1:] for row in rows if row.name[:1] == "-")
        common = [row for row in rows if row.name[:1] not in ("-", "@")]
        super().__init__((row.name, row) for row in common)
        self.required = tuple(row.name for row in common if row.required)
        tables: Item = {row.name: row.fields or (row.each and row.each.fields) for row in rows}
        self.nested: Item = {name: tables[name] for name in tables if tables[name]}
        self.closed = closed
        self.cases = {  # by the type of an object
            name[1:]: Fields(*common, *own.values(), " -".join(["", *own.ignored]), closed=closed)
            for name, own in tables.items()
            if name[0] == "@"
        }

    @classmethod
    def read_rows(cls, text: str, closed: bool) -> Iterator[Field]:
        """Yield the rows that words tell of."""
        for block in text.replace("\n ", "\f").split("\n"):
            line, _, inner = block.partition("\f ")
            fields = cls(inner.replace("\f ", "\n"), closed=closed) if inner else None
            for word in (words := line.split()):
                yield from read_word(word, fields if word is words[-1] else None)

    def pick(self, values: Item) -> Fields | None:
        """Return the table for an object's type; of an unknown type nothing is known."""
        if not self.cases:
            return self
        return self.cases.get(str(values.get("type") or next(iter(self.cases))))

    def check(self, values: Item, place: str = "") -> None:
        """Check values in place; unknown names pass, unless closed; `null` counts as absent."""
        if self.closed and not self.cases:
            self.check_names(values, place)
        for name in self.required:
            if values.get(name) is None:
                raise ApiError("missing", param=place + name)
        find = self.get
        for name, value in values.items():
            field, kind = find(name), type(value)
            if field is None or value is None or kind in field.free:
                continue
            if kind in field.chosen and value in field.choices:
                continue
            if (
                kind in field.sized
                and field.low <= (len(value) if kind is str else value) <= field.high
            ):
                continue
            try:
                checked = field.check(value)
            except ApiError as error:
                raise error.inside(place + name) from None
            if checked is not value:
                values[name] = checked  # the keys stay
        own = self.pick(values) if self.cases else None
        if own is not None:
            own.check(values, place)

    def check_names(self, names: Iterable[str], place: str) -> None:
        for name in names:
            if name not in self and name not in self.ignored:
                near = suggest(name, self)
                raise ApiError("invalid", param=place + name, reason=f"unknown key{near}")


Keys = functools.partial(Fields, closed=True)  # that refuse names without a row
NO_FIELDS = Fields()


def read_float(text: str) -> float:
    """Read a JSON number that has a fraction or exponent; refuse 1e999."""
    number = float(text)
    if number - number != 0:
        raise ApiError("bad_json", reason=f"the number {text[:20]} is too large")
    return number


def refuse_constant(name: str) -> Any:
    """Refuse the NaN and Infinity that Python's parser would take."""
    raise ApiError("bad_json", reason=f"{name} is not a JSON value")


DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_float=read_float)


def weigh(raw: bytes) -> int:
    return raw.count(b",") + 10 * sum(map(raw.count, b":[{"))


def is_heavy(raw: bytes) -> bool:
    """Tell whether JSON has too many values; what stands in its strings is none."""
    if len(raw) < MAX_JSON_WEIGHT / 10 or weigh(raw) <= MAX_JSON_WEIGHT:
        return False
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    weight = quotes = 0
    for start in range(0, len(plain), MAX_COUNTED_BYTES):
        parts = plain[start : start + MAX_COUNTED_BYTES].split(b'"')
        weight += weigh(b"".join(parts[quotes % 2 :: 2]))
        quotes += len(parts) - 1
    return weight > MAX_JSON_WEIGHT


def measure_depth(value: Any) -> int:
    items = value.values() if type(value) is dict else value
    inner = [measure_depth(item) for item in items if type(item) in (dict, list)]
    return 1 + max(inner, default=0)


def parse_json(raw: bytes, is_foreign: bool = True) -> Any:
    """Read JSON with limits; raise ApiError for whatever standard JSON does not allow.

    is_foreign  it comes from a client, and no test says it
    """
    if is_foreign and is_heavy(raw):
        raise ApiError("bad_json", reason="it has too many values")
    try:
        text = raw.decode()
        try:
            value, end = DECODER.scan_once(text, 0)  # type: ignore[attr-defined]
        except StopIteration:
            end = -1
        if end != len(text):  # there are blanks around the value, or this is no JSON
            value = DECODER.decode(text)
        if b"\\u" in raw and (b"\\ud" in raw or b"\\uD" in raw):  # a lone surrogate is refused
            json.dumps(value, ensure_ascii=False).encode()
        brackets = len(raw) > 2 * MAX_JSON_DEPTH and raw.count(b"[") + raw.count(b"{")
        if brackets > MAX_JSON_DEPTH and measure_depth(value) > MAX_JSON_DEPTH:
            raise RecursionError
    except UnicodeEncodeError:
        raise ApiError("bad_json", reason="a string has half of a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise ApiError("bad_json", reason=f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise ApiError("bad_json", reason=where) from None
    except RecursionError:
        raise ApiError("bad_json", reason=f"it nests deeper than {MAX_JSON_DEPTH}") from None
    except ValueError:  # Python's limit, about 4,300
        raise ApiError("bad_json", reason="a number has too many digits") from None
    return value


def read_text(field: Field | None, value: Any) -> Any:
    """Read a form or query value as one of the declared kinds, or leave it as it is."""
    if field is None:
        return value
    is_text = type(value) is str and str not in field.kinds
    if is_text and list in field.kinds and not value.startswith("["):
        value = value.split(",", MAX_FORM_FIELDS)
        if len(value) > MAX_FORM_FIELDS:
            raise refuse_value(field.name, f"must have at most {MAX_FORM_FIELDS} parts", value)
    if type(value) is list:
        return [read_text(field.each, part) for part in value]
    if not is_text:
        return value
    try:
        # Together's Python 1.x sends "True" in forms.
        return parse_json((value.lower() if bool in field.kinds else value).encode())
    except (ApiError, ValueError):
        return value


def read_texts(values: Item, fields: Fields) -> Item:
    return {name: read_text(fields.get(name), value) for name, value in values.items()}


def collect_fields(pairs: Iterable[tuple[str, Any]]) -> Item:
    """Make a dict of form fields; `name[]` and repeated names become arrays."""
    values: dict[str, list[Any]] = {}
    arrays = set()
    for written, value in pairs:
        name = written[:-2] if written.endswith("[]") else written
        if name != written or name in values:
            arrays.add(name)
        values.setdefault(name, []).append(value)
    return {name: found if name in arrays else found[0] for name, found in values.items()}


def parse_form(raw: bytes) -> Item:
    try:
        pairs = parse_qsl(raw.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS)
        return collect_fields((name, str(value.encode(), "utf-8")) for name, value in pairs)
    except ValueError as error:
        raise ApiError("bad_body", reason=f"the form fields do not parse ({error})") from None


PART_OPTION = lazy_regex(r';\s*([\w*-]+)=(?:"((?:[^"\\]|\\.)*)"|([^;"]*))')


def parse_part(head: bytes, data: bytes) -> tuple[str, Any]:
    """Return the name and value of one multipart part: a string, or an `Upload`."""
    lines = (line.partition(":") for line in head.decode("utf-8", "replace").split("\r\n"))
    headers = {name.strip().lower(): value.strip() for name, _, value in lines}
    disposition = headers.get("content-disposition", "")
    options = {
        name.lower(): re.sub(r"\\(.)", r"\1", quoted) or bare.strip()
        for name, quoted, bare in PART_OPTION.findall(disposition)
    }
    if "name" not in options:
        raise ApiError("bad_body", reason="a multipart part has no name")
    if "filename*" in options:  # RFC 5987: UTF-8''na%C3%AFve.txt
        options["filename"] = unquote(options["filename*"].rpartition("'")[2])
    if "filename" in options:
        kind = headers.get("content-type", "application/octet-stream")
        return options["name"], Upload(options["filename"], kind, data)
    try:
        return options["name"], data.decode()
    except UnicodeDecodeError:
        reason = f"the part {options['name']} is neither UTF-8 nor a file"
        raise ApiError("bad_body", reason=reason) from None


def parse_multipart(raw: bytes, content_type: str) -> Item:
    """Read a multipart/form-data body; every file part is copied once."""
    found = re.search(r';\s*boundary=(?:"([^"]{1,200})"|([^";,\s]{1,200}))', content_type, re.I)
    if found is None:
        raise ApiError("bad_body", reason="multipart/form-data without a boundary")
    fence = b"--" + (found.group(1) or found.group(2)).encode()
    pairs: list[tuple[str, Any]] = []
    at = raw.find(fence)
    while at >= 0 and raw[at + len(fence) : at + len(fence) + 2] != b"--":
        start = at + len(fence) + 2
        head_end = raw.find(b"\r\n\r\n", start, start + MAX_PART_HEAD_BYTES)
        at = raw.find(b"\r\n" + fence, max(head_end + 4, start))
        if head_end < 0 or at < 0 or len(pairs) >= MAX_FORM_FIELDS:
            break
        pairs.append(parse_part(raw[start:head_end], raw[head_end + 4 : at]))
        at += 2
    else:
        if at >= 0:
            return collect_fields(pairs)
    raise ApiError("bad_body", reason="the multipart parts do not end where they should")


def parse_body(raw: bytes, content_type: str, fields: Fields) -> Item:
    """Read a JSON, urlencoded or multipart body as one dict, texts in the types of its table."""
    if content_type != "application/json":
        kind = content_type.lower().lstrip()
        if kind.startswith("multipart/form-data"):
            return read_texts(parse_multipart(raw, content_type), fields)
        if kind.startswith("application/x-www-form-urlencoded") and raw.lstrip()[:1] != b"{":
            return read_texts(parse_form(raw), fields)
    value = parse_json(raw, is_foreign=not fields.closed) if raw else {}
    if type(value) is not dict:
        raise ApiError("bad_json", reason="the body must be a JSON object")
    return value


# === Randomness ===


class HashRandom:
    """Repeatable choices from a hash: the same names and facts give the same draw, everywhere.

    `child()` starts an independent draw for one question, so that a new question never
    changes old answers. Within one draw, each call uses up the next bytes of one stream: the
    first ones are blake2b's, which costs half of shake_256, whose bytes follow.
    """

    __slots__ = ("_at", "_pool", "_start", "key")

    def __init__(self, key: bytes, start: bytes = b"") -> None:
        self.key = key
        self._start = self._pool = start  # of the stream
        self._at = 0

    @classmethod
    def of_bytes(cls, data: bytes) -> HashRandom:
        """Start from bytes: one half of their digest is the key, the other starts the stream."""
        digest = hashlib.blake2b(data).digest()
        return cls(digest[:32], digest[32:])

    @classmethod
    def of(cls, name: str, facts: Any) -> HashRandom:
        """Start from a name and JSON-able facts; the order of keys does not matter."""
        return cls.of_bytes(f"{name}\n{CANONICAL(facts)}".encode())

    def child(self, *names: str | int) -> HashRandom:
        """Start the draw of one question about this one."""
        return HashRandom(self.key + ascii(names).encode())

    def randbytes(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        start, self._at = self._at, self._at + size
        if self._at > len(self._pool):
            self._pool = self._start + hashlib.blake2b(self.key).digest()
            if self._at > len(self._pool):
                self._pool += hashlib.shake_256(self.key).digest(2 * self._at)
        return self._pool[start : self._at]

    def randbelow(self, limit: int) -> int:
        size = (limit.bit_length() + 15) // 8  # 8 spare bits: no visible bias
        return int.from_bytes(self.randbytes(size), "big") * limit >> (8 * size)

    def random(self) -> float:
        return self.randbelow(1 << 32) / 4294967296

    def choice(self, choices: Sequence[Any]) -> Any:
        return choices[self.randbelow(len(choices))]

    def hex(self, digits: int) -> str:
        return self.randbytes((digits + 1) // 2).hex()[:digits]


# Alphabets as translations of a byte.
BASE62 = ((string.digits + string.ascii_letters).encode() * 5)[:256]
LOWER36 = ((string.ascii_lowercase + string.digits).encode() * 8)[:256]


def random_letters(rng: HashRandom, count: int, alphabet: bytes = BASE62) -> str:
    """Return letters of an alphabet, one byte of the draw each."""
    return rng.randbytes(count).translate(alphabet).decode()


def random_id(rng: HashRandom) -> str:
    """Return the id of an answer in its recorded form, `omJK98b-3pDw3Z-a04673c1cf25a2b4`."""
    letters = rng.key[:13].translate(BASE62).decode()
    return f"{letters[:7]}-{letters[7:]}-{rng.key[13:21].hex()}"


def random_uuid(rng: HashRandom) -> str:
    digits = rng.hex(32)
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


# === Text ===

MAX_WORD_BYTES = 40  # of a word: what counts of it for a vector, and what is worth remembering
MAX_COUNTED_TEXT = 2**18  # characters of a text whose tokens are counted at once
MAX_REMEMBERED_TEXT = 1000  # of one whose number is remembered


def phrases(text: str, first: str = " ") -> tuple[str, ...]:
    """Split a list at slashes and line ends; repeat it, so that any byte picks one."""
    found = [first + phrase for phrase in text.replace("\n", "/").split("/")]
    return tuple(found * (256 // len(found)))


# Every subject is singular, every verb fits a singular subject, every adjective may follow "a".
DETERMINERS = phrases("a/the/this/every/one/each/that/a/the/some/any/a/the/our/your/their")
ADJECTIVES = phrases("""\
quiet/small/careful/gentle/simple/patient/steady/familiar/bright/calm/clear/modest/narrow/warm/long
short/fresh/kind/thoughtful/generous/practical/curious/lively/friendly/local/nearby/hidden/wooden
little/common/modern/new""")
NOUNS = phrases("""\
garden/river/letter/library/kitchen/morning/evening/journey/question/story/idea/plan/habit/lesson
village/market/bridge/window/valley/harbor/map/book/song/workshop/project/teacher/neighbor/friend
meeting/method/notebook/season""")
VERBS = phrases("""\
rewards/invites/needs/brings/shows/teaches/suggests/supports/offers/reveals/deserves/inspires
encourages/adds/requires/promises""")
AMOUNTS = phrases("""\
a sense of/a new kind of/the value of/a little more/the comfort of/a good deal of/a fair share of
the pleasure of/plenty of/a fresh look at/a lasting interest in/a better grasp of/room for/time for
the first signs of/a taste for""")
QUALITIES = phrases("""\
patience/quiet order/shared purpose/honest work/good humor/steady progress/careful practice/trust
common sense/calm attention/careful thought/everyday courage/gentle change/open debate
good advice/curiosity""")
TAILS = phrases("""\
over the course of a year
when nobody is in a hurry
long before the work is done/from the very first day
even on a rainy afternoon
at almost every turn
in the middle of a busy week
far more often than expected
with a little help from others
one small step at a time
when the evening light comes in
for those who take the time
in the company of good friends
across many different fields/from one generation to the next
as any beginner soon finds out""")
CLAUSES = phrases("""\
people notice the small details first
a short walk clears the mind
the best ideas arrive without effort
clear notes save a lot of time
the simple version is usually right
good tools make slow work pleasant
children ask the most useful questions
a shared meal brings people together
the weather sets the mood of the day
there is more than one good answer
most plans improve after a pause
the numbers tell only part of the story
a good question opens many doors
everyone learns at a different speed
the first draft is rarely the last
a calm voice carries further""")
CONJUNCTIONS = phrases("because/since/and/while/although/as/even if/and", ", ")
REASONS = phrases("""\
careful reading pays off later
small changes add up quickly
the details decide the outcome
the old path still leads home
practice turns effort into ease
some problems solve themselves
good company shortens any road
the morning makes work lighter
mistakes are good teachers
patience matters more than talent
water finds its own way
a second look reveals new patterns
nothing has to be perfect
simple things tend to last
trust grows slowly
there is always more to learn""")
STEPS = phrases("""\
start with a short list
look at the problem from both sides
ask a friend for an honest opinion
write down what is already known
compare the options side by side
begin with the part that is clear
explain the idea in plain words
check the facts one more time""")
OPENINGS = phrases("""\
In most places,/As a rule,/On a calm day,/In the long run,/For many people,/More often than not,
In quiet moments,/At first glance,/With some practice,/Over the years,/In a small way,
Near the coast,/Under an open sky,/In the early hours,/By all accounts,/To a curious mind,""")
LINKS = phrases("""\
At the same time,/Even so,/For the same reason,/In much the same way,/After a while,/Of course,
As a result,/On the other hand,/Besides,/In turn,/Once in a while,/Most of all,/In the end,
Little by little,/Of all these things,/Seen in this light,""")
RESULTS = phrases("""\
The result/Such a choice/This way of working/All of this/The whole experience/That simple fact
Such an approach/The idea behind it/This kind of care/Each of these steps/Every part of it
The long tradition/That sort of thing/The effort/Such a view/The change""")
ADVICE = phrases("""\
It helps to/It is wise to/It is often enough to/The best step is to/One good way is to
It never hurts to/A sensible rule is to/It is worth the time to""")

SUBJECT = (DETERMINERS, ADJECTIVES, NOUNS)
PREDICATE = (VERBS, AMOUNTS, QUALITIES)
CAUSE = (CONJUNCTIONS, REASONS)
OPENING_FORMS = (
    (*SUBJECT, *PREDICATE, TAILS), (OPENINGS, *SUBJECT, *PREDICATE, *CAUSE),
    (OPENINGS, CLAUSES, *CAUSE), (*SUBJECT, *PREDICATE, *CAUSE),
)  # fmt: skip
LATER_FORMS = (
    OPENING_FORMS[0], (LINKS, CLAUSES, *CAUSE), (RESULTS, *PREDICATE, TAILS),
    (ADVICE, STEPS, *CAUSE), (LINKS, *SUBJECT, *PREDICATE, TAILS), (RESULTS, *PREDICATE, *CAUSE),
    (OPENINGS, CLAUSES, *CAUSE), (ADVICE, STEPS, TAILS),
)  # fmt: skip
PLACES = 8  # of a sentence in a text, each with its own sentences

# ASCII classes only: other letters differ between the Unicode tables of Python versions.
TOKEN = lazy_regex(
    r" ?(?:[A-Za-z]{1,7}|[0-9]{1,3}|[^\x00-\x7F]{1,2}|</?think>|[!-/:-@\[-`{-~])"
    r"|\n+|[ \t]+(?= )|[\x00-\x20\x7F]"
)


def split_tokens(text: str) -> list[str]:
    return TOKEN.findall(text)


@functools.lru_cache(maxsize=1000)  # what was said before comes again with each turn
def count_short(text: str) -> int:
    return TOKEN.subn("", text)[1]  # faster than a list


def count_tokens(text: str) -> int:
    """Count tokens, of a long text piece by piece, where a cut may add one: others get turns."""
    if len(text) <= MAX_REMEMBERED_TEXT:
        return count_short(text)
    starts = range(0, len(text), MAX_COUNTED_TEXT)
    return sum([TOKEN.subn("", text[at : at + MAX_COUNTED_TEXT])[1] for at in starts])


@functools.cache  # there are 256 for each place
def make_sentence(place: int, number: int) -> tuple[str, int]:
    """Write one of a place's 256 sentences, and count its tokens."""
    rng = HashRandom(b"sentence").child(place, number)
    tables = rng.choice(LATER_FORMS if place else OPENING_FORMS)
    words = "".join([rng.choice(table) for table in tables])
    text = f" {words[1].upper()}{words[2:]}."
    return text, count_tokens(text)


def make_prose(rng: HashRandom, sentences: int | None = None) -> tuple[str, int]:
    """Write calm prose that begins with a space, and count its tokens.

    Without a number of sentences it has 40 to 90 words.
    """
    data = rng.randbytes(sentences or 6)
    if sentences is None:
        data = data[: 4 + (data[5] & 1)]
    text, count = "", 0
    for place, byte in enumerate(data):
        sentence, tokens = make_sentence(place % PLACES, byte)
        text += sentence
        count += tokens
    return text, count


def make_text(rng: HashRandom, sentences: int | None = None) -> str:
    return make_prose(rng, sentences)[0][1:]


REQUESTS = phrases("""\
asks an open question/wants a clear explanation/seems to expect a few sentences
gives enough context to begin""")


def make_thought(rng: HashRandom) -> str:
    data = rng.randbytes(5)
    # Of the steps an even one, then an odd one: never the same twice.
    return (
        f"We need to{STEPS[data[0] & 254]}. The user{REQUESTS[data[1]]}. So it is best to"
        f"{STEPS[data[2] | 1]} and then mention{AMOUNTS[data[3]]}{QUALITIES[data[4]]}."
    )


@functools.lru_cache(maxsize=10_000)  # most come again
def token_id(piece: str) -> int:
    """Return the number of a token in a vocabulary of 128,000."""
    return zlib.crc32(piece.encode("utf-8", "surrogatepass")) % 128000


MARKS = phrases("""\
,/./;/:/!/?/-/(/)/and/or/but/so/to/of/in/is/the/a/with/for/on/at/by/from/as/it/that/this/0/1/2""")


def make_alternatives(rng: HashRandom, piece: str, count: int) -> list[tuple[str, float]]:
    """Return the chosen token and up to 19 less likely ones; at most 1 in probability."""
    data = rng.randbytes(24)
    unit = int.from_bytes(data[:2], "big") / 65536
    chosen = -round(unit * unit * unit * unit * 3.5 + 0.00001, 6)  # mostly near 0
    # The others share what is left: each gets less than half of the one before.
    logprob = min(math.log(-math.expm1(chosen)) - 0.7, chosen - 0.1)
    table = NOUNS if piece.strip().isalpha() else MARKS
    others = [table[(data[2] + 5 * place) & 255] for place in range(min(count, 20))]
    if piece[:1] != " ":
        others = [other[1:] for other in others]
    others = [other for other in others if other != piece]
    found = [(piece, chosen)]
    for other, byte in zip(others[: count - 1], data[3:]):
        found.append((other, round(logprob - byte / 512, 6)))
        logprob = found[-1][1] - 0.7
    return found


def make_scores(rng: HashRandom, pieces: list[str], count: int) -> list[Any]:
    """Return each token's logprob, its likeliest alternatives, itself first, and its offset."""
    tops = [make_alternatives(rng, piece, max(count, 1)) for piece in pieces]
    offsets = itertools.accumulate(map(len, pieces), initial=0)
    return [(top[0][1], top[:count], offset) for top, offset in zip(tops, offsets)]


# === Vectors ===

WORD = lazy_regex(rb"[a-z0-9]+|[\x80-\xff]+")  # of UTF-8 whose ASCII letters are in lower case
STOPWORDS = frozenset(
    b"a an and are as at be but by can do does for from has have how i in into is it its more of"
    b" on or our so than that the their there these they this to was we were what when where"
    b" which who why will with would you your".split()
)
BUCKETS = 4096
MAX_WORDS = 32768  # whose vectors are remembered
LEVELS = bytes(range(32)) * 8  # a random byte as one of 32 levels
BLOCK_WORDS = 48  # of at most 44 buckets of 31, whose sums stay below 2 ** 16
MAX_TEXT_WORDS = 32768  # that count for a vector
QUANTUM = 100000  # steps from 0 to 1


@functools.lru_cache(maxsize=2 * BUCKETS)
def draw_bucket(key: bytes, size: int, bucket: int) -> int:
    """Return a bucket's random vector: an integer of 16-bit lanes, the last of which counts."""
    lanes = bytearray(2 * size + 2)
    lanes[:-2:2] = hashlib.shake_256(key + bucket.to_bytes(2, "big")).digest(size).translate(LEVELS)
    lanes[-2] = 1
    return int.from_bytes(lanes, "little")


@functools.lru_cache(maxsize=MAX_WORDS)
def make_word_vector(key: bytes, size: int, word: bytes) -> int:
    """Add the bucket of a word, twice, and those of its trigrams."""
    padded = b"<%b>" % word[:MAX_WORD_BYTES]
    grams = [word, word, *[padded[at : at + 3] for at in range(len(padded) - 2)]]
    return sum([draw_bucket(key, size, zlib.crc32(gram) % BUCKETS) for gram in grams])


def find_words(text: str) -> list[bytes]:
    text = text[: 32 * MAX_TEXT_WORDS]  # as far as words may count
    words: list[bytes] = WORD.findall(text.encode("utf-8", "surrogatepass").lower())
    return [word for word in words if word not in STOPWORDS] or words or [b""]


def normalise(lanes: Sequence[int], floor: int, copies: int = 1) -> list[int]:
    """Take what numbers have above a floor, scaled so that its copies are a unit vector.

    Nothing is below 0, so that no two texts point away from each other.
    """
    lanes = [lane - floor if lane > floor else 0 for lane in lanes]
    square = sum(map(operator.mul, lanes, lanes))
    if not square:
        return [QUANTUM] + [0] * (len(lanes) - 1)
    scale = (QUANTUM << 64) // math.isqrt(copies * square << 64)
    half = 1 << 31  # rounds
    return [lane * scale + half >> 32 for lane in lanes]


def make_vector(text: str, size: int, model_key: bytes) -> list[int]:
    """Return a unit vector in steps of 1 / QUANTUM; texts that share words are close.

    Vectors of an even size are a half and its mirror image: half the work, the same likeness.
    """
    copies = 1 if size % 2 else 2
    size //= copies
    words = find_words(text)[:MAX_TEXT_WORDS]
    lanes: list[int] = []
    for start in range(0, len(words), BLOCK_WORDS):
        block = words[start : start + BLOCK_WORDS]
        is_short = max(map(len, block)) <= MAX_WORD_BYTES  # longer words are not remembered
        make = make_word_vector if is_short else make_word_vector.__wrapped__
        total = sum([make(model_key, size, word) for word in block])
        sums = struct.unpack(f"<{size + 1}H", total.to_bytes(2 * size + 2, "little"))
        lanes = list(map(operator.add, lanes, sums)) if lanes else list(sums)
    # One standard deviation above the mean: unrelated texts have a cosine of about 0.1.
    floor = lanes[-1] * 31 // 2 + math.isqrt(lanes[-1] * 85)
    vector = normalise(lanes[:-1], floor, copies)
    return vector + vector[::-1] if copies == 2 else vector


def truncate_vector(vector: list[int], dimensions: int) -> list[int]:
    return normalise(vector[:dimensions], 0)


def cosine_similarity(one: list[int], other: list[int]) -> float:
    return float(sum(map(operator.mul, one, other)) / QUANTUM**2)


class Decimals(dict):  # type: ignore[type-arg]
    """The text of each step from 0 to 1."""

    def __missing__(self, step: int) -> str:
        self[step] = text = repr(step / QUANTUM)
        return text


DECIMALS = Decimals()


def format_floats(vector: list[int]) -> str:
    return ",".join(map(DECIMALS.__getitem__, vector))


def pack_floats(vector: list[int]) -> bytes:
    return struct.pack(f"<{len(vector)}f", *[step / QUANTUM for step in vector])


# === Media ===

MIN_IMAGE_SIDE, MAX_IMAGE_SIDE, DEFAULT_IMAGE_SIDE = 16, 2048, 1024  # pixels


def encode_png(width: int, height: int, rows: Iterable[bytes], palette: bytes) -> bytes:
    """Build a PNG file; each row is a zero byte and then one palette index a pixel."""
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)), (b"PLTE", palette),
        (b"IDAT", zlib.compress(b"".join(rows), 1)), (b"IEND", b""),
    ):  # fmt: skip
        png += struct.pack(">I", len(data)) + kind + data
        png += struct.pack(">I", zlib.crc32(kind + data))
    return png


# A JPEG has blocks of 8 x 8 pixels; ours show four colours, one a quarter. Besides its mean (DC) a
# block has three coefficients (AC): half a wave to the right, down, and both. These quantisers
# make them what the quarters differ by; the rest would only sharpen the steps along an edge.
QUANTISERS = bytes([8]) + bytes([7]) * 63
# Huffman tables: how many codes have 1 to 16 digits, then what the codes stand for. "0" is no
# difference or no more coefficients. "10" goes on with the run of zeros before a coefficient (two
# digits, AC only) and the length of the number less 1 (three digits).
LENGTHS = bytes(range(1, 9))
DC_CODES = bytes([1, 0, 0, 0, 8]) + bytes(11) + b"\0" + LENGTHS
AC_CODES = bytes([1, 0, 0, 0, 0, 0, 32]) + bytes(9) + b"\0"
AC_CODES += bytes([run << 4 | length for run in range(4) for length in LENGTHS])


@functools.lru_cache(maxsize=5 * 511)  # all there are
def code_number(value: int, start: str = "10") -> str:
    """Return a number's Huffman code, which has this start, and its digits."""
    if not value:
        return "0"
    length = abs(value).bit_length()
    digits = value if value > 0 else value + (1 << length) - 1  # inverted if negative
    return f"{start}{length - 1:03b}{digits:0{length}b}"


def code_block(quarters: Iterable[Sequence[int]]) -> tuple[list[int], list[str]]:
    """Return each component's DC, and the bits of its AC."""
    means, bits = [], []
    for a, b, c, d in zip(*quarters):
        means.append(a + b + c + d + 2 >> 2)
        code, zeros = "", 0
        # In zigzag order, where a whole wave down comes before half a wave both ways.
        for value in (a - b + c - d + 2 >> 2, a + b - c - d + 2 >> 2, 0, a - b - c + d + 2 >> 2):
            if value:
                code += code_number(value, f"10{zeros:02b}")
                zeros = 0
            else:
                zeros += 1
        bits.append(code + "0")
    return means, bits


def code_scan(rows: Sequence[bytes], palette: bytes) -> str:
    """Return the bits of all blocks, which mostly come in long runs."""
    colours = [  # brightness, blueness and redness; 0 is a medium grey
        (
            (77 * red + 150 * green + 29 * blue + 128 >> 8) - 128,
            128 * blue - 43 * red - 85 * green + 128 >> 8,
            128 * red - 107 * green - 21 * blue + 128 >> 8,
        )
        for red, green, blue in zip(palette[::3], palette[1::3], palette[2::3])
    ]
    coded: dict[Any, tuple[list[int], list[str]]] = {}  # by four indices of the palette
    scan, before = [], [0, 0, 0]
    for upper, lower in zip(rows[::2], rows[1::2]):
        blocks = zip(upper[1::2], upper[2::2], lower[1::2], lower[2::2])
        for block, repeats in itertools.groupby(blocks):
            if block not in coded:
                coded[block] = code_block([colours[index] for index in block])
            means, bits = coded[block]
            for mean, last, code in zip(means, before, bits):
                scan.append(code_number(mean - last) + code)
            before = means
            again = "0" + "0".join(bits)  # the DC does not differ
            scan.append(again * (len(list(repeats)) - 1))
    return "".join(scan)


def encode_jpeg(width: int, height: int, rows: Sequence[bytes], palette: bytes) -> bytes:
    """Build a JPEG file; rows are as for a PNG, but each index is for 4 x 4 pixels."""
    bits = code_scan(rows, palette)
    bits += "1" * (-len(bits) % 8)
    jpeg = b"\xff\xd8"
    for kind, data in (
        (0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"), (0xDB, b"\0" + QUANTISERS),
        (0xC0, struct.pack(">BHHB", 8, height, width, 3) + b"\1\x11\0\2\x11\0\3\x11\0"),
        (0xC4, b"\0" + DC_CODES), (0xC4, b"\x10" + AC_CODES),
        (0xDA, b"\3\1\0\2\0\3\0\0\x3f\0"),
    ):  # fmt: skip
        jpeg += struct.pack(">BBH", 0xFF, kind, 2 + len(data)) + data
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return jpeg + scan.replace(b"\xff", b"\xff\0") + b"\xff\xd9"


# Colours of the sky's top, the horizon, the sun or moon, the farthest and the nearest layer.
PALETTES = phrases("""\
5b7db1 f7d9c4 fff1c9 c9a9b8 3d4a63
2d2a55 f08a6c ffd9a0 a35d78 241f3d
0d1530 3c5480 f4f1de 2f4468 0a1022
4a9bd6 dff1f7 fffbe6 9cc7c4 2f6b55
e8b77a fbe6c2 fff8e8 d99a6c 7a3f35
c98bab fbe3dc fff4ea c58ca2 5a3358
8fb8de eef6fb ffffff b4cfe4 41607f
062c36 2a8c82 e9f5db 1d6a6a 04191f""")
# Layers from far to near: the shape and its height in percent of the picture's smaller side.
SCENES = phrases("""\
peaks-20 peaks-16 hills-9 hills-7
hills-8 hills-9 hills-9 hills-8 hills-7
peaks-18 hills-6 hills-4 hills-8
peaks-12 peaks-12 peaks-11 peaks-10 peaks-8
hills-9 peaks-9 hills-6 hills-8
peaks-14 peaks-9 hills-5 hills-3
peaks-9 hills-12 peaks-6 hills-5
hills-6 hills-5 hills-4 hills-3 hills-2""")
HALOS = ((12, 25), (26, 16), (65, 11), (100, 10))  # of the sun: light and size in percent
HILLS = 5  # of a layer


def blend(one: bytes, other: bytes, share: int, whole: int = 100) -> bytes:
    return bytes([a + (b - a) * share // whole for a, b in zip(one, other)])


def outline(shape: str, width: int, height: int) -> list[int]:
    """Return how far a thing reaches to either side in each row, from its top down."""
    if shape == "peaks":
        return [width * down // height for down in range(height)]
    return [width * math.isqrt(height**2 - up**2) // height for up in range(height, 0, -1)]


class Canvas:
    """A picture whose things are painted over each other, the nearest last."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        # Palette indices behind a zero byte, as a PNG has them.
        self.rows: list[Any] = [bytearray(1 + width) for _ in range(height)]
        self.palette = b""

    def paint(
        self, x: int, top: int, outline: Sequence[int], first: bytes, last: bytes, shades: int
    ) -> None:
        """Paint a thing around a column, from one colour at its top to another."""
        offset = len(self.palette) // 3
        self.palette += b"".join([blend(first, last, shade, shades) for shade in range(shades)])
        for down, reach in enumerate(outline):
            left, right = max(1, x - reach), min(self.width, x + reach) + 1
            if 0 <= top + down < len(self.rows) and left < right:
                colour = bytes([offset + down * shades // len(outline)])
                self.rows[top + down][left:right] = colour * (right - left)


def paint_landscape(rng: HashRandom, width: int, height: int) -> Canvas:
    """Paint a landscape; it is the same on every machine."""
    data = rng.randbytes(64)
    codes, scene = PALETTES[data[3]].split(), SCENES[data[4]].split()
    top, horizon, sun, far, near = [blend(bytes.fromhex(code), data[:3], 3) for code in codes]
    side, skyline = min(width, height), max(1, height * (42 + data[5] % 24) // 100)
    canvas = Canvas(width, height)
    canvas.paint(0, 0, [width] * skyline, top, horizon, 80)
    x, y = width * (12 + data[6] % 76) // 100, skyline * (25 + data[7] % 70) // 100
    for light, size in HALOS:
        radius = side * (5 + data[8] % 7) * size // 1000
        half = outline("hills", radius, radius)
        rows = max(0, y - radius), min(y + radius, skyline)
        first, last = [blend(blend(top, horizon, row, skyline), sun, light) for row in rows]
        canvas.paint(x, y - radius, half + half[::-1], first, last, 12)
    deep = (height - skyline) // len(scene)
    for place, layer in enumerate(scene):
        shape, _, percent = layer.partition("-")
        base, swell = skyline + deep * place, side * int(percent) // 100
        colour, drawn = blend(far, near, place, len(scene) - 1), data[9 + 11 * place :]
        for hill in range(HILLS):
            tall = swell * (130 + drawn[hill]) // 256
            x = width * (25 * hill + drawn[hill + HILLS] % 25) // 100
            reach = width * (26 + drawn[hill] % 25) // 100
            canvas.paint(x, base - tall, outline(shape, reach, tall), colour, colour, 1)
        mist = blend(colour, horizon, 30)
        canvas.paint(0, base, [width] * (height - base), colour, mist, 16)
    return canvas


def make_image(rng: HashRandom, width: int, height: int, format: str = "png") -> bytes:
    """Paint a landscape; a PNG's pixels and a JPEG's bytes are the same on every machine."""
    if format == "png":
        canvas = paint_landscape(rng, width, height)
        return encode_png(width, height, canvas.rows, canvas.palette)
    # Whole blocks of two by two colours; a decoder cuts off what the size does not include.
    canvas = paint_landscape(rng, (width + 7) // 8 * 2, (height + 7) // 8 * 2)
    return encode_jpeg(width, height, canvas.rows, canvas.palette)


# One turn of a smooth wave from -256 to 256 in 1024 steps.
WAVE = [step * (512 - step) >> 8 for step in range(512)]
WAVE += [-height for height in WAVE]
CHARACTER_MS = 60  # of speech
MAX_SPEECH_CHARACTERS = 5000
ENCODINGS = {"pcm_f32le": "f", "pcm_s16le": "h"}  # the struct code of a sample
VOWELS, PAUSES = "aeiouAEIOU", ".,;:!?-()\"'\n\t "


def make_period(loudness: int, size: int, encoding: str) -> bytes:
    """Return one period of a hum, of three harmonics, in so many samples, from 0 to 0."""
    turn = [1024 * step // size for step in range(size)]
    samples = [
        (WAVE[t] * 5 + WAVE[2 * t & 1023] * 3 + WAVE[3 * t & 1023] * 2) * loudness >> 1
        for t in turn
    ]
    if encoding == "pcm_f32le":
        return struct.pack(f"<{size}f", *[sample / 32768 for sample in samples])
    return struct.pack(f"<{size}h", *samples)


def make_speech(rng: HashRandom, text: str, sample_rate: int, encoding: str) -> bytes:
    """Hum a text, `CHARACTER_MS` a character, and return its samples."""
    text = text[:MAX_SPEECH_CHARACTERS].ljust(4)
    data = rng.randbytes(65)
    pitch = 105 + data[64] % 90  # Hz
    hum_once = functools.lru_cache(None)(make_period)
    parts, at = [], 0
    for place, letter in enumerate(text):
        size = max(sample_rate // (pitch + data[place >> 3 & 63] % 3 * 8), 2)
        end = sample_rate * CHARACTER_MS * (place + 1) // 1000
        count = max(-((at - end) // size), 0)
        loudness = 14 if letter in VOWELS else 0 if letter in PAUSES else 5
        parts.append(hum_once(loudness, size, encoding) * count)
        at += count * size
    width = struct.calcsize(ENCODINGS[encoding])
    return b"".join(parts)[: sample_rate * CHARACTER_MS * len(text) // 1000 * width]


def wrap_wav(samples: bytes, sample_rate: int) -> bytes:
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    body = b"WAVE" + head + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def audio_seconds(data: bytes) -> float:
    """Return how long a WAV file plays; for anything else guess 16 kB a second."""
    form, start = data.find(b"fmt ", 12, 65536), data.find(b"data", 12, 65536) + 8
    if data[:4] != b"RIFF" or form < 0 or start < 8:
        return len(data) / 16000
    rate = int.from_bytes(data[form + 16 : form + 20], "little") or 16000
    size = int.from_bytes(data[start - 4 : start], "little")
    return min(size, max(len(data) - start, 0)) / rate


def mp4_box(kind: bytes, *parts: bytes | int) -> bytes:
    data = b"".join([p if isinstance(p, bytes) else struct.pack(">I", p) for p in parts])
    return struct.pack(">I", len(data) + 8) + kind + data


MATRIX = (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)  # pictures stay as they are


def make_video(rng: HashRandom, width: int, height: int, seconds: int, fps: int) -> bytes:
    """Build an MP4 file of a landscape, which holds still, from PNG frames."""
    frame = make_image(rng, width, height)
    count = seconds * fps
    start = mp4_box(b"ftyp", b"isom\0\0\2\0isomiso2mp41")
    entry = struct.pack(">6xH16xHHIIIH", 1, width, height, 0x480000, 0x480000, 0, 1)
    table = mp4_box(
        b"stbl",
        mp4_box(b"stsd", 0, 1, mp4_box(b"png ", entry, bytes(32), b"\0\x18\xff\xff")),
        mp4_box(b"stts", 0, 1, count, 1),  # each takes one tick
        mp4_box(b"stsc", 0, 1, 1, 1, 1),  # and is a chunk of its own
        mp4_box(b"stsz", 0, 0, count, *[len(frame)] * count),
        mp4_box(b"stco", 0, count, *[len(start) + 8] * count),
    )
    data = mp4_box(b"dinf", mp4_box(b"dref", 0, 1, mp4_box(b"url ", 1)))
    media = mp4_box(
        b"mdia",
        mp4_box(b"mdhd", 0, 0, 0, fps, count, 0x55C40000),  # no language
        mp4_box(b"hdlr", bytes(8), b"vide", bytes(13)),
        mp4_box(b"minf", mp4_box(b"vmhd", 1, 0, 0), data, table),
    )
    shape = (0, 0, 0, 0, *MATRIX, width << 16, height << 16)
    track = mp4_box(b"trak", mp4_box(b"tkhd", 3, 0, 0, 1, 0, count, *shape), media)
    head = (0, 0, 0, fps, count, 0x10000, 0x1000000, 0, 0, *MATRIX, *[0] * 6, 2)
    return start + mp4_box(b"mdat", frame) + mp4_box(b"moov", mp4_box(b"mvhd", *head), track)


# === Schemas ===

MAX_STEPS = 40_000  # of work for one value, some 0.2 seconds
MAX_REQUEST_STEPS = 500_000  # for all values of one request, some two seconds
MAX_TEXT = 10_000  # characters that a schema may ask of one string
MAX_ITEMS = 500  # items or properties that a schema may ask of one value
MAX_MORE_DEPTH = 30  # levels beyond the depth that is meant
MAX_BRANCHES = 48  # ways through anyOf and oneOf that are tried in one place
TRIES = 12  # values made for one way before it is given up
MAX_SEARCHED = 1_000_000  # characters in which a pattern is looked for
FEW_STEPS = 30_000  # with less left, optional properties are left out


class Unsatisfiable(Exception):
    """No value can be made for a schema or pattern; the text names the place and the reason."""


class OutOfSteps(Exception):
    """The work allowed is used up, whatever is still to be tried."""


class Work(threading.local):
    """The steps that a thread may still take for what it makes, so that nothing keeps it busy."""

    steps = math.inf


WORK = Work()


def spend(count: int = 1) -> None:
    WORK.steps = left = WORK.steps - count
    if left < 0:
        raise OutOfSteps


@contextlib.contextmanager
def bound_work() -> Iterator[None]:
    """Bound the work on one value, also by what is left for all values of a request."""
    left = WORK.steps
    WORK.steps = most = min(MAX_STEPS, left)
    try:
        yield
    except (OutOfSteps, RecursionError):
        raise Unsatisfiable("it asks for too much, or nests too deep") from None
    except ValueError:  # from urljoin()
        raise Unsatisfiable("it has a malformed URI") from None
    finally:
        WORK.steps = left - most + max(0, WORK.steps)


# Only what ECMA-262 and Python read alike. Whether a repeat is lazy does not change the texts.
ESCAPE = r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[dDwWsStnrfv]|[^0-9A-Za-z])"
PATTERN_TOKEN = lazy_regex(
    r"(?P<flags>\(\?[aims]+\))|(?P<open>\((?!\?)|\(\?(?:P?<[A-Za-z_]\w*>|[:=!]))|(?P<mark>[|)])"
    r"|(?P<at>[\^$]|\\[AZbB])|(?P<repeat>[*+?]|\{[0-9]{1,6}(?:,[0-9]{0,6})?\})\??(?![*+?{])"
    rf"|(?P<set>\.|{ESCAPE}|\[(?!\^?\])\^?(?:{ESCAPE}|\\b|[^\\\]])+\])"
    r"|(?P<text>(?:[^\\()\[|^$.*+?{](?![*+?{]))+|[^\\(\[*+?{]|\{(?![0-9,]))|(?P<rest>.)",
    re.DOTALL,
)
SET_OPERATOR = lazy_regex(r"\\.|(?!^)[\[&|~]", re.DOTALL)  # some day Python may read sets in sets
ENDLESS = MAX_SEARCHED  # repeats
REPEATS = {"*": (0, ENDLESS), "+": (1, ENDLESS), "?": (0, 1)}
PRINTABLE = "".join(map(chr, range(32, 127)))


@functools.lru_cache(maxsize=1000)
def list_members(expression: re.Pattern[str]) -> str:
    """Return the printable characters of a set, or some others."""
    plain = expression.findall(PRINTABLE) or expression.findall("\t\n\r")
    others = filter(expression.match, map(chr, range(161, 0xD800)))
    return "".join(plain or itertools.islice(others, 64))


class Pattern:
    """A regular expression, for making texts and for matching them.

    Matching follows all ways at once, so that no expression takes exponential time. Tree nodes:
    ("leaf", expression, size, texts to write, plain ones), ("all", nodes), ("any", nodes),
    ("repeat", node, low, high, expression of a run), ("look", node, wanted).
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._flags = 0
        self._spare = 0  # characters that repeats may still add
        spend(len(source))
        found = [(str(token.lastgroup), token) for token in PATTERN_TOKEN.finditer(source)]
        self._tokens = [(kind, token[kind]) for kind, token in reversed(found)]  # the next one last
        self.tree = self._read()
        if self._tokens:
            raise self._refusal("a parenthesis closes nothing")

    def _refusal(self, reason: str) -> Unsatisfiable:
        return Unsatisfiable(f"pattern {self.source[:200]!r}: {reason}")

    def _read(self) -> Any:
        """Read options up to the end or to the parenthesis that closes them."""
        options: list[list[Any]] = [[]]
        while self._tokens and self._tokens[-1][1] != ")":
            kind, text = self._tokens.pop()
            if kind == "mark":
                options.append([])
            elif kind == "flags":  # for what follows
                self._flags = re.compile(text).flags
            elif kind == "repeat":
                options[-1].append(self._read_repeat(options[-1], text))
            elif kind == "open":
                node = self._read()
                if not self._tokens:
                    raise self._refusal("a parenthesis is not closed")
                self._tokens.pop()
                is_look = text in ("(?=", "(?!")
                options[-1].append(("look", node, text == "(?=") if is_look else node)
            elif kind == "rest":
                raise self._refusal(f"{text} is not supported there")
            else:
                options[-1].append(self._read_leaf(kind, text))
        nodes = [option[0] if len(option) == 1 else ("all", option) for option in options]
        return nodes[0] if len(nodes) == 1 else ("any", nodes)

    def _read_repeat(self, before: list[Any], text: str) -> Any:
        first, comma, last = text.strip("{}").partition(",")
        low, high = REPEATS.get(text) or (int(first), int(last or ENDLESS if comma else first))
        if not before or before[-1][3:] == ([""], [""]) or low > high:
            raise self._refusal(f"{text} has nothing to repeat, or no count")
        part, run = before.pop(), None
        if part[0] == "leaf" and part[2] == 1:
            run = re.compile(f"(?:{part[1].pattern})*", self._flags)
        return ("repeat", part, low, high, run)

    def _read_leaf(self, kind: str, text: str) -> Any:
        """Read a text, a set of characters or an anchor."""
        source = SET_OPERATOR.sub(lambda found: "\\" + found[0][-1], text)
        if kind == "text":  # an expression that finds it where it overlaps, too
            source = f"{re.escape(text[0])}(?={re.escape(text[1:])})"
        try:
            expression = re.compile(source, self._flags)
        except re.error:
            raise self._refusal(f"{text[:60]} is not supported") from None
        if kind != "set":
            texts = [text if kind == "text" else ""]
            return ("leaf", expression, len(texts[0]), texts, texts)
        members = list_members(expression)
        if not members:
            raise self._refusal(f"{text[:60]} has no characters")
        if max(members) > "~":  # which took long to find
            spend(2000)
        return ("leaf", expression, 1, members, "".join(filter(str.islower, members)) or members)

    def _ends(self, node: Any, text: str, starts: Any) -> Any:
        """Return where the node can end, given where it may start: a set, or the range of all."""
        everywhere = type(starts) is range  # where a search is quick
        spend(1 + len(starts) // (64 if everywhere else 8))
        kind, content = node[:2]
        if kind == "leaf":
            if everywhere:
                ends = {found.start() + node[2] for found in content.finditer(text)}
                spend(len(ends) // 8)
                return ends
            return {at + node[2] for at in starts if content.match(text, at)}
        if kind == "look":
            return {at for at in starts if bool(self._ends(content, text, {at})) is node[2]}
        if kind == "any":
            return {end for part in content for end in self._ends(part, text, starts)}
        if kind == "repeat":
            return self._repeat_ends(node, text, starts)
        for part in content:
            starts = self._ends(part, text, starts)
        return starts

    def _repeat_ends(self, node: Any, text: str, starts: Any) -> set[int]:
        """Return where repeats of a part may end that begin at these places."""
        _, part, low, high, run = node
        ends = set() if low else set(starts)
        if run:
            end = following = -1
            for start in sorted(starts):
                if start > end:
                    end = run.match(text, start).end()
                last = min(start + high, end)
                ends.update(range(max(start + low, following), last + 1))
                following = last + 1
            spend(len(ends) // 8)
            return ends
        for count in range(1, high + 1):
            starts = set(self._ends(part, text, starts))
            if count >= low:
                starts -= ends
                ends |= starts
            if not starts:
                break
        return ends

    def is_in(self, text: str) -> bool:
        """Tell whether the pattern matches somewhere in the text."""
        return bool(self._ends(self.tree, text, range(len(text) + 1)))

    def search(self, text: str) -> bool:
        """Tell whether it is found in a text; one that takes too much work is not."""
        left, WORK.steps = WORK.steps, MAX_STEPS + len(text) // 2
        try:
            return self.is_in(text[:MAX_SEARCHED])
        except OutOfSteps:
            return False
        finally:
            WORK.steps = left

    def _write(self, rng: HashRandom, node: Any, plain: bool) -> str:
        """Draw a text; whether anchors and looks match is seen later.

        It repeats as long as there are characters to spare, or less often and with small letters
        if plain.
        """
        spend()
        kind, content = node[:2]
        if kind == "leaf":
            return str(rng.choice(node[3 + plain]))
        if kind == "any":
            return self._write(rng, rng.choice(content), plain)
        if kind == "all":
            return "".join([self._write(rng, part, plain) for part in content])
        texts: list[str] = []
        if kind == "repeat":
            texts = [self._write(rng, content, plain) for _ in range(node[2])]
            while len(texts) < node[3] and self._spare > 0 and (not plain or rng.randbelow(8)):
                texts.append(self._write(rng, content, plain))
                self._spare -= max(1, len(texts[-1]))
        return "".join(texts)

    def make(self, rng: HashRandom, low: int, high: int, others: Sequence[Pattern] = ()) -> str:
        """Draw a text of `low` to `high` characters that this and the other patterns match."""
        self._spare = 0
        least = len(self._write(rng, self.tree, True))
        start = max(low, least)
        ordered = sorted(
            (self, *others), key=lambda p: p.source.endswith("$") - p.source.startswith("^")
        )
        for attempt in range(4 * TRIES):
            again = rng.child("pattern", attempt)
            self._spare = start - least + again.randbelow(max(1, min(high - start + 1, 16)))
            text = self._write(again, self.tree, attempt < 2)
            if others and attempt % 2:  # one after the other: from a start to an end
                text = "".join([p._write(again, p.tree, attempt < 9) for p in ordered])
            padding = random_letters(again, max(0, low - len(text)), LOWER36)
            text = padding + text if attempt % 2 else text + padding
            if low <= len(text) <= high and all(p.is_in(text) for p in ordered):
                return text
        raise self._refusal(f"no text of {low} to {high} characters was found")


def read_table(text: str) -> dict[str, str]:
    """Return a table written as lines of names, a colon and what all of these stand for."""
    rows = [line.partition(": ") for line in text.splitlines()]
    return {name: value for names, _, value in rows for name in names.split()}


# What `{kind}` or `{kind4}` in a template stands for: one draw, or so many in a row. A template
# may also name its own choices: `{this|that}`.
SAMPLES = read_table("""\
d: 0|1|2|3|4|5|6|7|8|9
c: 1|2|3|4|5|6|7|8|9
s: 0|1|2|3|4|5
x: 0|1|2|3|4|5|6|7|8|9|a|b|c|d|e|f
first: Ada|Ben|Clara|David|Elena|Felix|Grace|Hugo|Ines|Jonas|Lena|Marco|Nora|Omar
last: Bauer|Chen|Diaz|Evans|Fischer|Garcia|Haddad|Ito|Jensen|Kaya|Lopez|Moreau
site: example.com|example.org|example.net
adjective: bright|calm|clear|careful|fresh|gentle|modern|quick|quiet|simple|steady
noun: bridge|garden|harbor|journey|letter|market|meadow|notebook|plan|river|signal
verb: check|compare|explain|improve|measure|prepare|review|share|update
""")
SAMPLES["user"] = SAMPLES["first"].lower()
# By format, or by a name that calls for it; Base64 takes four characters for three bytes.
FORMATS = read_table("""\
date day birthday deadline dob: 202{d}-0{c}-1{d}
time: 1{d}:{s}{d}:{s}{d}Z
date-time at timestamp datetime date_time: 202{d}-0{c}-1{d}T1{d}:{s}{d}:{s}{d}Z
duration: PT{c}{d}M
email idn-email email_address mail: {user}.{noun}@{site}
hostname idn-hostname host domain: {noun}.{site}
name-email: {first} {last} <{user}.{noun}@{site}>
ipv4 ip ipvanyaddress: 10.{c}{d}.{d}.{c}{d}
ipv4interface ipvanyinterface: 10.{c}{d}.{d}.{c}{d}/24
ipv4network ipvanynetwork cidrv4: 10.{c}{d}.{d}.0/24
ipv6: 2001:db8::{x4}:{x4}
ipv6interface: 2001:db8::{x4}:{x4}/64
ipv6network cidrv6: 2001:db8:{x4}::/48
uri url iri uri-template website link href homepage: https://{site}/{noun}/{adjective}
uri-reference iri-reference json-pointer path directory folder: /{noun}/{adjective}
uuid: {x8}-{x4}-4{x3}-a{x3}-{x12}
regex: ^{noun}[a-z]+$
byte base64 base64url: {YXNo|ZWxt|YmVl|bWFw}{cGVu|cmVk|dGVh|cGll}
json-string application/json: ["{noun}", {c}]
directory-path: /
""")
FORMATS.update((f"uuid{n}", FORMATS["uuid"].replace("-4", f"-{n}")) for n in range(1, 9))
# By the words of a property's name: the longest end of the name first, then single words.
TEXTS = FORMATS | read_table("""\
*: {adjective} {noun}
name author person contact: {first} {last}
first_name given_name firstname: {first}
last_name family_name surname lastname: {last}
user_name username login: {user}{d2}
phone telephone mobile: +1-555-01{d2}
image avatar photo image_url: https://{site}/{noun}.png
city town location place destination origin: {Berlin|Boston|Cairo|Kyoto|Lima|Oslo}
address street: {c}{d} {Elm|Garden|Lake|Mill|Oak|River} Street
zip zip_code postcode postal_code: {d5}
country: {Brazil|Canada|France|Japan|Kenya|Norway}
language locale: {de|en|es|fr|ja|pt}
currency: {EUR|GBP|JPY|USD}
timezone time_zone: {Africa/Cairo|America/Lima|Asia/Tokyo|Europe/Berlin|UTC}
title subject headline heading: A {adjective} {noun}
description summary text content body reason reasoning explanation comment message answer note \
review bio thought analysis: The {adjective} {noun} is easy to {verb} and leads to a {adjective} \
{noun}.
question prompt: How would you {verb} the {adjective} {noun}?
company organization employer brand: {Alder|Borealis|Cobalt|Ember} {Group|Labs|Studio|Works}
role job occupation profession: {analyst|architect|designer|editor|engineer|teacher}
type category kind group: {basic|custom|general|primary|public|standard}
status state: {active|approved|completed|open|pending|ready}
color colour: {aqua|blue|coral|green|silver|violet}
id key token: {noun}_{x8}
sku product_code order_code error_code reference: {A|B|C|D}{d3}-{d4}
file filename file_name: {noun}.txt
tag label slug word: {noun}
code snippet script python: print("{adjective} {noun}")
sql: SELECT name FROM {noun}s WHERE id = {d2}
command cmd bash shell: echo {noun}
step action task instruction: {verb} the {noun}
amount price: {d2}.{d2}
""")
NUMBERS = read_table("""\
*: 1 100
score confidence probability likelihood relevance: 0 1
verdict attributed binary: 0 1 1
weight height width length size: 1 200
price cost amount total subtotal fee: 5 250
count quantity qty number limit month index position: 1 12
percent percentage progress humidity: 0 100
at timestamp created updated: 1700000000 1760000000
rating star priority level rank: 1 5
age: 18 80
year: 1990 2025
day hour minute: 1 23
latitude lat longitude lon lng temperature: -5 40
""")
SAMPLE = lazy_regex(r"([^{]*)(?:\{([^{}0-9]+)([0-9]*)\})?")


@functools.lru_cache(maxsize=1024)
def split_name(name: str) -> list[str]:
    """Return what a property's name may be listed as: its ends first, then single words."""
    words = [word.lower() for word in NAME_WORD.findall(name)]
    ends = ["_".join(words[start:]) for start in range(len(words))]
    return [key for end in (*ends, *reversed(words)) for key in (end, end.rstrip("s"))]


def find_by_name(table: Mapping[str, str], name: str) -> str:
    """Return the row that a property's name suggests: `homeEmail` finds `email`."""
    for key in (name, *split_name(name[:100])):
        if key in table:
            return table[key]
    return table["*"]


@functools.lru_cache(maxsize=256)
def read_template(template: str) -> list[list[str]]:
    parts: list[list[str]] = []
    for text, kind, count in SAMPLE.findall(template):
        parts += [[text], *[SAMPLES.get(kind, kind).split("|")] * int(count or 1)]
    return parts


def fill_template(rng: HashRandom, template: str) -> str:
    parts = read_template(template)
    return "".join([rng.choice(part) if len(part) > 1 else part[0] for part in parts])


def as_whole(number: Any) -> Any:
    return int(number) if number == number // 1 else number


def canonical(value: Any) -> str:
    """Return a text that is the same for equal values: for 1 and 1.0, but not for true."""
    if type(value) is str:
        return '"' + value  # most are texts, and this is the short way for them
    plain = json.loads(json.dumps(value), parse_float=lambda digits: as_whole(float(digits)))
    return json.dumps(plain, sort_keys=True)


def is_among(value: Any, choices: Any) -> bool:
    own = canonical(value)
    spend((len(choices) + len(own)) // 16)
    return any(own == canonical(choice) for choice in choices if choice == value)


NUMBER = r"-?[0-9]{1,9}(?:\.[0-9]{1,9})?"
NUMBER_RANGE = lazy_regex(
    rf"between ({NUMBER}) and ({NUMBER})"
    rf"|(?<![\w.-])({NUMBER})\s?(?:-|\u2013|to|through|\.\.\.?)\s?({NUMBER})(?![\w-])"
    rf"|[\[(]({NUMBER}), ?({NUMBER})[\])]|\bout of ()({NUMBER})"
)
IN_BRACKETS = lazy_regex(r"\s?\([^()\n]{0,200}\)")


def read_numbers(text: str) -> Item:
    """Return the schema of a number that some words bound: `1-5`, `1 if so, 0 otherwise`."""
    plain = IN_BRACKETS.sub("", text) if text[:1] != "(" else text
    digits = set(re.findall(NUMBER, plain))
    if digits == {"0", "1"} and re.search(r"\bif\b|\bor\b|otherwise|else|[/=|]", plain, re.I):
        return {"enum": [0, 1]}
    found = NUMBER_RANGE.search(text) or NUMBER_RANGE.search(plain)
    if found is None:
        percent = re.search(r"\bpercent", text)
        return {"type": "number", "minimum": 0, "maximum": 100} if percent else {}
    low, high = [side or "0" for side in found.groups() if side is not None]
    whole = "." not in low + high and (float(high) > 1 or "integer" in text)
    kind = "integer" if whole and not re.search("float|decimal|real", text) else "number"
    bounds = sorted((as_whole(float(low)), as_whole(float(high))))
    return {"type": kind, "minimum": bounds[0], "maximum": bounds[1]}


KINDS: dict[type, str] = {kind: name.split()[1] for kind, name in KIND_NAMES.items()}
KINDS.update({int: "number", type(None): "null"})


# What a keyword of each shape takes; those of any shape are in no row.
SHAPES = Fields(
    "text list:list switch:bool names:list[str] schema:dict|bool schemas:list map,needs:dict",
    "limit:float|bool:-1e300..1e300",  # some are switches in draft 4
    "step:float:1e-8..1e300 count:int:0..1e300 items:dict|bool|list",  # a list until 2019-09
    "types:str|list[str={0}]:1..={0}".format("|".join(TYPES)),
)


SIZED = {"Length": "string", "Items": "array", "Properties": "object"}
# keyword: (the shape of its argument, the kind of value it speaks of, or "" for all, whether
# schema `s`, in which it has the argument `a`, accepts value `v`). `r` is the `SchemaReader`.
VOCABULARY: dict[str, tuple[str, str, Callable[[Any, Any, Any, Any], bool]]] = {
    "type": ("types", "", lambda r, a, v, s: KINDS[type(v)] in a or (  # 2.0 is an integer
        "integer" in a and type(v) in (int, float) and v == v // 1)),
    "enum": ("list", "", lambda r, a, v, s: is_among(v, a)),
    "$ref": ("text", "", lambda r, a, v, s: r.accepts(r.resolve(a), v)),
    "allOf": ("schemas", "", lambda r, a, v, s: r.accepts_all(a, v)),
    "anyOf": ("schemas", "", lambda r, a, v, s: any(r.accepts(part, v) for part in a)),
    "oneOf": ("schemas", "", lambda r, a, v, s: sum(r.accepts(part, v) for part in a) == 1),
    "not": ("schema", "", lambda r, a, v, s: not r.accepts(a, v)),
    "if": ("schema", "", lambda r, a, v, s: r.accepts_all(r.list_branches(s, v), v)),
    "minimum": ("limit", "number", lambda r, a, v, s: v >= a),
    "maximum": ("limit", "number", lambda r, a, v, s: v <= a),
    "exclusiveMinimum": ("limit", "number", lambda r, a, v, s: v > a),
    "exclusiveMaximum": ("limit", "number", lambda r, a, v, s: v < a),
    "multipleOf": ("step", "number", lambda r, a, v, s: abs(v) < 1e300
        and (v % a if type(a) is int else v / a % 1) == 0),  # as validators see it
    **{f"min{end}": ("count", kind, lambda r, a, v, s: len(v) >= a) for end, kind in SIZED.items()},
    **{f"max{end}": ("count", kind, lambda r, a, v, s: len(v) <= a) for end, kind in SIZED.items()},
    "pattern": ("text", "string", lambda r, a, v, s: r.matches(a, v)),
    "uniqueItems": ("switch", "array", lambda r, a, v, s: len({*map(canonical, v)}) >= len(v) * a),
    "prefixItems": ("schemas", "array", lambda r, a, v, s: all(map(r.accepts, a, v))),
    "items": ("items", "array", lambda r, a, v, s: all(
        r.accepts(a, item) for item in v[len(s.get("prefixItems", ())) :])),
    "contains": ("schema", "array", lambda r, a, v, s: s.get("minContains", 1)
        <= sum(r.accepts(a, item) for item in v) <= s.get("maxContains", len(v))),
    "unevaluatedItems": ("schema", "array", lambda r, a, v, s: all(
        r.accepts(a, v[number]) for number in r.find_rest(s, v, range(len(v))))),
    "dependentSchemas": ("needs", "object", lambda r, a, v, s: r.accepts_all(
        r.list_branches(s, v), v)),
    "required": ("names", "object", lambda r, a, v, s: all(name in v for name in a)),
    "propertyNames": ("schema", "object", lambda r, a, v, s: all(r.accepts(a, key) for key in v)),
    "properties": ("map", "object", lambda r, a, v, s: all(
        r.accepts(a[name], v[name]) for name in v if name in a)),
    "patternProperties": ("map", "object", lambda r, a, v, s: all(
        r.accepts(part, v[name]) for source, part in a.items() for name in v
        if r.matches(source, name))),
    "additionalProperties": ("schema", "object", lambda r, a, v, s: all(
        r.accepts(a, v[name]) for name in v if name not in s.get("properties", ())
        and not any(r.matches(source, name) for source in s.get("patternProperties", ())))),
    "unevaluatedProperties": ("schema", "object", lambda r, a, v, s: all(
        r.accepts(a, v[name]) for name in r.find_rest(s, v, v))),
}  # fmt: skip
# Keywords that others look at, or that are rewritten: the argument's shape.
LOOKED_AT = {
    "default": "any", "examples": "any", "description": "any", "format": "text",
    "contentMediaType": "text", "contentEncoding": "text", "contentSchema": "schema",
    "minContains": "count", "maxContains": "count", "const": "any",
    "then": "schema", "else": "schema", "additionalItems": "schema",
    "dependencies": "needs", "dependentRequired": "needs",
}  # fmt: skip
VOCABULARY.update(
    (keyword, (shape, "no kind", lambda r, a, v, s: True)) for keyword, shape in LOOKED_AT.items()
)
META_SCHEMA = lazy_regex(r"https?://json-schema\.org/draft[^#]*#")


def rewrite(schema: Item) -> Any:
    """Say all in few keywords of draft 2020-12, with the types as a tuple."""
    for side, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(strict), bool) and schema.pop(strict) and side in schema:
            schema[strict] = schema.pop(side)
    if isinstance(schema.get("items"), list):
        schema["prefixItems"] = schema["items"]
        schema["items"] = schema.get("additionalItems", True)
    for keyword in ("dependencies", "dependentRequired"):
        for key, part in schema.pop(keyword, {}).items():
            needs = schema.setdefault("dependentSchemas", {})
            needs[key] = {"allOf": [part, needs[key]]} if key in needs else part
    if "const" in schema:
        only = [schema.pop("const")]
        schema["enum"] = [value for value in only if is_among(value, schema.get("enum", only))]
    return False if schema.get("not") in (True, {}) else schema


def list_types(schemas: Sequence[Any]) -> list[str]:
    """Return the types that all schemas allow; without any, first those the keywords speak of."""
    given = [schema["type"] for schema in schemas if "type" in schema]
    if given:
        first, *others = given
        return [name for name in first if not others or all(name in other for other in others)]
    spoken_of = [VOCABULARY[keyword][1] for schema in schemas for keyword in schema]
    return [kind for kind in dict.fromkeys([*spoken_of, *TYPES]) if kind in TYPES]


def join_uri(base: str, reference: str) -> str:
    """Return what a reference stands for, with its `#`; `urljoin()` does not know URNs."""
    uri = base + reference if reference.startswith("#") else urljoin(base, reference)
    return uri if "#" in uri else f"{uri}#"


class SchemaReader:
    """One schema document: reads its parts, follows references, tests values.

    A read schema is True, False, or a dict of well-formed `VOCABULARY` after `rewrite()`.
    """

    def __init__(self, document: Any) -> None:
        self.document = document
        self.pattern = pattern = functools.cache(Pattern)  # no cycle: all is freed at once
        self.matches = functools.cache(lambda source, text: pattern(source).is_in(text))
        self._resolved: Item = {}  # what a $ref has named, by URI
        self.root = self.read(document, "#")

    @functools.cached_property
    def _names(self) -> tuple[Item, dict[int, str]]:
        """The parts by URI, and the URIs that references in a part start from, by its id()."""
        base = str(self.document.get("id", "")).partition("#")[0]  # which draft 4 has
        named, bases = {"#": self.document, f"{base}#": self.document}, {}
        todo = [(self.document, base)]
        for part, base in todo:  # grows on the way
            spend(len(part) // 16)
            if type(part) is dict:
                for keyword, mark in (("$id", ""), ("$anchor", "#"), ("$dynamicAnchor", "#")):
                    if isinstance(part.get(keyword), str):
                        uri = join_uri(base, mark + part[keyword])
                        named[uri] = part
                        base = uri.partition("#")[0]
                bases[id(part)] = base
            inside = part.values() if type(part) is dict else part
            todo += [(inner, base) for inner in inside if type(inner) in (dict, list)]
        return named, bases

    def read(self, schema: Any, place: str) -> Any:
        """Return the schema as it is used, or raise `Unsatisfiable` where it is malformed."""
        spend(1 + len(place) // 100)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise Unsatisfiable(f"{place[:200]}: a schema is an object or a boolean")
        read: Item = {}
        for keyword, argument in schema.items():
            name = "$ref" if keyword in ("$dynamicRef", "$recursiveRef") else keyword
            if name not in VOCABULARY:
                continue
            shape = VOCABULARY[name][0]
            field = SHAPES.get(shape)
            try:
                if field is not None and type(argument) not in field.free:
                    field.check(argument)
            except ApiError as error:
                reason = error.facts["reason"]
                raise Unsatisfiable(f"{place[:200]}: {keyword} {reason}") from None
            if shape in ("schema", "schemas", "map", "items", "needs"):
                argument = self._read_inner(argument, shape, f"{place}/{keyword}")
            elif name == "type":  # integers are among the numbers
                names = [argument] if isinstance(argument, str) else argument
                argument = (*names, "integer") if "number" in names else tuple(names)
            elif name == "$ref":
                argument = unquote(join_uri(self._names[1][id(schema)], argument))
            read[name] = argument
        return rewrite(read)

    def _read_inner(self, argument: Any, shape: str, place: str) -> Any:
        if isinstance(argument, list):
            return [self.read(part, f"{place}/{number}") for number, part in enumerate(argument)]
        if shape in ("schema", "items"):
            return self.read(argument, place)
        if shape == "needs":
            parts = argument.items()
            argument = {key: {"required": p} if isinstance(p, list) else p for key, p in parts}
        return {name: self.read(argument[name], f"{place}/{name}") for name in argument}

    def resolve(self, uri: str) -> Any:
        """Return the read schema that a reference names, in this document."""
        if META_SCHEMA.fullmatch(uri):
            return {"enum": [{}]}  # the simplest schema
        if uri in self._resolved:
            return self._resolved[uri]
        start, _, pointer = uri.partition("#")
        named = self._names[0]
        try:
            keys = [] if uri in named else pointer.split("/")[1:]
            part = named[f"{start}#" if keys else uri]
            for key in keys:
                name = key.replace("~1", "/").replace("~0", "~")
                part = part[int(key) if isinstance(part, list) else name]
            self._resolved[uri] = read = self.read(part, uri)
        except (LookupError, ValueError, TypeError):
            raise Unsatisfiable(f"$ref {uri[:200]!r}: names nothing in this schema") from None
        return read

    def accepts(self, schema: Any, value: Any) -> bool:
        """Tell whether the value is valid; `format` is not tested, as in most validators."""
        if isinstance(schema, bool):
            return schema
        spend()
        kind = KINDS[type(value)]
        for keyword, argument in schema.items():
            _, spoken_of, check = VOCABULARY[keyword]
            if spoken_of in ("", kind) and not check(self, argument, value, schema):
                return False
        return True

    def accepts_all(self, schemas: Any, value: Any) -> bool:
        return all(map(self.accepts, schemas, itertools.repeat(value)))

    def list_inside(self, schemas: Sequence[Any], key: Any) -> list[Any]:
        """Return all that schemas ask of a property, or of an item by its number."""
        asked: list[Any] = []
        for schema in schemas:
            if type(key) is int:
                parts, others = schema.get("prefixItems", ())[key : key + 1], "items"
            else:
                named, others = schema.get("properties", {}), "additionalProperties"
                parts = [named[key]] if key in named else []
                for source, part in schema.get("patternProperties", {}).items():
                    parts += [part] if self.matches(source, key) else []
            asked += parts or ([schema[others]] if others in schema else [])
        return asked

    def list_branches(self, schema: Any, value: Any) -> list[Any]:
        """Return what a schema asks of a value beside the rest, by `if` and `dependentSchemas`."""
        needs = schema.get("dependentSchemas", {}) if isinstance(value, dict) else {}
        branches = [needs[key] for key in needs if key in value]
        if "if" in schema:
            side = "then" if self.accepts(schema["if"], value) else "else"
            branches.append(schema.get(side, True))
        return branches

    def find_rest(self, schema: Any, value: Any, keys: Iterable[Any]) -> list[Any]:
        """Return the properties or items that a schema does not mention; the value meets it."""
        spend(len(value))
        wanted = isinstance(value, list) and schema.get("contains", False)
        all_others = "unevaluatedItems" if isinstance(value, list) else "unevaluatedProperties"
        rest = [
            key
            for key in keys
            if not (self.list_inside([schema], key) or self.accepts(wanted, value[key]))
        ]
        parts = [part for name in ("allOf", "anyOf", "oneOf") for part in schema.get(name, ())]
        parts += [self.resolve(schema["$ref"])] if "$ref" in schema else []
        parts += [schema["if"]] if "if" in schema else []
        parts += self.list_branches(schema, value)
        for part in parts:
            if isinstance(part, dict) and self.accepts(part, value):
                rest = [] if all_others in part else self.find_rest(part, value, rest)
        return rest


COMBINING = {"$ref", "allOf", "anyOf", "oneOf"}  # add parts
# What a made value does not meet by the way it is made, and is therefore tested for.
TESTED = {
    *("oneOf", "not", "contains", "if", "dependentSchemas"),
    *("unevaluatedItems", "unevaluatedProperties"),
}
NAMING = {"enum", "examples", "default"}  # keywords with values
MAPS = ("additionalProperties", "patternProperties", "unevaluatedProperties")


def rank_types(parts: list[Any]) -> Callable[[Any], bool]:
    """Return a sort key: null is last, a text after a number, as pydantic's Decimal is either."""
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    late = [("null",), ("string",)] if ("number", "integer") in kinds else [("null",)]
    return lambda part: isinstance(part, dict) and part.get("type") in late and "enum" not in part


class ValueMaker:
    """One place of an instance: makes its value, which meets what is given, and those inside."""

    schemas: list[Any]  # that are to be met
    arguments: dict[str, list[Any]]  # what they give to each keyword
    attempts: Sequence[int] = range(TRIES + 6)  # the late ones make only what must be there
    attempt = 0  # this one's number
    depth = 6  # levels that are left before only what must be there is made
    minimal = False  # only that is made
    path = "#"  # where this is in the instance
    name = ""  # of the property, for values that look natural
    trail = frozenset(("#",))  # references on the way
    start: int  # which of some schemas is tried first

    def __init__(self, reader: SchemaReader, rng: HashRandom, given: list[Any]) -> None:
        self.reader = reader
        self.rng = rng
        self.given = given

    def count_range(self, what: str, limit: int) -> tuple[int, int]:
        """Return how few and how many `minItems` and the like allow."""
        low = int(max(self.arguments["min" + what], default=0))
        high = int(min([limit, *self.arguments["max" + what]]))
        if low > high:
            raise self.no_value()
        late = self.attempt - TRIES  # for a bound within `not`
        if late >= 3:
            low = min(max(low, 16 << 3 * (late - 3)), high)
        elif late >= 0:
            high = low
        return low, high

    def no_value(self) -> Unsatisfiable:
        keywords = ", ".join(filter(self.arguments.get, self.arguments))
        return Unsatisfiable(f"{self.path}: no value was found that meets {keywords}")

    def make_inside(self, key: str | int, schemas: list[Any], name: str) -> Any:
        """Return the value of a property or an item."""
        inner = ValueMaker(self.reader, self.rng.child(key, self.attempt), schemas)
        inner.path, inner.name = f"{self.path}/{key}"[:200], name
        inner.depth, inner.minimal, inner.trail = self.depth - 1, self.minimal, self.trail
        unwanted = filter(None, self.arguments["not"] if self.attempt == 1 else ())
        for part in self.reader.list_inside([*unwanted], key):
            with contextlib.suppress(Unsatisfiable):
                inner.given = [*schemas, {"not": part}]
                return inner.make()
            inner.given = schemas
        return inner.make()

    def make(self) -> Any:
        """Return a value by the first way that is not blocked."""
        if self.depth < -MAX_MORE_DEPTH:
            raise Unsatisfiable(f"{self.path}: nests too deep")
        spend(4)
        self.minimal = self.minimal or self.depth <= 0
        for schema in self.given:
            if schema is False:
                raise Unsatisfiable(f"{self.path}: no value is allowed here")
            if schema is True or not COMBINING.isdisjoint(schema):
                break
        else:
            self.schemas = self.given
            return self._fill()
        self.start = self.rng.randbelow(1 << 16)
        problem: Any = None
        for number in range(MAX_BRANCHES):
            way = copy.copy(self)
            try:
                left = way._choose(number)
                if not left:
                    return way._fill()
                if left == number:  # there is nothing to choose
                    break
            except Unsatisfiable as error:
                problem = problem or error
        raise problem

    def _choose(self, number: int) -> int:
        """List all schemas to be met together, by one way through anyOf and oneOf.

        Returns the rest of the way's number: above 0 there is no such way.
        """
        schemas: list[Any] = []
        refs: set[str] = set()
        todo = list(self.given)
        for schema in todo:  # grows on the way
            if schema is True:
                continue
            if schema is False:
                raise Unsatisfiable(f"{self.path}: no value is allowed here")
            spend(2)
            schemas.append(schema)
            todo += schema.get("allOf", ())
            if "$ref" in schema and schema["$ref"] not in refs:
                refs.add(schema["$ref"])
                todo.append(self.reader.resolve(schema["$ref"]))
            is_simple = self.minimal or not refs.isdisjoint(self.trail)
            for parts in filter(None, (schema.get("anyOf"), schema.get("oneOf"))):
                start = self.start % len(parts)
                number, place = divmod(number, len(parts))
                # where it is deep, the simplest first
                order = self._count_refs if is_simple else rank_types(parts)
                todo.append(sorted(parts[start:] + parts[:start], key=order)[place])
        self.minimal = self.minimal or not refs.isdisjoint(self.trail)
        self.schemas, self.trail = schemas, self.trail | refs
        return number

    def _count_refs(self, schema: Any) -> int:
        """Return how often a schema, or the one that it names, refers to others."""
        if isinstance(schema, dict) and "$ref" in schema:
            schema = self.reader.resolve(schema["$ref"])
        text = str(schema)
        spend(len(text) // 100)
        return text.count("'$ref'")

    def _fill(self) -> Any:
        """Return a value that meets the schemas: one that they name, else one made."""
        schemas = self.schemas
        self.arguments = defaultdict(list)
        for schema in schemas:
            for keyword, argument in schema.items():
                self.arguments[keyword].append(argument)
        is_tested = not TESTED.isdisjoint(self.arguments)
        if not NAMING.isdisjoint(self.arguments):
            for value in self._list_known_values():
                if self.reader.accepts_all(schemas, value):
                    return value
        kinds = [] if self.arguments["enum"] else list_types(schemas)
        if len(kinds) > 1:
            kinds.sort(key="null".__eq__)
        attempts = self.attempts if is_tested else self.attempts[:1]
        problem = None
        for kind in kinds:
            try:
                for self.attempt in attempts:
                    value = getattr(self, f"make_{kind}")()
                    if not is_tested or self.reader.accepts_all(schemas, value):
                        return value
                    with contextlib.suppress(Unsatisfiable):
                        return self._make_again(value)
            except Unsatisfiable as error:
                problem = problem or error
        raise problem or self.no_value()

    def _make_again(self, value: Any) -> Any:
        """Make it again with what `if` and the like ask for now that a value is there."""
        parts = [part for each in self.schemas for part in self.reader.list_branches(each, value)]
        new = [part for part in parts if part is not True and part not in self.given]
        if not new:
            raise self.no_value()
        again = copy.copy(self)
        again.rng, again.attempts = HashRandom(self.rng.key), [self.attempt]
        again.given = [*self.given, *new]
        return again.make()

    def _list_known_values(self) -> list[Any]:
        """Return the values that are named: by enum, else as examples or defaults."""
        examples = [each for each in self.arguments["examples"] if isinstance(each, list)]
        values = list(itertools.chain(*self.arguments["enum"][:1] or examples))
        defaults = [each for each in self.arguments["default"] if each not in (None, "", [], {})]
        start = self.rng.randbelow(len(values)) if values else 0
        return [*values[start:], *values[:start], *defaults]

    def make_null(self) -> None:
        return None

    def make_boolean(self) -> bool:
        return self.rng.randbelow(2) == 0

    def make_string(self) -> str:
        """Return a text by format, by name or by pattern."""
        low, high = self.count_range("Length", MAX_TEXT)
        patterns = [self.reader.pattern(source) for source in self.arguments["pattern"]]
        keywords = ("format", "contentMediaType", "contentEncoding")
        formats = [name for each in keywords for name in self.arguments[each] if name in TEXTS]
        name = self.name if self.attempt < TRIES // 2 else ""  # whose few texts may be in use
        template = TEXTS[formats[0]] if formats else find_by_name(TEXTS, name)
        if self.arguments["contentSchema"]:
            return ENCODE(self.make_inside("content", self.arguments["contentSchema"], ""))
        for _ in range(TRIES if formats or patterns else 1):
            text = fill_template(self.rng, template)
            if low <= len(text) <= high and all(pattern.is_in(text) for pattern in patterns):
                return text
        if patterns:
            return patterns[0].make(self.rng.child(self.attempt), low, high, patterns[1:])
        while len(text) < low:
            text += fill_template(self.rng, " {noun}")
        return text[:high]

    def make_integer(self) -> Any:
        return as_whole(self.make_number(1))

    def make_number(self, least_step: float = 0) -> Any:
        for value in self._list_numbers(least_step):
            if self.reader.accepts_all(self.schemas, value):
                return value
        raise self.no_value()

    def _list_numbers(self, least_step: float) -> Iterator[Any]:
        """Yield multiples of the step, else of 0.01: of a natural range, then by the bounds."""
        floor, top, *flag = map(int, find_by_name(NUMBERS, self.name).split())
        natural: tuple[Any, Any] = (floor, 100 if top == least_step and not flag else top)
        step = max(least_step, max(self.arguments["multipleOf"], default=0.01))
        said = read_numbers(" ".join(map(str, self.arguments["description"])))
        if said:
            natural = (said["minimum"], said["maximum"]) if "minimum" in said else (0, 1)
            step = max(step, 1) if "enum" in said else step
        low = max([-math.inf, *self.arguments["minimum"], *self.arguments["exclusiveMinimum"]])
        high = min([math.inf, *self.arguments["maximum"], *self.arguments["exclusiveMaximum"]])
        beyond = (natural[1], natural[1] + MAX_ITEMS * step)
        spans = [natural, (low, high), (low, low + 100 * step), (high - 100 * step, high), beyond]
        if min(natural[1], high) - max(natural[0], low) < step:
            del spans[0]  # the bounds leave one of its numbers
        for start, end in (*spans, (1e9, 1e9 + step), (-1e9, step - 1e9)):
            start, end = max(start, low), min(end, high)
            if -1e300 <= start <= end <= 1e300:
                first = int(-(-start // step))
                count = int(end // step) - first + 1
                chosen = self.attempt + (self.rng.randbelow(count) if count > 0 else 0)
                for place in range(chosen, chosen + min(count, MAX_ITEMS)):
                    times = first + place % count
                    yield from {round(times * step, 10): 0, times * step: 0}
                yield start + (end - start) / 2

    def make_array(self) -> list[Any]:
        """Return a list; items beyond the least number end where they cannot be made."""
        low, high = self.count_range("Items", MAX_ITEMS)
        fixed = max(map(len, self.arguments["prefixItems"]), default=0)
        least = int(min(high, max(self.arguments["minContains"], default=1)))
        contained = self.arguments["contains"] * least
        low = max(low, min(fixed + len(contained), high))
        wanted = dict(enumerate(contained, low - len(contained)))  # what the last of these are
        some = 0 if self.minimal or self.attempt else 1 + self.rng.randbelow(3)
        items: list[Any] = []
        for index in range(min(high, max(low, fixed, some))):
            schemas = self.reader.list_inside(self.schemas, index)
            if index in wanted:
                schemas.append(wanted[index])
            else:
                schemas = schemas or list(self.arguments["unevaluatedItems"])
                if self.arguments["maxContains"]:
                    schemas += [{"not": each} for each in self.arguments["contains"]]
            if True in self.arguments["uniqueItems"]:
                schemas.append({"not": {"enum": list(items)}})
            try:
                items.append(self.make_inside(index, schemas, self.name))
            except Unsatisfiable:
                if index < low:
                    raise
                break
        return items

    def make_object(self) -> Item:
        """Return an object with what is required, most of what is declared, and extras."""
        low, high = self.count_range("Properties", MAX_ITEMS)
        declared = dict.fromkeys(itertools.chain(*self.arguments["properties"]))
        required = dict.fromkeys(itertools.chain(*self.arguments["required"]))
        made = {name: self._make_property(name) for name in required}
        optional = [] if self.minimal or self.attempt >= TRIES else list(declared)
        if self.attempt > 1:
            skipped = self.rng.child("skip", self.attempt).randbytes(len(optional))
            optional = [name for name, byte in zip(optional, skipped) if byte % 2]
        is_map = any(any(self.arguments[keyword]) for keyword in MAPS)
        if is_map and not (declared or required or self.minimal or self.attempt):
            low = max(low, min(2, high))
        for keys, enough in ((optional, high), ([*declared, *range(4 * low + TRIES)], low)):
            for key in keys:
                if key not in made and len(made) < (enough if WORK.steps > FEW_STEPS else low):
                    with contextlib.suppress(Unsatisfiable):
                        name = self._random_name(key) if isinstance(key, int) else key
                        made[name] = self._make_property(name)
        return {name: made[name] for name in (*declared, *made) if name in made}

    def _make_property(self, name: str) -> Any:
        rules = self.arguments["propertyNames"]
        if rules and not self.reader.accepts_all(rules, name):
            raise self.no_value()
        asked = self.reader.list_inside(self.schemas, name)
        schemas = asked or self.arguments["unevaluatedProperties"]
        return self.make_inside(name, schemas, name)

    def _random_name(self, number: int) -> str:
        """Return a name for a property that the schema does not name."""
        rng = self.rng.child("name", number, self.attempt)
        patterns = list(itertools.chain(*self.arguments["patternProperties"]))
        if patterns:
            return self.reader.pattern(rng.choice(patterns)).make(rng, 0, MAX_TEXT)
        if self.arguments["propertyNames"]:
            schemas = [*self.arguments["propertyNames"], {"type": ("string",)}]
            return str(self.make_inside(f"propertyNames {number}", schemas, "word"))
        return fill_template(rng, "{noun}" if number < TRIES else "{adjective}_{noun}{d3}")


def make_instance(rng: HashRandom, schema: Any) -> Any:
    """Return a value that is valid against a JSON schema, the same for the same draw.

    Beyond six levels, and inside a recursive schema, only what must be there is made.
    Raises `Unsatisfiable` where no valid value is found.
    """
    with bound_work():
        reader = SchemaReader(schema)
        value = ValueMaker(reader, rng, [reader.root]).make()
        if reader.accepts(reader.root, value):
            return value
    raise Unsatisfiable("no value that was tried meets all of the schema")


def make_matching(rng: HashRandom, pattern: str) -> str:
    """Return a text that the pattern matches as a whole, or raise `Unsatisfiable`."""
    with bound_work():
        whole = Pattern(pattern)
        start, end = (whole._read_leaf("at", mark) for mark in (r"\A", r"\Z"))
        whole.tree = ("all", [start, whole.tree, end])
        return whole.make(rng, 0, MAX_TEXT)


# === Prompts ===

PROMPT_WINDOW = 8192  # characters at either end of a message
MAX_LINES, MAX_ASKING = 45, 6
MAX_SAID, MAX_SENTENCE = 1200, 200  # characters
ASKING = (
    "answer|respond|reply|return|output|generate|choose|select|pick|classify|categorise|categorize|"
    "label|rate|score|judge|decide|end|finish|say|wrap|format|list|extract|repeat|echo|mark|grade|"
    "parse|tag|assess|conform|match"
)
HINTS = frozenset(
    form + mark
    for word in (
        f"{ASKING}|json|yaml|csv|category|title|only|just|word|words|line|block|table|separated|"
        "comma|bullet|checklist|response|yes|yes/no|true/false|either|exactly|template|"
        "comma-separated|nothing|else|int|integer|array|yyyy-mm-dd"
    ).split("|")
    for form in (word, word.capitalize(), word.upper())
    for mark in ("", "s", ".", ",", ":", "?")
)
TEXT_SCHEMA = {"type": "string"}


def as_object(properties: Item) -> Item:
    return {"type": "object", "properties": properties, "required": list(properties)}


JSON_MODE_SCHEMA = as_object(
    {
        "title": TEXT_SCHEMA,
        "summary": TEXT_SCHEMA,
        "tags": {"type": "array", "items": TEXT_SCHEMA, "minItems": 2, "maxItems": 4},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
    }
)


def message_text(message: Item) -> str:
    """Return the text of a message; other parts count as nothing."""
    content = message.get("content")
    if type(content) is list:
        return "".join([part.get("text") or "" for part in content])
    return content or ""


QUOTED = r"""(?:"[^"\n]{1,60}"|'[^'\n]{1,60}'|`[^`\n]{1,60}`)"""
ONE_WORD = r"[\w'-]{1,30}"
JOINING = r"(?:and|or|for|with|based|that|if|as|to|by|in|on|is|it)\b"
NO_ITEM = r"(?!(?:and|or|reply|respond|answer|return|give|provide|pick|choose|without|do) )"
PHRASE = rf"(?:{QUOTED}|{NO_ITEM}\w[\w'+-]{{0,29}}(?: (?!{JOINING})[\w+][\w'+-]{{0,29}}){{0,2}})"
BETWEEN = r"(?: ?\([^()\n]{0,80}\))?(?:\s?[|/,;]\s?(?:or |and )?| or )"
QUOTED_ROW = (
    rf"{QUOTED}(?:(?:: [^,;\n\"'`]{{0,80}})?{BETWEEN}{QUOTED}){{0,20}}"
    rf"(?:,? or | ?[|/] ?){QUOTED}"
)
WORDS_OFFERED = rf"(?:{ONE_WORD}(?:, ?| ?[/|] ?)){{0,20}}{ONE_WORD}(?:,? or | ?[/|] ?){ONE_WORD}"
ROW_OFFERED = rf"{PHRASE}(?:{BETWEEN}{PHRASE}){{1,20}}(?: and {PHRASE})?"
OFFER = lazy_regex(
    rf"({QUOTED_ROW})|(?i:\b((?:yes|true) ?(?:/|\||or) ?(?:no|false))\b)"
    r"|(?i:\b(?:(?:one|any|some|more) of|either|single letter|literal|(?:choose|pick"
    r"|select|one) from|(?:option|choice|value)s?(?= ?:| are)"
    r"|(?:label|classif|tag|mark)\w*\b[^.\n]{0,80} as)"
    r"(?: (?:are|the|these|following|(?:label|option|value|word|tag|choice|categorie|classe)s"
    rf"|\w+(?=:))\b)*\s?[:,=]?\s?[\[({{]?)({ROW_OFFERED}|[A-Z]{{2,8}}\b)"
    rf"|\(({WORDS_OFFERED})\)"
    rf"|(?:word|label)[:,] ({WORDS_OFFERED})"
)
TOLD_OF = lazy_regex(
    r"(?:(?:\(s\))? ?[:=\u2208]| (?:are|is(?= one| either)|(?:may|must) be|from|(?=[(\"'`])))"
    rf"(?: one of| either| any of)?:?\s?[\[({{]?({ROW_OFFERED}|{NUMBER} ?(?:-|to) ?{NUMBER})"
)
ARRAY = lazy_regex(r"(?i)[^\"'`(]{0,60}\b(?:JSON (?:array|list)|(?:array|list) of)")
COUNTS = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
COUNT = rf"(\d{{1,2}}{'|'.join(COUNTS)})"
ENTRIES = lazy_regex(
    rf"(?<![\w.-])(?:\d{{1,2}}-)?(?!one){COUNT} (?!columns|words)"
    r"(?=[A-Za-z])((?:[\w-]+ ?){1,4})"
)
MANY = lazy_regex(
    r"(?i)(?:an? )?(?:list|array)(?:(?: of |\[)([^\n]{1,60}?)\]?)?|([^\n]{1,60}?)\[\]"
)
TYPE_WORD = lazy_regex(
    r"(?i)(?:an? )?(?:(?P<string>str|text|[^,(]*\d (?:word|sentence))|(?P<integer>int|whole|"
    r"digit)|(?P<number>float|num|decimal|percent|confidence|score\b)"
    r"|(?P<boolean>bool|true)|(?P<object>dict|object)|(?P<array>array))"
)
NUMBER_WORD = lazy_regex(
    r"(?i)integer|\bint\b|float|decimal|number|digit|\bscor|\brat(?:e|ing)|scale|probab|confiden|"
    r"\bmark\b"
)


def read_type(text: str) -> str:
    found = TYPE_WORD.match(text)
    return found.lastgroup or "" if found else ""


def as_enum(items: Iterable[str]) -> Item:
    """Return the schema of one of some texts, as a prompt writes them; {} where they are none."""
    items = [*dict.fromkeys(filter(None, [item.strip(" \"'`*[](){}<>$") for item in items]))]
    if len(items) == 1 and re.fullmatch(r"(?!YES|NO)[A-Z]{2,5}", items[0]):
        items = list(items[0])
    if len(items) < 2 or any(len(item) > 40 or item.count(" ") > 2 for item in items):
        return {}
    if {item.lower() for item in items} == {"true", "false"}:
        return {"type": "boolean"}
    numbers = all(re.fullmatch(NUMBER, item) for item in items)
    return {"enum": [as_whole(float(item)) for item in items] if numbers else items}


def read_row(text: str) -> Item:
    """Return the schema of what a row offers, such as `a, b or c`."""
    if re.match(QUOTED, text):
        return as_enum(re.findall(QUOTED, IN_BRACKETS.sub("", text)))
    return as_enum(re.split(rf"{BETWEEN}| and ", text)) or read_numbers(text)


def read_offer(text: str) -> Item:
    found = OFFER.search(text)
    return read_row(found[found.lastindex or 0]) if found else {}


def read_count(text: str, name: str = "") -> int:
    words = [word for word, counted in ENTRIES.findall(text) if name in counted] or [""]
    return COUNTS.index(words[0]) if words[0] in COUNTS else min(int(words[0]), 20)


def as_array(items: Item, count: int = 2) -> Item:
    unique = len(items.get("enum", ())) >= count
    bounds = {"minItems": count, "maxItems": count, "uniqueItems": unique}
    return {"type": "array", "items": items, **bounds}


def read_phrase(text: str, note: str = "") -> Item:
    """Return the schema of a value by what is said of it, and by a note beside its name."""
    text = re.sub(r"(?:\s?\|\s?|\s+or\s+)(?:null|None)\b", "", text.strip())
    plain = text.strip(" <>(){}$*`").translate({95: " ", 37: ""})
    many = MANY.fullmatch(plain)
    if many:
        each = many[1] or many[2] or ""
        return as_array(read_phrase(each, note), read_count(each) or 2)
    if "YYYY-MM-DD" in text + note:
        return {"type": "string", "format": "date"}
    if re.fullmatch(WORDS_OFFERED, plain):
        return read_row(text) or TEXT_SCHEMA
    letters = re.search(r"\b([A-H])(?:-| to )([A-H])\b", plain)
    if letters:
        return {"enum": [chr(at) for at in range(ord(letters[1]), ord(letters[2]) + 1)]}
    kind = "integer" if text == "<number>" else read_type(plain)
    near = NUMBER_RANGE.search(plain[:40])
    offer = read_offer(text) or read_offer(note)
    if offer and kind in ("", "string") and not near:
        return offer
    told = not kind and (near or NUMBER_WORD.search(note[:60]))
    if told or kind in ("integer", "number"):
        numbers = read_numbers(f"{plain} {note}")
        if numbers or kind:
            return {"type": kind or "number", **numbers}
    if plain.lower() in ("yes", "no"):
        return {"enum": ["yes", "no"] if plain.islower() else ["Yes", "No"]}
    return {"type": kind or "string"}


EXAMPLE_TOKEN = lazy_regex(
    r"(?://|\#|\\)[^\n]*|\.\.\.|\u2026|(?P<end>;)"
    r"|(?P<name>[\"']?[\w$-]{1,60}[\"']?)\??(?=\s{0,9}:(?!//))"
    r"|(?P<text>\"[^\n]*?(?:\"(?=\s{0,99}(?:[,;}\]#\n]|//|\Z))|(?=\n)|\Z)"
    r"|'[^'\n]*'(?=\s{0,99}[,;}\]])|[^\s{}\[\],:;](?:\[\]|<[^<>\n]*>|[^,;\n{}\]/]|/(?!/))*)"
)


def rewrite_token(token: re.Match[str]) -> str:
    """Return a part of an example as JSON has it."""
    said = token[0].strip()
    if token["name"]:
        return QUOTE(said.strip("\"'?"))
    if token["text"] is None:
        return "," if token["end"] else ""
    if re.fullmatch(rf"(?i:true|false|null|none)|{NUMBER}", said):
        return said.lower().replace("none", "null")
    return QUOTE(said if re.fullmatch(QUOTED_ROW, said) else said.strip("\"'"))


def read_example(text: str) -> Any:
    """Return an example as a value, also in the ways of Python, TypeScript and BAML."""
    if "{{" in text:
        text = text.replace("{{", "{").replace("}}", "}")
    with contextlib.suppress(ValueError, RecursionError, ApiError):
        return DECODER.decode(text)
    with contextlib.suppress(ValueError, RecursionError, ApiError):
        text = re.sub(r"(\{[^{}]{0,400}\})\[\]", r"[\1]", text[:2400])
        text = EXAMPLE_TOKEN.sub(rewrite_token, text)
        return DECODER.decode(re.sub(r",(?=[\s,]{0,99}[,}\]])", "", text))
    return None


def as_schema(value: Any) -> Any:
    """Return a value that is a JSON schema, or a schema for each field; else None."""
    if type(value) is not dict:
        return None
    if type(value.get("properties")) is dict or value.get("type") == "array":
        return value
    fields = {}
    for name, field in value.items():
        part = field if type(field) is dict else {}
        kind, told = read_type(str(part.get("type"))), part.keys() & {"$ref", "enum", "anyOf"}
        fields[name] = {**part, "type": kind} if kind else part if told else as_schema(field)
    if not fields or None in fields.values():
        return None
    return {"$defs": fields.pop("$defs", {}).get("properties"), **as_object(fields)}


DATA = (
    "context|documents?|text|data|input|article|content|e-?mails?|transcript|conversation|passages?"
    "|history|sources?|reviews?|messages?|file|diff|code|logs?"
)
LABEL = lazy_regex(
    r"\W{0,6}(?:((?:question|query|user|task|instructions?|now)\b[^:]{0,20})"
    rf"|(?:{DATA})\W{{0,4}}):"
)
CONTEXT = lazy_regex(rf"(?i)(?:following|below|these|this)\b.{{0,60}}\b(?:{DATA}|pieces)\b")
PROSE_TASK = lazy_regex(
    r"(?i)\s{0,9}(?:please |c\w+ you )?(?:summari[sz]e|translate|proofread|rewrite|"
    r"paraphrase|correct|explain|review|reply to|draft|describe|fix|debug|refactor|improve|"
    r"analy[sz]e|what|why|how|who|help)\b(?:[^\n:]{0,200}:(?=\s{0,9}[\n\"'])"
    r"|[^\n:]{0,99}\b(?:following|this|these|below)\b[^\n:]{0,99}(?=\n+[^\n]+\Z))"
    r"|(?:translate|rewrite|(?:re|para)phrase)\b[^\n:.]{0,99}:(?= \w+ [a-z\"'`])"
)
EXAMPLE_START = lazy_regex(
    r"(?<![$\w])\{\s{0,99}(?:\n|[\"'][^\"'\n]{0,60}[\"']\s?:|[\w-]{1,60}\??\s?:\s|//|#)"
    r"|\[\{|(?:(?<=[\n:=])|(?<=[:=] )|(?<=like )|(?<=such as )|(?<=e\.g\. )|\A)(?!\[\[\w+\]\])"
    r"\[\s{0,99}(?:\n|[{\"\[]|\d{1,9}\s?,)"
)
FENCE = lazy_regex(
    r"```(?<![^\s:]```)[ \t]?([\w+-]*)[ \t]*\n([^`]*(?:`{1,2}(?!`)[^`]*)*)(?:```|\Z)"
)
ASKS = lazy_regex(
    r"\b(?<!> )(?:provide|give|print|write|produce|use|put|present|convert|follow|show(?=.* as )"
    r"|keep|compare|create|assign|name|suggest|summari[sz]e|describe|enclose"
    r"|fill|contain|consist|adhere|(?:must|should|has to) (?:be|look)|(?:only|just) (?:an? )?(?:the"
    rf"|yes|json|code|word|number|letter|single)|only(?! \w)|format|schema|structure|template"
    rf"|one (?:word|line)|{ASKING})\b|\b(?:antwort|r[e\xe9]pond|devuelv|respond[ae]|rispond)"
    r"|\u8fd4\u56de|\u8f93\u51fa|\u56de\u7b54"
    r"|\([^()]{1,99}\)\?|\A\W?\w+(?:/| or )\w+(?:\W{0,3}\Z| ?[:?,])"
)
TOLD = lazy_regex(
    r"\d\d|[>|]|\W*(?:(?:(?:in |here.?.s |this is )?(?:my|our)|i|i'm|he|she|they|we|it|"
    r"the (?!format|.{0,30}(?:answer|response|output|reply|line|label|verdict|json)))\b|"
    r"(?:c\w+ you |please )*(?:explain|translate|review)\b(?!.*(?:, | and )(?!(?:the|an?|its"
    r"|their)\b|how|wh))|(?:is it|should i)\b|can you label\b(?!.* as )"
    r"|(?:show me |\w+ )?(?:how|why|what|who|when (?:should|do|does))\b|(?:please )?(?:write"
    r"|create|build|make|implement|design|draft|add)\b.{0,50}\b(?:function|script|tests?"
    r"|component|prompt|program|app|class|docs|endpoint|essay|story|tutorial|e-?mail|letter|notes"
    r"|dialogue|code)\b)"
    r"|.*\b(?:then explain|how (?:do|can|could|should|would|does|to)|useful|helpful|needed)\b"
)
UNASKED = lazy_regex(
    r"(?i)(?=[nairw])(?:"
    r"(?<!is )(?<!or )\b(?:not|no(?<![/|]..)(?! (?:and|as|in|or|with)\b))|n['\u2019]t"
    r"|\bnever|\bavoid|\bwithout|refrain|instead|rather|about(?!.*\b(?:in|as|with)\b))\b"
    r"(?: of| than)?(?: (?!(?:and|than|except|anything|but|forget|hesitate|fail|outside|before"
    r"|after|is|if|know)\b)[^\s,.;:]+){0,5}? \W?(?:```|(?:JSON|YAML|CSV|XML|(?:\w+ )?(?:tables?"
    r"|tags)|lists?|bullet|numbered|markdown|code|fences|backticks|yes or no|(?:one|single)[ -]"
    r"(?:word|line|sentence|letter))\b)"
    rf"(?:(?! (?:but|and (?:{ASKING}))\b)[^,.;:?!)\n]|,(?=(?: \w+,)? n?or ))*"
)
SAID_END = lazy_regex(r" (?<=[.!?] )(?<!\A\d\. ) *(?=[^a-z])")
LIST_ITEM = lazy_regex(r"\s{0,9}(?:(?:[-*]|\(?(\w{1,2})[.):]) +|(?=\w+ \([^()\n]+\):))(\S.*)")
INLINE_ITEM = lazy_regex(r"(?<![\w.])\(?(\d|[A-H])[.)] ?([\w' -]{1,40}?)(?=[,;.?]|\Z| \(?\w[.)])")
ASKS_LINES = lazy_regex(
    r"(?i)\b(?:format|template|follows|structure|exactly|like this|XML|lines|tags)\b[^\n]{0,60}\Z"
    r"|\b(?:form|shape|session|with)\W{0,4}\Z"
)
SHOWN_LINE = lazy_regex(r"[ \t>*]{0,9}(?:[A-Za-z][\w /()-]{0,40}\**:|</?\w+[^<>]*>(?! \w))")
SPEAKER = lazy_regex(r"[A-Z]\w{0,15}:(?= )")
NOTE = lazy_regex(
    r"(?i)(?:[\"'`*#>\] ]{0,9}(\()|[\"'`*]+[:,]? (?!only|(?:and|then)\b|[\"'`{])"
    r"|[\"'`]?\??:.*?(?://|#))"
)
NOTE_END = lazy_regex(r"\.\s|\)(?:,|,? (?:and|then)) [\"'`]| [0-9]\) ")


def keep_ends(whole: Any, size: int) -> Any:
    return whole if len(whole) <= 2 * size else whole[:size] + whole[-size:]


def is_asking(sentence: str) -> bool:
    sentence = sentence[:MAX_SENTENCE].lower()
    found = ASKS.search(sentence)
    return found is not None and (found[0][0] == "(" or not TOLD.match(sentence))


class Prompt:
    """A message, taken apart into what asks, shows, lists and tells."""

    def __init__(self, text: str, about: str = "", answered: bool = False, more: str = "") -> None:
        self.about = about
        self.answered = answered
        self.text = text
        self.notes = more + text
        self.examples: list[tuple[str, str, str]] = []  # the line before it, language, text
        self.lines: list[str] = []
        self.lists: dict[str, list[tuple[str, str]]] = {}
        self.shown: list[str] = []
        self.unread = MAX_LINES // 2
        tags = re.findall(rf"</((?!code){DATA})>", text) if "</" in text else []
        marks = [(f"<{tag}", f"</{tag}>") for tag in dict.fromkeys(tags)]
        for opening, closing in [*marks, ('"""', '"""'), ("BEGIN", "END")]:
            before, _, rest = text.partition(opening)
            data, _, after = rest.rpartition(closing)
            if data and not ASKS_LINES.search(before.rstrip()[-99:]):
                self.about, text = data + self.about, f"{before}\0{after}"
        text = FENCE.sub(self._take_fence, text, MAX_ASKING)
        task = PROSE_TASK.match(text)
        if task and "\0" not in text:
            text = task[0]
        self._read_lines(keep_ends(self._take_examples(text).split("\n"), MAX_LINES))
        said = keep_ends("\n".join(filter(None, self.lines)), MAX_SAID).split("\n")
        said = [part[:MAX_SENTENCE] for line in said for part in SAID_END.split(line)]
        self.said = [UNASKED.sub("", part) for part in keep_ends(said, MAX_LINES // 4)]
        self.asking = keep_ends(list(filter(is_asking, self.said)), 3)
        self.whole = " ".join(self.asking)
        last = self.lines[-1].strip(" #*-") if self.lines and not task else ""
        self.tail = last[:-1] if last[-1:] == ":" and not last[80:] else ""

    @functools.cached_property
    def offers(self) -> list[tuple[str, Item]]:
        """What may be chosen, behind the words that tell of what: rows, then lists."""
        said = "\n".join([*self.said, self.tail])
        rows = []
        for row in TOLD_OF.finditer(said):
            told = said[max(0, row.start() - 60) : row.start()]
            told = re.split(r"\) a|[.,;\n]", told)[-1][-40:].lower()
            rows.append((told, read_row(row[1])))
        lists = [(told.lower(), [head for _, head in each]) for told, each in self.lists.items()]
        return rows + [(told, as_enum(heads)) for told, heads in lists]

    def _add_example(self, before: str, language: str, text: str) -> str:
        self.examples.append((before[-150:].rstrip().rpartition("\n")[2].strip(), language, text))
        return f"\0{len(self.examples)}\0"

    def _take_fence(self, found: re.Match[str]) -> str:
        text = found[2].strip()
        mark = self._add_example(found.string[: found.start()], found[1].lower(), text)
        return f"\n{text if not found[1] and SHOWN_LINE.match(text) else mark}\n"

    def _take_examples(self, text: str) -> str:
        """Replace JSON in a text by marks, and keep it as examples."""
        kept, at, depth, start = "", 0, 0, 0
        for bracket in itertools.islice(re.finditer(r"[\[\]{}]", text), 180):
            if depth == 0:
                start = bracket.start()
            if depth or (len(self.examples) < 2 * MAX_ASKING and EXAMPLE_START.match(text, start)):
                depth += 1 if bracket[0] in "[{" else -1
                if depth == 0:
                    shown = text[start : bracket.end()]
                    kept += text[at:start] + self._add_example(text[at:start], "", shown)
                    at = bracket.end()
        return kept + text[at:]

    def _read_lines(self, lines: list[str]) -> None:
        """Sort the lines into what is told, listed, shown and only data."""
        labels = [LABEL.match(line[:60].lower()) if ":" in line else None for line in lines]
        asked = max((at for at, label in enumerate(labels) if label and label[1]), default=0)
        heads = [found[0] for found in map(SPEAKER.match, lines) if found]
        turns = {head for head in heads if heads.count(head) > 1} - {lines[-1].strip()}
        until = 0  # the question, before which all is context
        given, data, showing = [], False, False
        before = ""
        for at, (line, label) in enumerate(zip(lines, labels)):
            bare = line.strip(" \t\0")
            if label or not bare or (data and SPEAKER.match(bare)):
                data = label is not None and not label[1]
            spoken = not showing and line.partition(" ")[0] in turns
            if data or spoken or at < until:
                given.append(line)
                for number in re.findall(r"\0(\d+)\0", line):
                    self.examples[int(number) - 1] = ("", "", "")
                continue
            self.lines.append(line)
            item = LIST_ITEM.match(line[:MAX_SENTENCE])
            if item:
                head = re.split(r":| [-(]", item[2])[0].strip("*\"'` ")
                self.lists.setdefault(before, []).append((item[1] or "", head))
            elif bare.strip("-=_"):
                before = bare
            if showing and SHOWN_LINE.match(line):
                self.shown.append(line[:MAX_SENTENCE])
            elif bare and bare[:3] != "...":
                told = (bare[-1] == ":" or "form" in bare) and not self.shown
                showing = told and ASKS_LINES.search(bare[-99:]) is not None
                last = SAID_END.split(bare[-MAX_SENTENCE:])[-1] if showing else ""
                showing = showing and not TOLD.match(last.lower())
            if asked > at and at < 2 * MAX_ASKING and CONTEXT.search(line[:MAX_SENTENCE]):
                until = asked
        self.about = "\n".join([*given, self.about])


def find_items(prompt: Prompt, numbered: bool = False) -> Item:
    """Return the schema of what the last list holds: its marks, such as A and B, or its heads."""
    is_mark = str.isalnum if numbered else str.isalpha
    tagged = re.findall(r"<(?:option|choice|label|category)[^<>]*>()([^<>]+)</", prompt.text)
    inline = [tagged] if tagged else map(INLINE_ITEM.findall, prompt.said[-3:])
    for items in ([*prompt.lists.values()] or [*inline])[:-3:-1]:
        schema = as_enum(mark if is_mark(mark) else head for mark, head in items[:20])
        if schema:
            return schema
    return {}


def find_offered(prompt: Prompt, about: str) -> Item:
    """Return the schema of what a noun may be, as is told elsewhere: `tones: calm, angry`."""
    for noun in re.findall(r"\b[a-z]{4,7}", about.lower())[:-8:-1]:
        for told, schema in prompt.offers:
            if noun in told and schema:
                return schema
    return {}


def count_entries(prompt: Prompt, name: str = "") -> int:
    given = re.findall(r"^\[.+\]$", prompt.text, re.M) if "equal" in prompt.text.lower() else []
    count = len(read_example(given[-1]) or ()) if given else 0
    return min(count, 50) or read_count(prompt.whole, name) or 2


def find_note(prompt: Prompt, name: str) -> str:
    """Return what is said beside a name, in brackets, quotes or a comment."""
    mark = f"`{name}`" if f"`{name}` (" in prompt.notes else name
    pieces = prompt.notes.split(mark, 4)
    for before, rest in zip(pieces, pieces[1:]):
        rest = rest[:240].partition("\n")[0]
        found = None if before[-1:].isalnum() else NOTE.match(rest)
        if found:
            return NOTE_END.split(rest[found.end() - bool(found[1]) :], 1)[0]
    return ""


def find_copies(prompt: Prompt) -> list[str]:
    about = (prompt.about or prompt.text)[-1000:]
    found = re.findall(r"\b[A-Z][\w']{2,30}(?:[ -][A-Z][\w']{1,30}){0,3}(?![\w:-])", about)
    return list(dict.fromkeys(found))[-3:]


SCORED = lazy_regex(r"(?i)\b(?:scor|rat(?:e|ing)\b|scale|grade)")
SCORE_TOLD = lazy_regex(r"(?i)\W*(?:score|rating|grade)?[ _]?(\d\d?)\w*\s?[:=-] ")


def measure_width(numbers: Item) -> Any:
    return numbers.get("maximum", 0) - numbers.get("minimum", 0)


def find_range(prompt: Prompt, name: str) -> str:
    """Return what is said of a number's widest range."""
    scored = SCORED.search(name.replace("_", " "))
    called = SCORED if scored else re.compile(rf"(?i)\b{re.escape(name)}s?\b")
    told = keep_ends([said for said in prompt.said if called.search(said)], 1)
    told = [f"{called.split(said, 1)[1]} {said}"[:199] for said in told]
    marks = [int(at[1]) for at in map(SCORE_TOLD.match, prompt.lines) if scored and at]
    told += [f"{min(marks)}-{max(marks)}"] if len(marks) > 1 else []
    return max(told, key=lambda text: measure_width(read_numbers(text)), default="")


def bound_numbers(prompt: Prompt, schema: Any, name: str = "") -> Any:
    """Return a schema with what the prompt says of its numbers."""
    if type(schema) is not dict:
        return schema
    if schema.get("type") not in ("integer", "number"):
        return {k: bound_numbers(prompt, v, name if k == "items" else k) for k, v in schema.items()}
    prompt.unread -= 1
    told = prompt.unread < 0 or read_numbers(str(schema.get("description")))
    return schema if told else {**schema, "description": find_range(prompt, name)}


def read_words(prompt: Prompt, text: str, name: str) -> Item:
    """Return the schema of a value that an example shows as a text."""
    shown = prompt.notes.rpartition(f"{{{name}}}")[2].partition("\n")[0]
    told = re.search(r"JSON schema: (\{.+\})", text or shown)
    schema = read_example(told[1].replace('\\"', '"')) if told else None
    if type(schema) is dict:
        return {**schema, "$id": name, "minItems": 1}
    note = find_note(prompt, name) if name else ""
    text = text.strip(".\u2026")
    kind = re.search(
        r"\b(?:an? (?!valid)|list|array|int|num|float|bool|true|str|dict|one of)\b", note[:60]
    )
    text = text or (note[kind.start() :].partition(")")[0] if kind else note)
    schema = read_phrase(text, note)
    if "items" in schema:
        return as_array(schema["items"], max(schema["minItems"], count_entries(prompt, name)))
    if schema != TEXT_SCHEMA:
        return schema
    about = text if text.istitle() else name or " ".join(prompt.said)
    offered = find_offered(prompt, about) if len(text) < 20 else {}
    if offered:
        return offered
    if re.search(r"(?:\b|_)(?:age|year|count|score|rating|quantity)\Z", name, re.I):
        return {"type": "integer"}
    named = re.search("name|person|people|place|compan|entit|cit(y|ies)", name)
    taken = named and "xtract" in prompt.whole
    if text[:1].isupper():
        taken = prompt.text.count(text) > 1
    copied = re.search(r"verbatim|exact (?:text|word)|as it appears", text + note)
    copies = find_copies(prompt) if taken or copied else []
    return {"enum": copies} if copies else schema


def read_value(prompt: Prompt, value: Any, name: str = "") -> Item:
    """Return the schema of a value that an example shows."""
    schema: Item | None = as_schema(value)
    prompt.unread -= 1
    if schema is not None:
        return schema
    if type(value) is dict:
        return as_object({key: read_value(prompt, field, key) for key, field in value.items()})
    if type(value) is list:
        items = value[:MAX_LINES] or [""]
        if all(type(item) is dict for item in items):
            items = [{key: field for item in items for key, field in item.items()}]
        each = read_value(prompt, items[0], name)
        return as_array(each, count_entries(prompt, name))
    if type(value) is float and 0 <= value <= 1:
        return {"type": "number", "minimum": 0, "maximum": 1}
    if type(value) not in (str, int, float) or prompt.unread < 0:
        return {"type": KINDS[type(value)]}
    numbers = find_items(prompt, True) if type(value) is int and "choice" in name else {}
    if numbers.get("enum", [0])[0] == 1:
        return numbers
    return read_words(prompt, value if type(value) is str else type(value).__name__, name)


class WantedForm:
    """A text with slots, each a name between two \\1 (none for prose), and their schemas."""

    def __init__(self, label: str, text: str, schemas: Item | None = None) -> None:
        self.label = label
        self.text, self.schemas = text, schemas or {}

    def write(self, rng: HashRandom) -> str:
        """Return the text with a value for each of its slots."""
        pieces = self.text.split("\1")
        for at, name in enumerate(pieces[1::2]):
            own, schema = rng.child("slot", at), self.schemas.get(name, TEXT_SCHEMA)
            whole = name in ("", "JSON")
            made = make_instance(own, schema if whole else as_object({name: schema}))
            value = made if whole else made[name]
            text = value if type(value) is str else json.dumps(value, ensure_ascii=False)
            pieces[2 * at + 1] = text if name else make_text(own, 2)
        return "".join(pieces)


JSON_ASKED = lazy_regex(
    r"(?i)(?<!ompare )(?<!XML and )(?<!this )(?<!escribe a )(?<![a-z])JSONL?"
    r"(?![a-z(_]|\.\w|(?<= o[fn] JSON)(?! obj)| (?:API|file|output schema|Web|pars))"
    r"|\bPython dict|\b(?:me|return|output|write|with) an array of (?:\w+ )?strings"
)
OUTPUT_INTRO = lazy_regex(r"(?i)output|respon|answer|reply|return\b|format|schema|structure")
INPUT_INTRO = lazy_regex(
    r"(?i)\b(?:input|context|documents?|messages?|rubric|previous|tools?|given|existing|summar\w*|"
    r"arguments|explain|well-formatted|feedback|for the schema)\b"
)
KEY_NAME = r"(?:(?:an?|the|its) (?!and\b))?(?!an? (?!and ))[A-Za-z][\w-]{0,40}(?: [A-Z]\w*)?"
KEYS_END = r"(?=\W*\Z|[.,:;)\n]| (?:for|of|from|in|to)\b)"
KEY_NAMES = (
    rf"{QUOTED}(?:(?:,? (?:and |then )?|,| ?\| ?){QUOTED}){{0,20}}"
    rf"|{KEY_NAME}(?:\s?[,|]\s?{KEY_NAME}){{0,20}}(?:,? (?:and|then) {KEY_NAME}{KEYS_END})?"
)
KEY_WORD = r"\b(?:(?:key|field|attribute)s?|propert(?:y|ies))\b"
KEYS = lazy_regex(
    rf"({QUOTED}(?:(?:,? (?:and |then )?|,){QUOTED}){{0,20}}) {KEY_WORD}"
    r"|\b(?:objects?|(?i:JSON)) (?:with|of|containing) (?![\"'`])(?=[^.:;]*(?:,| and ))"
    rf"({KEY_NAMES}){KEYS_END}"
    rf"|{KEY_WORD}(?: (?:named|called|of|are|is|one)){{0,3}}:? ?({KEY_NAMES})"
)
PROSE_KEYS = lazy_regex(
    rf"(?i)\b(?:give|write|find|print|provide|identify|{ASKING})(?: me| with)? ([^.:]{{3,99}}) "
    r"(?:as|in) [\w ]{0,9}JSON\b"
)
SPOKEN = r"\b(?:repeat|echo|reply|respond|answer|say|output|return|print)\b"
EXACTLY = lazy_regex(
    rf"(?i){SPOKEN}(?: (?:back|with|only|just|the|exactly|words?|phrase|following|text)\b|:)*\s(?:"
    rf"({QUOTED})(?:[.!]?\Z| and nothing)|(?<=only the word )(\w+)[.!]?\Z"
    r"|(?<=\Arespond with )((?-i:[A-Z]+))[.!]?\Z)|"
    rf"{SPOKEN}(?![^:\n]*\b(?:one of|form|exactly {COUNT}\b))[^:\n]{{0,30}}(?:exactly|verbatim|"
    r"(?:only|just)\b[^:\n]{0,20}(?:text|phrase|words?|message))[^:\n]{0,30}:\s(\S.*)"
)
FENCED = lazy_regex(r"(?i)\A.*(?:```|(?:code|fenced) ?-?(?:block|snippet)\b|backtick)")


def split_names(text: str) -> list[str]:
    return [
        re.sub(r"\A(?:an?|the|its) ", "", part.strip("\"'` "))
        for part in re.split(r",? (?:and|then) |\s?[,|]\s?", text)
    ]


def read_keys(prompt: Prompt, asked: str) -> list[str]:
    """Return the names of the keys that the prompt lists or names."""
    whole = (re.findall(r"order of fields: .{1,2000}", prompt.text) or [prompt.whole])[0]
    whole, asked = (re.sub(QUOTED_ROW, "", IN_BRACKETS.sub("", s)) for s in (whole, asked))
    texts = [found[found.lastindex or 0] for found in KEYS.finditer(whole)]
    texts = texts or re.findall(QUOTED, asked.partition("JSON")[2])
    lists = [items for before, items in prompt.lists.items() if re.search(KEY_WORD, before)]
    names = [head for items in lists for _, head in items]
    found = None if names or texts else PROSE_KEYS.search(asked)
    if found and ("xtract" in found[0] or re.search(",| and ", found[1])):
        texts = [re.sub(r"\b(?:the|an?|its|all|\w+'s) | (?:of|from|in|for) [^,]+\Z", "", found[1])]
    names += [name.replace(" ", "_") for text in texts for name in split_names(text)]
    return list(dict.fromkeys(filter(re.compile(r"(?!it\Z)[^\W\d][\w-]*\Z").match, names)))


def rank_example(keys: list[str], asked: list[str], example: tuple[str, str, str]) -> int:
    """Return how likely an answer shall look like an example: (line before, language, text)."""
    intro, text = UNASKED.sub("", example[0].rpartition(". ")[2]), example[2]
    rank = -4 * bool(INPUT_INTRO.search(intro))
    if OUTPUT_INTRO.search(intro) and (asked or is_asking(intro)):
        rank += 3
    rank -= 4 * (len(keys) > 1)
    return rank + 8 * any(f'"{key}"' in text or f"{key}:" in text for key in keys)


def read_json(prompt: Prompt, wanted: bool = False) -> WantedForm | None:
    """Read JSON by a schema, an example or the names of its keys."""
    asked = list(filter(JSON_ASKED.search, prompt.asking))
    if wanted or prompt.tail.upper().endswith("JSON"):
        asked.append("JSON")
    said = " ".join(asked)
    keys = read_keys(prompt, said) if asked else []
    array = any(map(ARRAY.match, asked))
    shown: Any = dict.fromkeys(keys, "") or ("" if array else None)
    label, value = f"JSON with {', '.join(keys) or 'a list'}", [shown] if array else shown
    rank = functools.partial(rank_example, keys, asked)
    for example in sorted(prompt.examples, key=rank)[-1:-4:-1]:
        read = read_example(example[2]) if rank(example) >= (0 if asked else 3) else None
        if read and type(read) in (dict, list):
            is_open = re.search(r'[<|]|\.\.|"(?:str|int|num|bool)', example[2])
            if EXACTLY.search(f"{example[0]} .") and not is_open:
                return WantedForm("exact JSON", example[2])
            value, label = read, f"JSON by {'schema' if as_schema(read) else 'example'}"
            break
    if value is None and not asked:
        return None
    schema = JSON_MODE_SCHEMA if value is None else bound_numbers(prompt, read_value(prompt, value))
    lines = re.search(r"JSON[ -]?[Ll](?:ines)?\b|per line", said)
    text = "\n".join(["\1JSON\1"] * (count_entries(prompt) if lines else 1))
    text = f"```json\n{text}\n```" if FENCED.match(said) else text
    return WantedForm("JSON" if value is None else label, text, {"JSON": schema})


CONDITION = lazy_regex(r"(?i)\b(?:if|when|whenever|unless|until|once|after)\b")
ENDING = lazy_regex(
    r"(?i:(?:repl|respond|say|output|return|end|command)[^.\n]{0,60}?[\"'`]?"
    r"((?-i:(?:echo )?(?<![|\w])<?[A-Z][A-Z_]{5,60}>?))[\"'`]?)"
)
ENDED = lazy_regex(r"(?i)done|complet|finish|solved|submit|terminat|address|(?-i:\bEND\b)")


def read_said(prompt: Prompt) -> WantedForm | None:
    """Read what shall be repeated, or said at the end."""
    for said in prompt.asking:
        found = None if CONDITION.search(said) else EXACTLY.search(said)
        text = "".join(filter(None, found.groups())) if found else ""
        if text and not re.search(r"[$<\[{]", text):
            text = text[1:-1] if re.fullmatch(QUOTED, text) else text.strip()
            return WantedForm(f"exactly {text[:60]}", text)
        found = ENDING.search(said) if prompt.answered else None
        if found and ENDED.search(said):
            kinds = [kind for _, kind, _ in prompt.examples if kind and found[1][:4] == "echo"]
            end = f"```{kinds[0]}\n{found[1]}\n```" if kinds else found[1]
            return WantedForm(f"the end, {found[1]}", f"\1\1\n{end}")
    return None


SLOT_SHOWN = lazy_regex(
    r"([A-Za-z][\w /-]{0,40}?)(\**:\**[ \t]+)([^\s|>\0][^\n]*?(?=, [A-Z]\w*: |\n|\Z))|(?<=<)([\w-]"
    r"{1,40})(>)([^<>\n]+)(?=</)|([\w-]{1,40})(=\")([^\"\n]+)"
    r"|()()(\.\.\.|\0\d*\0)"
)
TOOLS = lazy_regex(r"(?i)\b(?:tools|actions)\b[^\n]{0,99}?:\s+([^\0]{1,400})")
TOOL = lazy_regex(r"(?m)(?:^(?:(?:> )?Tool Name: |[-*] )?|, )([a-z]\w*)(?=\[\w+\]|\(\w+:|: |:?$)")


def fill_shown(prompt: Prompt, lines: list[str], known: Item | None = None) -> WantedForm | None:
    """Return lines that are shown, with a slot for each value behind a label or in a tag."""
    schemas = dict(known or {})

    def fill(found: re.Match[str]) -> str:
        """Return a label with a slot, whose schema is read at its first place."""
        name, between, value = filter(lambda part: part is not None, found.groups())
        slot, value = name.strip() or "note", value.strip().replace("...", "")
        if slot not in schemas:
            value = "object" if "JSON" in value else value
            schema = read_value(prompt, int(value) if value.isdecimal() else value, slot)
            schemas[slot] = bound_numbers(prompt, schema, f"{slot} {value}")
        return f"{name}{between}\1{slot}\1{'%' * (value[-2:] == '>%')}"

    text = SLOT_SHOWN.sub(fill, "\n".join(lines).strip(), 2 * MAX_ASKING)
    names = dict.fromkeys(text.split("\1")[1::2])
    return WantedForm(f"lines {', '.join(names)[:200]}", text, schemas) if names else None


def read_agent(prompt: Prompt) -> WantedForm | None:
    """Read the next lines, or JSON, of an agent that thinks and acts."""
    lines = prompt.shown
    heads = [line.partition(":")[0].strip() for line in [*lines, "Observation"]]
    acts = "Thought" in heads and "Action" in heads
    is_json = '"action_input"' in prompt.text
    if not acts and not is_json:
        return None
    begun = max(prompt.text.rfind("\nQuestion:"), prompt.text.rfind("Begin!"), 0)
    seen = prompt.about + prompt.text[begun:] * bool(begun)
    acted = prompt.answered or "\nObservation:" in seen
    told = TOOLS.search("\n".join(prompt.lines))
    tools = TOOL.findall(told[1]) if told else find_offered(prompt, "tool").get("enum", ())
    last = re.search(r"(?m)^(?:Thought: .*\n)?(?:Final )?Answer: .*", prompt.text)
    if acted and last:
        return fill_shown(prompt, last[0].split("\n"))
    if not is_json:
        lines = lines[heads.index("Thought") : heads.index("Observation")]
        takes = [as_schema(read_example(text)) for at, _, text in prompt.examples if "Arg" in at]
        known = {"Action Input": takes[0]} if takes else {}
        if tools:
            known["Action"] = {"enum": tools[:1] if takes else tools}
        return fill_shown(prompt, lines, known)
    name = "Final Answer" if acted or not tools else tools[0]
    form = as_object({"action": {"const": name}, "action_input": TEXT_SCHEMA})
    text = "Thought: \1thought\1\nAction:\n" * acts + "```json\n\1JSON\1\n```"
    return WantedForm("an action as JSON", text, {"JSON": form})


def read_shown(prompt: Prompt) -> WantedForm | None:
    """Read lines, or YAML, that show how the answer shall look."""
    lines = [] if "Observation" in "".join(prompt.shown) else prompt.shown
    if re.search(r"(?<!bout )\bYAML\b(?! (?:file|for))", prompt.whole):
        blocks = [text for _, kind, text in prompt.examples if kind[:1] in "y"]
        keys = [f"{key}: ..." for key in read_keys(prompt, "")]
        rest = "\n".join(prompt.lines).partition("YAML")[2]
        lines = blocks[-1:] or keys or re.findall(r"(?m)^ *[\w-]+:(?: .*)?$|^ +- .*", rest)
    return fill_shown(prompt, lines) if lines else None


SPOT = r"\$\w+|<[^<>\n]{1,80}>|\[(?!\[)[^\[\]\n]{1,80}\]|\{[^{}\n]{1,80}\}|[A-Z](?!\w|'\w)"
LABELLED = lazy_regex(
    r"(?:(?:([\"'`])|\b(?:line|form|write|with|as|put|either)\b[ :]*|:[ ]*)"
    r"(?=[A-Z]|(?<=[\"'`])the )(?!Obs|Thou)"
    r"|(?=[\\#\[]))([A-Zt][\w ]{0,30}(?::[ ]?|[ ]\()|\\boxed\{|\#{4}[ ]|\[RESULT\][ ])"
    rf"({SPOT}|\d+(?=/\d)|)(/\d{{1,3}}|\)|)"
)
WRAPPED = lazy_regex(r"(?i)\btags?\b|\bin \W?<|wrap|inside|enclos|between|</|xml")
TAG = lazy_regex(r"<([A-Za-z][\w-]{0,40})(?: [^<>]*)?>([^<>]{1,30}(?=</))?")
AFTER_TAG = lazy_regex(
    rf"(?:</[\w-]+>)?(?: tags? (?:with|as|containing) ({WORDS_OFFERED})\W*\Z"
    r"|,? where \w+ is ([^<>]{1,60}))"
)
MARKER = lazy_regex(r"[`\"']([\[<=#*][\[<=#* ]{1,7}(\w{2,40}|(?<=# )\w)[\]>=#* ]{2,8})[`\"']")


def read_marks(prompt: Prompt) -> WantedForm | None:
    """Read elements for the answer to stand in, or marks for it to stand below."""
    marks = dict(MARKER.findall(prompt.text)) if MARKER.search(prompt.whole) else {}
    if len(marks) > 1:
        schemas = {name: read_value(prompt, "", name) for name in marks.values()}
        parts = [f"{at}\n\1{marks[at]}\1" for at in marks if not ENDED.search(at)]
        text = "\n\n".join([*parts, *filter(ENDED.search, marks)])
        return WantedForm(f"frames {', '.join(schemas)}", text, schemas)
    tags: Item = {}
    shown: Item = defaultdict(dict)
    for said in filter(WRAPPED.search, [] if prompt.shown else prompt.asking):
        at = 0
        if said[0] == "<":
            continue
        for found in TAG.finditer(said):
            tag, before = found[1], said[at : found.start()]
            if found[2]:
                shown[tag][found[2].strip(".")] = 1
            offer = {"enum": [*shown[tag]]} if len(shown[tag]) > 1 else read_offer(before)
            told = AFTER_TAG.match(said, found.end())
            words, where = told.groups("") if told else ("", "")
            offer = offer or read_row(words) or read_numbers(where or before)
            tags[tag] = offer or read_value(prompt, "".join(shown[tag]), tag)
            at = found.end()
    text = "\n".join(f"<{tag}>\1{tag}\1</{tag}>" for tag in tags)
    return WantedForm(f"elements {', '.join(tags)}", text, tags) if tags else None


def as_choice(schema: Item, text: str, name: str = "") -> WantedForm:
    told = "one of " + ", ".join(map(str, schema.get("enum", [schema.get("type")])))[:200]
    if "minimum" in schema:
        told = f"{schema['type']} from {schema['minimum']} to {schema['maximum']}"
    return WantedForm(f"{name} {told}".strip(), text, {name or "answer": schema})


def read_label(prompt: Prompt) -> WantedForm | None:
    """Read one line with a label or mark, such as `ANSWER: $LETTER`, and what may stand behind."""
    for found in LABELLED.finditer(prompt.whole):
        quoted, label, slot, end = found.groups()
        is_mark = label[0] in "\\#["
        rest = prompt.whole[found.end() : found.end() + 200]
        closed = quoted and rest[:1] == quoted
        if not (slot or is_mark or label[:-2].isupper() or closed):
            continue
        after = rf"{re.escape(label.strip())} ?[\"'`]?(\w{{1,12}})\b"
        options = [*dict.fromkeys(re.findall(after, prompt.whole))]
        letters = [name for name in re.findall(r"\b[A-Z]\b", rest[:60]) if name != slot]
        options = options if len(options) > 1 else letters if len(letters) > 1 else []
        schema = read_phrase(slot) if slot[1:] else TEXT_SCHEMA
        schema = read_numbers("0 to 100") if is_mark else schema
        if is_mark or schema.keys().isdisjoint(("enum", "minimum")):
            limit = read_numbers(f"out of {end[1:]}" if end[:1] == "/" else rest[:60])
            listed = {"enum": options} if options else find_items(prompt)
            lettered = len(slot) < 2 or "etter" in slot
            schema = read_offer(rest) or limit or (listed if lettered else {}) or schema
        name = "number" if is_mark else label.rstrip(" :(")
        start = "\1\1\n\n" * ("ntire" not in prompt.whole) + label.rstrip()
        end = "}" if label[-1] == "{" else end
        return as_choice(schema, f"{start}{' ' * (label[-1] in ': ')}\1{name}\1{end}", name)
    return None


ONLY_CODE = lazy_regex(
    r"(?i)\b(?:only|just) (?:the |a |valid |raw )*(SQL|regex|code|command)\b(?! (?!query)\w)"
)


def read_block(prompt: Prompt) -> WantedForm | None:
    """Read a block of code, or nothing but code."""
    only = ONLY_CODE.search(prompt.whole)
    if only and not FENCED.match(prompt.whole):
        return WantedForm(f"only {only[1]}", f"\1{only[1].lower()}\1")
    if not FENCED.match(prompt.whole) or "YAML" in prompt.whole:
        return None
    kinds = re.findall(r"```(\w+)", prompt.whole) + [kind for _, kind, _ in prompt.examples if kind]
    kinds += re.findall(r"(?i)\b(python|javascript|sql|bash)\b", "\n".join(prompt.said))
    kind = [*kinds, "code"][0].lower()
    return WantedForm(f"block of {kind}", f"```{kind}\n\1{kind}\1\n```")


GAP = r"(?:<[a-z][\w -]*>|\b(?![YMDH]{2}|JSON|CSV)[A-Z]{3,}\b)"
GAPS = lazy_regex(
    rf"\b(?:form|format|template)\b[^\w<|]{{1,9}}({GAP}(?:[^\w<>\n,/]{{1,4}}{GAP})+)(?![ \w]\w)"
)


def read_records(prompt: Prompt) -> WantedForm | None:
    """Read a line of slots, or records whose fields a mark divides; names come from the text."""
    gaps = GAPS.search("\n".join(prompt.said)) if prompt.asking else None
    if gaps:
        text = re.sub(GAP, lambda gap: f"\1{gap[0].strip('<>').lower()}\1", gaps[1])
        names = text.split("\1")[1::2]
        slots = {at: find_offered(prompt, at) or read_value(prompt, "", at) for at in names}
        return WantedForm("template", text, slots)
    mark = re.search(r"<\|[^|\w]{0,9}\|?>", prompt.text)
    if mark is None:
        return None
    names = [*find_copies(prompt), "Anna", "Oslo"]
    rows: Item = {}
    for head, *fields in (line.split(mark[0]) for line in keep_ends(prompt.lines, 12)):
        cells = [re.split(r"\W", field.strip("<{"))[0] for field in fields]
        named = [at for at, cell in enumerate(cells) if re.search("name|source|target", cell)]
        cells = [f"\1{cell}\1" for cell in cells]
        for start in range(len(cells) > 1 and 3 - len(named)):
            for at, name in zip(named, names[start:]):
                cells[at] = name
            row = mark[0].join([head.rpartition(" ")[2].strip("`"), *cells])
            row += ")" * (row[0] == "(")
            rows.setdefault(f"{head[-9:]}{start}", row)
    end = re.findall(r"<\|[A-Z_]{3,20}\|>", prompt.text)[-1:]
    between = "##\n" if re.search(r"##\W* as ", prompt.text) else "\n"
    return WantedForm("records", between.join([*list(rows.values())[:4], *end]))


LISTS = (
    (r"(?:number|order)ed list", "\nN. "),
    (r"bullet|markdown list", "\n- "),
    (r"checklist", "\n- [ ] "),
    (r"comma[ -]separated(?! essay)|separated by commas|exactly \w+ keywords", ", "),
    (r"\b(?:one|each) (?:\w+ )?(?:per|on (?:a|its own)) line|separated by (?:new ?|line )", "\n"),
)
TABLE = lazy_regex(
    r"(?i)\bCSV\b(?! file)(?<!is CSV)(?<!the CSV)(?<!of a CSV)(?<! on CSV)|comma-separated rows"
    r"|table (?:with|of|that has|in) (?:the |\w+ )*(?:columns|markdown)"
    r"|\b(?:as|in|into|return|output|make) (?:an? )?(?:\w+ )?table\b"
)
COLUMNS = lazy_regex(rf"(?:columns?|headers?)(?: row| are| is|:)* ({KEY_NAMES})")


def read_list(prompt: Prompt) -> WantedForm | None:
    """Read a list, a table, CSV or a number of words."""
    for said in prompt.asking:
        if said[:3] == "If ":
            continue
        count = read_count(prompt.whole) or 3
        table = TABLE.search(said)
        words = re.search(rf"\b(?:\d\d?(?:-| to ))?{COUNT}[- ]words?\b", said)
        if table:
            named = COLUMNS.search(IN_BRACKETS.sub("", said)) or COLUMNS.search(said)
            names = split_names(named[1] if named else "name, note")
            rows = [names, *[[f"\1{name}\1" for name in names]] * count]
            if "table" not in table[0].lower():
                return WantedForm("CSV", "\n".join(map(",".join, rows)))
            head, *lines = [f"| {' | '.join(row)} |" for row in rows]
            return WantedForm("table", "\n".join([head, "|" + "---|" * len(names), *lines]))
        for pattern, before in LISTS:
            if re.search(pattern, prompt.whole if "N" in before else said, re.I):
                offered = []
                if before == ", ":
                    offered = find_offered(prompt, f"apply {said}").get("enum", [])
                pairs = list(map(", ".join, zip(offered, offered[1:])))
                if pairs:
                    return as_choice({"enum": pairs}, "\1answer\1")
                shape = re.search(r"[\"'`]?(\(?\w+(?:(?:; | ?\| ?)\w+)+\)?)", said)
                item = re.sub(r"(\w+)", "\1\\1\1", shape[1]) if shape else "\1item\1"
                entries = [f"{before.replace('N', str(at + 1))}{item}" for at in range(count)]
                return WantedForm("list", "".join(entries).lstrip("\n, "))
        if words and words[1] != "one":
            return WantedForm("words", " ".join(["\1word\1"] * read_count(f"{words[1]} of")))
    return None


VERDICT = r"([\"'`][\w ]{1,20}[\"'`]|[A-Z]\w*|\d|yes|no|true|false)"
CONDITIONS = lazy_regex(
    rf"{VERDICT},? (?:if|when|otherwise)\b|(?i:otherwise|else)(?:,? \w+)?:?,? {VERDICT}"
    rf"|(?i:\b(?:if|when) [^.;\"'`\n]{{1,99}}, (?:then )?{SPOKEN}(?: with)? )"
    r"([\"'`]\w+[\"'`])"
)
NOT_SAID = r"\b(?:function|method|program|script|code|test)|\w\(|and explain|in detail"
RESTRICTED = lazy_regex(
    r"(?i)\b(?:(?:only|just)(?! from)|alone|nothing (?:else|more)|single|do not explain|classif"
    r"|label|one (?:word|letter|digit|number)|without (?:any )?(?:punct|expla)|categor"
    r"|no (?:other|extra|preamble|expla|punct)|exactly as|anything else"
    r"|(?:as|return) (?:YYYY|an? (?:\w+ )?(?:int|float|num|bool)))"
)


ROW_AT_END = lazy_regex(
    rf"(?m)(?:({QUOTED_ROW}|{WORDS_OFFERED})\?"
    rf"|(?:[?:]|\b(?:as|to|only|with)) ({WORDS_OFFERED})\.?)$"
)


def read_offered(prompt: Prompt, said: str) -> Item:
    """Return the schema of what a sentence itself lets one choose, or nothing."""
    if "YYYY-MM-DD" in said and RESTRICTED.search(prompt.whole):
        return read_phrase(said)
    if "] > [" in said:
        names = list(dict.fromkeys(re.findall(r"(?m)^\[\d+\]", prompt.text) or ["[1]", "[2]"]))
        return {"enum": [" > ".join(names[at:] + names[:at]) for at in range(len(names))]}
    words = re.findall(r"\[\[([A-Z])\]\]", said)
    if not words:
        words = ["".join(found) for found in CONDITIONS.findall(said)]
    if len(words) > 1 and not re.search(NOT_SAID, " ".join(prompt.said)):
        return {"enum": [word.strip("\"'`") for word in words]}
    if "[[" in said:
        return read_numbers(" ".join([said, *prompt.said]))
    bounds, numeric = NUMBER_RANGE.search(said), NUMBER_WORD.search(said)
    near = bounds and numeric and numeric.start() < bounds.end() and said[:2] != "If"
    return read_offer(said) or (read_numbers(said) if near else {})


def read_restricted(prompt: Prompt, said: str) -> Item:
    """Return the schema of what a sentence or the label at the end restricts to, or nothing."""
    limited = RESTRICTED.search(said)
    of_list = re.search(r"(?i)categor|option|choice|label|letter|one of|\Aanswer\Z", said)
    at_end = said and said == prompt.tail
    if not (at_end or limited or of_list or RESTRICTED.search(prompt.whole)):
        return {}
    items = {} if LIST_ITEM.match(said) else find_items(prompt, "number" in said)
    if items and (of_list or (limited and type(items.get("enum", [""])[0]) is int)):
        return items
    kind = re.search(r"\b(?:int|float|num|bool|digit)(?:eger|ber|ean)?\b(?! of)", said)
    if limited and (kind or NUMBER_WORD.search(said)):
        limits = filter(None, map(read_numbers, prompt.said))
        typed = {"type": read_type(kind[0])} if kind else {}
        return max(limits, key=measure_width, default=typed)
    asked = ROW_AT_END.search("\n".join(prompt.said)) if at_end or limited else None
    offer = find_offered(prompt, said) or (read_row(asked[1] or asked[2]) if asked else {})
    return offer or (items if limited else {})


def read_choice(prompt: Prompt) -> WantedForm | None:
    """Read one of a few, a number in a range, or one word, line or sentence."""
    asking = [prompt.tail, *keep_ends(prompt.asking, 2)[::-1]]
    for read, said in itertools.product((read_offered, read_restricted), asking):
        schema = read(prompt, said)
        if schema:
            if schema in ({"type": "integer"}, {"type": "number"}):
                name = next(filter(NUMBERS.get, re.findall(r"\w+", said.lower())), "number")
                return as_choice(schema, f"\1{name}\1", name)
            if schema == {"type": "boolean"} and "True" in said:
                schema = {"enum": ["True", "False"]}
            if schema.get("enum") == ["Yes", "No"] and re.search("block|harm|unsafe", said):
                schema = {"enum": ["No"]}
            return as_choice(schema, "[[\1answer\1]]" if "[[" in said else "\1answer\1")
    short = re.search(r"\b(?:one|single)[ -](line|sentence|word)\b", prompt.whole)
    name = "word" if short and short[1] == "word" else "description"
    return WantedForm(f"one {short[1]}", f"\1{name}\1") if short else None


SORTS = lazy_regex(r"(?i)label|class|categ|sentiment|intent|topic")


def read_shots(prompt: Prompt) -> WantedForm | None:
    """Read what a label at the end had behind it before: JSON with the same keys, or labels."""
    before, _, end = prompt.text.strip().rpartition("\n")
    named = re.fullmatch(r"[A-Z][\w ]{0,30}:", end)
    shots = re.findall(rf"(?m)^{end}\s*(\{{[^{{}}]*\}}|\S.*)", before)[-6:] if named else []
    rated = re.fullmatch(r"([A-Z]\w*: )\d+(, [A-Z]\w*: )\d+", shots[0]) if shots else None
    if rated:
        return as_choice({"enum": [5, 7, 9]}, f"{rated[1]}1{rated[2]}\1answer\1")
    shown = [read_example(text) if text[:1] == "{" else {end: text} for text in shots]
    if len(shown) < 2 or not shown[0] or len({tuple(each or ()) for each in shown}) > 1:
        return None
    fields: Item = {}
    for key, value in shown[0].items():
        labels = [*dict.fromkeys(str(each[key]) for each in shown)]
        repeated = len(labels) < len(shown) and not labels[0].istitle()
        sorts = (repeated or SORTS.search(key + before[:99])) and type(value) is str
        few = sorts and re.fullmatch(r"(?=.+\n)(?:[\w-]+(?: [\w-]+)?(?:\n|\Z))+", "\n".join(labels))
        fields[key] = {"enum": labels} if few else read_value(prompt, value, key)
    if end not in fields:
        return WantedForm("JSON as before", "\1JSON\1", {"JSON": as_object(fields)})
    return as_choice(fields[end], "\1answer\1") if "enum" in fields[end] else None


FORM_READERS = (
    read_marks, read_agent, read_json, read_said, read_block, read_shown,
    read_label, read_records, read_list, read_choice, read_shots,
)  # fmt: skip
RESULT = lazy_regex(
    r"(?i)\A\W*(?:observation|tool|result|output|returncode|error|format error|for context|"
    r"continue|please (?:pro|con)|your (?:previous|last))|valid(?:ation error| json)|parsed"
    r"|try again"
)


@functools.lru_cache(maxsize=256)  # system messages come again
def has_hint(text: str) -> bool:
    if "{" in text or "<" in text or "`" in text or text.endswith((":", ": ", ":\n")):
        return True
    return not HINTS.isdisjoint(text.replace("few words", "").split())


def is_hinted(text: str) -> bool:
    return has_hint(keep_ends(text, 600))


def read_form(messages: list[Item], json_mode: bool = False) -> WantedForm | None:
    """Return the form that the user's last message (no result), or else the system, asks for."""
    texts = list(map(message_text, messages))
    backwards = range(len(messages) - 1, -1, -1)
    users = [at for at in backwards if messages[at]["role"] == "user"][:24]
    systems = [at for at in backwards if messages[at]["role"] in ("system", "developer")][:2]
    begun = [at for at in users if not RESULT.search(texts[at][:80])]
    asked = [at for at in dict.fromkeys([*users[:1], *begun[:1], *systems]) if is_hinted(texts[at])]
    told = texts[systems[0]][:PROMPT_WINDOW] if systems else ""
    vague = None
    for number in asked:
        window = PROMPT_WINDOW // (1 if number in (asked[0], *systems[:1]) else 4)
        answered = any(m["role"] in ("tool", "function", "assistant") for m in messages[number:])
        about = texts[users[0]][-PROMPT_WINDOW:] if users and number != users[0] else ""
        prompt = Prompt(keep_ends(texts[number], window), about, answered, told)
        tried = (read(prompt) for read in FORM_READERS)
        form = read_json(prompt, True) if json_mode else next(filter(None, tried), None)
        if form is not None:
            form.label += f", from messages[{number}]"
            if form.schemas.get("JSON") is not JSON_MODE_SCHEMA:
                return form
            vague = vague or form
    return vague


# === Catalogue ===

TRAITS = (
    "thinks", "always-thinks",  # before it answers; also where that is switched off
    "sees", "watches", "hears",  # takes images, videos, sound
    "retired",  # is served no more without a dedicated endpoint
    "no-steps", "loras",  # for an image: takes no number of steps, takes adapters
    "no-grammar",  # cannot be made to call a tool
    "sockets-only",  # transcribes what comes over a WebSocket alone
)  # fmt: skip


MAX_DIMENSIONS = 16384  # of an embedding
# What serves a model in production; `FORMS` has the form of each one's answers.
ENGINE_NAMES = (
    "A", "B", "V4", "Scout", "gpt-oss-20b", "gpt-oss-120b", "K2.7", "C", "DeepSeek", "GLM", "Qwen"
)  # fmt: skip


class Model:
    """One row of the catalogue; prices are USD for a million tokens.

    engine   one of ENGINE_NAMES; guessed from the id where it is unknown
    traits   words that tell what it can do, of `TRAITS`
    """

    organization = ""
    context_length: int | None = None
    prices: Sequence[float] = (0, 0)  # input, output and, where it is offered, cached input
    dimensions = 768  # of an embedding
    pricing: Item | None = None  # what is paid otherwise than by tokens

    def __init__(
        self, type: str, id: str, traits: Iterable[str] = ("known",), **facts: Any
    ) -> None:
        self.type = type
        self.id = id
        self.traits = frozenset(traits)
        self.thinks = not self.traits.isdisjoint(("thinks", "always-thinks"))
        self.display_name: str = id
        self.engine: str = "A" if re.search(r"-Turbo(-Free)?$", id) else "B"
        vars(self).update((name, facts[name]) for name in facts if facts[name] not in ("", None))

    def derive(self, id: str, owner: str) -> Model:
        """Return a model that answers as this one does under another id."""
        model = copy.copy(self)
        model.id = model.display_name = id
        model.organization = owner
        return model


# A type's heading, then: id | organization | display name | context length | prices | more, which
# are traits, the engine, dimensions and prices by another unit. The id says who and what it is
# where nothing else does.
# Ids, lengths, names and prices as they were seen up to 2026-10; below the second `chat`, older
# ids that programs and tests still use. What is not known is left out.
MODEL_TABLE = """\
= chat
meta-llama/Llama-3.3-70B-Instruct-Turbo|Meta|Meta Llama 3.3 70B Instruct Turbo|131072|1.04/1.04
openai/gpt-oss-120b|OpenAI|OpenAI GPT-OSS 120B|131072|0.15/0.6|always-thinks, engine gpt-oss-120b
openai/gpt-oss-20b|OpenAI|OpenAI GPT-OSS 20B|131072|0.05/0.2|thinks, engine gpt-oss-20b
deepseek-ai/DeepSeek-V4-Pro|Deepseek|Deepseek V4 Pro|512000|1.74/3.48/0.2\
|thinks, sees, watches, hears, engine V4
deepseek-ai/DeepSeek-V4-Pro-0813|Deepseek|Deepseek V4 Pro 0813|1048576|1.32/3.96/0.13\
|thinks, engine DeepSeek
deepseek-ai/DeepSeek-V4.1-Flash|Deepseek|Deepseek V4.1 Flash|1048576|0.3/1.2/0.006\
|thinks, engine DeepSeek
deepseek-ai/DeepSeek-V4-Flash-0731|Deepseek|Deepseek V4 Flash 0731|1048576|0.14/0.28/0.03\
|thinks, engine V4
moonshotai/Kimi-K3|Moonshot AI||1048576|3/15/0.3|thinks, sees, watches, engine C
moonshotai/Kimi-K2.7-Code|Moonshot AI||262144|0.95/4/0.19|thinks, sees, watches, engine K2.7
zai-org/GLM-5.3|||1048575|1.4/4.4/0.26|thinks, engine GLM
zai-org/GLM-5.3-Flash|||1048575|0.15/0.5/0.03|always-thinks, sees, engine GLM
zai-org/GLM-5.2|||1048575|1.4/4.4/0.26|thinks, engine GLM
Qwen/Qwen3.8-2.4T-A95B|||1010000|2/6/0.25|thinks
Qwen/Qwen3.8-Flash|||1000000|0.15/0.47|thinks, engine Qwen
Qwen/Qwen3.7-Max|||1000000|2.5/7.5/0.5|thinks, engine Qwen
Qwen/Qwen3.7-Plus|||1000000|0.32/1.28|thinks, engine Qwen
Qwen/Qwen3.6-Plus|||1000000|0.5/3|thinks, sees, watches, engine Qwen
Qwen/Qwen3.5-9B||Qwen3.5 9B FP8|262144|0.17/0.25|thinks, sees, watches
Qwen/Qwen2.5-7B-Instruct-Turbo|||32768|0.3/0.3|no-grammar
MiniMaxAI/MiniMax-M3|MiniMaxAI||524288|0.3/1.2/0.06|thinks, sees
MiniMaxAI/MiniMax-M2.7|MiniMaxAI|MiniMax M2.7 FP4|196608|0.3/1.2/0.06|thinks
google/gemma-4-31B-it||Gemma 4 31B-it FP8|262144|0.39/0.97|sees, watches
google/gemma-3n-E4B-it||Gemma 3N E4B Instruct|32768|0.06/0.12|sees, hears
LiquidAI/LFM2.5-8B-A1B|LiquidAI|LFM2.5-8B-A1B|128000|0.03/0.12
thinkingmachines/Inkling|Thinking Machines||524288|1/4.05/0.17
meta-models/Muse-Glimmer-30B|Meta||131072|0.35/1.5/0.04
together/Tev1-4B-experimental||Tev1 4B Experimental|32768|0.042/0
deepcogito/cogito-v2-1-671b||Cogito v2.1 671B|163840|1.25/1.25|thinks
= moderation
meta-llama/Llama-Guard-4-12B|Meta||1048576|0.2/0.2|sees
= code
facebook/cwm|Meta|Facebook CWM|131072
= language
meta-llama/Meta-Llama-3.1-8B|Meta||16384|0.2/0.2
mistralai/Mixtral-8x7B-v0.1|mistralai|Mixtral 8X7b V0.1|32768
Qwen/Qwen2-72B||Qwen 2 (72B)|32768
= embedding
intfloat/multilingual-e5-large-instruct||Multilingual E5 Large Instruct|514|0.02/0.02\
|dimensions 1024
BAAI/bge-base-en-v1.5|BAAI|BAAI-Bge-Base-1.5|512|0.008/0.008
= rerank
Salesforce/Llama-Rank-V1|salesforce|Salesforce Llama Rank V1 (8B)|8192|0.1/0.1|retired
mixedbread-ai/mxbai-rerank-large-v2|Mixedbread AI|Mxbai Rerank Large V2|32768||retired
= image
black-forest-labs/FLUX.1-schnell||FLUX.1 Schnell|||image_pixel 0.0027
black-forest-labs/FLUX.2-dev||FLUX.2 [dev]|||image 0.0154
black-forest-labs/FLUX.2-pro||FLUX.2 [pro]|||image 0.03, no-steps
black-forest-labs/FLUX.1-kontext-pro||FLUX.1 Kontext [pro]|0||image_pixel 0.04
google/flash-image-2.5||Gemini Flash Image 2.5 (Nano Banana)|||image 0.039, no-steps
stabilityai/stable-diffusion-xl-base-1.0|stabilityai|SD XL|||image 0.0019
Qwen/Qwen-Image|||||image 0.0058
= audio
hexgrad/Kokoro-82M||||4/0
canopylabs/orpheus-3b-0.1-ft|Canopy Labs|Orpheus 3B 0.1 FT||15/0
cartesia/sonic||Cartesia Sonic|0|65/0
cartesia/sonic-2||Cartesia Sonic 2|448|65/0
cartesia/sonic-3||Cartesia Sonic 3|448|65/0
= transcribe
openai/whisper-large-v3|OpenAI|Whisper large-v3|1|0.27/0.85|transcribe 0.0015
nvidia/parakeet-tdt-0.6b-v3||Nvidia Parakeet TDT 0.6B V3|448||transcribe 0.0015
nvidia/nemotron-3-asr-streaming-0.6b||Nemotron 3 ASR Streaming 0.6B|||sockets-only
= video
minimax/hailuo-02|MiniMaxAI|MiniMax Hailuo 02|||video 0.56 768p / 10s
minimax/video-01-director|MiniMaxAI|MiniMax 01 Director
openai/sora-2|OpenAI|Sora 2|||video 0.8 720p / 8s
ByteDance/Seedance-1.0-pro|ByteDance|ByteDance Seedance 1.0 Pro|||video 0.565 720p / 5s
Wan-AI/wan2.7-t2v|Wan-AI|Wan 2.7 T2V|||video 0.1 per 5 seconds
= chat
meta-llama/Llama-3.3-70B-Instruct-Turbo-Free|Meta|Meta Llama 3.3 70B Instruct Turbo Free|131072
meta-llama/Llama-4-Scout-17B-16E-Instruct|Meta|Llama 4 Scout Instruct (17Bx16E)|1048576|0.18/0.59\
|sees, engine Scout
meta-llama/Llama-Vision-Free|Meta|Meta Llama Vision Free|131072||sees
deepseek-ai/DeepSeek-R1|DeepSeek||163840|3/7|thinks, engine A
moonshotai/Kimi-K2.6|Moonshot AI|Kimi K2.6 Fp4|262144|1.2/4.5/0.2|thinks, sees, watches
nvidia/nemotron-3-ultra-550b-a55b|NVIDIA|NVIDIA Nemotron 3 Ultra 550B A55B NVFP4|512288\
|0.6/3.6/0.2|thinks, retired
Qwen/Qwen3.5-397B-A17B|||262144|0.6/3.6|thinks, sees, watches
Qwen/Qwen3-235B-A22B-Instruct-2507-tput||Qwen3 235B A22B Instruct 2507 FP8|262144|0.2/0.6
meta-llama/Meta-Llama-3.1-8B-Instruct-Turbo|Meta||131072|0.18/0.18|retired
mistralai/Mixtral-8x7B-Instruct-v0.1|mistralai|Mixtral-8x7B Instruct v0.1|32768|0.6/0.6|retired
Qwen/Qwen2.5-72B-Instruct-Turbo|||131072|1.2/1.2|retired
meta-llama/Llama-3.1-405B-Instruct|Meta||4096|3.5/3.5|retired
zai-org/GLM-5.1|||202752|1.4/4.4/0.26|thinks, retired
= embedding
togethercomputer/m2-bert-80M-8k-retrieval|Together|M2-BERT-Retrieval-8k|8192|0.008/0.008
togethercomputer/m2-bert-80M-32k-retrieval|Together|M2-BERT-Retrieval-32K|32768|0.008/0.008
togethercomputer/m2-bert-80M-2k-retrieval|Together|M2-BERT-Retrieval-2K|2048|0.008/0.008
Alibaba-NLP/gte-modernbert-base||Gte Modernbert Base|8192|0.08/0.08
BAAI/bge-large-en-v1.5|BAAI|BAAI-Bge-Large-1.5|512|0.016/0.016|dimensions 1024
WhereIsAI/UAE-Large-V1|WhereIsAI|UAE-Large v1|512|0.016/0.016|dimensions 1024
= rerank
Salesforce/Llama-Rank-v1|salesforce|Salesforce Llama Rank V1 (8B)|8192|0.1/0.1|retired
= image
black-forest-labs/FLUX.1-schnell-Free||FLUX.1 [schnell] Free
black-forest-labs/FLUX.1-dev||FLUX.1 [dev]
black-forest-labs/FLUX.1-dev-lora||FLUX.1 [dev] LoRA|||loras
black-forest-labs/FLUX.1-pro||FLUX.1 [pro]
black-forest-labs/FLUX.1-redux||FLUX.1 [redux]
black-forest-labs/FLUX.1-depth||FLUX.1 [depth]
black-forest-labs/FLUX.1-canny||FLUX.1 [canny]
black-forest-labs/FLUX.1-krea-dev||FLUX.1 Krea [dev]
black-forest-labs/FLUX.1-kontext-dev||FLUX.1 Kontext [dev]
black-forest-labs/FLUX.1-kontext-max||FLUX.1 Kontext [max]
black-forest-labs/FLUX.2-flex||FLUX.2 [flex]|||no-steps
google/imagen-4.0-preview||Google Imagen 4.0 Preview|||no-steps
ByteDance-Seed/Seedream-4.0|ByteDance|ByteDance Seedream 4.0
black-forest-labs/FLUX.1.1-pro||FLUX1.1 [pro]|||image_pixel 0.04, no-steps
= language
meta-llama/Llama-2-70b-hf|Meta|LLaMA-2 (70B)|4096|0.9/0.9
= moderation
Meta-Llama/Llama-Guard-7b|Meta|Llama Guard (7B)|4096|0.2/0.2
"""
UNIT_PRICES = {"image_pixel": "price_per_megapixel", "transcribe": "price_per_minute"}
PRICED = {"image", "video", *UNIT_PRICES}


def read_model(type: str, row: str) -> Model:
    """Make a model of one row of the table."""
    columns = [*row.split("|"), "", "", "", "", ""][:6]
    id, organization, display_name, context_length, prices, more = columns
    owner, _, name = id.partition("/")
    facts = dict(fact.partition(" ")[::2] for fact in more.split(", "))
    pricing: Item = {}
    for unit in PRICED.intersection(facts):
        price, _, what = facts[unit].partition(" ")
        pricing[unit] = {"example_price": float(price), "example_description": what or "1 image"}
        if unit in UNIT_PRICES:
            pricing[unit] = {UNIT_PRICES[unit]: float(price)}
    return Model(
        type,
        id,
        ["known", *facts.keys() & TRAITS],
        organization=organization or owner.replace("-", " ").title(),
        display_name=display_name or name.replace("-", " "),
        context_length=int(context_length) if context_length else None,
        prices=[float(price) for price in prices.split("/")] if prices else (0, 0),
        engine=facts.get("engine"),
        dimensions=int(facts.get("dimensions", 768)),
        pricing=pricing,
    )


def read_models(table: str) -> dict[str, Model]:
    models: dict[str, Model] = {}
    for group in table.split("= ")[1:]:
        type, *rows = group.splitlines()
        models.update((row.partition("|")[0], read_model(type, row)) for row in rows)
    return models


MODELS = read_models(MODEL_TABLE)
LISTED_TYPES = tuple(dict.fromkeys(model.type for model in MODELS.values()))

# What a chat template ends a turn with, by the maker of the model (recorded).
STOP_TOKENS = {
    "meta-llama": ["<|eot_id|>", "<|eom_id|>"],
    "openai": ["<|return|>"],
    "Qwen": ["<|im_end|>"],
}
PRICING_KEYS = (
    "hourly", "input", "output", "base", "finetune", "image_pixel", "transcribe", "image", "video"
)  # fmt: skip


def model_object(model: Model) -> Item:
    """Return a model as `GET /v1/models` lists it."""
    stop = STOP_TOKENS.get(model.id.partition("/")[0], [])
    pricing: Item = dict.fromkeys(PRICING_KEYS, 0)
    pricing.update(zip(("input", "output", "cached_input"), model.prices), **(model.pricing or {}))
    item: Item = {
        "id": model.id,
        "uuid": "endpoint-" + random_uuid(HashRandom.of("model", model.id)),
        "object": "model",
        "created": 0,  # as the service says of most
        "type": model.type,
        "running": False,
        "display_name": model.display_name,
        "organization": model.organization,
        "link": f"https://huggingface.co/{model.id}",
        "license": "other",
        "context_length": model.context_length,
        "config": {"chat_template": None, "stop": stop, "bos_token": None, "eos_token": None},
        "pricing": pricing,
    }
    if model.context_length is None:
        del item["context_length"]
    return item


# By the type of a model: what it can do, what it takes, what it makes.
SUPPORTED = {
    "embedding": ("EMBEDDING", "TEXT", "TEXT"),
    "rerank": ("RERANKING", "TEXT", "TEXT"),
    "image": ("IMAGE_GENERATION", "TEXT", "IMAGE"),
    "video": ("VIDEO_GENERATION", "TEXT", "VIDEO"),
    "audio": ("CHAT", "TEXT", "AUDIO"),
    "transcribe": ("CHAT", "AUDIO", "TEXT"),
}


def supported_model(model: Model) -> Item:
    """Return a model as `GET /v2/supported-models` lists it."""
    can, takes, gives = SUPPORTED.get(model.type, ("CHAT", "TEXT", "TEXT"))
    features = ["FEATURE_TOOL_CALLING", "FEATURE_STRUCTURED_OUTPUT"]
    features += ["FEATURE_REASONING"] if model.thinks else []
    day = format_time(CREATED).replace(".000", "")
    return {
        "id": "ml_" + HashRandom.of("supported model", model.id).hex(24),
        "name": model.id,
        "displayName": model.display_name,
        "displayType": model.type,
        "publisher": model.organization,
        "baseModel": "",
        "baseModelId": "",
        "capabilities": ["CAPABILITY_" + can],
        "inputModalities": ["MODALITY_" + takes],
        "outputModalities": ["MODALITY_" + gives],
        "products": ["PRODUCT_SERVERLESS"],
        "features": features if model.type == "chat" else [],
        "deploymentProfiles": [],
        "contextLength": str(model.context_length or 0),
        "pricing": dict(zip(("input", "output", "cachedInput"), model.prices)),
        "serverlessEndpoint": model.id,
        "status": "SUPPORTED_MODEL_STATUS_SUPPORTED",
        "createdAt": day,
        "updatedAt": day,
    }


# === Dialects ===

# Clients of one generation ask for /v1/v1/..., or for v2 and v3 operations under /v1.
VERSIONED = lazy_regex(r"/(?:v[0-9]+|__\w+|shrt|docs|health)(?:/|$)|/$")
DOUBLED_PREFIX = lazy_regex(r"^/v1(?=/v[123](?:/|$))")
MOVED_PREFIX = lazy_regex(
    r"^/v1(?=/(?:whoami|videos|supported-models|projects/[^/]+/models)(?:/|$))"
)


def collapse_path(path: str, strict: bool) -> str:
    """Return the path an operation is declared under: one base URL serves every client."""
    if "//" in path:
        path = re.sub("//+", "/", path)
    if len(path) > 1 and path[-1] == "/":
        path = path[:-1]
    path = DOUBLED_PREFIX.sub("", path, count=1)  # production answers these too
    path = path.replace("/v1/evaluations", "/v1/evaluation", 1)  # as Together's Python 1.x asks
    if strict:
        return path
    path = path if VERSIONED.match(path) else "/v1" + path
    return MOVED_PREFIX.sub("/v2", path, count=1)


def is_together(request: Request) -> bool:
    return request.headers.agent.startswith(("Together/", "AsyncTogether/"))


def is_openai(request: Request) -> bool:
    """Say whether a client of OpenAI asks, under whatever name a program gives it."""
    named = request.headers.agent.startswith(("OpenAI/", "AsyncOpenAI/"))
    return named or ("x-stainless-lang" in request.headers and not is_together(request))


def wrap_list(request: Request, items: list[Any], strict: bool, more: bool = False) -> Any:
    """Return the bare array of production, or the envelope that OpenAI's clients parse."""
    if is_openai(request) and not strict:
        return {"object": "list", "data": items, "has_more": more}
    return items


def completion_objects(request: Request, strict: bool) -> tuple[str, str]:
    """Return `object` of a completion, whole and in chunks; who is no SDK gets the original's."""
    known = strict or is_openai(request) or is_together(request)
    return ("text.completion", "completion.chunk") if known else ("text_completion",) * 2


# === Collections ===

MAX_RECORDED_BODY_BYTES = 4 * 2**20  # a larger body is not kept with its call
MAX_RECORD_BYTES = 64 * 2**20
MAX_OBJECTS = 10_000


def copy_json(value: Any) -> Any:
    if type(value) is dict:
        return {key: copy_json(item) for key, item in value.items()}
    return [copy_json(item) for item in value] if type(value) is list else value


def take_page(
    items: list[Item], args: Item, key: str = "id", most: int = MAX_OBJECTS
) -> tuple[list[Item], bool]:
    """Return `limit` items after `after`, none where that is gone, and whether more follow."""
    after, ids = args.get("after"), [item[key] for item in items]
    start = (ids.index(after) + 1 if after in ids else len(ids)) if after else 0
    end = start + (args.get("limit") or most)
    return items[start:end], end < len(ids)


class Shared:
    """What threads share. They take one lock, each for a moment; a clock may take it again."""

    _lock = threading.RLock()


class Collection(Shared):
    """The newest objects of one noun; it hands out copies and raises the 404."""

    def __init__(self, noun: str, forget: Callable[[str], Any] = lambda id: None) -> None:
        self.noun = noun
        self.forget = forget  # what else is kept of an object that goes
        self._items: dict[str, Item] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, id: str) -> bool:
        return id in self._items

    def __iter__(self) -> Iterator[Item]:
        """Yield all objects, the newest first."""
        with self._lock:
            items: list[Item] = copy_json(list(self._items.values()))
        return reversed(items)

    def add(self, id: str, item: Item) -> Item:
        with self._lock:
            self._items[id] = copy_json(item)
            while len(self._items) > MAX_OBJECTS:
                self.remove(next(iter(self._items)))
        return item

    def get(self, id: str) -> Item:
        with self._lock:
            item: Item | None = copy_json(self._items.get(id))
        if item is None:
            raise ApiError("no_object", param="id", noun=self.noun, id=id)
        return item

    __getitem__ = get

    def update(self, id: str, **changes: Any) -> Item:
        with self._lock:
            self._items.get(id, {}).update(copy_json(changes))
        return self.get(id)

    def remove(self, id: str) -> Item:
        item = self.get(id)
        with self._lock:
            self._items.pop(id, None)
        self.forget(id)
        return item


def get_path(value: Any, *steps: str) -> Any:
    for step in steps:
        if isinstance(value, list):
            value = dict(zip(map(str, itertools.count()), value))
        value = value.get(step) if isinstance(value, dict) else None
    return value


EVENT_STREAM = "text/event-stream"
EVENT_END = lazy_regex(rb"\r?\n\r?\n|\r\r")


def split_events(data: bytes) -> list[bytes]:
    ends = [found.end() for found in EVENT_END.finditer(data)]
    ends += [len(data)] if data[ends[-1] if ends else 0 :].strip() else []
    return [data[start:end] for start, end in zip([0, *ends], ends)]


def parse_events(data: bytes) -> list[Any]:
    """Return the data of events as JSON, or as text where it is none, such as `[DONE]`."""
    events: list[Any] = []
    for event in split_events(data):
        # Lines of bytes end with CR and LF alone; those of texts also where a text goes on.
        lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
        text = b"\n".join(lines).decode("utf-8", "replace").strip()
        try:
            events += [json.loads(text)] if lines else []
        except (ValueError, RecursionError):
            events.append(text)
    return events


BASE64_SOUND = lazy_regex(rb'("audio"\s*:\s*|audio_output\.delta".*"delta":)"([^"]*)"', re.DOTALL)


def shorten_sound(found: re.Match[bytes]) -> bytes:
    return b'%b{"bytes": %d}' % (found[1], len(found[2]) * 3 // 4 - found[2].count(b"="))


def find_usage(replies: Sequence[Any]) -> Item | None:
    """Return the last usage that one of the replies or events tells of."""
    for reply in reversed(replies):
        places = [reply, get_path(reply, "response"), get_path(reply, "choices", "0")]
        for place in places:
            usage = get_path(place, "usage")
            if isinstance(usage, dict):
                return usage
    return None


# What a list of calls shows of each, and what is shown of one.
ROW = (
    "kind", "operation", "method", "path", "model", "status", "usage", "fixture", "outcome", "test",
    "batch", "error",
)  # fmt: skip
ROW_MORE = (
    "query", "headers", "body", "reply", "messages", "close_code", "events_sent", "form",
    "warnings", "notes", "near_misses",
)  # fmt: skip


class Call:
    """One recorded request and what came of it."""

    kind = ""  # chat, response, completion, embedding, image, or the family of the path
    route_kind = ""  # what fixtures call it
    status = 0  # of the reply; 0 until there is one
    duration = 0.0  # seconds until the reply was there; of a stream, until its end
    outcome = "running"  # then "complete", "cut" by a fault, "left" by the client
    events_sent = 0
    close_code = 0
    sound: bytes | bytearray = b""  # that went over a socket
    sound_rate = 0  # samples a second
    first_event = 0.0  # seconds until the first of them was there
    error = ""
    notes: tuple[str, ...] = ()  # a path that was read as another, a fault
    fixture = ""  # the source of the one that answered
    form = ""  # of the answer, as the prompt asks for it, and the message that says so
    reply_type = ""
    reply_headers: Mapping[str, str] = {}  # but those of every reply
    reply_size = 0
    revision = 0  # rises whenever something about the call changes
    identity: Any = None  # what a fixture would match, where the body is not kept
    excused = False  # a client that leaves: the stream was slow, or the server stopped
    episode = 0  # of the record: a request that comes again in another one is another request
    is_stream = False  # of events, or of a socket's messages
    _pieces: Any = ()  # of the reply
    misses: Sequence[Any] = ()  # the fixtures that did not answer, and why
    explain_misses: Any = None
    answered_by: Any = None
    doubt: Any = None  # finds what its body is warned of, once somebody looks
    _warnings: tuple[str, ...] = ()

    def __init__(self, number: int, request: Request, at: float) -> None:
        self.number = number
        self.method = request.method
        self.path = request.path
        self.query = request.query and hide_in_url("?" + request.query)[1:]
        self.headers = request.headers.masked
        self.test: str = request.headers.get("x-test-id", "")
        self.batch = request.batch  # the job whose line this is
        self.peer = request.peer
        self.at = at
        self.started = time.perf_counter()
        self._raw = request.raw if len(request.raw) <= MAX_RECORDED_BODY_BYTES else b""
        self.kept = len(self._raw)  # bytes of the body and, once it has ended, of the reply

    def keep_reply(self, reply: Reply) -> None:
        self.status, self.reply_type = reply.status, reply.content_type
        self.reply_headers = reply.headers
        if reply.events is None and len(reply.body) <= MAX_RECORDED_BODY_BYTES:
            self._pieces, self.reply_size = [reply.body], len(reply.body)

    def add_message(self, message: bytes, is_sent: bool) -> None:
        """Keep a message of a socket; a client's is a comment between events."""
        line = b"data: %b\n\n" % b" ".join(BASE64_SOUND.sub(shorten_sound, message).splitlines())
        if not self.is_stream:
            self._pieces, self.is_stream = [], True
        if self.reply_size + len(line) <= MAX_RECORDED_BODY_BYTES:
            self.reply_size += len(line)
            self._pieces.append(line if is_sent else b": " + line)
        self.events_sent += is_sent

    def add_sound(self, data: bytes, rate: int) -> None:
        self.sound, self.sound_rate = self.sound or bytearray(), rate
        self.sound += data[: MAX_RECORDED_BODY_BYTES - len(self.sound)]

    def set_body(self, body: Item) -> None:
        self._raw = ENCODE(body).encode()

    def watch_events(
        self, events: Iterable[Any], end: Callable[[Call, str], None]
    ) -> Generator[Any, None, None]:
        """Pass a stream on; note its events, how it ended and how long it took."""
        kept: list[bytes] = []
        self._pieces, self.is_stream = kept, True
        room, outcome = MAX_RECORDED_BODY_BYTES, "left"
        try:
            yield 0.0  # has begun, so that closing it is noted
            for event in events:
                if type(event) is bytes:
                    room -= len(event)
                    if room >= 0:
                        kept.append(event)
                    self.events_sent += bool(event)
                    if not self.first_event:
                        self.first_event = time.perf_counter() - self.started
                elif event > 0:
                    self.excused = True
                yield event
            outcome = "complete"
        except Cut as error:
            outcome = error.outcome
            raise
        finally:
            if kept and kept[-1].endswith(DONE):  # who has this need not wait for the end
                outcome = "complete"
            self.duration = time.perf_counter() - self.started
            if hasattr(events, "close"):  # a generator, which may hold something
                events.close()
            self.reply_size = sum(map(len, kept))
            end(self, outcome)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Fields that nothing reads, and what production would never say."""
        if self.doubt is not None:
            self._warnings, self.doubt = (*self.doubt(self.body or {}), *self._warnings), None
        return self._warnings

    @warnings.setter
    def warnings(self, value: tuple[str, ...]) -> None:
        self._warnings = value

    @property
    def operation(self) -> str:
        """The method and path, as `POST /v1/chat/completions`."""
        return f"{self.method} {collapse_path(self.path, False)}"

    @property
    def body(self) -> Any:
        """JSON or form fields as a dict, files summarised, else None."""
        if not self._raw:
            return None
        try:
            body = parse_body(self._raw, self.headers.get("content-type", ""), NO_FIELDS)
        except ApiError:
            return None
        return redact(body)

    @property
    def is_kept(self) -> bool:
        return any(self._pieces) and len(self._pieces) >= self.events_sent

    @property
    def body_key(self) -> Any:
        """A key that equal bodies share; forms are compared without their boundary."""
        is_form = "multipart/" in self.headers.get("content-type", "")
        return self.identity or (self.body if is_form else self._raw)

    @property
    def raw_reply(self) -> bytes:
        return b"".join(self._pieces)

    @property
    def messages(self) -> list[Item]:
        """What went over a socket, `from` whom, and the `message`; of sound its length."""
        return [
            {
                "from": "client" if event.startswith(b":") else "server",
                "message": parse_events(event.lstrip(b": "))[0],
            }
            for event in (self._pieces if self.is_stream and self.status == 101 else ())
        ]

    @property
    def reply(self) -> Any:
        """JSON, the list of a stream's events, a text, or a file's type and size."""
        raw = self.raw_reply
        if self.is_stream:
            return [event for event in parse_events(raw) if event != "[DONE]"]
        if raw and ("json" in self.reply_type or "text" in self.reply_type):
            text = raw.decode("utf-8", "replace")
            return json.loads(text) if succeeds(json.loads, text) else text
        return {"content_type": self.reply_type, "bytes": len(raw)} if raw else None

    def get_header(self, name: str, default: str = "") -> str:
        return {key.lower(): text for key, text in self.reply_headers.items()}.get(name, default)

    def is_of(self, operation: str) -> bool:
        return operation in (self.kind, self.operation)

    @property
    def has_ended(self) -> bool:
        return self.outcome != "running"

    def as_request(self) -> Request:
        path = collapse_path(self.path, False)
        request = Request(self.method, path, self._raw, query=self.query, headers=self.headers)
        body = self.body
        request.body = body if isinstance(body, dict) else {}
        return request

    @property
    def usage(self) -> Item | None:
        """The tokens that the reply tells of, by chat's names too."""
        reply = self.reply
        found = find_usage(reply if isinstance(reply, list) else [reply])
        if found is not None and "input_tokens" in found:
            names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}
            found = {**found, **{name: found.get(other) for name, other in names.items()}}
        return found

    @property
    def model(self) -> str | None:
        body = self.body
        return body.get("model") if type(body) is dict else None

    @property
    def near_misses(self) -> list[Item]:
        """The fixtures that did not answer, the nearest first, each with what differed."""
        return self.explain_misses() if self.misses else []

    def __repr__(self) -> str:
        return f"<Call {self.number}: {self.method} {self.path} -> {self.status}>"

    def as_row(self) -> Item:
        """Return what lists of calls tell of it."""
        return {
            "n": self.number,
            "at": format_time(self.at),
            "duration_ms": round(self.duration * 1000, 3),
            **{name: getattr(self, name) for name in ROW},
            "warnings": len(self.warnings),
        }

    def as_json(self) -> Item:
        first = round(self.first_event * 1000, 3)
        more = {name: getattr(self, name) for name in ROW_MORE}
        return {**self.as_row(), "first_event_ms": first, **more}


# === WebSocket ===

MAX_MESSAGE_BYTES = 4 * 2**20  # of a message, all of its fragments together
MAX_WAITING_BYTES = 16 * 2**20  # that a client sends without taking the answers
LONG_MESSAGE_BYTES = 64 * 2**10  # a longer one is heard by a worker
TOO_LONG = 1009, f"a message has more than {MAX_MESSAGE_BYTES} bytes"
NO_TEXT = 1007, "a text is not UTF-8"
TEXT_FRAME, BINARY_FRAME, CLOSE, PING, PONG = 1, 2, 8, 9, 10  # 0 goes on with a message


class Closed(Exception):
    """Raised to close a socket: code, reason, outcome of the call, and an error to send first."""

    def __init__(self, code: int, reason: str, outcome: str = "cut", error: Any = None) -> None:
        super().__init__(code, reason)
        self.outcome, self.error = outcome, error


def is_close_code(code: int) -> bool:
    return code in (*range(1000, 1004), *range(1007, 1015), *range(3000, 5000))


def accept_upgrade(request: Request) -> dict[str, str]:
    """Return the headers that make a connection a socket; raise ApiError 400 or 426."""
    headers = request.headers
    names = ("upgrade", "connection", "sec-websocket-version")
    asked = " ".join([request.method, *(headers.get(name, "") for name in names)])
    if not re.fullmatch("GET websocket .*upgrade.* 13", asked, re.IGNORECASE):
        error = ApiError("no_upgrade", path=request.path)
        error.headers = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        raise error
    key = headers.get("sec-websocket-key", "")
    if not re.fullmatch("[A-Za-z0-9+/]{21}[AQgw]==", key):
        raise ApiError("bad_http", reason="Sec-WebSocket-Key is not 16 bytes in base64")
    data = (key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()
    digest = hashlib.sha1(data, usedforsecurity=False).digest()
    accepted = {"Upgrade": "websocket", "Sec-WebSocket-Accept": base64.b64encode(digest).decode()}
    offered = headers.get("sec-websocket-protocol", "").replace(",", " ").split()
    if offered:
        chosen = "realtime" if "realtime" in offered else offered[0]
        accepted["Sec-WebSocket-Protocol"] = chosen
    return accepted


def write_frame(kind: int, data: bytes) -> bytes:
    size = len(data)
    mark, count = (size, 0) if size < 126 else (126, 2) if size < 65536 else (127, 8)
    return bytes((0x80 | kind, mark)) + size.to_bytes(8, "big")[8 - count :] + data


def take_frame(data: bytearray) -> tuple[bool, int, bytes] | None:
    """Take the next whole frame: whether it ends its message, its kind, its bytes."""
    if len(data) < 2:
        return None
    is_last, kind, size = data[0] > 127, data[0] & 15, data[1] & 127
    is_known = kind in (0, 1, 2) or (kind in (CLOSE, PING, PONG) and is_last and size < 126)
    if data[0] & 0x70 or data[1] < 128 or not is_known:
        raise Closed(1002, "a frame is of no known kind, extended or not masked")
    start = 6 + {126: 2, 127: 8}.get(size, 0)
    size = int.from_bytes(data[2 : start - 4], "big") if start > 6 else size
    if len(data) >= start and size > MAX_MESSAGE_BYTES:
        raise Closed(*TOO_LONG)
    if len(data) < start + size:
        return None
    mask, payload = data[start - 4 : start] * (size // 4 + 1), data[start : start + size]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(mask[:size], "big")
    del data[: start + size]
    return is_last, kind, number.to_bytes(size, "big")


class Socket:
    """One client's socket, as `Connection.hand_over()` wants it; a subclass says what is answered.

    `open()`, `hear(message)` and `tell(error)` send events, and add turns: these yield events and
    pauses, and wait for the turns before them.
    """

    connection: Any
    open: Any
    hear: Any
    tell: Any

    def __init__(self, server: TogetherAiServer, request: Request) -> None:
        self.server, self.request, self.call = server, request, request.call
        self.unread = bytearray()
        self.message, self.kind = b"", 0  # as far as its fragments have come
        self.decode = codecs.getincrementaldecoder("utf-8")().decode  # of its text
        self.turns: list[Iterator[Any]] = []
        self.waiting = 0  # bytes received since all turns had been sent
        self.is_busy = False  # with a long message: nothing more is received, or sent at once
        self.unsent = b""
        self.closed: Closed | None = None

    def send(self, event: Item) -> None:
        self.unsent += self.frame(ENCODE(event).encode())

    def on_open(self, connection: Any) -> None:
        self.connection = connection
        self.act(self.open)

    def on_bytes(self, data: bytes) -> None:
        """Take what has come; answer each whole message."""
        self.unread += data
        self.waiting = len(data) + (self.waiting if self.turns else 0)
        self.act(self.read)
        if self.unsent and not (self.is_busy or self.closed):
            self.connection.write(self.unsent)
            self.unsent = b""

    def on_close(self) -> bytes:
        """End the call, once; return the frame that says why, behind the last word."""
        if self.call.has_ended:
            return b""
        code = 1001 if self.server.stopping.is_set() else 0
        closed = self.closed or Closed(code, "", "left")
        if closed.error is not None:
            self.tell(closed.error)
        code, reason = closed.args
        self.call.close_code, self.call.error = code, self.call.error or reason
        self.finish(closed.outcome)
        data = struct.pack(">H", code) + reason.encode("ascii", "replace")[:120]
        return self.unsent + write_frame(CLOSE, data if code else b"")

    def finish(self, outcome: str) -> None:
        self.call.duration = time.perf_counter() - self.call.started
        self.server._end_call(self.call, outcome)

    def act(self, act: Callable[[], None]) -> None:
        """Do something, if it is not over yet."""
        try:
            if not self.closed:
                act()
        except Closed as closed:
            self.closed = closed
        except Exception:
            self.call.error = complain_of_bug()
            self.closed = Closed(1011, "this is a bug of together_fake")

    def read(self) -> None:
        """Act on the frames that are whole."""
        if self.waiting > MAX_WAITING_BYTES:
            raise Closed(1008, "too much waits to be answered")
        while not self.is_busy and (frame := take_frame(self.unread)):
            is_last, kind, data = frame
            if kind == CLOSE:
                self.read_close(data)
            if kind == PING:
                self.unsent += write_frame(PONG, data)
            if kind <= BINARY_FRAME:
                self.read_fragment(is_last, kind, data)

    def read_close(self, data: bytes) -> None:
        code = int.from_bytes(data[:2], "big")
        if data and (len(data) < 2 or not is_close_code(code)):
            raise Closed(1002, "the code of a close is none that may be sent")
        raise Closed(code, "", "complete") if succeeds(bytes.decode, data[2:]) else Closed(*NO_TEXT)

    def read_fragment(self, is_last: bool, kind: int, data: bytes) -> None:
        """Add to a message, and answer it once it is whole."""
        if (kind == 0) != (self.kind > 0):
            raise Closed(1002, "a fragment is missing, or belongs to no message")
        if kind == BINARY_FRAME:
            raise Closed(1003, "a message is a text")
        message = self.message + data
        if len(message) > MAX_MESSAGE_BYTES:
            raise Closed(*TOO_LONG)
        if not succeeds(lambda data: self.decode(data, is_last), data):
            raise Closed(*NO_TEXT)
        self.message, self.kind = (b"", 0) if is_last else (message, TEXT_FRAME)
        if is_last and len(message) > LONG_MESSAGE_BYTES:
            self.is_busy = True
            hear = functools.partial(self.hear, message)
            self.connection.run(functools.partial(self.act, hear), self.read_on)
        elif is_last:
            self.hear(message)

    def read_on(self, result: Any = None, error: Any = None) -> None:
        self.is_busy = False
        if error is not None:  # no memory was left to hear it
            self.closed = Closed(1011, "no memory is left")
        self.connection.hear(b"")

    def draw(self) -> Generator[Any, None, None]:
        """Yield the events of the next turn in their frames, and its pauses, until it closes."""
        turn = self.turns[0]
        try:
            for event in turn:
                if self.closed:
                    return
                yield event if type(event) is float else self.frame(event)
        except Closed as closed:
            self.closed = self.closed or closed
        except Cut:
            self.finish("cut")
            raise
        self.turns.remove(turn)

    def frame(self, event: bytes) -> bytes:
        self.call.add_message(event, is_sent=True)
        return write_frame(TEXT_FRAME, event)


# === Fixtures ===

MAX_NEAR_MISSES = 20
MAX_FIXTURES = 10_000
MAX_TESTS = 10_000  # whose calls are counted apart
MAX_COMPARED = 4000  # characters of two texts that are compared
MAX_DIFFS = 3  # of the nearest misses of one call
MAX_SHOWN = 200  # characters of a text: where two differ, and in the list of calls


def list_objects(value: Any) -> list[Item]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def join_text(content: Any) -> Any:
    """Join the text parts of a content; None where it has no text at all."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") for part in list_objects(content) if part.get("type") == "text"]
    return "".join(map(str, parts)) if parts else None


OPERATIONS: dict[str, Route] = {}  # what fixtures call an operation, and its first route


def convert_content(content: Any) -> Any:
    """Return an item's content, or a part of it, as a chat has it."""
    if isinstance(content, list):
        return list(map(convert_content, list_objects(content)))
    kind = get_path(content, "type")
    if kind in ("input_text", "output_text", "refusal"):
        return {"type": "text", "text": content.get("text", content.get("refusal"))}
    if kind == "input_image" and content.get("image_url"):
        return {"type": "image_url", "image_url": {"url": content["image_url"]}}
    return content


def convert_item(item: Item) -> Item:
    """Return a message with what one item adds to a chat; nothing for what a chat has not."""
    kind, role = item.get("type") or "message", item.get("role")
    content = convert_content(item.get("content"))
    if kind == "message" and role == "assistant":
        return {"role": role, "content": join_text(content)}
    if kind == "message":
        return {"role": "system" if role == "developer" else role, "content": content}
    if kind == "function_call_output":
        result = {"role": "tool", "tool_call_id": item.get("call_id")}
        return {**result, "content": convert_content(item.get("output"))}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "reasoning":
        parts = list_objects(item.get("content") or item.get("summary"))
        texts = [str(part.get("text", "")) for part in parts]
        return {"role": "assistant", "reasoning": "".join(texts)}
    return {}


def convert_items(body: Item) -> list[Item]:
    """Return what a request to the Responses API says as the messages of a chat."""
    given, instructions = body.get("input"), body.get("instructions")
    messages = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    for item in filter(None, map(convert_item, list_objects(given))):
        last = messages[-1] if messages else {}
        is_more = last.get("role") == item["role"] == "assistant"
        if is_more and ("tool_calls" in item or "content" not in last):  # one message says both
            key, value = item.popitem()
            last[key] = last[key] + value if key in last else value
        else:
            messages.append(item)
    return messages


def names_model(got: str, wanted: str) -> bool:
    """Compare names of models: one without a slash may be followed by `-` and a digit."""
    more = got[len(wanted) :] if "/" not in wanted and got.startswith(wanted) else ""
    return got == wanted or (more[:1] == "-" and "0" <= more[1:2] <= "9")


# How a text that is there is compared with the one that is wanted, by match key.
TEXT_KEYS: dict[str, Callable[[str, str], bool]] = {
    **dict.fromkeys(
        ("userMessage", "systemMessage", "inputText", "toolResultContains"), operator.contains
    ),
    "model": names_model,
    **dict.fromkeys(
        ("toolCallId", "toolName", "responseFormat", "endpoint", "context", "testId"), operator.eq
    ),
}


def holds_text(key: str, wanted: Any, got: Any) -> bool:
    """Compare a text, or any of several, with a text, all of a list, or a pattern."""
    if isinstance(got, tuple):
        return any(holds_text(key, wanted, each) for each in got)
    if not isinstance(got, str):
        return False
    if isinstance(wanted, list):
        return all(each in got for each in wanted)
    if isinstance(wanted, (Pattern, re.Pattern)):
        return bool(wanted.search(got))
    return TEXT_KEYS[key](got, wanted)


# What is as good as another one of its kind where a request differs from a fixture in it alone.
VOLATILE = {
    r"(?i)\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b": "<uuid>",
    r"\b[0-9]{4}-[01][0-9]-[0-3][0-9](?=T|\b)": "<date>",
    r"(?:T|\b)[0-2][0-9]:[0-5][0-9](?::[0-5][0-9](?:\.[0-9]+)?)?"
    r"(?:Z|[+-][0-2][0-9]:?[0-5][0-9])?\b": "<time>",
}


class Normaliser:
    """Takes out of requests and fixtures what is not compared.

    given     patterns, or a function that returns of a request's body what is compared
    is_loose  what is volatile is as good as another; texts must be equal then
    """

    def __init__(self, given: Any = (), more: Iterable[str] = (), is_loose: bool = False) -> None:
        self.change, self.is_loose = given if callable(given) else None, is_loose
        own = [given] if isinstance(given, (str, re.Pattern)) else () if self.change else given
        patterns = {**dict.fromkeys([*own, *more], ""), **(VOLATILE if is_loose else {})}
        self.is_idle = not (patterns or self.change)
        try:
            self.patterns = [(re.compile(pattern), patterns[pattern]) for pattern in patterns]
        except (re.error, TypeError) as error:
            raise ValueError(f"normalise: {[*patterns]!r:.100}: {error}") from None

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return list(map(self, value))
        if isinstance(value, str):
            for pattern, text in self.patterns:
                value = pattern.sub(text, value)
        return value


COMPARES_ALL = Normaliser()


def contains_json(got: Any, wanted: Any) -> bool:
    """Compare JSON where `wanted` may leave out keys and the end of lists."""
    if isinstance(got, Upload):
        got = redact(got)
    if isinstance(wanted, dict):
        return isinstance(got, dict) and all(
            key in got and contains_json(got[key], value) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        long_enough = isinstance(got, list) and len(got) >= len(wanted)
        return long_enough and all(map(contains_json, got, wanted))
    return bool(got == wanted) and isinstance(got, bool) == isinstance(wanted, bool)


def holds_key(key: str, wanted: Any, facts: MatchFacts) -> bool:
    """Tell whether a request has what a fixture wants under one match key."""
    if key == "not":
        return not all(holds_key(inner, wanted[inner], facts) for inner in wanted)
    if not facts.normaliser.is_idle:
        wanted = facts.normaliser(wanted)
        if facts.normaliser.is_loose and key in TEXT_KEYS and isinstance(wanted, str):
            return bool(facts[key] == wanted)
    if key == "headers":
        sent = facts[key]
        return all(holds_text("context", wanted[name], sent.get(name)) for name in wanted)
    if key in TEXT_KEYS:
        return holds_text(key, wanted, facts[key])
    return contains_json(facts[key], wanted)


# What does not change what a chat says, so that it does not tell two of them apart.
UNSAID_FIELDS = frozenset(("stream", "stream_options", "user"))
COMPARABLE = make_encoder(
    sort_keys=True, default=lambda file: hashlib.sha256(file.data).hexdigest()
)


def say_body(kind: str, body: Item) -> Item:
    return {name: body[name] for name in body if kind != "chat" or name not in UNSAID_FIELDS}


def digest_body(kind: str, body: Item) -> str:
    return hashlib.sha256(COMPARABLE(say_body(kind, body)).encode("utf-8", "replace")).hexdigest()


class MatchFacts(dict):  # type: ignore[type-arg]
    """What fixtures ask about a request, by match key; a prompt counts as one user message."""

    answer: Any = None  # an iterator's

    def __init__(self, kind: str, request: Request, normaliser: Normaliser = COMPARES_ALL) -> None:
        body, headers = request.body, request.headers
        if not normaliser.is_idle:
            body = normaliser(normaliser.change(copy_json(body)) if normaliser.change else body)
        known = OPERATIONS.get(kind)
        asked = body.get(known.prompt or known.input) if known is not None else None
        asked = " ".join(map(str, asked)) if isinstance(asked, list) else asked
        is_chat = kind != "response"
        messages = list_objects(body.get("messages")) if is_chat else convert_items(body)
        if known is not None and known.prompt:
            messages = [{"role": "user", "content": asked}]
        said = [(message.get("role"), join_text(message.get("content"))) for message in messages]
        users = [text for role, text in said if role == "user" and isinstance(text, str)]
        system = [text for role, text in said if role == "system" and isinstance(text, str)]
        turns = [role for role, _ in said if role in ("user", "tool")]
        last = messages[-1] if messages and messages[-1].get("role") == "tool" else {}
        tools = [each.get("function") or each for each in list_objects(body.get("tools"))]
        format = body.get("response_format") or get_path(body, "text", "format")
        is_socket = request.route is not None and request.route.status == 101
        self.is_handshake = request.turn is None if is_socket else None
        self.request, self.kind, self.normaliser = request, kind, normaliser
        self.messages = messages or ([{"role": "input", "content": asked}] if asked else [])
        self.test = headers.get("x-test-id", "")
        super().__init__(
            endpoint=(kind, f"{request.method} {request.path}"),
            userMessage=users[-1] if users else None,
            systemMessage="\n".join(system) or None,
            inputText=asked,
            toolCallId=last.get("tool_call_id"),
            toolResultContains=join_text(last.get("content")),
            toolName=tuple(get_path(tool, "name") for tool in tools),
            model=body.get("model"),
            responseFormat=get_path(format, "type"),
            hasToolResult=turns[-1:] == ["tool"],
            context=headers.get("x-aimock-context"),
            testId=self.test or None,
            turnIndex=sum(role == "assistant" for role, _ in said),
            body=body,
            headers=headers,
        )

    def __missing__(self, key: str) -> str:
        return digest_body(self.kind, self["body"])


DECODE_BASE64 = functools.partial(base64.b64decode, validate=True)


PATTERN = Keys(Field("pattern!", str, test=("a regular expression that compiles", re.compile)))


MAX_MS = 86_400_000
BASE64 = ("base64", DECODE_BASE64)
PLAIN_MATCH = Keys(
    *[Field(key, str, dict, fields=PATTERN) for key in TEXT_KEYS],
    Field("systemMessage", str, dict, list, low=1, fields=PATTERN, each=Field("", str)),
    "hasToolResult:bool body:dict bodyDigest:64..64",
    Field("headers", dict, each=Field("", str, dict, fields=PATTERN)),
)
MATCH = Keys(
    *PLAIN_MATCH.values(),
    Field("not", dict, low=1, fields=PLAIN_MATCH),
    "turnIndex,sequenceIndex:int:0..",
)
CHAOS: dict[str, Item] = {  # what each rate's hit does, as options; the first wins
    "dropRate": {"status": 500},
    "malformedRate": {"malformed": True},
    "rateLimitRate": {"status": 429},
    "disconnectRate": {"disconnectAfterChunks": 0},
}


def check_after(place: str) -> None:
    if place not in ("toolName", "tool_name") and not re.match("(?s)text:.", place):
        raise ValueError


# What happens to a stream after so many chunks, counted from a place where one is named.
STRIKES = (
    "disconnectAfterChunks", "truncateAfterChunks", "errorAfterChunks", "malformedAfterChunks",
    "stallAfterChunks", "endAfterChunks",
)  # fmt: skip
QUIET_OPTIONS = {"times", "chunkSize", "chunkSizes", "shouldRetry"}  # that are no fault
STRIKE_PLACES = ("after", "in", "before")
OPTIONS = Keys(
    # Numbers that may be floats stay as they were written: 5 is not made 5.0.
    f"latency,disconnectAfterMs:int|float:0..{MAX_MS} replaySpeed:int|float:0.001..",
    f"{','.join(STRIKES)}:int:0.. chunkSize,times,truncateAfterChunks:int:1..",
    "chunkSizes:list[int:1..]:1..",
    "shouldRetry,malformed,empty:bool",
    Field("after", str, test=("text:... or toolName", check_after)),
    f"""\
in=arguments before=finish|usage|done insert
streamingProfile:dict
  ttft:int|float:0..{MAX_MS} tps:int|float:0.001.. jitter:int|float:0..1
recordedTimings:dict
  ttftMs,totalDurationMs:int|float:0..{MAX_MS} interChunkDelaysMs:list[int|float:0..{MAX_MS}]
chaos:dict
  latencyMs:int|float:0..{MAX_MS} {",".join(CHAOS)}:int|float:0..1""",
)
TYPES_BY_KEY: dict[str, ResponseType] = {}  # where keys tell of two types, the later is meant
FOREIGN = "-openRouterProcessing,metadata"
RESPONSE = Keys(*OPTIONS.values(), FOREIGN)  # and the rows of all types: a header mixes them
ENTRY = Keys(
    Field("match!", dict, fields=MATCH),
    Field("response", dict, fields=RESPONSE),
    *OPTIONS.values(),
    FOREIGN,
)
FIXTURE_FILE = Keys(
    "fixtures!:list models:dict exactTurns:bool",
    Field("normalise", list, each=Field("", str, test=("a regular expression", re.compile))),
    "-$schema,$comment,meta",
)

OWN_MODEL = Keys(  # one that the catalogue lacks, or has otherwise
    f"type={'|'.join(LISTED_TYPES)} engine={'|'.join(ENGINE_NAMES)}",
    f"contextLength:int:1.. dimensions:int:1..{MAX_DIMENSIONS}",
    f"organization displayName traits:list[str={'|'.join(TRAITS)}] price:dict\n"
    "  input,output,cachedInput:int|float:0..",
)

OVERRIDES = Fields("""\
id model finishReason role created:int:0.. usage:dict
  prompt_tokens,completion_tokens,total_tokens,cached_tokens,reasoning_tokens:int|float:0..
  input_tokens,output_tokens:int|float:0.. prompt_tokens_details,completion_tokens_details:dict
  input_tokens_details,output_tokens_details:dict""")
USAGE_KEYS = OVERRIDES.nested["usage"]
RAW = Keys("text", Field("b64Json", str, test=BASE64), "contentType")


def to_snake(name: str) -> str:
    return re.sub("[A-Z]", lambda found: "_" + found[0].lower(), name)


def to_camel(name: str) -> str:
    return re.sub("(?!^)_([a-z])", lambda found: found[1].upper(), name)


def snake_keys(values: Item) -> Item:
    return {to_snake(key): value for key, value in values.items()}


def dump_json(value: Any) -> str:
    return value if isinstance(value, str) else ENCODE(value)


def normalise_message(said: Item) -> Item:
    """Return text and calls as blocks in stream order, and by kind."""
    spoken = [{"type": "text", "text": said["content"]}] if "content" in said else []
    texts, calls, blocks = [], [], []
    for block in said.get("blocks") or spoken + said.get("toolCalls", []):
        if block.get("type") == "text":
            texts.append(dump_json(block["text"]))
            blocks.append({"type": "text", "text": texts[-1]})
        else:
            made = {"type": "tool_call", "arguments": dump_json(block["arguments"])}
            calls.append({"id": None, **block, **made})
            blocks.append(calls[-1])
    more = snake_keys({key: said[key] for key in ("reasoning", *OVERRIDES) if key in said})
    content = "".join(texts) if texts else None
    return {"reasoning": None, "blocks": blocks, "content": content, "tool_calls": calls, **more}


def normalise_error(said: Item) -> Item:
    return {"status": 500, **snake_keys(said)}


def normalise_body(said: Item) -> Item:
    """Return a scripted body as the arguments of `Reply`."""
    reply: Item = {key: said[key] for key in ("status", "headers") if key in said}
    if "json" in said:
        return {**reply, "body": ENCODE(said["json"]).encode()}
    raw = {"text": "", "contentType": "application/octet-stream", **said["raw"]}
    data = DECODE_BASE64(raw["b64Json"]) if "b64Json" in raw else raw["text"].encode()
    return {**reply, "body": data, "content_type": raw["contentType"]}


class ResponseType:
    """One thing that a fixture may say; `@route(response=...)` names the one of an operation.

    normalise   returns what the composers read
    told_by     the keys of which one tells that it is meant (default: the first)
    everywhere  it fits every operation, and routes that are none
    """

    def __init__(
        self,
        name: str,
        fields: Fields,
        normalise: Callable[[Item], Any] = dict,
        told_by: str = "",
        everywhere: bool = False,
    ) -> None:
        self.name, self.fields, self.normalise = name, fields, normalise
        self.everywhere = everywhere
        RESPONSE.update(fields)
        RESPONSE.ignored |= fields.ignored
        keys = told_by or next(iter(fields), "")
        TYPES_BY_KEY.update(dict.fromkeys(keys.split(), self))

    def fits(self, kind: str) -> bool:
        return self.everywhere or (kind in OPERATIONS and OPERATIONS[kind].response is self)


GENERATED = ResponseType("generated", Keys(), everywhere=True)  # the usual answer
ERROR = ResponseType(
    "error",
    Keys(
        "error:dict\n  message!:str|dict type param code -metadata",
        f"id retryAfter:int|float:0..{MAX_MS} retryAfterDate:bool status:int:200..4999",
        "-fallthrough",
    ),
    normalise_error,
    told_by="status",
    everywhere=True,
)
TEXT = ResponseType(
    "text",
    Keys(
        """\
content:str|dict|list reasoning
toolCalls:list
  name! id arguments!:str|dict|list
blocks:list:1..
  type!=text|toolCall
  @text
    text!
  @toolCall
    name! id arguments!:str|dict|list
-systemFingerprint,provider,nativeFinishReason,webSearches,reasoningSignature,redactedThinking""",
        *OVERRIDES.values(),
    ),
    normalise_message,
    told_by="content toolCalls blocks",
)
BODY = ResponseType(
    "body",
    Keys(
        "json:str|int|float|bool|list|dict status:int:200..4999",
        Field("raw", dict, low=1, fields=RAW),
        "headers:dict[str] -billableUnits",
    ),
    normalise_body,
    told_by="json raw",
    everywhere=True,
)
TYPES_BY_KEY["error"] = ERROR  # whatever else there is


def find_response_type(keys: Iterable[str]) -> ResponseType | None:
    return next((TYPES_BY_KEY[key] for key in reversed(TYPES_BY_KEY) if key in keys), None)


def suggest_operation(name: str) -> str:
    path = re.sub(r"^/?(?:v[0-9]/)?", "", name.lower()).replace(".", "/").rstrip("/")
    paths = {known.path[4:]: kind for kind, known in OPERATIONS.items()}
    return f", did you mean {paths[path]}?" if path in paths else suggest(name, OPERATIONS)


def as_json(value: Any) -> Any:
    """Return what JSON can say of a pattern or a model; all else as it is."""
    if isinstance(value, re.Pattern):
        flags = "".join(flag for flag in "aimsx" if value.flags & re.RegexFlag[flag.upper()])
        return {"pattern": f"(?{flags}){value.pattern}" if flags else value.pattern}
    dump = None if isinstance(value, type) else getattr(value, "model_dump", None)
    return dump(mode="json") if callable(dump) else value


def clean(value: Any, row: Field, ignored: set[str]) -> Any:
    """Copy JSON without nulls, comments and what its table ignores, whose names are noted."""
    value, each = as_json(value), row.each or row
    if row.test is BASE64 and isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, (list, tuple)):
        return [clean(item, each, ignored) for item in value]
    if not isinstance(value, dict):
        return value
    if row.fields is None:
        return {key: clean(item, each, ignored) for key, item in value.items()}
    copy = {}
    for given, item in value.items():
        key = to_camel(given) if row.fields.closed else given
        if key in row.fields.ignored and key not in row.fields:
            ignored.add(key)
        elif given[:1] != "_" and (item is not None or key == "json"):  # no comment
            copy[key] = clean(item, row.fields.get(key, row), ignored)
    return copy


def check_clean(value: Any, fields: Fields, place: str, ignored: set[str]) -> Any:
    """Return a clean copy; raise ValueError naming the first place that is wrong."""
    row = Field("", dict, fields=fields)
    try:
        return row.check(clean(value, row, ignored))
    except ApiError as error:
        reason = error.facts.get("reason") or "is missing"
        raise ValueError(f"{place}{error.param}: {reason}") from None


def check_response(said: Item, place: str, ignored: set[str]) -> ResponseType:
    """Return the type of a response; refuse what it cannot say, note what it ignores."""
    type = find_response_type(said)
    if type is None:
        keys = ", ".join(TYPES_BY_KEY)
        raise ValueError(f"{place}: has none of the keys that say what to answer: {keys}")
    foreign = sorted(said.keys() - type.fields.keys())
    ignored.update(foreign)
    reason = f"does not go with a response of type {type.name}"
    wrong = {key: reason for key in foreign if key not in type.fields.ignored}
    # No bound of its row: others say both sound and no calls.
    empty = ["toolCalls"] if type is TEXT and said.get("toolCalls") == [] else []
    for image in list_objects([said.get("image"), *said.get("images", ())]):
        empty += [] if image.keys() & {"url", "b64Json"} else ["image"]
    wrong.update(dict.fromkeys(empty, "says nothing"))
    if len({isinstance(item, list) for item in said.get("embedding", ())}) > 1:
        wrong["embedding"] = "must be numbers, or a list of numbers each"
    status = said.get("status", 400)
    if status < 400 and type is ERROR and "error" not in said:
        wrong["status"] = f"must be at least 400, not {status}"
    if status > 999 and not (type is ERROR and is_close_code(status)):
        wrong["status"] = f"{status} is neither a status nor the code of a close"
    if wrong:
        raise ValueError("; ".join(f"{place}.{key}: {wrong[key]}" for key in wrong))
    return type


def parse_entry(given: Any, place: str, ignored: set[str]) -> tuple[ResponseType, Item]:
    """Return the type of a fixture's response, and its entry, checked and clean."""
    entry, type = check_clean(given, ENTRY, place, ignored), GENERATED
    if "response" in entry:
        type = check_response(entry["response"], place + ".response", ignored)
    elif entry.keys() == {"match"} and not ("response" in given or "endpoint" in entry["match"]):
        raise ValueError(f"{place}: needs a response, or an option such as latency")
    name = entry["match"].get("endpoint", " ")
    is_kind = isinstance(name, str) and " " not in name  # no pattern, no "POST /v1/files"
    if is_kind and not type.fits(name):
        reason = f"{name} cannot serve a response of type {type.name}"
        if name not in OPERATIONS:
            reason = f"{preview(name)} is unknown{suggest_operation(name)}"
        raise ValueError(f"{place}.match.endpoint: {reason}")
    try:
        json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(f"{place}: holds what JSON cannot say: {error}") from None
    return type, entry


def compile_pattern(wanted: Any, trusted: bool) -> Any:
    """Compile `{"pattern": ...}`; `re` has what the bounded matcher cannot read of an author."""
    if not isinstance(wanted, dict):
        return wanted
    source = wanted["pattern"]
    try:
        with bound_work():
            return Pattern(source)
    except Unsatisfiable as error:
        if trusted:
            return re.compile(source)
        reason = f"cannot be matched with bounded work, so it is taken from files alone: {error}"
    raise ValueError(f"the pattern {preview(source)} {reason}")


def compile_match(match: Item, trusted: bool) -> Item:
    """Return a match whose patterns are compiled."""
    wanted = {key: match[key] for key in PLAIN_MATCH if key in match}
    for key in wanted.keys() & TEXT_KEYS.keys():
        wanted[key] = compile_pattern(wanted[key], trusted)
    if "headers" in wanted:
        headers = wanted["headers"]
        wanted["headers"] = {n.lower(): compile_pattern(headers[n], trusted) for n in headers}
    if "not" in match:
        wanted["not"] = compile_match(match["not"], trusted)
    return wanted


TEMPLATE = lazy_regex(r"\{\{\s*([A-Za-z]\w*)((?:\.[\w-]+)*)\s*\}\}", re.ASCII)
QUOTABLE = ("model", "systemMessage", "inputText", "body", "userMessage")  # no key of a header


def shorten_path(path: str) -> str:
    with contextlib.suppress(ValueError, OSError):  # another drive, no working directory
        near = os.path.relpath(path)
        return path if near.startswith("..") else near
    return path


async def settle(value: Any) -> Any:
    return await value


def run_code(source: str, code: Callable[..., Any], *args: Any) -> Any:
    """Call a test's code; what it raises is told by its place, and no client asks again."""
    try:
        value = code(*args)
        if hasattr(value, "__await__"):
            import asyncio

            value = asyncio.run(settle(value))
        return value
    except BaseException as error:  # SystemExit, too
        import traceback

        own = run_code.__code__.co_filename
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != own]
        place = "".join(f", at {shorten_path(f.filename)}:{f.lineno}" for f in frames[-1:])
        reason = f"{source} raised {type(error).__name__}: {error}{place}"
    failure = ApiError("script_failed", reason=reason)
    failure.headers["x-should-retry"] = "false"
    raise failure


class SharedIterator:
    """An iterator whose answers each test has in turn, asked when one is needed."""

    def __init__(self, iterator: Iterator[Any], source: str) -> None:
        self.iterator, self.source = iterator, source
        self.known: list[Any] = []
        self._returned: dict[str, list[Any]] = BoundedDict(MAX_TESTS)  # by refused requests
        self._lock = threading.Lock()  # of this iterator alone: its code may take its time

    def take(self, test: str, place: int) -> Any:
        """Return a test's next answer, at a place; raise IndexError where there is none."""
        with self._lock:
            if returned := self._returned.get(test):
                return returned.pop(0)
            while place >= len(self.known):
                answer = run_code(self.source, next, self.iterator, self)
                if answer is self:
                    raise IndexError
                self.known.append(answer)
            return self.known[place]

    def give_back(self, test: str, answer: Any) -> None:
        with self._lock:
            self._returned[test] = [*self._returned.get(test, ()), answer]


def show_difference(wanted: Any, got: Any) -> str:
    """Return where two long values differ; a wanted text is looked for by its first letters."""
    one, other = (v if isinstance(v, str) else preview(v, MAX_COMPARED) for v in (wanted, got))
    if len(one) <= 60 and (len(other) <= 60 or isinstance(got, str)):
        return ""
    other = other[max(0, other.find(one[:20])) :]
    alike = itertools.takewhile(bool, map(operator.eq, one, other))
    start = max(0, len([*alike]) - 40)
    parts = (text[start : start + MAX_SHOWN].replace("\n", "\\n") for text in (one, other))
    return "\n".join(map("{} {}".format, "-+", parts))


# Why a fixture does not answer, where it is not what one key wants.
OBSTACLES = {
    "": "it matches",
    "response": "it answers {kinds}, and this is {kind}",
    "handshake": "of a socket a status refuses the handshake, all else is a turn",
    "match.not": "what it excludes holds",
    "match.sequenceIndex": "it was not the turn of {sequence} {0.sequence}",
    "when": "its function says no",
    "times": "it is used up: served {0.times} of {0.times}",
    "shadowed": "it matched, but {by.source}{later} was served",
}
# What sorts fixtures: a header's, limited ones, steps (a reply(), a POST; the last first), files.
FIRST, LIMITED, LAST = -math.inf, -sys.maxsize, 1


class Fixture:
    """One scripted answer: when it is served, what it says, and how it travels.

    source  "reply() at FILE:LINE", "run time[3]" (of a POST), "header" or "file NAME[3]"
    when    is asked with the request
    normal  what it says, as the composers read it
    """

    number = -1  # among those added at run time
    rank: float = FIRST
    relaxed = False  # a turn near its own will do, as aimock has it in files
    owner: Fixtures | None = None
    list_calls: Callable[[], list[Call]] = list
    answers: Any = None  # a function of the request, or an iterator, that gives the content

    def __init__(self, given: Any, place: str, source: str = "", when: Any = None) -> None:
        """Read an entry; raise ValueError naming the place in it that is wrong."""
        self.ignored: set[str] = set()  # keys that only others read
        self.type, entry = parse_entry(given, place, self.ignored)
        self.entry, self.source, self.when = entry, source, when
        self.counts: dict[str, int] = BoundedDict(MAX_TESTS)  # how often it was served, by test
        self.sequel: dict[str, int] = self.counts  # the same of all fixtures of its sequence
        self.spell = to_snake if place.endswith("()") else str  # as its author writes keys
        self.said: Item = entry.get("response", {})
        content = get_path(given, "response", "content")
        self.is_model = as_json(content) is not content  # of pydantic, or the like
        self.normal: Item = self.type.normalise(self.said)
        self._quotes = self.type is TEXT and "{{" in ENCODE(self.said)
        self.options = {key: entry[key] for key in OPTIONS if key in entry}
        is_error, late = self.type is ERROR, {"errorAfterChunks", *STRIKE_PLACES}
        # It is the reply of any operation, or closes a socket; a late error is neither.
        self.is_whole = self.type is BODY or (is_error and late.isdisjoint(self.options))
        self.closes = is_error and self.normal["status"] > 999
        self.times: int | None = self.options.get("times")
        # With `in`, engines that send all arguments at once cut them, too.
        size = self.options.get("chunkSize", int("in" in self.options))
        self.chunk_sizes: list[int] = self.options.get("chunkSizes") or ([size] if size else [])
        self.faulty = not self.options.keys() <= QUIET_OPTIONS
        self.match: Item = entry["match"]
        self.turn: int | None = self.match.get("turnIndex")
        self.sequence: int | None = self.match.get("sequenceIndex")
        alike = {key: self.match[key] for key in self.match if key != "sequenceIndex"}
        self.group = (CANONICAL(alike), when)  # what one sequence shares
        try:
            self.wanted = compile_match(self.match, source not in ("run time", "header"))
        except ValueError as error:
            raise ValueError(f"{place}.match: {error}") from None
        # A text without which it cannot match, to pass it over at a glance.
        keys = (key for key in TEXT_KEYS if isinstance(self.match.get(key), str))
        self.needle_key = next(keys, "")
        self.needle: str = self.match.get(self.needle_key, "")

    def fits(self, kind: str) -> bool:
        if self.closes:
            return kind in OPERATIONS and OPERATIONS[kind].status == 101
        has_text = self.type is not TEXT or self.normal["content"] is not None
        return self.type.fits(kind) and (has_text or kind != "completion")

    def render(self, kind: str, request: Request) -> Item:
        """Return the normal form with each known `{{path}}` quoting the request, but its keys."""
        if not self._quotes:
            return self.normal
        facts = MatchFacts(kind, request)

        def quote_fact(found: re.Match[str]) -> str:
            key = "userMessage" if found[1] == "lastUserMessage" else found[1]
            if key not in QUOTABLE:
                return found[0]
            fact = get_path(facts[key], *found[2].split(".")[1:])
            return "" if fact is None else ENCODE(dump_json(fact))[1:-1]

        return normalise_message(json.loads(TEMPLATE.sub(quote_fact, ENCODE(self.said))))

    def find_obstacle(self, facts: MatchFacts) -> str:
        """Return why it does not match; nothing where it does."""
        if not self.fits(facts.kind):
            return "response"
        if facts.is_handshake not in (None, self.is_whole):
            return "handshake"
        for key, wanted in self.wanted.items():
            if not holds_key(key, wanted, facts):
                return f"match.{key}"
        if not self.relaxed and self.turn not in (None, facts["turnIndex"]):
            return "match.turnIndex"
        says_no = self.when and not run_code(self.source, self.when, facts.request)
        return "when" if says_no else ""

    def find_use(self, test: str) -> str:
        """Return why it is used up; nothing where it is not."""
        if self.sequence not in (None, self.sequel.get(test, 0)):
            return "match.sequenceIndex"
        is_used_up = self.times is not None and self.counts.get(test, 0) >= self.times
        return "times" if is_used_up else ""

    def count_holding(self, facts: MatchFacts) -> int:
        if not self.fits(facts.kind):
            return -1
        return sum(holds_key(key, wanted, facts) for key, wanted in self.wanted.items())

    def explain(self, facts: MatchFacts, differs: str, by: Fixture | None, with_diff: bool) -> Item:
        """Say how a request differs, or what was served instead."""
        if differs == "shadowed" and self.turn not in (None, facts["turnIndex"]):
            differs = "match.turnIndex"
        if differs in OBSTACLES:
            later = ", added later," if by is not None and by.number > self.number >= 0 else ""
            reason = OBSTACLES[differs].format(
                self,
                by=by,
                later=later,
                kinds=", ".join(filter(self.fits, OPERATIONS)),
                kind=facts.kind or "another operation",
                sequence=self.spell("sequenceIndex"),
            )
        else:
            reason = self._compare(differs[6:], facts, with_diff)
        return {"fixture": self.source, "differs": differs, "reason": reason}

    def _compare(self, key: str, facts: MatchFacts, with_diff: bool) -> str:
        name, wanted, got = self.spell(key), self.match[key], facts[key]
        if key == "headers":
            got = {name.lower(): facts.request.headers.masked.get(name) for name in wanted}
        elif key == "body":
            got = redact({name: got[name] for name in wanted if name in got})
        if diff := show_difference(wanted, got) if with_diff else "":
            return f"{name} differs:\n{diff}\n"
        if got in (None, ()):
            return f"there is no {name}, wanted {preview(wanted)}"
        verb, hint = "is not", ""
        if isinstance(wanted, dict) and wanted.keys() == {"pattern"}:
            verb, wanted = "does not match the pattern", wanted["pattern"]
        elif TEXT_KEYS.get(key) is operator.contains:
            verb = "does not contain"
            if isinstance(wanted, str) and wanted.lower() in got.lower():
                hint = ", but it does where case is ignored"
        return f"{name} {preview(got)} {verb} {preview(wanted)}{hint}"

    @property
    def calls(self) -> list[Call]:
        """The recorded calls that it answered."""
        return [call for call in self.list_calls() if call.answered_by is self]

    def remove(self) -> None:
        if self.owner is not None:
            self.owner.remove(self)

    @property
    def served(self) -> int:
        return sum(self.counts.values())

    def count(self, test: str, change: int) -> int:
        """Count that it is served, or not; return how often it was before."""
        before = self.counts.get(test, 0)
        self.counts[test] = before + change
        if self.sequel is not self.counts:
            self.sequel[test] = self.sequel.get(test, 0) + change
        return before

    def __repr__(self) -> str:
        return f"<Fixture {self.source}: {self.type.name}, served {self.served} times>"

    def describe(self) -> Item:
        more = {} if self.number < 0 else {"number": self.number}
        if self.answers or self.when:  # which JSON cannot say
            more["has_code"] = True
        return {**self.entry, **more, "source": self.source, "served": self.served}


FOREIGN_ENDPOINTS = lazy_regex(r"(audio-gen|elevenlabs-.+|fal|fal-audio|openai-live|realtime.*)\Z")


def parse_models(rows: Mapping[str, Any]) -> dict[str, Model]:
    """Return the models that a script adds or changes, by their ids."""
    models = {}
    for id, row in rows.items():
        told = snake_keys(check_clean(row, OWN_MODEL, f"models[{id!r}]", set()))
        traits = ["known", *told["traits"]] if "traits" in told else []
        price = told.pop("price", {})
        prices = [price.get(key, 0) for key in ("input", "output", "cachedInput")]
        models[id] = Model(**{"type": "chat", **told, "id": id, "prices": prices, "traits": traits})
    return models


def read_file(data: Any) -> Item:
    """Return a file's JSON as an object; a list of entries, or a single one, is a file too."""
    if isinstance(data, dict) and data.keys() & {"match", "response"}:
        data = [data]
    file = {"fixtures": data} if isinstance(data, list) else data
    if isinstance(file, dict) and "models" in file:
        file = {"fixtures": [], **file}
    read: Item = check_clean(file, FIXTURE_FILE, "file", set())
    return read


class Loaded(list):  # type: ignore[type-arg]
    """Fixtures, and what came with them: models, warnings, patterns of what is not compared."""

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, Model] = {}
        self.warnings: list[str] = []
        self.normalise: list[str] = []

    def add(self, more: Loaded) -> None:
        self += more
        self.models.update(more.models)
        self.warnings += more.warnings
        self.normalise += more.normalise


def parse_fixtures(data: Any, place: str = "") -> Loaded:
    """Build the fixtures of a file's JSON; raise ValueError with a line for all that is wrong."""
    loaded, problems = Loaded(), []
    ignored: set[str] = set()
    file: Item = {"fixtures": []}
    try:
        file = read_file(data)
        loaded.models = parse_models(file.get("models", {}))
        if loaded.models and not place:
            raise ValueError("models: are for files and TogetherAiServer(models=...) alone")
    except ValueError as error:
        problems.append(f"{error}")
    loaded.normalise = file.get("normalise", [])
    is_relaxed = bool(place or len(file["fixtures"]) > 1) and not file.get("exactTurns")
    for index, entry in enumerate(file["fixtures"]):
        at = f"fixtures[{index}]"
        name = str(get_path(entry, "match", "endpoint"))
        said = find_response_type(get_path(entry, "response") or ())
        if FOREIGN_ENDPOINTS.match(name) and (name != "realtime" or said is TEXT):
            ignored.add(f"endpoint {name}")
            continue
        try:
            fixture = Fixture(entry, at, f"file {place}[{index}]" if place else "run time")
        except ValueError as error:
            problems.append(f"{error}")
            continue
        fixture.relaxed = is_relaxed
        ignored |= fixture.ignored
        loaded.append(fixture)
    prefix = f"{place}: " if place else ""
    if problems:
        raise ValueError("\n".join(prefix + problem for problem in problems))
    if ignored:
        loaded.warnings = [
            f"{prefix}ignored, for other providers only: {', '.join(sorted(ignored))}"
        ]
    return loaded


def list_fixture_files(path: str) -> list[str]:
    """Return the file itself, or the JSON files of a folder, in the order of their names."""
    if not os.path.isdir(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path}: is neither a file nor a folder")
        return [path]
    tree = sorted(os.walk(path), key=lambda row: row[0].split(os.sep))
    names = [os.path.join(folder, name) for folder, _, files in tree for name in sorted(files)]
    # No FIFO, no link to nowhere.
    return [name for name in names if name.endswith(".json") and os.path.isfile(name)]


def load_json(path: str, name: str) -> Any:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: is not JSON: {error}") from None


def load_fixtures(*paths: str) -> Loaded:
    """Load files or folders; raise ValueError with a line for all that is wrong in all of it."""
    loaded, problems = Loaded(), []
    for path, full in ((each, file) for each in paths for file in list_fixture_files(each)):
        name = os.path.basename(path) if full == path else os.path.relpath(full, path)
        name = name.replace(os.sep, "/")
        try:
            loaded.add(parse_fixtures(load_json(full, name), name))
        except ValueError as error:
            problems.append(f"{error}")
    if problems:
        raise ValueError("\n".join(problems))
    return loaded


def find_unreachable(fixtures: Iterable[Fixture]) -> list[str]:
    """Return a sentence for each fixture that can never answer, since another does."""
    found = []
    first: dict[Any, Fixture] = {}
    for fixture in (each for each in fixtures if each.sequence is None):
        type, same = fixture.type.name, fixture.group[0]
        own = type if fixture.fits("completion") else f"{type} without content"
        wider = [{}, {"endpoint": fixture.match.get("endpoint")}] if fixture.turn is None else []
        keys = itertools.product((type, own), (same, *map(CANONICAL, wider)))
        other = next(filter(None, map(first.get, keys)), None)
        if other is not None:
            how = "the same" if other.match == fixture.match else "a wider"
            found.append(f"{fixture.source}: never answers, since {other.source} has {how} match")
        elif fixture.times is None:
            first[own, same] = fixture
    return found


def stamp_files(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return the names, times and sizes of fixture files, which differ when one changes."""
    stamps = []
    for name in itertools.chain(*map(list_fixture_files, paths)):
        with contextlib.suppress(OSError):
            status = os.stat(name)
            stamps.append((name, status.st_mtime_ns, status.st_size))
    return stamps


def parse_header(text: str) -> Fixture:
    """Build the fixture of a header: one entry, or a response and options."""
    with contextlib.suppress(UnicodeError):  # header bytes are read as latin-1, curl sends UTF-8
        text = text.encode("latin-1").decode()
    at = "X-Parlel-Fixture"
    try:
        entry = json.loads(text)
        if not isinstance(entry, dict) or entry.keys().isdisjoint(("match", "response")):
            entry = check_clean(entry, RESPONSE, at, set())
            said = {key: entry.pop(key) for key in [*entry] if key not in OPTIONS}
            entry.update({"response": said} if said else {})
        fixture = Fixture({"match": {}, **entry}, at, "header")
        fixture.sequence = None  # one request is no sequence
        return fixture
    except (ValueError, RecursionError) as error:
        raise ApiError("bad_fixture", reason=str(error)) from None


def answer_with(fixture: Fixture, facts: MatchFacts) -> Fixture:
    """Return the fixture that says what one, its iterator or its function says this time."""
    if fixture.answers is None:
        return fixture
    given = facts.answer
    if not isinstance(fixture.answers, SharedIterator):
        given = run_code(fixture.source, fixture.answers, facts.request)
    said = {to_camel(str(key)): given[key] for key in given} if isinstance(given, dict) else {}
    type = find_response_type(said)
    is_response = type is not None and all(
        key in type.fields and (said[key] is None or isinstance(said[key], type.fields[key].kinds))
        for key in said
    )
    said = given if is_response else {"content": given}  # all else is JSON
    entry = {"match": {}, "response": said, **fixture.options}
    answer: Fixture = run_code(fixture.source, Fixture, entry, "the answer", fixture.source)
    if not answer.fits(facts.kind):
        reason = f"{fixture.source} answers {facts.kind} with a response of type"
        raise ApiError("script_failed", reason=f"{reason} {answer.type.name}")
    return answer


def choose(fixtures: list[Fixture], turn: int) -> Fixture | None:
    """Choose among fixtures that all match, by the number of assistant messages so far.

    Turns that lie ahead come last. Else the lowest rank wins, and of that the nearest turn; one
    without a turn gives way to others of its rank, but not to an exact one that comes after it.
    """
    exact = {each.rank for each in fixtures if each.turn == turn}

    def prefer(each: Fixture) -> tuple[bool, float, float]:
        if each.turn is None:
            return False, each.rank, 0 if each.rank in exact else math.inf
        return each.turn > turn, each.rank, abs(each.turn - turn)

    return min(fixtures, key=prefer, default=None)


def explain_misses(
    misses: Iterable[Any], facts: MatchFacts, by: Fixture | None = None
) -> list[Item]:
    """Tell why each of them did not answer, the nearest first, and of those what differs."""
    known = [(each, each.find_obstacle(facts) if key is None else key) for each, key in misses]
    known.sort(key=lambda miss: -miss[0].count_holding(facts))
    return [
        fixture.explain(facts, differs, by, index < MAX_DIFFS)
        for index, (fixture, differs) in enumerate(known)
    ]


class Fixtures(Shared):
    """The fixtures of one server: which is served next, counted under one lock.

    Each is asked whether it matches and is not used up; of those, `choose()` takes the one of
    lowest rank: a header's, then those with `times` in the order they came, then the last
    that was added, then files. Turns that lie ahead come after all others.
    """

    def __init__(self, seed: int = 0, exact_turns: bool = False, normalise: Any = ()) -> None:
        self.seed = seed
        self.exact_turns = exact_turns  # in files, too
        self.normalise = normalise  # patterns, or a function of the body
        self._added: list[Fixture] = []
        self._arranged: Any = None
        self.replace_files(Loaded())
        self.watched: Sequence[str] = ()
        self._seen: list[tuple[str, int, int]] = []
        self.reset()

    @property
    def every(self) -> list[Fixture]:
        return [*self._added, *self.files]

    @property
    def slow(self) -> bool:
        """Whether one of them asks a pattern or a function."""
        return bool(self._arrange()[2])

    @property
    def empty(self) -> bool:
        return not (self._added or self.files)

    def reset(self, test: str | None = None) -> None:
        """Remove what was added at run time, and count again from zero; or a test's alone."""
        with self._lock:
            mine = [each for each in self.every if test in (None, each.match.get("testId"))]
            for each in self.every:
                each.counts.clear() if test is None else each.counts.pop(test, None)
            self.remove(*mine)
            if test is None:
                self._numbers, self.draws = itertools.count(), itertools.count(1)

    def remove(self, *fixtures: Fixture) -> None:
        """Remove fixtures that were added at run time; those of files stay."""
        gone = set(fixtures)
        with self._lock:
            self._added = [each for each in self._added if each not in gone]
            self._arranged = None

    def add(self, fixtures: Sequence[Fixture]) -> None:
        """Add fixtures in one step; raise ValueError where there are too many."""
        with self._lock:
            if len(self._added) + len(fixtures) > MAX_FIXTURES:
                raise ValueError(f"there may be at most {MAX_FIXTURES} fixtures; remove some")
            rank: float = LIMITED  # until one is not
            for fixture in fixtures:
                fixture.number = next(self._numbers)
                rank = rank if fixture.times is not None else -fixtures[0].number
                fixture.rank = rank
                if fixture.source == "run time":
                    fixture.source = f"run time[{fixture.number}]"
                fixture.owner = self
            self._added, self._arranged = [*self._added, *fixtures], None

    def load(self, path: str) -> Loaded:
        loaded = load_fixtures(path)
        self.files.add(loaded)
        self.replace_files(self.files)
        return loaded

    def replace_files(self, fixtures: Loaded) -> None:
        """Serve these fixtures of files from now on; what was served is forgotten."""
        with self._lock:
            self.files, self._arranged = fixtures, None
            self.normaliser = Normaliser(self.normalise, fixtures.normalise)
            self.loose = Normaliser(self.normalise, fixtures.normalise, is_loose=True)
            for fixture in fixtures:
                fixture.owner, fixture.rank = self, LAST

    def watch(self, paths: Sequence[str]) -> None:
        self.watched = paths
        self._seen = stamp_files(paths)

    def follow_files(self) -> None:
        """Load the watched files again if one has changed; what is wrong is told, not taken."""
        with self._lock:
            stamps = stamp_files(self.watched)
            if stamps == self._seen:
                return
            self._seen = stamps
            try:
                loaded = load_fixtures(*self.watched)
            except (OSError, ValueError) as error:
                complain(f"cannot load fixtures: {error}\n")
                return
            self.replace_files(loaded)
            complain(f"loaded {len(loaded)} fixtures again\n")

    # Which one is served

    def _arrange(self) -> Any:
        """Return the fixtures by rank, in runs by the key they look for, and if any is slow."""
        with self._lock:
            if self._arranged is None:
                sequences: dict[Any, dict[str, int]] = {}
                for each in self.every:
                    each.relaxed = each.relaxed and not self.exact_turns
                for each in [each for each in self.every if each.sequence is not None]:
                    each.sequel = sequences.setdefault(each.group, BoundedDict(MAX_TESTS))
                    for test, count in each.counts.items():
                        each.sequel[test] = each.sequel.get(test, 0) + count
                order = sorted(self.every, key=lambda each: each.rank)
                runs = itertools.groupby(order, key=lambda each: each.needle_key)
                needles = [(key, [(each.needle, each) for each in run]) for key, run in runs]
                slow = any(
                    each.when or each.answers or '"pattern"' in each.group[0] for each in order
                )
                self._arranged = order, needles, slow
            return self._arranged

    def find(self, facts: MatchFacts) -> tuple[Fixture | None, list[Any]]:
        """Return the fixture that answers, counted as served; and why the others do not."""
        order, needles, _ = self._arrange()
        own = facts.request.headers.get("x-parlel-fixture")
        if facts.normaliser.is_loose:  # as recordings are compared, which are in files
            own, order = None, [each for each in order if each.rank == LAST]
        likely = [parse_header(own)] if own else []
        if not facts.normaliser.is_idle:
            likely += order
            needles = []
        for key, run in needles:
            text = facts[key] if key else ""
            text = text if type(text) in (str, tuple) else ""
            likely += [each for needle, each in run if needle in text]
        # Patterns and functions may take their time: they are asked without the lock.
        found = {each: each.find_obstacle(facts) for each in likely}
        while True:
            with self._lock:
                reasons = {each: found[each] or each.find_use(facts.test) for each in found}
                matching = [each for each in found if not reasons[each]]
                chosen = choose(matching, facts["turnIndex"])
                if chosen is not None:
                    place = chosen.count(facts.test, 1)
            if chosen is None or not isinstance(chosen.answers, SharedIterator):
                break
            try:
                facts.answer = chosen.answers.take(facts.test, place)
                break
            except (IndexError, ApiError) as error:  # it has ended, or its code raised
                with self._lock:
                    chosen.count(facts.test, -1)
                if isinstance(error, ApiError):
                    raise
                chosen.times = len(chosen.answers.known)  # another one may answer
        reasons.update(dict.fromkeys(matching, "shadowed"))
        others = (each for each in order if each not in found)  # why is told when asked
        misses = (
            (each, reasons.get(each))
            for each in itertools.chain(found, others)
            if each is not chosen
        )
        return chosen, list(itertools.islice(misses, MAX_NEAR_MISSES))

    def give_back(self, fixture: Fixture, facts: MatchFacts) -> None:
        with self._lock:
            fixture.count(facts.test, -1)
        if isinstance(fixture.answers, SharedIterator):
            fixture.answers.give_back(facts.test, facts.answer)

    def miss_error(self, request: Request, misses: list[Item]) -> ApiError:
        reasons = [f" {miss['fixture']}: {miss['reason']}." for miss in misses]
        more = len(self.every) - len(misses)
        reasons += [f" And {more} more."] if more > 0 else []
        reason = "".join(reasons) or " There are no fixtures."
        return ApiError("no_fixture", method=request.method, path=request.path, reason=reason)

    def unused(self, test: str = "") -> list[Fixture]:
        mine = (each for each in self.every if not test or each.match.get("testId") == test)
        return [each for each in mine if not each.served]

    def describe(self) -> Item:
        every = [each.describe() for each in self.every]
        return {"fixtures": every, "count": len(every)}


# === Faults ===

NAMED_BYTES = 2**20
COLO = "-SEA"  # where it was answered: ends the ids of images
STATUS_ERRORS = {401: "bad_key", 404: "no_model"}  # for the others: status_...
PROXY_STATUSES = (520, 521, 522, 523, 524)  # sent as text by the proxy in front of production
RATE_LIMIT_HEADERS = {  # recorded, but for the seconds
    "retry-after": "{seconds}", "x-ratelimit": "true", "x-ratelimit-limit": "1",
    "x-ratelimit-remaining": "0", "x-ratelimit-reset": "{seconds}",
    "x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "979",
}  # fmt: skip


def name_request(request: Request) -> str:
    """Return the id of an answer; a refused request has none but its bytes."""
    if not request.id:
        facts = f"{request.method} {request.path}\n".encode("utf-8", "replace")
        request.id = random_id(HashRandom.of_bytes(facts + request.raw[-NAMED_BYTES:]))
        request.id += COLO if request.path.startswith("/v1/images/") else ""
    return request.id


def status_reply(
    status: int,
    error: Any = None,
    retry_after: float | None = None,
    retry_after_date: bool = False,
    model: Any = None,
    id: str = "",
    name: str = "",
    rpm: float = 60,
    tpm: float = 60_000,
) -> Reply:
    """Build an error reply; without `error` with that status's real body.

    name      of the error, where the status does not tell it
    rpm, tpm  the limits that a 429 tells
    """
    seconds = 1 if retry_after is None and status == 429 else retry_after
    names = () if seconds is None else RATE_LIMIT_HEADERS if status == 429 else ("retry-after",)
    headers = {name: RATE_LIMIT_HEADERS[name].format(seconds=seconds) for name in names}
    if retry_after_date and seconds is not None:
        headers["retry-after"] = formatdate(time.time() + seconds + 1, usegmt=True)
    if status in PROXY_STATUSES and error is None:
        return Reply(b"error code: %d" % status, status, "text/plain; charset=UTF-8", headers)
    name = name or STATUS_ERRORS.get(status, f"status_{status}")
    if status == 429 and str(model).endswith("-Free"):
        name, rpm = "model_rate_limit", 10
    name = name if name in ERRORS else "other_status"
    refusal = ApiError(
        name, model=model, status=status, rpm=rpm, tpm=tpm, qps=rpm / 60, tps=tpm / 60
    )
    refusal.status, refusal.headers = status, headers
    if error is not None:
        refusal.unusual = {"type": "server_error", "code": None, **error}
    return refusal.as_reply(id=id)


def scripted_close(status: int, **said: Any) -> Closed:
    error = json.loads(status_reply(status, **said).body)["error"]
    return Closed(status, error["code"] or error["message"], error=error)


def whole_reply(fixture: Fixture, request: Request) -> Reply:
    """Return the reply that a fixture tells whole: a body, or an error."""
    if fixture.type is BODY:
        reply = Reply(**fixture.normal)
        reply.id = name_request(request)
        if reply.content_type.startswith(EVENT_STREAM):  # whose events are its chunks
            reply.events = iter(split_events(reply.body))
        return reply
    model, id = request.body.get("model"), name_request(request)
    reply = status_reply(**{"id": id, **fixture.normal}, model=model)
    if "shouldRetry" in fixture.options:
        asked = json.dumps(fixture.options["shouldRetry"])
        reply.headers = {**reply.headers, "x-should-retry": asked}
    return reply


STALL_SECONDS = 600.0  # after which a stalled stream is cut


def halve(text: bytes) -> bytes:
    return text[: (len(text) + 1) // 2]


def add_call_delta(calls: list[Item], delta: Item) -> None:
    """Add a chunk's part of a tool call to the calls it continues or begins."""
    index, id = delta.get("index"), delta.get("id")
    call = next((each for each in calls if each["index"] == index), None)
    if call is None or (index is None and id):
        call = {"index": index, "id": id, "function": {"name": "", "arguments": ""}}
        calls.append(call)
    name, arguments = (get_path(delta, "function", key) or "" for key in ("name", "arguments"))
    call["id"], made = call["id"] or id, call["function"]
    made["name"], made["arguments"] = made["name"] or name, made["arguments"] + dump_json(arguments)


def read_item_event(event: Item) -> Item:
    """Return what an event of the Responses API adds, as a part of a chunk."""
    type, call = event.get("type"), {"index": event.get("output_index")}
    kind, id, name = (get_path(event, "item", key) for key in ("type", "call_id", "name"))
    if type == "response.output_text.delta":
        return {"delta": {"content": event.get("delta")}}
    if type == "response.function_call_arguments.delta":
        call["function"] = {"arguments": event.get("delta")}
    elif type == "response.output_item.added" and kind == "function_call":
        call.update(id=id, function={"name": name})
    else:
        ends = ("response.completed", "response.incomplete")
        return {"finish_reason": "stop"} if type in ends else {}
    return {"delta": {"tool_calls": [call]}}


def fold_stream(events: Any) -> list[Item]:
    """Return the messages that the events of a stream tell, cut or not, or a whole reply."""
    messages: dict[str, Item] = {}
    parts = (list_objects(e.get("choices")) or [read_item_event(e)] for e in list_objects(events))
    for part in filter(None, itertools.chain(*parts)):
        said = part.get("delta") or part.get("message") or {"content": part.get("text")}
        delta = {**said} if isinstance(said, dict) else {"odd": said}
        delta["reasoning"] = delta.get("reasoning") or delta.get("reasoning_content")
        delta["finish_reason"] = part.get("finish_reason")
        blank: Item = {"content": "", "reasoning": "", "tool_calls": [], "finish_reason": None}
        message = messages.setdefault(repr(part.get("index")), {**blank, "role": "assistant"})
        if delta.get("content") and message["tool_calls"]:
            message["order"] = "a text after a tool call"  # as no fixture's words can say it
        for call in list_objects(delta.pop("tool_calls", None)):
            add_call_delta(message["tool_calls"], call)
        for name in [name for name in delta if delta[name]]:
            if name not in ("content", "reasoning"):
                message[name] = delta[name]
            elif isinstance(delta[name], str):
                message[name] += delta[name]
            else:
                message["odd"] = name
    return list(messages.values())


def tell_event(event: bytes) -> Item:
    """Return what an event tells: text, toolName, arguments, finish, usage, done."""
    values = parse_events(event)
    said = fold_stream(values)
    calls = [call["function"] for message in said for call in message["tool_calls"]]
    told = {
        "text": "".join(message["content"] for message in said),
        "toolName": any(call["name"] for call in calls),
        "arguments": any(call["arguments"] for call in calls),
        "finish": any(message["finish_reason"] for message in said),
        "usage": find_usage(values),
        "done": event == DONE,
    }
    return {name: what for name, what in told.items() if what}


class Fault:
    """How one reply goes wrong on its way, drawn from a fixture's options.

    chaos  the rate that hit, or ""
    error  what a fixture says of an error in the stream
    """

    def __init__(
        self, options: Mapping[str, Any], rng: HashRandom, error: Mapping[str, Any] | None = None
    ) -> None:
        self.error = error or {"status": 500}
        rates = options.get("chaos", {})
        hits = (rate for rate in CHAOS if rng.child(rate).random() < rates.get(rate, 0))
        self.chaos = next(hits, "")
        self.options: Item = {**options, **CHAOS.get(self.chaos, {})}
        self.latency = rates.get("latencyMs", 0)
        self.rng = rng.child("jitter")
        self.place = next((place for place in STRIKE_PLACES if place in options), "")
        # After how many chunks what happens.
        self.strikes = {name: self.options[name] for name in STRIKES if name in self.options}
        if self.options.get("malformed"):
            self.strikes["malformedAfterChunks"] = 0
        if self.place and not self.strikes and "insert" not in options:
            self.strikes["errorAfterChunks" if error else "disconnectAfterChunks"] = 0

    def shorten(self) -> None:
        """Keep what a whole reply, sent in halves, can meet: it waits, or is cut."""
        self.latency += self.options.get("latency", 0)
        most = {"disconnectAfterMs": MAX_MS, "disconnectAfterChunks": 1, "stallAfterChunks": 1}
        self.options = {
            name: min(self.options[name], most[name]) for name in most & self.options.keys()
        }
        self.strikes, self.place = self.options, ""

    def delays(self) -> Iterator[float]:
        """Yield the seconds before each chunk."""
        profile, recorded = map(self.options.get, ("streamingProfile", "recordedTimings"))
        profile = profile or {}
        rest = 1000 / profile["tps"] if "tps" in profile else self.options.get("latency", 0)
        first = [profile.get("ttft", rest)]
        if recorded and not profile:
            delays = recorded.get("interChunkDelaysMs", [])
            first, rest = [recorded.get("ttftMs", 0), *delays], sum(delays) / max(1, len(delays))
        jitter, speed = profile.get("jitter", 0), 1000 * self.options.get("replaySpeed", 1)
        for pause in itertools.chain(first, itertools.repeat(rest)):
            yield pause * (1 + jitter * (2 * self.rng.random() - 1)) / speed

    def pace(
        self, events: Iterable[bytes], clock: Callable[[], float]
    ) -> Generator[bytes | float, None, None]:
        """Yield events, and the seconds until the next one is due; Cut ends the connection."""
        start, delays, inserted = clock(), self.delays(), self.options.get("insert")
        due = start + self.latency / 1000
        end = start + self.options.get("disconnectAfterMs", math.inf) / 1000
        for event, since in self.locate(events):
            hits = {name for name in self.strikes if self.strikes[name] == since}
            if "malformedAfterChunks" in hits:
                head, mark, data = event.partition(b"data: ")
                event = head + mark + halve(data.rstrip()) + (b"\n\n" if len(hits) == 1 else b"")
                yield from (event,) if len(hits) > 1 else ()
            if hits & {"disconnectAfterChunks", "truncateAfterChunks"}:
                raise Cut
            if "stallAfterChunks" in hits:
                yield b""  # so that the head leaves
                yield float(max(0, min(end - clock(), STALL_SECONDS)))
                raise Cut
            if "errorAfterChunks" in hits and self.error["status"] > 999:
                raise scripted_close(**self.error)
            if "errorAfterChunks" in hits:
                yield b"data: %b\n\n" % status_reply(**self.error).body
            if hits & {"errorAfterChunks", "endAfterChunks"}:
                return
            due += next(delays) if event != DONE else 0
            left = min(due, end) - clock()
            if left > 0:
                yield float(left)
            if max(due, clock()) >= end:
                raise Cut
            if inserted and since == (0 if self.place else 1):
                yield inserted.encode()
            yield event

    def locate(self, events: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
        """Yield each event with the number of chunks since the place; -1 before it."""
        wanted, text = self.options.get(self.place, ""), ""
        wanted, since = "toolName" if wanted == "tool_name" else wanted, -1 if self.place else 0
        for event in events:
            told = tell_event(event) if since < 0 else {}
            text += told.get("text", "")
            met = wanted in told or (wanted[:5] == "text:" and wanted[5:] in text)
            since += self.place == "before" and met
            yield event, since
            since += since >= 0 or met


def draw_fault(script: Fixtures, fixture: Fixture) -> Fault | None:
    if not fixture.faulty:
        return None
    rng = HashRandom.of("fault", [script.seed, next(script.draws)])
    return Fault(fixture.options, rng, fixture.normal if fixture.type is ERROR else None)


def apply_fault(reply: Reply, fault: Fault, clock: Callable[[], float]) -> Reply:
    """Return the reply as it arrives; a whole one that waits or is cut becomes raw pieces."""
    options = fault.options
    if "status" in options:
        reply = status_reply(options["status"], id=reply.id)
    elif reply.events is None and "errorAfterChunks" in options:
        reply = status_reply(**fault.error, id=reply.id)
    if options.get("empty"):
        reply.body, reply.events = b"", None
    if reply.events is None:
        if "malformedAfterChunks" in fault.strikes:
            reply.body = halve(reply.body)
        fault.shorten()
        if not (fault.options or fault.latency):
            return reply
        reply.headers = {**reply.headers, "Content-Length": str(len(reply.body))}
        half = halve(reply.body)
        reply.events = (half, reply.body[len(half) :])
    reply.events = fault.pace(reply.events, clock)
    return reply


def call_wrongly(request: Request) -> Item:
    tool = next(iter(list_objects(request.body.get("tools"))), {})
    function = tool.get("function") or tool
    rows = get_path(function, "parameters", "properties") or {"value": {}}
    wrong = {name: 1 if get_path(rows[name], "type") == "string" else "one" for name in rows}
    return {"tool_calls": [{"name": str(function.get("name")), "arguments": wrong}]}


FIRST_TOOL = "{{body.tools.0.function.name}}{{body.tools.0.name}}"  # a chat's, a response's
CALLS_TOOLS: Item = {"body": {"tools": [{}]}}
HTML = "<html><head><title>524: A timeout occurred</title></head></html>"
BLANK_CHUNK = {"id": "1", "object": "chat.completion.chunk", "created": CREATED, "choices": []}
# What production and the ways to it are known for, as keywords of `reply()`.
FAULTS: dict[str, Item] = {
    "rate_limit": {"status": 429, "retry_after": 1},
    "rate_limit_date": {"status": 429, "retry_after": 1, "retry_after_date": True},
    "model_rate_limit": {
        "status": 429,
        "retry_after": 1,
        "error": {"message": "The rate limit of this model is reached", "type": "model_rate_limit"},
    },
    "no_credit": {"status": 402},
    "server_error": {"status": 500},
    "unavailable": {"status": 503, "empty": True},
    "proxy_timeout": {"raw": {"text": HTML, "contentType": "text/html"}, "status": 524},
    "engine_error": {
        "status": 400,
        "error": {"message": {"message": "Bad tool.", "type": "BadRequestError", "code": 400}},
    },
    "refused": {},  # nobody listens: for `server.fault()` alone
    "reset": {"disconnect_after_chunks": 0},
    "reset_in_stream": {"disconnect_after_chunks": 3},
    "silent_end": {"end_after_chunks": 3},
    "half_event": {"malformed_after_chunks": 3, "disconnect_after_chunks": 3},
    "broken_json": {"malformed_after_chunks": 3},
    "error_event": {"error_after_chunks": 3},
    "slow_first_token": {"streaming_profile": {"ttft": 1000}},
    "stall": {"stall_after_chunks": 3, "disconnect_after_ms": 30_000},
    "empty_choices": {"insert": f"data: {ENCODE(BLANK_CHUNK)}\n\n"},
    "keepalive": {"insert": ": keepalive\n\n"},
    "arguments_cut": {
        "tool_calls": [{"name": FIRST_TOOL, "arguments": '{"a'}],
        "finish_reason": "length",
        **CALLS_TOOLS,
    },
    "unknown_tool": {"tool_calls": [{"name": "no_such_tool", "arguments": {}}], **CALLS_TOOLS},
    "wrong_types": {"content": call_wrongly, **CALLS_TOOLS},
    "call_in_reasoning": {
        "content": "",
        "reasoning": "We call the tool.",
        "finish_reason": "tool_calls",
        **CALLS_TOOLS,
    },
    "blanks_lost": {"content": "Thewordscomewithoutblanks.", "chunk_size": 5},
}


class RateLimits(dict):  # type: ignore[type-arg]
    """Requests and tokens that come back evenly: so many a minute, and no more at once."""

    def __init__(self, clock: Callable[[], float], **limits: Any) -> None:
        super().__init__()
        self.clock, self.limits = clock, limits  # each for all, or {model: number}

    def find(self, unit: str, model: Any) -> float | None:
        given = self.limits[unit]
        return given.get(model) if isinstance(given, dict) else given

    def take(self, unit: str, model: Any, count: float) -> float:
        """Take what is asked for; return the seconds until there is one again."""
        limit, now = self.find(unit, model), self.clock()
        if not limit:
            return 0.0
        key, each = (unit, model if isinstance(self.limits[unit], dict) else ""), 60 / limit
        full_at = self[key] = max(now, self.get(key, now)) + count * each
        wait = float(full_at - now - (limit - 1) * each)
        return wait if wait > 0.001 else 0.0  # sums of fractions are not exact


# === Routes ===

STORAGE_LIMIT = 0  # as a route's max_bytes: what the server may store

# Kinds that are quick while they are asked for little, and the field that may have many inputs.
QUICK_KINDS = {
    "chat": "", "response": "", "completion": "prompt", "embedding": "input", "rerank": "documents"
}  # fmt: skip


ROUTES: list[Route] = []
EXACT: dict[tuple[str, str], Route] = {}  # the routes without parameters, found by one look-up


def read_family(path: str) -> str:
    found = re.match(r"/v[0-9]/([\w-]+)", path)
    return found[1] if found else ""


HEAVY_FIELDS = {"tools", "response_format", "text", "echo"}  # what they ask for takes long
MULTIPLIERS = {"n", "logprobs", "top_logprobs"}  # of the answers that a body is worth
QUICK_ANSWERS = 8  # together as quick as other clients may wait for
MAX_ANSWERS = 50_000  # some two seconds


class Route:
    """One operation: a method and a path template with their handler."""

    body = query = NO_FIELDS  # the tables of fields, or their rows as one text
    kind = ""  # of an inference call: what fixtures name it
    prompt = ""  # the field that counts as what a user said
    input = ""  # the field that fixtures look through, where it is no prompt
    response: ResponseType | None = None  # what a fixture says in its place
    status = 200  # of a good reply
    open = False  # needs no key
    slow = True  # may take longer than some hundred microseconds; no kind in QUICK_KINDS does
    max_bytes = MAX_JSON_BYTES  # of the body; 0: as much as may be stored
    admit: Callable[[Any, dict[str, str]], Any] | None = None  # raises before a body is read
    handler: Any = None

    def __init__(self, operation: str, **facts: Any) -> None:
        self.method, _, path = operation.partition(" ")
        self.path = path
        for name, value in facts.items():
            getattr(self, name)  # it is one of those above
            is_rows = name in ("body", "query") and isinstance(value, str)
            setattr(self, name, Fields(value) if is_rows else value)
        kind = self.kind
        self.slow = self.slow and kind not in QUICK_KINDS
        self.recorded_kind = read_family(path) if kind in ("", "job") else kind
        # Paths with fewer parameters go first, then those with a longer template.
        self.rank = (path.count("{") + path.count("...}"), -len(path))
        rest = path.replace("...}", ">.+)").replace("}", ">[^/]+)")
        self.pattern = lazy_regex(rest.replace("{", "(?P<"))

    def __call__(self, handler: Any) -> Any:
        """Declare the handler below this route."""
        self.handler = handler
        after = (at for at, known in enumerate(ROUTES) if known.rank > self.rank)
        ROUTES.insert(next(after, len(ROUTES)), self)
        if not self.rank[0]:
            EXACT[self.method, self.path] = self
        if self.kind:
            OPERATIONS.setdefault(self.kind, self)
        return handler

    def count_answers(self, body: Item) -> int:
        """Return how many answers a body asks for, which bounds what may be asked."""
        inputs = body.get(QUICK_KINDS.get(self.kind, ""))
        several = isinstance(inputs, list) and inputs and type(inputs[0]) is not int
        if not several and MULTIPLIERS.isdisjoint(body):
            return 1
        n, scores = body.get("n"), body.get("top_logprobs") or body.get("logprobs")
        choices = n if isinstance(n, int) else 1
        each = 1 + 10 * scores if isinstance(scores, int) else 1
        return max(1, choices) * each * (len(inputs or "") if several else 1)

    def match(self, path: str) -> dict[str, str] | None:
        """Return the parameters of a path that fits: `{id}` one segment, `{id...}` the rest."""
        if not self.rank[0]:
            return {} if path == self.path else None
        found = self.pattern.fullmatch(path)
        return found and {name: unquote(part) for name, part in found.groupdict().items()}


route = Route  # `@route(...)` above a handler declares it


def find_route(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """Return the route and the path's parameters.

    Raises ApiError 405 for a known path, else 404 with the nearest emulated ones.
    """
    method = "GET" if method == "HEAD" else method
    allowed: list[str] = []
    for known in ROUTES:
        found = known.match(path)
        if found is not None:
            if known.method == method:
                return known, found
            allowed.append(known.method)
    if allowed:
        allow = ", ".join(sorted({*allowed, "OPTIONS", *(["HEAD"] if "GET" in allowed else [])}))
        error = ApiError("bad_method", path=path[:100], method=method[:20], allow=allow)
        error.headers["Allow"] = allow
        raise error
    from difflib import get_close_matches  # only for this message

    own = path.startswith("/__")
    paths = list(dict.fromkeys(known.path for known in ROUTES if known.open == own))
    near = ", ".join(get_close_matches(path[:100], paths, n=3, cutoff=0.3) or paths[:3])
    reason = f" This emulator has {near}, among others."
    raise ApiError("no_route", path=path[:100], reason=reason)


# === Inference endpoints ===

SERVED_AS = {"language": "chat", "code": "chat", "moderation": "chat"}


def resolve_model(server: Server, id: str, type: str) -> Model:
    """Return the model of an id; an unknown one answers too, unless the server is strict."""
    model = server.models.get(id)
    if model is None:
        if server.endpoints and any(each["name"] == id for each in server.endpoints):
            raise ApiError("not_running", model=id)
        if server.strict:
            raise ApiError("retired" if id.endswith("-Lora") else "no_model", model=id[:100])
        return Model(type, id, traits=())
    if not server.strict:
        return model
    if "retired" in model.traits:
        raise ApiError("retired", model=id)
    if "sockets-only" in model.traits:
        raise ApiError("sockets_only")
    if SERVED_AS.get(model.type, model.type) != SERVED_AS.get(type, type):
        raise refuse_value("model", f"must be of the type {type}, not {model.type}", id)
    return model


# --- Answers, and the form that each engine gives them (recorded)


def cut_pieces(text: str, sizes: Iterator[int]) -> list[str]:
    """Cut a text into pieces of these sizes."""
    pieces, start = [], 0
    while start < len(text):
        pieces.append(text[start : start + next(sizes)])
        start += len(pieces[-1])
    return pieces


class Choice:
    """One of the texts that answer a prompt."""

    thoughts: Sequence[str] = ()  # tokens of the reasoning
    thought_count = 0  # of these, or of those that are not shown
    stop_text = ""  # before which the text was cut
    tool_calls: Sequence[Item] = ()
    calls_first = False  # in a stream, before the text
    function_call: Item | None = None  # the older form of one tool call
    scores: Sequence[Any] = ()  # logprob and alternatives of each thought and text, if asked for
    text = ""
    token_count = 0  # of the text
    finish_reason = "tool_calls"

    def __init__(self, index: int) -> None:
        self.index = index

    def write(self, text: str, count: int, stop: Any, budget: int) -> None:
        """Take what of a text of `count` tokens is before a stop text and within the budget."""
        self.finish_reason = "stop"
        if stop:
            text = self.end(text, stop)
            count = count_tokens(text)
        if count > budget:
            text, count = "".join(split_tokens(text)[:budget]), budget
            self.finish_reason = "length"
        self.text, self.token_count = text, count

    def end(self, text: str, stop: Any) -> str:
        """Return a text up to the first stop text."""
        for ending in filter(None, [stop] if type(stop) is str else stop):
            text, found, _ = text.partition(ending)
            self.stop_text = found or self.stop_text
        return text

    def think(self, thoughts: str, stop: Any, budget: int) -> int:
        """Take what of some reasoning is within the budget; return what is left of that.

        Nothing is where a stop text ends it: engines look for those in all that is written
        (recorded).
        """
        self.thoughts = split_tokens(self.end(thoughts, stop or ()))
        if len(self.thoughts) > budget:
            self.thoughts, self.stop_text = self.thoughts[: max(budget, 0)], ""
        self.thought_count = len(self.thoughts)
        return 0 if self.stop_text else budget - self.thought_count

    @functools.cached_property
    def pieces(self) -> list[str]:
        """The tokens of the text, or the pieces of it that a fixture wants."""
        return split_tokens(self.text)

    def cut(self, sizes: Sequence[int]) -> None:
        """Let the chunks of a stream have these sizes in characters, the others the last of them.

        They are those of the reasoning, then of the text, then of the arguments of tool calls.
        """
        left = itertools.chain(sizes, itertools.repeat(sizes[-1]))
        self.thoughts = cut_pieces("".join(self.thoughts), left)
        self.pieces = cut_pieces(self.text, left)
        for call in self.tool_calls:
            call["pieces"] = cut_pieces(call["function"]["arguments"], left)


# What stands for a piece of text and its number in a chunk that is encoded once; no text that comes
# in has such characters.
SLOT, SLOT_NUMBER = "\udc00", "\udc01"


def repeat_json(text: str, pieces: Iterable[str]) -> Iterator[str]:
    """Yield JSON for each piece of a text, which stands where SLOT does."""
    is_numbered = SLOT_NUMBER in text
    parts = text.replace(QUOTE(SLOT_NUMBER), "\0").split(QUOTE(SLOT))  # no JSON has that character
    for piece in pieces:
        filled = QUOTE(piece).join(parts)
        yield filled.replace("\0", str(token_id(piece))) if is_numbered else filled


def describe_token(piece: str, logprob: float) -> Item:
    return {"token": piece, "bytes": list(piece.encode()), "logprob": logprob}


def list_logprobs(pieces: Sequence[str], scores: Sequence[Any]) -> list[Item]:
    """Return logprobs in OpenAI's form, one object a token, with the keys in recorded order."""
    return [
        {**describe_token(piece, logprob), "top_logprobs": [describe_token(*top) for top in tops]}
        for piece, (logprob, tops, _) in zip(pieces, scores)
    ]


def shape_logprobs(style: str, pieces: Sequence[str], scores: Sequence[Any]) -> Any:
    """Return the logprobs of some tokens in one of the recorded styles."""
    if style == "content":
        return {"content": list_logprobs(pieces, scores)}
    if style == "number":
        return scores[0][0]
    tops = [top for _, top, _ in scores]
    told: Item = {
        "tokens": pieces,
        "token_logprobs": [logprob for logprob, _, _ in scores],
        "token_ids": [token_id(piece) for piece in pieces],
    }
    if style == "nested":
        told["token_ids"] = [None]
        told["top_logprobs"] = [[{"token": word, "logprob": at} for word, at in tops[0]]]
    elif any(tops):
        told["top_logprobs"] = list(map(dict, tops))
    if style == "offsets":
        told["text_offset"] = [offset for _, _, offset in scores]
    return told


@functools.lru_cache(maxsize=256)
def split_keys(keys: str) -> tuple[list[str], list[str]]:
    """Return some keys, and those that end in `?`: they are left out without a value."""
    return re.findall(r"\w+", keys), re.findall(r"(\w+)\?", keys)


def arrange(keys: str, values: Mapping[str, Any]) -> Item:
    """Return the values under these keys, in their order."""
    names, optional = split_keys(keys)
    found = dict(zip(names, map(values.get, names)))
    for name in optional:
        if found[name] in (None, []):
            del found[name]
    return found


# The form of each engine's answers. To add one: a group here, its name in ENGINE_NAMES and `engine
# NAME` in the catalogue. What a group lacks is as in the one that its heading names. It has the
# keys of each object, in one kind of bodies or else in all (`whole`; the chunks `mark`, `opener`,
# `thought`, `text`, `head` and `rest` of a call, `close`, `usage`, `end`), and traits. In full:
#   compact: tokens have numbers, a text no opener; the end brings the usage, the last token of a
#     text that was cut, and arguments in one piece
#   blank: "" stands for reasoning and ids that a chunk has not
#   marks: two chunks of a tag come before reasoning
#   closes-thoughts, closes-calls: with an empty piece
#   counts-thoughts: where `reasoning_tokens` stand by themselves; else they are 0
#   any-effort: any word is taken as `reasoning_effort`, and none hides the reasoning
#   needs-content: where strict, in the messages of an assistant too
FORM_TABLE = """\
= B
whole body: id object created model metadata prompt choices usage
whole choice: index message logprobs finish_reason seed
whole message: role content tool_calls function_call? reasoning
opener body: id object created choices model
body: id object created choices model usage
choice: index text logprobs finish_reason delta
message: token_id role content tool_calls? function_call? reasoning
call: id index type function
function: name arguments
usage: prompt_tokens total_tokens completion_tokens prompt_tokens_details? reasoning_tokens
whole logprobs: content
logprobs: nested
call id: call_{hex}
content type: application/json; charset=utf-8
= A like B
whole body: id object created model prompt choices usage
whole choice: finish_reason seed index logprobs message
whole message: role content tool_calls function_call? reasoning?
whole function: arguments name
call: index id type function
opener choice: index role text logprobs finish_reason delta
choice: index text logprobs finish_reason seed delta
message: token_id role content tool_calls? function_call?
thought message: token_id role content reasoning
head,rest body: id object created choices model
head,rest choice: index text logprobs finish_reason delta
rest call: index function
rest function: arguments
usage: prompt_tokens completion_tokens total_tokens cached_tokens
whole logprobs: tokens
logprobs: number
call id: call_{letters}
traits: compact null-content tells-seed thinks-in-content tight-arguments
= completion like A
whole choice: text finish_reason logprobs index
usage: prompt_tokens completion_tokens total_tokens
whole logprobs: offsets
logprobs: offsets
traits: compact null-content
= completion of A like A
whole choice: text finish_reason seed logprobs index
whole logprobs: offsets
logprobs: offsets
= V4 like B
traits: counts-thoughts
= Scout like B
usage: prompt_tokens total_tokens completion_tokens
= gpt-oss-20b like B
whole message: role content tool_calls function_call? reasoning?
= gpt-oss-20b without tools like B
whole choice: index logprobs finish_reason seed message
whole message: role content tool_calls reasoning?
opener body: id object created choices model usage
choice: index text logprobs finish_reason matched_stop delta
message: token_id role content tool_calls? reasoning?
stop token: 200002
traits: skips-reasoning
= K2.7 like B
whole body: id object created model system_fingerprint prompt choices usage
whole choice: index message logprobs? finish_reason seed
usage: prompt_tokens completion_tokens total_tokens prompt_tokens_details completion_tokens_details
= gpt-oss-120b like K2.7
whole message: role content tool_calls function_call? reasoning?
whole call: id type function
call id: call_{uuid}
traits: needs-content talks-beside-calls any-effort tight-arguments
= C like K2.7
whole body: id object created model prompt? choices usage system_fingerprint
whole choice: index message logprobs? finish_reason matched_stop?
whole message: role content reasoning_content? tool_calls? function_call?
opener body: id object created model system_fingerprint choices
body: id object created model system_fingerprint choices usage?
choice: index delta logprobs finish_reason matched_stop? usage?
opener message: role content
thought message: reasoning_content
text message: content function_call?
head,rest message: tool_calls
message: -
call: index id type function
rest call: index function
rest function: arguments
logprobs: content
id: chatcmpl-{hex:.24}
call id: {name}_{index}
traits: closes-thoughts comments null-content tight-arguments
= DeepSeek like C
whole message: role content reasoning_content tool_calls? function_call?
choice: index delta logprobs finish_reason matched_stop?
opener message: role reasoning_content
text message: content function_call? reasoning_content
head,rest message: tool_calls reasoning_content
message: reasoning_content
usage: prompt_tokens completion_tokens total_tokens prompt_tokens_details completion_tokens_details?
id: {hex:.8}-aws_ue2
call id: call_{hex}
content type: application/json
traits: comments null-content
= GLM like DeepSeek
stop token: 154827
tool_calls token: 154829
= Qwen like K2.7
mark choice: index text logprobs finish_reason seed delta
mark message: token_id role content
opener body: id object created choices model usage
opener choice: index logprobs delta finish_reason text
choice: index delta finish_reason logprobs text
call: index id type function
rest,close function: arguments
close call: function index id type
close message: token_id role content tool_calls
end message: token_id role content
usage: completion_tokens completion_tokens_details prompt_tokens prompt_tokens_details total_tokens
id: chatcmpl-{uuid}
traits: marks blank closes-calls counts-text only-streams
"""
USAGE_SIDES = (("prompt", "cached_tokens"), ("completion", "reasoning_tokens"))
THOUGHT_MARKS = (("<think>", 128798, 0), ("\n", 201, -1.7881393e-06))  # text, token id and logprob
END_TOKENS = {"meta-llama/": 128009, "Qwen/": 151645}  # what ends a turn, by the start of an id


class Form:
    """The form of one engine's answers: a group of FORM_TABLE."""

    def __init__(self, rows: dict[str, str]) -> None:
        self.rows = rows
        self.traits = frozenset(rows.get("traits", "").split())

    def arrange(self, kind: str, level: str, values: Item) -> Item:
        return arrange(self.rows.get(f"{kind} {level}") or self.rows[level], values)

    def arrange_call(self, kind: str, call: Item) -> Item:
        function = self.arrange(kind, "function", call["function"])
        return self.arrange(kind, "call", {**call, "function": function})

    def name_answer(self, rng: HashRandom) -> str:
        if "id" not in self.rows:
            return random_id(rng)
        return self.rows["id"].format(hex=rng.key.hex(), uuid=random_uuid(rng.child("id")))

    def name_call(self, rng: HashRandom, name: str, index: int) -> str:
        """Return the id of a tool call."""
        own = rng.child("id")
        uuid, letters = random_uuid(own), random_letters(own, 24, LOWER36)
        row = self.rows["call id"]
        return row.format(hex=own.hex(24), letters=letters, uuid=uuid, name=name, index=index)


def read_forms(table: str) -> dict[str, Form]:
    """Return the forms by their names."""
    forms: dict[str, Form] = {}
    for group in table.split("= ")[1:]:
        heading, *rows = group.splitlines()
        name, _, model = heading.partition(" like ")
        own = dict(forms[model].rows) if model else {}
        for row in rows:
            key, value = row.split(": ", 1)
            kinds, _, level = key.rpartition(" ")
            own.update((f"{kind} {level}".strip(), value) for kind in kinds.split(","))
        forms[name] = Form(own)
    return forms


FORMS = read_forms(FORM_TABLE)


class Answer:
    """All that an answer says, as a whole or as chunks whose fold that is."""

    created = CREATED
    role = "assistant"
    objects = ("chat.completion", "chat.completion.chunk")  # of the whole, of a chunk
    unended = 0  # choices whose stream goes on

    def __init__(self, request: Request, form: Form, choices: list[Choice], usage: Item) -> None:
        self.request = request
        self.form = form  # of its engine
        self.traits = form.traits
        self.blank = "" if "blank" in form.traits else None
        self.prompt: list[Item] = []  # the echo
        self.id = request.id
        self.model: str = request.body["model"]
        self.seed: int | None = request.body.get("seed")
        self.choices = choices
        self.usage = usage
        if request.chunk_sizes:
            for choice in choices:
                choice.cut(request.chunk_sizes)

    def list_usage(self) -> Item:
        """Return the usage as the engine tells it; what a fixture adds to it stands last."""
        keys, counts = self.form.rows["usage"], dict(self.usage)
        if "reasoning_tokens" in keys and "counts-thoughts" not in self.traits:
            counts["reasoning_tokens"] = 0
        if "details" in keys:
            for side, part in USAGE_SIDES:
                name, details = f"{side}_tokens_details", {part: counts[part]}
                if "counts-text" in self.traits:
                    details["text_tokens"] = counts[f"{side}_tokens"]
                absent = f"{name}?" in keys and not counts[part]
                counts.setdefault(name, None if absent else details)
        given = (self.request.script or {}).get("usage") or {}
        return {**arrange(keys, counts), **given}

    def find_seed(self) -> int | None:
        """Return the seed asked for, else one made of the id: up to 2 ** 64."""
        if "tells-seed" not in self.traits:
            return None
        if self.seed is None:
            return zlib.crc32(self.id.encode()) * 4 * 10**9
        return self.seed

    def find_ending(self, choice: Choice) -> Item:
        """Return what tells of the end of a choice."""
        reason = choice.finish_reason
        token = self.form.rows.get(f"{reason} token")
        stop = token and (choice.stop_text or int(token))
        return {"finish_reason": reason, "seed": self.find_seed(), "matched_stop": stop}

    def frame(self, kind: str, choices: list[Item], has_usage: bool = True) -> Item:
        """Return the body of a whole answer, or of a chunk."""
        values = {
            "id": self.id,
            "object": self.objects[kind != "whole"],
            "created": self.created,
            "model": self.model,
            "system_fingerprint": "default",
            "metadata": {"weight_version": "default"},
            "prompt": self.prompt,
            "choices": choices,
            "usage": self.list_usage() if has_usage else None,
        }
        return self.form.arrange(kind, "body", values)

    def part(self, kind: str, choice: Choice, said: Item, **more: Any) -> Item:
        """Return what a body of this kind says of a choice."""
        values = {"role": self.role, "content": "", "reasoning": self.blank, **said}
        message = self.form.arrange(kind, "message", values)
        part = {"index": choice.index, "role": self.role, "text": values["content"], **more}
        part["message"] = part["delta"] = message
        return self.form.arrange(kind, "choice", part)

    # The whole

    def write_choice(self, choice: Choice) -> Item:
        """Return one choice of a whole answer; what stands beside tool calls is the engine's."""
        thoughts = "".join(choice.thoughts) or None
        blank = None if choice.tool_calls and "null-content" in self.traits else ""
        said = {
            "content": None if choice.function_call else choice.text or blank,
            "tool_calls": [self.form.arrange_call("whole", call) for call in choice.tool_calls],
            "function_call": choice.function_call,
            "reasoning": thoughts,
            "reasoning_content": thoughts,
        }
        style, scores, told = self.form.rows["whole logprobs"], choice.scores, None
        if scores:
            style = "content" if self.request.body["logprobs"] is True else style
            told = shape_logprobs(style, [*choice.thoughts, *choice.pieces], scores)
        more = {"text": choice.text, "logprobs": told, **self.find_ending(choice)}
        return self.part("whole", choice, said, **more)

    # The stream

    def stream(self) -> Iterator[Any]:
        """Yield the chunks of an answer, as JSON values or as JSON text."""
        self.unended = len(self.choices)
        for choice in self.choices:
            marks = THOUGHT_MARKS if "marks" in self.traits and choice.thoughts else ()
            for text, number, logprob in marks:
                said = {"token_id": number, "content": text}
                yield self.chunk("mark", choice, said, logprobs=logprob)
            if choice.tool_calls or "compact" not in self.traits:
                yield self.chunk("opener", choice, {"reasoning_content": ""})
        turns = itertools.zip_longest(*map(self.stream_choice, self.choices))
        yield from filter(None, itertools.chain.from_iterable(turns))  # a chunk of each choice
        if "compact" not in self.traits:
            yield self.frame("usage", [])

    def stream_choice(self, choice: Choice) -> Iterator[Any]:
        """Yield the chunks of a choice: reasoning, text and tool calls, the end."""
        if choice.thoughts:
            said = {"reasoning": SLOT, "reasoning_content": SLOT}
            pieces = [*choice.thoughts, *([""] if "closes-thoughts" in self.traits else [])]
            yield from repeat_json(ENCODE(self.chunk("thought", choice, said)), pieces)
        if "comments" in self.traits:
            yield KEEPALIVE
        is_cut = choice.finish_reason == "length" and "compact" in self.traits
        has_calls = choice.tool_calls or choice.function_call
        last = choice.pieces[-1:] if is_cut and not has_calls else []
        parts = [self.texts(choice, len(choice.pieces) - len(last)), self.calls(choice)]
        for part in reversed(parts) if choice.calls_first else parts:
            yield from part
        if choice.function_call:
            yield self.chunk("text", choice, {"function_call": choice.function_call})
        self.unended -= 1
        usage = None if self.unended else self.list_usage()
        ending = {**self.find_ending(choice), "usage": usage}
        if last:
            yield self.text(choice, last[0], *choice.scores[-1:], **ending)
            return
        starts = (number for start, number in END_TOKENS.items() if self.model.startswith(start))
        number = next(starts, 1) if "compact" in self.traits else None
        yield self.chunk("end", choice, {"token_id": number}, **ending)

    def chunk(self, kind: str, choice: Choice, said: Item, **more: Any) -> Item:
        ends = bool(more.get("usage")) and "compact" in self.traits
        return self.frame(kind, [self.part(kind, choice, said, **more)], ends)

    def text(self, choice: Choice, piece: str, score: Any = None, **more: Any) -> Item:
        """Return the chunk of a token of the text, with its number where the engine tells it."""
        number = SLOT_NUMBER if piece == SLOT else token_id(piece)
        said = {"token_id": number if "compact" in self.traits else None, "content": piece}
        if score:
            more["logprobs"] = shape_logprobs(self.form.rows["logprobs"], [piece], [score])
        return self.chunk("text", choice, said, **more)

    def texts(self, choice: Choice, count: int) -> Iterator[Any]:
        pieces = choice.pieces[:count]
        for piece, score in zip(pieces, choice.scores[len(choice.thoughts) :]):
            yield self.text(choice, piece, score)
        if not choice.scores:
            yield from repeat_json(ENCODE(self.text(choice, SLOT)), pieces)

    def calls(self, choice: Choice) -> Iterator[Any]:
        """Yield each tool call: its head, then its arguments in pieces."""
        is_compact = "compact" in self.traits
        for call in choice.tool_calls:
            text = call["function"]["arguments"]
            pieces = call.get("pieces") or ([text] if is_compact else split_tokens(text))
            yield self.call("head", choice, call, {**call["function"], "arguments": ""})
            rest = {**call, "id": self.blank}
            chunk = ENCODE(self.call("rest", choice, rest, {"arguments": SLOT}))
            yield from repeat_json(chunk, pieces[:-1] if is_compact else pieces)
            if is_compact:
                last = {"arguments": pieces[-1]}
                yield self.call("rest", choice, rest, last, finish_reason=choice.finish_reason)
            if "closes-calls" in self.traits:
                yield self.call("close", choice, rest, {"arguments": ""})

    def call(self, kind: str, choice: Choice, call: Item, function: Item, **more: Any) -> Item:
        said = self.form.arrange_call(kind, {**call, "function": function})
        return self.chunk(kind, choice, {"tool_calls": [said]}, **more)


OVERRIDING = {"created", "finish_reason", "role", "usage"}  # in what a fixture says
OPTIONAL = ("thoughts", "reasoning_tokens", "cached_tokens")  # none changes more than a value
TEMPLATES: dict[Any, Any] = {}  # of plain answers, by what does so


def make_template(answer: Answer, values: Item) -> tuple[str, Callable[[Item], Any]]:
    """Return the JSON of a plain answer with slots for values, and what picks those in order."""
    slots: Any = {name: SLOT + name for name in values}
    slots.update((name, values[name]) for name in OPTIONAL if not values[name])
    blank, choice = copy.copy(answer), copy.copy(answer.choices[0])
    blank.id, blank.model, blank.seed = slots["id"], slots["model"], slots["seed"]
    blank.usage = {name: slots[name] for name in answer.usage}
    choice.text, choice.thoughts = slots["text"], slots["thoughts"]
    whole, slot = ENCODE(blank.frame("whole", [blank.write_choice(choice)])), rf'"{SLOT}(\w+)"'
    whole = whole.replace("%", "%%")
    return re.sub(slot, "%s", whole), operator.itemgetter(*re.findall(slot, whole))


def encode_answer(answer: Answer) -> bytes:
    """Return an answer as JSON.

    What plain ones share is encoded once, a quarter of a chat; many choices are one by one: while
    JSON is written, no other thread runs.
    """
    choice, script = answer.choices[0], answer.request.script
    called = choice.tool_calls or choice.function_call
    is_bare = not (called or choice.scores or choice.stop_text or answer.prompt)
    if not is_bare or len(answer.choices) > 1 or (script and not OVERRIDING.isdisjoint(script)):
        head, mark, tail = ENCODE(answer.frame("whole", [])).partition('"choices":[')
        choices = ",".join(map(ENCODE, map(answer.write_choice, answer.choices)))
        return f"{head}{mark}{choices}{tail}".encode()
    thoughts = "".join(choice.thoughts)
    values: Item = {
        "id": QUOTE(answer.id),
        "model": QUOTE(answer.model),
        "text": QUOTE(choice.text),
        "thoughts": thoughts and QUOTE(thoughts),
        "seed": answer.find_seed(),
        **answer.usage,
    }
    lacks = not thoughts, not values["reasoning_tokens"], not values["cached_tokens"]
    key = (answer.form, answer.objects, choice.finish_reason, lacks)
    if key not in TEMPLATES:
        TEMPLATES[key] = make_template(answer, values)
    template, pick = TEMPLATES[key]
    text: str = template % pick(values)
    return text.encode()


# --- Chat completions

DEFAULT_MAX_TOKENS = 2048  # recorded: where several models stop when nothing is asked
MEDIA_TOKENS = 256  # of an image, video or sound
MESSAGE_TOKENS = 3  # around a message
CACHED_TOKENS = 64  # the cached part of a prompt is a multiple of so many (recorded)

EFFORT_THOUGHTS = {"none": 0, "minimal": 1, "low": 1, "medium": 1, "high": 2, "xhigh": 3, "max": 4}

MODEL_ROW = "model!:1.."
SAMPLING_ROWS = f"""\
{MODEL_ROW} temperature:float:0..2 top_k:int:-1.. top_p,min_p:float:0..1
repetition_penalty:float:0.. presence_penalty,frequency_penalty:float:-2..2
logit_bias:dict[float] seed:int n:int:1..128 max_tokens:int:0.. stop:str|list[str] stream:bool
stream_options:dict
  include_usage:bool -include_obfuscation,continuous_usage_stats
echo:bool safety_model user
"""
TEXT_FORMAT = {"type": "text"}
# What SDKs send back of a message is ignored by name, as production does.
CHAT_FIELDS = Fields(SAMPLING_ROWS + """\
messages!:list:1..
  role!=system|developer|user|assistant|tool|function content:str|list
    type!=text|image_url|video_url|audio_url|input_audio|file|refusal|reasoning|thinking
    text image_url,video_url,audio_url:dict
      url! -detail,format
    input_audio:dict
      data! -format
    -file,refusal,reasoning,thinking,signature,annotations,cache_control
  name tool_call_id reasoning reasoning_content tool_calls:list
    function:dict
      name! arguments -parsed_arguments
    -id,type,index,custom
  function_call:dict
    name! arguments -parsed_arguments
  -refusal,annotations,audio,parsed,reasoning_details,cache_control
max_completion_tokens:int:0.. logprobs:int|bool:0..20 top_logprobs:int:0..20 response_format:dict
  type!=text|json_object|json_schema|regex schema:dict|bool pattern json_schema:dict
    name:..64 strict:bool schema:dict|bool -description
tools:list:..1024
  type function!:dict
    name!:1.. description parameters:dict -strict
tool_choice:str|dict
  type name function:dict
    name
  allowed_tools:dict
    mode=auto|required tools:list:1..
      type name function:dict
        name
parallel_tool_calls:bool functions:list
  name!:1.. description parameters:dict -strict
function_call:str|dict
  name
context_length_exceeded_behavior=truncate|error reasoning_effort reasoning:dict
  enabled:bool
compliance=hipaa chat_template_kwargs,metadata:dict""")  # fmt: skip
# What changes no answer, but its length or how it is sent.
UNDRAWN = {
    "prompt", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options", "echo",
    "logprobs", "top_logprobs", "user", "metadata", "compliance", "parallel_tool_calls",
    "context_length_exceeded_behavior",
}  # fmt: skip
CHAT_FACTS = frozenset(CHAT_FIELDS) - UNDRAWN


def pick_given(body: Item, names: Iterable[str]) -> Item:
    return {name: body[name] for name in names if body.get(name) is not None}


def pick_facts(body: Item, names: frozenset[str]) -> Item:
    """Return the fields that an answer is drawn from; one choice is what absent `n` means."""
    facts = {}
    for name, value in body.items():
        if name in names and value is not None and (name != "n" or value != 1):
            facts[name] = value
    return facts


TOOL_KEYS = {"tools", "functions", "tool_choice", "function_call"}
MEDIA_TRAITS = {
    "image_url": "sees", "video_url": "watches", "audio_url": "hears", "input_audio": "hears"
}  # fmt: skip


def refuse_chat(body: Item, model: Model, traits: Any, thinks: bool, strict: bool) -> None:
    """Raise ApiError for what an engine does not take, and where strict a model or anyone."""
    choice, messages = body.get("tool_choice"), body["messages"]
    is_forced = choice not in (None, "auto", "none")
    if strict and is_forced:
        if type(choice) is str and choice != "required":
            raise refuse_value("tool_choice", "must be auto, none, required or an object", choice)
        if "no-grammar" in model.traits:
            raise ApiError("no_grammar")
    if strict and "needs-content" in traits:
        for each in messages:
            if each["role"] == "assistant" and each.get("content") is None:
                raise ApiError("empty_prompt")
    if "only-streams" not in traits:
        return
    if not body.get("stream"):
        raise ApiError("streaming_required", param="stream")
    if any(each["role"] == "developer" for each in messages):
        raise ApiError("unknown_role", role="developer")
    if thinks and is_forced:
        raise ApiError("forced_while_thinking")


def check_message(message: Item, place: str, model: Model) -> int:
    """Check a message by its rules and its model; return how many media it has."""
    role, content = message["role"], message.get("content")
    parts = content if type(content) is list else ()
    if role == "tool" and not message.get("tool_call_id"):
        raise ApiError("missing", param=place + ".tool_call_id")
    if content is None and role != "assistant":
        raise ApiError("missing", param=place + ".content")
    for index, part in enumerate(parts):
        kind = part["type"]
        trait = MEDIA_TRAITS.get(kind)
        if (trait or kind == "text") and part.get(kind) is None:
            raise ApiError("missing", param=f"{place}.content[{index}].{kind}")
        if trait and trait not in model.traits and "known" in model.traits:
            blind = model.engine != "A" and model.traits.isdisjoint(MEDIA_TRAITS.values())
            raise ApiError("no_eyes" if blind else "no_media", model=model.id)
    return sum(part["type"] != "text" for part in parts)


def count_messages(messages: list[Item], texts: list[str], model: Model) -> tuple[int, int]:
    """Check each message, and count its tokens: text, calls, media and the frame around it.

    Returned are those of all and of what was asked before: what precedes the last answer.
    """
    count, before = 1, 0
    for number, (message, text) in enumerate(zip(messages, texts)):
        content, role = message.get("content"), message["role"]
        before = count if role == "assistant" else before
        if type(content) is not str or role == "tool":
            count += MEDIA_TOKENS * check_message(message, f"messages[{number}]", model)
        count += MESSAGE_TOKENS + count_tokens(text)
        if message.get("tool_calls"):
            count += count_tokens(ENCODE(message["tool_calls"]))
    return count, before


def find_budget(body: Item, model: Model, prompt_tokens: int) -> tuple[int, int]:
    """Return how many tokens may be written, and how many of the prompt are read.

    Raises ApiError when the context is too short, unless the request wants it truncated.
    """
    asked = body.get("max_completion_tokens")
    asked = body.get("max_tokens") if asked is None else asked
    room = model.context_length or sys.maxsize
    limit = room + 1 if model.engine == "A" else room  # recorded
    fits = not model.context_length or prompt_tokens + (asked or 1) <= limit
    if fits or body.get("context_length_exceeded_behavior") == "truncate":
        budget, left = DEFAULT_MAX_TOKENS if asked is None else asked, room - prompt_tokens
        if budget > left:
            budget = min(budget, max(1, left))
            prompt_tokens = min(prompt_tokens, max(1, room - budget))
        return budget, prompt_tokens
    name = "too_long_prompt" if prompt_tokens >= room else "too_long"
    raise ApiError(
        "too_long_turbo" if model.engine == "A" else name,
        room=limit,
        total=prompt_tokens + (asked or 1),
        prompt=prompt_tokens,
        asked=asked or 1,
    )


def count_usage(prompt_tokens: int, choices: list[Choice], cached_tokens: int = 0) -> Item:
    """Add up the tokens of an answer."""
    written = thought = 0
    for choice in choices:
        thought += choice.thought_count
        written += choice.token_count
        for call in choice.tool_calls:
            written += sum(map(count_tokens, call["function"].values()))
        if choice.function_call:
            written += sum(map(count_tokens, choice.function_call.values()))
    written += thought
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "reasoning_tokens": thought,
        "cached_tokens": cached_tokens,
    }


def find_tools(body: Item) -> list[Item]:
    return [tool["function"] for tool in body.get("tools") or ()] or body.get("functions") or []


def read_tool_choice(body: Item) -> tuple[str, list[str]]:
    """Return none, auto, required or named, and the names it is limited to."""
    choice = body.get("tool_choice")
    if choice is None:
        choice = body.get("function_call")
    names = [tool["name"] for tool in find_tools(body)]
    if choice is None or type(choice) is str:
        if choice and choice in names:
            return "named", [choice]
        mode = "required" if choice == "any" else choice
        return (mode if mode in ("none", "required") else "auto"), []
    allowed = choice.get("allowed_tools")
    wanted = [choice] if allowed is None else allowed.get("tools") or []
    limited = [(tool.get("function") or tool).get("name") for tool in wanted]
    for name in limited:
        if name not in names:
            rule = f"must name one of the tools: {', '.join(names) or 'there are none'}"
            raise refuse_value("tool_choice", rule, name)
    return "named" if allowed is None else allowed.get("mode") or "auto", limited


def fill_forced_tool(body: Item, script: Item | None) -> Any:
    """Return what a fixture says; the model of a form becomes the call of the tool it is for."""
    if script is None or not script.get("is_model"):
        return script
    mode, names = read_tool_choice(body)
    names = names or [tool["name"] for tool in find_tools(body)]
    if mode not in ("named", "required") or len(names) != 1:
        return script
    call = {"type": "tool_call", "id": None, "name": names[0], "arguments": script["content"]}
    return {**script, "content": None, "blocks": [call], "tool_calls": [call]}


NAME_BREAK = lazy_regex(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[a-z])(?=[0-9])|[_.-]")
FINAL_NAME = lazy_regex(
    r"(?:mark|attempt|report)?_?(?:submit|finish(?:ed)?|done|final|completed?|completion|terminate)"
    r"_?(?:answer|task|result|response|output|work)?",
    re.IGNORECASE,
)
FINAL_CALL = lazy_regex(
    r"(?:done|finish|complet|ready)[^.\n]{0,80}\b(?:call|use|invoke)\b(?: the)? \W?(\w+)|\b(?:call|"
    r"use|invoke)\b(?: the)? \W?(\w+)[^.\n]{0,60}\b(?:when|once)\b.{0,40}(?:done|finish|compl)",
    re.IGNORECASE,
)
HANDS_OVER = lazy_regex(r"transfer|hand_?off", re.IGNORECASE)
EXTRACTS = lazy_regex(r"extract|pars(?:e|ing)\b|\bfill|structured", re.IGNORECASE)


def topic_words(text: str) -> set[bytes]:
    """Return the words that say what a text is about; plurals count as their singular."""
    return {word.rstrip(b"s") for word in find_words(NAME_BREAK.sub(" ", text))}


def read_turn(messages: list[Item], names: Sequence[str]) -> tuple[str, list[str], bool]:
    """Return the user's last request, the tools called since, and whether a result came last.

    A call may be written as text, as smolagents and adk have it; what the user says next is its
    result.
    """
    asked, written, ends = "", False, False
    done: list[str] = []
    for message in messages:
        text, role = message_text(message), message["role"]
        spoken = re.findall(r"""(?:["']name["']: ["']|tool `)(\w+)["'`]""", text)
        found = [name for name in spoken if name in names]
        ends = role in ("tool", "function")
        if role == "user":
            ends = written or bool(found) or bool(asked and RESULT.search(text[:80]))
            if not ends:
                asked, done = text, []
        done += [get_path(call, "function", "name") for call in message.get("tool_calls") or ()]
        if role != "system":
            done, written = done + found, bool(found) and role == "assistant"
    return asked, done, ends


INSTRUCTS = {"user", "system", "developer"}  # what a tool returns must not steer


def find_final(texts: list[str], tools: list[Item]) -> list[Item]:
    """Return the tools that end a task, by their names or as the prompt says.

    Where there is one tool, to run commands, it may be a command.
    """
    named = {name for text in texts for found in FINAL_CALL.findall(text) for name in found}
    final = [tool for tool in tools if tool["name"] in named or FINAL_NAME.fullmatch(tool["name"])]
    fields = get_path(tools[0], "parameters", "properties")
    found = ENDING.search("\n".join(texts)) if fields and len(tools) == 1 and not final else None
    if fields and found and found[1][:5] == "echo ":
        command = as_object({next(iter(fields)): {"const": found[1]}})
        return [{**tools[0], "parameters": command}]
    return final


def choose_tools(body: Item) -> list[Item]:
    """Return the functions to call: those that share most words with the user's last request.

    With `auto`, none when no word is shared. After a result it is the tool that ends the task, once
    if one does; else none with `auto`, and with `required` one that was not called: so loops end.
    """
    tools = find_tools(body)
    mode, names = read_tool_choice(body)
    if mode == "required" and not tools:
        raise ApiError("missing", param="tools")
    offered = [tool for tool in tools if not names or tool["name"] in names]
    if mode in ("none", "named") or not tools:
        return offered[:1] if mode == "named" else []
    asked, done, ends = read_turn(body["messages"], [tool["name"] for tool in offered])
    texts = [message_text(message)[-PROMPT_WINDOW:] for message in body["messages"]]
    told = [text for text, each in zip(texts, body["messages"]) if each["role"] in INSTRUCTS]
    final = find_final(told, offered)
    last = (done and done[-1]) or ""
    is_passed = HANDS_OVER.search(last) and "back" not in last  # the next agent has not begun
    if ends and (final or (mode == "auto" and not is_passed)):
        ended = {tool["name"] for tool in final if tool in offered}.intersection(done)
        return [] if ended and mode == "auto" else final[:1]
    left = [tool for tool in offered if tool["name"] not in done and tool not in final]
    left = [tool for tool in left if not ends or not HANDS_OVER.search(tool["name"])] or left
    offered = (left if left or ends else final) or offered
    wanted = topic_words(asked)
    shared = []
    for tool in offered:
        known = topic_words(f"{tool['name']} {tool.get('description') or ''}")
        name = tool["name"].lower().encode()
        shared.append(sum(word in known or (len(word) > 3 and word in name) for word in wanted))
    best = max(shared)
    if best == 0 and len(offered) == 1:  # a form to fill in is known by its fields
        fields = get_path(offered[0], "parameters", "properties")
        asks = any(map(EXTRACTS.search, texts))
        best = shared[0] = bool(fields and (asks or wanted & topic_words(ENCODE(fields))))
    if not best:
        return offered[:1] if mode == "required" else []
    matching = [tool for tool, score in zip(offered, shared) if score == best]
    alone = body.get("parallel_tool_calls") is False or not body.get("tools")
    return matching[:1] if alone else matching


def make_valid(rng: HashRandom, schema: Any, place: str, is_tight: bool = False) -> str:
    try:
        value = make_instance(rng, schema)
        return ENCODE(value) if is_tight else json.dumps(value, ensure_ascii=False)
    except Unsatisfiable as error:
        raise ApiError("invalid", param=place, reason=f"cannot be satisfied: {error}") from None


def tool_call(
    rng: HashRandom, form: Form, index: int, name: str, arguments: str, id: str | None = None
) -> Item:
    """Return one tool call as messages hold it."""
    function = {"name": name, "arguments": arguments}
    id = id or form.name_call(rng, name, index)
    return {"index": index, "id": id, "type": "function", "function": function}


def choose_calls(rng: HashRandom, form: Form, body: Item, index: int) -> list[Item]:
    """Return the tool calls of one choice; with `auto`, none that was made before."""
    if TOOL_KEYS.isdisjoint(body):
        return []
    calls = []
    for at, function in enumerate(choose_tools(body)):
        name = function["name"]
        own = rng.child("call", index, at, name)
        schema = function.get("parameters") or {"type": "object"}
        place = f"tools.{name}.parameters"
        arguments = make_valid(own, schema, place, "tight-arguments" in form.traits)
        calls.append(tool_call(own, form, at, name, arguments))
    if body.get("tool_choice") not in (None, "auto"):
        return calls
    told = [message.get("tool_calls") or () for message in body["messages"]]
    made = [call.get("function") for call in itertools.chain(*told)]
    return [call for call in calls if call["function"] not in made]


def cut_calls(choice: Choice, budget: int) -> None:
    """End tool calls where the budget of tokens is spent; a name is written whole or not at all."""
    for at, call in enumerate(choice.tool_calls):
        function = call["function"]
        budget -= count_tokens(function["name"])
        pieces = split_tokens(function["arguments"])
        if len(pieces) > budget:
            function["arguments"] = "".join(pieces[: max(budget, 0)])
            choice.tool_calls = choice.tool_calls[: at + (budget >= 0)]
            choice.finish_reason = "length"
            return
        budget -= len(pieces)


def read_prompt(
    server: Server, request: Request, messages: list[Item], texts: Iterable[str]
) -> WantedForm | None:
    """Return the form that a prompt asks for, where nothing stronger says what to answer."""
    if request.script or not server.read_prompts:
        return None
    format = request.body.get("response_format") or TEXT_FORMAT
    if format["type"] != "text" and (format["type"] != "json_object" or "schema" in format):
        return None
    if not any(map(is_hinted, texts)):
        return None
    form = read_form(messages, format["type"] == "json_object")
    if form is not None:
        request.form = form.label
    return form


def make_answer(rng: HashRandom, form: WantedForm | None) -> tuple[str, int]:
    """Return an answer in the form that its prompt asks for, and the number of its tokens."""
    if form is not None:
        with contextlib.suppress(Unsatisfiable):  # what only looked like a schema
            text = form.write(rng)
            return text, count_tokens(text)
    return make_prose(rng)  # a blank goes before it, as before what continues a text


def make_content(
    rng: HashRandom, body: Item, model: Model, form: WantedForm | None
) -> tuple[str, int]:
    """Return an answer in the format asked for, and the number of its tokens."""
    format: Item = body.get("response_format") or TEXT_FORMAT
    kind = format["type"]
    if kind == "text" and model.type != "moderation":
        text, count = make_answer(rng, form)
        return text.lstrip(" "), count
    if kind == "regex":
        place = "response_format.pattern"
        if not format.get("pattern"):
            raise ApiError("missing", param=place)
        try:
            text = make_matching(rng, format["pattern"])
        except Unsatisfiable as error:
            raise ApiError("invalid", param=place, reason=str(error)) from None
    elif kind == "text":
        text = "safe"
    else:
        inner = format.get("json_schema")
        if kind == "json_schema" and inner is None and "schema" not in format:
            raise ApiError("missing", param="response_format.json_schema")
        schema = (inner or format).get("schema")
        if schema is None:
            schema = form.schemas["JSON"] if form else JSON_MODE_SCHEMA  # within a fence, perhaps
        text = make_valid(rng, schema, "response_format")
    return text, count_tokens(text)


def find_effort(body: Item, model: Model) -> str:
    """Return how much a model shall think, in the words of `reasoning_effort`."""
    effort: str = body.get("reasoning_effort") or "medium"
    if effort not in EFFORT_THOUGHTS and "any-effort" not in FORMS[model.engine].traits:
        raise refuse_value(
            "reasoning_effort", f"must be one of {', '.join(EFFORT_THOUGHTS)}", effort
        )
    if not model.thinks:
        return "none"
    switches = {**(body.get("chat_template_kwargs") or {}), **(body.get("reasoning") or {})}
    told = map(switches.get, ("enabled", "thinking", "enable_thinking"))
    return "none" if any(each is False for each in told) else effort


def compose_choice(
    choice: Choice, model: Model, effort: str, wanted: Any, rng: HashRandom, form: Form,
    body: Item, budget: int,
) -> None:  # fmt: skip
    """Write one choice of a chat answer."""
    index, thoughts = choice.index, ""
    calls = choose_calls(rng, form, body, index)
    if model.thinks and "skips-reasoning" not in form.traits:
        count = EFFORT_THOUGHTS.get(effort, 1) or int("always-thinks" in model.traits)
        own = rng.child("reasoning", index)
        thoughts = " ".join([make_thought(own.child(number)) for number in range(count)])
        if "thinks-in-content" not in form.traits:
            budget = choice.think(thoughts, body.get("stop"), budget)
            if effort == "none" and "any-effort" in form.traits:
                choice.thoughts = ()
    if budget <= 0:
        choice.finish_reason = "stop" if choice.stop_text else "length"
    elif calls:
        if "talks-beside-calls" in form.traits and body.get("tools"):
            text = make_text(rng.child("beside", index), 1)
            choice.write(text, count_tokens(text), body.get("stop"), budget)
        if choice.finish_reason != "length":
            choice.finish_reason = "tool_calls"
            choice.tool_calls = calls
            cut_calls(choice, budget - choice.token_count)
    else:
        own = rng.child("text", index) if index else rng  # nothing else takes from it
        text, count = make_content(own, body, model, wanted)
        if thoughts and "thinks-in-content" in form.traits:
            text = f"<think>\n{thoughts}\n</think>\n\n{text}"
            count = count_tokens(text)
        choice.write(text, count, body.get("stop"), budget)
    if choice.tool_calls and not body.get("tools"):
        choice.function_call, choice.tool_calls = choice.tool_calls[0]["function"], ()
        if choice.finish_reason == "tool_calls":
            choice.finish_reason = "function_call"


def script_choice(
    choice: Choice, script: Item, rng: HashRandom, form: Form, body: Item, budget: int
) -> None:
    """Write one choice that a fixture scripts; the limits on its length hold too."""
    ended = "finish_reason" in script  # as it was recorded
    most = sys.maxsize if ended else budget
    stop = None if ended else body.get("stop")
    most = choice.think(script["reasoning"] or "", stop, most)
    if choice.stop_text:
        choice.finish_reason = "stop"
        return
    blocks = script["blocks"]
    calls = [block for block in blocks if block["type"] == "tool_call"]
    if script["content"] is not None or not calls:
        text = script["content"] or ""
        choice.write(text, count_tokens(text), stop, max(most, 0))
    if calls:
        choice.finish_reason = "tool_calls"
        choice.calls_first = blocks[0] is calls[0]
    for at, call in enumerate(calls):
        own = rng.child("call", choice.index, at)
        said = tool_call(own, form, at, call["name"], call["arguments"], call["id"])
        choice.tool_calls = (*choice.tool_calls, said)


def apply_script(answer: Answer, script: Item) -> None:
    """Let a fixture override what surrounds its text."""
    for name in ("id", "created", "model", "role"):
        setattr(answer, name, script.get(name) or getattr(answer, name))
    answer.request.id = answer.id
    usage, given = answer.usage, script.get("usage") or {}
    if {"prompt_tokens", "completion_tokens", "total_tokens"} <= given.keys():
        usage["reasoning_tokens"] = 0  # a whole one was given
    usage.update(given)
    if "total_tokens" not in given:
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    for choice in answer.choices:
        choice.finish_reason = script.get("finish_reason") or choice.finish_reason


def finish_answer(answer: Answer, rng: HashRandom, texts: Iterable[str]) -> Answer:
    """Add the echo and the logprobs that a request asked for, and what a fixture overrides."""
    body = answer.request.body
    if answer.request.script:
        apply_script(answer, answer.request.script)
    asked = body.get("logprobs")
    if asked is not None and asked is not False:
        count = (body.get("top_logprobs") or 0) if asked is True else asked
        for choice in answer.choices:
            own = rng.child("logprobs", choice.index)
            choice.scores = make_scores(own, [*choice.thoughts, *choice.pieces], count)
    if body.get("echo"):
        answer.prompt = [{"text": "\n".join(texts)}]
        if asked:
            pieces = split_tokens(answer.prompt[0]["text"])
            scores = make_scores(rng.child("prompt logprobs"), pieces, 0)
            answer.prompt[0]["logprobs"] = shape_logprobs("tokens", pieces, scores)
    return answer


def send_answer(answer: Answer) -> Any:
    """Return what sends an answer, whole or as a stream."""
    if answer.request.body.get("stream"):
        return Events(answer.stream())
    return Reply(encode_answer(answer), content_type=answer.form.rows["content type"])


def compose_chat(server: Server, request: Request) -> Answer:
    """Write the answer to a conversation."""
    body = request.body
    model = resolve_model(server, body["model"], "chat")
    messages, texts = body["messages"], list(map(message_text, body["messages"]))
    prompt_tokens, before = count_messages(messages, texts, model)
    form = FORMS[model.engine]
    if body.get("tools") and body.get("tool_choice") == "none":
        form = FORMS.get(f"{model.engine} without tools", form)
    effort = find_effort(body, model)
    refuse_chat(body, model, form.traits, effort != "none", server.strict)
    rng = HashRandom.of("chat", pick_facts(body, CHAT_FACTS))
    request.id = form.name_answer(rng)
    for tools in (body.get("tools"), body.get("functions")):
        is_told = tools and body.get("tool_choice") != "none"
        prompt_tokens += count_tokens(ENCODE(tools)) if is_told else 0
    budget, prompt_tokens = find_budget(body, model, prompt_tokens)
    script = request.script = fill_forced_tool(body, request.script)
    wanted = read_prompt(server, request, messages, texts)
    choices = []
    for index in range(body.get("n") or 1):
        choice = Choice(index)
        if script:
            script_choice(choice, script, rng, form, body, budget)
        else:
            compose_choice(choice, model, effort, wanted, rng, form, body, budget)
        if choice.finish_reason == "tool_calls":
            request.form = ""
        choices.append(choice)
    cached = before // CACHED_TOKENS * CACHED_TOKENS
    answer = Answer(request, form, choices, count_usage(prompt_tokens, choices, cached))
    return finish_answer(answer, rng, texts)


@route("POST /v1/chat/completions", body=CHAT_FIELDS, kind="chat", response=TEXT)
def create_chat_completion(server: Server, request: Request) -> Any:
    """Answer a conversation, whole or as a stream."""
    return send_answer(compose_chat(server, request))


# --- Responses

INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
ECHO: Item = {  # what a response repeats of its request, and the defaults
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "temperature": 1.0,
    "top_p": 1.0, "max_output_tokens": None, "max_tool_calls": None,
    "text": {"format": TEXT_FORMAT}, "reasoning": {"effort": None, "summary": None},
    "truncation": "disabled", "metadata": {}, "top_logprobs": 0, "prompt_cache_key": None,
    "safety_identifier": None, "user": None,
}  # fmt: skip


# What a chat asks in the same words.
SAME_IN_CHAT = ("model", "temperature", "top_p", "parallel_tool_calls", "stream")
ITEM_PARTS = """
      type!
      @input_text,@output_text
        text! -annotations,logprobs
      @input_image
        image_url file_id detail
      @input_audio
        input_audio!:dict
          data -format"""
RESPONSE_FIELDS = Fields(*[CHAT_FIELDS[name] for name in (*SAME_IN_CHAT, "top_logprobs")], f"""\
input!:str|list
  type
  @message
    role!=user|assistant|system|developer -id,status content!:str|list{ITEM_PARTS}
  @function_call
    call_id!,name!:1.. arguments! -id,status
  @function_call_output
    call_id!:1.. -id,status output!:str|list{ITEM_PARTS}
tools:list:..1024
  type!
  @function
    name!:1.. description parameters:dict -strict
tool_choice:str|dict=none|auto|required
  type!
  @function
    name!
  @allowed_tools
    mode!=auto|required tools!:list
      type!
      @function
        name!
text:dict
  verbosity=low|medium|high format:dict
    type!=text|json_object|json_schema|regex
    @json_schema
      name!:1..64 schema!:dict strict:bool -description
reasoning:dict
  effort summary=auto|concise|detailed
max_output_tokens:int:0.. max_tool_calls:int:1.. truncation=auto|disabled include:list[str]
store,background:bool prompt,metadata,stream_options:dict conversation:str|dict
previous_response_id service_tier prompt_cache_key prompt_cache_retention safety_identifier
user instructions""")  # fmt: skip
# What a chat asks in other words; those are also the names in its errors.
OTHER_IN_CHAT = {
    "max_tokens": "max_output_tokens", "messages": "input", "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}  # fmt: skip


def chat_tool(tool: Item) -> Item:
    given = pick_given(tool, ("name", "description", "parameters", "strict"))
    return {"type": "function", "function": given}


def chat_choice(choice: Any) -> Any:
    """Return `tool_choice` as a chat has it; hosted tools are never called."""
    if type(choice) is str:
        return choice
    is_limit = choice["type"] == "allowed_tools"
    chosen = choice["tools"] if is_limit else [choice]
    tools = [chat_tool({"name": tool["name"]}) for tool in chosen if tool["type"] == "function"]
    if not is_limit or not tools:
        return tools[0] if tools else "none"
    return {"allowed_tools": {"mode": choice["mode"], "tools": tools}}


def chat_body(body: Item) -> Item:
    """Return the body of a chat that asks the same."""
    messages = convert_items(body)
    if len(messages) == bool(body.get("instructions")):
        raise ApiError("missing", param="input")
    given = body.get("tools") or ()
    tools = [chat_tool(tool) for tool in given if tool["type"] == "function"]
    format = get_path(body, "text", "format") or {}
    chat = {
        **pick_given(body, SAME_IN_CHAT),
        **{name: get_path(body, *place.split(".")) for name, place in OTHER_IN_CHAT.items()},
        "messages": messages,
        "tools": tools or None,
        "response_format": pick_given(format, ("type", "schema", "pattern")) or None,
    }
    choice = body.get("tool_choice")
    if choice is not None and (tools or choice != "required" or not given):
        chat["tool_choice"] = chat_choice(choice)
    if body.get("truncation") == "auto":
        chat["context_length_exceeded_behavior"] = "truncate"
    if "message.output_text.logprobs" in (body.get("include") or ()):
        chat.update(logprobs=True, top_logprobs=body.get("top_logprobs"))
    return pick_given(chat, chat)


def list_items(choice: Choice, summarised: bool, digits: str) -> list[tuple[Item, Any]]:
    """Return reasoning, text and calls as items, with their pieces; the last one may be cut."""
    items: list[tuple[Item, Any]] = []

    def add(prefix: str, type: str, pieces: Any, **fields: Any) -> None:
        id = f"{prefix}_{digits}{len(items):02x}"
        items.append(({"id": id, "type": type, "status": "completed", **fields}, pieces))

    if choice.thoughts:
        kind = "summary_text" if summarised else "reasoning_text"
        parts = [{"type": kind, "text": "".join(choice.thoughts)}]
        summary, content = (parts, []) if summarised else ([], parts)
        more = {"summary": summary, "content": content, "encrypted_content": None}
        add("rs", "reasoning", choice.thoughts, **more)
    cut = choice.finish_reason in INCOMPLETE
    if choice.text or not (choice.tool_calls or (choice.thoughts and cut)):
        logprobs = list_logprobs(choice.pieces, choice.scores[len(choice.thoughts) :])
        part = {"type": "output_text", "text": choice.text, "annotations": [], "logprobs": logprobs}
        add("msg", "message", choice.pieces, role="assistant", content=[part])
    for call in choice.tool_calls:
        pieces = call.get("pieces") or split_tokens(call["function"]["arguments"])
        add("fc", "function_call", pieces, call_id=call["id"], **call["function"])
    items[-1][0]["status"] = "incomplete" if cut else "completed"
    return items


def response_usage(answer: Answer) -> Item:
    """Return the usage in the words of the Responses API, which fixtures may use."""
    usage = answer.usage
    cached = (usage.get("prompt_tokens_details") or usage).get("cached_tokens", 0)
    thought = (usage.get("completion_tokens_details") or usage).get("reasoning_tokens", 0)
    told = {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": usage["total_tokens"],
    }
    return {name: usage.get(name, value) for name, value in told.items()}


def echo_request(body: Item) -> Item:
    """Return what a response repeats of its request, but for keys."""
    echo = {"instructions": body.get("instructions"), **ECHO}
    for name, value in pick_given(body, ECHO).items():
        echo[name] = {**ECHO[name], **value} if type(ECHO[name]) is dict else value
    blank = {"description": None, "parameters": None, "strict": None}
    echo["tools"] = [
        {**blank, **tool}
        if tool["type"] == "function"
        else {key: tool[key] for key in tool if key not in ("authorization", "headers")}
        for tool in echo["tools"]
    ]
    return echo


def response_object(answer: Answer, echo: Item, items: list[Item]) -> Item:
    """Return a response that has ended."""
    reason = INCOMPLETE.get(answer.choices[0].finish_reason)
    return {
        "id": answer.id,
        "object": "response",
        "created_at": answer.created,
        "status": "incomplete" if reason else "completed",
        "completed_at": None if reason else answer.created,
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "model": answer.model,
        "output": items,
        **echo,
        "service_tier": "default",
        "background": False,
        "store": False,
        "previous_response_id": None,
        "usage": response_usage(answer),
    }


def item_events(place: Item, item: Item, pieces: Any) -> Iterator[Any]:
    """Yield a text, reasoning, its summary or the arguments of a call, piece by piece."""
    if "arguments" in item:
        said = {"name": item["name"], "arguments": item["arguments"]}
        yield "function_call_arguments.delta", {**place, "delta": SLOT}, pieces
        yield "function_call_arguments.done", {**place, **said}
        return
    (part,) = item.get("summary") or item["content"]
    stem, name, index = "content_part", part["type"], "content_index"
    if name == "summary_text":
        stem, name, index = "reasoning_summary_part", "reasoning_summary_text", "summary_index"
    more: Item = {"logprobs": []} if name == "output_text" else {}
    place = {**place, index: 0}
    yield f"{stem}.added", {**place, "part": {**part, "text": "", **more}}
    if not part.get("logprobs"):
        yield f"{name}.delta", {**place, "delta": SLOT, **more}, pieces
    for piece, logprobs in zip(pieces, part.get("logprobs", ())):
        yield f"{name}.delta", {**place, "delta": piece, "logprobs": [logprobs]}
    yield f"{name}.done", {**place, **{key: part[key] for key in ("text", *more)}}
    yield f"{stem}.done", {**place, "part": part}


def response_events(response: Item, items: list[tuple[Item, Any]]) -> Iterator[Any]:
    """Yield the type and the fields of each event; the last one has all of the response.

    An event that comes for each piece of a text is yielded once, with the pieces.
    """
    nothing = dict.fromkeys(("completed_at", "incomplete_details", "usage"))
    opened = {"response": {**response, **nothing, "status": "in_progress", "output": []}}
    yield "created", opened
    yield "in_progress", opened
    for at, (item, pieces) in enumerate(items):
        later = [key for key in ("summary", "content", "arguments") if key in item]
        blank: Item = {key: type(item[key])() for key in later}
        added = {**item, "status": "in_progress", **blank}
        yield "output_item.added", {"output_index": at, "item": added}
        yield from item_events({"item_id": item["id"], "output_index": at}, item, pieces)
        yield "output_item.done", {"output_index": at, "item": item}
    yield response["status"], {"response": response}


def number_events(events: Iterable[Any]) -> Iterator[bytes]:
    """Yield the bytes of numbered events."""
    number = 0
    for type, fields, *pieces in events:
        head = f'event: response.{type}\ndata: {{"type":"response.{type}","sequence_number":'
        end = f",{ENCODE(fields)[1:]}\n\n"
        for text in repeat_json(end, pieces[0]) if pieces else (end,):
            yield f"{head}{number}{text}".encode()
            number += 1


@route("POST /v1/responses", body=RESPONSE_FIELDS, kind="response", response=TEXT)
def create_response(server: Server, request: Request) -> Any:
    """Answer a conversation in items, whole or as a stream of named events."""
    body = request.body
    if body.get("previous_response_id"):
        raise ApiError("no_response", id=body["previous_response_id"], param="previous_response_id")
    for name in ("background", "conversation", "prompt"):
        if body.get(name):
            raise ApiError("invalid", param=name, reason="is not supported: nothing is stored")
    request.body = chat_body(body)
    try:
        answer = compose_chat(server, request)
    except ApiError as error:
        param = OTHER_IN_CHAT.get(error.param or "", error.param)
        raise ApiError(error.name, param=param, **error.facts) from None
    digits = HashRandom.of("response", answer.id).hex(62)
    summarised = bool((body.get("reasoning") or {}).get("summary"))
    items = list_items(answer.choices[0], summarised, digits[32:62])
    if not (request.script or {}).get("id"):
        answer.id = request.id = "resp_" + digits[:32]
    response = response_object(answer, echo_request(body), [item for item, _ in items])
    if body.get("stream"):
        return Events(number_events(response_events(response, items)), encoded=True)
    return response


@route("GET /v1/responses/{id}")
@route("DELETE /v1/responses/{id}")
@route("POST /v1/responses/{id}/cancel")
def refuse_response(server: Server, request: Request) -> Any:
    """Answer that there is no such response: none is stored."""
    raise ApiError("no_response", id=request.params["id"], param="response_id")


# --- Text completions

MAX_INPUT_ITEMS = 2048  # texts of one embedding request

COMPLETION_FIELDS = Fields(SAMPLING_ROWS + "prompt!:str|list logprobs:int:0..20")
COMPLETION_FACTS = frozenset((*COMPLETION_FIELDS, "suffix")) - UNDRAWN


def read_inputs(value: Any, place: str) -> list[Any]:
    """Return a list of texts or token lists, whichever way they were sent."""
    kinds = {str} if type(value) is str else set(map(type, value))
    inputs = [value] if type(value) is str or kinds == {int} else value
    if not 0 < len(inputs) <= MAX_INPUT_ITEMS:
        raise refuse_value(place, f"must have 1 to {MAX_INPUT_ITEMS} items", len(inputs))
    if kinds not in ({str}, {int}, {list}):
        raise refuse_value(place, "must be a string, or an array of strings or token ids", value)
    for index, item in enumerate(inputs):
        if type(item) is list and not (item and all(type(id) is int and id >= 0 for id in item)):
            where = f"{place}[{index}]" if kinds == {list} else place
            raise refuse_value(where, "must be an array of token ids", item)
    return list(inputs)


def input_text(value: Any) -> str:
    return value if type(value) is str else " ".join([f"token{id}" for id in value])


def compose_completion(server: Server, request: Request) -> Answer:
    """Write the continuations of each prompt."""
    body = request.body
    prompts = read_inputs(body["prompt"], "prompt")
    if not all(prompts):
        raise ApiError("empty_prompt", param="prompt")
    model = resolve_model(server, body["model"], "language")
    facts = pick_facts(body, COMPLETION_FACTS)
    rng = HashRandom.of("completion", [facts, prompts])
    request.id = random_id(rng)
    script = request.script
    form = FORMS["completion of A" if model.engine == "A" else "completion"]
    choices: list[Choice] = []
    prompt_tokens = 0
    for prompt in prompts:
        length = count_tokens(prompt) if type(prompt) is str else len(prompt)
        budget, read = find_budget(body, model, length)
        prompt_tokens += read
        own = HashRandom.of("prompt", [facts, prompt])
        text = input_text(prompt)
        wanted = read_prompt(server, request, [{"role": "user", "content": text}], [text])
        for index in range(body.get("n") or 1):
            choice = Choice(len(choices))
            if script:
                script_choice(choice, script, rng, form, body, budget)
            else:
                text, count = make_answer(own.child("text", index), wanted)
                choice.write(text, count, body.get("stop"), budget)
            choices.append(choice)
    answer = Answer(request, form, choices, count_usage(prompt_tokens, choices))
    answer.objects = completion_objects(request, server.strict)
    return finish_answer(answer, rng, map(input_text, prompts))


@route(
    "POST /v1/completions",
    body=COMPLETION_FIELDS,
    kind="completion",
    prompt="prompt",
    response=TEXT,
)
def create_completion(server: Server, request: Request) -> Any:
    """Continue a prompt, whole or as a stream."""
    return send_answer(compose_completion(server, request))


# --- Embeddings


def embed(model: Model, value: Any, dimensions: int | None) -> list[int]:
    vector = make_vector(input_text(value), model.dimensions, model.id.encode())
    return truncate_vector(vector, dimensions) if dimensions else vector


def quote_bytes(data: bytes) -> str:
    return f'"{base64.b64encode(data).decode()}"'


def normalise_vectors(said: Item) -> Item:
    given = said["embedding"]
    return {"vectors": given if list in map(type, given) else [given]}


VECTORS = Keys("embedding:list[int|float|list[int|float:-3.4e38..3.4e38]:-3.4e38..3.4e38]:1..")
SCRIPTED_VECTORS = ResponseType("embedding", VECTORS, normalise_vectors)


def embed_inputs(request: Request, model: Model, inputs: list[Any]) -> Iterator[str]:
    """Yield the JSON of each input's vector, generated or from a fixture."""
    packed = request.body.get("encoding_format") == "base64"
    if request.script is None:
        for value in inputs:
            vector = embed(model, value, request.body.get("dimensions"))
            yield quote_bytes(pack_floats(vector)) if packed else f"[{format_floats(vector)}]"
        return
    vectors = request.script["vectors"] or [[]]
    for numbers in [*vectors, *vectors[-1:] * len(inputs)][: len(inputs)]:
        floats = struct.pack(f"<{len(numbers)}f", *numbers)
        yield quote_bytes(floats) if packed else ENCODE(numbers)


@route(
    "POST /v1/embeddings",
    body=f"{MODEL_ROW} input!:str|list encoding_format=float|base64 "
    f"dimensions:int:1..{MAX_DIMENSIONS} user",
    kind="embedding",
    input="input",
    response=SCRIPTED_VECTORS,
)
def create_embeddings(server: Server, request: Request) -> Any:
    """Embed texts: those that share words are close."""
    body = request.body
    inputs = read_inputs(body["input"], "input")
    model = resolve_model(server, body["model"], "embedding")
    if (body.get("dimensions") or 0) > model.dimensions:
        rule = f"must be at most {model.dimensions}, as {model.id} has them"
        raise refuse_value("dimensions", rule, body["dimensions"])
    request.id = random_id(HashRandom.of_bytes(request.raw))
    # Written by hand: the JSON encoder would take ten times as long for the numbers.
    items = [
        f'{{"object":"embedding","index":{index},"embedding":{numbers}}}'
        for index, numbers in enumerate(embed_inputs(request, model, inputs))
    ]
    head = f'{{"object":"list","model":{ENCODE(body["model"])},"data":['
    return Reply(f"{head}{','.join(items)}]}}".encode())


# --- Rerank

RERANK_FIELDS = Fields(f"""\
{MODEL_ROW} query! top_n:int:1.. documents!:list[str|dict]:1..{MAX_INPUT_ITEMS}
return_documents:bool rank_fields:list[str]""")


def document_text(document: Any, names: list[str] | None) -> str:
    if type(document) is str:
        return document
    values = pick_given(document, document if names is None else names).values()
    return "\n".join([value if type(value) is str else ENCODE(value) for value in values])


SCRIPTED_SCORES = ResponseType("rerank", Keys("scores:list[int|float]:1.."))


@route(
    "POST /v1/rerank", body=RERANK_FIELDS, kind="rerank", input="query", response=SCRIPTED_SCORES
)
def rerank(server: Server, request: Request) -> Any:
    """Sort documents by their likeness to a query."""
    body, documents = request.body, request.body["documents"]
    model = resolve_model(server, body["model"], "rerank")
    texts = [document_text(document, body.get("rank_fields")) for document in documents]
    wanted = embed(model, body["query"], None)
    whole = cosine_similarity(wanted, wanted)  # but for rounding 1
    likeness = [cosine_similarity(wanted, embed(model, text, None)) / whole for text in texts]
    scores = [round(min(1.0, cosine), 6) for cosine in likeness]
    if request.script:
        scores = (request.script["scores"] + [0.0] * len(texts))[: len(texts)]
    results = []
    for index in sorted(range(len(scores)), key=lambda i: -scores[i])[: body.get("top_n")]:
        text = documents[index] if type(documents[index]) is str else ENCODE(documents[index])
        document = {"text": text} if body.get("return_documents") else {}
        results.append({"index": index, "relevance_score": scores[index], "document": document})
    rng = HashRandom.of("rerank", [model.id, body["query"], documents])
    request.id = random_id(rng)
    tokens = sum(map(count_tokens, [*texts, *[body["query"]] * len(texts)]))
    return {
        "object": "rerank", "id": request.id, "model": model.id, "results": results,
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }  # fmt: skip


# === File and job endpoints ===


# --- Stored objects

USER = "parlel"  # whose models and jobs these are
USER_ID = "65f0c2a1b3d4e5f60718293a"
UNKNOWN_MODEL = Model("chat", "", traits=())  # what a base that the catalogue lacks counts as
OPENAI_PURPOSES = {"batch": "batch-api", "batch_output": "batch-generated"}
JOBS: dict[str, Jobs] = {}
# No size has more than 18 digits.
RANGE = lazy_regex(r"bytes=(?=-?[0-9])([0-9]{0,18})[0-9]*-([0-9]{0,18})[0-9]*")


def merge(template: Item, changes: Item) -> Item:
    """Return a template with changes, also inside of its objects; `None` changes nothing.

    Raises ApiError for a value of another kind than the template's, which a seed may have.
    """
    merged: Item = copy_json(template)
    for name, value in changes.items():
        known = merged.get(name)
        if type(value) is dict and type(known) is dict:
            merged[name] = merge(known, value)
        elif value is not None:
            if known not in (None, "auto", "max") and KINDS[type(value)] != KINDS[type(known)]:
                raise refuse_value(name, f"must be {KIND_NAMES[type(known)]}", value)
            merged[name] = value
    return merged


class Jobs:
    """The objects of one collection, how they go, and the routes that all of them have.

    make      `make(server, item)` returns what an object has that its item lacks
    prefix    of ids
    key       the member that is the id, as `status` is the one of the status
    fields    of who makes one, which seeds are checked by
    statuses  from the first to the last, one taken whenever a job is retrieved
    enter     `enter(server, job, status)` does the work of a status and returns what changes
    view      `view(server, request, job)` returns a job as a client sees it
    cancelled the status of a job that is cancelled, and those that follow it
    filters   members by which a list is asked for
    listed    the members of a list's answer, or "array"; "" where there is no list
    most      of a list that is asked for no limit
    """

    key, status = "id", "status"
    prefix = statuses = cancelled = filters = ""
    fields = NO_FIELDS
    listed, most = "data", MAX_OBJECTS
    enter: Callable[[Any, Item, str], Item]
    view: Any = staticmethod(lambda server, request, job: job)

    def __init__(
        self, collection: str, path: str, make: Callable[[Any, Item], Item], **facts: Any
    ) -> None:
        self.collection, self.make = collection, make
        self.__dict__.update(facts)
        self.order = self.statuses.split()
        ladders = (self.order, self.cancelled.split())
        self.following = {one: next for each in ladders for one, next in zip(each, each[1:])}
        JOBS[collection] = self
        route(f"GET {path}/{{id}}")(self.get)
        if self.listed:
            query = f"limit:int:0..{MAX_OBJECTS} after mine {self.filters}"
            route(f"GET {path}", query=query)(self.list)
        if self.cancelled:
            route(f"POST {path}/{{id}}/cancel")(self.cancel)

    def objects(self, server: Server) -> Collection:
        found: Collection = getattr(server, self.collection)
        return found

    def enter_status(self, server: Server, id: str, job: Item, status: str) -> Item:
        changes = {self.status: status, **self.enter(server, job, status)}
        return self.objects(server).update(id, **changes)

    def advance(self, server: Server, id: str) -> Item:
        """Take a job to its next status, or to its last where jobs are instant."""
        with server.job_lock:
            job = self.objects(server).get(id)
            while job.get(self.status) in self.following:
                status, end = self.following[job[self.status]], server.starts.get(id, ("",))[0]
                if end not in ("", *self.order) and status == self.order[:4][-1]:
                    status = end  # before the last of the work
                job = self.enter_status(server, id, job, status)
                if not server.instant_jobs:
                    break
        return job

    def start(self, server: Server, request: Request, item: Item) -> Any:
        job = server._store(self.collection, item)
        id = job[self.key]
        end = (request.script or {}).get("status", "")
        server.starts[id] = end, pick_given(request.headers, ["x-test-id"])
        return self.view(server, request, self.advance(server, id) if server.instant_jobs else job)

    def get(self, server: Server, request: Request) -> Any:
        """Describe a job, one step on."""
        return self.view(server, request, self.advance(server, request.params["id"]))

    def list(self, server: Server, request: Request) -> Any:
        """List what there is, newest first; jobs do not move."""
        found = list(self.objects(server))
        for name in self.filters.split():
            wanted = request.args.get(name) or ""
            wanted = OPENAI_PURPOSES.get(wanted, wanted)
            found = [job for job in found if wanted in ("", job.get(name))]
        page, more = take_page(found, request.args, self.key, self.most)
        shown = [self.view(server, request, job) for job in page]
        if self.listed == "array":
            return wrap_list(request, shown, server.strict, more)
        return pick_given({"object": "list", "data": shown, "has_more": more}, self.listed.split())

    def cancel(self, server: Server, request: Request) -> Any:
        """Cancel a job that has not ended."""
        jobs, status = self.objects(server), self.cancelled.split()[0]
        with server.job_lock:
            job = jobs.get(request.params["id"])
            if job["status"] in self.following:
                job = self.enter_status(server, job["id"], job, status)
        if job["status"] != status:
            raise ApiError("bad_state", noun=jobs.noun, id=job["id"], status=job["status"])
        return self.view(server, request, job)


def add_model(server: Server, id: str, base: str) -> None:
    """Have a model answer as its base does; of too many the oldest goes."""
    with server._lock:
        server.models[id] = server.models.get(base, UNKNOWN_MODEL).derive(id, USER)
        if len(server.models) > len(MODELS) + MAX_OBJECTS:
            del server.models[next(id for id in server.models if id not in MODELS)]


def serve_bytes(
    request: Request, data: bytes, content_type: str = "application/octet-stream"
) -> Reply:
    """Return bytes, or the one range of them that the request asks for."""
    headers, size = {"Accept-Ranges": "bytes"}, len(data)
    found = RANGE.fullmatch(request.headers.get("range", ""))
    first, last = found.groups() if found else ("", "")
    if not found or (first and last and int(last) < int(first)):  # ignored, as RFC 9110 has it
        return Reply(data, 200, content_type, headers)
    start = int(first) if first else max(0, size - int(last))
    part = range(size)[start : int(last) + 1 if first and last else size]
    if not part:
        error = ApiError("bad_range", size=size)
        error.headers["Content-Range"] = f"bytes */{size}"
        raise error
    headers["Content-Range"] = f"bytes {part[0]}-{part[-1]}/{size}"
    return Reply(data[part[0] : part[-1] + 1], 206, content_type, headers)


# --- Files

MAX_STORED_BYTES = 256 * 2**20  # contents of all files together
PARSED_BYTES = 2 * 2**20  # of a JSONL file: what is parsed line by line, the rest is counted

MAX_PARTS = 250  # of an upload
FILE_TYPES = ("jsonl", "csv", "parquet")
UPLOAD_ROWS = f"""\
purpose!=fine-tune|batch-api|eval|calibration|eval-sample|eval-output|eval-summary\
|batch-generated|batch|batch_output|assistants|assistants_output|vision|user_data|evals
file_name:1.. file_type={"|".join(FILE_TYPES)} checksum"""
UPLOAD_FIELDS = Fields(UPLOAD_ROWS, "file:Upload")
MESSAGES = """\
messages!:list:1..
  role!=system|user|assistant|tool|developer content:str|list[dict]"""
DATASETS = {  # what a line of a training file may be; its first field tells which
    "CONVERSATION": Fields(MESSAGES),
    "INSTRUCTION": Fields("prompt! completion!"),
    "GENERAL": Fields("text!"),
    "PREFERENCE": Fields(
        Field("input!", dict, fields=Fields(MESSAGES)),
        "preferred_output!,non_preferred_output!:list:1..",
    ),
}
BATCH_LINE_FIELDS = Fields(
    "custom_id!:1..64 method=POST url",
    Field("body!", dict, fields=Fields(Field("stream", bool, choices=(False,)))),
)
LINES = {  # what is checked, by purpose
    "fine-tune": NO_FIELDS, "batch-api": BATCH_LINE_FIELDS, "eval": NO_FIELDS
}  # fmt: skip
FILE: Item = {
    "object": "file", "filename": "data.jsonl", "bytes": 0, "purpose": "fine-tune",
    "Processed": False, "LineCount": 0, "processing_status": "PENDING",
}  # fmt: skip


def read_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    lines = enumerate(map(bytes.rstrip, io.BytesIO(data)), 1)
    return ((number, line) for number, line in lines if line)


def parse_line(line: bytes) -> Item:
    value = parse_json(line)
    if type(value) is not dict:
        raise ApiError("bad_json", reason="a line must be a JSON object")
    return value


def find_format(row: Item) -> str:
    """Return the format of a training file by one of its lines."""
    for format, fields in DATASETS.items():
        if fields.required[0] in row:
            return format
    raise ApiError("missing", param=" or ".join(fields.required[0] for fields in DATASETS.values()))


def validate_lines(data: bytes, purpose: str) -> Item:
    """Check the first `PARSED_BYTES` of a JSONL file; return the report."""
    report: Item = {"valid": True, "nlines": sum(1 for _ in read_lines(data))}
    wrong = {"valid": False, "error": "The file has no lines.", "error_type": "INVALID_FORMAT"}
    fields, size = LINES[purpose], 0
    for number, line in read_lines(data):
        size += len(line)
        if size > PARSED_BYTES:
            break
        try:
            row = parse_line(line)
            if purpose == "fine-tune":
                fields = DATASETS[report.setdefault("dataset_format", find_format(row))]
            fields.check(row)
        except ApiError as error:
            return {**wrong, "error": f"Line {number}: {error.message}", "line_number": number}
    return report if report["nlines"] else wrong


def put_data(server: Server, file: Item, data: bytes) -> Item:
    """Keep a file's data and return what is known by it; nobody looks into CSV and Parquet."""
    server._keep(file["id"], data)
    is_checked = file["FileType"] == "jsonl" and file["purpose"] in LINES
    report = validate_lines(data, file["purpose"]) if is_checked else {"valid": True}
    return {
        "bytes": len(data), "Processed": True, "LineCount": report.get("nlines", data.count(b"\n")),
        "validation_report": {"file_id": file["id"], **report},
        "processing_status": report.get("error_type", "COMPLETED"),
    }  # fmt: skip


def store_lines(server: Server, name: str, purpose: str, lines: bytes) -> str:
    item = {"filename": name, "purpose": purpose, "content": lines}
    id: str = server._store("files", item)["id"]
    return id


def file_object(server: Server, item: Item) -> Item:
    """Return what a file lacks; its `content`, a text or bytes, is its data."""
    data = item.pop("content", None)
    server._drop(item["id"])  # of an older file
    item["purpose"] = OPENAI_PURPOSES.get(item.get("purpose", ""), item.get("purpose"))
    suffix = (item.get("filename") or "").rpartition(".")[2].lower()
    kind = suffix if suffix in FILE_TYPES else "jsonl"
    file = merge({"created_at": server._now(), "FileType": kind, **FILE}, item)
    if data is None:
        return file
    data = data.encode() if type(data) is str else data
    return {**file, **put_data(server, file, data)}


FILES = Jobs(
    "files", "/v1/files", file_object, prefix="file-", fields=UPLOAD_FIELDS, filters="purpose",
    listed="object data has_more",
)  # fmt: skip
route("POST /v1/files/{id}/preprocess")(FILES.get)


def find_file(server: Server, id: str, param: str, purpose: str = "") -> Item:
    """Return the file that a body names, which must serve a purpose."""
    if id not in server.files:
        raise ApiError("no_object", param=param, noun="File", id=id)
    file, reason = server.files.get(id), ""
    report = file.get("validation_report") or {"valid": file["Processed"]}
    if purpose not in ("", file["purpose"]):
        reason = f"its purpose is {file['purpose']}, not {purpose}"
    elif purpose == "fine-tune" and not report["valid"]:
        reason = report.get("error") or "its data was never put"
    if reason:
        raise ApiError("bad_file", param=param, id=id, reason=reason)
    return file


@route("POST /v1/files", body=UPLOAD_FIELDS, max_bytes=STORAGE_LIMIT)
@route("POST /v1/files/upload", body=Fields(UPLOAD_ROWS, "file!:Upload"), max_bytes=STORAGE_LIMIT)
def create_file(server: Server, request: Request) -> Any:
    """Store a file from a multipart body, or say where its data is to be put."""
    body, upload = request.body, request.body.get("file")
    name = body.get("file_name") or (upload.filename if upload else "")
    item = {
        "filename": re.split(r"[/\\]", name)[-1] or None, "purpose": body["purpose"],
        "FileType": body.get("file_type"), "content": upload.data if upload else None,
    }  # fmt: skip
    file = server._store("files", item)
    if upload:
        return file
    place = f"{request.origin}/__upload/{file['id']}"
    return Reply(b"", 302, headers={"Location": place, "X-Together-File-Id": file["id"]})


@route(
    "POST /v1/files/multipart/initiate",
    body=Fields(UPLOAD_ROWS, f"file_size!:int:1.. num_parts!:int:1..{MAX_PARTS}"),
)
def initiate_upload(server: Server, request: Request) -> Any:
    """Announce a large file that comes in parts."""
    request.body.pop("file", None)  # none of it is there yet
    place, id = create_file(server, request).headers.values()
    parts = [
        {"PartNumber": number, "URL": f"{place}/{number}", "Headers": {}}
        for number in range(1, request.body["num_parts"] + 1)
    ]
    return {"upload_id": id, "file_id": id, "parts": parts}


def admit_upload(server: Server, params: dict[str, str]) -> None:
    server.files.get(params["id"])
    part = params.get("part", "1")
    if part not in map(str, range(1, MAX_PARTS + 1)):
        raise ApiError("no_object", param="part", noun="Part", id=part)


@route("PUT /__upload/{id}", open=True, max_bytes=STORAGE_LIMIT, admit=admit_upload)
@route("PUT /__upload/{id}/{part}", open=True, max_bytes=STORAGE_LIMIT, admit=admit_upload)
def put_file(server: Server, request: Request) -> Any:
    """Take the data of an announced file, or one part of it; it needs no key."""
    admit_upload(server, request.params)
    id, part = request.params["id"], request.params.get("part")
    status = server.files.get(id)["processing_status"]
    if status != "PENDING" and server.contents.get(id) != request.raw:  # the same again is fine
        raise ApiError("bad_state", noun="File", id=id, status=status)
    if part:
        server._keep(f"{id}/{part.zfill(3)}", request.raw)
    else:
        server.files.update(id, **put_data(server, server.files.get(id), request.raw))
    return Reply(headers={"ETag": f'"{zlib.crc32(request.raw):08x}"'})


@route(
    "POST /v1/files/multipart/complete",
    body="upload_id! file_id! parts!:list:1..\n  part_number!:int etag",
)
@route("POST /v1/files/multipart/abort", body="upload_id! file_id!")
def end_upload(server: Server, request: Request) -> Any:
    """Join the parts of a large file, or forget it."""
    body, id = request.body, request.body["upload_id"]
    if id not in server.files or id in server.contents or id != body["file_id"]:
        raise ApiError("no_object", param="upload_id", noun="Upload", id=id)
    if request.route.path.endswith("abort"):
        server.files.remove(id)
        return {"success": True}
    names = sorted(name for name in list(server.contents) if name.startswith(f"{id}/"))
    if names != sorted(f"{id}/{part['part_number']:03}" for part in body["parts"]):
        raise ApiError("invalid", param="parts", reason="must be the parts that were put")
    data = b"".join(map(server.contents.pop, names))
    return {"file": server.files.update(id, **put_data(server, server.files.get(id), data))}


@route("GET /v1/files/{id}/content")
def get_file_content(server: Server, request: Request) -> Any:
    """Return a file's bytes, or a range of them."""
    id = server.files.get(request.params["id"])["id"]
    if id not in server.contents:
        raise ApiError("no_object", param="id", noun="The content of", id=id)
    return serve_bytes(request, server.contents[id])


@route("DELETE /v1/files/{id}")
def delete_file(server: Server, request: Request) -> Any:
    """Delete a file."""
    id = server.files.remove(request.params["id"])["id"]
    return {"id": id, "object": "file", "deleted": True}


# --- Batches

MAX_BATCH_LINES = 50_000  # documented

BATCH_FIELDS = Fields("""\
endpoint!=/v1/chat/completions|/v1/responses|/v1/completions|/v1/embeddings\
|/v1/audio/transcriptions|/v1/audio/translations
metadata:dict input_file_id! completion_window model_id priority:int""")


def batch_object(server: Server, item: Item) -> Item:
    """Return what a batch lacks."""
    return {
        "job_deadline": format_time(server._now() + 86400), "user_id": USER_ID,
        "status": "VALIDATING", "endpoint": "/v1/chat/completions", "progress": 0.0,
        "input_file_id": "", "file_size_bytes": 0, "model_id": "", "output_file_id": None,
        "error_file_id": None, "error": "", "completed_at": None,
    }  # fmt: skip


def run_line(server: Server, job: Item, number: int, line: bytes, seen: set[str]) -> Item:
    """Answer a line of a batch: return a row of the output, or of the errors."""
    row: Item = {}
    try:
        row = parse_line(line)
        BATCH_LINE_FIELDS.check(row)
        if row["custom_id"] in seen:
            raise ApiError("invalid", param="custom_id", reason="must differ from earlier ones")
    except ApiError as error:
        error.message = f"Line {number}: {error.message}"
        reply = error.as_reply()
    else:
        seen.add(row["custom_id"])
        headers = {"authorization": f"Bearer {DEFAULT_KEY}", "content-type": "application/json"}
        headers.update(server.starts.get(job["id"], ("", {}))[1])
        request = Request("POST", job["endpoint"], ENCODE(row["body"]).encode(), headers=headers)
        request.batch = job["id"]
        reply = server.answer(request)
    id, body = HashRandom.of("batch", [job["id"], number]).hex(24), reply.read()
    made: Item = {"id": f"br_{id}", "custom_id": row.get("custom_id")}
    said = json.loads(body) if succeeds(json.loads, body) else None  # a fault may have cut it
    if reply.status == 200 and said is not None:
        return {**made, "response": {"status_code": 200, "body": said}}
    told = get_path(said, "error")
    message = get_path(told, "message") or f"The request failed with status {reply.status}."
    code = get_path(told, "code") or get_path(told, "type")
    return {**made, "error": {"message": message, "code": code}}


def run_batch(server: Server, job: Item, data: bytes) -> Item:
    """Answer every line of a batch and store what came of them."""
    rows: dict[str, bytearray] = {"output": bytearray(), "error": bytearray()}
    seen: set[str] = set()
    for number, line in read_lines(data):
        if server.stopping.is_set():
            return {"status": "FAILED", "error": "The server stopped."}
        row = run_line(server, job, number, line, seen)
        kind = "error" if "error" in row else "output"
        rows[kind] += ENCODE(row).encode() + b"\n"
        if len(rows[kind]) > server.max_stored_bytes:
            break  # the storing will say so
    changes: Item = {"progress": 100.0}
    try:
        for kind in filter(rows.get, rows):
            name = f"{job['id']}_{kind}.jsonl"
            lines = bytes(rows[kind])
            changes[f"{kind}_file_id"] = store_lines(server, name, "batch-generated", lines)
    except ApiError as error:
        changes.update(status="FAILED", error=error.message)
    return changes


def enter_batch(server: Server, job: Item, status: str) -> Item:
    """Count the lines of a batch when it is validated, run them when it completes."""
    data = server.contents.get(job["input_file_id"], b"")
    ended: Item = {"completed_at": format_time(server._now())}
    if status == "COMPLETED":
        return {**ended, **run_batch(server, job, data)}
    if status != "IN_PROGRESS":
        return ended
    count = sum(1 for _ in read_lines(data))
    if 0 < count <= MAX_BATCH_LINES:
        return {}
    error = f"The input file has {count} requests; it must have 1 to {MAX_BATCH_LINES}."
    return {**ended, "status": "FAILED", "error": error}


BATCHES = Jobs(
    "batches", "/v1/batches", batch_object, fields=BATCH_FIELDS, enter=enter_batch,
    statuses="VALIDATING IN_PROGRESS COMPLETED", cancelled="CANCELLED", listed="array",
)  # fmt: skip
ENDS = Keys("job:dict\n  status!")
JOB: Any = {"kind": "job", "response": ResponseType("job", ENDS, operator.itemgetter("job"))}


@route("POST /v1/batches", body=BATCH_FIELDS, status=201, **JOB)
def create_batch(server: Server, request: Request) -> Any:
    """Start a batch job from a file of requests."""
    file = find_file(server, request.body["input_file_id"], "input_file_id", "batch-api")
    given = pick_given(request.body, BATCH_FIELDS)
    job = BATCHES.start(server, request, {**given, "file_size_bytes": file["bytes"]})
    return {"job": job}


# --- Fine-tuning

TRAINABLE = ("chat", "language", "code")  # types of models
TRAIN_PRICE = 0.48  # USD for a million tokens
TRAIN_TOKEN_BYTES = 4  # of a training file, by which its tokens are estimated
MAX_METRICS = 1000  # points of a curve
NDJSON = "application/x-ndjson"
MAX_TOKENIZED = 1000  # examples of a tokenized dataset
LIMITS: Item = {  # documented, but for the flags
    "full_training": {"max_batch_size": 96, "max_batch_size_dpo": 48, "min_batch_size": 8},
    "lora_training": {
        "max_batch_size": 128, "max_batch_size_dpo": 64, "min_batch_size": 8, "default_rank": 64,
        "max_rank": 64,
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj", "up_proj", "down_proj"],
    },
    "max_num_epochs": 20, "min_learning_rate": 1e-06, "max_learning_rate": 1.0,
    "max_num_checkpoints": 100, "max_num_evals": 100, "default_gradient_accumulation_steps": 1,
    "min_max_seq_length": 512, "max_seq_length_sft": 16384, "max_seq_length_dpo": 8192,
    "merge_output_lora": True, "supports_full_training": True, "supports_tools": True,
    "supports_reasoning": False, "supports_vision": False,
}  # fmt: skip
ESTIMATE_FIELDS = Fields("""\
training_file!:1.. validation_file model from_checkpoint n_epochs:int:0..20 n_evals:int:0..100
training_method:dict
  method!=sft|dpo train_on_inputs:bool|str=auto dpo_beta,rpo_alpha,simpo_gamma:float
  dpo_normalize_logratios_by_length,dpo_reference_free:bool
training_type:dict
  type!=Full|Lora lora_r:int:1..64 lora_alpha:int:1.. lora_dropout:float:0..1
  lora_trainable_modules""")  # fmt: skip
FINE_TUNE_FIELDS = Fields(*ESTIMATE_FIELDS.values(), """\
n_epochs:int:1..20 n_checkpoints:int:1..100 batch_size:int|str:1..128=max max_seq_length:int:1..
train_on_inputs:bool|str=auto learning_rate:float:1e-06..1 warmup_ratio:float:0..1
lr_scheduler:dict
  lr_scheduler_type!=linear|cosine lr_scheduler_args:dict
    min_lr_ratio,num_cycles:float
max_grad_norm,weight_decay:float:0.. random_seed:int packing:bool multimodal_params:dict
  train_vision:bool
suffix:..40 from_hf_model hf_model_revision hf_output_repo_name wandb_base_url
wandb_project_name wandb_name wandb_entity wandb_api_key hf_api_token""")  # fmt: skip
TRAINING_SETTINGS = (
    ("training_method", "method", "sft"), ("training_type", "type", "Lora"),
    ("lr_scheduler", "lr_scheduler_type", "linear"),
)  # fmt: skip
TRAINING_FORMS: dict[str, Item] = {  # with their documented defaults
    "sft": {"train_on_inputs": "auto"},
    "dpo": {"dpo_beta": 0.1, "dpo_normalize_logratios_by_length": False},
    "Lora": {
        "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.0,
        "lora_trainable_modules": "all-linear",
    },
    "Full": {},
    "linear": {"lr_scheduler_args": {"min_lr_ratio": 0.0}},
    "cosine": {"lr_scheduler_args": {"min_lr_ratio": 0.0, "num_cycles": 0.5}},
}  # fmt: skip
FINE_TUNE: Item = {
    "object": "fine-tune", "status": "pending", "user_id": USER_ID,
    "model": "meta-llama/Meta-Llama-3.1-8B-Instruct-Reference", "model_output_path": "",
    "adapter_output_name": None, "training_file": "", "validation_file": "", "from_checkpoint": "",
    "job_id": "", "started_at": None, "multimodal_params": None, "n_epochs": 1, "n_checkpoints": 1,
    "n_evals": 0, "learning_rate": 1e-05, "max_grad_norm": 1.0, "warmup_ratio": 0.0,
    "weight_decay": 0.0, "train_on_inputs": "auto", "token_count": 0,
    "param_count": 0, "total_price": 0, "epochs_completed": 0, "queue_depth": 0,
    "wandb_project_name": "", "wandb_url": "", "events": [],
    "progress": {"estimate_available": False, "seconds_remaining": 0},
}  # fmt: skip
FINE_TUNE_EVENTS = {  # what a job reports on entering a status: types and documented messages
    "pending": [("job_pending", "Fine tune request created")],
    "running": [
        ("job_start", "Job started at {updated_at}"),
        ("model_download_complete", "Model data downloaded for {model}"),
        ("training_data_download_complete", "Data downloaded for {training_file}"),
        ("training_start", "Training started for model {model}"),
    ],
    "uploading": [
        ("epoch_complete", "Epoch completed, at step {step}"),
        ("training_complete", "Training completed for {model}"),
        ("model_uploading", "Uploading {artifact} model"),
    ],
    "completed": [
        ("model_upload_complete", "Model upload complete"),
        ("job_complete", "Job finished at {updated_at}"),
    ],
    "error": [("job_error", "The job was scripted to fail")],
    "cancelled": [("job_stopped", "Job cancelled")],
}


def complete_training(item: Item) -> Item:
    """Return the nested settings of a job with defaults, and the batch size."""
    settings: Item = {}
    for name, key, usual in TRAINING_SETTINGS:
        given = item.get(name) or {}
        form = given.get(key) or usual
        settings[name] = merge({key: form, **TRAINING_FORMS[form]}, given)
    limits = LIMITS[f"{settings['training_type']['type'].lower()}_training"]
    dpo = settings["training_method"]["method"] == "dpo"
    size, most = item.get("batch_size"), limits["max_batch_size_dpo" if dpo else "max_batch_size"]
    return {**settings, "batch_size": min(size, most) if type(size) is int else most}


def list_steps(job: Item, count: int) -> list[int]:
    """Return training steps at equal distances, the last of all among them."""
    total = job["n_epochs"] * max(1, -(-job["TrainingFileNumLines"] // job["batch_size"]))
    return sorted({total * (n + 1) // count for n in range(count)} - {0})


def list_new_events(job: Item, status: str) -> list[Item]:
    """Return what a job reports when it reaches a status; an epoch's end once for each."""
    steps = list_steps(job, job["n_epochs"])
    artifact = "output" if job["training_type"]["type"] == "Full" else "adapter"
    return [
        {
            "object": "fine-tune-event", "param_count": 0, "token_count": 0, "training_offset": 0,
            "wandb_url": "", "checkpoint_path": "", "hash": "", "created_at": job["updated_at"],
            "level": "error" if status == "error" else "info", "total_steps": steps[-1],
            "model_path": job["model_output_path"], "type": type, "step": step,
            "message": message.format_map({**job, "step": step, "artifact": artifact}),
        }
        for type, message in FINE_TUNE_EVENTS.get(status, ())
        for step in (steps if type == "epoch_complete" else [0])
    ]  # fmt: skip


def enter_fine_tune(server: Server, job: Item, status: str) -> Item:
    """Return what changes with a status; add the model when it is made."""
    changes: Item = {"updated_at": format_time(server._now())}
    if status == "running":
        changes["started_at"] = changes["updated_at"]
    if status == "completed":
        changes["model_output_path"] = f"s3://{USER}/{job['id']}/model"
        changes["epochs_completed"] = job["n_epochs"]
        changes["token_count"] = job["TrainingFileSize"] // TRAIN_TOKEN_BYTES * job["n_epochs"]
        add_model(server, job["model_output_name"], job["model"])
    return {**changes, "events": job["events"] + list_new_events({**job, **changes}, status)}


def show_fine_tune(server: Server, request: Request, job: Item) -> Item:
    """Return a job, with its events, in the client's case, where its id was asked for."""
    events = job["events"] if request.method == "GET" and request.params else []
    if "x-stainless-lang" not in request.headers:
        events = [{**event, "type": event["type"].upper()} for event in events]
    return {**job, "events": events}


def fine_tune_object(server: Server, item: Item) -> Item:
    """Return what a fine-tuning job lacks, with the events up to its status."""
    now, file_id = format_time(server._now()), item.get("training_file") or ""
    file = server.files.get(file_id) if file_id in server.files else FILE
    item["events"] = None
    facts = {"TrainingFileNumLines": file["LineCount"], "TrainingFileSize": file["bytes"]}
    item.update(complete_training(item))
    job = merge({"updated_at": now, **FINE_TUNE, **facts}, item)
    words = [job["model"].rpartition("/")[2], job.get("suffix") or ""]
    words.append(HashRandom.of("fine-tune", job["id"]).hex(8))
    job = {"model_output_name": f"{USER}/{'-'.join(filter(None, words))}", **job}
    end, ladder = job["status"], JOBS["fine_tunes"].order
    for status in ladder[: ladder.index(end) + 1] if end in ladder else ("pending", end):
        job.update(enter_fine_tune(server, job, status))
    return job


FINE_TUNES = Jobs(
    "fine_tunes", "/v1/fine-tunes", fine_tune_object, prefix="ft-", fields=FINE_TUNE_FIELDS,
    enter=enter_fine_tune, view=show_fine_tune,
    statuses="pending queued running uploading completed", cancelled="cancel_requested cancelled",
)  # fmt: skip


def list_ids(server: Server, *types: str, wanted: str | None = None) -> list[str]:
    models = list(server.models.items())
    return [id for id, model in models if model.type in types and wanted in (None, id)]


def resolve_trainable(server: Server, id: str) -> Model:
    """Return a model that can be trained, as unknown ones can unless the server is strict."""
    model = resolve_model(server, id, "chat")
    if model.type not in TRAINABLE:
        raise ApiError("no_model", param="model", model=id)
    return model


@route("POST /v1/fine-tunes", body=FINE_TUNE_FIELDS, **JOB)
def create_fine_tune(server: Server, request: Request) -> Any:
    """Start a fine-tuning job."""
    body, jobs = request.body, server.fine_tunes
    base = (body.get("from_checkpoint") or "").partition(":")[0]
    earlier = jobs.get(base) if base in jobs or base.startswith("ft-") else {"model": base}
    model = body.get("model") or earlier["model"]
    if not model:
        raise ApiError("missing", param="model")
    for name in ("training_file", "validation_file"):
        if body.get(name):
            find_file(server, body[name], name, "fine-tune")
    item = redact(pick_given(body, FINE_TUNE_FIELDS))
    item["model"] = resolve_trainable(server, model).id
    return FINE_TUNES.start(server, request, item)


@route("GET /v1/fine-tunes/{id}/events")
def list_events(server: Server, request: Request) -> Any:
    """List what a fine-tuning job has reported."""
    job = server.fine_tunes.get(request.params["id"])
    return {"data": show_fine_tune(server, request, job)["events"]}


@route("DELETE /v1/fine-tunes/{id}", query="force:bool")
def delete_fine_tune(server: Server, request: Request) -> Any:
    """Delete a fine-tuning job and the model it made."""
    job = server.fine_tunes.remove(request.params["id"])
    server.models.pop(job["model_output_name"], None)
    return {"message": f"Fine-tune job {job['id']} was deleted."}


@route("GET /v1/fine-tunes/{id}/checkpoints")
def list_checkpoints(server: Server, request: Request) -> Any:
    """List the checkpoints of a fine-tuning job that has completed."""
    job = server.fine_tunes.get(request.params["id"])
    *steps, last = list_steps(job, job["n_checkpoints"])
    full = job["training_type"]["type"] == "Full"
    names = ["Final"] if full else ["Final Merged", "Final Adapter"]
    found = [("Intermediate", step) for step in steps] + [(name, last) for name in names]
    if job["status"] != "completed":
        found = []
    return {"data": [
        {"step": step, "created_at": job["updated_at"], "checkpoint_type": name,
         "path": f"s3://{USER}/{job['id']}/{name.replace(' ', '-').lower()}-{step}"}
        for name, step in found
    ]}  # fmt: skip


@route(
    "GET /v1/fine-tunes/{id}/metrics",
    query="global_step_from,global_step_to,resolution:int:0.. logged_at_from logged_at_to",
)
def list_metrics(server: Server, request: Request) -> Any:
    """List the loss curve of a fine-tuning job as far as it has come; it falls."""
    job, args = server.fine_tunes.get(request.params["id"]), request.args
    total, loss = list_steps(job, 1)[0], 2 + HashRandom.of("loss", job["id"]).random()
    done = {"pending": 0, "queued": 0, "uploading": total, "completed": total}
    last = min(done.get(job["status"], (total + 1) // 2), args.get("global_step_to") or total)
    first = args.get("global_step_from") or 1
    points = min(args.get("resolution") or MAX_METRICS, MAX_METRICS, max(0, last - first + 1))
    steps = [first + (last - first) * n // max(1, points - 1) for n in range(points)]
    return {"metrics": [
        {"train/global_step": step, "train/epoch": round(step / total * job["n_epochs"], 4),
         "train/loss": round(loss / (1 + 8 * step / total), 6),
         "train/learning_rate": round(job["learning_rate"] * (1 - (step - 1) / total), 12)}
        for step in steps
    ]}  # fmt: skip


@route("POST /v1/fine-tunes/estimate-price", body=ESTIMATE_FIELDS)
def estimate_price(server: Server, request: Request) -> Any:
    """Estimate what a fine-tuning job would cost."""
    body, tokens, reasons = request.body, [], []
    for use, name, times in (
        ("train", "training_file", body.get("n_epochs") or 1),
        ("eval", "validation_file", body.get("n_evals") or 0),
    ):
        file = find_file(server, body[name], name) if body.get(name) else FILE
        tokens.append(file["bytes"] // TRAIN_TOKEN_BYTES * times)
        if body.get(name) and file["processing_status"] != "COMPLETED":
            reasons.append(f"{use}_file_{'invalid' if file['Processed'] else 'not_validated'}")
    return {
        "estimation_available": not reasons, "allowed_to_proceed": not reasons, "user_limit": 100.0,
        "estimated_total_price": round(sum(tokens) * TRAIN_PRICE / 1e6, 6),
        "estimated_train_token_count": tokens[0], "estimated_eval_token_count": tokens[1],
        **({"unavailable_reason": reasons[0]} if reasons else {}),
    }  # fmt: skip


@route("GET /v1/fine-tunes/models/limits", query="model_name model")
def get_training_limits(server: Server, request: Request) -> Any:
    """Say within which limits a model can be trained."""
    id = request.args.get("model_name") or request.args.get("model")
    if not id:
        raise ApiError("missing", param="model_name")
    return {"model_name": resolve_trainable(server, id).id, **LIMITS}


@route("GET /v1/fine-tunes/models/supported", query="model_name model")
def list_trainable(server: Server, request: Request) -> Any:
    """List the models that can be trained."""
    return {"models": list_ids(server, *TRAINABLE, wanted=request.args.get("model_name"))}


@route(
    "GET /v1/finetune/download",
    query="ft_id! checkpoint_step:int checkpoint=merged|adapter|model_output_path",
)
def download_model(server: Server, request: Request) -> Any:
    """Return the archive of a trained model, or a range of it."""
    import gzip
    import tarfile

    args = request.args
    job = server.fine_tunes.get(args["ft_id"])
    if job["status"] != "completed":
        raise ApiError("bad_state", noun="Fine-tune", id=job["id"], status=job["status"])
    steps = list_steps(job, job["n_checkpoints"])
    step = args.get("checkpoint_step") or steps[-1]
    if step not in steps:
        raise ApiError("no_object", param="checkpoint_step", noun="Checkpoint", id=step)
    weights = HashRandom.of("weights", [job["id"], step, args.get("checkpoint")])
    entry = tarfile.TarInfo("model.safetensors")
    entry.size = 65536
    data = entry.tobuf(tarfile.USTAR_FORMAT) + weights.randbytes(entry.size) + bytes(1024)
    packed = bytearray(gzip.compress(data, 0, mtime=0))
    packed[8:10] = b"\0\xff"  # no word of the level and the system: the same on all
    return serve_bytes(request, bytes(packed), "application/x-tar")


def tokenize_file(server: Server, id: str, count: int, on_inputs: bool) -> list[Item]:
    """Return a file's first examples as tokens; only the last text of one is learned."""
    examples: list[Item] = []
    for _, line in itertools.islice(read_lines(server.contents.get(id, b"")), count):
        row, names = parse_line(line), ("prompt", "completion", "text")
        messages = row.get("messages") or [{"content": row[name]} for name in names if name in row]
        pieces = [split_tokens(message_text(message) + "\n") for message in messages]
        tokens = list(itertools.chain(*pieces))
        ids, start = list(map(token_id, tokens)), 0 if on_inputs else sum(map(len, pieces[:-1]))
        examples.append({
            "tokens": tokens, "input_ids": ids, "labels": [-100] * start + ids[start:],
            "trained_spans": [[start, len(tokens)]], "truncated": False,
            "num_tokens": len(tokens), "num_trained_tokens": len(tokens) - start,
        })  # fmt: skip
    return examples


@route(
    "POST /v1/fine-tunes/preview",
    body="model! training_file! top_k:int:1..100 train_on_inputs:bool training_method=sft",
)
def preview_training(server: Server, request: Request) -> Any:
    """Show the first examples of a training file as tokens."""
    body, id = request.body, request.body["training_file"]
    report = find_file(server, id, "training_file", "fine-tune")["validation_report"]
    form = report.get("dataset_format", "GENERAL").lower()
    on_inputs, count = bool(body.get("train_on_inputs")), body.get("top_k") or 5
    return {
        "model": body["model"], "dataset_format": form, "train_on_inputs": on_inputs,
        "max_seq_length": LIMITS["max_seq_length_sft"],
        "rows": tokenize_file(server, id, count, on_inputs),
    }  # fmt: skip


@route("GET /__tokenized/{id}.jsonl", open=True)
def serve_tokenized_dataset(server: Server, request: Request) -> Any:
    """Serve the tokens of a job's training file; it needs no key."""
    job = server.fine_tunes.get(request.params["id"])
    on_inputs = job["train_on_inputs"] is True
    examples = tokenize_file(server, job["training_file"], MAX_TOKENIZED, on_inputs)
    data = "".join(ENCODE(row) + "\n" for row in examples).encode()
    return serve_bytes(request, data, NDJSON)


@route("GET /v1/fine-tunes/{id}/download-tokenized-dataset")
def get_tokenized_dataset(server: Server, request: Request) -> Any:
    """Say where the tokens of a job's training file can be fetched."""
    id = request.params["id"]
    return {
        "url": f"{request.origin}/__tokenized/{id}.jsonl", "filename": f"{id}-tokenized.jsonl",
        "size": len(serve_tokenized_dataset(server, request).body), "content_type": NDJSON,
        "expires_at": format_time(server._now() + 3600),
    }  # fmt: skip


# --- Evaluations

JUDGE_ROWS = """
      model!,system_template!:1.. model_source!=serverless|dedicated|external
      external_api_token external_base_url num_workers,max_tokens:int:1.. temperature:float:0..2"""
PARAMETERS = f"""
  parameters!:dict
    judge!:dict{JUDGE_ROWS}
    disable_position_bias_correction:bool
    input_data_file_path!:1.. model_to_evaluate,model_a,model_b:str|dict{JUDGE_ROWS}
      input_template!"""
EVALUATION_FIELDS = Fields(f"""\
type!=classify|compare|score parameters!:dict
@classify:dict{PARAMETERS}
    labels!,pass_labels!:list[str]:1..
@compare:dict{PARAMETERS}
@score:dict{PARAMETERS}
    min_score!,max_score!,pass_threshold!:float:-1e9..1e9""")


def summarize_verdicts(type: str, verdicts: list[Any], said: Item) -> Item:
    """Return the results of an evaluation, as far as the verdicts give them."""
    if type == "compare":
        names = {"A_wins": "A", "B_wins": "B", "Ties": "Tie"}
        return {name: verdicts.count(verdict) for name, verdict in names.items()}
    count, passing = len(verdicts) or 1, said.get("pass_labels", ())
    passed = [v in passing if type == "classify" else v >= said["pass_threshold"] for v in verdicts]
    share = {"pass_percentage": round(100 * sum(passed) / count, 2)}
    if type == "classify":
        counts = {label: verdicts.count(label) for label in said["labels"]}
        return {"invalid_label_count": 0, "label_counts": counts, **share}
    mean = sum(verdicts) / count
    spread = math.sqrt(sum((score - mean) ** 2 for score in verdicts) / count)
    scores = {"mean_score": round(mean, 4), "std_score": round(spread, 4), **share}
    return {"aggregated_scores": scores, "failed_samples": 0, "invalid_score_count": 0}


def judge_rows(server: Server, job: Item) -> Item:
    """Judge every row, store the outcome and return the results."""
    type, facts = job["type"], dict(job["parameters"])
    id = server.files.get(facts.pop("input_data_file_path", ""))["id"]
    judged = [parse_line(line) for _, line in read_lines(server.contents.get(id, b""))]
    source = HashRandom.of("evaluation", [type, facts])
    scores: list[Any] = [facts.get(n) for n in ("min_score", "pass_threshold", "max_score")]
    if type == "score":
        scores[1] = min(max(scores[0], scores[1]), scores[2])
    choices: dict[str, Any] = {
        "classify": facts.get("labels"),
        "compare": ["A", "A", "B", "B", "Tie"],
        "score": scores,
    }
    for row in judged:
        rng = source.child(ENCODE(row))
        row.update(verdict=rng.choice(choices[type]), feedback=make_text(rng.child("feedback"), 1))
    lines = "".join([ENCODE(row) + "\n" for row in judged]).encode()
    file_id = store_lines(server, f"{job['workflow_id']}_results.jsonl", "eval-output", lines)
    counts = {"generation_fail_count": 0, "judge_fail_count": 0, "result_file_id": file_id}
    return {**summarize_verdicts(type, [row["verdict"] for row in judged], facts), **counts}


def note_status(server: Server, status: str, updates: Any = ()) -> Item:
    now = format_time(server._now())
    update = {"status": status, "message": f"Job is {status}", "timestamp": now}
    return {"status": status, "updated_at": now, "status_updates": [*updates, update]}


def evaluation_object(server: Server, item: Item) -> Item:
    return {
        "type": "classify", "owner_id": USER_ID, "results": None, "parameters": {},
        **note_status(server, item.get("status", "pending")),
    }  # fmt: skip


def enter_evaluation(server: Server, job: Item, status: str) -> Item:
    """Judge the data at the end; what goes wrong is in the results."""
    results: Any = {"error": f"The evaluation was scripted to end as {status}."}
    if status == "completed":
        try:
            results = judge_rows(server, job)
        except ApiError as error:
            status, results = "user_error", {"error": error.message}
    elif status in ("queued", "running"):
        results = None
    return {**note_status(server, status, job["status_updates"]), "results": results}


def show_evaluation(server: Server, request: Request, job: Item) -> Item:
    """Return a job; generated clients want the counts of labels as JSON text."""
    results = job["results"]
    if "x-stainless-lang" in request.headers and get_path(results, "label_counts"):
        results["label_counts"] = ENCODE(results["label_counts"])
    if request.route.path.endswith("/status"):
        return {"status": job["status"], "results": results}
    return job


EVALUATION_JOBS = Jobs(
    "evaluations", "/v1/evaluation", evaluation_object, prefix="eval-", key="workflow_id",
    fields=EVALUATION_FIELDS, enter=enter_evaluation, view=show_evaluation,
    statuses="pending queued running completed", filters="status", listed="array", most=10,
)  # fmt: skip
route("GET /v1/evaluation/{id}/status")(EVALUATION_JOBS.get)


@route("POST /v1/evaluation", body=EVALUATION_FIELDS, **JOB)
def create_evaluation(server: Server, request: Request) -> Any:
    """Start to judge the rows of a data file."""
    item = pick_given(request.body, EVALUATION_FIELDS)
    job = EVALUATION_JOBS.start(server, request, redact(item))
    return {"workflow_id": job["workflow_id"], "status": "pending"}


@route("GET /v1/evaluation/model-list", query="model_source")
def list_judges(server: Server, request: Request) -> Any:
    """Name the models that can judge."""
    return {"model_list": list_ids(server, "chat")}


# --- Dedicated endpoints

CHANGE_FIELDS = Fields("""\
display_name state=STARTED|STOPPED inactive_timeout:int:0.. autoscaling:dict
  min_replicas!,max_replicas!:int:0..""")  # fmt: skip
ENDPOINT_FIELDS = Fields(*CHANGE_FIELDS.values(), """\
model!,hardware!:1.. availability_zone disable_prompt_cache,disable_speculative_decoding:bool
autoscaling!:dict
  min_replicas!,max_replicas!:int:0..""")  # fmt: skip
# GPU, its GB, link and cents a minute for one; prices chosen
HARDWARE = (("h100", 80, "sxm", 5.65), ("a100", 80, "sxm", 4.28), ("l40s", 48, "pcie", 3.5))


def enter_endpoint(server: Server, endpoint: Item, state: str) -> Item:
    server.models.pop(endpoint["name"], None)
    if state == "STARTED":
        add_model(server, endpoint["name"], endpoint["model"])
    return {}


def endpoint_object(server: Server, item: Item) -> Item:
    """Return what an endpoint lacks; a started one answers under its name."""
    model = item.get("model", "meta-llama/Llama-3.3-70B-Instruct-Turbo")
    name = f"{USER}/{model}-{HashRandom.of('endpoint', item['id']).hex(8)}"
    endpoint = merge({
        "object": "endpoint", "name": name, "display_name": name, "model": model,
        "hardware": "1x_nvidia_h100_80gb_sxm", "type": "dedicated", "owner": USER,
        "state": "PENDING", "autoscaling": {"min_replicas": 1, "max_replicas": 1},
        "inactive_timeout": None,
    }, item)  # fmt: skip
    enter_endpoint(server, endpoint, endpoint["state"])
    return endpoint


ENDPOINTS = Jobs(
    "endpoints", "/v1/endpoints", endpoint_object, prefix="endpoint-", status="state",
    fields=ENDPOINT_FIELDS, enter=enter_endpoint, statuses="PENDING STARTING STARTED",
    filters="type", listed="object data",
)  # fmt: skip


@route("POST /v1/endpoints", body=ENDPOINT_FIELDS, **JOB)
def create_endpoint(server: Server, request: Request) -> Any:
    """Create an endpoint; it is pending, then starting, then started."""
    if server.strict:
        raise ApiError("no_new_endpoints")
    item = pick_given(request.body, ENDPOINT_FIELDS)
    item["state"] = "STOPPED" if item.get("state") == "STOPPED" else "PENDING"
    return ENDPOINTS.start(server, request, item)


@route("PATCH /v1/endpoints/{id}", body=CHANGE_FIELDS)
def update_endpoint(server: Server, request: Request) -> Any:
    """Start or stop an endpoint, or change its settings."""
    id, changes = request.params["id"], pick_given(request.body, CHANGE_FIELDS)
    with server.job_lock:
        before = server.endpoints.get(id)["state"]
        if changes.get("state") == "STARTED":  # one that is not stopped goes on as it is
            changes["state"] = before if before in ENDPOINTS.order else "PENDING"
        endpoint = server.endpoints.update(id, **changes)
        enter_endpoint(server, endpoint, endpoint["state"])
    return ENDPOINTS.advance(server, id) if server.instant_jobs else endpoint


@route("DELETE /v1/endpoints/{id}", status=204)
def delete_endpoint(server: Server, request: Request) -> Any:
    """Delete an endpoint."""
    endpoint = server.endpoints.remove(request.params["id"])
    for id in (endpoint["name"], *server.adapters.pop(endpoint["id"], ())):
        server.models.pop(id, None)
    return Reply(status=204)


@route("GET /v1/endpoints/{id}/adapters")
@route("POST /v1/endpoints/{id}/adapters", body="model_id!:1..")
@route("DELETE /v1/endpoints/{id}/adapters", body="model_id!:1..")
def handle_adapters(server: Server, request: Request) -> Any:
    """List, load or unload LoRA adapters, which answer as `endpoint:adapter`."""
    endpoint, id = server.endpoints.get(request.params["id"]), request.body.get("model_id", "")
    adapters = server.adapters.setdefault(endpoint["id"], {})
    if request.method == "POST":
        adapters[id] = endpoint["model"]
        add_model(server, id, endpoint["model"])
        return {"model_id": id}
    if request.method == "DELETE":
        found = adapters.pop(id, None) is not None
        if found:
            server.models.pop(id, None)
        return {"model_id": id, "deleted": found}
    names = ("model_id", "endpoint_name", "adapter_name")
    rows = [dict(zip(names, (id, *id.split(":", 1), ""))) for id in adapters]
    return {"object": "list", "data": rows}


@route("GET /v1/hardware", query="model")
def list_hardware(server: Server, request: Request) -> Any:
    """List what endpoints run on; for a given model, whether it is available too."""
    model = request.args.get("model")
    if server.strict and model and model not in server.models:
        raise ApiError("no_hardware", model=model[:100])
    more = {"availability": {"status": "available"}} if model else {}
    items = [
        {"object": "hardware", "id": f"{count}x_nvidia_{gpu}_{memory}gb_{link}",
         "pricing": {"cents_per_minute": round(cents * count, 2)},
         "specs": {"gpu_type": f"{gpu}-{memory}gb", "gpu_link": link,
                   "gpu_memory": memory, "gpu_count": count},
         "updated_at": format_time(CREATED), **more}
        for gpu, memory, link, cents in HARDWARE
        for count in (1, 2, 4, 8)
    ]  # fmt: skip
    return {"object": "list", "data": items}


@route("GET /v1/clusters/availability-zones")
def list_availability_zones(server: Server, request: Request) -> Any:
    """List where endpoints can run."""
    return {"avzones": ["us-central-4b", "us-east-1a", "us-west-2b"]}


# === Media endpoints ===


# --- Images

MAX_IMAGES = 4  # of one request; documented

IMAGE_FIELDS = Fields(
    f"{MODEL_ROW} prompt! n:int:0..{MAX_IMAGES} width,height:int:0..{MAX_IMAGE_SIDE} seed:int",
    "steps:int:0..100 guidance_scale,guidance:float size aspect_ratio image_url image_base64",
    "negative_prompt user",
    "reference_images:list[str] image_loras:list\n  path! scale!:float",
    "disable_safety_checker,prompt_upsampling:bool response_format=base64|b64_json|url",
    "output_format=jpeg|png",
)
IMAGE_FACTS = frozenset(IMAGE_FIELDS) - {  # what draws another picture
    "n", "size", "aspect_ratio", "user", "disable_safety_checker", "prompt_upsampling",
    "response_format", "output_format",
}  # fmt: skip


def read_counts(pattern: str, text: Any, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return the numbers of a text such as `720p`, or the default."""
    found = re.fullmatch(pattern, str(text), re.ASCII)
    counts = tuple(map(int, found.groups())) if found else default
    return counts if all(counts) else default


def read_pair(text: str, separator: str, place: str) -> tuple[int, ...]:
    pair = read_counts(rf"(\d{{1,4}}){separator}(\d{{1,4}})", text, ())
    if not pair:
        raise refuse_value(place, f"must be two numbers such as 16{separator}9", text)
    return pair


def read_image_size(body: Item) -> tuple[int, int]:
    """Return width and height from whichever fields give them."""
    given = [body.get("width"), body.get("height")]
    size, ratio = body.get("size"), body.get("aspect_ratio")
    sides: Any = (DEFAULT_IMAGE_SIDE, DEFAULT_IMAGE_SIDE)
    if size and size != "auto":
        sides = read_pair(size, "x", "size")
    elif ratio and not any(given):
        across, down = read_pair(ratio, ":", "aspect_ratio")
        root = min(max(across / down, 1 / 16), 16) ** 0.5
        steps = (round(64 * root), round(64 / root))  # that every model takes
        sides = [min(16 * count, MAX_IMAGE_SIDE) for count in steps]
    width, height = (own or side for own, side in zip(given, sides))
    rule = f"must be from {MIN_IMAGE_SIDE} to {MAX_IMAGE_SIDE} pixels"
    for name, side in (("width", width), ("height", height)):
        if not MIN_IMAGE_SIDE <= side <= MAX_IMAGE_SIDE:
            raise refuse_value(name if body.get(name) else "size", rule, side)
    return width, height


# Seven letters, width and height, and how the format begins: sixteen as in production.
IMAGE_TOKEN = lazy_regex(r"(\w{7})(\d{4})(\d{4})[jp]", re.ASCII)


def read_name(
    name: str, pattern: re.Pattern[str], noun: str, limits: Sequence[int]
) -> tuple[HashRandom, list[int]]:
    """Return what a file is drawn from, and the numbers that its name tells of it."""
    found = pattern.fullmatch(name)
    letters, *numbers = found.groups() if found else ("", "0")
    counts = list(map(int, numbers))
    if not all(0 < count <= limit for count, limit in zip(counts, limits)):
        raise ApiError("no_object", param="name", noun=noun, id=name[:100])
    return HashRandom.of_bytes(letters.encode()), counts


def render_image(token: str) -> tuple[bytes, str]:
    """Return the file that an image's name stands for, and its format."""
    limits = (MAX_IMAGE_SIDE, MAX_IMAGE_SIDE)
    rng, (width, height) = read_name(token, IMAGE_TOKEN, "Image", limits)
    format = "png" if token[-1] == "p" else "jpeg"
    return make_image(rng, width, height, format), format


def show_image(server: Server, request: Request, rng: HashRandom, size: tuple[int, int]) -> Item:
    """Return one image as a URL or as base64.

    Where nothing was asked it is both, unless the server is strict: as the original has it.
    """
    item: Item = {}
    asked = request.body.get("response_format")
    format = request.body.get("output_format") or ("jpeg" if server.strict else "png")
    width, height = size
    token = f"{random_letters(rng, 7)}{width:04}{height:04}{format[0]}"
    if asked in (None, "url"):
        item["url"] = f"{request.origin or server.origin}/shrt/{token}"
    if asked != "url" and (asked or not server.strict):
        item["b64_json"] = base64.b64encode(render_image(token)[0]).decode()
    return item


SCRIPTED_IMAGE: Item = {
    "low": 1,
    "test": BASE64,
    "fields": Keys("url revisedPrompt", Field("b64Json", str, test=BASE64)),
}


def normalise_images(said: Item) -> Item:
    given = said.get("images", [said.get("image")])
    return {
        "images": [{"b64_json": each} if type(each) is str else snake_keys(each) for each in given]
    }


SCRIPTED_IMAGES = ResponseType(
    "image",
    Keys(
        Field("image", str, dict, **SCRIPTED_IMAGE),
        Field("images", list, low=1, each=Field("", str, dict, **SCRIPTED_IMAGE)),
    ),
    normalise_images,
    told_by="image images",
)


@route(
    "POST /v1/images/generations",
    body=IMAGE_FIELDS,
    kind="image",
    prompt="prompt",
    response=SCRIPTED_IMAGES,
)
def create_images(server: Server, request: Request) -> Any:
    """Paint images of a prompt."""
    body = request.body
    if not body["prompt"]:
        raise ApiError("empty_prompt", param="prompt")
    model = resolve_model(server, body["model"], "image")
    refused = {"steps": "no-steps" in model.traits, "image_loras": "loras" not in model.traits}
    for name in refused:
        if server.strict and body.get(name) and refused[name]:
            raise ApiError("no_parameter", parameter=name)
    size = read_image_size(body)
    rng = HashRandom.of("image", pick_facts(body, IMAGE_FACTS))
    request.id = random_id(rng) + COLO
    items = []
    images = request.script["images"] if request.script else [{}] * (body.get("n") or 1)
    for index, image in enumerate(images):
        own = rng.child("image", index)
        given = pick_given(image, image) or show_image(server, request, own, size)
        item = {"index": index, **given}
        inference = 100 + own.randbelow(900)  # milliseconds
        if "FLUX.2" in model.id:  # recorded
            items.append({"timings": {"inference": inference}, **item})
        else:
            items.append({**item, "timings": {"inference": inference / 1000}})
    return {"id": request.id, "model": model.id, "object": "list", "data": items}


@route("GET /shrt/{token}", open=True)
def get_image(server: Server, request: Request) -> Any:
    """Serve an image that an answer pointed to; it needs no key."""
    data, format = render_image(request.params["token"])
    headers = {"Cache-Control": "max-age=31536000"}
    return Reply(data, content_type=f"image/{format}", headers=headers)


# --- Audio

MAX_AUDIO_BYTES = 80 * 2**20  # a body with sound or pictures; documented
MAX_AUDIO_SECONDS = 4 * 3600  # documented
MAX_SPEAKERS = 32  # of one transcription

MP3_SILENCE = b"\xff\xfb\x90\xc0" + bytes(413)  # 26 ms of MPEG-1 layer 3, mono, 128 kbit/s
SPEECH_FIELDS = Fields(
    f"{MODEL_ROW} input!:1..{MAX_SPEECH_CHARACTERS} voice! language instructions",
    f"response_format=wav|mp3|raw|pcm response_encoding={'|'.join(ENCODINGS)}",
    "extra_params:dict sample_rate:int:8000..48000 stream:bool speed:float:0.25..4",
    Field("bit_rate", int, choices=(32000, 64000, 96000, 128000, 192000)),
)
SPEECH_FACTS = ("model", "input", "voice", "language", "extra_params", "speed", "instructions")
SPEECH_EVENT_MS = 250  # of sound in one event of a stream
SPEECH_EVENT = {  # has the keys of the older and of the newer documentation
    "object": "audio.tts.chunk", "type": "conversation.item.audio_output.delta", "item_id": "tts_1"
}  # fmt: skip
SPEECH_TYPES = {"wav": "audio/wav", "mp3": "audio/mpeg"}  # without parameters: Python 1.x compares
TRANSCRIPTION_FIELDS = Fields(
    "file!:Upload|str model language prompt response_format=json|verbose_json",
    f"temperature:float:0..1 diarize:bool min_speakers,max_speakers:int:1..{MAX_SPEAKERS}",
    "timestamp_granularities:str|list[str=segment|word]",
)
SEGMENT_WORDS, WORDS_A_SECOND = 10, 2.5
SPEECH_VOICES = {  # documented examples, by who made the model
    "cartesia": ("friendly sidekick", "british reading lady", "newsman", "storyteller lady"),
    "hexgrad": ("af_alloy", "af_bella", "af_heart", "am_adam", "am_michael", "bf_emma"),
    "canopylabs": ("tara", "leah", "jess", "leo", "dan", "mia", "zac", "zoe"),
}


def normalise_audio(said: Item) -> Item:
    audio = said["audio"] if isinstance(said["audio"], dict) else {"b64Json": said["audio"]}
    data, content_type = DECODE_BASE64(audio["b64Json"]), audio.get("contentType")
    return {"audio": data, "content_type": content_type, "format": said.get("format")}


SOUND = Keys(Field("b64Json!", str, test=BASE64), "contentType")
SCRIPTED_SPEECH = ResponseType(
    "audio",
    Keys(
        Field("audio", str, dict, test=BASE64, fields=SOUND),
        "format",
        "-content,toolCalls,reasoning",
    ),
    normalise_audio,
)
TRANSCRIPT = f"""\
transcription:str|dict
  text! language duration:int|float:0..{MAX_MS} words,segments:list[dict] -languages,usage"""


def normalise_transcript(said: Item) -> Item:
    given = said["transcription"]
    return {"text": given} if type(given) is str else snake_keys(given)


HEARING: Any = {
    "body": TRANSCRIPTION_FIELDS,
    "max_bytes": MAX_AUDIO_BYTES,
    "response": ResponseType("transcription", Keys(TRANSCRIPT), normalise_transcript),
}


@route(
    "POST /v1/audio/speech",
    body=SPEECH_FIELDS,
    kind="speech",
    prompt="input",
    response=SCRIPTED_SPEECH,
)
def create_speech(server: Server, request: Request) -> Any:
    """Hum a text: WAV or raw samples, whole or as a stream; an MP3 is silent."""
    body, script, streams = request.body, request.script or {}, request.body.get("stream")
    form = body.get("response_format") or ("raw" if streams else "wav")
    if streams and form not in ("raw", "pcm"):
        raise refuse_value("response_format", "must be raw where stream is true", form)
    model = resolve_model(server, body["model"], "audio")
    rng = HashRandom.of("speech", pick_given(body, SPEECH_FACTS))
    request.id = random_id(rng)
    rate = body.get("sample_rate") or (44100 if "cartesia" in model.id else 24000)
    encoding = "pcm_s16le" if form == "wav" else body.get("response_encoding") or "pcm_f32le"
    if script:
        sound, form = script["audio"], script["format"] or form
    elif form == "mp3":
        sound = MP3_SILENCE * (len(body["input"]) * CHARACTER_MS // 26 + 1)
    else:
        sound = make_speech(rng, body["input"], rate, encoding)
        sound = wrap_wav(sound, rate) if form == "wav" else sound
    if streams:
        size = rate * SPEECH_EVENT_MS // 1000 * struct.calcsize(ENCODINGS[encoding])
        starts = range(0, len(sound) or 1, size)
        parts = (base64.b64encode(sound[at : at + size]).decode() for at in starts)
        return Events({**SPEECH_EVENT, "model": model.id, "b64": p, "delta": p} for p in parts)
    kind = SPEECH_TYPES.get(form, "application/octet-stream")
    return Reply(sound, content_type=script.get("content_type") or kind)


def transcribe(body: Item, task: str) -> tuple[list[str], float]:
    """Return the words that a sound or its URL stands for, and its seconds."""
    file = body["file"]
    data = file.encode() if type(file) is str else file.data
    if not data:
        raise ApiError("invalid", param="file", reason="is empty")
    facts = pick_given(body, ("model", "language", "prompt", "temperature"))
    rng = HashRandom.of(task, [facts, hashlib.sha256(data).hexdigest()])
    seconds = 5.0 + rng.randbelow(56) if type(file) is str else audio_seconds(data)
    seconds = round(min(max(seconds, 0.4), MAX_AUDIO_SECONDS), 2)
    count = max(1, round(seconds * WORDS_A_SECOND))
    return make_text(rng.child("words"), 1 + count // 8).split()[:count], seconds


def make_segments(words: list[str], seconds: float, speakers: int) -> list[Item]:
    """Spread words evenly over the time; speakers take turns, a segment each."""
    times = [round(seconds * n / len(words), 2) for n in range(len(words) + 1)]
    segments = []
    for id, at in enumerate(range(0, len(words), SEGMENT_WORDS)):
        speaker = {"speaker_id": f"SPEAKER_{id % speakers:02}"}
        part = [
            {"word": words[n], "start": times[n], "end": times[n + 1], **speaker}
            for n in range(len(words))[at : at + SEGMENT_WORDS]
        ]
        text = " ".join(words[at : at + SEGMENT_WORDS])
        whole = {"id": id, "start": part[0]["start"], "end": part[-1]["end"], **speaker}
        segments.append({**whole, "text": text, "words": part})
    return segments


@route("POST /v1/audio/transcriptions", kind="transcription", **HEARING)
@route("POST /v1/audio/translations", kind="translation", **HEARING)
def create_transcript(server: Server, request: Request) -> Any:
    """Write down what a sound says, or a translation: words drawn from its bytes."""
    body, script = request.body, request.script or {}  # a fixture says all or some of it
    resolve_model(server, body.get("model") or "openai/whisper-large-v3", "transcribe")
    task = "translate" if "translations" in request.path else "transcribe"
    words, seconds = transcribe(body, task)
    words = script["text"].split() or [""] if script else words
    seconds = script.get("duration") or seconds
    speakers = max(body.get("min_speakers") or 1, min(2, body.get("max_speakers") or 2))
    spoken = make_segments(words, seconds, speakers)
    answer = {
        "task": task, "language": (body.get("language") or "en").replace("auto", "en"),
        "duration": seconds, "text": " ".join(words),
        "segments": [pick_given(part, ("id", "start", "end", "text")) for part in spoken],
    }  # fmt: skip
    timed = [word for part in spoken for word in part["words"]]
    if body.get("diarize"):
        answer.update(words=timed, speaker_segments=spoken)
    elif "word" in (body.get("timestamp_granularities") or ()):
        answer["words"] = [pick_given(word, ("word", "start", "end")) for word in timed]
    answer = {name: script.get(name) or value for name, value in answer.items()}
    return answer if body.get("response_format") == "verbose_json" else {"text": answer["text"]}


@route("GET /v1/voices", query="model")
def list_voices(server: Server, request: Request) -> Any:
    """List the voices of each speech model."""
    found = []
    for id in list_ids(server, "audio", wanted=request.args.get("model")):
        names = SPEECH_VOICES.get(id.partition("/")[0], ())
        found.append({"model": id, "voices": [{"id": name, "name": name} for name in names]})
    return {"data": found}


# --- Videos

MAX_VIDEO_SECONDS, DEFAULT_VIDEO_SECONDS = 60, 6
MAX_FPS, DEFAULT_FPS = 60, 24

VIDEO_FIELDS = Fields(
    f"{MODEL_ROW} prompt:1..32000 seconds:str|int resolution ratio negative_prompt size",
    f"seed,output_quality:int width,height:int:0..{MAX_IMAGE_SIDE} guidance_scale:float",
    f"fps:int:0..{MAX_FPS} steps:int:10..50 output_format=MP4|WEBM generate_audio:bool",
    "frame_images,reference_images:list media:dict",
)
VIDEO_NAME = lazy_regex(r"(\w{16})-(\d{1,4})x(\d{1,4})-(\d{1,2})s(\d{1,3})\.mp4", re.ASCII)


def read_video_size(body: Item) -> str:
    """Return width and height from whichever fields give them, as `1366x768`."""
    given = (body.get("width") or 0, body.get("height") or 0)
    width, height = read_counts(r"(\d{1,4})x(\d{1,4})", body.get("size"), given)
    across, down = read_counts(r"(\d{1,3}):(\d{1,3})", body.get("ratio"), (16, 9))
    if not (width or height):
        (lines,) = read_counts(r"(\d{1,4})[pP]", body.get("resolution"), (768,))
        width, height = (0, lines) if across >= down else (lines, 0)
    width = width or 2 * round(height * across / down / 2)
    height = height or 2 * round(width * down / across / 2)
    return "x".join(str(max(MIN_IMAGE_SIDE, min(n, MAX_IMAGE_SIDE))) for n in (width, height))


def video_object(server: Server, item: Item) -> Item:
    """Return what a video lacks; its URL says all that is needed to make the file."""
    asked = item.pop("asked", item)
    (seconds,) = read_counts(r"(\d{1,2})", asked.get("seconds"), (DEFAULT_VIDEO_SECONDS,))
    item.update(size=read_video_size(asked), seconds=str(min(seconds, MAX_VIDEO_SECONDS)))
    name = random_letters(HashRandom.of("video", asked), 16)
    name += f"-{item['size']}-{item['seconds']}s{asked.get('fps') or DEFAULT_FPS}.mp4"
    url = f"{item.pop('origin', server.origin)}/shrt/videos/{name}"
    now = server._now()
    return {
        "object": "video", "model": "minimax/hailuo-02", "status": "in_progress",
        "created_at": now, "completed_at": now if item.get("status") == "completed" else None,
        "outputs": {"cost": 0, "video_url": item.pop("url", url)}, "error": None,
    }  # fmt: skip


def enter_video(server: Server, job: Item, status: str) -> Item:
    failure = {"error": job["error"] or {"code": None, "message": "The video failed"}}
    return failure if status == "failed" else {"completed_at": server._now()}


def show_video(server: Server, request: Request, job: Item) -> Item:
    done = job["status"] == "completed"
    return {**job, "outputs": job["outputs"] if done else None, "progress": 100 if done else 0}


VIDEOS = Jobs(
    "videos", "/v2/videos", video_object, prefix="video-", fields=VIDEO_FIELDS, enter=enter_video,
    view=show_video, statuses="in_progress completed", listed="",
)  # fmt: skip
VIDEO_ENDS = {"completed": "completed", "processing": "completed", "failed": "failed"}
SCRIPTED_VIDEO = f"""\
video:dict
  id! status!={"|".join(VIDEO_ENDS)} url error -b64,cost,duration"""


@route(
    "POST /v2/videos",
    body=VIDEO_FIELDS,
    kind="video",
    prompt="prompt",
    response=ResponseType(
        "video",
        Keys(SCRIPTED_VIDEO),
        lambda said: {**said["video"], "status": VIDEO_ENDS[said["video"]["status"]]},
    ),
    max_bytes=MAX_AUDIO_BYTES,
)
def create_video(server: Server, request: Request) -> Any:
    """Start a video; it is completed when it is first retrieved."""
    body, script = request.body, request.script or {}
    item = {
        "model": resolve_model(server, body["model"], "video").id,
        "origin": request.origin or server.origin, "asked": pick_given(body, VIDEO_FIELDS),
        **pick_given(script, ("id", "url")),
    }  # fmt: skip
    if script.get("error"):
        item["error"] = {"code": None, "message": script["error"]}
    return VIDEOS.start(server, request, item)


@route("GET /shrt/videos/{name}", open=True)
def get_video_file(server: Server, request: Request) -> Any:
    """Serve a video that an answer pointed to; it needs no key."""
    limits = (MAX_IMAGE_SIDE, MAX_IMAGE_SIDE, MAX_VIDEO_SECONDS, MAX_FPS)
    rng, counts = read_name(request.params["name"], VIDEO_NAME, "Video", limits)
    return serve_bytes(request, make_video(rng, *counts), "video/mp4")


# === Realtime endpoints ===

AUDIO_RATES = {  # samples a second; a bare name means 24 kHz
    "pcm_s16le_8000": 8000, "pcm_s16le_16000": 16000,
    **dict.fromkeys(("pcm_s16le_24000", "pcm_s16le", "pcm_s16", "pcm16"), 24000),
}  # fmt: skip
FRAMES_A_SECOND = 50  # of sound; each is loud or silent as a whole
LOUDNESS = 330  # of samples that are speech with a probability of 0.5
VOICE_RATE = 24000  # samples a second
DELTA_WORDS = 3  # told at once when a turn ends
DETECTION = {  # of turns: the defaults, documented
    "threshold": 0.3, "min_silence_duration_ms": 500, "min_speech_duration_ms": 250,
    "max_speech_duration_s": 5.0,
}  # fmt: skip
DETECTION_ROWS = f"{','.join(DETECTION)}:float:0.."
REALTIME_ROWS = f"""\
turn_detection:str|dict=server_vad|none
  {DETECTION_ROWS}
{DETECTION_ROWS} language prompt input_audio_format={"|".join(AUDIO_RATES)}"""
VOICE_ROWS = "model voice language alignment max_partial_length:int:1.."
SENTENCE_END = lazy_regex(  # a full stop behind a digit may be a decimal point
    r"""(?:(?<![0-9])\.|[!?…])[.!?…]*["')\]]*(?=\s|\Z)|\.["')\]]*(?=\s)|[。\uff01\uff1f]+|\n"""
)


class Session(Socket):
    """A client that is heard over a socket, or spoken to."""

    object = ""  # what it is called
    failure = ""  # the type of a message that tells of an error
    modalities: tuple[str, ...] = ("audio",)
    messages: Mapping[str, Fields] = {}  # by type, which ends in the name of the method for it
    is_strict = False  # an error in a message ends it

    def __init__(self, server: Server, request: Request) -> None:
        super().__init__(server, request)
        self.settings = pick_given(request.args, request.route.query)
        model = self.settings.setdefault("model", "hexgrad/Kokoro-82M")
        if model not in server.models:
            raise ApiError("no_model", model=model[:100])
        self.count = 0  # of turns

    def open(self) -> None:
        """Tell the client that it is heard; a fixture may have the socket closed instead."""
        if self.request.script is not None:
            raise Closed(*scripted_close(**self.request.script).args)
        self.call.set_body(self.settings)
        rng = HashRandom.of(self.failure, self.settings)
        session = {"id": random_uuid(rng), "object": self.object, "modalities": self.modalities}
        session.update(pick_given(self.settings, ("model", "voice")))
        created = {"event_id": random_uuid(rng), "type": "session.created"}
        self.send({**created, "session": session})

    def hear(self, data: bytes) -> None:
        """Answer a message, or tell what is wrong with it."""
        self.call.add_message(data, is_sent=False)
        try:
            message = parse_body(data, "", NO_FIELDS)
            type = str(message.get("type"))
            if type in self.messages:
                self.messages[type].check(message)
                getattr(self, type.rpartition(".")[2])(message)
            else:
                earlier = self.call.warnings[:MAX_NEAR_MISSES]
                self.call.warnings = (*earlier, f"nothing reads {type[:100]}")
        except ApiError as error:
            if self.is_strict:
                raise Closed(1000, error.message, error=error.envelope()) from None
            self.tell(error.envelope())

    def tell(self, error: Item) -> None:
        self.send({"type": self.failure, "error": error})

    def updated(self, message: Item) -> None:
        known, given = self.request.route.query, message["session"]
        self.settings.update({name: given[name] for name in given if name in known})
        self.send(message)

    def answer(self, item_id: str, say: Any, facts: Any, **body: Any) -> Iterator[Any]:
        """Have a turn, whose messages `say()` yields, go the way of a request; yield its events."""
        turn = Request("GET", self.request.path, headers=self.request.headers)
        turn.call, turn.route, self.call.fixture = self.call, self.request.route, ""
        turn.body = {**self.settings, **body}
        turn.turn = lambda _, request: Events(say(request.script, item_id, facts))
        reply = self.server._settle(turn, self.call)
        failed = {"type": self.failure, "item_id": item_id}
        if self.is_strict:  # without this it would be the end of the session
            failed["event_type"] = "completed"
        for event in [reply.read()] if reply.status >= 400 else reply.events or ():
            if type(event) is float:
                yield event
            elif event.startswith(b'data: {"type"'):
                yield event[6:-2]
            elif b'"error"' in event:
                error = json.loads(event.replace(b"data: ", b"", 1))["error"]
                yield ENCODE({**failed, "error": error}).encode()


def take_event(events: Iterator[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        if type(event) is bytes:
            return


@route(
    "GET /v1/realtime", query=f"{MODEL_ROW}\n{REALTIME_ROWS}", kind="realtime",
    input="prompt", response=HEARING["response"], status=101, slow=False,
)  # fmt: skip
class HearingSession(Session):
    """Write down over a WebSocket what is said; turns are told apart by silence."""

    object = "realtime.session"
    prefix = "conversation.item.input_audio_transcription."
    failure = prefix + "failed"
    is_strict = True
    messages: Mapping[str, Fields] = {
        "input_audio_buffer.append": Fields(Field("audio!", str, test=BASE64)),
        "transcription_session.updated": Fields(
            Field("session!", dict, fields=Fields(REALTIME_ROWS))
        ),
        "input_audio_buffer.commit": NO_FIELDS,
        "input_audio_buffer.clear": NO_FIELDS,
        "echo": NO_FIELDS,
    }

    def __init__(self, server: Server, request: Request) -> None:
        super().__init__(server, request)
        self.second = 2 * AUDIO_RATES[self.settings.get("input_audio_format", "pcm_s16le_16000")]
        self.clear({})

    @property
    def limits(self) -> Item:
        """By what turns are told apart; without turn detection only commits end them."""
        asked = self.settings.get("turn_detection", "server_vad") or "none"
        given = asked if type(asked) is dict else {**self.settings, "type": asked}
        if given.get("type") == "none":
            return {**dict.fromkeys(DETECTION, math.inf), "threshold": DETECTION["threshold"]}
        return {**DETECTION, **pick_given(given, DETECTION)}

    def clear(self, message: Item) -> None:
        self.unheard = bytearray()  # less than a frame
        self.heard = 0  # bytes of the stream
        self.begin()

    def begin(self) -> None:
        self.sound, self.speech = bytearray(), 0  # from its first loud frame on; to its last
        self.told = 0  # words
        self.drafts: list[Any] = []  # how many words of which sound, and its times at the end
        self.events: Any = None

    def append(self, message: Item) -> None:
        """Hear some sound, a frame after the other."""
        sound = DECODE_BASE64(message["audio"])
        self.call.add_sound(sound, self.second // 2)
        self.unheard += sound
        size, limits = self.second // FRAMES_A_SECOND, self.limits
        while len(self.unheard) >= size:
            frame = bytes(self.unheard[:size])
            del self.unheard[:size]
            self.hear_frame(frame, limits)
        if len(self.sound) > MAX_WAITING_BYTES:
            raise refuse_value("audio", "must be committed at times", len(self.sound))

    def hear_frame(self, frame: bytes, limits: Item) -> None:
        """Hear a frame, and tell of the turn that it continues or ends."""
        self.heard += len(frame)
        threshold = min(limits["threshold"], 0.99)
        level = LOUDNESS * threshold / (1 - threshold)
        samples = struct.unpack(f"<{len(frame) // 2}h", frame[: len(frame) // 2 * 2])
        is_loud = math.hypot(*samples) > level * math.sqrt(len(samples))  # by their energy
        self.sound += frame if is_loud or self.sound else b""
        self.speech = len(self.sound) if is_loud else self.speech
        if not self.sound:
            return
        quiet, millisecond = len(self.sound) - self.speech, self.second / 1000
        is_long = len(self.sound) >= limits["max_speech_duration_s"] * self.second
        is_speech = self.speech >= limits["min_speech_duration_ms"] * millisecond
        if is_long or (quiet and quiet >= limits["min_silence_duration_ms"] * millisecond):
            self.end_turn(is_speech)
        elif is_speech and len(self.sound) % (self.second // 2) == 0:
            self.draft()

    def end_turn(self, is_speech: bool) -> None:
        start = (self.heard - len(self.sound)) / self.second
        if is_speech:
            self.draft({"start": start, "duration": self.speech / self.second})
        self.begin()

    def draft(self, times: dict[str, float] | None = None) -> None:
        """Tell the words so far, in the place of those told before; with times, all of them."""
        speech = self.sound[: self.speech]
        count = round(len(speech) / self.second * WORDS_A_SECOND) or 1
        if times is None and count <= self.told:
            return
        self.told = count
        self.drafts.append((count, hashlib.sha256(speech).hexdigest(), times))
        if self.events is None:
            self.count += 1
            rng = HashRandom.of("item", [self.settings, self.count])
            self.events = self.answer(
                "item_" + random_letters(rng, 21), self.write_down, self.drafts
            )
        self.turns.append(take_event(self.events) if times is None else self.events)

    def write_down(self, script: Any, item_id: str, drafts: list[Any]) -> Iterator[Any]:
        """Yield the messages of a turn, one for each draft, and the last ones."""
        facts = pick_given(self.settings, ("model", "language", "prompt"))
        words: list[str] = script["text"].split() if script else []
        head, told, times = {"type": self.prefix + "delta", "item_id": item_id}, 0, None
        while times is None:
            count, sound, times = drafts.pop(0)
            while not script and len(words) < count:
                rng = HashRandom.of("transcribe", [facts, sound, len(words)])
                words += make_text(rng, 1).split()
            if times is None:
                told = count
                yield {**head, "delta": " ".join(words[:told])}
        count = len(words) if script else count
        for end in (*range(told + DELTA_WORDS, count, DELTA_WORDS), count):
            if end > told:
                yield {**head, "delta": " ".join(words[:end])}
        text = " ".join(words[:count])
        yield {**head, "type": self.prefix + "completed", "transcript": text, **times}
        milliseconds = round(1000 * sum(times.values()))
        yield {"type": "input_audio_buffer.processed", "processed_ms": milliseconds}

    def commit(self, message: Item) -> None:
        frame = bytes(self.unheard)
        self.unheard.clear()
        self.hear_frame(frame, self.limits)
        self.end_turn(bool(self.sound))

    def echo(self, message: Item) -> None:
        now = CREATED + self.heard / self.second  # the time is that of the sound
        times = dict.fromkeys(("server_received_at", "server_sent_at"), now)
        self.send({**message, "type": "echo.response", **times})


@route(
    "GET /v1/audio/speech/websocket", query=VOICE_ROWS, kind="voice", prompt="input",
    response=SCRIPTED_SPEECH, status=101, slow=False,
)  # fmt: skip
class VoiceSession(Session):
    """Speak over a WebSocket what is written, each sentence as an item, once it is complete."""

    object = "realtime.tts.session"
    modalities = ("text", "audio")
    failure = "conversation.item.tts.failed"
    messages: Mapping[str, Fields] = {
        "input_text_buffer.append": Fields(f"text!:..{MAX_SPEECH_CHARACTERS}"),
        "tts_session.updated": Fields(f"session!:dict\n  {VOICE_ROWS}"),
        "input_text_buffer.commit": NO_FIELDS,
        "input_text_buffer.clear": NO_FIELDS,
    }

    def __init__(self, server: Server, request: Request) -> None:
        super().__init__(server, request)
        resolve_model(server, self.settings["model"], "audio")
        voices = SPEECH_VOICES.get(self.settings["model"].partition("/")[0], ("default",))
        self.settings.setdefault("voice", voices[0])
        self.text = ""  # not spoken yet
        self.spoken = ""

    def append(self, message: Item) -> None:
        self.text += message["text"]
        self.send({"type": "conversation.item.input_text.received", "text": message["text"]})
        self.speak()

    def commit(self, message: Item) -> None:
        self.speak(ends=True)

    def clear(self, message: Item) -> None:
        self.text = ""

    def speak(self, ends: bool = False) -> None:
        """Add a turn for each sentence that is complete, or as long as it may be."""
        longest = self.settings.get("max_partial_length") or 250  # documented
        while self.text:
            found = SENTENCE_END.search(self.text)
            end = found.end() if found else len(self.text)
            if not found and end > longest:
                end = self.text.rfind(" ", 1, longest + 1) + 1 or longest
            elif not (found or ends):
                return
            text, self.text = self.text[:end].strip(), self.text[end:]
            if text:
                self.count += 1
                self.spoken = f"{self.spoken} {text}".lstrip()[:MAX_SHOWN]
                self.call.set_body({**self.settings, "input": self.spoken})
                settings = {**self.settings, "input": text}
                item_id = f"tts_{self.count}"
                self.turns.append(self.answer(item_id, self.utter, settings, input=text))

    def utter(self, script: Any, item_id: str, settings: Item) -> Iterator[Any]:
        """Yield a text's sound in pieces, the times of its words where asked for, and the end."""
        text = settings["input"]
        rng = HashRandom.of("speech", pick_given(settings, SPEECH_FACTS))
        sound = script["audio"] if script else make_speech(rng, text, VOICE_RATE, "pcm_s16le")
        sound = sound[sound.find(b"data") + 8 :] if sound[:4] == b"RIFF" else sound
        self.call.add_sound(sound, VOICE_RATE)
        size = VOICE_RATE * SPEECH_EVENT_MS // 1000 * 2
        for at in range(0, len(sound), size):
            delta = base64.b64encode(sound[at : at + size]).decode()
            yield {"type": SPEECH_EVENT["type"], "item_id": item_id, "delta": delta}
        if settings.get("alignment") == "word":
            words = list(re.finditer(r"\S+", text))
            yield {
                "type": "conversation.item.word_timestamps", "item_id": item_id,
                "words": [word[0] for word in words],
                "start_seconds": [word.start() * CHARACTER_MS / 1000 for word in words],
                "end_seconds": [word.end() * CHARACTER_MS / 1000 for word in words],
            }  # fmt: skip
        yield {"type": "conversation.item.audio_output.done", "item_id": item_id}


# === Account endpoints ===


# --- Models


def owned_model(model: Model) -> Item:
    return {**model_object(model), "owned_by": model.organization or "user"}


@route("GET /v1/models", query="dedicated:bool")
def list_models(server: Server, request: Request) -> Any:
    """List the catalogue and the models that jobs have made."""
    write = owned_model if is_openai(request) else model_object
    return wrap_list(
        request, [write(model) for model in list(server.models.values())], server.strict
    )


@route("GET /v1/models/{id...}")
def get_model(server: Server, request: Request) -> Any:
    """Describe one model; its slashes may come as they are or as %2F."""
    model = server.models.get(request.params["id"])
    if model is None:
        raise ApiError("no_model", model=request.params["id"][:100])
    return owned_model(model)


@route("GET /v1/autoscale/models")
def list_autoscale_models(server: Server, request: Request) -> Any:
    return [{"name": id} for id in list_ids(server, "chat")]


def list_page(request: Request, items: list[Item]) -> Item:
    page, more = take_page(items, request.args, most=100)
    return {"object": "list", "data": page, "next_cursor": page[-1]["id"] if more else None}


PAGE_ROWS = "limit:int:0..1000 after"


@route("GET /v2/supported-models", query=PAGE_ROWS)
def list_supported_models(server: Server, request: Request) -> Any:
    return list_page(request, [supported_model(model) for model in list(server.models.values())])


@route("GET /v2/supported-models/{id...}")
def get_supported_model(server: Server, request: Request) -> Any:
    """Describe one model in the second API's form, by id or by name."""
    wanted = request.params["id"]
    for item in map(supported_model, list(server.models.values())):
        if wanted in (item["id"], item["name"]):
            return item
    raise ApiError("no_model", model=wanted[:100])


# --- Projects and uploads of models

ORGANIZATION = {"id": "66a1b2c3d4e5f60718293a4b", "name": "Parlel"}  # pragma: allowlist secret
PROJECT = {"id": "proj-5f0e1d2c3b4a", "name": "Default", "slug": "default"}
API_KEY_ID = "key-9a8b7c6d5e4f"


@route("GET /v1/projects", query=PAGE_ROWS)
def list_projects(server: Server, request: Request) -> Any:
    owner = {f"organization_{name}": value for name, value in ORGANIZATION.items()}
    return list_page(request, [{**PROJECT, **owner}])


@route("GET /v2/projects/{project}/models", query=PAGE_ROWS)
def list_project_models(server: Server, request: Request) -> Any:
    """List the models that jobs and uploads have made."""
    return list_page(request, [
        {"id": "ml_" + HashRandom.of("project model", id).hex(24), "name": id,
         "organizationId": ORGANIZATION["id"], "projectId": PROJECT["id"],
         "visibility": "VISIBILITY_PRIVATE",
         "weights": {"contextLength": str(model.context_length or 0)}}
        for id, model in list(server.models.items())
        if id not in MODELS
    ])  # fmt: skip


@route("GET /v2/whoami")
@route("GET /v3/whoami")
def get_identity(server: Server, request: Request) -> Any:
    """Say whose key this is: flat for Together's Python 2.x and nested for 3.x."""
    named = {"organization": ORGANIZATION, "project": PROJECT}
    flat = {f"{kind}_{name}": said[name] for kind, said in named.items() for name in said}
    nested = {"type": "project_api_key", "api_key": {"id": API_KEY_ID}, **named}
    return {**nested, "api_key_id": API_KEY_ID, "user_id": USER_ID, **flat}


def upload_job_object(server: Server, item: Item) -> Item:
    return {
        "type": "model_upload",
        "args": {"description": "", "modelName": f"{USER}/model", "modelSource": ""},
        **note_status(server, item.get("status", "Queued")),
    }  # fmt: skip


def enter_upload(server: Server, job: Item, status: str) -> Item:
    if status == "Complete":
        add_model(server, job["args"]["modelName"], "")
    return note_status(server, status, job["status_updates"])


UPLOADS = Jobs(
    "jobs", "/v1/jobs", upload_job_object, prefix="job-", key="job_id", enter=enter_upload,
    statuses="Queued Running Complete",
)  # fmt: skip


@route(
    "POST /v1/models",
    body="model_name!,model_source!:1.. model_type=model|adapter hf_token description base_model "
    "lora_model",
)
def upload_model(server: Server, request: Request) -> Any:
    """Start to upload a model or an adapter from elsewhere."""
    body = redact(request.body)
    name, source = body["model_name"], body["model_source"]
    name = name if "/" in name else f"{USER}/{name}"
    args = {"modelName": name, "modelSource": source, "description": body.get("description")}
    job = UPLOADS.start(server, request, {"args": args})
    kind = "remote" if "://" in source else "huggingface"
    data = {"job_id": job["job_id"], "model_name": name, "model_source": kind}
    data["model_id"] = server._next_id("model-")
    return {"data": data, "message": "Processing model weights. Job created."}


# === Recording ===

MAX_RECORDED_ANSWER_BYTES = 32 * 2**20  # a larger answer is passed on, but not recorded
# Headers that change what a client does, so that they are recorded.
KEPT_HEADER = lazy_regex(
    r"location|retry-after(-ms)?|x-should-retry|x-ratelimit\b.*", re.IGNORECASE
)
REPLACE_TRIES, REPLACE_SECONDS = 20, 0.05  # for others to close a file
REST = 4  # times as long as it wrote a recorder leaves the processor to the clients


# --- From an answer to what a fixture says: a chat in words, all else as it came


# What a fixture's words say of a message, or need not say.
IN_WORDS = {
    "role", "content", "reasoning", "reasoning_content", "tool_calls", "token_id", "finish_reason",
}  # fmt: skip


def put_message(message: Item) -> Item:
    """Return a message of an answer in the words of a fixture."""
    text, made = message.get("content"), message.get("tool_calls", ())
    calls = [{**call["function"], "id": call["id"]} for call in made]
    said = {"reasoning": message.get("reasoning"), "toolCalls": calls}
    words = {"content": text or ""} if text or not calls else {}
    return {**words, **{name: value for name, value in said.items() if value}}


def list_chunk_sizes(chunks: list[Any]) -> list[int]:
    """Return the characters in each chunk: of reasoning, of text, of arguments."""
    sizes: dict[Any, list[int]] = {"reasoning": [], "content": []}
    for said in itertools.chain(*(fold_stream([chunk]) for chunk in chunks)):
        texts: dict[Any, str] = {part: said[part] for part in ("reasoning", "content")}
        for call in said["tool_calls"]:
            texts[call["index"]] = call["function"]["arguments"]
        for part in filter(texts.get, texts):
            sizes.setdefault(part, []).append(len(texts[part]))
    return [size for part in sizes.values() for size in part]


def put_into_words(request: Request, reply: Reply) -> Item | None:
    """Return the response and options for a chat's answer; None where words cannot say it."""
    chunks = [event for event in parse_events(reply.body) if event != "[DONE]"]
    usual = {"model": request.body.get("model"), "role": "assistant"}
    try:
        events = chunks or [parse_json(reply.body)]
        (message,) = fold_stream(events)
        scores = [get_path(event, "choices", "0", "logprobs") for event in events]
        finish, is_chat = message["finish_reason"], all("choices" in event for event in events)
        if any(scores) or not (finish and is_chat) or message.keys() - IN_WORDS:
            return None
        said = {name: events[0].get(name) for name in ("id", "created", "model")}
        said.update(usage=find_usage(events), finishReason=finish, role=message["role"])
        more = {name: said[name] for name in said if said[name] and said[name] != usual.get(name)}
        sizes, response = list_chunk_sizes(chunks), {**put_message(message), **more}
        words = {"response": response, **({"chunkSizes": sizes} if sizes else {})}
        Fixture({"match": {}, **words}, "")
        return None if TEMPLATE.search(ENCODE(response)) else words  # it would quote a request
    except (ApiError, ValueError, TypeError, AttributeError, KeyError):
        return None  # it is not of the form that chats have


def keep_as_it_came(reply: Reply) -> Item:
    """Return a fixture's response that sends the same bytes again."""
    headers = {name: text for name, text in reply.headers.items() if KEPT_HEADER.fullmatch(name)}
    said: Item = {"headers": headers} if headers else {}
    said.update({"status": reply.status} if reply.status != 200 else {})
    kind = reply.content_type.partition(";")[0].strip().lower()
    with contextlib.suppress(ApiError):
        if kind == "application/json":
            return {"response": {"json": parse_json(reply.body), **said}}
    try:
        body = {"text": reply.body.decode()}
    except UnicodeDecodeError:
        body = {"b64Json": base64.b64encode(reply.body).decode()}
    return {"response": {"raw": {**body, "contentType": reply.content_type}, **said}}


def put_answer(kind: str, request: Request, reply: Reply, times: Any = ()) -> Item:
    """Return the response and options that answer as a reply did, at its pace if it was a stream.

    times  the bytes so far and the seconds, for each piece that came
    """
    words = put_into_words(request, reply) if kind == "chat" and reply.status == 200 else None
    answer = words or keep_as_it_came(reply)
    if not times or not reply.content_type.startswith(EVENT_STREAM):
        return answer
    ends = itertools.accumulate(map(len, split_events(reply.body)))
    places = (bisect.bisect(times, (end, -math.inf)) for end in ends)
    stamps = [min(round(times[place][1] * 1000), MAX_MS) for place in places]
    delays = [later - earlier for earlier, later in zip(stamps, stamps[1:])]
    if delays:
        timings = {"interChunkDelaysMs": delays, "totalDurationMs": stamps[-1]}
        answer["recordedTimings"] = {"ttftMs": stamps[0], **timings}
    return answer


# --- From a request to what a fixture matches


NAMES = {"userMessage", "inputText"}  # keys that tell most requests from others


def identify(kind: str, request: Request) -> tuple[Item, Item]:
    """Return the match of a request, and its body for where others share that match."""
    facts, body = MatchFacts(kind, request), say_body(kind, request.body)
    name: Item = {}
    if kind != "chat":
        name["endpoint"] = facts["endpoint"][kind not in OPERATIONS or kind == "job"]
    text = "inputText" if kind in ("embedding", "rerank") else "userMessage"
    for key in (text, "model", "context"):
        if isinstance(facts[key], str) and facts[key]:
            name[key] = facts[key]
    if kind in ("chat", "response"):
        name.update(turnIndex=facts["turnIndex"], hasToolResult=facts["hasToolResult"])
    large = len(request.raw) > MAX_RECORDED_BODY_BYTES
    told = body or not NAMES.isdisjoint(name) or kind not in OPERATIONS
    if body == redact(body) and not large and told:
        return name, body
    for key in [key for key in name if type(name[key]) is str and large]:
        name[key] = name[key][:MAX_SHOWN]
    return {**name, "bodyDigest": digest_body(kind, request.body)}, {}


def read_loosely(request: Request) -> None:
    if request.raw and not request.body:
        with contextlib.suppress(ApiError):
            kind = request.headers.get("content-type", "")
            request.body = parse_body(request.raw, kind, NO_FIELDS)


def rank_fixture(fixture: Item) -> tuple[int, int]:
    """Return the sort key of a fixture: more words match fewer requests, and go first."""
    match = fixture["match"]
    name = {key: match[key] for key in match if key not in ("body", "sequenceIndex")}
    if name.get("endpoint") == "chat":  # said of some alone
        del name["endpoint"]
    return -len(CANONICAL(name)), -len(CANONICAL(match.get("body", {})))


class Recording:
    """Fixtures for recorded calls: a sequence where one had several answers."""

    def __init__(self) -> None:
        # Answers by the JSON of a request's name, then of its body.
        self._names: dict[str, dict[str, list[Item]]] = {}

    def add(self, identity: Any, answer: Item, secrets: Iterable[str]) -> None:
        """Add an answer to what identifies its request, but no key."""
        told = ENCODE([*identity, answer])
        for secret in secrets:
            told = told.replace(ENCODE(secret)[1:-1], "***")
        name, body, answer = json.loads(told)
        Fixture({"match": {**name, "body": body}, **answer}, "")
        alike = self._names.setdefault(CANONICAL(name), {})
        alike.setdefault(CANONICAL(body), []).append(answer)

    def list_fixtures(self) -> list[Item]:
        """Return the fixtures, sorted."""
        fixtures = []
        rows = [(name, body) for name, alike in self._names.items() for body in alike]
        for name, body in rows:
            match, answers = json.loads(name), self._names[name][body]
            if any(answer["response"].keys() & {"json", "raw"} for answer in answers):
                match = {"endpoint": "chat", **match}  # the answer does not say what it is
            if body != "{}" and (len(self._names[name]) > 1 or NAMES.isdisjoint(match)):
                match["body"] = json.loads(body)
            for at, answer in enumerate(answers):
                number = {"sequenceIndex": at} if at < len(answers) - 1 else {}
                fixtures.append({"match": {**match, **number}, **answer})
        return sorted(fixtures, key=rank_fixture)


def write_fixtures(file: Item) -> bytes:
    return (json.dumps(file, indent=2, ensure_ascii=False) + "\n").encode()


def record_calls(calls: Iterable[Call], secrets: Iterable[str]) -> list[Item]:
    """Return the fixtures that answer recorded calls as they were answered."""
    recording = Recording()
    for call in calls:
        request = call.as_request()
        # What was refused for its key or JSON would refuse others again.
        unread = (call.status == 401 and not call.fixture) or (request.raw and call.body is None)
        is_said = call.kind in OPERATIONS and OPERATIONS[call.kind].status != 101
        if is_said and call.outcome == "complete" and call.is_kept and not unread:
            reply = Reply(call.raw_reply, call.status, call.reply_type, call.reply_headers)
            answer = put_answer(call.kind, request, reply)
            with contextlib.suppress(ValueError):
                recording.add(call.identity or identify(call.kind, request), answer, secrets)
    return recording.list_fixtures()


def check_target(path: str) -> str:
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is no file", path)
    return path


def write_file(path: str, data: bytes) -> None:
    """Replace a file at once: whoever is killed meanwhile leaves the old one or the new."""
    path = check_target(path)
    draft = f"{path}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            os.chmod(draft, os.stat(path).st_mode)
        for left in reversed(range(REPLACE_TRIES)):
            try:
                return os.replace(draft, path)
            except PermissionError:  # on Windows, while somebody reads it
                if not left:
                    raise
                time.sleep(REPLACE_SECONDS)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


@contextlib.contextmanager
def lock_folder(path: str) -> Iterator[None]:
    """Keep out other programs that record to this folder, where the system can."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


class Recorder(Shared):
    """Adds answers to a fixture file, which may be there already, and be others' too.

    A thread writes what has come since it last wrote, and ends when nothing has.
    """

    def __init__(self, path: str, change: Any = None) -> None:
        import tempfile

        self._change, self.path = change, check_target(path)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        tempfile.TemporaryFile(dir=os.path.dirname(self.path)).close()  # there can be a draft
        self._recording = Recording()
        self._mine: set[str] = set()  # the JSON of what it last wrote
        self._before = set(map(ENCODE, self._read()["fixtures"]))  # by hand, maybe: they stay first
        self._unwritten = False
        self._waiting: list[tuple[str, Request, Reply, Any]] = []
        self._hurry = threading.Event()
        self._writer: threading.Thread | None = None

    def add(self, kind: str, request: Request, reply: Reply, times: Any) -> None:
        """Have a recording written before long."""
        with self._lock:
            self._waiting.append((kind, request, reply, times))
            if self._writer is None:
                self._writer = threading.Thread(target=self._work, name="together-fake-record")
                try:
                    self._writer.start()
                except RuntimeError:  # the program ends: finish() writes
                    self._writer = None

    def finish(self) -> None:
        """Write all that waits, and say what could not be written."""
        with self._lock:  # a thread in there has been started
            writer = self._writer
        self._hurry.set()
        if writer is not None:
            writer.join()
        self._work()
        if self._unwritten:  # the disk may have room again
            self._write()
        self._hurry.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._writer = None
                    return
            began = time.perf_counter()
            for kind, request, reply, times in batch:
                try:
                    read_loosely(request)
                    answer = put_answer(kind, request, reply, times)
                    request.body = self._change(request.body) if self._change else request.body
                    self._recording.add(identify(kind, request), answer, request.headers.secrets)
                except Exception as error:  # a bug, too, must not end the thread
                    complain(f"cannot record {request.method} {request.path}: {error!r}\n")
            self._write()
            self._hurry.wait(REST * (time.perf_counter() - began))

    def _read(self) -> Item:
        """Return the file, with the fixtures of earlier runs and of other programs."""
        data = load_json(self.path, self.path) if os.path.exists(self.path) else []
        file: Item = data if isinstance(data, dict) and "match" not in data else {}
        return {**file, "fixtures": read_file(data)["fixtures"]}

    def _write(self) -> None:
        """Write the file; where that fails, it is tried again later."""
        is_told, self._unwritten = self._unwritten, True
        try:
            with lock_folder(self.path):
                file, mine = self._read(), self._recording.list_fixtures()
                mine = [entry for entry in mine if ENCODE(entry) not in self._before]
                rows = [(ENCODE(entry), entry) for entry in file["fixtures"]]
                first = [entry for text, entry in rows if text in self._before]
                known = self._mine | self._before
                others = [entry for text, entry in rows if text not in known]
                parse_fixtures(others, self.path)  # names what is wrong
                file["fixtures"] = first + sorted(others + mine, key=rank_fixture)
                write_file(self.path, write_fixtures(file))
                self._mine = set(map(ENCODE, mine))
            self._unwritten = False
        except (OSError, ValueError) as error:
            if not is_told:
                complain(f"cannot record to {self.path}: {error}\n")


# === Verdict ===

# What a client may have done wrong; what cannot be told from the record is not claimed.
WRONGS = (
    "retry_after_ignored", "retried_refusal", "retry_storm", "no_retry", "gave_up",
    "half_answer_taken", "tool_call_invented", "stream_left", "over_budget",
)  # fmt: skip
MAX_ATTEMPTS = 5
REFUSED = frozenset((400, 401, 402, 403, 404, 405, 413, 415, 422))
TEMPORARY = frozenset((408, 409, 429, *range(500, 600)))
MIN_QUOTE = 8  # characters of half an answer, which nobody says by chance
EARLY_SHARE, EARLY_SECONDS = 0.05, 0.01  # that a client may come too early: clocks differ


class Finding:
    """One thing that a client did wrong, and the calls that show it."""

    def __init__(self, name: str, text: str, *calls: Call) -> None:
        self.name = name
        self.text = text
        self.calls = calls

    def __repr__(self) -> str:
        lines = [f"{self.name}: the client {self.text}"]
        for call in self.calls:
            told = "" if call.outcome == "complete" else f", {call.outcome}"
            lines.append(f"{call.started - self.calls[0].started:9.3f} s  {call!r}{told}")
        return "\n".join(lines)


def is_inference(call: Call) -> bool:
    """Tell whether a client asked a model; lines of batches are not judged."""
    known = OPERATIONS.get(call.kind)
    return known is not None and call.method == known.method and not call.batch


def find_end(call: Call) -> float:
    return call.started + call.duration if call.has_ended else math.inf


def list_facts(call: Call) -> MatchFacts:
    return MatchFacts(call.route_kind, call.as_request())


FINISH = lazy_regex(rb'"finish_reason":\s*"|"response\.(?:completed|incomplete)"')


def list_quotes(messages: list[Item]) -> tuple[list[str], set[Any]]:
    """Return the texts of messages, and the ids of their tool calls."""
    calls = [call for each in messages for call in list_objects(each.get("tool_calls"))]
    texts = [str(join_text(each.get("content"))).strip() for each in messages]
    return texts, {call.get("id") for call in calls} - {None}


def find_half(call: Call) -> tuple[str, set[Any]] | None:
    """Return the text and the ids of tool calls of a stream without an end; else None."""
    is_text = call.kind in ("chat", "completion", "response") and call.outcome != "left"
    if not (is_text and call.events_sent and call.is_kept) or FINISH.search(call.raw_reply):
        return None
    texts, ids = list_quotes(fold_stream(call.reply))
    return "".join(texts), ids


def has_failed(call: Call) -> bool:
    """Tell whether a client may ask again."""
    is_json = call.reply_type.startswith("application/json")
    return call.has_ended and (
        call.status >= 400
        or call.outcome == "cut"
        or (call.outcome == "left" and call.excused)
        or (is_json and call.is_kept and not isinstance(call.reply, (dict, list)))
        or find_half(call) is not None
    )


def find_wait(call: Call) -> float:
    """Return how many seconds a reply asked its client to wait."""
    text = call.get_header("retry-after", "0")
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        ended = time.time() - time.perf_counter() + find_end(call)
        return parsedate_to_datetime(text).timestamp() - ended
    return 0.0


def follows(call: Call, earlier: Call) -> bool:
    """Tell whether a call can be another attempt of an equal one that failed.

    SDKs count; else it comes on the same connection, or there is no other.
    """
    count, before = (c.headers.get("x-stainless-retry-count", "0") for c in (call, earlier))
    if count != "0":
        return bool(before.isdecimal() and count == str(int(before) + 1))
    return bool(call.peer[0] == earlier.peer[0] or not call.peer[1])


def group_attempts(calls: Iterable[Call]) -> list[list[Call]]:
    """Return calls in the attempts of one request each; what may be of several is left out."""
    groups: dict[str, list[list[Call]]] = {}
    unclear = set()
    for call in calls:
        agent, count = (call.headers.get(n) for n in ("user-agent", "x-stainless-retry-count"))
        body = call.method == "POST" and call.body_key  # not what went over a socket
        key = repr((call.episode, call.operation, call.query, call.test, agent, body))
        chains = groups.setdefault(key, [])
        running = [chain for chain in chains if find_end(chain[-1]) > call.started]
        failed = [chain for chain in chains if chain not in running and has_failed(chain[-1])]
        earlier = [chain for chain in failed if follows(call, chain[-1])]
        if len(earlier) == 1 and (count or not running):
            earlier[0].append(call)
            continue
        if count != "0" and (failed or running):
            unclear.add(key)
        chains.append([call])
    return [chain for key in groups for chain in groups[key] if key not in unclear]


def judge_retries(attempts: list[Call], most: int) -> Iterator[Finding]:
    """Yield what is wrong with the pauses between attempts, and with their number."""
    last, pauses = attempts[-1], []
    for call, following in zip(attempts, attempts[1:]):
        by_server = following.at - call.at - call.duration  # whose clock a test may set
        pause, wait = max(following.started - find_end(call), by_server), find_wait(call)
        if call.status in REFUSED and call.get_header("x-should-retry") != "true":
            text = f"repeated what was refused by a {call.status}"
            yield Finding("retried_refusal", text, call, following)
        elif pause < wait * (1 - EARLY_SHARE) - EARLY_SECONDS:
            text = f"came back after {pause:.3f} of {wait:g} seconds"
            yield Finding("retry_after_ignored", text, call, following)
        elif wait <= 0:
            pauses.append(pause)
    alike = len(pauses) > 2 and max(pauses) < min(pauses) * 1.25 + 0.05
    if alike or len(attempts) > most:
        how = "with pauses that do not grow" if alike else f"where {most} are allowed"
        yield Finding("retry_storm", f"made {len(attempts)} attempts {how}", *attempts)
    may_retry = last.get_header("x-should-retry") != "false"
    blamed = 0 < last.close_code < 1011  # for what it sent over a socket
    if may_retry and not blamed and (last.outcome == "cut" or last.status in TEMPORARY):
        reason = "a connection that was cut" if last.outcome == "cut" else f"a {last.status}"
        name = "gave_up" if len(attempts) > 1 else "no_retry"
        yield Finding(name, f"gave up at {reason}, attempt {len(attempts)}", *attempts)


def judge_halves(calls: Sequence[Call]) -> Iterator[Finding]:
    """Yield where half an answer was quoted as if it were whole."""
    whole = {repr(call.body_key) for call in calls if call.has_ended and not has_failed(call)}
    for call in calls:
        text, ids = find_half(call) or ("", set())
        text = text if len(text) >= MIN_QUOTE else ""
        if repr(call.body_key) in whole or not (text or ids):
            continue
        for following in calls:
            asked = list_facts(following).messages
            texts, called = list_quotes([each for each in asked if each.get("role") == "assistant"])
            if following.started >= find_end(call) and (text in texts if text else ids & called):
                text = f"took for whole {preview(text) if text else 'a tool call'}"
                yield Finding("half_answer_taken", text, call, following)
                break


def judge_tools(calls: Iterable[Call]) -> Iterator[Finding]:
    """Yield which tool results answer no call of a tool, and which calls have none."""
    told: set[str] = set()
    for call in calls:
        if "item_reference" in ENCODE(call.body):  # to what is not here
            continue
        made: list[Any] = [None]
        waiting: list[Any] = []
        wrong: list[str] = []
        for message in list_facts(call).messages:
            id = message.get("tool_call_id")
            if message.get("role") != "tool":
                wrong += [f"sent no result for {preview(each)}" for each in waiting]
                calls_made = list_objects(message.get("tool_calls"))
                waiting = [each["id"] for each in calls_made if isinstance(each.get("id"), str)]
                made += waiting
            elif id not in made:
                wrong.append(f"sent a result for {preview(id)}, which no message before it calls")
            waiting = [each for each in waiting if each != id]
        for text in wrong:
            if text not in told:
                told.add(text)
                yield Finding("tool_call_invented", text, call)


def judge_budget(
    calls: Sequence[Call], total_tokens: float | None, most: int | None, at_once: int | None
) -> Iterator[Finding]:
    """Yield what was used more of than a test allows."""
    running: list[Call] = []
    crowd: list[Call] = []
    for call in calls:
        running = [each for each in running if find_end(each) > call.started] + [call]
        crowd = max(crowd, running, key=len)
    spent = sum(get_path(call.usage, "total_tokens") or 0 for call in calls)
    for what, used, allowed, shown in (
        ("tokens", spent, total_tokens, calls),
        ("calls", len(calls), most, calls),
        ("calls at once", len(crowd), at_once, crowd),
    ):
        if allowed is not None and used > allowed:
            yield Finding("over_budget", f"used {used} {what}, of {allowed} allowed", *shown)


def judge(calls: Iterable[Call], most_attempts: int) -> list[Finding]:
    """Return what the client did wrong, in the order in which it began."""
    asked = list(filter(is_inference, calls))
    found = [*judge_halves(asked), *judge_tools(asked)]
    for attempts in group_attempts(asked):
        found += judge_retries(attempts, most_attempts)
    for call in asked:
        if call.outcome == "left" and call.is_stream and not call.excused:
            text = f"left a stream after {call.events_sent} events"
            found.append(Finding("stream_left", text, call))
    return sorted(found, key=lambda finding: finding.calls[0].number)


# === Page ===

# What a browser shows of the record; it asks `GET /__parlel/requests?view=rows` for what is new.
# Texts become nodes of text and nothing else, so that no prompt is ever run as HTML.
PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>together_fake</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --panel: #8882; --line: #8885; }
* { box-sizing: border-box; }
body {
  display: flex; flex-direction: column; height: 100dvh; margin: 0;
  background: light-dark(#fff, #14171b); font: 14px/1.5 system-ui, sans-serif;
}
[hidden] { display: none !important; }
.dim, summary { opacity: 0.7; }
.good { color: light-dark(#14733a, #5cc483); }
.warn, .left { color: light-dark(#8f4d08, #e0aa55); }
.bad, .cut { color: light-dark(#b3201f, #f5807e); }
button, input, textarea {
  padding: 4px 10px; border: 1px solid var(--line); border-radius: 6px;
  background: none; color: inherit; font: inherit;
}
button:hover, [aria-pressed=true] { border-color: currentcolor; }
header, .bar { display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: center; }
header { padding: 8px 12px; border-bottom: 1px solid var(--line); background: var(--panel); }
h1, h2, h3 { margin: 8px 0 0; font-size: 15px; }
header h1 { margin: 0; }
h2, pre, .card > * { white-space: pre-wrap; overflow-wrap: anywhere; }
input { flex: 1 1 180px; }
main { display: flex; flex: 1; min-height: 0; }
main > * { flex: 1; overflow: auto; padding: 8px 12px; }
#detail { flex: 1.3; border-left: 1px solid var(--line); }
#list { container-type: inline-size; }
.group, .card { content-visibility: auto; contain-intrinsic-height: auto 34px; }
.group { margin: 6px 0; border-left: 3px solid var(--line); }
.single { margin: 0; border: 0; }
.single > summary, .group:not(:has(.row)) { display: none; }
summary { padding: 2px 8px; }
.row {
  display: grid; width: 100%; gap: 0 12px; padding: 4px 8px; text-align: left;
  border-color: transparent transparent var(--line); border-radius: 0;
  grid-template-columns: 72px 3fr 4fr 2fr 68px 66px 84px;
}
.row > * { min-width: 0; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
.row img { height: 40px; vertical-align: top; }
.answer .warn:not(:empty) {
  display: inline-block; max-width: 45%; margin-right: 8px; overflow: hidden;
  text-overflow: ellipsis; vertical-align: top;
}
.row[aria-current=true], h4, pre { background: var(--panel); }
@container (max-width: 800px) {
  .row { grid-template-columns: 1fr 68px 66px; }
  .time, .tokens, .model { display: none; }
  .answer { grid-area: 2 / 1 / 3 / 4; }
}
@media (max-width: 800px) {
  main:has(#detail:not([hidden])) > :not(#detail) { display: none; }
}
.card { margin: 8px 0; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.card > * { margin: 0; padding: 5px 10px; }
pre, textarea { font: 12px/1.5 ui-monospace, Menlo, monospace; }
pre { margin: 4px 0; padding: 6px 10px; }
textarea { width: 100%; max-height: 400px; field-sizing: content; }
.card :is(img, audio, video) { display: block; max-width: 100%; max-height: 420px; }
.sides {
  display: grid; gap: 0 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr));
}
meter { width: 100%; }
</style>
<header>
  <h1>together_fake</h1>
  <button id="calls" aria-pressed="true">Calls</button>
  <button id="fixtures">Fixtures</button>
  <input id="filter" type="search" aria-label="Filter"
    placeholder="Filter ( / ): words, kind:chat, status:4xx, test:id">
  <span id="state" role="status"></span>
  <a id="download" download="fixtures.json">Download as fixtures</a>
  <button id="reset">Reset</button>
</header>
<main>
  <section id="list"></section>
  <section id="scripted" hidden></section>
  <section id="detail" tabindex="-1" hidden></section>
</main>
<script>
"use strict";
// What comes from clients is shown as text: nothing here parses HTML.

const ids = [...document.querySelectorAll("[id]")].map((node) => [node.id, node]);
const { calls, fixtures, filter, state, download, reset, list, scripted, detail } =
  Object.fromEntries(ids);
const groups = new Map(); // of one test or one conversation
const rows = new Map(); // by number
let since = 0; // the revision to ask from; 0 loads everything again
let epoch; // another one means that the record was reset
let opened = 0; // a call's number
let polls = 0; // the newest one's answer counts
let timer = 0;

function make(kind, ...content) {
  const [tag, name = ""] = kind.split(".");
  const node = document.createElement(tag);
  node.className = name;
  node.append(...content.flat(9).filter(Boolean)); // strings become text
  return node;
}

function makeButton(label, press) {
  const button = make("button", label);
  button.onclick = () => press(button);
  return button;
}

// JSON in a string, such as a tool's arguments, is shown in lines; long values are cut.
function toText(value) {
  let shown = value;
  if (/^\s*[[{]/.test(value)) try { shown = JSON.parse(value); } catch {}
  if (typeof shown !== "string") shown = JSON.stringify(shown, (key, item) =>
    item?.length > 500 ? `${item.slice(0, 20)}... (${item.length})` : item, 2) ?? "";
  return shown.slice(0, 50000);
}

const makePre = (value) => make("pre", toText(value));

const makeCard = (title, note, ...parts) =>
  make("div.card", make("h4.bar", title, make("span.dim", String(note ?? ""))), parts);

// Nothing is fetched from elsewhere.
function makeMedia(type, address) {
  const { href, origin } = new URL(address, location);
  const tag = { image: "img", audio: "audio", video: "video" }[type];
  if (!tag || origin !== location.origin && !/^data:(image|audio|video)/.test(href))
    return make("div", `${type}: ${address.slice(0, 200)}`);
  return Object.assign(make(tag), { alt: type, controls: true, src: href });
}

// === A request and a reply as messages ===

function readPart(part) {
  const { type, text, image_url: image, input_audio: sound, url } = Object(part);
  if (image) return makeMedia("image", image.url ?? image);
  if (sound) return makeMedia("audio", `data:audio/${sound.format};base64,${sound.data}`);
  return url ? makeMedia(type, url) : make("div", toText(text ?? part));
}

function readMessage({ role = "", content, tool_calls: calls, ...more }) {
  const thought = more.reasoning || more.reasoning_content;
  return makeCard(role, more.tool_call_id ?? more.finish_reason,
    thought && make("div.dim", toText(thought)),
    [content ?? []].flat().map(readPart),
    (calls ?? []).map((call) =>
      make("div", "calls " + call.function.name, makePre(call.function.arguments))));
}

function readTool({ name, description, parameters, function: nested }) {
  if (nested) return readTool(nested);
  const given = Object.keys(parameters?.properties ?? {}).join(", ");
  return make("div", make("b", `${name}(${given}) `), description);
}

function drawTimeline({ first_event_ms: first, duration_ms: whole, events_sent: events, outcome }) {
  if (!events) return "";
  const rest = whole - first;
  const pace = rest > 5 ? Math.round((events - 1) / rest * 1000) + " a second, " : "";
  const meter = make("meter");
  meter.value = whole ? first / whole : 0; // what it waited
  return make("div." + outcome, meter, `first event after ${first} ms, ` +
    `${events} events in ${whole} ms, ${pace}${outcome}`);
}

function drawCall(call) {
  const { method, body } = call;
  const url = call.path + (call.query && "?" + call.query);
  const headers = { "Content-Type": "application/json", Authorization: "Bearer any" };
  if (call.test) headers["X-Test-Id"] = call.test;
  const isForm = /^(multipart|application.x-www)/.test(call.headers["content-type"]);
  const misses = call.fixture ? [] : call.near_misses;
  const { messages, input, tools = [], ...settings } = Object(body);
  detail.replaceChildren(
    make("h2", `#${call.n} ${call.status} ${method} ${url}`),
    make("div.bar",
      Object.entries(call.copy).map(([name, text]) =>
        text && makeButton("Copy " + name, (button) => copyText(text, button))),
      !isForm && makeButton("Send again", () =>
        fetch(url, { method, headers, body: body && JSON.stringify(body) })),
      makeButton("Close", closeCall)),
    make("div.dim", [call.fixture ? "answered by " + call.fixture : !call.error && "generated",
      call.form && "form: " + call.form, call.model, tellTime(call.duration_ms),
      tellTokens(call.usage), call.test].filter(Boolean).join(", ")),
    ...[!misses.length && call.error, ...call.verdict].map((text) => make("div.bad", text)),
    ...call.warnings.map((text) => make("div.warn", text)),
    drawTimeline(call),
    make("div.sides",
      make("section", make("h3", "Request"), call.asked.map(readMessage),
        tools.length > 0 && makeCard("tools", "", tools.map(readTool)),
        makeCard("settings", "", makePre(settings))),
      make("section", make("h3", "Reply"), call.said.map(readMessage))),
    ...misses.map((miss) =>
      makeCard(miss.fixture, miss.differs, makePre(miss.reason))),
    make("details", make("summary", "As JSON"), makePre(call)));
}

async function openCall(number) {
  opened = number;
  for (const [n, row] of rows) row.ariaCurrent = n === number;
  detail.hidden = false;
  let call;
  try {
    call = await ask("/__parlel/requests/" + number);
    if (opened === number) drawCall(call);
  } catch (error) {
    // What is not as expected is shown as it is.
    detail.replaceChildren(error.message, makeButton("Close", closeCall), makePre(call));
  }
}

function closeCall() {
  rows.get(opened)?.focus();
  opened = 0;
  detail.hidden = true;
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    prompt("Copy this", text);
  }
}

// === The list ===

const tellTime = (ms) => ms < 1000 ? ms.toFixed(1) + " ms" : (ms / 1000).toFixed(2) + " s";
const tellTokens = (usage) =>
  usage && `${usage.prompt_tokens} + ${usage.completion_tokens ?? 0} tokens`;

function drawRow(call) {
  const { n, status, usage, outcome } = call;
  const colour = { 0: "dim", 4: "warn", 5: "bad" }[Math.floor(status / 100)] ?? "good";
  const row = makeButton("", () => {
    openCall(n);
    detail.focus();
  });
  row.append(
    make("span.time", new Date(call.at).toTimeString().slice(0, 8)),
    make("span", call.question || call.operation),
    make("span.answer", make("span.warn", call.warning),
      call.images.map((url) => makeMedia("image", url)),
      make(status < 400 ? "span" : "span.bad", call.answer)),
    make("span.model", call.model),
    make("b." + (outcome === "complete" ? colour : outcome),
      { running: "...", complete: String(status) }[outcome] ?? `${status} ${outcome}`),
    make("span", tellTime(call.duration_ms)),
    make("span.tokens", tellTokens(usage)));
  return Object.assign(row, { className: "row", id: "call-" + n, ariaCurrent: n === opened, call });
}

function place(call) {
  const { n, test, thread } = call;
  const key = test || thread || n;
  if (!groups.has(key))
    groups.set(key, Object.assign(make("details.group", make("summary")), { open: true, key }));
  const group = groups.get(key);
  const row = drawRow(call);
  if (rows.has(n)) rows.get(n).replaceWith(row);
  else {
    group.firstChild.after(row);
    list.prepend(group);
  }
  rows.set(n, row);
  for (const [old, node] of [...rows].slice(0, -1000)) {
    const rest = node.parentNode;
    node.remove();
    rows.delete(old);
    if (!rest.children[1]) {
      rest.remove();
      groups.delete(rest.key);
    }
  }
  const calls = [...group.children].slice(1).map((node) => node.call);
  const tokens = calls.reduce((sum, { usage }) => sum + (usage?.total_tokens ?? 0), 0);
  group.firstChild.textContent =
    `${test ? "test " + test : calls.at(-1).question}, ${calls.length} calls, ${tokens} tokens`;
  group.classList.toggle("single", calls.length === 1 && !test);
}

function drawEmpty(filtered) {
  const base = location.origin + "/v1";
  list.replaceChildren(filtered ? "No call passes the filter." :
    "No calls yet. Set these before a client is built, or try the curl:", filtered ? "" : makePre(
`export TOGETHER_BASE_URL=${base} TOGETHER_API_KEY=any
export OPENAI_BASE_URL=${base} OPENAI_API_KEY=any
curl ${base}/chat/completions -H 'Authorization: Bearer any' \\
  -d '{"model": "m", "messages": [{"role": "user", "content": "hello"}]}'`));
}

function clear() {
  rows.clear();
  groups.clear();
  list.replaceChildren();
  since = 0;
}

// === Fixtures ===

function drawFixture({ number, source, served, has_code: isCode, ...entry }) {
  const area = make("textarea", JSON.stringify(entry, null, 2));
  const problem = make("div.bad");
  const change = async (text) => {
    try {
      if (text) await ask("/__parlel/fixtures", "POST", `{"fixtures": [${text}]}`);
      await ask("/__parlel/fixtures/" + number, "DELETE");
      drawFixtures();
    } catch (error) {
      problem.textContent = error.message;
    }
  };
  return makeCard(source, served ? "served: " + served : "never served", area,
    number >= 0 && make("div.bar", !isCode && makeButton("Save", () => change(area.value)),
      makeButton("Remove", () => change())), problem);
}

async function drawFixtures() {
  const { fixtures } = await ask("/__parlel/fixtures");
  scripted.replaceChildren(...fixtures.map(drawFixture),
    fixtures.length ? "" : "Nothing is scripted: every answer is generated.");
}

function show(tab) {
  for (const [button, section] of [[calls, list], [fixtures, scripted]]) {
    button.ariaPressed = button === tab;
    section.hidden = button !== tab;
  }
  closeCall();
  if (tab === fixtures) drawFixtures();
}

// === The server ===

async function ask(path, method = "GET", body = undefined) {
  const answer = await fetch(path, { method, body });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error?.message ?? "status " + answer.status);
  return value;
}

// The filter as a query: `kind:chat some words` is kind=chat and text=some words.
function readFilter() {
  const query = new URLSearchParams();
  const words = filter.value.replace(/\b(kind|status|test|model|outcome):(\S+)/g,
    (all, name, value) => query.set(name, value) ?? "");
  if (words.trim()) query.set("text", words.trim());
  return query;
}

async function poll() {
  clearTimeout(timer);
  const mine = ++polls;
  try {
    const filtered = String(readFilter());
    download.href = "/__parlel/fixtures?from=requests&" + filtered;
    const answer = await ask(`/__parlel/requests?view=rows&since=${since}&${filtered}`);
    if (mine !== polls) return;
    const fresh = answer.epoch !== epoch;
    epoch = answer.epoch;
    if (fresh && since) {
      closeCall();
      clear();
      return poll();
    }
    if (!rows.size && answer.rows.length) list.replaceChildren();
    answer.rows.forEach(place);
    if (!rows.size) drawEmpty(filtered);
    if (answer.rows.some(({ n }) => n === opened)) openCall(opened);
    const isRead = scripted.contains(document.activeElement); // or changed
    if (answer.rows.length && !scripted.hidden && !isRead) drawFixtures();
    since = answer.next;
    state.textContent = rows.size + (filtered ? " of " + answer.last : "") + " calls";
  } catch (error) {
    state.textContent = "disconnected: " + error.message;
  }
  timer = setTimeout(poll, 500);
}

calls.onclick = () => show(calls);
fixtures.onclick = () => show(fixtures);
filter.oninput = () => {
  clear();
  if (!list.offsetParent) closeCall(); // on a phone it hides the list
  poll();
};
reset.onclick = async () => {
  if (!confirm("Forget all calls, stored objects and run-time fixtures?")) return;
  await ask("/__parlel/reset", "POST");
  poll();
};
document.onkeydown = (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = target.matches("input, textarea");
  const step = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 }[key];
  if (key === "Escape" && typing) target.blur();
  else if (typing) return;
  else if (key === "Escape") closeCall();
  else if (key === "/") filter.focus();
  else if (step) {
    const shown = [...document.querySelectorAll("details[open] > .row")];
    const next = shown[Math.max(0, shown.indexOf(rows.get(opened) ?? target) + step)];
    next?.focus();
    if (opened) next?.click();
  } else return;
  event.preventDefault();
};
poll();
</script>
</html>
"""


@functools.lru_cache(maxsize=1)
def page_policy() -> str:
    """Return the content security policy under which nothing but the page itself can run."""
    texts = re.findall(r"<(?:style|script)>(.*?)</s", PAGE, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts]
    style, script = (f"sha256-{digest.decode()}" for digest in digests)
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; img-src 'self' data:;"
        " media-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )


# === Control ===


@route("GET /", open=True, slow=False)
def get_root(server: Server, request: Request) -> Any:
    """Say what this is: to a browser by a page that shows the record."""
    if "text/html" in request.headers.get("accept", ""):
        headers = {"Content-Security-Policy": page_policy(), "Vary": "Accept"}
        return Reply(PAGE.encode(), 200, "text/html; charset=utf-8", headers)
    return {
        "name": "together-ai",
        "version": "1",
        "protocol": "together-v1",
        "documentation": "/docs/together-ai.md",
        "emulator": f"together_fake {__version__}",
    }


def list_route_lines() -> list[str]:
    lines = ["| method | path | what it does |", "| --- | --- | --- |"]
    for known in sorted(ROUTES, key=lambda known: (known.path.startswith("/__"), known.path)):
        first = (known.handler.__doc__ or "").strip().partition("\n")[0]
        lines.append(f"| {known.method} | `{known.path}` | {first} |")
    return lines


@route("GET /docs/together-ai.md", open=True)
def get_documentation(server: Server, request: Request) -> Any:
    """Return what this file says of itself, and the table of routes."""
    lines = ["# together_fake", "", "```", __doc__, "```", "", *list_route_lines(), ""]
    return Reply("\n".join(lines).encode(), 200, "text/markdown; charset=utf-8")


@route("GET /health", open=True, slow=False)
def get_health(server: Server, request: Request) -> Any:
    """Say that the server answers."""
    return {"status": "ok"}


@route("POST /__parlel/reset", open=True, query="test")
def reset_server(server: Server, request: Request) -> Any:
    """Go back to the state after the start, or forget what belongs to one test."""
    server.reset(test=request.args.get("test"))
    return {"ok": True}


SEEDED = f"content bytes,created,created_at:int|str:0..{2**53}"


def make_seed_row(name: str) -> Field:
    """Return the row of seeds, checked as if they had been posted; nothing is required of one."""
    rows = [row for row in JOBS[name].fields.values() if row.name not in ("file", "purpose")]
    fields = Fields(*rows, SEEDED)
    fields.required = ()
    return Field(name, list, each=Field("", dict, fields=fields))


@route(
    "POST /__parlel/seed",
    open=True,
    body=Keys(*map(make_seed_row, JOBS)),
    max_bytes=STORAGE_LIMIT,
)
def seed_objects(server: Server, request: Request) -> Any:
    """Store objects with chosen ids: `{"files": [{"id": "file-1", "content": "..."}], ...}`."""
    seeds = {name: items for name, items in request.body.items() if items is not None}
    try:
        return {name: server.seed(name, items) for name, items in seeds.items()}
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ApiError("bad_body", reason=f"a seed's value is of a wrong kind: {error!r}") from None


RECORD_FILTERS = Keys(
    "path model kind outcome test text batch status:int|str since:int:0.. limit:int:1..",
    "view=calls|rows",
)


def passes_filters(server: Server, call: Call, args: Item) -> bool:
    """Tell whether the query of the record's list asks for a call."""
    alike = ("kind", "outcome", "test", "batch", "model")
    text = args.get("text", "").encode().lower()
    return (
        args.get("path") in (None, call.path, collapse_path(call.path, server.strict))
        and str(args.get("status", "")) in ("", f"{call.status // 100}xx", str(call.status))
        and all(args[name] == getattr(call, name) for name in alike if name in args)
        and (not text or text in call._raw.lower() or text in call.raw_reply.lower())
    )


# --- A call as the page shows it: in messages, as those of a chat

MAX_THUMBNAIL = 50_000  # characters of an image's base64


def list_said(call: Call) -> list[Item]:
    """Return what came back; over a socket, what went both ways."""
    place, reply = f"/__parlel/requests/{call.number}/reply", call.reply
    if call.status == 101:
        said = [{"role": each["from"], "content": each["message"]} for each in call.messages]
        sound = {"role": "sound", "content": [{"type": "audio", "url": place}]}
        return [*said, sound] if call.sound else said
    events = list_objects(reply if call.events_sent else [reply])
    whole = events[-1] if events else None
    output = get_path(whole, "output") or get_path(whole, "response", "output")
    said = convert_items({"input": output}) if output else fold_stream(events)
    errors = [get_path(event, "error", "message") for event in events]
    said += [{"role": "error", "content": error} for error in errors if error][:1]
    kind = get_path(reply, "content_type")
    if said or reply is None or call.events_sent:
        return said
    if kind:
        size = {"type": "text", "text": f"{kind}, {reply['bytes']} bytes"}
        file = {"type": kind.partition("/")[0], "url": place}
        return [{"role": "reply", "content": [size, file]}]
    images = [
        {"type": "image", "url": item.get("url") or f"data:image/png;base64,{item['b64_json']}"}
        for item in list_objects(get_path(reply, "data"))
        if item.keys() & {"url", "b64_json"}
    ]
    rest = get_path(reply, "results") or get_path(reply, "data") or reply
    text = rest if type(rest) is str else ENCODE(rest)
    return [{"role": "images", "content": images} if images else {"role": "reply", "content": text}]


def tell_message(message: Item) -> str:
    """Return the beginning of a message in one line."""
    calls = [get_path(call, "function") or {} for call in list_objects(message.get("tool_calls"))]
    said = [f"{call.get('name')}({call.get('arguments')})" for call in calls]
    text = " ".join([str(join_text(message.get("content")) or ""), *said])
    return " ".join(text[: 2 * MAX_SHOWN].split())[:MAX_SHOWN]


def show_row(call: Call) -> Item:
    """Return what the page's list shows of a call."""
    asked, said = list_facts(call).messages, list_said(call)
    first = next((at for at, each in enumerate(asked, 1) if each.get("role") == "user"), None)
    # A conversation is known by all up to the user's first message.
    thread = hashlib.sha256(ENCODE([call.kind, asked[:first]]).encode()).hexdigest()[:16]
    last = [each for each in asked if each.get("role") not in ("system", "tool", "assistant")]
    parts = [part for each in said for part in list_objects(each.get("content"))]
    images = [part["url"] for part in parts if part.get("type") == "image"]
    if call.status == 101:
        heard = [get_path(each, "content", "transcript") for each in said]
        sound = f"{len(call.sound) / 2 / (call.sound_rate or 1):.1f} s of sound"
        said = [{"content": text} for text in filter(None, [*heard, sound])]
    return {
        **call.as_row(),
        "question": tell_message(last[-1]) if last else "",
        "answer": call.error or " / ".join(map(tell_message, said[:4])),
        "images": [url for url in images if len(url) < MAX_THUMBNAIL][:4],
        "warning": call.warnings[0][:MAX_SHOWN] if call.warnings else "",
        "thread": thread if first else "",
    }


@route("GET /__parlel/requests", open=True, query=RECORD_FILTERS)
def list_requests(server: Server, request: Request) -> Any:
    """List the record, oldest first; a query may ask for a kind, a status, a test, a text ..."""
    args = request.args
    rows, since = args.get("view") == "rows", args.get("since") or 0
    calls, epoch = server.requests, server.epoch
    last = calls[-1].number if calls else 0
    following = max((call.revision for call in calls), default=0)
    calls = [
        call
        for call in calls
        if (call.revision if rows else call.number) > since and passes_filters(server, call, args)
    ]
    calls = calls[-(args.get("limit") or len(calls)) :]
    # One after the other, so that others are served in between.
    items = ",".join([ENCODE(show_row(call) if rows else call.as_json()) for call in calls])
    more = {"last": last, "next": following, "epoch": epoch} if rows else {}
    name, tail = "rows" if rows else "requests", ENCODE({"count": len(calls), **more})
    return Reply(f'{{"{name}":[{items}],{tail[1:]}'.encode())


CONNECTION_HEADERS = {  # that concern one connection alone
    "accept-encoding", "connection", "content-length", "expect", "host", "keep-alive",
    "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip


def list_body_options(call: Call) -> Iterator[tuple[str, str]]:
    """Yield the options by which curl sends a body; files by their names."""
    kind, body = call.headers.get("content-type", ""), call.body or {}
    is_multipart = kind.startswith("multipart/")
    if not is_multipart and not kind.startswith("application/x-www-form-urlencoded"):
        yield from [("--data-raw", ENCODE(body))] if body else ()
        return
    pairs = [(n, v) for n in body for v in (body[n] if type(body[n]) is list else [body[n]])]
    for name, value in pairs:
        if type(value) is dict and "filename" in value:
            file = re.sub(r'(["\\])', r"\\\1", value["filename"].rpartition("/")[2])
            yield "-F", f'{name}=@"{file}";type={value["content_type"]}'
        else:
            option = "--form-string" if is_multipart else "--data-urlencode"
            yield option, f"{name}={dump_json(value)}"


def write_curl(call: Call, origin: str) -> str:
    """Return the command that sends a call again, with any key."""
    import shlex

    method = "-I" if call.method == "HEAD" else f"-X {shlex.quote(call.method)}"
    query = call.query and "?" + call.query
    options = [(f"curl -gsS --path-as-is {method}", origin + call.path + query)]
    for name, value in call.headers.items():
        if not (name in CONNECTION_HEADERS or value[:10] == "multipart/" or is_secret_header(name)):
            options.append(("-H", f"{name}: {value}" if value else f"{name};"))
    options += [("-H", f"authorization: Bearer {DEFAULT_KEY}"), *list_body_options(call)]
    return " \\\n  ".join(f"{option} {shlex.quote(text)}" for option, text in options)


def write_python(call: Call, entry: Item) -> str:
    """Return the shortest `server.reply()` that answers this request so again."""
    match, words, said = entry["match"], entry["response"], list_said(call)
    if [message["role"] for message in said] == ["assistant"]:
        words, finish = put_message(said[0]), said[0].get("finish_reason")
        for call_words in words.get("toolCalls", ()):
            del call_words["id"]
            if succeeds(json.loads, call_words["arguments"]):
                call_words["arguments"] = json.loads(call_words["arguments"])
        if finish not in (None, "stop", "tool_calls"):
            words["finishReason"] = finish
    lines = [repr(words.pop("content"))] if "content" in words else []
    if said and said[0]["role"] == "images" and len(said[0]["content"]) == 1:
        words.pop("json")
        lines.append(f'image=Path("call-{call.number}.png").read_bytes()')
    for key, value in words.items():
        prefix = "response_" if key in ("model", "headers") else ""
        lines.append(f"{prefix}{to_snake(key)}={value!r}")
    if not match.keys() & {"userMessage", "inputText"}:  # and else every operation
        lines.append(f"endpoint={match.get('endpoint', call.kind)!r}")
    is_agent = bool(get_path(call.body, "tools"))
    for key in ("userMessage", "inputText", "hasToolResult", "turnIndex"):
        if match.get(key) or (is_agent and match.get(key) is False):
            lines.append(f"{to_snake(key)}={match[key]!r}")
    short = f"server.reply({', '.join(lines)})"
    return short if len(short) <= 88 else "server.reply(\n    " + ",\n    ".join(lines) + ",\n)"


def find_numbered(noun: str, items: Iterable[Any], request: Request) -> Any:
    number = request.params["number"]
    for item in items:
        if str(item.number) == number:
            return item
    raise ApiError("no_object", param="number", noun=noun, id=number[:20])


@route("GET /__parlel/requests/{number}", open=True)
def get_recorded_call(server: Server, request: Request) -> Any:
    """Describe one recorded call, with what came back and ways to say it again."""
    call = find_numbered("Call", server.requests, request)
    rows = record_calls([call], server.secrets)
    return {
        **call.as_json(),
        "asked": list_facts(call).messages,
        "said": list_said(call),
        "verdict": [
            f"{each.name}: it {each.text}" for each in server.verdict() if call in each.calls
        ],
        "copy": {
            "curl": write_curl(call, request.origin),
            "python": write_python(call, copy_json(rows[0])) if rows else "",
            "fixture": write_fixtures({"fixtures": rows}).decode() if rows else "",
        },
    }


@route("GET /__parlel/requests/{number}/reply", open=True)
def get_recorded_reply(server: Server, request: Request) -> Any:
    """Return the bytes that one call got."""
    call = find_numbered("Call", server.requests, request)
    data, kind = call.raw_reply, call.reply_type
    if call.sound:
        data, kind = wrap_wav(bytes(call.sound), call.sound_rate), "audio/wav"
    reply = serve_bytes(request, data, kind)
    policy = {"Content-Security-Policy": "sandbox; default-src 'none'"}
    reply.headers = {**reply.headers, "X-Content-Type-Options": "nosniff", **policy}
    return reply


@route("POST /__parlel/fixtures", open=True)
def add_fixtures(server: Server, request: Request) -> Any:
    """Add the fixtures of a file's JSON, all or none."""
    try:
        added = parse_fixtures(parse_json(request.raw, is_foreign=False))
        server.script.add(added)
    except ValueError as error:
        raise ApiError("bad_fixture", reason=str(error)) from None
    numbers = [fixture.number for fixture in added]
    return {"ok": True, "added": len(added), "numbers": numbers, "warnings": added.warnings}


@route(
    "GET /__parlel/fixtures",
    open=True,
    query=Keys("from=requests", *RECORD_FILTERS.values()),
)
def list_fixtures(server: Server, request: Request) -> Any:
    """List the fixtures with how often each was served, or make them from the record."""
    if request.args.get("from") is None:
        return server.script.describe()
    calls = [call for call in server.requests if passes_filters(server, call, request.args)]
    return Reply(write_fixtures({"fixtures": record_calls(calls, server.secrets)}))


@route("DELETE /__parlel/fixtures", open=True)
def remove_fixtures(server: Server, request: Request) -> Any:
    """Remove the fixtures that were added at run time; those of files stay."""
    server.script.remove(*server.script.every)
    return {"ok": True}


@route("DELETE /__parlel/fixtures/{number}", open=True)
def remove_fixture(server: Server, request: Request) -> Any:
    """Remove one fixture that was added at run time, by its number."""
    find_numbered("Fixture", server.script.every, request).remove()
    return {"ok": True}


# === HTTP ===

MAX_HEADER_BYTES = 64 * 2**10  # request line and header lines together
MAX_HEADERS = 100  # header lines, and trailer lines of a chunked body
MAX_CHUNK_LINE_BYTES = 4096  # a chunk's size with its extensions, or one trailer line
SEND_BUFFER_BYTES = 128 * 2**10  # of the kernel, which would keep 4 MB for who does not read
MAX_GATHERED_BYTES = 64 * 2**10  # of replies or events that are at hand, sent at once
MAX_REMEMBERED_HEADS = 128  # of requests, so that they need not be taken apart again

RECEIVE_BYTES = 64 * 2**10  # taken at once
LAST_CHUNK = b"0\r\n\r\n"
IDLE, PARTIAL = "idle", "partial"  # a new request is to come, or the rest of one
SINGLE = {"content-length", "host", "transfer-encoding"}  # refused when repeated
OWN = {  # response headers that a reply cannot set, because this section does
    "access-control-allow-origin",
    "connection",
    "content-length",
    "content-type",
    "date",
    "server",
    "transfer-encoding",
}
CROSS_ORIGIN = (  # other origins may read a reply, and these headers of it
    "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: retry-after, x-request-id,"
    " x-should-retry, x-ratelimit, x-ratelimit-limit, x-ratelimit-remaining, x-ratelimit-reset,"
    " x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, cf-ray, etag, x-amzn-trace-id,"
    " x-api-received, x-api-call-start, x-api-call-end, x-inference-version, content-range,"
    " accept-ranges, location, x-together-file-id\r\n"
)
# Of an answer, as production tells them; the second of one that ended well.
API_TIMES = ("x-api-received: {at}\r\nx-api-call-start: {at}\r\n", "x-api-call-end: {at}\r\n")
UNCACHED = {"Cache-Control": "no-cache, no-transform"}  # a proxy shall not gather a stream
CHUNKED = "Transfer-Encoding: chunked\r\n"
BODILESS = {101, 204, 304}  # statuses whose replies end with the head
UNSAFE = lazy_regex(r"[\r\n\0]+")  # would start a header of its own

# What a request looks like. These patterns are the whole specification: what they do not match
# is refused. Text is latin-1, so a character is a byte.
NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
VALUE = r"[\t -~\x80-\xff]*"
HEAD = lazy_regex(
    rf"""(?:\r\n)?                       # an empty line too many, as old clients send
    ({NAME})[ ]                          # method
    (?:(?i:https?://)[^/?\ \r\n]+)?      # of an absolute target, only the path counts
    (/[!->@-~]*|\*|(?<![ ])(?=[ ?]))     # path; only an absolute target may lack it
    (?:\?([!-~]*))?[ ]                   # query
    HTTP/1\.([0-9])\r\n                  # minor version
    ((?:{NAME}:{VALUE}\r\n)*)            # header lines""",
    re.VERBOSE,
)
FIELD = lazy_regex(r"([^:]+):[ \t]*([^\r]*[^\r\t ]|)[ \t]*\r\n")
CHUNK_LINE = lazy_regex(rf"([0-9A-Fa-f]{{1,15}})[ \t]*(?:;{VALUE})?\r\n".encode("latin-1"))
CHUNK_END = lazy_regex(rb"\r\n")
TRAILER_LINE = lazy_regex(rf"(?:{NAME}:{VALUE})?\r\n".encode("latin-1"))

# Tells from its first bytes that a head will never be one, so that nobody waits for the rest.
HOPELESS = lazy_regex(rb"\A(?:\r\n)?[^!-~\r]|(?<!\r)\n|\r(?!\n|\Z)|\0")


def explain_refusal(head: str) -> ApiError:
    """Say why the start of what a client sent is no head of a request."""
    reason = "a line is neither METHOD /path HTTP/1.1 nor Name: value, and then CR LF"
    if head.startswith("\x16\x03"):
        reason = "this is TLS: have the client use http://, or give the server an ssl_context"
    if head.startswith("PRI * HTTP/2"):
        reason = "this is HTTP/2: have the client speak HTTP/1.1, as curl does with --http1.1"
    return ApiError("bad_http", reason=reason)


def parse_fields(lines: str) -> Headers:
    """Return header lines by name in lower case; repeated ones are joined."""
    fields = FIELD.findall(lines)
    if len(fields) > MAX_HEADERS:
        raise ApiError("headers_too_large")
    headers = Headers()
    for field, value in fields:
        name = field.lower()
        if name in headers and name in SINGLE:
            raise ApiError("bad_http", reason=f"it has several {name} headers")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ApiError("too_large", size=size, limit=limit)


def clean_header(text: str) -> str:
    return text if text.isprintable() else UNSAFE.sub("", text)


def frame_chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event) if event else b""  # empty would end the body


class Head:
    """What the lines before a body say; the requests of a connection mostly share one."""

    def __init__(self, scheme: str, netloc: str, data: bytes) -> None:
        """Take a head apart; raise ApiError where it is none."""
        text = data.decode("latin-1")
        match = HEAD.fullmatch(text)
        if not match:
            raise explain_refusal(text)
        self.method, path, query, self.minor, lines = match.groups()
        self.path, self.query = path or "/", query or ""
        self.fields = fields = parse_fields(lines)
        old = self.minor == "0"
        if not old and "host" not in fields:
            raise ApiError("bad_http", reason="HTTP/1.1 needs a Host header")
        self.origin = scheme + (fields.get("host") or netloc)
        self.closes = old or "close" in fields.get("connection", "").lower()
        self.coding: str | None = fields.get("transfer-encoding")
        if self.coding is not None and ("content-length" in fields or old):
            raise ApiError("bad_http", reason="Transfer-Encoding takes HTTP/1.1 and no length")
        if self.coding is not None and self.coding.lower() != "chunked":
            raise ApiError("unknown_coding", coding=self.coding)
        digits = fields.get("content-length", "0")
        if not digits.isdecimal():  # int() alone also takes "+5" and "1_0"
            raise ApiError("bad_http", reason=f"Content-Length {digits!r} is not a whole number")
        self.size = int(digits.lstrip("0")[:18] or 0)  # of the body; none has more digits


class RequestReader:
    """Takes requests out of the bytes that one client sends; `feed()` gives it those.

    The methods that read yield IDLE or PARTIAL when more has to come, and raise ApiError where the
    bytes are no request: where the next one begins is then unknown. `say` tells the client
    something before its request is whole.
    """

    def __init__(self, server: Any, say: Callable[[bytes], None]) -> None:
        self.server, self.say = server, say
        self.data = b""  # what has come
        self.at = 0  # what stands before has been used
        self.head: Any = None  # of the latest request

    def feed(self, data: bytes) -> None:
        self.data, self.at = self.data[self.at :] + data, 0

    def count_unused(self) -> int:
        return len(self.data) - self.at

    def read_request(self) -> Generator[str, None, Request]:
        """Return the next request, whole."""
        while self.at == len(self.data):
            yield IDLE
        self.head = None
        end = self.data.find(b"\r\n\r\n", self.at)
        if end < 0:
            end = yield from self.wait_for_head()
        if end - self.at > MAX_HEADER_BYTES:
            raise ApiError("headers_too_large")
        self.head = head = self.server.read_head(self.data[self.at : end + 2])
        start, self.at = end + 4, end + 4 + head.size
        if head.coding is None and self.at <= len(self.data):
            body = self.data[start : self.at]
        else:
            self.at = start
            body = yield from self.read_body(head)
        return Request(
            head.method,
            head.path,
            body,
            query=head.query,
            headers=head.fields,
            origin=head.origin,
        )

    def wait_for_head(self) -> Generator[str, None, int]:
        """Return where a head ends, once it does; raise ApiError when it never will."""
        self.feed(b"")
        seen = 0
        while (end := self.data.find(b"\r\n\r\n", max(0, seen - 3))) < 0:
            if len(self.data) > MAX_HEADER_BYTES:
                raise ApiError("headers_too_large")
            if HOPELESS.search(self.data, max(0, seen - 1)):
                raise explain_refusal(self.data.decode("latin-1"))
            seen = len(self.data)
            yield PARTIAL
        return end

    def read_body(self, head: Head) -> Generator[str, None, bytes]:
        """Return a body by its length or its chunks, after a wished-for 100 Continue."""
        limit = self.server.app._limit_body(Request(head.method, head.path, headers=head.fields))
        check_size(head.size, limit)
        waits = head.fields.get("expect", "").lower() == "100-continue" and head.minor != "0"
        if waits and not self.count_unused():
            self.say(b"HTTP/1.1 100 Continue\r\n\r\n")
        chunked = self.read_chunks(limit)
        return (yield from chunked if head.coding else self.read_exactly(head.size))

    def read_exactly(self, size: int) -> Generator[str, None, bytes]:
        """Return the next `size` bytes."""
        body = io.BytesIO()  # gives its bytes away without a copy
        self.at += body.write(self.data[self.at : self.at + size])
        while missing := size - body.tell():
            yield PARTIAL
            self.at = body.write(self.data[:missing])
        return body.getvalue()

    def read_chunks(self, limit: int) -> Generator[str, None, bytes]:
        """Return a body that comes in chunks; its trailers are read and dropped."""
        body = bytearray()
        while size := int((yield from self.read_line(CHUNK_LINE))[1], 16):
            check_size(len(body) + size, limit)
            body += yield from self.read_exactly(size)
            yield from self.read_line(CHUNK_END)
        for _ in range(MAX_HEADERS + 1):
            if (yield from self.read_line(TRAILER_LINE))[0] == b"\r\n":
                return bytes(body)
        raise ApiError("headers_too_large")

    def read_line(self, pattern: re.Pattern[bytes]) -> Generator[str, None, re.Match[bytes]]:
        """Return a line between the chunks of a body, as `pattern` takes it apart."""
        while not (match := pattern.match(self.data, self.at)):
            if b"\n" in self.data[self.at :] or self.count_unused() > MAX_CHUNK_LINE_BYTES:
                raise ApiError("bad_http", reason="a chunk does not end or begin as it should")
            yield PARTIAL
        self.at = match.end()
        return match


@functools.lru_cache(maxsize=1)
def common_headers(second: int) -> tuple[str, list[str]]:
    """Return the headers of every reply in a second of Unix time, and the times of answers."""
    date, at = formatdate(second, usegmt=True), format_time(second)
    return f"Server: together-fake\r\nDate: {date}\r\n", [each.format(at=at) for each in API_TIMES]


def answer_headers(reply: Reply, times: list[str]) -> str:
    """Return the headers that production gives every answer, made of its id (recorded)."""
    id = clean_header(reply.id)
    short = id.removesuffix(COLO)
    own = short[-17:-16] == "-"  # in Together's form; there are others
    ray = short[-16:] if own else hashlib.blake2b(id.encode(), digest_size=8).hexdigest()
    fields = f"x-request-id: {id}\r\n{times[0]}cf-ray: {ray}{COLO}\r\n"
    if short == id:
        trace = f"{ray[:8]}-{ray[8:12]}-4{ray[1:4]}-a{ray[4:7]}-{ray[:12]}"
        fields += "x-inference-version: v2\r\nvary: accept-encoding\r\n"
        fields += f"x-amzn-trace-id: {trace}-noamzn\r\n"
    else:  # of images
        fields += "x-image-version: v2\r\n"
    if reply.events is None:
        fields += f'etag: W/"{len(reply.body):x}-{id}"\r\n'
        fields += times[1] if reply.status < 400 else ""
    return fields


def write_head(reply: Reply, closes: bool, framing: str) -> bytes:
    """Return the status line and the headers; `framing` tells where the reply ends."""
    fields, times = common_headers(int(time.time()))
    if reply.reader:
        fields += CROSS_ORIGIN if reply.reader == "*" else CROSS_ORIGIN.replace("*", reply.reader)
    for name, value in reply.headers.items():
        if name.lower() not in OWN:
            fields += clean_header(f"{name}: {value}") + "\r\n"
    if reply.id:
        fields += answer_headers(reply, times)
    if reply.status not in BODILESS:
        fields += f"Content-Type: {clean_header(reply.content_type)}\r\n{framing}"
    if reply.handler is not None:
        fields += "Connection: Upgrade\r\n"
    elif closes:
        fields += "Connection: close\r\n"
    reason = http.client.responses.get(reply.status, "")
    lines = f"HTTP/1.1 {reply.status} {reason}\r\n{fields}\r\n"
    return lines.encode("latin-1", "replace")


def write_whole(reply: Reply, head: Head, closes: bool = False) -> tuple[bytes, bytes]:
    start = write_head(reply, closes or head.closes, f"Content-Length: {len(reply.body)}\r\n")
    ends = head.method == "HEAD" or reply.status in BODILESS
    return start, b"" if ends else reply.body


def write_events(reply: Reply, head: Head) -> Iterator[Any]:
    """Yield the bytes of a stream, as many as are at hand, and seconds to pause between.

    The first events leave with the head, the last ones with the end.
    """
    size = reply.headers.get("Content-Length")
    is_chunked = size is None and head.minor != "0"
    framing = "" if size is None else f"Content-Length: {size}\r\n"
    if size is None:
        reply.headers = {**UNCACHED, **reply.headers}
    start = write_head(reply, head.closes, CHUNKED if is_chunked else framing)
    frame: Callable[[Any], bytes] = frame_chunk if is_chunked else bytes
    events, last = reply.events, LAST_CHUNK if is_chunked else b""
    if head.method == "HEAD":
        events, last = (), b""
    drawn = bytearray()
    most = 1 if reply.waits else MAX_GATHERED_BYTES
    has_begun = False
    try:
        for event in events:
            pauses = type(event) is float
            if not pauses:
                drawn += event
                has_begun = True  # if only with b"", so that the head leaves
                if len(drawn) < most:
                    continue
            if drawn or (start and has_begun):
                yield start + frame(drawn)
                start, drawn = b"", bytearray()
            if pauses:
                yield event
    except Exception:  # what was drawn before is sent
        if drawn:
            yield start + frame(drawn)
        raise
    yield start + frame(drawn) + last


# === Sockets ===

# Which thread answers is told at `HttpServer`, and chosen by `_begin()` of the server.
# At once; further ones wait in the backlog. select() alone, on Windows, watches 512.
MAX_CONNECTIONS = 4000 if hasattr(select, "poll") else 500
CROWDED_SECONDS = 1.0  # to ask, send on or read, where all places are taken and somebody waits
MAX_HELD = 8  # replies that are sent at once
MAX_IDLE_WORKERS = 16
LOOK_SECONDS = 0.25  # between two looks at who is slow or has left
RESET_SECONDS = 0.02  # in which a client that has left answers by a reset
STALLED_SECONDS = 4.0  # a pause behind which it need not be heard who reads on
TURN_SECONDS = 0.0005  # of a thread while workers are busy, so that the loop waits less for its
MAX_UNREAD_BYTES = 4 * 2**20  # of a handler
STOP_SECONDS = 0.25  # for workers to end what they do; a test's function may sleep for longer

# Memory that must be left to begin with a thread, a part for its stack, or with a task: where
# none is, threading waits for a thread that failed, and Python 3.11 unwinds for good. Of over 32 MB
# C libraries touch none, which takes them 8 us.
SPARE_BYTES = 33 * 2**20
QUICK, HEAVY, WAITING = "quick", "heavy", "waiting"  # who answers, see `HttpServer`
MAX_WORKERS = {HEAVY: 2, WAITING: 10**6}  # at once
# What a connection waits for beside those of HTTP; behind OVER nothing follows.
ROOM, OVER, END, SOCKET = "room", "over", "end", "socket"
BYTES = (IDLE, PARTIAL, END, SOCKET)  # those that end when something comes
PATIENCE = {  # for how many seconds it does so
    IDLE: 60.0,
    PARTIAL: 30.0,  # from the first byte of a request to its last
    ROOM: 30.0,  # for a client to take what is sent to it
    OVER: 30.0,
    END: 1.0,  # for a refused one to read why
}


class Connection(http.server.BaseHTTPRequestHandler):
    """One client; the loop alone calls its methods.

    `converse()` tells its life. It yields what has to happen before it goes on:

    IDLE, PARTIAL  bytes of a new request come, more of one that has begun
    ROOM           what is to be sent has been
    END, SOCKET    a refused client sends no more, one that was handed over does
    0.5            so many seconds have passed
    (kind, work, has_begun)  a worker has done this work; it goes on with the result
    """

    server: Any

    def __init__(self, client: socket.socket, address: Any, server: Any) -> None:
        """Begin to wait for a request; its base would answer all of them first."""
        self.socket, self.client_address, self.server = client, address, server
        self.reader = RequestReader(server, self.write)
        self.unsent: Any = b""
        self.since = server.now  # when it began to wait
        self.has_begun = False  # with a reply in events
        self.has_ended = False  # the client sends no more
        self.is_closed = False
        self.call: Any = None  # the latest that a worker answers
        self.handler: Any = None  # once it is handed over
        self.interest = 0  # what the selector watches
        self.life: Any = self.converse()
        self.awaited = next(self.life)  # what for

    # Its life

    def converse(self) -> Generator[Any, Any, None]:
        """Answer one request after the other."""
        app, reader = self.server.app, self.reader
        request: Any = None
        try:
            while self.handler is None and not (reader.head and reader.head.closes):
                request, self.has_begun = None, False
                request = yield from reader.read_request()
                request.peer = self.client_address, len(self.server.clients) - 1
                kind = app._begin(request)
                if kind is QUICK:
                    reply = app.answer(request)
                else:
                    request.client, self.call = self, request.call
                    reply = yield kind, functools.partial(app.answer, request), False
                yield from self.send_reply(reply)
                if self.has_ended:
                    yield from self.see_off()
        except (ApiError, MemoryError) as error:
            if self.has_begun:
                raise Cut from None
            if isinstance(error, MemoryError):
                yield LOOK_SECONDS  # for workers to leave some
                error = ApiError("no_memory")
            head = reader.head
            if head is None:  # all that is known is how it begins
                line = reader.data[reader.at : reader.at + 100].partition(b"\r")[0]
                request = Request("", line.decode("latin-1"))
                head = Head("", "", b"GET / HTTP/1.0\r\n")
            elif request is None:
                request = Request(head.method, head.path, query=head.query, headers=head.fields)
            self.unsent += b"".join(write_whole(app.answer(request, error), head, True))
            yield from self.linger()

    def linger(self) -> Generator[Any, Any, None]:
        """Let the client read what was sent last: closing before it ends would reset that away."""
        yield ROOM
        self.socket.shutdown(socket.SHUT_WR)
        while not self.has_ended:
            yield END
            self.reader.data = b""

    def see_off(self) -> Generator[Any, Any, None]:
        """Find out by sending whether the client has left or still reads."""
        yield ROOM
        yield RESET_SECONDS
        gone = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self.end_call("left" if gone else "complete")

    def end_call(self, outcome: str) -> None:
        if self.call is not None and not self.call.has_ended:
            self.server.app._end_call(self.call, outcome)

    def send_reply(self, reply: Reply) -> Generator[Any, Any, None]:
        """Send the reply to the latest request."""
        head = self.reader.head
        if reply.events is not None:
            yield from self.send_events(reply, write_events(reply, head))
            return
        start, body = write_whole(reply, head)
        if len(body) <= MAX_GATHERED_BYTES:
            self.unsent += start + body
        else:  # it is not copied behind its head
            self.unsent += start
            yield ROOM
            self.unsent = memoryview(body)
            yield ROOM
        if reply.handler is not None:
            yield from self.hand_over(reply.handler)
        if len(self.unsent) > MAX_GATHERED_BYTES:
            yield ROOM

    def send_events(self, reply: Any, pieces: Iterator[Any]) -> Generator[Any, Any, None]:
        """Send the pieces of a stream, which pauses where it says so."""
        draw = functools.partial(next, pieces, None)
        kind = WAITING if reply.waits else QUICK
        has_paused = is_worked_on = False
        try:
            while True:
                is_worked_on = kind is not QUICK
                piece = (yield kind, draw, True) if is_worked_on else draw()
                is_worked_on = False
                if piece is None:
                    return
                if type(piece) is float:
                    has_paused = True
                    yield piece
                    continue
                self.unsent += piece
                self.has_begun = True
                if has_paused and self.has_ended:  # who has left resets what is sent
                    yield ROOM
                    yield RESET_SECONDS
                has_paused = False
                if len(self.unsent) >= MAX_GATHERED_BYTES:
                    yield ROOM
                    kind = WAITING if reply.waits else HEAVY
        finally:
            if not is_worked_on:  # closing it meanwhile ends Python 3.12 with a fault
                reply.events.close()

    def hand_over(self, handler: Any) -> Generator[Any, Any, None]:
        """Let a handler, a `Socket`, take the connection over; what it does has to be quick.

        `on_bytes()` hears what comes, until it is `closed`; workers `draw()` what is sent, while
        there are `turns`; `on_close()` returns what the client is told last.
        """
        self.handler = handler
        try:
            handler.on_open(self)
            handler.on_bytes(self.reader.data[self.reader.at :])
            while not handler.closed:
                if handler.turns:
                    turn = Reply(events=handler.draw())
                    turn.waits = True
                    yield from self.send_events(turn, turn.events)
                else:
                    yield SOCKET
            self.write(handler.on_close())
            yield from self.linger()
        finally:
            with contextlib.suppress(OSError):
                self.socket.send(handler.on_close())

    # What the loop does with it

    def resume(self, result: Any = None, error: BaseException | None = None) -> None:
        """Run `converse()` up to what it waits for next."""
        if self.is_closed:
            if isinstance(result, Reply) and result.events is None:
                self.end_call("left")
            return
        before = self.awaited
        try:
            self.awaited = self.life.send(result) if error is None else self.life.throw(error)
        except BaseException as end:
            self.awaited = OVER
            if not isinstance(end, (StopIteration, Cut, OSError)):
                complain_of_bug()
        if type(self.awaited) is tuple:
            self.server.run(*self.awaited, self.resume)
        elif type(self.awaited) is float:
            is_closed = self.handler is not None and self.handler.closed
            self.server.call_later(0 if is_closed else self.awaited, self.resume)
        elif self.awaited is not before:
            self.since = self.server.now
        self.server.held.append(self)

    def act(self, mask: int) -> None:
        """Receive what has come, or send on, as far as there is something."""
        if not mask & selectors.EVENT_READ:
            self.flush()
            return
        try:
            data = self.socket.recv(RECEIVE_BYTES)  # more than a record of TLS has
        except self.server.not_yet:
            return
        except MemoryError:
            if self.awaited in BYTES:  # else the worker may leave some
                self.resume(error=ApiError("no_memory"))
            return
        except OSError as error:
            if (reason := getattr(error, "reason", "")) and self.awaited is IDLE:  # no TLS
                self.resume(error=ApiError("bad_http", reason=f"this port speaks TLS ({reason})"))
            self.close()
            return
        self.has_ended = not data
        if data and self.handler is not None:
            self.hear(data)
            return
        self.reader.feed(data)
        if data and self.awaited in BYTES:
            self.resume()
        else:
            self.server.held.append(self)

    def hear(self, data: bytes) -> None:
        """Give what has come on a socket to its session, and go on where that ended or waits."""
        if not self.is_closed:
            self.handler.on_bytes(data)
            pauses = type(self.awaited) is float
            if self.awaited is SOCKET or (pauses and self.handler.closed):
                self.resume()
            self.server.held.append(self)

    def run(self, work: Any, take: Any) -> None:
        self.server.run(HEAVY, work, False, take)

    def flush(self) -> None:
        """Send what is to be sent; go on where that was waited for."""
        if self.unsent:
            try:
                sent = self.socket.send(self.unsent)
            except self.server.not_yet:
                sent = 0
            except OSError:
                self.close()
                return
            if sent:
                self.since = self.server.now
                self.unsent = self.unsent[sent:] if sent < len(self.unsent) else b""
        usual = self.awaited is IDLE and self.interest == selectors.EVENT_READ
        if usual and not (self.unsent or self.has_ended):
            return
        is_stalled = type(self.awaited) is float and self.awaited > STALLED_SECONDS
        if self.has_ended and (self.awaited in BYTES or is_stalled or self.handler is not None):
            self.awaited = OVER  # it has left, or has all it asked for
        if self.unsent or self.awaited not in (ROOM, OVER):
            self.watch()
        elif self.awaited is OVER:
            self.close()
        else:
            self.resume()

    def watch(self) -> None:
        """Have the selector watch for what can be done next."""
        full = self.reader.count_unused() > RECEIVE_BYTES and self.awaited not in BYTES
        full = full or (self.handler is not None and self.handler.is_busy)
        interest = 0 if self.has_ended or full or self.is_closed else selectors.EVENT_READ
        interest |= selectors.EVENT_WRITE if self.unsent else 0
        if interest == self.interest:
            return
        before, self.interest = self.interest, interest
        try:
            if before:
                self.server.selector.unregister(self.socket)
            if interest:
                self.server.selector.register(self.socket, interest, self.act)
        except (OSError, ValueError, KeyError):  # no memory for one more, say
            self.interest = 0
            self.close()

    def close(self) -> None:
        """End its life and close the socket; what a worker does for it is dropped."""
        self.is_closed = self.has_ended = True
        is_worked_on = type(self.awaited) is tuple
        self.unsent, self.awaited = b"", OVER
        self.watch()
        try:
            self.life.close()
            if not is_worked_on:
                self.end_call("left")
        except Exception:
            complain_of_bug()
        self.socket.close()
        self.server.clients.discard(self)
        if not self.server.stopping.is_set():
            self.server.accept_or_not()

    def write(self, data: bytes) -> None:
        """Send something before long; who does not read loses the connection."""
        self.unsent += data
        self.server.held.append(self)
        if len(self.unsent) > MAX_UNREAD_BYTES:
            self.unsent, self.has_ended = b"", True


BUSY: list[float] = []  # the interval of turns before each task that is done


class Workers:
    """Threads that do what takes long, so many at once; the loop gives them their tasks."""

    def __init__(self, server: Any, most: int) -> None:
        self.server, self.most = server, most
        self.waiting: deque[Any] = deque()  # tasks that no worker has: work, and who takes its end
        self.given: Any = queue.SimpleQueue()  # tasks that one has; None ends it
        self.count = self.idle = 0

    def give_tasks(self) -> None:
        """Give tasks to idle workers, and start one more where there is none."""
        if not self.idle and self.count < self.most:
            try:
                self.server.start_thread(self.work)
                self.count += 1
                self.idle += 1
                self.server.soon.append(int)  # the next round comes at once
            except (RuntimeError, MemoryError):  # there are too many threads
                if not self.count:
                    self.idle -= 1
                    self.do(*self.waiting.popleft())
        while self.waiting and self.idle > 0:
            self.idle -= 1
            self.given.put(self.waiting.popleft())

    def work(self) -> None:
        """Do one task after the other, until `stop()`."""
        while task := self.given.get():
            try:
                self.do(*task)
            except MemoryError:
                self.given.put(task)  # when some is left
            task = None  # else it would keep a stream open that was given up

    def do(self, work: Callable[[], Any], take: Callable[..., None]) -> None:
        """Do something, and have the loop take its result or its error."""
        came: list[Any] = [None, MemoryError()]
        end = functools.partial(self.end_task, take, came)  # while there is memory for it
        with Shared._lock:  # the whole process takes turns more often meanwhile
            BUSY.append(sys.getswitchinterval())
            sys.setswitchinterval(min(TURN_SECONDS, BUSY[-1]))
        try:
            bytes(SPARE_BYTES)
            came[:] = work(), None
        except MemoryError:
            pass  # its frames hold what there is
        except BaseException as error:
            came[1] = error
        with Shared._lock:
            sys.setswitchinterval(BUSY.pop())
        self.server.call_soon(end)

    def end_task(self, take: Callable[..., None], came: list[Any]) -> None:
        """Pass on what a worker has done; end a worker too many."""
        self.idle += 1
        if self.idle > MAX_IDLE_WORKERS:
            self.idle -= 1
            self.count -= 1
            self.given.put(None)
        take(*came)


class HttpServer(http.server.ThreadingHTTPServer):
    """Serves `app` at an address, from construction (`OSError`: it is taken) to `stop()`.

    One thread, the loop, reads from and writes to the clients, never waits for one of them, and
    answers what is quick itself. Workers do the rest and hand their results to it by `call_soon()`:

    HEAVY    what keeps a processor busy: two at once, the others in the order they came
    WAITING  what mostly sleeps, as a test's function or an upstream does: all at once

    A reply that pauses, as a slow stream does, needs no worker: `call_later()` goes on with it.

    Replies to clients that ask at once leave at once, a few at a time: to wake a sleeping client
    costs a third of answering it, and while it is awake the next reply wakes nobody.
    """

    request_queue_size = 1024  # connections that wait to be accepted
    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers share the port

    def __init__(self, address: tuple[str, int], app: Any, ssl_context: Any = None) -> None:
        """Bind to (host, port)."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.app, self.ssl_context = app, ssl_context
        self.not_yet: tuple[type[Exception], ...] = (BlockingIOError,)
        if ssl_context is not None:
            import ssl

            self.not_yet += (ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self.patience = dict(PATIENCE)
        self.stopping = threading.Event()
        self.now = time.monotonic()  # when this round began
        self.clients: set[Connection] = set()
        self.held: list[Connection] = []  # that may have something to be sent
        self.timers: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self.timer_numbers = itertools.count()
        self.soon: deque[Callable[[], Any]] = deque()  # what workers want to be called
        self.threads: list[threading.Thread] = []
        self.workers = {kind: Workers(self, MAX_WORKERS[kind]) for kind in MAX_WORKERS}
        self.accepting = self.looks = False
        super().__init__(address, Connection)
        # For all clients:
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.socket.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.wake_reader, self.wake_writer = socket.socketpair()  # ends the loop's waiting
        self.wake_writer.setblocking(False)
        self.selector.register(self.wake_reader, selectors.EVENT_READ, self.wake_up)
        self.accept_or_not()

    def server_bind(self) -> None:
        """Bind without looking up the host's name."""
        socketserver.TCPServer.server_bind(self)
        host, port = self.socket.getsockname()[:2]
        self.server_port = port
        netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        scheme = "http://" if self.ssl_context is None else "https://"
        read_head = functools.partial(Head, scheme, netloc)
        self.read_head = functools.lru_cache(MAX_REMEMBERED_HEADS)(read_head)

    # The loop

    def start(self) -> None:
        try:
            self.start_thread(self.serve_forever)
        except RuntimeError:  # there are too many
            self.close_sockets()
            raise

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Be the loop until `stop()`."""
        while not self.stopping.is_set():
            try:
                self.serve_round()
            except Exception as error:  # nobody else would serve
                if not isinstance(error, MemoryError):  # some of which workers leave
                    complain_of_bug()
                self.stopping.wait(0.01)
        for connection in list(self.clients):
            connection.close()
        undone = [take for each in self.workers.values() for _, take in each.waiting]
        with contextlib.suppress(OSError):  # a process that has just been forked has it, too
            self.socket.shutdown(socket.SHUT_RDWR)
        self.close_sockets()  # which lets go of their streams, and so ends those calls
        for take in undone:
            take(Reply())

    def serve_round(self) -> None:
        """Wait until something can be done, and do all of it."""
        due = self.timers[0][0] - time.monotonic() if self.timers else None
        ready = self.selector.select(0 if self.held or self.soon else due)
        self.now = time.monotonic()
        for key, mask in ready:
            key.data(mask)
            if len(self.held) >= MAX_HELD:
                self.send_held()
        while self.soon and not self.stopping.is_set():
            self.soon.popleft()()
        while self.timers and self.timers[0][0] <= self.now:
            heapq.heappop(self.timers)[2]()
        self.send_held()
        if not self.stopping.is_set():
            for workers in self.workers.values():
                if workers.waiting:
                    workers.give_tasks()

    def send_held(self) -> None:
        """Send the replies held back; who has more to be sent comes again in the next round."""
        held, self.held = self.held, []
        for connection in held:
            if not connection.is_closed:
                try:
                    connection.flush()
                except MemoryError:
                    connection.close()

    def call_later(self, seconds: float, act: Callable[[], None]) -> None:
        """Have the loop, which must be who asks, call something after so many seconds."""
        due = time.monotonic() + seconds
        heapq.heappush(self.timers, (due, next(self.timer_numbers), act))

    def call_soon(self, act: Callable[[], Any]) -> None:
        """Have the loop call something, from any thread."""
        self.soon.append(act)
        with contextlib.suppress(OSError):  # it is awake already, or it is over
            self.wake_writer.send(b"\0")

    def wake_up(self, mask: int) -> None:
        self.wake_reader.recv(RECEIVE_BYTES)

    # Clients

    def accept_clients(self, mask: int) -> None:
        """Accept some of the clients that wait, as far as there are places."""
        for _ in range(MAX_HELD):
            if not self.accepting:
                return
            try:
                client, address = self.socket.accept()
                client.setblocking(False)
                if self.ssl_context is not None:  # hands are shaken while it is read from
                    client = self.ssl_context.wrap_socket(client, True, False)
            except BlockingIOError:
                return
            except OSError:  # too many open files, say
                self.accept_or_not(False)
                self.call_later(LOOK_SECONDS, self.accept_or_not)
                return
            connection = Connection(client, address, self)
            self.clients.add(connection)
            if not self.looks:
                self.look()
            self.accept_or_not()
            self.held.append(connection)
            connection.act(selectors.EVENT_READ)  # it mostly has asked already

    def accept_or_not(self, room: bool = True) -> None:
        """Accept clients while there are not too many."""
        room = room and len(self.clients) < MAX_CONNECTIONS
        if room and not self.accepting:
            self.selector.register(self.socket, selectors.EVENT_READ, self.accept_clients)
        elif self.accepting and not room:
            self.selector.unregister(self.socket)
        self.accepting = room

    def look(self) -> None:
        """Close who waits too long; sooner where others wait for a place."""
        self.looks = bool(self.clients)
        if self.looks:
            self.call_later(LOOK_SECONDS, self.look)
        most = math.inf if self.accepting else CROWDED_SECONDS
        for connection in list(self.clients):
            if most < math.inf and connection.awaited is IDLE:
                connection.act(selectors.EVENT_READ)  # it may just have asked
            patience = self.patience.get(connection.awaited)
            if patience is None or self.now < connection.since + min(patience, most):
                continue
            if connection.awaited is PARTIAL:
                connection.resume(error=ApiError("slow_request", seconds=patience))
            else:
                connection.close()

    # Workers

    def run(self, kind: str, work: Any, has_begun: bool, take: Callable[..., None]) -> None:
        """Have a worker do something; the loop is then given its result and its error.

        What has begun goes first: it fills memory until it is sent.
        """
        waiting = self.workers[kind].waiting
        add = waiting.appendleft if has_begun else waiting.append
        add((work, take))

    def start_thread(self, target: Callable[[], None]) -> None:
        bytes(SPARE_BYTES)
        thread = threading.Thread(target=target, name="together-fake", daemon=True)
        thread.start()
        self.threads = [*filter(threading.Thread.is_alive, self.threads), thread]

    # The end

    def stop(self) -> None:
        """End the connections and free the port; wait for the loop, and a moment for workers."""
        self.stopping.set()
        self.call_soon(int)
        if not self.threads:
            self.close_sockets()
        elif self.threads[0] is not threading.current_thread():  # the loop, which starts others
            self.threads[0].join()
        end = time.monotonic() + STOP_SECONDS
        for workers in self.workers.values():
            for _ in range(workers.count):
                workers.given.put(None)
        for thread in self.threads[1:]:
            if thread is not threading.current_thread():
                thread.join(max(0, end - time.monotonic()))

    def close_sockets(self) -> None:
        """Close what this process has open: in a child, the connections of its parent go on."""
        for used in (self.socket, self.selector, self.wake_reader, self.wake_writer):
            used.close()
        for connection in list(self.clients):
            connection.socket.close()
        for workers in self.workers.values():
            workers.waiting.clear()  # and lets go of its streams


# === Upstream ===

UPSTREAM_SECONDS = 300.0  # for its answer to begin, and then without a byte: models may be slow
CONNECT_SECONDS = 10.0  # for it to be reached
# Headers that concern one connection alone, or this server.
NOT_PASSED = {*CONNECTION_HEADERS, "x-parlel-fixture", "x-aimock-context"}
NOT_RETURNED = NOT_PASSED | {"alt-svc"}


def drop_headers(headers: Mapping[str, str], names: set[str]) -> dict[str, str]:
    """Return the headers that travel on: neither those names nor what `Connection` names."""
    headers = {name.title(): value for name, value in headers.items()}
    gone = names.union(re.split(r"[ \t,]+", headers.get("Connection", "").lower()))
    return {name: headers[name] for name in headers if name.lower() not in gone}


class UpstreamReader(io.RawIOBase):
    """What an upstream sends, as long as its client stays, this server runs and it is in time.

    head_end  when the whole head must be here; 0 once it is, and each byte has its own time
    """

    def __init__(self, sock: Any, client: Any, stopping: Any):
        sock.settimeout(LOOK_SECONDS)
        self.sock, self.client, self.stopping = sock, client, stopping
        self.head_end = time.monotonic() + UPSTREAM_SECONDS
        self.buffered = io.BufferedReader(self, RECEIVE_BYTES)

    def makefile(self, mode: str) -> Any:
        return self.buffered

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive some bytes; raise `Left` when nobody wants them any more."""
        end = self.head_end or time.monotonic() + UPSTREAM_SECONDS
        while time.monotonic() < end:
            try:
                size: int = self.sock.recv_into(buffer)
            except socket.timeout:
                size = -1
            if self.stopping.is_set() or (size < 0 and self.client and self.client.is_closed):
                raise Left
            if not size and self.head_end:
                raise ConnectionError("it closed the connection within the head of its answer")
            if size >= 0:
                return size
        raise socket.timeout(f"nothing came from it within {UPSTREAM_SECONDS:g} seconds")


class Upstream:
    """Sends what no fixture answers to another server; a recorder, if any, keeps the answers."""

    def __init__(self, url: str, recorder: Recorder | None, stopping: Any) -> None:
        """Raise ValueError where the URL cannot be one of an upstream."""
        from urllib.parse import urlsplit

        parts = urlsplit(url)
        is_known = parts.scheme in ("http", "https") and parts.hostname
        if not is_known or parts.query or parts.fragment or "@" in parts.netloc:
            rule = "must be an http:// or https:// URL without a name, a password or a query"
            raise ValueError(f"upstream {rule}, not {hide_in_url(url)!r}")
        self.url, self.recorder, self.stopping = url, recorder, stopping
        is_secure = parts.scheme == "https"
        kind: Any = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        self.connect = functools.partial(kind, parts.hostname, parts.port, timeout=CONNECT_SECONDS)
        self.prefix = re.sub(r"(?:/v1)?/*$", "", parts.path.rstrip("/"))
        self.name = f"1.1 together-fake-{os.getpid():x}-{id(self):x}"  # in `Via`

    def pass_on(self, kind: str, request: Request) -> Reply:
        """Return what the upstream answers, as it comes; raise ApiError 502 where it does not."""
        started = time.perf_counter()
        recorder: Any = self.recorder
        if self.name in request.headers.get("via", ""):
            raise self.refuse("it is this server")
        if ".." in re.split(r"[/\\]", unquote(unquote(request.path))):
            raise self.refuse(f"the path {request.path[:100]} leads out of it")
        connection = self.connect()
        try:
            response = self.send(connection, request)
            reply = self.begin_reply(response)
        except (Cut, OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            told = f"its answer is not HTTP ({error!r:.100})"
            if isinstance(error, OSError):
                told = f"{error.strerror or error}"
            elif isinstance(error, Cut):
                told = "its client left before it answered"
            raise self.refuse(told) from None

        def record(body: bytes, times: Any) -> None:
            kept = Reply(body, reply.status, reply.content_type, reply.headers)
            recorder.add(kind, request, kept, [(size, at - started) for size, at in times])

        has_body = request.method != "HEAD" and response.status not in BODILESS
        is_packed = "Content-Encoding" in reply.headers  # though nobody asked for that
        is_kept = recorder is not None and has_body and not is_packed
        pieces = self.read_pieces(response, connection, record if is_kept else None)
        next(pieces)  # it has begun, so that closing it closes the connection
        reply.events = next(pieces, None) if response.status in BODILESS else pieces
        return reply

    def refuse(self, reason: str) -> ApiError:
        return ApiError("bad_upstream", url=self.url, reason=reason)

    def send(self, connection: Any, request: Request) -> Any:
        """Send a request and return the head of the answer, from which its body can be read."""
        via = ", ".join(filter(None, [request.headers.get("via"), self.name]))
        headers = drop_headers({**request.headers, "via": via}, NOT_PASSED)
        headers["Connection"] = "close"
        connection.connect()
        target = self.prefix + request.path + (f"?{request.query}" if request.query else "")
        connection.request(request.method, target, request.raw or None, headers)
        source: Any = UpstreamReader(connection.sock, request.client, self.stopping)
        while True:
            response = http.client.HTTPResponse(source, method=request.method)
            response.begin()
            if not 100 <= response.status < 200:  # else it is no answer yet
                source.head_end = 0.0
                return response
            response.fp = None  # type: ignore[assignment]  # which it would close

    def begin_reply(self, response: Any) -> Reply:
        """Make the head of an answer that of a reply."""
        names = response.headers.keys()
        headers = drop_headers({name: response.getheader(name) for name in names}, NOT_RETURNED)
        content_type = headers.get("Content-Type", "application/octet-stream")
        size = response.getheader("Content-Length")
        if size and not (size.isdecimal() and len(size) < 19):
            raise http.client.HTTPException(f"Content-Length {size:.20}")
        if size and not response.chunked and not content_type.lower().startswith(EVENT_STREAM):
            headers["Content-Length"] = size
        reply = Reply(b"", response.status, content_type, headers)
        reply.waits = True
        return reply

    def read_pieces(
        self, response: Any, connection: Any, record: Callable[..., None] | None
    ) -> Generator[bytes, None, None]:
        """Yield a body as it comes; raise `Cut` where it does not come whole.

        It is recorded before its last piece is passed on: the client may ask at once.
        """
        kept = bytearray()
        times: list[tuple[int, float]] = []  # bytes so far, and when they came
        missing = response.length  # older Pythons do not count while read1() reads
        ends = response.chunked or missing is not None  # else a cut cannot be told
        try:
            yield b""
            while True:
                size = RECEIVE_BYTES if missing is None else min(missing, RECEIVE_BYTES)
                piece = response.read1(size) if size else b""
                if missing and not piece:
                    raise Cut
                missing = missing and missing - len(piece)
                if record and len(kept) + len(piece) > MAX_RECORDED_ANSWER_BYTES:
                    record = None
                if record:
                    kept += piece
                    times.append((len(kept), time.perf_counter()))
                    is_json = not piece and kept.startswith((b"{", b"["))
                    is_whole = (ends and not piece) or (is_json and succeeds(json.loads, kept))
                    if is_whole or missing == 0 or kept.endswith(DONE):
                        record(bytes(kept), times)
                        record = None
                if not piece:
                    return
                yield piece
        except (OSError, http.client.HTTPException, ValueError):
            raise Cut from None
        finally:
            response.close()
            connection.close()


# === Warnings ===

MODEL_TYPES = {  # by kind of operation, where these are called otherwise
    "response": "chat", "completion": "chat", "speech": "audio", "transcription": "transcribe",
    "translation": "transcribe",
}  # fmt: skip
FINISH_REASONS = ("stop", "eos", "length", "tool_calls", "function_call")
STREAM_OPTIONS = (  # that a whole reply does not know
    "chunkSize", "chunkSizes", "streamingProfile", "recordedTimings", "truncateAfterChunks",
    "endAfterChunks", "insert", *STRIKE_PLACES,
)  # fmt: skip


@functools.lru_cache(maxsize=256)  # a program misspells the same each time
def suggest_near(name: str, names: tuple[str, ...]) -> str:
    near = suggest(name, names)
    return near if near.endswith("?") else ""


def list_unread(values: Item, fields: Fields, place: str = "") -> Iterator[str]:
    """Yield the places of a body that no row of its table reads."""
    table = fields.pick(values)
    if table is None:
        return
    for name, value in values.items():
        if name not in table and name not in table.ignored:
            yield f"{place}{name}{suggest_near(name, tuple(table))}"
        inner = table.nested.get(name)
        if inner is None:
            continue
        is_list = type(value) is list
        for index, part in enumerate(value if is_list else [value]):
            if type(part) is dict:
                at = f"[{index}]" if is_list else ""
                yield from list_unread(part, inner, f"{place}{name}{at}.")


def warn_of_request(server: Server, route: Route, body: Item) -> Iterator[str]:
    """Yield what production would not understand, or not answer."""
    unread = ", ".join(list_unread(body, route.body))
    if unread:
        yield f"nothing reads {unread}"
    id, kind = body.get("model"), route.kind
    if kind in ("", "job") or not isinstance(id, str):
        return
    model = server.models.get(id)
    if model is None:
        if all(each["name"] != id for each in server.endpoints):
            near = suggest_near(id[:100], tuple(server.models))
            yield f"the model {id[:100]!r} is listed nowhere{near}"
    elif SERVED_AS.get(model.type, model.type) != MODEL_TYPES.get(kind, kind):
        yield f"{id} is a model of type {model.type}, which does not serve {kind}"


def find_violation(reader: SchemaReader, schema: Any, value: Any, place: str = "") -> str:
    """Say where a value misses a schema, and how."""
    at = place[:-1] or "it"
    if isinstance(schema, bool):
        return f"{at} is not allowed"
    for keyword, argument in schema.items():
        _, spoken_of, check = VOCABULARY[keyword]
        if spoken_of not in ("", KINDS[type(value)]) or check(reader, argument, value, schema):
            continue
        if keyword == "$ref":
            return find_violation(reader, reader.resolve(argument), value, place)
        if keyword == "properties":
            names = (name for name in argument if name in value)
            name = next(each for each in names if not reader.accepts(argument[each], value[each]))
            return find_violation(reader, argument[name], value[name], f"{place}{name}.")
        if keyword == "required":
            return f"{place}{next(name for name in argument if name not in value)} is missing"
        wanted = " or ".join(argument) if keyword == "type" else f"{keyword} {preview(argument)}"
        return f"{at} is {preview(value)}, wanted {wanted}"
    return f"{at} is {preview(value)}"


def explain_violation(schema: Any, text: str) -> str:
    """Say how a text misses a schema; nothing where it does not, or nobody can tell."""
    try:
        value = parse_json(text.encode("utf-8", "replace"))
        with bound_work():
            reader = SchemaReader(schema)
            is_valid = reader.accepts(reader.root, value)
            return "" if is_valid else find_violation(reader, reader.root, value)
    except ApiError:
        return f"{preview(text)} is no JSON"
    except Unsatisfiable:
        return ""


def warn_of_calls(body: Item, said: Item) -> Iterator[str]:
    """Yield how tool calls are none that the request can get."""
    tools = {tool["name"]: tool for tool in find_tools(body)}
    mode, names = read_tool_choice(body)
    choice = body.get("tool_choice")
    if tools and not said["tool_calls"] and mode in ("required", "named"):
        yield f"it calls no tool, and tool_choice is {preview(choice)}"
    for call in said["tool_calls"]:
        name = call["name"]
        if not tools:
            yield f"it calls {name}, and the request offers no tools"
        elif name not in tools:
            yield f"it calls {name}, a tool that the request does not offer{suggest(name, tools)}"
        elif mode == "none" or (names and name not in names):
            yield f"it calls {name}, and tool_choice is {preview(choice)}"
        else:
            schema = {"type": "object", **(tools[name].get("parameters") or {})}
            problem = explain_violation(schema, call["arguments"])
            if problem:
                yield f"it calls {name} with arguments that miss its schema: {problem}"


def warn_of_text(body: Item, said: Item) -> Iterator[str]:
    """Yield how a scripted answer is none that the request can get."""
    yield from warn_of_calls(body, said)
    format, text = body.get("response_format"), said["content"]
    reason = said.get("finish_reason")
    if format is not None and text is not None and reason != "length":
        schema = (format.get("json_schema") or format).get("schema", {"type": "object"})
        is_json = format["type"] in ("json_schema", "json_object")
        if problem := explain_violation(schema, text) if is_json else "":
            yield f"its content misses the {format['type']} of response_format: {problem}"
    for key in said.get("usage") or ():
        if key not in USAGE_KEYS:
            yield f"its usage has {key}{suggest(key, USAGE_KEYS)}"
    if reason is not None and reason not in FINISH_REASONS:
        yield f"its finish_reason is {preview(reason)}{suggest(reason, FINISH_REASONS)}"


def warn_of_response(
    server: Server, fixture: Fixture, request: Request, reply: Reply
) -> Iterator[str]:
    """Yield what a fixture says that production could not, or that changes nothing."""
    body, said = request.body, request.script or {}
    if "blocks" in said:
        yield from warn_of_text(body, said)
    elif "vectors" in said:
        model = server.models.get(body["model"])
        length = body.get("dimensions") or (model.dimensions if model is not None else None)
        for given in {len(vector) for vector in said["vectors"] if length is not None} - {length}:
            yield f"its embedding has {given} numbers; {body['model']} makes {length}"
    elif "scores" in said and len(said["scores"]) != len(body["documents"]):
        given, wanted = len(said["scores"]), len(body["documents"])
        yield f"it has {given} scores, and the request has {wanted} documents"
    idle = [name for name in STREAM_OPTIONS if name in fixture.options]
    if reply.events is None and idle:
        yield f"{', '.join(idle)} had no effect on a whole reply"
    is_silent = not any(map(said.get, ("content", "reasoning", "tool_calls")))
    if reply.events is not None and fixture.chunk_sizes and is_silent and "blocks" in said:
        yield "chunkSize had no effect without a text"
    if "shouldRetry" in fixture.options and reply.status < 400:
        yield "shouldRetry had no effect on a good reply"


# === Server ===

LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where to reach a server bound to all

UNRECORDED = lazy_regex(r"/+__parlel/|/docs/|/(?:health)?\Z")  # calls that look after the server
CONTROL_PATH = lazy_regex(r"/+__parlel(?:/|\Z)")
STORED_PATH = lazy_regex(  # what pages of others shall not reach
    r"/+(?:v[0-9]/+)*(?:__(?:parlel|upload|tokenized)|files|batches|endpoints|evaluations?|jobs"
    r"|fine-?tunes?)(?:/|\Z)"
)
LOOPBACK_NAME = lazy_regex(
    r"(?:localhost|[^:]*\.localhost|127(?:\.[0-9]{1,3}){3}|\[?::1\]?)(?::[0-9]*)?"
)
ADDRESS = lazy_regex(r"[0-9.]+|\[[0-9a-f:.]+\]")  # nobody can point it elsewhere
MAX_LOG_LINES = 10_000  # that wait to be written
LOG_SECONDS = 0.5  # for the last of them when the server stops
MAX_QUICK_BYTES = 8192  # of a body that is answered before the next client is
METHODS = "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS"
PREFLIGHT = {  # what a browser asks before it sends a page's request
    "Access-Control-Allow-Methods": METHODS,
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Max-Age": "86400",
    "Access-Control-Allow-Private-Network": "true",
}


def is_loopback(host: str) -> bool:
    return LOOPBACK_NAME.fullmatch(host.lower()) is not None


def is_guarded(request: Request) -> bool:
    """Tell whether not every page may send a request; programs do not look like one."""
    headers, path = request.headers, request.path
    if headers.is_page and ("x-parlel-fixture" in headers or STORED_PATH.match(path)):
        return True
    return path[:4] != "/v1/" and CONTROL_PATH.match(path) is not None


def check_page(server: Server, request: Request) -> None:
    """Refuse the pages of others, and names that others can point here.

    A page that a developer visits may send requests anywhere, so the browser's word on where they
    come from is all there is.
    """
    here = request.headers.get("host", "localhost").lower()
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    name = (origin or "").partition("://")[2]
    own = name == here or is_loopback(name) if origin else site in ("none", "same-origin")
    if not own and origin not in server.allow_origin:
        raise ApiError("foreign_page", who=(origin or site)[:100])
    host = re.sub(r":[0-9]*\Z", "", here)
    named = host in (socket.gethostname().lower(), *server.allow_host)
    if not (named or is_loopback(host) or ADDRESS.fullmatch(host)):
        raise ApiError("foreign_page", who=host[:100])


def write_line(call: Call) -> str:
    """Return what the log says of a call."""
    path = call.path + (f"?{call.query}" if call.query else "")
    at, tokens = format_time(call.at), get_path(call.usage, "total_tokens")
    parts = (
        f'{at} "{call.method} {path}" {call.status} {call.duration * 1000:.1f} ms',
        call.model if isinstance(call.model, str) else "",
        "" if tokens is None else f"{tokens} tokens",
        call.fixture,
        "" if call.outcome == "complete" else call.outcome,
    )
    return escape_unprintable(" ".join(filter(None, parts)).replace("\n", "\\n"))


def encode_events(chunks: Iterator[Any]) -> Iterator[bytes]:
    """Yield JSON values as server-sent events, and the sentinel."""
    for chunk in chunks:
        comment = ""
        while type(chunk) is bytes:  # goes with the next event
            comment, chunk = chunk.decode(), next(chunks)
        text = chunk if type(chunk) is str else ENCODE(chunk)
        yield f"{comment}data: {text}\n\n".encode()
    yield DONE


def as_reply(value: Any, request: Request, status: int) -> Reply:
    """Make a handler's result a reply; a stream's first event is drawn before the head is sent."""
    if type(value) is Reply:
        return value
    if isinstance(value, Socket):
        reply = Reply(b"", status, headers=accept_upgrade(request))
        reply.handler = value
        return reply
    if type(value) is not Events:
        return Reply(ENCODE(value).encode(), status)
    chunks = iter(value.chunks)
    events = chunks if value.encoded else encode_events(chunks)
    first = next(events)
    kind = "text/event-stream;charset=utf-8"
    return Reply(b"", status, kind, events=itertools.chain([first], events))


def check_operation(operation: str) -> None:
    """Raise ValueError for an operation that no call can have."""
    method, _, path = operation.partition(" ")
    near = suggest_operation(operation)
    try:
        if operation in {known.recorded_kind for known in ROUTES} or find_route(method, path):
            return
    except ApiError as error:
        near = f": {error.message}" if path else near
    raise ValueError(f"no operation is called {operation!r}{near}")


def list_refused_kinds(on_miss: Any) -> list[str]:
    """Return the kinds of operation whose misses are an error."""
    texts = [kind for kind in OPERATIONS if OPERATIONS[kind].response is TEXT]
    by_kind = on_miss if isinstance(on_miss, dict) else dict.fromkeys(texts, on_miss)
    for kind, word in by_kind.items():
        if word not in ("generate", "error"):
            either = '"generate", "error" or what for each kind, as {"embedding": "error"}'
            raise ValueError(f"on_miss must be {either}, not {on_miss!r}")
        if kind not in OPERATIONS:
            raise ValueError(f"on_miss: {kind!r} is no kind{suggest_operation(kind)}")
    return [kind for kind in by_kind if by_kind[kind] == "error"]


def explain_mismatch(fixture: Fixture, call: Call) -> str:
    (told,) = explain_misses(
        [(fixture, dict(call.misses).get(fixture))], list_facts(call), call.answered_by
    )
    return f"{call!r}: {told['reason']}"


KEYWORD_ROWS = (("response", RESPONSE), ("", OPTIONS), ("match", MATCH))
# keyword: (part of the entry, key); a match's `model` goes before a response's
KEYWORDS = {to_snake(key): (part, key) for part, rows in KEYWORD_ROWS for key in rows}
KEYWORDS.update(response_model=("response", "model"), response_headers=("response", "headers"))
KEYWORDS.update(not_=KEYWORDS.pop("not"), in_=KEYWORDS.pop("in"))


REPLY_WORDS = [*KEYWORDS, "when"]
SCRIPT_WORDS = ("endpoint", "sequence_index")  # that say nothing of a recorded call
CALL_WORDS = [
    word for word in KEYWORDS if KEYWORDS[word][0] == "match" and word not in SCRIPT_WORDS
]


def fixture_from_keywords(
    verb: str, words: Mapping[str, Any], known: Sequence[str] = REPLY_WORDS
) -> Fixture:
    """Build the fixture of `reply(...)` or `fail(...)`; None counts as absent."""
    frame = sys._getframe()
    while frame.f_globals.get("__name__") in (__name__, "contextlib") and frame.f_back is not None:
        frame = frame.f_back  # to the line that called this file
    place = f"{verb}()"
    source = f"{place} at {shorten_path(frame.f_code.co_filename)}:{frame.f_lineno}"
    entry: Item = {"match": {}, "response": {}, "": {}}
    for word in words:
        if word not in known:
            hint = suggest_near(word, tuple(known)) or f" (of the body: body={{{word!r}: ...}})"
            raise TypeError(f"{place} has no keyword {word!r}{hint}")
        if words[word] is not None and word != "when":
            part, key = KEYWORDS[word]
            entry[part][key] = words[word]
    entry.update(entry.pop(""))
    content, answers = entry["response"].get("content"), None
    if hasattr(content, "__next__"):
        answers = SharedIterator(content, source)
    elif callable(content) and not hasattr(content, "model_dump"):
        answers = content
    if answers is not None:
        entry["response"]["content"] = ""
    entry = {key: entry[key] for key in entry if entry[key] or key != "response"}
    fixture = Fixture(entry, place, source, when=words.get("when"))
    fixture.answers = answers
    return fixture


if TYPE_CHECKING:
    # The same words for mypy and editors, with their types.
    from typing_extensions import TypedDict, Unpack

    Object = Mapping[str, Any]

    class CallWords(TypedDict, total=False):
        user_message: TextMatch
        system_message: TextMatch | Sequence[str]
        input_text: TextMatch
        tool_call_id: TextMatch
        tool_result_contains: TextMatch
        tool_name: TextMatch
        model: TextMatch
        response_format: TextMatch
        context: TextMatch
        test_id: TextMatch
        has_tool_result: bool
        turn_index: int
        body: Object
        body_digest: str
        headers: Mapping[str, TextMatch]
        not_: Object

    class ReplyWords(CallWords, total=False):
        endpoint: TextMatch
        sequence_index: int
        when: Callable[[Request], Any]
        times: int
        latency: float
        chunk_size: int
        chunk_sizes: Sequence[int]
        streaming_profile: Mapping[str, float]
        recorded_timings: Object
        replay_speed: float
        should_retry: bool
        malformed: bool
        empty: bool
        truncate_after_chunks: int
        disconnect_after_ms: float
        disconnect_after_chunks: int
        error_after_chunks: int
        chaos: Mapping[str, float]
        error: Object
        retry_after: float
        retry_after_date: bool
        malformed_after_chunks: int
        stall_after_chunks: int
        end_after_chunks: int
        after: str
        in_: str
        before: str
        insert: str
        reasoning: str
        tool_calls: Sequence[Object]
        blocks: Sequence[Object]
        embedding: Sequence[Any]
        image: Any
        images: Sequence[Any]
        audio: Any
        format: str
        transcription: Any
        video: Object
        scores: Sequence[float]
        json: Any
        raw: Mapping[str, str]
        job: Object
        status: int
        id: str
        created: int
        response_model: str
        response_headers: Mapping[str, str]
        usage: Object
        finish_reason: str
        role: str


def explain_call(call: Call) -> str:
    """Say why a call failed, or which fixtures for its kind were passed over, and why."""
    others = ("response", "handshake")
    misses = (miss for miss in call.near_misses if miss["differs"] not in others)
    told = [call.error] if call.error else [f"{m['fixture']}: {m['reason']}" for m in misses]
    return "".join("\n" + reason.rstrip() for reason in told)


def read_fault(fault: Any) -> Item:
    """Return the keywords of a fault: a name, a status, or they themselves."""
    faults = {**FAULTS, "timeout": {"latency": MAX_MS}}
    if not isinstance(fault, str):
        return fault if isinstance(fault, dict) else {"status": fault}
    if fault not in faults:
        raise ValueError(f"no fault is called {fault!r}{suggest(fault, faults)}")
    return faults[fault]


def make_probe(words: Mapping[str, Any]) -> Fixture:
    """Build the fixture that calls are compared with."""
    return fixture_from_keywords("assert_called", {**words, "latency": 0}, [*CALL_WORDS, "latency"])


POLL_SECONDS = 0.005  # between two looks; not by time.sleep(), which a test may patch


def other_verb(meant: str) -> Any:
    def refuse(_: Any) -> Any:
        raise AttributeError(f"{meant} does that here")

    return property(refuse)


def tell_lines(title: str, lines: Iterable[Any]) -> str:
    """Write lines, if any, below a title."""
    told = [str(line).replace("\n", "\n    ") for line in lines]
    return "\n  ".join([f"{title}:", *told]) if told else ""


def refuse_lines(title: str, lines: Iterable[Any]) -> None:
    if told := tell_lines(title, lines):
        raise AssertionError(told)


class Scripting:
    """Scripts answers and looks at what was asked, on a whole server or for one test."""

    server: Server
    script: Fixtures
    test_id = ""  # the test whose answers and calls these are; "" for all

    @property
    def requests(self) -> list[Call]:
        """The recorded calls, newest last: a list of its own each time."""
        with self.server._lock:
            every = list(self.server._calls)
        return [call for call in every if call.test == self.test_id] if self.test_id else every

    def reply(self, content: Any = None, **words: Unpack[ReplyWords]) -> Fixture:
        """Script an answer: `reply("Hi!", user_message="hello", times=1)`.

        content  a text; JSON or a pydantic model, which becomes one; an iterator of answers; a
                 function of the request, which returns a text, JSON, or a dict of a response's keys

        The keywords are the keys of fixture files in snake case.
        """
        if isinstance(content, list) and set(map(type, content)) == {str}:
            import warnings

            sentence = "a list of texts is sent as JSON; a sequence of answers is iter([...])"
            warnings.warn(sentence, stacklevel=2)
        return self._add_fixture("reply", {"content": content, **words})

    reply.__doc__ = f"{reply.__doc__}\n        Keywords: {', '.join(REPLY_WORDS)}"

    def fail(
        self, status: int | str | Mapping[str, Any] | None = None, /, **words: Unpack[ReplyWords]
    ) -> Fixture:
        """Script a fault: a status with its real body, or a reply that goes wrong on its way.

        `fail(429, retry_after=1, times=2)`, `fail(disconnect_after_chunks=3)`, a name in `FAULTS`,
        or `fail("timeout")`, which never answers.
        """
        status = words.pop("status", None) if status is None else status
        return self._add_fixture("fail", {**read_fault(status), **words})

    @contextlib.contextmanager
    def fault(self, fault: str | Mapping[str, Any], times: int | None = 1) -> Iterator[None]:
        """Have the next request meet a fault: `for name in FAULTS: with server.fault(name): ...`.

        times  how many requests meet it (None: all)
        """
        words, server, wanted = read_fault(fault), self.server, self.server._wanted_port
        self.mark()
        if words != FAULTS["refused"]:
            undo: Any = self._add_fixture("fault", {"times": times, **words}).remove
        else:  # nobody listens for a while
            server._wanted_port, undo = server.port, server.start
            server.stop()
        try:
            yield
        finally:
            undo()
            server._wanted_port = wanted
        self.mark()

    def mark(self) -> int:
        """Begin another part of the record; return the number of the last call before it.

        A request that comes again behind a mark is another request.
        """
        with self.server._lock:
            self.server._episode += 1
            calls = self.server._calls
            return calls[-1].number if calls else 0

    def verdict(self, since: int = 0, most_attempts: int = MAX_ATTEMPTS) -> list[Finding]:
        """Return what the client did wrong, each with the calls that show it; see `WRONGS`.

        since          the number of the last call that does not count, from `mark()`
        most_attempts  how often one request may be sent
        """
        return judge([call for call in self.requests if call.number > since], most_attempts)

    def assert_resilient(
        self, allow: str | Iterable[str] = (), since: int = 0, most_attempts: int = MAX_ATTEMPTS
    ) -> None:
        """Fail where the client did something wrong; tell it in order and with times.

        allow  names in `WRONGS` that are no wrongs here
        """
        allowed = {allow} if isinstance(allow, str) else set(allow)
        for name in allowed.difference(WRONGS):
            raise ValueError(f"no wrong is called {name!r}{suggest(name, WRONGS)}")
        found = self.verdict(since, most_attempts)
        refuse_lines("wrongs", (each for each in found if each.name not in allowed))

    def assert_budget(
        self,
        total_tokens: float | None = None,
        calls: int | None = None,
        at_once: int | None = None,
        since: int = 0,
    ) -> None:
        """Fail where there were more tokens, calls, or calls at once."""
        asked = [call for call in self.requests if call.number > since and is_inference(call)]
        refuse_lines("wrongs", judge_budget(asked, total_tokens, calls, at_once))

    if not TYPE_CHECKING:  # as other libraries call it; __getattr__ would slow all attributes
        respond = other_verb("reply()")
        on_message = other_verb("reply(user_message=...)")
        add_fixture = other_verb("reply() or load()")

    def _add_fixture(self, verb: str, words: Mapping[str, Any]) -> Fixture:
        processes = sys.modules.get("multiprocessing")
        is_spawned = processes is not None and processes.parent_process() is not None
        if self.server._http is None and (self.server._parent_port or is_spawned):
            raise RuntimeError(
                "nobody would see this script: the server runs in another process; script there,"
                " or POST to /__parlel/fixtures"
            )
        own = {"test_id": self.test_id} if self.test_id else {}
        fixture = fixture_from_keywords(verb, {**words, **own})
        fixture.list_calls = lambda: self.requests
        self.script.add([fixture])
        return fixture

    def calls_to(self, operation: str, **words: Unpack[CallWords]) -> list[Call]:
        """Return the calls of an operation, `"chat"` or `"POST /v1/..."`, that match."""
        check_operation(operation)
        probe, calls = make_probe(words), [call for call in self.requests if call.is_of(operation)]
        return [call for call in calls if not probe.find_obstacle(list_facts(call))]

    def assert_called(
        self, operation: str, *, times: int | None = None, **words: Unpack[CallWords]
    ) -> Call:
        """Return the last such call; fail showing how the nearest ones differ.

        times  how many there have to be (default: at least one)
        """
        calls = self.calls_to(operation, **words)
        if (len(calls) != times) if times is not None else not calls:
            raise self._miscounted(operation, times, words, len(calls))
        return calls[-1] if calls else None  # type: ignore[return-value]  # only with times=0

    def assert_called_once(self, operation: str, **words: Unpack[CallWords]) -> Call:
        """Return the only such call; fail where there are none or several."""
        return self.assert_called(operation, times=1, **words)

    def assert_not_called(self, operation: str, **words: Unpack[CallWords]) -> None:
        """Fail where there was such a call."""
        self.assert_called(operation, times=0, **words)

    def wait_for(
        self, operation: str, *, times: int = 1, timeout: float = 5, **words: Unpack[CallWords]
    ) -> list[Call]:
        """Wait `timeout` seconds at most for so many calls to have ended; return them."""
        end = time.monotonic() + timeout
        while True:
            calls = [call for call in self.calls_to(operation, **words) if call.has_ended]
            if len(calls) >= times:
                return calls
            if time.monotonic() >= end:
                raise self._miscounted(operation, times, words, len(calls))
            threading.Event().wait(POLL_SECONDS)

    def wait_idle(self, timeout: float = 5) -> None:
        """Wait until every call has ended; fail after `timeout` seconds."""
        end = time.monotonic() + timeout
        while running := [call for call in self.requests if not call.has_ended]:
            if time.monotonic() >= end:
                refuse_lines("still running", running)
            threading.Event().wait(POLL_SECONDS)

    def assert_all_matched(self) -> None:
        """Fail where no fixture answered a text (or what `on_miss` refuses)."""
        kinds = self.server._refused or list_refused_kinds("error")
        missed = [each for each in self.requests if each.kind in kinds and not each.fixture]
        refuse_lines("answered by no fixture", (f"{call!r}{explain_call(call)}" for call in missed))

    def assert_no_warnings(self) -> None:
        """Fail where there are warnings."""
        lines = (f"{call!r}: {text}" for call in self.requests for text in call.warnings)
        refuse_lines("there are warnings", lines)

    def assert_tool_called(self, name: str, /, **arguments: Any) -> Call:
        """Return the last call that sent back such a call of a tool; else fail."""
        seen: dict[str, None] = {}
        for call in reversed(self.requests):
            messages = list_facts(call).messages
            for made in [one for each in messages for one in list_objects(each.get("tool_calls"))]:
                tool, given = (get_path(made, "function", key) for key in ("name", "arguments"))
                given = json.loads(given) if succeeds(json.loads, given) else given
                if tool == name and contains_json(given, arguments):
                    return call
                seen[f"{tool}({preview(given, MAX_SHOWN)})"] = None
        wanted = f"wanted a call of {name}({preview(arguments, MAX_SHOWN)}), saw"
        nothing = ["no tool call came back to the service"]
        raise AssertionError(tell_lines(wanted, seen or nothing))

    def assert_usage(self, **counts: int) -> None:
        """Fail where the usage of all calls adds up to other counts of tokens."""
        usages = [call.usage for call in self.requests]
        for name, wanted in counts.items():
            each = [get_path(usage, name) or 0 for usage in usages]
            if sum(each) != wanted:
                raise AssertionError(f"wanted {wanted} {name} in all, saw {sum(each)}: {each}")

    def _miscounted(
        self, operation: str, times: int | None, words: Mapping[str, Any], seen: int
    ) -> AssertionError:
        wanted = "a call" if times is None else f"{times} calls"
        given = "".join(f" {name}={value!r:.160}" for name, value in words.items() if value)
        probe, lines = make_probe(words), []
        for call in sorted(self.requests, key=lambda call: call.is_of(operation))[:-6:-1]:
            other = f"{call!r}: another operation, {call.kind or call.path}"
            lines.append(explain_mismatch(probe, call) if call.is_of(operation) else other)
        nothing = f"nothing reached {self.server.origin}; was the client built before the variables"
        told = f"wanted {wanted} to {operation}{given}, saw {seen}; nearest"
        return AssertionError(tell_lines(told, lines or [f"{nothing} were set?"]))

    def assert_all_used(self) -> None:
        """Fail where fixtures were never served, and say why not."""
        refuse_lines("never served", self._list_unused())

    def explain(self) -> str:
        """Tell of misses, fixtures never served, and warnings; or nothing."""
        calls = self.requests[-MAX_NEAR_MISSES:]
        missed = [
            f"{call!r}{why}" for call in calls if not call.fixture and (why := explain_call(call))
        ]
        told = [f"{call!r}: {warning}" for call in calls for warning in call.warnings]
        parts: dict[str, Iterable[str]] = {
            "answered by no fixture": missed,
            "never served": self._list_unused(),
            "warnings": [*self.script.files.warnings, *told],
        }
        return "\n".join(filter(None, itertools.starmap(tell_lines, parts.items())))

    def _list_unused(self) -> Iterator[str]:
        calls = [(call, list_facts(call)) for call in self.requests[-MAX_NEAR_MISSES:]]
        for fixture in self.script.unused(self.test_id):
            nearest = sorted(calls, key=lambda each: fixture.count_holding(each[1]))[-1:]
            told = [explain_mismatch(fixture, call) for call, _ in nearest]
            yield "\nnearest: ".join([json.dumps(fixture.describe()), *told])


class OneTest(Scripting):
    """One of many tests on a server, told apart by `X-Test-Id`: it scripts and sees its own."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.script = server, server.script
        self.test_id = quote(name, safe="/:[]()=,.-_ ")  # what a header can carry

    @property
    def headers(self) -> dict[str, str]:
        """The header that names it."""
        return {"X-Test-Id": self.test_id}

    @property
    def env(self) -> dict[str, str]:
        """The server's variables, and those by which SDKs send the header."""
        header = f"X-Test-Id: {self.test_id}"
        variables = ("TOGETHER_CUSTOM_HEADERS", "OPENAI_CUSTOM_HEADERS")
        return {**self.server.env, **dict.fromkeys(variables, header)}

    def reset(self) -> None:
        """Forget its calls, counts and fixtures."""
        self.server.reset(test=self.test_id)


STARTED: weakref.WeakSet[TogetherAiServer] = weakref.WeakSet()  # servers, once they have been


def leave_parents() -> None:
    """Let go, in a child process, of what belongs to its parent."""
    Shared._lock = threading.RLock()
    if BUSY:  # whose workers do not live here
        sys.setswitchinterval(BUSY[0])
        BUSY.clear()
    for server in list(STARTED):
        server._leave_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=leave_parents)


KEY_VARIABLES = ("TOGETHER_API_KEY", "TOGETHERAI_API_KEY", "OPENAI_API_KEY")
URL_VARIABLES = (
    "TOGETHER_BASE_URL",
    "TOGETHER_API_BASE",
    "TOGETHER_AI_API_BASE",
    "TOGETHERAI_API_BASE",
    "OPENAI_BASE_URL",
    "OPENAI_API_BASE",
)


class TogetherAiServer(Scripting, Shared):
    """The emulator: `with TogetherAiServer(port=0) as server:` and point a client at `.base_url`.

    life      start(), stop(), reset(); or `with`
    address   url, base_url, port, env
    script    reply(), fail(), load(), test()
    record    requests, calls_to(), assert_called(), assert_all_used(), save()
    stored    add_file(), seed(), and files, batches, fine_tunes, ... by id

    Everything else is for the handlers in this file, and may change. The options:

    port          0 takes any free one
    host          the address to listen on
    require_auth  answer 401 where no key comes
    strict        behave as production does where this file is more helpful
    instant_jobs  finish jobs when they are created
    max_stored_bytes  of all files; more is a 413
    seed          what the chances in faults are drawn from
    read_prompts  answer in the form that a prompt asks for
    models        more models: {"acme/llama": {"engine": "B", "context_length": 8192}}
    on_miss       where no fixture matches: "generate" or, for texts, "error"; or a word by kind,
                  as {"embedding": "error"}
    exact_turns   turns of fixture files hold exactly
    warnings      "record" them with their calls, or answer those with an "error" 500
    normalise     patterns of what fixtures do not compare, or a function of the body
    rpm, tpm      requests and tokens a minute, of all or {model: number}
    upstream      the URL of a server that answers where no fixture matches
    record        the fixture file to which its answers are added
    record_limit  how many calls `.requests` keeps
    allow_origin  pages that may reach what is stored: ["https://app.test"]
    allow_host    names of this server beside localhost and the machine's own
    ssl_context   an ssl.SSLContext, for https://
    log           called with a line for every request
    clock         the time of stored objects and limits, in Unix seconds
    """

    def __init__(
        self,
        port: int = DEFAULT_PORT,
        *,
        host: str = "127.0.0.1",
        require_auth: bool = True,
        strict: bool = False,
        instant_jobs: bool = False,
        max_stored_bytes: int = MAX_STORED_BYTES,
        seed: int = 0,
        read_prompts: bool = True,
        models: Mapping[str, Mapping[str, Any]] | None = None,
        on_miss: str | Mapping[str, str] = "generate",
        exact_turns: bool = False,
        warnings: str = "record",
        normalise: Any = (),
        rpm: float | Mapping[str, float] | None = None,
        tpm: float | Mapping[str, float] | None = None,
        upstream: str | None = None,
        record: str | os.PathLike[str] | None = None,
        record_limit: int = DEFAULT_RECORD_LIMIT,
        allow_origin: Sequence[str] = (),
        allow_host: Sequence[str] = (),
        ssl_context: Any = None,
        log: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if record_limit < 0:
            raise ValueError(f"record_limit must be 0 or more, not {record_limit}")
        if warnings not in ("record", "error"):
            raise ValueError(f'warnings must be "record" or "error", not {warnings!r}')
        self.host, self._wanted_port = host or "127.0.0.1", port
        self.require_auth, self.strict, self.read_prompts = require_auth, strict, read_prompts
        self.on_miss, self.warnings = on_miss, warnings
        self.instant_jobs, self.max_stored_bytes = instant_jobs, max_stored_bytes
        self.rpm, self.tpm, self.ssl_context = rpm, tpm, ssl_context
        self.allow_origin, self.allow_host = allow_origin, allow_host
        self.record_limit, self.log, self.clock = record_limit, log, clock
        self.script = Fixtures(seed, exact_turns, normalise)
        self._prepare(models or {}, upstream, record)

    def _prepare(self, models: Mapping[str, Any], upstream: str | None, record: Any) -> None:
        self.server = self  # for what it shares with `test()`
        self._own_models = parse_models(models)
        self.stopping = threading.Event()
        if isinstance(self.allow_origin, str) or isinstance(self.allow_host, str):
            raise ValueError("allow_origin and allow_host are lists: one name is ['name']")
        if upstream is None and record is not None:
            raise ValueError("record needs an upstream, whose answers it records")
        self._recorder: Recorder | None = None
        if record is not None:
            self._recorder = Recorder(os.fspath(record), self.script.normaliser.change)
        self._upstream: Upstream | None = None
        if upstream is not None:
            self._upstream = Upstream(upstream, self._recorder, self.stopping)
        self._http: HttpServer | None = None
        self._ending: HttpServer | None = None
        self._make_locks()
        self._calls: deque[Call] = deque()
        self.epoch = int(time.time() * 1000)  # of the record: changes when that is reset
        self.reset()
        if record is not None and os.path.exists(record):
            self.load(record)

    _parent_port = 0  # in a child process, whose requests another one answers

    def _make_locks(self) -> None:
        """Make what threads share; anew in a child process."""
        # Held while a job takes a step, a whole batch too; its lines may retrieve jobs.
        self.job_lock = threading.RLock()
        self._life = threading.Lock()
        self._heavy = threading.Semaphore(MAX_WORKERS[HEAVY])
        self._logged: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._logger: threading.Thread | None = None

    # Life cycle

    def start(self) -> TogetherAiServer:
        """Listen and return; raise OSError at once where the port is taken."""
        with self._life:
            if self._http is not None:
                return self
            if self._ending is not None:  # the port may be the same
                self._ending.stop()
            self.stopping.clear()
            try:
                http_server = HttpServer((self.host, self._wanted_port), self, self.ssl_context)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    error.strerror = f"port {self._wanted_port} is taken; port 0 takes any free one"
                raise
            http_server.start()
            with self._lock:
                self._http, self._parent_port = http_server, 0
            STARTED.add(self)
            if self.log is not None:
                logger = threading.Thread(target=self._write_log, name="log", daemon=True)
                with contextlib.suppress(RuntimeError):  # there are too many
                    logger.start()
                    self._logger = logger
        return self

    def stop(self) -> None:
        """End live connections, threads and sockets; start() works again."""
        with self._lock:  # a start() in between would be lost
            http_server, self._http = self._http, None
        if http_server is not None:
            self._ending = http_server
            self.stopping.set()
            http_server.stop()
            if self._recorder is not None:
                self._recorder.finish()
            if self._logger is not None:
                self._logged.put(None)
                self._logger.join(LOG_SECONDS)
                self._logger = None

    def _write_log(self) -> None:
        """Write a line for each call; one that cannot be written is dropped."""
        log: Any = self.log
        while call := self._logged.get():
            with contextlib.suppress(BaseException):
                log(write_line(call))

    def _leave_parent(self) -> None:
        """Let go, in a child process, of what belongs to its parent."""
        http_server, self._http = self._http, None
        if http_server is not None:
            self._parent_port = http_server.server_port
            http_server.close_sockets()
        self._make_locks()

    def __enter__(self) -> TogetherAiServer:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    async def __aenter__(self) -> TogetherAiServer:
        return self.start()

    async def __aexit__(self, *error: object) -> None:
        self.stop()

    def reset(self, test: str | None = None) -> None:
        """Go back to the state after start(): nothing recorded, stored or counted.

        test  forget the calls, counts and fixtures of this X-Test-Id alone
        """
        with self._lock:
            self._calls = deque(call for call in self._calls if test not in (None, call.test))
            self._recorded_bytes = sum(call.kept for call in self._calls)
            self.epoch += 1
            self.script.reset(test)
            if test is not None:
                return
            self.models = {**MODELS, **self.script.files.models, **self._own_models}
            # Keys of the calls, which nothing that is written of them shall hold.
            self.secrets: dict[str, None] = BoundedDict(MAX_OBJECTS)
            self._episode = 0
            self._limits = RateLimits(self._read_clock, rpm=self.rpm, tpm=self.tpm)
            self._numbers = itertools.count(1)
            self._revisions = itertools.count(1)
            self.files = Collection("File", forget=self._drop)
            self.batches = Collection("Batch")
            self.fine_tunes = Collection("Fine-tune")
            self.videos = Collection("Video")
            self.evaluations = Collection("Evaluation")
            self.endpoints = Collection("Endpoint")
            self.jobs = Collection("Job")
            self.adapters: dict[str, dict[str, str]] = BoundedDict(MAX_OBJECTS)
            self.contents: dict[str, bytes] = {}  # by file id; parts by "file id/number"
            # How each job shall end, and whose test it belongs to.
            self.starts: dict[str, tuple[str, Item]] = BoundedDict(MAX_OBJECTS)
            self._counts: dict[str, int] = {}

    @property
    def on_miss(self) -> str | Mapping[str, str]:
        """What happens where no fixture matches, for all kinds or for each."""
        return self._on_miss

    @on_miss.setter
    def on_miss(self, value: str | Mapping[str, str]) -> None:
        self._refused = list_refused_kinds(value)
        self._on_miss = value

    def __repr__(self) -> str:
        calls, fixtures = len(self._calls), len(self.script.every)
        state = self.url if self._http else "stopped"
        return f"<TogetherAiServer {state}: {calls} calls, {fixtures} fixtures>"

    # Where it listens

    @property
    def port(self) -> int:
        """The port it listens on; the one asked for while it is stopped."""
        return self._http.server_port if self._http else self._parent_port or self._wanted_port

    @property
    def origin(self) -> str:
        """The address at which it is found once it is started."""
        host = LOOPBACK.get(self.host, self.host)
        scheme = "http" if self.ssl_context is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`."""
        if self._http is None:
            raise RuntimeError("the server has no address yet: call start() first")
        return self.origin

    @property
    def base_url(self) -> str:
        """The same with `/v1`."""
        return self.url + "/v1"

    @property
    def env(self) -> dict[str, str]:
        """The variables to set before a program builds its client; see the README."""
        return {
            **dict.fromkeys(KEY_VARIABLES, DEFAULT_KEY),
            **dict.fromkeys(URL_VARIABLES, self.base_url),
            "TOGETHER_PROJECT_ID": PROJECT["id"],
        }

    # Stored objects

    def _now(self) -> int:
        return int(self._read_clock())

    def _read_clock(self) -> float:
        """The time of calls and limits; one that raises breaks none."""
        try:
            return self.clock()
        except Exception:
            complain_of_bug()
            return time.time()

    def _next_id(self, prefix: str) -> str:
        with self._lock:
            count = self._counts[prefix] = self._counts.get(prefix, 0) + 1
        return prefix + random_uuid(HashRandom.of(prefix, count))

    def _store(self, collection: str, item: Mapping[str, Any]) -> Item:
        jobs, given = JOBS[collection], dict(item)
        ids = given.pop(jobs.key, None), given.pop("id", None)
        id = ids[0] or ids[1] or self._next_id(jobs.prefix)
        given[jobs.key] = id
        made = {jobs.key: id, "created_at": format_time(self._now()), **jobs.make(self, given)}
        return jobs.objects(self).add(id, merge(made, given))

    def test(self, name: str) -> OneTest:
        """Return a view of one test, by its `X-Test-Id`."""
        return OneTest(self, name)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a fixture file or folder; ValueError names the place that is wrong."""
        for warning in self._load(os.fspath(path)).warnings:
            import warnings

            warnings.warn(warning, stacklevel=2)

    def _load(self, path: str) -> Loaded:
        loaded = self.script.load(path)
        self.models.update({**self.script.files.models, **self._own_models})
        return loaded

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a fixture file that answers every recorded call again."""
        fixtures = record_calls(self.requests, self.secrets)
        write_file(os.fspath(path), write_fixtures({"fixtures": fixtures}))

    def seed(self, collection: str, items: Iterable[Mapping[str, Any]]) -> list[Item]:
        """Store objects under ids of your choice; what an item lacks gets a default.

        The collections are files (`content` is a text or bytes), batches, fine_tunes, ...
        """
        if collection not in JOBS:
            raise ValueError(f"no collection {collection!r}; there are {', '.join(JOBS)}")
        return [self._store(collection, item) for item in items]

    def add_file(
        self,
        data: str | bytes,
        filename: str = "data.jsonl",
        purpose: str = "fine-tune",
        id: str | None = None,
    ) -> Item:
        """Store a file as an upload would."""
        item = {"id": id, "content": data, "filename": filename, "purpose": purpose}
        return self._store("files", item)

    def _keep(self, name: str, data: bytes) -> None:
        with self._lock:
            size = sum(map(len, {**self.contents, name: data}.values()))
            if size > self.max_stored_bytes:
                raise ApiError("storage_full", size=size, limit=self.max_stored_bytes)
            self.contents[name] = data

    def _drop(self, id: str) -> None:
        for name in list(self.contents):
            if name.partition("/")[0] == id:
                self.contents.pop(name, None)

    # The pipeline

    def answer(self, request: Request, refusal: ApiError | None = None) -> Reply:
        """Answer a request; this is all there is behind the sockets, and it never raises."""
        call = request.call = request.call or self._record(request)
        reply = self._settle(request, call, refusal)
        call.duration = time.perf_counter() - call.started
        call.keep_reply(reply)
        if len(request.raw) > MAX_RECORDED_BODY_BYTES and request.body:
            call.identity = identify(call.kind, request)
        if reply.events is not None:
            reply.events = call.watch_events(reply.events, self._end_call)
            next(reply.events)
        elif request.client is not None and request.client.is_closed:
            self._end_call(call, "left")
        elif reply.handler is None and not (request.client and request.client.has_ended):
            self._end_call(call, "complete")
        return reply

    def _settle(self, request: Request, call: Call, refusal: ApiError | None = None) -> Reply:
        """Return the reply or the error, whatever happens."""
        try:
            if refusal is not None:
                raise refusal
            reply = self._respond(request, call)
        except BaseException as error:  # a test's function may raise SystemExit
            refusal = error if isinstance(error, ApiError) else ApiError("bug", reason=repr(error))
            if isinstance(error, MemoryError):
                refusal = ApiError("no_memory")
            call.error = complain_of_bug() if refusal.name == "bug" else refusal.message
            call.kind = call.kind or read_family(request.path)
            reply = refusal.as_reply(self.strict, name_request(request))
        if request.route is None or request.route.kind in ("", "job"):
            reply.reader = self._find_reader(request)
        return reply

    def _find_reader(self, request: Request) -> str:
        """Return the origin whose pages may read the reply: "*", or its own where that matters."""
        if not STORED_PATH.match(request.path):
            return "*"
        try:
            check_page(self, request)
        except ApiError:
            return ""
        return clean_header(request.headers.get("origin", ""))

    def _record(self, request: Request) -> Call:
        """Keep the call, unless it only looks after the server."""
        at, path, headers = self._read_clock(), request.path, request.headers
        is_shown = path[:6] == "/shrt/" and headers.get("sec-fetch-site") == "same-origin"
        is_unrecorded = is_shown or (path[:4] != "/v1/" and UNRECORDED.match(path))
        if request.method == "OPTIONS" or is_unrecorded:
            return Call(0, request, at)
        with self._lock:
            call = Call(next(self._numbers), request, at)
            call.revision = next(self._revisions)
            call.episode = self._episode
            self._calls.append(call)
            for key in headers.secrets:
                self.secrets[key] = None
            self._recorded_bytes += call.kept
            self._shorten_record()
        return call

    def _shorten_record(self) -> None:
        while len(self._calls) > self.record_limit or (
            self._recorded_bytes > MAX_RECORD_BYTES and len(self._calls) > 1
        ):
            gone = self._calls.popleft()
            self._recorded_bytes -= gone.kept
            gone.revision = 0

    def _end_call(self, call: Call, outcome: str) -> None:
        if outcome == "left" and self.stopping.is_set():
            call.excused = True
        if self.tpm:
            with self._lock:
                self._limits.take("tpm", call.model, get_path(call.usage, "total_tokens") or 0)
        call.outcome = outcome
        with self._lock:
            if call.revision:
                call.revision = next(self._revisions)
                size = len(call._raw) + call.reply_size + len(call.sound)
                self._recorded_bytes += size - call.kept
                call.kept = size
                if self._recorded_bytes > MAX_RECORD_BYTES:
                    self._shorten_record()
        if self._logger is not None and not call.batch and self._logged.qsize() < MAX_LOG_LINES:
            self._logged.put(call)

    def _respond(self, request: Request, call: Call) -> Reply:
        if request.method == "OPTIONS":
            asked = request.headers.get("access-control-request-headers")
            names = {"Access-Control-Allow-Headers": asked} if asked else {}
            allowed = {**PREFLIGHT, **names} if self._find_reader(request) else {}
            return Reply(b"", 204, headers={"Allow": METHODS, **allowed})
        route = request.route or self._open(request, call)
        if (self.rpm or self.tpm) and route.kind not in ("", "job"):
            limited = self._limit(request)
            if limited is not None:
                return limited
        if self.script.watched:
            self.script.follow_files()
            self.models.update(self.script.files.models)
        if route.open or (self.script.empty and "x-parlel-fixture" not in request.headers):
            reply = self._handle(route, request, call)
        else:
            reply = self._follow_script(route, request, call)
        if self.warnings == "error" and call.warnings and not route.open:
            error = ApiError("warned", reason="; ".join(call.warnings))
            error.headers["x-should-retry"] = "false"
            raise error
        return reply

    def _limit(self, request: Request) -> Reply | None:
        """Count a request to the limits; return the 429 where one is reached."""
        model, limits = request.body.get("model"), self._limits
        with self._lock:
            wait = limits.take("tpm", model, 0) or limits.take("rpm", model, 0)
            if not wait:
                limits.take("rpm", model, 1)
                return None
        facts: Any = {unit: n for unit in ("rpm", "tpm") if (n := limits.find(unit, model))}
        name = "model_rate_limit" if dict in (type(self.rpm), type(self.tpm)) else ""
        id = name_request(request)
        return status_reply(429, None, math.ceil(wait), model=model, id=id, name=name, **facts)

    def _open(self, request: Request, call: Call) -> Route:
        """Check page and key, read query and body; return the route."""
        if is_guarded(request):
            check_page(self, request)
        route = EXACT.get((request.method, request.path)) or self._find_route(request, call)
        call.kind, call.route_kind = route.recorded_kind, route.kind
        headers, has_key = request.headers, request.headers.has_key
        if route.status == 101 and not has_key:  # a page's socket brings one in other places
            query = parse_form(request.query.encode())
            offered = KEY_PROTOCOL.search(headers.get("sec-websocket-protocol", ""))
            has_key = bool(query.get("api_key") or query.get("authorization") or offered)
            if not has_key:
                check_page(self, request)
        if self.require_auth and not route.open and not has_key:
            raise ApiError("unauthorized" if route.path == "/v1/models" else "bad_key")
        if route.query and (request.query or route.query.required):
            request.args = read_texts(parse_form(request.query.encode()), route.query)
            route.query.check(request.args)
        coding = headers.get("content-encoding", "identity")
        if coding != "identity":
            raise ApiError("unknown_encoding", coding=coding[:40])
        if route.body:
            kind = headers.get("content-type", "")
            request.body = parse_body(request.raw, kind, route.body)
            request.answers = route.count_answers(request.body)
            if not route.open:
                call.doubt = functools.partial(warn_of_request, self, route)
        request.route = route
        return route

    def _find_route(self, request: Request, call: Call) -> Route:
        """Find the route of a path that is not written as it was declared."""
        path = collapse_path(request.path, self.strict)
        if path != request.path:
            call.notes += (f"the path was read as {path}",)
        request.path = path
        try:
            route, request.params = find_route(request.method, path)
        except ApiError:
            scripted = (fixture.match.get("endpoint") for fixture in self.script.every)
            known = self._upstream is not None or f"{request.method} {path}" in scripted
            if not known or not path.startswith("/v"):
                raise
            route = Route(f"{request.method} {path}")  # the upstream's or a fixture's to know
            read_loosely(request)
        return route

    def _handle(self, route: Route, request: Request, call: Call) -> Reply:
        """Let the handler answer, or the upstream where no fixture does."""
        if self._upstream is not None and not (call.fixture or route.open or route.status == 101):
            call.fixture = "upstream"
            return self._upstream.pass_on(route.kind, request)
        if route.handler is None:
            find_route(request.method, route.path)  # which raises
        asks = request.turn or route.status != 101
        if route.kind in self._refused and not call.fixture and asks:
            misses = explain_misses(call.misses, MatchFacts(route.kind, request))
            raise self.script.miss_error(request, misses)
        if route.body:
            route.body.check(request.body)
            if request.answers > MAX_ANSWERS:
                reason = "inputs, n and logprobs multiply to more than one request may ask for"
                rule = f"{reason} ({request.answers} > {MAX_ANSWERS})"
                raise ApiError("invalid", param="n", reason=rule)
        handler: Any = request.turn or route.handler
        WORK.steps = MAX_REQUEST_STEPS if route.kind else math.inf
        try:
            reply = as_reply(handler(self, request), request, route.status)
        finally:
            WORK.steps = math.inf
        call.form = request.form
        if not route.open:
            reply.id = request.id or name_request(request)
        return reply

    def _follow_script(self, route: Route, request: Request, call: Call) -> Reply:
        """Answer by the fixture that matches, if there is one."""
        facts = MatchFacts(route.kind, request, self.script.normaliser)
        fixture, call.misses = self.script.find(facts)
        call.explain_misses = lambda: explain_misses(call.misses, list_facts(call), fixture)
        if fixture is None and self.script.files:
            facts = MatchFacts(route.kind, request, self.script.loose)
            fixture, _ = self.script.find(facts)
        if fixture is None:
            return self._handle(route, request, call)
        turn = facts["turnIndex"]
        if fixture.turn not in (None, turn):
            place = f"for turn {fixture.turn}, and this is turn {turn}"
            call.warnings += (f"{fixture.source} is {place}",)
        elif facts.normaliser.is_loose:
            call.warnings += (f"{fixture.source} has another date, time or uuid",)
        call.answered_by, call.fixture = fixture, fixture.source
        request.chunk_sizes = fixture.chunk_sizes
        answer = answer_with(fixture, facts)
        if answer.is_whole and answer.closes:
            request.script = answer.normal
            return self._handle(route, request, call)
        if answer.is_whole:
            reply = whole_reply(answer, request)
        else:
            if answer.type not in (ERROR, GENERATED):
                said = answer.render(route.kind, request)
                request.script = {**said, "is_model": answer.is_model}
            try:
                reply = self._handle(route, request, call)
            except ApiError:
                self.script.give_back(fixture, facts)
                raise
        for doubt in warn_of_response(self, fixture, request, reply):
            call.warnings += (f"{fixture.source}: {doubt}",)
        fault = draw_fault(self.script, answer)
        if fault is None:
            return reply
        call.notes += (f"the fixture's {fault.chaos}",) if fault.chaos else ()
        return apply_fault(reply, fault, time.monotonic)

    def _begin(self, request: Request) -> str:
        """Record and read a request; return who shall answer it: see `HttpServer`."""
        call, script, heavy = self._record(request), self.script, True
        request.call = call
        if len(request.raw) <= MAX_QUICK_BYTES:
            try:
                route = self._open(request, call)
            except Exception:  # answer() meets it again, and tells
                return QUICK
            if route.open and not route.slow:
                return QUICK
            asks = request.answers > QUICK_ANSWERS or not HEAVY_FIELDS.isdisjoint(request.body)
            heavy = route.slow or asks
        waits = script.slow or script.watched or "x-parlel-fixture" in request.headers
        if self._upstream is None and not waits:
            return HEAVY if heavy else QUICK
        if heavy:
            request.turn = self._take_turn
        return WAITING

    def _take_turn(self, server: Server, request: Request) -> Any:
        """Run a handler whose work is heavy: a few at once, in the order they came."""
        with self._heavy:
            return request.route.handler(self, request)

    def _limit_body(self, request: Request) -> int:
        """Return how many bytes a request may carry; raise ApiError for one that may not ask."""
        if is_guarded(request):
            check_page(self, request)
        try:
            route, params = find_route(request.method, collapse_path(request.path, self.strict))
        except ApiError:
            return MAX_JSON_BYTES
        if route.admit is not None:
            route.admit(self, params)
        return route.max_bytes or self.max_stored_bytes + MAX_PART_HEAD_BYTES


# === Command line ===


def print_line(line: str) -> None:
    """Write a line to standard error, with nothing left to flush at the end."""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{line}\n".encode("utf-8", "replace"))


def print_lines(lines: Iterable[str]) -> None:
    try:
        print("\n".join(lines), flush=True)  # at once, for who reads it
    except (OSError, ValueError, AttributeError):
        sys.stdout = None  # the interpreter would flush it again


SERVER_OPTIONS = (  # those of the class, whose docstring says what they do
    "host", "port", "strict", "on_miss", "exact_turns", "upstream", "record", "instant_jobs",
    "max_stored_bytes", "record_limit", "seed", "allow_origin", "allow_host",
)  # fmt: skip
SWITCHES = ("no_auth", "no_read_prompts", "strict_scripts", "quiet", "watch")
COMMAND_HELP = {  # of what is of the command alone, or said otherwise there
    "no_auth": "answer without a key too",
    "no_read_prompts": "answer in prose, whatever form a prompt asks for",
    "strict_scripts": "a call with a warning is a 500 that tells it",
    "quiet": "no line for each request",
    "watch": "follow changes of the fixture files",
    "port": f"0 takes any free one ({DEFAULT_PORT}; with --run 0)",
    "on_miss": "without a fixture: generate, error, or kinds: chat,embedding",
    "allow_origin": "pages that may reach what is stored, with commas between",
}


def read_variables(names: Iterable[str]) -> dict[str, str]:
    """Return what the environment says of options, and tell of variables for none."""
    variables = {name: f"TOGETHER_FAKE_{name.upper()}" for name in names}
    known = variables.values()
    for variable in sorted(os.environ):
        if variable.startswith("TOGETHER_FAKE_") and variable not in known:
            print_line(f"nothing reads the variable {variable}{suggest(variable, known)}")
    return {name: os.environ.get(variables[name], "") for name in variables}


def read_options(args: Sequence[str] | None) -> Any:
    """Read the command line; what it does not say may stand in the environment."""
    import argparse  # not needed where the file is imported

    parser = argparse.ArgumentParser(
        "together_fake.py",
        description="A local, repeatable stand-in for the Together AI API.",
        epilog="Every option may be a variable, too: TOGETHER_FAKE_PORT, TOGETHER_FAKE_STRICT=1.",
    )
    rows = re.sub(r"\n {8,}", " ", TogetherAiServer.__doc__ or "")  # 3.13 has no indent there
    told = {**dict(re.findall(r"(?m)^ *(\w+)  +(.+)", rows)), **COMMAND_HELP}
    usual: Item = dict(TogetherAiServer.__init__.__kwdefaults__ or {}, port=None)
    given = read_variables([*SERVER_OPTIONS, *SWITCHES, "fixtures"])
    for name in (*SERVER_OPTIONS, *SWITCHES):
        option, help = "--" + name.replace("_", "-"), told.get(name)
        value, default = given[name], usual.get(name, False)
        if default is False:
            on = value.lower() not in ("", "0", "false", "no", "off")
            parser.add_argument(option, action="store_true", default=on, help=help)
        else:
            kind: Any = int if name == "port" or type(default) is int else str
            help = f"{help} ({default})" if default else help
            parser.add_argument(option, type=kind, default=value or default, help=help)
    parser.add_argument("--fixtures", action="append", metavar="PATH", help="file or folder")
    parser.add_argument("--check", metavar="PATH", help="say what is wrong in fixtures and exit")
    parser.add_argument("--routes", action="store_true", help="print the routes and exit")
    parser.add_argument("--version", action="store_true", help="print version and digest and exit")
    help = "run this, which finds the server by itself, and exit with its status"
    parser.add_argument("--run", nargs=argparse.REMAINDER, metavar="COMMAND", help=help)
    options = parser.parse_args(args)
    paths = filter(None, given["fixtures"].split(os.pathsep))
    options.fixtures = options.fixtures or list(paths)
    if options.run == []:
        parser.error("--run needs a command, as in --run npx vitest run")
    if options.port is None:
        options.port = 0 if options.run else DEFAULT_PORT
    options.allow_origin = options.allow_origin and options.allow_origin.split(",")
    options.allow_host = options.allow_host and options.allow_host.split(",")
    if options.on_miss not in ("generate", "error"):
        options.on_miss = dict.fromkeys(options.on_miss.split(","), "error")
    return options


def check_fixtures(path: str) -> int:
    """Say what is wrong in fixtures and which never answer; return the exit status."""
    try:
        loaded = load_fixtures(path)
    except (OSError, ValueError) as error:
        print_line(f"{error}")
        return 1
    told = [*loaded.warnings, *find_unreachable(loaded)]
    print_lines([*told, f"{path}: {len(loaded)} fixtures, nothing wrong"])
    return 0


def catch_signals(handler: Any) -> None:
    import signal

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
        if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, handler)


def serve(server: TogetherAiServer) -> int:
    """Say where a server listens, and run it until a signal comes."""
    import gc
    import signal

    running = threading.Lock()
    running.acquire()

    def end(*_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # it ends already
            running.release()

    catch_signals(end)
    with server:
        exports = [f"export {variable}={value}" for variable, value in server.env.items()]
        bound = f"is bound to {server.host} and listens on {server.url}"
        print_lines([f"together_fake {__version__} {bound}", *exports])
        gc.freeze()  # what lives until the end need not be looked at again and again
        while not running.acquire(timeout=1):  # on Windows signals wait
            pass
        catch_signals(signal.SIG_IGN)  # one is enough
    return 0


def reserve_streams() -> None:
    """Open closed standard streams, whose numbers sockets would take."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def build_server(options: Any) -> TogetherAiServer:
    """Return the server that a command line asks for."""
    server = TogetherAiServer(
        require_auth=not options.no_auth,
        read_prompts=not options.no_read_prompts,
        warnings="error" if options.strict_scripts else "record",
        log=None if options.quiet or options.run else print_line,
        **{name: getattr(options, name) for name in SERVER_OPTIONS},
    )
    for path in options.fixtures:
        server._load(path)
    if options.watch:
        server.script.watch(options.fixtures)
    for warning in server.script.files.warnings:
        print_line(warning)
    return server


def run_command(server: TogetherAiServer, command: Sequence[str]) -> int:
    """Run a command beside a server, say what missed; return the exit status."""
    import shutil
    import signal
    import subprocess

    def pass_on(number: int, frame: Any) -> None:
        if number != signal.SIGINT or not os.isatty(0):  # a terminal sends Ctrl-C to both
            with contextlib.suppress(ValueError):  # Windows sends Ctrl-C itself to both
                process.send_signal(number)

    program = shutil.which(command[0]) or command[0]
    with (
        server,
        subprocess.Popen([program, *command[1:]], env={**os.environ, **server.env}) as process,
    ):
        catch_signals(pass_on)
        status = process.wait()
    told = server.explain()
    if told:
        print_line(told)
    return 128 - status if status < 0 else status  # as shells say which signal ended it


def describe_version() -> str:
    """Return version and digest, and whether this file is as released."""
    with open(__file__, "rb") as file:
        source = file.read().replace(b"\r\n", b"\n")
    digest = hashlib.sha256(source.replace(f'"{RELEASED}"'.encode(), b'""', 1)).hexdigest()
    state = "as released" if digest == RELEASED else "modified"
    return f"together_fake {__version__}, {state}, sha256 {hashlib.sha256(source).hexdigest()}"


def main(args: Sequence[str] | None = None) -> int:
    """Run the server, or a command with it; return the exit status."""
    reserve_streams()
    options = read_options(args)
    if options.check:
        return check_fixtures(options.check)
    if options.version or options.routes:
        print_lines([describe_version()] if options.version else list_route_lines())
        return 0
    try:
        server = build_server(options)
        return run_command(server, options.run) if options.run else serve(server)
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        print_line(f"cannot begin: {error}")
        return 1


# === Test runners ===

# What a running server can change.
MARKED = ("strict", "on_miss", "warnings", "require_auth", "read_prompts", "instant_jobs")

if "pytest" in sys.modules:  # which asks for what follows
    pytest: Any = sys.modules["pytest"]

    def serve_session(pytestconfig: Any) -> Iterator[TogetherAiServer]:
        """The server of the session, which a conftest.py may override."""
        options = read_options(["--port=0", "--quiet", *pytestconfig.getini("together_fake")])
        options.fixtures = [os.path.join(pytestconfig.rootpath, path) for path in options.fixtures]
        with build_server(options) as server:
            yield server

    def serve_test(
        request: Any, monkeypatch: Any, together_fake_server: TogetherAiServer
    ) -> TogetherAiServer:
        """The server in a fresh state, found by clients that the test builds."""
        server = together_fake_server
        server.reset()
        for mark in reversed(list(request.node.iter_markers("together_fake"))):
            for name, value in mark.kwargs.items():
                if name not in MARKED:
                    near = suggest(name, MARKED)
                    raise ValueError(f"the marker together_fake takes no {name}{near}")
                monkeypatch.setattr(server, name, value)
        for name, value in server.test(request.node.nodeid).env.items():
            monkeypatch.setenv(name, value)
        return server

    def meet_fault(request: Any, together_fake: TogetherAiServer) -> Iterator[str]:
        """The fault that the test's first request meets; one test for each."""
        with together_fake.fault(request.param):
            yield request.param

    def add_section(item: Any) -> Iterator[None]:
        """Add what the server has to tell to the report of a failure."""
        outcome: Any = yield
        report, values = outcome.get_result(), getattr(item, "funcargs", {})
        server = values.get("together_fake") or values.get("together_fake_server")
        if report.failed and isinstance(server, Scripting) and (told := server.explain()):
            report.sections.append(("together_fake", told))

    together_fake_server: Any = pytest.fixture(scope="session")(serve_session)
    together_fake: Any = pytest.fixture(serve_test)
    together_fault: Any = pytest.fixture(params=list(FAULTS))(meet_fault)
    pytest_runtest_makereport: Any = pytest.hookimpl(hookwrapper=True)(add_section)


def pytest_addoption(parser: Any) -> None:
    help = "the server's options, as on its command line"
    parser.addini("together_fake", help, type="args", default=[])


def pytest_configure(config: Any) -> None:
    marker = "together_fake(**options): options of the server during a test, as strict=True"
    config.addinivalue_line("markers", marker)


class ExplainedResult:
    """A result of unittest or pytest, whose failures say what the server knows."""

    def __init__(self, result: Any, server: TogetherAiServer) -> None:
        self.result, self.server = result, server

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.result, name)
        if name not in ("addError", "addFailure", "addSubTest"):
            return found

        def add(test: Any, *args: Any) -> None:
            if args[-1] and (told := self.server.explain()):  # its type, what was raised, where
                args[-1][1].args = (f"{args[-1][1]}\n{told}",)
            found(test, *args)

        return add


def make_test_case() -> Any:
    """Return TogetherTestCase."""
    import unittest
    from unittest import mock

    class TogetherTestCase(unittest.TestCase):
        """A test with a server in a fresh state, found by clients that it builds.

        The options of the class's server: `class MyTest(TogetherTestCase, on_miss="error")`.
        """

        options: Mapping[str, Any] = {}
        server: TogetherAiServer

        def __init_subclass__(cls, **options: Any) -> None:
            super().__init_subclass__()
            cls.options = {**cls.options, **options}

        @classmethod
        def setUpClass(cls) -> None:
            super().setUpClass()
            cls.server = TogetherAiServer(0, **cls.options).start()
            cls.addClassCleanup(cls.server.stop)

        def run(self, result: Any = None) -> Any:
            """Run the test in the server's environment; explain its failures."""
            if not hasattr(self, "server"):  # the class is skipped
                return super().run(result)
            self.server.reset()
            told: Any = ExplainedResult(result or self.defaultTestResult(), self.server)
            with mock.patch.dict(os.environ, self.server.test(self.id()).env):
                return super().run(told)

    return TogetherTestCase


if TYPE_CHECKING:
    import unittest

    class TogetherTestCase(unittest.TestCase):
        """A test with a server of its own; see make_test_case()."""

        server: TogetherAiServer

        def __init_subclass__(cls, **options: Any) -> None: ...

else:

    def __getattr__(name: str) -> Any:
        """Make TogetherTestCase, which needs unittest, when somebody asks for it."""
        if name != "TogetherTestCase":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = make_test_case()
        return globals()[name]


if __name__ == "__main__":
    sys.exit(main())
