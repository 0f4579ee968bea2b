"""Run clients of the realtime sockets, unmodified, against together_fake.py.

Run as `python .ci/voices.py` where together, websockets and pipecat-ai are installed: those that
are missing are skipped, unless REQUIRE_CLIENTS names them, separated by blanks. TOGETHER_FAKE is
the file to serve. FUZZ_SECONDS is how long broken frames are sent (3).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import importlib
import importlib.util
import io
import json
import math
import os
import pathlib
import random
import socket
import struct
import sys
import threading
import time
import unittest
import wave
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
FAKE = os.environ.get("TOGETHER_FAKE") or str(HERE.parent / "together_fake.py")
WHISPER = "openai/whisper-large-v3"
REALTIME = f"/v1/realtime?model={WHISPER}&input_audio_format=pcm_s16le_16000"
VOICE = "/v1/audio/speech/websocket"
RATE = 16000
KEY = {"Authorization": "Bearer x"}
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS") or 3)


def load_fake() -> Any:
    spec = importlib.util.spec_from_file_location("together_fake", FAKE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["together_fake"] = module
    spec.loader.exec_module(module)
    return module


fake = load_fake()


def need(name: str) -> Any:
    """Import a client, or skip unless it is required."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if name.partition(".")[0] in os.environ.get("REQUIRE_CLIENTS", "").split():
            raise
        raise unittest.SkipTest(f"{name} is not installed") from None


def tone(seconds: float, pitch: int = 440) -> bytes:
    samples = (
        int(8000 * math.sin(math.tau * pitch * at / RATE)) for at in range(int(seconds * RATE))
    )
    return b"".join(struct.pack("<h", sample) for sample in samples)


def silence(seconds: float) -> bytes:
    return bytes(int(seconds * RATE) * 2)


def read_wav() -> bytes:
    """Return the samples of a WAV file with two sentences and a pause."""
    with io.BytesIO() as file:
        with wave.open(file, "wb") as sound:
            sound.setparams((1, 2, RATE, 0, "NONE", ""))
            sound.writeframes(tone(1.5) + silence(0.8) + tone(2, 300) + silence(0.8))
        with wave.open(io.BytesIO(file.getvalue())) as sound:
            return sound.readframes(sound.getnframes())


WAV = read_wav()


def cut(sound: bytes, size: int) -> list[bytes]:
    return [sound[at : at + size] for at in range(0, len(sound), size)]


def append(piece: bytes) -> str:
    audio = base64.b64encode(piece).decode()
    return json.dumps({"type": "input_audio_buffer.append", "audio": audio})


def say(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, **fields})


class SocketCase(unittest.TestCase):
    def setUp(self) -> None:
        self.server = fake.TogetherAiServer(port=0).start()
        self.addCleanup(self.server.stop)
        self.url = self.server.url.replace("http", "ws")


