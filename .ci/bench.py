"""Measure together_fake.py against its targets, as ratios within one run.

Load and servers are processes of their own, on one core each where the system allows it. Rounds of
the fake and of its yardstick alternate, every request differs from the one before, and a figure is
the median over the rounds.

    bench.py            print the table
    bench.py --check    the same with fewer rounds; exit status 1 where a row is far worse than
                        what was last measured (FLOORS), targets aside
    bench.py chat image only the rows whose name has one of these words
"""

from __future__ import annotations

import argparse
import ast
import http.client
import http.server
import json
import os
import random
import re
import resource
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

FAKE = Path(__file__).resolve().parent.parent / "together_fake.py"
CHAT_MODEL = "meta-llama/Llama-3.3-70B-Instruct-Turbo"
EMBEDDING_MODEL = "togethercomputer/m2-bert-80M-8k-retrieval"
IMAGE_MODEL = "black-forest-labs/FLUX.1-schnell"
NEW_AT_ONCE = 4  # connections in flight where each request has its own
# The share of its target below which a row fails --check: LENIENT, because CI may share its cores,
# and less for rows that fall short of their target, or that few rounds cannot tell.
LENIENT = 0.3
FLOORS = {
    "embeddings, texts of 50 words by plain replies": 0.2,
    "spawn to first answer": 0.15,
    "slow stream, error of ttft and pace": 0.2,
    "bytes of together_fake.py": 0.7,
}
MAX_BYTES = 560_000

# What a program sends: keys that a client adds, in the order of the OpenAI client.
REQUEST_HEAD = (
    "POST {path} HTTP/1.1\r\nHost: 127.0.0.1:4863\r\nAccept-Encoding: gzip, deflate\r\n"
    "Connection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
    "User-Agent: OpenAI/Python 3.54.0\r\nAuthorization: Bearer parlel-together\r\n"
    "Content-Length: {length}\r\n\r\n"
)

# The yardstick of streams: canned events, each sent before the next is written. Without the wait
# Node gathers all writes of one turn into one system call, and no event is flushed by itself.
NODE_RESPONDER = """
const events = JSON.parse(require("fs").readFileSync(process.argv[1], "utf8"));
const server = require("http").createServer((request, response) => {
  request.resume().on("end", async () => {
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    for (const event of events) await new Promise((sent) => response.write(event, sent));
    response.end();
  });
});
server.listen(0, "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}`));
"""


# === Load ===


class Load(NamedTuple):
    """One kind of request: `body` makes the JSON of the n-th one."""

    path: str
    body: Callable[[int], Any]

    def encode(self, number: int) -> bytes:
        """Return the n-th request as it goes over the wire."""
        body = json.dumps(self.body(number)).encode()
        return REQUEST_HEAD.format(path=self.path, length=len(body)).encode() + body

    def template(self) -> Callable[[int], bytes]:
        """Return a fast `encode` for bodies that differ in their number alone."""
        digits = 900_000_000
        before, after = self.encode(digits).split(str(digits).encode())
        return lambda number: b"%b%d%b" % (before, digits + number, after)


class Rate(NamedTuple):
    """What a server answered, a second."""

    replies: float
    events: float


