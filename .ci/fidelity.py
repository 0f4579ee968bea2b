"""Compare recorded answers of the real service with those of together_fake.py, by structure.

    fidelity.py                   the recordings in ../shared/recordings, beside the checkout
    fidelity.py FOLDER_OR_FILE    recordings of your own: files of JSON lines, named *.jsonl
    fidelity.py --live https://api.together.xyz/v1 --out FILE
                                  send the recorded requests to the real service, with the key in
                                  TOGETHER_API_KEY; record and compare what it answers

Structure is the status, the media type, keys, types, words such as a finish reason, and a stream's
sequence of chunks. What a model chose to say is none: where the fake's own answer to a chat
differs, it is asked again with a fixture that says what was recorded.

A recording is {"name", "source", "date", "model", "request": {"method", "url", "headers", "body"},
"response": {"status", "headers", "body"}}; streams have "events" instead of the last. It may have
`replay: false` (leave it out), `raw: "sdk-parsed"` (a client dropped nulls), `binary: true`,
`fixture` (what the fake is told to say). Without a response it is a request for --live.
"""

from __future__ import annotations

import argparse
import http.client
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

CHECKOUT = Path(__file__).resolve().parent.parent
FAKE = Path(os.environ.get("TOGETHER_FAKE_PATH") or CHECKOUT / "together_fake.py")
RECORDINGS = CHECKOUT.parent / "shared" / "recordings"
TIMEOUT = 120  # seconds without a byte
SHOWN = 3  # differences of a recording, without -v
LONGEST_TEXT = 300  # characters, in a new recording
LONGEST_LIST = 40  # items, and those of another structure that follow

# No request brings these statuses about: a fixture does.
FORCED = {402, 429, 500, 502, 503, 504, 520, 521, 522, 524, 529}
ENUMERATED = {"object", "finish_reason", "role", "type", "code", "stop_reason"}
INFERENCE = re.compile(
    r"/v1/(completions|chat/completions|responses|embeddings|rerank|images/generations|audio/speech)"
)
# Headers that are neither sent from a recording nor written into one.
HIDDEN = {"authorization", "cookie", "set-cookie", "x-api-key", "proxy-authorization", "date"}
HIDDEN |= {"host", "accept-encoding", "connection", "transfer-encoding", "content-length"}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    data: bytes

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0]

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")

    @property
    def events(self) -> list[Any]:
        lines = self.text.splitlines()
        return [parse(line[5:].strip()) for line in lines if line.startswith("data:")]


