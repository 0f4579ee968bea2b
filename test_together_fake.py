"""Tests of together_fake: `python test_together_fake.py`; nothing but Python is needed.

Every test starts from a fresh state: one server serves nearly all and is reset before each. The
sections are those of together_fake.py. Cases for each route are made from `ROUTES`, so a new
endpoint is covered the day it is declared, and fails until it has an entry in `VALID`. The classes
named ...ClientTests run official clients where those are installed; REQUIRE_CLIENTS=together makes
a missing one a failure.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import datetime
import email.utils
import errno
import functools
import gc
import gzip
import hashlib
import http.client
import importlib
import importlib.metadata
import inspect
import io
import ipaddress
import itertools
import json
import math
import operator
import os
import pathlib
import py_compile
import pydoc
import re
import select
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import symtable
import sys
import tarfile
import tempfile
import threading
import time
import types
import unittest
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
import wave
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import together_fake as fake
from together_fake import Request, TogetherAiServer

try:
    import resource
except ImportError:  # Windows
    resource = None


# === Settings ===


def say(text):
    """Return the messages of a chat that begins so."""
    return [{"role": "user", "content": text}]


def tool(name, **more):
    """Return a tool as chats are given it, or the choice of that tool."""
    return {"type": "function", "function": {"name": name, **more}}


HERE = Path(__file__).resolve().parent
PYTHON = (sys.executable, "-S")  # what is installed is not needed, and looking for it takes time
PROGRAM = (*PYTHON, "-m", "together_fake")  # in COPY, where its code is compiled already
COPY = Path(tempfile.gettempdir(), f"together_fake_{os.getpid()}")  # made by setUpModule()
REQUIRED = [name for name in os.environ.get("REQUIRE_CLIENTS", "").split(",") if name]
PATIENCE = 20  # seconds that a test waits for what takes milliseconds on a quiet machine
FEW_THREADS = 20  # serve any number of clients, once those who kept one have been answered

KEY = {"Authorization": "Bearer parlel-together"}
OPENAI = {**KEY, "User-Agent": "OpenAI/Python 3.54.0", "X-Stainless-Lang": "python"}
PY1 = {**KEY, "User-Agent": "Together/v1 PythonBindings/1.5.35"}
PY3 = {**KEY, "User-Agent": "Together/Python 3.1.1", "X-Stainless-Lang": "python"}
FORM = {**KEY, "Content-Type": "multipart/form-data; boundary=b"}
CHAT = "/v1/chat/completions"
REALTIME = "/v1/realtime?model=openai/whisper-large-v3"
VOICE = "/v1/audio/speech/websocket"
UPGRADE = {  # the handshake of RFC 6455, 1.3
    **KEY, "Host": "127.0.0.1", "Connection": "keep-alive, Upgrade", "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}  # fmt: skip
FIXTURES = "/__parlel/fixtures"
LLAMA = "meta-llama/Llama-3.3-70B-Instruct-Turbo"
THINKER = "openai/gpt-oss-20b"
R1 = "deepseek-ai/DeepSeek-R1"  # engine A
KIMI_CODE = "moonshotai/Kimi-K2.7-Code"
KIMI = "moonshotai/Kimi-K3"  # engine C
OTHER = "Qwen/Qwen3-235B-A22B-Instruct-2507-tput"  # engine B, does not reason
SEES = "google/gemma-3n-E4B-it"  # images and sound; 32,768 tokens; engine B
SMALL_MODEL = "Qwen/Qwen2.5-7B-Instruct-Turbo"  # 32,768 tokens; engine A
FLUX = "black-forest-labs/FLUX.1-schnell"
HAILUO = "minimax/hailuo-02"
BASE_MODEL = "meta-llama/Meta-Llama-3.1-8B-Instruct-Reference"
RERANKER = "Salesforce/Llama-Rank-V1"
HELLO = {"model": LLAMA, "messages": say("hello")}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = tool("get_weather", description="Get the weather of a city", parameters=CITY)
FINAL = tool("final_result", description="Say the end")
JUDGE = {"model": THINKER, "model_source": "serverless", "system_template": "Judge."}
EVALUATION = {"judge": JUDGE, "input_data_file_path": "rows"}
CLASSIFY = {**EVALUATION, "labels": ["yes", "no"], "pass_labels": ["yes"]}
SCORE = {**EVALUATION, "min_score": 1, "max_score": 5, "pass_threshold": 3}
SCALING = {"min_replicas": 1, "max_replicas": 2}
ENDPOINT = {"model": THINKER, "hardware": "1x_nvidia_a100_80gb_sxm", "autoscaling": SCALING}
DOCUMENTS = ["a red car", "apple pie recipe", "pie"]
RERANK = {"model": RERANKER, "query": "apple pie", "documents": DOCUMENTS}
SPEECH = {"model": "cartesia/sonic", "input": "Hello there, friend.", "voice": "newsman"}
HEARD = {"model": "openai/whisper-large-v3", "response_format": "verbose_json"}
TRAIN = b'{"text": "one"}\n{"text": "two"}\n'
IN_PARTS = {"file_name": "a.jsonl", "file_size": len(TRAIN), "num_parts": 2, "purpose": "fine-tune"}
QUESTIONS = ["Why is the sky blue?", "Who built the lighthouse?", "What do herons eat?"]
SERVER = TogetherAiServer(port=0)  # the one that all tests share


def setUpModule() -> None:
    COPY.mkdir()
    unittest.addModuleCleanup(shutil.rmtree, COPY)
    py_compile.compile(shutil.copy2(HERE / "together_fake.py", COPY), doraise=True)
    SERVER.start()
    unittest.addModuleCleanup(SERVER.stop)


# === Asking ===


def wait_until(condition):
    """Return whether a condition comes to hold, as soon as it does."""
    end, never = time.monotonic() + PATIENCE, threading.Event()
    while not condition():
        if time.monotonic() > end:
            return False
        never.wait(0.001)
    return True


def count_new_threads(before, wanted=0):
    """Return how many threads there are besides those before: when few enough, or in the end."""

    def count():
        return len(set(threading.enumerate()) - before)

    wait_until(lambda: count() <= wanted)
    return count()


def list_descriptors():
    """Return the numbers of what this process has open, where the system tells them."""
    return set(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else set()


def write_lines(rows):
    """Return rows as a file of JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def batch_lines(texts, line=MappingProxyType({}), **fields):
    """Return the lines of a batch that asks these questions; their ids are q0, q1, ..."""
    bodies = [{"model": LLAMA, "messages": say(text), **fields} for text in texts]
    return write_lines(
        {"custom_id": f"q{n}", "body": body, **line} for n, body in enumerate(bodies)
    )


def write_form(fields, file=None):
    """Return a multipart body: texts, and the bytes of a file."""
    parts = [f'name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    if file is not None:
        parts.append(b'name="file"; filename="a.jsonl"\r\n\r\n' + file + b"\r\n")
    start = b"--b\r\nContent-Disposition: form-data; "
    return b"".join(start + part for part in parts) + b"--b--\r\n"


def read_lines(data):
    return [json.loads(line) for line in data.splitlines()]


def write_sound(seconds, rate=8000):
    """Return a silent WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(bytes(2 * rate * seconds))
    return file.getvalue()


def png_size(data):
    """Return width and height of a PNG file."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise AssertionError(f"not a PNG file: {data[:24]!r}")
    return struct.unpack(">II", data[16:24])


class Got:
    """What came back: status, headers, raw bytes, and their JSON or events."""

    def __init__(self, status, headers, raw, is_cut=False):
        self.status = status
        self.headers = {name.lower(): value for name, value in dict(headers).items()}
        self.raw = raw
        self.is_cut = is_cut  # it ended too early

    @property
    def json(self):
        return json.loads(self.raw)

    @property
    def events(self):
        blocks = self.raw.decode().split("\n\n")
        lines = [block for block in blocks if not block.startswith(":")]
        assert lines[-2:] == ["data: [DONE]", ""], lines[-2:]
        return [json.loads(line[len("data: ") :]) for line in lines[:-2]]


class FakeCase(unittest.TestCase):
    """A test that asks the fake, over HTTP or in process, and finds it in a fresh state.

    options    those of a server of its own; None: the one that all tests share will do
    over_http  False: ask() opens no socket, answer() does the same without
    origin     where the requests of answer() say that they were sent
    """

    options: Mapping | None = None
    over_http = True
    origin = ""

    def setUp(self):
        if self.options is None:
            self.server = SERVER
            self.server.reset()
        else:
            self.server = TogetherAiServer(port=0, **self.options)
            if self.over_http:
                self.server.start()
                self.addCleanup(self.server.stop)

    def ask(self, method, path, body=None, headers=KEY):
        """Send one request and return what came back; a dict or a list goes as JSON."""
        if not self.over_http:
            return self.answer(method, path, body, headers)
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
            headers = {"Content-Type": "application/json", **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            try:
                raw, is_cut = response.read(), False
            except http.client.IncompleteRead as error:
                raw, is_cut = error.partial, True
            return Got(response.status, response.getheaders(), raw, is_cut)

    def answer(self, method, path, body=None, headers=KEY):
        """Do what ask() does without a socket."""
        path, _, query = path.partition("?")
        fields = {name.lower(): value for name, value in headers.items()}
        given = b"" if body is None else body
        request = Request(method, path, given, query=query, headers=fields, origin=self.origin)
        reply = self.server.answer(request)
        raw = reply.read()
        return Got(reply.status, {"Content-Type": reply.content_type, **reply.headers}, raw)

    def post(self, path, body, headers=KEY):
        """Post what has to be answered with 200."""
        got = self.ask("POST", path, body, headers)
        self.assertEqual(got.status, 200, got.raw[:500])
        return got

    def json(self, method, path, body=None, headers=KEY, status=200):
        """Return the JSON of an answer that must have this status."""
        got = self.ask(method, path, body, headers)
        self.assertEqual(got.status, status, got.raw[:500])
        return got.json if got.raw else None

    def chat(self, text="hello", **fields):
        """Return the JSON of a whole chat answer."""
        return self.post(CHAT, {"model": LLAMA, "messages": say(text), **fields}).json

    def text(self, *args, **fields):
        """Return the text of a chat answer."""
        return self.chat(*args, **fields)["choices"][0]["message"]["content"]

    def stream(self, headers=KEY, **fields):
        """Return the events of a streamed chat answer."""
        return self.post(CHAT, {**HELLO, "stream": True, **fields}, headers).events

    def climb(self, path, key="status"):
        """Retrieve a job until nothing changes; return every state seen."""
        seen = []
        while len(seen) < 2 or seen[-1] != seen[-2]:
            self.assertLess(len(seen), 20, seen)
            seen.append(self.json("GET", path)[key])
        return seen[:-1]

    def assertApiError(self, got, status, type, param, message, code=None):
        self.assertEqual(got.status, status, got.raw[:500])
        self.assertEqual(
            got.json["error"], {"message": message, "type": type, "param": param, "code": code}
        )

    def assertRefused(self, path, body, param):
        """Post what has to be a 400 that names a field."""
        got = self.ask("POST", path, body)
        self.assertEqual((got.status, got.json["error"]["param"]), (400, param), got.raw[:500])


class LocalCase(FakeCase):
    """A test without a socket, with a server that it may change."""

    options = MappingProxyType({})
    over_http = False


# === Checks ===


class BodyTests(FakeCase):
    """Bodies that are not what they should be."""

    def test_rows_of_a_table_are_read_from_words(self):
        table = fake.Fields("a! b,c:int|str:1..5 d=x|y e:float:-0.5..", fake.Field("f", list))
        self.assertEqual(list(table), list("abcdef"))
        self.assertEqual((table["a"].kinds, table.required), ((str,), ("a",)))
        for name in "bc":
            self.assertEqual(table[name].kinds, (int, str))
            self.assertEqual((table[name].low, table[name].high), (1, 5))
        self.assertEqual((table["d"].choices, table["d"].high), (("x", "y"), math.inf))
        self.assertEqual((table["e"].low, table["e"].high), (-0.5, math.inf))

    def test_bad_json(self):
        for raw, start in (
            (b"{", "Expecting property name"),
            (b"[]", "the body must be a JSON object."),
            (b'{"a": NaN}', "NaN is not a JSON value."),
            (b'{"a": -Infinity}', "-Infinity is not a JSON value."),
            (b'{"a": 1e999}', "the number 1e999 is too large."),
            (b'{"a": "\\ud800"}', "a string has half of a surrogate"),
            (b'{"a": "\xff"}', "byte 7 is not UTF-8."),
            (b'{"a": %b}' % (b"9" * 6000), "a number has too many digits"),
            (b"[" * 100000, "it nests deeper than 200."),
            (b'{"a": [0%b]}' % (b",[]" * 120_000), "it has too many values."),
            (b'{"a": {%b}}' % b",".join(b'"%d" :1' % key for key in range(120_000)), "it has too"),
            (b'{"a": %b}' % (b"[" * 300 + b"]" * 300), "it nests"),
        ):
            with self.subTest(raw=raw[:30]):
                message = self.json("POST", CHAT, raw, status=400)["error"]["message"]
                start = "The body is not valid JSON: " + start
                self.assertTrue(message.startswith(start), message)
        message = self.json("POST", CHAT, b"", status=400)["error"]["message"]
        self.assertEqual(message, "Missing required field: model.")

    def test_what_is_large_but_real_is_read(self):
        """2,048 inputs of 512 ids; texts full of marks; what a test says, of any size."""
        ids = [[7] * 512] * 2048
        body = {"model": HELLO["model"], "input": ids}
        raw = json.dumps(body).encode()
        self.assertEqual(fake.parse_body(raw, "", fake.NO_FIELDS), body)
        body = json.loads('{"x": "' + "{[:," * 40_000 + '"}')
        self.assertEqual(fake.parse_json(json.dumps(body, indent=1).encode() + b"\n"), body)
        deep = b'{"x": "%b", "y": %b}' % (b":" * 120_000, b"[" * 250 + b"]" * 250)
        with self.assertRaisesRegex(fake.ApiError, "nests deeper"):
            fake.parse_json(deep)
        escapes = {"x": '\\" {[:,' * 60_000 + "\\"}
        self.assertEqual(fake.parse_json(json.dumps(escapes).encode()), escapes)
        keys = b'{"a": {%b' % (b'"a" :1,' * 120_000)  # its end is never reached
        with self.assertRaisesRegex(fake.ApiError, "too many values"):
            fake.parse_json(keys)
        many = b'{"x": [0%b]}' % (b",[]" * 120_000)
        error = self.json("POST", "/__parlel/fixtures", many, status=400)["error"]
        self.assertIn("fixture was refused", error["message"])

    def test_fields_with_and_without_brackets_are_one_array(self):
        for form, values in (
            (b"a=1&a[]=2", ["1", "2"]),
            (b"a[]=1", ["1"]),
            (b"a=1&a=2", ["1", "2"]),
        ):
            self.assertEqual(fake.parse_form(form + b"&b=3"), {"a": values, "b": "3"})

    def test_a_file_is_no_text(self):
        values = {"a": fake.Upload("a.txt", "text/plain", b"true"), "b": "True"}
        fields = fake.Fields(fake.Field("a", bool), fake.Field("b", bool))
        self.assertEqual(fake.read_texts(values, fields), {**values, "b": True})

    def test_good_json_of_unusual_kinds(self):
        for raw in (
            json.dumps({**HELLO, "x": "\U0001f600" + "9" * 500}),
            json.dumps({**HELLO, "x": [[]] * 300}),
            json.dumps({**HELLO, "x": "\U0001f600"}, ensure_ascii=False),
        ):
            self.assertEqual(self.ask("POST", CHAT, raw.encode()).status, 200)

    def test_sentences_about_values(self):
        huge = 10**350
        for fields, param, message in (
            ({"temperature": 3}, "temperature", "must be at most 2, not 3.0"),
            ({"temperature": huge}, "temperature", f"must be a number, not {str(huge)[:57]}..."),
            ({"logit_bias": {"1": "x"}}, "logit_bias[1]", 'must be a number, not "x"'),
            ({"n": True}, "n", "must be an integer, not true"),
            ({"n": 1.5}, "n", "must be an integer, not 1.5"),
            ({"stream": "yes"}, "stream", 'must be a boolean, not "yes"'),
            ({"messages": []}, "messages", "must have at least 1 items, not 0"),
            ({"stop": ["a", 1]}, "stop[1]", "must be a string, not 1"),
            ({"seed": "x" * 99}, "seed", f'must be an integer, not "{"x" * 56}...'),
        ):
            with self.subTest(fields=fields):
                got = self.ask("POST", CHAT, {**HELLO, **fields})
                message = f"Input validation error: {param} {message}."
                self.assertApiError(got, 400, "invalid_request_error", param, message)


class MultipartTests(FakeCase):
    def upload(self, disposition, kind="multipart/form-data; boundary=X"):
        head = "--X\r\nContent-Disposition: form-data; name="
        text = f'{head}"purpose"\r\n\r\neval\r\n{head}file; {disposition}\r\n\r\n'
        body = text.encode() + b'{"a": 1}\r\n--X--\r\n'
        return self.ask("POST", "/v1/files", body, {**KEY, "Content-Type": kind})

    def test_unusual_but_legal_parts(self):
        for disposition, name in (
            ('filename="a; b.jsonl"', "a; b.jsonl"),
            ("filename=c.jsonl", "c.jsonl"),
            ('filename="q\\"q.jsonl"', 'q"q.jsonl'),
            ("filename*=UTF-8''d%C3%A9.jsonl", "d\u00e9.jsonl"),
        ):
            with self.subTest(disposition=disposition):
                got = self.upload(disposition)
                self.assertEqual((got.status, got.json["filename"]), (200, name), got.raw)
        for kind in ("multipart/form-data; Boundary=X", 'multipart/form-data; boundary="X"'):
            self.assertEqual(self.upload("filename=a.jsonl", kind).status, 200)

    def test_a_finished_file_stays_as_it_is(self):
        id = self.upload("filename=a.jsonl").json["id"]
        for path in (f"/__upload/{id}", f"/__upload/{id}/1"):
            self.assertEqual(self.ask("PUT", path, b"other", headers={}).status, 400)
        self.assertEqual(self.ask("GET", f"/v1/files/{id}/content").raw, b'{"a": 1}')
        self.assertEqual(self.ask("PUT", f"/__upload/{id}", b'{"a": 1}', headers={}).status, 200)

    def test_large_bodies_leave_the_record_alone(self):
        self.chat()
        body = b"." * (fake.MAX_RECORDED_BODY_BYTES + 1)
        with mock.patch.object(fake, "MAX_RECORD_BYTES", 9000):
            self.ask("PUT", "/nowhere", body)
        self.assertEqual(len(self.server.requests), 2)
        self.assertIsNone(self.server.requests[-1].body)


# === Text ===


def golden(number):
    return fake.HashRandom.of("golden", number)


class TextTests(unittest.TestCase):
    def test_golden(self):
        self.assertEqual(
            fake.make_text(golden(2), 2),
            "Under an open sky, this clear journey needs a good deal of open debate, even if"
            " patience matters more than talent. Besides, the simple version is usually right,"
            " while some problems solve themselves.",
        )

    def test_lengths(self):
        texts = [fake.make_text(golden(i)) for i in range(500)]
        self.assertEqual(len(set(texts)), 500)
        for text in texts:
            self.assertTrue(40 <= len(text.split()) <= 100, text)
            self.assertTrue(text.isascii() and text[0].isupper() and text[-1] == ".", text)
            self.assertNotRegex(text, r" ,|  |\.\.| \.|,,")

    def test_words_and_sentences(self):
        self.assertEqual(fake.make_text(golden(1), 9).count("."), 9)
        self.assertEqual(fake.make_thought(golden(1)).count("."), 3)


class TokenTests(unittest.TestCase):
    def test_join(self):
        everything = "".join(map(chr, range(0x3000))) + "\ud800\U0001f600 x  y\t\t z\n\n\n end "
        for text in (
            "",
            " ",
            "  a",
            "a \n b",
            " more than forty characters with a blank at both ends ",
            "more than forty characters and  two blanks in a row",
            "more than forty \u00e4\u00f6\u00fc\u65e5\u672c characters, 1234567 and a mark: \x7f.",
            everything,
            everything[::-1],
            fake.make_text(golden(1)),
        ):
            pieces = fake.split_tokens(text)
            self.assertEqual("".join(pieces), text)
            self.assertEqual(fake.count_tokens(text), len(pieces))
            self.assertTrue(all(0 <= fake.token_id(piece) < 128000 for piece in pieces))

    def test_golden(self):
        pieces = fake.split_tokens("Hello, unbelievable world 12345!\n\nIt's")
        wanted = "Hello|,| unbelie|vable| world| 123|45|!|\n\n|It|'|s"
        self.assertEqual("|".join(pieces), wanted)
        self.assertEqual(
            [fake.token_id(p) for p in fake.split_tokens("Hello, world")], [8578, 878, 85707]
        )

    def test_logprobs(self):
        from math import exp

        for i in range(400):
            for piece in (" river", "river", ",", " the", "\n", ""):
                found = fake.make_alternatives(golden(i), piece, 20)
                self.assertEqual(len({p for p, _ in found}), 20)
                self.assertEqual(found[0][0], piece)
                values = [value for _, value in found]
                self.assertEqual(values, sorted(values, reverse=True))
                self.assertLess(values[0], 0)
                self.assertLessEqual(sum(map(exp, values)), 1)
            self.assertEqual(fake.make_alternatives(golden(i), piece, 1), found[:1])


# === Vectors ===


class VectorTests(unittest.TestCase):
    def test_golden(self):
        vector = fake.make_vector("The llama is a camelid of the Andes", 768, b"model")
        self.assertEqual(vector[5:8], [0, 10784, 0])
        self.assertEqual(fake.format_floats(vector[5:8]), "0.0,0.10784,0.0")
        digest = hashlib.sha256(fake.pack_floats(vector)).hexdigest()
        self.assertEqual(digest[:16], "6da40ef7015c5dba")
        fake.make_word_vector.cache_clear()
        self.assertEqual(vector, fake.make_vector("THE LLAMA is a camelid: Andes", 768, b"model"))

    def test_norm(self):
        texts = [
            "",
            "!",
            "the",
            "caf\u00e9 \ud800",
            "x" * 999,
            "word " * 900,
            fake.make_text(golden(1)),
        ]
        for size in (1, 2, 3, 64, 1023, 4096):
            for text in texts:
                vector = fake.make_vector(text, size, b"k")
                self.assertEqual(len(vector), size)
                for part in {vector[:1] and 1, size // 2 or 1, size}:
                    norm = (
                        sum([q * q for q in fake.truncate_vector(vector, part)]) ** 0.5
                        / fake.QUANTUM
                    )
                    self.assertAlmostEqual(norm, 1, delta=3e-4)

    def test_likeness(self):
        def near(one, other):
            return fake.cosine_similarity(
                *(fake.make_vector(text, 768, b"m") for text in (one, other))
            )

        llama = "The llama is a camelid of the Andes"
        self.assertGreater(near(llama, "camelids near Peru: llama"), 0.3)
        self.assertLess(near(llama, "stock market prices"), 0.2)
        self.assertGreater(near("How do I reset my password?", "password reset instructions"), 0.4)
        self.assertAlmostEqual(near(llama, llama), 1, places=4)

    def test_long_words_are_not_remembered(self):
        fake.make_word_vector.cache_clear()
        fake.make_vector("x" * 100_000, 8, b"m")
        self.assertEqual(fake.make_word_vector.cache_info().currsize, 0)

    def test_no_two_texts_point_away_from_each_other(self):
        texts = [fake.make_text(golden(number), 1) for number in range(30)] + ["", "a", "?"]
        for size in (1, 7, 64, 768):
            vectors = [fake.make_vector(text, size, b"m") for text in texts]
            self.assertGreaterEqual(min(map(min, vectors)), 0)
            cut = [fake.truncate_vector(vector, size // 2 or 1) for vector in vectors]
            self.assertGreaterEqual(min(map(min, cut)), 0)


# === Media ===


def read_png(data):
    """Return width, height, palette and decompressed rows; checks every CRC."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack_from(">I", data, place + 8 + size)[0]
        chunks[kind] = body
        place += 12 + size
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    return width, height, chunks[b"PLTE"], zlib.decompress(chunks[b"IDAT"])


class MediaTests(unittest.TestCase):
    def test_image_pixels(self):
        for number, width, height, wanted in (
            (1, 96, 64, "811d5bcc4b60b3fc"),
            (2, 96, 64, "e5a71c104a9d14fa"),
            (1, 1024, 1024, "8532f6bd83890b3c"),
        ):
            image = fake.make_image(golden(number), width, height)
            _, _, palette, rows = read_png(image)
            self.assertEqual(hashlib.sha256(palette + rows).hexdigest()[:16], wanted)

    def test_image_sizes(self):
        seen = set()
        for number, (width, height) in enumerate(
            [(1, 1), (1, 2), (2, 1), (3, 200), (200, 3), (1, 2048), (2048, 1), (333, 77)] * 4
        ):
            image = fake.make_image(golden(number), width, height)
            wide, high, palette, rows = read_png(image)
            self.assertEqual((wide, high, len(rows)), (width, height, (width + 1) * height))
            self.assertFalse(any(rows[:: width + 1]))
            indexes = set(rows)
            self.assertTrue(max(indexes) < len(palette) // 3 <= 256)
            seen.add(image)
        self.assertEqual(len(seen), 32)

    def test_wav(self):
        for encoding, letter in fake.ENCODINGS.items():
            for rate in (8000, 24000, 44100):
                samples = fake.make_speech(golden(1), "Hello there, friend.", rate, encoding)
                self.assertEqual(len(samples), rate * 6 // 5 * struct.calcsize(letter))
        samples = fake.make_speech(golden(1), "", 44100, "pcm_s16le")
        data = fake.wrap_wav(samples, 44100)
        self.assertEqual(struct.unpack_from("<I", data, 4)[0], len(data) - 8)
        self.assertAlmostEqual(fake.audio_seconds(data), 0.24)
        with wave.open(io.BytesIO(data)) as file:
            self.assertEqual((file.getnchannels(), file.getsampwidth()), (1, 2))
            self.assertEqual((file.getframerate(), file.getnframes()), (44100, 10584))

    def test_speech_golden(self):
        heads = ["6323c6b5674d", "8e41bac6f9ff"]
        for encoding, wanted in zip(fake.ENCODINGS, heads):
            samples = fake.make_speech(golden(1), "Hello there, friend", 16000, encoding)
            self.assertEqual(hashlib.sha256(samples).hexdigest()[:12], wanted)

    def test_seconds_of_hostile_audio(self):
        data = fake.wrap_wav(bytes(32000), 16000)
        self.assertEqual(fake.audio_seconds(data), 1)
        listed = data[:12] + b"LIST\x03\0\0\0abc\0" + data[12:]
        self.assertEqual(fake.audio_seconds(listed), 1)
        endless = data[:40] + b"\xff\xff\xff\xff" + data[44:]
        self.assertEqual(fake.audio_seconds(endless), 1)
        for cut in range(60):
            self.assertLessEqual(fake.audio_seconds(data[:cut]), 1)
        zeros = b"RIFF\0\0\0\0WAVE" + bytes(100000)
        self.assertGreaterEqual(fake.audio_seconds(zeros), 0)
        no_rate = data[:24] + bytes(8) + data[32:]
        self.assertEqual(fake.audio_seconds(no_rate), 2)
        self.assertEqual(fake.audio_seconds(bytes(16000)), 1)

    def test_a_jpeg_has_no_marker_in_its_scan(self):
        row = b"\0" + bytes([0, 0, 1, 1] * 8)  # black and white, which differ by eight ones
        image = fake.encode_jpeg(128, 16, [row] * 4, bytes([0] * 3 + [255] * 3))
        scan = image[image.index(b"\xff\xda") + 14 : -2]
        self.assertGreater(scan.count(b"\xff\0"), 0)
        self.assertEqual(scan.count(b"\xff"), scan.count(b"\xff\0"))

    def test_video(self):
        video = fake.make_video(golden(1), 64, 36, 2, 24)
        boxes, place = {}, 0
        while place < len(video):
            size, kind = struct.unpack_from(">I4s", video, place)
            boxes[kind] = video[place + 8 : place + size]
            place += size
        self.assertEqual((place, list(boxes)), (len(video), [b"ftyp", b"mdat", b"moov"]))
        sizes = boxes[b"moov"].index(b"stsz")
        places = boxes[b"moov"].index(b"stco")
        count = struct.unpack_from(">I", boxes[b"moov"], sizes + 12)[0]
        self.assertEqual(count, 48)
        for frame in range(count):
            size = struct.unpack_from(">I", boxes[b"moov"], sizes + 16 + 4 * frame)[0]
            start = struct.unpack_from(">I", boxes[b"moov"], places + 12 + 4 * frame)[0]
            self.assertEqual(read_png(video[start : start + size])[:2], (64, 36))


# === Schemas ===

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
A_WHOLE = {"properties": {"a": WHOLE}}
NODE = {"$anchor": "n", "type": "array", "items": {"$ref": "#n"}}
# A schema, values that meet it, values that miss it: one row a keyword, limits at both sides.
KEYWORDS = (
    (TEXT, ["", "a"], [1, None]),
    (WHOLE, [1, 2.0, -3], [1.5, True, "1"]),
    ({"type": ["number", "null"]}, [1, 1.5, None], [True, "1", []]),
    ({"enum": [1, "a", [2], {"b": 1}]}, [1, 1.0, "a", [2], {"b": 1.0}], [True, 2, [3], {"b": 2}]),
    ({"const": False}, [False], [0, None]),
    ({"minimum": 2}, [2, 3, "a"], [1.9]),
    ({"maximum": 2}, [2, 1], [2.1]),
    ({"exclusiveMinimum": 2}, [2.1], [2]),
    ({"exclusiveMaximum": 2}, [1.9], [2]),
    ({"minimum": 2, "exclusiveMinimum": True}, [3], [2]),
    ({"maximum": 2, "exclusiveMaximum": False}, [2], [3]),
    ({"multipleOf": 0.5}, [1, 1.5, 0], [1.2]),
    ({"minLength": 2}, ["ab", 1], ["a"]),
    ({"maxLength": 2}, ["ab", ""], ["abc"]),
    ({"pattern": "^a|b$"}, ["ac", "cb", 1], ["ca", "bc"]),
    ({"minItems": 1}, [[1], 1], [[]]),
    ({"maxItems": 1}, [[1], []], [[1, 2]]),
    ({"uniqueItems": True}, [[1, True, "1", [1]], []], [[1, 1.0], [{"a": 1}, {"a": 1}]]),
    ({"uniqueItems": False}, [[1, 1]], []),
    ({"items": WHOLE}, [[1, 2], [], {}], [[1, "a"]]),
    ({"prefixItems": [WHOLE], "items": TEXT}, [[1, "a"], [1], []], [["a"], [1, 2]]),
    ({"items": [WHOLE], "additionalItems": TEXT}, [[1, "a"]], [[1, 2]]),
    ({"items": [WHOLE]}, [[1, "a"]], [["a"]]),
    ({"contains": WHOLE}, [["a", 1]], [["a"], []]),
    ({"contains": WHOLE, "minContains": 2}, [[1, 2]], [[1, "a"]]),
    ({"contains": WHOLE, "maxContains": 1}, [[1, "a"]], [[1, 2], []]),
    ({"prefixItems": [WHOLE], "unevaluatedItems": False}, [[1]], [[1, 2]]),
    ({"allOf": [{"prefixItems": [WHOLE]}], "unevaluatedItems": TEXT}, [[1, "a"]], [[1, 2]]),
    ({"contains": WHOLE, "unevaluatedItems": TEXT}, [[1, "a"]], [[1, None]]),
    ({"minProperties": 1}, [{"a": 1}], [{}]),
    ({"maxProperties": 1}, [{"a": 1}], [{"a": 1, "b": 1}]),
    ({"required": ["a", "b"]}, [{"a": 1, "b": 1}, []], [{"a": 1}]),
    (A_WHOLE, [{"a": 1}, {"b": "c"}], [{"a": "b"}]),
    ({"patternProperties": {"^a": WHOLE}}, [{"ab": 1, "b": "c"}], [{"ab": "b"}]),
    ({**A_WHOLE, "additionalProperties": TEXT}, [{"a": 1, "b": "c"}], [{"a": 1, "b": 1}]),
    (
        {"patternProperties": {"^a": {}}, "additionalProperties": False},
        [{"ab": 1}],
        [{"ab": 1, "b": 1}],
    ),
    ({"propertyNames": {"maxLength": 1}}, [{"a": 1}], [{"ab": 1}]),
    ({**A_WHOLE, "unevaluatedProperties": False}, [{"a": 1}], [{"a": 1, "b": 1}]),
    ({"anyOf": [A_WHOLE, {}], "unevaluatedProperties": False}, [{"a": 1}], [{"a": ""}, {"b": 1}]),
    ({"if": A_WHOLE, "unevaluatedProperties": False}, [{}, {"a": 1}], [{"a": ""}, {"b": 1}]),
    (
        {"dependentSchemas": {"a": {"properties": {"b": {}}}}, **A_WHOLE}
        | {"unevaluatedProperties": False},
        [{"a": 1, "b": 1}],
        [{"b": 1}],
    ),
    ({"dependentRequired": {"a": ["b"]}}, [{"a": 1, "b": 1}, {"b": 1}], [{"a": 1}]),
    ({"dependentSchemas": {"a": {"required": ["b"]}}}, [{"a": 1, "b": 1}, {}], [{"a": 1}]),
    ({"dependencies": {"a": ["b"], "c": {"required": ["d"]}}}, [{}], [{"a": 1}, {"c": 1}]),
    ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, [1, 2], [0, 3]),
    ({"anyOf": [{"minimum": 2}, {"maximum": 0}]}, [2, 0], [1]),
    ({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, [0, 3], [1, 2]),
    ({"not": WHOLE}, ["a"], [1]),
    ({"if": WHOLE, "then": {"minimum": 5}, "else": TEXT}, [5, "a"], [4, None]),
    ({"if": WHOLE, "then": {"minimum": 5}}, [5, None], [4]),
    ({"if": WHOLE, "else": TEXT}, [4, "a"], [None]),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": WHOLE}}, [1], ["a"]),
    ({"$ref": "#/x/0", "x": [WHOLE]}, [1], ["a"]),
    (NODE, [[], [[], [[]]]], [[1], [[[1]]]]),
    ({"$dynamicAnchor": "n", "type": "array", "items": {"$dynamicRef": "#n"}}, [[[]]], [[1]]),
    ({"$recursiveAnchor": True, "type": "array", "items": {"$recursiveRef": "#"}}, [[[]]], [[1]]),
    (
        {"$id": "http://e.org/a", "$ref": "b#/$defs/c"}
        | {"$defs": {"b": {"$id": "b", "$defs": {"c": WHOLE}}}},
        [1],
        ["a"],
    ),
    ({"id": "http://e.org/a", "$ref": "a#/x", "x": WHOLE}, [1], ["a"]),
    (
        {"$id": "urn:x:a", "$ref": "urn:x:a#b", "$defs": {"b": {"$id": "#b", **WHOLE}}},
        [1],
        ["a"],
    ),
)
# What used to be refused, or asks for much at once.
ENTANGLED = (
    {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": list("abcdefgh")}},
        "allOf": [
            {
                "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                "then": {"required": [kind], "properties": {kind: {"const": at}}},
            }
            for at, kind in enumerate("abcdefgh")
        ],
    },
    {**WHOLE, "not": {"allOf": [{"minimum": -999}, {"maximum": 999}]}},
    {**TEXT, "allOf": [{"pattern": "^ab"}, {"pattern": "-mid-"}, {"pattern": "yz$"}]},
    {**TEXT, "pattern": "^[ab]{3}$", "not": {"pattern": "^a"}},
    {**TEXT, "not": {"maxLength": 200}},
    {"required": ["a", "b"], **A_WHOLE, "not": {"properties": {"a": {"maximum": 999}, "b": {}}}},
    {"type": "array", "minItems": 2, "items": WHOLE, "not": {"items": {"minimum": -5}}},
    {"type": "array", "minItems": 3}
    | {"items": {"type": "object", **A_WHOLE, "not": {"properties": {"a": {"minimum": 10}}}}},
    {**TEXT, "pattern": "(?i)^AB[c-e]{3}$"},
    {
        "required": ["score", "url"],
        "properties": {
            "score": {**WHOLE, "exclusiveMaximum": 0},
            "url": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        },
    },
    {"type": "object", "oneOf": [{"required": [name]} for name in "abcdefgh"]},
    {**WHOLE, "minimum": 1, "maximum": 9, "oneOf": [{"minimum": 5}, {"maximum": 5}]},
    {"type": "object", "propertyNames": {"enum": ["a", "b", "c"]}, "minProperties": 3},
    {"type": "object", "not": {"anyOf": [{"required": [f"a{n}"]} for n in range(60)]}},
    {"type": "array", "items": {"enum": [1, 2]}, "contains": {"const": 1}, "minItems": 5}
    | {"minContains": 2, "maxContains": 2},
    {
        "required": ["a"],
        "properties": {"a": {"type": "boolean"}, "b": TEXT},
        "if": {"properties": {"a": {"const": True}}},
        "then": {"required": ["c"], "properties": {"b": False, "c": WHOLE}},
        "unevaluatedProperties": False,
    },
)
INSIDE = {"$ref": "#/$defs/n"}
# A schema, and the reason that is given.
IMPOSSIBLE = (
    (False, "#: no value is allowed here"),
    ({"anyOf": [False, {"allOf": [False]}]}, "#: no value is allowed here"),
    ({**WHOLE, "not": WHOLE}, "#: no value was found that meets type, not"),
    ({"allOf": [{"const": 1}, {"const": 2}]}, "#: no value was found that meets allOf, enum"),
    (
        {"required": ["a"], "properties": {"b": False}, "dependentRequired": {"a": ["b"]}}
        | {"type": "object"},
        "#: no value was found that meets required, properties, type, dependentSchemas",
    ),
    (
        {"type": "object", "required": ["z"], "unevaluatedProperties": False},
        "#/z: no value is allowed here",
    ),
    (
        {"type": "object", "required": ["ab"], "propertyNames": {"maxLength": 1}},
        "#: no value was found that meets type, required, propertyNames",
    ),
    (
        {"type": "array", "items": WHOLE, "contains": TEXT},
        "#/0: no value was found that meets type",
    ),
    (
        {"type": "array", "items": {"const": 1}, "contains": {"const": 1}, "maxContains": 1}
        | {"minItems": 2},
        "#/0: no value was found that meets enum, not",
    ),
    (
        {"type": "array", "items": {"enum": [1, 1.0]}, "uniqueItems": True, "minItems": 2},
        "#/1: no value was found that meets enum, not",
    ),
    (
        {"type": "array", "minItems": 3, "maxItems": 2},
        "#: no value was found that meets type, minItems, maxItems",
    ),
    (
        {
            **INSIDE,
            "$defs": {"n": {"type": "object", "required": ["n"]} | {"properties": {"n": INSIDE}}},
        },
        "#" + "/n" * 37 + ": nests too deep",
    ),
    ({"$ref": "#/$defs/none"}, "$ref '#/$defs/none': names nothing in this schema"),
    ({"$ref": "http://e.org/x"}, "$ref 'http://e.org/x#': names nothing in this schema"),
    ({"properties": {"a": {"type": "strin"}}}, "#/properties/a: type must be one of string, "),
    ({"dependencies": {"a": 1}}, "#/dependencies/a: a schema is an object or a boolean"),
    ({"required": ["a", 1]}, "#: required must be a string, not 1"),
    ({**TEXT, "pattern": "a{3,2}"}, "'a{3,2}': {3,2} has nothing to repeat, or no count"),
    ({**TEXT, "pattern": "*a"}, "'*a': * has nothing to repeat, or no count"),
    ({**TEXT, "pattern": r"[^\s\S]"}, r": [^\s\S] has no characters"),
    ({**TEXT, "pattern": "^a{3}$"} | {"maxLength": 2}, "no text of 0 to 2 characters was found"),
    ({**TEXT, "pattern": "^a$", "minLength": 5}, "no text of 5 to 10000 characters was found"),
    (
        {**TEXT, "minLength": 3, "maxLength": 2},
        "#: no value was found that meets type, minLength, maxLength",
    ),
)
A_TO_F = {"type": "object", "properties": dict.fromkeys("abcdef", WHOLE)}
# A schema, and the values that the first two draws give.
DRAWN = (
    ({**TEXT, "pattern": "^(?!.*xx)[xy]{4}$"}, "xyyx", "yyyx"),
    ({**TEXT, "pattern": "^(ab|c)+?$", "minLength": 5}, "abcccc", "abababc"),
    ({"type": ["null", "string"], "maxLength": 3}, "gen", "sim"),
    ({"type": ["string", "integer"], "maxLength": 2, "minLength": 3}, 47, 90),
    ({**TEXT, "not": {"minLength": 3}}, "", ""),
    ({"type": "array", "items": WHOLE, "not": {"minItems": 2}}, [], []),
    ({"type": "array", "contains": {"const": 7}, "minContains": 2}, [7, 7], [7, 7, "quick plan"]),
    ({**A_TO_F, "propertyNames": {"enum": ["a", "g"]}}, {"a": 19}, {"a": 9}),
    ({**A_TO_F, "not": {"required": ["c"]}}, {"b": 68, "e": 8, "f": 93}, {"e": 62, "f": 39}),
    (
        {**A_TO_F, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"a": 17, "c": 86, "d": 25},
        {"a": 9, "e": 62, "f": 39},
    ),
    (
        {**INSIDE, "$defs": {"n": {**A_TO_F, "required": ["a"], "properties": {"a": WHOLE}}}},
        {"a": 19},
        {"a": 9},
    ),
    (
        {**INSIDE, "$defs": {"n": {"type": "object", "properties": {"n": INSIDE, "v": WHOLE}}}},
        {"n": {}, "v": 20},
        {"n": {}, "v": 12},
    ),
    (
        {"items": {"anyOf": [{"type": "array", "minItems": 1, "items": INSIDE}, INSIDE]}}
        | {"type": "array", "$defs": {"n": {"enum": [1, 2]}}, "minItems": 2},
        [2, 1],
        [[1, 1], [1, 2, 2], 2],
    ),
)
HEAVY = (
    {"allOf": [{"anyOf": [{"const": n}, {"const": -n}]} for n in range(1, 60)]},
    {"allOf": [{"const": ["x" * 100] * 5000}] * 50},
    {**TEXT, "pattern": "".join(rf"[^\x00-\u0{100 + n}]" for n in range(300))},
    {"type": "array", "minItems": 100, "items": {"type": "array", "minItems": 100}},
)


def read_schema(schema):
    return fake.SchemaReader(schema)


def make_instance(schema, number=0):
    return fake.make_instance(fake.HashRandom.of("schema", number), schema)


class SchemaTests(unittest.TestCase):
    """Instances are valid, and what is valid is told keyword by keyword."""

    def test_keywords(self):
        for schema, met, missed in KEYWORDS:
            reader = read_schema(schema)
            for number, value in enumerate(met + missed):
                with self.subTest(schema=schema, value=value):
                    self.assertIs(reader.accepts(reader.root, value), number < len(met))

    def test_instances(self):
        for schema in (*(row[0] for row in KEYWORDS), *ENTANGLED):
            reader = read_schema(schema)
            for number in range(3):
                with self.subTest(schema=schema, number=number):
                    value = make_instance(schema, number)
                    self.assertTrue(reader.accepts(reader.root, value), value)
            self.assertEqual(value, make_instance(schema, number))

    def test_numbers_vary_within_their_bounds(self):
        for bounds in (
            {"minimum": 0, "maximum": 1},
            {"minimum": -1, "maximum": 1},
            {"minimum": 100},
            {"exclusiveMaximum": 1},
        ):
            for kind in ("number", "integer"):
                with self.subTest(bounds=bounds, kind=kind):
                    schema = {"type": kind, **bounds}
                    self.assertGreater(len({make_instance(schema, n) for n in range(20)}), 1)

    def test_a_number_goes_before_a_text(self):
        """As pydantic takes a Decimal, which may be any text by its schema."""
        for number in range(5):
            made = make_instance({"anyOf": [TEXT, {"type": "null"}, {"type": "number"}]}, number)
            self.assertIsInstance(made, float)

    def test_content_of_texts(self):
        inside = {"type": "object", "required": ["a"], **A_WHOLE}
        text = make_instance({**TEXT, "contentSchema": inside})
        self.assertIsInstance(json.loads(text)["a"], int)
        base64.b64decode(make_instance({**TEXT, "contentEncoding": "base64"}), validate=True)
        self.assertRegex(make_instance({**TEXT, "format": "phone"}), r"\A\+1-555-01\d\d\Z")

    def test_drawn(self):
        for schema, *wanted in DRAWN:
            with self.subTest(schema=schema):
                self.assertEqual([make_instance(schema, number) for number in range(2)], wanted)

    def test_maps_and_lists_are_not_empty(self):
        for keyword in ("additionalProperties", "unevaluatedProperties"):
            self.assertTrue(make_instance({"type": "object", keyword: WHOLE}))
        for number in range(5):
            names = make_instance({"type": "object", "patternProperties": {"^a": {}}}, number)
            self.assertTrue(names)
            self.assertFalse([name for name in names if name[0] != "a"])
        self.assertEqual(make_instance({"type": "object", "additionalProperties": False}), {})
        self.assertTrue(make_instance({"type": "array", "items": TEXT}))

    def test_what_fails_a_keyword_is_found(self):
        refused = []
        for schema, _, missed in KEYWORDS:
            if missed and "$" not in str(schema):
                with self.subTest(schema=schema):
                    reader = read_schema(schema)
                    try:
                        value = make_instance({"not": schema})
                    except fake.Unsatisfiable:
                        refused.append(schema)
                    else:
                        self.assertFalse(reader.accepts(reader.root, value), value)
        self.assertLess(len(refused), 9, refused)

    def test_nothing_is_left_to_the_garbage_collector(self):
        schema = {"$ref": "#/$defs/a", "$defs": {"a": {**TEXT, "pattern": "^[a-c]{3}$"}}}
        make_instance(schema)
        gc.collect()
        make_instance(schema)
        self.assertEqual(gc.collect(), 0)

    def test_impossible(self):
        for schema, reason in IMPOSSIBLE:
            with self.subTest(schema=schema):
                with self.assertRaises(fake.Unsatisfiable) as caught:
                    make_instance(schema)
                self.assertIn(reason, str(caught.exception))

    def test_the_work_is_bounded(self):
        with mock.patch.object(fake, "MAX_STEPS", fake.MAX_STEPS // 10):
            for schema in HEAVY:
                with self.subTest(str(schema)[:100]), self.assertRaises(fake.Unsatisfiable):
                    make_instance(schema)

    def test_long_repeats_are_quick(self):
        began = time.monotonic()
        for pattern in (".{0,5000}timeout", "[^,]{1,5000}@"):
            self.assertFalse(fake.Pattern(pattern).search("y" * 100_000))
            self.assertTrue(fake.Pattern(pattern).search("y" * 9_000 + "timeout@"))
        self.assertLess(time.monotonic() - began, PATIENCE)
        many = "[a-z]{0,9999}"
        text = make_instance({**TEXT, "minLength": 9990, "pattern": rf"^{many}-?{many}\d?{many}$"})
        self.assertGreaterEqual(len(text), 9990)

    def test_where_repeats_end(self):
        for pattern in ("ya{1,3}b", "a{2,3}b", "(a|y)a{3,4}y", "a{2,}y", "a{0,2}ya?b", "(?:a|)*b"):
            for text in ("yaab", "yaaaab", "ab", "aayaaay", "yab", "aaaayb"):
                with self.subTest(pattern=pattern, text=text):
                    found = re.search(pattern, text) is not None
                    self.assertIs(fake.Pattern(pattern).search(text), found)

    def test_formats(self):
        readers = {
            "ipv4network": ipaddress.IPv4Network,
            "ipv6network": ipaddress.IPv6Network,
            "ipvanyaddress": ipaddress.ip_address,
            "ipv6interface": ipaddress.IPv6Interface,
            "base64url": lambda text: base64.b64decode(text, b"-_", validate=True).decode("ascii"),
            "json-string": json.loads,
            "date": datetime.date.fromisoformat,
            "uuid": uuid.UUID,
        }
        for format, read in readers.items():
            with self.subTest(format=format):
                read(make_instance({**TEXT, "format": format}))
        for version in (1, 3, 4, 5, 6, 7):
            text = make_instance({**TEXT, "format": f"uuid{version}"})
            self.assertEqual(uuid.UUID(text).version, version)
        json.loads(make_instance({**TEXT, "contentMediaType": "application/json"}))
        email = make_instance({**TEXT, "format": "name-email"})
        self.assertRegex(email, r"\A\w+ \w+ <\S+@\S+>\Z")


# === Fixtures ===


def asked(body=None, kind="chat", path=CHAT, **headers):
    """Return what fixtures ask about a request, as the pipeline has it."""
    names = {name.replace("_", "-").lower(): value for name, value in headers.items()}
    request = Request("POST", path, headers=names)
    request.body = {} if body is None else body
    return fake.MatchFacts(kind, request)


def talk(*messages, **fields):
    """Return the facts of a chat request made of "role: text" lines."""
    pairs = [line.split(": ", 1) for line in messages]
    return asked({"messages": [{"role": r, "content": t} for r, t in pairs], **fields})


def file_of(*entries):
    return {"fixtures": list(entries)}


def entry(match, response="ok", **options):
    said = {"content": response} if isinstance(response, str) else response
    return {"match": match, "response": said, **options}


def script_of(*entries, seed=0, in_file=False):
    script = fake.Fixtures(seed)
    fixtures = fake.parse_fixtures(file_of(*entries))
    script.replace_files(fixtures) if in_file else script.add(fixtures)
    return script


def find(script, facts):
    """Return the fixture that answers a request, counted as served."""
    return script.find(facts)[0]


def content_of(fixture):
    return fixture and fixture.normal.get("content")


def save_fixtures(folder, **files):
    """Write fixture files: their names without .json, in which `__` is a slash, and entries."""
    for name, entries in files.items():
        path = Path(folder, *name.split("__")).with_suffix(".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(file_of(*entries)), "utf-8")


TOOL_TALK = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "18 degrees"}]},
]
PARTS = json.loads("""[{"role": "user", "content":
    [{"type": "text", "text": "hel"}, {"type": "image_url"}, {"type": "text", "text": "lo"}]}]""")
PICTURE_LAST = say("describe") + say([{"type": "image_url"}])
AS_JSON = {"type": "json_object"}
WITH_A_TOOL = asked({"messages": [], "tools": [tool("get_weather")]})
# (match, request, whether it holds)
MATCHES = [
    ({}, talk("user: x"), True),
    ({"userMessage": "hello"}, talk("user: well, hello you"), True),
    ({"userMessage": "hello"}, talk("user: Hello"), False),
    ({"userMessage": "hello"}, talk("user: hello", "assistant: hi", "user: bye"), False),
    ({"userMessage": "hello"}, asked({"messages": PARTS}), True),
    ({"userMessage": "describe"}, asked({"messages": PICTURE_LAST}), True),
    ({"userMessage": "x"}, talk("system: x"), False),
    ({"userMessage": {"pattern": "(?i)^HEL+O$"}}, talk("user: hello"), True),
    ({"userMessage": {"pattern": "^x"}}, talk("user: hello"), False),
    ({"userMessage": None}, talk("user: hello"), True),
    ({"systemMessage": "brief"}, talk("system: Be brief.", "user: x"), True),
    ({"systemMessage": "a\nb"}, talk("system: a", "user: x", "system: b"), True),
    ({"systemMessage": ["a", "b"]}, talk("system: a", "system: b"), True),
    ({"systemMessage": ["a", "z"]}, talk("system: a", "system: b"), False),
    ({"systemMessage": {"pattern": "^a"}}, talk("system: a"), True),
    ({"systemMessage": "a"}, talk("user: a"), False),
    ({"toolCallId": "call_1"}, asked({"messages": TOOL_TALK}), True),
    ({"toolCallId": "call_2"}, asked({"messages": TOOL_TALK}), False),
    ({"toolCallId": "call_1"}, asked({"messages": [*TOOL_TALK, {"role": "user"}]}), False),
    ({"toolCallId": {"pattern": "^call_"}}, asked({"messages": TOOL_TALK}), True),
    ({"toolResultContains": "18 deg"}, asked({"messages": TOOL_TALK}), True),
    ({"toolResultContains": "snow"}, asked({"messages": TOOL_TALK}), False),
    ({"toolName": "get_weather"}, WITH_A_TOOL, True),
    ({"toolName": "weather"}, WITH_A_TOOL, False),
    ({"toolName": {"pattern": "weather$"}}, WITH_A_TOOL, True),
    ({"model": "qwen"}, talk("user: x", model="qwen"), True),
    ({"model": "qwen"}, talk("user: x", model="qwen-2024"), True),
    ({"model": "qwen"}, talk("user: x", model="qwen-max"), False),
    ({"model": "qwen"}, talk("user: x"), False),
    ({"model": "Qwen/Qwen3"}, talk("user: x", model="Qwen/Qwen3-8B"), False),
    ({"model": "Qwen/Qwen3"}, talk("user: x", model="Qwen/Qwen3"), True),
    ({"model": {"pattern": "^Qwen/"}}, talk("user: x", model="Qwen/Qwen3"), True),
    ({"responseFormat": "json_object"}, talk("user: x", response_format=AS_JSON), True),
    ({"responseFormat": "json_object"}, talk("user: x"), False),
    ({"endpoint": "chat"}, talk("user: x"), True),
    ({"endpoint": "completion"}, talk("user: x"), False),
    ({"endpoint": "POST /v1/chat/completions"}, talk("user: x"), True),
    ({"endpoint": "POST /v1/completions"}, talk("user: x"), False),
    ({"endpoint": {"pattern": "^POST /v1/chat"}}, talk("user: x"), True),
    ({"hasToolResult": True}, asked({"messages": TOOL_TALK}), True),
    ({"hasToolResult": True}, asked({"messages": [*TOOL_TALK, {"role": "user"}]}), False),
    ({"hasToolResult": False}, asked({"messages": [*TOOL_TALK, {"role": "user"}]}), True),
    ({"hasToolResult": True}, asked({"messages": [{"role": "tool"}]}), True),
    ({"context": "a"}, asked({"messages": []}, X_AIMock_Context="a"), True),
    ({"context": "a"}, asked({"messages": []}), False),
    ({"body": {"n": 2, "stop": ["a"]}}, asked({"n": 2, "stop": ["a", "b"], "x": 1}), True),
    ({"body": {"n": 2}}, asked({"n": 2.0}), True),
    ({"body": {"n": 1}}, asked({"n": True}), False),
    ({"body": {"stop": ["b"]}}, asked({"stop": ["a", "b"]}), False),
    ({"body": {"user": None}}, asked({}), False),
    ({"headers": {"X-Test": "1"}}, asked({}, X_Test="1"), True),
    ({"headers": {"X-Test": "1"}}, asked({}, X_Test="12"), False),
    ({"headers": {"X-Test": {"pattern": "^1"}}}, asked({}, X_Test="12"), True),
    ({"headers": {"X-Test": {"pattern": ""}}}, asked({}), False),
    ({"headers": {"X-Test": {"pattern": ""}}}, asked({}, X_Test="any"), True),
    ({"not": {"userMessage": "x"}}, talk("user: x"), False),
    ({"not": {"userMessage": "x"}}, talk("user: y"), True),
    ({"not": {"userMessage": {"pattern": "x"}, "model": "m"}}, talk("user: x", model="n"), True),
    ({"userMessage": "a cat"}, asked({"prompt": "a cat"}, "completion"), True),
    ({"inputText": "a cat"}, asked({"prompt": ["a", "cat"]}, "completion"), True),
    ({"inputText": "x"}, talk("user: x"), False),
]


def text_of(content, *blocks, **more):
    """Return the normal form of a response of type text."""
    blocks = [{"type": "text", "text": each} if isinstance(each, str) else each for each in blocks]
    calls = [block for block in blocks if block["type"] == "tool_call"]
    return {"blocks": blocks, "content": content, "tool_calls": calls, "reasoning": None, **more}


def read_pairs(text):
    """Return [(JSON of a line, the text of the line under it)]."""
    lines = text.strip("\n").splitlines()
    return [(json.loads(one), other.strip()) for one, other in zip(lines[::2], lines[1::2])]


BOTH = "chat completion response"
A_JSON = '{"a":[1,"é"]}'
F = {"name": "f", "arguments": {"a": 1}}
G = {"name": "f", "arguments": "{}", "id": "c"}
F_CALL = {"type": "tool_call", "name": "f", "arguments": '{"a":1}', "id": None}
G_CALL = {"type": "tool_call", **G}
B_AND_C = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
NAMES = {"id": "i", "created": 7, "model": "m", "usage": {"prompt_tokens": 1}, "role": "assistant"}
# (response, kinds of endpoint, normal form) of those of type text
TEXT_RESPONSES = [
    ({"content": "hi"}, BOTH, text_of("hi", "hi")),
    (
        {"content": {"a": [1, "é"]}, "reasoning": "why"},
        BOTH,
        text_of(A_JSON, A_JSON, reasoning="why"),
    ),
    ({"toolCalls": [F], "content": None}, "chat response", text_of(None, F_CALL)),
    ({"content": "x", "toolCalls": [G]}, BOTH, text_of("x", "x", G_CALL)),
    ({"blocks": [{"type": "toolCall", **F}, *B_AND_C]}, BOTH, text_of("bc", F_CALL, "b", "c")),
    ({"content": "x", "finishReason": "length"}, BOTH, text_of("x", "x", finish_reason="length")),
    ({"content": "x", **NAMES}, BOTH, text_of("x", "x", **NAMES)),
]

# A response, and under it its kind, the kinds of endpoint it serves, and its normal form.
EVERY = " ".join(("", *fake.OPERATIONS))  # "" stands for what has no kind
RESPONSES = read_pairs(r"""
{"error": {"message": "no"}}
    error | every | {"status": 500, "error": {"message": "no"}}
{"status": 429, "retryAfter": 3}
    error | every | {"status": 429, "retry_after": 3}
{"embedding": [1, 2.5]}
    embedding | embedding | {"vectors": [[1, 2.5]]}
{"embedding": [[1], [2]]}
    embedding | embedding | {"vectors": [[1], [2]]}
{"image": {"b64Json": "YWE=", "revisedPrompt": "p"}}
    image | image | {"images": [{"b64_json": "YWE=", "revised_prompt": "p"}]}
{"images": [{"url": "u"}, {"url": "v"}]}
    image | image | {"images": [{"url": "u"}, {"url": "v"}]}
{"audio": "UklGRg=="}
    audio | speech voice | {"audio": "RIFF", "content_type": null, "format": null}
{"audio": {"b64Json": "UklGRg==", "contentType": "audio/wav"}}
    audio | speech voice | {"audio": "RIFF", "content_type": "audio/wav", "format": null}
{"transcription": {"text": "t", "language": "en", "duration": 1.5, "words": [{}], "segments": []}}
    transcription | transcription translation realtime | the same
{"video": {"id": "v", "status": "failed", "url": "u", "error": "e"}}
    video | video | the same
{"scores": [0.5, -1]}
    rerank | rerank | {"scores": [0.5, -1]}
{"json": null}
    body | every | {"body": "null"}
{"json": {"a": 1}, "status": 201}
    body | every | {"body": "{\"a\":1}", "status": 201}
""")
# A file, and under it the whole sentence that refuses it.
BAD_FILES = read_pairs(r"""
"x"
    file: must be an object, not "x"
{"fixtures": [], "fixture": []}
    file.fixture: unknown key, did you mean fixtures?
{"fixtures": {}}
    file.fixtures: must be an array, not {}
{"fixtures": ["x"]}
    fixtures[0]: must be an object, not "x"
{"fixtures": [{"response": {"content": "x"}}]}
    fixtures[0].match: is missing
{"fixtures": [{"match": {}}]}
    fixtures[0]: needs a response, or an option such as latency
{"fixtures": [{"match": {}, "latency": 1}, {"match": {"not": {"modle": "x"}}, "latency": 1}]}
    fixtures[1].match.not.modle: unknown key, did you mean model?
""")
# The same of files with one entry, in which what is not said here is good.
BAD_ENTRIES = read_pairs(r"""
{"match": {"userMesage": "x"}}
    fixtures[0].match.userMesage: unknown key, did you mean userMessage?
{"match": {"not": {"turnIndex": 1}}}
    fixtures[0].match.not.turnIndex: unknown key
{"match": {"not": {}}}
    fixtures[0].match.not: must have at least 1 items, not 0
{"match": {"systemMessage": []}}
    fixtures[0].match.systemMessage: must have at least 1 items, not 0
{"match": {"systemMessage": ["a", 1]}}
    fixtures[0].match.systemMessage[1]: must be a string, not 1
{"match": {"userMessage": 1}}
    fixtures[0].match.userMessage: must be a string or an object, not 1
{"match": {"userMessage": {"patern": "x"}}}
    fixtures[0].match.userMessage.patern: unknown key, did you mean pattern?
{"match": {"userMessage": {"pattern": "("}}}
    fixtures[0].match.userMessage.pattern: must be a regular expression that compiles, not "("
{"match": {"not": {"model": {"pattern": "*"}}}}
    fixtures[0].match.not.model.pattern: must be a regular expression that compiles, not "*"
{"match": {"hasToolResult": 1}}
    fixtures[0].match.hasToolResult: must be a boolean, not 1
{"match": {"turnIndex": -1}}
    fixtures[0].match.turnIndex: must be at least 0, not -1
{"match": {"sequenceIndex": true}}
    fixtures[0].match.sequenceIndex: must be an integer, not true
{"match": {"endpoint": "chats"}}
    fixtures[0].match.endpoint: "chats" is unknown, did you mean chat?
{"match": {"endpoint": "image"}}
    fixtures[0].match.endpoint: image cannot serve a response of type text
{"match": {"body": []}}
    fixtures[0].match.body: must be an object, not []
{"match": {"headers": {"a": 1}}}
    fixtures[0].match.headers[a]: must be a string or an object, not 1
{"response": {}}
    fixtures[0].response: has none of the keys that say what to answer: status
{"response": {"contents": "x"}}
    fixtures[0].response.contents: unknown key, did you mean content?
{"response": {"error": {"message": "x"}, "content": "x"}}
    fixtures[0].response.content: does not go with a response of type error
{"response": {"content": "x", "status": 500}}
    fixtures[0].response.status: does not go with a response of type text
{"response": {"content": 1}}
    fixtures[0].response.content: must be a string or an object or an array, not 1
{"response": {"toolCalls": [{"name": "f"}]}}
    fixtures[0].response.toolCalls[0].arguments: is missing
{"response": {"blocks": [{"type": "text"}]}}
    fixtures[0].response.blocks[0].text: is missing
{"response": {"blocks": [{"type": "image"}]}}
    fixtures[0].response.blocks[0].type: must be one of text, toolCall, not "image"
{"response": {"error": {"type": "x"}}}
    fixtures[0].response.error.message: is missing
{"response": {"status": 200}}
    fixtures[0].response.status: must be at least 400, not 200
{"response": {"error": {"message": "x"}, "status": 99}}
    fixtures[0].response.status: must be at least 200, not 99
{"response": {"embedding": ["a"]}}
    fixtures[0].response.embedding[0]: must be a number or an array, not "a"
{"response": {"embedding": [1, [2]]}}
    fixtures[0].response.embedding: must be numbers, or a list of numbers each
{"response": {"images": [{"url": "https://e.org/a"}, {}]}}
    fixtures[0].response.image: says nothing
{"response": {"audio": "*"}}
    fixtures[0].response.audio: must be base64, not "*"
{"response": {"scores": [NaN]}}
    fixtures[0]: holds what JSON cannot say: Out of range float values are not JSON compliant
{"response": {"content": "x", "created": -1}}
    fixtures[0].response.created: must be at least 0, not -1
{"response": {"content": "x", "usage": {"prompt_tokens": {"a": 1}}}}
    fixtures[0].response.usage.prompt_tokens: must be a number, not {"a": 1}
{"latncy": 1}
    fixtures[0].latncy: unknown key, did you mean latency?
{"latency": -1}
    fixtures[0].latency: must be at least 0, not -1
{"times": -1}
    fixtures[0].times: must be at least 1, not -1
{"chunkSize": 0}
    fixtures[0].chunkSize: must be at least 1, not 0
{"truncateAfterChunks": 0}
    fixtures[0].truncateAfterChunks: must be at least 1, not 0
{"streamingProfile": {"tps": 0}}
    fixtures[0].streamingProfile.tps: must be at least 0.001, not 0
{"replaySpeed": 0}
    fixtures[0].replaySpeed: must be at least 0.001, not 0
{"recordedTimings": {"interChunkDelaysMs": [1, -1]}}
    fixtures[0].recordedTimings.interChunkDelaysMs[1]: must be at least 0, not -1
{"chaos": {"dropRate": 1.5}}
    fixtures[0].chaos.dropRate: must be at most 1, not 1.5
{"chaos": {"droprate": 1}}
    fixtures[0].chaos.droprate: unknown key, did you mean dropRate?
{"shouldRetry": "no"}
    fixtures[0].shouldRetry: must be a boolean, not "no"
""")


def mask(kind, data=b"", last=True, size=None, key=b"\x37\xfa\x21\x3d"):
    """Return the frame of a client; `size` tells how its length is written."""
    code, count = size or ((len(data), 0) if len(data) < 126 else (126, 2))
    if len(data) > 65535:
        code, count = 127, 8
    head = bytes([kind | 128 * last, 128 | code]) + (
        len(data).to_bytes(count, "big") if count else b""
    )
    pad = (key * (len(data) // 4 + 1))[: len(data)]
    masked = int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")
    return head + key + masked.to_bytes(len(data), "big")


class FrameTests(unittest.TestCase):
    """What a client may send over a socket: cases of the Autobahn test suite, as bytes."""

    def read(self, data, step):
        """Return the messages and pings that a socket hears, and the code with which it closes."""
        found = []

        def hear(message):
            line.write(socket.unsent)
            socket.unsent = b""
            found.extend((9, pong) for pong in line.take())
            found.append((1, message))

        request = Request("GET", "/")
        request.call = fake.Call(1, request, 0)
        socket = fake.Socket(TogetherAiServer(port=0), request)
        socket.open, socket.hear = bool, hear
        line = Line(socket)
        for at in range(0, len(data), step):
            line.on_bytes(data[at : at + step])
            found += [(9, each) if isinstance(each, bytes) else each for each in line.take()]
        return found

    def check(self, *cases):
        for name, data, *wanted in cases:
            for step in (len(data), 1, 3) if len(data) < 9000 else (len(data), 65536):
                with self.subTest(case=name, step=step):
                    self.assertEqual(self.read(data, step), wanted)

    def test_sizes(self):
        for size in (0, 1, 125, 126, 127, 128, 65535, 65536, 65537):
            text = ("*" * size).encode()
            self.check((f"1.1 {size}", mask(1, text), (1, text)))
            self.check((f"1.2 {size}", mask(2, b"\xfe" * size), 1003))  # only texts are known
        long = mask(1, b"abc", size=(127, 8))
        self.check(("a size that takes more bytes than it needs", long, (1, b"abc")))

    def test_frames_of_the_server_have_the_shortest_head(self):
        for size, head in (
            (0, b"\x81\0"),
            (125, b"\x81\x7d"),
            (126, b"\x81\x7e\0\x7e"),
            (65535, b"\x81\x7e\xff\xff"),
            (65536, b"\x81\x7f\0\0\0\0\0\1\0\0"),
        ):
            self.assertEqual(fake.write_frame(1, bytes(size)), head + bytes(size))

    def test_pings_and_pongs(self):
        self.check(
            ("2.1", mask(9), (9, b"")),
            ("2.3", mask(9, b"\0\xff\xfe"), (9, b"\0\xff\xfe")),
            ("2.4", mask(9, b"x" * 125), (9, b"x" * 125)),
            ("2.5", mask(9, b"x" * 126), 1002),
            ("2.7", mask(10)),
            ("2.11", mask(9, b"a") * 3, *[(9, b"a")] * 3),
        )

    def test_reserved_bits_and_kinds(self):
        for bits in (0x10, 0x20, 0x30, 0x40, 0x70):
            data = mask(1, b"a")
            self.check((f"3 {bits:x}", mask(1, b"b") + bytes([data[0] | bits]) + data[1:],
                        (1, b"b"), 1002))  # fmt: skip
        for kind in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
            self.check((f"4 {kind}", mask(1, b"a") + mask(kind), (1, b"a"), 1002))
        self.check(("no mask", b"\x81\x01a", 1002))

    def test_fragments(self):
        one, two = mask(1, b"frag", last=False), mask(0, b"ment")
        part = mask(0, b"..", last=False)
        self.check(
            ("5.1", mask(9, b"a", last=False), 1002),
            ("5.3", one + two, (1, b"fragment")),
            ("5.6", one + mask(9, b"p") + two, (9, b"p"), (1, b"fragment")),
            ("5.9", mask(0, b"a"), 1002),
            ("5.12", mask(0, b"a", last=False), 1002),
            ("5.15", one + two + part + mask(1, b"x"), (1, b"fragment"), 1002),
            ("5.18", one + mask(1, b"b"), 1002),
            ("5.19", one + part + mask(9) + part + two, (9, b""), (1, b"frag....ment")),
            ("6.1", mask(1, b"", last=False) + mask(0, b"", last=False) + mask(0), (1, b"")),
            ("empty ones do not add up", one + mask(0, last=False) * 999 + two, (1, b"fragment")),
        )

    def test_text_is_utf8(self):
        kosme = "κόσμε".encode()
        good = (kosme, "\U0010ffff\ufffe\0".encode(), b"\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbd")
        bad = (
            b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xe0\x80\xaf", b"\x80", b"\xfe",
            b"\xf8\x88\x80\x80\x80", b"\xed\xae\x80\xed\xb0\x80", kosme + b"\xce", b"\xf0\x9f\x98",
        )  # fmt: skip
        for text in good:
            self.check((f"6 {text!r}", mask(1, text), (1, text)))
            pieces = [
                mask(0 if at else 1, text[at : at + 1], last=False) for at in range(len(text))
            ]
            self.check((f"6.2 {text!r}", b"".join(pieces) + mask(0), (1, text)))
        for text in bad:
            self.check((f"6 {text!r}", mask(1, text), 1007))
        for text in bad[:-2]:  # told as soon as it is known
            self.check((f"6.4.1 {text!r}", mask(1, kosme + text, last=False), 1007))
            parts = mask(1, kosme + text[:1], last=False) + mask(0, text[1:] + b"a", last=False)
            self.check((f"6.4.2 {text!r}", parts, 1007))

    def test_a_close_has_a_code_that_may_be_sent(self):
        good = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4503, 4999)
        bad = (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
        for code in good:
            data = struct.pack(">H", code)
            self.check((f"7.7 {code}", mask(8, data + b"bye") + mask(1, b"x"), code))
        for code in bad:
            self.check((f"7.9 {code}", mask(8, struct.pack(">H", code)), 1002))
        self.check(
            ("7.3.1", mask(8), 0),
            ("7.3.2", mask(8, b"\x03"), 1002),
            ("7.5.1", mask(8, b"\x03\xe8\xce\xba\xed\xa0\x80"), 1007),
            ("7.1.2", mask(8, b"\x03\xe8") + mask(8, b"\x03\xe9"), 1000),
            ("7.1.3", mask(8, b"\x03\xe8") + mask(9, b"ping"), 1000),
        )

    def test_a_message_has_at_most_4_mb(self):
        self.assertEqual(fake.MAX_MESSAGE_BYTES, 4 * 2**20)
        most, half = b"x" * 2**17, b"x" * 2**16
        part = mask(1, half, last=False)
        with mock.patch.object(fake, "MAX_MESSAGE_BYTES", len(most)):
            self.check(("9 whole", mask(1, most), (1, most)))
            self.check(("9 fragments", part + mask(0, half), (1, most)))
            self.check(("9 too many", part + mask(0, half, last=False) + mask(0, b"x"), 1009))
        head = mask(1, b"", size=(127, 8))[:2] + (2**63).to_bytes(8, "big") + b"abcd"
        self.check(("9 refused before it comes", head, 1009))


class HandshakeTests(LocalCase):
    def refuse(self, path=REALTIME, **changed):
        """Return the status of a handshake in which some headers are others, or lack."""
        headers = {**UPGRADE, **{name.replace("_", "-"): text for name, text in changed.items()}}
        got = self.ask("GET", path, None, {n: text for n, text in headers.items() if text})
        return got.status

    def test_it_is_accepted_as_the_rfc_wants(self):
        got = self.ask("GET", REALTIME, None, UPGRADE)
        self.assertEqual(got.status, 101)
        self.assertEqual(got.headers["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        self.assertNotIn("sec-websocket-protocol", got.headers)
        offer = {"Sec-WebSocket-Extensions": "permessage-deflate"}
        self.assertNotIn(
            "sec-websocket-extensions",
            self.ask("GET", REALTIME, None, {**UPGRADE, **offer}).headers,
        )

    def test_its_refusals(self):
        self.assertEqual(self.refuse(Upgrade=""), 426)
        self.assertEqual(self.refuse(Connection="close"), 426)
        self.assertEqual(self.refuse(Sec_WebSocket_Version="8"), 426)
        got = self.ask("GET", REALTIME)
        self.assertEqual(got.headers["sec-websocket-version"], "13")
        for key in ("", "short", "dGhlIHNhbXBsZSBub25jZR==", "dGhlIHNhbXBsZSBub25jZQ== x"):
            self.assertEqual(self.refuse(Sec_WebSocket_Key=key), 400, key)
        self.assertEqual(self.refuse(Authorization=""), 401)
        self.assertEqual(self.refuse("/v1/realtime"), 400)
        self.assertEqual(self.refuse("/v1/realtime?model=no/such"), 404)
        self.assertEqual(self.refuse(REALTIME + "&input_audio_format=mp3"), 400)
        self.assertEqual(self.refuse(VOICE + "?model=no/such"), 404)
        self.assertEqual(self.refuse(VOICE), 101)

    def test_a_page_brings_its_key_where_it_can(self):
        protocols = "openai-beta.realtime-v1, openai-insecure-api-key.SECRET, realtime"
        foreign = {"Authorization": "", "Origin": "https://example.com"}
        self.assertEqual(self.refuse(**foreign), 403)
        self.assertEqual(self.refuse(**{**foreign, "Origin": "http://127.0.0.1"}), 401)
        self.assertEqual(self.refuse(Authorization="", Host="example.com"), 403)
        self.assertEqual(self.refuse(**{**foreign, "Sec_WebSocket_Protocol": "realtime"}), 403)
        for path, protocol in (
            (REALTIME + "&api_key=SECRET", ""),
            (REALTIME + "&authorization=Bearer%20SECRET", ""),
            (REALTIME, protocols),
        ):
            got = self.ask("GET", path, None, {
                **UPGRADE, "Authorization": "", "Origin": "https://example.com",
                **({"Sec-WebSocket-Protocol": protocol} if protocol else {}),
            })  # fmt: skip
            self.assertEqual(got.status, 101)
            chosen = "realtime" if protocol else None
            self.assertEqual(got.headers.get("sec-websocket-protocol"), chosen)
            self.assertNotIn("SECRET", json.dumps(self.server.requests[-1].as_json()))
        self.assertEqual(self.refuse(REALTIME + "&api_key=", Authorization=""), 401)


class FixtureTests(unittest.TestCase):
    def test_each_match_key(self):
        for match, facts, holds in MATCHES:
            with self.subTest(match=match, body=facts["body"]):
                found = find(script_of(entry(match)), facts)
                self.assertEqual(content_of(found), "ok" if holds else None)

    def test_each_response_kind(self):
        rows = [(said, "text", kinds, normal) for said, kinds, normal in TEXT_RESPONSES]
        for said, row in RESPONSES:
            kind, kinds, normal = row.split(" | ")
            normal = said[kind] if normal == "the same" else json.loads(normal)
            rows.append((said, kind, kinds, normal))
        for said, kind, kinds, normal in rows:
            with self.subTest(said=said):
                for name in {"audio", "body"} & normal.keys():
                    normal[name] = normal[name].encode()
                fixture = fake.parse_fixtures(file_of(entry({}, said)))[0]
                served = (EVERY if kinds == "every" else kinds).split(" ")
                fits = set(filter(fixture.fits, ("", *fake.OPERATIONS)))
                self.assertEqual((fixture.type.name, fits), (kind, set(served)))
                self.assertEqual(fixture.normal, normal)

    def test_input_text_of_each_kind(self):
        kinds = "embedding image rerank speech video completion"
        fields = "input prompt query input prompt prompt"
        for kind, field in zip(kinds.split(), fields.split()):
            with self.subTest(kind=kind):
                error = {"error": {"message": "x"}}
                script = script_of(entry({"inputText": "a cat"}, error))
                self.assertIsNotNone(find(script, asked({field: "see a cat"}, kind)))
                self.assertIsNone(find(script, asked({field: "see a dog"}, kind)))

    def test_response_serves_only_the_kinds_it_fits(self):
        script = script_of(entry({}, {"scores": [1]}), entry({}, {"embedding": [1]}), entry({}))
        self.assertEqual(find(script, asked({}, "rerank")).type.name, "rerank")
        self.assertEqual(find(script, asked({}, "embedding")).type.name, "embedding")
        self.assertEqual(find(script, asked({}, "completion")).type.name, "text")
        self.assertIsNone(find(script, asked({}, "image")))
        self.assertIsNone(find(script, asked({}, "", "/v1/files")))

    def test_bad_files_are_refused_with_the_place(self):
        entries = [(file_of({**entry({}), **given}), said) for given, said in BAD_ENTRIES]
        for data, sentence in BAD_FILES + entries:
            with self.subTest(sentence=sentence):
                with self.assertRaises(ValueError) as caught:
                    fake.parse_fixtures(data)
                self.assertEqual(str(caught.exception)[: len(sentence)], sentence)
                self.assertNotIn("\n", str(caught.exception))

    def test_keys_of_other_providers_are_ignored_with_one_warning(self):
        said = {"content": "x", "webSearches": ["a"], "provider": "p"}
        fixtures = fake.parse_fixtures(
            file_of(
                entry({}, said, metadata={}, openRouterProcessing=True),
                entry({"endpoint": "fal"}, {"live": {}}),
                entry({"endpoint": "openai-live"}, {"live": {}}),
                entry({}, {"audio": "UklGRg==", "toolCalls": []}),
            ),
            "a.json",
        )
        self.assertEqual(len(fixtures), 2)
        self.assertEqual(
            fixtures.warnings,
            [
                "a.json: ignored, for other providers only: endpoint fal, endpoint openai-live,"
                " metadata, openRouterProcessing, provider, toolCalls, webSearches"
            ],
        )

    def test_comments_and_the_forms_of_a_file(self):
        one = {"match": {"userMessage": "hi", "_why": "a note"}, "response": {"content": "x"}}
        noted = {**one, "_comment": ["any"], "response": {"content": "x", "_by": 1}}
        for data, count in (
            (one, 1),
            ([one, noted], 2),
            ({"_meta": {}, "meta": {"by": 1}, "_comment": "x", "fixtures": [noted]}, 1),
            ([], 0),
        ):
            with self.subTest(data=data):
                fixtures = fake.parse_fixtures(data, "a.json")
                self.assertEqual((len(fixtures), fixtures.warnings), (count, []))
        self.assertEqual(fixtures, [])
        kept = fake.parse_fixtures(noted)[0].entry
        self.assertEqual(kept, {"match": {"userMessage": "hi"}, "response": {"content": "x"}})
        for data in ({"met": {}, "fixtures": []}, [{"match": {"_": 1}, "respons": {}}]):
            with self.subTest(data=data), self.assertRaisesRegex(ValueError, "unknown key"):
                fake.parse_fixtures(data)

    def test_folder_is_loaded_by_name_files_before_folders(self):
        with tempfile.TemporaryDirectory() as folder:
            names = {name: [entry({}, name)] for name in ("z", "a__2", "a__b__0", "a__1", "b")}
            save_fixtures(folder, **names)
            Path(folder, "note.txt").write_text(json.dumps(file_of(entry({}))), "utf-8")
            script = fake.Fixtures()
            self.assertTrue(script.empty)
            loaded = script.load(folder)
            said = [content_of(each) for each in loaded]
            self.assertEqual(said, ["b", "z", "a__1", "a__2", "a__b__0"])
            self.assertEqual(loaded[4].source, "file a/b/0.json[0]")
            self.assertFalse(script.empty)
            self.assertEqual(len(script.load(os.path.join(folder, "z.json"))), 1)

    def test_templates_quote_the_request(self):
        facts = talk("system: S", 'user: a "q"', model="m", temperature=0.5, stop=["x", "y"])
        cases = [
            ("{{model}}/{{ lastUserMessage }}", 'm/a "q"'),
            ("{{systemMessage}} {{body.temperature}} {{body.stop.1}}", "S 0.5 y"),
            ("{{body.messages.0.role}}{{body.stop}}", 'system["x","y"]'),
            ("<{{body.nothing.here}}{{body.stop.9}}{{inputText}}>", "<>"),
            ("{{name}} {{ x y }} {{{model}}}", "{{name}} {{ x y }} {m}"),
            ({"q": "{{lastUserMessage}}"}, '{"q":"a \\"q\\""}'),
        ]
        for said, wanted in cases:
            with self.subTest(said=said):
                fixture = fake.parse_fixtures(file_of(entry({}, {"content": said})))[0]
                self.assertEqual(fixture.render("chat", facts.request)["content"], wanted)
        call = {"toolCalls": [{"name": "f", "arguments": '{"m": "{{model}}"}'}]}
        fixture = fake.parse_fixtures(file_of(entry({}, call)))[0]
        (made,) = fixture.render("chat", facts.request)["tool_calls"]
        self.assertEqual(made["arguments"], '{"m": "m"}')


class KeywordTests(unittest.TestCase):
    def build(self, **keywords):
        return fake.fixture_from_keywords("reply", keywords)

    def test_keywords_are_the_keys_in_snake_case(self):
        fixture = self.build(
            content="Hi",
            user_message=re.compile("he.*o", re.I),
            model="m",
            response_model="r",
            finish_reason="stop",
            times=1,
            chunk_size=3,
            system_message=("a", "b"),
            body={"n_x": 1},
            streaming_profile={"ttft": 5},
            chaos={"drop_rate": 0.5, "latencyMs": 1},
            reasoning=None,
            not_={"tool_name": "f"},
            headers={"X_a": re.compile("1")},
        )
        self.assertEqual(
            fixture.entry,
            {
                "match": {
                    "userMessage": {"pattern": "(?i)he.*o"},
                    "model": "m",
                    "systemMessage": ["a", "b"],
                    "body": {"n_x": 1},
                    "not": {"toolName": "f"},
                    "headers": {"X_a": {"pattern": "1"}},
                },
                "response": {"content": "Hi", "model": "r", "finishReason": "stop"},
                "times": 1,
                "chunkSize": 3,
                "streamingProfile": {"ttft": 5},
                "chaos": {"dropRate": 0.5, "latencyMs": 1},
            },
        )
        self.assertRegex(fixture.source, r"^reply\(\) at (.*/)?test_together_fake\.py:\d+$")
        self.assertEqual(fixture.chunk_sizes, [3])

    def test_tool_calls_images_and_errors(self):
        fixture = self.build(tool_calls=[{"name": "f", "arguments": {"to_do": 1}}])
        made = fixture.normal["tool_calls"][0]["arguments"]
        self.assertEqual(made, '{"to_do":1}')
        fixture = self.build(image={"b64_json": "YWE="})
        self.assertEqual(fixture.normal, {"images": [{"b64_json": "YWE="}]})
        fixture = self.build(status=429, retry_after=1, times=2)
        self.assertEqual(fixture.type.name, "error")
        fixture = self.build(disconnect_after_chunks=3)
        self.assertEqual((fixture.type.name, fixture.faulty), ("generated", True))

    def test_when_is_a_function_of_the_request(self):
        fixture = self.build(content="x", when=lambda request: request.body["n"] > 1)
        script = fake.Fixtures()
        script.add([fixture])
        self.assertIsNone(find(script, asked({"n": 1})))
        self.assertIs(find(script, asked({"n": 2})), fixture)

    def test_bad_keywords(self):
        server = TogetherAiServer(port=0)
        near = "() has no keyword 'user_mesage', did you mean user_message?"
        for verb, operation in (("reply", "x"), ("fail", 500), ("assert_called", "chat")):
            with self.subTest(verb=verb), self.assertRaises(TypeError) as caught:
                getattr(server, verb)(operation, user_mesage="x")
            self.assertEqual(str(caught.exception), verb + near)
        with self.assertRaises(TypeError) as caught:
            server.assert_called("chat", temperature=1)
        self.assertIn("'temperature' (of the body: body={'temperature': ", str(caught.exception))
        bad_chaos = {"content": "x", "chaos": {"drop_rat": 1}}
        for keywords, sentence in (
            ({"content": 1}, "reply().response.content: must be a string or an object"),
            ({"content": "x", "times": 0}, "reply().times: must be at least 1"),
            ({}, "reply(): needs a response, or an option such as latency"),
            ({"content": "x", "status": 429}, "reply().response.status: does not go with"),
            (bad_chaos, "reply().chaos.dropRat: unknown key, did you mean dropRate?"),
        ):
            with self.subTest(keywords=keywords), self.assertRaises(ValueError) as refused:
                self.build(**keywords)
            self.assertTrue(str(refused.exception).startswith(sentence), refused.exception)


class ScriptTests(unittest.TestCase):
    def test_turn_index_is_relaxed_in_files(self):
        def turn(index):
            return entry({} if index is None else {"turnIndex": index}, str(index))

        for turns, count, wanted in (
            ([0, 1, 2], 1, 1),
            ([0, 2], 1, 0),
            ([None, 1], 1, None),
            ([1, None], 1, 1),
            ([None, 0], 1, 0),
            ([2, None], 1, None),
            ([5, 3], 1, 3),
            ([None, None], 0, None),
            ([0, 0], 0, 0),
        ):
            with self.subTest(turns=turns, count=count):
                request = talk(*["assistant: x"] * count, "user: y")
                script = script_of(*map(turn, turns), in_file=True)
                self.assertEqual(content_of(find(script, request)), str(wanted))

    def test_sequence_index_and_times(self):
        script = script_of(
            entry({"userMessage": "x", "sequenceIndex": 0}, "first"),
            entry({"userMessage": "x", "sequenceIndex": 1}, "second"),
            entry({"userMessage": "x"}, "twice", times=2),
            entry({}, "rest"),
        )
        said = [content_of(find(script, talk("user: x"))) for _ in range(5)]
        self.assertEqual(said, ["first", "second", "twice", "twice", "rest"])
        self.assertEqual([each["served"] for each in script.describe()["fixtures"]], [1, 1, 2, 1])

    def test_times_and_the_place_in_a_sequence_are_counted_apart(self):
        script = script_of(
            entry({"userMessage": "x", "sequenceIndex": 0}, "first"),
            entry({"userMessage": "x", "sequenceIndex": 1}, "second", times=1),
            entry({"userMessage": "x", "sequenceIndex": 1}, "never"),
            entry({}, "rest"),
        )
        said = [content_of(find(script, talk("user: x"))) for _ in range(3)]
        self.assertEqual(said, ["first", "second", "rest"])
        self.assertEqual([each.served for each in script.every], [1, 1, 0, 1])

    def test_reset_begins_the_sequences_of_files_again(self):
        first = entry({"userMessage": "x", "sequenceIndex": 0}, "first")
        script = script_of(first, entry({}, "rest"), in_file=True)
        for _ in range(2):
            said = [content_of(find(script, talk("user: x"))) for _ in range(2)]
            self.assertEqual(said, ["first", "rest"])
            script.reset()

    def test_order_header_run_time_files(self):
        script = fake.Fixtures()
        with tempfile.TemporaryDirectory() as folder:
            save_fixtures(folder, f=[entry({}, "file")])
            script.load(os.path.join(folder, "f.json"))
        script.add(fake.parse_fixtures(file_of(entry({}, "run time", times=1))))
        own = json.dumps({"content": "own"})
        request = talk("user: x")
        self.assertEqual(content_of(find(script, asked({}, X_Parlel_Fixture=own))), "own")
        said = [content_of(find(script, request)) for _ in range(2)]
        self.assertEqual(said, ["run time", "file"])
        self.assertEqual(script.describe()["count"], 2)
        script.add(fake.parse_fixtures(file_of(entry({"turnIndex": 9}, "ahead"))))
        self.assertEqual(content_of(find(script, request)), "file")
        script.remove(*script.every)
        self.assertEqual([each["served"] for each in script.describe()["fixtures"]], [2])
        script.reset()
        self.assertEqual([each["served"] for each in script.describe()["fixtures"]], [0])
        self.assertEqual(len(script.unused()), 1)

    def test_header_forms(self):
        for text, kind in (
            ('{"status": 429}', "error"),
            ('{"content": "x", "provider": "p", "latency": 1}', "text"),
            ('{"disconnectAfterMs": 5}', "generated"),
            ('{"match": {}, "response": {"json": 1}}', "body"),
            ('{"response": {"content": "x"}, "latency": 1}', "text"),
        ):
            with self.subTest(text=text):
                found = find(fake.Fixtures(), asked({}, X_Parlel_Fixture=text))
                self.assertEqual(found.type.name, kind)
        match, at = "X-Parlel-Fixture.match", "X-Parlel-Fixture"
        for text, reason in (
            ("{", "Expecting property name"),
            ("[]", "X-Parlel-Fixture: must be an object, not []"),
            ('{"contnt": 1}', f"{at}.contnt: unknown key, did you mean content?"),
            ('{"content": "x", "latncy": 1}', f"{at}.latncy: unknown key, did you mean latency?"),
            ('{"match": {"modl": 1}}', f"{match}.modl: unknown key, did you mean model"),
        ):
            with self.subTest(text=text), self.assertRaises(fake.ApiError) as caught:
                find(fake.Fixtures(), asked({}, X_Parlel_Fixture=text))
            self.assertEqual(caught.exception.status, 400)
            message = caught.exception.message
            self.assertTrue(message.startswith("The fixture was refused: " + reason), message)

    def test_near_misses_name_the_first_difference(self):
        script = script_of(
            entry({"userMessage": "bye", "model": "m"}),
            entry({"model": "m"}),
            entry({}, {"scores": [1]}),
            entry({"sequenceIndex": 1}),
            entry({"not": {"userMessage": "hello"}}),
            entry({}, times=1),
            entry({}),
        )
        facts = talk("user: hello", model="n")
        find(script, facts)
        chosen, misses = script.find(facts)
        misses = fake.explain_misses(misses, facts, chosen)
        rows = [
            ("run time[3]", "match.sequenceIndex", "it was not the turn of sequenceIndex 1"),
            ("run time[4]", "match.not", "what it excludes holds"),
            ("run time[5]", "times", "it is used up: served 1 of 1"),
            ("run time[0]", "match.userMessage", 'userMessage "hello" does not contain "bye"'),
            ("run time[1]", "match.model", 'model "n" is not "m"'),
            ("run time[2]", "response", "it answers rerank, and this is chat"),
        ]
        names = ("fixture", "differs", "reason")
        self.assertEqual(chosen.source, "run time[6]")
        self.assertEqual(misses, [dict(zip(names, row)) for row in rows])
        error = script.miss_error(facts.request, misses[4:5])
        self.assertEqual(error.status, 404)
        start = 'No fixture matches POST /v1/chat/completions. run time[1]: model "n" is not "m".'
        self.assertEqual(error.message, start + " And 6 more.")

    def test_64_threads_share_one_sequence(self):
        script = script_of(*[entry({}, str(index), times=1) for index in range(128)])
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)  # they meet within each other's steps
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            found = pool.map(lambda _: content_of(find(script, talk("user: x"))), range(128))
        self.assertEqual(sorted(found, key=int), [str(index) for index in range(128)])


def result_of(call):
    return {"role": "tool", "tool_call_id": call["id"], "content": "42"}


class ScriptingCase(LocalCase):
    """A test with a server of its own, since loaded files outlive a reset."""

    def outcome(self, *messages, fixture=None, **fields):
        """Return the text of an answer, the names of its tool calls, or the status of an error."""
        said = [say(each)[0] if isinstance(each, str) else each for each in messages]
        headers = {} if fixture is None else {"X-Parlel-Fixture": json.dumps(fixture)}
        body = {"model": "m", "messages": said, **fields}
        got = self.ask("POST", CHAT, body, {**KEY, **headers})
        if got.status != 200:
            return got.status
        message = got.json["choices"][0]["message"]
        return [call["function"]["name"] for call in message["tool_calls"]] or message["content"]

    def list_fixtures(self):
        return self.json("GET", FIXTURES)["fixtures"]

    def load(self, **files):
        """Write fixture files into a folder, as save_fixtures() does, and load it."""
        with tempfile.TemporaryDirectory() as folder:
            save_fixtures(folder, **files)
            self.server.load(folder)


class ScriptingTests(ScriptingCase):
    """What a test's author scripts, over HTTP."""

    def test_one_mechanism_for_python_files_http_and_header(self):
        self.load(one=[entry({"userMessage": "hi"}, "from a file")])
        self.assertEqual(self.outcome("hi"), "from a file")
        added = file_of(entry({"userMessage": "hi"}, "over HTTP", times=1))
        got = self.json("POST", FIXTURES, added)
        self.assertEqual(got, {"ok": True, "added": 1, "numbers": [0], "warnings": []})
        self.server.reply("from Python", user_message="hi", times=1)
        self.assertEqual(self.outcome("hi", fixture={"content": "by header"}), "by header")
        said = [self.outcome("hi") for _ in range(3)]
        self.assertEqual(said, ["over HTTP", "from Python", "from a file"])
        self.assertEqual([each["served"] for each in self.list_fixtures()], [1, 1, 2])
        self.json("DELETE", FIXTURES)
        self.assertEqual(self.json("GET", FIXTURES)["count"], 1)
        self.server.reset()
        self.assertEqual(self.outcome("hi"), "from a file")

    def test_a_single_fixture_and_a_list_can_be_posted(self):
        self.json("POST", FIXTURES, entry({"userMessage": "one"}, "first"))
        self.json("POST", FIXTURES, [entry({"userMessage": "two"}, "second")])
        self.assertEqual([self.outcome("one"), self.outcome("two")], ["first", "second"])
        for body in (b"[", b"7", b'{"fixtures": {}}'):
            self.json("POST", FIXTURES, body, status=400)

    def test_removed_sequences_start_again(self):
        added = file_of(entry({"userMessage": "hi", "sequenceIndex": 0}, "first"))
        for _ in range(2):
            self.json("POST", FIXTURES, added)
            self.assertEqual(self.outcome("hi"), "first")
            self.json("DELETE", FIXTURES)

    def test_a_refused_request_uses_nothing_up(self):
        self.server.reply("still there", times=1)
        self.json("POST", CHAT, {"messages": say("no model")}, status=400)
        self.assertEqual(self.outcome("hi"), "still there")

    def test_nothing_of_a_bad_folder_or_request_is_loaded(self):
        good, bad = entry({}, "x"), entry({"userMesage": "hi"}, "x")
        with self.assertRaisesRegex(
            ValueError,
            r"^b\.json: fixtures\[1\]\.match\.userMesage: unknown key, did you mean userMessage\?$",
        ):
            self.load(a=[good], b=[good, bad])
        body = self.json("POST", FIXTURES, file_of(good, bad), status=400)
        self.assertIn("fixtures[1].match.userMesage", body["error"]["message"])
        self.assertEqual(self.json("GET", FIXTURES), {"fixtures": [], "count": 0})

    def test_values_that_cannot_be_sent_are_refused_when_loaded(self):
        surrogate = "\ud800"
        for response in ({"content": surrogate}, {"json": float("nan")}, {"images": []}):
            with self.subTest(response=response), self.assertRaises(ValueError):
                self.server.reply(**response)

    def test_agent_of_two_tool_rounds(self):
        search, fetch = ([{"name": name, "arguments": {}}] for name in ("search", "fetch"))
        search[0]["id"], fetch[0]["id"] = "call_1", "call_2"
        self.server.reply(tool_calls=search, has_tool_result=False, turn_index=0)
        self.server.reply(tool_calls=fetch, tool_call_id="call_1", turn_index=1)
        self.server.reply("Done.", tool_call_id="call_2", has_tool_result=True, turn_index=2)
        messages = say("go")
        for _ in range(2):
            message = self.chat(messages=messages)["choices"][0]["message"]
            messages += [message, result_of(message["tool_calls"][0])]
        self.assertEqual(self.outcome(*messages), "Done.")
        self.server.assert_all_used()

    def test_parallel_callers_script_by_header_alone(self):
        wanted = [f"caller {number}" for number in range(8)] * 4
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            outcomes = pool.map(lambda text: self.outcome("a", fixture={"content": text}), wanted)
        self.assertEqual(list(outcomes), wanted)

    def test_header_is_utf_8(self):
        fixture = json.dumps({"content": "\u00e9"}, ensure_ascii=False)
        fixture = fixture.encode().decode("latin-1")  # as heads are read
        got = self.post(CHAT, HELLO, {**KEY, "X-Parlel-Fixture": fixture}).json
        self.assertEqual(got["choices"][0]["message"]["content"], "\u00e9")

    def test_operation_is_matched_under_each_spelling_of_its_path(self):
        self.server.fail(418, endpoint="POST /v1/chat/completions")
        for path in (CHAT, "/v1" + CHAT, CHAT + "/"):
            with self.subTest(path=path):
                self.assertEqual(self.ask("POST", path, HELLO).status, 418)

    def test_templates_quote_the_request(self):
        self.server.reply("{{model}} at {{body.temperature}}: {{lastUserMessage}}{{body.none}}")
        self.assertEqual(self.outcome('say "x"', temperature=0.5), 'm at 0.5: say "x"')

    def test_total_of_scripted_usage(self):
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        self.server.reply("Hi", usage=usage)
        more = {"total_tokens": 10, "cached_tokens": 0}
        self.assertEqual(self.chat()["usage"], {**usage, **more})

    def test_what_surrounds_a_text_holds_whole_and_streamed(self):
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "cached_tokens": 4}
        around = {"created": 1234567890, "role": "tutor", "id": "mine", "usage": usage}
        self.server.reply("Hi", **around)
        for model in (LLAMA, OTHER, THINKER, KIMI_CODE):
            whole = self.chat(model=model)
            first, *_, last = self.stream(model=model)
            roles = [whole["choices"][0]["message"]["role"], first["choices"][0]["delta"]["role"]]
            self.assertEqual(roles, ["tutor"] * 2)
            for got in (whole, first):
                self.assertEqual((got["id"], got["created"]), ("mine", 1234567890))
            for got in (whole, last):
                self.assertEqual({**got["usage"], **usage}, got["usage"])

    def test_finish_reason_of_completions(self):
        self.server.reply("Hi", finish_reason="length")
        got = self.json("POST", "/v1/completions", {"model": "m", "prompt": "hi"})
        self.assertEqual(got["choices"][0]["finish_reason"], "length")

    def test_without_fixtures_nothing_changes(self):
        before = self.outcome("hi")
        self.server.reply("never", user_message="something else")
        self.assertEqual(self.outcome("hi"), before)

    def test_assert_all_used_names_what_was_never_served(self):
        self.server.reply("used", user_message="hi")
        self.server.reply("unused", user_message="bye")
        self.outcome("hi")
        with self.assertRaises(AssertionError) as caught:
            self.server.assert_all_used()
        self.assertIn('"userMessage": "bye"', str(caught.exception))
        self.assertNotIn('"userMessage": "hi"', str(caught.exception))


class ScriptedMissTests(LocalCase):
    """Servers that answer nothing but what is scripted."""

    options = MappingProxyType({"on_miss": "error"})

    def test_miss_lists_each_fixture_and_what_differed(self):
        self.server.reply("x", user_message="hello")
        self.server.reply(embedding=[1])
        body = {"model": "m", "messages": say("bye")}
        message = self.json("POST", CHAT, body, status=404)["error"]["message"]
        self.assertIn('user_message "bye" does not contain "hello". reply() at ', message)
        self.assertTrue(message.endswith("it answers embedding, and this is chat."), message)
        self.json("GET", "/v1/models")

    def test_the_miss_of_a_text_is_an_error_and_the_rest_is_generated(self):
        self.json("POST", CHAT, HELLO, status=404)
        for path in ("/v1/completions", "/v1/responses"):
            self.json("POST", path, {"model": "m", "prompt": "x", "input": "x"}, status=404)
        self.post("/v1/embeddings", {"model": "m", "input": "x"})
        self.post("/v1/rerank", RERANK)

    def test_it_can_be_said_for_each_kind(self):
        self.server.on_miss = {"embedding": "error", "chat": "generate"}
        embedding = {"model": "m", "input": "x"}
        self.post(CHAT, HELLO)
        self.json("POST", "/v1/embeddings", embedding, status=404)
        self.server.reply(endpoint="embedding")  # without a response: generate
        self.post("/v1/embeddings", embedding)
        self.server.script.remove(*self.server.script.every)
        self.json("POST", FIXTURES, {"match": {"endpoint": "embedding"}, "response": None})
        self.post("/v1/embeddings", embedding)

    def test_a_wrong_word_raises_when_it_is_set(self):
        for wrong, sentence in (
            ("eror", 'on_miss must be "generate", "error" or what for each kind'),
            ({"chat": "eror"}, "on_miss must be "),
            ({"embeddings": "error"}, "'embeddings' is no kind, did you mean embedding?"),
            (None, "on_miss must be "),
        ):
            with self.subTest(wrong=wrong):
                with self.assertRaises(ValueError) as caught:
                    self.server.on_miss = wrong
                self.assertIn(sentence, str(caught.exception))
                self.assertEqual(self.server.on_miss, "error")
                with self.assertRaises(ValueError):
                    TogetherAiServer(on_miss=wrong)


# === Faults ===


class Clock:
    """A clock that stands still but for waits; `drift` is lost with every wait."""

    def __init__(self, drift=0.0):
        self.now = 100.0
        self.drift = drift

    def wait(self, seconds):
        self.now += seconds + self.drift

    def read(self):
        return self.now


EVENTS = [b'data: {"n": %d}\n\n' % index for index in range(4)] + [b"data: [DONE]\n\n"]


def run(options, stream=True, seed=0, call=1, clock=None, events=EVENTS):
    """Send a reply through a fault: status, [(time, piece)], whether it was cut."""
    clock = clock or Clock()
    reply = fake.Reply(b'{"answer": 42}', events=iter(events) if stream else None)
    fault = fake.Fault(options, fake.HashRandom.of("fault", [seed, call]))
    reply = fake.apply_fault(reply, fault, clock.read)
    got, was_cut = [], False
    if reply.events is None:
        return reply.status, [(0, reply.body)], False
    try:
        for piece in reply.events:
            if isinstance(piece, float):
                clock.wait(piece)
            else:
                got.append((round(clock.now - 100, 6), piece))
    except fake.Cut:
        was_cut = True
    return reply.status, got, was_cut


ERROR_EVENT = b"data: %b\n\n" % fake.status_reply(500).body


class FaultTests(unittest.TestCase):
    def draw(self, script):
        fixture = find(script, talk("user: x"))
        return fake.draw_fault(script, fixture)

    def times(self, options, **more):
        return [at for at, _ in run(options, **more)[1]]

    def test_delays_of_a_stream(self):
        first, rate = {"ttft": 500}, {"tps": 10}
        timings = {"ttftMs": 100, "interChunkDelaysMs": [10, 30]}
        for options, wanted in (
            ({}, [0, 0, 0, 0, 0]),
            ({"latency": 10}, [0.01, 0.02, 0.03, 0.04, 0.04]),
            ({"latency": 10, "replaySpeed": 2}, [0.005, 0.01, 0.015, 0.02, 0.02]),
            ({"streamingProfile": {**first, **rate}, "latency": 3}, [0.5, 0.6, 0.7, 0.8, 0.8]),
            ({"streamingProfile": first, "latency": 3}, [0.5, 0.503, 0.506, 0.509, 0.509]),
            ({"streamingProfile": rate}, [0.1, 0.2, 0.3, 0.4, 0.4]),
            ({"recordedTimings": timings}, [0.1, 0.11, 0.14, 0.16, 0.16]),
            ({"recordedTimings": {"ttftMs": 100}, "replaySpeed": 4}, [0.025] * 5),
            ({"chaos": {"latencyMs": 50}}, [0.05] * 5),
        ):
            with self.subTest(options=options):
                self.assertEqual(self.times(options), wanted)

    def test_rate_is_kept_when_each_wait_is_late(self):
        events = [b"data: %d\n\n" % index for index in range(101)]
        profile = {"streamingProfile": {"ttft": 200, "tps": 50}}
        times = self.times(profile, clock=Clock(drift=0.004), events=events)
        self.assertAlmostEqual(times[0], 0.2, delta=0.02)
        self.assertAlmostEqual(100 / (times[-1] - times[0]), 50, delta=0.5)

    def test_jitter_stays_within_its_share_and_repeats(self):
        profile = {"streamingProfile": {"tps": 10, "jitter": 0.5}}
        times = self.times(profile)
        self.assertEqual(times, self.times(profile))
        self.assertNotEqual(times, self.times(profile, seed=1))
        steps = [b - a for a, b in zip([0, *times], times[:4])]
        self.assertTrue(all(0.05 <= step <= 0.15 for step in steps), steps)

    def test_ends_of_a_stream(self):
        for options, pieces, cut in [
            ({"truncateAfterChunks": 2}, EVENTS[:2], True),
            ({"disconnectAfterChunks": 3}, EVENTS[:3], True),
            ({"disconnectAfterChunks": 0}, [], True),
            ({"disconnectAfterChunks": 4}, EVENTS[:4], True),
            ({"disconnectAfterChunks": 9}, EVENTS, False),
            ({"disconnectAfterMs": 25, "latency": 10}, EVENTS[:2], True),
            ({"disconnectAfterMs": 0}, [], True),
            ({"disconnectAfterMs": 25}, EVENTS, False),
            ({"chaos": {"disconnectRate": 1}}, [], True),
            ({"errorAfterChunks": 1}, [EVENTS[0], ERROR_EVENT], False),
            ({"errorAfterChunks": 0}, [ERROR_EVENT], False),
            ({"malformed": True}, [b'data: {"n"\n\n', *EVENTS[1:]], False),
            ({"empty": True}, [b""], False),
        ]:
            with self.subTest(options=options):
                status, got, was_cut = run(options)
                self.assertEqual((status, [p for _, p in got], was_cut), (200, pieces, cut))
        error = json.loads(ERROR_EVENT[6:])["error"]
        self.assertEqual(
            (error["message"], error["type"]), ("Internal server error", "server_error")
        )
        self.assertEqual((error["param"], error["code"], len(error)), (None, None, 4))

    def test_whole_replies(self):
        for options, status, pieces, cut in [
            ({"latency": 30}, 200, [(0.03, b'{"answe'), (0.03, b'r": 42}')], False),
            ({"chaos": {"latencyMs": 20}}, 200, [(0.02, b'{"answe'), (0.02, b'r": 42}')], False),
            ({"disconnectAfterChunks": 3}, 200, [(0, b'{"answe')], True),
            ({"disconnectAfterChunks": 0}, 200, [], True),
            ({"disconnectAfterMs": 10, "latency": 20}, 200, [], True),
            ({"truncateAfterChunks": 1}, 200, [(0, b'{"answer": 42}')], False),
            ({"malformed": True}, 200, [(0, b'{"answe')], False),
            ({"empty": True}, 200, [(0, b"")], False),
            ({"chaos": {"malformedRate": 1}}, 200, [(0, b'{"answe')], False),
            ({"chaos": {"disconnectRate": 1}}, 200, [], True),
        ]:
            with self.subTest(options=options):
                self.assertEqual(run(options, stream=False), (status, pieces, cut))
        reply = fake.apply_fault(
            fake.Reply(b"12345"),
            fake.Fault({"disconnectAfterChunks": 1}, fake.HashRandom(b"")),
            Clock().read,
        )
        self.assertEqual(reply.headers["Content-Length"], "5")

    def test_an_empty_reply_keeps_its_name(self):
        reply = fake.Reply(b"12345", headers={"a": "b"})
        reply.id = "answer-1"
        clock = Clock()
        fault = fake.Fault({"empty": True}, fake.HashRandom(b""))
        got = fake.apply_fault(reply, fault, clock.read)
        self.assertEqual((got.id, got.headers, got.body), ("answer-1", {"a": "b"}, b""))

    def test_chaos_statuses(self):
        for options, status in [
            ({"chaos": {"dropRate": 1}}, 500),
            ({"errorAfterChunks": 3}, 500),
            ({"chaos": {"rateLimitRate": 1}}, 429),
        ]:
            for stream in (False, True) if status == 429 else (False,):
                with self.subTest(options=options, stream=stream):
                    self.assertEqual(run(options, stream=stream)[0], status)

    def test_chaos_repeats_with_its_seed(self):
        def statuses(seed):
            script = script_of(entry({}, chaos={"dropRate": 0.5, "rateLimitRate": 0.5}), seed=seed)
            found = []
            for _ in range(200):
                fault = self.draw(script)
                found.append(fault.chaos)
            return found

        first = statuses(0)
        self.assertEqual(first, statuses(0))
        self.assertNotEqual(first, statuses(1))
        self.assertTrue(80 <= first.count("dropRate") <= 120, first.count("dropRate"))
        self.assertTrue(30 <= first.count("rateLimitRate") <= 70, first.count("rateLimitRate"))

    def test_fixture_without_fault_has_none(self):
        script = script_of(entry({}, times=3, chunkSize=2, shouldRetry=False))
        self.assertIsNone(self.draw(script))


class PlaceTests(LocalCase):
    """Faults that strike at a place in an answer, whatever the form of the model's stream."""

    CALL = MappingProxyType({
        "toolCalls": [{"name": "get_weather", "arguments": '{"city": "Rome"}'}]
    })  # fmt: skip
    TOLD = MappingProxyType({"content": "Hello there, you.", "reasoning": "Hm, well."})

    def follow(self, fixture, model=LLAMA, path=CHAT):
        """Return what a stream tells, each text joined, and how it ends."""
        asked = {"input": "hi"} if path == "/v1/responses" else {"prompt": "hi"}
        asked = {"messages": say("hi"), "tools": [WEATHER]} if path == CHAT else asked
        headers = {"authorization": "Bearer x", "x-parlel-fixture": json.dumps(fixture)}
        request = Request("POST", path, {"model": model, **asked, "stream": True}, headers=headers)
        reply = self.server.answer(request)
        pieces, end = [], "end"
        try:
            pieces.extend(event for event in reply.events if type(event) is bytes)
        except fake.Cut:
            end = "cut"
        told = {"text": "", "arguments": "", "pieces": pieces, "end": end}
        for piece in pieces:
            for name, what in fake.tell_event(piece).items():
                if name == "arguments":
                    what = self.read_arguments(piece)
                told[name] = told[name] + what if name in ("text", "arguments") else what
        return told

    def read_arguments(self, piece):
        value = json.loads(piece.partition(b"data: ")[2])
        calls = [
            c for part in value.get("choices", ()) for c in part["delta"].get("tool_calls", ())
        ]
        return "".join(c["function"]["arguments"] for c in calls) or value.get("delta", "")

    FORMS = ((LLAMA, CHAT), (THINKER, CHAT), (KIMI, CHAT), (R1, CHAT), (THINKER, "/v1/responses"))

    def test_after_a_text(self):
        for model, path in (*self.FORMS, (LLAMA, "/v1/completions")):
            with self.subTest(model=model, path=path):
                fixture = {"content": "Hello there, you.", "after": "text:there"}
                told = self.follow(fixture, model, path)
                self.assertEqual((told["text"], told["end"]), ("Hello there", "cut"))
                told = self.follow({**fixture, "endAfterChunks": 1}, model, path)
                self.assertEqual((told["text"], told["end"]), ("Hello there,", "end"))
                self.assertNotIn("finish", told)
                self.assertNotIn("done", told)
                told = self.follow({**fixture, "after": "text:where"}, model, path)
                self.assertIn("finish", told)

    def test_after_the_name_of_a_tool_and_in_its_arguments(self):
        for model, path in self.FORMS:
            with self.subTest(model=model, path=path):
                told = self.follow({**self.CALL, "after": "toolName"}, model, path)
                self.assertEqual((told["arguments"], told["toolName"]), ("", True))
                for more, end in (({}, "cut"), ({"endAfterChunks": 0}, "end")):
                    told = self.follow({**self.CALL, "in": "arguments", **more}, model, path)
                    whole = self.CALL["toolCalls"][0]["arguments"]
                    self.assertTrue(whole.startswith(told["arguments"]), told["arguments"])
                    self.assertTrue(0 < len(told["arguments"]) < len(whole))
                    self.assertEqual((told["end"], told.get("finish")), (end, None))

    def test_before_the_end(self):
        for model, path in self.FORMS:
            with self.subTest(model=model, path=path):
                told = self.follow({**self.TOLD, "before": "finish"}, model, path)
                self.assertEqual((told["end"], told.get("finish")), ("cut", None))
                self.assertIn("Hello there, you.", told["text"])
                told = self.follow(
                    {**self.TOLD, "before": "usage", "endAfterChunks": 0}, model, path
                )
                self.assertEqual((told["end"], told.get("usage")), ("end", None))
                if path == CHAT:  # the other has no such end
                    told = self.follow({**self.TOLD, "before": "done"}, model, path)
                    self.assertEqual((told["end"], told.get("done")), ("cut", None))
                    self.assertTrue(told["finish"] and told["usage"])

    def test_an_error_at_a_place(self):
        fixture = {"status": 503, "after": "text:a"}
        told = self.follow(fixture)
        self.assertIn(b"Service unavailable", told["pieces"][-1])
        self.assertIn("a", told["text"])

    def test_a_broken_event_in_the_middle_and_half_of_one(self):
        told = self.follow({"content": "abcdef", "chunkSize": 1, "malformedAfterChunks": 2})
        whole = self.follow({"content": "abcdef", "chunkSize": 1})
        broken = [
            at
            for at, (one, other) in enumerate(zip(told["pieces"], whole["pieces"]))
            if one != other
        ]
        self.assertEqual((broken, told["end"], told["text"]), ([2], "end", "abdef"))
        self.assertTrue(told["pieces"][2].endswith(b"\n\n"))
        both = {"malformedAfterChunks": 2, "disconnectAfterChunks": 2}
        told = self.follow({"content": "abcdef", "chunkSize": 1, **both})
        self.assertEqual((len(told["pieces"]), told["end"]), (3, "cut"))
        self.assertFalse(told["pieces"][2].endswith(b"\n\n"))

    def test_what_is_inserted(self):
        comment = ": keepalive\n\n"
        told = self.follow({"content": "abc", "chunkSize": 1, "insert": comment})
        self.assertEqual((told["pieces"].index(comment.encode()), told["text"]), (1, "abc"))
        told = self.follow({"content": "abc", "chunkSize": 1, "insert": comment, "after": "text:b"})
        self.assertEqual(told["pieces"].index(comment.encode()), 2)

    def test_a_stall(self):
        self.server.stopping.set()
        for count in (0, 2):
            told = self.follow({"content": "abcdef", "chunkSize": 1, "stallAfterChunks": count})
            self.assertEqual(
                (len(told["text"]), told["pieces"][-1], told["end"]), (count, b"", "cut")
            )
            self.assertEqual(self.server.requests[-1].events_sent, count)

    def test_chunks_have_the_sizes_that_are_wanted(self):
        for model, path in self.FORMS:
            with self.subTest(model=model, path=path):
                fixture = {**self.CALL, "reasoning": "Hm, well.", "chunkSizes": [4, 5, 3, 13]}
                told = self.follow(fixture, model, path)
                pieces = [p for p in told["pieces"] if "arguments" in fake.tell_event(p)]
                pieces = list(map(self.read_arguments, pieces))
                self.assertEqual(pieces, ['{"c', 'ity": "Rome"}'])
                sent = b"".join(told["pieces"]).decode()
                self.assertIn('"Hm, "', sent)
                self.assertIn('"well."', sent)

    def test_places_that_are_none(self):
        for fixture in ({"after": "hello"}, {"after": "text:"}, {"in": "text"}, {"before": "all"}):
            with self.subTest(fixture):
                headers = {"authorization": "Bearer x", "x-parlel-fixture": json.dumps(fixture)}
                reply = self.server.answer(Request("POST", CHAT, HELLO, headers=headers))
                self.assertEqual(reply.status, 400)

    def test_a_date_to_come_again(self):
        self.server.fail(429, retry_after=60, retry_after_date=True)
        headers = {"authorization": "Bearer x"}
        reply = self.server.answer(Request("POST", CHAT, HELLO, headers=headers))
        then = reply.headers["retry-after"]
        self.assertRegex(then, r"^\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT$")
        left = email.utils.parsedate_to_datetime(then).timestamp() - time.time()
        self.assertTrue(60 - PATIENCE < left <= 61, left)


class StatusTests(unittest.TestCase):
    def send(self, said, body=None, **options):
        script = script_of(entry({}, said, **options))
        facts = asked(body or {"model": "m"})
        fixture = find(script, facts)
        return fake.whole_reply(fixture, facts.request)

    def test_status_alone_sends_the_real_body(self):
        for status, kind, start in [
            (400, "invalid_request_error", "Input validation error"),
            (401, "invalid_request_error", "Invalid API key provided."),
            (402, "credit_limit", "Credit limit exceeded, please [add credits]"),
            (403, "invalid_request_error", "This request"),
            (404, "invalid_request_error", "Unable to access model m. Please visit"),
            (408, "invalid_request_error", "Request timed out"),
            (409, "invalid_request_error", "The resource"),
            (413, "request_too_large", "Request entity"),
            (422, "invalid_request_error", "The parameters"),
            (429, "rate_limit", "Request was rejected due to request rate limiting. Your rate"),
            (500, "server_error", "Internal server error"),
            (503, "service_unavailable", "Service unavailable"),
            (504, "server_error", "Gateway timeout"),
            (529, "server_error", "The service is overloaded"),
            (418, "server_error", "The request failed with status 418"),
        ]:
            with self.subTest(status=status):
                reply = self.send({"status": status})
                error = json.loads(reply.body)["error"]
                self.assertEqual((reply.status, error["type"]), (status, kind))
                self.assertTrue(error["message"].startswith(start), error["message"])
        for status in range(520, 525):
            reply = self.send({"status": status})
            self.assertEqual((reply.status, reply.body), (status, b"error code: %d" % status))
            self.assertTrue(reply.content_type.startswith("text/plain"))
        for model, said in (("m", "60 RPM (1 QPS) and 60000 TPM (1000 TPS)"), ("m-Free", "10.0 q")):
            self.assertIn(said.encode(), fake.status_reply(429, model=model).body)

    def test_headers(self):
        for said, options, headers in (
            ({"status": 503, "retryAfter": 0.5}, {}, {"retry-after": "0.5"}),
            ({"status": 503}, {}, {}),
            ({"status": 503}, {"shouldRetry": False}, {"x-should-retry": "false"}),
        ):
            self.assertEqual(self.send(said, **options).headers, headers)
        self.assertEqual(self.send({"status": 429}).headers["retry-after"], "1")
        headers = json.loads("""
            {"retry-after": "2", "x-ratelimit": "true", "x-ratelimit-limit": "1",
             "x-ratelimit-remaining": "0", "x-ratelimit-reset": "2",
             "x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "979"}""")
        self.assertEqual(self.send({"status": 429, "retryAfter": 2}).headers, headers)

    def test_scripted_error_and_json(self):
        reply = self.send({"error": {"message": "no", "code": "c", "param": None}, "status": 418})
        said = {"message": "no", "type": "server_error", "param": None, "code": "c"}
        body = json.loads(reply.body)
        self.assertEqual((reply.status, body["error"]), (418, said))
        self.assertRegex(body["id"], r"\A\w{7}-\w{6}-[0-9a-f]{16}\Z")
        reply = self.send({"json": [1, None], "status": 202})
        self.assertEqual((reply.status, json.loads(reply.body)), (202, [1, None]))


class ScriptedFaultTests(ScriptingCase):
    """Faults as a client meets them."""

    over_http = True

    def follow(self):
        """Return the texts of a stream's chunks, as far as it comes, and how it ends early."""
        got = self.ask("POST", CHAT, {**HELLO, "stream": True})
        events = [event[6:] for event in got.raw.decode().split("\n\n")]
        chunks = [json.loads(event) for event in events if event not in ("", "[DONE]")]
        error = "cut" if got.is_cut else None
        if "error" in chunks[-1]:
            error = chunks.pop()["error"]["message"]
        return [chunk["choices"][0]["delta"]["content"] for chunk in chunks], error

    def test_a_late_error_of_a_whole_body_is_that_error(self):
        for response in ({"json": {"a": 1}}, {"raw": {"text": '{"a":1}'}}):
            for path, body in (
                (CHAT, HELLO),
                (CHAT, {**HELLO, "stream": True}),
                ("/v1/rerank", RERANK),
                ("/v1/embeddings", {"model": "m", "input": "x"}),
            ):
                with self.subTest(response=response, path=path):
                    fixture = json.dumps({**response, "errorAfterChunks": 1})
                    got = self.ask("POST", path, body, {**KEY, "X-Parlel-Fixture": fixture})
                    self.assertEqual(got.json["error"]["message"], "Internal server error")
                    self.assertEqual(self.server.requests[-1].error, "")  # no bug

    def test_status_has_its_body_and_the_seconds_to_wait(self):
        self.server.fail(429, retry_after=7, times=1)
        self.assertEqual([self.outcome("hi"), isinstance(self.outcome("hi"), str)], [429, True])
        self.assertEqual([call.status for call in self.server.requests], [429, 200])

    def test_a_stall_sends_the_head_alone_and_ends_with_the_server(self):
        for stream in (True, False):
            with self.subTest(stream=stream), TogetherAiServer(port=0) as self.server:
                self.server.fail(stall_after_chunks=0)
                body = json.dumps({**HELLO, "stream": stream}).encode()
                sent = POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
                with socket.create_connection(("127.0.0.1", self.server.port), PATIENCE) as client:
                    client.sendall(sent)
                    head = receive_until(client, b"\r\n\r\n")
                    self.assertTrue(head.startswith(b"HTTP/1.1 200"))
                    self.assertFalse(select.select([client], [], [], 0.02)[0])

    def test_slow_stream_keeps_its_pace(self):
        profile = {"ttft": 30, "tps": 200}
        self.server.reply("a b c d e f", streaming_profile=profile)  # 6 tokens and the end
        began = time.perf_counter()
        self.assertEqual("".join(self.follow()[0]), "a b c d e f")
        self.assertGreaterEqual(time.perf_counter() - began, 0.06)

    def test_time_taken_counts_the_wait(self):
        self.server.reply("x", latency=30)
        self.outcome("hi")
        self.assertGreaterEqual(self.server.requests[0].duration, 0.03)

    def test_chaos_repeats_with_its_seed(self):
        def run(seed):
            self.server = TogetherAiServer(port=0, seed=seed)
            self.server.fail(chaos={"dropRate": 0.4, "rateLimitRate": 0.4})
            found = [self.answer("POST", CHAT, HELLO).status for _ in range(20)]
            for call in self.server.requests:
                rate = {429: "rateLimitRate", 500: "dropRate"}.get(call.status)
                self.assertEqual(call.notes, (f"the fixture's {rate}",) if rate else ())
            return found

        first = run(1)
        self.assertEqual(run(1), first)
        self.assertNotEqual(run(2), first)
        self.assertEqual(set(first), {200, 429, 500})

    def test_stop_ends_the_waits(self):
        before = set(threading.enumerate())
        with TogetherAiServer(port=0) as self.server:
            self.server.fail(latency=60_000)
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                waiting = [pool.submit(self.outcome, "hi") for _ in range(4)]
                self.assertTrue(wait_until(lambda: len(self.server.requests) == 4))
                began = time.perf_counter()
                self.server.stop()
                self.assertLess(time.perf_counter() - began, PATIENCE)
                errors = [each.exception(PATIENCE) for each in waiting]
        for error in errors:
            self.assertIsInstance(error, (OSError, http.client.HTTPException))
        self.assertEqual(count_new_threads(before), 0)


# === Routes ===

# The smallest good body of each route that needs one.
VALID = {
    "POST /v1/chat/completions": HELLO,
    "POST /v1/responses": {"model": LLAMA, "input": "hello"},
    "POST /v1/completions": {"model": "mistralai/Mixtral-8x7B-v0.1", "prompt": "Once upon"},
    "POST /v1/embeddings": {"model": "BAAI/bge-base-en-v1.5", "input": "a text"},
    "POST /v1/images/generations": {"model": FLUX, "prompt": "a lake", "width": 64, "height": 64},
    "POST /v1/rerank": RERANK,
    "POST /v1/audio/speech": SPEECH,
    "POST /v1/audio/transcriptions": {"file": "https://example.com/a.mp3"},
    "POST /v1/audio/translations": {"file": "https://example.com/a.mp3"},
    "POST /v2/videos": {"model": HAILUO, "prompt": "a lake"},
    "POST /v1/evaluation": {"type": "classify", "parameters": CLASSIFY},
    "POST /v1/endpoints": ENDPOINT,
    "PATCH /v1/endpoints/{id}": {"state": "STOPPED"},
    "POST /v1/endpoints/{id}/adapters": {"model_id": "e:lora"},
    "DELETE /v1/endpoints/{id}/adapters": {"model_id": "e:lora"},
    "POST /v1/models": {"model_name": "mine", "model_source": "unsloth/Qwen2.5"},
    "POST /v1/files": {"purpose": "fine-tune", "file_name": "a.jsonl", "file_type": "jsonl"},
    "POST /v1/files/multipart/complete": {"upload_id": "u", "file_id": "id"},
    "POST /v1/files/multipart/abort": {"upload_id": "u", "file_id": "id"},
    "POST /v1/files/multipart/initiate": {**IN_PARTS, "file_type": "jsonl"},
    "POST /v1/fine-tunes": {"training_file": "id", "model": "m"},
    "POST /v1/fine-tunes/estimate-price": {"training_file": "id", "model": "m"},
    "POST /v1/fine-tunes/preview": {"training_file": "id", "model": "m"},
    "POST /v1/batches": {"endpoint": CHAT, "input_file_id": "lines"},
    "POST /__parlel/fixtures": {"fixtures": []},
    "POST /__parlel/seed": {"files": []},
}
# What stands for the parameters of a path that is not an `id` of SEEDS.
TOKENIZED = "/v1/fine-tunes/{id}/download-tokenized-dataset"
PATHS = {
    "GET /v1/realtime": REALTIME,
    "GET /v1/models/{id...}": "/v1/models/" + LLAMA,
    "GET /v2/supported-models/{id...}": "/v2/supported-models/" + LLAMA,
    "GET /v1/finetune/download": "/v1/finetune/download?ft_id=done",
    "GET /v1/fine-tunes/models/limits": "/v1/fine-tunes/models/limits?model_name=m",
    "GET " + TOKENIZED: TOKENIZED.replace("{id}", "done"),
}
# Takes more than one request, and has tests of its own.
STEPS = {
    "POST /v1/files/multipart/complete",
    "POST /v1/files/multipart/abort",
    "POST /v1/files/upload",
    "PUT /__upload/{id}",
    "PUT /__upload/{id}/{part}",
    "GET /__parlel/requests/{number}",
    "GET /__parlel/requests/{number}/reply",
    "DELETE /__parlel/fixtures/{number}",
    "GET /v1/responses/{id}",
    "DELETE /v1/responses/{id}",
    "POST /v1/responses/{id}/cancel",
    "GET /__tokenized/{id}.jsonl",
    "GET /shrt/{token}",
    "GET /shrt/videos/{name}",
}
SEEDS = {
    "files": [
        {"id": "id", "purpose": "fine-tune", "content": '{"text": "one"}\n'},
        {"id": "rows", "purpose": "eval", "content": '{"text": "one"}\n'},
        {"id": "lines", "purpose": "batch-api", "content": batch_lines(["hello"])},
    ],
    "batches": [{"id": "id", "input_file_id": "lines"}],
    "fine_tunes": [{"id": "id"}, {"id": "done", "status": "completed"}],
    "evaluations": [{"workflow_id": "id"}],
    "videos": [{"id": "id"}, {"id": "done", "status": "completed"}],
    "endpoints": [{"id": "id"}],
    "jobs": [{"job_id": "id"}],
}


# Two digits for each step of SessionTests.
SESSION = """\
chats:
f2914e3443b6f5d8c855fc8480f521ab0b61fee8846fb2cfd453ec5573df25d6064c25caead3b3006e1fdff813b4e5f2
4a5ce866ec7a5d65baa0de6021662eab868a2f528bde0d4e0056af1354a1e0109cf7dcc1fbfca3f42f6b730f730aac28
abe2a1568411134c420cbe86d1d84ae000d00076a89401abf5e41db8b91ed09c9ed6b43bf90c7b4bd7215ff4e957ff47
e3eb8434f1bfcd9a3110f64ee1b0332767bc5f38c720d933663a83c50cccb8d39176fcb1014e5152da84c81f491c9f5e
90333685137558315a4793b77bc714e322a65868352ceb2a6059a10f2aa506697c36b3bc13e4d15fef08bce7260af859
598761b0d4cb6d32f1f0dc3145cc15ce0cb22d177780074f04062579e1fbfeb3409ee7acf6dd26851356d77b8b4cde53
45fb9930e1c9c96604020257e09879ab4f7476b273a71f3ec3ac2786168e59bcb43b05a538a5cdc5459d9c5ea6380570
59c57d413b98

faults:
8dd1e586d1e581d1292bd1e59fd1e597d1e511d12905d129fad1e5b2d1e5b2d129ebd1e5b8d129c9d12925d129c0d129
f8d1292cd12953d1296ed12984d129

files and batches:
73e773d3d3b9a3b9424270d1700c0cffdbff8793f2373737ded013077abfbfbfeb89d73fd79b6c276c56793f799bfb25
fbfbd73fd79b477133

jobs and accounts:
8a3e843c3c3cd1a142f3ffffffd69f8cc9b7b7b76d7079252525257b7b7b7b7b7b7676767676767d4928282828eb81a5
b9b5686868686868686868686868f5f5f5f5f5f5fe1fababababeb59a5b9b52b807e7e7e7e202020202020e3e3e3e3e3
e3e8e6bdbdbdbdeb57a5b9b586a5c8c8c8c840fbdddddddd4299b6b6b6b652e3ededededebfba0a0a0a0a4a592929292
0109e0e0f3f357573e3e53533a3a

media:
ba7755d0558947bcf27468d8ff99ef02293105a064611bbd86aa5d5d5d5d5d335a5a5a5a5aae121212121286

misses:
82716d73330997a15115dbfdc0e17550330997a15115dbfdc0e175330997a151865bdbfdc0e160cacacacacacacacaca
cacaca

record:
81f901d081877aa47f5a02f2dc027a46f3a8615d7fbb0d29b91e971bb2b629

refusals:
4e9c28da10945aa34bc74352f1112569b9d7bc9931c93ab24d9862821bc9db21b266b0abde67b2585a24f6f6f6727c41
fb4c58350c8af8196891f858536b5fa2d6ea325bb2b4fbbb6a0b4ec02001e97e4c9f41624efe6c6056b266b0abe8f421
fe9eb5b4b4b4f45c711fe72e350c5c914468

responses:
c6e7065213e664efbb7e9b03149c1d2d2b9dd795c3a122b2769ac7c740b1b266907933d8945d384ebfe65b12d5663e69
6136f8be889006062384cac4918cb1d379756ca7a5d0dd193d2025fa0c653866a5ef5d5d

scripts:
00bd6097ed78714c55997f6e268a90b16f714c55997f4c1479dc48fb714c55997fc3ebc49cca68714c5599bc9726c575
4f6c714c55997fbfa57e025bf8f47db588a2cecececececececececea280808080808080808080a2d1050040b1685f4c
5599b8d1050040b16871775599b8d1050040b168714cb499b8d1050040b168714c5599f9d1050040b168714c5546b879
0a32c23657714c55997f33110040b168714c55997b9eb90040b168714c55997b

texts and vectors:
601bf83f8dc37f4ec673df6a791402224c0d4c0d424867f119759669b656eb8ed158aa5afd46fd466ccbf4c5668fa244
373ddeee2035b2a849a049a0a3678dc6050a7cfdbefc4c6cc2

trainings:
dbc4e3aa38e65f1ee9e630ec05e630932b5c30932b5c30932b5c307bf6fbab7999c513e65f0e30e666fc2ee6976cc103
976cc103976cc103977b75f6f54f818838e65fa1e9e64c1f05e64c1eb6b84c1eb6b84c1eb6b84c7b0006cec4dada38e6
5fbde9e6025005e6024988a3024988a3024988a3027b2ce65440a3b238e65f7ce9e67b7905e67be7ffed7be7ffed7be7
ffed7b7bd2e580c4bdf538e65f96e9e6962305e696caaf5596caaf5596caaf55967b202154ebb8c589c4fec589c4fec5
89c4fec589c4fec589c4fec589c4fe656676c4851acccbbf1acccbbf1acccbbf1acccbbf1acccbbf1acccbbf1d0654cb
21
"""
# CRC-32 of what GoldenTests get, where the clock stands still.
GOLDEN = """\
A logprobs 563a7c87
A schema 72c3bd55
A text 3e131dbb
A tools 8026e466
B logprobs b9cc5836
B schema 95371ab5
B text c745b3dd
B tools 5a8341bf
C logprobs 68ebb3a6
C schema 01c14d49
C text 4e1f868d
C tools ade8b311
DELETE /v1/endpoints/{id} b1726ea5
DELETE /v1/endpoints/{id}/adapters 640d11ef
DELETE /v1/files/{id} 62893e05
DELETE /v1/fine-tunes/{id} 5fe398f2
DeepSeek logprobs 0c578b05
DeepSeek schema 8f983385
DeepSeek text 365ff9f7
DeepSeek tools 61f88f1d
GET /v1/autoscale/models 42610f3b
GET /v1/batches 68062ab9
GET /v1/batches/{id} c5dd9e94
GET /v1/clusters/availability-zones b57c6cf4
GET /v1/endpoints d4a9ee0d
GET /v1/endpoints/{id} 74cec67b
GET /v1/endpoints/{id}/adapters 872c90f8
GET /v1/evaluation 8e96035c
GET /v1/evaluation/model-list 579c7b94
GET /v1/evaluation/{id} 8aae37b1
GET /v1/evaluation/{id}/status f988750a
GET /v1/files 79c30675
GET /v1/files/{id} b0a54ccf
GET /v1/files/{id}/content fa0c4a88
GET /v1/fine-tunes db639e00
GET /v1/fine-tunes/models/limits 2816dfa8
GET /v1/fine-tunes/models/supported c9e6af1b
GET /v1/fine-tunes/{id} a2af8f9d
GET /v1/fine-tunes/{id}/checkpoints c60333d7
GET /v1/fine-tunes/{id}/download-tokenized-dataset e93651de
GET /v1/fine-tunes/{id}/events 3fe77c5a
GET /v1/fine-tunes/{id}/metrics 23891834
GET /v1/hardware 5eccc5c9
GET /v1/jobs 0c91f481
GET /v1/jobs/{id} 199a2c95
GET /v1/models 3e983ef0
GET /v1/models/{id...} d751bd42
GET /v1/projects 744ac014
GET /v1/voices aa9dda73
GET /v2/projects/{project}/models d8bd9635
GET /v2/supported-models d5fb3ee9
GET /v2/supported-models/{id...} 035f3d90
GET /v2/videos/{id} a1bd21b4
GET /v2/whoami 1496641f
GET /v3/whoami 1496641f
GLM logprobs 4e83b079
GLM schema 43b5a6b4
GLM text 00d69d12
GLM tools 10ee3ff4
K2.7 logprobs b5e20b31
K2.7 schema 298d002a
K2.7 text c2f9316b
K2.7 tools 3214716f
PATCH /v1/endpoints/{id} 626cc5b9
POST /v1/audio/speech 4de15127
POST /v1/audio/transcriptions 3cac45be
POST /v1/audio/translations 3226f3ef
POST /v1/batches 577cb88d
POST /v1/batches/{id}/cancel e3b6f6df
POST /v1/chat/completions 0235a362
POST /v1/completions 6bf6bc68
POST /v1/embeddings c4a8798d
POST /v1/endpoints a5b77873
POST /v1/endpoints/{id}/adapters 6887a246
POST /v1/evaluation c9763bc6
POST /v1/files 5954bb3a
POST /v1/files/multipart/initiate 2349346a
POST /v1/files/{id}/preprocess b0a54ccf
POST /v1/fine-tunes 38615d60
POST /v1/fine-tunes/estimate-price 33fd0d0c
POST /v1/fine-tunes/preview b37fe6db
POST /v1/fine-tunes/{id}/cancel 7117ddbf
POST /v1/models 8a77fd2f
POST /v1/rerank 8f8fef18
POST /v1/responses 044203d0
POST /v2/videos 97d3a283
Qwen logprobs 5e4493ee
Qwen schema aaa73a5a
Qwen text 5b23f066
Qwen tools 4607e32c
Scout logprobs fa39a2b6
Scout schema fa845edc
Scout text d905a7b6
Scout tools 0e4b2461
V4 logprobs b373422a
V4 schema 0b0f6a41
V4 text b4f1cf5d
V4 tools 62f2dc53
gpt-oss-120b logprobs a67b69a7
gpt-oss-120b schema 77644cad
gpt-oss-120b text 1c1754e0
gpt-oss-120b tools dc2bc659
gpt-oss-20b logprobs 4bdca87f
gpt-oss-20b schema 899a6e2e
gpt-oss-20b text 5c2a2938
gpt-oss-20b tools 2e18d603
"""


def add_call(calls, fragment):
    """Add what a chunk says of a tool call: its head, or a piece of its arguments."""
    call = calls.setdefault(fragment["index"], {"id": None, "name": None, "arguments": ""})
    call["id"] = fragment.get("id") or call["id"]
    call["name"] = fragment["function"].get("name") or call["name"]
    call["arguments"] += fragment["function"].get("arguments") or ""


def fold_choices(events):
    """Fold chunks of chat or text completions into what a whole reply says."""
    choices = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for part in event["choices"]:
            usage = part.get("usage") or usage
            choice = choices.setdefault(part["index"], {"text": "", "reasoning": "", "calls": {}})
            delta = part["delta"]
            choice["text"] += delta.get("content") or ""
            choice["reasoning"] += delta.get("reasoning") or delta.get("reasoning_content") or ""
            for fragment in delta.get("tool_calls") or []:
                add_call(choice["calls"], fragment)
            if delta.get("function_call"):
                choice["function_call"] = delta["function_call"]
            if part["finish_reason"]:
                choice.update(finish_reason=part["finish_reason"], seed=part.get("seed"))
    first = {key: events[0][key] for key in ("id", "created", "model")}
    return {**first, "usage": usage, "choices": choices}


def flatten_whole(reply):
    """Say a whole reply in the form of `fold_choices`."""
    choices = {}
    for part in reply["choices"]:
        message = part.get("message") or {"content": part["text"]}
        choices[part["index"]] = choice = {
            "text": message["content"] or "",
            "reasoning": message.get("reasoning") or message.get("reasoning_content") or "",
            "calls": {},
            "finish_reason": part["finish_reason"],
            "seed": part.get("seed"),
        }
        for at, call in enumerate(message.get("tool_calls") or []):
            add_call(choice["calls"], {"index": at, **call})
        if message.get("function_call"):
            choice["function_call"] = message["function_call"]
    first = {key: reply[key] for key in ("id", "created", "model")}
    return {**first, "usage": reply["usage"], "choices": choices}


FOLDS = {"chat": fold_choices, "completion": fold_choices, "whole": flatten_whole}


def wrong_value(field):
    """Return a value of a type that the field does not take."""
    kinds = {*field.kinds, *([int] if float in field.kinds else [])}
    return next(value for value in (True, {}, "maybe", 7.5, []) if type(value) not in kinds)


def name_of(route):
    return f"{route.method} {route.path}"


def seed(server):
    server.reset()
    for collection, items in SEEDS.items():
        server.seed(collection, items)


def cases(server):
    """Yield each route with a path and a body that are good where the seeds are."""
    seed(server)
    for route in fake.ROUTES:
        name = name_of(route)
        path = PATHS.get(name, re.sub(r"{\w+}", "id", route.path))
        yield route, path, VALID.get(name, {} if route.body else None)


class RouteTests(FakeCase):
    """What holds for each operation there is."""

    over_http = False

    def cases(self):
        return cases(self.server)

    def test_a_good_request_gets_the_declared_status(self):
        self.over_http = True
        for route, path, body in self.cases():
            with self.subTest(route=name_of(route)):
                if name_of(route) not in STEPS:
                    seed(self.server)
                    headers = UPGRADE if route.status == 101 else KEY
                    got = self.ask(route.method, path, body, headers)
                    wanted = 302 if name_of(route) == "POST /v1/files" else route.status
                    self.assertEqual(got.status, wanted, got.raw[:300])

    def test_the_same_request_gets_the_same_bytes(self):
        for route, path, body in self.cases():
            with self.subTest(route=name_of(route)):
                if route.kind not in ("", "video", "job"):  # a job has a time and a counted id
                    first = self.ask(route.method, path, body)
                    self.assertEqual(self.ask(route.method, path, body).raw, first.raw)

    def test_no_key_is_a_401_but_for_open_routes(self):
        for route, path, body in self.cases():
            with self.subTest(route=name_of(route)):
                got = self.ask(route.method, path, body, headers={})
                self.assertEqual(got.status == 401, not route.open, got.raw[:300])

    def test_another_method_is_a_405_that_lists_the_right_ones(self):
        for route, path, _ in self.cases():
            with self.subTest(route=name_of(route)):
                got = self.ask("TRACE", path)
                self.assertEqual(got.status, 405)
                self.assertIn(route.method, got.headers["allow"].split(", "))

    def test_each_required_field_is_asked_for_by_name(self):
        for route, path, body in self.cases():
            with self.subTest(route=name_of(route)):
                if name_of(route) in STEPS:
                    continue
                for name in route.body.required:
                    less = {key: value for key, value in body.items() if key != name}
                    for sent in (less, {**less, name: None}):
                        message = f"Missing required field: {name}."
                        got = self.ask(route.method, path, sent)
                        self.assertApiError(got, 400, "invalid_request_error", name, message)

    def test_each_field_of_a_wrong_type_is_named(self):
        for route, path, body in self.cases():
            with self.subTest(route=name_of(route)):
                if name_of(route) in STEPS:
                    continue
                for field in route.body.values():
                    sent = {**(body or {}), field.name: wrong_value(field)}
                    got = self.ask(route.method, path, sent)
                    self.assertEqual(got.status, 400, (field.name, got.raw[:300]))
                    self.assertEqual(got.json["error"]["param"], field.name)

    def test_each_number_out_of_bounds_is_named(self):
        for route, path, body in self.cases():
            with self.subTest(route=name_of(route)):
                for field in route.body.values():
                    if field.kinds[0] in (int, float):
                        limits = ((field.low, -1), (field.high, 1))
                        for wrong in [
                            limit + step for limit, step in limits if abs(limit) < math.inf
                        ]:
                            got = self.ask(route.method, path, {**body, field.name: wrong})
                            self.assertEqual(got.status, 400, (field.name, wrong))
                            self.assertEqual(got.json["error"]["param"], field.name)

    def test_null_counts_as_absent(self):
        for route, path, body in self.cases():
            with self.subTest(route=name_of(route)):
                if body and route.kind not in ("", "video", "job"):
                    nulls = {
                        field.name: None for field in route.body.values() if not field.required
                    }
                    got = self.ask(route.method, path, {**nulls, **body})
                    self.assertEqual(got.raw, self.ask(route.method, path, body).raw)

    def test_a_stream_folds_to_the_whole_reply(self):
        for route, path, body in self.cases():
            with self.subTest(route=name_of(route)):
                if "stream" in route.body and route.kind in FOLDS:
                    for n in (1, 2, 3):
                        whole = self.post(path, {**body, "n": n}).json
                        events = self.post(path, {**body, "n": n, "stream": True}).events
                        self.assertEqual(FOLDS[route.kind](events), FOLDS["whole"](whole))


class GoldenTests(FakeCase):
    """The bytes of each answer are those of this version; asked often, a job comes to its end."""

    options = MappingProxyType({"clock": lambda: 1.7e9})
    over_http = False
    origin = "http://here"

    def requests(self):
        """Yield names of rows with what is asked five times."""
        for route, path, body in cases(self.server):
            name = name_of(route)
            is_step = name in STEPS or route.status == 101
            if path.startswith(("/v1", "/v2", "/v3")) and not is_step:
                yield name, route.method, path, [body] * 5
        for engine, model in FormTests.MODELS.items():
            for name, fields in (
                ("text", {}),
                ("tools", {"tools": [WEATHER], "messages": say("the weather in Rome")}),
                ("logprobs", {"logprobs": 2, "n": 2, "max_tokens": 60}),
                ("schema", {"response_format": {"type": "json_object", "schema": CITY}}),
            ):
                body = {**HELLO, "model": model, **fields}
                yield f"{engine} {name}", "POST", CHAT, [body, {**body, "stream": True}]

    def test_golden(self):
        """To change a row is to change answers: say so under Changes, raise the minor version."""
        told = dict(line.rsplit(" ", 1) for line in GOLDEN.splitlines())
        for name, method, path, bodies in self.requests():
            seed(self.server)
            raw = b"\n".join(self.answer(method, path, body).raw for body in bodies)
            if b"\x1f\x8b" in raw or b'"b64_json"' in raw:  # compressed by this machine's zlib
                continue
            with self.subTest(row=name):
                self.assertEqual(f"{zlib.crc32(raw):08x}", told.pop(name, None), raw[:999])
        self.assertEqual(told, {})


class SessionTests(FakeCase):
    """What a whole session gets and leaves, group by group, is that of this version."""

    options = MappingProxyType({"clock": lambda: 1.7e9})
    over_http = False
    origin = "http://here"

    def setUp(self):
        super().setUp()
        self.steps = []

    def note(self, step, *parts):
        """Take a step, which SESSION knows by two digits of what it gives."""
        told = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
        # Where a script stands in this file is no matter.
        told = [re.sub(rb"[\w./-]+\.py:\d+", b"", part[:9999]) + part[9999:] for part in told]
        raw = b"\n".join(told)
        self.steps.append((f"{zlib.crc32(raw) & 255:02x}", step, raw))

    def send(self, method, path, body=None, headers=KEY):
        """Ask, and note what came; a picture's bytes depend on this machine's zlib."""
        got = self.answer(method, path, body, headers)
        is_packed = b'"b64_json"' in got.raw or got.raw[:2] in (b"\x1f\x8b", b"\x89P")
        call = self.server.requests[-1]
        told = (call.warnings, call.form, call.fixture, call.error, call.usage)
        raw = b"" if is_packed else got.raw
        self.note((path, body), got.status, sorted(got.headers.items()), told, raw)
        return got

    def give(self, method, path, *bodies, headers=KEY):
        for body in bodies:
            self.send(method, path, body, headers)

    def climb(self, path):
        for _ in range(5):
            self.send("GET", path)

    def check(self, name):
        """To change SESSION is to change answers: it is noted in README, Changes."""
        known = SESSION.partition(f"{name}:\n")[2].partition("\n\n")[0].replace("\n", "")
        digits = "".join(step[0] for step in self.steps)
        for at, (two, step, raw) in enumerate(self.steps):
            self.assertEqual(two, known[2 * at : 2 * at + 2], (digits, at, step, raw[:999]))
        self.assertEqual(len(digits), len(known))

    def test_chats(self):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        asked = [*say("hi"), {"role": "assistant", "content": None, "tool_calls": [call]}]
        answered = [*asked, {"role": "tool", "tool_call_id": "c", "content": "1"}]
        picture = {"type": "image_url", "image_url": {"url": "https://e.org/a.png"}}
        for model in (LLAMA, OTHER, THINKER, V4, KIMI, QWEN, R1, "mine/x-Turbo", "mine/x"):
            for fields in (
                {"stop": ["a", "e"]},
                {"max_tokens": 9, "n": 2},
                {"echo": True, "logprobs": 1, "max_tokens": 5},
                {"logprobs": True, "top_logprobs": 2, "max_tokens": 5, "temperature": 0.5},
                {"seed": 7, "stream_options": {"include_usage": True}},
                {"response_format": CITY_FORMAT},
                {"response_format": {"type": "json_object"}},
                {"response_format": {"type": "regex", "pattern": "^[a-c]{3}$"}},
                {"tools": [WEATHER, FINAL], "tool_choice": "required"},
                {"tools": [WEATHER], "tool_choice": "none"},
                {"tools": [WEATHER], "messages": answered},
                {"tools": [WEATHER, tool("transfer_to_bob")], "messages": asked},
                {"functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}},
                {"reasoning_effort": "high"},
                {"reasoning": {"enabled": False}},
                {"messages": [{"role": "user", "content": [picture]}]},
                {"messages": [{"role": "developer", "content": "Be brief."}, *say("hi")]},
                {"messages": answered},
                {"max_token": 5, "user": "u", "metadata": {"a": 1}},
            ):
                body = {**HELLO, "model": model, **fields}
                self.give("POST", CHAT, body, {**body, "stream": True})
        self.check("chats")

    def test_refusals(self):
        wrong = ({"messages": []}, {"messages": [{}]}, {"messages": [{"role": "x"}]}, {"n": 0})
        wrong += ({"stop": 1}, {"temperature": 9}, {"tools": [{}]}, {"tool_choice": "f"})
        wrong += ({"tool_choice": tool("g"), "tools": [WEATHER]}, {"reasoning_effort": "x"})
        wrong += ({"response_format": {"type": "json_schema"}}, {"max_tokens": 10**7})
        wrong += ({"response_format": {"type": "x"}}, {"logprobs": 99}, {"model": "none"})
        for strict in (False, True):
            self.server.strict = strict
            for fields in wrong:
                for model in (LLAMA, OTHER, QWEN):
                    self.send("POST", CHAT, {**HELLO, "model": model, **fields})
            for model in ("Qwen/Qwen2.5-72B-Instruct-Turbo", "a/b-Lora", FLUX, RERANKER):
                self.send("POST", CHAT, {**HELLO, "model": model})
            self.give("POST", "/v1/rerank", RERANK, {**RERANK, "top_n": 0})
            self.give("HEAD", "/v1/models", None)
            self.give("GET", "/v1/chat", None)
            self.give("POST", CHAT, b"{", b"[1]", b"")
            self.give("GET", "/v1/models", None, headers={})
        self.check("refusals")

    def test_responses(self):
        message = [{"role": "user", "content": [{"type": "input_text", "text": "the weather"}]}]
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        result = {"type": "function_call_output", "call_id": "c", "output": "it is sunny"}
        thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
        look = {"type": "input_image", "image_url": "https://e.org/a.png"}
        for model in (LLAMA, THINKER, KIMI):
            for fields in (
                {},
                {"instructions": "Be brief.", "metadata": {"a": "b"}, "temperature": 0.3},
                {"tools": [WEATHER_FLAT], "tool_choice": "required"},
                {"input": message, "tools": [WEATHER_FLAT, WIKI]},
                {"input": [*message, thought, call, result], "tools": [WEATHER_FLAT]},
                {"input": [{"role": "user", "content": [look]}]},
                {"input": [{"role": "assistant", "content": "Hm?"}, *message]},
                {"max_output_tokens": 4},
                {"reasoning": {"effort": "high", "summary": "auto"}},
                {"text": {"format": {"type": "json_schema", "name": "c", "schema": CITY}}},
                {"include": ["message.output_text.logprobs"], "top_logprobs": 1},
                {"previous_response_id": "x"},
                {"background": True},
                {"tool_choice": {"type": "function", "name": "g"}, "tools": [WEATHER_FLAT]},
            ):
                body = {"model": model, "input": "hello", **fields}
                self.give("POST", RESPONSES_PATH, body, {**body, "stream": True})
        self.check("responses")

    def test_texts_and_vectors(self):
        for model in (LLAMA, "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen2-72B"):
            for fields in (
                {},
                {"prompt": ["one", "two"], "n": 2},
                {"echo": True, "logprobs": 2, "max_tokens": 4},
                {"stop": "a", "suffix": "end", "seed": 3},
                {"prompt": ""},
            ):
                body = {"model": model, "prompt": "Once upon", **fields}
                for headers in (KEY, OPENAI):
                    self.give(
                        "POST", "/v1/completions", body, {**body, "stream": True}, headers=headers
                    )
        vectors = {"model": "BAAI/bge-base-en-v1.5", "input": "a text"}
        for fields in (
            {},
            {"input": ["a", "b c"]},
            {"input": [1, 2]},
            {"dimensions": 8},
            {"input": []},
        ):
            for form in ("float", "base64"):
                self.send("POST", "/v1/embeddings", {**vectors, "encoding_format": form, **fields})
        for fields in (
            {},
            {"top_n": 1, "return_documents": True},
            {"documents": [{"a": "x", "b": "y"}], "rank_fields": ["a"]},
        ):
            self.send("POST", "/v1/rerank", {**RERANK, **fields})
        self.check("texts and vectors")

    def test_media(self):
        for fields in (
            {"response_format": "url", "n": 2},
            {"response_format": "url", "aspect_ratio": "16:9"},
            {"response_format": "base64", "output_format": "jpeg"},
            {"steps": 4, "seed": 3, "response_format": "url"},
            {"width": 63},
            {"prompt": ""},
        ):
            body = {"model": FLUX, "prompt": "a lake", "width": 64, "height": 64, **fields}
            self.send("POST", "/v1/images/generations", body)
        for fields in (
            {},
            {"response_format": "raw", "sample_rate": 16000, "response_encoding": "pcm_f32le"},
            {"response_format": "mp3"},
            {"stream": True, "response_format": "raw"},
            {"response_format": "opus"},
            {"voice": "nobody"},
            {"language": "de", "speed": 1.5},
        ):
            self.send("POST", "/v1/audio/speech", {**SPEECH, **fields})
        for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
            for fields in (
                {},
                {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]},
                {"response_format": "verbose_json", "diarize": True, "max_speakers": 2},
                {"language": "de", "prompt": "names", "temperature": 0.2},
                {"model": "nobody"},
                {"file": "no"},
            ):
                self.send("POST", path, {"file": "https://example.com/a.mp3", **fields})
        for fields in ({}, {"seconds": "4", "fps": 12, "width": 640, "height": 480}, {"width": 9}):
            got = self.send("POST", "/v2/videos", {"model": HAILUO, "prompt": "a lake", **fields})
            self.climb(f"/v2/videos/{got.json.get('id')}")
        self.send("GET", "/v1/voices?model=cartesia/sonic")
        self.check("media")

    def test_files_and_batches(self):
        seed(self.server)
        server = self.server
        for purpose, text in (
            ("fine-tune", '{"messages": [{"role": "user", "content": "a"}]}\n'),
            ("fine-tune", '{"text": 1}\n[]\n{'),
            ("eval", "a,b\n1,2\n"),
            ("batch-api", batch_lines(["a", "b"]) + b'{"custom_id": "c"}\n{"body": 1}\nx\n'),
        ):
            file = server.add_file(text, purpose=purpose)
            for part in ("", "/content"):
                self.send("GET", f"/v1/files/{file['id']}{part}")
            self.send("POST", f"/v1/files/{file['id']}/preprocess", {})
            body = {"endpoint": CHAT, "input_file_id": file["id"], "completion_window": "24h"}
            for headers in (KEY, OPENAI):
                made = self.send("POST", "/v1/batches", body, headers)
                if made.status < 300:
                    id = made.json.get("job", made.json)["id"]
                    self.climb(f"/v1/batches/{id}")
                    for name in ("output_file_id", "error_file_id"):
                        self.send("GET", f"/v1/files/{server.batches[id].get(name)}/content")
        for query in ("", "?limit=1", "?purpose=eval", "?limit=2&after=id", "?order=asc"):
            for headers in (KEY, OPENAI):
                self.give("GET", f"/v1/files{query}", None, headers=headers)
                self.give("GET", f"/v1/batches{query}", None, headers=headers)
        self.give("POST", "/v1/batches/id/cancel", None)
        self.give("DELETE", "/v1/files/rows", None)
        self.give("GET", "/v1/files/rows", None)
        self.check("files and batches")

    def test_trainings(self):
        seed(self.server)
        for fields in (
            {},
            {"n_epochs": 2, "n_checkpoints": 2, "suffix": "mine", "learning_rate": 1e-4},
            {"lora": False, "batch_size": 8, "validation_file": "id", "n_evals": 2},
            {"training_method": {"method": "dpo", "dpo_beta": 0.2}},
            {"training_type": {"type": "Lora", "lora_r": 8}, "wandb_api_key": "secret"},
            {"from_checkpoint": "done"},
            {"training_file": "none"},
            {"n_epochs": 0},
        ):
            body = {"training_file": "id", "model": "m", **fields}
            got = self.send("POST", "/v1/fine-tunes", body)
            self.send("POST", "/v1/fine-tunes/estimate-price", body)
            self.send("POST", "/v1/fine-tunes/preview", body)
            id = got.json.get("id")
            for _ in range(6):
                for part in ("", "/events", "/checkpoints", "/metrics"):
                    self.send("GET", f"/v1/fine-tunes/{id}{part}")
            self.send("GET", f"/v1/finetune/download?ft_id={id}")
            self.send("POST", f"/v1/fine-tunes/{id}/cancel", {})
            if got.status == 200:
                named = {**HELLO, "model": got.json["model_output_name"]}
                self.send("POST", CHAT, named)
        self.give("GET", "/v1/fine-tunes?limit=2", None)
        self.give("GET", "/v1/fine-tunes/models/limits?model_name=none", None)
        self.give("DELETE", "/v1/fine-tunes/done?force=true", None)
        self.check("trainings")

    def test_jobs_and_accounts(self):
        seed(self.server)
        compare = {**EVALUATION, "model_a": "a", "model_b": "b"}
        for type, parameters in (("classify", CLASSIFY), ("score", SCORE), ("compare", compare)):
            body = {"type": type, "parameters": parameters}
            id = self.send("POST", "/v1/evaluation", body).json.get("workflow_id")
            self.climb(f"/v1/evaluation/{id}")
            self.send("GET", f"/v1/evaluation/{id}/status")
        for fields in ({}, {"display_name": "d", "state": "STOPPED"}, {"hardware": "x"}):
            id = self.send("POST", "/v1/endpoints", {**ENDPOINT, **fields}).json.get("id")
            self.climb(f"/v1/endpoints/{id}")
            for change in ({"state": "STOPPED"}, {"display_name": "e"}, {"state": "STARTED"}):
                self.send("PATCH", f"/v1/endpoints/{id}", change)
                self.climb(f"/v1/endpoints/{id}")
            path = f"/v1/endpoints/{id}/adapters"
            self.give("POST", path, {"model_id": "e:lora"}, {})
            self.give("GET", path, None)
            self.give("DELETE", path, {"model_id": "e:lora"}, {"model_id": "e:lora"})
        for source in ("unsloth/Qwen2.5", "https://e.org/model.tgz", "s3://b/m"):
            for more in ({}, {"model_type": "adapter", "base_model": "b", "description": "d"}):
                body = {"model_name": "mine", "model_source": source, **more}
                id = self.send("POST", "/v1/models", body).json["data"]["job_id"]
                self.climb(f"/v1/jobs/{id}")
        for path in (
            "/v1/models?dedicated=true",
            "/v1/endpoints?type=dedicated&mine=true",
            "/v1/hardware?model=" + LLAMA,
            "/v2/supported-models?limit=2",
            "/v2/supported-models/none/such",
            "/v1/projects",
            "/v3/whoami",
        ):
            for headers in (KEY, OPENAI):
                self.give("GET", path, None, headers=headers)
        self.check("jobs and accounts")

    def test_scripts(self):
        server, words = self.server, {"name": "f", "arguments": {"a": 1}}
        scripts = (
            {"content": "Said."},
            {"content": "Said.", "reasoning": "Thought.", "finish_reason": "length"},
            {"content": {"city": "Rome"}, "usage": {"prompt_tokens": 2}, "id": "x", "created": 5},
            {"tool_calls": [words, {**words, "id": "c2"}]},
            {"blocks": [{"type": "toolCall", **words}, {"type": "text", "text": "After."}]},
            {"error": {"message": "No.", "code": "c"}, "status": 418},
            {"json": {"any": [1]}, "response_headers": {"x-a": "b"}, "status": 202},
            {"raw": {"text": "data: 1\n\n", "contentType": "text/event-stream"}},
            {"embedding": [0.5, 0.25]},
            {"scores": [0.1, 0.9, 0.5]},
            {"image": {"url": "https://e.org/a.png"}},
            {"audio": "UklGRg=="},
            {"transcription": {"text": "Heard."}},
            {"content": lambda request: f"{request.path} {len(request.raw)}"},
            {"content": iter(["one", "two"])},
            {"content": "{{model}} {{lastUserMessage}}", "times": 2},
        )
        for script in scripts:
            server.reset()
            try:
                server.reply(**script)
            except ValueError as error:
                self.note(script, error)
                continue
            for path, body in (
                (CHAT, HELLO),
                (CHAT, {**HELLO, "stream": True, "tools": [WEATHER]}),
                (CHAT, {**HELLO, "model": KIMI, "stream": True}),
                (RESPONSES_PATH, {"model": THINKER, "input": "hello"}),
                (RESPONSES_PATH, {"model": THINKER, "input": "hello", "stream": True}),
                ("/v1/completions", {"model": LLAMA, "prompt": "hello", "logprobs": 1}),
                ("/v1/embeddings", {"model": "BAAI/bge-base-en-v1.5", "input": ["a", "b"]}),
                ("/v1/rerank", RERANK),
                ("/v1/images/generations", {"model": FLUX, "prompt": "a lake"}),
                ("/v1/audio/transcriptions", {"file": "https://example.com/a.mp3"}),
            ):
                self.send("POST", path, body)
            self.note(script, [fixture.served for fixture in server.script.every])
        self.check("scripts")

    def test_misses(self):
        server = self.server
        server.on_miss = {"chat": "error", "embedding": "error"}
        for match in (
            {"user_message": "bye"},
            {"user_message": re.compile("^bye$")},
            {"system_message": ["a", "b"]},
            {"model": "other"},
            {"tool_name": "f", "has_tool_result": True},
            {"turn_index": 2},
            {"body": {"n": 2}},
            {"headers": {"x-a": "b"}},
            {"response_format": "json_object"},
            {"context": "c"},
            {"when": lambda request: False},
        ):
            server.reply("x", **match)
        server.reply("y", user_message="hello", times=1)
        for body in (HELLO, HELLO, {**HELLO, "messages": say("HELLO " * 40)}):
            self.send("POST", CHAT, body)
        self.send("POST", "/v1/embeddings", {"model": "m", "input": "x"})
        for call in server.requests:
            for miss in call.near_misses:
                self.note(miss["differs"], miss["reason"])
        self.check("misses")

    def test_faults(self):
        for name in fake.FAULTS:
            self.server.reset()
            with self.server.fault(name):
                if name in ("slow_first_token", "stall", "rate_limit_date"):  # by the clock
                    continue
                for body in ({**HELLO, "stream": True, "tools": [WEATHER]}, HELLO):
                    self.send("POST", CHAT, body)
                self.note(name, [finding.name for finding in self.server.verdict()])
        self.check("faults")

    def test_what_is_recorded(self):
        times = re.compile(rb'"(at|duration_ms|first_event_ms|epoch)":\s*[^,}]+')
        for path, body in (
            (CHAT, HELLO),
            (CHAT, {**HELLO, "stream": True, "model": THINKER}),
            (CHAT, {**HELLO, "tools": [WEATHER], "tool_choice": "required", "seed": 3}),
            (CHAT, {**HELLO, "messages": []}),
            (CHAT, {**HELLO, "max_token": 3, "wandb_api_key": "secret"}),
            (RESPONSES_PATH, {"model": THINKER, "input": "hello", "stream": True}),
            ("/v1/completions", {"model": LLAMA, "prompt": ["a", "b"]}),
            ("/v1/embeddings", {"model": "BAAI/bge-base-en-v1.5", "input": ["a", "b"]}),
            ("/v1/rerank", RERANK),
            ("/v1/audio/speech", SPEECH),
            ("/v1/audio/transcriptions", {"file": "https://example.com/a.mp3"}),
            ("/v1/nothing?key=secret", {"a": 1}),
        ):
            self.answer("POST", path, body, {**KEY, "X-Test-Id": "t", "user-agent": "x/1"})
        for path in ("", "?view=rows", "?kind=chat&status=4xx", "?text=hello", "?test=t"):
            got = self.answer("GET", "/__parlel/requests" + path)
            self.note(path, times.sub(b"", got.raw))
        for number in range(1, 13):
            for part in ("", "/reply"):
                got = self.answer("GET", f"/__parlel/requests/{number}{part}")
                self.note(number, times.sub(b"", got.raw))
        self.note("fixtures", self.answer("GET", FIXTURES + "?from=requests").raw)
        self.note("verdict", self.server.verdict())
        self.check("record")


class PathTests(FakeCase):
    def test_one_base_url_serves_every_client(self):
        whole = self.ask("POST", CHAT, HELLO).raw
        for path in ("/v1/v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/"):
            self.assertEqual(self.ask("POST", path, HELLO).raw, whole)
        self.assertEqual(self.ask("POST", "/chat/completions", HELLO).raw, whole)
        for path in ("/v1/v2/supported-models", "/v1/supported-models"):
            self.assertEqual(self.ask("GET", path).status, 200)

    def test_an_unknown_path_names_its_neighbours(self):
        got = self.ask("POST", "/v1/chat/completion", HELLO)
        self.assertEqual(got.status, 404)
        self.assertIn("Unknown endpoint /v1/chat/completion.", got.json["error"]["message"])
        self.assertIn(CHAT, got.json["error"]["message"])

    def test_repeated_query_parameters_are_no_bug(self):
        for route in fake.ROUTES:
            if route.method == "GET":
                path = re.sub(r"{\w+(\.\.\.)?}", "id", route.path)
                for query in ("x=1&x=2", "type=a&type=b", "limit=1&limit=2", "after=a&after=b"):
                    with self.subTest(path=path, query=query):
                        self.assertLess(self.answer("GET", f"{path}?{query}").status, 500)

    def test_keys(self):
        for value, status in (
            ("Bearer x", 200),
            ("bearer x", 200),
            ("Bearer", 401),
            ("Bearer ", 401),
            ("x", 401),
        ):
            got = self.ask("GET", "/v1/models", headers={"Authorization": value})
            self.assertEqual(got.status, status, value)
        got = self.ask("GET", "/v1/models", headers={})
        self.assertEqual((got.status, got.json), (401, {"error": {"message": "Unauthorized"}}))
        got = self.ask("POST", CHAT, HELLO, headers={})
        message = (
            "Invalid API key provided. You can find your API key at"
            " https://api.together.ai/settings/api-keys."
        )
        self.assertApiError(
            got, 401, "invalid_request_error", None, message, code="invalid_api_key"
        )

    def test_ids_and_headers_of_images_tell_where(self):
        for prompt in ("a lake", ""):
            body = {"model": FLUX, "prompt": prompt, "width": 64, "height": 48}
            got = self.ask("POST", "/v1/images/generations", body)
            self.assertRegex(got.json["id"], r"^\w{7}-\w{6}-[0-9a-f]{16}-SEA$")
            self.assertEqual(got.headers["cf-ray"], got.json["id"][-20:])
            self.assertEqual(got.headers["x-image-version"], "v2")
            self.assertFalse({"x-inference-version", "x-amzn-trace-id", "vary"} & {*got.headers})

    def test_the_id_is_in_the_headers_too(self):
        got = self.ask("POST", CHAT, HELLO)
        id = got.json["id"]
        self.assertEqual(got.headers["cf-ray"], id[-16:] + "-SEA")
        self.assertEqual(got.headers["etag"], f'W/"{len(got.raw):x}-{id}"')
        self.assertIn("x-api-call-end", got.headers)
        for body in ({**HELLO, "stream": True}, {}):
            other = self.ask("POST", CHAT, body).headers
            self.assertTrue({"x-api-call-start", "x-inference-version"} <= {*other})
            self.assertNotIn("x-api-call-end", other)
        trace = r"^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-a[0-9a-f]{3}-[0-9a-f]{12}-noamzn$"
        self.assertRegex(got.headers["x-amzn-trace-id"], trace)
        for method, path, body in (
            ("POST", CHAT, HELLO),
            ("POST", CHAT, {**HELLO, "model": KIMI}),
            ("POST", CHAT, {**HELLO, "model": ""}),  # an error
            ("POST", "/v1/completions", {"model": LLAMA, "prompt": "x"}),
            ("POST", RESPONSES_PATH, {"model": LLAMA, "input": "x"}),
            ("GET", "/v1/files/file-none", None),
        ):
            got = self.ask(method, path, body)
            self.assertEqual(got.headers["x-request-id"], got.json["id"])
        for path in (CHAT, RESPONSES_PATH):
            got = self.ask("POST", path, {**HELLO, "input": "x", "stream": True})
            first = json.loads(got.raw.split(b"data: ")[1].split(b"\n")[0])
            first = first.get("response", first)
            self.assertEqual(got.headers["x-request-id"], first["id"])
            self.assertNotIn("etag", got.headers)
        self.assertTrue(self.ask("GET", "/v1/models").headers["x-request-id"])
        self.server.fail(503, times=1)
        got = self.ask("POST", CHAT, HELLO)
        self.assertEqual(got.headers["x-request-id"], got.json["id"])

    def test_no_key_is_needed_where_none_is_required(self):
        self.server = TogetherAiServer(port=0, require_auth=False)
        self.assertEqual(self.answer("GET", "/v1/models", headers={}).status, 200)

    def test_browsers_may_ask_from_anywhere(self):
        headers = {"Access-Control-Request-Headers": "authorization,x-stainless-lang"}
        got = self.ask("OPTIONS", CHAT, headers=headers)
        self.assertEqual(got.status, 204)
        self.assertEqual(
            got.headers["access-control-allow-headers"], "authorization,x-stainless-lang"
        )
        self.assertIn("POST", got.headers["access-control-allow-methods"])
        self.assertEqual(got.headers["access-control-allow-origin"], "*")

    def test_strict(self):
        self.server = TogetherAiServer(port=0, strict=True)
        got = self.answer("POST", CHAT, {**HELLO, "model": "no/such"})
        message = (
            "Unable to access model no/such. Please visit https://api.together.ai/models"
            " to view the list of supported models."
        )
        self.assertApiError(
            got, 404, "invalid_request_error", None, message, code="model_not_available"
        )
        self.assertEqual(self.answer("POST", "/v1/v1/chat/completions", HELLO).status, 200)
        self.assertEqual(self.answer("POST", "/chat/completions", HELLO).status, 404)
        self.assertIsInstance(self.answer("GET", "/v1/models", headers=OPENAI).json, list)
        for model, apart in ((LLAMA, False), ("google/gemma-4-31B-it", True)):
            body = {**HELLO, "model": model, "stream": True}
            last = self.answer("POST", CHAT, body).events[-1]
            self.assertEqual((last["choices"] == [], bool(last["usage"])), (apart, True))
        for body, said in (
            ({"model": LLAMA}, "Input required"),
            ({**HELLO, "temperature": "hot"}, "Input validation error"),
        ):
            error = self.answer("POST", CHAT, body).json["error"]
            self.assertEqual((error["message"], error["param"]), (said, None))

    def test_what_strict_refuses(self):
        self.server = TogetherAiServer(port=0, strict=True)
        unknown, image = {"model": "no/such"}, {"prompt": "x", "width": 64, "height": 64}
        flux, loras = "black-forest-labs/FLUX.", {"image_loras": [{"path": "x", "scale": 1}]}
        tool, sound = {"tools": [WEATHER]}, {"file": "https://sounds.test/a.wav"}
        scale = {"min_replicas": 1, "max_replicas": 1}
        hearing, images = "/v1/audio/transcriptions", "/v1/images/generations"
        missing, closed = "model_not_available", "endpoints_v1_create_access_disabled"
        for path, body, status, code in (
            (CHAT, {**HELLO, "model": "acme/llama-Lora"}, 400, missing),
            (CHAT, {**HELLO, "model": "meta-llama/Llama-3.1-405B-Instruct"}, 400, missing),
            (CHAT, {**HELLO, **tool, "tool_choice": "get_weather"}, 400, None),
            (CHAT, {**HELLO, **tool, "tool_choice": "perhaps"}, 400, None),
            (CHAT, {**HELLO, **tool, "tool_choice": "required"}, 200, None),
            ("/v1/embeddings", {**unknown, "input": "x"}, 404, missing),
            ("/v1/rerank", {**unknown, "query": "x", "documents": ["y"]}, 404, missing),
            ("/v1/audio/speech", {**unknown, "input": "x", "voice": "v"}, 404, missing),
            ("/v2/videos", {**unknown, "prompt": "x"}, 404, missing),
            (images, {**unknown, **image}, 404, missing),
            (images, {**image, "model": flux + "2-pro", "steps": 4}, 400, None),
            (images, {**image, "model": flux + "2-dev", "steps": 4}, 200, None),
            (images, {**image, "model": flux + "2-dev", **loras}, 400, None),
            (images, {**image, "model": flux + "1-dev-lora", **loras}, 200, None),
            (hearing, {**unknown, **sound}, 404, missing),
            ("/v1/audio/translations", {**unknown, **sound}, 404, missing),
            (hearing, {**sound, "model": "nvidia/nemotron-3-asr-streaming-0.6b"}, 400, None),
            (hearing, sound, 200, None),
            ("/v1/endpoints", {"model": LLAMA, "hardware": "h", "autoscaling": scale}, 403, closed),
        ):
            with self.subTest(path=path, body=body):
                got = self.answer("POST", path, body)
                self.assertEqual(got.status, status)
                self.assertEqual(got.json["error"]["code"] if status != 200 else None, code)
        self.assertEqual(self.answer("GET", f"/v1/hardware?model={LLAMA}").status, 200)
        self.assertEqual(self.answer("GET", "/v1/hardware?model=no/such").status, 404)

    def test_a_tool_choice_of_a_wrong_form_is_refused(self):
        for choice in (
            {"type": "function", "function": "get_weather"},
            {"type": "function"},
            {"type": "allowed_tools", "allowed_tools": {"tools": ["get_weather"]}},
            {"type": "allowed_tools", "allowed_tools": {"mode": 1, "tools": [{}]}},
            {"allowed_tools": []},
            7,
        ):
            with self.subTest(choice=choice):
                body = {**HELLO, "tools": [WEATHER], "tool_choice": choice}
                self.assertEqual(self.answer("POST", CHAT, body).status, 400)


# === Inference endpoints ===


class ToolTests(LocalCase):
    """What is called, and when an agent's loop ends."""

    def called(self, *args, **fields):
        choice = self.chat(*args, **fields)["choices"][0]
        calls = choice["message"]["tool_calls"]
        self.assertEqual(choice["finish_reason"], "tool_calls" if calls else "stop")
        return [call["function"]["name"] for call in calls]

    def test_auto_goes_by_shared_words(self):
        tools = [WEATHER, FINAL]
        self.assertEqual(self.called("How is the weather?", tools=tools), ["get_weather"])
        self.assertEqual(self.called("hello", tools=tools), [])
        tools.append(tool("see_map", description="Say the end"))
        text = "the end of the weather"
        self.assertEqual(self.called(text, tools=tools), ["get_weather", "see_map"])
        got = self.called(text, tools=tools, parallel_tool_calls=False)
        self.assertEqual(got, ["get_weather"])

    def test_choices(self):
        for choice, names in (
            ("none", []),
            ("auto", []),
            ("required", ["get_weather"]),
            ("any", ["get_weather"]),
            ("final_result", ["final_result"]),
            (tool("final_result"), ["final_result"]),
            ({"type": "tool", "name": "final_result"}, ["final_result"]),  # as Anthropic has it
            ("tool_name", []),
        ):
            with self.subTest(choice=choice):
                got = self.called("hello", tools=[WEATHER, FINAL], tool_choice=choice)
                self.assertEqual(got, names)

    def test_bad_choices(self):
        kinds = ("required", "any", "auto", "none", "web_search", "allowed_tools")
        for choice in ({"allowed_tools": None}, *({"type": kind} for kind in kinds)):
            body = {**HELLO, "tools": [WEATHER], "tool_choice": choice}
            with self.subTest(choice=choice):
                self.assertRefused(CHAT, body, "tool_choice")
                message = self.ask("POST", CHAT, body).json["error"]["message"]
                self.assertIn("one of the tools: get_weather", message)
        for fields, param in (
            ({"tools": [WEATHER], "tool_choice": tool("nothing")}, "tool_choice"),
            ({"tool_choice": "required"}, "tools"),
            ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ):
            with self.subTest(fields=fields):
                self.assertRefused(CHAT, {**HELLO, **fields}, param)

    def run_agent(self, **fields):
        """Answer every call until there is none, or `final_result` is called."""
        messages = say("the weather in Rome")
        names = []
        for _ in range(6):
            body = {"messages": messages, "tools": [WEATHER, FINAL], **fields}
            message = self.chat(**body)["choices"][0]["message"]
            names += [call["function"]["name"] for call in message["tool_calls"]]
            if not message["tool_calls"] or "final_result" in names:
                return names
            messages += [message, *map(result_of, message["tool_calls"])]
        return names

    def test_loops_end(self):
        self.assertEqual(self.run_agent(tools=[WEATHER]), ["get_weather"])
        self.assertEqual(self.run_agent(), ["get_weather", "final_result"])
        self.assertEqual(self.run_agent(tool_choice="required"), ["get_weather", "final_result"])

    def test_after_a_result(self):
        shell = tool("bash", parameters={"type": "object", "properties": {"command": {}}})
        empty = tool("getWeather2", parameters={"type": "object", "properties": {}})
        ask = tool("look_up", parameters={"properties": {"museum": {"type": "string"}}})
        finish = "Solve it. Finish by issuing the command: `echo ALL_DONE_NOW`."
        for text, tools, names in (
            ("the weather in Rome", [empty], ["getWeather2"]),  # whatever the spelling
            (
                "call `close` when done, and look up",
                [ask, tool("close")],
                ["look_up", "close"],
            ),
            ("look it up and submit the answer", [tool("submit"), ask], ["look_up", "submit"]),
            ("look it up", [tool("finish_task"), ask], ["look_up", "finish_task"]),
            ("extract: Ann, 34", [ask], ["look_up"]),  # the only form there is
            (f"{finish} Use bash.", [shell], ["bash", "bash"]),
        ):
            with self.subTest(text=text):
                messages, called = say(text), []
                for _ in range(2):
                    message = self.chat(messages=messages, tools=tools)["choices"][0]["message"]
                    calls = message["tool_calls"]
                    called += [call["function"]["name"] for call in calls]
                    messages = [*messages, message, *map(result_of, calls)]
                self.assertEqual(called, names)
        self.assertIn("echo ALL_DONE_NOW", str(calls))

    def test_who_says_which_tool_ends_the_task(self):
        tools = [tool("look_up"), tool("report")]
        said = "When you are done, call the `report` tool."
        message = self.chat("look it up", tools=tools)["choices"][0]["message"]
        (result,) = map(result_of, message["tool_calls"])
        for role, names in (("system", ["report"]), ("developer", ["report"]), ("tool", [])):
            messages = [*say("look it up"), message, result]
            if role == "tool":
                messages[-1] = {**result, "content": said}
            else:
                messages.insert(0, {"role": role, "content": said})
            self.assertEqual(self.called(messages=messages, tools=tools), names, role)

    def test_the_same_call_is_not_made_twice(self):
        tools = [tool("list_files", parameters={"type": "object", "properties": {}})]
        message = self.chat("list the files", tools=tools)["choices"][0]["message"]
        asked = [*say("list the files"), message, *map(result_of, message["tool_calls"])]
        asked += [{"role": "assistant", "content": "a, b"}, *say("list the files again")]
        self.assertEqual(self.called(messages=asked, tools=tools), [])
        self.assertEqual(
            self.called(messages=asked, tools=tools, tool_choice="required"), ["list_files"]
        )

    def test_a_hand_over_happens_once(self):
        told = "For context: [root] called tool `transfer_to_agent` with parameters {}"
        messages = [*say("transfer me to the agent for refunds"), *say(told)]
        tools = [tool("transfer_to_agent"), tool("find_refund")]
        self.assertEqual(self.called(messages=messages[:1], tools=tools), ["transfer_to_agent"])
        self.assertNotIn("transfer_to_agent", self.called(messages=messages, tools=tools))
        for name in ("transfer_back_to_supervisor", "delegate_task"):
            back = {"id": "c", "type": "function", "function": {"name": name, "arguments": "{}"}}
            talk = [
                *say("delegate the task to the weather agent"),
                {"role": "assistant", "content": "", "tool_calls": [back]},
                {"role": "tool", "tool_call_id": "c", "content": "Done: 22 degrees."},
            ]
            tools = [tool("transfer_to_math_agent"), tool("delegate_task")]
            self.assertEqual(self.called(messages=talk, tools=tools), [])

    def test_a_call_of_a_tool_of_another_kind_is_passed_over(self):
        call = {"id": "a", "type": "custom", "custom": {"name": "x", "input": "y"}}
        messages = [
            *say("add 1"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "2"},
        ]
        for choice in ("auto", "required"):
            asked = {"messages": messages, "tools": [tool("add")], "tool_choice": choice}
            self.assertEqual(self.called(**asked), ["add"] if choice == "required" else [])

    def test_arguments_are_valid_and_cut_by_the_budget(self):
        message = self.chat("weather", tools=[WEATHER])["choices"][0]["message"]
        call = message["tool_calls"][0]
        self.assertIsNone(message["content"])
        self.assertRegex(call["id"], r"^call_[a-z0-9]{24}$")
        self.assertIsInstance(json.loads(call["function"]["arguments"])["city"], str)
        got = self.chat("weather", tools=[WEATHER], max_tokens=4)
        self.assertEqual(got["choices"][0]["finish_reason"], "length")
        self.assertLessEqual(got["usage"]["completion_tokens"], 4)

    def test_a_schema_that_is_none_is_no_bug(self):
        odd = tool("see", parameters={"type": "object", "properties": 1.5})
        for choice in ("auto", "required"):
            body = {**HELLO, "tools": [odd], "tool_choice": choice}
            self.assertIn(self.ask("POST", CHAT, body).status, (200, 400))

    def test_functions_before_they_were_tools(self):
        fields = {"functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}}
        got = self.chat(**fields)
        message = got["choices"][0]["message"]
        self.assertEqual(message["function_call"]["name"], "get_weather")
        self.assertEqual(got["choices"][0]["finish_reason"], "function_call")
        self.assertGreater(got["usage"]["completion_tokens"], 3)
        folded = fold_choices(self.stream(**fields))
        self.assertEqual(folded["choices"][0]["function_call"], message["function_call"])


class FormatTests(LocalCase):
    """Content that is valid, or refused."""

    def value(self, format, text="hello"):
        return json.loads(self.text(text, response_format=format))

    def test_schemas_in_both_spellings_and_in_the_prompt(self):
        schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 40}}}
        schema["required"] = ["age"]
        for format in (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
            {"type": "json_schema", "schema": schema},
            {"type": "json_object", "schema": schema},
        ):
            with self.subTest(format=format):
                self.assertEqual(list(self.value(format)), ["age"])
        text = f"Answer in JSON. The schema: {json.dumps(schema)}"
        self.assertEqual(list(self.value({"type": "json_object"}, text)), ["age"])
        self.assertIsInstance(self.value({"type": "json_object"}), dict)

    def test_patterns(self):
        text = self.text(response_format={"type": "regex", "pattern": "(yes|no), [0-9]{3}"})
        self.assertRegex(text, r"\A(yes|no), [0-9]{3}\Z")

    def test_refusals(self):
        impossible = {"type": "integer", "minimum": 2, "maximum": 1}
        for format, param in (
            ({"type": "json_schema"}, "response_format.json_schema"),
            ({"type": "json_schema", "schema": impossible}, "response_format"),
            ({"type": "regex"}, "response_format.pattern"),
            ({"type": "regex", "pattern": "("}, "response_format.pattern"),
            ({"type": "poem"}, "response_format.type"),
        ):
            with self.subTest(format=format):
                self.assertRefused(CHAT, {**HELLO, "response_format": format}, param)

    def test_what_is_wrong_with_a_pattern(self):
        for pattern, told in (
            ("(?<=x)y", "pattern '(?<=x)y': ( is not supported there"),
            ("a)(b", "pattern 'a)(b': a parenthesis closes nothing"),
            ("a{20000}", "it asks for too much, or nests too deep"),
        ):
            body = {**HELLO, "response_format": {"type": "regex", "pattern": pattern}}
            self.assertIn(told, self.ask("POST", CHAT, body).json["error"]["message"])
        schema = {"$id": "http://e.org/", "$ref": "http://["}
        body = {**HELLO, "response_format": {"type": "json_schema", "schema": schema}}
        told = self.ask("POST", CHAT, body).json["error"]["message"]
        self.assertIn("it has a malformed URI", told)


PLACE = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "hot": {"type": "boolean"}},
        "required": ["city", "hot"],
    }
)
EXAMPLE = json.dumps({"properties": {"foo": {"type": "array"}}, "required": ["foo"]})
CHOICES = "\n\nWhat is a planet?\n\nA) Mars\nB) Milk\nC) Moss"
REACT = """Answer as best you can. You have these tools: search, calc. Use this format:

Question: the question you must answer
Thought: what you think
Action: the action to take, should be one of [search, calc]
Action Input: the input to the action
Observation: the result of the action
... (this can repeat)
Thought: I now know the final answer
Final Answer: the answer to the question

Begin!

Question: How old is Rome?
Thought:"""
SEEN = " search it\nAction: search\nAction Input: Rome\nObservation: 2777 years\nThought:"

# A form: what the whole answer matches, then prompts that ask for it.
REACT_LINES = (
    "Thought: ...\nAction: the action\nAction Input: the input\nObservation: the result\n"
    "Final Answer: the answer\n\nQuestion: Who wrote Faust?"
)
REACT_BLOCKS = """Tools:
> Tool Name: get_rain
Tool Args: {"properties": {"day": {"type": "integer"}}, "required": ["day"], "type": "object"}

Use the following format:

```
Thought: I need a tool.
Action: tool name (one of get_rain) if using a tool.
Action Input: the input, in JSON
```

If this is used, the tool will respond in the following format:

```
Observation: tool response
```

At the end, use one of two formats:

```
Thought: I can answer.
Answer: [the answer]
```

```
Thought: I cannot answer.
Answer: [the answer]
```
"""
FRAMES = (
    "Your output fields are:\n1. `mood` (Literal['sad', 'glad']):\n2. `sure` (float):\n"
    "3. `people` (list[P]):\n\n[[ ## text ## ]]\n{text}\n\n[[ ## mood ## ]]\n{mood}\n\n"
    "[[ ## people ## ]]\n{people}  # note: the value must adhere to the JSON schema: "
    '{"type": "array", "$defs": {"P": {"type": "object", "properties": {"age": {"type": "integer"}}'
    ', "required": ["age"]}}, "items": {"$ref": "#/$defs/P"}}\n\n[[ ## text ## ]]\nFine.\n\n'
    "Respond with the output fields, starting with `[[ ## mood ## ]]`, then `[[ ## sure ## ]]` "
    "(must be a valid Python float), then `[[ ## people ## ]]`, and then ending with the marker "
    "for `[[ ## completed ## ]]`."
)
BLOB = (
    "You have these tools:\n\nsearch: looks things up\nsum: adds\n\nUse a json blob with an action "
    'key and an action_input key, as shown:\n\n```\n{\n  "action": $TOOL_NAME,\n  "action_input": '
    "$INPUT\n}\n```\n\nFollow this format:\n\nQuestion: the question\nThought: what you "
    "think\nAction:"
    "\n```\n$JSON_BLOB\n```\nObservation: the result\n... (repeat)\nThought: I "
    "know\nAction:\n```\n{\n"
    '  "action": "Final Answer",\n  "action_input": "the answer"\n}\n```\n\nBegin!'
)

FORMS = {
    "frames with types": (
        r"\[\[ ## mood ## \]\]\n(sad|glad)\n\n\[\[ ## sure ## \]\]\n-?[\d.]+\n\n"
        r'\[\[ ## people ## \]\]\n\[\{"age": \d+\}, \{"age": \d+\}\]\n\n\[\[ ## completed ## \]\]',
        FRAMES,
    ),
    "frames": (
        r"=== gist ===\n.+\n\n=== why ===\n.+",
        "Write the gist under `=== gist ===`, then give the reason under `=== why ===`.\n\nText: x",
    ),
    "keys that prose names": (
        r'\{"name": ".+", "age": \d+, "city": ".+"\}',
        "Extract the person's name, age and city as JSON.\n\nText: Anna, 31, lives in Oslo.",
        "Please return the name, the age and the city of the writer in JSON.\n\nText: I am Bo, 9.",
    ),
    "YAML with a list": (
        r'name: .+\nage: \d+\nhobbies: \[".+"\]',
        "Return YAML with the keys name, age and hobbies (a list).",
        "Describe a user in YAML with the fields `name`, `age` and `hobbies` (list of strings).",
    ),
    "as many as told": (
        r'\[("[^"]+", ){2}"[^"]+"\]',
        "Give me a JSON array of 3 strings with names of rivers.",
        "Name exactly three rivers. Answer with a JSON list only.",
    ),
    "as many as told, by name": (
        r'\{"questions": \[("[^"]+", ){4}"[^"]+"\]\}',
        'Write 5 short questions on bees. Return JSON: {"questions": ["...", "..."]}',
        'Return JSON with a key "questions", a list of five strings.',
    ),
    "equal, but to no list": (
        r'\[("[^"]+"(, )?){2}\]|\{"equal": (true|false), "steps": \["[^"]+", "[^"]+"\]\}',
        "Treat everyone equally. Respond with a JSON list of names.",
        'Is 2 equal to 3? Respond with JSON: {"equal": true, "steps": ["..."]}',
    ),
    "as many as given": (
        r'\{"verdicts": \[(\{"verdict": "(yes|no)"\}(, )?){3}\]\}',
        "Judge each statement. The number of verdicts must be equal to that of statements. Return "
        'JSON like {"verdicts": [{"verdict": "yes"}, {"verdict": "no"}]}.\n\nStatements:\n'
        "['Rome is old', 'Oslo is cold', 'Ann is tall']\n\nJSON:",
    ),
    "JSON Lines": (
        r'(\{"fact": "[^"]+", "source": "[^"]+"\}(\n|\Z)){3}',
        'List three facts as JSON Lines, one object per line with the keys "fact" and "source".',
        "Write 3 examples in JSONL format with the keys fact and source.",
    ),
    "those that apply": (
        "(politics, )?(sport|science)(, science)?",
        "Return a comma-separated list of those that apply: politics, sport, science.",
        "Which of these topics apply: politics, sport, science? Return a comma-separated list.",
    ),
    "code of the language": (
        "```python\n[^`]+\n```",
        "Write a Python function add(a, b). Only code, in a fenced block.",
        "Return the function as a code block. It is for Python.",
    ),
    "a date": (
        r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d",
        "Give me a date in the format YYYY-MM-DD. Output nothing else.",
        "When did it happen? Answer only with the date as YYYY-MM-DD.",
    ),
    "the number of an option in JSON": (
        r'\[\{"choice": [12]\}, \{"choice": [12]\}\]',
        "Choose from this list:\n(1) hours\n\n(2) prices\n\nAnswer with JSON only. Here is an "
        "example:\n[\n  {{\n    choice: 1\n  }},\n  ...\n]",
        'Pick two of the options.\n1. hours\n2. prices\nRespond with a JSON list: [{"choice": 1}]',
    ),
    "a schema for each field, and one that is escaped": (
        r'\{"title": "[^"]+", "score": [1-5]\}',
        'Provide your output as JSON with these fields:\n{"title": {"description": "it", "type": '
        '"string"}, "score": {"minimum": 1, "maximum": 5, "type": "integer"}}',
        'Here is a JSON schema to follow:\n{{"properties": {{"title": {{"type": "string"}}, '
        '"score": {{"type": "integer", "minimum": 1, "maximum": 5}}}}, '
        '"required": ["title", "score"]}}\n\n'
        "Output a valid JSON object but do not repeat the schema.",
    ),
    "the number of an option": (
        "[123]",
        "Choose the best way:\n1. walk\n2. run\n3. swim\nReply with the number of the option.",
        "Which option is best: 1. walk 2. run 3. swim? Answer only with the option's number.",
    ),
    "one on a condition": (
        "fine|fraud",
        'Answer "fraud" if the claim looks wrong, "fine" if it does not.\n\nClaim: x',
        "Reply with `fraud` when the claim is wrong, otherwise say `fine`.\n\nClaim: x",
    ),
    "an example that looks as a schema": (
        r'\{"type": "[^"]+", "items": \["[^"]+", "[^"]+"\]\}',
        'Return JSON: {"type": "shirt", "items": ["collar", "cuff"]}',
    ),
    "one that the last words of a sentence offer": (
        "APPROVE|REJECT",
        "Decide whether to APPROVE or REJECT. Output only the decision.",
        'Should it be "APPROVE", or "REJECT"? Answer with a single word.\n\nRequest: x',
    ),
    "one as it is written": ("True|False", "Is it spam? Output True if it is, False otherwise."),
    "one of a noun's": (
        "low|medium|high",
        "Priority must be low, medium or high. Return only the priority.\n\nTicket: x",
        "Decide the priority of the ticket (low, medium, high). Answer with the priority only.",
        "State the level (low, medium, high) of the risk below. Return only the level.\n\nRisk: x",
    ),
    "JSON by schema": (
        r'\{"city": ".+", "hot": (true|false)\}',
        f"Answer in JSON that follows this schema:\n{PLACE}",
        "Here is a text: hot in Rome.\n\nReturn JSON only. The JSON schema:\n```json\n"
        f"{PLACE}\n```",
        f"Extract the data as JSON matching the schema {json.loads(PLACE)!r}",
        f"As an example, for the schema {EXAMPLE}\nthe object {{'foo': ['bar']}} is well-formatted."
        f"\n\nThe output should be JSON. Here is the output schema:\n```\n{PLACE}\n```",
    ),
    "JSON by example": (
        r'\{"verdict": "(yes|no)", "reason": "[^.][^"]+"\}',
        'Respond with JSON only: {"verdict": "yes or no", "reason": "..."}',
        'The form is {"verdict": "yes or no", "reason": "..."}. Respond in JSON.',
        "Judge it.\n\nYour output must be a JSON object like this:\n"
        '{\n  "verdict": "yes" | "no",\n  "reason": <why>, // briefly\n}\n\nText:\nIt works.',
    ),
    "JSON with numbers and lists": (
        r'\{"score": [1-5], "sure": (0(\.\d+)?|1(\.0)?), "tags": \[".+"\]\}',
        "Reply in this JSON format:\n{\n  score: int, // 1 to 5\n  sure: float between 0 and 1,\n"
        "  tags: string[],\n}",
        'Output format:\n```json\n{"score": "<integer from 1 to 5>", "sure": "0.0-1.0", '
        '"tags": ["first", "..."]}\n```',
    ),
    "JSON with what is said of its keys": (
        r'\{"verdicts": \[(\{"verdict": "(yes|no|idk)", "reason": "[^"]+"\}(, )?){1,3}\]\}',
        "Only return JSON, with the 'verdicts' key as a list of JSON objects.\nExample JSON:\n"
        '{\n  "verdicts": [\n    {"verdict": "yes"},\n    {"verdict": "no", "reason": <why>}\n  ]\n'
        "}\n\nThe 'verdict' key should STRICTLY be either 'yes', 'no' or 'idk'.\n\nInput:\nx\n\n"
        "JSON:",
    ),
    "JSON by the names of keys": (
        r'\{"score": ([0-9]|10), "reason": "[^"]+"\}',
        "Return a JSON with two keys: `score` and `reason`. The `score` is an integer between 0 "
        "and 10.",
        "Please respond with a JSON object with two fields:\n- `score`: an integer from 0 to 10\n"
        "- `reason`: one sentence",
        'Respond in JSON with "score" set to an integer between 0 and 10 and "reason" as a text.',
    ),
    "JSON by keys with their types": (
        r'\{"score": [0-5], "sure": (true|false), "why": "[^"]+"\}',
        'Give your verdict as a JSON object with keys "score" (integer 0-5), "sure" (boolean) and '
        '"why" (string).',
        "Output a JSON object with these fields:\nscore (int from 0 to 5): how good it is\n"
        "sure (boolean): whether you know\nwhy (string): the reason",
    ),
    "a JSON array": (
        r'\[(\{"question": "[^"]+", "answer": "[^"]+"\}(, )?)+\]',
        "Return a JSON array of objects, each with `question` and `answer` fields.",
        'Return a JSON list where each item has "question" and "answer" keys.',
    ),
    "a JSON array of texts": (
        r'\["[^"]+"(, "[^"]+")*\]',
        "Output only a JSON list of keywords.",
        "Return a JSON array of strings with three questions.",
    ),
    "placeholders of several words": (
        r'\{"steps": \["[^"]+"(, "[^"]+")*\]\}',
        'Return JSON only.\nExample JSON:\n{\n  "steps": <list_of_strings>\n}\n\nJSON:',
        'Answer in this JSON format: {"steps": <array of strings>}',
    ),
    "names that occur": (
        r'\{"people": \[("(Marie|Paris|Tom)"(, )?)+\]\}',
        'Extract them as JSON: {"people": ["<name>"]}\n\nText: Marie went to Paris with Tom.',
        'Extract the people. Return JSON in this format:\n{\n  "people": ["string"]\n}\n\n'
        "Text: Marie went to Paris with Tom.",
    ),
    "names as an example has them": (
        r'\{"character": "(Lady Ann|Sir Tom)"\}',
        'Extract as JSON.\nExample: Lady Ann sings.\nOutput: {"character": "Lady Ann"}\n\n'
        "Sir Tom sings.\nOutput:",
    ),
    "one of a list": (
        r"billing|bug|other",
        "Classify the ticket. Answer with one of: billing, bug, other.\n\nTicket: it crashes",
        "Choose one of the following categories:\n- billing: money\n- bug: it fails\n- other\n\n"
        "Reply with the category only.",
        'What is it about? Your answer must be "billing", "bug" or "other".',
    ),
    "one that another sentence names": (
        r"friendly|hostile|neutral",
        "What is the tone (friendly, hostile or neutral)? Respond with a single word.\n\nText: ok",
        "Allowed tones: friendly, hostile, neutral. Reply with the tone and nothing else.",
        "Name its tone. Possible values: friendly, hostile, neutral. Return just the value.",
    ),
    "a number that another sentence bounds": (
        r"[0-5]",
        "How close are they, from 0 (unrelated) to 5 (equal)? Output the number alone.",
        "On a scale of 0-5, how polite is it? Your answer should be only a digit.",
    ),
    "JSON with a letter": (
        r'\{"category": "[ABC]", "reason": "[^"]+"\}',
        f"{CHOICES}\n\nRespond ONLY with a JSON object in this format:\n"
        '{\n  "category": "[LETTER]",\n'
        '  "reason": "[WHY]"\n}\n\n- The "category" must be a single letter A, B, or C.',
    ),
    "JSON that you respond with": (
        r'\{"reason": "[^"]+", "pass": (true|false), "score": .+\}',
        "You grade. You respond with a JSON object with this structure: {reason: string, pass: "
        "boolean, score: number}",
    ),
    "as many as were given": (
        r'\{"answers": \["(yes|no)", "(yes|no)"\]\}',
        'Only return JSON.\nExample:\n{\n  "answers": ["yes"]\n}\nThe length of answers is EQUAL '
        "to that of questions.\n\nQuestions:\n['Is it red?', 'Is it old?']\n\nJSON:",
    ),
    "a value of a type": (
        r"-?\d+",
        "How many words are there?\nAnswer as an int",
    ),
    "types of their own": (
        r'\{"name": "Anna Berg", "mood": "(HAPPY|SAD)", "next": null\}',
        "Mood\n----\n- HAPPY\n- SAD: not happy\n\nAnswer in JSON using this schema:\n{\n  name: "
        "string, // as it appears in the text\n  mood: Mood,\n  next: null,\n}\n\n"
        "Text: I met Anna Berg.",
    ),
    "yes or no": (
        r"(?i:yes|no)",
        "Does the text mention Rome? Answer yes or no.\n\nText: I was in Rome.",
        "Question: Should the message be blocked (Yes or No)?\nAnswer:",
    ),
    "a number": (
        r"[1-9]|10",
        "Rate the answer on a scale of 1 to 10. Reply with the number only.",
        "Output a single integer between 1 and 10.",
        "On a scale between 1 and 10, how similar are they? Return a single int.",
    ),
    "a letter": (
        r"[ABC]",
        f"Answer with the letter only.{CHOICES}",
        f"{CHOICES}\nAnswer:",
    ),
    "a verdict in brackets": (
        r"\[\[[ABC]\]\]",
        'Output your final verdict by strictly following this format: "[[A]]" if A is better, '
        '"[[B]]" if B is better, and "[[C]]" for a tie.',
        "Compare both. Your answer must be [[A]], [[B]] or [[C]].",
    ),
    "a rating in brackets": (
        r"\[\[[1-5]\]\]",
        'Rate it on a scale of 1 to 5 in this format: "[[rating]]", for example: "Rating: [[5]]".',
        "Respond with a score between 1 and 5 like [[score]].",
    ),
    "a last line": (
        r"[^\n]+\n\nANSWER: [ABC]",
        "Answer the question. The last line of your response should be of the following format: "
        f"'ANSWER: $LETTER' (without quotes) where LETTER is one of A,B,C.{CHOICES}",
        f'Think step by step, then end with "ANSWER: <A, B or C>".{CHOICES}',
        f"{CHOICES}\nThink step by step and finish with a line of the form 'ANSWER: X' where X is "
        "the letter.",
        'Solve it, explain why, and finish with a line in the form "ANSWER: X", X being A, B or C.',
        f"Explain why. On the last line write ANSWER: followed by the letter.{CHOICES}",
    ),
    "a last line that is one of two": (
        r"[^\n]+\n\nVERDICT: (PASS|FAIL)",
        "Explain briefly, then on a new line write VERDICT: PASS or VERDICT: FAIL.",
        'Finish with "VERDICT: PASS" or with "VERDICT: FAIL", after your reasoning.',
    ),
    "a score of so many": (
        r"[^\n]+\n\nScore: [0-5]/5",
        'Explain your reasoning, and put "Score: <n>/5" on its own last line.',
        "Think it over. At the end write 'Score: <points>/5'.",
        'First give your reasoning, then end with "Score: X/5".',
    ),
    "labelled lines": (
        r"Score: [1-5]\nReason: .+",
        "Evaluate it. Use this format:\nScore: <1-5>\nReason: <text>",
        "Respond exactly like this:\n\nScore: [1-5]\nReason: [why]\n",
    ),
    "elements": (
        r"<answer>[^<]+</answer>",
        "Think about it, then put your final answer in <answer></answer> tags.",
        "Write nothing else and wrap the result in <answer> tags.",
    ),
    "elements with attributes": (
        r'<rating value="[1-5]">[^<]+</rating>',
        'Answer in this format:\n<rating value="1-5">one sentence</rating>',
        'Reply with XML exactly like this:\n<rating value="1-5">why</rating>',
    ),
    "elements of data's names": (
        r"<review>\n  <score>\d+</score>\n  <comment>[^<]+</comment>\n</review>",
        "Reply with XML exactly like:\n<review>\n  <score>1-10</score>\n  <comment>text</comment>\n"
        "</review>",
    ),
    "nested elements": (
        r"<tasks>\n(<task>[^<]+</task>\n){2}</tasks>",
        "Respond in the following format:\n\n<tasks>\n<task>Task 1</task>\n<task>Task 2</task>\n"
        "</tasks>",
    ),
    "a block of code": (
        r"```bash\n[^`]+\n```",
        "Your response must contain exactly ONE bash code block:\n\n```bash\nyour_command\n```",
        "Reply with a single ```bash block.",
        "List the files. Put the command in a bash code block.",
    ),
    "YAML": (
        r"title: .+\nsteps:\n *- name: .+\n *minutes: \d+",
        "Answer in YAML like this:\n```yaml\ntitle: text\nsteps:\n  - name: text\n    minutes: 5\n"
        "```",
    ),
    "lists": (
        r"1\. .+\n2\. .+\n3\. .+",
        "Give me the steps as a numbered list.",
        "Your response should be a numbered list with each item on a new line.",
        "Name three European rivers as a numbered list.",
    ),
    "commas": (
        r"[\w ]+, [\w ]+, [\w ]+",
        "Your response should be a list of comma separated values, eg: `foo, bar` or `foo,bar`",
        "Return the keywords, separated by commas.",
    ),
    "so many entries": (
        r"[^,]+(, [^,]+){4}",
        "List five fruits, separated by commas.",
        "Give 5 names as a comma-separated list.",
        "Name five colours, comma-separated.",
    ),
    "CSV": (
        r"name,age,city\n([^,\n]+,[^,\n]+,[^,\n]+\n?){3}",
        "Output CSV with the header name,age,city and nothing else.",
        "Produce a CSV with the header name,age,city and three rows.",
    ),
    "a table": (
        r"\| Name \| Role \|\n\|---\|---\|(\n\| .+ \| .+ \|){3}",
        "Present it as a markdown table with columns Name, Role.",
        "Compare them in a Markdown table with the columns Name and Role.",
    ),
    "records": (
        r"(entity<\|#\|>(Anna Berg|Oslo|Nordlys)<\|#\|>[^<]+\n)+<\|COMPLETE\|>",
        "Output each as entity<|#|>entity_name<|#|>description on its own line, and end with "
        "<|COMPLETE|>.\n\nText: Anna Berg of Oslo works for Nordlys.",
    ),
    "so many words": (
        r"\w+( \w+){4}",
        "Generate a title of five words for this chat.",
        "Respond with a 3-5 word title.",
        "Suggest a name of no more than 5 words.",
    ),
    "a text as it stands": (
        r"pong",
        "Reply with exactly 'pong'.",
        "Repeat exactly: pong",
        "Say only the word pong.",
        'Please respond with the word "pong" and nothing else.',
        "Echo this back verbatim: pong",
        "Repeat exactly the following text: 'pong'",
    ),
    "an action": (r"[^\n]*\nAction: (search|calc)\nAction Input: .+", REACT),
    "one of the tools": (
        r"Thought: .+\nAction: (search|finish)\nAction Input: .+",
        f"You can use tools: search[query], finish[answer].\nUse this format:\n{REACT_LINES}",
        f"Use these tools:\n- search: finds\n- finish: ends\n\nUse this format:\n{REACT_LINES}",
    ),
    "a ranking": (
        r"(?:\[[123]\] > ){2}\[[123]\]",
        "Rank the passages. Output the ranking as [2] > [1] > [3].\n\n[1] a\n[2] b\n[3] c",
        "[1] a\n[2] b\n[3] c\n\nThe output format must be [] > [], e.g. [4] > [2].",
    ),
    "a rating in doubled brackets": (
        r"\[\[(?:[1-9]|10)\]\]",
        "Rate it on a scale of 1 to 10 by strictly following this format: [[rating]].\n\nText: x",
        'Give your score from 1 to 10, for example: "Rating: [[5]]".\n\nText: x',
    ),
    "what the label at the end may have": (
        "[1-5]",
        "Relevance (1-5) - important content.\n\nSummary: x\n\nForm (scores ONLY):\n- Relevance:",
        "Judge a text.\nStyle (1 to 5) - is it clear?\n\nText: x\n\nStyle:",
    ),
    "one of two, by a question or a condition": (
        "spam|ham",
        "Is the following comment spam or ham?\n\nComment: win money\n\nAnswer:",
        "If it sells something, reply `spam`; otherwise reply `ham`.\n\nMail: hello",
        "Reply with exactly one word, spam or ham.\n\nMail: hello",
    ),
    "words offered for an element": (
        "<label>(?:good|bad|mixed)</label>",
        "Respond inside <label></label> tags with good, bad or mixed.",
        "Put it into <label> tags as good, bad or mixed.",
    ),
    "one of the list that the label at the end names": (
        "billing|tech",
        "Pick the best agent.\n\nAgents:\n- billing: money\n- tech: bugs\n\nQuery: x\n\nAgent:",
        "Route it to a team.\n\nTeams:\n1. billing - money\n2. tech - bugs\n\nMail: x\nTeam:",
    ),
    "letters and percents": (
        r"Grade: [A-F]\nSure: \d+%",
        "Respond in this exact format:\n\nGrade: <letter A-F>\nSure: <0-100>%",
        "OUTPUT FORMAT:\nGrade: <A-F>\nSure: <0-100>%",
    ),
    "records of a shape": (
        r"(?:\([a-z ]+; [a-z ]+\)\n?)+",
        "List pairs, one per line, in the form (noun; verb).\n\nText: cats run",
        "List the events, each on its own line, in the format (noun; verb).\n\nText: cats run",
    ),
    "a result behind a mark": (
        r"[\s\S]+\n\n(?:\\boxed\{\d+\}|#### \d+|\[RESULT\] [1-5])",
        "Solve it. Put your final answer within \\boxed{}.\n\nProblem: 2+2",
        "Think step by step and finish with #### <answer>.\n\nProblem: 2+2",
        'The output format should be "Feedback: (why) [RESULT] (an integer between 1 and 5)".',
    ),
    "one of the words before a label at the end": (
        "good|bad|mixed",
        "What is the mood of this mail? good, bad, or mixed\nMail: I love it\nMood:",
        "Say what the mood is: good, bad or mixed.\n\nMail: hello\n\nMood:",
    ),
    "an element whose value is described": (
        r"<score>(?:\d|10)</score>",
        "Give your answer as <score>X</score> where X is between 0 and 10.",
        "Answer in the form <score>N</score>, where N is a number from 0 to 10.",
    ),
    "only a query": (
        "SELECT .+",
        "Write an SQL query for all users older than 30. Return only the SQL.",
        "Translate the question into a query. Output just the SQL.\n\nQuestion: who is ill?",
    ),
    "objects with these keys": (
        r'\[\{"question": ".+", "answer": ".+"\}.*\]',
        "Write 3 questions. Return a JSON array of objects with question and answer.",
        "Return a JSON list of objects with question, answer.",
    ),
    "JSON with keys of one letter": (
        r'\{"a": ".+", "b": ".+"\}',
        "Return JSON with the keys a and b.",
        "Respond with a Python dictionary that has the keys 'a' and 'b'.",
    ),
    "JSON with nouns": (
        r'\{"title": ".+", "body": ".+"\}',
        "Reply as JSON with a title and a body.",
        "Write a JSON object containing the title and the body of a letter.",
    ),
    "those that apply of what is listed": (
        "a, b|b, c",
        "List those that apply, comma-separated: a, b, c.",
        "Name the labels, comma-separated: a, b, c",
    ),
    "names from the text by one noun": (
        r'\{"people": "(?:Anna Smith|Bob Jones)"\}',
        "Extract the people in the text as JSON.\n\nText: then Anna Smith met Bob Jones",
        "Please extract people as JSON.\n\nText: there Anna Smith saw Bob Jones",
    ),
    "some of what is allowed": (
        r'\["(?:sport|tech|art)"(?:, "(?:sport|tech|art)")*\]',
        "Assign tags. Allowed tags: sport, tech, art. Return a JSON list.\n\nText: x",
        "Possible topics: sport, tech, art. Return the topics as a JSON array.\n\nText: x",
    ),
    "five lines, a checklist of four, a year": (
        r"(?:[a-z ]+\n){4}[a-z ]+|(?:- \[ \] [a-z ]+\n?){4}|[12]\d{3}",
        "Write five versions of the question. Provide them separated by newlines.\n\nQuestion: x",
        "Produce a markdown checklist of 4 items for moving house.",
        "What year did it end? Answer with a four digit year only.",
    ),
    "a score in its range": (
        r'\{"score": [0-5]\}',
        'Score 0 to 5 by likeness. Answer in JSON: {"properties": {"score": {"type": "integer"}}, '
        '"required": ["score"]}',
        'Score1: bad\nScore5: good\n\nAnswer as JSON: {"score": 3}',
    ),
    "labels of examples": (
        "pos|neg",
        "Classify.\n\nReview: good\nLabel: pos\n\nReview: bad\nLabel: neg\n\nReview: fine\nLabel:",
        "In: a\nOut: pos\n\nIn: b\nOut: neg\n\nIn: c\nOut: neg\n\nIn: d\nOut:",
    ),
    "JSON of examples": (
        r'\{"x": -?[\d.]+\}',
        'Q: a\nA: {"x": 1}\n\nQ: b\nA: {"x": 2}\n\nQ: c\nA:',
        'Text: a\nJSON:\n{\n  "x": 1\n}\n\nText: b\nJSON:\n{\n  "x": 2\n}\n\nText: c\nJSON:',
    ),
    "YAML without a block": (
        r"name: .+\nage: -?\d+",
        "Answer in YAML:\nname: string\nage: int\n\nDescribe a person.",
        "Respond in YAML with the following keys.\n\nname: <name>\nage: <integer>\n",
    ),
    "a final answer": (r"[^\n]*\nFinal Answer: .+", REACT + SEEN),
    "what a noun may be": (
        "fiction|biography|poetry",
        "Classify the genre of the book. The allowed genres are fiction, biography and poetry. "
        "Output "
        "the genre in lower case, without any punctuation.\n\nBook: x",
        "Genres: fiction, biography, poetry\n\nRespond with only the book's genre.\n\nBook: x",
    ),
    "what a label at the end offers": (
        "A|B|NOT SURE",
        "Decide who is right.\n\nClaim: x\n\nYour verdict (A / B / NOT SURE):",
        "Which is it? Choose from A, B or NOT SURE, and reply with just that.",
    ),
    "one of several conditions": (
        "[012]",
        "Reply with 1 if the first is better, 2 if the second is, 0 if they tie. The digit only.",
        "Output 0 if it is bad, 1 if it is fine and 2 if it is good.",
    ),
    "one of quoted lines": (
        r"[^\n]+\n\nRESULT: (pass|fail)",
        "After your reasoning, the very last line must be `RESULT: pass` or `RESULT: fail`.",
    ),
    "an element that is chosen": (
        r"<winner>[AB]</winner>",
        "Compare them. Output format: <winner>A</winner> or <winner>B</winner>",
    ),
    "an element with a number": (
        r"<why>[^<]+</why>\n<score>([1-9]|10)</score>",
        "Think inside <why></why>, then give your score between 1 and 10 inside <score></score>.",
    ),
    "a template to fill in": (
        r"Sender: .+\nUrgency: (low|medium|high)",
        "Read the mail and fill in this template:\n\nSender: [name]\nUrgency: [low/medium/high]\n",
    ),
    "keys beside offers": (
        r'\{"score": "(yes|no)"\}',
        "Give a binary score 'yes' or 'no'. Provide it as a JSON with a single key 'score' and no "
        "preamble.",
    ),
    "keys with types in brackets": (
        r'\{"name": "[^"]+", "skills": \["[^"]+", "[^"]+"\], "years": -?[\d.]+\}',
        "Produce a JSON document with `name`, `skills` (array of strings) and `years` (number).",
    ),
    "a type of TypeScript": (
        r'\{"total": -?[\d.]+, "currency": "(EUR|USD)", "lines": \[\{"item": "[^"]+"\}.*\]\}',
        "Respond only with JSON of this type:\n\ntype Bill = {\n  total: number;\n  currency: "
        '"EUR" | '
        '"USD";\n  lines: { item: string }[];\n}',
    ),
    "JSON in other tongues": (
        r'\{"name": "[^"]+", "note": -?[\d.]+\}',
        'Antworte nur mit JSON:\n{"name": "...", "note": 4}\n\nText: gut',
        'Réponds uniquement en JSON : {"name": "...", "note": 4}',
        '请以JSON格式输出:\n{"name": "...", "note": 4}',
    ),
    "an action as JSON": (
        r'Thought: .+\nAction:\n```json\n\{"action": "search", "action_input": "[^"]+"\}\n```',
        BLOB,
    ),
    "an answer as JSON": (
        r'Thought: .+\nAction:\n```json\n\{"action": "Final Answer", "action_input": "[^"]+"\}'
        r"\n```",
        f"{BLOB}\n\nQuestion: x\nThought: y\nObservation: z",
    ),
    "records that are related": (
        r"entity#(Anna Berg|Oslo)#[^#]+\nentity#(Anna Berg|Oslo)#[^#]+\nrelation#(Anna Berg#Oslo|"
        r"Oslo#Anna Berg)#[^#]+\n<\|COMPLETE\|>".replace("#", r"<\|#\|>"),
        "Output these rows:\n\nentity<|#|><entity_name><|#|><description>\nrelation<|#|><source>"
        "<|#|><target><|#|><description>\n<|COMPLETE|>\n\nText: Anna Berg is from Oslo.",
    ),
    "in a few words": (
        r"(?i:yes|no)|\w+|[\d.]+",
        "yes or no: is water wet?",
        "one word: the capital of France?",
        "number only: how many legs has a spider?",
    ),
    "all but a form is forbidden": (
        r'\{"a": "[^"]+", "b": "[^"]+"\}',
        "Do not output anything other than JSON with keys a and b.",
        "Never forget to return JSON with keys a and b.",
        "Return a JSON object with keys a and b. Do not wrap the JSON in ```json fences.",
        "Explain your choice and give the answer as JSON with keys a and b.",
        "Respond with JSON (not markdown) with keys a and b.",
    ),
    "another form is forbidden": (
        "(?i:yes|no)",
        "Do not use tables and answer yes or no.",
        "Think about it and answer yes or no. Don't return JSON.",
    ),
    "a text beside a number": (
        r'\{"name": "[^"]+", "(rank|age)": \d+\}',
        "Return JSON with fields `name` (string) and `rank` (1 to 5).",
        "Return JSON with the fields name (string) and age (integer between 0 and 120).",
        'Return JSON: {"name": "text of 5 to 10 words about the product", "age": 4}',
    ),
    "exactly one of several": (
        "red|blue",
        "Reply with exactly one of: red, blue",
        "Output exactly one word: red or blue\n\nText: roses",
        "Respond with exactly one of the following: red, blue.",
    ),
    "exactly so many": (
        r"[a-z ]+(?:, [a-z ]+){4}|(?:- [a-z ]+\n?){3}",
        "Return exactly 5 keywords: no explanations.\n\nText: x",
        "Reply with exactly three bullet points: one per topic.",
    ),
    "exactly this JSON": (r'\{"a": 1\}', 'Respond with exactly the following JSON: {"a": 1}'),
    "a line of slots": (
        r"[\w' ]+ - \d+|(feat|fix)\([^()]+\): [\w ]+",
        "Answer with exactly this format: NAME - AGE",
        "Use this template: <type>(<scope>): <subject>, where type is one of feat, fix.",
    ),
    "fields that are schemas": (
        r'\{"city": \{"name": "[^"]+"\}, "mood": "(sun|rain)", "note": ("[^"]+"|null)\}',
        'Provide JSON. The properties for each field:\n{"city": {"$ref": "#/$defs/City"}, "mood": '
        '{"enum": ["sun", "rain"]}, "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}, '
        '"$defs": {"City": {"name": {"type": "string"}}}}',
    ),
    "frames with names of one letter": (
        r"\[\[ ## a ## \]\]\n.+\n\n\[\[ ## b ## \]\]\n.+\n\n\[\[ ## completed ## \]\]",
        "Respond with the fields, starting with the field `[[ ## a ## ]]`, then `[[ ## b ## ]]`, "
        "and then ending with the marker for `[[ ## completed ## ]]`.",
    ),
    "all fields in an order, whatever was quoted before": (
        r'\{"why": "[^"]+", "b": -?[\d.]+, "ok": (true|false), "tags": \["[^"]+", "[^"]+"\], '
        r'"next": "(get_rain|finish)"\}',
        'It failed.\n\nTraceback: ValueError: got this response:\n{"wrong": 1}\n\n'
        "Respond with a JSON object in the following order of fields: `why`, then `b` (must be "
        "formatted as a valid Python float), then `ok` (must be formatted as a valid Python bool), "
        "then `tags` (must be formatted as a valid Python list[str]), then `next` (must be "
        "formatted as a valid Python Literal['get_rain', 'finish']).",
    ),
    "one of the labels": (
        "red|blue",
        "Output exactly one of the labels red, blue. Never anything but the label.",
        "Assign the text to one of the categories red, blue. Output the category only.\n\nText: x",
        "Options are red or blue; give just one of them.\n\nMail: x",
        "Tools:\n- red: looks\n- blue: adds\n\nReply with its name exactly as listed.",
    ),
    "JSON of what is named": (
        r'\{"name": "[^"]+", "age": \d+, "city": "[^"]+"\}',
        "Give me the name, age and city as JSON.",
        "Reply with the name, age and city as JSON.",
        "Generate the name, age and city as JSON.",
    ),
    "three strings": (r'\["[^"]+"(, "[^"]+"){2}\]', "Return an array of 3 strings."),
    "an int, a date": (
        r"\d+|\d{4}-\d\d-\d\d",
        "Give the count as an int.",
        "Write the date as YYYY-MM-DD.",
    ),
    "those that apply, below": (
        "a, b|b, c",
        "Return those that apply, comma-separated:\na, b, c",
    ),
    "lines in lower case": (
        r"mood: (good|bad)\nsure: \d+",
        "Answer in this format:\nmood: <good or bad>\nsure: <0% to 100%>\n\nText: x",
    ),
    "numbered, though one a line": (
        r"1\. .+\n2\. .+\n3\. .+",
        "Return one task per line in your response. Use a numbered list.",
    ),
    "either of two lines": (
        r"[\s\S]+\nVERDICT: (PASS|FAIL)",
        "Think, then end with a line that reads either VERDICT: PASS or VERDICT: FAIL.",
    ),
    "the answer is (X)": (
        r"[\s\S]+\n\nthe answer is \([AB]\)",
        'Finish with "the answer is (X)" where X is the correct letter.\n\nA. Mars\nB. Moss',
    ),
    "records with a delimiter": (
        r'\("entity"<\|>Anna Berg<\|>.+\)##\n\("entity"<\|>Oslo<\|>.+\)##\n<\|COMPLETE\|>',
        'Format each entity as ("entity"<|><entity_name><|><description>)\nUse **##** as the list '
        "delimiter.\nWhen finished, output <|COMPLETE|>\n\nText: Anna Berg is from Oslo.",
    ),
    "documents that are chosen": (
        r"Doc: 1, Relevance: ([1-9]|10)",
        "Some documents are shown below. Each document has a number. Respond with the numbers.\n"
        "Example format:\nDocument 1:\n<summary>\n\n"
        "Question: <question>\nAnswer:\nDoc: 9, Relevance: 7\n\nLet's try this now:\n\nDocument 1:"
        "\nAnts.\n\nQuestion: Who?\nAnswer:\n",
    ),
    "passages that are chosen": (
        r"Passage: 1, Score: ([1-9]|10)",
        "Which passages answer the question?\n\nQuestion: <question>\nAnswer:\n"
        "Passage: 4, Score: 9\n\nNow this one:\n\nQuestion: Who?\nAnswer:\n",
    ),
    "each number in its own range": (
        r'\{"depth": ([1-9]|10), "clarity": [1-5]\}',
        'Rate depth from 1 to 10 and clarity from 1 to 5. Return JSON {"depth": 3, "clarity": 4}',
    ),
    "a rating in brackets, its scale told before": (
        r"\[\[([1-9]|10)\]\]",
        "Rate it on a scale of 1 to 10. Then output your verdict in the format [[rating]].",
    ),
    "rows": (
        r"a,b(\n[^,\n]+,[^,\n]+)+",
        "Return comma-separated rows with the columns a, b.",
        "Convert the notes to CSV (columns: a,b). No commentary.\n\nNotes: x",
    ),
    "true or false, listed": (
        "true|false",
        "Is the earth flat? Respond with only one word:\n- true\n- false",
    ),
}
# What only looks as if it asked for a form.
PROSE = (
    "Why is the sky blue?",
    'Summarise this JSON:\n{"name": "Ann", "tags": ["a", "b"], "age": 3}',
    'Can you explain what this JSON response means? {"status": "ok", "items": [1, 2]}',
    'Context:\n{"answer": "yes or no", "score": "1-5"}\n\nQuestion: What is the product about?',
    'Review this function:\n\ndef f(x):\n    # return json, yes or no\n    return {"answer": x}\n',
    "Review this code:\n```python\ndef f(x):\n    return json.dumps({'a': 'yes or no'})\n```",
    "What is the difference between a polite yes and a polite no in Japan?",
    "Why do people find it hard to answer yes or no to simple questions?",
    "Summarise this e-mail:\n\nHi Ann,\nplease reply with one of: Monday, Friday.\nBest, Bob",
    "Use these pieces of context to answer the question.\n\nQ: Is it red? Answer with one of: yes, "
    'no.\nA: yes\n\nAnswer in JSON: {"a": 1}\n\nQuestion: Which colours are used?\nAnswer:',
    "<context>\nRespond only with one of: a, b, c\n</context>\n\nWhat does the document say?",
    'Translate to French: "Please answer yes or no."',
    "I have to choose one of two jobs, a bank or a school. What do you think?",
    "Write a story about a fox or a bear.",
    "Explain this matrix: [[1]] and [[a]].",
    "Rewrite this so that it is friendlier: Respond with a single word, please.",
    "Compare JSON and XML. Which has better tools?",
    "You are a helpful assistant. Answer questions about JSON politely.",
    "Describe a JSON array of objects to a child.",
    "Create a story about Anna (the girl) and Tom (the boy). What would you say?",
    "Write a letter to my landlord about the table and the five chairs.",
    'My JSON object has keys "score" and "reasoning". Why would a parser reject it?',
    "I asked him to list five fruits, separated by commas. What happened?",
    "The teacher said: finish with a line of the form you like. Write a poem about it.",
    "How do I return JSON from Flask?",
    "What is the difference between YAML and JSON?",
    "Why does `print(x)` output nothing?",
    "What does the <answer> element in my XML do?",
    "What trends do you see in this data?\n\nname,age\nann,3\nbob,5",
    "How many of the numbers between 1 and 10 are prime?",
    "What single word would you use to describe autumn?",
    'I get this response from the API:\n\n{"error": {"code": 429}}\n\nHow should I handle it?',
    "Translate the following text into Spanish.\n\nChoose one of these options: red, blue.",
    "Here is the log. What happened?\n\n2026-01-01 ERROR output must be one of: a, b",
    "My notes:\n1. Buy milk\n2. Choose a category for the blog\n\nHow can I get this done?",
    "Create a table-top game for two people.",
    "Write a function is_even(n). Return True if n is even, False otherwise.",
    "Write tests for parse(): it should return True if it is valid, False otherwise.",
    'Translate to French: Answer "yes" if you agree, "no" if you do not.',
    "Which applies: A. tort or B. contract? Discuss each in detail.",
    "Create a tutorial for JSON.",
    "Find the sum, mean and median of 3 numbers: 1, 2, 3.",
    "My cats (Tom, Mia, Leo) are ill. What should I do? Answer only in English.",
    "Explain what `=== head ===` and `=== body ===` mean in this file.",
    'Give me feedback on this JSON schema:\n{"type": "object", "properties": {"a": {}}}',
    "Here is my config:\n```yaml\nname: x\nsteps:\n  - a\n```\nWhat is wrong with it?",
    "In pandas, how do I convert id and name as JSON?",
    "Say yes if we can, no if we can't, and explain why.",
    "Write a comma-separated essay about the history of punctuation.",
    "Summarise the key points of this CSV:\n\nid,name,score\n1,Ann,4",
    "Write a Python script that reads a CSV with columns name and age.",
    'Use the context. If it has no answer, say "I don\'t know".\n\nContext: a\n\nWho?',
    "Be concise and friendly. Format lists as bullet points where useful.",
    'User: hi\nBot: hello\nUser: give me JSON\nBot: {"a": 1}\n\nWhat mood is the user in?',
    "Alice: Answer yes or no!\nBob: Maybe.\nAlice: One word only!\n\nSummarise this argument.",
    "Write a product description for a table with five legs.",
    "Write a prompt which makes an assistant classify tickets as bug or feature.",
    "Write a unit test that checks that the endpoint returns a JSON object with keys id and name.",
    "Create a component with a select that lets users choose one of red, green and blue.",
    "Write release notes for version 2.0: added JSON export, fixed CSV import.",
    'Write the docs for this.\n\nPOST /answer\nReturns: {"answer": "yes|no"}',
    'Our API returns JSON: {"id": 1, "status": "on|off"}. Errors look like {"error": 1}.\n\nWhy?',
    "Yes or no questions are boring. Why?",
    'Only one of my tests fails: expected "a" or "b". Why?',
    "Never respond in JSON. Be friendly.",
    "Don't return JSON. Hello!",
    "Never use bullet points.",
    "Don't use bullet points or numbered lists.",
    "Do not provide numbered lists unless asked",
    "Do not create a table.",
    "Don't answer with yes or no, explain.",
    "Don't answer in one word.",
    "Avoid JSON.",
    "Answer without bullet points.",
    "Do not use markdown tables or JSON.",
    "Do not format your response using markdown, tables, or bullet lists.",
    "Respond in prose rather than in a table.",
    "Do not wrap the answer in <answer> tags.",
    "Tell me about the <b> tag in HTML.",
    "Explain the <div> tag and the <span> tag.",
    "Give me an overview of JSON.",
    "Show me the structure of a JSON Web Token.",
    "Write about the history of JSON.",
    "Can you show JSON parsing in Rust?",
    "Show an example of a CSV.",
    "Show me how a numbered list works in Word.",
    "Just curious, is it left or right?",
    "Only tell me if you are sure: is it A or B?",
    "Can you label the parts of a flower? Petal or sepal?",
    "Start your answer with 'Yes' or 'No', then explain.",
    "Give me some background on JSON.",
    "Explain the <answer> tag, the <think> tag and their use.",
    "Write a poem about a bullet list.",
    "In our app a user can choose from the options: small, medium, large. Which would you take?",
    'Could you please explain how {"type": "object"} differs from {"type": "array"}?',
    "Compare YAML, XML and JSON for config files.",
    'Under no circumstances return JSON such as {"a": "..."}. Why is the sky blue?',
    "When should one use a bullet list in a book?",
    "Rephrase: the output must be JSON or the parser fails.",
    "Which of the labels on this jar matter for someone with a nut allergy? It says: vegan, nuts.",
    "The docs say to format commits like this:\n\nfix: something\n\nWhy would anyone bother?",
    "Should I save the name, age and city as JSON?",
    "In the template NAME - DATE the date is missing. Why?",
)


class PromptTests(LocalCase):
    """The form that a prompt asks its answer in."""

    SCHEMA = json.dumps({"properties": {"age": {"type": "integer"}}, "required": ["age"]})
    ASKED = f"Answer in JSON. The schema: {SCHEMA}"

    def read(self, *texts):
        """Return the form of a conversation that the user begins."""
        roles = ("user", "assistant") * 4
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        return fake.read_form(messages)

    def test_forms(self):
        for name, (pattern, *prompts) in FORMS.items():
            for prompt in prompts:
                with self.subTest(form=name, prompt=prompt):
                    form = self.read(prompt)
                    self.assertIsNotNone(form)
                    for number in range(3):
                        answer = form.write(fake.HashRandom.of("test", number))
                        self.assertRegex(answer, rf"\A(?:{pattern})\Z", form.label)

    def test_prose_stays_prose(self):
        for prompt in PROSE:
            with self.subTest(prompt=prompt):
                form = self.read(prompt)
                self.assertIsNone(form, form and form.label)

    def test_a_share_in_an_example_is_no_negative_number(self):
        form = self.read('Return JSON like {"share": 0.4, "lon": -73.98, "profit": -2000.5}')
        share, *others = form.schemas["JSON"]["properties"].values()
        self.assertEqual((share["minimum"], share["maximum"]), (0, 1))
        for schema in others:
            self.assertTrue(schema.keys().isdisjoint(("minimum", "maximum")), schema)

    def test_the_last_message_goes_first(self):
        asked = [
            {"role": "system", "content": "Respond only with one of: a, b."},
            {"role": "user", "content": "Answer yes or no: is Mars red?"},
        ]
        self.assertEqual(fake.read_form(asked).label, "one of yes, no, from messages[1]")
        asked[1]["content"] = "Is Mars red?"
        self.assertEqual(fake.read_form(asked).label, "one of a, b, from messages[0]")

    def test_a_turn_that_is_over_asks_for_nothing(self):
        self.assertIsNone(self.read("Answer yes or no: is Mars red?", "yes", "Tell me more of it."))
        said = self.read("Answer yes or no: is Mars red?", "maybe", "Format error: try again.")
        self.assertEqual(said.label, "one of yes, no, from messages[0]")

    def test_the_words_that_end_a_task_come_when_something_was_done(self):
        asked = 'Run the tests. Reply "TERMINATE" when everything is done.'
        self.assertIsNone(self.read(asked))
        system = {"role": "system", "content": asked}
        self.assertIsNone(fake.read_form([system, *say("Go!")]))
        later = [system, *say("Go!"), {"role": "assistant", "content": "Done."}, *say("And?")]
        for form in (self.read(asked, "running", "Result: 3 passed"), fake.read_form(later)):
            self.assertTrue(form.write(fake.HashRandom.of("test", 1)).endswith("TERMINATE"))

    def test_an_agent_calls_its_tool_as_it_takes_it_and_ends(self):
        asked = [{"role": "system", "content": REACT_BLOCKS}, *say("Will it rain?")]
        said = fake.read_form(asked).write(fake.HashRandom.of("test", 1))
        self.assertRegex(said, r'\AThought: .+\nAction: get_rain\nAction Input: \{"day": \d+\}\Z')
        for told in (
            "Observation: no",
            "Analyze the result. If needs are met, provide the answer.",
        ):
            turns = [*asked, {"role": "assistant", "content": said}, *say(told)]
            ended = fake.read_form(turns).write(fake.HashRandom.of("test", 1))
            self.assertRegex(ended, r"\AThought: .+\nAnswer: .+\Z")

    def test_it_is_told_in_the_record(self):
        self.assertEqual(list(json.loads(self.text(self.ASKED))), ["age"])
        call = self.server.requests[-1]
        self.assertEqual(call.form, "JSON by schema, from messages[0]")
        self.assertEqual(call.as_json()["form"], call.form)
        self.text("hello")
        self.assertEqual(self.server.requests[-1].form, "")

    def test_it_holds_for_every_way_to_ask(self):
        body = {"model": THINKER, "input": self.ASKED}
        said = self.post("/v1/responses", body).json["output"][-1]["content"][0]["text"]
        self.assertEqual(list(json.loads(said)), ["age"])
        said = self.post("/v1/completions", {"model": "m", "prompt": self.ASKED}).json["choices"][0]
        self.assertEqual(list(json.loads(said["text"])), ["age"])
        events = self.stream(messages=[{"role": "user", "content": self.ASKED}])
        said = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        self.assertEqual(list(json.loads(said)), ["age"])

    def test_what_the_request_and_fixtures_say_goes_first(self):
        format = {"type": "regex", "pattern": "[0-9]{3}"}
        self.assertRegex(self.text(self.ASKED, response_format=format), r"\A[0-9]{3}\Z")
        self.server.reply("scripted")
        self.assertEqual(self.text(self.ASKED), "scripted")
        self.assertEqual(self.server.requests[-1].form, "")

    def test_one_switch_turns_it_off(self):
        for server in (
            fake.TogetherAiServer(read_prompts=False),
            fake.build_server(fake.read_options(["--no-read-prompts", "--quiet"])),
        ):
            body = {"model": LLAMA, "messages": [{"role": "user", "content": self.ASKED}]}
            server.answer(fake.Request("POST", CHAT, body, headers={"authorization": "Bearer k"}))
            self.assertEqual(server.requests[-1].form, "")
            content = server.requests[-1].reply["choices"][0]["message"]["content"]
            self.assertNotIn('"age"', content)


V4, R1 = "deepseek-ai/DeepSeek-V4-Pro", "deepseek-ai/DeepSeek-R1"


class ThoughtTests(LocalCase):
    def thoughts(self, model=THINKER, **fields):
        got = self.chat(model=model, **fields)
        message, usage = got["choices"][0]["message"], got["usage"]
        if message.get("reasoning"):
            tokens = len(fake.split_tokens(message["reasoning"]))
            counted = tokens if model == V4 else 0
            self.assertEqual(usage["reasoning_tokens"], counted)
            self.assertGreater(usage["completion_tokens"], tokens)
        return message.get("reasoning", "absent")

    def test_who_thinks_and_how_to_switch_it_off(self):
        self.assertEqual(self.thoughts(LLAMA), "absent")
        self.assertTrue(self.thoughts())
        for fields in (
            {"reasoning": {"enabled": False}},
            {"reasoning_effort": "none"},
            {"chat_template_kwargs": {"thinking": False}},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ):
            with self.subTest(fields=fields):
                self.assertEqual(self.thoughts(**fields), "absent")
                self.assertIsNone(self.thoughts("Qwen/Qwen3.5-9B", **fields))
        low, high = (self.thoughts(reasoning_effort=effort) for effort in ("low", "high"))
        self.assertGreater(len(high), len(low))

    def test_only_deepseek_v4_counts_them_beside_the_rest(self):
        self.assertTrue(self.thoughts(V4))

    def test_a_stop_text_ends_them_and_the_answer(self):
        for model in (V4, THINKER, "Qwen/Qwen3.5-9B", KIMI):
            with self.subTest(model=model):
                whole = self.chat(model=model)["choices"][0]["message"]
                key = "reasoning_content" if model == KIMI else "reasoning"
                before, word = whole[key][:20], whole[key][20:26]
                got = self.chat(model=model, stop=["~", word])
                (choice,) = got["choices"]
                message, ended = choice["message"], choice["finish_reason"]
                self.assertEqual((message[key], message["content"], ended), (before, "", "stop"))
                count = len(fake.split_tokens(before))
                self.assertEqual(got["usage"]["completion_tokens"], count)
                events = self.stream(model=model, stop=word)
                self.assertEqual(fold_choices(events), flatten_whole(got))
                cut = self.chat(model=model, stop=word, max_tokens=count - 1)["choices"][0]
                self.assertEqual(cut["finish_reason"], "length")
        first = self.chat(model=THINKER)["choices"][0]["message"]["reasoning"][:3]
        (choice,) = self.chat(model=THINKER, stop=first)["choices"]
        self.assertEqual([*choice["message"]], ["role", "content", "tool_calls"])

    def test_a_stop_text_ends_scripted_ones_too(self):
        with TogetherAiServer(port=0) as self.server:
            self.server.reply("Rome", reasoning="It is in Italy.")
            for fields, wanted in (({"stop": "is"}, "It "), ({}, "It is in Italy.")):
                message = self.chat(model=V4, **fields)["choices"][0]["message"]
                said = (message["reasoning"], message["content"])
                self.assertEqual(said, (wanted, "" if fields else "Rome"))

    def test_deepseek_r1_writes_its_marks_in_one_piece(self):
        texts = [event["choices"][0]["delta"]["content"] for event in self.stream(model=R1)]
        self.assertEqual((texts[0], texts.count("</think>")), ("<think>", 1))


class LogprobTests(LocalCase):
    def test_both_forms_join_to_the_content(self):
        for fields in ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}):
            choice = self.chat(**fields)["choices"][0]
            part, content = choice["logprobs"], choice["message"]["content"]
            if "content" in part:
                tokens = [entry["token"] for entry in part["content"]]
                first = [top["token"] for top in part["content"][0]["top_logprobs"]]
            else:
                tokens, first = part["tokens"], list(part["top_logprobs"][0])
            self.assertEqual("".join(tokens), content)
            self.assertEqual((len(first), first[0]), (3, tokens[0]))
        self.assertIsNone(self.chat()["choices"][0]["logprobs"])

    def test_a_stream_has_those_of_its_engine_whoever_asks(self):
        for headers in (PY3, OPENAI):
            event = self.stream(headers, logprobs=1, max_tokens=2)[0]
            self.assertIs(type(event["choices"][0]["logprobs"]), float)
            events = self.stream(headers, model=OTHER, logprobs=2, max_tokens=2)
            part = events[1]["choices"][0]["logprobs"]
            self.assertEqual([len(tops) for tops in part["top_logprobs"]], [2])
            self.assertEqual(set(part["top_logprobs"][0][0]), {"token", "logprob"})
            self.assertEqual(part["token_ids"], [None])

    def test_a_number_asks_for_the_same_as_true_where_engine_b_answers_whole(self):
        asked = self.chat(model=OTHER, logprobs=2)["choices"][0]["logprobs"]
        self.assertEqual(list(asked), ["content"])
        named = self.chat(model=OTHER, logprobs=True, top_logprobs=2)
        self.assertEqual(named["choices"][0]["logprobs"], asked)

    def test_a_whole_answer_has_those_of_what_was_thought(self):
        (choice,) = self.chat(model=THINKER, logprobs=2)["choices"]
        message, entries = choice["message"], choice["logprobs"]["content"]
        said = "".join(entry["token"] for entry in entries)
        self.assertEqual(said, message["reasoning"] + message["content"])
        events = self.stream(model=THINKER, logprobs=2)
        chunks = [event["choices"][0] for event in events if event["choices"]]
        told = [chunk["logprobs"] for chunk in chunks if chunk["text"]]
        tops = [each["top_logprobs"][0][0]["logprob"] for each in told]
        wanted = [entry["top_logprobs"][0]["logprob"] for entry in entries[-len(told) :]]
        self.assertEqual(tops, wanted)
        thought = [chunk["logprobs"] for chunk in chunks if chunk["delta"]["reasoning"]]
        self.assertEqual(thought, [None] * (len(entries) - len(told)))


class ChatTests(LocalCase):
    def test_the_shape_of_an_answer(self):
        got = self.chat()
        self.assertEqual(
            list(got), ["id", "object", "created", "model", "prompt", "choices", "usage"]
        )
        self.assertRegex(got["id"], r"^\w{7}-\w{6}-[0-9a-f]{16}$")
        self.assertEqual(got["object"], "chat.completion")
        self.assertEqual(got["created"], 1700000000)
        self.assertEqual(got["model"], LLAMA)
        self.assertEqual(got["prompt"], [])
        choice = got["choices"][0]
        self.assertEqual(choice["message"]["role"], "assistant")
        self.assertEqual(choice["message"]["tool_calls"], [])
        self.assertEqual(choice["finish_reason"], "stop")
        usage = got["usage"]
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])

    def test_what_changes_an_answer_and_what_does_not(self):
        plain = self.text()
        for fields in (
            {"model": SMALL_MODEL},
            {"seed": 1},
            {"temperature": 0.3},
            {"top_p": 0.5},
            {"messages": say("hello!")},
        ):
            with self.subTest(changes=fields):
                self.assertNotEqual(self.text(**fields), plain)
        for fields in (
            {"user": "ann"},
            {"metadata": {"a": "b"}},
            {"stream": False},
            {"n": 1},
            {"temperature": None},
            {"unknown": 1},
            {"max_tokens": 2000},
        ):
            with self.subTest(changes_not=fields):
                self.assertEqual(self.text(**fields), plain)

    def test_an_integer_is_a_number(self):
        self.assertEqual(self.text(temperature=1), self.text(temperature=1.0))
        self.assertEqual(self.text(max_tokens=4.0), self.text(max_tokens=4))

    def test_max_tokens_cuts_the_same_answer(self):
        whole = self.text()
        for name in ("max_tokens", "max_completion_tokens"):
            got = self.chat(**{name: 5})
            cut = got["choices"][0]["message"]["content"]
            self.assertTrue(whole.startswith(cut) and cut != whole)
            self.assertEqual(got["choices"][0]["finish_reason"], "length")
            self.assertEqual(got["usage"]["completion_tokens"], 5)

    def test_no_tokens_at_all(self):
        choice = self.chat(max_tokens=0)["choices"][0]
        self.assertEqual((choice["message"]["content"], choice["finish_reason"]), ("", "length"))

    def test_stop_cuts_before_the_first_hit(self):
        whole = self.text()
        words = whole.split()
        for stop in (words[3], [words[9], words[3]], ["", words[3]]):
            got = self.chat(stop=stop)["choices"][0]
            self.assertEqual(got["message"]["content"], whole.partition(words[3])[0])
            self.assertEqual(got["finish_reason"], "stop")

    def test_n_gives_different_choices(self):
        choices = self.chat(n=4)["choices"]
        self.assertEqual([choice["index"] for choice in choices], [0, 1, 2, 3])
        self.assertEqual(len({choice["message"]["content"] for choice in choices}), 4)

    def test_echo_gives_the_prompt(self):
        self.assertEqual(self.chat(echo=True)["prompt"], [{"text": "hello"}])
        part = self.chat(echo=True, logprobs=1)["prompt"][0]["logprobs"]
        self.assertEqual(part["tokens"], ["hello"])
        self.assertLess(part["token_logprobs"][0], 0)

    def test_all_roles_and_parts(self):
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        call = {"id": "c1", **tool("see", arguments="{}")}
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": [{"type": "text", "text": "What is this?"}, picture]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
            {"role": "function", "name": "see", "content": "a cat"},
        ]
        with_picture = self.chat(model=SEES, messages=messages)
        del messages[2]["content"][1]
        without = self.chat(model=SEES, messages=messages)
        tokens = [got["usage"]["prompt_tokens"] for got in (with_picture, without)]
        self.assertEqual(tokens[0] - tokens[1], fake.MEDIA_TOKENS)

    def test_rules_between_the_fields_of_a_message(self):
        for message, param in (
            ({"role": "robot", "content": "x"}, "messages[0].role"),
            ({"content": "x"}, "messages[0].role"),
            ({"role": "user"}, "messages[0].content"),
            ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
            ({"role": "user", "content": 5}, "messages[0].content"),
            ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
            ({"role": "user", "content": [{"text": "x"}]}, "messages[0].content[0].type"),
            ("hello", "messages[0]"),
        ):
            with self.subTest(message=message):
                self.assertRefused(CHAT, {**HELLO, "messages": [message]}, param)

    def test_media_for_a_model_that_cannot_take_it_is_refused(self):
        for part in (
            {"type": "image_url", "image_url": {"url": PIXEL}},
            {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}},
            {"type": "audio_url", "audio_url": {"url": "https://example.com/a.wav"}},
        ):
            with self.subTest(part=part["type"]):
                got = self.ask("POST", CHAT, {"model": LLAMA, "messages": say([part])})
                refused = (400, "invalid_request_error", None, "Input validation error")
                self.assertApiError(got, *refused)
                self.chat([part], model="nobody/knows")

    def test_the_context_length_is_kept(self):
        length = 32768
        for model, sentence in (
            (SMALL_MODEL, r"`inputs` tokens \+ `max_new_tokens` must be <= \d+\. Given: "),
            (SEES, r"^The input \(\d+ tokens\) is longer than the model's context"),
        ):
            with self.subTest(model=model):
                long = {"model": model, "messages": say("word " * (length + 200))}
                error = self.json("POST", CHAT, long, status=400)["error"]
                self.assertRegex(error["message"], sentence)
                self.assertIsNone(error["param"])
                truncate = {"context_length_exceeded_behavior": "truncate"}
                usage = self.post(CHAT, {**long, **truncate}).json["usage"]
                self.assertLessEqual(usage["total_tokens"], length)
                cut = self.chat(model=model, max_tokens=length + 200, **truncate)
                self.assertEqual(cut["choices"][0]["finish_reason"], "stop")

    def test_the_context_is_full_to_the_token(self):
        room = 32768
        for model, extra in ((SMALL_MODEL, 1), (SEES, 0)):  # engine A takes one token more
            prompt = self.chat(model=model)["usage"]["prompt_tokens"]
            for limit, status in ((room + extra, 200), (room + extra + 1, 400)):
                asked = {**HELLO, "model": model, "max_tokens": limit - prompt}
                with self.subTest(model=model, limit=limit):
                    self.assertEqual(self.ask("POST", CHAT, asked).status, status)
                    words = "hello" + " a" * (limit - prompt - 1)  # and one token is written
                    got = self.ask("POST", CHAT, {**HELLO, "model": model, "messages": say(words)})
                    self.assertEqual(got.status, status)
                    if status == 200:
                        usage = got.json["usage"]
                        self.assertEqual(usage["total_tokens"], room)
                        self.assertEqual(usage["completion_tokens"], 1)

    def test_choices_of_a_stream_interleave(self):
        events = self.stream(n=2)
        self.assertEqual([event["choices"][0]["index"] for event in events[:4]], [0, 1, 0, 1])

    def test_an_early_error_of_a_stream_is_an_http_error(self):
        self.assertRefused(CHAT, {"model": LLAMA, "stream": True}, "messages")

    def test_a_guard_says_safe(self):
        self.assertEqual(self.text(model="meta-llama/Llama-Guard-4-12B"), "safe")


def outline(value):
    """Return the keys of JSON in their order, in the words "id choices[index message[role]]"."""
    if isinstance(value, list):
        return outline(value[0]) if value else ""
    if not isinstance(value, dict):
        return ""
    parts = ((key, outline(inner)) for key, inner in value.items())
    return " ".join(f"{key}[{inner}]" if inner else key for key, inner in parts)


USAGE_A = "usage[prompt_tokens completion_tokens total_tokens cached_tokens]"
USAGE_B = "usage[prompt_tokens total_tokens completion_tokens reasoning_tokens]"
DETAILS = (
    "usage[prompt_tokens completion_tokens total_tokens prompt_tokens_details[cached_tokens]"
    " completion_tokens_details[reasoning_tokens]]"
)
DETAILS_QWEN = (
    "usage[completion_tokens completion_tokens_details[reasoning_tokens text_tokens]"
    " prompt_tokens prompt_tokens_details[cached_tokens text_tokens] total_tokens]"
)
WHOLE_A = "id object created model prompt choices[finish_reason seed index logprobs message[%s]] "
WHOLE_B = (
    "id object created model metadata[weight_version] prompt"
    " choices[index message[%s] logprobs finish_reason seed] "
)
WHOLE_K = (
    "id object created model system_fingerprint prompt"
    " choices[index message[%s] finish_reason seed] "
)
WHOLE_C = "id object created model choices[index message[%s] finish_reason%s] %s system_fingerprint"
CALL_A = "tool_calls[index id type function[arguments name]]"
CALL_B = "tool_calls[id index type function[name arguments]]"
CALL_C = "tool_calls[index id type function[name arguments]]"
B_SAYS = "role content tool_calls reasoning"
# engine: (model, its whole, its whole with a tool call)
WHOLES = {
    "A": (
        LLAMA,
        WHOLE_A % "role content tool_calls" + USAGE_A,
        WHOLE_A % f"role content {CALL_A}" + USAGE_A,
    ),
    "B": (
        OTHER,
        WHOLE_B % B_SAYS + USAGE_B,
        WHOLE_B % B_SAYS.replace("tool_calls", CALL_B) + USAGE_B,
    ),
    "V4": (
        V4,
        WHOLE_B % B_SAYS + USAGE_B,
        WHOLE_B % B_SAYS.replace("tool_calls", CALL_B) + USAGE_B,
    ),
    "Scout": (
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        WHOLE_B % B_SAYS + USAGE_B[:-18] + "]",
        WHOLE_B % B_SAYS.replace("tool_calls", CALL_B) + USAGE_B[:-18] + "]",
    ),
    "gpt-oss-20b": (
        THINKER,
        WHOLE_B % B_SAYS + USAGE_B,
        WHOLE_B % B_SAYS.replace("tool_calls", CALL_B) + USAGE_B,
    ),
    "K2.7": (
        KIMI_CODE,
        WHOLE_K % B_SAYS + DETAILS,
        WHOLE_K % B_SAYS.replace("tool_calls", CALL_B) + DETAILS,
    ),
    "gpt-oss-120b": (
        "openai/gpt-oss-120b",
        WHOLE_K % B_SAYS + DETAILS,
        WHOLE_K % B_SAYS.replace("tool_calls", "tool_calls[id type function[name arguments]]")
        + DETAILS,
    ),
    "C": (
        KIMI,
        WHOLE_C % ("role content reasoning_content", "", DETAILS),
        WHOLE_C % (f"role content reasoning_content {CALL_C}", "", DETAILS),
    ),
    "DeepSeek": (
        "deepseek-ai/DeepSeek-V4.1-Flash",
        WHOLE_C % ("role content reasoning_content", "", DETAILS),
        WHOLE_C % (f"role content reasoning_content {CALL_C}", "", DETAILS),
    ),
    "GLM": (
        "zai-org/GLM-5.2",
        WHOLE_C % ("role content reasoning_content", " matched_stop", DETAILS),
        WHOLE_C % (f"role content reasoning_content {CALL_C}", " matched_stop", DETAILS),
    ),
}
QWEN = "Qwen/Qwen3.7-Plus"  # which only streams
CHUNK_A = "id object created choices[index text logprobs finish_reason seed delta[%s]] model "
CHUNK_B = "id object created choices[index text logprobs finish_reason delta[%s]] model"
CHUNK_C = (
    "id object created model system_fingerprint choices[index delta%s logprobs finish_reason%s]"
)
CHUNK_Q = "id object created choices[index delta[%s] finish_reason logprobs text] model usage"
A_SAYS, B_SAYS, Q_SAYS = (
    f"token_id role content{rest}" for rest in ("", " reasoning", " {} reasoning")
)
# engine: the chunks of a text, then those of a tool call; equal ones told once
STREAMS = {
    "A": (
        [CHUNK_A % A_SAYS + "usage", CHUNK_A % A_SAYS + USAGE_A],
        [
            CHUNK_B.replace("text", "role text") % A_SAYS,
            CHUNK_B % f"{A_SAYS} {CALL_C}",
            CHUNK_B % f"{A_SAYS} tool_calls[index function[arguments]]",
            CHUNK_A % A_SAYS + USAGE_A,
        ],
    ),
    "B": (
        [
            CHUNK_B % B_SAYS,
            CHUNK_B % B_SAYS + " usage",
            f"id object created choices model {USAGE_B}",
        ],
        [
            CHUNK_B % B_SAYS,
            CHUNK_B % Q_SAYS.format(CALL_B) + " usage",
            CHUNK_B % B_SAYS + " usage",
            f"id object created choices model {USAGE_B}",
        ],
    ),
    "gpt-oss-120b": (
        [
            CHUNK_B % B_SAYS,
            CHUNK_B % B_SAYS + " usage",
            f"id object created choices model {DETAILS}",
        ],
        [
            CHUNK_B % B_SAYS,
            CHUNK_B % B_SAYS + " usage",
            CHUNK_B % Q_SAYS.format(CALL_B) + " usage",
            CHUNK_B % B_SAYS + " usage",
            f"id object created choices model {DETAILS}",
        ],
    ),
    "C": (
        [
            CHUNK_C % ("[role content]", ""),
            CHUNK_C % ("[reasoning_content]", ""),
            CHUNK_C % ("[content]", ""),
            CHUNK_C % ("", f" {DETAILS}"),
            f"id object created model system_fingerprint choices {DETAILS}",
        ],
        [
            CHUNK_C % ("[role content]", ""),
            CHUNK_C % ("[reasoning_content]", ""),
            CHUNK_C % (f"[{CALL_C}]", ""),
            CHUNK_C % ("[tool_calls[index function[arguments]]]", ""),
            CHUNK_C % ("", f" {DETAILS}"),
            f"id object created model system_fingerprint choices {DETAILS}",
        ],
    ),
    "GLM": (
        [
            CHUNK_C % ("[role reasoning_content]", ""),
            CHUNK_C % ("[reasoning_content]", ""),
            CHUNK_C % ("[content reasoning_content]", ""),
            CHUNK_C % ("[reasoning_content]", " matched_stop"),
            f"id object created model system_fingerprint choices {DETAILS}",
        ],
        [
            CHUNK_C % ("[role reasoning_content]", ""),
            CHUNK_C % ("[reasoning_content]", ""),
            CHUNK_C % (f"[{CALL_C} reasoning_content]", ""),
            CHUNK_C % ("[tool_calls[index function[arguments]] reasoning_content]", ""),
            CHUNK_C % ("[reasoning_content]", " matched_stop"),
            f"id object created model system_fingerprint choices {DETAILS}",
        ],
    ),
    "Qwen": (
        [
            CHUNK_A % A_SAYS + "usage",
            CHUNK_Q.replace("delta[%s] finish_reason logprobs", "logprobs delta[%s] finish_reason")
            % B_SAYS,
            CHUNK_Q % B_SAYS,
            CHUNK_Q % A_SAYS,
            f"id object created choices model {DETAILS_QWEN}",
        ],
        [
            CHUNK_A % A_SAYS + "usage",
            CHUNK_Q.replace("delta[%s] finish_reason logprobs", "logprobs delta[%s] finish_reason")
            % B_SAYS,
            CHUNK_Q % B_SAYS,
            CHUNK_Q % Q_SAYS.format(CALL_C),
            CHUNK_Q % Q_SAYS.format("tool_calls[index id type function[arguments]]"),
            CHUNK_Q % f"{A_SAYS} tool_calls[function[arguments] index id type]",
            CHUNK_Q % A_SAYS,
            f"id object created choices model {DETAILS_QWEN}",
        ],
    ),
}


class FormTests(LocalCase):
    """The form that each engine of production gives its answers, as recordings show it."""

    WEATHER = MappingProxyType({"messages": say("the weather in Rome"), "tools": [WEATHER]})
    MODELS = MappingProxyType(
        {**{engine: model for engine, (model, *_) in WHOLES.items()}, "Qwen": QWEN}
    )

    def test_each_engine_has_a_model_here(self):
        self.assertEqual(set(fake.ENGINE_NAMES), set(self.MODELS))
        others = {"completion", "completion of A", "gpt-oss-20b without tools"}
        self.assertEqual(set(fake.FORMS), {*fake.ENGINE_NAMES, *others})
        for engine, model in self.MODELS.items():
            self.assertEqual(fake.MODELS[model].engine, engine)

    def test_each_whole_answer(self):
        for engine, (model, *wanted) in WHOLES.items():
            for fields, outlined in zip(({}, self.WEATHER), wanted):
                with self.subTest(engine=engine, fields=list(fields)):
                    self.assertEqual(outline(self.chat(model=model, **fields)), outlined)

    def test_each_stream(self):
        for engine, streams in STREAMS.items():
            for fields, wanted in zip(({}, self.WEATHER), streams):
                with self.subTest(engine=engine, fields=list(fields)):
                    outlines = map(outline, self.stream(model=self.MODELS[engine], **fields))
                    self.assertEqual([told for told, _ in itertools.groupby(outlines)], wanted)

    def test_what_stands_beside_tool_calls(self):
        for engine, content in (("A", None), ("B", ""), ("K2.7", ""), ("C", None)):
            got = self.chat(model=self.MODELS[engine], **self.WEATHER)
            self.assertEqual(got["choices"][0]["message"]["content"], content, engine)
        talker = {"model": self.MODELS["gpt-oss-120b"], **self.WEATHER}
        for limit in (None, 40, 45, 60):
            got = self.chat(**talker, max_tokens=limit)
            choice, usage = got["choices"][0], got["usage"]
            if limit is None:
                self.assertTrue(choice["message"]["content"] and choice["message"]["tool_calls"])
            else:
                self.assertLessEqual(usage["completion_tokens"], limit)
                self.assertEqual(choice["finish_reason"], "length")

    def test_cached_tokens_are_what_was_asked_before(self):
        long = say("word " * 100)
        talk = [*long, {"role": "assistant", "content": "Yes."}, *say("And now?")]
        for engine, places in (
            ("A", ("cached_tokens",)),
            ("B", ("prompt_tokens_details", "cached_tokens")),
            ("C", ("prompt_tokens_details", "cached_tokens")),
        ):
            model = self.MODELS[engine]
            usage = self.chat(model=model, messages=talk)["usage"]
            self.assertEqual(functools.reduce(operator.getitem, places, usage), 64, engine)
            self.assertEqual(self.stream(model=model, messages=talk)[-1]["usage"], usage)
            for messages in (long, [*say("Hi"), *talk[1:]]):
                usage = self.chat(model=model, messages=messages)["usage"]
                details = usage.get("prompt_tokens_details", usage)
                self.assertEqual(details.get("cached_tokens", 0), 0, engine)
        body = {"model": LLAMA, "input": talk}
        usage = self.json("POST", RESPONSES_PATH, body)["usage"]
        self.assertEqual(usage["input_tokens_details"]["cached_tokens"], 64)

    def test_the_ids_of_each_engine(self):
        own, letters = r"\w{7}-\w{6}-[0-9a-f]{16}", r"call_[0-9a-f]{24}"
        uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
        for engine, id, call in (
            ("A", own, r"call_[0-9a-z]{24}"),
            ("B", own, letters),
            ("gpt-oss-120b", own, "call_" + uuid),
            ("C", "chatcmpl-[0-9a-f]{24}", "get_weather_0"),
            ("GLM", "[0-9a-f]{8}-aws_ue2", letters),
            ("Qwen", "chatcmpl-" + uuid, letters),
        ):
            with self.subTest(engine=engine):
                events = self.stream(model=self.MODELS[engine], **self.WEATHER)
                self.assertRegex(events[0]["id"], f"^{id}$")
                (named,) = fold_choices(events)["choices"][0]["calls"].values()
                self.assertRegex(named["id"], f"^{call}$")

    def test_the_media_type_of_each_engine(self):
        for engine, (model, *_) in WHOLES.items():
            got = self.ask("POST", CHAT, {**HELLO, "model": model})
            plain = engine in ("DeepSeek", "GLM")
            wanted = "application/json" + ("" if plain else "; charset=utf-8")
            self.assertEqual(got.headers["content-type"], wanted, engine)

    def test_the_role_is_in_each_delta_but_for_what_is_passed_through(self):
        for engine, model in self.MODELS.items():
            for headers in (OPENAI, PY3):
                with self.subTest(engine=engine):
                    events = self.stream(headers, model=model, max_tokens=4)
                    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
                    roles = sum("role" in delta for delta in deltas)
                    first = engine in ("C", "DeepSeek", "GLM")
                    self.assertEqual(roles, 1 if first else len(deltas))

    def test_a_comment_keeps_a_stream_of_engine_c_alive(self):
        for engine, model in self.MODELS.items():
            raw = self.ask("POST", CHAT, {**HELLO, "model": model, "stream": True}).raw
            commented = engine in ("C", "DeepSeek", "GLM")
            self.assertEqual(raw.count(b"\n\n: keepalive\n\n"), commented, engine)

    def test_what_a_token_or_text_ended(self):
        glm = {"model": self.MODELS["GLM"]}
        for fields, wanted in (
            ({}, 154827),
            (self.WEATHER, 154829),
            ({"stop": ["e"], "reasoning": {"enabled": False}}, "e"),
            ({"max_tokens": 1}, None),
        ):
            with self.subTest(fields=fields):
                choice = self.chat(**glm, **fields)["choices"][0]
                self.assertEqual(choice.get("matched_stop"), wanted)
                self.assertEqual("matched_stop" in choice, wanted is not None)
                end = self.stream(**glm, **fields)[-2]["choices"][0]
                self.assertEqual(end.get("matched_stop"), wanted)

    def test_gpt_oss_120b_thinks_always_and_takes_any_effort(self):
        model = self.MODELS["gpt-oss-120b"]
        self.assertTrue(self.chat(model=model, reasoning_effort="bogus"))
        self.assertRefused(CHAT, {**HELLO, "reasoning_effort": "bogus"}, "reasoning_effort")
        got = self.chat(model=model, reasoning_effort="none")
        self.assertNotIn("reasoning", got["choices"][0]["message"])
        self.assertGreater(got["usage"]["completion_tokens_details"]["reasoning_tokens"], 0)
        shown = self.chat(model=model)["choices"][0]["message"]["reasoning"]
        self.assertTrue(shown)
        flash = self.chat(model="zai-org/GLM-5.3-Flash", reasoning_effort="none")
        self.assertTrue(flash["choices"][0]["message"]["reasoning_content"])
        glm = self.chat(model=self.MODELS["GLM"], reasoning_effort="none")
        self.assertIsNone(glm["choices"][0]["message"]["reasoning_content"])
        self.assertNotIn("completion_tokens_details", glm["usage"])

    def test_what_is_passed_on_to_alibaba(self):
        def refused(**fields):
            got = self.ask("POST", CHAT, {**HELLO, "model": QWEN, **fields})
            self.assertEqual(got.status, 400)
            return got.json["error"]

        error = refused()
        self.assertEqual((error["param"], error["code"]), ("stream", "streaming_required"))
        error = refused(stream=True, tools=[WEATHER], tool_choice="required")
        self.assertIn("thinking mode", error["message"])
        error = refused(stream=True, messages=[{"role": "developer", "content": "x"}, *say("y")])
        self.assertIn("developer is not one of", error["message"])
        self.server.reply("Scripted.")
        self.assertEqual(refused()["code"], "streaming_required")
        self.server.reset()
        off = {"model": QWEN, "tools": [WEATHER], "tool_choice": "required"}
        events = self.stream(**off, chat_template_kwargs={"enable_thinking": False})
        folded = fold_choices(events)["choices"][0]
        self.assertEqual((folded["text"], folded["finish_reason"]), ("", "tool_calls"))
        self.assertEqual(
            fold_choices(self.stream(model=QWEN))["choices"][0]["text"][:8], "<think>\n"
        )
        for stream, status in ((True, 200), (False, 400)):
            body = {"model": QWEN, "input": "hello", "stream": stream}
            self.assertEqual(self.ask("POST", RESPONSES_PATH, body).status, status)

    def test_the_seed(self):
        number = self.chat()["choices"][0]["seed"]
        self.assertTrue(0 <= number < 2**64)
        for engine, seed in (("A", 7), ("B", None), ("K2.7", None)):
            got = self.chat(model=self.MODELS[engine], seed=7)
            self.assertEqual(got["choices"][0]["seed"], seed, engine)

    def test_r1_reasons_in_its_content(self):
        self.assertRegex(self.text(model=R1), r"^<think>\n[^<]+</think>\n")

    def test_tools_in_the_stream_of_each_engine(self):
        for engine, count in (("A", 4), ("B", 4)):
            with self.subTest(engine=engine):
                events = self.stream(model=self.MODELS[engine], **self.WEATHER)
                self.assertGreaterEqual(len(events), count)
                opener, head, *fragments = events
                self.assertNotIn("tool_calls", opener["choices"][0]["delta"])
                (call,) = head["choices"][0]["delta"]["tool_calls"]
                self.assertEqual(call["function"], {"name": "get_weather", "arguments": ""})
                reasons = [
                    event["choices"][0]["finish_reason"] for event in fragments if event["choices"]
                ]
                finishes = {"A": 2, "B": 1}[engine]  # A tells it with the arguments already
                self.assertEqual(reasons[-finishes:], ["tool_calls"] * finishes)
                self.assertEqual(set(reasons[:-finishes]) - {None}, set())
        fragment = self.stream(model=OTHER, **self.WEATHER)[2]
        self.assertEqual(
            outline(fragment["choices"][0]["delta"]["tool_calls"]),
            "id index type function[name arguments]",
        )
        (call,) = fragment["choices"][0]["delta"]["tool_calls"]
        self.assertEqual((call["id"], call["function"]["name"]), (None, None))

    def test_a_message_without_content_is_refused_by_gpt_oss_120b_where_strict(self):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        talk = [*say("x"), {"role": "assistant", "content": None, "tool_calls": [call]}]
        talk.append({"role": "tool", "tool_call_id": "c", "content": "1"})
        for engine, status in (("gpt-oss-120b", 400), ("gpt-oss-20b", 200), ("A", 200), ("C", 200)):
            body = {"model": self.MODELS[engine], "messages": talk}
            self.assertEqual(self.ask("POST", CHAT, body).status, 200)
            self.server.strict = True
            self.addCleanup(setattr, self.server, "strict", False)
            self.assertEqual(self.ask("POST", CHAT, body).status, status, engine)
            self.server.strict = False

    def test_the_end_of_a_stream(self):
        for options in ({}, {"stream_options": {"include_usage": True}}):
            last = self.stream(**options)[-1]
            self.assertEqual(last["choices"][0]["finish_reason"], "stop")
            self.assertEqual(last["usage"], self.chat()["usage"])
            *_, finish, last = self.stream(model=OTHER, **options)
            self.assertEqual(finish["choices"][0]["finish_reason"], "stop")
            self.assertEqual((last["choices"], last["usage"]["total_tokens"] > 0), ([], True))

    def test_arguments_are_spaced_as_the_engine_does(self):
        for engine, model in self.MODELS.items():
            if engine != "Qwen":
                message = self.chat(model=model, **self.WEATHER)["choices"][0]["message"]
                spaced = engine not in ("A", "gpt-oss-120b", "C")
                arguments = message["tool_calls"][0]["function"]["arguments"]
                self.assertEqual('": ' in arguments, spaced, engine)

    def test_seeds_go_beyond_what_signed_integers_hold(self):
        seeds = [self.chat(messages=say(str(n)))["choices"][0]["seed"] for n in range(20)]
        self.assertTrue(2**63 < max(seeds) < 2**64, max(seeds))

    def test_tools_that_may_not_be_called_are_not_in_the_prompt(self):
        plain = self.chat()["usage"]["prompt_tokens"]
        told = [
            self.chat(tools=[WEATHER], tool_choice=choice)["usage"]["prompt_tokens"]
            for choice in ("none", "auto")
        ]
        self.assertEqual(told[0], plain)
        self.assertGreater(told[1], plain)

    def test_gpt_oss_whose_tools_must_not_be_called(self):
        fields = {"model": THINKER, "tools": [WEATHER], "tool_choice": "none"}
        choice = "choices[index logprobs finish_reason seed message[role content tool_calls]]"
        self.assertIn(choice, outline(self.chat(**fields)))
        events = self.stream(**fields)
        self.assertIn("matched_stop delta[token_id role content]", outline(events[0]))
        self.assertIsNone(events[0]["usage"])
        self.assertIs(type(events[-2]["choices"][0]["matched_stop"]), int)

    def test_the_fold_of_each_stream_is_the_whole(self):
        for engine, (model, *_) in WHOLES.items():
            for fields in (
                {},
                {"max_tokens": 3},
                {"stop": "."},
                {"reasoning": {"enabled": False}},
                {"logprobs": True, "top_logprobs": 1},
                {**self.WEATHER, "n": 2},
                {**self.WEATHER, "tool_choice": "required"},
                {"tools": [WEATHER], "tool_choice": "none"},
                {"response_format": {"type": "json_object"}},
            ):
                with self.subTest(engine=engine, fields=fields):
                    whole = self.chat(model=model, **fields)
                    events = self.stream(model=model, **fields)
                    self.assertEqual(fold_choices(events), flatten_whole(whole))


class BudgetTests(LocalCase):
    """What a limit leaves of an answer: below it, at it, above it."""

    def models(self):
        """Return a model of each engine that also answers whole."""
        return {engine: model for engine, model in FormTests.MODELS.items() if engine != "Qwen"}

    def test_engine_a_tells_logprobs_in_the_form_they_were_asked_in(self):
        for asked, key in ((1, "token_logprobs"), (True, "content")):
            (choice,) = self.chat(logprobs=asked, max_tokens=2)["choices"]
            self.assertEqual(len(choice["logprobs"][key]), 2)

    def test_as_many_alternatives_as_were_asked_for(self):
        for count in (1, 2, 20):
            fields = {"model": OTHER, "logprobs": True, "top_logprobs": count, "max_tokens": 3}
            (choice,) = self.chat(**fields)["choices"]
            content = choice["logprobs"]["content"]
            self.assertEqual([len(token["top_logprobs"]) for token in content], [count] * 3)

    def test_a_text_ends_by_itself_at_its_own_length(self):
        for engine, model in self.models().items():
            whole = self.chat(model=model)
            length = whole["usage"]["completion_tokens"]
            for spare, reason in ((-1, "length"), (0, "stop"), (1, "stop")):
                with self.subTest(engine=engine, spare=spare):
                    cut = self.chat(model=model, max_tokens=length + spare)
                    self.assertEqual(cut["choices"][0]["finish_reason"], reason)
                    self.assertEqual(cut["usage"]["completion_tokens"], length + min(spare, 0))
                    same = cut["choices"][0]["message"] == whole["choices"][0]["message"]
                    self.assertEqual(same, reason == "stop")

    def test_arguments_are_cut_at_the_last_token(self):
        for engine, model in self.models().items():
            fields = {"model": model, "messages": say("weather in Rome"), "tools": [WEATHER]}
            whole = self.chat(**fields)
            length = whole["usage"]["completion_tokens"]
            (wanted,) = whole["choices"][0]["message"]["tool_calls"]
            for spare in (-1, 0):
                with self.subTest(engine=engine, spare=spare):
                    choice = self.chat(**fields, max_tokens=length + spare)["choices"][0]
                    (call,) = choice["message"]["tool_calls"]
                    reason = "length" if spare else "tool_calls"
                    self.assertEqual(choice["finish_reason"], reason)
                    arguments = wanted["function"]["arguments"]
                    arguments = arguments[:-1] if spare else arguments
                    self.assertEqual(call["function"]["arguments"], arguments)

    def test_a_name_is_whole_or_missing(self):
        tools = [WEATHER, tool("get_weather_forecast", parameters=CITY)]
        fields = {"messages": say("get the weather"), "tools": tools}
        whole = self.chat(**fields)
        first, second = (call["function"] for call in whole["choices"][0]["message"]["tool_calls"])
        spent = fake.count_tokens(first["name"]) + fake.count_tokens(first["arguments"])
        name = fake.count_tokens(second["name"])
        for limit, names in (
            (spent - 1, [first["name"]]),
            (spent, [first["name"]]),
            (spent + name - 1, [first["name"]]),
            (spent + name, [first["name"], second["name"]]),
        ):
            with self.subTest(limit=limit):
                choice = self.chat(**fields, max_tokens=limit)["choices"][0]
                calls = [call["function"] for call in choice["message"]["tool_calls"]]
                self.assertEqual([call["name"] for call in calls], names)
                self.assertEqual(choice["finish_reason"], "length")
        self.assertEqual(calls[1]["arguments"], "")

    def test_each_token_is_a_chunk_and_an_end_by_itself_one_more(self):
        length = self.chat()["usage"]["completion_tokens"]
        for limit, count in ((length - 1, length - 1), (length, length + 1)):
            with self.subTest(limit=limit):
                events = self.stream(max_tokens=limit)  # of engine A, where no usage follows
                self.assertEqual(len(events), count)
                ends = [event["choices"][0]["finish_reason"] for event in events]
                self.assertEqual([bool(end) for end in ends], [False] * (count - 1) + [True])

    def test_all_that_is_written_is_counted(self):
        named = {"functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}}
        for engine, model in self.models().items():
            for fields in ({}, {"n": 2}, {"tools": [WEATHER], "tool_choice": "required"}, named):
                with self.subTest(engine=engine, fields=fields):
                    got = self.chat(model=model, **fields)
                    written = 0
                    for choice in got["choices"]:
                        message = choice["message"]
                        calls = [call["function"] for call in message.get("tool_calls") or ()]
                        calls += [message["function_call"]] if message.get("function_call") else []
                        texts = [call[key] for call in calls for key in ("name", "arguments")]
                        thoughts = message.get("reasoning") or message.get("reasoning_content")
                        texts += [message["content"] or "", thoughts or ""]
                        written += sum(map(fake.count_tokens, texts))
                    usage = got["usage"]
                    self.assertEqual(usage["completion_tokens"], written)
                    self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + written)

    def test_a_context_of_unknown_length_is_never_too_short(self):
        got = self.chat(model="acme/unknown", max_tokens=2**70)
        self.assertEqual(got["choices"][0]["finish_reason"], "stop")

    def test_one_choice_is_what_absent_n_means(self):
        self.assertEqual(self.chat(n=1), self.chat())
        self.assertNotEqual(self.chat(n=2)["id"], self.chat()["id"])

    def test_who_may_be_called(self):
        self.assertEqual(
            self.ask("POST", CHAT, {**HELLO, "tool_choice": {"allowed_tools": {}}}).status, 200
        )
        fields = {"tools": [WEATHER], "tool_choice": "required"}
        self.assertEqual(self.chat(**fields)["choices"][0]["finish_reason"], "tool_calls")
        self.server.strict = True  # where the one model that cannot be made to refuses
        for model, status in ((SMALL_MODEL, 422), (LLAMA, 200)):
            body = {**HELLO, **fields, "model": model}
            self.assertEqual(self.ask("POST", CHAT, body).status, status)
        free = self.chat(model=SMALL_MODEL, tools=[WEATHER])
        self.assertEqual(free["choices"][0]["finish_reason"], "stop")


class CompletionTests(LocalCase):
    def complete(self, prompt="Once upon", headers=KEY, **fields):
        body = {"model": "mistralai/Mixtral-8x7B-v0.1", "prompt": prompt, **fields}
        return self.ask("POST", "/v1/completions", body, headers).json

    def test_a_continuation_begins_with_a_blank(self):
        body = {"model": LLAMA, "prompt": "Once upon"}
        (choice,) = self.post("/v1/completions", body).json["choices"]
        self.assertRegex(choice["text"], r"^ \w")
        self.assertRegex(self.text("Once upon"), r"^\w")

    def test_a_stream_tells_the_same_logprobs(self):
        body = {"model": LLAMA, "prompt": "Once upon", "max_tokens": 4, "logprobs": 2}
        (whole,) = self.post("/v1/completions", body).json["choices"]
        events = self.post("/v1/completions", {**body, "stream": True}).events
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            parts = [event["choices"][0]["logprobs"] for event in events]
            told = [value for part in parts for value in (part or {}).get(name) or ()]
            self.assertEqual(told, whole["logprobs"].get(name) or [], name)
        self.assertEqual(len(whole["logprobs"]["tokens"]), 4)

    def test_the_seed_comes_with_the_end(self):
        body = {"model": LLAMA, "prompt": "Once upon", "max_tokens": 3, "stream": True}
        *before, last = self.post("/v1/completions", body).events
        self.assertEqual({event["choices"][0]["seed"] for event in before}, {None})
        self.assertIsInstance(last["choices"][0]["seed"], int)
        self.assertEqual(last["choices"][0]["finish_reason"], "length")

    def test_the_four_forms_of_a_prompt(self):
        one = self.complete("Once upon")["choices"][0]["text"]
        two = self.complete(["Once upon", "a time"])
        self.assertEqual([choice["index"] for choice in two["choices"]], [0, 1])
        self.assertEqual(two["choices"][0]["text"], one)
        tokens = self.complete([1, 2, 3])
        self.assertEqual(tokens["usage"]["prompt_tokens"], 3)
        self.assertEqual(self.complete([[1, 2, 3], [4]])["usage"]["prompt_tokens"], 4)

    def test_bad_prompts(self):
        for prompt, param in (
            ([], "prompt"),
            ([1, "a"], "prompt"),
            ([[]], "prompt[0]"),
            (5, "prompt"),
        ):
            with self.subTest(prompt=prompt):
                self.assertEqual(self.complete(prompt)["error"]["param"], param)
        self.assertEqual(self.complete("")["error"]["message"], "Prompt cannot be empty")

    def test_object_of_production_and_of_the_original_for_who_is_no_sdk(self):
        sent, original = ("text.completion", "completion.chunk"), ("text_completion",) * 2
        for headers, (whole, chunk) in (
            ({**KEY, "User-Agent": "curl/8"}, original),
            (OPENAI, sent),
            ({**KEY, "User-Agent": "OpenAI/Python 3.54.0"}, sent),
            ({**KEY, "User-Agent": "AsyncOpenAI/Python 3"}, sent),
            ({**KEY, "User-Agent": "my-app/1", "X-Stainless-Lang": "python"}, sent),
            (PY1, sent),
            (PY3, sent),
        ):
            with self.subTest(headers=headers):
                self.assertEqual(self.complete(headers=headers)["object"], whole)
                body = {"model": "m", "prompt": "p", "stream": True}
                got = self.ask("POST", "/v1/completions", body, headers)
                self.assertEqual({event["object"] for event in got.events}, {chunk})

    def test_echo_is_in_the_prompt_whoever_asks(self):
        text = self.complete()["choices"][0]["text"]
        for headers in (KEY, OPENAI):
            got = self.complete(echo=True, headers=headers)
            self.assertEqual(got["prompt"], [{"text": "Once upon"}])
            self.assertEqual(got["choices"][0]["text"], text)

    def test_the_shape_of_an_answer(self):
        choice = ["text", "finish_reason", "logprobs", "index"]
        for model, keys in (("m", choice), ("m-Turbo", [*choice[:2], "seed", *choice[2:]])):
            got = self.complete(model=model)
            shape = ["id", "object", "created", "model", "prompt", "choices", "usage"]
            self.assertEqual(list(got), shape)
            self.assertEqual(list(got["choices"][0]), keys)

    def test_logprobs_join_to_the_text(self):
        choice = self.complete(logprobs=2, max_tokens=6)["choices"][0]
        part = choice["logprobs"]
        self.assertEqual("".join(part["tokens"]), choice["text"])
        self.assertEqual(len(part["top_logprobs"][0]), 2)
        self.assertEqual(part["text_offset"][:2], [0, len(part["tokens"][0])])

    def test_nothing_is_written_where_max_tokens_is_0(self):
        whole = self.complete(max_tokens=0)
        body = {"model": "mistralai/Mixtral-8x7B-v0.1", "prompt": "Once upon", "max_tokens": 0}
        events = self.post("/v1/completions", {**body, "stream": True}).events
        self.assertEqual(fold_choices(events), flatten_whole(whole))
        self.assertEqual(whole["choices"][0]["finish_reason"], "length")


class EmbeddingTests(LocalCase):
    def embed(self, input, model="BAAI/bge-base-en-v1.5", **fields):
        body = {"model": model, "input": input, **fields}
        got = self.post("/v1/embeddings", body).json
        self.assertEqual([item["index"] for item in got["data"]], list(range(len(got["data"]))))
        return [item["embedding"] for item in got["data"]]

    def test_numbers_of_tokens_start_at_zero(self):
        self.assertEqual(len(self.embed([0, 5])), 1)
        self.assertEqual(len(self.embed([[0], [5]])), 2)

    def test_what_is_no_input_is_refused_and_named(self):
        for given, place in (
            ([-1, 5], ""),
            (["a", [1]], ""),
            ([[1], "a"], ""),
            ([1, "a"], ""),
            ([None], ""),
            ([], ""),
            ([[]], "[0]"),
            ([[1], ["a"]], "[1]"),
        ):
            with self.subTest(given=given):
                self.assertRefused(
                    "/v1/embeddings", {"model": "m", "input": given}, f"input{place}"
                )
                body = {"model": "m", "prompt": given}
                self.assertRefused("/v1/completions", body, f"prompt{place}")

    def test_texts_without_a_topic_differ_too(self):
        the, of, nothing = self.embed(["the", "of", ""])
        self.assertNotEqual(the, of)
        self.assertNotEqual(the, nothing)

    def test_sizes(self):
        for model, size in (
            ("intfloat/multilingual-e5-large-instruct", 1024),
            ("togethercomputer/m2-bert-80M-8k-retrieval", 768),
            ("nobody/knows", 768),
        ):
            self.assertEqual(len(self.embed("a", model)[0]), size)

    def test_vectors_have_length_one_and_follow_the_words(self):
        about_llamas = "The llama is a camelid of the Andes"
        about_camels = "camelids near Peru, such as the llama"
        texts = [about_llamas, about_camels, "stock market prices fell today"]
        llama, camel, stocks = self.embed(texts)
        self.assertAlmostEqual(sum(x * x for x in llama), 1, places=4)
        near = sum(x * y for x, y in zip(llama, camel))
        far = sum(x * y for x, y in zip(llama, stocks))
        self.assertGreater(near, far + 0.2)

    def test_base64_is_the_same_vector_in_float32(self):
        floats = self.embed("a text")[0]
        packed = base64.b64decode(self.embed("a text", encoding_format="base64")[0])
        for one, other in zip(floats, struct.unpack("<768f", packed)):
            self.assertAlmostEqual(one, other, places=7)

    def test_dimensions_cut_and_renormalise(self):
        whole, cut = self.embed("a text")[0], self.embed("a text", dimensions=64)[0]
        self.assertEqual(len(cut), 64)
        self.assertAlmostEqual(sum(x * x for x in cut), 1, places=4)
        scale = max(cut) / max(whole[:64])
        for one, other in zip(cut, whole):
            self.assertAlmostEqual(one, other * scale, delta=2e-4)

    def test_a_long_text_is_one_input(self):
        self.assertEqual(len(self.embed("word " * 1000)), 1)
        self.assertRefused("/v1/embeddings", {"model": "m", "input": ["a"] * 2049}, "input")

    def test_more_dimensions_than_there_are(self):
        body = {"model": "m", "input": "a", "dimensions": 769}
        self.assertRefused("/v1/embeddings", body, "dimensions")

    def test_token_ids(self):
        self.assertEqual(self.embed([1, 2]), self.embed([[1, 2]]))

    def test_there_is_no_usage_as_in_production(self):
        got = self.post("/v1/embeddings", {"model": "m", "input": ["one two", "three"]}).json
        self.assertEqual(list(got), ["object", "model", "data"])


RESPONSES_PATH = "/v1/responses"
WEATHER_FLAT = {"type": "function", **WEATHER["function"], "strict": True}
FINAL_FLAT = {"type": "function", **FINAL["function"], "parameters": {"type": "object"}}
WIKI = {"type": "mcp", "server_label": "wiki", "server_url": "https://wiki.test/mcp"}
ITEM_KEYS = {
    "message": "id type status role content",
    "reasoning": "id type status summary content encrypted_content",
    "function_call": "id type status call_id name arguments",
}
DELTAS = {  # event: (key of the item's part, or of the item, that it adds to)
    "output_text": "text",
    "reasoning_text": "text",
    "reasoning_summary_text": "text",
    "function_call_arguments": "arguments",
}


def fold_events(events):
    """Return the items of a stream by its deltas: what each says, by its place."""
    said = {}
    for event in events:
        stem, _, verb = event["type"][len("response.") :].rpartition(".")
        if verb == "delta":
            said[event["output_index"]] = said.get(event["output_index"], "") + event["delta"]
        elif verb == "done" and stem in DELTAS:
            assert event[DELTAS[stem]] == said[event["output_index"]], event
    return said


def text_of_item(item):
    """Return what an item says: a text, reasoning, or arguments."""
    parts = item.get("content") or item.get("summary")
    return parts[0]["text"] if parts else item["arguments"]


class ResponseCase(LocalCase):
    def respond(self, given="hello", **fields):
        return self.post(RESPONSES_PATH, {"model": LLAMA, "input": given, **fields}).json

    def stream_response(self, given="hello", **fields):
        """Return the events of a streamed response, whose names are those of their data."""
        body = {"model": LLAMA, "input": given, "stream": True, **fields}
        got = self.post(RESPONSES_PATH, body)
        self.assertEqual(got.headers["content-type"], "text/event-stream;charset=utf-8")
        rows = [block.split("\n") for block in got.raw.decode().split("\n\n")[:-1]]
        events = [json.loads(data[len("data: ") :]) for _, data in rows]
        self.assertEqual([name[len("event: ") :] for name, _ in rows], [e["type"] for e in events])
        return events

    def kinds(self, *args, **fields):
        return [item["type"] for item in self.respond(*args, **fields)["output"]]

    def called(self, *args, **fields):
        output = self.respond(*args, **fields)["output"]
        return [item["name"] for item in output if item["type"] == "function_call"]


class ResponseTests(ResponseCase):
    def test_only_what_is_complete_has_an_end(self):
        for fields, status, has_end in (
            ({}, "completed", True),
            ({"max_output_tokens": 1}, "incomplete", False),
        ):
            got = self.respond(**fields)
            self.assertEqual((got["status"], got["completed_at"] is not None), (status, has_end))

    def test_an_item_is_there_for_each_thing_said(self):
        def types(**fields):
            return [item["type"] for item in self.respond(**fields)["output"]]

        thinking = self.chat(model=THINKER)["choices"][0]["message"]["reasoning"]
        thoughts = len(fake.split_tokens(thinking))
        called = {"tools": [{"type": "function", **WEATHER["function"]}], "tool_choice": "required"}
        for fields, wanted in (
            ({"model": THINKER}, ["reasoning", "message"]),
            ({"model": THINKER, "max_output_tokens": thoughts - 1}, ["reasoning"]),
            ({"model": THINKER, **called}, ["reasoning", "function_call"]),
            (called, ["function_call"]),
            ({"max_output_tokens": 1}, ["message"]),
        ):
            with self.subTest(fields=fields):
                self.assertEqual(types(**fields), wanted)
        self.server.reply("")
        self.assertEqual(types(), ["message"])

    def test_the_shape_of_a_response(self):
        got = self.respond(instructions="Be brief.", metadata={"run": "7"}, temperature=0.5)
        self.assertRegex(got["id"], r"^resp_[0-9a-f]{32}$")
        self.assertEqual((got["object"], got["status"]), ("response", "completed"))
        echoed = (got["instructions"], got["metadata"], got["temperature"], got["top_p"])
        self.assertEqual(echoed, ("Be brief.", {"run": "7"}, 0.5, 1.0))
        self.assertEqual(
            (got["error"], got["incomplete_details"], got["store"]), (None, None, False)
        )
        (message,) = got["output"]
        self.assertEqual(" ".join(message), ITEM_KEYS["message"])
        self.assertRegex(message["id"], r"^msg_[0-9a-f]{32}$")
        (part,) = message["content"]
        self.assertEqual(
            part["text"], self.text(messages=self.read("Be brief.", "hello"), temperature=0.5)
        )
        self.assertEqual((part["annotations"], part["logprobs"]), ([], []))
        usage = got["usage"]
        self.assertEqual(usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"])
        details = (usage["input_tokens_details"], usage["output_tokens_details"])
        wanted = ({"cached_tokens": 0, "cache_write_tokens": 0}, {"reasoning_tokens": 0})
        self.assertEqual(details, wanted)

    @staticmethod
    def read(system, text):
        return [{"role": "system", "content": system}, *say(text)]

    def test_each_form_of_input_that_says_the_same(self):
        parts = [{"type": "input_text", "text": "hello"}]
        answers = self.text(), self.text(messages=say([{"type": "text", "text": "hello"}]))
        for given, answer in (
            ("hello", answers[0]),
            (say("hello"), answers[0]),
            ([{"type": "message", "role": "user", "content": "hello"}], answers[0]),
            (say(parts), answers[1]),
        ):
            with self.subTest(given=given):
                self.assertEqual(text_of_item(self.respond(given)["output"][0]), answer)
        for role in ("system", "developer"):
            given = [{"role": role, "content": "Be brief."}, *say("hello")]
            said = self.respond(given)["output"][0]["content"]
            self.assertEqual(said, self.respond(instructions="Be brief.")["output"][0]["content"])

    def test_what_was_said_is_sent_back(self):
        first = self.respond("weather in Rome", model=THINKER, tools=[WEATHER_FLAT])
        self.assertEqual([item["type"] for item in first["output"]], ["reasoning", "function_call"])
        call = first["output"][1]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
        given = [*say("weather in Rome"), *first["output"], result]
        second = self.respond(given, model=THINKER, tools=[WEATHER_FLAT])
        self.assertEqual([item["type"] for item in second["output"]], ["reasoning", "message"])
        reference = {"type": "item_reference", "id": "rs_1"}  # as @ai-sdk/openai sends
        self.assertTrue(self.respond([*given, *second["output"], reference, *say("thanks")]))

    def test_images_are_for_models_that_see(self):
        image = {"type": "input_image", "image_url": PIXEL, "detail": "auto"}
        given = [{"role": "user", "content": [{"type": "input_text", "text": "What?"}, image]}]
        with_image = self.respond(given, model=SEES)["usage"]["input_tokens"]
        del given[0]["content"][1]
        without = self.respond(given, model=SEES)["usage"]["input_tokens"]
        self.assertEqual(with_image - without, fake.MEDIA_TOKENS)
        given[0]["content"].append(image)
        self.assertRefused(RESPONSES_PATH, {"model": LLAMA, "input": given}, None)

    def test_formats(self):
        schema = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
        got = self.respond(text={"format": schema, "verbosity": "low"})
        self.assertIsInstance(json.loads(text_of_item(got["output"][0]))["city"], str)
        self.assertEqual(got["text"], {"format": schema, "verbosity": "low"})
        got = self.respond(text={"format": {"type": "json_object"}})
        self.assertIsInstance(json.loads(text_of_item(got["output"][0])), dict)
        got = self.respond(text={"format": {"type": "text"}})
        self.assertNotIn("{", text_of_item(got["output"][0]))

    def test_tools_as_in_chats(self):
        tools = [WEATHER_FLAT, FINAL_FLAT]
        allowed = {"type": "allowed_tools", "mode": "required"}
        for choice, text, names in (
            ("auto", "How is the weather?", ["get_weather"]),
            ("auto", "hello", []),
            ("none", "How is the weather?", []),
            ("required", "hello", ["get_weather"]),
            ({"type": "function", "name": "final_result"}, "hello", ["final_result"]),
            (
                {**allowed, "tools": [{"type": "function", "name": "final_result"}]},
                "hello",
                ["final_result"],
            ),
            ("auto", "the end of the weather", ["get_weather"]),
        ):
            with self.subTest(choice=choice, text=text):
                self.assertEqual(self.called(text, tools=tools, tool_choice=choice), names)
        counted = self.chat(tools=[WEATHER])["usage"]["prompt_tokens"]
        nulls = {**WEATHER_FLAT, "strict": None}
        self.assertEqual(self.respond(tools=[nulls])["usage"]["input_tokens"], counted)
        single = {"tools": tools, "parallel_tool_calls": False}
        self.assertEqual(self.called("the end of the weather", **single), ["get_weather"])
        (item,) = self.respond("How is the weather?", tools=tools)["output"]
        self.assertEqual(" ".join(item), ITEM_KEYS["function_call"])
        self.assertRegex(item["call_id"], r"^call_\w+$")
        self.assertIsInstance(json.loads(item["arguments"])["city"], str)

    def test_hosted_tools_are_echoed_and_never_called(self):
        tools = [
            {"type": "web_search"},
            {"type": "code_interpreter", "container": {"type": "auto"}},
            WIKI,
        ]
        for choice in ("auto", "required", {"type": "mcp", "server_label": "wiki"}):
            got = self.respond("search the web", tools=tools, tool_choice=choice)
            self.assertEqual((got["tools"], got["tool_choice"]), (tools, choice))
            self.assertEqual([item["type"] for item in got["output"]], ["message"])
        tools.append(WEATHER_FLAT)
        wiki = {"type": "mcp", "server_label": "wiki"}
        limit = {"type": "allowed_tools", "mode": "auto", "tools": [wiki]}
        none = self.respond("weather", model=THINKER, tools=tools, tool_choice="none")
        qwen = {"model": QWEN, "input": "weather", "tools": tools, "stream": True}
        for choice in ({"type": "web_search"}, {"type": "file_search"}, wiki, limit):
            with self.subTest(choice=choice):
                got = self.respond("weather", model=THINKER, tools=tools, tool_choice=choice)
                self.assertEqual(got["output"], none["output"])
                body = {**qwen, "tool_choice": choice}
                self.assertEqual(self.ask("POST", RESPONSES_PATH, body).status, 200)
        secret = {**WIKI, "authorization": "sesame", "headers": {"X-Key": "sesame"}}
        self.assertEqual(self.respond(tools=[secret])["tools"], [WIKI])

    def test_an_agent_ends(self):
        rounds = ["get_weather", "final_result"]
        for choice in ("auto", "required"):
            given, names = say("the weather in Rome"), []
            for _ in range(6):
                tools = {"tools": [WEATHER_FLAT, FINAL_FLAT], "tool_choice": choice}
                output = self.respond(given, **tools)["output"]
                calls = [item for item in output if item["type"] == "function_call"]
                names += [item["name"] for item in calls]
                if not calls or (choice == "required" and "final_result" in names):
                    break
                given = [*given, *output]
                for item in calls:
                    result = {"call_id": item["call_id"], "output": "42"}
                    given.append({"type": "function_call_output", **result})
            self.assertEqual(names, rounds)

    def test_a_limit_leaves_it_incomplete(self):
        whole = text_of_item(self.respond()["output"][0])
        got = self.respond(max_output_tokens=4)
        self.assertEqual(got["status"], "incomplete")
        self.assertEqual(got["incomplete_details"], {"reason": "max_output_tokens"})
        (item,) = got["output"]
        self.assertEqual((item["status"], got["usage"]["output_tokens"]), ("incomplete", 4))
        self.assertTrue(whole.startswith(text_of_item(item)))
        self.assertEqual(self.kinds(model=THINKER, max_output_tokens=3), ["reasoning"])

    def test_reasoning(self):
        reasoning, _ = self.respond(model=THINKER)["output"]
        self.assertEqual(" ".join(reasoning), ITEM_KEYS["reasoning"])
        self.assertEqual((reasoning["summary"], len(reasoning["content"])), ([], 1))
        summarised, _ = self.respond(model=THINKER, reasoning={"summary": "auto"})["output"]
        self.assertEqual(text_of_item(summarised), text_of_item(reasoning))
        self.assertEqual((len(summarised["summary"]), summarised["content"]), (1, []))
        tokens = [
            self.respond(model=THINKER, reasoning={"effort": effort})["usage"][
                "output_tokens_details"
            ]["reasoning_tokens"]
            for effort in ("low", "high")
        ]
        self.assertLess(*tokens)

    def test_logprobs_where_they_are_included(self):
        include = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        part = self.respond(**include)["output"][0]["content"][0]
        self.assertEqual("".join(each["token"] for each in part["logprobs"]), part["text"])
        self.assertEqual(len(part["logprobs"][0]["top_logprobs"]), 2)

    def test_what_nothing_reads_is_named_inside_of_items(self):
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "i"}
        result = {"type": "function_call_output", "call_id": "c", "output": "1", "status": "x"}
        given = [*say([{"type": "input_text", "text": "x"}]), {"type": "reasoning"}, call, result]
        tools = [WEATHER_FLAT, {"type": "web_search", "size": 1}]
        for odd, places in (({}, []), ({"odd": 1}, ["input[2].odd", "tools[0].odd"])):
            fields = {"given": [*given[:2], {**call, **odd}, result], "tool_choice": "none"}
            self.respond(**fields, tools=[{**tools[0], **odd}, tools[1]])
            warned = [f"nothing reads {', '.join(places)}"] if odd else []
            self.assertEqual(list(self.server.requests[-1].warnings), warned)
        self.assertRefused(
            RESPONSES_PATH, {"model": LLAMA, "input": [{"type": []}]}, "input[0].type"
        )
        self.assertEqual(self.server.requests[-1].warnings, ())

    def test_nothing_is_stored(self):
        id = self.respond(store=True)["id"]
        for method, path in (
            ("GET", f"/{id}"),
            ("DELETE", f"/{id}"),
            ("POST", f"/{id}/cancel"),
        ):
            error = self.json(method, RESPONSES_PATH + path, status=404)["error"]
            self.assertIn(id, error["message"])
        for fields, status, param in (
            ({"previous_response_id": id}, 404, "previous_response_id"),
            ({"background": True}, 400, "background"),
            ({"conversation": "c"}, 400, "conversation"),
            ({"prompt": {"id": "p"}}, 400, "prompt"),
        ):
            with self.subTest(fields=fields):
                got = self.ask("POST", RESPONSES_PATH, {"model": LLAMA, "input": "x", **fields})
                self.assertEqual((got.status, got.json["error"]["param"]), (status, param))

    def test_what_is_wrong_is_named(self):
        message = {"role": "user"}
        for fields, param in (
            ({"input": []}, "input"),
            ({"input": [message]}, "input[0].content"),
            ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
            ({"input": [{"type": 7}]}, "input[0].type"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
            ({"tool_choice": "perhaps"}, "tool_choice"),
            ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
            ({"text": {"format": {"type": "odd"}}}, "text.format.type"),
            ({"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
        ):
            with self.subTest(fields=fields):
                self.assertRefused(RESPONSES_PATH, {"model": LLAMA, "input": "x", **fields}, param)

    def test_keys_of_a_chat_mean_nothing_in_tools_and_formats(self):
        for odd in (5, "f", [5], {"name": [1]}, {"tools": 5}, {"schema": 5}):
            tool = {"type": "function", "name": "f", "function": odd}
            body = {
                "model": LLAMA,
                "input": "x",
                "tools": [tool],
                "text": {"format": {"type": "json_object", "json_schema": odd}},
            }
            for choice in ("required", {**tool, "allowed_tools": odd}):
                status = self.post(RESPONSES_PATH, {**body, "tool_choice": choice}).status
                self.assertLess(status, 500, (odd, choice))


class ResponseStreamTests(ResponseCase):
    def test_the_events_of_a_text(self):
        events = self.stream_response(max_output_tokens=2)
        self.assertEqual(
            [event["type"][len("response.") :] for event in events],
            [
                *("created", "in_progress", "output_item.added", "content_part.added"),
                *("output_text.delta", "output_text.delta", "output_text.done"),
                *("content_part.done", "output_item.done", "incomplete"),
            ],
        )
        numbers = [event["sequence_number"] for event in events]
        self.assertEqual(numbers, list(range(len(events))))
        opened = events[0]["response"]
        self.assertEqual(
            (opened["status"], opened["output"], opened["usage"]), ("in_progress", [], None)
        )
        self.assertEqual(events[2]["item"]["content"], [])

    def test_the_fold_of_each_stream_is_the_whole(self):
        schema = {"type": "json_schema", "name": "city", "schema": CITY}
        tools = [WEATHER_FLAT, FINAL_FLAT]
        for fields in (
            {},
            {"model": THINKER},
            {"model": THINKER, "reasoning": {"summary": "auto"}},
            {"model": KIMI, "max_output_tokens": 3},
            {"given": "the end of the weather", "tools": tools},
            {"model": THINKER, "given": "weather", "tools": tools},
            {"text": {"format": schema}},
            {"include": ["message.output_text.logprobs"]},
        ):
            with self.subTest(fields=fields):
                whole = self.respond(**fields)
                events = self.stream_response(**fields)
                self.assertEqual(events[-1]["response"], whole)
                done = [event["item"] for event in events if event["type"].endswith("item.done")]
                self.assertEqual(done, whole["output"])
                said = {at: text_of_item(item) for at, item in enumerate(done)}
                told = fold_events(events)
                self.assertEqual({at: told.get(at) for at in said}, said)
                ids = [event["item_id"] for event in events if "item_id" in event]
                self.assertEqual(set(ids), {item["id"] for item in done})

    def test_an_early_error_is_an_http_error(self):
        self.assertRefused(RESPONSES_PATH, {"model": LLAMA, "stream": True}, "input")


class ResponseScriptTests(ResponseCase):
    """Fixtures, faults, the record and batches: what chats have."""

    def test_fixtures_of_chats_and_its_own(self):
        self.server.reply("Hi!", user_message="hello")
        self.assertEqual(text_of_item(self.respond()["output"][0]), "Hi!")
        self.server.reply("Of a response.", endpoint="response")
        self.assertEqual(text_of_item(self.respond()["output"][0]), "Of a response.")
        self.assertEqual(self.text(), "Hi!")
        self.server.reply(tool_calls=[{"name": "add", "arguments": {"a": 1}}], reasoning="Add.")
        kinds = ["reasoning", "function_call"]
        self.assertEqual(self.kinds(), kinds)
        done = [event for event in self.stream_response() if event["type"].endswith("item.done")]
        self.assertEqual([event["item"]["type"] for event in done], kinds)
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        self.server.reply("x", id="resp_mine", created=5, response_model="other", usage=usage)
        got = self.respond()
        self.assertEqual((got["id"], got["created_at"], got["model"]), ("resp_mine", 5, "other"))
        self.assertEqual((got["usage"]["input_tokens"], got["usage"]["total_tokens"]), (7, 10))

    def test_matches_look_into_items(self):
        self.server.reply("called", tool_result_contains="sunny", times=1)
        self.server.reply("by tool", tool_name="get_weather", times=1)
        self.server.reply("by system", system_message="brief", times=1)
        self.server.reply("by format", response_format="json_schema", times=1)
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        result = {"type": "function_call_output", "call_id": "c", "output": "it is sunny"}
        schema = {"type": "json_schema", "name": "city", "schema": CITY}
        for fields, said in (
            ({"given": [*say("x"), call, result]}, "called"),
            ({"tools": [WEATHER_FLAT]}, "by tool"),
            ({"instructions": "Be brief."}, "by system"),
            ({"text": {"format": schema}}, "by format"),
        ):
            self.assertEqual(text_of_item(self.respond(**fields)["output"][0]), said)
        self.server.assert_all_used()

    def test_faults(self):
        self.server.fail(429, retry_after=1, endpoint="response", times=1)
        got = self.ask("POST", RESPONSES_PATH, {"model": LLAMA, "input": "x"})
        self.assertEqual((got.status, got.headers["retry-after"]), (429, "1"))
        self.server.fail(disconnect_after_chunks=3, times=1)
        body = {"model": LLAMA, "input": "x", "stream": True}
        got = self.ask("POST", RESPONSES_PATH, body)
        self.assertEqual((self.server.requests[-1].outcome, got.raw.count(b"\n\n")), ("cut", 3))
        self.server.fail(error={"message": "It broke."}, error_after_chunks=2, times=1)
        last = self.ask("POST", RESPONSES_PATH, body).raw.split(b"\n\n")[2]
        self.assertIn(b"It broke.", last)

    def test_the_record(self):
        self.respond()
        self.stream_response()
        whole, streamed = self.server.requests
        self.assertEqual((whole.kind, whole.operation), ("response", "POST " + RESPONSES_PATH))
        self.assertEqual({**whole.usage, **whole.reply["usage"]}, whole.usage)
        self.assertEqual(streamed.reply[-1]["response"]["output"], whole.reply["output"])
        self.assertEqual(streamed.outcome, "complete")
        self.server.assert_called("response", user_message="hello", times=2)

    def test_batches(self):
        lines = write_lines(
            {"custom_id": text, "body": {"model": LLAMA, "input": text}} for text in QUESTIONS
        )
        file = self.server.add_file(lines, purpose="batch-api")
        self.server.instant_jobs = True
        self.addCleanup(setattr, self.server, "instant_jobs", False)
        body = {"endpoint": RESPONSES_PATH, "input_file_id": file["id"]}
        job = self.json("POST", "/v1/batches", body, status=201)["job"]
        rows = read_lines(self.server.contents[job["output_file_id"]])
        direct = [self.respond(text) for text in QUESTIONS]
        self.assertEqual([row["response"]["body"] for row in rows], direct)


class RerankTests(LocalCase):
    def rerank(self, **fields):
        return self.json("POST", "/v1/rerank", {**RERANK, **fields})

    def test_the_likest_comes_first(self):
        results = self.rerank()["results"]
        self.assertEqual([result["index"] for result in results], [1, 2, 0])
        scores = [result["relevance_score"] for result in results]
        self.assertEqual(scores, sorted(scores, reverse=True))
        self.assertEqual([result["document"] for result in results], [{}] * 3)

    def test_top_n_and_documents(self):
        (best,) = self.rerank(top_n=1, return_documents=True)["results"]
        self.assertEqual(best["document"], {"text": "apple pie recipe"})

    def test_the_query_is_counted_with_each_document(self):
        query, one, two = map(fake.count_tokens, ("apple pie", "a red car", "pie"))
        for documents, tokens in (
            (["a red car"], one + query),
            (["a red car", "pie"], one + two + 2 * query),
        ):
            usage = self.rerank(documents=documents)["usage"]
            wanted = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
            self.assertEqual(usage, wanted)

    def test_an_equal_text_scores_one(self):
        (best,) = self.rerank(documents=["apple pie"])["results"]
        self.assertEqual(best["relevance_score"], 1)

    def test_rank_fields_choose_what_counts(self):
        documents = [{"title": "apple pie", "note": "car"}, {"title": "car", "note": "apple pie"}]
        for field, first in (("title", 0), ("note", 1)):
            got = self.rerank(documents=documents, rank_fields=[field], return_documents=True)
            self.assertEqual(got["results"][0]["index"], first)
        text = '{"title":"car","note":"apple pie"}'
        self.assertEqual(got["results"][0]["document"], {"text": text})

    def test_a_fixture_gives_the_scores(self):
        self.server.reply(scores=[0.1, 0.9], endpoint="rerank")
        got = [(each["index"], each["relevance_score"]) for each in self.rerank()["results"]]
        self.assertEqual(got, [(1, 0.9), (0, 0.1), (2, 0.0)])


# === File and job endpoints ===


class StoreCase(LocalCase):
    """A test of stored objects, at a time that stands still."""

    options = MappingProxyType({"clock": lambda: 1767607200.5})
    origin = "http://host:1"

    def upload(self, fields, data=None, path="/v1/files"):
        return self.ask("POST", path, write_form(fields, data), FORM)


class FileTests(StoreCase):
    def test_upload_in_one_request(self):
        for path, fields in (
            ("/v1/files", {"purpose": "fine-tune"}),
            ("/v1/files/upload", {"purpose": "fine-tune", "file_name": "a.jsonl"}),
        ):
            file = self.upload(fields, TRAIN, path).json
            self.assertEqual((file["bytes"], file["LineCount"]), (len(TRAIN), 2))
            self.assertEqual(file["processing_status"], "COMPLETED")
            self.assertEqual(self.ask("GET", f"/v1/files/{file['id']}/content").raw, TRAIN)

    def test_upload_by_redirect(self):
        got = self.upload({"purpose": "fine-tune", "file_name": "x/a.jsonl"})
        id = got.headers["x-together-file-id"]
        place = f"http://host:1/__upload/{id}"
        self.assertEqual((got.status, got.headers["location"]), (302, place))
        self.assertEqual(self.json("GET", f"/v1/files/{id}")["processing_status"], "PENDING")
        self.json("GET", f"/v1/files/{id}/content", status=404)
        self.assertEqual(self.ask("PUT", f"/__upload/{id}", TRAIN, headers={}).status, 200)
        file = self.json("POST", f"/v1/files/{id}/preprocess")
        self.assertEqual((file["filename"], file["processing_status"]), ("a.jsonl", "COMPLETED"))

    def test_bytes_go_with_their_file(self):
        with mock.patch.object(fake, "MAX_OBJECTS", 3):
            first, *_ = [self.server.add_file(f"{n}" * 10) for n in range(4)]
        self.assertNotIn(first["id"], self.server.contents)
        self.assertEqual(sum(map(len, self.server.contents.values())), 30)
        self.server.add_file("new", id="own")
        self.server.seed("files", [{"id": "own"}])
        self.assertNotIn("own", self.server.contents)
        self.server._keep("own/001", b"a part")
        self.ask("DELETE", "/v1/files/own")
        self.assertEqual(sum(map(len, self.server.contents.values())), 30)

    def test_upload_in_parts(self):
        initiate, complete, abort = (
            f"/v1/files/multipart/{step}" for step in ("initiate", "complete", "abort")
        )
        upload = self.json("POST", initiate, IN_PARTS)
        tags = []
        for part, data in zip(upload["parts"], (TRAIN[:5], TRAIN[5:])):
            got = self.ask("PUT", part["URL"][len(self.origin) :], data)
            tags.append({"part_number": part["PartNumber"], "etag": got.headers["etag"]})
        end = {"upload_id": upload["upload_id"], "file_id": upload["file_id"], "parts": tags}
        self.json("POST", complete, {**end, "parts": tags[:1]}, status=400)
        self.assertEqual(self.json("POST", complete, end)["file"]["LineCount"], 2)
        self.assertEqual(list(self.server.contents.values()), [TRAIN])
        upload = self.json("POST", initiate, IN_PARTS)
        self.json("POST", abort, {"upload_id": upload["upload_id"], "file_id": "no"}, status=404)
        self.json("POST", abort, {key: upload[key] for key in ("upload_id", "file_id")})
        self.assertEqual(len(self.server.files), 1)

    def test_range(self):
        id = self.server.add_file("0123456789", "a.txt", "user_data")["id"]
        for asked, status, body, range in (
            ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
            ("bytes=7-", 206, b"789", "bytes 7-9/10"),
            ("bytes=-3", 206, b"789", "bytes 7-9/10"),
            ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
            ("bytes=1-2,4-5", 200, b"0123456789", None),
            ("lines=1", 200, b"0123456789", None),
        ):
            got = self.ask("GET", f"/v1/files/{id}/content", headers={**KEY, "Range": asked})
            found = (got.status, got.raw, got.headers.get("content-range"))
            self.assertEqual(found, (status, body, range), asked)
        for asked in ("bytes=10-", "bytes=-0"):
            got = self.ask("GET", f"/v1/files/{id}/content", headers={**KEY, "Range": asked})
            self.assertEqual((got.status, got.headers["content-range"]), (416, "bytes */10"))

    def test_first_bad_line_is_named(self):
        good = b'{"messages":[{"role":"user","content":"x"}]}\n'
        for purpose, data, line in (
            ("fine-tune", TRAIN + b"\n{]\n", 4),
            ("fine-tune", TRAIN + b"[1]", 3),
            ("fine-tune", TRAIN + good, 3),
            ("fine-tune", good + b'{"messages":[{"role":"boss","content":"x"}]}', 2),
            ("fine-tune", b'{"input": 1}', 1),
            ("batch-api", b'{"custom_id":"1","body":{}}\n{"body":{}}', 2),
            ("eval", b'{"any": 1}\nx', 2),
        ):
            file = self.server.add_file(data, purpose=purpose)
            report = file["validation_report"]
            self.assertEqual((report["valid"], report["line_number"]), (False, line), data)
            self.assertIn(f"Line {line}: ", report["error"])
            self.assertEqual(file["processing_status"], "INVALID_FORMAT")
        for data, name, is_valid in (
            (b"", "data.jsonl", False),
            (b"PAR1..PAR1", "a.parquet", True),
        ):
            report = self.server.add_file(data, name)["validation_report"]
            self.assertEqual(report["valid"], is_valid)

    def test_formats(self):
        for data, form in (
            (TRAIN, "GENERAL"),
            (b'{"prompt": "a", "completion": "b"}', "INSTRUCTION"),
            (b'{"messages":[{"role":"user","content":"x"}]}', "CONVERSATION"),
        ):
            report = self.server.add_file(data)["validation_report"]
            self.assertEqual((report["valid"], report["dataset_format"]), (True, form))

    def test_beyond_the_limit_nothing_is_lost(self):
        self.server.max_stored_bytes = 50
        id = self.server.add_file(TRAIN)["id"]
        self.assertEqual(self.upload({"purpose": "eval"}, TRAIN).status, 413)
        self.assertEqual([file["id"] for file in self.server.files], [id])
        self.assertEqual(self.ask("GET", f"/v1/files/{id}/content").raw, TRAIN)
        self.json("DELETE", f"/v1/files/{id}")
        self.assertEqual(self.upload({"purpose": "eval"}, TRAIN).status, 200)

    def test_purposes_are_those_of_production_whoever_asks(self):
        self.server.seed("files", [{"id": "f", "purpose": "batch-generated"}])
        for headers in (OPENAI, PY1, KEY):
            got = self.json("GET", "/v1/files/f", headers=headers)["purpose"]
            self.assertEqual(got, "batch-generated")
        listed = self.json("GET", "/v1/files?purpose=batch_output", headers=OPENAI)["data"]
        self.assertEqual([file["id"] for file in listed], ["f"])

    def test_list_and_delete(self):
        ids = [self.server.add_file(TRAIN)["id"] for _ in range(3)]
        for query, found, has_more in (
            ("limit=2", ids[:0:-1], True),
            (f"limit=2&after={ids[1]}", ids[:1], False),
        ):
            page = self.json("GET", f"/v1/files?{query}")
            self.assertEqual([file["id"] for file in page["data"]], found)
            self.assertEqual(page["has_more"], has_more)
        gone = self.json("DELETE", f"/v1/files/{ids[0]}")
        self.assertEqual(gone, {"id": ids[0], "object": "file", "deleted": True})
        self.json("GET", f"/v1/files/{ids[0]}", status=404)

    def test_a_list_has_the_members_that_are_documented(self):
        for path, members in (
            ("files", ["object", "data", "has_more"]),
            ("fine-tunes", ["data"]),
            ("jobs", ["data"]),
            ("endpoints", ["object", "data"]),
        ):
            self.assertEqual(list(self.json("GET", f"/v1/{path}")), members)
        self.server.seed("evaluations", [{}] * 12)
        for query, count in (("", 10), ("?limit=11", 11)):
            self.assertEqual(len(self.json("GET", f"/v1/evaluation{query}")), count)

    def test_ids_repeat_after_reset(self):
        first = self.server.add_file(TRAIN)["id"]
        self.server.reset()
        self.assertEqual(self.server.add_file(TRAIN)["id"], first)

    def test_seed_over_http(self):
        files = [{"id": "f", "content": TRAIN.decode()}]
        jobs = [{"id": "t", "status": "completed"}]
        self.json("POST", "/__parlel/seed", {"files": files, "fine_tunes": jobs})
        self.assertEqual(self.server.contents["f"], TRAIN)
        self.assertEqual(self.server.fine_tunes["t"]["events"][-1]["type"], "job_complete")
        self.json("POST", "/__parlel/seed", {"unknown": []}, status=400)


class BatchTests(StoreCase):
    def create(self, data, headers=KEY):
        file = self.server.add_file(data, purpose="batch-api")
        body = {"endpoint": CHAT, "input_file_id": file["id"], "completion_window": "24h"}
        return self.json("POST", "/v1/batches", body, headers, status=201)

    def rows(self, id):
        return read_lines(self.server.contents[id])

    def test_answers_equal_direct_ones(self):
        lines = batch_lines(QUESTIONS)
        id = self.create(lines)["job"]["id"]
        before = len(self.server.requests)
        seen = [self.json("GET", f"/v1/batches/{id}") for _ in range(3)]
        self.assertEqual([job["status"] for job in seen], ["IN_PROGRESS", "COMPLETED", "COMPLETED"])
        sent = [call for call in self.server.requests[before:] if not call.batch]
        self.assertEqual(len(sent), 3)
        output = self.server.contents[seen[-1]["output_file_id"]].splitlines()
        self.assertEqual(len(output), len(QUESTIONS))
        for line, row in zip(read_lines(lines), output):
            direct = self.ask("POST", CHAT, line["body"]).raw
            self.assertIn(b'"body":' + direct + b"}", row)
        self.assertIsNone(seen[-1]["error_file_id"])

    def test_a_line_under_latency_does_not_wait_and_ends(self):
        self.server.instant_jobs = True
        self.server.reply("late", user_message="a", latency=60_000, times=1)
        self.server.fail(user_message="b", disconnect_after_chunks=0)
        job = self.create(batch_lines(["a", "b"]))["job"]
        said = self.rows(job["output_file_id"])[0]["response"]["body"]
        self.assertEqual(said["choices"][0]["message"]["content"], "late")
        self.assertEqual(len(self.rows(job["error_file_id"])), 1)
        lines = [call.outcome for call in self.server.requests if call.batch]
        self.assertEqual(lines, ["complete", "cut"])

    def test_bad_lines_become_error_lines(self):
        good, stream = batch_lines(["a"]), batch_lines(["a"], stream=True)
        wrong = b'{"custom_id": "x", "body": {"model": "m"}}\n'
        self.server.instant_jobs = True
        job = self.create(good + b"{]\n" + good + wrong + stream)["job"]
        self.assertEqual(job["status"], "COMPLETED")
        self.assertEqual(len(self.rows(job["output_file_id"])), 1)
        errors = self.rows(job["error_file_id"])
        self.assertEqual([row["custom_id"] for row in errors], [None, "q0", "x", "q0"])
        self.assertIn("messages", errors[2]["error"]["message"])

    def test_cancel_stays(self):
        id = self.create(batch_lines(["a"]))["job"]["id"]
        self.json("GET", f"/v1/batches/{id}")
        for method, path in (("POST", f"/v1/batches/{id}/cancel"), ("GET", f"/v1/batches/{id}")):
            self.assertEqual(self.json(method, path)["status"], "CANCELLED")
        self.server.seed("batches", [{"id": "b", "status": "COMPLETED"}])
        self.json("POST", "/v1/batches/b/cancel", status=400)

    def test_input_is_checked(self):
        train = self.server.add_file(TRAIN)["id"]
        for body, status in (
            ({"endpoint": CHAT, "input_file_id": "none"}, 404),
            ({"endpoint": CHAT, "input_file_id": train}, 400),
            ({"endpoint": "/v1/models", "input_file_id": train}, 400),
            ({"endpoint": CHAT}, 400),
        ):
            self.json("POST", "/v1/batches", body, status=status)
        id = self.create("")["job"]["id"]
        self.assertEqual(self.json("GET", f"/v1/batches/{id}")["status"], "FAILED")

    def test_every_client_gets_the_form_of_production(self):
        for headers in (OPENAI, PY1, PY3, KEY):
            created = self.create(batch_lines(["a", "b"]), headers)["job"]
            for status in ("IN_PROGRESS", "COMPLETED"):
                job = self.json("GET", f"/v1/batches/{created['id']}", headers=headers)
                self.assertEqual((job["status"], list(job)), (status, list(created)))
                self.assertEqual(job["created_at"], "2026-01-05T10:00:00.000Z")

    def test_a_list_for_openais_clients_says_whether_there_are_more(self):
        ids = [self.create(batch_lines(["a"]))["job"]["id"] for _ in range(3)]
        self.assertEqual([job["id"] for job in self.json("GET", "/v1/batches")], ids[::-1])
        seen, after = [], ""
        for more in (True, True, False):
            page = self.json("GET", f"/v1/batches?limit=1{after}", headers=OPENAI)
            self.assertIs(page["has_more"], more)
            seen += [job["id"] for job in page["data"]]
            after = f"&after={seen[-1]}"
        self.assertEqual(seen, ids[::-1])


class FineTuningTests(StoreCase):
    LIMITS = "/v1/fine-tunes/models/limits"
    DOWNLOAD = "/v1/finetune/download"
    METRICS = "/v1/fine-tunes/t/metrics"

    def create(self, status=200, **more):
        id = self.server.add_file(TRAIN)["id"]
        body = {"training_file": id, "model": LLAMA, "n_epochs": 2, **more}
        return self.json("POST", "/v1/fine-tunes", body, status=status)

    def test_ladder(self):
        job = self.create(suffix="mine", wandb_api_key="secret")
        path = f"/v1/fine-tunes/{job['id']}"
        self.assertNotIn("secret", json.dumps(job))
        statuses, counts = [], []
        for _ in range(5):
            self.json("GET", "/v1/fine-tunes")
            job = self.json("GET", path)
            statuses.append(job["status"])
            counts.append(len(self.json("GET", path + "/events")["data"]))
        self.assertEqual(statuses, ["queued", "running", "uploading", "completed", "completed"])
        self.assertEqual(counts, [1, 5, 9, 11, 11])
        name = job["model_output_name"]
        self.assertRegex(name, r"^parlel/Llama-3.3-70B-Instruct-Turbo-mine-[0-9a-f]{8}$")
        self.assertEqual(self.chat(model=name)["model"], name)
        self.assertIn(name, [model["id"] for model in self.json("GET", "/v1/models")])
        self.json("DELETE", path + "?force=false")
        self.assertNotIn(name, self.server.models)

    def test_loss_falls(self):
        job = {"id": "t", "status": "completed", "n_epochs": 20, "TrainingFileNumLines": 5000}
        (job,) = self.server.seed("fine_tunes", [job])
        metrics = self.json("GET", self.METRICS)["metrics"]
        losses = [point["train/loss"] for point in metrics]
        self.assertEqual(losses, sorted(set(losses), reverse=True))
        self.assertEqual(metrics[-1]["train/global_step"], 800)
        query = "?global_step_from=3&global_step_to=9&resolution=3"
        part = self.json("GET", self.METRICS + query)["metrics"]
        self.assertEqual([point["train/global_step"] for point in part], [3, 6, 9])
        self.assertEqual(part[0], metrics[2])
        self.server.reset()
        self.server.seed("fine_tunes", [job])
        self.assertEqual(self.json("GET", self.METRICS)["metrics"], metrics)

    def test_event_types_are_in_the_case_of_the_client(self):
        id = self.create()["id"]
        for headers, type in ((KEY, "JOB_PENDING"), (PY1, "JOB_PENDING"), (PY3, "job_pending")):
            events = self.json("GET", f"/v1/fine-tunes/{id}/events", headers=headers)["data"]
            self.assertEqual(events[0]["type"], type)

    def test_cancel(self):
        path = f"/v1/fine-tunes/{self.create()['id']}"
        self.assertEqual(self.json("POST", path + "/cancel")["status"], "cancel_requested")
        for _ in range(2):
            self.assertEqual(self.json("GET", path)["status"], "cancelled")
        self.json("POST", path + "/cancel", status=400)

    def test_training_file_is_checked(self):
        for more, status in (
            ({"training_file": "none"}, 404),
            ({"training_file": self.server.add_file(b"{]")["id"]}, 400),
            ({"training_file": self.server.add_file("{}", purpose="eval")["id"]}, 400),
            ({"validation_file": "none"}, 404),
            ({"validation_file": ""}, 200),  # as Together's Python sends it
            ({"batch_size": "max"}, 200),
            ({"batch_size": 32}, 200),
            ({"batch_size": "most"}, 400),
            ({"batch_size": 1000}, 400),
            ({"model": None}, 400),
            ({"model": None, "from_checkpoint": "ft-other:3"}, 404),
        ):
            self.create(status, **more)

    def test_settings_that_are_given_in_part_have_the_other_defaults(self):
        for given, name, wanted in (
            ({"type": "Lora"}, "training_type", {"lora_r": 64, "lora_alpha": 128}),
            ({"method": "dpo"}, "training_method", {"dpo_beta": 0.1}),
            ({"lr_scheduler_type": "cosine"}, "lr_scheduler", {"lr_scheduler_args": mock.ANY}),
        ):
            job = self.create(**{name: given})
            self.assertEqual(job[name], {**job[name], **given, **wanted})
        (job,) = self.server.seed("fine_tunes", [{"training_type": {"lora_r": 8}}])
        self.assertEqual((job["training_type"]["type"], job["batch_size"]), ("Lora", 128))

    def test_a_curve_reaches_the_last_step_in_so_many_points(self):
        self.server.instant_jobs = True
        lines = write_lines({"text": f"line {n}"} for n in range(100))
        job = self.create(training_file=self.server.add_file(lines)["id"], batch_size=1)
        for points in (2, 3, 60, 99):
            path = f"/v1/fine-tunes/{job['id']}/metrics?resolution={points}"
            rows = self.json("GET", path)["metrics"]
            steps = [row["train/global_step"] for row in rows]
            self.assertEqual((len(steps), steps[0], steps[-1]), (points, 1, 200))

    def test_the_largest_batch_depends_on_the_training(self):
        for method, kind, size in (
            ("sft", "Lora", 128),
            ("sft", "Full", 96),
            ("dpo", "Lora", 64),
            ("dpo", "Full", 48),
        ):
            job = self.create(training_method={"method": method}, training_type={"type": kind})
            self.assertEqual(job["batch_size"], size)

    def test_instant(self):
        self.server.instant_jobs = True
        job = self.create(training_type={"type": "Full"}, n_checkpoints=2)
        self.assertEqual(job["status"], "completed")
        rows = self.json("GET", f"/v1/fine-tunes/{job['id']}/checkpoints")["data"]
        points = [(row["step"], row["checkpoint_type"]) for row in rows]
        self.assertEqual(points, [(1, "Intermediate"), (2, "Final")])

    def test_download(self):
        self.server.seed("fine_tunes", [{"id": "t", "status": "completed"}, {"id": "u"}])
        merged = self.DOWNLOAD + "?ft_id=t&checkpoint=merged"
        whole = self.ask("GET", merged).raw
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(whole))) as archive:
            self.assertEqual(archive.getnames(), ["model.safetensors"])
        probe = self.ask("GET", merged, headers={**KEY, "Range": "bytes=0-1"})
        self.assertEqual(probe.headers["content-range"], f"bytes 0-1/{len(whole)}")
        for query, status in (("u", 400), ("none", 404), ("t&checkpoint_step=99", 404)):
            self.json("GET", f"{self.DOWNLOAD}?ft_id={query}", status=status)

    def test_limits_estimate_preview_and_tokens(self):
        self.json("GET", self.LIMITS + "?model_name=BAAI/bge-base-en-v1.5", status=404)
        for name in ("model_name", "model"):
            limits = self.json("GET", f"{self.LIMITS}?{name}={LLAMA}")
            self.assertEqual(limits["model_name"], LLAMA)
        self.assertIn(LLAMA, self.json("GET", "/v1/fine-tunes/models/supported")["models"])
        good, bad = (self.server.add_file(data)["id"] for data in (TRAIN * 100, b"["))
        estimate = "/v1/fine-tunes/estimate-price"
        price = self.json("POST", estimate, {"training_file": good, "model": LLAMA})
        self.assertTrue(price["allowed_to_proceed"])
        self.assertEqual(price["estimated_train_token_count"], 800)
        price = self.json("POST", estimate, {"training_file": bad})
        self.assertEqual(price["unavailable_reason"], "train_file_invalid")
        talk = [*say("a b"), {"role": "assistant", "content": "c"}]
        file = self.server.add_file(write_lines([{"messages": talk}]))
        body = {"training_file": file["id"], "model": LLAMA}
        row = self.json("POST", "/v1/fine-tunes/preview", body)["rows"][0]
        start, end = row["trained_spans"][0]
        self.assertEqual("".join(row["tokens"][start:end]), "c\n")
        self.assertEqual(row["labels"][:start], [-100] * start)
        id = self.create()["id"]
        place = self.json("GET", f"/v1/fine-tunes/{id}/download-tokenized-dataset")
        data = self.ask("GET", place["url"][len(self.origin) :], headers={}).raw
        self.assertEqual((len(data), data.count(b"\n")), (place["size"], 2))


class EvaluationTests(LocalCase):
    def evaluate(self, type, parameters, headers=KEY):
        rows = write_lines({"text": f"row {n}"} for n in range(20))
        self.server.seed("files", [{"id": "rows", "purpose": "eval", "content": rows}])
        made = self.json("POST", "/v1/evaluation", {"type": type, "parameters": parameters})
        self.assertEqual(made["status"], "pending")
        path = f"/v1/evaluation/{made['workflow_id']}"
        self.assertEqual(self.climb(path), ["queued", "running", "completed"])
        return self.json("GET", path, headers=headers)["results"]

    def test_classify(self):
        results = self.evaluate("classify", CLASSIFY)
        counts = results["label_counts"]
        self.assertEqual(sum(counts.values()), 20)
        self.assertEqual(results["pass_percentage"], counts["yes"] * 5)
        lines = read_lines(self.server.contents[results["result_file_id"]])
        verdicts = [line["verdict"] for line in lines]
        self.assertEqual({label: verdicts.count(label) for label in counts}, counts)

    def test_no_score_lies_outside_of_its_bounds(self):
        results = self.evaluate("score", {**SCORE, "pass_threshold": 50})
        self.assertLessEqual(results["aggregated_scores"]["mean_score"], 5)

    def test_no_secret_is_kept(self):
        judge = {**CLASSIFY["judge"], "external_api_token": "sk-secret"}
        asked = {**CLASSIFY, "judge": judge, "model_to_evaluate": judge | {"input_template": "x"}}
        made = self.post("/v1/evaluation", {"type": "classify", "parameters": asked}).json
        kept = str(self.server.evaluations[made["workflow_id"]])
        self.assertIn("model_to_evaluate", kept)
        self.assertNotIn("sk-secret", kept)

    def test_generated_clients_get_the_counts_as_text(self):
        results = self.evaluate("classify", CLASSIFY, PY3)
        self.assertEqual(sum(json.loads(results["label_counts"]).values()), 20)

    def test_score(self):
        scores = self.evaluate("score", SCORE)["aggregated_scores"]
        self.assertTrue(1 <= scores["mean_score"] <= 5, scores)

    def test_compare(self):
        results = self.evaluate("compare", EVALUATION)
        self.assertEqual(results["A_wins"] + results["B_wins"] + results["Ties"], 20)

    def test_a_missing_file_is_the_users_error(self):
        parameters = {**CLASSIFY, "input_data_file_path": "file-no"}
        body = {"type": "classify", "parameters": parameters}
        made = self.json("POST", "/v1/evaluations", body)
        seen = self.climb(f"/v1/evaluations/{made['workflow_id']}/status")
        self.assertEqual(seen[-1], "user_error")

    def test_rules(self):
        for type, parameters, param in (
            ("classify", EVALUATION, "parameters.labels"),
            ("score", EVALUATION, "parameters.min_score"),
            ("score", {**SCORE, "judge": {"model": "x"}}, "parameters.judge.system_template"),
        ):
            body = {"type": type, "parameters": parameters}
            self.assertRefused("/v1/evaluation", body, param)

    def test_list(self):
        states = {"eval-0": "error", "eval-1": "queued"}
        jobs = [{"workflow_id": id, "status": status} for id, status in states.items()]
        self.server.seed("evaluations", jobs)
        for query, ids in (
            ("", ["eval-1", "eval-0"]),
            ("?status=error", ["eval-0"]),
            ("?limit=1", ["eval-1"]),
        ):
            got = self.json("GET", "/v1/evaluations" + query)
            self.assertEqual([job["workflow_id"] for job in got], ids)


class EndpointTests(LocalCase):
    def test_its_name_answers_while_it_is_started(self):
        made = self.json("POST", "/v1/endpoints", ENDPOINT)
        self.assertEqual(made["state"], "PENDING")
        path = f"/v1/endpoints/{made['id']}"
        self.assertEqual(self.climb(path, "state"), ["STARTING", "STARTED"])
        chat = {**HELLO, "model": made["name"]}
        for state, status in (("STARTED", 200), ("STOPPED", 400), ("STARTED", 400)):
            self.json("PATCH", path, {"state": state})
            got = self.ask("POST", CHAT, chat)
            self.assertEqual(got.status, status)
        said = f"The dedicated endpoint for {made['name']} is not running."
        self.assertTrue(got.json["error"]["message"].startswith(said))
        self.assertEqual(got.json["error"]["code"], "dedicated_endpoint_not_running")
        self.assertEqual(self.climb(path, "state"), ["STARTING", "STARTED"])
        self.json("POST", CHAT, chat)
        self.server.strict = True
        self.assertEqual(self.ask("DELETE", path).status, 204)
        self.json("POST", CHAT, chat, status=404)
        self.json("GET", path, status=404)

    def test_filters(self):
        self.server.seed("endpoints", [{"id": "endpoint-1", "state": "STARTED"}])
        for query, found in (
            ("", {"dedicated"}),
            ("?type=serverless", set()),
            ("?mine=true", {"dedicated"}),
        ):
            items = self.json("GET", "/v1/endpoints" + query)["data"]
            self.assertEqual({item["type"] for item in items}, found, query)

    def test_hardware(self):
        items = self.json("GET", "/v1/hardware")["data"]
        self.assertEqual(len({item["id"] for item in items}), len(items))
        self.assertNotIn("availability", items[0])
        self.assertIn("availability", self.json("GET", "/v1/hardware?model=x")["data"][0])


class JobScriptTests(LocalCase):
    """How jobs end when a fixture says so."""

    def setUp(self):
        super().setUp()
        for collection, items in SEEDS.items():
            self.server.seed(collection, items)

    def end_of(self, path, body, key="id", status="status"):
        created = self.ask("POST", path, body).json
        created = created.get("job", created)
        return self.climb(f"{path}/{created[key]}", status)[-1]

    def test_scripted_ends(self):
        for path, end, key, status in (
            ("/v1/fine-tunes", "error", "id", "status"),
            ("/v1/batches", "EXPIRED", "id", "status"),
            ("/v1/evaluation", "error", "workflow_id", "status"),
            ("/v1/endpoints", "ERROR", "id", "state"),
        ):
            with self.subTest(path=path):
                self.server.reply(job={"status": end}, endpoint=f"POST {path}", times=1)
                self.assertEqual(self.end_of(path, VALID[f"POST {path}"], key, status), end)
        self.server.assert_all_used()

    def test_a_cut_reply_is_an_error_line(self):
        self.server.fail(malformed=True, endpoint="chat")
        id = self.ask("POST", "/v1/batches", VALID["POST /v1/batches"]).json["job"]["id"]
        for _ in range(3):
            job = self.ask("GET", f"/v1/batches/{id}").json
        self.assertEqual((job["status"], job["output_file_id"]), ("COMPLETED", None))
        line = self.ask("GET", f"/v1/files/{job['error_file_id']}/content").json
        self.assertEqual(line["custom_id"], "q0")


# === Media endpoints ===


class ImageTests(LocalCase):
    def draw(self, prompt="a lake", **fields):
        body = {"model": FLUX, "prompt": prompt, "width": 64, "height": 48, **fields}
        return self.ask("POST", "/v1/images/generations", body)

    def test_flux_2_tells_milliseconds_and_first(self):
        flux = {"model": "black-forest-labs/FLUX.2-dev", "response_format": "url"}
        (item,) = self.draw(**flux).json["data"]
        self.assertEqual([*item], ["timings", "index", "url"])
        self.assertGreater(item["timings"]["inference"], 99)
        (item,) = self.draw(response_format="url").json["data"]
        self.assertEqual([*item], ["index", "url", "timings"])
        self.assertLess(item["timings"]["inference"], 1)

    def test_forms(self):
        both = self.draw().json["data"][0]
        self.assertEqual(set(both), {"index", "url", "b64_json", "timings"})
        png = base64.b64decode(both["b64_json"])
        self.assertEqual(png_size(png), (64, 48))
        got = self.ask("GET", urllib.parse.urlsplit(both["url"]).path, headers={})
        self.assertEqual((got.headers["content-type"], got.raw), ("image/png", png))
        for form, key in (("base64", "b64_json"), ("b64_json", "b64_json"), ("url", "url")):
            item = self.draw(response_format=form).json["data"][0]
            self.assertEqual(set(item), {"index", key, "timings"})

    def test_only_the_address_is_sent_where_no_form_was_asked_of_a_strict_server(self):
        with TogetherAiServer(port=0, strict=True) as self.server:
            item = self.draw().json["data"][0]
            self.assertEqual(set(item), {"index", "url", "timings"})
            got = self.ask("GET", item["url"].partition(str(self.server.port))[2], headers={})
            self.assertEqual(got.headers["content-type"], "image/jpeg")

    def test_a_jpeg_is_one(self):
        item = self.draw(response_format="base64", output_format="jpeg").json["data"][0]
        data = base64.b64decode(item["b64_json"])
        self.assertEqual((data[:4], data[-2:]), (b"\xff\xd8\xff\xe0", b"\xff\xd9"))
        frame = data.index(b"\xff\xc0") + 5  # behind its marker, length and precision
        self.assertEqual(struct.unpack(">HH", data[frame : frame + 4]), (48, 64))

    def test_sizes(self):
        for fields, size in (
            ({"size": "128x64", "width": None, "height": None}, (128, 64)),
            ({"width": 100, "height": None}, (100, 1024)),
            ({"width": 100, "height": None, "aspect_ratio": "16:9"}, (100, 1024)),
            ({"aspect_ratio": "9:1", "width": None, "height": None}, (2048, 336)),
            ({"aspect_ratio": "16:9", "width": None, "height": None}, (1360, 768)),
        ):
            with self.subTest(fields=fields):
                item = self.draw(response_format="b64_json", **fields).json["data"][0]
                self.assertEqual(png_size(base64.b64decode(item["b64_json"])), size)

    def test_zero_counts_as_not_given(self):
        fields = {"n": 0, "width": 0, "height": 0, "steps": 0}
        item = self.draw(response_format="b64_json", **fields).json["data"][0]
        self.assertEqual(png_size(base64.b64decode(item["b64_json"])), (1024, 1024))

    def test_bad_sizes_and_counts(self):
        for fields, param in (
            ({"width": -1}, "width"),
            ({"width": 8}, "width"),
            ({"height": 9999}, "height"),
            ({"width": None, "height": None, "size": "huge"}, "size"),
            ({"width": None, "height": None, "size": "9999x9999"}, "size"),
            ({"n": -1}, "n"),
            ({"n": 100}, "n"),
        ):
            with self.subTest(fields=fields):
                got = self.draw(**fields)
                self.assertEqual((got.status, got.json["error"]["param"]), (400, param))

    def test_each_prompt_seed_and_index_is_another_picture(self):
        def pictures(*args, **fields):
            items = self.draw(*args, **fields).json["data"]
            return [item["b64_json"] for item in items]

        all = pictures(n=3) + pictures("a hill") + pictures(seed=1)
        self.assertEqual(len(set(all)), 5)

    def test_addresses_that_were_never_given(self):
        for token in ("x", "0123456789abcdef-9999x9999.png", "0123456789abcdef-0x5.png"):
            self.assertEqual(self.ask("GET", "/shrt/" + token).status, 404)


class AudioTests(LocalCase):
    def speak(self, **fields):
        return self.post("/v1/audio/speech", {**SPEECH, **fields})

    def hear(self, data, task="transcriptions", **fields):
        return self.ask("POST", f"/v1/audio/{task}", write_form(fields, data), FORM)

    def test_wav_is_as_long_as_the_text(self):
        lengths = []
        for text in ("Hello.", "Hello there, this takes longer."):
            got = self.speak(input=text)
            self.assertEqual(got.headers["content-type"], "audio/wav")
            with wave.open(io.BytesIO(got.raw)) as file:
                self.assertEqual((file.getframerate(), file.getsampwidth()), (44100, 2))
                lengths.append(file.getnframes())
        self.assertLess(*lengths)

    def test_equal_requests_sound_equal_and_voices_do_not(self):
        self.assertEqual(self.speak().raw, self.speak().raw)
        self.assertNotEqual(self.speak().raw, self.speak(voice="tara").raw)

    def test_raw_takes_the_bytes_of_its_encoding(self):
        sizes = {}
        for name in ("f32le", "s16le"):
            got = self.speak(response_format="raw", response_encoding="pcm_" + name)
            self.assertEqual(got.headers["content-type"], "application/octet-stream")
            sizes[name] = len(got.raw)
        self.assertEqual(sizes["f32le"], 2 * sizes["s16le"])
        for name in ("pcm_mulaw", "pcm_alaw"):
            body = {**SPEECH, "response_encoding": name}
            self.assertRefused("/v1/audio/speech", body, "response_encoding")

    def test_mp3_is_frames_as_long_as_the_text(self):
        got = self.speak(response_format="mp3", bit_rate=32000)
        self.assertEqual(got.headers["content-type"], "audio/mpeg")
        frames = got.raw.split(b"\xff\xfb\x90\xc0")[1:]
        self.assertEqual({len(frame) for frame in frames}, {413})
        self.assertAlmostEqual(len(frames) * 1152 / 44100, 20 * 0.06, delta=0.03)

    def test_a_stream_is_the_raw_reply_in_pieces(self):
        whole = self.speak(response_format="raw").raw
        chunks = self.speak(stream=True).events
        self.assertGreater(len(chunks), 1)
        self.assertEqual(b"".join(base64.b64decode(c["b64"]) for c in chunks), whole)
        kinds = {(c["object"], c["b64"] == c["delta"]) for c in chunks}
        self.assertEqual(kinds, {("audio.tts.chunk", True)})

    def test_only_raw_streams(self):
        body = {**SPEECH, "stream": True, "response_format": "wav"}
        self.assertRefused("/v1/audio/speech", body, "response_format")

    def test_a_transcript_lasts_as_long_as_the_sound(self):
        for seconds in (1, 7):
            got = self.hear(write_sound(seconds), response_format="verbose_json").json
            self.assertEqual((got["duration"], got["segments"][-1]["end"]), (seconds, seconds))
            self.assertEqual(" ".join(part["text"] for part in got["segments"]), got["text"])
            self.assertNotIn("words", got)

    def test_words_speakers_and_tasks(self):
        wishes = {"response_format": "verbose_json", "diarize": "true", "min_speakers": 2}
        wishes["timestamp_granularities[]"] = "word"
        got = self.hear(write_sound(9), **wishes).json
        self.assertEqual(" ".join(word["word"] for word in got["words"]), got["text"])
        speakers = [part["speaker_id"] for part in got["speaker_segments"]]
        self.assertEqual(speakers[:2], ["SPEAKER_00", "SPEAKER_01"])
        spoken = [word for part in got["speaker_segments"] for word in part["words"]]
        self.assertEqual(spoken, got["words"])
        got = self.hear(write_sound(9), "translations", response_format="verbose_json").json
        self.assertEqual(got["task"], "translate")

    def test_other_bytes_say_other_words(self):
        texts = [self.hear(data).raw for data in (b"one", b"one", b"other")]
        self.assertEqual(texts[0], texts[1])
        self.assertNotEqual(texts[0], texts[2])

    def test_a_url_and_an_empty_file(self):
        self.json("POST", "/v1/audio/transcriptions", {"file": "https://a.b/c.mp3"})
        self.assertEqual(self.hear(b"").status, 400)

    def test_fixtures_speak_and_listen(self):
        self.server.reply(transcription={"text": "hello big world", "duration": 3}, times=1)
        self.assertEqual(self.hear(b"x").json, {"text": "hello big world"})
        self.server.reply(audio="QUJD")
        self.assertEqual(self.speak().raw, b"ABC")

    def test_voices(self):
        voices = self.json("GET", "/v1/voices")["data"]
        self.assertIn("tara", [v["id"] for each in voices for v in each["voices"]])
        (one,) = self.json("GET", "/v1/voices?model=cartesia/sonic")["data"]
        self.assertEqual(one["model"], "cartesia/sonic")


class Line:
    """Stands in for a connection that was handed over to a socket.

    is_held  what the turns say is not drawn until `go_on()`
    """

    def __init__(self, handler, is_held=False):
        self.handler, self.is_held = handler, is_held
        self.sent, self.pauses = b"", []
        self.is_cut = False
        handler.on_open(self)
        self.on_bytes(b"")

    def write(self, data):
        self.sent += data

    def on_bytes(self, data):
        self.handler.on_bytes(data)
        if self.handler.closed or not self.is_held:
            self.go_on()

    hear = on_bytes

    def run(self, work, take):
        work()
        take(None, None)

    def go_on(self):
        try:
            while self.handler.turns and not self.handler.closed:
                for piece in self.handler.draw():
                    if isinstance(piece, float):
                        self.pauses.append(piece)
                    else:
                        self.sent += piece
        except fake.Cut:
            self.is_cut = True
        if self.handler.closed or self.is_cut:
            self.write(self.handler.on_close())

    def take(self):
        """Return what was sent since: messages, pongs as bytes, the code of a close."""
        found, data, self.sent = [], self.sent, b""
        while data:
            assert data[0] in (0x81, 0x88, 0x8A), data[:2]  # a text, a close, a pong
            kind, size, start = data[0] & 15, data[1], 2
            if size > 125:
                start = 4 if size == 126 else 10
                size = int.from_bytes(data[2:start], "big")
            payload, data = data[start : start + size], data[start + size :]
            if kind == 8:
                found.append(int.from_bytes(payload[:2], "big"))
            else:
                found.append(payload if kind == 10 or payload[-1:] != b"}" else json.loads(payload))
        return found


class TalkCase(LocalCase):
    """A test that talks over a socket without a connection."""

    path = REALTIME

    def connect(self, query="", is_held=False, **headers):
        """Open a socket and return what it says first."""
        path, _, given = self.path.partition("?")
        query = "&".join(filter(None, (given, query)))
        request = Request("GET", path, query=query, headers={
            name.lower(): text for name, text in {**UPGRADE, **headers}.items()
        })  # fmt: skip
        reply = self.server.answer(request)
        self.assertEqual(reply.status, 101, reply.body)
        self.line = Line(reply.handler, is_held)
        self.call = request.call
        return self.line.take()

    def say(self, type, **fields):
        """Send a message and return the answers."""
        self.line.on_bytes(mask(1, json.dumps({"type": type, **fields}).encode()))
        return self.line.take()

    def texts(self, answers, type, key):
        """Return one member of the messages of a type."""
        return [
            each[key] for each in answers if isinstance(each, dict) and each["type"].endswith(type)
        ]


@functools.cache
def tone(seconds, rate=16000, pitch=440, level=8000):
    """Return samples of a tone; level 0 is silence."""
    if not level:
        return bytes(2 * int(seconds * rate))
    turn = 2 * math.pi * pitch / rate
    samples = [int(level * math.sin(turn * at)) for at in range(int(seconds * rate))]
    return struct.pack(f"<{len(samples)}h", *samples)


TURN = "conversation.item.input_audio_transcription."


class RealtimeTests(TalkCase):
    def append(self, sound, size=6400):
        answers = []
        for at in range(0, len(sound), size):
            piece = base64.b64encode(sound[at : at + size]).decode()
            answers += self.say("input_audio_buffer.append", audio=piece)
        return answers

    def hear(self, sound, query="", size=6400, commit=False):
        """Return what a new session answers to some sound."""
        self.connect(query)
        answers = self.append(sound, size)
        return answers + (self.say("input_audio_buffer.commit") if commit else [])

    def test_a_session_is_told_as_it_was_asked_for(self):
        (created,) = self.connect()
        self.assertEqual(created["type"], "session.created")
        session = created["session"]
        self.assertEqual(session["object"], "realtime.session")
        self.assertEqual(session["model"], "openai/whisper-large-v3")
        self.assertEqual(self.connect(), [created])
        self.assertNotEqual(self.connect("language=de")[0]["session"]["id"], session["id"])
        self.assertEqual(self.call.body, {"model": session["model"], "language": "de"})

    def test_two_sentences_and_a_pause_are_two_turns(self):
        sound = tone(1.2) + tone(0.8, level=0) + tone(2, pitch=300) + tone(0.7, level=0)
        answers = self.hear(tone(0.5, level=40) + sound)
        first, second = self.texts(answers, ".completed", "transcript")
        self.assertEqual([len(text.split()) for text in (first, second)], [3, 5])
        self.assertEqual(self.texts(answers, ".completed", "start"), [0.5, 2.5])
        self.assertEqual(self.texts(answers, ".completed", "duration"), [1.2, 2.0])
        self.assertEqual(self.texts(answers, ".processed", "processed_ms"), [1700, 4500])
        deltas = self.texts(answers, ".delta", "delta")
        self.assertTrue(all((first + " ").startswith(text + " ") for text in deltas[:3]), deltas)
        self.assertEqual(deltas[-1], second)
        self.assertEqual(len(set(self.texts(answers, ".completed", "item_id"))), 2)

    def test_drafts_come_while_somebody_speaks(self):
        answers = self.hear(tone(1.5))
        self.assertEqual({each["type"] for each in answers}, {TURN + "delta"})
        self.assertGreater(len(answers), 1)

    def test_the_same_sound_has_the_same_words_however_it_is_cut(self):
        sound = tone(0.3, level=0) + tone(1.7) + tone(1, level=0) + tone(0.9, pitch=200)
        whole = self.hear(sound, size=len(sound), commit=True)
        for size in (6400, 1001, 333):
            self.assertEqual(self.hear(sound, size=size, commit=True), whole)
        self.assertEqual(len(self.texts(whole, ".completed", "transcript")), 2)
        other = self.hear(tone(1.7, pitch=441), commit=True)
        self.assertNotEqual(
            self.texts(other, ".completed", "transcript"),
            self.texts(whole, ".completed", "transcript")[:1],
        )

    def test_formats_differ_in_their_rate(self):
        for format, rate in (
            ("pcm_s16le_8000", 8000), ("pcm_s16le_24000", 24000), ("pcm16", 24000),
            ("pcm_s16", 24000), ("pcm_s16le", 24000),
        ):  # fmt: skip
            sound = tone(2, rate) + tone(0.6, rate, level=0)
            answers = self.hear(sound, f"input_audio_format={format}")
            self.assertEqual(self.texts(answers, ".completed", "duration"), [2])

    def test_turns_are_told_apart_as_asked(self):
        sound = tone(1) + tone(0.3, level=0) + tone(1) + tone(0.6, level=0)

        def count(query):
            return len(self.texts(self.hear(sound, query), ".completed", "start"))

        self.assertEqual(count(""), 1)
        self.assertEqual(count("min_silence_duration_ms=200"), 2)
        self.assertEqual(count("max_speech_duration_s=0.5"), 4)
        self.assertEqual(count("min_speech_duration_ms=3000"), 0)
        self.assertEqual(count("threshold=0.98"), 0)
        self.assertEqual(count("turn_detection=none"), 0)

    def test_without_turn_detection_a_commit_ends_a_turn(self):
        self.connect("turn_detection=none")
        self.assertEqual(self.append(tone(0.5, level=0) + tone(1) + tone(7, level=0)), [])
        answers = self.say("input_audio_buffer.commit")
        self.assertEqual(self.texts(answers, ".completed", "start"), [0.5])
        self.assertEqual(self.texts(answers, ".completed", "duration"), [1])
        self.assertEqual(self.append(tone(0.5, level=0) + tone(0.11)), [])  # 0.01 are no frame
        answers = self.say("input_audio_buffer.commit")
        self.assertEqual(self.texts(answers, ".completed", "start"), [9])
        self.assertEqual(self.texts(answers, "processed", "processed_ms"), [9110])
        self.append(tone(0.1))
        answers = self.say("input_audio_buffer.commit")
        self.assertEqual(self.texts(answers, "processed", "processed_ms"), [9210])
        self.assertEqual(self.say("input_audio_buffer.commit"), [])

    def test_a_commit_ends_speech_that_goes_on(self):
        answers = self.hear(tone(1), commit=True)
        self.assertEqual(len(self.texts(answers, ".completed", "transcript")), 1)
        self.assertEqual(self.hear(tone(1, level=0), commit=True), [])

    def test_clear_forgets_and_counts_anew(self):
        self.connect()
        self.append(tone(1))
        self.assertEqual(self.say("input_audio_buffer.clear"), [])
        self.assertEqual(self.say("input_audio_buffer.commit"), [])
        self.append(tone(1))
        answers = self.say("input_audio_buffer.commit")
        self.assertEqual(self.texts(answers, ".completed", "start"), [0])

    def test_a_session_can_be_changed(self):
        self.connect()
        rules = {"type": "server_vad", "min_silence_duration_ms": 100}
        (answer,) = self.say("transcription_session.updated", session={"turn_detection": rules})
        self.assertEqual(answer["type"], "transcription_session.updated")
        self.assertEqual(answer["session"]["turn_detection"], rules)
        self.assertEqual(
            len(self.texts(self.append(tone(1) + tone(0.2, level=0)), "ed", "type")), 2
        )
        (answer,) = self.say("transcription_session.updated", session={"turn_detection": None})
        self.assertIsNone(answer["session"]["turn_detection"])
        self.assertEqual(self.append(tone(1) + tone(1, level=0)), [])
        self.append(tone(1))
        answers = self.say("input_audio_buffer.commit")
        self.assertEqual(len(self.texts(answers, ".completed", "transcript")), 1)

    def test_echo_is_answered_at_once(self):
        self.server.reply(transcription="One two", latency=60_000)
        self.connect(is_held=True)
        self.append(tone(1))
        (answer,) = self.say("echo", echo_id=7, payload={"a": 1})
        self.assertEqual((answer["type"], answer["echo_id"]), ("echo.response", 7))
        self.assertEqual(answer["payload"], {"a": 1})
        self.assertEqual(answer["server_sent_at"], 1700000001)

    def test_what_cannot_be_understood_ends_the_session(self):
        for frame, reason in (
            (mask(1, b"{"), "not valid JSON"),
            (mask(1, b"[]"), "must be a JSON object"),
            (mask(1, b'{"type":"input_audio_buffer.append"}'), "Missing required field: audio"),
            (mask(1, b'{"type":"input_audio_buffer.append","audio":"?"}'), "must be base64"),
        ):
            with self.subTest(frame=frame):
                self.connect()
                self.line.on_bytes(frame)
                failed, code = self.line.take()
                self.assertEqual((failed["type"], code), (TURN + "failed", 1000))
                self.assertEqual(failed["error"]["type"], "invalid_request_error")
                self.assertIn(reason, failed["error"]["message"])
                self.assertNotIn("event_type", failed)
                self.line.on_bytes(mask(1, b'{"type":"echo"}'))
                self.assertEqual(self.line.take(), [])
                self.assertEqual((self.call.outcome, self.call.close_code), ("cut", 1000))

    def test_an_unknown_message_is_told_in_the_record(self):
        self.connect()
        self.assertEqual(self.say("transcription_session.update", session={}), [])
        self.assertEqual(self.call.warnings, ("nothing reads transcription_session.update",))
        for number in range(50):
            self.say(f"type {number}")
        self.assertLess(len(self.call.warnings), 50)

    def test_sound_without_end_is_refused(self):
        with mock.patch.object(fake, "MAX_WAITING_BYTES", 100_000):
            self.connect("turn_detection=none")
            self.assertIn(1000, self.append(tone(4)))


class VoiceTests(TalkCase):
    path = VOICE
    RECEIVED = "conversation.item.input_text.received"

    def speak(self, *texts, query="", commit=True):
        """Return what a new session answers to pieces of a text."""
        self.connect(query)
        answers = []
        for text in texts:
            answers += self.say("input_text_buffer.append", text=text)
        return answers + (self.say("input_text_buffer.commit") if commit else [])

    def spoken(self, answers):
        """Return the sound of each item, by its id."""
        sound = {}
        for each in answers:
            if each["type"].endswith("audio_output.delta"):
                data = base64.b64decode(each["delta"])
                sound[each["item_id"]] = sound.get(each["item_id"], b"") + data
        return sound

    def test_a_session_is_told_with_its_voice(self):
        (created,) = self.connect("model=canopylabs/orpheus-3b-0.1-ft")
        self.assertEqual(created["session"]["object"], "realtime.tts.session")
        self.assertEqual(created["session"]["voice"], "tara")
        session = self.connect()[0]["session"]
        self.assertEqual((session["model"], session["voice"]), ("hexgrad/Kokoro-82M", "af_alloy"))
        self.assertEqual(self.connect("voice=leo")[0]["session"]["voice"], "leo")

    def test_a_sentence_is_spoken_once_it_is_complete(self):
        self.connect()
        for text, count in (
            ("Hello", 0), (" there. How", 1), (" are", 0), (" you?", 1), (" Pi is 3.", 0),
            ("14, or so", 0), ("! And", 1), (" 1, 2, 3. Then", 1), ("... ", 1), ("好。", 1),
        ):  # fmt: skip
            answers = self.say("input_text_buffer.append", text=text)
            self.assertEqual(answers[0], {"type": self.RECEIVED, "text": text})
            self.assertEqual(len(self.spoken(answers)), count, text)
        self.assertEqual(self.say("input_text_buffer.commit"), [])
        said = self.call.body["input"]
        self.assertEqual(
            said, "Hello there. How are you? Pi is 3.14, or so! And 1, 2, 3. Then... 好。"
        )

    def test_the_sound_is_24_khz_and_as_long_as_the_text(self):
        answers = self.speak("Hello there, friend")
        (sound,) = self.spoken(answers).values()
        self.assertEqual(len(sound), 19 * fake.CHARACTER_MS * 24 * 2)
        whole = self.post("/v1/audio/speech", {
            "model": "hexgrad/Kokoro-82M", "voice": "af_alloy", "input": "Hello there, friend",
            "response_format": "raw", "response_encoding": "pcm_s16le",
        })  # fmt: skip
        self.assertEqual(sound, whole.raw)
        self.assertEqual(answers[-1], {
            "type": "conversation.item.audio_output.done", "item_id": "tts_1",
        })  # fmt: skip
        (other,) = self.spoken(self.speak("Hello there, friend", query="voice=am_adam")).values()
        self.assertNotEqual(other, sound)

    def test_words_have_times_where_asked_for(self):
        answers = self.speak("Hello big world", query="alignment=word")
        (times,) = [each for each in answers if each["type"].endswith("word_timestamps")]
        self.assertEqual(times["words"], ["Hello", "big", "world"])
        self.assertEqual(times["start_seconds"], [0.0, 0.36, 0.6])
        self.assertEqual(times["end_seconds"], [0.3, 0.54, 0.9])
        self.assertEqual(self.texts(self.speak("Hello"), "timestamps", "words"), [])

    def test_text_without_an_end_is_spoken_when_it_is_long(self):
        text = "word " * 20
        answers = self.speak(text, query="max_partial_length=32", commit=False)
        sizes = [len(sound) // (fake.CHARACTER_MS * 48) for sound in self.spoken(answers).values()]
        self.assertEqual(sizes, [29, 29, 29])
        self.assertEqual(len(self.spoken(self.speak("x" * 80, query="max_partial_length=32"))), 3)

    def test_clear_forgets_what_is_not_spoken(self):
        self.speak("Hello there", commit=False)
        self.assertEqual(self.say("input_text_buffer.clear"), [])
        self.assertEqual(self.say("input_text_buffer.commit"), [])

    def test_a_session_can_be_changed(self):
        (first,) = self.spoken(self.speak("Hello")).values()
        (answer,) = self.say("tts_session.updated", session={"voice": "bf_emma", "speed": None})
        self.assertEqual(answer["type"], "tts_session.updated")
        self.assertEqual(answer["session"]["voice"], "bf_emma")
        self.say("input_text_buffer.append", text="Hello")
        (second,) = self.spoken(self.say("input_text_buffer.commit")).values()
        self.assertNotEqual(first, second)

    def test_an_error_in_a_message_is_told_and_is_not_the_end(self):
        self.connect()
        self.line.on_bytes(mask(1, b"{"))
        (failed,) = self.line.take()
        self.assertEqual(failed["type"], "conversation.item.tts.failed")
        for fields in ({"text": 5}, {}):
            (failed,) = self.say("input_text_buffer.append", **fields)
            self.assertEqual(failed["error"]["param"], "text")
        (failed,) = self.say("tts_session.updated", session={"voice": 1})
        self.assertEqual(failed["error"]["param"], "session.voice")
        self.assertEqual(len(self.say("input_text_buffer.append", text="Go on.")), 4)

    def test_pings_and_closes(self):
        self.connect()
        self.line.on_bytes(mask(9, b"hi") + mask(10, b"x") + mask(8, b"\x0f\xa0bye"))
        self.assertEqual(self.line.take(), [b"hi", 4000])
        self.line.handler.on_close()
        self.assertEqual((self.call.outcome, self.call.close_code), ("complete", 4000))
        self.connect()
        self.line.handler.on_close()
        self.assertEqual((self.call.outcome, self.call.close_code), ("left", 0))
        self.connect()
        self.line.on_bytes(mask(1, b"\xff"))
        self.assertEqual(self.line.take(), [1007])
        self.assertEqual(self.call.error, "a text is not UTF-8")

    def test_who_does_not_take_the_answers_is_closed(self):
        with mock.patch.object(fake, "MAX_WAITING_BYTES", 1000):
            self.connect(is_held=True)
            answers = []
            for _ in range(20):
                answers += self.say("input_text_buffer.append", text="Hello. ")
            self.assertIn(1008, answers)
            self.connect()
            for _ in range(20):
                self.assertNotIn(1008, self.say("input_text_buffer.append", text="Hello. "))


class SocketScriptTests(TalkCase):
    """Fixtures that answer the turns of a socket, and faults on their way."""

    path = VOICE

    def speak(self, text="Hello there.", **headers):
        self.connect(**headers)
        return self.say("input_text_buffer.append", text=text)[1:]

    def kinds(self, answers):
        return [
            each["type"].rpartition(".")[2] if isinstance(each, dict) else each for each in answers
        ]

    def test_a_transcription(self):
        self.path = REALTIME
        fixture = self.server.reply(transcription="Call me back at five", endpoint="realtime")
        self.connect("turn_detection=none")
        sound = base64.b64encode(tone(1)).decode()
        self.say("input_audio_buffer.append", audio=sound)
        answers = self.say("input_audio_buffer.commit")
        deltas = self.texts(answers, ".delta", "delta")
        self.assertEqual(deltas, ["Call me back", "Call me back at five"])
        self.assertEqual(self.texts(answers, ".completed", "transcript"), ["Call me back at five"])
        self.assertEqual((fixture.served, self.call.fixture), (1, fixture.source))

    def test_a_sound(self):
        self.server.reply(audio=b"\1\2" * 9000, model="hexgrad/Kokoro-82M", input_text="Hello")
        self.assertEqual(self.kinds(self.speak()), ["delta", "delta", "done"])
        with io.BytesIO() as file:
            with wave.open(file, "wb") as sound:
                sound.setparams((1, 2, 24000, 0, "NONE", ""))
                sound.writeframes(b"\3\4" * 10)
            self.server.reply(audio=file.getvalue(), test_id="one")
        first, _ = self.speak(**{"X-Test-Id": "one"})
        self.assertEqual(base64.b64decode(first["delta"]), b"\3\4" * 10)
        self.assertGreater(len(self.speak("Something else.")), 3)

    def test_statuses_refuse_the_handshake_and_nothing_else(self):
        self.server.fail(503, endpoint="voice", times=1)
        got = self.ask("GET", VOICE, None, UPGRADE)
        self.assertEqual((got.status, self.server.requests[-1].kind), (503, "voice"))
        self.assertEqual(fake.record_calls(self.server.requests, ()), [])
        self.assertEqual(self.kinds(self.speak())[-1], "done")

    def test_close_codes(self):
        fixture = self.server.fail(4503, times=1)
        self.assertEqual(self.ask("POST", CHAT, HELLO).status, 200)
        self.assertEqual(self.connect(), [4503])
        self.assertEqual((self.call.outcome, self.call.close_code), ("cut", 4503))
        self.assertEqual(fixture.served, 1)
        self.server.fail(4503, error_after_chunks=1, times=1)
        *_, failed, code = self.speak()
        self.assertEqual((failed["error"]["code"], code), ("no_healthy_workers", 4503))
        self.assertNotIn("item_id", failed)
        self.server.fail(1013, error={"message": "Later", "code": "busy"}, error_after_chunks=0)
        self.assertEqual(self.speak()[0]["error"]["message"], "Later")
        for code in (1005, 1006, 1500, 2999):
            with self.assertRaises(ValueError):
                self.server.fail(code)

    def test_a_late_error_fails_one_item(self):
        self.server.fail(429, error_after_chunks=1, times=1)
        answers = self.speak()
        self.assertEqual(self.kinds(answers), ["delta", "failed"])
        self.assertEqual(answers[1]["item_id"], "tts_1")
        self.assertEqual(answers[1]["error"]["type"], "rate_limit")
        again = self.say("input_text_buffer.append", text="Hello there.")
        self.assertEqual(self.kinds(again)[-1], "done")
        self.path = REALTIME
        self.server.fail(500, error_after_chunks=0)
        self.connect()
        sound = base64.b64encode(tone(1)).decode()
        (failed,) = self.say("input_audio_buffer.append", audio=sound)
        self.assertEqual((failed["type"], failed["event_type"]), (TURN + "failed", "completed"))
        self.assertEqual(self.say("input_audio_buffer.commit"), [])

    def test_faults_on_the_way(self):
        usual = self.kinds(self.speak())
        self.server.fail(disconnect_after_chunks=2, times=1)
        self.assertEqual(self.kinds(self.speak()), usual[:2])
        self.assertTrue(self.line.is_cut)
        self.assertEqual((self.call.outcome, self.call.close_code), ("cut", 0))
        self.server.fail(malformed=True, times=1)
        first, *rest = self.speak()
        self.assertTrue(first.startswith(b'{"type":"conversation.item.audio_output.delta"'), first)
        self.assertEqual(len(rest) + 1, len(usual))
        self.server.fail(empty=True, times=1)
        self.assertEqual(self.speak(), [])
        self.server.fail(end_after_chunks=1, times=1)
        self.assertEqual(self.kinds(self.speak()), usual[:1])
        self.server.fail(stall_after_chunks=1, times=1)
        self.assertEqual(self.kinds(self.speak()), usual[:1])
        self.assertEqual(self.line.pauses[-1], fake.STALL_SECONDS)
        self.server.fail(chaos={"dropRate": 1}, times=1)
        self.assertEqual(self.kinds(self.speak()), ["failed"])
        self.server.reply(audio=b"ab", streaming_profile={"ttft": 500, "tps": 10})
        self.assertEqual(self.kinds(self.speak()), ["delta", "done"])
        self.assertEqual([round(pause, 1) for pause in self.line.pauses[:2]], [0.5, 0.6])

    def test_a_miss_is_an_error_of_the_turn(self):
        self.server = TogetherAiServer(port=0, on_miss={"voice": "error"})
        self.server.reply(audio=b"ab", input_text="goodbye")
        (failed,) = self.speak()
        self.assertIn("No fixture matches", failed["error"]["message"])
        self.assertEqual(
            self.kinds(self.say("input_text_buffer.append", text="goodbye."))[1:], ["delta", "done"]
        )

    def test_files_of_others_are_still_read(self):
        entries = [
            {"match": {"endpoint": "realtime"}, "response": {"content": "foreign"}},
            {"match": {"endpoint": "realtime"}, "response": {"transcription": {"text": "ours"}}},
        ]
        found = fake.parse_fixtures({"fixtures": entries}, "a.json")
        self.assertEqual([each.type.name for each in found], ["transcription"])

    def test_the_record_has_one_call_with_its_messages(self):
        self.speak("Hello there.")
        self.line.on_bytes(mask(8))
        (call,) = self.server.calls_to(
            "voice", input_text="Hello there", model="hexgrad/Kokoro-82M"
        )
        self.assertEqual((call.status, call.model), (101, "hexgrad/Kokoro-82M"))
        senders = [each["from"] for each in call.messages]
        self.assertEqual(senders[:3], ["server", "client", "server"])
        self.assertEqual(call.messages[1]["message"]["text"], "Hello there.")
        self.assertEqual(call.messages[3]["message"]["delta"], {"bytes": 12000})
        self.assertEqual(call.reply[-1]["type"], "conversation.item.audio_output.done")
        self.assertEqual(call.events_sent, len(call.reply))
        row = call.as_json()
        self.assertEqual((row["close_code"], row["messages"]), (0, call.messages))
        self.server.assert_called("voice", times=1)

    def test_the_page_plays_the_sound(self):
        self.speak("Hello there.")
        self.path = REALTIME
        self.connect("input_audio_format=pcm_s16le_8000")
        heard = tone(0.5, 8000)
        for at in range(0, len(heard), 4000):
            audio = base64.b64encode(heard[at : at + 4000]).decode()
            self.say("input_audio_buffer.append", audio=audio)
        for call, rate in zip(self.server.requests, (24000, 8000)):
            place = f"/__parlel/requests/{call.number}"
            (part,) = self.ask("GET", place).json["said"][-1]["content"]
            self.assertEqual(part, {"type": "audio", "url": f"{place}/reply"})
            got = self.ask("GET", part["url"])
            with wave.open(io.BytesIO(got.raw)) as sound:
                self.assertEqual(got.headers["content-type"], "audio/wav")
                self.assertEqual(sound.getframerate(), rate)
                played = sound.readframes(10**6)
        self.assertEqual(played, heard)
        self.say("input_audio_buffer.commit")
        rows = self.ask("GET", "/__parlel/requests?view=rows").json["rows"]
        said = call.reply[-2]["transcript"]
        answers = ["0.7 s of sound", f"{said} / 0.5 s of sound"]
        self.assertEqual([row["answer"] for row in rows], answers)
        self.assertNotIn(base64.b64encode(heard[:300]).decode(), json.dumps(call.as_json()))

    def test_the_verdict_knows_reconnects(self):
        def judge():
            names = [finding.name for finding in self.server.verdict()]
            self.server.reset()
            return names

        self.path = REALTIME
        self.server.fail(4503, times=1)
        self.connect()
        self.connect()
        self.assertEqual(judge(), [])
        self.server.fail(4503)
        self.connect()
        self.assertEqual(judge(), ["no_retry"])
        self.server.fail(4503)
        for _ in range(6):
            self.connect()
        self.assertEqual(judge(), ["retry_storm", "gave_up"])
        self.connect()
        self.line.on_bytes(mask(1, b"\xff"))  # which is its own fault
        self.assertEqual(judge(), [])


class VideoTests(LocalCase):
    def create(self, **fields):
        return self.json("POST", "/v2/videos", {"model": HAILUO, **fields})

    def test_a_video_completes_when_it_is_retrieved(self):
        job = self.create(prompt="a lake", seconds="2", width=64, height=48)
        self.assertEqual((job["status"], job["outputs"]), ("in_progress", None))
        self.assertEqual(job["size"], "64x48")
        done = self.json("GET", f"/v2/videos/{job['id']}")
        self.assertEqual((done["status"], done["progress"]), ("completed", 100))
        self.assertEqual(done["seconds"], "2")
        path = done["outputs"]["video_url"].partition(self.server.origin)[2]
        got = self.ask("GET", path)
        self.assertEqual((got.headers["content-type"], got.raw[4:8]), ("video/mp4", b"ftyp"))
        part = self.ask("GET", path, headers={**KEY, "Range": "bytes=4-7"})
        self.assertEqual(part.raw, b"ftyp")

    def test_sizes(self):
        for fields, size in (
            ({}, "1366x768"),
            ({"resolution": "720p"}, "1280x720"),
            ({"resolution": "480p"}, "854x480"),
            ({"resolution": "720p", "ratio": "9:16"}, "720x1280"),
            ({"height": 512, "ratio": "1:1"}, "512x512"),
            ({"size": "1280x720"}, "1280x720"),
            ({"width": 0, "height": 0, "resolution": "resolution", "ratio": "0:0"}, "1366x768"),
        ):
            self.assertEqual(self.create(**fields)["size"], size, fields)

    def test_no_such_file(self):
        for name in ("x", "0123456789abcdef-9999x64-2s24.mp4", "0123456789abcdef-64x64-0s24.mp4"):
            self.assertEqual(self.ask("GET", f"/shrt/videos/{name}").status, 404)

    def test_a_fixture_names_and_fails_a_video(self):
        self.server.reply(video={"id": "v1", "status": "failed", "error": "too dark"})
        self.assertEqual(self.create()["status"], "in_progress")
        job = self.json("GET", "/v2/videos/v1")
        self.assertEqual((job["status"], job["error"]["message"]), ("failed", "too dark"))


# === Account endpoints ===


class OwnModelTests(LocalCase):
    """Models that the catalogue lacks, described by a test or a file."""

    ROW = MappingProxyType(
        {
            "engine": "GLM",
            "context_length": 100,
            "traits": ["sees"],
            "price": {"input": 1, "output": 2, "cached_input": 0.5},
        }
    )

    def chat_with(self, model, **fields):
        return self.ask("POST", CHAT, {**HELLO, "model": model, **fields})

    def test_a_server_has_them(self):
        own = {"acme/llama": dict(self.ROW), "acme/e": {"type": "embedding", "dimensions": 8}}
        self.server = TogetherAiServer(strict=True, models={**own, LLAMA: {"engine": "B"}})
        for _ in range(2):
            got = self.chat_with("acme/llama").json
            self.assertIn("matched_stop", got["choices"][0])
            self.assertIn("metadata", self.chat_with(LLAMA).json)
            self.assertEqual(self.chat_with("acme/llama", max_tokens=99).status, 400)
            listed = {each["id"]: each for each in self.ask("GET", "/v1/models").json}
            model = listed["acme/llama"]
            self.assertEqual((model["type"], model["context_length"]), ("chat", 100))
            prices = {key: model["pricing"][key] for key in ("input", "output", "cached_input")}
            self.assertEqual(prices, self.ROW["price"])
            got = self.ask("POST", "/v1/embeddings", {"model": "acme/e", "input": "x"}).json
            self.assertEqual(len(got["data"][0]["embedding"]), 8)
            self.server.reset()

    def test_files_have_them(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "models.json")
            row = {"engine": "C", "contextLength": 50, "price": {"input": 1, "cachedInput": 2}}
            path.write_text(json.dumps({"models": {"acme/llama": row}}), "utf-8")
            self.server = TogetherAiServer(strict=True)
            self.server.load(path)
            for _ in range(2):
                id = self.chat_with("acme/llama").json["id"]
                self.assertTrue(id.startswith("chatcmpl-"), id)
                self.server.reset()
            path.write_text(json.dumps({"models": {"acme/llama": {"engin": "C"}}}), "utf-8")
            with self.assertRaisesRegex(ValueError, "engin: unknown key, did you mean engine"):
                fake.load_fixtures(str(path))

    def test_what_is_wrong_is_named(self):
        for row, said in (
            ({"engine": "Z"}, "models['m'].engine: must be one of A, B"),
            ({"contextlength": 5}, "did you mean contextLength"),
            ({"context_length": 0}, "models['m'].context"),
            ({"traits": ["sings"]}, "models['m'].traits[0]"),
            ({"price": {"input": -1}}, "models['m'].price.input"),
            (7, "models['m']"),
        ):
            with self.subTest(row=row), self.assertRaises(ValueError) as caught:
                TogetherAiServer(models={"m": row})
            self.assertIn(said, str(caught.exception))
        body = {"fixtures": [], "models": {"m": {}}}
        got = self.ask("POST", "/__parlel/fixtures", body)
        self.assertEqual(got.status, 400)
        self.assertIn("models", got.json["error"]["message"])


class ModelTests(LocalCase):
    def test_clients_made_from_openais_are_known_by_their_own_header(self):
        for headers, is_list in (
            ({"User-Agent": "MyApp/1", "X-Stainless-Lang": "js"}, False),
            ({"User-Agent": "Together/JS 0.52.0", "X-Stainless-Lang": "js"}, True),
            ({"User-Agent": "MyApp/1"}, True),
        ):
            got = self.ask("GET", "/v1/models", headers={**KEY, **headers}).json
            self.assertEqual(isinstance(got, list), is_list, headers)

    def test_lengths_of_context_and_prices_are_told(self):
        models = {model["id"]: model for model in self.json("GET", "/v1/models")}
        self.assertEqual(models[SMALL_MODEL]["context_length"], 32768)
        self.assertNotIn("context_length", models[FLUX])
        pricing = models[SMALL_MODEL]["pricing"]
        self.assertEqual((pricing["input"], pricing["output"], pricing["hourly"]), (0.3, 0.3, 0))

    def test_the_list_is_bare_but_for_openai(self):
        models = self.json("GET", "/v1/models")
        self.assertIn("/", models[0]["id"])
        types = "chat moderation code language embedding rerank image audio transcribe video"
        self.assertEqual({model["type"] for model in models}, set(types.split()))
        for agent in ("OpenAI/Python 3.54.0", "AsyncOpenAI/Python 1.109.1", "OpenAI/JS 6.49.0"):
            got = self.json("GET", "/v1/models", headers={**KEY, "User-Agent": agent})
            self.assertEqual(got["object"], "list")
            self.assertEqual(got["data"][0]["owned_by"], "Meta")

    def test_one_model_with_slashes_of_both_kinds(self):
        for id in (LLAMA, LLAMA.replace("/", "%2F")):
            self.assertEqual(self.ask("GET", "/v1/models/" + id).json["id"], LLAMA)
        got = self.ask("GET", "/v1/models/no/such")
        self.assertEqual((got.status, got.json["error"]["code"]), (404, "model_not_available"))

    def test_pages_of_supported_models(self):
        seen, cursor = [], ""
        while cursor is not None:
            after = f"&after={cursor}" if cursor else ""
            page = self.ask("GET", "/v2/supported-models?limit=20" + after).json
            seen += [model["name"] for model in page["data"]]
            cursor = page["next_cursor"]
        self.assertEqual(seen, list(fake.MODELS))

    def test_nothing_follows_an_unknown_cursor(self):
        file = self.server.add_file(TRAIN)["id"]
        paths = ("/v1/files", "/v1/projects", "/v2/projects/p/models", "/v2/supported-models")
        for path in paths:
            with self.subTest(path=path):
                page = self.ask("GET", f"{path}?after=nothing")
                self.assertEqual((page.status, page.json["data"]), (200, []))
        self.assertEqual([f["id"] for f in self.ask("GET", "/v1/files").json["data"]], [file])


class AccountTests(LocalCase):
    def test_who_am_i(self):
        flat, nested = self.json("GET", "/v1/whoami"), self.json("GET", "/v1/v3/whoami")
        self.assertEqual(flat["project_id"], nested["project"]["id"])
        (project,) = self.json("GET", "/v1/projects?limit=0")["data"]
        self.assertEqual(project["slug"], flat["project_slug"])

    def test_an_uploaded_model_answers(self):
        body = {"model_name": "mine", "model_source": "someone/model"}
        made = self.json("POST", "/v1/models", body)["data"]
        self.assertNotIn(made["model_name"], self.server.models)
        seen = self.climb(f"/v1/jobs/{made['job_id']}")
        self.assertEqual(seen, ["Running", "Complete"])
        self.assertIn(made["model_name"], self.server.models)
        self.assertEqual(len(self.json("GET", "/v1/jobs")["data"]), 1)


# === Control ===


class RecordTests(FakeCase):
    def test_what_was_sent_can_be_read(self):
        self.chat("remember me", extra=1)
        call = self.server.requests[-1]
        self.assertEqual(call.body["messages"], say("remember me"))
        facts = (call.number, call.method, call.path, call.kind, call.status)
        self.assertEqual(facts, (1, "POST", CHAT, "chat", 200))
        self.assertEqual(call.warnings, ("nothing reads extra",))

    def test_failed_calls_are_kept(self):
        self.ask("POST", CHAT, b"{")
        self.ask("GET", "/nowhere")
        self.assertEqual([call.status for call in self.server.requests], [400, 404])
        self.assertIn("Unknown endpoint", self.server.requests[1].error)

    def test_looking_after_the_server_is_not_recorded(self):
        for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/__parlel/requests")):
            self.ask(method, path)
        self.ask("OPTIONS", CHAT)
        self.assertEqual(list(self.server.requests), [])

    def test_keys_are_masked(self):
        headers = {"Authorization": "Bearer sesame", "Cookie": "sesame"}
        self.ask("GET", "/v1/models?api_key=sesame", headers=headers)
        body = {**HELLO, "wandb_api_key": "sesame"}
        self.ask("POST", CHAT, body, {**KEY, "X-Api-Key": "sesame"})
        got = self.ask("GET", "/__parlel/requests").json
        self.assertNotIn("sesame", json.dumps(got))
        self.assertEqual(got["requests"][0]["headers"]["authorization"], "Bearer ***")

    def test_keys_are_masked_by_any_name_and_in_urls(self):
        headers = {
            f"X-{name}": "sesame" for name in ("Bearer", "Credential", "Signature", "Session")
        }
        headers["Referer"] = "http://me:sesame@host.test/?a=1&X-Amz-Signature=sesame#x"
        for name in ("sig", "pwd", "token", "Password", "session", "my.key", "access%5Ftoken"):
            self.ask("POST", f"{CHAT}?{name}=sesame&design=1", b"{", {**KEY, **headers})
        url = "https://me:sesame@host.test/a@b?x=1&sig=sesame&y=2"
        self.ask("POST", CHAT, {**HELLO, "messages": say(f"look at {url}, a@b")})
        got = self.ask("GET", "/__parlel/requests").json["requests"]
        self.assertNotIn("sesame", json.dumps(got))
        self.assertIn("design=1", got[0]["query"])
        said = got[-1]["body"]["messages"][0]["content"]
        self.assertEqual(said, "look at https://***@host.test/a@b?x=1&sig=***&y=2, a@b")

    def test_the_control_routes(self):
        self.chat()
        self.post("/v1/embeddings", {"model": "m", "input": "x"})
        got = self.ask("GET", "/__parlel/requests", headers={}).json
        self.assertEqual(got["count"], 2)
        self.assertEqual([item["kind"] for item in got["requests"]], ["chat", "embedding"])
        self.assertEqual([item["n"] for item in got["requests"]], [1, 2])
        self.assertEqual(self.ask("POST", "/__parlel/reset", headers={}).json, {"ok": True})
        got = self.ask("GET", "/__parlel/requests", headers={}).json
        self.assertEqual(got, {"requests": [], "count": 0})

    def test_an_event_that_is_none_breaks_no_listing(self):
        self.server.fail(malformed_after_chunks=0, user_message="broken")
        self.server.reply(raw={"text": "\n\n: x\n\nhalf", "contentType": "text/event-stream"})
        for text in ("broken", "raw", "whole"):
            self.ask("POST", CHAT, {"model": LLAMA, "messages": say(text), "stream": True})
        listed = self.ask("GET", "/__parlel/requests?model=" + LLAMA)
        self.assertEqual((listed.status, len(self.server.requests)), (200, 3))
        self.assertEqual([call.messages for call in self.server.requests], [[]] * 3)

    def test_the_record_is_bounded(self):
        self.server = TogetherAiServer(port=0, record_limit=3)
        for number in range(5):
            self.answer("GET", f"/{number}")
        self.assertEqual([call.path for call in self.server.requests], ["/2", "/3", "/4"])
        self.server = TogetherAiServer(port=0)
        with mock.patch.object(fake, "MAX_RECORD_BYTES", 1000):
            for _ in range(50):
                self.answer("POST", "/x", b"." * 40)
        *older, last = self.server.requests
        sizes = [40 + len(call.raw_reply) for call in older]
        self.assertTrue(2 * sizes[0] < sum(sizes) <= 1000, sizes)
        self.assertEqual(last.number, 50)

    def test_the_record_is_bounded_where_calls_end_after_all_have_come(self):
        self.server = TogetherAiServer(port=0)
        asked = [Request("POST", "/x", {"a": number}) for number in range(50)]
        for request in asked:
            self.server._begin(request)
        with mock.patch.object(fake, "MAX_RECORD_BYTES", 1000):
            for request in asked:
                self.server.answer(request)
        self.assertLess(len(self.server.requests), 20)
        self.assertEqual(self.server.requests[-1].number, 50)

    def test_near_misses_among_many_fixtures(self):
        for number in range(fake.MAX_NEAR_MISSES + 5):
            self.server.reply("x", user_message=f"never {number}")
        self.chat("hello")
        call = self.server.requests[-1]
        self.assertEqual(len(call.near_misses), fake.MAX_NEAR_MISSES)
        self.assertIn('"hello" does not contain', call.near_misses[0]["reason"])
        self.assertEqual(call.near_misses[0]["differs"], "match.userMessage")
        self.assertIsNone(call.misses[0][1])  # no text is held

    def test_a_bug_is_a_500_and_kept(self):
        self.server = TogetherAiServer(port=0)
        self.server.models = None
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            got = self.answer("GET", "/v1/models")
        self.assertEqual((got.status, got.json["error"]["type"]), (500, "server_error"))
        self.assertIn("AttributeError", stderr.getvalue())
        self.assertIn("AttributeError", self.server.requests[-1].error)


class ScriptedRecordTests(ScriptingCase):
    """What the record says of calls, and to whom."""

    def listed(self, query=""):
        return self.json("GET", "/__parlel/requests" + query)["requests"]

    def test_filters(self):
        for model in ("one", "two"):
            self.outcome("hi", model=model)
            self.outcome("hi", model=model, fixture={"status": 503})
        self.ask("GET", "/v1/models")
        self.ask("POST", "/v1" + CHAT, {**HELLO, "model": "three"})
        for query, numbers in {
            "": [1, 2, 3, 4, 5, 6],
            "?path=/v1/models": [5],
            f"?path={CHAT}": [1, 2, 3, 4, 6],
            "?model=two": [3, 4],
            "?status=503": [2, 4],
            "?since=4": [5, 6],
            "?limit=2": [5, 6],
            "?model=one&status=503&limit=5": [2],
        }.items():
            with self.subTest(query=query):
                self.assertEqual([call["n"] for call in self.listed(query)], numbers)

    def test_near_misses_stay_what_they_were(self):
        self.server.reply("zero", user_message="hi", sequence_index=0)
        self.server.reply("one", user_message="hi", sequence_index=1)
        self.outcome("hi")
        self.outcome("hi")
        (near,) = self.server.requests[0].near_misses
        self.assertEqual(near["differs"], "match.sequenceIndex")
        self.assertEqual(near["reason"], "it was not the turn of sequence_index 1")

    def test_record_tells_which_fixture_served(self):
        self.server.reply("a", user_message="a")
        self.server.reply("b", user_message="b")
        line = inspect.currentframe().f_lineno
        for text in ("a", "b"):
            self.outcome(text)
        shown = fake.shorten_path(__file__)
        places = [f"reply() at {shown}:{number}" for number in (line - 2, line - 1)]
        self.assertEqual([call.fixture for call in self.server.requests], places)

    def test_a_schema_that_names_a_secret_can_be_read_and_an_object_under_its_name_cannot(self):
        schema = {"type": "object", "properties": {"token": {"type": "string", "default": "x"}}}
        sent = {"tools": [tool("log_in", parameters=schema)], "max_tokens": 7}
        hidden = {"auth": {"jwt": "sesame"}, "apiKeyValue": "sesame", "api_keys": [["sesame"]]}
        self.ask("POST", CHAT, {**HELLO, **sent, **hidden}, {**KEY, "X-Password": "sesame"})
        self.assertNotIn("sesame", json.dumps(self.listed()))
        body = self.server.requests[-1].body
        self.assertEqual({name: body[name] for name in sent}, sent)

    def test_failed_assertion_shows_the_nearest_calls(self):
        for number in range(9):
            self.outcome("hi", model=f"m{number}")
        with self.assertRaisesRegex(AssertionError, "(?s)saw 0; nearest:.*m8"):
            self.server.assert_called("POST " + CHAT, model="m8", body={"temperature": 1})


class OrderTests(ScriptingCase):
    """Which of several fixtures answers, and why another one does not."""

    def talk(self, turns):
        """Return what is answered in a talk with so many assistant messages."""
        said = [{"role": "assistant", "content": "x"}] * turns
        return self.outcome(*said, "go")

    def test_a_turn_is_that_turn_alone(self):
        self.server.reply("the fifth", turn_index=5)
        self.server.reply("the first", turn_index=0)
        self.assertEqual([self.talk(0), self.talk(5)], ["the first", "the fifth"])
        for turns in (1, 4, 6):
            self.assertNotIn(self.talk(turns), ("the first", "the fifth"))

    def test_a_loop_of_turns_ends(self):
        call = [{"name": "f", "arguments": {}}]
        self.server.reply("the end", user_message="go")
        for turn in (0, 1):
            self.server.reply(tool_calls=call, turn_index=turn)
        self.assertEqual([self.talk(turn) for turn in range(4)], [["f"]] * 2 + ["the end"] * 2)

    def test_files_choose_relaxed_and_warn(self):
        self.load(a=[entry({"turnIndex": 0}, "zero"), entry({"turnIndex": 2}, "two")])
        self.assertEqual([self.talk(turn) for turn in (0, 1, 2)], ["zero", "zero", "two"])
        warning = "file a.json[0] is for turn 0, and this is turn 1"
        warnings = [call.warnings for call in self.server.requests]
        unlisted = "the model 'm' is listed nowhere"
        self.assertEqual(warnings, [(unlisted,), (unlisted, warning), (unlisted,)])

    def test_a_miss_that_is_an_error_does_not_change_how_turns_of_files_match(self):
        with TogetherAiServer(port=0, on_miss="error") as self.server:
            self.load(a=[entry({"turnIndex": 0}, "zero"), entry({"turnIndex": 2}, "two")])
            self.assertEqual([self.talk(turn) for turn in range(4)], ["zero", "zero", "two", "two"])
            (miss,) = self.server.requests[1].near_misses
        self.assertEqual(miss["reason"], "turnIndex 1 is not 2")

    def test_turns_of_one_file_may_be_exact(self):
        entries = [entry({"turnIndex": turn}, str(turn)) for turn in (0, 2)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.json")
            path.write_text(json.dumps({"fixtures": entries, "exactTurns": True}), "utf-8")
            self.server.load(path)
        said = [self.talk(turn) for turn in range(4)]
        self.assertEqual((said[0], said[2]), ("0", "2"))
        self.assertFalse({"0", "2"} & {said[1], said[3]})

    def test_turns_of_all_files_may_be_exact(self):
        with TogetherAiServer(port=0, on_miss="error", exact_turns=True) as self.server:
            self.load(a=[entry({"turnIndex": 0}, "zero"), entry({"turnIndex": 2}, "two")])
            self.server.reply("three", turn_index=3)
            said = [self.talk(turn) for turn in range(5)]
            self.assertEqual(said, ["zero", 404, "two", "three", 404])
            misses = self.server.requests[1].near_misses
            self.assertEqual(
                [miss["reason"] for miss in misses],
                ["turn_index 1 is not 3"] + [f"turnIndex 1 is not {n}" for n in (0, 2)],
            )

    def test_limited_ones_first_in_their_order_then_the_last_added(self):
        self.server.reply("set-up")
        self.server.reply("first", times=1)
        self.server.reply("second", times=2)
        self.server.reply("test")
        said = [self.outcome("hi") for _ in range(5)]
        self.assertEqual(said, ["first", "second", "second", "test", "test"])

    def test_inside_one_post_the_order_stands(self):
        self.json("POST", FIXTURES, file_of(entry({}, "first"), entry({}, "second")))
        self.assertEqual(self.outcome("hi"), "first")
        self.json("POST", FIXTURES, file_of(entry({}, "a later post")))
        self.assertEqual(self.outcome("hi"), "a later post")

    def test_one_can_be_removed(self):
        self.server.reply("stays")
        for _ in range(2):
            fixture = self.server.reply("goes")
            self.assertEqual(self.outcome("hi"), "goes")
            fixture.remove()
            self.assertEqual(self.outcome("hi"), "stays")
        fixture.remove()
        (number,) = self.json("POST", FIXTURES, file_of(entry({}, "posted")))["numbers"]
        self.assertEqual(self.outcome("hi"), "posted")
        self.json("DELETE", f"{FIXTURES}/{number}")
        self.assertEqual(self.outcome("hi"), "stays")
        for wrong in (number, "x", "1" * 30):
            self.json("DELETE", f"{FIXTURES}/{wrong}", status=404)

    def test_one_that_was_passed_over_says_why(self):
        self.load(f=[entry({}, "from a file")])
        other = self.server.reply("x", model="other")
        turn = self.server.reply("x", turn_index=3)
        used = self.server.reply("used up", times=1)
        ended = self.server.reply(iter(["one"]), model="m", times=9)
        hidden = self.server.reply("hidden")
        served = self.server.reply("served")
        vector = self.server.reply(embedding=[1])
        said = [self.outcome("hi") for _ in range(3)]
        self.assertEqual(said, ["used up", "one", "served"])
        (_, _, call) = self.server.requests
        self.assertEqual(call.fixture, served.source)
        told = {miss["fixture"]: miss["reason"] for miss in call.near_misses}
        self.assertEqual(
            told,
            {
                used.source: "it is used up: served 1 of 1",
                ended.source: "it is used up: served 1 of 1",
                hidden.source: f"it matched, but {served.source}, added later, was served",
                "file f.json[0]": f"it matched, but {served.source} was served",
                turn.source: "turn_index 0 is not 3",
                other.source: 'model "m" is not "other"',
                vector.source: "it answers embedding, and this is chat",
            },
        )
        self.assertEqual(list(told)[-1], vector.source)


class Dumped:
    """What a model of pydantic is to the fake."""

    def __init__(self, **fields):
        self.fields = fields

    def model_dump(self, mode="python"):
        return {**self.fields, "mode": mode}


class AnswerTests(ScriptingCase):
    """What reply() and the header take as an answer."""

    def test_what_a_content_may_be(self):
        def shout(request):
            return request.body["messages"][-1]["content"].upper()

        def call_a_tool(request):
            return {"tool_calls": [{"name": "f", "arguments": {}}]}

        for content, wanted in (
            ("text", "text"),
            ({"a": [1]}, '{"a":[1]}'),
            (Dumped(city="Rome"), '{"city":"Rome","mode":"json"}'),
            (shout, "HI"),
            (call_a_tool, ["f"]),
            (lambda request: Dumped(n=1), '{"n":1,"mode":"json"}'),
            (lambda request: {"id": 7, "status": "shipped"}, '{"id":7,"status":"shipped"}'),
            (lambda request: {"error": "none"}, '{"error":"none"}'),
            (lambda request: {1: 2}, '{"1":2}'),
            (lambda request: {"status": 503}, 503),
        ):
            with self.subTest(wanted=wanted):
                self.server.reply(content)
                self.assertEqual(self.outcome("hi"), wanted)

    def test_what_a_content_may_not_be(self):
        for content, name in ((b"abc", "b'abc'"), (Dumped, "Dumped"), (7, "7")):
            with self.subTest(content=name), self.assertRaises(ValueError) as caught:
                self.server.reply(content)
            sentence = str(caught.exception)
            start = "reply().response.content: must be a string or an object or an array, not "
            self.assertEqual(sentence[: len(start)], start)
            self.assertIn(name, sentence[len(start) :])

    def test_an_iterator_gives_one_after_the_other(self):
        self.server.reply("afterwards")
        self.server.reply(iter(["one", {"two": 2}, Dumped(three=3)]))
        said = [self.outcome("hi") for _ in range(4)]
        self.assertEqual(said, ["one", '{"two":2}', '{"three":3,"mode":"json"}', "afterwards"])

    def test_bytes_of_images_and_sound_and_texts_of_transcriptions(self):
        self.server.reply(image=b"picture")
        self.server.reply(audio=write_sound(1))
        self.server.reply(transcription="Hello there")
        picture = {"model": FLUX, "prompt": "a lake", "response_format": "base64"}
        (got,) = self.post("/v1/images/generations", picture).json["data"]
        self.assertEqual(base64.b64decode(got["b64_json"]), b"picture")
        self.assertEqual(self.post("/v1/audio/speech", SPEECH).raw, write_sound(1))
        heard = self.post("/v1/audio/transcriptions", {"file": "https://example.com/a.mp3"})
        self.assertEqual(heard.json["text"], "Hello there")

    def test_a_header_mixes_an_answer_with_options(self):
        mixed = {"content": "abcd", "chunkSize": 2, "latency": 1}
        got = self.stream({**KEY, "X-Parlel-Fixture": json.dumps(mixed)})
        said = [event["choices"][0]["delta"].get("content") for event in got if event["choices"]]
        self.assertEqual([text for text in said if text], ["ab", "cd"])
        fixture = {"content": "x", "latncy": 1}
        got = self.ask("POST", CHAT, HELLO, {**KEY, "X-Parlel-Fixture": json.dumps(fixture)})
        self.assertEqual(got.status, 400)
        self.assertIn("latncy: unknown key, did you mean latency?", got.json["error"]["message"])

    def refuse(self, **match):
        """Return how this match is refused by Python, in a file, over HTTP and by header."""
        wrong = entry({fake.to_camel(key): value for key, value in match.items()}, "x")
        for act in (
            lambda: self.server.reply("x", **match),
            lambda: self.load(a=[wrong]),
        ):
            with self.assertRaises((TypeError, ValueError)) as caught:
                act()
            yield str(caught.exception)
        yield self.json("POST", FIXTURES, file_of(wrong), status=400)["error"]["message"]
        headers = {**KEY, "X-Parlel-Fixture": json.dumps(wrong)}
        yield self.json("POST", CHAT, HELLO, headers, status=400)["error"]["message"]

    def test_a_mistake_is_named_wherever_it_is_made(self):
        places = ("reply().", "a.json: fixtures[0].", "fixtures[0].", "X-Parlel-Fixture.")
        said = list(self.refuse(user_mesage="x"))
        self.assertTrue(said[0].endswith("'user_mesage', did you mean user_message?"), said[0])
        for place, sentence in zip(places[1:], said[1:]):
            mistake = f"{place}match.userMesage: unknown key, did you mean userMessage?"
            self.assertTrue(sentence.endswith(mistake), sentence)
        for match, key in (
            ({"user_message": {"pattern": "("}}, "userMessage.pattern"),
            ({"headers": {"X-Run": {"pattern": "["}}}, "headers[X-Run].pattern"),
        ):
            for place, sentence in zip(places, self.refuse(**match)):
                with self.subTest(place=place, key=key):
                    self.assertIn(f"{place}match.{key}: ", sentence)
        self.assertEqual(self.list_fixtures(), [])

    def test_the_words_are_the_same_everywhere(self):
        error = {"error": {"message": "no"}, "status": 418}
        inference = {"speech": "POST /v1/audio/speech", "video": "POST /v2/videos"}
        inference.update(embedding="POST /v1/embeddings", rerank="POST /v1/rerank")
        inference.update(chat="POST " + CHAT, image="POST /v1/images/generations")
        inference.update(completion="POST /v1/completions")
        for kind, operation in inference.items():
            with self.subTest(kind=kind):
                self.server.reply(**error, endpoint=kind)
                method, path = operation.split()
                self.assertEqual(self.ask(method, path, VALID[operation]).status, 418)
                call = self.server.assert_called(kind)
                self.assertEqual((call.kind, call.operation), (kind, operation))
                self.assertIs(self.server.assert_called(operation), call)
                found = self.json("GET", f"/__parlel/requests?kind={kind}")["requests"]
                self.assertEqual([each["n"] for each in found], [call.number])

    def test_a_path_may_be_an_object(self):
        with tempfile.TemporaryDirectory() as folder:
            save_fixtures(folder, a=[entry({}, "from a file")])
            self.server.load(Path(folder, "a.json"))
            said = self.outcome("hi")
            self.server.save(Path(folder, "b.json"))
            upstream = {"upstream": "http://127.0.0.1:1", "record": Path(folder, "b.json")}
            self.server = TogetherAiServer(port=0, **upstream)
            self.assertEqual([said, self.outcome("hi")], ["from a file"] * 2)
            self.assertEqual(self.server.requests[0].fixture, "file b.json[0]")


CITY_FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
CALL = {"name": "get_weather", "arguments": {"city": "Rome"}}


class MistakeTests(ScriptingCase):
    """What production would never take or say is served, and told; or refused, where asked for."""

    # what is wrong: what is scripted, what is asked beside a chat's usual, the warning
    MISTAKES = (
        (
            {"tool_calls": [{**CALL, "name": "get_wether"}]},
            {"tools": [WEATHER]},
            "it calls get_wether, a tool that the request does not offer, did you mean get_weat",
        ),
        (
            {"tool_calls": [{**CALL, "arguments": {"town": "Rome"}}]},
            {"tools": [WEATHER]},
            "it calls get_weather with arguments that miss its schema: city is missing",
        ),
        (
            {"tool_calls": [{**CALL, "arguments": {"city": 7}}]},
            {"tools": [WEATHER]},
            "it calls get_weather with arguments that miss its schema: city is 7, wanted string",
        ),
        (
            {"tool_calls": [{**CALL, "arguments": "{city"}]},
            {"tools": [WEATHER]},
            'it calls get_weather with arguments that miss its schema: "{city" is no JSON',
        ),
        ({"tool_calls": [CALL]}, {}, "it calls get_weather, and the request offers no tools"),
        (
            {"tool_calls": [CALL]},
            {"tools": [WEATHER], "tool_choice": "none"},
            'it calls get_weather, and tool_choice is "none"',
        ),
        (
            {"tool_calls": [CALL]},
            {"tools": [WEATHER, FINAL], "tool_choice": tool("final_result")},
            "it calls get_weather, and tool_choice is {",
        ),
        (
            {"content": "It is warm."},
            {"tools": [WEATHER], "tool_choice": "required"},
            'it calls no tool, and tool_choice is "required"',
        ),
        (
            {"content": {"town": "Rome"}},
            {"response_format": CITY_FORMAT},
            "its content misses the json_schema of response_format: city is missing",
        ),
        (
            {"content": "Rome"},
            {"response_format": {"type": "json_object"}},
            'its content misses the json_object of response_format: "Rome" is no JSON',
        ),
        (
            {"content": "x", "usage": {"prompt_token": 3}},
            {},
            "its usage has prompt_token, did you mean prompt_tokens?",
        ),
        (
            {"content": "x", "finish_reason": "stopped"},
            {},
            'its finish_reason is "stopped", did you mean stop?',
        ),
        (
            {"content": "", "chunk_size": 2},
            {"stream": True},
            "chunkSize had no effect without a text",
        ),
        (
            {"content": "x", "should_retry": True},
            {},
            "shouldRetry had no effect on a good reply",
        ),
    )  # fmt: skip

    def test_a_scripted_text_that_could_never_come(self):
        for said, asked, sentence in self.MISTAKES:
            with self.subTest(sentence=sentence):
                self.server.reset()
                fixture = self.server.reply(**said)
                self.post(CHAT, {**HELLO, **asked})
                (call,) = self.server.requests
                (warning,) = call.warnings
                self.assertTrue(warning.startswith(f"{fixture.source}: {sentence}"), warning)

    def test_the_same_is_told_in_the_responses_api_and_of_completions(self):
        self.server.reply(tool_calls=[CALL])
        self.post("/v1/responses", {"model": LLAMA, "input": "hi"})
        self.server.reply("x", finish_reason="stopped")
        self.post("/v1/completions", {"model": LLAMA, "prompt": "hi"})
        one, two = (call.warnings for call in self.server.requests)
        self.assertIn("it calls get_weather, and the request offers no tools", one[0])
        self.assertIn("did you mean stop?", two[0])

    def test_a_scripted_answer_of_another_kind(self):
        model = "intfloat/multilingual-e5-large-instruct"
        size = fake.MODELS[model].dimensions
        for said, path, body, sentence in (
            (
                {"embedding": [0.1] * 3},
                "/v1/embeddings",
                {"model": model, "input": "x"},
                f"its embedding has 3 numbers; {model} makes {size}",
            ),
            (
                {"scores": [0.5]},
                "/v1/rerank",
                RERANK,
                "it has 1 scores, and the request has 3 documents",
            ),
        ):
            with self.subTest(sentence=sentence):
                self.server.reset()
                fixture = self.server.reply(**said)
                self.post(path, body)
                self.assertEqual(
                    self.server.requests[0].warnings, (f"{fixture.source}: {sentence}",)
                )

    def test_what_only_the_request_shows(self):
        near = LLAMA[:-5] + "Trubo"
        for path, body, warning in (
            (
                CHAT,
                {**HELLO, "model": near},
                f"the model {near!r} is listed nowhere, did you mean {LLAMA}?",
            ),
            (CHAT, {**HELLO, "max_token": 5}, "nothing reads max_token, did you mean max_tokens?"),
            (
                CHAT,
                {**HELLO, "messages": [{**say("x")[0], "nam": "y"}]},
                "nothing reads messages[0].nam, did you mean name?",
            ),
            (
                CHAT,
                {**HELLO, "tools": [tool("f", parametres={})]},
                "nothing reads tools[0].function.parametres, did you mean parameters?",
            ),
            (
                "/v1/embeddings",
                {"model": LLAMA, "input": "x"},
                f"{LLAMA} is a model of type chat, which does not serve embedding",
            ),
        ):
            with self.subTest(warning=warning):
                self.server.reset()
                self.post(path, body)
                self.assertEqual(self.server.requests[0].warnings, (warning,))

    def test_what_production_says_is_not_warned_about(self):
        message = self.chat(tools=[WEATHER], tool_choice="required")["choices"][0]["message"]
        from_sdk = {"refusal": None, "annotations": None, "audio": None, "function_call": None}
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "1"}
        self.chat(messages=[*say("x"), {**message, **from_sdk}, result], tools=[WEATHER])
        city = {"content": {"city": "Rome"}, "finish_reason": "eos"}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        for said, asked in (
            (city, {"response_format": CITY_FORMAT}),
            ({"content": "Hi", "usage": usage}, {"stream": True}),
            ({"tool_calls": [CALL]}, {"tools": [WEATHER], "tool_choice": "required"}),
            ({"content": '{"ci', "finish_reason": "length"}, {"response_format": CITY_FORMAT}),
            ({"content": "So:", "chunk_size": 2}, {"stream": True}),
            ({"status": 500, "should_retry": False}, {}),
        ):
            self.server.reply(**said)
            self.ask("POST", CHAT, {**HELLO, **asked})
        self.server.fail(disconnect_after_chunks=2)
        self.ask("POST", CHAT, {**HELLO, "stream": True})
        self.ask("POST", "/v1" + CHAT, HELLO)
        self.assertEqual([call.warnings for call in self.server.requests if call.warnings], [])

    def test_a_warning_can_be_an_error_that_no_client_repeats(self):
        with TogetherAiServer(port=0, warnings="error") as self.server:
            fixture = self.server.reply("x", finish_reason="stopped")
            for stream in (False, True):
                got = self.ask("POST", CHAT, {**HELLO, "stream": stream})
                self.assertEqual((got.status, got.headers["x-should-retry"]), (500, "false"))
                message = got.json["error"]["message"]
                self.assertIn(f'{fixture.source}: its finish_reason is "stopped"', message)
            fixture.remove()
            self.post(CHAT, HELLO)
            self.assertEqual(self.ask("POST", CHAT, {**HELLO, "max_token": 5}).status, 500)
        with self.assertRaisesRegex(ValueError, "warnings must be"):
            TogetherAiServer(warnings="eror")

    def test_a_model_given_to_a_forced_tool_becomes_its_call(self):
        named = {"tools": [WEATHER, FINAL], "tool_choice": tool("get_weather")}
        for asked in (named, {"tools": [WEATHER], "tool_choice": "required"}):
            for content in (Dumped(city="Rome"), lambda request: Dumped(city="Rome")):
                self.server.reply(content)
                (call,) = self.chat(**asked)["choices"][0]["message"]["tool_calls"]
                said = json.loads(call["function"]["arguments"])
                self.assertEqual((call["function"]["name"], said["city"]), ("get_weather", "Rome"))
        self.assertEqual(json.loads(self.text())["city"], "Rome")
        flat = {"type": "function", "name": "get_weather", "parameters": CITY}
        body = {"model": LLAMA, "input": "hi", "tools": [flat], "tool_choice": "required"}
        (item,) = self.post("/v1/responses", body).json["output"]
        self.assertEqual((item["type"], item["name"]), ("function_call", "get_weather"))


class MessageTests(ScriptingCase):
    """Every message says what happened and where, and what would have worked."""

    def refused(self, act, *args, error=AssertionError, **words):
        """Return the message of an error that has to come."""
        with self.assertRaises(error) as caught:
            act(*args, **words)
        return str(caught.exception)

    def test_another_operation_is_told(self):
        self.chat()
        said = self.refused(self.server.assert_called, "embedding")
        self.assertIn("another operation, chat", said)
        self.assertNotIn("matches", said)

    def test_nothing_came_at_all(self):
        with self.server:
            said = self.refused(self.server.assert_called, "chat")
            self.assertIn(f"nothing reached {self.server.url}; ", said)
        self.assertIn("was the client built before the variables were set?", said)

    def test_long_texts_are_compared_for_the_nearest_three(self):
        for number in range(5):
            self.server.reply("x", user_message=f"{'word ' * 40}{number}")
        self.chat("word " * 40)
        reasons = [miss["reason"] for miss in self.server.requests[-1].near_misses]
        compared = ["user_message differs:\n- " in reason for reason in reasons]
        self.assertEqual(compared, [True] * 3 + [False] * 2)
        self.assertRegex(reasons[3], 'user_message "word .+ does not contain "word ')

    def test_a_long_text_is_looked_for_by_its_first_letters(self):
        self.server.reply("x", user_message="Where is the station? " + "a" * 60)
        self.server.reply("x", user_message={"pattern": "^bye$"})
        self.chat("Good day. " * 9 + "Where is the station? " + "b" * 60)
        pattern, text = (miss["reason"] for miss in self.server.requests[0].near_misses)
        if "differs" in pattern:
            pattern, text = text, pattern
        wanted, got = text.splitlines()[1:]
        self.assertEqual(
            (wanted[:24], got[:24]), tuple(f"{sign} Where is the station? " for sign in "-+")
        )
        self.assertIn("does not match the pattern", pattern)

    def test_case_is_told_where_it_alone_differs(self):
        self.server.reply("x", user_message="Hello")
        self.chat("well, hello")
        (miss,) = self.server.requests[0].near_misses
        said = (
            'user_message "well, hello" does not contain "Hello", but it does where case is ignored'
        )
        self.assertEqual(miss["reason"], said)
        self.chat("well, hello " * 20)
        (miss,) = self.server.requests[1].near_misses
        self.assertIn('does not contain "Hello", but it does where case', miss["reason"])

    def test_a_shadowed_one_says_by_which(self):
        hidden = self.server.reply("hidden", user_message="hi")
        served = self.server.reply("served")
        self.outcome("hi")
        said = self.refused(self.server.assert_all_used)
        self.assertIn(f"it matched, but {served.source}, added later, was served", said)
        self.assertEqual((hidden.served, served.served), (0, 1))

    def test_misses_of_another_endpoint_come_last(self):
        with TogetherAiServer(port=0, on_miss="error") as self.server:
            self.server.reply(embedding=[1])
            self.server.reply("x", user_message="bye")
            message = self.json("POST", CHAT, HELLO, status=404)["error"]["message"]
        self.assertLess(message.index("does not contain"), message.index("it answers embedding"))

    def test_a_function_that_raises_says_which_and_where(self):
        def fail(request):
            raise KeyError("no such city")

        line = fail.__code__.co_firstlineno + 1
        for given in ({"content": fail}, {"content": "x", "when": fail}):
            with self.subTest(given=list(given)):
                self.server.reset()
                fixture = self.server.reply(**given)
                got = self.ask("POST", CHAT, HELLO)
                self.assertEqual((got.status, got.headers["x-should-retry"]), (500, "false"))
                message = got.json["error"]["message"]
                raised = f"{fixture.source} raised KeyError: 'no such city', at "
                self.assertIn(raised, message)
                self.assertTrue(message.endswith(f".py:{line}"), message)
                self.assertNotIn("Traceback", self.server.requests[0].error)
        self.server.reset()
        self.server.reply(lambda request: next(iter([])))
        self.assertIn("raised StopIteration", self.ask("POST", CHAT, HELLO).raw.decode())
        self.server.reset()
        self.server.reply(iter([7]))
        self.assertIn("content: must be a string", self.ask("POST", CHAT, HELLO).raw.decode())

    def test_a_taken_port_is_named(self):
        with self.server:
            port = self.server.port
            said = self.refused(TogetherAiServer(port).start, error=OSError)
        self.assertIn(f"port {port} is taken; port 0 takes any free one", said)

    def test_there_is_no_address_before_the_start(self):
        server = TogetherAiServer(port=0)
        for name in ("url", "base_url", "env"):
            with self.assertRaisesRegex(RuntimeError, "call start"):
                getattr(server, name)

    def test_operations_are_known_by_their_paths(self):
        for name in ("/v1/chat/completions", "chat.completions", "chat/completions"):
            said = self.refused(self.server.assert_called, name, error=ValueError)
            self.assertEqual(said, f"no operation is called {name!r}, did you mean chat?")
            said = self.refused(self.server.reply, "x", endpoint=name, error=ValueError)
            self.assertTrue(said.endswith("did you mean chat?"), said)
        said = self.ask("GET", "/__parlel/fixture").json["error"]["message"]
        self.assertIn("This emulator has /__parlel/fixtures", said)

    def test_the_words_of_other_libraries_are_told_ours(self):
        for name, ours in (
            ("respond", "reply()"),
            ("on_message", "reply(user_message=...)"),
            ("add_fixture", "reply() or load()"),
        ):
            for scripting in (self.server, self.server.test("a")):
                with self.assertRaises(AttributeError) as caught:
                    getattr(scripting, name)
                self.assertIn(ours, str(caught.exception))
        self.assertFalse(hasattr(self.server, "__wrapped__"))

    def test_a_list_of_texts_is_json_and_says_so(self):
        with self.assertWarnsRegex(UserWarning, r"a sequence of answers is iter\(\[") as caught:
            self.server.reply(["one", "two"])
        self.assertEqual(caught.filename, __file__)
        self.assertEqual(self.outcome("hi"), '["one","two"]')
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.server.reply([{"a": 1}])

    def test_a_child_process_is_told_that_nobody_would_see_its_script(self):
        self.server._parent_port = 4863  # as after a fork
        said = self.refused(self.server.reply, "x", error=RuntimeError)
        self.assertIn("nobody would see this script", said)
        self.refused(self.server.test("a").fail, 500, error=RuntimeError)


class CountTests(ScriptingCase):
    """What was asked is counted, waited for and looked through."""

    over_http = True

    def refuse(self, sentence, act, *args, **words):
        with self.assertRaises(AssertionError) as caught:
            act(*args, **words)
        self.assertIn(sentence, str(caught.exception))

    def test_a_refused_request_takes_no_answer_of_an_iterator(self):
        self.server.reply(iter(["one", "two"]))
        refused = {**HELLO, "temperature": 99}
        for wanted in ("one", "two"):
            self.assertEqual(self.ask("POST", CHAT, refused).status, 400)
            self.assertEqual(self.text(), wanted)

    def test_answers_of_refused_requests_come_next_in_order_and_once(self):
        answers = fake.SharedIterator(iter("abc"), "here")
        taken = [answers.take("", place) for place in range(3)]
        self.assertRaises(IndexError, answers.take, "", 3)
        for letter in taken[:2]:  # the third is served already
            answers.give_back("", letter)
        self.assertEqual([answers.take("", place) for place in (1, 2)], ["a", "b"])
        self.assertRaises(IndexError, answers.take, "", 3)
        self.assertEqual(answers.take("another test", 0), "a")

    def test_an_iterator_goes_on_where_its_code_raised(self):
        answers = iter(["one", ValueError("no"), "two"])

        class Answers:
            def __next__(self):
                answer = next(answers)
                if isinstance(answer, Exception):
                    raise answer
                return answer

        self.server.reply(Answers(), user_message="hello", sequence_index=1)
        self.server.reply("zero", user_message="hello", sequence_index=0)
        self.assertEqual([self.text(), self.text()], ["zero", "one"])
        self.server.reply(Answers())
        self.assertEqual(self.ask("POST", CHAT, HELLO).status, 500)
        self.assertEqual(self.text(), "two")

    def test_an_answer_of_another_type_is_told(self):
        self.server.reply(lambda request: {"scores": [1]})
        error = self.json("POST", CHAT, HELLO, status=500)["error"]
        self.assertRegex(error["message"], r"reply\(\) at .+ answers chat with .+ of type rerank")

    def test_how_often(self):
        self.assertIsNone(self.server.assert_called("chat", times=0))
        self.server.assert_not_called("chat")
        self.chat("one")
        self.assertIs(self.server.assert_called_once("chat"), self.server.requests[0])
        self.chat("two")
        self.server.assert_not_called("chat", user_message="three")
        self.refuse("wanted 0 calls", self.server.assert_not_called, "chat")
        self.refuse("wanted 1 calls", self.server.assert_called_once, "chat")
        self.refuse("wanted 0 calls", self.server.assert_called, "chat", times=0)

    def test_the_calls_of_a_fixture(self):
        fixture = self.server.reply("x", user_message="one")
        for text in ("one", "two", "one"):
            self.chat(text)
        self.assertEqual([call.number for call in fixture.calls], [1, 3])
        self.assertEqual(fixture.served, 2)

    def test_waiting(self):
        asker = threading.Thread(target=lambda: [self.chat("x") for _ in range(3)])
        asker.start()
        calls = self.server.wait_for("chat", times=3, timeout=PATIENCE)
        asker.join()
        self.server.wait_idle()
        self.assertEqual([call.number for call in calls], [1, 2, 3])
        self.refuse("saw 3", self.server.wait_for, "chat", times=4, timeout=0)
        self.server.requests[0].outcome = "running"
        self.refuse("still running:\n  <Call 1", self.server.wait_idle, timeout=0)

    def test_a_miss_that_the_program_swallowed(self):
        self.server.reply("x", user_message="one")
        self.chat("one")
        self.post("/v1/embeddings", {"model": "m", "input": "x"})
        self.server.assert_all_matched()
        self.chat("two")
        self.refuse('user_message "two" does not contain', self.server.assert_all_matched)

    def test_warnings(self):
        self.chat()
        self.server.assert_no_warnings()
        self.chat(max_token=5)
        self.refuse("nothing reads max_token", self.server.assert_no_warnings)

    def test_tool_calls_that_came_back(self):
        made = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        turn = [{"role": "assistant", "content": None, "tool_calls": [made]}, result_of(made)]
        self.refuse("no tool call came back", self.server.assert_tool_called, "add")
        self.chat(messages=[*say("x"), *turn])
        call = self.server.assert_tool_called("add", a=1)
        self.assertEqual(call.number, 1)
        self.refuse('add({"a": 1})', self.server.assert_tool_called, "add", a=2)
        self.refuse('add({"a": 1})', self.server.assert_tool_called, "sub")
        self.server.reset()
        items = [
            {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ]
        self.post("/v1/responses", {"model": LLAMA, "input": [*say("x"), *items]})
        self.server.assert_tool_called("add", a=1)

    def test_usage(self):
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        self.server.reply("x", usage=usage)
        self.chat()
        self.chat()
        self.server.assert_usage(total_tokens=10, prompt_tokens=4)
        self.refuse(
            "wanted 9 total_tokens in all, saw 10", self.server.assert_usage, total_tokens=9
        )

    def test_a_reply_that_never_comes(self):
        with TogetherAiServer(port=0) as self.server:
            fixture = self.server.fail("timeout")
            connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=0.05)
            with contextlib.closing(connection), self.assertRaises(OSError):
                connection.request("POST", CHAT, json.dumps(HELLO), KEY)
                connection.getresponse()
            self.assertEqual(fixture.options["latency"], fake.MAX_MS)
            fixture.remove()
            self.server.fail("rate_limit", times=1)
            self.assertEqual([self.ask("POST", CHAT, HELLO).status for _ in range(2)], [429, 200])
            with self.assertRaisesRegex(ValueError, "did you mean timeout"):
                self.server.fail("timout")

    def test_coroutines(self):
        async def answer(request):
            await asyncio.sleep(0)
            return request.body["model"]

        async def stream(request):
            yield "x"

        async def use():
            async with TogetherAiServer(port=0) as server:
                return server.url

        self.assertTrue(asyncio.run(use()).startswith("http://127.0.0.1:"))
        self.server.reply(answer)
        self.assertEqual(self.outcome("hi"), "m")
        with self.assertRaisesRegex(ValueError, "async_generator"):
            self.server.reply(stream(None))

    def test_64_threads_share_an_iterator_that_is_asked_when_it_is_needed(self):
        drawn = []

        def numbers():
            for number in range(100):
                drawn.append(number)
                yield str(number)

        self.server.reply(numbers())
        self.assertEqual(drawn, [])
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            got = list(pool.map(lambda _: self.outcome("x"), range(64)))
        self.assertEqual(sorted(map(int, got)), list(range(64)))
        self.assertEqual(drawn, list(range(64)))

    def test_an_iterator_counts_for_each_test_and_takes_back(self):
        self.server.reply(iter(["one", "two"]))
        self.json("POST", CHAT, {"messages": say("no model")}, status=400)
        said = [
            self.post(CHAT, HELLO, {**KEY, "X-Test-Id": test}).json["choices"][0]["message"]
            for test in ("a", "b", "a", "a", "b")
        ]
        *told, other, last = [message["content"] for message in said]
        self.assertEqual([*told, last], ["one", "one", "two", "two"])
        self.assertNotIn(other, ("one", "two"))


class DifferenceTests(ScriptingCase):
    """Where two long texts differ, the part that does is shown."""

    options = MappingProxyType({"on_miss": "error"})
    LONG = "You are a helpful assistant. " * 20 + "The city is %s." + " Be brief." * 20

    def setUp(self):
        super().setUp()
        self.server.reply("x", user_message=self.LONG % "Paris")
        body = {"model": "m", "messages": say(self.LONG % "Rome")}
        self.error = self.json("POST", CHAT, body, status=404)["error"]["message"]

    def check(self, message):
        """Check that a message has the lines that differ, and neither text whole."""
        for sign, city in (("-", "Paris"), ("+", "Rome")):
            self.assertRegex(message, rf"(?m)^ *\{sign}.*The city is {city}\.")
        self.assertNotRegex(message, r"(?s)(You are a helpful assistant\. You.*){2}")

    def test_in_the_404(self):
        self.check(self.error)

    def test_in_near_misses(self):
        (miss,) = self.server.requests[0].near_misses
        self.check(miss["reason"])
        (call,) = self.json("GET", "/__parlel/requests")["requests"]
        self.check(call["near_misses"][0]["reason"])

    def test_in_assert_called(self):
        for wanted in (
            {"user_message": self.LONG % "Paris"},
            {"body": {"messages": say(self.LONG % "Paris")}},
        ):
            with self.subTest(wanted=list(wanted)), self.assertRaises(AssertionError) as caught:
                self.server.assert_called("chat", **wanted)
            _, listing = str(caught.exception).split("nearest:")
            self.check(listing)

    def test_in_assert_all_used_with_the_nearest_miss(self):
        self.ask("POST", "/v1/embeddings", {"model": "m", "input": "far away"})
        with self.assertRaises(AssertionError) as caught:
            self.server.assert_all_used()
        _, nearest = str(caught.exception).split("nearest: ")
        self.assertTrue(nearest.startswith("<Call 1:"), nearest)
        self.check(nearest)

    def test_headers_and_bodies_show_what_was_asked_about(self):
        self.ask("GET", "/v1/models", headers={**KEY, "X-Run": "a" * 99 + "b"})
        wanted = {"X-Run": "a" * 99 + "c"}
        self.server.reply(json={}, headers=wanted, endpoint="GET /v1/models")
        for assertion in (
            lambda: self.server.assert_called("GET /v1/models", headers=wanted),
            self.server.assert_all_used,
        ):
            with self.assertRaises(AssertionError) as caught:
                assertion()
            self.assertRegex(str(caught.exception), r'(?m)^ *\+.*ab"')
        self.assertNotIn("authorization", str(caught.exception))

    def test_the_nearest_call_of_any_route(self):
        self.server.reset()
        self.ask("GET", "/v1/models")
        self.ask("POST", "/v1/endpoints", ENDPOINT)
        self.ask("POST", CHAT, HELLO)
        for given, number in (
            ({"json": 1, "endpoint": "GET /v1/models", "headers": {"X-A": "b"}}, 1),
            ({"job": {"status": "ERROR"}, "endpoint": "job", "body": {"model": "x"}}, 2),
            ({"content": "x", "user_message": "bye"}, 3),
        ):
            with self.subTest(number=number):
                fixture = self.server.reply(**given)
                with self.assertRaisesRegex(
                    AssertionError, f"nearest: <Call {number}: .*(is not|wanted|contain)"
                ):
                    self.server.assert_all_used()
                fixture.remove()

    def test_did_you_mean(self):
        for operation, near in (
            ("chatt", ", did you mean chat."),
            ("embeddings", ", did you mean embedding."),
            ("POST /v1/chat/completion", ": .* has /v1/chat/completions, "),
            ("GET " + CHAT, ": .*POST"),
        ):
            sentence = f"^no operation is called {operation!r}{near}"
            with self.subTest(operation=operation), self.assertRaisesRegex(ValueError, sentence):
                self.server.assert_called(operation)


class CallTests(ScriptingCase):
    """A call in the record tells the whole story, in Python and over HTTP."""

    over_http = True

    def listed(self, query=""):
        return self.json("GET", "/__parlel/requests" + query)["requests"]

    def numbers(self, query):
        return [call["n"] for call in self.listed(query)]

    def test_what_came_back(self):
        whole = self.chat()
        events = self.stream(stream_options={"include_usage": True})
        one, two = self.server.requests
        self.assertEqual((one.reply, one.events_sent, one.outcome), (whole, 0, "complete"))
        self.assertEqual(two.reply, events)
        self.assertEqual(
            (two.events_sent, two.outcome), (len(events) + 1, "complete")
        )  # with [DONE]
        self.assertEqual(one.usage, whole["usage"])
        self.assertEqual(two.usage["total_tokens"], whole["usage"]["total_tokens"])
        for call, listed in zip((one, two), self.listed()):
            facts = (call.reply, call.events_sent, call.outcome, call.usage)
            names = ("reply", "events_sent", "outcome", "usage")
            self.assertEqual(facts, tuple(listed[name] for name in names))

    def test_when_it_came(self):
        self.server = TogetherAiServer(clock=lambda: 1_700_000_000.25)
        self.answer("GET", "/v1/models")
        (call,) = self.server.requests
        self.assertEqual(call.at, 1_700_000_000.25)
        self.assertEqual(call.as_json()["at"], "2023-11-14T22:13:20.250Z")

    def test_how_it_ended(self):
        self.server.reply("a b c d", disconnect_after_chunks=2, times=1)
        self.ask("POST", CHAT, {**HELLO, "stream": True})
        self.server.reply("a b c d " * 50, latency=50, times=1)
        body = json.dumps({**HELLO, "stream": True})
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("POST", CHAT, body, KEY)
            with connection.getresponse() as response:
                response.readline()
        cut, left = self.server.requests
        self.assertEqual((cut.outcome, cut.events_sent, len(cut.reply)), ("cut", 2, 2))
        self.assertTrue(wait_until(lambda: left.outcome != "running"), "it goes on and on")
        self.assertEqual(left.outcome, "left")
        self.assertLess(left.events_sent, 200)
        for outcome, number in (("cut", 1), ("left", 2)):
            self.assertEqual(self.numbers(f"?outcome={outcome}"), [number])

    def test_large_replies_are_not_kept(self):
        with mock.patch.object(fake, "MAX_RECORDED_BODY_BYTES", 100):
            self.chat()
            self.stream()
        whole, stream = self.server.requests
        self.assertEqual((whole.status, whole.reply), (200, None))
        self.assertLess(len(stream.raw_reply), 101)
        self.assertGreater(stream.events_sent, 2)

    def test_the_record_is_a_list_of_its_own(self):
        self.chat("one")
        before = self.server.requests
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(self.chat, f"{number}") for number in range(40)]
            while not all(each.done() for each in asked):
                self.assertEqual([call.kind for call in self.server.requests[-3:]][:1], ["chat"])
        self.assertIs(type(before), list)
        self.assertEqual((len(before), len(self.server.requests)), (1, 41))
        self.assertEqual([call.number for call in self.server.requests[:2]], [1, 2])

    def test_headers_in_any_case(self):
        self.ask("GET", "/v1/models", headers={**KEY, "X-Run": "7"})
        headers = self.server.requests[0].headers
        for name in ("X-Run", "x-run", "X-RUN"):
            self.assertEqual((headers[name], headers.get(name), name in headers), ("7", "7", True))
        self.assertNotIn("X-Other", headers)

    def test_fine_prints(self):
        self.server.reply("x", chunk_size=2, truncate_after_chunks=1)
        self.chat()
        self.ask("POST", CHAT, {**HELLO, "stream": True})
        whole, stream = [" ".join(call.warnings) for call in self.server.requests]
        self.assertRegex(
            whole, r"reply\(\) at .*: chunkSize, truncateAfterChunks had no effect on a whole reply"
        )
        self.assertNotIn("no effect", stream)
        self.server.reply("x", malformed_after_chunks=1)
        self.ask("POST", CHAT, HELLO)  # half of it comes
        self.assertEqual(self.server.requests[-1].warnings, ())

    def test_batch_lines_are_recorded_and_marked(self):
        self.server.seed("files", SEEDS["files"])
        (job,) = self.server.seed("batches", SEEDS["batches"])
        self.climb("/v1/batches/id")
        lines = [call for call in self.server.requests if call.batch]
        self.assertEqual([(call.kind, call.batch) for call in lines], [("chat", job["id"])])
        self.assertEqual(lines[0].body["messages"], say("hello"))
        self.assertEqual(self.numbers("?batch=id"), [lines[0].number])
        self.assertNotIn(lines[0].number, self.numbers("?batch="))

    def test_filters(self):
        self.outcome("one")
        self.ask("POST", "/v1/embeddings", {"model": "m", "input": "two"}, {**KEY, "X-Run": "7"})
        self.server.fail(disconnect_after_chunks=0)
        with contextlib.suppress(http.client.HTTPException, OSError):
            self.ask("POST", CHAT, {**HELLO, "stream": True}, {**KEY, "X-Run": "8"})
        for query, numbers in {
            "?kind=chat": [1, 3],
            "?kind=embedding": [2],
            "?outcome=cut": [3],
            "?outcome=cut&kind=embedding": [],
        }.items():
            with self.subTest(query=query):
                self.assertEqual(self.numbers(query), numbers)
        message = self.json("GET", "/__parlel/requests?knd=chat", status=400)["error"]["message"]
        self.assertIn("knd", message)


# What each of many programs does: it asks a server, and prints what it was told.
TEST_PROGRAM = """
import json, socket, sys
port, test = int(sys.argv[1]), sys.argv[2]
told = []
for text in ["once", "once", "next", "next", "next", "who"]:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]})
    head = "POST /v1/chat/completions HTTP/1.0\\r\\nAuthorization: Bearer x\\r\\n"
    head += f"X-Test-Id: {test}\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        client.sendall((head + body).encode())
        answer = client.makefile().read().partition("\\n\\n")[2]
    told.append(json.loads(answer)["choices"][0]["message"]["content"])
print(json.dumps(told))
"""


class SharedServerTests(ScriptingCase):
    """Many tests, one server: an X-Test-Id separates them."""

    over_http = True

    def script(self, tests):
        self.server.reply("again", user_message="once")
        self.server.reply("first", user_message="once", times=1)
        for number in range(3):
            self.server.reply(str(number), user_message="next", sequence_index=number)
        for test in tests:
            self.server.reply(f"I am {test}", user_message="who", test_id=test)

    def test_four_processes_against_one_server(self):
        tests = [f"test-{number}" for number in range(4)]
        self.script(tests)
        command = [*PYTHON, "-c", TEST_PROGRAM, str(self.server.port)]
        programs = [
            subprocess.Popen([*command, test], stdout=subprocess.PIPE, text=True) for test in tests
        ]
        for test, program in zip(tests, programs):
            told, _ = program.communicate(timeout=60)
            wanted = ["first", "again", "0", "1", "2", f"I am {test}"]
            self.assertEqual(json.loads(told), wanted)
        for test in tests:
            calls = self.json("GET", f"/__parlel/requests?test={test}")["requests"]
            self.assertEqual([call["test"] for call in calls], [test] * 6)

    def test_one_is_reset_without_the_others(self):
        self.script([])
        first = {test: {**KEY, "X-Test-Id": test} for test in ("a", "b")}

        def ask(test):
            body = {"model": "m", "messages": say("once")}
            return self.post(CHAT, body, first[test]).json["choices"][0]["message"]["content"]

        self.assertEqual([ask(test) for test in "aabb"], ["first", "again"] * 2)
        self.json("POST", "/__parlel/reset?test=a")
        self.assertEqual([call.test for call in self.server.requests], ["b", "b"])
        self.assertEqual([ask(test) for test in "ab"], ["first", "again"])
        self.server.reset(test="b")
        self.assertEqual([call.test for call in self.server.requests], ["a"])
        self.assertEqual([ask(test) for test in "ab"], ["again", "first"])


class OneTestTests(ScriptingCase):
    """`server.test("id")` scripts, sees and forgets one test alone."""

    over_http = True

    def setUp(self):
        super().setUp()
        self.one, self.other = map(self.server.test, ("tests/test_a.py::test_x[é 1]", "other"))

    def say(self, test, text="hi"):
        """Ask as that test's program does, with the header that its environment asks for."""
        name, _, value = test.env["TOGETHER_CUSTOM_HEADERS"].partition(": ")
        self.assertEqual(test.env["OPENAI_CUSTOM_HEADERS"], f"{name}: {value}")
        body = {"model": "m", "messages": say(text)}
        return self.post(CHAT, body, {**KEY, name: value}).json["choices"][0]["message"]["content"]

    def test_each_has_answers_and_calls_of_its_own(self):
        self.server.reply("for all")
        self.one.reply("for one", times=1)
        self.other.fail(503, user_message="never")
        said = [self.say(test) for test in (self.other, self.one, self.one, self.other)]
        self.assertEqual(said, ["for all", "for one", "for all", "for all"])
        self.assertEqual([len(test.requests) for test in (self.one, self.other)], [2, 2])
        self.assertEqual(len(self.server.requests), 4)
        self.assertIs(self.one.assert_called("chat", times=2), self.server.requests[2])
        self.assertEqual(self.other.calls_to("chat", user_message="bye"), [])
        self.one.assert_all_used()
        with self.assertRaisesRegex(AssertionError, "never"):
            self.other.assert_all_used()
        self.assertEqual(self.one.headers["X-Test-Id"], self.one.requests[0].test)
        self.assertEqual(self.one.env["TOGETHER_BASE_URL"], self.server.base_url)

    def test_a_reset_forgets_its_fixtures_and_no_others(self):
        for reset in (
            self.one.reset,
            lambda: self.json(
                "POST", "/__parlel/reset?test=" + urllib.parse.quote(self.one.test_id)
            ),
        ):
            with self.subTest(reset=reset):
                self.server.reply("for all")
                for test, text in ((self.one, "one"), (self.other, "other")):
                    test.reply(text)
                said = [self.say(self.one), self.say(self.other)]
                reset()
                said += [self.say(self.one), self.say(self.other)]
                self.assertEqual(said, ["one", "other", "for all", "other"])
                self.assertEqual((len(self.one.requests), len(self.other.requests)), (1, 2))
                self.server.reset()

    def test_the_lines_of_a_batch_are_those_of_its_test(self):
        self.one.reply("for one")
        file = self.server.add_file(batch_lines(["hi"]), purpose="batch-api")
        body = {"endpoint": CHAT, "input_file_id": file["id"]}
        for test, said in ((self.one, b"for one"), (self.other, b"choices")):
            job = self.ask("POST", "/v1/batches", body, {**KEY, **test.headers}).json["job"]
            self.climb(f"/v1/batches/{job['id']}")
            done = self.json("GET", f"/v1/batches/{job['id']}")
            content = self.ask("GET", f"/v1/files/{done['output_file_id']}/content").raw
            self.assertIn(said, content)
            self.assertEqual([call.batch for call in test.requests], ["", job["id"]])
        self.assertNotIn(b"for one", content)

    def test_ids_of_any_length(self):
        name = "x" * 4000
        self.server.test(name).reply("found")
        self.server.test(name + "y").reply("wrong")
        self.assertEqual(self.say(self.server.test(name)), "found")


GOOD_TYPES = """
import re
from pathlib import Path
from together_fake import TogetherAiServer

server = TogetherAiServer(port=0)
server.reply("Hi!", user_message=re.compile("hello"), times=1)
server.reply(tool_calls=[{"name": "f", "arguments": {}}], turn_index=0, latency=1.5)
server.fail(429, retry_after=1, times=2, endpoint="chat")
server.load(Path("a.json"))
server.assert_called("chat", model="m", body={"n": 1}).headers["X-Run"].upper()
server.requests[-1].outcome.upper()
"""


class TypeTests(unittest.TestCase):
    """mypy and editors find what is misspelt."""

    def run_mypy(self, text):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "mine.py").write_text(text, "utf-8")
            options = ["--strict", "--cache-dir", os.path.join(folder, "cache"), "mine.py"]
            done = subprocess.run(
                [sys.executable, "-m", "mypy", *options],
                cwd=folder,
                env={**os.environ, "MYPYPATH": str(HERE)},
                capture_output=True,
                text=True,
                timeout=300,
            )
            return done.stdout

    def test_the_types_are_those_of_the_words_that_are_taken(self):
        source = (HERE / "together_fake.py").read_text("utf-8")
        classes = dict(re.findall(r"^    class (\w+)\(.*\n((?: {8}.*\n|\n)*)", source, re.M))
        typed = set()
        for name, known in (
            ("CallWords", fake.CALL_WORDS),
            ("ReplyWords", fake.REPLY_WORDS),
        ):
            typed |= set(re.findall(r"^ {8}(\w+):", classes[name], re.M))
            with self.subTest(name=name):
                self.assertLessEqual(set(known) - {"content"}, typed)
        self.assertLessEqual(typed, set(fake.REPLY_WORDS))

    def test_a_typo_is_found(self):
        need("mypy")
        wrong = (
            'server.reply("x", user_mesage="y")',
            "server.fail(429, retry_afer=1)",
            'server.assert_called("chat", modle="m")',
            'server.calls_to("chat", temperature=1)',
            'server.reply("x", times="1")',
            "server.load(1)",
        )
        found = self.run_mypy(GOOD_TYPES + "\n".join(wrong) + "\n")
        first = GOOD_TYPES.count("\n") + 1
        lines = {int(line) for line in re.findall(r"^mine\.py:(\d+): error", found, re.M)}
        self.assertEqual(lines, set(range(first, first + len(wrong))), found)


class HelpTests(FakeCase):
    """What a reader is told by Python itself."""

    def test_the_head_of_the_file(self):
        head = (HERE / "together_fake.py").read_text("utf-8").partition('"""')[0]
        for words in (f"together_fake {fake.__version__}:", "SPDX-License-Identifier: MIT\n"):
            self.assertIn(words, head)
        self.assertRegex(" ".join(head.split("# ")), "From the repository .+ To renew it, copy")
        promise = "Answers change only with the minor version"
        self.assertIn(promise, " ".join(fake.__doc__.split()))

    def test_help_begins_with_what_users_need(self):
        text = pydoc.plain(pydoc.render_doc(TogetherAiServer))
        head = text[: text.index("Methods defined here")]
        for name in ("start", "stop", "reset", "base_url", "env", "reply", "fail", "requests"):
            self.assertIn(name, head)
            self.assertTrue(inspect.getdoc(getattr(TogetherAiServer, name)), name)
        self.assertRegex(text, r"Keywords: .*\buser_message, .*\bwhen\b")

    def test_repr_shows_the_url_and_the_counts(self):
        self.chat()
        fixture = self.server.reply("x")
        counts = "1 calls, 1 fixtures"
        self.assertEqual(repr(self.server), f"<TogetherAiServer {self.server.url}: {counts}>")
        stopped = "<TogetherAiServer stopped: 0 calls, 0 fixtures>"
        self.assertEqual(repr(TogetherAiServer()), stopped)
        self.chat()
        self.assertRegex(repr(fixture), r"^<Fixture reply\(\) at .*: text, served 1 times>$")


# === HTTP ===

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\n"
BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'  # 57 bytes
RAW_CHAT = POST + b"Content-Length: 57\r\n\r\n" + BODY
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"39\r\n" + BODY + b"\r\n0\r\n\r\n"
ODD_CHUNKS = b"1;a=b; c\r\n{\r\n0038 ;x\r\n" + BODY[1:] + b"\r\n00\r\nX-Sum: 1\r\nY:\r\n\r\n"
ODDLY_CHUNKED = CHUNKED.replace(b"chunked", b"Chunked") + ODD_CHUNKS


class EchoApp:
    """Answers like the fake where the tests of framing look, and keeps what it was asked.

    What is scripted may take long, but for the paths in `quick`.
    """

    def __init__(self, reply=None):
        self.reply = reply
        self.requests = []
        self.quick = ()

    def _begin(self, request):
        slow = bool(self.reply) and request.path not in self.quick
        return fake.WAITING if slow else fake.QUICK

    def answer(self, request, refusal=None):
        if refusal is not None:
            return refusal.as_reply()
        self.requests.append(request)
        if callable(self.reply):
            return self.reply(request)
        if self.reply:
            return self.reply
        if request.method == "OPTIONS":
            return fake.Reply(b"", 204)
        return fake.Reply(b'{"status":"ok"}')

    def _limit_body(self, request):
        return 100 * 2**20 if request.path == "/v1/files" else fake.MAX_JSON_BYTES


def get(path):
    """Return the bytes of a request."""
    return b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode()


def receive_all(client):
    """Return everything until the server closes; a reset ends it too."""
    pieces = []
    with contextlib.suppress(ConnectionError):
        while True:
            piece = client.recv(65536)
            if not piece:
                break
            pieces.append(piece)
    return b"".join(pieces)


def receive_head(client):
    """Return the head of a reply."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(65536)
        assert piece, data
        data += piece
    return data.partition(b"\r\n\r\n")[0] + b"\r\n"


def receive_until(client, end):
    """Return what comes, up to and with the bytes `end`."""
    data = b""
    while not data.endswith(end):
        piece = client.recv(65536)
        assert piece, data
        data += piece
    return data


def split_replies(data):
    """Take replies that have a length, or none, apart: [(status, headers, body)]."""
    replies = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in lines}
        size = int(headers.get("content-length", 0))
        replies.append((int(first.split()[1]), headers, data[:size]))
        data = data[size:]
    return replies


def dechunk(data):
    """Return a chunked body's chunks, and whether the last one came."""
    chunks = []
    while data:
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        if not size:
            return chunks, data == b"\r\n"
        chunks.append(data[:size])
        data = data[size + 2 :]
    return chunks, False


def stream(events, **fields):
    """Return a reply with events."""
    return fake.Reply(events=(event for event in events), **fields)


def pace(events, **fields):
    """Return a reply whose events are sent one by one, as they are drawn."""
    reply = stream(events, **fields)
    reply.waits = True
    return reply


def reset(client):
    """Close a connection so that its other end is reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


class SocketCase(unittest.TestCase):
    """A server for each test, on any free port, and raw sockets to talk to it."""

    def serve(self, reply=None, host="127.0.0.1", start=True):
        self.app = EchoApp(reply)
        self.server = fake.HttpServer((host, 0), self.app)
        self.addCleanup(self.server.stop)
        self.address = host, self.server.server_port
        if start:
            self.server.start()
        return self.server

    def connect(self):
        client = socket.create_connection(self.address, timeout=PATIENCE)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.addCleanup(client.close)
        return client

    def status(self, client, data=HEALTH):
        """Send a request; return the status of its reply."""
        client.sendall(data)
        return int(client.recv(65536).split()[1])

    def exchange(self, *pieces):
        """Send pieces, each in a segment of its own, and return all that comes back."""
        client = self.connect()
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        return receive_all(client)

    def statuses(self, *pieces):
        return [status for status, _, _ in split_replies(self.exchange(*pieces))]


class RequestTests(SocketCase):
    """Each row is sent with GET /health behind it, which shows where the server went on."""

    ACCEPTED = (
        ("GET", HEALTH, [200, 200]),
        ("pipelining", HEALTH + RAW_CHAT + HEALTH, [200, 200, 200, 200]),
        ("Content-Length", RAW_CHAT, [200, 200]),
        ("Content-Length of 0", POST + b"Content-Length: 0\r\n\r\n", [200, 200]),
        ("chunked", CHUNKED + CHUNKS, [200, 200]),
        ("chunk extensions and trailers", ODDLY_CHUNKED, [200, 200]),
        ("one empty line before", b"\r\n" + HEALTH, [200, 200]),
        ("absolute target", b"GET http://h:1/health?a=b HTTP/1.1\r\nHost: x\r\n\r\n", [200, 200]),
        ("absolute target, no path", b"OPTIONS HTTP://h HTTP/1.1\r\nHost: x\r\n\r\n", [204, 200]),
        ("OPTIONS *", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [204, 200]),
        ("blanks around a value", b"GET /health HTTP/1.1\r\nHost: \t x \t\r\n\r\n", [200, 200]),
        ("no blank, no value", b"GET /health HTTP/1.1\r\nHost:x\r\nA:\r\n\r\n", [200, 200]),
        ("bytes over 127 in a value", HEALTH[:-2] + b"A: \xc3\xa4\xff\r\n\r\n", [200, 200]),
        ("100 header lines", HEALTH[:-2] + b"A: b\r\n" * 99 + b"\r\n", [200, 200]),
        ("Connection: close", HEALTH[:-2] + b"Connection: Close\r\n\r\n", [200]),
        ("HTTP/1.0", b"GET /health HTTP/1.0\r\n\r\n", [200]),
        ("keep-alive in 1.0", b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", [200]),
    )
    REFUSED = (
        ("both lengths", b"Content-Length: 57\r\nTransfer-Encoding: chunked\r\n", 400),
        ("two lengths", b"Content-Length: 57\r\nContent-Length: 58\r\n", 400),
        ("two lengths in one line", b"Content-Length: 57, 58\r\n", 400),
        ("plus sign", b"Content-Length: +57\r\n", 400),
        ("minus sign", b"Content-Length: -1\r\n", 400),
        ("underscore", b"Content-Length: 5_7\r\n", 400),
        ("superscript", b"Content-Length: \xb2\r\n", 400),
        ("hexadecimal", b"Content-Length: 0x39\r\n", 400),
        ("inner blank", b"Content-Length: 5 7\r\n", 400),
        ("no digit", b"Content-Length:\r\n", 400),
        ("20 digits", b"Content-Length: 99999999999999999999\r\n", 413),
        ("5,000 digits", b"Content-Length: " + b"9" * 5000 + b"\r\n", 413),
        ("unknown coding", b"Transfer-Encoding: gzip\r\n", 501),
        ("coding before chunked", b"Transfer-Encoding: gzip, chunked\r\n", 501),
        ("chunked twice", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
        ("folded header", b"A: b\r\n c: d\r\n", 400),
        ("nameless header", b": b\r\n", 400),
        ("header without colon", b"Ab\r\n", 400),
        ("blank before colon", b"A : b\r\n", 400),
        ("blank in name", b"A b: c\r\n", 400),
        ("letter beyond ASCII in name", b"\xc3\xa4: b\r\n", 400),
        ("bare LF", b"A: b\nC: d\r\n", 400),
        ("bare CR", b"A: b\rC: d\r\n", 400),
        ("NUL", b"A: b\0\r\n", 400),
        ("second Host", b"Host: y\r\n", 400),
        ("101 header lines", b"A: b\r\n" * 101, 431),
        ("long header", b"A: " + b"b" * 70_000 + b"\r\n", 431),
    )
    HOPELESS = (
        ("no Host", b"GET /health HTTP/1.1\r\n\r\n", 400),
        ("line ends of LF alone", b"GET /health HTTP/1.1\nHost: x\n\n", 400),
        ("two empty lines before", b"\r\n\r\n" + HEALTH, 400),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        ("HTTP/3.0", b"GET /health HTTP/3.0\r\nHost: x\r\n\r\n", 400),
        ("HTTP/0.9", b"GET /health\r\n\r\n", 400),
        ("lower-case version", b"GET /health http/1.1\r\nHost: x\r\n\r\n", 400),
        ("no target", b"GET  HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("blank in target", b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("authority as target", b"CONNECT h:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("relative target", b"GET health HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("target not in ASCII", b"GET /\xc3\xa4 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("method with a bracket", b"G(T /health HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("long target", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        ("endless line", b"a" * 70_000, 431),
        ("chunked in 1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    )
    BAD_CHUNKS = (
        ("no size", b"\r\nabc\r\n0\r\n\r\n", 400),
        ("sign", b"+1\r\na\r\n0\r\n\r\n", 400),
        ("prefix", b"0x1\r\na\r\n0\r\n\r\n", 400),
        ("underscore", b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n", 400),
        ("LF alone", b"1\na\n0\n\n", 400),
        ("longer than its size", b"1\r\nabc\r\n0\r\n\r\n", 400),
        ("folded trailer", b"0\r\nA: b\r\n c\r\n\r\n", 400),
        ("endless extension", b"1;" + b"a" * 5000, 400),
        ("101 trailers", b"0\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
        ("over the limit", b"2000001\r\na", 413),
        ("17 digits", b"10000000000000001\r\na", 400),
    )

    def setUp(self):
        self.serve()

    def test_accepted(self):
        for name, data, expected in self.ACCEPTED:
            with self.subTest(name):
                self.assertEqual(self.statuses(data + HEALTH), expected)

    def test_accepted_in_single_bytes(self):
        for name, data, expected in self.ACCEPTED:
            if len(data) < 300:
                with self.subTest(name):
                    pieces = [bytes([byte]) for byte in data + HEALTH]
                    self.assertEqual(self.statuses(*pieces), expected)

    def test_refused_and_closed(self):
        rows = [(name, POST + lines + b"\r\n", status) for name, lines, status in self.REFUSED]
        rows += [(f"chunk: {name}", CHUNKED + data, code) for name, data, code in self.BAD_CHUNKS]
        for name, data, status in (*rows, *self.HOPELESS):
            with self.subTest(name):
                ((got, headers, body),) = split_replies(self.exchange(data + HEALTH))
                self.assertEqual((got, headers["connection"]), (status, "close"))
                self.assertIn("message", json.loads(body)["error"])
        self.assertEqual(self.app.requests, [])

    def test_hopeless_is_refused_without_waiting_for_more(self):
        for name, data, status in self.HOPELESS:
            with self.subTest(name):
                self.assertEqual(self.status(self.connect(), data), status)

    def test_the_reason_is_told(self):
        for data, reason in (
            (b"\x16\x03\x01", "this is TLS: have the client use http://"),
            (b"PRI * HTTP/2.0\r\n\r\n", "this is HTTP/2: have the client speak HTTP/1.1"),
            (b"GET / HTTP/1.1\r\n: b\r\n\r\n", "a line is neither METHOD /path HTTP/1.1 nor"),
            (b"GET / HTTP/1.1\nA: b\n\n", "and then CR LF"),
        ):
            with self.subTest(reason):
                self.assertIn(reason.encode(), self.exchange(data))

    def test_what_the_app_is_given(self):
        data = RAW_CHAT.replace(b"/v1/chat/completions", b"HTTP://h/v1/a%2Fb?x=1&y=?")
        data = data.replace(b"\r\nAuth", b"\r\nX-A: 1\r\nx-a: 2\r\nAuth")
        self.exchange(data, b"GET / HTTP/1.0\r\n\r\n")
        first, second = self.app.requests
        self.assertEqual((first.method, first.path, first.query), ("POST", "/v1/a%2Fb", "x=1&y=?"))
        self.assertEqual(
            first.headers,
            {"host": "x", "x-a": "1, 2", "authorization": "Bearer x", "content-length": "57"},
        )
        self.assertEqual((first.raw, first.origin), (BODY, "http://x"))
        self.assertEqual(second.origin, f"http://127.0.0.1:{self.server.server_port}")

    def test_many_different_heads_are_each_read(self):
        client = self.connect()
        for number in [*range(300), *range(300)]:  # more than are remembered
            padding = b"a" * (4000 if number % 100 == 0 else number % 2)
            data = b"GET /%d HTTP/1.1\r\nHost: x\r\nA: %b\r\n\r\n" % (number, padding)
            self.assertEqual(self.status(client, data), 200)
            self.assertEqual(self.app.requests[-1].path, f"/{number}")
            self.assertEqual(self.app.requests[-1].headers["a"], padding.decode())

    def test_a_method_is_taken_as_it_is(self):
        self.exchange(HEALTH.replace(b"GET", b"get"))
        self.assertEqual(self.app.requests[0].method, "get")

    def test_a_half_request_ends_quietly(self):
        for data in (b"", b"\r\n", HEALTH[:9], HEALTH[:-2], RAW_CHAT[:-1]):
            with self.subTest(data):
                self.assertEqual(self.exchange(data), b"")


class RequestBodyTests(SocketCase):
    """Expect, limits and large bodies."""

    UPLOAD = b"POST /v1/files HTTP/1.1\r\nHost: x\r\n"

    def setUp(self):
        self.serve()

    def test_100_continue(self):
        client = self.connect()
        client.sendall(POST + b"Content-Length: 57\r\nExpect: 100-Continue\r\n\r\n")
        said = b"HTTP/1.1 100 Continue\r\n\r\n"
        self.assertEqual(receive_until(client, b"\r\n\r\n"), said)
        self.assertEqual(self.status(client, BODY), 200)

    def test_no_100_continue_when_nobody_waits_for_it(self):
        read = threading.Event()
        self.app._limit_body = lambda request: read.set() or fake.MAX_JSON_BYTES
        expecting = RAW_CHAT.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
        old = expecting[:-57].replace(b"HTTP/1.1", b"HTTP/1.0")
        for first, rest in ((RAW_CHAT[:-57], BODY), (expecting[:-1], BODY[-1:]), (old, BODY)):
            client = self.connect()
            client.sendall(first)
            self.assertTrue(read.wait(PATIENCE))
            read.clear()
            self.assertEqual(self.status(client, rest), 200)

    def test_too_large_is_refused_before_it_is_read(self):
        client = self.connect()
        client.sendall(POST + b"Content-Length: 33554433\r\nExpect: 100-continue\r\n\r\n")
        ((status, headers, body),) = split_replies(receive_all(client))
        self.assertEqual((status, headers["connection"]), (413, "close"))
        self.assertIn(b"33554433 bytes; at most 33554432", body)

    def test_a_client_that_sends_on_reads_the_refusal(self):
        data = POST + b"Content-Length: 99999999\r\n\r\n" + bytes(2**20)
        self.assertEqual(self.statuses(data), [413])

    @mock.patch.object(fake, "MAX_JSON_BYTES", 2**21)
    def test_a_route_may_take_more(self):
        size = 3 * 2**20
        data = memoryview(bytes(range(256)) * (size // 256))
        with self.subTest("length"):
            head = self.UPLOAD + b"Content-Length: %d\r\n\r\n" % size
            self.assertEqual(self.statuses(head, data, HEALTH), [200, 200])
        with self.subTest("chunked"):
            head = self.UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size
            self.assertEqual(self.statuses(head, data, b"\r\n0\r\n\r\n", HEALTH), [200, 200])
        for request in self.app.requests[::2]:
            self.assertTrue(request.raw == data)

    def test_many_small_chunks(self):
        data = CHUNKED + b"1\r\n \r\n" * 60_000 + b"0\r\n\r\n"
        began = time.process_time()
        self.assertEqual(self.statuses(data), [200])
        self.assertLess(time.process_time() - began, 4)

    @mock.patch.object(fake, "MAX_JSON_BYTES", 2**21)
    def test_chunks_count_together(self):
        chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
        self.assertEqual(self.statuses(CHUNKED, chunk, chunk, b"1\r\na\r\n"), [413])

    def test_a_large_reply_arrives_whole(self):
        self.app.reply = fake.Reply(bytes(range(256)) * 8_000)
        replies = split_replies(self.exchange(HEALTH + HEALTH))
        self.assertEqual([body == self.app.reply.body for _, _, body in replies], [True, True])


class RefusalRecordTests(FakeCase):
    """What is refused before it is a request is found in the record and in the log."""

    def test_it_is_recorded_and_logged(self):
        lines = []
        with TogetherAiServer(port=0, log=lines.append) as server:
            for data, path, status in (
                (b"\x16\x03\x01\x02\x00", "\x16\x03\x01\x02\x00", 400),
                (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "PRI * HTTP/2.0", 400),
                (b"GET /\x1b]0;a\x07 HTTP/1.1\r\n\r\n", "GET /\x1b]0;a\x07 HTTP/1.1", 400),
                (POST + b"Content-Length: 99999999\r\n\r\n", CHAT, 413),
                (POST + b"Transfer-Encoding: gzip\r\n\r\n", POST.split(b"\r")[0].decode(), 501),
            ):
                with self.subTest(path=path):
                    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client:
                        client.sendall(data)
                        told = json.loads(receive_all(client).partition(b"\r\n\r\n")[2])
                    call = server.requests[-1]
                    self.assertEqual(
                        (call.path, call.status, call.outcome), (path, status, "complete")
                    )
                    self.assertEqual(call.error, told["error"]["message"])
        self.assertEqual(len(lines), 5)
        for line in lines:
            self.assertTrue(line.isprintable(), line)

    def test_a_line_of_the_log_holds_no_control_characters(self):
        lines = []
        with TogetherAiServer(port=0, log=lines.append) as server:
            body = {"model": "a\x1b[2J\r\n\u202eb\u00e4", "messages": say("hi")}
            request = urllib.request.Request(
                f"{server.base_url}/chat/completions", json.dumps(body).encode(), KEY
            )
            urllib.request.urlopen(request).read()
            self.assertTrue(wait_until(lambda: lines))
        self.assertTrue(lines[0].isprintable(), lines[0])
        self.assertIn("a\\x1b[2J\\x0d\\n\\x202eb\u00e4", lines[0])


class ReplyTests(SocketCase):
    """Replies, byte by byte."""

    def receive(self, reply, request=HEALTH):
        """Return the bytes of a reply."""
        self.serve(lambda request: reply)
        return self.exchange(request)

    def test_every_reply_has_these_headers(self):
        self.serve()
        ((_, headers, _),) = split_replies(self.exchange(HEALTH))
        date = r"^[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} [\d:]{8} GMT$"
        self.assertRegex(headers.pop("date"), date)
        exposed = headers.pop("access-control-expose-headers").split(", ")
        self.assertTrue({"retry-after", "x-ratelimit-remaining", "cf-ray"} <= set(exposed), exposed)
        self.assertEqual(
            headers,
            {
                "server": "together-fake",
                "access-control-allow-origin": "*",
                "content-type": "application/json; charset=utf-8",
                "content-length": "15",
            },
        )

    def test_a_body_of_any_size_is_its_length(self):
        for body, status in ((b"a" * 65_536, 200), (b"a" * 65_537, 200), (b"", 200)):
            with self.subTest(size=len(body)):
                ((got, headers, data),) = split_replies(self.receive(fake.Reply(body, status)))
                self.assertEqual((got, headers["content-length"]), (status, str(len(body))))
                self.assertTrue(data == body)

    def test_events_are_chunks_and_those_at_hand_are_one(self):
        events = [b"data: 1\n\n", b"", b"data: 2\n\n", b"data: [DONE]\n\n"]
        apart = b"9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        together = b"20\r\ndata: 1\n\ndata: 2\n\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        for reply, chunks in (
            (pace(iter(events)), apart),
            (stream(events), together),
        ):
            head, _, data = self.receive(reply).partition(b"\r\n\r\n")
            self.assertIn(b"\r\nTransfer-Encoding: chunked", head)
            self.assertEqual(data, chunks)

    def test_at_most_so_many_bytes_leave_together(self):
        events = [b"a" * 1000] * 100
        _, _, data = self.receive(stream(events)).partition(b"\r\n\r\n")
        chunks, complete = dechunk(data)
        self.assertEqual((b"".join(chunks), complete), (b"".join(events), True))
        self.assertLess(max(map(len, chunks)), fake.MAX_GATHERED_BYTES + 1000)

    def test_head_has_no_body(self):
        request = HEALTH.replace(b"GET", b"HEAD")
        whole = self.receive(fake.Reply(b"abc"), request)
        self.assertIn(b"Content-Length: 3\r\n", whole)
        self.assertTrue(whole.endswith(b"\r\n\r\n"))
        events = self.receive(stream([b"abc"]), request)
        self.assertIn(b"Transfer-Encoding: chunked\r\n", events)
        self.assertTrue(events.endswith(b"\r\n\r\n"))

    def test_204_and_304_end_with_the_head(self):
        for status in (204, 304):
            sent = self.receive(fake.Reply(b"abc", status))
            self.assertTrue(sent.endswith(b"\r\n\r\n"))
            self.assertNotIn(b"Content-", sent)

    def test_a_header_cannot_bring_another(self):
        headers = {"A": "1\r\nB: 2", "C\r\nD": "\0\n3"}
        headers.update({"content-length": "99", "Connection": "close"})
        for reply in (
            fake.Reply(b"x", headers=headers),
            fake.Reply(b"x", 200, "a\r\nE: 5", headers),
        ):
            ((_, got, _),) = split_replies(self.receive(reply))
            self.assertEqual((got["a"], got["cd"], got["content-length"]), ("1B: 2", "3", "1"))
            self.assertNotIn("connection", got)
            self.assertNotIn("e", got)

    def test_unknown_statuses_and_letters_go_through(self):
        sent = self.receive(fake.Reply(b"", 599, headers={"A": "\u4e16\xe4"}))
        self.assertIn(b"HTTP/1.1 599 \r\n", sent)
        self.assertIn(b"A: ?\xe4\r\n", sent)


class StreamTests(SocketCase):
    """Replies that come in events."""

    def test_each_event_goes_out_at_once(self):
        received = threading.Semaphore(0)

        def events():
            for number in (1, 2, 3):
                yield b"data: %d\n\n" % number
                received.acquire(timeout=PATIENCE)
            yield b"data: [DONE]\n\n"

        self.serve(lambda request: pace(events(), content_type="text/event-stream"))
        client = self.connect()
        client.sendall(HEALTH + HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        head, _, data = receive_until(client, b"1\n\n\r\n").partition(b"\r\n\r\n")
        self.assertIn(b"Cache-Control: no-cache, no-transform\r\n", head)
        self.assertEqual(data, b"9\r\ndata: 1\n\n\r\n")
        for number in (2, 3):
            received.release()
            event = b"9\r\ndata: %d\n\n\r\n" % number
            self.assertEqual(receive_until(client, b"\n\n\r\n"), event)
        received.release(4)
        rest = receive_all(client)
        self.assertTrue(rest.startswith(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\nHTTP/1.1 200"))

    def test_a_stream_that_is_read_to_its_end_is_not_left(self):
        with TogetherAiServer(port=0) as server:
            server.reply("a b c", latency=1, user_message="paced")
            server.reply("a b c", error_after_chunks=1, user_message="faulted")
            server.reply("x" * 200_000, user_message="long")
            for text in ("paced", "faulted", "plain", "long"):
                body = {"model": LLAMA, "messages": say(text), "stream": True}
                request = urllib.request.Request(
                    f"{server.base_url}/chat/completions", json.dumps(body).encode(), KEY
                )
                urllib.request.urlopen(request).read()
                self.assertEqual(server.requests[-1].outcome, "complete", text)

    def test_a_stream_of_exactly_one_piece_is_not_left(self):
        drawn = []

        def events():
            yield bytes(fake.MAX_GATHERED_BYTES)
            drawn.append("all")

        self.serve(lambda request: stream(events()))
        _, _, data = self.exchange(HEALTH).partition(b"\r\n\r\n")
        self.assertTrue(dechunk(data)[1])
        self.assertEqual(drawn, ["all"])

    def test_http_1_0_ends_with_the_connection(self):
        self.serve(lambda request: stream([b"a", b"data: [DONE]\n\n"]))
        request = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
        head, _, body = self.exchange(request + HEALTH).partition(b"\r\n\r\n")
        self.assertIn(b"\r\nConnection: close", head)
        self.assertNotIn(b"chunked", head)
        self.assertEqual(body, b"adata: [DONE]\n\n")

    def test_a_stream_with_a_length_is_sent_bare(self):
        self.serve(lambda request: stream(([b"ab", b"c"]), headers={"Content-Length": "3"}))
        replies = split_replies(self.exchange(HEALTH + HEALTH))
        self.assertEqual([body for _, _, body in replies], [b"abc", b"abc"])

    def test_a_cut_ends_the_connection(self):
        def events(count):
            yield from [b"ab"] * count
            raise fake.Cut

        for reply_of, count, expected in (
            (pace, 0, []),
            (pace, 2, [b"ab", b"ab"]),
            (stream, 2, [b"abab"]),
        ):
            with self.subTest(expected):
                self.serve(lambda request, of=reply_of, count=count: of(events(count)))
                _, _, data = self.exchange(HEALTH + HEALTH).partition(b"\r\n\r\n")
                self.assertEqual(dechunk(data), (expected, False))
        headers = {"Content-Length": "9"}
        self.serve(lambda request: fake.Reply(events=events(1), headers=headers))
        self.assertTrue(self.exchange(HEALTH + HEALTH).endswith(b"\r\n\r\nab"))

    def test_a_bug_ends_the_connection_with_a_traceback(self):
        def events():
            yield b"ab"
            raise ValueError("the generator's bug")

        self.serve(lambda request: fake.Reply(events=events()))
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            _, _, data = self.exchange(HEALTH + HEALTH).partition(b"\r\n\r\n")
        self.assertEqual(dechunk(data), ([b"ab"], False))
        self.assertIn("ValueError: the generator's bug", stderr.getvalue())

    def test_a_client_that_leaves_is_normal(self):
        closed = threading.Event()

        def events():
            try:
                while True:
                    yield bytes(65536)
            finally:
                closed.set()

        self.serve(lambda request: fake.Reply(events=events()))
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            client = self.connect()
            client.sendall(HEALTH)
            client.recv(10)
            client.close()
            self.assertTrue(closed.wait(PATIENCE))
            self.server.stop()
        self.assertEqual(stderr.getvalue(), "")

    def test_an_unread_generator_is_closed(self):
        closed = threading.Event()

        def events():
            try:
                yield b"drawn by the app"
                yield b"never"
            finally:
                closed.set()

        def reply(request):
            drawn = events()
            next(drawn)
            return fake.Reply(events=drawn)

        self.serve(reply)
        self.exchange(HEALTH.replace(b"GET", b"HEAD"))
        self.assertTrue(closed.wait(PATIENCE))


class WorkTests(FakeCase):
    """What takes long follows from the work that is asked for."""

    def test_who_answers(self):
        server, key = TogetherAiServer(port=0), {"authorization": "Bearer x"}
        chat, scores = {"model": LLAMA, "messages": say("hi")}, {"logprobs": True}
        texts = {"model": "BAAI/bge-base-en-v1.5", "input": ["a"] * 20}
        tool = {"type": "function", "function": {"name": "format"}}
        for path, body, who in (
            (CHAT, chat, fake.QUICK),
            (CHAT, {**chat, "n": 8}, fake.QUICK),
            (CHAT, {**chat, "n": 9}, fake.HEAVY),
            (CHAT, {**chat, **scores}, fake.HEAVY),
            (CHAT, {**chat, "tools": [tool]}, fake.HEAVY),
            (CHAT, {**chat, "messages": say('"tools" and format" \\u0061')}, fake.QUICK),
            (CHAT, {**chat, "messages": say("a" * 9000)}, fake.HEAVY),
            ("/v1/embeddings", texts, fake.HEAVY),
            ("/v1/embeddings", {**texts, "input": "a"}, fake.QUICK),
            ("/v1/completions", {"model": LLAMA, "prompt": ["a"] * 9}, fake.HEAVY),
            ("/v1/completions", {"model": LLAMA, "prompt": list(range(500))}, fake.QUICK),
            ("/v1/images/generations", {"model": "x", "prompt": "y"}, fake.HEAVY),
            (CHAT, {}, fake.QUICK),
        ):
            with self.subTest(path=path, body=str(body)[-60:]):
                self.assertEqual(server._begin(Request("POST", path, body, headers=key)), who)
        server.reply(lambda request: "x")
        self.assertEqual(server._begin(Request("POST", CHAT, chat, headers=key)), fake.WAITING)
        self.assertEqual(server._begin(Request("GET", "/health")), fake.QUICK)

    def test_products_have_a_limit(self):
        body = {"model": LLAMA, "prompt": ["a"] * 100, "n": 16, "logprobs": 5}
        got = self.ask("POST", "/v1/completions", body)
        self.assertEqual((got.status, got.json["error"]["param"]), (400, "n"))
        self.assertIn("81600 > 50000", got.json["error"]["message"])
        self.post("/v1/completions", {**body, "n": 1, "prompt": "a"})

    def test_the_values_of_a_request_share_a_limit(self):
        schema = {"type": "array", "items": WHOLE, "minItems": 100}
        held = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        for kind in (
            {"response_format": {"type": "json_schema", "schema": schema}},
            {"response_format": {"type": "regex", "pattern": "[ab]{500}"}},
            {"tools": [tool("f", parameters=held)], "tool_choice": "required"},
        ):
            body = {"model": LLAMA, "messages": say("hi"), **kind}
            with mock.patch.object(fake, "MAX_REQUEST_STEPS", 8_000):
                self.post(CHAT, {**body, "n": 3})
                got = self.ask("POST", CHAT, {**body, "n": 128})
            self.assertEqual(got.status, 400, kind)
            self.assertIn("it asks for too much", got.json["error"]["message"])
            self.assertEqual(getattr(fake.WORK, "steps", math.inf), math.inf)

    def test_patterns_of_added_fixtures_share_none(self):
        rows = [entry({"userMessage": {"pattern": f"^[äöü]{n}"}}) for n in range(4)]
        with mock.patch.object(fake, "MAX_REQUEST_STEPS", 5_000):
            self.post("/__parlel/fixtures", {"fixtures": rows})

    def test_many_choices_are_written_one_by_one(self):
        """While JSON is written no other thread runs, and somebody may ask for /health."""
        body = {"model": LLAMA, "messages": say("hi"), "n": 99, "logprobs": 2, "max_tokens": 9}
        sizes, write = [], fake.ENCODE
        with mock.patch.object(fake, "ENCODE", lambda value: sizes.append(value) or write(value)):
            chat = self.post(CHAT, body)
            completion = self.post("/v1/completions", {**body, "prompt": "hi"})
        for got in (chat, completion):
            self.assertEqual(write(got.json).encode(), got.raw)
            self.assertEqual(len(got.json["choices"]), 99)
        self.assertLess(max(len(write(value)) for value in sizes), len(completion.raw) / 9)

    def test_heavy_requests_take_turns_in_the_order_they_came(self):
        order, gate, at_once = [], threading.Event(), threading.Semaphore(0)
        counts = []

        def reply(request):
            order.append(request.path)
            counts.append(len(order))
            at_once.release()
            gate.wait(PATIENCE)
            return fake.Reply(b"{}")

        case = SocketCase()
        self.addCleanup(case.doCleanups)
        case.serve(reply)
        case.app._begin = lambda request: (
            fake.HEAVY
            if request.path.startswith("/h") and request.path != "/health"
            else fake.QUICK
        )
        case.app.reply = lambda request: (
            fake.Reply(b"{}") if request.path == "/health" else reply(request)
        )
        clients = [case.connect() for _ in range(12)]
        for number, client in enumerate(clients):
            client.sendall(get(f"/h{number}"))
            self.assertEqual(case.status(case.connect()), 200)
        for _ in range(fake.MAX_WORKERS[fake.HEAVY]):
            self.assertTrue(at_once.acquire(timeout=PATIENCE))
        self.assertEqual(len(order), fake.MAX_WORKERS[fake.HEAVY])
        gate.set()
        for client in clients:
            self.assertEqual(client.recv(15), b"HTTP/1.1 200 OK")
        self.assertEqual(sorted(order[:2]), ["/h0", "/h1"])
        self.assertEqual(len(order), 12)
        for place, path in enumerate(order):  # as far as two at once keep it
            self.assertLessEqual(abs(place - int(path[2:])), 3, order)

    def test_workers_draw_long_streams_and_end_one_before_another_begins(self):
        """Else the loop is busy for as long, and all wholes lie in memory at once."""
        case, order = SocketCase(), []
        self.addCleanup(case.doCleanups)

        def events(path):
            for _ in range(3):
                order.append((path, threading.current_thread() is case.server.threads[0]))
                yield bytes(fake.MAX_GATHERED_BYTES)

        def reply(request):
            order.append((request.path, "asked"))
            while not order[1:] and len(case.server.workers[fake.HEAVY].waiting) < 2:
                threading.Event().wait(0.001)
            return stream(events(request.path))

        with mock.patch.dict(fake.MAX_WORKERS, {fake.HEAVY: 1}):
            case.serve(reply)
            case.app._begin = lambda request: fake.HEAVY
            clients = [case.connect() for _ in range(3)]
            for number, client in enumerate(clients):
                client.sendall(get(f"/{number} ").replace(b"  HTTP/1.1", b" HTTP/1.0"))
            for client in clients:
                self.assertGreater(len(receive_all(client)), 3 * fake.MAX_GATHERED_BYTES)
        begun = [path for path, by in order if by == "asked"]
        self.assertEqual(order[:2], [(begun[0], "asked"), (begun[0], True)])
        drawn = [at for at, row in enumerate(order) if row == (begun[0], False)]
        self.assertEqual(len(drawn), 2)
        self.assertLess(drawn[0], order.index((begun[2], "asked")))

    def test_calls_that_wait_for_a_worker_end_with_the_server(self):
        server = TogetherAiServer(port=0).start()
        self.addCleanup(server.stop)
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
        for client in clients:
            self.addCleanup(client.close)
            body = json.dumps({**HELLO, "n": 99}).encode()
            client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.assertTrue(wait_until(lambda: len(server.requests) == 8))
        server.stop()
        self.assertTrue(wait_until(lambda: all(call.has_ended for call in server.requests)))

    def test_a_round_starts_one_worker_and_the_next_comes_at_once(self):
        """A new thread waits for its turn behind all others, and so does who starts it."""
        case = SocketCase()
        self.addCleanup(case.doCleanups)
        server = case.serve(start=False)
        for _ in range(3):
            server.run(fake.WAITING, int, False, int)
        with mock.patch.object(server, "start_thread") as start:
            for row in ((1, 1), (2, 1), (3, 1), (3, 0)):
                server.soon.clear()
                if server.workers[fake.WAITING].waiting:
                    server.workers[fake.WAITING].give_tasks()
                self.assertEqual((start.call_count, len(server.soon)), row)

    def test_threads_take_short_turns_while_workers_are_busy(self):
        """A loop that waits 5 ms at each system call beside heavy work answers nobody soon."""
        case, leave = SocketCase(), threading.Event()
        self.addCleanup(case.doCleanups)
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        self.assertTrue(wait_until(lambda: not fake.BUSY))  # with a test before
        sys.setswitchinterval(0.004)
        case.serve(lambda request: leave.wait(PATIENCE) and fake.Reply(b"{}"))
        clients = [case.connect(), case.connect()]
        for client in clients:
            self.assertAlmostEqual(sys.getswitchinterval(), 0.004)
            client.sendall(get("/slow"))
            self.assertTrue(wait_until(lambda: sys.getswitchinterval() < fake.TURN_SECONDS * 1.1))
            leave.set()
            client.recv(100)
            self.assertTrue(wait_until(lambda: not fake.BUSY))
            leave.clear()
        self.assertAlmostEqual(sys.getswitchinterval(), 0.004)
        client.sendall(get("/slow"))
        self.assertTrue(wait_until(lambda: fake.BUSY))
        case.server.stop()
        leave.set()
        self.assertTrue(wait_until(lambda: not fake.BUSY))
        self.assertAlmostEqual(sys.getswitchinterval(), 0.004)

    def test_heavy_requests_take_turns_behind_what_waits(self):
        """A test's function may sleep, so that each request has a thread; who computes, waits."""
        server, running, leave = TogetherAiServer(port=0), threading.Semaphore(0), threading.Event()
        server.reply(lambda request: "x", user_message="never")

        def answer(server, request):
            running.release()
            leave.wait(PATIENCE)
            return {}

        body = {"model": LLAMA, "messages": say("hi"), "n": 9}
        headers = {"authorization": "Bearer x"}
        asked = [Request("POST", CHAT, body, headers=headers) for _ in range(4)]
        pool = concurrent.futures.ThreadPoolExecutor(4)
        with mock.patch.object(fake.EXACT["POST", CHAT], "handler", answer), pool:
            for request in asked:
                self.assertEqual(server._begin(request), fake.WAITING)
                pool.submit(server.answer, request)
            for _ in range(fake.MAX_WORKERS[fake.HEAVY]):
                self.assertTrue(running.acquire(timeout=PATIENCE))
            self.assertFalse(running.acquire(timeout=0.05))
            leave.set()
        self.assertEqual([call.status for call in server.requests], [200] * 4)

    def test_a_packed_body_is_a_415_that_names_the_packing(self):
        plain = json.dumps(HELLO).encode()
        for coding, data, status in (
            ("gzip", gzip.compress(plain), 415),
            ("br", plain, 415),
            ("identity", plain, 200),
        ):
            headers = {**KEY, "Content-Type": "application/json", "Content-Encoding": coding}
            got = self.ask("POST", CHAT, data, headers)
            self.assertEqual(got.status, status, got.raw[:200])
            self.assertEqual(f"'{coding}'" in got.raw.decode(), status == 415)


class HostileFormTests(LocalCase):
    """Forms and ranges that are meant to hurt."""

    def test_commas_and_brackets(self):
        hearing, images = "/v1/audio/transcriptions", "/v1/images/generations"
        for value in ("," * 20_000, "[" * 20_000, "[" * 500 + "]" * 500, "[NaN]", "9" * 5000):
            for path, name, status in (
                (hearing, "timestamp_granularities", 200),
                (hearing, "temperature", 400),
                (hearing, "diarize", 400),
                (hearing, "x", 200),
                (images, "reference_images", 400 if value[0] != "9" else 200),
            ):
                with self.subTest(name=name, value=value[:5]):
                    fields = urllib.parse.urlencode({**VALID[f"POST {path}"], name: value})
                    headers = {**KEY, "Content-Type": "application/x-www-form-urlencoded"}
                    began = time.process_time()
                    got = self.ask("POST", path, fields.encode(), headers)
                    self.assertEqual(got.status, status, got.raw[:200])
                    self.assertLess(time.process_time() - began, PATIENCE / 4)

    def test_ranges(self):
        file = self.server.add_file(b"0123456789")
        path = f"/v1/files/{file['id']}/content"
        digits = "9" * 5000
        for asked, status, data in (
            ("bytes=5-2", 200, b"0123456789"),
            ("bytes=2-5", 206, b"2345"),
            (f"bytes=2-{digits}", 206, b"23456789"),
            (f"bytes=-{digits}", 206, b"0123456789"),
            (f"bytes={digits}-", 416, None),
            ("bytes=10-", 416, None),
        ):
            with self.subTest(asked[:12]):
                got = self.ask("GET", path, headers={**KEY, "Range": asked})
                self.assertEqual(got.status, status)
                self.assertIn(got.raw, (data, got.raw if data is None else data))


class HostileBodyTests(SocketCase):
    """What goes through the wire unharmed must not harm what is behind it."""

    def test_who_is_behind_hostile_json_is_answered(self):
        self.address = "127.0.0.1", SERVER.port
        for body in (b'{"model":"\xff"}', b"[" * 100_000 + b"]" * 100_000, b""):
            with self.subTest(body[:9]):
                data = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body + RAW_CHAT
                self.assertEqual(self.statuses(data), [400, 200])


# === Sockets ===


class SlowSenderTests(SocketCase):
    """Clients that are slow to send."""

    def test_a_request_must_arrive_in_time(self):
        self.serve().patience[fake.PARTIAL] = 0.03
        for data in (b"GET", HEALTH[:-2], RAW_CHAT[:-1], CHUNKED + b"1"):
            with self.subTest(data):
                client = self.connect()
                client.sendall(data)
                ((status, _, body),) = split_replies(receive_all(client))
                self.assertEqual(status, 408)
                self.assertIn(b"within 0.03 seconds", body)

    def test_drops_of_bytes_do_not_prolong_it(self):
        self.serve().patience[fake.PARTIAL] = 0.05
        client = self.connect()
        client.sendall(b"GET / HTTP/1.1\r\nA: ")
        replied = []

        def drip():
            with contextlib.suppress(ConnectionError):
                client.sendall(b"b")
            replied.extend(select.select([client], [], [], 0)[0])
            return replied

        self.assertTrue(wait_until(drip))
        self.assertEqual(client.recv(12), b"HTTP/1.1 408")

    def test_an_idle_connection_closes_without_a_word(self):
        server = self.serve(start=False)
        server.patience[fake.IDLE] = 0.03
        silent, other = self.connect(), self.connect()
        other.sendall(HEALTH)
        server.start()
        self.assertEqual(receive_all(silent), b"")
        self.assertEqual(len(split_replies(receive_all(other))), 1)

    def test_a_refused_client_that_stays_is_left(self):
        self.serve().patience[fake.END] = 0.03
        client = self.connect()
        client.sendall(b"\0")
        self.assertEqual(len(split_replies(receive_all(client))), 1)

        def is_left():  # what is sent to a closed socket is answered with a reset
            try:
                client.sendall(b"a")
            except ConnectionError:
                return True
            return False

        self.assertTrue(wait_until(is_left))


class CrowdTests(SocketCase):
    """Who is answered while other clients are slow, and how many threads that takes."""

    def test_who_waits_for_nobody_takes_no_time(self):
        selector = self.serve().selector
        self.assertEqual(self.status(self.connect()), 200)
        with mock.patch.object(selector, "select", wraps=selector.select) as asked:
            threading.Event().wait(0.05)
        self.assertLess(asked.call_count, 5)

    def test_where_there_is_only_select(self):
        with mock.patch.object(selectors, "DefaultSelector", selectors.SelectSelector):
            self.serve()
            clients = [self.connect() for _ in range(20)]
            for _ in range(2):
                self.assertEqual({self.status(client) for client in clients}, {200})

    def test_a_busy_handler_delays_nobody_for_long(self):
        entered, leave = threading.Event(), threading.Event()

        def reply(request):
            if not entered.is_set():
                entered.set()
                leave.wait(2 * PATIENCE)
            return fake.Reply(b"{}")

        self.serve(reply)
        self.addCleanup(leave.set)
        busy, other = self.connect(), self.connect()
        busy.sendall(HEALTH)
        self.assertTrue(entered.wait(PATIENCE))
        self.assertEqual([self.status(other) for _ in range(3)], [200] * 3)
        self.assertEqual(select.select([busy], [], [], 0)[0], [])
        leave.set()
        self.assertEqual(busy.recv(15), b"HTTP/1.1 200 OK")
        self.assertEqual(self.status(other), 200)

    def test_a_busy_handler_holds_no_reply_back(self):
        entered, gate, leave = (threading.Event() for _ in range(3))

        def reply(request):
            if request.path == "/gate":
                entered.set()
                gate.wait(PATIENCE)
            elif request.path == "/slow":
                leave.wait(2 * PATIENCE)
            return fake.Reply(b"{}")

        self.serve(reply)
        self.app.quick = ("/gate", "/quick", "/health")
        self.addCleanup(leave.set)
        first, quick, slow = (self.connect() for _ in range(3))
        self.assertEqual([self.status(client) for client in (first, quick, slow)], [200] * 3)
        first.sendall(get("/gate"))
        self.assertTrue(entered.wait(PATIENCE))
        for client, path in ((quick, "/quick"), (slow, "/slow")):  # they are served together
            client.sendall(get(path))
        gate.set()
        self.assertEqual(select.select([quick, slow], [], [], PATIENCE)[0], [quick])
        leave.set()
        self.assertEqual([client.recv(15)[-2:] for client in (quick, slow)], [b"OK", b"OK"])

    def test_a_stream_hinders_nobody(self):
        leave = threading.Event()

        def events():
            yield b"data: 1\n\n"
            leave.wait(2 * PATIENCE)
            yield b"data: [DONE]\n\n"

        def reply(request):
            return pace(events()) if request.path == "/stream" else fake.Reply(b"{}")

        self.serve(reply)
        self.addCleanup(leave.set)
        streaming, other = self.connect(), self.connect()
        streaming.sendall(get("/stream"))
        receive_until(streaming, b"1\n\n\r\n")
        self.assertEqual([self.status(other) for _ in range(3)], [200] * 3)
        leave.set()
        self.assertEqual(receive_until(streaming, b"0\r\n\r\n")[:6], b"e\r\ndat")

    def test_a_stream_is_closed_behind_a_client_that_reset_it(self):
        entered, leave, closed = (threading.Event() for _ in range(3))

        def events():
            try:
                yield b"data: 1\n\n"
                entered.set()
                leave.wait(2 * PATIENCE)
                yield b"data: 2\n\n"
            finally:
                closed.set()

        self.serve(lambda request: pace(events()))
        self.addCleanup(leave.set)
        client = self.connect()
        client.sendall(get("/stream"))
        self.assertTrue(entered.wait(PATIENCE))
        reset(client)
        self.assertTrue(wait_until(lambda: not self.server.clients))  # though a worker is busy
        leave.set()
        self.assertTrue(closed.wait(PATIENCE))

    def test_without_memory_there_is_an_answer(self):
        def reply(request):
            raise MemoryError

        self.serve(reply)
        self.assertEqual(self.status(self.connect()), 503)
        with mock.patch("traceback.format_exc", side_effect=MemoryError), mock.patch("sys.stderr"):
            self.server.call_soon(functools.partial(reply, None))  # which ends a loop's round
            self.app.reply = None
            self.assertEqual(self.status(self.connect()), 200)

    def test_a_stream_without_memory_is_a_503_or_cut(self):
        def events(count):
            yield from [b"a"] * count
            raise MemoryError

        for reply_of in (stream, pace):
            self.serve(lambda request, of=reply_of: of(events(request.path.count("x"))))
            self.assertEqual(self.status(self.connect(), get("/")), 503)
        client = self.connect()
        client.sendall(get("/xx"))
        _, _, data = receive_all(client).partition(b"\r\n\r\n")
        self.assertEqual(dechunk(data), ([b"a", b"a"], False))

    def test_who_sends_when_memory_is_out_is_told_so(self):
        self.serve()
        client = self.connect()
        self.assertEqual(self.status(client), 200)
        (connection,) = self.server.clients
        with mock.patch.object(connection, "socket", mock.Mock(wraps=connection.socket)) as wrapped:
            wrapped.recv.side_effect = [MemoryError, b""]
            self.assertEqual(self.status(client), 503)

    def test_a_call_without_memory_has_failed_in_the_record(self):
        handler = mock.patch.object(fake.EXACT["POST", CHAT], "handler", side_effect=MemoryError)
        with TogetherAiServer(port=0) as server, handler:
            client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
            for _ in range(2):
                client.request("POST", CHAT, json.dumps(HELLO), KEY)
                got = client.getresponse()
                self.assertEqual((got.status, got.headers["retry-after"]), (503, "1"))
                error = json.load(got)["error"]
                self.assertEqual(error["type"], "service_unavailable")
            client.close()
            calls = [(call.status, call.outcome, call.error) for call in server.requests]
        self.assertEqual(calls, [(503, "complete", error["message"])] * 2)

    def test_nothing_is_begun_without_spare_memory(self):
        """Python 3.11 unwinds for good where not a byte is left, and start() waits for good."""
        self.serve(lambda request: fake.Reply(b"{}"))
        with mock.patch.object(fake, "SPARE_BYTES", 2**60):
            self.assertEqual(self.status(self.connect()), 503)
            self.assertEqual(len(self.server.threads), 1)
        self.assertEqual(self.status(self.connect()), 200)
        with mock.patch.object(fake, "SPARE_BYTES", 2**60):
            self.assertEqual(self.status(self.connect()), 503)

    def test_a_server_without_clients_sleeps(self):
        with mock.patch.object(fake, "LOOK_SECONDS", 0.01):
            self.serve()
            for _ in range(2):
                client = self.connect()
                self.assertEqual(self.status(client), 200)
                self.assertTrue(self.server.timers)
                client.close()
                self.assertTrue(wait_until(lambda: not self.server.timers))

    def test_clients_that_do_not_read_hinder_nobody(self):
        self.serve(lambda request: fake.Reply(bytes(60_000)))
        deaf = [self.connect() for _ in range(3)]
        for client in deaf:
            client.settimeout(0.2)
            with contextlib.suppress(OSError):
                for _ in range(200):
                    client.sendall(HEALTH)
        self.assertEqual(self.status(self.connect()), 200)

    def test_a_client_that_does_not_read_holds_no_other_reply_back(self):
        gate, entered = threading.Event(), threading.Event()

        def reply(request):
            if request.path == "/gate":
                entered.set()
                gate.wait(PATIENCE)
            return fake.Reply(bytes(60_000) if request.path == "/large" else b"small")

        self.serve(reply)
        self.app.quick = ("/gate", "/large", "/other")
        first, deaf, *others = (self.connect() for _ in range(5))
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(80):  # replies until the deaf one's socket is full, and some more
            gate.clear()
            entered.clear()
            first.sendall(get("/gate"))
            self.assertTrue(entered.wait(PATIENCE))
            deaf.sendall(get("/large"))
            for client in others:
                client.sendall(get("/other"))
            gate.set()
            for client in (first, *others):
                receive_until(client, b"small")

    def test_too_many_clients_wait_until_one_leaves(self):
        with mock.patch.object(fake, "MAX_CONNECTIONS", 2):
            self.serve()
            first, second, third = (self.connect() for _ in range(3))
            self.assertEqual([self.status(first), self.status(second)], [200, 200])
            third.sendall(HEALTH)
            self.assertEqual(select.select([third], [], [], 0.05)[0], [])
            first.close()
            self.assertEqual(third.recv(15), b"HTTP/1.1 200 OK")

    @unittest.skipUnless(resource, "needs Unix")
    def test_too_many_open_files_keep_only_new_clients_waiting(self):
        self.serve()
        old = self.connect()
        self.assertEqual(self.status(old), 200)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as new, contextlib.redirect_stderr(io.StringIO()):
            new.settimeout(PATIENCE)
            free = os.dup(new.fileno())
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                new.connect(self.address)
                new.sendall(HEALTH)
                self.assertEqual([self.status(old) for _ in range(3)], [200] * 3)
                self.assertEqual(select.select([new], [], [], 0)[0], [])
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            self.assertEqual(new.recv(15), b"HTTP/1.1 200 OK")

    def test_a_burst_is_answered_by_few_threads(self):
        before = set(threading.enumerate())
        self.serve(lambda request: stream([b"data: 1\n\n", b"data: [DONE]\n\n"]))
        for _ in range(3 * FEW_THREADS):
            self.assertTrue(self.exchange(HEALTH).endswith(b"0\r\n\r\n"))
        clients = [self.connect() for _ in range(100)]
        for client in clients:
            client.sendall(HEALTH)
        self.assertEqual([client.recv(15) for client in clients], [b"HTTP/1.1 200 OK"] * 100)
        self.assertLessEqual(count_new_threads(before, FEW_THREADS), FEW_THREADS)

    def test_half_requests_hinder_nobody_and_leave_no_threads_behind(self):
        before = set(threading.enumerate())
        self.serve()
        clients = [self.connect() for _ in range(3 * FEW_THREADS)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\n")
        self.assertEqual(self.status(self.connect()), 200)
        for client in reversed(clients):
            self.assertEqual(self.status(client, b"Host: x\r\n\r\n"), 200)
        self.assertLessEqual(count_new_threads(before, FEW_THREADS), FEW_THREADS)


class Doubler:
    """Takes a connection over: sends back twice what it gets, and says when it is left."""

    def __init__(self):
        self.left = threading.Event()
        self.turns, self.closed, self.is_busy = [], False, False

    def on_open(self, connection):
        self.connection = connection
        connection.write(b"hello\n")

    def on_bytes(self, data):
        for line in data.splitlines(True):
            if line == b"end\n":
                self.closed = True
            elif line == b"now\n":
                self.connection.write(line)
            else:
                pause = {b"wait\n": 0.001, b"wait long\n": 60.0}.get(line, line)
                self.turns.append([pause, line, pause])

    def draw(self):
        return (piece for piece in self.turns.pop(0) if not self.closed)

    def on_close(self):
        self.left.set()
        return b"bye\n"


class HandOverTests(SocketCase):
    """A connection that a handler takes over, as for a WebSocket."""

    REQUEST = b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nUpgrade: echo\r\n\r\n"

    def serve_doubler(self):
        handler = Doubler()
        reply = fake.Reply(b"", 101, headers={"Upgrade": "echo"})
        reply.handler = handler
        self.serve(lambda request: reply)
        self.app.quick = ("/v1/realtime",)
        return handler

    def test_a_handler_writes_waits_works_and_ends(self):
        handler = self.serve_doubler()
        client = self.connect()
        client.sendall(self.REQUEST)
        head, _, said = receive_until(client, b"hello\n").partition(b"\r\n\r\n")
        self.assertTrue(head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n"), head)
        self.assertIn(b"\r\nUpgrade: echo\r\nConnection: Upgrade", head)
        self.assertEqual(said, b"hello\n")
        client.sendall(b"wait\n")
        self.assertEqual(receive_until(client, b"\n"), b"wait\n")
        client.sendall(b"ab\n")
        self.assertEqual(receive_until(client, b"ab\n" * 3), b"ab\n" * 3)
        client.sendall(b"wait long\n")
        client.sendall(b"now\n")
        self.assertEqual(receive_until(client, b"\n"), b"now\n")
        self.assertFalse(handler.left.is_set())
        client.sendall(b"end\n")
        self.assertEqual(receive_all(client), b"bye\n")
        self.assertTrue(handler.left.wait(PATIENCE))

    def test_it_is_told_that_the_client_left(self):
        handler = self.serve_doubler()
        client = self.connect()
        client.sendall(self.REQUEST + b"ab")
        receive_until(client, b"abab")
        client.close()
        self.assertTrue(handler.left.wait(PATIENCE))

    def test_it_is_told_that_the_server_stops(self):
        handler = self.serve_doubler()
        client = self.connect()
        client.sendall(self.REQUEST)
        receive_until(client, b"hello\n")
        self.server.stop()
        self.assertTrue(handler.left.is_set())
        self.assertEqual(receive_all(client), b"bye\n")


class LiveSocketTests(FakeCase):
    """Realtime sockets over real connections."""

    options = MappingProxyType({})

    def setUp(self):
        super().setUp()
        self.ended = threading.Event()
        end_call = self.server._end_call

        def note_end(*args):
            end_call(*args)
            self.ended.set()

        self.server._end_call = note_end

    def connect(self, path=VOICE, behind=b"", until=b"}}"):
        """Return a connection on which the server's first message has come."""
        client = socket.create_connection(("127.0.0.1", self.server.port), PATIENCE)
        self.addCleanup(client.close)
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {UPGRADE[name]}" for name in UPGRADE), "", ""]
        client.sendall("\r\n".join(lines).encode() + behind)
        receive_until(client, until)
        return client

    def wait_for_end(self):
        """Return the last call, once it has ended."""
        self.assertTrue(self.ended.wait(PATIENCE))
        return self.server.requests[-1]

    def test_a_frame_may_come_with_the_head(self):
        text = mask(1, b'{"type":"input_text_buffer.append","text":"Hi."}')
        client = self.connect(behind=text, until=b'audio_output.done","item_id":"tts_1"}')
        client.sendall(mask(8, b"\x03\xe8"))
        self.assertEqual(receive_all(client), b"\x88\x02\x03\xe8")
        self.assertEqual(self.wait_for_end().outcome, "complete")

    def test_a_long_message_keeps_nobody_waiting(self):
        heard = []

        def hear(session, message):
            if len(message) > fake.LONG_MESSAGE_BYTES:  # else the loop itself would ask
                heard.append(self.ask("GET", "/health").status)
            session.send({"heard": len(message)})

        with mock.patch.object(fake.VoiceSession, "hear", hear):
            client = self.connect()
            sizes = (fake.LONG_MESSAGE_BYTES + 1, 10, fake.MAX_MESSAGE_BYTES)
            client.sendall(b"".join(mask(1, b"x" * size) for size in sizes))
            told = receive_until(client, b'{"heard":%d}' % sizes[-1])
        self.assertEqual(re.findall(rb"heard\":(\d+)", told), [b"%d" % size for size in sizes])
        self.assertEqual(heard, [200, 200])

    def test_a_turn_that_pauses_keeps_nobody_waiting(self):
        self.server.reply(audio=b"ab", latency=60_000)
        client = self.connect()
        client.sendall(mask(1, b'{"type":"input_text_buffer.append","text":"Hi."}'))
        receive_until(client, b'"Hi."}')
        client.sendall(mask(9, b"ping"))
        receive_until(client, b"\x8a\x04ping")
        client.sendall(mask(8))
        self.assertEqual(receive_all(client), b"\x88\0")
        self.assertEqual(self.wait_for_end().outcome, "complete")

    def test_who_goes_on_sending_hears_why_the_socket_is_closed(self):
        self.server.fail(4503, error_after_chunks=0)
        client = self.connect()
        text = mask(1, b'{"type":"input_text_buffer.append","text":"Hello there."}')
        client.sendall(text)
        with contextlib.suppress(OSError):
            for _ in range(2000):
                client.sendall(text)
        self.assertTrue(receive_all(client).endswith(b"\x11\x97no_healthy_workers"))
        self.assertEqual(self.wait_for_end().close_code, 4503)

    def test_a_client_that_leaves_while_a_turn_is_made_is_noticed_at_once(self):
        entered, leave = threading.Event(), threading.Event()
        self.addCleanup(leave.set)

        def make(*args):
            entered.set()
            leave.wait(2 * PATIENCE)
            return b"ab"

        client = self.connect()
        with mock.patch.object(fake, "make_speech", make):
            client.sendall(mask(1, b'{"type":"input_text_buffer.append","text":"Hi."}'))
            self.assertTrue(entered.wait(PATIENCE))
            client.close()
            self.assertEqual(self.wait_for_end().outcome, "left")
            leave.set()

    def test_stop_and_a_lost_connection_end_the_call(self):
        self.connect().close()
        self.assertEqual(self.wait_for_end().outcome, "left")
        client = self.connect(REALTIME)
        self.server.stop()
        call = self.server.requests[-1]
        self.assertEqual((call.outcome, call.close_code), ("left", 1001))
        self.assertEqual(receive_all(client), b"\x88\x02\x03\xe9")


class LifeCycleTests(SocketCase):
    """From the taking of a port to stop(), which ends everything."""

    def test_a_taken_port_is_an_error_of_the_caller(self):
        port = self.serve().server_port
        with self.assertRaises(OSError) as caught:
            fake.HttpServer(("127.0.0.1", port), self.app)
        self.assertIn(caught.exception.errno, (errno.EADDRINUSE, 10048))

    def test_a_port_is_free_again_after_stop(self):
        port = self.serve().server_port
        self.exchange(HEALTH)
        for _ in range(3):
            self.server.stop()
            self.server = fake.HttpServer(("127.0.0.1", port), self.app)
            self.addCleanup(self.server.stop)
            self.server.start()
            self.assertEqual(self.statuses(HEALTH), [200])

    def test_stop_leaves_no_thread_and_no_socket(self):
        threads, descriptors = set(threading.enumerate()), list_descriptors()
        self.serve()
        clients = [self.connect() for _ in range(10)]
        for client in clients:
            self.assertEqual(self.status(client), 200)
        clients[0].sendall(RAW_CHAT[:-1])
        started = time.perf_counter()
        self.server.stop()
        self.assertLess(time.perf_counter() - started, self.server.patience[fake.PARTIAL] / 2)
        self.assertEqual(set(threading.enumerate()) - threads, set())
        self.assertEqual([receive_all(client) for client in clients], [b""] * 10)
        for client in clients:
            client.close()
        self.assertEqual(list_descriptors() - descriptors, set())
        self.server.stop()

    def test_stop_ends_a_stream_that_nobody_reads(self):
        before = set(threading.enumerate())
        self.serve(lambda request: stream(iter(lambda: bytes(65536), None)))
        client = self.connect()
        client.sendall(HEALTH)
        client.recv(1)
        self.server.stop()
        self.assertEqual(set(threading.enumerate()) - before, set())

    def test_a_handler_may_stop_the_server(self):
        before = set(threading.enumerate())
        self.serve(lambda request: self.server.stop() or fake.Reply())
        self.assertEqual(self.exchange(HEALTH), b"")
        self.server.stop()
        self.assertEqual(count_new_threads(before), 0)

    def test_a_handler_that_takes_long_may_stop_the_server(self):
        before = set(threading.enumerate())
        entered, leave = threading.Event(), threading.Event()

        def reply(request):
            if not entered.is_set():
                entered.set()
                leave.wait(2 * PATIENCE)
                self.server.stop()
            return fake.Reply()

        self.serve(reply)
        self.addCleanup(leave.set)
        busy, other = self.connect(), self.connect()
        busy.sendall(HEALTH)
        self.assertTrue(entered.wait(PATIENCE))
        self.assertEqual(self.status(other), 200)
        leave.set()
        self.assertEqual([receive_all(busy), receive_all(other)], [b"", b""])
        self.server.stop()
        self.assertEqual(count_new_threads(before), 0)

    def test_clients_that_come_while_it_stops_do_not_delay_it(self):
        for _ in range(20):
            stopper = threading.Thread(target=self.serve().stop)
            stopper.start()
            with contextlib.suppress(ConnectionError):  # it has stopped
                client = self.connect()
                client.sendall(b"GET / HTTP/1.1\r\n")  # and no more
                self.assertEqual(receive_all(client), b"")
            stopper.join(PATIENCE)
            self.assertFalse(stopper.is_alive())

    def test_stop_without_start(self):
        server = self.serve(start=False)
        server.stop()
        fake.HttpServer(self.address, self.app).stop()  # the port is free

    def test_bound_to_all_addresses(self):
        self.serve(host="0.0.0.0")
        self.address = "127.0.0.1", self.server.server_port
        self.assertEqual(self.status(self.connect()), 200)

    def test_ipv6(self):
        try:
            self.serve(host="::1")
        except OSError as error:
            self.skipTest(f"no IPv6 here: {error}")
        self.exchange(HEALTH.replace(b"Host: x", b"Host:"))
        port = self.server.server_port
        self.assertEqual(self.app.requests[0].origin, f"http://[::1]:{port}")

    def test_the_host_name_is_not_looked_up(self):
        with mock.patch("socket.getfqdn", side_effect=AssertionError("looked up")):
            self.serve()


class FairTests(SocketCase):
    """Many clients at once: each is answered, and soon."""

    def open_many(self, count):
        """Connect so many clients at once, none of which blocks; skip where the system forbids."""
        wanted = 2 * count + 200  # of this process, which holds both ends
        if resource is not None:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft < wanted and (hard < wanted and hard != resource.RLIM_INFINITY):
                self.skipTest(f"{hard} open files are too few")
            if soft < wanted:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        return [self.connect() for _ in range(count)]

    def test_each_of_a_crowd_that_asks_in_a_loop_is_answered(self):
        self.serve()
        clients = self.open_many(500)
        selector = selectors.DefaultSelector()
        self.addCleanup(selector.close)
        began, first = time.monotonic(), {}
        for client in clients:
            client.setblocking(False)
            client.sendall(HEALTH)
            selector.register(client, selectors.EVENT_READ)
        while len(first) < len(clients) and time.monotonic() < began + PATIENCE:
            for key, _ in selector.select(1):
                if key.fileobj.recv(65536):
                    first.setdefault(key.fileobj, time.monotonic() - began)
                    key.fileobj.sendall(HEALTH)  # again and again
        self.assertEqual(len(first), len(clients))
        self.assertLess(max(first.values()), PATIENCE / 2)

    @unittest.skipIf(fake.MAX_CONNECTIONS <= 2000, "select() watches 512")
    def test_2000_connections_at_once_need_few_threads(self):
        before = set(threading.enumerate())
        self.serve()
        clients = self.open_many(2000)
        for client in clients:
            client.sendall(HEALTH)
        for client in clients:
            self.assertEqual(client.recv(65536)[:15], b"HTTP/1.1 200 OK")
        self.assertLessEqual(count_new_threads(before, FEW_THREADS), FEW_THREADS)

    def crowd_out(self, send):
        """Take all places by clients that `send` leaves waiting; return the time of a good one."""
        with contextlib.ExitStack() as stack:
            for name, value in (
                ("MAX_CONNECTIONS", 8),
                ("CROWDED_SECONDS", 0.2),
            ):
                stack.enter_context(mock.patch.object(fake, name, value))
            self.serve(lambda request: fake.Reply(bytes(8 * 2**20)))
            for _ in range(8):
                send(self.connect())
            began = time.monotonic()
            client = self.connect()
            client.sendall(get("/health"))
            client.recv(100)
            return time.monotonic() - began

    def test_who_keeps_a_place_and_does_nothing_loses_it_when_all_are_taken(self):
        for name, data in (
            ("silent", b""),
            ("half a head", b"GET /hea"),
            ("half a body", POST + b"Content-Length: 57\r\n\r\n{"),
            ("a reply that nobody reads", HEALTH),
        ):
            with self.subTest(name):
                seconds = self.crowd_out(lambda client, data=data: client.sendall(data))
                self.assertLess(seconds, PATIENCE / 2)

    def test_without_a_crowd_they_keep_it(self):
        with mock.patch.object(fake, "CROWDED_SECONDS", 0.0):
            self.serve()
            client = self.connect()
            client.sendall(HEALTH[:9])
            threading.Event().wait(0.3)
            self.assertEqual(self.status(client, HEALTH[9:]), 200)


class ForeignPageTests(SocketCase):
    """What a page that a developer visits may ask of a server on the same machine."""

    @classmethod
    def setUpClass(cls):
        cls.server = TogetherAiServer(port=0).start()
        cls.addClassCleanup(cls.server.stop)
        cls.address = "127.0.0.1", cls.server.port

    def ask(self, path, method="GET", host=None, length=0, **fields):
        """Send a head alone; return status and headers of the reply."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host or f'localhost:{self.server.port}'}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        lines += ["Authorization: Bearer x", f"Content-Length: {length}", "", ""]
        client = self.connect()
        client.sendall("\r\n".join(lines).encode())
        head = receive_head(client)
        return int(head.split()[1]), head.lower()

    def test_control_routes_are_closed_to_pages_of_others(self):
        own = f"http://localhost:{self.server.port}"
        for path in ("/__parlel/requests", "/__parlel/fixtures", "/__parlel/reset"):
            method = "POST" if path.endswith("reset") else "GET"
            for origin in ("https://evil.test", "null", "http://127.0.0.1.evil.test"):
                with self.subTest(path=path, origin=origin):
                    status, head = self.ask(path, method, Origin=origin)
                    self.assertEqual(status, 403)
                    self.assertNotIn(b"access-control", head)
            for origin in (own, "http://localhost:3000", "http://127.0.0.1"):
                status, head = self.ask(path, method, Origin=origin)
                self.assertEqual(status, 200)
                self.assertIn(b"access-control-allow-origin: %b\r\n" % origin.encode(), head)
            self.assertEqual(self.ask(path, method, Sec_Fetch_Site="cross-site")[0], 403)
            self.assertEqual(self.ask(path, method)[0], 200)

    def test_what_is_stored_is_for_pages_of_this_machine(self):
        for path in ("/v1/files", "/v1/batches", "/v1//files/x", "/v1/v1/endpoints"):
            for origin, known in (
                ("https://evil.test", False),
                ("null", False),
                ("http://localhost:3000", True),
                ("https://app.test", False),
            ):
                with self.subTest(path=path, origin=origin):
                    status, head = self.ask(path, Origin=origin)
                    self.assertEqual(status != 403, known)
                    self.assertEqual(origin.encode() in head, known)
                    self.assertNotIn(b"allow-origin: *", head)
                    _, head = self.ask(path, "OPTIONS", Origin=origin)
                    self.assertEqual(b"access-control-allow-methods" in head, known)
            self.assertEqual(self.ask(path, Sec_Fetch_Site="cross-site")[0], 403)
            self.assertNotEqual(self.ask(path)[0], 403)
        for option in ("allow_origin", "allow_host"):
            with self.assertRaisesRegex(ValueError, "are lists"):
                TogetherAiServer(**{option: "https://app.test"})
        named = TogetherAiServer(port=0, allow_origin=["https://app.test"], allow_host=["fake"])
        for origin, host, status in (
            ("https://app.test", "fake:1", 200),
            ("https://app.test", "evil.test", 403),
            ("https://evil.test", "fake:1", 403),
        ):
            headers = {"authorization": "Bearer x", "origin": origin, "host": host}
            self.assertEqual(
                named.answer(Request("GET", "/v1/files", headers=headers)).status, status
            )
            reply = named.answer(Request("GET", "/__parlel/requests", headers=headers))
            self.assertEqual((reply.status, reply.reader == origin), (status, status == 200))

    def test_a_foreign_page_scripts_nothing(self):
        fixture = '{"match":{},"response":{"content":"x"}}'
        for origin, status in (("https://evil.test", 403), ("http://localhost:5173", 400)):
            fields = {"Origin": origin, "X_Parlel_Fixture": fixture}
            self.assertEqual(self.ask(CHAT, "POST", **fields)[0], status)
        self.assertEqual(self.ask(CHAT, "POST", Origin="https://evil.test")[0], 400)

    def test_a_name_that_others_point_here_is_refused(self):
        for host, status in (
            ("evil.test", 403),
            ("127.0.0.1.evil.test", 403),
            ("localhost", 200),
            ("127.0.0.1:4863", 200),
            ("127.8.8.8", 200),
            ("[::1]:4863", 200),
            ("192.168.7.9:4863", 200),
            ("[fe80::1]", 200),
            (socket.gethostname(), 200),
        ):
            with self.subTest(host=host):
                self.assertEqual(self.ask("/__parlel/requests", host=host)[0], status)
                self.assertEqual(self.ask("/v1/models", host=host)[0], 200)
                self.assertEqual(self.ask("/v1/files", host=host)[0], 200)
                got = self.ask("/v1/files", host=host, User_Agent="Mozilla/5.0 (X11)")
                self.assertEqual(got[0], status)

    def test_the_api_is_open_to_pages(self):
        status, head = self.ask("/v1/models", Origin="https://app.test")
        self.assertEqual(status, 200)
        self.assertIn(b"\r\naccess-control-allow-origin: *\r\n", head)
        self.assertIn(b"retry-after", head.partition(b"access-control-expose-headers:")[2])
        asked = {"Access_Control_Request_Private_Network": "true", "Origin": "https://app.test"}
        status, head = self.ask(CHAT, "OPTIONS", **asked)
        self.assertIn(b"\r\naccess-control-allow-private-network: true\r\n", head)
        status, head = self.ask("/__parlel/reset", "OPTIONS", Origin="https://app.test")
        self.assertNotIn(b"access-control-allow", head)

    def test_what_is_refused_is_not_read_first(self):
        for path, method, fields, status in (
            ("/__parlel/seed", "POST", {"Origin": "https://evil.test"}, 403),
            ("/__upload/unknown", "PUT", {}, 404),
        ):
            with self.subTest(path=path):
                self.assertEqual(self.ask(path, method, length=2 * 10**8, **fields)[0], status)


class CallbackTests(FakeCase):
    """What a test's own code does wrong, or slowly."""

    def raise_exit(self, *args):
        raise SystemExit("as pytest.fail() does")

    def test_a_function_that_raises_is_a_500_in_the_record(self):
        line = self.raise_exit.__code__.co_firstlineno + 1
        shown = fake.shorten_path(__file__)
        for keywords in ({"when": self.raise_exit}, {"content": self.raise_exit}):
            with self.subTest(list(keywords)):
                self.server.reset()
                self.server.reply(**{"content": "x", **keywords})
                with contextlib.redirect_stderr(io.StringIO()):
                    got = self.ask("POST", CHAT, HELLO)
                self.assertEqual((got.status, got.json["error"]["type"]), (500, "server_error"))
                call = self.server.requests[-1]
                self.assertIn("as pytest.fail() does", call.error)
                self.assertIn(f"SystemExit: as pytest.fail() does, at {shown}:{line}", call.error)
                self.assertEqual(self.ask("GET", "/health").status, 200)

    def test_functions_are_asked_once_a_request_and_keep_nobody_waiting(self):
        asked, all_there = [], threading.Barrier(10, timeout=PATIENCE)

        def wait(request):
            asked.append(request)
            all_there.wait()  # each waits for the others: one after the other they would never end
            return True

        self.server.reply("late", when=wait)
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            said = list(pool.map(lambda number: self.text(f"hello {number}"), range(10)))
        self.assertEqual((said, len(asked)), (["late"] * 10, 10))

    def test_the_record_tells_that_a_client_left_before_its_answer(self):
        entered, leave = threading.Event(), threading.Event()
        self.addCleanup(leave.set)

        def reply(request):
            entered.set()
            leave.wait(2 * PATIENCE)
            return "late"

        self.server.reply(reply)
        with socket.create_connection(("127.0.0.1", self.server.port), PATIENCE) as client:
            client.sendall(RAW_CHAT)
            self.assertTrue(entered.wait(PATIENCE))
        (call,), clients = self.server.requests, self.server._http.clients
        self.assertTrue(wait_until(lambda: any(client.has_ended for client in clients)))
        leave.set()
        self.assertTrue(wait_until(lambda: call.has_ended))
        self.assertEqual((call.status, call.outcome), (200, "left"))

    def test_who_sends_no_more_but_reads_has_not_left(self):
        """So do `nc -N` and clients of HTTP/1.0; who has left shows it when something is sent."""
        entered, leave = threading.Semaphore(0), threading.Semaphore(0)
        self.addCleanup(leave.release, 9)

        def reply(request):
            entered.release()
            leave.acquire(timeout=2 * PATIENCE)
            return "late"

        self.server.reply(reply)
        clients = self.server._http.clients
        for end, outcome in (
            (lambda client: client.shutdown(socket.SHUT_WR), "complete"),
            (reset, "left"),
            (socket.socket.close, "left"),
        ):
            with socket.create_connection(("127.0.0.1", self.server.port), PATIENCE) as client:
                client.sendall(RAW_CHAT)
                self.assertTrue(entered.acquire(timeout=PATIENCE))
                end(client)
                self.assertTrue(wait_until(lambda: all(each.has_ended for each in clients)))
                leave.release()
                if outcome == "complete":
                    self.assertIn(b"late", receive_all(client))
            call = self.server.requests[-1]
            self.assertTrue(wait_until(lambda call=call: call.has_ended))
            self.assertEqual((call.status, call.outcome), (200, outcome))

    def test_who_sends_no_more_but_reads_a_paused_stream_has_not_left(self):
        clients = self.server._http.clients
        body = {"model": LLAMA, "messages": say("hi"), "stream": True}
        data = json.dumps(body).encode()
        raw = POST + b"Content-Length: %d\r\n\r\n" % len(data) + data
        for end, outcome in (
            (lambda client: client.shutdown(socket.SHUT_WR), "complete"),
            (socket.socket.close, "left"),
        ):
            self.server.reset()
            self.server.reply("one two three", latency=100)
            with socket.create_connection(("127.0.0.1", self.server.port), PATIENCE) as client:
                client.sendall(raw)
                self.assertTrue(wait_until(lambda: self.server.requests))
                end(client)
                if outcome == "complete":
                    self.assertIn(b"[DONE]", receive_all(client))
            call = self.server.requests[-1]
            self.assertTrue(wait_until(lambda call=call: call.has_ended))
            self.assertEqual((call.status, call.outcome), (200, outcome))
        self.assertTrue(wait_until(lambda: not clients))

    def test_a_handshake_that_is_reset_while_it_waits_has_left(self):
        entered, leave = threading.Event(), threading.Event()
        self.addCleanup(leave.set)

        def when(request):
            entered.set()
            return leave.wait(2 * PATIENCE)

        self.server.reply("x", when=when)
        upgrade = "GET /v1/realtime?model=openai/whisper-large-v3 HTTP/1.1"
        with socket.create_connection(("127.0.0.1", self.server.port), PATIENCE) as client:
            client.sendall(
                b"\r\n".join(
                    [
                        upgrade.encode(),
                        b"Host: localhost",
                        b"Authorization: Bearer x",
                        b"Upgrade: websocket",
                        b"Connection: Upgrade",
                        b"Sec-WebSocket-Version: 13",
                        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                        b"",
                        b"",
                    ]
                )
            )
            self.assertTrue(wait_until(lambda: self.server.requests))
            reset(client)
        (call,) = self.server.requests
        self.assertTrue(wait_until(lambda: not self.server._http.clients))
        leave.set()
        self.assertTrue(wait_until(lambda: call.has_ended), call)
        self.assertEqual(call.outcome, "left")

    def test_a_clock_that_raises_or_stops_the_server_breaks_no_call(self):
        calls = []

        def tell():
            calls.append(1)
            if len(calls) == 2:
                self.server.stop()
            raise ValueError("no time")

        self.server = TogetherAiServer(port=0, clock=tell)
        with contextlib.redirect_stderr(io.StringIO()) as told:
            self.assertEqual(self.answer("POST", CHAT, HELLO).status, 200)
            self.server.start()
            with contextlib.suppress(OSError):  # it has stopped
                self.ask("POST", CHAT, HELLO)
            self.assertEqual(self.answer("POST", CHAT, HELLO).status, 200)
        self.assertIn("no time", told.getvalue())

    def test_stop_does_not_wait_for_a_function_that_sleeps(self):
        asked, leave = threading.Event(), threading.Event()
        self.addCleanup(leave.set)

        def sleep(request):
            asked.set()
            leave.wait(2 * PATIENCE)
            return "late"

        with TogetherAiServer(port=0) as self.server:
            self.server.reply(sleep)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(self.ask, "POST", CHAT, HELLO)
                self.assertTrue(asked.wait(PATIENCE))
                self.assertEqual(self.server.requests[-1].outcome, "running")
                began = time.monotonic()
                self.server.stop()
                self.assertLess(time.monotonic() - began, PATIENCE / 4)
                self.assertIsInstance(waiting.exception(PATIENCE), OSError)

    def test_options_that_cannot_be_are_refused(self):
        with self.assertRaisesRegex(ValueError, "record_limit must be 0 or more, not -1"):
            TogetherAiServer(record_limit=-1)
        self.assertEqual(TogetherAiServer(host="").host, "127.0.0.1")

    def test_a_client_that_hangs_up_while_the_fake_waits_is_noticed(self):
        with TogetherAiServer(port=0) as server:
            server.reply("late", latency=60_000)
            for stream in (False, True):
                body = json.dumps({**HELLO, "stream": stream}).encode()
                with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client:
                    client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                    self.assertTrue(wait_until(lambda: server.requests))
                    call = server.requests[-1]
                    self.assertEqual(call.outcome, "running")
                left = time.monotonic()
                self.assertTrue(wait_until(lambda call=call: call.outcome == "left"))
                self.assertLess(time.monotonic() - left, PATIENCE / 4)
                server.reset()
                server.reply("late", latency=60_000)

    def test_a_log_that_raises_or_hangs_delays_nobody(self):
        logged, leave = threading.Event(), threading.Event()
        self.addCleanup(leave.set)

        def hang(line):
            logged.set()
            leave.wait(2 * PATIENCE)

        for log in (self.raise_exit, hang):
            with TogetherAiServer(port=0, log=log) as self.server:
                said = {self.text() for _ in range(20)}
                self.assertEqual(len(said), 1)
                if log is hang:
                    self.assertTrue(logged.wait(PATIENCE) and not leave.is_set())
                    leave.set()


class BoundTests(FakeCase):
    """What would take all time or memory is refused, or takes little."""

    EXPLODING = ("(a+)+$", "(a|aa)+$", "(a*)*b", "(.*a){20}", "a?" * 30 + "a" * 30)

    def assertQuick(self, body):
        """Ask while a clock runs: patterns that explode take minutes."""
        began = time.monotonic()
        self.ask("POST", CHAT, body)
        self.assertLess(time.monotonic() - began, PATIENCE)

    def test_exploding_patterns_over_http_from_python_and_in_files(self):
        text = say("a" * 40 + "!")
        for pattern in self.EXPLODING:
            for add in (self.add_over_http, self.add_from_python, self.add_from_file):
                with (
                    self.subTest(pattern=pattern[:10], add=add.__name__),
                    TogetherAiServer(port=0) as self.server,
                ):
                    if add(pattern):
                        self.assertQuick({"model": "m", "messages": text})

    def add_over_http(self, pattern):
        fixtures = file_of(entry({"userMessage": {"pattern": pattern}}))
        return self.ask("POST", FIXTURES, fixtures).status == 200

    def add_from_python(self, pattern):
        return self.is_taken(lambda: self.server.reply("x", user_message=re.compile(pattern)))

    def add_from_file(self, pattern):
        with tempfile.TemporaryDirectory() as folder:
            save_fixtures(folder, a=[entry({"userMessage": {"pattern": pattern}})])
            return self.is_taken(lambda: self.server.load(folder))

    def is_taken(self, add):
        """Return whether a fixture was added; a refusal says that it is for the pattern."""
        try:
            add()
        except ValueError as error:
            self.assertIn("userMessage.pattern: must be a regular expression", str(error))
            return False
        return True

    def test_ordinary_patterns_are_matched(self):
        for pattern, text in (
            (r"(sun|moon) ?light", "by moonlight"),
            (r"^order #\d{4,6}$", "order #12345"),
            (r"(?i)\bhello\b.*world", "Say HELLO to the world"),
            (r"[\w.]+@[\w.]+\.com", "write to ann.lee@example.com now"),
        ):
            with self.subTest(pattern=pattern):
                for add in (self.add_over_http, self.add_from_python):
                    self.server.reset()
                    self.assertTrue(add(pattern))
                    self.assertIn(self.text(text), ("ok", "x"))

    def test_a_slow_pattern_delays_no_other_request(self):
        self.server.reply("x", user_message=re.compile("(a*)*b"), model="slow")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            slow = pool.submit(
                self.ask, "POST", CHAT, {"model": "slow", "messages": say("a" * 5000)}
            )
            began = time.monotonic()
            for _ in range(20):
                self.ask("POST", CHAT, HELLO)
            self.assertLess(time.monotonic() - began, PATIENCE / 2)
            self.assertEqual(slow.result(PATIENCE).status, 200)

    def test_a_large_body_keeps_nobody_waiting_for_longer_than_it_takes_to_parse(self):
        for data in (b"[" + b"[]," * 200_000 + b"0]", b"{" + b'"":0,' * 200_000 + b'"":0}'):
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                large = pool.submit(self.ask, "POST", CHAT, data)
                while not large.done():
                    began = time.monotonic()
                    self.assertEqual(self.ask("GET", "/health").status, 200)
                    self.assertLess(time.monotonic() - began, PATIENCE / 4)
                self.assertEqual(large.result().status, 400)

    def test_seeded_values_are_checked_as_posted_ones(self):
        for collection, item, place in (
            ("fine_tunes", {"n_epochs": -1}, "fine_tunes[0].n_epochs"),
            ("videos", {"fps": 10**6}, "videos[0].fps"),
            ("files", {"bytes": -1}, "files[0].bytes"),
            ("batches", {"created": 10**30}, "batches[0].created"),
            ("files", {"content": {}}, "files[0].content"),
            ("fine_tunes", {"TrainingFileSize": "x"}, "TrainingFileSize"),
            ("evaluations", {"status_updates": True}, "status_updates"),
            ("jobs", {"args": {"modelName": []}}, "modelName"),
        ):
            with self.subTest(item=item):
                self.assertRefused("/__parlel/seed", {collection: [item]}, place)
        self.assertEqual(self.json("POST", "/__parlel/seed", {"files": None}), {})
        (video,) = self.json(
            "POST", "/__parlel/seed", {"videos": [{"seconds": "999999", "size": "9x9"}]}
        )["videos"]
        self.assertEqual((video["seconds"], video["size"]), ("6", "16x16"))

    def test_objects_and_fixtures_are_as_bounded_as_the_record(self):
        with mock.patch.object(fake, "MAX_OBJECTS", 5):
            for _ in range(9):
                self.post("/v2/videos", {"model": HAILUO, "prompt": "a lake"})
            self.assertEqual(len(self.server.videos), 5)
        with mock.patch.object(fake, "MAX_FIXTURES", 3):
            for _ in range(3):
                self.server.reply("x")
            with self.assertRaisesRegex(ValueError, "at most 3 fixtures"):
                self.server.reply("x")
            got = self.ask("POST", FIXTURES, file_of(entry({})))
            self.assertIn("at most 3 fixtures", got.json["error"]["message"])

    def start_batch(self, inputs, lines):
        """Start a batch of so many lines, each of which embeds so many texts."""
        line = {"model": "BAAI/bge-base-en-v1.5", "input": ["a text"] * inputs}
        rows = [{"custom_id": str(number), "body": line} for number in range(lines)]
        file = self.server.add_file(write_lines(rows), purpose="batch-api")
        body = {"endpoint": "/v1/embeddings", "input_file_id": file["id"]}
        return self.json("POST", "/v1/batches", body, status=201)["job"]

    def test_a_batch_stops_at_the_storage_limit(self):
        with TogetherAiServer(port=0, max_stored_bytes=2**20, instant_jobs=True) as self.server:
            self.assertEqual(self.start_batch(50, 100)["status"], "FAILED")
            asked = [call for call in self.server.requests if call.batch]
            self.assertLess(len(asked), 10)  # each answer has half a MB

    def test_a_batch_stops_with_the_server(self):
        with TogetherAiServer(port=0) as self.server:
            job = self.start_batch(10, 8_000)
            path = f"/v1/batches/{job['id']}"
            self.assertEqual(self.json("GET", path)["status"], "IN_PROGRESS")
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                running = pool.submit(self.ask, "GET", path)
                self.assertTrue(wait_until(lambda: any(c.batch for c in self.server.requests)))
                began = time.monotonic()
                self.server.stop()
                self.assertLess(time.monotonic() - began, PATIENCE / 2)
                running.exception(PATIENCE)  # it has ended, with an answer or without
            failed = wait_until(lambda: self.server.batches[job["id"]]["status"] == "FAILED")
            self.assertTrue(failed)


@functools.cache
def make_certificate():
    """Return the TLS of a server on 127.0.0.1, and the file with its certificate."""
    import ssl

    key, certificate = str(COPY / "key.pem"), str(COPY / "certificate.pem")
    words = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=together.test", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", *words.split(), *names, "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


class ForkTests(FakeCase):
    """Life beside other processes and threads."""

    def test_a_child_of_a_busy_process_takes_turns_as_usual(self):
        usual = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, usual)
        names = {"BUSY": [usual, fake.TURN_SECONDS], "STARTED": set()}
        with mock.patch.multiple(fake, **names):
            sys.setswitchinterval(fake.TURN_SECONDS)
            fake.leave_parents()
            self.assertEqual((sys.getswitchinterval(), fake.BUSY), (usual, []))

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_child_process_keeps_nothing_open_and_stops_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
            with TogetherAiServer(port=0) as self.server:
                port = self.server.port
                waiting = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
                self.addCleanup(waiting.close)
                self.assertEqual(self.ask("GET", "/health").status, 200)
                reader, writer = os.pipe()
                child = os.fork()
                if child == 0:  # it must not come back into the tests
                    try:
                        self.server.stop()
                        os.close(writer)
                        os.read(reader, 1)
                    finally:
                        os._exit(0)
                try:
                    threading.Event().wait(0.2)
                    waiting.sendall(HEALTH)
                    self.assertTrue(waiting.recv(65536).startswith(b"HTTP/1.1 200"))
                    self.server.fail(disconnect_after_chunks=1)
                    got = self.ask("POST", CHAT, {**HELLO, "stream": True})
                    self.assertTrue(got.is_cut)
                    self.server.stop()
                    TogetherAiServer(port).start().stop()  # the port is free
                finally:
                    os.close(writer)
                    os.close(reader)
                    os.waitpid(child, 0)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_child_process_has_locks_of_its_own_and_knows_the_port(self):
        with warnings.catch_warnings(), TogetherAiServer(port=0) as server:
            warnings.simplefilter("ignore", DeprecationWarning)
            held = [server._lock, server.script._lock, server.files._lock, server.job_lock]
            taken, leave = threading.Event(), threading.Event()

            def hold():
                with contextlib.ExitStack() as stack:
                    for lock in held:
                        stack.enter_context(lock)
                    taken.set()
                    leave.wait(PATIENCE)

            holder = threading.Thread(target=hold)
            holder.start()
            self.assertTrue(taken.wait(PATIENCE))
            port = server.port
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    signal.alarm(int(PATIENCE))
                    request = Request("POST", CHAT, HELLO, headers={"authorization": "Bearer x"})
                    files = Request("GET", "/v1/files", headers={"authorization": "Bearer x"})
                    good = [server.answer(each).status for each in (request, files)] == [200, 200]
                    status = 0 if good and server.port == port else 2
                finally:
                    os._exit(status)
            _, status = os.waitpid(child, 0)
            leave.set()
            holder.join(PATIENCE)
            self.assertEqual(status, 0)

    @unittest.skipUnless(shutil.which("openssl"), "there is no openssl")
    def test_https(self):
        import ssl

        context, certificate = make_certificate()
        with TogetherAiServer(port=0, ssl_context=context) as server:
            self.assertEqual(server.url, f"https://127.0.0.1:{server.port}")
            silent = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
            self.addCleanup(silent.close)  # it shakes no hands, and nobody waits for it
            trusting = ssl.create_default_context(cafile=certificate)
            for text, stream in (("hi", False), ("a" * 300_000, False), ("hi", True)):
                body = json.dumps({"model": "m", "messages": say(text), "stream": stream}).encode()
                request = urllib.request.Request(f"{server.base_url}/chat/completions", body, KEY)
                with urllib.request.urlopen(request, context=trusting, timeout=PATIENCE) as reply:
                    self.assertIn(b"choices", reply.read())
            self.assertEqual(server.requests[0].headers["host"], server.url[8:])
            silent.sendall(HEALTH)  # that is no TLS
            self.assertEqual(receive_all(silent), b"")
            self.assertIn("this port speaks TLS (HTTP_REQUEST)", server.requests[-1].error)
            with self.assertRaises(urllib.error.URLError):
                urllib.request.urlopen(f"{server.url}/health", timeout=PATIENCE)
            self.assertTrue(wait_until(lambda: "UNKNOWN_CA" in server.requests[-1].error))

    def test_start_and_stop_from_many_threads(self):
        threads, descriptors = set(threading.enumerate()), list_descriptors()
        server = TogetherAiServer(port=0)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for _ in range(20):
                verbs = [server.start, server.stop] * 4
                for future in [pool.submit(verb) for verb in verbs]:
                    future.result(PATIENCE)
        server.stop()
        self.assertEqual(count_new_threads(threads), 0)
        self.assertEqual(list_descriptors() - descriptors, set())

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_port_is_free_though_a_child_has_just_been_forked(self):
        server = TogetherAiServer(port=0).start()
        port = server.port
        self.addCleanup(server._http.socket.dup().close)  # as the child has it
        server.stop()
        TogetherAiServer(port).start().stop()

    def test_where_no_thread_can_be_made_the_port_stays_free_and_one_answers(self):
        with TogetherAiServer(port=0) as server:
            port = server.port
        server = TogetherAiServer(port)
        no_thread = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("none"))
        with no_thread, self.assertRaises(RuntimeError):
            server.start()
        with server as self.server:
            self.assertEqual(server.port, port)
            server.reply(lambda request: "late")
            with no_thread:  # its only thread answers
                self.assertEqual(self.text(), "late")

    @unittest.skipUnless(shutil.which("sh"), "there is no shell")
    def test_closed_and_unread_streams(self):
        program = " ".join(PROGRAM)
        for command, said in (
            (f"{program} --routes | head -n 1", "| method | path | what it does |\n"),
            (f"{program} --routes >&-", ""),
            (f"{program} --check /nowhere >&- 2>&-", ""),
        ):
            with self.subTest(command=command):
                done = subprocess.run(
                    ["sh", "-c", command], capture_output=True, cwd=COPY, timeout=60
                )
                self.assertEqual((done.stdout.decode(), done.stderr), (said, b""))

    @unittest.skipUnless(shutil.which("sh"), "there is no shell")
    def test_it_answers_though_nobody_reads_its_log(self):
        program = f"exec {' '.join(PROGRAM)} --port 0 2>&1"
        pipes = {"stdout": subprocess.PIPE, "start_new_session": True}
        with subprocess.Popen(["sh", "-c", program], cwd=COPY, **pipes) as process:
            try:
                self.port = int(process.stdout.readline().split(b":")[-1])
                process.stdout.close()  # as head -n 1 does
                for _ in range(20):
                    connection = http.client.HTTPConnection(
                        "127.0.0.1", self.port, timeout=PATIENCE
                    )
                    with contextlib.closing(connection):
                        connection.request("GET", "/v1/models", headers=KEY)
                        self.assertEqual(connection.getresponse().status, 200)
                process.terminate()
                self.assertEqual(process.wait(PATIENCE), 0)
            finally:
                process.kill()

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no FIFOs here")
    def test_a_fifo_or_a_dangling_link_among_fixtures_is_passed_over(self):
        with tempfile.TemporaryDirectory() as folder:
            save_fixtures(folder, a=[entry({})])
            os.mkfifo(os.path.join(folder, "b.json"))
            os.symlink("nowhere", os.path.join(folder, "c.json"))
            self.assertEqual(len(fake.load_fixtures(folder)), 1)
            for path in (os.path.join(folder, "b.json"), os.devnull):
                with self.subTest(path), self.assertRaisesRegex(ValueError, "neither a file nor"):
                    fake.load_fixtures(path)


# === Server ===


# What clients of Together and OpenAI read: .ci/reach.py tries it.
VARIABLES = {
    *("TOGETHER_API_KEY", "TOGETHER_BASE_URL", "TOGETHER_PROJECT_ID", "TOGETHER_API_BASE"),
    *("TOGETHER_AI_API_BASE", "TOGETHERAI_API_BASE", "TOGETHERAI_API_KEY"),
    *("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE"),
}


class ServerTests(unittest.TestCase):
    def test_addresses(self):
        server = TogetherAiServer()
        server._http = mock.Mock(server_port=server.port)  # as if it listened
        self.assertEqual(server.url, "http://127.0.0.1:4863")
        self.assertEqual(server.base_url, "http://127.0.0.1:4863/v1")
        project = server.env["TOGETHER_PROJECT_ID"]
        self.assertTrue(project)
        for name, value in server.env.items():
            expected = "parlel-together" if name.endswith("_KEY") else server.base_url
            self.assertEqual(value, project if name.endswith("_ID") else expected, name)
        self.assertEqual(set(server.env), VARIABLES)

    def test_restarting(self):
        server = TogetherAiServer(port=0)
        for _ in range(3):
            with server as started:
                self.assertIs(started, server)
                with socket.create_connection(("127.0.0.1", server.port)):
                    pass
        server.stop()


# === Command line ===


def run_main(*args):
    """Return the status of a command that ends by itself, and what it prints and logs."""
    printed, log = io.StringIO(), mock.patch.object(fake, "print_line")
    with log as logged, contextlib.redirect_stdout(printed):
        status = fake.main(args)
    return status, printed.getvalue(), "".join(f"{call.args[0]}\n" for call in logged.mock_calls)


class CommandLineTests(unittest.TestCase):
    @contextlib.contextmanager
    def start(self, *command, **variables):
        """Start a program that reads no input; end it at the latest with the test."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        pipes["env"] = {**os.environ, **variables}
        with subprocess.Popen(command, text=True, cwd=COPY, **pipes) as program:
            try:
                yield program
            finally:
                program.kill()

    def test_every_option_says_what_it_does(self):
        with self.start(*PROGRAM, "--help", COLUMNS="200") as program:
            told, _ = program.communicate(timeout=PATIENCE)
        options = re.findall(r"(?m)^  (--[a-z-]+)(?: [A-Z_]+| [.]{3})?(?:\n)? +(\S.+)", told)
        self.assertGreater(len(options), 20)
        for option, help in options:
            self.assertRegex(help, r"^[A-Za-z0-9].* ", option)

    def test_a_signal_that_windows_cannot_send(self):
        """Popen.send_signal() knows SIGTERM and console events there."""
        handlers = []

        def wait():
            handlers[0](signal.SIGINT, None)
            return 3

        process = mock.MagicMock()
        process.__enter__.return_value = process
        process.send_signal.side_effect = ValueError("Unsupported signal: 2")
        process.wait = wait
        with (
            mock.patch("subprocess.Popen", return_value=process),
            mock.patch.object(fake, "catch_signals", handlers.append),
            mock.patch.object(os, "isatty", return_value=False),
        ):
            self.assertEqual(fake.run_command(fake.TogetherAiServer(port=0), ["x"]), 3)
        process.send_signal.assert_called_once()

    def test_it_says_where_it_listens_and_stops_cleanly(self):
        # As a shell has the commands that a script leaves in the background.
        ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGINT, ignored)
        endings = [
            (signal.SIGINT, ("--port", "0"), {}, True),
            (signal.SIGTERM, ("--port=0", "--quiet"), {}, False),
        ]
        if os.name == "posix":  # nohup has it ignored, and so would the program
            hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
            self.addCleanup(signal.signal, signal.SIGHUP, hang_up)
            endings.append((signal.SIGHUP, (), {"TOGETHER_FAKE_PORT": "0"}, True))
        before = sum(os.times()[2:4])
        for number, flags, variables, logs in endings:
            with self.start(*PROGRAM, *flags, **variables) as program:
                first = program.stdout.readline()
                url = re.search(r"listens on (http://127\.0\.0\.1:\d+)\n", first).group(1)
                with self.assertRaises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(url + "/v1/models?api_key=sesame", timeout=PATIENCE)
                caught.exception.close()
                self.assertEqual(caught.exception.code, 401)
                program.send_signal(number)
                printed = program.stdout.read()
                _, log = program.communicate(timeout=PATIENCE)
                self.assertEqual(program.returncode, 0)
                exports = dict(re.findall("^export (.+?)=(.+)$", printed, re.M))
                self.assertEqual(set(exports), VARIABLES)
                self.assertEqual(exports["TOGETHER_API_KEY"], "parlel-together")
                for name in ("TOGETHER_BASE_URL", "OPENAI_BASE_URL"):
                    self.assertEqual(exports[name], url + "/v1")
                line = r'"GET /v1/models\?api_key=\*\*\*" 401 \d+\.\d ms\n$'
                pattern = r"^\d{4}-\d\d-\d\dT[\d:.]{12}Z " + line
                self.assertRegex(log, pattern if logs else "^$")
        seconds = (sum(os.times()[2:4]) - before) / len(endings)
        said = json.loads((HERE / "manifest.json").read_text("utf-8"))["startup_time_ms"]
        # Ten times as long is left for debug builds and slow machines.
        self.assertLess(seconds, 10 * said / 1000)

    def test_every_option_may_be_a_variable_and_a_flag_wins(self):
        def read(args=(), **variables):
            variables = {f"TOGETHER_FAKE_{name}": value for name, value in variables.items()}
            with mock.patch.dict(os.environ, variables):
                return vars(fake.read_options(args))

        for name, value, option in (
            ("HOST", "0.0.0.0", "0.0.0.0"),
            ("PORT", "7", 7),
            ("STRICT", "1", True),
            ("STRICT", "false", False),
            ("NO_AUTH", "yes", True),
            ("FIXTURES", os.pathsep.join(("a.json", "b")), ["a.json", "b"]),
            ("ON_MISS", "error", "error"),
            ("UPSTREAM", "http://127.0.0.1:1", "http://127.0.0.1:1"),
            ("RECORD", "r.json", "r.json"),
            ("INSTANT_JOBS", "1", True),
            ("MAX_STORED_BYTES", "5", 5),
            ("RECORD_LIMIT", "6", 6),
            ("SEED", "8", 8),
            ("QUIET", "1", True),
            ("WATCH", "1", True),
        ):
            with self.subTest(name):
                self.assertEqual(read(**{name: value})[name.lower()], option)
        self.assertEqual(read(["--port", "8", "--on-miss", "generate"], PORT="7")["port"], 8)
        self.assertEqual(read(["--fixtures", "c"], FIXTURES="a")["fixtures"], ["c"])

    def test_a_line_of_the_log_tells_what_was_answered(self):
        lines = []
        with TogetherAiServer(port=0, log=lines.append) as server:
            server.reply("Hi!", user_message="hello")
            body = json.dumps({**HELLO, "stream": True}).encode()
            request = urllib.request.Request(f"{server.base_url}/chat/completions", body, KEY)
            urllib.request.urlopen(request).read()
            self.assertTrue(wait_until(lambda: lines))
        time, said = lines[0].split(" ", 1)
        self.assertRegex(time, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z$")
        for part in (f'"POST {CHAT}" 200', LLAMA, "7 tokens", "reply() at "):
            self.assertIn(part, said)

    @unittest.skipUnless(hasattr(signal, "SIGKILL"), "needs Unix")
    def test_signals_that_come_early_or_twice_end_it_quietly(self):
        code = (
            "import os, signal, together_fake as fake\n"
            "def early(self):\n"
            "    os.kill(os.getpid(), signal.SIGINT)\n"
            "    return start(self)\n"
            "start, fake.TogetherAiServer.start = fake.TogetherAiServer.start, early\n"
            "def late(self):\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    stop(self)\n"
            "    os.kill(os.getpid(), signal.SIGINT)\n"
            "stop, fake.TogetherAiServer.stop = fake.TogetherAiServer.stop, late\n"
            "print(fake.main(['--port', '0', '--quiet']))\n"  # it returns
            "os.kill(os.getpid(), signal.SIGTERM)"
        )
        with self.start(*PYTHON, "-c", code) as program:
            printed, told = program.communicate(timeout=PATIENCE)
        self.assertEqual((program.returncode, told), (0, ""))
        self.assertEqual(printed.split("\n")[-2:], ["0", ""])

    def test_empty_variables_count_as_none(self):
        empty = dict.fromkeys(("PORT", "HOST", "FIXTURES", "SEED", "STRICT"), "")
        with mock.patch.dict(os.environ, {f"TOGETHER_FAKE_{name}": "" for name in empty}):
            options = fake.read_options(())
        self.assertEqual((options.port, options.host), (4863, "127.0.0.1"))
        self.assertEqual((options.fixtures, options.seed, options.strict), ([], 0, False))

    def test_what_cannot_begin_is_one_line(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            url = ("--upstream", "http://127.0.0.1:1")
            for options, said in (
                (
                    ("--port", port, "--run", "x"),
                    f"port {port} is taken; port 0 takes any free one",
                ),
                (("--run", "no-such-command"), "'no-such-command'"),
                (("--fixtures", str(HERE / "nowhere.json")), r"nowhere\.json'?"),
                (("--record", "x.json"), "record needs an upstream"),
                (("--upstream", "nowhere"), "must be an http:// or https:// URL"),
                ((*url, "--record", str(COPY)), "is no file"),
            ):
                with self.subTest(options):
                    status, printed, logged = run_main(*options)
                    self.assertEqual((status, printed), (1, ""))
                    self.assertRegex(logged, f"^cannot begin: .*{said}.*\n$")

    def test_the_version_tells_a_copy_that_was_changed(self):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copy2(HERE / "together_fake.py", folder))
            unstamped = copy.read_text("utf-8").replace(f'"{fake.RELEASED}"', '""', 1)
            digest = hashlib.sha256(unstamped.encode()).hexdigest()
            stamped = unstamped.replace('RELEASED = ""', f'RELEASED = "{digest}"', 1)
            for source, state in ((stamped, "as released"), (stamped + "# mine\n", "modified")):
                with self.subTest(state):
                    copy.write_text(source, "utf-8")
                    with mock.patch.multiple(fake, __file__=str(copy), RELEASED=digest):
                        _, printed, _ = run_main("--version")
                    whole = hashlib.sha256(copy.read_bytes()).hexdigest()
                    said = f"together_fake {fake.__version__}, {state}, sha256 {whole}\n"
                    self.assertEqual(printed, said)

    def test_a_misspelt_variable_is_named(self):
        variables = {"TOGETHER_FAKE_PROT": "0", "TOGETHER_FAKE_PORT": "1"}
        with mock.patch.dict(os.environ, variables):
            _, _, logged = run_main("--version")
        said = "nothing reads the variable TOGETHER_FAKE_PROT, did you mean TOGETHER_FAKE_PORT?\n"
        self.assertEqual(logged, said)

    def test_each_option_reaches_the_server(self):
        for args, name, value in (
            ("", "require_auth", True),
            ("--no-auth", "require_auth", False),
            ("", "read_prompts", True),
            ("--no-read-prompts", "read_prompts", False),
            ("", "warnings", "record"),
            ("--strict-scripts", "warnings", "error"),
            ("--strict", "strict", True),
            ("--instant-jobs", "instant_jobs", True),
            ("--on-miss=error", "on_miss", "error"),
            ("--on-miss=chat,image", "on_miss", {"chat": "error", "image": "error"}),
            ("--host=127.0.0.2", "host", "127.0.0.2"),
            ("", "port", fake.DEFAULT_PORT),
            ("--port=7", "port", 7),
            ("--run x", "port", 0),
            ("--port=7 --run x", "port", 7),
            ("--record-limit=7", "record_limit", 7),
            ("--max-stored-bytes=7", "max_stored_bytes", 7),
        ):
            with self.subTest(args=args, name=name):
                server = fake.build_server(fake.read_options(args.split()))
                self.assertEqual(getattr(server, name), value)
        for args, logs in (("", True), ("--quiet", False), ("--run x", False)):
            server = fake.build_server(fake.read_options(args.split()))
            self.assertEqual(server.log is not None, logs, args)
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said:
            fake.read_options(["--run"])
        self.assertIn("--run needs a command", said.getvalue())

    def test_a_command_is_run_beside_the_server(self):
        code = (
            "import os, sys, urllib.request as r; url = os.environ['TOGETHER_BASE_URL']\n"
            "good = r.urlopen(url[:-3] + '/health').status == 200 and '--port' in sys.argv\n"
            "sys.exit(7 if good else 1)"
        )
        with mock.patch.object(fake, "catch_signals"):
            told = run_main("--on-miss", "error", "--run", *PYTHON, "-c", code, "--port")
        self.assertEqual(told, (7, "", ""))

    @unittest.skipUnless(os.name == "posix", "needs signals")
    def test_a_command_gets_the_signals(self):
        code = (
            "import os, signal, urllib.request as r; url = os.environ['TOGETHER_BASE_URL']\n"
            "signal.signal(signal.SIGTERM, lambda *_: os._exit(5))\n"
            "headers = {'Authorization': 'Bearer x'}\n"
            'data = b\'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}\'\n'
            "try: r.urlopen(r.Request(url + '/chat/completions', data, headers))\n"
            "except OSError: print('missed', flush=True)\n"
            "signal.pause()"
        )
        with self.start(*PROGRAM, "--on-miss=error", "--run", *PYTHON, "-c", code) as program:
            self.assertEqual(program.stdout.readline(), "missed\n")
            program.send_signal(signal.SIGTERM)
            _, logged = program.communicate(timeout=PATIENCE)
        self.assertEqual(program.returncode, 5)
        self.assertRegex(
            logged, r"^answered by no fixture:\n  <Call 1: POST /v1/chat/completions -> "
        )


# === Test runners ===


def ask_openly(text):
    """Ask as a program does that knows the environment alone."""
    answer = StandIn().create(model=LLAMA, messages=say(text))
    return answer.choices[0].message.content


class TestCaseTests(unittest.TestCase):
    """TogetherTestCase."""

    def run_case(self, *bases, options=MappingProxyType({}), **members):
        """Run the tests of a class; return the texts of its failures, and how many tests ran."""
        members["__module__"] = "elsewhere"  # which has no fixtures of a module
        case = type("Case", (fake.TogetherTestCase, *bases), members, **options)
        result = unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())
        return [text for _, text in result.failures + result.errors], result.testsRun

    def test_each_test_has_a_fresh_server_and_its_environment(self):
        servers = []

        def test(case):
            self.assertEqual(case.server.requests, [])
            case.server.reply("Hi!", user_message="hello")
            self.assertEqual(ask_openly("hello"), "Hi!")
            self.assertEqual(os.environ["OPENAI_CUSTOM_HEADERS"], f"X-Test-Id: {case.id()}")
            servers.append(case.server)

        with mock.patch.dict(os.environ, OPENAI_BASE_URL="before"):
            failures, count = self.run_case(test_a=test, test_b=test)
            self.assertEqual(os.environ["OPENAI_BASE_URL"], "before")
        self.assertNotIn("OPENAI_CUSTOM_HEADERS", os.environ)
        self.assertEqual((failures, count, len(set(servers))), ([], 2, 1))
        self.assertIn("stopped", repr(servers[0]))

    def test_failures_tell_what_the_server_knows(self):
        def fail(case):
            case.server.reply("Hi!", user_message="hello")
            case.assertEqual(ask_openly("good-bye"), "Hi!")

        def fail_inside(case):
            with case.subTest("inside"):
                fail(case)

        async def fail_later(case):
            fail(case)

        alone = [{"test_it": fail}, {"test_it": fail_inside}]
        for bases, members in (
            *(((), each) for each in alone),
            ((unittest.IsolatedAsyncioTestCase,), {"test_it": fail_later}),
        ):
            with self.subTest(members=members):
                (text,), _ = self.run_case(*bases, **members)
                for part in (
                    "answered by no fixture:\n",
                    'user_message "good-bye" does not contain "hello"',
                    "never served:\n",
                ):
                    self.assertIn(part, text)

    def test_a_failure_of_which_the_server_knows_nothing(self):
        (text,), _ = self.run_case(test_it=lambda case: case.fail("own words"))
        self.assertRegex(text, r"own words\n$")

    def test_options_are_those_of_the_class(self):
        def test(case):
            case.assertTrue(case.server.strict)

        self.assertEqual(self.run_case(test_it=test, options={"strict": True}), ([], 1))

    def test_a_class_that_is_skipped_starts_nothing(self):
        skipped = {"__unittest_skip__": True, "__unittest_skip_why__": "for now"}
        with mock.patch.object(TogetherAiServer, "start") as start:
            self.assertEqual(self.run_case(test_it=print, **skipped)[0], [])
        start.assert_not_called()

    def test_neither_test_runners_nor_types_are_imported_with_the_file(self):
        code = (
            "import sys; sys.modules['typing_extensions'] = None\n"  # which only mypy needs
            "import together_fake; print({'unittest', 'pytest'} & set(sys.modules))"
        )
        done = subprocess.run(
            [*PYTHON, "-c", code], cwd=COPY, capture_output=True, timeout=3 * PATIENCE
        )
        self.assertEqual((done.stdout, done.stderr), (b"set()\n", b""))
        with self.assertRaisesRegex(AttributeError, "no attribute 'TogetherTestCas'"):
            fake.TogetherTestCas  # noqa: B018


class ExplainTests(LocalCase):
    def test_nothing_is_to_be_told(self):
        self.text()  # generated, since there are no fixtures
        self.assertEqual(self.server.explain(), "")

    def test_misses_unused_fixtures_and_warnings(self):
        self.server.reply("Hi!", user_message="hello")
        self.text("hello", odd=1)
        self.text("good-bye")
        self.ask("POST", CHAT, {"model": LLAMA})
        self.ask("GET", "/v1/models")  # which no fixture answers
        self.server.reply("Bye!", user_message="bye-bye")
        told = self.server.explain()
        for number, part in enumerate(("<Call 2:", "<Call 3:", "Bye!", "<Call 1:")):
            with self.subTest(part):
                place = told.index(part)
                title = ("answered by no fixture", "answered by no fixture", "never", "warnings")
                self.assertIn(title[number], told[:place])
        self.assertRegex(told, r'<Call 2: .*\n    \S+.*user_message "good-bye" does not contain')
        self.assertRegex(told, r"<Call 3: .*\n    .*messages")
        self.assertIn("nothing reads odd", told)
        self.assertNotIn("<Call 4:", told)


# === The repository ===


class StandIn:
    """As much of an OpenAI client as the README's snippets use, where none is installed."""

    def __init__(self, base_url=None, api_key="x"):
        self.url = (base_url or os.environ["OPENAI_BASE_URL"]) + "/chat/completions"
        self.headers = {"Authorization": f"Bearer {api_key}"}
        self.chat = self.completions = self

    def create(self, **body):
        for _ in range(3):
            request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
            try:
                with urllib.request.urlopen(request, timeout=10) as response:
                    return json.load(response, object_hook=lambda o: types.SimpleNamespace(**o))
            except urllib.error.HTTPError as error:
                error.close()
        raise AssertionError("three tries failed")


def run_snippet(snippet):
    """Run Python of the README in a namespace of its own, and the tests that it declares."""
    modules = {"openai": types.SimpleNamespace(OpenAI=StandIn), "pytest": mock.MagicMock()}
    for name in modules:
        with contextlib.suppress(ImportError):
            modules[name] = importlib.import_module(name)
    names = {"__name__": "readme"}
    with mock.patch.dict(sys.modules, modules), contextlib.redirect_stdout(io.StringIO()):
        exec(compile(snippet, "README.md", "exec"), names)
        for case in names.values():
            if getattr(case, "__module__", "") == "readme" and hasattr(case, "setUpClass"):
                result = unittest.defaultTestLoader.loadTestsFromTestCase(case).run(
                    unittest.TestResult()
                )
                assert result.testsRun and result.wasSuccessful(), result.errors + result.failures


# === Upstream and recording ===


class Service:
    """An upstream that does with each connection what a function does.

    received  each request, head and body
    """

    def __init__(self, act, tls=None):
        self.act = act
        self.tls = tls
        self.received = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self.listener.getsockname()[1]}"
        self.stopping = False
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while True:
            client, _ = self.listener.accept()
            client.settimeout(PATIENCE)
            with contextlib.suppress(OSError), client:
                if self.stopping:
                    return
                self.serve(self.tls.wrap_socket(client, server_side=True) if self.tls else client)

    def serve(self, client):
        with client:
            data, size = b"", 0
            while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < size:
                piece = client.recv(65536)
                if not piece:
                    return
                data += piece
                found = re.search(rb"(?i)content-length: (\d+)", data)
                size = int(found.group(1)) if found else 0
            head, _, body = data.partition(b"\r\n\r\n")
            self.received.append((head, body))
            self.act(client)

    def close(self):
        self.stopping = True
        socket.create_connection(self.listener.getsockname()).close()
        self.thread.join()
        self.listener.close()


OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
EVENTS_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def chunk(data):
    """Return bytes as a chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def send(data):
    """Return what makes a service send these bytes and close."""
    return lambda client: client.sendall(data)


class UpstreamCase(FakeCase):
    """A test of a server that stands before the one that all tests share, or before another."""

    def setUp(self):
        super().setUp()
        self.service = self.server
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.file = self.folder / "recorded.json"

    def run_server(self, **options):
        """Ask a server with these options from now on."""
        self.server = TogetherAiServer(port=0, **options).start()
        self.addCleanup(self.server.stop)

    def stand_before(self, upstream="", **options):
        """Ask a server from now on that asks another one."""
        self.run_server(upstream=upstream or self.service.base_url, **options)

    def stand_before_service(self, act, tls=None, **options):
        """Ask a server from now on whose upstream does what a function does; return that one."""
        service = Service(act, tls)
        self.addCleanup(service.close)
        self.stand_before(service.url, **options)
        self.addCleanup(self.server.stop)  # before the service, which serves one at a time
        return service

    def replay(self, **options):
        """Ask a server from now on that has the recorded file alone; none of it is unknown."""
        if self.server is not self.service:
            self.server.stop()
        self.run_server(on_miss=dict.fromkeys(fake.OPERATIONS, "error"), **options)
        self.server.load(self.file)

    def read_entries(self):
        """Return what is in the recorded file."""
        return json.loads(self.file.read_text("utf-8"))["fixtures"]

    def wait_for_entries(self, count):
        """Wait until this many entries are in the file, and return them."""
        ready = wait_until(lambda: self.file.exists() and len(self.read_entries()) >= count)
        self.assertTrue(ready, f"no {count} entries came")
        return self.read_entries()


class UpstreamTests(UpstreamCase):
    def test_the_clients_own_request_arrives(self):
        service = self.stand_before_service(send(OK_HEAD + b"Content-Length: 2\r\n\r\n{}"))
        headers = {"Authorization": "Bearer own-key", "X-Mine": "1", "Accept-Encoding": "br"}
        body = json.dumps({**HELLO, "unheard_of": [1.0, 2]}, indent=1).encode()
        self.post(CHAT + "?a=b%20c", body, {**headers, "Content-Type": "application/json"})
        ((head, sent),) = service.received
        first, *lines = head.decode().rstrip().split("\r\n")
        self.assertEqual((first, sent), (f"POST {CHAT}?a=b%20c HTTP/1.1", body))
        got = {line.partition(":")[0].lower(): line.partition(": ")[2] for line in lines}
        self.assertEqual((got["authorization"], got["x-mine"]), ("Bearer own-key", "1"))
        self.assertEqual(got["host"], service.url.partition("//")[2])
        self.assertNotEqual(got.get("accept-encoding"), "br")  # it could not be recorded

    def test_an_answer_that_nobody_takes_is_closed(self):
        self.stand_before_service(send(OK_HEAD + b"Content-Length: 2\r\n\r\n{}"))
        gc.collect()  # what other tests left
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            request = Request("POST", CHAT, HELLO, headers={"authorization": "Bearer x"})
            self.server.answer(request).events.close()
            gc.collect()
        self.assertEqual([str(each.message) for each in warned], [])
        self.assertEqual(self.server.requests[0].outcome, "left")

    def test_what_comes_back_is_passed_on_as_it_is(self):
        odd = (
            b"HTTP/1.1 418 Odd\r\nContent-Type: text/odd\r\nX-Request-Id: 7\r\nSet-Cookie: a=b\r\n"
        )
        self.stand_before_service(send(odd + b"Content-Length: 5\r\n\r\n\xff\x00odd"))
        got = self.ask("POST", CHAT, HELLO)
        self.assertEqual((got.status, got.raw), (418, b"\xff\x00odd"))
        self.assertEqual(
            (got.headers["content-type"], got.headers["x-request-id"]), ("text/odd", "7")
        )
        self.assertEqual(self.server.requests[0].fixture, "upstream")

    def test_the_upstream_knows_more_than_this_server(self):
        service = self.stand_before_service(send(OK_HEAD + b"Content-Length: 2\r\n\r\n{}"))
        for method, path in (
            ("POST", "/v1/brand/new"),
            ("PUT", "/v1/models"),
            ("GET", "/v2/else"),
            ("DELETE", "/v1/files/a%2Fb"),
        ):
            with self.subTest(path=path):
                self.assertEqual(self.ask(method, path).json, {})
                self.assertTrue(service.received[-1][0].startswith(f"{method} {path} ".encode()))

    def test_answers_are_those_of_the_upstream(self):
        calls = [(CHAT, HELLO), (CHAT, {**HELLO, "stream": True}), (CHAT, {}), ("/v1/nothing", {})]
        calls += [("/v1/audio/speech", SPEECH), ("/v1/embeddings", {"model": "m", "input": "x"})]
        theirs = [self.ask("POST", *call) for call in calls]
        self.stand_before()
        for call, wanted in zip(calls, theirs):
            with self.subTest(call=call):
                got = self.ask("POST", *call)
                self.assertEqual((got.status, got.raw), (wanted.status, wanted.raw))
                self.assertEqual(got.headers["content-type"], wanted.headers["content-type"])

    def test_its_address_may_have_a_path(self):
        service = self.stand_before_service(send(OK_HEAD + b"Content-Length: 2\r\n\r\n{}"))
        for end, path in (("", CHAT), ("/v1", CHAT), ("/v1/", CHAT), ("/team/v1", "/team" + CHAT)):
            with self.subTest(end=end):
                self.stand_before(service.url + end)
                self.post(CHAT, HELLO)
                self.assertTrue(service.received[-1][0].startswith(f"POST {path} ".encode()))

    def test_an_event_arrives_before_the_next_one_is_sent(self):
        seen = threading.Event()

        def act(client):
            client.sendall(EVENTS_HEAD + chunk(b"data: 1\n\n"))
            if seen.wait(PATIENCE):
                client.sendall(chunk(b"data: 2\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

        self.stand_before_service(act, record=self.file)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("POST", CHAT, json.dumps({**HELLO, "stream": True}), KEY)
            response = connection.getresponse()
            self.assertEqual(response.read(9), b"data: 1\n\n")
            seen.set()
            self.assertEqual(response.read(), b"data: 2\n\ndata: [DONE]\n\n")

    def test_fixtures_go_before_it(self):
        self.stand_before()
        own = self.server.reply("mine", user_message="ours")
        self.assertEqual(self.text("ours"), "mine")
        scripted = {**KEY, "X-Parlel-Fixture": '{"content": "also mine"}'}
        got = self.post(CHAT, HELLO, scripted).json
        self.assertEqual(got["choices"][0]["message"]["content"], "also mine")
        self.assertEqual(self.service.requests, [])
        self.text("theirs")
        self.assertEqual(len(self.service.requests), 1)
        sources = [call.fixture for call in self.server.requests]
        self.assertEqual(sources, [own.source, "header", "upstream"])

    def test_a_failure_is_told_and_not_recorded(self):
        line = b"X-Many: 1\r\n"
        for name, act, reason in (
            ("no answer", send(b""), "it closed the connection within"),
            ("no HTTP", send(b"SSH-2.0-OpenSSH_9.2\r\n"), "its answer is not HTTP"),
            ("no status", send(b"HTTP/1.1 yes\r\n\r\n"), "its answer is not HTTP"),
            ("cut head", send(b"HTTP/1."), "it closed the connection within"),
            ("head cut after its first line", send(OK_HEAD), "it closed the connection within"),
            ("head cut in a line", send(OK_HEAD[:-9]), "it closed the connection within"),
            ("head cut after an early one", send(b"HTTP/1.1 103 Early\r\n\r\n"), "it closed"),
            ("endless line", send(b"HTTP/1.1 200 " + b"K" * 70000), "its answer is not HTTP"),
            ("many headers", send(OK_HEAD + line * 200 + b"\r\n"), "its answer is not HTTP"),
            ("stall", lambda client: client.recv(1), "nothing came from it within 0.2 seconds"),
            ("drip", drip, "nothing came from it within 0.2 seconds"),
        ):
            seconds = 0.2 if name in ("stall", "drip") else PATIENCE
            with self.subTest(name), mock.patch.object(fake, "UPSTREAM_SECONDS", seconds):
                service = self.stand_before_service(act, record=self.file)
                got = self.ask("POST", CHAT, HELLO)
                self.assertEqual((got.status, got.json["error"]["type"]), (502, "server_error"))
                self.assertIn(
                    f"The upstream {service.url} does not answer: {reason}",
                    got.json["error"]["message"],
                )
                self.assertEqual(self.server.requests[0].error, got.json["error"]["message"])
                self.server.stop()
                self.assertFalse(self.file.exists())

    def test_nobody_listens_there(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        self.stand_before(f"http://127.0.0.1:{port}")
        message = self.ask("POST", CHAT, HELLO).json["error"]["message"]
        self.assertIn("does not answer: Connection refused", message)

    def test_a_body_that_does_not_come_whole_is_cut_here_too(self):
        size = OK_HEAD + b"Content-Length: 50\r\n\r\n"
        first = chunk(b"data: 1\n\n")
        for name, act in (
            ("shorter than said", send(size + b'{"a": ')),
            ("stream cut", send(EVENTS_HEAD + first)),
            ("stream cut in a chunk", send(EVENTS_HEAD + first + b"ff\r\ndata")),
            ("chunk without a size", send(EVENTS_HEAD + first + b"zz\r\n")),
            ("stall", lambda client: (client.sendall(size + b'{"a": '), client.recv(1))),
        ):
            seconds = 0.2 if name in ("stall", "drip") else PATIENCE
            with self.subTest(name), mock.patch.object(fake, "UPSTREAM_SECONDS", seconds):
                self.stand_before_service(act, record=self.file)
                got = self.ask("POST", CHAT, HELLO)
                self.assertEqual((got.status, got.is_cut), (200, True))
                self.server.stop()
                self.assertFalse(self.file.exists())

    def test_a_length_that_is_a_lie(self):
        for name, head, body, wanted in (
            ("more than said", b"Content-Length: 2\r\n\r\n", b"{} and more", (200, b"{}")),
            ("no number", b"Content-Length: two\r\n\r\n", b"{}", (502, None)),
            ("negative", b"Content-Length: -2\r\n\r\n", b"{}", (502, None)),
            ("none at all", b"\r\n", b"{}", (200, b"{}")),
        ):
            with self.subTest(name):
                self.stand_before_service(send(OK_HEAD + head + body))
                got = self.ask("POST", CHAT, HELLO)
                self.assertEqual((got.status, got.raw if wanted[1] else None), wanted)

    def test_an_answer_whose_end_cannot_be_told_is_recorded_where_it_is_whole_json(self):
        for body, count in ((b'{"a": ', None), (b"12", None), (b"{}", 1)):
            with self.subTest(body):
                self.stand_before_service(send(OK_HEAD + b"\r\n" + body), record=self.file)
                self.assertEqual(self.ask("POST", CHAT, HELLO).raw, body)
                self.server.stop()
                self.assertEqual(len(self.read_entries()) if self.file.exists() else None, count)

    def test_heads_that_come_before_the_answer_are_skipped(self):
        early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        answer = early + OK_HEAD + b"Content-Length: 2\r\n\r\n{}"
        self.stand_before_service(send(answer), record=self.file)
        got = self.ask("POST", CHAT, HELLO)
        self.assertEqual((got.status, got.json), (200, {}))
        self.replay()
        self.assertEqual(self.post(CHAT, HELLO).json, {})

    def test_a_redirection_comes_back_from_the_file(self):
        head = b"HTTP/1.1 307 Moved\r\nLocation: https://elsewhere.test/x\r\nX-Other: 1\r\n"
        self.stand_before_service(send(head + b"Content-Length: 0\r\n\r\n"), record=self.file)
        self.ask("POST", CHAT, HELLO)
        self.replay()
        got = self.ask("POST", CHAT, HELLO)
        self.assertEqual((got.status, got.headers["location"]), (307, "https://elsewhere.test/x"))
        self.assertNotIn("x-other", got.headers)

    def test_no_path_leaves_the_upstreams_prefix(self):
        service = self.stand_before_service(send(OK_HEAD + b"Content-Length: 2\r\n\r\n{}"))
        self.stand_before(service.url + "/tenant/v1")
        for path in (
            "/v1/../../admin",
            "/v1/x/..",
            "/v1/%2e%2e/%2E%2e/admin",
            "/v1/a%2f..%2f..%2fb",
            "/v1/..%5cadmin",
            "/v1/%252e%252e/admin",
        ):
            with self.subTest(path):
                self.assertEqual(self.ask("POST", path, {}).status, 502)
        self.assertEqual(service.received, [])
        self.assertEqual(self.ask("POST", "/v1/a..b/...", {}).status, 200)

    def test_a_slow_upstream_is_waited_for(self):
        def act(client):
            self.assertFalse(left.wait(0.1))
            client.sendall(OK_HEAD + b"Content-Length: 2\r\n\r\n{}")

        left = threading.Event()
        with mock.patch.object(fake, "LOOK_SECONDS", 0.02):
            self.stand_before_service(act)
            self.assertEqual(self.post(CHAT, HELLO).json, {})

    def test_an_answer_that_is_too_large_to_keep_is_passed_on(self):
        body = b'{"a": "%b"}' % (b"x" * 300_000)
        answer = OK_HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        with mock.patch.object(fake, "MAX_RECORDED_ANSWER_BYTES", 200_000):
            self.stand_before_service(send(answer), record=self.file)
            self.assertEqual(self.post(CHAT, HELLO).raw, body)
            self.server.stop()
        self.assertFalse(self.file.exists())

    def test_it_is_left_when_the_client_leaves(self):
        left = threading.Event()

        def act(client):
            client.sendall(EVENTS_HEAD + chunk(b"data: 1\n\n"))
            with contextlib.suppress(ConnectionError):
                client.recv(1)
            left.set()

        self.stand_before_service(act, record=self.file)
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=PATIENCE) as client:
            client.sendall(RAW_CHAT)
            receive_until(client, b"data: 1\n\n\r\n")
            reset(client)
        self.assertTrue(left.wait(PATIENCE))
        self.assertTrue(wait_until(lambda: self.server.requests[0].outcome == "left"))
        self.server.stop()
        self.assertFalse(self.file.exists())

    def test_who_sends_no_more_gets_its_answer(self):
        def act(client):
            ended.wait(PATIENCE)
            self.assertFalse(left.wait(0.1))
            client.sendall(OK_HEAD + b"Content-Length: 2\r\n\r\n{}")

        ended, left = threading.Event(), threading.Event()
        with mock.patch.object(fake, "LOOK_SECONDS", 0.02):
            self.stand_before_service(act)
            with socket.create_connection(("127.0.0.1", self.server.port), PATIENCE) as client:
                client.sendall(RAW_CHAT)
                client.shutdown(socket.SHUT_WR)
                clients = self.server._http.clients
                self.assertTrue(wait_until(lambda: any(each.has_ended for each in clients)))
                ended.set()
                self.assertIn(b"200 OK", receive_all(client))

    def test_stop_does_not_wait_for_it(self):
        asked = threading.Event()
        self.stand_before_service(lambda client: (asked.set(), client.recv(1)))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            call = pool.submit(self.ask, "POST", CHAT, HELLO)
            self.assertTrue(asked.wait(PATIENCE))
            self.server.stop()
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.assertEqual(call.result(PATIENCE).status, 502)

    def test_two_servers_that_ask_each_other_say_so(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        self.server = TogetherAiServer(0, upstream=f"http://127.0.0.1:{port}/v1").start()
        self.addCleanup(self.server.stop)
        other = TogetherAiServer(port, upstream=self.server.base_url).start()
        self.addCleanup(other.stop)
        self.assertIn(
            "it is this server", self.json("POST", CHAT, HELLO, status=502)["error"]["message"]
        )
        self.assertEqual((len(self.server.requests), len(other.requests)), (2, 1))

    def test_a_server_that_is_its_own_upstream_says_so(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        self.server = TogetherAiServer(port=port, upstream=f"http://127.0.0.1:{port}/v1").start()
        self.addCleanup(self.server.stop)
        got = self.ask("POST", CHAT, HELLO)
        self.assertEqual(got.status, 502)
        self.assertIn("it is this server", got.json["error"]["message"])

    def test_addresses_that_cannot_be_one(self):
        for upstream, reason in (
            (
                "api.together.xyz",
                "without a name, a password or a query, not 'api.together.xyz'",
            ),
            ("ftp://host", "must be an http:// or https:// URL"),
            ("http://", "must be an http:// or https:// URL"),
            ("http://host/v1?a=b", "must be an http:// or https:// URL"),
            (
                "http://me:secret@host",
                "without a name, a password or a query, not 'http://***@host'",
            ),
        ):
            with self.subTest(upstream), self.assertRaisesRegex(ValueError, re.escape(reason)):
                TogetherAiServer(upstream=upstream)

    @unittest.skipUnless(shutil.which("openssl"), "needs the command openssl")
    def test_certificates_are_verified(self):
        tls, certificate = make_certificate()
        answer = send(OK_HEAD + b"Content-Length: 2\r\n\r\n{}")
        service = self.stand_before_service(answer, tls)
        got = self.ask("POST", CHAT, HELLO)
        self.assertEqual((got.status, service.received), (502, []))
        self.assertRegex(got.json["error"]["message"], "verify failed: self[- ]signed certificate")
        with mock.patch.dict(os.environ, SSL_CERT_FILE=certificate):
            self.stand_before(service.url)
            self.assertEqual(self.ask("POST", CHAT, HELLO).json, {})
            # It is nobody else's certificate.
            self.stand_before(service.url.replace("127.0.0.1", "localhost"))
            self.assertIn("SSL", self.ask("POST", CHAT, HELLO).json["error"]["message"])


def drip(client):
    """Send a head so slowly that it never ends."""
    with contextlib.suppress(OSError):
        for letter in OK_HEAD * 99:
            client.sendall(bytes([letter]))
            time.sleep(0.02)


def chats(text, **fields):
    """Return a whole chat and a streamed one, by what tells them apart."""
    body = {"model": LLAMA, **fields}
    return {
        f"{text}, {how}": (
            CHAT,
            {**body, "messages": say(f"{text}, {how}"), "stream": how == "streamed"},
        )
        for how in ("whole", "streamed")
    }


SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY}}
RESPONSE_TOOL = {"type": "function", "name": "get_weather", "parameters": CITY}
CALLED = {"tools": [RESPONSE_TOOL], "tool_choice": "required"}
IMAGE = {"model": FLUX, "width": 64, "height": 64, "response_format": "base64"}
PROMPT = {"model": LLAMA, "prompt": "Once upon a time"}
HEARS = {"model": "openai/whisper-large-v3"}
BLUE = {"model": "m", "input": "blue"}
RESPOND = {"model": THINKER, "input": "respond"}
# What is asked, by name; each answer is recorded and must come back.
RECORDABLE = {
    **chats("a chat"),
    **chats("a tool", tools=[WEATHER], tool_choice="required"),
    **chats("tools", tools=[WEATHER, tool("get_time", parameters=CITY)], tool_choice="auto"),
    **chats("thoughts", model=THINKER),
    **chats("thoughts of engine A", model=R1),
    **chats("thoughts of engine C", model=KIMI),
    **chats("logprobs", logprobs=1),
    **chats("choices", n=2),
    **chats("an end", max_tokens=3),
    **chats("a form", response_format=SCHEMA),
    **chats("usage", stream_options={"include_usage": True}),
    "no messages": (CHAT, {"model": LLAMA}),
    "response": ("/v1/responses", RESPOND),
    "response, streamed": ("/v1/responses", {**RESPOND, "input": "stream", "stream": True}),
    "response, tool": ("/v1/responses", {**RESPOND, **CALLED}),
    "completion": ("/v1/completions", PROMPT),
    "completion, streamed": ("/v1/completions", {**PROMPT, "prompt": "Long ago", "stream": True}),
    "completion, echo": ("/v1/completions", {**PROMPT, "echo": True}),
    "embedding": ("/v1/embeddings", {"model": "m", "input": "red"}),
    "embeddings": ("/v1/embeddings", {"model": "m", "input": ["red", "green"]}),
    "embedding, base64": ("/v1/embeddings", {**BLUE, "encoding_format": "base64"}),
    "image": ("/v1/images/generations", {**IMAGE, "prompt": "a fox"}),
    "images": ("/v1/images/generations", {**IMAGE, "prompt": "hens", "n": 2}),
    "speech": ("/v1/audio/speech", SPEECH),
    "speech, wav": ("/v1/audio/speech", {**SPEECH, "response_format": "wav"}),
    "speech, streamed": ("/v1/audio/speech", {**SPEECH, "stream": True, "response_format": "raw"}),
    "transcription": ("/v1/audio/transcriptions", write_form(HEARS, write_sound(2))),
    "transcription, verbose": ("/v1/audio/transcriptions", write_form(HEARD, write_sound(3))),
    "translation": ("/v1/audio/translations", write_form(HEARS, write_sound(2))),
    "rerank": ("/v1/rerank", RERANK),
    "rerank, the best": ("/v1/rerank", {**RERANK, "top_n": 1, "return_documents": True}),
    "unknown": ("/v1/nothing", {"a": 1}),
}  # fmt: skip
UNTOLD = ("sequence_number", "token_id")  # that depend on how a stream was cut
TEXTS = ("content", "reasoning", "text", "arguments", "delta")


def list_leaves(value, path=()):
    """Yield the place and value of everything that is said in some JSON."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        if key not in UNTOLD:
            if isinstance(inner, (dict, list)):
                yield from list_leaves(inner, (*path, key))
            elif inner is not None:
                yield (*path, key), "some time" if key == "inference" else inner


def read_said(got):
    """Return what an answer says, however a stream is cut: texts joined, the rest by place."""
    kind = got.headers["content-type"].partition(";")[0]
    if kind == "application/json":
        return dict(list_leaves(got.json))
    if kind != "text/event-stream":
        return got.raw
    said = {}
    events = [event[6:] for event in got.raw.decode().split("\n\n")]
    for event in events:
        for path, value in list_leaves(json.loads(event)) if event.startswith("{") else ():
            joined = path[-1] in TEXTS and isinstance(value, str) and path in said
            said[path] = said[path] + value if joined else value
    return said


class RecordingCase(UpstreamCase):
    """A test of answers that are kept in a file."""

    def ask_all(self):
        """Ask for all that can be recorded; return what was said by the name of the call."""
        said = {}
        for name, (path, body) in RECORDABLE.items():
            headers = FORM if isinstance(body, bytes) else KEY
            got = self.answer("POST", path, body, headers)
            said[name] = got.status, got.headers["content-type"], read_said(got)
        return said

    def assertAllAlike(self, recorded):
        for name, answer in self.ask_all().items():
            with self.subTest(name):
                same = answer == recorded[name]  # a difference of long texts would take minutes
                self.assertTrue(same, f"{answer!r:.1000}\n{recorded[name]!r:.1000}")


class RecordingTests(RecordingCase):
    def test_each_kind_is_answered_alike_without_the_upstream(self):
        self.stand_before(record=self.file)
        recorded = self.ask_all()
        self.replay()
        self.assertAllAlike(recorded)
        sources = {call.fixture.partition("[")[0] for call in self.server.requests}
        self.assertEqual(sources, {"file recorded.json"})

    def test_the_words_are_those_of_aimocks_recorder(self):
        self.service.reply("Hi", reasoning="Hm.", finish_reason="length", times=1)
        self.stand_before(record=self.file)
        self.text("hello")
        (entry,) = self.wait_for_entries(1)
        match = {"userMessage": "hello", "model": LLAMA, "turnIndex": 0, "hasToolResult": False}
        self.assertEqual(entry["match"], match)
        said = {key: entry["response"][key] for key in ("content", "reasoning", "finishReason")}
        self.assertEqual(said, {"content": "Hi", "reasoning": "Hm.", "finishReason": "length"})

    def test_a_call_that_only_the_upstream_knows_is_answered_from_the_file(self):
        self.stand_before_service(
            send(OK_HEAD + b'Content-Length: 8\r\n\r\n{"a": 1}'), record=self.file
        )
        self.post("/v1/brand/new", {"model": "m"})
        self.replay()
        self.assertEqual(self.post("/v1/brand/new", {"model": "m"}).json, {"a": 1})
        self.assertEqual(self.ask("POST", "/v1/brand/new", {"model": "n"}).status, 404)
        self.assertEqual(self.ask("POST", "/v1/brand/newer", {"model": "m"}).status, 404)

    def test_a_path_that_this_server_lacks_can_be_scripted(self):
        self.service.reply(endpoint="PUT /v1/models", json={"a": 1})
        self.assertEqual(self.json("PUT", "/v1/models"), {"a": 1})
        self.assertEqual(self.ask("PATCH", "/v1/models").status, 405)
        self.assertEqual(self.ask("PUT", "/v1/models", headers={}).status, 401)

    def test_an_answer_that_aimocks_recorder_did_not_understand_loads(self):
        response = {"error": {"message": "No format", "type": "proxy_error"}, "status": 200}
        self.file.write_text(json.dumps({"fixtures": [{"match": {}, "response": response}]}))
        self.replay()
        got = self.ask("POST", CHAT, HELLO)
        self.assertEqual((got.status, got.json["error"]["message"]), (200, "No format"))

    def test_what_fixtures_cannot_say_is_kept_as_it_came(self):
        odd = "say {{model}} and {{ body.seed }}"
        called = {"name": "get", "arguments": '{"a": '}
        for message in (
            {"content": odd},
            {"content": "x", "reasoning": odd},
            {"content": None, "refusal": odd},
            {"content": "x", "annotations": [{"type": "url"}]},
            {"content": None, "function_call": called},
            {"content": ""},
        ):
            message["role"] = "assistant"
            for stream in (False, True):
                with self.subTest(message=message, stream=stream):
                    self.file.unlink(missing_ok=True)
                    part = {"index": 0, "finish_reason": "stop"}
                    place = "choices", 0, "delta" if stream else "message"
                    part[place[-1]] = message
                    data = json.dumps({"id": "1", "model": "m", "choices": [part]}).encode()
                    data = b"data: %b\n\ndata: [DONE]\n\n" % data if stream else data
                    size = b"Content-Length: %d\r\n\r\n" % len(data)
                    answer = (
                        EVENTS_HEAD + chunk(data) + b"0\r\n\r\n"
                        if stream
                        else OK_HEAD + size + data
                    )
                    self.stand_before_service(send(answer), record=self.file)
                    body = {"model": "m", "messages": say("hi"), "stream": stream}
                    self.post(CHAT, body)
                    self.replay()
                    said = read_said(self.post(CHAT, body)).items()
                    got = {path[3:]: value for path, value in said if value and path[:3] == place}
                    wanted = {path: value for path, value in list_leaves(message) if value}
                    self.assertEqual(got, wanted)

    def test_answers_to_the_same_request_become_a_sequence(self):
        for text in ("one", "two", "three"):
            self.service.reply(text, times=1)
        self.stand_before(record=self.file)
        self.assertEqual([self.text("next") for _ in range(3)], ["one", "two", "three"])
        self.replay()
        texts = [self.text("next") for _ in range(4)]
        self.assertEqual(texts, ["one", "two", "three", "three"])
        numbers = [entry["match"].get("sequenceIndex") for entry in self.read_entries()]
        self.assertEqual(numbers, [0, 1, None])

    def test_a_sequence_has_the_order_in_which_clients_had_all_bytes(self):
        for text in ("one", "two"):
            self.service.reply(text, times=1)
        self.stand_before(record=self.file)
        events = []
        for _ in range(2):  # each is read to its last byte, but is not over for the server
            headers = {name.lower(): value for name, value in KEY.items()}
            events.append(self.server.answer(Request("POST", CHAT, HELLO, headers=headers)).events)
            self.assertTrue(next(events[-1]).endswith(b"}"))
        for each in reversed(events):
            self.assertEqual(list(each), [])
        texts = [entry["response"]["content"] for entry in self.wait_for_entries(2)]
        self.assertEqual(texts, ["one", "two"])

    def test_requests_that_are_named_alike_are_told_apart(self):
        system = [{"role": "system", "content": "Be brief."}]
        answered = [{"role": "assistant", "content": "Yes?"}]
        bodies = [
            HELLO,
            {**HELLO, "temperature": 0.5},
            {**HELLO, "temperature": 1},
            {**HELLO, "seed": True},
            {**HELLO, "messages": system + say("hello")},
            {**HELLO, "messages": say("well") + answered + say("hello")},
            {**HELLO, "messages": say("hello there")},
            {**HELLO, "tools": [WEATHER], "tool_choice": "none"},
        ]
        for order in (bodies, bodies[::-1]):
            with self.subTest(first=order[0]):
                self.file.unlink(missing_ok=True)
                self.stand_before(record=self.file)
                recorded = [self.ask("POST", CHAT, body).raw for body in order]
                self.replay()
                for body, wanted in zip(order, recorded):
                    self.assertEqual(self.ask("POST", CHAT, body).raw, wanted)

    def test_errors_come_back_with_their_wait(self):
        self.service.fail(429, retry_after=7, times=1)
        self.stand_before(record=self.file)
        wanted = self.ask("POST", CHAT, HELLO)
        self.replay()
        got = self.ask("POST", CHAT, HELLO)
        self.assertEqual((got.status, got.raw), (429, wanted.raw))
        self.assertEqual(got.headers["retry-after"], "7")

    def test_timings_come_back(self):
        profile = {"ttft": 100, "tps": 20}
        self.service.reply("one two three", streaming_profile=profile, chunk_size=4)
        self.stand_before(record=self.file)
        self.stream()
        (entry,) = self.wait_for_entries(1)
        timings = entry["recordedTimings"]
        self.assertGreaterEqual(timings["ttftMs"], 90)
        self.assertEqual(
            timings["ttftMs"] + sum(timings["interChunkDelaysMs"]), timings["totalDurationMs"]
        )
        self.replay()
        began = time.monotonic()
        self.stream()
        self.assertGreaterEqual(time.monotonic() - began, timings["totalDurationMs"] / 1000 * 0.8)

    def test_keys_never_reach_the_file(self):
        key, word = "sk-0123456789-abcdefghij", "sesame-open-the-door-please"
        self.service.reply(f"You said {key}.", error=None)
        self.stand_before(record=self.file)
        headers = {"Authorization": f"Bearer {key}", "X-Api-Key": word, "Cookie": f"session={word}"}
        hidden = {"wandb_api_key": word, "deep": {"hf_token": word, "list": [{"password": word}]}}
        plain = {"max_token": 5, "eos_token": "</s>", "prompt_cache_key": "tenant-7"}
        self.assertEqual(fake.redact(plain), plain)
        for path, body in (
            (CHAT, {**HELLO, **hidden}),
            (CHAT, {**HELLO, **hidden, "seed": 1}),
            (CHAT, {"model": LLAMA, "messages": say(f"my key is {key}")}),
            (CHAT, {"model": key, "messages": f"no list: {word}"}),
            (f"/v1/nothing?api_key={word}", hidden),
            ("/v1/embeddings", {"model": "m", "input": key}),
        ):
            self.ask("POST", path, body, headers)
        self.server.stop()
        written = self.file.read_text("utf-8")
        self.assertEqual(len(self.read_entries()), 6)
        self.assertNotIn(key, written)
        self.assertNotIn(word, written)

    def test_a_file_is_continued_and_answers_first(self):
        self.file.write_text(
            '{"fixtures": [{"match": {"userMessage": "old"}, "response": {"content": "Old."}}]}'
        )
        for text in ("first", "second"):
            self.stand_before(record=self.file)
            self.assertEqual(self.text("old"), "Old.")
            self.text(text)
            self.server.stop()
        self.assertEqual(len(self.service.requests), 2)
        self.stand_before(record=self.file)
        self.text("first")
        self.assertEqual(len(self.service.requests), 2)
        self.assertEqual(
            [entry["match"]["userMessage"] for entry in self.read_entries()],
            ["old", "first", "second"],
        )

    def test_what_the_file_does_not_know_is_named(self):
        self.stand_before(record=self.file)
        self.text("the weather in Rome")
        self.replay()
        got = self.ask("POST", CHAT, {**HELLO, "messages": say("the weather in Paris")})
        self.assertEqual(got.status, 404)
        message = got.json["error"]["message"]
        for part in ("recorded.json[0]", "userMessage", "Paris"):
            self.assertIn(part, message)

    def test_what_cannot_be_recorded_to(self):
        plain, broken = self.folder / "plain", self.folder / "broken.json"
        plain.write_text("")
        broken.write_text('{"fixtures": [')
        url = self.service.url
        for options, kind, reason in (
            ({"record": self.file}, ValueError, "record needs an upstream"),
            ({"upstream": url, "record": self.folder}, OSError, "is no file"),
            ({"upstream": url, "record": plain / "x.json"}, OSError, "plain"),
            ({"upstream": url, "record": broken}, ValueError, "broken.json"),
            ({"upstream": url, "record": plain}, ValueError, "plain"),
            ({"upstream": url, "record": os.devnull}, OSError, "is no file"),
        ):  # fmt: skip
            with self.subTest(options), self.assertRaisesRegex(kind, reason):
                TogetherAiServer(**options)

    def test_a_disk_that_was_full_loses_nothing(self):
        self.stand_before(record=self.file)
        full = OSError(errno.ENOSPC, "no room")
        with mock.patch("sys.stderr", io.StringIO()) as stderr:
            with mock.patch("os.fsync", side_effect=full):
                for text in ("one", "two"):
                    self.text(text)
                recorder = self.server._recorder
                self.assertTrue(wait_until(lambda: recorder._writer is None))
                self.assertIn("no room", stderr.getvalue())
                self.assertFalse(self.file.exists())
            self.server.stop()
        self.assertEqual(stderr.getvalue().count("cannot record"), 1)
        self.assertEqual(len(self.read_entries()), 2)
        self.assertEqual(os.listdir(self.folder), ["recorded.json"])

    @unittest.skipIf(os.name == "nt", "files are not locked there")
    def test_two_servers_record_to_one_file(self):
        servers = []
        for _ in range(2):
            self.stand_before(record=self.file)
            servers.append(self.server)
        for number in range(13):
            self.server = servers[number % 2]
            self.text(f"question {number}")
            self.server._upstream.recorder.finish()
        for server in servers:
            server.stop()
        self.server = self.service
        wanted = [self.text(f"question {number}") for number in range(13)]
        self.replay()
        got = [self.text(f"question {number}") for number in range(13)]
        self.assertEqual(got, wanted)  # question 1 is in question 10

    def test_what_was_there_is_not_written_twice(self):
        self.stand_before(record=self.file)
        self.text("one")
        self.server.stop()
        self.stand_before(record=self.file)
        self.server.script.replace_files(fake.Loaded())  # as where others are watched
        for text in ("one", "two", "three"):
            self.text(text)
            self.server._upstream.recorder.finish()
        self.server.stop()
        self.assertEqual(len(json.loads(self.file.read_text())["fixtures"]), 3)

    def test_what_others_write_wrongly_is_told_and_ends_nothing(self):
        self.stand_before(record=self.file)
        self.text("one")
        recorder, stderr = self.server._upstream.recorder, io.StringIO()
        recorder.finish()
        right = self.file.read_text()
        with contextlib.redirect_stderr(stderr):
            for wrong in ('[{"response": {"content": "x"}}]', "[5]", "{"):
                self.file.write_text(wrong)
                self.text(wrong)
                recorder.finish()
                self.assertEqual(self.file.read_text(), wrong)
        self.assertEqual(stderr.getvalue().count("cannot record"), 1)
        self.file.write_text(right)
        self.server.stop()
        self.assertEqual(len(json.loads(self.file.read_text())["fixtures"]), 4)

    def test_what_a_file_says_beside_its_fixtures_stays(self):
        self.file.write_text('{"$schema": "x", "fixtures": []}')
        self.file.chmod(0o640)
        self.stand_before(record=self.file)
        self.text("one")
        self.server.stop()
        self.assertEqual(json.loads(self.file.read_text())["$schema"], "x")
        self.assertEqual(stat.S_IMODE(self.file.stat().st_mode), 0o640)

    def test_recording_takes_time_by_the_number_of_calls(self):
        def record(count):
            recording, began = fake.Recording(), time.process_time()
            for number in range(count):
                request = Request(
                    "POST", CHAT, {"model": "m", "messages": say(f"question {number}")}
                )
                request.body = json.loads(request.raw)
                reply = fake.Reply(b"{}")
                answer = fake.put_answer("chat", request, reply)
                recording.add(fake.identify("chat", request), answer, ())
            self.assertEqual(len(recording.list_fixtures()), count)
            return time.process_time() - began

        few, many = (min(record(count) for _ in range(2)) for count in (30, 240))
        self.assertLess(many, 40 * few)

    def test_a_disk_that_fails_costs_no_answer(self):
        self.file = self.folder / "new" / "recorded.json"
        self.stand_before(record=self.file)
        shutil.rmtree(self.file.parent)
        with mock.patch("sys.stderr", io.StringIO()) as stderr:
            self.text("lost")
            self.server.stop()
        self.assertRegex(stderr.getvalue(), r"^cannot record to .+recorded\.json: ")

    def test_a_file_that_somebody_reads_is_replaced_when_it_is_closed(self):
        """Windows refuses to replace an open file."""
        self.file.write_text("old")
        for times, kept in ((3, b"new"), (99, b"old")):
            refusals = [PermissionError(errno.EACCES, "open")] * times
            outcomes = [*refusals, mock.DEFAULT]
            quick = mock.patch.object(fake, "REPLACE_SECONDS", 0)
            replace = mock.patch("os.replace", side_effect=outcomes, wraps=os.replace)
            with quick, replace, contextlib.suppress(PermissionError):
                fake.write_file(str(self.file), b"new")
            self.assertEqual((self.file.read_bytes(), len(list(self.folder.iterdir()))), (kept, 1))
            self.file.write_text("old")

    # What Windows lacks, taken away.
    WINDOWS = """
import os, select, signal, sys
for module in (os, select, signal):
    for name in ("fork", "register_at_fork", "poll", "epoll", "kqueue", "SIGHUP"):
        vars(module).pop(name, None)
sys.modules["fcntl"] = None
import together_fake as fake
assert fake.MAX_CONNECTIONS == 500
sys.exit(fake.main(sys.argv[1:]))
"""

    def test_it_records_without_what_windows_lacks(self):
        command = [*PYTHON, "-c", self.WINDOWS, "--port=0", "--quiet", "--record", str(self.file)]
        command += ["--upstream", self.service.url]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, cwd=COPY, **pipes) as program:
            url = program.stdout.readline().split()[-1]
            self.server = types.SimpleNamespace(port=int(url.rpartition(":")[2]))
            for number in range(3):
                self.text(f"hello {number}")
            program.terminate()
            self.assertEqual(program.communicate(timeout=PATIENCE)[1], "")
        self.assertEqual((program.returncode, len(self.read_entries())), (0, 3))

    # Asks the upstream questions from a number on; a function of `os` may kill it.
    PROGRAM = """
import os, sys, together_fake as fake
upstream, record, first, deadly = sys.argv[1:]
server = fake.TogetherAiServer(0, upstream=upstream, record=record).start()
if deadly:
    setattr(os, deadly, lambda *_: os.kill(os.getpid(), 9))
headers = {"authorization": "Bearer x"}
for number in range(int(first), 10_000):
    body = {"model": "m", "messages": [{"role": "user", "content": f"question {number}"}]}
    reply = server.answer(fake.Request("POST", "/v1/chat/completions", body, headers=headers))
    list(reply.events or ())
    print(number, flush=True)
"""

    @contextlib.contextmanager
    def run_program(self, first, deadly=""):
        """Run the program, and kill it in the end."""
        command = [*PYTHON, "-c", self.PROGRAM, self.service.url, str(self.file)]
        command += [str(first), deadly]
        with subprocess.Popen(command, cwd=COPY, stdout=subprocess.PIPE) as program:
            try:
                yield program
            finally:
                program.kill()

    def test_the_file_is_whole_whenever_the_program_is_killed(self):
        known = 0

        def has_grown():
            return self.file.exists() and len(self.read_entries()) > known

        for _ in range(2):
            with self.run_program(0):
                self.assertTrue(wait_until(has_grown))
            entries = self.read_entries()
            self.assertTrue(all(entry["response"]["content"] for entry in entries))
            self.assertTrue(has_grown())
            known = len(entries)
        self.replay()
        self.text("question 0", model="m")

    @unittest.skipUnless(os.name == "posix", "needs signals")
    def test_a_program_that_is_killed_while_it_writes_leaves_the_old_file(self):
        self.stand_before(record=self.file)
        self.text("kept")
        self.server.stop()
        before = self.file.read_bytes()
        for deadly in ("fsync", "replace"):
            with self.subTest(deadly), self.run_program(0, deadly) as program:
                self.assertEqual(program.wait(PATIENCE), -signal.SIGKILL)
                self.assertEqual(self.file.read_bytes(), before)


class NormaliseTests(RecordingCase):
    """Recordings of prompts that hold what is another each day."""

    UUIDS = ("0b9a3c1e-7d52-4f0c-9d7e-1f2a3b4c5d6e", "F47AC10B-58CC-4372-A567-0E02B2C3D479")

    def record(self, *texts, **options):
        """Return what was answered to these texts, which are then recorded."""
        self.stand_before(record=self.file, **options)
        answers = [self.text(text) for text in texts]
        self.server.stop()
        return answers

    def test_dates_times_and_uuids_are_compared_as_such(self):
        one, other = self.UUIDS
        for before, after, alike in (
            ("Report of 2026-11-28.", "Report of 2026-11-29.", True),
            ("At 2026-11-28T10:00:00.123Z go", "At 2027-01-01T09:30:59+01:00 go", True),
            ("Now it is 09:15", "Now it is 23:59:01", True),
            (f"Session {one}: hi", f"Session {other}: hi", True),
            ("Report of 2026-11-28.", "Reports of 2026-11-29.", False),
            ("Report of 2026-11-28.", "The Report of 2026-11-29. Now.", False),
            ("Report of 2026-11-28.", f"Report of {one}.", False),
            ("Add 10 and 20", "Add 10 and 21", False),
        ):
            with self.subTest(before=before, after=after):
                self.file.unlink(missing_ok=True)
                (said,) = self.record(before)
                self.replay()
                got = self.ask("POST", CHAT, {"model": LLAMA, "messages": say(after)})
                self.assertEqual(got.status, 200 if alike else 404)
                call = self.server.requests[0]
                self.assertEqual(len(call.warnings), alike, call.warnings)
                if alike:
                    self.assertEqual(got.json["choices"][0]["message"]["content"], said)
                    self.assertIn("another date, time or uuid", call.warnings[0])
                self.server.reset()
                self.assertEqual(self.text(before), said)
                self.assertEqual(self.server.requests[0].warnings, ())

    def test_bodies_are_compared_so_too(self):
        system = [{"role": "system", "content": "Today is 2026-11-28."}]
        later = [{"role": "system", "content": "Today is 2026-12-01."}]
        said = []
        self.stand_before(record=self.file)
        for first in ([], system):  # named alike
            said.append(self.chat("hi", messages=first + say("hi")))
        self.replay()
        self.assertEqual(self.chat("hi", messages=later + say("hi")), said[1])

    def test_scripts_of_a_test_mean_the_day_they_name(self):
        self.server.reply("Holiday.", user_message="2026-12-25")
        self.assertNotEqual(self.text("2026-12-26"), "Holiday.")

    def test_patterns_are_left_out(self):
        for normalise in (r"/tmp/\w+", [re.compile(r"/tmp/\w+"), "never"]):
            with self.subTest(normalise):
                self.file.unlink(missing_ok=True)
                said = self.record("Read /tmp/abc now", "Read /tmp/abc later")
                self.replay(normalise=normalise)
                self.assertEqual(self.text("Read /tmp/xyz later"), said[1])
                self.assertEqual(self.text("Read /tmp/xyz now"), said[0])
                self.assertEqual(self.server.requests[0].warnings, ())
                self.assertEqual(self.ask("POST", CHAT, HELLO).status, 404)
        self.replay()
        got = self.ask("POST", CHAT, {"model": LLAMA, "messages": say("Read /tmp/xyz now")})
        self.assertEqual(got.status, 404)

    def test_a_file_names_patterns(self):
        self.file.write_text('{"normalise": ["run [0-9]+"], "fixtures": []}')
        said = self.record("This is run 7 of it")
        self.assertEqual(json.loads(self.file.read_text())["normalise"], ["run [0-9]+"])
        self.replay()
        self.assertEqual(self.text("This is run 12 of it"), said[0])

    def test_a_function_says_what_is_compared(self):
        def change(body):
            body["messages"] = [
                {**m, "content": m["content"].rpartition(":")[2]} for m in body["messages"]
            ]
            body.pop("seed", None)
            return body

        self.stand_before(record=self.file, normalise=change)
        said = [self.text(f"id 1: {text}", seed=1) for text in ("red", "red", "blue")]
        self.assertEqual(
            [len(call.body["messages"][0]["content"]) for call in self.service.requests], [9, 9, 10]
        )
        self.replay(normalise=change)
        self.assertEqual(self.text("id 77: blue", seed=2), said[2])
        self.assertEqual(self.text("id 78: red"), said[0])

    def test_what_is_no_pattern(self):
        for normalise in ("(", ["a", "["], [7]):
            with self.subTest(normalise), self.assertRaisesRegex(ValueError, "^normalise: "):
                TogetherAiServer(0, normalise=normalise)
        self.file.write_text('{"normalise": ["("], "fixtures": []}')
        with self.assertRaisesRegex(ValueError, "regular expression"):
            fake.load_fixtures(str(self.file))


class SaveTests(RecordingCase):
    """Answers that were generated, kept as fixtures."""

    def test_what_was_answered_is_pinned(self):
        said = self.ask_all()
        self.service.save(self.file)
        self.replay()
        self.assertAllAlike(said)

    def test_a_path_or_a_text_names_the_file(self):
        self.text("hello")
        other = self.folder / "other.json"
        self.service.save(self.file)
        self.service.save(str(other))
        self.assertEqual(self.file.read_bytes(), other.read_bytes())

    def test_the_record_over_http(self):
        self.chat("one")
        self.post(CHAT, HELLO, {**KEY, "X-Test-Id": "mine"})
        self.service.save(self.file)
        whole = self.ask("GET", FIXTURES + "?from=requests", headers={})
        self.assertEqual((whole.status, whole.raw), (200, self.file.read_bytes()))
        mine = self.ask("GET", FIXTURES + "?from=requests&test=mine", headers={}).json["fixtures"]
        self.assertEqual([entry["match"]["userMessage"] for entry in mine], ["hello"])
        self.run_server(on_miss=dict.fromkeys(fake.OPERATIONS, "error"))
        self.assertEqual(self.post(FIXTURES, whole.json).json["added"], 2)
        self.assertEqual(self.chat("one")["object"], "chat.completion")

    def test_calls_that_broke_or_look_after_the_server_are_left_out(self):
        self.service.fail(disconnect_after_chunks=1, user_message="broken")
        self.ask("POST", CHAT, {**HELLO, "messages": say("broken"), "stream": True})
        self.ask("GET", "/v1/models")
        self.ask("GET", "/nowhere")
        self.chat("kept")
        wait_until(lambda: self.service.requests[0].outcome != "running")
        self.service.save(self.file)
        self.assertEqual([e["match"]["userMessage"] for e in self.read_entries()], ["kept"])

    def test_a_large_body_is_known_by_its_digest(self):
        pictures = [f"data:image/png;base64,{letter * 2000}" for letter in "AB"]
        bodies = [
            {"model": "m", "messages": say([{"type": "text", "text": "What is this?"}, part])}
            for part in ({"type": "image_url", "image_url": {"url": url}} for url in pictures)
        ]
        with mock.patch.object(fake, "MAX_RECORDED_BODY_BYTES", 1000):
            self.server.reply("a cat", times=1)
            self.server.reply("a dog")
            for body in bodies:
                self.post(CHAT, body)
        self.service.save(self.file)
        self.replay()
        for body, text in zip(bodies[::-1], ("a dog", "a cat")):
            self.assertEqual(self.post(CHAT, body).json["choices"][0]["message"]["content"], text)
        self.assertEqual(self.ask("POST", CHAT, HELLO).status, 404)
        self.assertNotIn("AAAA", self.file.read_text())

    def test_an_answer_that_was_too_large_to_keep_is_not_saved(self):
        with mock.patch.object(fake, "MAX_RECORDED_BODY_BYTES", 2000):
            self.server.reply("x" * 3000)
            for stream in (False, True):
                self.post(CHAT, {**HELLO, "seed": int(stream), "stream": stream})
            self.server.reply("short", user_message="kept")
            self.text("kept")
            self.service.save(self.file)
        self.assertEqual([each["match"]["userMessage"] for each in self.read_entries()], ["kept"])
        self.assertEqual(self.service.verdict(), [])

    def test_nothing_that_was_refused_or_empty_answers_everything(self):
        self.ask("POST", CHAT, b"{")
        self.ask("POST", CHAT, HELLO, {})
        self.ask("POST", CHAT, {})
        self.ask("POST", "/v1/embeddings", {"input": []})
        self.service.save(self.file)
        self.replay()
        self.assertEqual(self.ask("POST", CHAT, {}).status, 400)
        self.assertEqual(self.ask("POST", CHAT, HELLO).status, 404)
        self.assertEqual(self.ask("POST", "/v1/embeddings", {"input": "x"}).status, 404)

    def test_texts_hold_no_key_of_a_header(self):
        key = "sk-0123456789-abcdefghij"
        self.server.reply(f"You said {key}.")
        headers = {"Authorization": f"Bearer {key}"}
        self.post(CHAT, {"model": "m", "messages": say(f"my key is {key}")}, headers)
        self.service.save(self.file)
        self.assertNotIn(key, self.file.read_text())
        self.assertIn("my key is ***", self.file.read_text())
        copies = json.dumps(self.json("GET", "/__parlel/requests/1")["copy"]["fixture"])
        self.assertNotIn(key, copies)

    def test_a_text_may_have_any_line_end(self):
        text = "one\u2028two\u2029three\u0085four\x0bfive\x1csix"
        self.server.reply(text)
        self.stream()
        deltas = [event["choices"][0]["delta"] for event in self.service.requests[0].reply]
        self.assertEqual("".join(delta.get("content", "") for delta in deltas), text)
        self.service.save(self.file)
        self.assertEqual(self.read_entries()[0]["response"]["content"], text)

    def test_two_saves_at_once(self):
        for number in range(5):
            self.text(f"question {number}")
        self.service.save(self.file)
        wanted = self.file.read_bytes()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(self.service.save, [self.file] * 16))
        self.assertEqual(self.file.read_bytes(), wanted)
        self.assertEqual(os.listdir(self.folder), ["recorded.json"])

    def test_nothing_recorded_is_a_file_without_fixtures(self):
        self.service.save(self.file)
        self.assertEqual(self.read_entries(), [])
        self.replay()

    def test_where_it_cannot_be_written_the_old_file_stays(self):
        self.file.write_text("old")
        with mock.patch("os.replace", side_effect=OSError(errno.ENOSPC, "no room")):
            self.assertRaises(OSError, self.service.save, self.file)
        self.assertEqual(os.listdir(self.folder), ["recorded.json"])
        self.assertEqual(self.file.read_text(), "old")
        self.assertRaises(OSError, self.service.save, self.folder / "no" / "file.json")
        self.assertRaises(OSError, self.service.save, self.folder)
        self.assertRaises(OSError, self.service.save, os.devnull)


# === Verdicts ===


class VerdictTests(LocalCase):
    """What a client is told to have done wrong: a clock that the test sets says when it came."""

    def setUp(self):
        self.now = 1000.0
        super().setUp()
        clocks = {"perf_counter": lambda: self.now, "time": lambda: 1e9 + self.now}
        patch = mock.patch.multiple(time, **clocks)
        patch.start()
        self.addCleanup(patch.stop)

    def send(self, body=None, after=0.0, leave=None, path=CHAT, **headers):
        """Ask after so many seconds; read the reply, or leave after so many events."""
        self.now += after
        fields = {
            "authorization": "Bearer x",
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        reply = self.server.answer(Request("POST", path, body or HELLO, headers=fields))
        try:
            for count, event in enumerate(reply.events or ()):
                self.now += event if type(event) is float else 0
                if count == leave:
                    reply.events.close()
                    break
        except fake.Cut:
            pass
        return self.server.requests[-1]

    def names(self, **options):
        return [finding.name for finding in self.server.verdict(**options)]

    def break_next(self, status=None, times=1, **words):
        self.server.fail(status, times=times, **words)

    def test_who_does_well_is_told_nothing(self):
        self.break_next(429, retry_after=2)
        self.break_next(503)
        self.break_next(disconnect_after_chunks=3)
        for after in (0, 2, 1, 4, 9):
            self.send({**HELLO, "stream": True}, after)
        call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        asked = [*say("hi"), {"role": "assistant", "content": None, "tool_calls": [call]}]
        result = {"role": "tool", "tool_call_id": "call_1", "content": "1"}
        self.send({"model": "m", "messages": [*asked, result]})
        self.send({"model": "m", "messages": asked})  # which goes on itself
        self.send({"model": "m", "messages": "no list"})
        for body in (HELLO, HELLO):
            self.send(body, 0.1)
            self.assertEqual(self.ask("GET", "/v1/files/none").status, 404)
        self.assertEqual(self.names(), [])
        self.server.assert_resilient()

    def test_retry_after_is_ignored(self):
        for words, wait, late in (
            ({"retry_after": 2}, 1, 2),
            ({"retry_after": 2}, 1.8, 1.95),
            ({"retry_after": 0.5}, 0.1, 0.6),
        ):
            for after, wanted in ((wait, ["retry_after_ignored"]), (late, [])):
                with self.subTest(words=words, after=after):
                    self.server.reset()
                    self.break_next(429, **words)
                    first, second = self.send(), self.send(after=after)
                    self.assertEqual(self.names(), wanted)
                    for finding in self.server.verdict():
                        self.assertEqual(finding.calls, (first, second))

    def test_a_date_is_a_time_to_wait_too(self):
        for after, wanted in ((3, ["retry_after_ignored"]), (11.1, [])):
            self.server.reset()
            self.break_next(503, retry_after=10, retry_after_date=True)
            self.send()
            self.send(after=after)
            self.assertEqual(self.names(), wanted, after)

    def test_a_clock_that_is_set_counts_as_well(self):
        at = [0.0]
        self.server = TogetherAiServer(0, clock=lambda: at[0])
        self.break_next(429, retry_after=60)
        self.send()
        at[0] += 60
        self.send()
        self.assertEqual(self.names(), [])

    def test_refusals_are_repeated(self):
        for status in (400, 401, 402, 404, 422):
            with self.subTest(status):
                self.server.reset()
                self.break_next(status)
                self.send()
                self.assertEqual(self.names(), [])
                self.send(after=5)
                self.assertEqual(self.names(), ["retried_refusal"])

    def test_a_storm(self):
        for status, pauses, wanted in (
            (500, [1, 2, 4, 8], []),
            (500, [1, 2, 4, 8, 16, 32], ["retry_storm"]),
            (500, [0, 0, 0], ["retry_storm"]),
            (500, [1, 1, 1], ["retry_storm"]),
            (500, [1, 1], []),  # too few to tell
            (429, [1, 1, 1], []),  # as it was told
        ):
            with self.subTest(status=status, pauses=pauses):
                self.server.reset()
                self.break_next(status, times=len(pauses))
                for after in (0, *pauses):
                    self.send(after=after)
                self.assertEqual(self.names(), wanted)
        self.assertEqual(self.names(most_attempts=3), ["retry_storm"])

    def test_giving_up(self):
        for words, stream, wanted in (
            ({"status": 429}, False, True),
            ({"status": 500}, False, True),
            ({"status": 503}, False, True),
            ({"status": 503, "should_retry": False}, False, False),
            ({"status": 400}, False, False),
            ({"status": 408}, False, True),
            ({"status": 409}, False, True),
            ({"status": 418}, False, False),
            ({"status": 599}, False, True),
            ({"disconnect_after_chunks": 0}, False, True),
            ({"disconnect_after_chunks": 2}, True, True),
        ):
            with self.subTest(words):
                self.server.reset()
                self.break_next(times=None, **words)
                self.send({**HELLO, "stream": stream})
                self.assertEqual(self.names(), ["no_retry"] if wanted else [])
                how = f"a {words['status']}" if "status" in words else "a connection that was cut"
                for finding in self.server.verdict():
                    self.assertEqual(finding.text, f"gave up at {how}, attempt 1")
                self.send({**HELLO, "stream": stream}, 1)
                if wanted:
                    self.assertEqual(self.names(), ["gave_up"])

    def test_half_an_answer_is_quoted(self):
        text = "The quick brown fox jumps."
        half = text[:15]
        stream = {**HELLO, "stream": True}

        def quote(said):
            turn = {"role": "assistant", "content": said}
            return {"model": "m", "messages": [*say("hello"), turn, *say("go on")]}

        for words in (
            {"disconnect_after_chunks": 3},
            {"end_after_chunks": 3},
            {"error_after_chunks": 3},
        ):
            for said, again, wanted in (
                (half, False, True),
                (f"\n{half} ", False, True),
                (text, False, False),
                ("The", False, False),
                (half, True, False),
            ):
                with self.subTest(words, said=said, again=again):
                    self.server.reset()
                    self.server.reply(text, chunk_size=5, times=1, **words)
                    self.send(stream)
                    if again:  # it has asked again, and was given just that
                        self.server.reply(half)
                        self.send(stream, 1)
                    self.send(quote(said), 1)
                    self.assertEqual("half_answer_taken" in self.names(), wanted, self.names())

    def quote_first(self, count):
        """Ask for a stream that ends after so many letters, and quote them."""
        self.server.reply("Certainly.", chunk_size=1, times=1, end_after_chunks=count)
        self.send({**HELLO, "stream": True}, 1)
        turn = {"role": "assistant", "content": "Certainly."[:count]}
        self.send({"model": "m", "messages": [*say("hello"), turn, *say("go on")]}, 1)

    def test_few_letters_are_quoted_by_chance(self):
        self.quote_first(7)
        self.assertEqual(self.names(), [])
        self.server.reset()
        self.quote_first(8)
        (finding,) = self.server.verdict()
        self.assertEqual(finding.text, 'took for whole "Certainl"')

    def test_what_was_too_large_to_keep_is_not_judged(self):
        with mock.patch.object(fake, "MAX_RECORDED_BODY_BYTES", 100):
            for _ in range(4):
                self.quote_first(9)
        self.assertEqual(self.names(), [])

    def test_counts_tell_who_of_two_comes_again(self):
        self.break_next(503, times=None)
        for after, count, port in ((0, 0, 1), (1, 1, 1), (0, 0, 2), (2, 2, 1)):
            self.now += after
            fields = self.fields({"x_stainless_retry_count": str(count)})
            request = Request("POST", CHAT, HELLO, headers=fields)
            request.peer = (("127.0.0.1", port), 1)
            self.server.answer(request)
        self.assertEqual(sorted(self.names()), ["gave_up", "no_retry"])

    def test_half_a_call_is_answered(self):
        for path in (CHAT, "/v1/responses"):
            with self.subTest(path):
                self.server.reset()
                called = {"name": "get_weather", "arguments": '{"city": "Rome"}', "id": "call_7"}
                self.server.reply(tool_calls=[called], in_="arguments", times=1)
                asked = {"messages": say("hi")} if path == CHAT else {"input": "hi"}
                self.send({"model": THINKER, **asked, "stream": True}, path=path)
                function = {"name": "get_weather", "arguments": '{"city'}
                call = {"id": "call_7", "type": "function", "function": function}
                turn = {"role": "assistant", "content": "", "tool_calls": [call]}
                result = {"role": "tool", "tool_call_id": "call_7", "content": "1"}
                body = {"messages": [*say("hi"), turn, result]}
                if path != CHAT:
                    item = {"type": "function_call", "call_id": "call_7", **function}
                    output = {"type": "function_call_output", "call_id": "call_7", "output": "1"}
                    body = {"input": [{"role": "user", "content": "hi"}, item, output]}
                self.send({"model": THINKER, **body}, 1, path=path)
                self.assertEqual(set(self.names()), {"no_retry", "half_answer_taken"})
                found = self.server.verdict()
                self.assertIn("took for whole a tool call", [each.text for each in found])

    def test_results_without_calls_and_calls_without_results(self):
        def turns(*calls, results=()):
            made = [
                {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}
                for id in calls
            ]
            said = {"role": "assistant", "content": None, "tool_calls": made}
            told = [{"role": "tool", "tool_call_id": id, "content": "1"} for id in results]
            return [*say("hi"), *([said] if made else []), *told]

        for messages, wanted in (
            (turns("a", "b", results=("b", "a")), ""),
            (turns("a", "b", results=("a",)), ""),  # more may come
            (turns("a", "b", results=("a",)) + say("go on"), "b"),
            (turns("a", results=("x",)), "x"),
            (turns(results=("x",)), "x"),
        ):
            with self.subTest(messages=messages):
                self.server.reset()
                for _ in range(2):  # told once
                    self.send({"model": "m", "messages": messages})
                self.assertEqual(self.names(), ["tool_call_invented"] * len(wanted))
                for finding in self.server.verdict():
                    self.assertRegex(finding.text, f'^sent .* result for "{wanted}"')

    def test_a_stream_is_left(self):
        for words, wanted in (
            ({}, ["stream_left"]),
            ({"latency": 60_000}, []),
            ({"stall_after_chunks": 1}, []),
        ):
            with self.subTest(words):
                self.server.reset()
                self.server.reply("One two three four five.", chunk_size=8, times=1, **words)
                self.send({**HELLO, "stream": True}, leave=2)
                said = {"role": "assistant", "content": "One two three four five."}
                self.send({"model": "m", "messages": [*say("hello"), said]}, 1)
                self.assertEqual(self.names(), wanted)

    def test_equal_requests_at_once_are_no_attempts(self):
        for first, second, wanted in (
            ({}, {}, []),  # cannot be told
            ({"x_stainless_retry_count": "0"}, {"x_stainless_retry_count": "0"}, ["no_retry"] * 2),
        ):
            with self.subTest(first):
                self.server.reset()
                self.break_next(503, latency=1, times=None)
                running = self.server.answer(
                    Request("POST", CHAT, HELLO, headers=self.fields(first))
                )
                self.send(**second)
                self.now += 1
                list(running.events or ())
                self.assertEqual(self.names(), wanted)

    def fields(self, more):
        return {"authorization": "Bearer x", **{k.replace("_", "-"): v for k, v in more.items()}}

    def test_counts_of_sdks_tell_attempts_apart(self):
        self.break_next(503, latency=1, times=2)
        both = [
            self.server.answer(
                Request("POST", CHAT, HELLO, headers=self.fields({"x_stainless_retry_count": "0"}))
            )
            for _ in range(2)
        ]
        self.now += 1
        for reply in both:
            list(reply.events or ())
        for _ in range(2):
            self.send(after=1, x_stainless_retry_count="1")
        self.assertEqual(self.names(), [])

    def test_marks_and_tests(self):
        self.break_next(400, times=None)
        self.send()
        mark = self.server.mark()
        self.send()
        self.assertEqual(self.names(), [])
        self.send(x_test_id="one")
        self.send(x_test_id="one")
        self.assertEqual([f.name for f in self.server.test("one").verdict()], ["retried_refusal"])
        self.assertEqual(self.server.test("two").verdict(), [])
        self.assertEqual(self.names(since=mark + 2), [])

    def test_the_text_says_what_happened_in_order_and_when(self):
        self.break_next(429, retry_after=2)
        self.send()
        self.send(after=0.5)
        with self.assertRaises(AssertionError) as caught:
            self.server.assert_resilient()
        said = str(caught.exception)
        self.assertIn("after 0.500 of 2 seconds", said)
        self.assertRegex(
            said, r"(?is)0\.000 s .*call 1: POST /v1/chat/completions -> 429.*0\.500 s .*call 2"
        )
        self.server.assert_resilient(allow="retry_after_ignored")
        self.server.assert_resilient(allow=["retry_after_ignored", "gave_up"])
        with self.assertRaisesRegex(ValueError, "did you mean gave_up"):
            self.server.assert_resilient(allow=["give_up"])

    def test_budgets(self):
        usage = {"prompt_tokens": 20, "completion_tokens": 30, "total_tokens": 50}
        self.server.reply("x", usage=usage)
        self.server.assert_budget(total_tokens=0, calls=0, at_once=0)
        for _ in range(3):
            self.send()
        self.server.assert_budget(total_tokens=150, calls=3, at_once=1)
        for words, said in (
            ({"total_tokens": 149}, "150 tokens, of 149 allowed"),
            ({"calls": 2}, "3 calls, of 2 allowed"),
            ({"at_once": 0}, "1 calls at once, of 0 allowed"),
        ):
            with self.subTest(words), self.assertRaisesRegex(AssertionError, said):
                self.server.assert_budget(**words)
        self.now += 1
        running = [
            self.server.answer(
                Request("POST", CHAT, {**HELLO, "stream": True}, headers=self.fields({}))
            )
            for _ in range(2)
        ]
        self.assertRaises(AssertionError, self.server.assert_budget, at_once=1)
        self.server.assert_budget(at_once=2)
        for reply in running:
            list(reply.events)


class KnownFaultTests(FakeCase):
    """The table of faults, and limits of a rate."""

    def test_each_is_met_once_and_gone_with_its_block(self):
        for name in fake.FAULTS:
            with self.subTest(name):
                self.server.reset()
                body = {**HELLO, "tools": [WEATHER], "stream": True}
                wanted = self.chat_of(body)
                with self.server.fault(name):
                    if name in ("refused", "stall", "slow_first_token"):
                        continue
                    self.assertNotEqual(self.chat_of(body), wanted)
                    self.assertEqual(self.chat_of(body), wanted)
                with self.server.fault(name):
                    pass
                self.assertEqual(self.chat_of(body), wanted)

    def chat_of(self, body):
        try:
            got = self.ask("POST", CHAT, body)
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        return got.status, got.raw, got.is_cut

    def test_nobody_listens_for_a_while(self):
        with TogetherAiServer(port=0) as self.server:
            port = self.server.port
            with self.server.fault("refused"):
                self.assertRaises(ConnectionRefusedError, self.ask, "POST", CHAT, HELLO)
            self.assertEqual(self.server.port, port)
            self.chat()

    def test_faults_are_words_of_fail(self):
        self.server.fail(fake.FAULTS["rate_limit"], times=1)
        self.assertEqual(self.ask("POST", CHAT, HELLO).status, 429)
        self.chat()
        with self.assertRaisesRegex(ValueError, "did you mean stall"), self.server.fault("stal"):
            pass

    def test_wrong_types_are_wrong_for_the_schema(self):
        schema = {
            "type": "object",
            "properties": {"a": {"type": "string"}, "b": {"type": "integer"}},
        }
        with self.server.fault("wrong_types"):
            got = self.chat(tools=[tool("f", parameters=schema)])
        (call,) = got["choices"][0]["message"]["tool_calls"]
        self.assertEqual(call["function"]["name"], "f")
        self.assertEqual(json.loads(call["function"]["arguments"]), {"a": 1, "b": "one"})


class ConnectionTests(FakeCase):
    """Whether equal requests are attempts of one depends on their connections."""

    def ask_by(self, connection):
        connection.request("POST", CHAT, json.dumps(HELLO), KEY)
        connection.getresponse().read()

    def test_equal_requests_of_clients_at_once(self):
        with TogetherAiServer(port=0) as self.server, contextlib.ExitStack() as stack:
            address = ("127.0.0.1", self.server.port)
            for status, count, wanted in (
                (400, 2, []),  # what each of two sends once cannot be told from what one repeats
                (400, 1, ["retried_refusal"]),
            ):
                self.server.reset()
                self.server.fail(status)
                connections = [
                    http.client.HTTPConnection(*address, timeout=PATIENCE) for _ in range(count)
                ]
                for connection in connections:
                    stack.callback(connection.close)
                    connection.connect()
                for connection in connections * (2 // count):
                    self.ask_by(connection)
                found = [each.name for each in self.server.verdict()]
                self.assertEqual(found, wanted)
                for connection in connections:
                    connection.close()
                wait_until(lambda: not self.server._http.clients)


class LimitTests(LocalCase):
    def setUp(self):
        self.now = 1_000_000.0

    def start(self, **options):
        self.server = TogetherAiServer(0, clock=lambda: self.now, **options)

    def statuses(self, count, model=LLAMA, path=CHAT):
        return [self.ask("POST", path, {**HELLO, "model": model}).status for _ in range(count)]

    def test_requests_come_back_with_the_time(self):
        self.start(rpm=3)
        self.assertEqual(self.statuses(4), [200, 200, 200, 429])
        got = self.ask("POST", CHAT, HELLO)
        self.assertEqual(
            (got.headers["retry-after"], got.json["error"]["type"]), ("20", "rate_limit")
        )
        self.assertIn("Your rate limits are 3 RPM (0.05 QPS)", got.json["error"]["message"])
        self.now += 19
        self.assertEqual(self.statuses(1), [429])
        self.now += 1
        self.assertEqual(self.statuses(2), [200, 429])
        self.now += 3600
        self.assertEqual(self.statuses(4), [200, 200, 200, 429])
        self.assertEqual(self.ask("GET", "/v1/models").status, 200)
        self.server.reset()
        self.assertEqual(self.statuses(1), [200])

    def test_all_that_are_allowed_may_come_at_once(self):
        self.now = 1_700_000_000.0
        for limit in (7, 9, 23):
            self.start(rpm=limit)
            self.assertEqual(self.statuses(limit + 1), [200] * limit + [429])

    def test_tokens_count_when_they_are_written(self):
        self.start(tpm=100)
        usage = {"prompt_tokens": 20, "completion_tokens": 100, "total_tokens": 120}
        self.server.reply("x", usage=usage)
        self.assertEqual(self.statuses(2), [200, 429])
        self.assertEqual(self.ask("POST", CHAT, HELLO).headers["retry-after"], "13")
        self.now += 13
        self.assertEqual(self.statuses(1), [200])

    def test_a_model_has_a_limit_of_its_own(self):
        self.start(rpm={LLAMA: 1})
        self.assertEqual(self.statuses(2), [200, 429])
        self.assertEqual(self.statuses(2, THINKER), [200, 200])
        error = self.ask("POST", CHAT, HELLO).json["error"]
        self.assertEqual(error["type"], "model_rate_limit")
        self.assertIn(
            f"this model {LLAMA}. The maximum rate limit for this model is 1.0", error["message"]
        )


class WatchTests(UpstreamCase):
    """`--watch` and `--check`."""

    def write(self, content):
        fixtures = [{"match": {"userMessage": "hello"}, "response": {"content": content}}]
        self.file.write_text(json.dumps({"fixtures": fixtures}))

    def watch(self):
        """Return what looks at the file for a server that has loaded it."""
        self.run_server()
        self.server.load(self.file)
        self.server.script.watch([str(self.folder)])

    def look(self, text="hello"):
        """Ask; return what is answered and what the server says meanwhile."""
        with mock.patch.object(fake, "complain") as said:
            answer = self.text(text)
        return answer, "".join(call.args[0] for call in said.call_args_list)

    def test_changes_are_followed(self):
        self.write("old")
        self.watch()
        self.assertEqual(self.look(), ("old", ""))
        self.write("new and longer")
        self.assertEqual(self.look(), ("new and longer", "loaded 1 fixtures again\n"))
        self.assertEqual(self.look(), ("new and longer", ""))
        more = [{"match": {"userMessage": "bye"}, "response": {"content": "Bye."}}]
        (self.folder / "more.json").write_text(json.dumps({"fixtures": more}))
        self.assertEqual(self.look("bye"), ("Bye.", "loaded 2 fixtures again\n"))
        self.file.unlink()
        text, said = self.look()
        self.assertEqual(said, "loaded 1 fixtures again\n")
        self.assertNotEqual(text, "new and longer")

    def test_what_was_added_at_run_time_stays(self):
        self.write("old")
        self.watch()
        self.server.reply("scripted", user_message="by hand")
        self.write("new and longer")
        self.assertEqual(self.look("by hand"), ("scripted", "loaded 1 fixtures again\n"))

    def test_a_broken_edit_is_told_once_and_keeps_the_old(self):
        self.write("old")
        self.watch()
        for broken, reason in (
            ('{"fixtures": [', "is not JSON"),
            ('{"fixtures": [' + "9" * 9000 + "]}", "is not JSON"),
            ('{"fixtures": [{"match": {"userMesage": "x"}, "response": {}}]}', "userMesage"),
        ):
            with self.subTest(broken[:50]):
                self.file.write_text(broken)
                text, said = self.look()
                self.assertRegex(said, f"^cannot load fixtures: recorded.json: .*{reason}")
                self.assertEqual((text, self.look()), ("old", ("old", "")))
        self.write("mended again")
        self.assertEqual(self.look()[0], "mended again")

    def test_the_program_follows(self):
        self.write("old")
        command = [*PROGRAM, "--port", "0", "--watch", "--fixtures", str(self.file)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, cwd=COPY, **pipes) as program:
            try:
                url = program.stdout.readline().split()[-1]
                self.server = types.SimpleNamespace(port=int(url.rpartition(":")[2]))
                self.assertEqual(self.text(), "old")
                self.file.write_text("{")
                self.assertEqual(self.text(), "old")
                for line in program.stderr:
                    if "cannot load fixtures: recorded.json: is not JSON" in line:
                        break
                self.write("new and longer")
                self.assertEqual(self.text(), "new and longer")
            finally:
                program.kill()

    def test_what_is_recorded_is_not_watched(self):
        options = fake.read_options(
            ["--watch", "--record", str(self.file), "--upstream", self.service.url]
        )
        self.assertEqual(fake.build_server(options).script.watched, [])

    def test_files_are_checked(self):
        good = {"match": {"userMessage": "x"}, "response": {"content": "y"}}
        foreign = {**good, "match": {"endpoint": "fal"}}
        (self.folder / "sub").mkdir()
        for name, fixtures in {
            "good.json": [good, good],
            "foreign.json": [good, foreign],
            "typo.json": [good, {"match": {"userMesage": "x"}, "response": {"content": "y"}}],
            "type.json": [{**good, "times": "often"}],
            "sub/one.json": [good],
            "wide.json": [
                {"match": {}, "response": {"content": "all"}},
                {**good, "response": {"toolCalls": [{"name": "f", "arguments": {}}]}},
                {"match": {"turnIndex": 2}, "response": {"content": "y"}},
                {"match": {}, "response": {"embedding": [1]}},
            ],
            "apart.json": [  # a completion has no tool calls
                {**good, "response": {"toolCalls": [{"name": "f", "arguments": {}}]}},
                good,
            ],
        }.items():
            (self.folder / name).write_text(json.dumps({"fixtures": fixtures}))
        (self.folder / "cut.json").write_text('{"fixtures": [')
        for name, status, said in (
            (
                "good.json",
                0,
                r"^file good\.json\[1\]: never answers, since file good\.json\[0\] has the same"
                r" match\n\S+good\.json: 2 fixtures, nothing wrong\n$",
            ),
            (
                "wide.json",
                0,
                r"^file wide\.json\[1\]: never answers, since file wide\.json\[0\] has a wider"
                r" match\n\S+: 4 fixtures, nothing wrong\n$",
            ),
            ("sub", 0, r"^\S+sub: 1 fixtures, nothing wrong\n$"),
            ("apart.json", 0, r"^\S+: 2 fixtures, nothing wrong\n$"),
            ("foreign.json", 0, r"endpoint fal\n.*1 fixtures, nothing wrong\n$"),
            ("typo.json", 1, r"^typo\.json: fixtures\[1\]\.match\.userMesage: .*userMessage\?\n$"),
            ("type.json", 1, r"^type\.json: fixtures\[0\]\.times: .+\n$"),
            ("cut.json", 1, r"^cut\.json: is not JSON: .+\n$"),
            ("none.json", 1, r"^.*No such file.*none\.json'\n$"),
            ("", 1, r"(?s)^cut\.json: is not JSON.*type\.json: fixtures.*typo\.json: fixtures"),
        ):
            with self.subTest(name):
                exit_status, printed, logged = run_main("--check", str(self.folder / name))
                self.assertEqual(exit_status, status, logged)
                self.assertRegex(logged if status else printed, said)


class LiveTests(UpstreamCase):
    """`.ci/fidelity.py --live`, where a second server plays the service."""

    KEY = "key-of-the-service-0123456789"

    def compare(self, *options):
        """Run the comparison; return its exit status and what it prints."""
        sys.path.insert(0, str(HERE / ".ci"))
        self.addCleanup(sys.path.remove, str(HERE / ".ci"))
        fidelity = importlib.import_module("fidelity")
        key = mock.patch.dict(os.environ, TOGETHER_API_KEY=self.KEY)
        args = mock.patch.object(sys, "argv", ["fidelity.py", *map(str, options)])
        said = io.StringIO()
        with key, args, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                status = fidelity.main()
            except SystemExit as error:
                status = error.code
        return status, said.getvalue()

    def write_requests(self, *requests):
        """Return a file of requests, none of which has been answered."""
        path = self.folder / "requests.jsonl"
        rows = [
            {"name": str(number), "request": {"method": method, "url": url, "body": body}}
            for number, (method, url, body) in enumerate(requests)
        ]
        path.write_bytes(write_lines(rows))
        return path

    def test_requests_are_sent_there_and_here(self):
        self.run_server(strict=True)
        asked = self.write_requests(
            ("POST", CHAT, HELLO),
            ("POST", CHAT, {**HELLO, "stream": True}),
            ("POST", CHAT, HELLO),  # sent already
            ("POST", CHAT, {"model": LLAMA}),
            ("POST", "/v1/embeddings", {"model": "intfloat/multilingual-e5-large-instruct"}),
            ("GET", "/v1/models", None),
            ("DELETE", "/v1/files/file-1", None),  # does harm
        )
        out = self.folder / "live.jsonl"
        status, said = self.compare(asked, "--live", self.server.base_url, "--out", out)
        self.assertEqual(status, 0, said)
        for part in (
            "2 was not recorded: ValueError: this request was sent already",
            "6 was not recorded: ValueError: only inference and GET are sent",
            "5 of 7 requests were recorded",
            "5 of 5 recordings are equal",
        ):
            self.assertIn(part, said)
        self.assertEqual([call.method for call in self.server.requests], ["POST"] * 4 + ["GET"])
        made = read_lines(out.read_bytes())
        for recording in made:
            self.assertEqual(recording["source"], "live")
            self.assertTrue(recording["request"]["url"].startswith(self.server.url))
        self.assertGreater(len(made[1]["response"]["events"]), 2)
        self.assertNotIn(self.KEY, out.read_text("utf-8"))
        # The file is one of recordings like those in use.
        self.assertEqual(self.compare(out, "--at-least", "1")[0], 0)

    def test_a_difference_is_listed(self):
        self.run_server()
        self.server.reply(json={"object": "chat.completion", "answer": self.KEY})
        asked, out = self.write_requests(("POST", CHAT, HELLO)), self.folder / "live.jsonl"
        status, said = self.compare(asked, "--live", self.server.base_url, "--out", out)
        self.assertEqual(status, 1, said)
        self.assertRegex(said, r"differs live-.*: .*answer is missing")
        self.assertNotIn(self.KEY, said + out.read_text("utf-8"))

    def test_a_key_travels_by_https_alone(self):
        asked, out = self.write_requests(("POST", CHAT, HELLO)), self.folder / "live.jsonl"
        status, said = self.compare(asked, "--live", "http://together.test/v1", "--out", out)
        self.assertEqual((status, out.exists()), (2, False))
        self.assertIn("a key travels by https alone", said)

    def test_a_service_that_refuses_the_key(self):
        self.run_server()
        self.server.fail(401)
        asked, out = self.write_requests(("POST", CHAT, HELLO)), self.folder / "live.jsonl"
        status, said = self.compare(asked, "--live", self.server.base_url, "--out", out)
        self.assertEqual(status, 1, said)
        self.assertIn("0 was not recorded: ValueError: the service refused the key", said)
        self.assertEqual(out.read_bytes(), b"")


class PageTests(FakeCase):
    """What a browser is sent; .ci/page.mjs tries it in one."""

    BROWSER = MappingProxyType({"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})

    def test_a_browser_gets_the_page(self):
        got = self.ask("GET", "/", headers=self.BROWSER)
        self.assertEqual(
            (got.status, got.headers["content-type"]), (200, "text/html; charset=utf-8")
        )
        self.assertEqual(got.headers["vary"], "Accept")
        self.assertTrue(got.raw.startswith(b"<!doctype html>"))
        self.assertLessEqual(len(got.raw), 16 * 1024)

    def test_the_documentation_it_names_is_there(self):
        got = self.ask("GET", self.json("GET", "/")["documentation"], headers={})
        self.assertEqual(
            (got.status, got.headers["content-type"]), (200, "text/markdown; charset=utf-8")
        )
        self.assertIn(b"| POST | `/v1/chat/completions` |", got.raw)
        self.assertEqual(self.server.requests, [])

    def test_others_get_json(self):
        for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json, text/plain, */*"}):
            with self.subTest(accept):
                got = self.ask("GET", "/", headers=accept)
                self.assertEqual(got.headers["content-type"], "application/json; charset=utf-8")
                self.assertEqual(
                    (got.json["name"], got.json["protocol"]), ("together-ai", "together-v1")
                )

    def test_it_asks_nobody_else(self):
        got = self.ask("GET", "/", headers=self.BROWSER)
        page, policy = got.raw.decode(), got.headers["content-security-policy"]
        self.assertEqual(
            re.findall(r"(?:https?:)?//[\w.]+|@import|url\(", page.replace("// ", "")), []
        )
        rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
        self.assertEqual((rules["default-src"], rules["connect-src"]), ("'none'", "'self'"))
        for tag in ("script", "style"):
            (text,) = re.findall(rf"<{tag}>(.*)</{tag}>", page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            self.assertEqual(rules[f"{tag}-src"], f"'sha256-{digest}'")

    def test_no_text_is_run_as_html(self):
        before = self.ask("GET", "/", headers=self.BROWSER).raw
        self.chat("<script>window.ran = 1</script>")
        self.assertEqual(self.ask("GET", "/", headers=self.BROWSER).raw, before)
        for name in (
            b"innerHTML",
            b"outerHTML",
            b"insertAdjacentHTML",
            b"document.write",
            b"eval(",
        ):
            self.assertNotIn(name, before)
        for path in ("/__parlel/requests", "/__parlel/requests/1"):
            got = self.ask("GET", path, headers=self.BROWSER)
            self.assertEqual(got.headers["content-type"], "application/json; charset=utf-8")

    def test_a_recorded_reply_is_served_so_that_it_cannot_run(self):
        page = {"text": "<script>1</script>", "contentType": "text/html"}
        self.server.reply(raw=page)
        self.ask("POST", CHAT, HELLO)
        got = self.ask("GET", "/__parlel/requests/1/reply", headers=self.BROWSER)
        self.assertEqual(
            (got.raw, got.headers["content-type"]), (b"<script>1</script>", "text/html")
        )
        self.assertEqual(got.headers["x-content-type-options"], "nosniff")
        self.assertIn("sandbox; default-src 'none'", got.headers["content-security-policy"])

    def test_rows_are_those_that_are_new_since(self):
        def rows(since):
            return self.json("GET", f"/__parlel/requests?view=rows&since={since}")

        self.chat("one")
        first = rows(0)
        self.assertEqual([row["n"] for row in first["rows"]], [1])
        self.assertEqual(rows(first["next"])["rows"], [])
        self.ask("POST", CHAT, {})
        second = rows(first["next"])
        (row,) = second["rows"]
        self.assertEqual((row["n"], row["status"], second["last"]), (2, 400, 2))
        self.server.reset()
        self.assertNotEqual(rows(0)["epoch"], second["epoch"])

    def rows(self):
        return self.json("GET", "/__parlel/requests?view=rows")["rows"]

    def test_a_row_says_what_was_asked_and_answered(self):
        self.server.reply("It is\nsunny.", user_message="weather", times=1)
        self.server.reply(tool_calls=[{"name": "look", "arguments": {"at": "sky"}}])
        self.chat("the weather?", nonsense=1)
        self.stream(messages=say("and then?"), tools=[tool("look", parameters=CITY)])
        self.post("/v1/responses", {"model": LLAMA, "input": "hello", "stream": True, "tools": []})
        self.ask("POST", CHAT, {"model": LLAMA, "messages": []})
        one, two, _, four = self.rows()
        self.assertEqual((one["question"], one["answer"]), ("the weather?", "It is sunny."))
        self.assertIn("nonsense", one["warning"])
        self.assertEqual((two["question"], two["answer"]), ("and then?", 'look({"at":"sky"})'))
        self.assertEqual((four["question"], four["answer"]), ("", four["error"]))

    def test_a_row_tells_of_every_kind(self):
        self.post("/v1/embeddings", {"model": LLAMA, "input": ["one", "two"]})
        self.post("/v1/rerank", RERANK)
        self.post("/v1/images/generations", {"model": FLUX, "prompt": "a boat", "width": 16})
        self.post("/v1/completions", {"model": LLAMA, "prompt": "Once upon"})
        self.post("/v1/responses", {"model": LLAMA, "input": "hello", "stream": True})
        rows = self.rows()
        self.assertEqual(
            [row["question"] for row in rows],
            ["one two", RERANK["query"], "a boat", "Once upon", "hello"],
        )
        self.assertTrue(rows[0]["answer"].startswith('[{"object":"embedding"'))
        self.assertTrue(rows[1]["answer"].startswith('[{"index":'))
        (image,) = rows[2]["images"]
        self.assertEqual(self.ask("GET", image[len(self.server.url) :]).raw[:4], b"\x89PNG")
        for row in rows[3:]:
            self.assertRegex(row["answer"], r"^\w+ \w+")

    def test_a_conversation_is_one_thread_and_a_cut_stream_shows_what_came(self):
        first = self.chat("hello")["choices"][0]["message"]["content"]
        more = [*say("hello"), {"role": "assistant", "content": first}, *say("and now?")]
        self.chat(messages=more)
        self.chat("another")
        self.server.reply("one two three", disconnect_after_chunks=2)
        self.ask("POST", CHAT, {**HELLO, "stream": True})
        one, two, other, cut = self.rows()
        self.assertEqual(one["thread"], two["thread"])
        self.assertNotEqual(one["thread"], other["thread"])
        self.assertEqual((cut["outcome"], cut["answer"]), ("cut", "one two"))
        self.assertEqual(two["question"], "and now?")
        call = self.json("GET", "/__parlel/requests/2")
        self.assertEqual([each["role"] for each in call["asked"]], ["user", "assistant", "user"])
        self.assertEqual(
            call["said"][0]["content"], call["reply"]["choices"][0]["message"]["content"]
        )

    def test_a_call_tells_what_its_client_did_wrong(self):
        self.server.fail(400, times=2)
        for _ in range(2):
            self.answer("POST", CHAT, HELLO)
        self.chat("something else")
        wrong = [self.json("GET", f"/__parlel/requests/{n}")["verdict"] for n in (1, 2, 3)]
        self.assertIn("retried_refusal: it ", wrong[1][0])
        self.assertEqual(wrong[2], [])

    def test_a_socket_shows_what_went_both_ways(self):
        call = fake.Call(1, Request("GET", "/v1/realtime"), 0.0)
        call.status = 101
        call.is_stream = True
        call._pieces = [
            b': data: {"type": "echo"}\n\n',
            b'data: {"type": "session.created"}\n\n',
        ]
        self.assertEqual([each["role"] for each in fake.list_said(call)], ["client", "server"])
        self.assertEqual(fake.show_row(call)["answer"], "0.0 s of sound")

    def copied(self, number):
        return self.json("GET", f"/__parlel/requests/{number}")["copy"]["python"]

    def test_a_copy_in_python_is_short(self):
        self.server.reply("Hi!", user_message="hello")
        self.chat("hello you")
        self.assertEqual(self.copied(1), "server.reply('Hi!', user_message='hello you')")
        self.server.reset()
        self.chat("hello", tools=[WEATHER], tool_choice="required", stream=False)
        (call,) = self.server.requests[0].reply["choices"][0]["message"]["tool_calls"]
        wanted = json.loads(call["function"]["arguments"])
        self.assertIn(f"[{{'name': 'get_weather', 'arguments': {wanted}}}]", self.copied(1))
        self.post("/v1/images/generations", {"model": FLUX, "prompt": "a boat", "width": 16})
        self.assertIn('image=Path("call-2.png").read_bytes()', self.copied(2))

    def test_a_copied_answer_is_given_again(self):
        asked = [
            (CHAT, HELLO),
            (CHAT, {**HELLO, "model": THINKER, "max_tokens": 30}),
            ("/v1/responses", {"model": THINKER, "input": "hello"}),
            ("/v1/completions", {"model": LLAMA, "prompt": "hello"}),
            ("/v1/rerank", RERANK),
            (CHAT, {**HELLO, "messages": []}),
            (CHAT, {**HELLO, "n": 2}),
        ]
        for path, body in asked:
            with self.subTest(path=path, body=body):
                self.server.reset()
                first = self.ask("POST", path, body)
                exec(self.copied(1), {"server": self.server})
                again = self.ask("POST", path, body)
                self.assertEqual((again.status, again.raw), (first.status, first.raw))
                self.assertNotEqual(self.server.requests[1].fixture, "")

    def test_a_copied_answer_says_what_it_is_for(self):
        self.ask("POST", CHAT, {**HELLO, "messages": []})
        self.assertIn("endpoint='chat'", self.copied(1))
        self.post(CHAT, {**HELLO, "tools": [WEATHER], "tool_choice": "required"})
        self.assertIn("has_tool_result=False", self.copied(2))
        self.chat("hello")
        self.assertNotIn("tool_result", self.copied(3))
        self.assertNotIn("endpoint", self.copied(3))
        body = {"model": FLUX, "prompt": "a lake", "width": 64, "height": 64, "n": 2}
        self.post("/v1/images/generations", body)
        self.assertNotIn("Path(", self.copied(4))

    def test_code_is_not_edited(self):
        self.server.reply(lambda request: "x", user_message="hi")
        self.server.reply("x", when=lambda request: True)
        self.server.reply("x")
        rows = self.json("GET", FIXTURES)["fixtures"]
        self.assertEqual(["has_code" in row for row in rows], [True, True, False])

    def test_what_is_filtered_is_downloaded_as_fixtures(self):
        self.chat("about apples")
        self.chat("about pears")
        got = self.json("GET", FIXTURES + "?from=requests&text=apples")
        matches = [entry["match"]["userMessage"] for entry in got["fixtures"]]
        self.assertEqual(matches, ["about apples"])

    def test_a_call_can_be_said_again(self):
        odd = 'It\'s {{odd}}: $HOME `ls` \\ "quoted"\n\u2028 ü'
        self.server.reply(odd, reasoning="Hm.", user_message="it's")
        asked = {"model": THINKER, "messages": say("it's $HOME `ls`\n")}
        wanted = self.post(CHAT, asked).json
        copies = self.json("GET", "/__parlel/requests/1")["copy"]
        self.server.reset()
        exec(copies["python"], {"server": self.server})
        self.assertEqual(self.post(CHAT, asked).json, wanted)
        self.server.reset()
        self.post(FIXTURES, json.loads(copies["fixture"]))
        self.assertEqual(self.post(CHAT, asked).json, wanted)
        if shutil.which("curl") and os.name == "posix":
            self.assertIn("content-type", copies["curl"])
            done = subprocess.run(["sh", "-c", copies["curl"]], capture_output=True, check=True)
            self.assertEqual(json.loads(done.stdout), wanted)
            self.assertEqual(self.server.requests[-1].body, asked)

    def test_what_is_odd_is_shown(self):
        stream = 'data: {"choices": [{"index": [1], "delta": {"content": 5}}, {"delta": "x"}]}\n\n'
        raw = {"text": stream, "contentType": "text/event-stream"}
        headers = {**KEY, "X-Parlel-Fixture": json.dumps({"raw": raw})}
        self.post(CHAT, {"messages": [{"content": None}, {"role": 5, "tool_calls": "x"}]}, headers)
        (row,) = self.json("GET", "/__parlel/requests?view=rows")["rows"]
        self.assertEqual(row["status"], 200)
        fixture = self.json("GET", "/__parlel/requests/1")["copy"]["fixture"]
        self.assertEqual(json.loads(fixture)["fixtures"][0]["response"]["raw"], raw)
        self.assertEqual(self.server.verdict(), [])

    @unittest.skipUnless(shutil.which("curl") and os.name == "posix", "needs curl and a shell")
    def test_a_copied_command_sends_all_and_runs_nothing(self):
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        (folder / "it's.wav").write_bytes(write_sound(1))
        odd = {**KEY, "X-Odd": "it's $(touch ran) `touch ran`", "X-Empty": ""}
        form = b"a=1&b=it%27s+%24%28touch+ran%29&b=%40x"
        urlencoded = {**odd, "Content-Type": "application/x-www-form-urlencoded"}
        upload = write_form(HEARS, write_sound(1)).replace(b"a.jsonl", b"it's.wav")
        for method, path, body, headers in (
            ("POST", CHAT + "?a=b%20c&d=$(touch%20ran)'[1-2]", HELLO, odd),
            ("X`touch$IFS$9ran`", "/v1/models", b"", odd),
            ("DELETE", "/v1/files/a%2f..%2fb", b"", odd),
            ("HEAD", "/v1/models", b"", odd),
            ("POST", "/v1/nothing", form, urlencoded),
            ("POST", "/v1/audio/transcriptions", upload, {**FORM, "X-Odd": odd["X-Odd"]}),
        ):
            with self.subTest(method=method, path=path):
                self.ask(method, path, body, headers)
                sent = self.server.requests[-1]
                command = self.json("GET", f"/__parlel/requests/{sent.number}")["copy"]["curl"]
                run = ["sh", "-c", command]
                subprocess.run(run, cwd=folder, capture_output=True, check=True, timeout=PATIENCE)
                again = self.server.requests[-1]
                self.assertEqual(again.number, sent.number + 1)
                for name in ("method", "path", "query", "body"):
                    self.assertEqual(getattr(again, name), getattr(sent, name), name)
                self.assertEqual(again.headers.get("x-odd"), odd["X-Odd"])
        self.assertEqual(os.listdir(folder), ["it's.wav"])


class RepositoryTests(unittest.TestCase):
    source = (HERE / "together_fake.py").read_text("utf-8")
    readme = (HERE / "README.md").read_text("utf-8")

    @unittest.skipIf(sys.version_info < (3, 10), "hints of types count as names there")
    def test_the_file_reads_downwards(self):
        lines = {}
        for number, line in enumerate(self.source.split("\n"), 1):
            for name in re.findall(r"^(?:def |class |(?=[A-Z].* = ))(\w+)", line):
                lines.setdefault(name, number)
        self.assertIn("TogetherAiServer", lines)
        tables, upward = [symtable.symtable(self.source, "together_fake.py", "exec")], []
        for table in tables:
            tables += table.get_children()
            if table is not tables[0]:
                names = [name.get_name() for name in table.get_symbols() if name.is_global()]
                late = [name for name in names if lines.get(name, 0) > table.get_lineno()]
                upward += [f"{name} in {table.get_name()}()" for name in late]
        self.assertEqual(upward, [])

    def test_no_constant_is_given_twice(self):
        names = re.findall(r"^([A-Z]\w+)(?:: .+?)? = ", self.source, re.M)
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        self.assertEqual(twice, [])

    def test_the_map_lists_the_sections(self):
        banners = re.findall(r"^# === (.+) ===$", self.source, re.M)
        listed = re.findall(r"^    (\w[\w ]*?)(?: \*)? +(?<=  |\* )\w", fake.__doc__, re.M)
        self.assertEqual(listed, banners)

    def test_only_the_standard_library_is_imported(self):
        names = set(re.findall(r"^ *(?:import|from) (\w+)", self.source, re.M))
        names -= {"typing_extensions"}  # for mypy alone: TestCaseTests import the file without it
        self.assertIn("json", names)
        library = Path(os.__file__).parent
        for name in names - set(sys.builtin_module_names):
            with self.subTest(name):
                origin = importlib.util.find_spec(name).origin
                self.assertNotIn("-packages", origin)  # where pip and distributions install
                self.assertTrue(origin == "frozen" or library in Path(origin).parents, origin)

    def test_the_readme_counts_the_routes(self):
        rows = re.findall(r"^\| ([\w, -]+) \| (\d+) \| ((?:`[\w/-]+` ?)+) \|$", self.readme, re.M)
        family = {part: name for name, _, parts in rows for part in re.findall("`(.+?)`", parts)}
        firsts = (re.sub(r"^/(v\d/)?", "", route.path).split("/")[0] for route in fake.ROUTES)
        counts = collections.Counter(family[first or "/"] for first in firsts)
        self.assertEqual(counts, {name: int(count) for name, count, _ in rows})

    def test_the_first_screen_of_the_readme_is_one(self):
        first = self.readme.partition("\n## ")[0]
        self.assertLessEqual(len(first.split("\n")), 60)
        (picture,) = re.findall(r"!\[.+?\]\((.+?)\)", first)
        self.assertLess((HERE / picture).stat().st_size, 60_000)
        self.assertIn(f"version {fake.__version__} of", first)

    def test_links_of_the_readme_lead_somewhere(self):
        heads = re.findall(r"^#+ (.+)$", self.readme, re.M)
        known = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
        self.assertEqual(set(re.findall(r"\(#([\w-]+)\)", self.readme)) - known, set())

    def test_snippets_of_the_readme_run(self):
        snippets = re.findall(r"^```python\n(.*?)^```", self.readme, re.M | re.S)
        self.assertGreater(len(snippets), 1)
        for snippet in snippets:
            with self.subTest(snippet=snippet[:60]):
                run_snippet(snippet)

    @unittest.skipUnless(shutil.which("curl") and shutil.which("sh"), "there is no curl")
    def test_commands_of_the_readme_run(self):
        commands = re.findall(r"^```sh\n(.*?)^```", self.readme, re.M | re.S)
        self.assertGreater(len(commands), 1)
        with TogetherAiServer(port=0) as server:
            for command in commands:
                here = command.replace("127.0.0.1:4863", f"127.0.0.1:{server.port}")
                here = here.replace("python3 -m together_fake", " ".join(PROGRAM))
                done = subprocess.run(
                    ["sh", "-ec", here], cwd=COPY, capture_output=True, timeout=3 * PATIENCE
                )
                self.assertEqual(done.returncode, 0, (here, done.stderr))

    def test_the_manifest_is_true(self):
        manifest = json.loads((HERE / "manifest.json").read_text("utf-8"))
        self.assertEqual(manifest["version"], fake.__version__)
        self.assertEqual(
            {key: manifest[key] for key in ("name", "port", "protocol", "healthcheck")},
            {"name": "together-ai", "port": 4863, "protocol": "http", "healthcheck": "/health"},
        )
        self.assertIn(f"`{manifest['command']}`", self.readme)
        original = {"TOGETHER_API_KEY", "TOGETHER_BASE_URL"}
        self.assertEqual(
            manifest["env_vars"]["TOGETHER_BASE_URL"], TogetherAiServer().origin + "/v1"
        )
        self.assertEqual(manifest["env_vars"].keys(), original)
        self.assertAlmostEqual(manifest["size_kb"], len(self.source.encode()) / 1024, delta=30)


# === Official clients ===

ERRORS = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError"}
V1_ERRORS = {400: "InvalidRequestError", 401: "AuthenticationError", 404: "InvalidRequestError"}
GREETING = say("Tell me about the harbour at night.")
MADE = {"name": "multiply", "arguments": '{"a": 6, "b": 7}'}
SHOWN = [
    {"type": "text", "text": "And what does this picture show?"},
    {"type": "image_url", "image_url": {"url": PIXEL}},
]
ALL_ROLES = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "What is 6 times 7?"},
    {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": MADE}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": SHOWN},
]


def need(package: str, *majors: int):
    """Import a client whose major version is one of `majors`, or skip the tests that want it.

    A package that REQUIRE_CLIENTS names must be there: its absence fails.
    """
    os.environ.setdefault("TOGETHER_NO_BANNER", "1")
    try:
        module = importlib.import_module(package)
        version = importlib.metadata.version(package)
    except ImportError as error:
        if package in REQUIRED:
            raise
        raise unittest.SkipTest(f"{package} is not installed") from error
    if majors and int(version.split(".")[0]) not in majors:
        raise unittest.SkipTest(f"{package} {version} is tested by another class")
    return module


async def settle(result):
    """Wait for whatever an async client returned; a stream becomes a list."""
    if inspect.isawaitable(result) and not hasattr(result, "__aiter__"):
        result = await result
    return [item async for item in result] if hasattr(result, "__aiter__") else result


class PytestClientTests(unittest.TestCase):
    """The file as a plugin, in a session of pytest."""

    TESTS = """
import os, urllib.request
import pytest

def ask(text):
    data = b'{"model": "m", "messages": [{"role": "user", "content": "%s"}]}' % text
    url = os.environ["TOGETHER_BASE_URL"] + "/chat/completions"
    request = urllib.request.Request(url, data, {"Authorization": "Bearer x"})
    return urllib.request.urlopen(request).read()

def test_answer(together_fake, together_fake_server):
    assert together_fake is together_fake_server and not together_fake.strict
    together_fake.reply("Hi!", user_message="hello")
    assert b"Hi!" in ask(b"hello")
    assert os.environ["OPENAI_CUSTOM_HEADERS"].endswith("test_it.py::test_answer")

def test_fresh_state(together_fake):
    assert together_fake.requests == [] and together_fake.script.seed == 7
    together_fake.reply("Hi!", user_message="hello")
    ask(b"good-bye")
    assert False

@pytest.mark.together_fake(on_miss="error", strict=True)
def test_options(together_fake):
    assert together_fake.strict and together_fake.on_miss == "error"

@pytest.mark.together_fake(on_mis="error")
def test_a_typo(together_fake):
    pass

@pytest.mark.together_fake(seed=3)
def test_an_option_of_the_start(together_fake):
    pass

def test_environment():
    assert "OPENAI_CUSTOM_HEADERS" not in os.environ

def test_each_fault(together_fake, together_fault):
    if together_fault == "server_error":
        with pytest.raises(urllib.error.HTTPError):
            ask(b"hello")
        assert ask(b"hello") and not together_fake.verdict()
"""

    def test_a_session(self):
        need("pytest")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "conftest.py").write_text('pytest_plugins = ["together_fake"]\n')
            Path(folder, "pytest.ini").write_text("[pytest]\ntogether_fake = --seed 7\n")
            Path(folder, "test_it.py").write_text(self.TESTS, "utf-8")
            # Rewriting the asserts of the plugin, too, would take as long as all the rest.
            options = ["-q", "--tb=native", "-p", "no:cacheprovider", "--assert=plain"]
            options += ["-W", "error::pytest.PytestWarning"]
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(COPY), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                capture_output=True,
                text=True,
                timeout=60,
            )
        passed = 3 + len(fake.FAULTS)
        self.assertIn(f"1 failed, {passed} passed, 2 errors", done.stdout)
        self.assertIn("takes no on_mis, did you mean on_miss?", done.stdout)
        self.assertIn("takes no seed; valid here: strict, on_miss", done.stdout)
        (section,) = re.findall(r"^-+ together_fake -+\n(.*?)^==", done.stdout, re.M | re.S)
        self.assertRegex(section, r"^answered by no fixture:\n  <Call 1: POST /v1/chat/completions")
        self.assertIn("never served:\n", section)


class Driver:
    """One way to use every client, sync or async: blocking calls, lists instead of streams."""

    def __init__(self, name, client):
        self.name = name
        self.client = client
        self.loop = asyncio.new_event_loop() if "async" in name else None
        self.strict = "strict" in name
        # Strict, openai's client refuses what OpenAI sends: base64, unfinished text completions.
        self.picky = "openai" in name and self.strict

    def __call__(self, path, **fields):
        """Call the method at `path`; what its signature does not know goes to `extra_body`."""
        method = operator.attrgetter(path)(self.client)
        known = inspect.signature(method).parameters
        if "extra_body" in known:
            extra = {name: fields.pop(name) for name in list(fields) if name not in known}
            fields.update({"extra_body": extra} if extra else {})
        return self.finish(method(**fields))

    def finish(self, result):
        if self.loop:
            return self.loop.run_until_complete(settle(result))
        listed = isinstance(result, Iterator) or hasattr(result, "iter_pages")
        return list(result) if listed else result

    def close(self):
        if hasattr(self.client, "close"):
            self.finish(self.client.close())
        if self.loop:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def chat(self, messages=GREETING, model=LLAMA, **fields):
        return self("chat.completions.create", model=model, messages=messages, **fields)

    def complete(self, prompt="Once upon", model=LLAMA, **fields):
        return self("completions.create", model=model, prompt=prompt, **fields)

    def embed(self, text, model="intfloat/multilingual-e5-large-instruct", **fields):
        if self.picky:
            fields.setdefault("encoding_format", "float")
        return self("embeddings.create", model=model, input=text, **fields)

    def stream_with_helper(self, **fields):
        """Return the events and the final completion of openai's own stream helper."""
        manager = self.client.chat.completions.stream(model=LLAMA, **fields)
        if not self.loop:
            with manager as stream:
                return list(stream), stream.get_final_completion()

        async def drain():
            async with manager as stream:
                return [event async for event in stream], await stream.get_final_completion()

        return self.loop.run_until_complete(drain())


def each_client(scenario):
    """Make a test that runs the scenario with every client of its class on a fresh record."""

    @functools.wraps(scenario)
    def test(self):
        for call in self.calls:
            with self.subTest(client=call.name):
                self.server.reset()
                scenario(self, call)

    return test


def summarize(reply):
    """Return `{index: what the choice says}` of a whole reply or of a stream's chunks."""
    if isinstance(reply, list):
        return fold_choices([chunk.model_dump() for chunk in reply])["choices"]
    return flatten_whole(reply.model_dump())["choices"]


def called(reply):
    """Return `[(name, arguments)]` of the tools that the first choice calls."""
    calls = summarize(reply)[0]["calls"].values()
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


def find_usage(chunks):
    """Return the counts of the only chunk that has usage."""
    counts = [chunk.usage for chunk in chunks if chunk.usage]
    if len(counts) != 1:
        raise AssertionError(f"usage is on {len(counts)} of {len(chunks)} chunks, not on one")
    return counts[0]


def likeness(one, other):
    return sum(map(operator.mul, one, other))


def answer_models():
    """Return pydantic models whose schemas use references, unions, bounds and recursion."""
    from typing import Literal, Optional

    from pydantic import BaseModel, Field, create_model

    class Folder(BaseModel):
        name: str
        folders: list[Folder]

    address = create_model("Address", street=(str, ...), city=(str, ...))
    person = create_model(
        "Person",
        name=(str, ...),
        age=(int, Field(ge=18, le=120)),
        email=(str, Field(pattern=r"^[a-z]+@[a-z]+\.com$")),
        address=(address, ...),
        former=(list[address], Field(max_length=2)),
        nickname=(Optional[str], ...),
        mood=(Literal["calm", "merry"], ...),
        files=(Folder, ...),
    )
    weather = create_model("Weather", city=(str, ...), unit=(Literal["celsius", "kelvin"], ...))
    product = create_model("Product", a=(int, ...), b=(int, Field(ge=1, le=9)))
    return person, weather, product


def make_tools():
    """Return two tools, and the models that their arguments must fit."""
    _, weather, product = answer_models()
    models = {"get_weather": weather, "multiply": product}
    descriptions = ("Get the current weather of a city", "Multiply two numbers")
    tools = [
        {"name": name, "description": text, "parameters": model.model_json_schema()}
        for text, (name, model) in zip(descriptions, models.items())
    ]
    return [{"type": "function", "function": tool} for tool in tools], models


class ClientCase:
    """Every client of one package: sync and async, at each base URL, lenient and strict."""

    package = ""
    majors = ()
    strictness = ({}, {"_strict_response_validation": True})

    @classmethod
    def setUpClass(cls):
        cls.module = need(cls.package, *cls.majors)
        cls.major = int(importlib.metadata.version(cls.package).split(".")[0])
        cls.server = TogetherAiServer(port=0).start()
        cls.addClassCleanup(cls.server.stop)
        cls.calls = [
            cls.connect(url, is_async, **options)
            for is_async in (False, True)
            for options in cls.strictness
            for url in cls.base_urls(cls.server)
        ]

    @classmethod
    def base_urls(cls, server):
        return [server.base_url]

    @classmethod
    def connect(cls, url, is_async=False, **options):
        name = " ".join([cls.package, "async" if is_async else "sync", url, *options])
        make = getattr(cls.module, ("Async" if is_async else "") + cls.maker)
        options = {"api_key": "parlel-together", "max_retries": 0, **options}
        call = Driver(name, make(base_url=url, **options))
        cls.addClassCleanup(call.close)
        return call


class ClientScenarioCase(ClientCase):
    """What every generation of every client must be able to do."""

    errors = ERRORS
    key_header = "default_headers"
    strictness = ({}, {"_strict_response_validation": True})
    image_size = MappingProxyType({"width": 320, "height": 192})
    image_base64 = "base64"
    draw = "images.generate"

    def assertRefused(self, call, path, status, param=None, code=None, **fields):
        base = getattr(self.module, "APIError", None) or self.module.error.TogetherException
        with self.assertRaises(base) as caught:
            call(path, **fields)
        error = caught.exception
        self.assertEqual(type(error).__name__, self.errors[status], error)
        if hasattr(error, "api_response"):
            body = error.api_response.model_dump()
        else:
            body = error.body.get("error", error.body)
        self.assertEqual((body["param"], body["code"]), (param, code), error)
        self.assertGreater(len(body["message"]), 10, body)

    def assertInvalid(self, ask, *args, **fields):
        """Ask for a body of production's form, which a client that validates strictly refuses."""
        with self.assertRaises(self.module.APIResponseValidationError):
            ask(*args, **fields)

    def assertSameStream(self, call, **fields):
        """Ask for the whole answer and for the stream: they must be the same. Return the whole."""
        whole = call.chat(**fields)
        if call.strict and self.package == "together" and called(whole):
            self.assertInvalid(call.chat, stream=True, **fields)
            return whole
        chunks = call.chat(stream=True, **fields)
        self.assertEqual(summarize(chunks), summarize(whole))
        self.assertEqual(find_usage(chunks).model_dump(), whole.usage.model_dump())
        return whole

    @each_client
    def test_chat(self, call):
        reply = call.chat()
        (choice,) = reply.choices
        self.assertEqual((choice.index, choice.message.role), (0, "assistant"))
        self.assertGreater(len(choice.message.content.split()), 3, choice)
        self.assertEqual(choice.finish_reason, "stop")
        self.assertFalse(choice.message.tool_calls)
        usage = reply.usage
        self.assertEqual(usage.prompt_tokens + usage.completion_tokens, usage.total_tokens)
        self.assertGreater(min(usage.prompt_tokens, usage.completion_tokens), 3)
        self.assertEqual((reply.model, reply.object), (LLAMA, "chat.completion"))
        self.assertEqual(call.chat().model_dump(), reply.model_dump(), "not repeatable")
        self.assertNotEqual(call.chat(seed=7).choices[0].message.content, choice.message.content)

    def test_clients_get_the_same_answer(self):
        self.assertEqual(len({call.chat().choices[0].message.content for call in self.calls}), 1)

    @each_client
    def test_record_holds_what_was_sent(self, call):
        call.chat(ALL_ROLES, model=SEES, temperature=0.5)
        (seen,) = self.server.requests
        self.assertEqual(seen.body["messages"], ALL_ROLES)
        self.assertEqual((seen.body["temperature"], seen.status), (0.5, 200))

    @each_client
    def test_streams_are_the_same_answer(self, call):
        every_role = {"messages": ALL_ROLES, "model": SEES}
        for fields in ({}, {"n": 2}, {"n": 3, "max_tokens": 9}, {"model": OTHER}, every_role):
            with self.subTest(**fields):
                self.assertSameStream(call, **fields)

    @each_client
    def test_usage_chunk(self, call):
        for model, is_apart in ((LLAMA, False), (OTHER, True)):
            *chunks, last = call.chat(model=model, stream=True)
            self.assertEqual(last.choices == [], is_apart)
            self.assertEqual(last.usage.model_dump(), call.chat(model=model).usage.model_dump())
            self.assertEqual([chunk.usage for chunk in chunks if chunk.usage], [])

    @each_client
    def test_limits(self, call):
        whole = call.chat().choices[0].message.content
        for name in ("max_tokens", "max_completion_tokens"):
            reply = call.chat(**{name: 5})
            self.assertEqual(reply.usage.completion_tokens, 5, name)
            self.assertEqual(reply.choices[0].finish_reason, "length", name)
            self.assertTrue(whole.startswith(reply.choices[0].message.content), name)
        word = whole.split()[4]
        (stopped,) = call.chat(stop=[word]).choices
        self.assertEqual(stopped.message.content, whole[: whole.index(word)], f"stop {word!r}")
        self.assertEqual(stopped.finish_reason, "stop")
        first, second = call.chat(n=2).choices
        self.assertEqual((first.index, second.index), (0, 1))
        self.assertNotEqual(first.message.content, second.message.content)

    @each_client
    def test_completions(self, call):
        if call.picky:
            self.assertInvalid(call.complete, max_tokens=12)
            return
        reply = call.complete(max_tokens=12)
        (choice,) = reply.choices
        self.assertTrue(choice.text)
        self.assertEqual((choice.finish_reason, reply.usage.completion_tokens), ("length", 12))
        self.assertEqual(getattr(reply.object, "value", reply.object), "text.completion")
        if call.strict:
            self.assertInvalid(call.complete, max_tokens=12, stream=True)
            return
        chunks = call.complete(max_tokens=12, stream=True)
        self.assertEqual(summarize(chunks), summarize(reply))
        self.assertEqual(find_usage(chunks).model_dump(), reply.usage.model_dump())

    @each_client
    def test_embeddings(self, call):
        texts = ["a red fox in the snow", "the red fox sleeps", "quarterly tax report"]
        if call.picky:  # production sends no usage
            self.assertInvalid(call.embed, texts)
            return
        data = call.embed(texts).data
        self.assertEqual([item.index for item in data], [0, 1, 2])
        fox, sleeper, tax = (item.embedding for item in data)
        for vector in (fox, sleeper, tax):
            self.assertEqual(len(vector), 1024)
            self.assertAlmostEqual(math.hypot(*vector), 1, places=4)
        self.assertGreater(likeness(fox, sleeper), likeness(fox, tax))
        self.assertEqual(list(call.embed(texts[0]).data[0].embedding), list(fox))
        for model in ("togethercomputer/m2-bert-80M-8k-retrieval", "somebody/unknown"):
            self.assertEqual(len(call.embed("one text", model=model).data[0].embedding), 768)

    @each_client
    def test_images(self, call):
        draw = functools.partial(call, self.draw, model=FLUX, prompt="a heron", **self.image_size)
        if call.strict:  # production says neither of what type an image is, nor when it was made
            self.assertInvalid(draw, response_format=self.image_base64)
            return
        (image,) = draw(response_format=self.image_base64).data
        data = base64.b64decode(image.b64_json, validate=True)
        self.assertEqual(png_size(data), (320, 192))
        first, second = draw(response_format="url", n=2).data
        for item in (first, second):
            with urllib.request.urlopen(item.url) as answer:
                self.assertEqual(png_size(answer.read()), (320, 192))
        self.assertNotEqual(first.url, second.url)
        (default,) = draw().data
        self.assertTrue(default.url)
        self.assertEqual(png_size(base64.b64decode(default.b64_json)), (320, 192))

    @each_client
    def test_refusals(self, call):
        chat = functools.partial(self.assertRefused, call, "chat.completions.create", model=LLAMA)
        chat(status=400, param="messages", messages=[])
        chat(status=400, param="temperature", messages=GREETING, temperature=9)
        absent = {"type": "function", "function": {"name": "absent"}}
        tool = {"type": "function", "function": {"name": "present"}}
        chat(status=400, param="tool_choice", messages=GREETING, tools=[tool], tool_choice=absent)
        chat(status=400, param="messages", messages=[], stream=True)
        self.assertTrue(call.chat().choices, "the connection is of no use after an error")

    def test_wrong_key_and_path(self):
        request = {"path": "chat.completions.create", "model": LLAMA, "messages": GREETING}
        for is_async in (False, True):
            with self.subTest(is_async=is_async):
                url = self.server.base_url
                keyless = self.connect(url, is_async, **{self.key_header: {"Authorization": ""}})
                self.assertRefused(keyless, status=401, code="invalid_api_key", **request)
                lost = self.connect(url + "/nowhere", is_async)
                self.assertRefused(lost, status=404, **request)

    def test_strict_server_knows_its_models(self):
        with TogetherAiServer(port=0, strict=True) as server:
            call = self.connect(self.base_urls(server)[0])
            for path, fields in (
                ("chat.completions.create", {"messages": GREETING}),
                ("chat.completions.create", {"messages": GREETING, "stream": True}),
                ("completions.create", {"prompt": "Once"}),
                ("embeddings.create", {"input": "text"}),
                (self.draw, {"prompt": "a heron"}),
            ):
                with self.subTest(path, **fields):
                    facts = {"status": 404, "code": "model_not_available", "model": "no/model"}
                    self.assertRefused(call, path, **facts, **fields)
            self.assertTrue(call.chat().choices)

    def test_refusals_are_not_retried(self):
        call = self.connect(self.server.base_url, max_retries=2)
        self.server.reset()
        self.assertRefused(
            call, "chat.completions.create", 400, "messages", model=LLAMA, messages=[]
        )
        self.assertEqual(len(self.server.requests), 1)

    @each_client
    def test_tool_choice(self, call):
        tools, models = make_tools()
        one = {"type": "function", "function": {"name": "multiply"}}
        rain = "How is the weather in the city of Lisbon?"
        for content, choice, names in (
            (rain, "auto", ["get_weather"]),
            (rain, one, ["multiply"]),
            (rain, "none", []),
            ("Please multiply two numbers.", "auto", ["multiply"]),
            ("Good evening!", "auto", []),
            ("Good evening!", "required", ["get_weather", "multiply"]),
        ):
            if choice == "none" and self.errors[400] == "InvalidRequestError":
                continue  # together 1.x cannot say so
            with self.subTest(content=content, tool_choice=choice):
                fields = {"tools": tools, "messages": say(content), "tool_choice": choice}
                reply = self.assertSameStream(call, **fields)
                (answer,) = summarize(reply).values()
                self.assertEqual(answer["finish_reason"], "tool_calls" if names else "stop")
                self.assertEqual(bool(answer["calls"]), bool(names), answer)
                self.assertEqual(bool(answer["text"]), not names, answer)
                for name, arguments in called(reply):
                    self.assertIn(name, names)
                    models[name].model_validate(arguments)

    @each_client
    def test_parallel_tool_calls(self, call):
        tools, _ = make_tools()
        fields = {"tools": tools, "messages": say("The weather, please; then multiply.")}
        both = self.assertSameStream(call, **fields)
        self.assertEqual(sorted(name for name, _ in called(both)), ["get_weather", "multiply"])
        ids = [made["id"] for made in summarize(both)[0]["calls"].values()]
        self.assertEqual(len(set(ids)), 2, ids)
        single = self.assertSameStream(call, parallel_tool_calls=False, **fields)
        self.assertEqual(len(called(single)), 1, called(single))

    @each_client
    def test_agent_loop_ends(self, call):
        tools, _ = make_tools()
        messages = say("Please multiply two numbers for me.")
        rounds = []
        for _ in range(5):
            (choice,) = call.chat(messages, tools=tools).choices
            rounds.append(choice.finish_reason)
            messages.append(choice.message.model_dump(exclude_none=True, mode="json"))
            if choice.finish_reason != "tool_calls":
                break
            for tool in messages[-1]["tool_calls"]:
                messages.append({"role": "tool", "tool_call_id": tool["id"], "content": "42"})
        self.assertEqual(rounds, ["tool_calls", "stop"])
        self.assertTrue(messages[-1]["content"])

    @each_client
    def test_structured_output(self, call):
        person, _, _ = answer_models()
        schema = person.model_json_schema()
        named = {"name": "person", "schema": schema, "strict": True}
        for format in (
            {"type": "json_schema", "json_schema": named},
            {"type": "json_schema", "schema": schema},
            {"type": "json_object", "schema": schema},
        ):
            with self.subTest(format=format["type"], spelling=list(format)[1]):
                reply = self.assertSameStream(call, response_format=format)
                person.model_validate_json(reply.choices[0].message.content)
                self.assertEqual(reply.choices[0].finish_reason, "stop")
        reply = self.assertSameStream(call, response_format={"type": "json_object"})
        self.assertIsInstance(json.loads(reply.choices[0].message.content), dict)
        pattern = r"(yes|no), [A-Z]{3}-\d{4}\.?"
        format = {"type": "regex", "pattern": pattern}
        reply = self.assertSameStream(call, response_format=format)
        self.assertTrue(re.fullmatch(pattern, reply.choices[0].message.content), reply.choices)

    @each_client
    def test_reasoning(self, call):
        reply = self.assertSameStream(call, model=V4)
        message = reply.choices[0].message
        self.assertTrue(message.content and message.reasoning, message)
        self.assertGreater(reply.usage.reasoning_tokens, 0)
        self.assertLess(reply.usage.reasoning_tokens, reply.usage.completion_tokens)
        low, high = (
            call.chat(model=V4, reasoning_effort=effort).usage.reasoning_tokens
            for effort in ("low", "high")
        )
        self.assertLess(low, high)
        (choice,) = call.chat(model=THINKER, reasoning={"enabled": False}).choices
        self.assertFalse(choice.message.model_dump().get("reasoning"), "not switched off")
        self.assertTrue(choice.message.content)


class TogetherScenarioCase(ClientScenarioCase):
    """What the clients of every together generation share, and openai's do not."""

    package = "together"
    maker = "Together"

    @each_client
    def test_echo(self, call):
        (part,) = call.complete("Once upon", max_tokens=3, echo=True).prompt
        self.assertEqual(part.text, "Once upon")

    @each_client
    def test_logprobs(self, call):
        if call.strict:
            self.assertInvalid(call.chat, logprobs=1)
            return
        reply = self.assertSameStream(call, logprobs=1)
        (choice,) = reply.choices
        found = choice.logprobs
        self.assertEqual("".join(found.tokens), choice.message.content)
        self.assertEqual(len(found.token_logprobs), reply.usage.completion_tokens)
        self.assertLessEqual(max(found.token_logprobs), 0)
        pieces = [part for chunk in call.chat(stream=True, logprobs=1) for part in chunk.choices]
        floats = [part.logprobs for part in pieces if part.logprobs is not None]
        self.assertEqual(floats, found.token_logprobs)

    @each_client
    def test_models(self, call):
        if self.major < 3:
            models = call("models.list")
            self.assertIn(LLAMA, [model.id for model in models])
            self.assertEqual({type(model).__name__ for model in models}, {"ModelObject"})
            return
        models = call("models.list_supported")
        self.assertIn(LLAMA, [model.name for model in models])
        self.assertEqual({type(model).__name__ for model in models}, {"SupportedModel"})
        one = call("models.retrieve_supported", id=models[0].id)
        self.assertEqual(one.model_dump(), models[0].model_dump())
        paged = call("models.list_supported", limit=7)
        self.assertEqual([model.id for model in paged], [model.id for model in models])


class TogetherV1ClientTests(TogetherScenarioCase, unittest.TestCase):
    majors = (1,)
    errors = V1_ERRORS
    key_header = "supplied_headers"
    strictness = ({},)


class TogetherClientTests(TogetherScenarioCase, unittest.TestCase):
    majors = (2, 3)

    @classmethod
    def base_urls(cls, server):
        return [server.url, server.base_url] if cls.major == 3 else [server.base_url]


class OpenAiClientTests(ClientScenarioCase, unittest.TestCase):
    package = "openai"
    maker = "OpenAI"
    image_size = MappingProxyType({"size": "320x192"})
    image_base64 = "b64_json"

    @each_client
    def test_functions_before_they_were_tools(self, call):
        tools, models = make_tools()
        functions = {"functions": [tool["function"] for tool in tools]}
        reply = call.chat(**functions, function_call={"name": "multiply"})
        made = reply.choices[0].message.function_call
        self.assertEqual((made.name, reply.choices[0].finish_reason), ("multiply", "function_call"))
        models["multiply"].model_validate_json(made.arguments)
        *_, delta, last = call.chat(**functions, function_call={"name": "multiply"}, stream=True)
        self.assertEqual(delta.choices[0].delta.function_call.model_dump(), made.model_dump())
        self.assertEqual(last.choices[0].finish_reason, "function_call")

    @each_client
    def test_openai_spellings(self, call):
        self.assertRegex(call.chat(stop=" ").choices[0].message.content, r"^\S+$")
        odd = {"role": "developer", "content": "Be kind."}
        old = {"role": "function", "name": "multiply", "content": "42"}
        self.assertTrue(call.chat([odd, *GREETING, old]).choices[0].message.content)
        self.assertEqual(self.server.requests[-1].body["messages"], [odd, *GREETING, old])

    @each_client
    def test_prompts(self, call):
        for prompt, choices in (
            (["Once upon", "In the end"], 2),
            ([11, 22, 33], 1),
            ([[11, 22], [33]], 2),
        ):
            with self.subTest(prompt=prompt):
                if call.picky:
                    self.assertInvalid(call.complete, prompt, max_tokens=6)
                    continue
                reply = call.complete(prompt, max_tokens=6)
                self.assertEqual([c.index for c in reply.choices], list(range(choices)))
                self.assertEqual(reply.usage.completion_tokens, 6 * choices)
                chunks = call.complete(prompt, max_tokens=6, stream=True)
                self.assertEqual(summarize(chunks), summarize(reply))

    @each_client
    def test_embedding_formats(self, call):
        if call.picky:
            return
        packed = call.embed("a red fox").data[0].embedding
        self.assertEqual(self.server.requests[-1].body["encoding_format"], "base64")
        plain = call.embed("a red fox", encoding_format="float").data[0].embedding
        self.assertEqual(len(packed), len(plain))
        self.assertLess(max(map(abs, map(operator.sub, packed, plain))), 1e-6)
        short = call.embed("a red fox", dimensions=64).data[0].embedding
        self.assertEqual(len(short), 64)
        self.assertAlmostEqual(math.hypot(*short), 1, places=4)
        reply = call.embed([[1, 2, 3], [4]])
        self.assertEqual((len(reply.data), reply.usage), (2, None))  # as in production
        self.assertEqual(len(call.embed([1, 2, 3]).data), 1)

    @each_client
    def test_models(self, call):
        models = call("models.list")
        (listed,) = [model for model in models if model.id == LLAMA]
        one = call("models.retrieve", model=LLAMA)
        self.assertEqual(one.model_dump(), listed.model_dump())
        self.assertTrue(one.owned_by)
        self.assertRefused(
            call, "models.retrieve", 404, None, "model_not_available", model="no/model"
        )

    @each_client
    def test_logprobs(self, call):
        reply = call.chat(logprobs=True, top_logprobs=2)
        tokens = reply.choices[0].logprobs.content
        self.assertEqual("".join(t.token for t in tokens), reply.choices[0].message.content)
        self.assertEqual(len(tokens), reply.usage.completion_tokens)
        for token in tokens:
            self.assertEqual(bytes(token.bytes).decode(), token.token)
            self.assertEqual(len(token.top_logprobs), 2)
            self.assertLessEqual(token.logprob, 0)
        if call.strict:  # a number, where OpenAI has an object
            self.assertInvalid(call.chat, stream=True, logprobs=True)
            return
        chunks = call.chat(stream=True, logprobs=True, top_logprobs=2)
        found = [part.logprobs for c in chunks for part in c.choices if part.logprobs is not None]
        self.assertEqual(found, [token.logprob for token in tokens])

    @each_client
    def test_parse(self, call):
        person, weather, _ = answer_models()
        parse = functools.partial(call, "chat.completions.parse", model=LLAMA, messages=GREETING)
        reply = parse(response_format=person)
        self.assertIsInstance(reply.choices[0].message.parsed, person)
        tool = self.module.pydantic_function_tool(weather, name="get_weather")
        (choice,) = parse(tools=[tool], tool_choice="required").choices
        (made,) = choice.message.tool_calls
        self.assertIsInstance(made.function.parsed_arguments, weather)

    @each_client
    def test_stream_helper(self, call):
        person, weather, _ = answer_models()
        events, final = call.stream_with_helper(messages=GREETING, response_format=person)
        self.assertIsInstance(final.choices[0].message.parsed, person)
        self.assertIn("content.done", [event.type for event in events])
        message = final.choices[0].message.model_dump(include={"role", "content"})
        self.assertRegex(message["role"], r"^(assistant){2,}$")  # as of production's streams
        with self.assertRaisesRegex(self.module.BadRequestError, "Input validation error"):
            call.chat([*GREETING, message])
        tool = self.module.pydantic_function_tool(weather, name="get_weather")
        fields = {"messages": GREETING, "tools": [tool], "tool_choice": "required"}
        events, final = call.stream_with_helper(**fields)
        (made,) = final.choices[0].message.tool_calls
        self.assertIsInstance(made.function.parsed_arguments, weather)
        self.assertRegex(made.id, r"^call_\w+$")
        done = "tool_calls.function.arguments.done"
        (event,) = [event for event in events if event.type == done]
        self.assertEqual((event.name, event.arguments), ("get_weather", made.function.arguments))


class RequiredClientsTests(unittest.TestCase):
    """REQUIRE_CLIENTS means what it says: a client that is not tested is a failure."""

    def test_required_clients_are_tested(self):
        tested = []
        for case in (TogetherV1ClientTests, TogetherClientTests, OpenAiClientTests):
            result = unittest.TestResult()
            if case.package in REQUIRED:
                unittest.TestSuite([case("test_chat")]).run(result)
            if result.testsRun and not result.skipped:
                self.assertTrue(result.wasSuccessful(), result.failures + result.errors)
                tested.append(case.package)
        self.assertEqual(sorted(tested), sorted(REQUIRED), "REQUIRE_CLIENTS asks for the latter")


# === Files and jobs of official clients ===

LESSONS = [[*say(question), {"role": "assistant", "content": "See."}] for question in QUESTIONS]
TRAINING = write_lines({"messages": lesson} for lesson in LESSONS * 4)
SOUND = write_sound(3)


class StoreScenarioCase(ClientCase):
    """What every client does with files and batches."""

    batch_purpose = "batch-api"
    batch_line: Mapping[str, str] = MappingProxyType({})  # what each line of a batch has besides

    def upload(self, call, data, purpose="fine-tune"):
        """Upload a file named lines.jsonl."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "lines.jsonl")
            path.write_bytes(data)
            return call("files.upload", file=path, purpose=purpose)

    def download(self, call, id):
        """Return the content of a file."""
        return call.finish(call("files.content", id=id).read())

    def batch_input(self):
        """Return the questions as the lines of a batch, and a last one without messages."""
        wrong = {"custom_id": "q3", "body": {"model": LLAMA}, **self.batch_line}
        return batch_lines(QUESTIONS, self.batch_line) + write_lines([wrong])

    def start_batch(self, call, id):
        job = call("batches.create", input_file_id=id, endpoint=CHAT)
        return job.job

    def fetch_batch(self, call, id):
        return call("batches.retrieve", id=id)

    def list_batches(self, call):
        return call("batches.list")

    def climb(self, fetch, limit=10):
        """Fetch a job until it has ended; return its last state and every status seen."""
        seen = []
        while len(seen) < limit and (not seen or seen[-1].lower() not in ("completed", "failed")):
            job = fetch()
            seen.append(getattr(job.status, "value", job.status))
        return job, seen

    @each_client
    def test_files(self, call):
        if call.picky:  # production's files lack what OpenAI's types require
            return
        file = self.upload(call, TRAINING)
        self.assertEqual((file.filename, file.bytes), ("lines.jsonl", len(TRAINING)))
        self.assertEqual(getattr(file.purpose, "value", file.purpose), "fine-tune")
        self.assertEqual(self.download(call, file.id), TRAINING)
        other = self.upload(call, TRAINING[:-1])
        files = call("files.list")
        listed = {each.id for each in getattr(files, "data", files)}
        self.assertEqual(listed, {file.id, other.id})
        self.assertEqual(self.retrieve_file(call, file.id).filename, "lines.jsonl")
        gone = self.delete_file(call, file.id)
        self.assertEqual((gone.id, gone.deleted), (file.id, True))
        self.assertEqual([each["id"] for each in self.server.files], [other.id])

    def retrieve_file(self, call, id):
        return call("files.retrieve", id=id)

    def delete_file(self, call, id):
        return call("files.delete", id=id)

    @each_client
    def test_a_batch_answers_as_chat_does(self, call):
        if call.picky:
            return
        file = self.upload(call, self.batch_input(), self.batch_purpose)
        job = self.start_batch(call, file.id)
        self.assertEqual(getattr(job.status, "value", job.status), "VALIDATING")
        self.assertEqual(job.input_file_id, file.id)
        done, seen = self.climb(lambda: self.fetch_batch(call, job.id))
        self.assertEqual(seen, ["IN_PROGRESS", "COMPLETED"])
        self.assertEqual([each.id for each in self.list_batches(call)], [job.id])
        rows = read_lines(self.download(call, done.output_file_id))
        replies = {row["custom_id"]: row["response"]["body"] for row in rows}
        texts = {id: reply["choices"][0]["message"]["content"] for id, reply in replies.items()}
        direct = [call.chat(say(each)).choices[0].message.content for each in QUESTIONS]
        self.assertEqual(texts, {f"q{n}": text for n, text in enumerate(direct)})
        (wrong,) = read_lines(self.download(call, done.error_file_id))
        self.assertEqual(wrong["custom_id"], "q3")
        self.assertIn("messages", json.dumps(wrong))


class TrainingScenarioCase(StoreScenarioCase):
    """What the clients of every together generation do besides: train."""

    package = "together"
    maker = "Together"

    def list_models(self, call):
        return [model.id for model in call("models.list")]

    @each_client
    def test_fine_tuning(self, call):
        file = self.upload(call, TRAINING)
        job = call("fine_tuning.create", training_file=file.id, model=BASE_MODEL, lora=True)
        self.assertEqual(getattr(job.status, "value", job.status), "pending")
        done, seen = self.climb(lambda: self.fetch_tuning(call, job.id))
        self.assertEqual(seen, ["queued", "running", "uploading", "completed"])
        events = self.of_tuning(call, "list_events", job.id).data
        kinds = [str(getattr(event.type, "value", event.type)).lower() for event in events]
        self.assertEqual((kinds[0], kinds[-1]), ("job_pending", "job_complete"))
        self.assertTrue(self.of_tuning(call, "list_checkpoints", job.id))
        model = self.name_of(done)
        self.assertTrue(call.chat(model=model).choices[0].message.content)
        self.assertEqual([each.id for each in call("fine_tuning.list").data], [job.id])
        self.assertEqual(self.download_model(call, job.id)[:2], self.archive_start)
        if self.major < 3:
            self.assertIn(model, self.list_models(call))

    def fetch_tuning(self, call, id):
        return call("fine_tuning.retrieve", id=id)

    def of_tuning(self, call, name, id):
        return call(f"fine_tuning.{name}", id=id)

    def name_of(self, job):
        return job.x_model_output_name

    def download_model(self, call, id):
        reply = call("fine_tuning.content", ft_id=id, checkpoint="adapter")
        return call.finish(reply.read())

    archive_start = b"\x1f\x8b"


class TogetherV1StoreClientTests(TrainingScenarioCase, unittest.TestCase):
    majors = (1,)
    strictness = ({},)

    # Its async client has neither uploads nor downloads: the sync one makes them.
    def upload(self, call, data, purpose="fine-tune"):
        return super().upload(self.calls[0], data, purpose)

    def download(self, call, id):
        return self.save("files.retrieve_content", id)

    def download_model(self, call, id):
        return self.save("fine_tuning.download", id)

    def save(self, path, id):
        """Return what a method of the sync client writes into a file."""
        with tempfile.TemporaryDirectory() as folder:
            saved = self.calls[0](path, id=id, output=pathlib.Path(folder, "saved"))
            return pathlib.Path(saved.filename).read_bytes()

    def start_batch(self, call, id):
        return call("batches.create_batch", file_id=id, endpoint=CHAT)

    def fetch_batch(self, call, id):
        return call("batches.get_batch", batch_job_id=id)

    def list_batches(self, call):
        return call("batches.list_batches")

    def name_of(self, job):
        return job.output_name


class TogetherStoreClientTests(TrainingScenarioCase, unittest.TestCase):
    majors = (2, 3)

    @classmethod
    def base_urls(cls, server):
        return [server.url, server.base_url] if cls.major == 3 else [server.base_url]

    @each_client
    def test_rerank(self, call):
        reply = call("rerank.create", **RERANK, top_n=2, return_documents=True)
        self.assertEqual([each.index for each in reply.results], [1, 2])
        best, second = reply.results
        self.assertEqual(best.document.text, "apple pie recipe")
        self.assertGreater(best.relevance_score, second.relevance_score)

    @each_client
    def test_speech(self, call):
        reply = call("audio.speech.create", response_format="wav", **SPEECH)
        with wave.open(io.BytesIO(call.finish(reply.read()))) as sound:
            self.assertEqual(sound.getframerate(), 44100)
            self.assertGreater(sound.getnframes(), 4410)
        raw = call("audio.speech.create", response_format="raw", **SPEECH)
        chunks = call("audio.speech.create", response_format="raw", stream=True, **SPEECH)
        whole = b"".join(base64.b64decode(chunk.b64) for chunk in chunks if chunk.b64)
        self.assertEqual(whole, call.finish(raw.read()))

    @each_client
    def test_transcription(self, call):
        file = ("a.wav", SOUND)
        plain = call("audio.transcriptions.create", file=file, model=HEARD["model"])
        wishes = {"timestamp_granularities": ["segment", "word"], "diarize": True, **HEARD}
        full = call("audio.transcriptions.create", file=file, **wishes)
        self.assertEqual(full.text, plain.text)
        self.assertEqual(full.duration, 3)
        self.assertEqual(" ".join(word.word for word in full.words), full.text)
        self.assertTrue(full.speaker_segments[0].speaker_id)
        other = call("audio.translations.create", file=file, **HEARD)
        self.assertTrue(other.text)

    @each_client
    def test_evaluation(self, call):
        rows = write_lines({"text": question} for question in QUESTIONS)
        given = {**EVALUATION, "input_data_file_path": self.upload(call, rows, "eval").id}
        classes = {"labels": ["yes", "no"], "pass_labels": ["yes"]}
        both = {"model_a": "text", "model_b": "text"}
        scores = {"min_score": 1.0, "max_score": 5.0, "pass_threshold": 3.0}
        for type, fields in (("classify", classes), ("score", scores), ("compare", both)):
            with self.subTest(type=type):
                job = call("evals.create", type=type, parameters={**given, **fields})
                self.assertEqual(job.status, "pending")
                done, seen = self.climb(lambda id=job.workflow_id: call("evals.retrieve", id=id))
                self.assertEqual(seen, ["queued", "running", "completed"])
                status = call("evals.status", id=job.workflow_id)
                self.assertEqual(status.results.model_dump(), done.results.model_dump())
                judged = read_lines(self.download(call, done.results.result_file_id))
                self.assertEqual(len(judged), len(QUESTIONS))
        self.assertEqual(len(call("evals.list")), 3)

    @each_client
    def test_video(self, call):
        fields = {"model": HAILUO, "prompt": "A heron takes off."}
        job = call("videos.create", width=64, height=48, seconds="2", **fields)
        self.assertEqual((job.status, job.size, job.seconds), ("in_progress", "64x48", "2"))
        done, _ = self.climb(lambda: call("videos.retrieve", id=job.id))
        self.assertEqual(done.status, "completed")
        with urllib.request.urlopen(done.outputs.video_url) as response:
            self.assertEqual(response.headers["Content-Type"], "video/mp4")
            self.assertEqual(response.read(8)[4:], b"ftyp")


class OpenAiStoreClientTests(StoreScenarioCase, unittest.TestCase):
    package = "openai"
    maker = "OpenAI"
    batch_purpose = "batch"
    batch_line = MappingProxyType({"method": "POST", "url": CHAT})

    def upload(self, call, data, purpose="fine-tune"):
        return call("files.create", file=("lines.jsonl", data), purpose=purpose)

    def download(self, call, id):
        return call("files.content", file_id=id).content

    def retrieve_file(self, call, id):
        return call("files.retrieve", file_id=id)

    def delete_file(self, call, id):
        return call("files.delete", file_id=id)

    def start_batch(self, call, id):
        window = {"endpoint": CHAT, "completion_window": "24h"}
        created = call("batches.create", input_file_id=id, metadata={"run": "7"}, **window)
        return types.SimpleNamespace(**created.job)  # production's form, not OpenAI's

    def fetch_batch(self, call, id):
        return call("batches.retrieve", batch_id=id)

    @each_client
    def test_speech(self, call):
        reply = call("audio.speech.create", response_format="wav", **SPEECH)
        with wave.open(io.BytesIO(reply.content)) as sound:
            self.assertGreater(sound.getnframes(), 4410)
        reply = call("audio.speech.create", response_format="mp3", **SPEECH)
        self.assertEqual(reply.content[:2], b"\xff\xfb")

    @each_client
    def test_transcription(self, call):
        file = ("a.wav", SOUND)
        plain = call("audio.transcriptions.create", file=file, model=HEARD["model"])
        if call.picky:  # it wants the scores that only OpenAI gives with each segment
            self.assertTrue(plain.text)
            return
        words = {"timestamp_granularities": ["word"]}
        full = call("audio.transcriptions.create", file=file, **HEARD, **words)
        self.assertEqual((full.text, full.duration), (plain.text, 3))
        self.assertEqual(" ".join(word.word for word in full.words), full.text)
        other = call("audio.translations.create", file=file, **HEARD)
        self.assertTrue(other.text)


# === Scripts of official clients ===


class ScriptedClientTests(unittest.TestCase):
    """Retries and broken streams as official clients live through them."""

    def check(self, client):
        question = {"model": "m", "messages": say("hi")}
        self.server.fail(429, retry_after=0.01, times=2)
        self.assertTrue(client.chat.completions.create(**question).choices[0].message.content)
        self.assertEqual([call.status for call in self.server.requests], [429, 429, 200])

        self.server.reset()
        self.server.reply("one two three four", disconnect_after_chunks=2)
        before = set(threading.enumerate())
        got = []
        with self.assertRaises(Exception) as caught:
            for chunk in client.chat.completions.create(**question, stream=True):
                got.append(chunk.choices[0].delta.content)
        self.assertRegex(type(caught.exception).__name__, "Protocol|Connection|ChunkedEncoding")
        self.assertEqual(got, ["", "one"])  # the first one opens the stream
        self.assertLessEqual(count_new_threads(before, FEW_THREADS), FEW_THREADS)

    def run_client(self, client_of):
        with TogetherAiServer(port=0) as self.server:
            client = client_of(api_key="key-of-a-test", base_url=self.server.base_url)
            self.check(client)

    def test_together(self):
        self.run_client(need("together").Together)

    def test_openai(self):
        self.run_client(need("openai").OpenAI)


if __name__ == "__main__":
    unittest.main()