class Connection:
    """One client: sends a request, and knows when the reply to it is complete."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.left = 0  # bytes to come; -1 before the head, -2 until the last chunk
        self.tail = b""

    def send(self, request: bytes) -> None:
        self.left = -1
        self.socket.sendall(request)

    def receive(self) -> bytes:
        """Return the next piece of the reply; afterwards `left` is 0 at its end."""
        data = self.socket.recv(1 << 18)
        if self.left == -1:
            self._read_head(data)
        elif self.left == -2:
            self.tail = self.tail[-7:] + data[-7:]
            self.left = 0 if self.tail.endswith(b"\r\n0\r\n\r\n") else -2
        else:
            self.left -= len(data)
        if not data and self.left:
            raise ConnectionError("the server closed the connection before the reply's end")
        return data

    def _read_head(self, data: bytes) -> None:
        # Both servers send the whole head with the first write.
        end = data.find(b"\r\n\r\n") + 4
        if data[9:12] != b"200" or end < 4:
            raise ConnectionError(f"expected a reply of 200, got {data[:600]!r}")
        head = data[:end].lower()
        at = head.find(b"content-length:")
        if at >= 0:
            self.left = int(head[at + 15 : head.find(b"\r", at)]) - len(data) + end
        else:
            self.tail = data[-7:]
            self.left = 0 if data.endswith(b"\r\n0\r\n\r\n") else -2


class Clients:
    """Connections that each send their next request as soon as a reply is complete."""

    def __init__(self, port: int, encode: Callable[[int], bytes]) -> None:
        self.port = port
        self.encode = encode
        self.sent = 0
        self.replies = 0
        self.events = 0

    def run(self, connections: int, seconds: float, most: int = 10**9, fresh: bool = False) -> Rate:
        """Send for so many seconds, at most `most` requests, and count what comes back.

        `fresh` opens a new connection for every request.
        """
        self.replies = self.events = 0
        last = self.sent + most
        with selectors.DefaultSelector() as selector:
            opened = [self._open(selector) for _ in range(connections)]
            began = time.perf_counter()
            for connection in opened:
                self._send(connection)
            while selector.get_map():
                ready = selector.select(30)
                if not ready:
                    raise TimeoutError("no reply within 30 s")
                for key, _ in ready:
                    if self._receive(key.data):
                        more = time.perf_counter() - began < seconds and self.sent < last
                        if not more or fresh:
                            selector.unregister(key.fileobj)
                            key.data.socket.close()
                        if more and fresh:
                            self._send(self._open(selector))
                        elif more:
                            self._send(key.data)
            took = time.perf_counter() - began
        return Rate(self.replies / took, self.events / took)

    def _open(self, selector: selectors.BaseSelector) -> Connection:
        connection = Connection(self.port)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        return connection

    def _send(self, connection: Connection) -> None:
        connection.send(self.encode(self.sent))
        self.sent += 1

    def _receive(self, connection: Connection) -> bool:
        self.events += connection.receive().count(b"data: ")
        self.replies += not connection.left
        return not connection.left


def ask(port: int, request: bytes) -> bytes:
    """Return the whole reply to one request, as sent."""
    connection = Connection(port)
    connection.send(request)
    reply = b""
    while connection.left:
        reply += connection.receive()
    connection.socket.close()
    return reply


# === Servers ===


class PlainResponder(http.server.BaseHTTPRequestHandler):
    """The yardstick: http.server as it comes, without Nagle's delay, one write for a reply."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one write: the base class flushes after each request
    canned = b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.canned)))
        self.end_headers()
        self.wfile.write(self.canned)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def serve_plain(size: str) -> None:
    PlainResponder.canned = b"x" * int(size)
    http.server.ThreadingHTTPServer.request_queue_size = 1024
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PlainResponder)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def run_on_core(core: int) -> None:
    """Move this process, and those it starts from now on, to one core, if it has two."""
    if hasattr(os, "sched_setaffinity") and len(CORES) > 1:
        os.sched_setaffinity(0, {CORES[core]})


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


class Server(NamedTuple):
    process: subprocess.Popen[str]
    port: int


@contextmanager
def serve(*command: str, pinned: bool = True) -> Iterator[Server]:
    """Run a server that prints its URL, on the first core if it is pinned."""
    if pinned:
        run_on_core(0)
    elif hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    run_on_core(-1)
    try:
        assert process.stdout
        for line in process.stdout:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found:
                yield Server(process, int(found[1]))
                break
        else:
            raise RuntimeError(f"{command} ended without printing a URL")
    finally:
        process.terminate()
        process.wait(10)


def serve_fake() -> Any:
    return serve(sys.executable, str(FAKE), "--port", "0", "--quiet")