def parse(text: str) -> Any:
    """Return the value of a JSON text, or the text where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


# === Structure ===


def kind_of(value: Any, key: str) -> str:
    """Return the type of a value; a word from a fixed set is a type of its own."""
    if isinstance(value, str):
        return repr(value) if key in ENUMERATED else "string"
    if value is None or isinstance(value, bool):
        return "null" if value is None else "bool"
    if isinstance(value, list):
        return "list" if value else "empty list"
    return "object" if isinstance(value, dict) else "number"


def describe(*values: Any) -> dict[tuple[str, ...], set[str]]:
    """Return which types are found at each path in any of these values."""
    found: dict[tuple[str, ...], set[str]] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        found.setdefault(path, set()).add(kind_of(value, path[-1] if path else ""))
        if isinstance(value, dict):
            # One form of logprobs has the tokens as keys.
            tokens = path[-2:] == ("top_logprobs", "[]") and "token" not in value
            for key, item in value.items():
                walk(item, (*path, "{token}" if tokens else key))
        elif isinstance(value, list):
            for item in value:
                walk(item, (*path, "[]"))

    for value in values:
        walk(value, ())
    return found


def compare_values(recorded: list[Any], ours: list[Any], where: str = "") -> Iterator[str]:
    """Yield a phrase for each path where the structure differs, only the outermost of a branch."""
    left, right = describe(*recorded), describe(*ours)
    for path in {**left, **right}:
        # Whether something was cached is state, not structure.
        if left.get(path) == right.get(path) or "prompt_tokens_details" in path:
            continue
        name = where + (".".join(path).replace(".[]", "[]") or "all")
        kinds = [" or ".join(sorted(side.get(path, ()))) for side in (left, right)]
        if all(kinds):
            yield f"{name} is {kinds[1]}, recorded {kinds[0]}"
            continue
        holder = "list" if path[-1] == "[]" else "object"
        if holder in (left if kinds[1] else right).get(path[:-1], ()):
            yield f"{name} is added: {kinds[1]}" if kinds[1] else f"{name} is missing: {kinds[0]}"


def chunk_kind(event: Any) -> str:
    """Return what a chunk brings: its place in the sequence, and what it is compared with."""
    if not isinstance(event, dict):
        return "done" if event == "[DONE]" else "text"
    if event.get("error"):
        return "error"
    choices = event.get("choices")
    if not choices:
        return "usage" if choices == [] else str(event.get("type") or event.get("object"))
    delta = choices[0].get("delta") or {}
    kind = "content" if delta.get("content") or choices[0].get("text") else "empty"
    if delta.get("reasoning") or delta.get("reasoning_content"):
        kind = "reasoning"
    if delta.get("tool_calls"):
        function = delta["tool_calls"][0].get("function") or {}
        kind = "call" if function.get("name") else "arguments"
        kind = "whole call" if function.get("name") and function.get("arguments") else kind
        kind += f" and {len(delta['tool_calls']) - 1} more" if delta["tool_calls"][1:] else ""
    if not choices[0].get("finish_reason"):
        return kind
    return "finish" if kind in ("content", "empty") else f"finish with {kind}"


def compare_streams(recorded: list[Any], ours: list[Any]) -> Iterator[str]:
    sides = []
    for events in (recorded, ours):
        chunks = [(chunk_kind(event), event) for event in events]
        # An empty chunk says something only as the first.
        sides.append(chunks[:1] + [chunk for chunk in chunks[1:] if chunk[0] != "empty"])
    left, right = ([kind for kind, _ in groupby(side, lambda chunk: chunk[0])] for side in sides)
    if left != right:
        yield f"chunks are {', '.join(right)}, recorded {', '.join(left)}"
    for kind in dict.fromkeys(left):
        if kind in right:
            chunks = [[event for name, event in side if name == kind] for side in sides]
            yield from compare_values(chunks[0], chunks[1], f"<{kind}> ")


def compare_bodies(recorded: Any, ours: Any) -> Iterator[str]:
    """Compare two JSON bodies; a list of models by the types that both list."""

    def group(side: Any) -> dict[str, list[Any]]:
        if not isinstance(side, list) or not all(isinstance(m, dict) and "type" in m for m in side):
            return {"": [side]}
        return {str(m["type"]): [x for x in side if x["type"] == m["type"]] for m in side}

    left, right = group(recorded), group(ours)
    if ("" in left) != ("" in right):
        left, right = {"": [recorded]}, {"": [ours]}
    for type in left:
        if type in right:
            yield from compare_values(left[type], right[type], f"<{type}> " if type else "")


def compare(recording: Any, answer: Answer) -> list[str]:
    """Return where the structure of an answer differs from the recorded one."""
    response = recording["response"]
    if answer.status != response["status"]:
        text = answer.text[:200] if answer.status >= 400 else ""
        return [f"status is {answer.status}, recorded {response['status']} {text}".rstrip()]
    found = []
    headers = {name.lower(): value for name, value in response.get("headers", {}).items()}
    media_type = headers.get("content-type", "").partition(";")[0]
    if media_type not in ("", answer.media_type):
        found.append(f"media type is {answer.media_type}, recorded {media_type}")
    clean = drop_nulls if recording.get("raw") == "sdk-parsed" else lambda value: value
    if "events" in response:
        # Only the Responses API names its events.
        named = re.search(rb"^event:", answer.data, re.MULTILINE) is not None
        if named != ("/responses" in recording["request"]["url"]):
            found.append(f"events have {'names' if named else 'no names'}")
        return found + list(compare_streams(clean(response["events"]), clean(answer.events)))
    body, ours = response.get("body"), parse(answer.text)
    if body is None or isinstance(body, str):
        return found
    if isinstance(ours, str):
        return [*found, "the body is not JSON"]
    return found + list(compare_bodies(clean(body), clean(ours)))


def drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


# === Asking ===


def send(base: str, request: Any, extra: dict[str, str]) -> Answer:
    """Send a recorded request. Redirects are not followed: they could lead a key elsewhere."""
    headers = {"user-agent": "Go-http-client/2.0"}  # of most recordings; it is no SDK
    headers.update(show(request.get("headers") or {}))
    body = request.get("body")
    if body is not None:
        headers.setdefault("content-type", "application/json")
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
    parts = urlsplit(base)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=TIMEOUT)
    try:
        target = re.sub("/v1/?$", "", parts.path) + path_of(request)
        connection.request(request["method"], target, body, {**headers, **extra})
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, names, response.read())
    finally:
        connection.close()


def show(headers: dict[str, str]) -> dict[str, str]:
    lower = {name.lower(): value for name, value in sorted(headers.items())}
    return {name: value for name, value in lower.items() if name not in HIDDEN}


def path_of(request: Any) -> str:
    """Return path and query of a request, without what its base URL had before /v1."""
    parts = urlsplit(request["url"])
    path = re.sub("^.*/v1/", "/v1/", parts.path)
    return f"{path}?{parts.query}" if parts.query else path


class Fakes(NamedTuple):
    """The URLs of two servers: what a convenience answers otherwise is for the strict one."""

    default: str
    strict: str

    def ask(self, recording: Any, fixture: Any = None) -> Answer:
        request, status = recording["request"], recording["response"]["status"]
        strict = re.search(r"/images|/shrt/|/models$", request["url"]) or status in (400, 404, 422)
        base = self.strict if strict else self.default
        extra = {"authorization": "Bearer parlel-together"}
        if "/shrt/" in request["url"]:  # the address of an image, which must be made first
            body = {"model": stand_in("/images"), "prompt": "x", "response_format": "url"}
            image = {"method": "POST", "url": "/v1/images/generations", "body": body}
            url = json.loads(send(base, image, extra).data)["data"][0]["url"]
            return send(base, {**request, "url": url}, {})
        if status == 401:
            extra = {}
        if fixture is not None:
            extra["x-parlel-fixture"] = json.dumps(fixture)
        return send(base, request, extra)

    def judge(self, recording: Any, again: bool = True) -> list[str]:
        """Return where the fake differs: nothing if its own or the scripted answer is equal."""
        request, response = recording["request"], recording["response"]
        body = request.get("body")
        forced = response["status"] in FORCED or recording.get("force")
        fixture = recording.get("fixture") or make_fixture(response)
        try:
            found = [] if forced else compare(recording, self.ask(recording))
            if found and again and isinstance(body, dict) and lacks_model(response, found[0]):
                model = stand_in(request["url"], body.get("model", ""), fixture)
                request = {**request, "body": {**body, "model": model}}
                return self.judge({**recording, "request": request}, again=False)
            chat = response["status"] == 200 and "completions" in request["url"]
            other = bool(found) and not found[0].startswith("status")
            if fixture is not None and (forced or (chat and other)):
                told = compare(recording, self.ask(recording, fixture))
                if forced or not told or not told[0].startswith("status"):
                    return told
            return found
        except (OSError, http.client.HTTPException) as error:
            return [f"no answer: {type(error).__name__}: {error}"]


def lacks_model(response: Any, difference: str) -> bool:
    """Whether the strict fake refused a model, where the real service said nothing of that."""
    refused = difference.startswith("status is 404") and "Unable to access" in difference
    return refused and "non-serverless" not in json.dumps(response.get("body"))


def stand_in(url: str, model: str = "", fixture: Any = None) -> str:
    """Return a model of the same kind that the fake's catalogue surely has."""
    if "/embeddings" in url:
        return "intfloat/multilingual-e5-large-instruct"
    if "/images" in url:
        return "black-forest-labs/FLUX.1-schnell"
    if fixture and fixture.get("reasoning"):
        return "openai/gpt-oss-20b"
    is_turbo = "Turbo" in model
    return "meta-llama/Llama-3.3-70B-Instruct-Turbo" if is_turbo else "google/gemma-4-31B-it"