class TogetherTests(SocketCase):
    """client.beta.realtime of together 3."""

    def setUp(self) -> None:
        super().setUp()
        self.together = need("together")
        self.events = need("together.realtime")
        need("websockets")

    def client(self) -> Any:
        return self.together.Together(base_url=self.server.base_url, api_key="x")

    def run_session(self, sound: bytes = WAV, **options: Any) -> tuple[list[Any], str]:
        """Return the events of a session that hears some sound, and what it heard."""

        async def run() -> tuple[list[Any], str]:
            client = self.together.AsyncTogether(base_url=self.server.base_url, api_key="x")
            events: list[Any] = []
            fast = {"backoff_initial": 0.01, "backoff_max": 0.02}
            async with client.beta.realtime.transcription(
                model=WHISPER,
                sample_rate=RATE,
                event_callback=events.append,
                **{"reconnect": fast, **options},
            ) as session:
                for piece in cut(sound, 6400):
                    await session.append(piece)
                    await asyncio.sleep(0)
                text = await session.flush(quiescence=0.4, timeout=10)
            return events, text

        return asyncio.run(run())

    def completed(self, events: list[Any]) -> list[str]:
        return [each.text for each in events if isinstance(each, self.events.TranscriptCompleted)]

    def test_a_session_hears_two_sentences(self) -> None:
        events, text = self.run_session()
        first, second = self.completed(events)
        self.assertEqual(text, f"{first} {second}")
        deltas = [each.text for each in events if isinstance(each, self.events.TranscriptDelta)]
        self.assertTrue(first.startswith(deltas[0]), (first, deltas))
        self.assertEqual(self.completed(self.run_session()[0]), [first, second])
        self.assertEqual([call.outcome for call in self.server.requests], ["complete"] * 2)

    def test_a_raw_connection(self) -> None:
        with self.client().beta.realtime.connect(
            model=WHISPER, turn_detection={"type": "none"}, prompt="Names: Ada"
        ) as line:
            kinds = []
            for piece in cut(WAV, 9999):
                line.input_audio_buffer.append(piece)
            line.input_audio_buffer.commit()
            line.echo(echo_id=5)
            for event in line:
                kinds.append(event.type.rpartition(".")[2])
                if kinds[-1] == "processed":
                    break
            self.assertEqual(kinds[:3], ["created", "updated", "response"], kinds)
            self.assertEqual(kinds[-2:], ["completed", "processed"])

    def test_it_reconnects_and_loses_nothing(self) -> None:
        whole = self.run_session(WAV)[1]
        for fault in (
            {"disconnect_after_chunks": 1},
            {
                "status": 1011,
                "error_after_chunks": 1,
                "error": {"message": "x", "type": "server_error"},
            },
            {"status": 1012, "error_after_chunks": 0},
        ):
            with self.subTest(fault=fault):
                self.server.reset()
                status = fault.pop("status", None)
                self.server.fail(status, endpoint="realtime", times=1, **fault)
                events, text = self.run_session(buffer={"max_replay_seconds": None})
                self.assertEqual(sum(isinstance(e, self.events.Reconnected) for e in events), 1)
                self.assertEqual(text, whole)
                self.assertEqual(
                    [call.outcome for call in self.server.requests], ["cut", "complete"]
                )

    def test_it_gives_up_where_there_are_no_workers(self) -> None:
        for fault in ({}, {"error_after_chunks": 1}):
            with self.subTest(fault=fault):
                self.server.reset()
                self.server.fail(4503, endpoint="realtime", times=1, **fault)
                with self.assertRaises(self.events.RealtimeConnectionError) as caught:
                    self.run_session()
                self.assertEqual(caught.exception.code, "no_healthy_workers")
                self.assertEqual(len(self.server.requests), 1)

    def test_a_refused_handshake_is_an_error_and_a_new_one_is_not(self) -> None:
        self.server.fail(503, endpoint="realtime", times=1)
        with self.assertRaises(self.events.RealtimeConnectionError):
            self.run_session()
        self.assertEqual(len(self.completed(self.run_session()[0])), 2)
        self.assertEqual([call.status for call in self.server.requests], [503, 101])

    def test_a_failed_turn_is_not_the_end(self) -> None:
        self.server.fail(500, endpoint="realtime", error_after_chunks=0, times=1)
        events, _ = self.run_session()
        self.assertEqual(sum(isinstance(e, self.events.TranscriptFailed) for e in events), 1)
        self.assertEqual(len(self.completed(events)), 1)

    def test_sync(self) -> None:
        self.server.reply(transcription="Call me back at five", endpoint="realtime")
        session = self.client().beta.realtime.transcription(model=WHISPER)
        with session:
            for piece in cut(tone(1), 3200):
                session.append(piece)
            self.assertEqual(session.flush(quiescence=0.3), "Call me back at five")