def serve_module() -> Any:
    """Run the fake from cached code: a script keeps what compiling it took, 19 MB."""
    subprocess.run([sys.executable, "-m", "py_compile", str(FAKE)], check=True)
    command = "import sys, together_fake; sys.exit(together_fake.main())"
    run = f"import sys; sys.path.insert(0, {str(FAKE.parent)!r}); {command}"
    return serve(sys.executable, "-c", run, "--port", "0", "--quiet")


# === Rows ===


class Row(NamedTuple):
    """One line of the table; `measured` is None where it was skipped, and `note` says why."""

    name: str
    measured: float | None
    target: float
    unit: str = "x"
    at_most: bool = False
    note: str = ""

    def share(self) -> float:
        """Return what was reached of the target: 1 is just enough."""
        if self.measured is None:
            return 1.0
        if self.at_most:
            return self.target / self.measured if self.measured > 0 else float("inf")
        return self.measured / self.target

    def line(self) -> str:
        sign = "<=" if self.at_most else ">="
        if self.measured is None:
            figure, verdict = "-", "skipped"
        else:
            figure, verdict = f"{self.measured:.2f}", "ok" if self.share() >= 1 else "BELOW"
        target = f"{sign} {self.target:.3g} {self.unit}"
        return f"{self.name:<48} {figure:>9}  {target:<12} {verdict:<8} {self.note}".rstrip()


class Plan(NamedTuple):
    """How long to measure."""

    rounds: int
    seconds: float  # of one round
    starts: int  # of a process
    memory_requests: int


def chat_body(number: int) -> Any:
    return {
        "model": CHAT_MODEL,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": f"Tell me about ticket {number} in a few words, please."},
        ],
        "temperature": 0.7,
    }


def stream_body(number: int) -> Any:
    return {**chat_body(number), "stream": True}


def schema_body(number: int) -> Any:
    kinds: list[dict[str, Any]] = [
        {"type": "string"},
        {"type": "integer", "minimum": 0, "maximum": 100},
        {"type": "boolean"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"enum": ["low", "medium", "high"]},
    ]
    properties = {f"field_{i}": kinds[i % len(kinds)] for i in range(30)}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    return {**chat_body(number), "response_format": wanted}


def embedding_body(number: int) -> Any:
    """Return 64 texts of 50 words; the texts of two requests share words, never a text."""
    draw = random.Random(number)
    texts = [" ".join(draw.choices(VOCABULARY, k=50)) for _ in range(64)]
    return {"model": EMBEDDING_MODEL, "input": texts}


def image_body(number: int) -> Any:
    return {
        "model": IMAGE_MODEL,
        "prompt": f"a lighthouse at dusk, number {number}",
        "width": 1024,
        "height": 1024,
        "response_format": "base64",
    }


def make_vocabulary() -> list[str]:
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er")]
    return ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(5000)]


VOCABULARY = make_vocabulary()
CHAT = Load("/v1/chat/completions", chat_body)
STREAM = Load("/v1/chat/completions", stream_body)
SCHEMA = Load("/v1/chat/completions", schema_body)
EMBEDDINGS = Load("/v1/embeddings", embedding_body)


# === Measurements: each yields its rows ===


def alternate(plan: Plan, first: Callable[[], float], second: Callable[[], float]) -> float:
    """Return the median over the rounds of `first` by `second`, after one round to warm up."""
    return median([first() / second() for _ in range(plan.rounds + 1)][1:])


@contextmanager
def serve_with_plain() -> Iterator[tuple[int, int]]:
    """Run the fake, and the plain responder with as many bytes as the fake's answer to a chat."""
    with serve_fake() as fake:
        size = len(ask(fake.port, CHAT.encode(1)).partition(b"\r\n\r\n")[2])
        with serve(sys.executable, __file__, "--serve-plain", str(size)) as plain:
            yield fake.port, plain.port