def make_fixture(response: Any) -> Any:
    """Return the fixture that says what was recorded; None where no model said anything."""
    if response["status"] != 200:
        return {"status": response["status"]}
    said = {"content": "", "reasoning": ""}
    calls: dict[int, dict[str, str]] = {}
    finish = choice = None
    for event in response.get("events") or [response.get("body")]:
        if not isinstance(event, dict) or not event.get("choices"):
            continue
        choice = event["choices"][0]
        finish = choice.get("finish_reason") or finish
        part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        said["content"] += part.get("content") or ""
        said["reasoning"] += part.get("reasoning") or part.get("reasoning_content") or ""
        for place, call in enumerate(part.get("tool_calls") or []):
            place = place if "message" in choice else call.get("index", place)
            told = calls.setdefault(place, {"name": "", "arguments": ""})
            for key in told:
                told[key] += (call.get("function") or {}).get(key) or ""
    if choice is None:
        return None
    fixture: dict[str, Any] = {key: text[:LONGEST_TEXT] for key, text in said.items() if text}
    if calls:
        fixture["toolCalls"] = list(calls.values())
    else:
        fixture.setdefault("content", "")
    if finish in ("length", "stop", "tool_calls"):
        fixture["finishReason"] = finish
    return fixture


# === Recording anew ===