class WebsocketsTests(SocketCase):
    """The package websockets, sync and async."""

    def setUp(self) -> None:
        super().setUp()
        self.sync = need("websockets.sync.client")
        self.aio = need("websockets.asyncio.client")

    def test_sync(self) -> None:
        with self.sync.connect(self.url + REALTIME, additional_headers=KEY) as line:
            created = json.loads(line.recv())
            self.assertEqual(created["type"], "session.created")
            self.assertTrue(line.ping().wait(5))
            line.send(iter(cut_text(append(tone(1)), 1000)))  # in fragments
            line.send(say("input_audio_buffer.commit"))
            kinds = []
            while kinds[-1:] != ["processed"]:
                kinds.append(json.loads(line.recv(timeout=5))["type"].rpartition(".")[2])
            self.assertEqual(kinds[-2:], ["completed", "processed"])
        self.assertEqual(line.close_code, 1000)

    def test_async(self) -> None:
        async def run() -> bytes:
            sound = bytearray()
            async with self.aio.connect(self.url + VOICE, additional_headers=KEY) as line:
                self.assertIsNone(line.subprotocol)
                for text in ("Hello there. ", "And ", "this is all"):
                    await line.send(say("input_text_buffer.append", text=text))
                await line.send(say("input_text_buffer.commit"))
                done = 0
                async for message in line:
                    event = json.loads(message)
                    sound += base64.b64decode(event.get("delta", ""))
                    done += event["type"].endswith(".done")
                    if done == 2:
                        break
            return bytes(sound)

        sound = asyncio.run(run())
        self.assertEqual(len(sound), (12 + 15) * 60 * 48)

    def test_subprotocols(self) -> None:
        offered = ["realtime", "openai-insecure-api-key.SECRET", "openai-beta.realtime-v1"]
        with self.sync.connect(self.url + REALTIME, subprotocols=offered) as line:
            self.assertEqual(line.subprotocol, "realtime")
            line.recv(timeout=5)
        self.assertNotIn("SECRET", json.dumps(self.server.requests[-1].as_json()))

    def test_a_client_that_sends_without_reading_hears_why_it_is_closed(self) -> None:
        self.server.fail(4503, endpoint="realtime", error_after_chunks=1)
        with self.sync.connect(self.url + REALTIME, additional_headers=KEY) as line:
            with contextlib.suppress(Exception):
                for piece in cut(tone(60), 3200):
                    line.send(append(piece))
            with contextlib.suppress(Exception):
                while True:
                    line.recv(timeout=5)
            self.assertEqual(line.close_code, 4503)