def measure_chat(plan: Plan) -> Iterator[Row]:
    with serve_with_plain() as (fake_port, plain_port):
        fake = Clients(fake_port, CHAT.template())
        plain = Clients(plain_port, CHAT.template())

        def ratio(connections: int, fresh: bool = False) -> float:
            def rate(clients: Clients) -> float:
                return clients.run(connections, plan.seconds, fresh=fresh).replies

            return alternate(plan, lambda: rate(fake), lambda: rate(plain))

        yield Row("chat, 1 keep-alive connection", ratio(1), 1.05)
        at_16 = ratio(16)
        yield Row("chat, 16 keep-alive connections", at_16, 1.4)
        yield Row("chat, 64 keep-alive connections", ratio(64), 1.4)
        yield Row("chat, a new connection each", ratio(NEW_AT_ONCE, fresh=True), 2)
        yield Row("chat without tools or schema", at_16, 1.4, note="the row of 16 connections")


def measure_stream(plan: Plan) -> Iterator[Row]:
    name = "streamed chat, 16 connections, events"
    node = shutil.which("node")
    if not node:
        yield Row(name, None, 2, note="no node on the path")
        return
    yield Row(name, compare_streams(plan, node, pinned=True), 2)
    yield Row(f"{name}, two cores", compare_streams(plan, node, pinned=False), 1.5)


def compare_streams(plan: Plan, node: str, pinned: bool) -> float:
    """Return the events a second by those of a Node responder; if pinned, each has one core."""
    fake_command = (sys.executable, str(FAKE), "--port", "0", "--quiet")
    with serve(*fake_command, pinned=pinned) as fake, tempfile.TemporaryDirectory() as folder:
        canned = Path(folder, "events.json")
        canned.write_text(json.dumps(read_events(ask(fake.port, STREAM.encode(1)))))
        with serve(node, "-e", NODE_RESPONDER, str(canned), pinned=pinned) as responder:
            ours = Clients(fake.port, STREAM.template())
            theirs = Clients(responder.port, STREAM.template())
            return alternate(
                plan,
                lambda: ours.run(16, plan.seconds).events,
                lambda: theirs.run(16, plan.seconds).events,
            )


def read_events(reply: bytes) -> list[str]:
    """Return the events of a chunked reply, `data: ` and empty line included."""
    body = reply.partition(b"\r\n\r\n")[2]
    text = re.sub(rb"(?:^|\r\n)[0-9a-fA-F]+\r\n", b"", body).decode()
    return [event + "\n\n" for event in text.split("\n\n") if event.strip()]


def measure_embeddings(plan: Plan) -> Iterator[Row]:
    bodies = [EMBEDDINGS.encode(number) for number in range(300)]
    with serve_with_plain() as (fake_port, plain_port):
        fake = Clients(fake_port, lambda number: bodies[number % len(bodies)])
        plain = Clients(plain_port, CHAT.template())
        ratio = alternate(
            plan,
            lambda: 64 * fake.run(4, plan.seconds).replies,
            lambda: plain.run(16, plan.seconds).replies,
        )
    yield Row("embeddings, texts of 50 words by plain replies", ratio, 6000 / 9500)


def measure_image(plan: Plan) -> Iterator[Row]:
    milliseconds = run_inside("time_images")
    yield Row("image 1024x1024, CPU", milliseconds, 10, "ms", at_most=True)


def measure_life_cycle(plan: Plan) -> Iterator[Row]:
    milliseconds = run_inside("time_start_and_stop")
    yield Row("start() and stop(), 10 open connections", milliseconds, 5, "ms", at_most=True)


def measure_cold_start(plan: Plan) -> Iterator[Row]:
    pairs = [(time_import(), time_first_answer()) for _ in range(plan.starts + 1)][1:]
    bare, answered = (median(times) for times in zip(*pairs))
    note = f"importing http.server takes {bare:.0f} ms"
    yield Row("spawn to first answer", answered, 1.25 * bare + 15, "ms", at_most=True, note=note)