def record(asked: list[Any], base: str, out: Path) -> list[Any]:
    """Send each request to the real service, one at a time; write and return the exchanges."""
    key = os.environ["TOGETHER_API_KEY"]
    made: list[Any] = []
    sent: list[Any] = []
    with out.open("a", encoding="utf-8") as file:
        for recording in asked:
            request = recording["request"]
            # A recorded refusal of a key is asked for without one.
            extra = {"authorization": f"Bearer {key}"}
            if recording.get("response", {}).get("status") == 401:
                extra = {}
            same = [request["method"], path_of(request), request.get("body"), extra]
            try:
                if same in sent:
                    raise ValueError("this request was sent already")
                sent.append(same)
                check_harmless(request)
                answer = send(base, request, extra)
                if extra and answer.status == 401:
                    raise ValueError("the service refused the key")
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{recording['name']} was not recorded: {type(error).__name__}: {error}"
                print(problem.replace(key, "KEY"), flush=True)
                continue
            line = json.dumps(make_recording(request, base, answer, len(made) + 1))
            line = line.replace(key, "KEY")
            file.write(line + "\n")
            file.flush()
            made.append(json.loads(line))
    print(f"{len(made)} of {len(asked)} requests were recorded in {out}")
    return made


def check_harmless(request: Any) -> None:
    path = path_of(request).partition("?")[0]
    if not path.startswith("/v1/"):
        raise ValueError("its address was valid for a while only")
    infers = request["method"] == "POST" and INFERENCE.fullmatch(path)
    if request["method"] != "GET" and not infers:
        raise ValueError("only inference and GET are sent")


def make_recording(request: Any, base: str, answer: Answer, number: int) -> Any:
    """Return an exchange in the format of the recordings in use."""
    path, body = path_of(request), request.get("body")
    model = body.get("model") if isinstance(body, dict) else None
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    operation = path.partition("?")[0][4:].replace("/", "_")
    name = f"live-{date}-{number:04}-{operation}-{answer.status}-{str(model or '').split('/')[-1]}"
    content: dict[str, Any] = {}
    binary = not re.match(r"$|text/|application/json", answer.media_type)
    if binary:
        content["body"] = f"({len(answer.data)} bytes)"
    elif answer.media_type == "text/event-stream":
        content["events"] = [shorten(event) for event in trim_runs(answer.events)]
        comments = [line for line in answer.text.splitlines() if line.startswith(":")]
        content.update({"comments": comments[:3]} if comments else {})
    else:
        content["body"] = shorten(parse(answer.text))
        content["pretty"] = "\n  " in answer.text
    return {
        "name": name,
        "source": "live",
        "date": date,
        "model": model,
        **({"binary": True} if binary else {}),
        "request": {
            "method": request["method"],
            "url": re.sub("/v1/?$", "", base) + path,
            "headers": show(request.get("headers") or {}),
            "body": body,
        },
        "response": {"status": answer.status, "headers": show(answer.headers), **content},
    }