def cut_text(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


class PipecatTests(SocketCase):
    """Pipecat's services for Together."""

    def setUp(self) -> None:
        super().setUp()
        need("pipecat")
        need("loguru").logger.remove()

    def test_text_to_speech(self) -> None:
        from pipecat.frames.frames import TTSAudioRawFrame, TTSSpeakFrame, TTSStoppedFrame
        from pipecat.services.together.tts import TogetherTTSService
        from pipecat.tests.utils import SleepFrame, run_test

        async def run() -> list[Any]:
            service = TogetherTTSService(api_key="x", url=self.url + VOICE)
            down, up = await run_test(
                service, frames_to_send=[TTSSpeakFrame("Hello there, friend."), SleepFrame(1.5)]
            )
            self.assertEqual([str(frame) for frame in up if "Error" in str(frame)], [])
            return list(down)

        frames = asyncio.run(run())
        sound = [frame for frame in frames if isinstance(frame, TTSAudioRawFrame)]
        self.assertEqual({frame.sample_rate for frame in sound}, {24000})
        self.assertGreaterEqual(sum(len(frame.audio) for frame in sound), 20 * 60 * 48)
        self.assertTrue(any(isinstance(frame, TTSStoppedFrame) for frame in frames))
        (call,) = self.server.calls_to("voice", input_text="Hello there, friend.")
        self.assertEqual(call.body["voice"], "af_heart")

    def test_text_to_speech_hears_of_an_error(self) -> None:
        from pipecat.frames.frames import ErrorFrame, TTSSpeakFrame
        from pipecat.services.together.tts import TogetherTTSService
        from pipecat.tests.utils import SleepFrame, run_test

        self.server.fail(429, endpoint="voice", error_after_chunks=0)

        async def run() -> list[Any]:
            service = TogetherTTSService(api_key="x", url=self.url + VOICE)
            frames = [TTSSpeakFrame("Hello."), SleepFrame(1)]
            _, up = await run_test(service, frames_to_send=frames)
            return list(up)

        errors = [frame for frame in asyncio.run(run()) if isinstance(frame, ErrorFrame)]
        self.assertIn("rate limiting", errors[0].error)

    def test_speech_to_text(self) -> None:
        from pipecat.frames.frames import (
            InputAudioRawFrame,
            TranscriptionFrame,
            VADUserStoppedSpeakingFrame,
        )
        from pipecat.services.together.stt import TogetherSTTService
        from pipecat.tests.utils import SleepFrame, run_test

        self.server.reply(transcription="Call me back at five", endpoint="realtime")

        async def run() -> list[Any]:
            service = TogetherSTTService(api_key="x", base_url=self.url + "/v1", sample_rate=RATE)
            sound = [InputAudioRawFrame(piece, RATE, 1) for piece in cut(tone(1), 6400)]
            frames = [*sound, VADUserStoppedSpeakingFrame(), SleepFrame(1)]
            down, _ = await run_test(service, frames_to_send=frames)
            return list(down)

        frames = asyncio.run(run())
        texts = [frame.text for frame in frames if isinstance(frame, TranscriptionFrame)]
        self.assertEqual(texts, ["Call me back at five"])


UPGRADE = (
    "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Authorization: Bearer x\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def list_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()


def measure_memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class RawTests(SocketCase):
    """Bytes that no client would send, and many clients that say nothing."""

    def upgrade(self, path: str) -> socket.socket:
        line = socket.create_connection(("127.0.0.1", self.server.port), 5)
        line.sendall(UPGRADE.format(path=path).encode())
        return line

    def test_200_idle_sockets_cost_no_more_than_200_idle_connections(self) -> None:
        threads = threading.active_count()
        costs = []
        for path in ("", VOICE, "", VOICE):
            before = measure_memory()
            lines: list[Any] = []
            for _ in range(200):
                if path:
                    lines.append(self.upgrade(path))
                    while b"session.created" not in lines[-1].recv(4096):
                        pass
                else:
                    lines.append(http.client.HTTPConnection("127.0.0.1", self.server.port))
                    lines[-1].request("GET", "/v1/voices", headers=KEY)
                    lines[-1].getresponse().read()
            costs.append((measure_memory() - before) // 200)
            self.assertLessEqual(threading.active_count(), threads + 1)
            for line in lines:
                line.close()
        print(f"bytes an idle connection, socket, both again: {costs}", file=sys.stderr)

    def test_broken_frames_leave_nothing_behind(self) -> None:
        rng = random.Random(7)
        good = [
            say("input_text_buffer.append", text="Hello there. And"),
            say("echo", echo_id=1),
            append(tone(0.3)),
            say("input_audio_buffer.commit"),
            say("input_text_buffer.commit"),
            say("transcription_session.updated", session={"turn_detection": None}),
        ]
        with self.upgrade(VOICE) as line:  # has what is made once be made
            line.sendall(frame(1, good[0].encode()))
            line.recv(100)
        threads, descriptors = threading.active_count(), list_descriptors()
        end, count = time.monotonic() + FUZZ_SECONDS, 0
        while time.monotonic() < end:
            count += 1
            with self.upgrade(rng.choice((VOICE, REALTIME))) as line:
                data = b"".join(
                    frame(rng.choice((1, 1, 1, 2, 0, 8, 9, 10, rng.randrange(16))),
                          rng.choice(good).encode(), rng.random() < 0.8)
                    for _ in range(rng.randrange(1, 6))
                )  # fmt: skip
                data = bytearray(data)
                for _ in range(rng.choice((0, 0, 1, 3))):
                    data[rng.randrange(len(data))] = rng.randrange(256)
                with contextlib.suppress(OSError):
                    at = 0
                    while at < len(data):
                        size = rng.choice((1, 7, 100, 5000))
                        line.sendall(data[at : at + size])
                        at += size
                    line.settimeout(rng.choice((0.001, 0.05)))
                    line.recv(65536)
        print(f"{count} sockets with broken frames", file=sys.stderr)
        limit = time.monotonic() + 10
        while time.monotonic() < limit and list_descriptors() - descriptors:
            time.sleep(0.05)
        self.assertEqual(list_descriptors() - descriptors, set())
        self.assertLessEqual(threading.active_count(), threads + 8)  # workers that wait for work
        self.assertFalse([call for call in self.server.requests if "Traceback" in call.error])
        self.assertFalse([call for call in self.server.requests if not call.outcome])
        health = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=5)
        health.request("GET", "/health")
        self.assertEqual(health.getresponse().status, 200)
        health.close()


def frame(kind: int, data: bytes, last: bool = True) -> bytes:
    code, count = (len(data), 0) if len(data) < 126 else (126, 2)
    code, count = (127, 8) if len(data) > 65535 else (code, count)
    head = bytes([kind | 128 * last, 128 | code]) + (
        len(data).to_bytes(count, "big") if count else b""
    )
    return head + b"\0\0\0\0" + data


if __name__ == "__main__":
    unittest.main()