def time_import() -> float:
    """Return the milliseconds of a Python that imports http.server and ends."""
    run_on_core(0)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import http.server"], check=True)
    took = (time.perf_counter() - began) * 1000
    run_on_core(-1)
    return took


def time_first_answer() -> float:
    """Return the milliseconds from spawning the fake to its first healthy answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run_on_core(0)  # not the one on which this process tries to connect
    began = time.perf_counter()
    command = [sys.executable, str(FAKE), "--port", str(port), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    run_on_core(-1)
    try:
        while time.perf_counter() - began < 10:
            try:
                ask(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return (time.perf_counter() - began) * 1000
            except ConnectionRefusedError:
                time.sleep(0.0002)  # leaves the core to the server
    finally:
        process.terminate()
        process.wait(10)
    raise RuntimeError(f"{command} did not answer within 10 s")


def measure_size(plan: Plan) -> Iterator[Row]:
    """Yield what a reader, a copy and a test run pay for; the last row runs the tests."""
    size = FAKE.stat().st_size
    yield Row("bytes of together_fake.py", size, MAX_BYTES, "bytes", at_most=True)
    bodies = [
        len(list_code_lines(node))
        for node in ast.walk(ast.parse(FAKE.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    note = f"{len(bodies)} functions, the longest of {max(bodies)}"
    yield Row("lines of code of the median function", median(bodies), 6, "lines", True, note)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    tests = FAKE.with_name("test_together_fake.py")
    subprocess.run([sys.executable, tests], check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = sum(after[:2]) - sum(before[:2])
    yield Row("processor time of the tests", seconds, 15, "s", at_most=True)


def list_code_lines(function: ast.FunctionDef) -> set[int]:
    """Return the lines of a function but for its docstring and blank lines between statements."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    lines = {line for node in body for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    return lines | {function.lineno}