def trim_runs(events: list[Any]) -> list[Any]:
    """Return the events with each run of equal structure cut to its first two and its last."""
    runs = [list(run) for _, run in groupby(events, lambda e: (chunk_kind(e), describe(e)))]
    return [event for run in runs for event in run[:2] + run[2:][-1:]]


def shorten(value: Any, key: str = "") -> Any:
    """Return a value without long texts, and without items that add nothing to the structure."""
    if isinstance(value, dict):
        return {name: shorten(item, name) for name, item in value.items()}
    if isinstance(value, list):
        kept: list[Any] = []
        seen: list[Any] = []
        for item in value:
            if len(kept) < LONGEST_LIST or describe(item) not in seen:
                seen.append(describe(item))
                kept.append(shorten(item))
        return kept
    # Arguments that were cut would be no JSON.
    return value[:LONGEST_TEXT] if isinstance(value, str) and key != "arguments" else value


# === Command line ===


@contextmanager
def serve(**options: bool) -> Iterator[str]:
    """Run the fake, and give its URL."""
    sys.path.insert(0, str(FAKE.parent))
    try:
        server_class = importlib.import_module(FAKE.stem).TogetherAiServer
    finally:
        sys.path.pop(0)
    with server_class(port=0, **options) as server:
        yield server.url


def read_recordings(path: Path) -> Iterator[Any]:
    """Yield what is recorded in a file, or in those of a folder."""
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            recording = parse(line) if line.strip() else None
            request = recording.get("request") if isinstance(recording, dict) else None
            if isinstance(request, dict) and {"method", "url"} <= set(request):
                yield {"name": f"{file.name}:{number}", "date": "", **recording}
            elif recording is not None:
                sys.exit(f"{file}, line {number}: this is no recording: {line[:80]}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="FOLDER_OR_FILE", help="where recordings are")
    add("-v", "--verbose", action="store_true", help="print all differences, and what is left out")
    add("--only", default="", metavar="TEXT", help="only names that have this text")
    add("--since", default="", metavar="DATE", help="only those of this date or later: 2026-04")
    add("--live", metavar="BASE_URL", help="record anew from here")
    add("--out", type=Path, metavar="FILE", help="add what --live records to this file")
    add("--at-least", type=float, default=0.95, metavar="N", help="equal ones, up to 1 a share")
    options = parser.parse_args()
    for path in options.paths:
        if not path.exists():
            parser.error(f"{path} does not exist")
    parts = urlsplit(options.live or "https:")
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1"):
        parser.error(f"--live {options.live}: a key travels by https alone")
    if options.live and not (options.out and os.environ.get("TOGETHER_API_KEY")):
        parser.error("--live needs --out FILE, and a key in the variable TOGETHER_API_KEY")
    return options


def main() -> int:
    options = parse_options()
    if not options.paths and not RECORDINGS.exists():
        print("Nothing to compare: there is no folder ../shared/recordings, and none was named.")
        return 0
    asked = []
    for recording in (r for p in options.paths or [RECORDINGS] for r in read_recordings(p)):
        if options.only not in recording["name"] or recording["date"] < options.since:
            continue
        if recording.get("replay") is not False:
            asked.append(recording)
        elif options.verbose:
            print(f"left out {recording['name']}: {recording.get('why', 'it says so')}")
    if options.live:
        asked = record(asked, options.live, options.out)
    compared = [recording for recording in asked if "response" in recording]
    equal = 0
    with serve() as default, serve(strict=True) as strict:
        for recording in compared:
            found = Fakes(default, strict).judge(recording)
            equal += not found
            if found:
                shown = found if options.verbose else found[:SHOWN]
                more = f"; {len(found) - len(shown)} more" if shown != found else ""
                print(f"differs {recording['name']}: {'; '.join(shown)}{more}", flush=True)
    print(f"{equal} of {len(compared)} recordings are equal")
    wanted = options.at_least * (len(compared) if options.at_least <= 1 else 1)
    return 1 if equal < wanted or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