def measure_memory(plan: Plan) -> Iterator[Row]:
    growth = f"memory growth over {plan.memory_requests:,} requests"
    with serve_module() as fake:
        ask(fake.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        after_start = read_resident(fake.process.pid)
        if after_start is None:
            yield Row("memory after start", None, 30, "MB", True, note="no /proc on this system")
            yield Row(growth, None, 5, "MB", True)
            return
        clients = Clients(fake.port, CHAT.template())
        clients.run(16, 60, most=2000)  # twice what the record holds
        full = read_resident(fake.process.pid)
        clients.run(16, 60, most=plan.memory_requests)
        grown = read_resident(fake.process.pid) - full
    yield Row("memory after start", after_start, 30, "MB", at_most=True)
    yield Row(growth, grown, 5, "MB", at_most=True, note=f"from {full:.0f} MB")


def read_resident(process: int) -> Any:
    """Return the megabytes of memory in use, or None where the system does not tell."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    kilobytes = re.findall(r"VmRSS:\s+(\d+) kB", status)
    return int(kilobytes[0]) / 1024


def measure_schema(plan: Plan) -> Iterator[Row]:
    with serve_fake() as fake:
        schema = Clients(fake.port, SCHEMA.template())
        chat = Clients(fake.port, CHAT.template())

        def extra() -> float:
            slow, fast = (clients.run(1, plan.seconds / 2).replies for clients in (schema, chat))
            return 1000 / slow - 1000 / fast

        costs = [extra() for _ in range(plan.rounds + 1)][1:]
    yield Row("schema of 30 properties, extra", median(costs), 1, "ms", at_most=True)


def measure_fixtures(plan: Plan) -> Iterator[Row]:
    name = "chat with 1,000 fixtures, time by one without"
    fixtures = [
        {"match": {"userMessage": f"never said {i}"}, "response": {"content": "Hi"}}
        for i in range(1000)
    ]
    with serve_fake() as bare, serve_fake() as scripted:
        status = post(scripted.port, "/__parlel/fixtures", {"fixtures": fixtures})
        if status == 404:
            yield Row(name, None, 2, at_most=True, note="there is no POST /__parlel/fixtures")
            return
        assert status < 300, f"POST /__parlel/fixtures answered {status}"
        without = Clients(bare.port, CHAT.template())
        loaded = Clients(scripted.port, CHAT.template())
        ratio = alternate(
            plan,
            lambda: without.run(16, plan.seconds).replies,
            lambda: loaded.run(16, plan.seconds).replies,
        )
    yield Row(name, ratio, 2, at_most=True)


def measure_pace(plan: Plan) -> Iterator[Row]:
    """Ask for a slow stream, and compare when its events come with what was asked."""
    ttft, tps = 0.2, 50
    fixture = {
        "match": {},
        "response": {"content": "word " * 25},
        "streamingProfile": {"ttft": 1000 * ttft, "tps": tps},
    }
    with serve_fake() as fake:
        post(fake.port, "/__parlel/fixtures", {"fixtures": [fixture]})
        connection = Connection(fake.port)
        began = time.perf_counter()
        connection.send(Load("/v1/chat/completions", stream_body).encode(0))
        times: list[float] = []
        while connection.left:
            events = connection.receive().count(b"data: {")
            times += [time.perf_counter() - began] * events
        connection.socket.close()
    pace = (len(times) - 1) / (times[-1] - times[0])
    error = 100 * max(abs(times[0] / ttft - 1), abs(pace / tps - 1))
    yield Row("slow stream, error of ttft and pace", error, 10, "%", at_most=True)


def measure_batch(plan: Plan) -> Iterator[Row]:
    """Run a batch of 10,000 chats: its lines run when it is retrieved."""
    rows = ({"custom_id": str(i), "body": chat_body(i)} for i in range(10_000))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with serve_fake() as fake:
        seed = {"files": [{"id": "file-in", "purpose": "batch-api", "content": lines}]}
        assert post(fake.port, "/__parlel/seed", seed) == 200
        job = {"endpoint": "/v1/chat/completions", "input_file_id": "file-in"}
        began = time.perf_counter()
        batch = ask_json(fake.port, "POST", "/v1/batches", json.dumps(job).encode())["job"]
        while batch["status"] != "COMPLETED":
            batch = ask_json(fake.port, "GET", f"/v1/batches/{batch['id']}")
        took = time.perf_counter() - began
    yield Row("batch of 10,000 chats", took, 3, "s", at_most=True)


def measure_transfer(plan: Plan) -> Iterator[Row]:
    """Upload and download 100 MB, and see how much memory that takes at the most."""
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    content = line * (100_000_000 // len(line))
    fence = b"--fence\r\nContent-Disposition: form-data; name="
    body = b'%b"purpose"\r\n\r\nfine-tune\r\n%b"file"; filename="a.jsonl"\r\n\r\n%b\r\n--fence--'
    body %= (fence, fence, content)
    megabytes = len(content) / 1e6
    with serve_fake() as fake:
        before = read_memory(fake.process.pid, "VmHWM")
        began = time.perf_counter()
        file = ask_json(fake.port, "POST", "/v1/files", body, "multipart/form-data; boundary=fence")
        uploaded = time.perf_counter()
        yield Row("upload of 100 MB", megabytes / (uploaded - began), 200, "MB/s")
        got = ask_bytes(fake.port, "GET", f"/v1/files/{file['id']}/content")
        assert got == content, "the download is not what was uploaded"
        yield Row("download of 100 MB", megabytes / (time.perf_counter() - uploaded), 200, "MB/s")
        if before:
            copies = (read_memory(fake.process.pid, "VmHWM") - before) / megabytes
            yield Row("copies of it in memory", copies, 3, at_most=True)


def ask_bytes(
    port: int, method: str, path: str, body: bytes = b"", kind: str = "application/json"
) -> bytes:
    """Return the body of a good answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": kind, "Authorization": "Bearer parlel-together"}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    assert response.status < 300, f"{method} {path} answered {response.status}: {data[:300]!r}"
    return data


def ask_json(port: int, *request: Any) -> Any:
    return json.loads(ask_bytes(port, *request))


def read_memory(pid: int, field: str) -> float:
    """Return a figure of /proc/PID/status in MB; 0 where there is none."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def post(port: int, path: str, body: Any) -> int:
    """Return the status of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    status = connection.getresponse().status
    connection.close()
    return status


# === Measurements inside a process of their own ===


def run_inside(function: str) -> float:
    """Return what a function of this file returns in a new process, on the first core."""
    run_on_core(0)
    command = [sys.executable, __file__, "--inside", function]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    run_on_core(-1)
    return float(done.stdout)


def time_images() -> float:
    """Return the median milliseconds of CPU for one image, from request to reply."""
    import together_fake

    server = together_fake.TogetherAiServer(port=0)
    times = []
    for number in range(20):
        headers = {"authorization": "Bearer parlel-together", "content-type": "application/json"}
        request = together_fake.Request(
            "POST", "/v1/images/generations", image_body(number), headers=headers
        )
        began = time.process_time()
        reply = server.answer(request)
        times.append(time.process_time() - began)
        assert reply.status == 200, reply.body
    return 1000 * median(times)


def time_start_and_stop() -> float:
    """Return the median milliseconds of start() and stop() together, without what is between."""
    from together_fake import TogetherAiServer

    times = []
    for number in range(21):
        server = TogetherAiServer(port=0)
        began = time.perf_counter()
        server.start()
        started = time.perf_counter()
        connections = [Connection(server.port) for _ in range(10)]
        for connection in connections:
            connection.send(CHAT.encode(number))
            while connection.left:
                connection.receive()
        stopping = time.perf_counter()
        server.stop()
        times.append(time.perf_counter() - stopping + started - began)
        for connection in connections:
            connection.socket.close()
    return 1000 * median(times[1:])


# === Command line ===

MEASUREMENTS = {
    "size": measure_size,
    "chat": measure_chat,
    "stream": measure_stream,
    "embeddings": measure_embeddings,
    "image": measure_image,
    "start": measure_life_cycle,
    "spawn": measure_cold_start,
    "memory": measure_memory,
    "schema": measure_schema,
    "fixtures": measure_fixtures,
    "pace": measure_pace,
    "batch": measure_batch,
    "transfer": measure_transfer,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--check", action="store_true", help="status 1 far below the last figures")
    parser.add_argument("--serve-plain", metavar="BYTES", help=argparse.SUPPRESS)
    parser.add_argument("--inside", metavar="FUNCTION", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_plain:
        serve_plain(options.serve_plain)
    if options.inside:
        sys.path.insert(0, str(FAKE.parent))
        print(globals()[options.inside]())
        return 0
    if set(options.names) - set(MEASUREMENTS):
        parser.error(f"{options.names}: a name is one of {', '.join(MEASUREMENTS)}")
    return print_table(options.names or list(MEASUREMENTS), options.check)


def measure(name: str, plan: Plan) -> Iterator[Row]:
    """Yield the rows of one measurement; one that breaks is a row far below its target."""
    try:
        yield from MEASUREMENTS[name](plan)
    except Exception as error:
        yield Row(name, 0.0, 1, note=f"failed: {error}"[:400])


def print_table(names: list[str], check: bool) -> int:
    """Measure and print row by row; return the exit status."""
    began = time.perf_counter()
    plan = Plan(4, 0.3, 7, 20_000) if check else Plan(8, 0.4, 15, 100_000)
    below: list[str] = []
    for name in names:
        for _ in range(3 if check else 1):  # what else the machine does passes; a defect stays
            rows = list(measure(name, plan))
            worse = [row.name for row in rows if row.share() < FLOORS.get(row.name, LENIENT)]
            if not worse:
                break
        below += worse
        for row in rows:
            print(row.line(), flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    if check and below:
        print(f"far worse than last measured: {'; '.join(below)}")
    return 1 if check and below else 0


if __name__ == "__main__":
    sys.exit(main())
