"""Run programs that use responses and chats, unmodified, against together_fake.py.

Run as `python .ci/agents.py` where openai is installed, and openai-agents, pydantic-ai-slim,
langchain-openai or litellm for their classes of tests: those that are missing are skipped, unless
REQUIRE_CLIENTS names them, separated by blanks. TOGETHER_FAKE is the file to serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import unittest
import urllib.request
from typing import Any, Literal

from pydantic import BaseModel

HERE = pathlib.Path(__file__).resolve().parent
sys.path = [path for path in sys.path if path != str(HERE)]  # openai-agents is `agents` too
FAKE = os.environ.get("TOGETHER_FAKE") or str(HERE.parent / "together_fake.py")
MODEL = "meta-llama/Llama-3.3-70B-Instruct-Turbo"
THINKER = "openai/gpt-oss-20b"
ENGINES = {  # a model of each; the last one only streams
    "A": MODEL,
    "B": "google/gemma-4-31B-it",
    "gpt-oss-20b": THINKER,
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "K2.7": "moonshotai/Kimi-K2.7-Code",
    "C": "moonshotai/Kimi-K3",
    "DeepSeek": "deepseek-ai/DeepSeek-V4.1-Flash",
    "GLM": "zai-org/GLM-5.3",
    "Qwen": "Qwen/Qwen3.7-Plus",
}
VIEWER = "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)
QUESTION = "Why is the sky blue?"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
WIKI = {"type": "mcp", "server_label": "wiki", "server_url": "https://wiki.test/mcp"}


class Address(BaseModel):
    city: str
    main: bool


class Person(BaseModel):
    name: str
    age: int
    role: Literal["admin", "guest"]
    addresses: list[Address]


class Server:
    """together_fake.py as a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, FAKE, "--port", "0", "--quiet"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = next(line for line in self.process.stdout if "http://127.0.0.1:" in line)
        self.url = "http://127.0.0.1:" + line.rsplit(":", 1)[1].strip().rstrip("/")
        self.base_url = self.url + "/v1"

    def call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """Ask a control route."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read() or b"null")

    def bodies(self) -> list[Any]:
        """Return the bodies of the calls so far, the oldest first."""
        return [call["body"] for call in self.call("/__parlel/requests", method="GET")["requests"]]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


SERVER: Server


def setUpModule() -> None:
    global SERVER
    SERVER = Server()
    os.environ["OPENAI_API_KEY"] = "parlel-together"
    os.environ["OPENAI_BASE_URL"] = SERVER.base_url
    os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"


def tearDownModule() -> None:
    SERVER.stop()


def need(name: str, package: str) -> Any:
    """Return a module, or skip the tests where its package is missing and not required."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        if package in os.environ.get("REQUIRE_CLIENTS", "").split():
            raise
        raise unittest.SkipTest(f"{package} is not installed") from None
    print(f"{package} {importlib.metadata.version(package)}", file=sys.stderr)
    return module


class ClientCase(unittest.TestCase):
    def setUp(self) -> None:
        SERVER.call("/__parlel/reset")


class OpenAITests(ClientCase):
    """The official client, which validates every object and event strictly."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.openai = need("openai", "openai")
        cls.client = cls.openai.OpenAI(_strict_response_validation=True, max_retries=0)
        cls.lax = cls.openai.OpenAI(max_retries=0)
        cls.addClassCleanup(cls.client.close)
        cls.addClassCleanup(cls.lax.close)

    def create(self, input: Any = QUESTION, **fields: Any) -> Any:
        return self.client.responses.create(**{"model": MODEL, "input": input, **fields})

    def events(self, input: Any = QUESTION, **fields: Any) -> list[Any]:
        """Return the events of a stream, which have to be numbered and to end with the whole."""
        events = list(self.create(input, stream=True, **fields))
        self.assertEqual([event.sequence_number for event in events], list(range(len(events))))
        whole = self.create(input, **fields)
        self.assertEqual(events[-1].response.to_dict(), whole.to_dict())
        return events

    def kinds(self, events: list[Any]) -> list[str]:
        """Return the types of events without the prefix, runs of one type as one."""
        kinds = [event.type.replace("response.", "", 1) for event in events]
        return [kind for at, kind in enumerate(kinds) if kinds[at - 1 : at] != [kind]]

    def test_text(self) -> None:
        whole = self.create(instructions="Be brief.", temperature=0.5, metadata={"a": "b"})
        self.assertEqual(
            (whole.status, whole.model, whole.object), ("completed", MODEL, "response")
        )
        self.assertEqual((whole.instructions, whole.temperature), ("Be brief.", 0.5))
        self.assertTrue(whole.output_text)
        usage = whole.usage
        self.assertEqual(usage.total_tokens, usage.input_tokens + usage.output_tokens)
        again = self.create(instructions="Be brief.", temperature=0.5, metadata={"a": "b"})
        self.assertEqual(whole.to_dict(), again.to_dict())

    def test_text_is_that_of_the_chat(self) -> None:
        messages = [{"role": "user", "content": QUESTION}]
        chat = self.lax.chat.completions.create(model=MODEL, messages=messages)
        whole = self.create()
        self.assertEqual(whole.output_text, chat.choices[0].message.content)
        self.assertEqual(whole.usage.output_tokens, chat.usage.completion_tokens)
        self.assertEqual(whole.usage.input_tokens, chat.usage.prompt_tokens)

    def test_text_streamed(self) -> None:
        events = self.events()
        self.assertEqual(
            self.kinds(events),
            [
                "created", "in_progress", "output_item.added", "content_part.added",
                "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
                "completed",
            ],
        )  # fmt: skip
        deltas = [event.delta for event in events if event.type.endswith("text.delta")]
        self.assertEqual("".join(deltas), events[-1].response.output_text)
        self.assertGreater(len(deltas), 10)

    def test_reasoning(self) -> None:
        events = self.events(model=THINKER, reasoning={"effort": "low"})
        reasoning, message = events[-1].response.output
        self.assertEqual((reasoning.type, message.type), ("reasoning", "message"))
        deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        self.assertEqual("".join(deltas), reasoning.content[0].text)
        self.assertEqual(reasoning.summary, [])
        used = events[-1].response.usage.output_tokens_details.reasoning_tokens
        self.assertEqual(used, len(deltas))

    def test_reasoning_is_off(self) -> None:
        effort = "none" if self.openai.__version__ >= "2" else "minimal"
        output = self.create(model=THINKER, reasoning={"effort": effort}).output
        self.assertEqual(output[-1].type, "message")
        self.assertEqual(len(output), 1 if effort == "none" else 2)

    def test_reasoning_summary(self) -> None:
        events = self.events(model=THINKER, reasoning={"effort": "low", "summary": "auto"})
        reasoning = events[-1].response.output[0]
        deltas = [event.delta for event in events if event.type.endswith("summary_text.delta")]
        self.assertEqual("".join(deltas), reasoning.summary[0].text)
        self.assertIn("reasoning_summary_part.added", self.kinds(events))

    def test_incomplete(self) -> None:
        events = self.events(max_output_tokens=5)
        whole = events[-1].response
        self.assertEqual(events[-1].type, "response.incomplete")
        self.assertEqual(whole.incomplete_details.reason, "max_output_tokens")
        self.assertEqual((whole.status, whole.output[0].status), ("incomplete", "incomplete"))
        self.assertEqual(whole.usage.output_tokens, 5)

    def test_incomplete_in_thought(self) -> None:
        whole = self.events(model=THINKER, max_output_tokens=5)[-1].response
        self.assertEqual([item.type for item in whole.output], ["reasoning"])
        self.assertEqual((whole.status, whole.output[0].status), ("incomplete", "incomplete"))

    def test_logprobs(self) -> None:
        fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        events = self.events(max_output_tokens=6, **fields)
        scores = events[-1].response.output[0].content[0].logprobs
        self.assertEqual([len(score.top_logprobs) for score in scores], [2] * 6)
        streamed = [event.logprobs[0] for event in events if event.type.endswith("text.delta")]
        self.assertEqual([score.token for score in streamed], [score.token for score in scores])

    def test_image_and_file(self) -> None:
        parts = [
            {"type": "input_text", "text": "What is on this picture?"},
            {"type": "input_image", "image_url": PIXEL, "detail": "auto"},
        ]
        question = [{"role": "user", "content": parts}]
        whole = self.create(question, model=VIEWER)
        alone = self.create([{"role": "user", "content": parts[:1]}], model=VIEWER)
        self.assertTrue(whole.output_text)
        self.assertNotEqual(whole.output_text, alone.output_text)
        self.assertGreater(whole.usage.input_tokens, alone.usage.input_tokens + 100)

    def test_parse(self) -> None:
        parsed = self.client.responses.parse(model=MODEL, input=QUESTION, text_format=Person)
        self.assertIsInstance(parsed.output_parsed, Person)

    def test_formats(self) -> None:
        schema = {"type": "json_schema", "name": "person", "schema": Person.model_json_schema()}
        events = self.events(text={"format": schema, "verbosity": "low"})
        Person.model_validate_json(events[-1].response.output_text)
        whole = self.create("Answer in JSON.", text={"format": {"type": "json_object"}})
        self.assertIsInstance(json.loads(whole.output_text), dict)

    def test_stream_helper(self) -> None:
        with self.client.responses.stream(
            model=MODEL, input="What is the weather in Lisbon?", tools=[WEATHER]
        ) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        self.assertIn("response.function_call_arguments.delta", kinds)
        self.assertEqual(final.output[0].name, "get_weather")
        with self.client.responses.stream(
            model=THINKER, input=QUESTION, text_format=Person
        ) as stream:
            self.assertIsInstance(stream.get_final_response().output_parsed, Person)

    def test_tools(self) -> None:
        talk: list[Any] = [{"role": "user", "content": "What is the weather in Lisbon?"}]
        first = self.create(talk, tools=[WEATHER], instructions="Be brief.")
        (call,) = first.output
        self.assertEqual(
            (call.type, call.name, call.status), ("function_call", "get_weather", "completed")
        )
        arguments = json.loads(call.arguments)
        self.assertIn(arguments["unit"], ["celsius", "fahrenheit"])
        talk += [item.to_dict() for item in first.output]
        talk += [{"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}]
        second = self.create(talk, tools=[WEATHER], instructions="Be brief.")
        self.assertEqual([item.type for item in second.output], ["message"])
        talk += [item.to_dict() for item in second.output]
        talk += [{"role": "user", "content": "And the weather in Porto?"}]
        third = self.create(talk, tools=[WEATHER], instructions="Be brief.")
        self.assertEqual([item.type for item in third.output], ["function_call"])

    def test_tool_choice(self) -> None:
        clock = {**WEATHER, "name": "read_clock", "description": "Tell the time of a zone"}
        tools = [WEATHER, clock]

        def called(choice: Any, question: str = QUESTION, **fields: Any) -> list[str]:
            output = self.create(question, tools=tools, tool_choice=choice, **fields).output
            return [item.name for item in output if item.type == "function_call"]

        self.assertEqual(called("auto"), [])
        self.assertEqual(called("none", "What is the weather?"), [])
        self.assertEqual(len(called("required")), 1)
        self.assertEqual(called({"type": "function", "name": "read_clock"}), ["read_clock"])
        both = "Tell me the time and get the weather: call both."
        self.assertEqual(called("auto", "weather and clock"), ["get_weather", "read_clock"])
        self.assertEqual(len(called("auto", "weather and clock", parallel_tool_calls=False)), 1)
        allowed = {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "read_clock"}],
        }
        self.assertEqual(called(allowed, both), ["read_clock"])

    def test_parallel_calls_streamed(self) -> None:
        clock = {**WEATHER, "name": "read_clock", "description": "Tell the time of a zone"}
        events = self.events("weather and clock", tools=[WEATHER, clock])
        done = [event for event in events if event.type.endswith("arguments.done")]
        whole = events[-1].response
        self.assertEqual([item.type for item in whole.output], ["function_call"] * 2)
        self.assertEqual(
            [event.arguments for event in done], [item.arguments for item in whole.output]
        )
        self.assertEqual([event.output_index for event in done], [0, 1])

    def test_hosted_tools_are_echoed(self) -> None:
        tools = [{"type": "web_search_preview"}, WIKI, WEATHER]
        whole = self.create(tools=tools, tool_choice="auto")
        kinds = ["web_search_preview", "mcp", "function"]
        self.assertEqual([tool.type for tool in whole.tools], kinds)
        self.assertEqual([item.type for item in whole.output], ["message"])

    def test_refusals(self) -> None:
        openai = self.openai
        with self.assertRaises(openai.NotFoundError):
            self.create(previous_response_id="resp_1")
        with self.assertRaises(openai.NotFoundError):
            self.client.responses.retrieve("resp_1")
        with self.assertRaises(openai.NotFoundError):
            self.client.responses.delete("resp_1")
        with self.assertRaises(openai.NotFoundError):
            self.client.responses.cancel("resp_1")
        with self.assertRaisesRegex(openai.BadRequestError, "background"):
            self.create(background=True)
        with self.assertRaisesRegex(openai.BadRequestError, r"input\[0\].content\[0\].text"):
            self.create([{"role": "user", "content": [{"type": "input_text"}]}], stream=True)

    def test_fixtures(self) -> None:
        match = {"userMessage": "sky", "systemMessage": "brief"}
        scripted = {"match": match, "response": {"content": "Because!", "reasoning": "Hm."}}
        SERVER.call("/__parlel/fixtures", {"fixtures": [scripted]})
        whole = self.events(instructions="Be brief.")[-1].response
        self.assertEqual(whole.output_text, "Because!")
        self.assertEqual(whole.output[0].content[0].text, "Hm.")


class AgentsTests(ClientCase):
    """openai-agents, whose default is the Responses API."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.agents = need("agents", "openai-agents")
        cls.agents.set_tracing_disabled(True)

    def setUp(self) -> None:
        super().setUp()
        self.calls: list[str] = []
        agents, calls = self.agents, self.calls
        client = importlib.import_module("openai").AsyncOpenAI()
        self.model, self.thinker = (
            agents.OpenAIResponsesModel(name, client) for name in (MODEL, THINKER)
        )

        @agents.function_tool
        def find_city(country: str) -> str:
            """Find the largest city of a country."""
            calls.append("find_city")
            return "Lisbon"

        @agents.function_tool
        def get_weather(city: str) -> str:
            """Get the weather of a place."""
            calls.append("get_weather")
            return "21 degrees"

        self.tools = [find_city, get_weather]

    def test_one_round(self) -> None:
        agent = self.agents.Agent("Guide", instructions="Help.", model=self.model, tools=self.tools)
        result = self.agents.Runner.run_sync(agent, "What is the weather like?")
        self.assertEqual(self.calls, ["get_weather"])
        self.assertTrue(result.final_output)

    def test_two_rounds(self) -> None:
        settings = self.agents.ModelSettings(tool_choice="required", parallel_tool_calls=False)
        agent = self.agents.Agent(
            *("Guide",),
            instructions="Help.",
            model=self.thinker,
            tools=self.tools,
            model_settings=settings,
            reset_tool_choice=False,
            tool_use_behavior=lambda context, results: self.agents.ToolsToFinalOutputResult(
                is_final_output=len(self.calls) == 2, final_output="done"
            ),
        )
        result = self.agents.Runner.run_sync(agent, "What is the weather like in the city?")
        self.assertEqual(sorted(self.calls), ["find_city", "get_weather"])
        self.assertEqual(result.final_output, "done")
        kinds = [item.get("type", "message") for item in SERVER.bodies()[-1]["input"]]
        self.assertIn("function_call_output", kinds)
        self.assertIn("reasoning", kinds)

    def test_handoff(self) -> None:
        weather = self.agents.Agent(
            *("Weather",), instructions="Tell.", model=self.model, tools=self.tools[1:]
        )
        triage = self.agents.Agent(
            *("Triage",), instructions="Hand over.", model=self.model, handoffs=[weather]
        )
        result = self.agents.Runner.run_sync(triage, "transfer me, and tell the weather")
        self.assertEqual(result.last_agent.name, "Weather")
        self.assertTrue(result.final_output)

    def test_typed_result(self) -> None:
        agent = self.agents.Agent("Clerk", model=self.model, output_type=Person)
        result = self.agents.Runner.run_sync(agent, "Who is that?")
        self.assertIsInstance(result.final_output, Person)

    def test_streamed(self) -> None:
        agent = self.agents.Agent("Guide", model=self.thinker, tools=self.tools)

        async def run() -> tuple[list[str], Any]:
            result = self.agents.Runner.run_streamed(agent, "What is the weather like?")
            kinds = [event.type async for event in result.stream_events()]
            return kinds, result.final_output

        kinds, output = asyncio.run(run())
        self.assertEqual(self.calls, ["get_weather"])
        self.assertIn("raw_response_event", kinds)
        self.assertTrue(output)


class PydanticTests(ClientCase):
    """pydantic-ai, whose model `openai:...` asks the Responses API."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.ai = need("pydantic_ai", "pydantic-ai-slim")
        cls.models = need("pydantic_ai.models.openai", "pydantic-ai-slim")

    def agent(self, model: str = MODEL, **fields: Any) -> Any:
        agent = self.ai.Agent(self.models.OpenAIResponsesModel(model), **fields)

        @agent.tool_plain
        def get_weather(city: str) -> str:
            """Get the weather of a place."""
            self.calls.append(city)
            return "21 degrees"

        return agent

    def setUp(self) -> None:
        super().setUp()
        self.calls: list[str] = []

    def test_tool(self) -> None:
        for model in (MODEL, THINKER):
            with self.subTest(model=model):
                result = self.agent(model).run_sync("What is the weather like?")
                self.assertEqual(len(self.calls), 1)
                self.assertTrue(result.output)
                self.assertEqual(result.usage.requests, 2)
                self.calls.clear()

    def test_typed_result(self) -> None:
        result = self.agent(output_type=Person).run_sync("What is the weather like?")
        self.assertIsInstance(result.output, Person)
        native = self.agent(output_type=self.ai.NativeOutput(Person)).run_sync("Who is that?")
        self.assertIsInstance(native.output, Person)

    def test_history(self) -> None:
        agent = self.agent(THINKER)
        first = agent.run_sync("What is the weather like?")
        second = agent.run_sync("Thanks!", message_history=first.all_messages())
        self.assertTrue(second.output)

    def test_streamed(self) -> None:
        async def run() -> str:
            async with self.agent(THINKER).run_stream("What is the weather like?") as result:
                return "".join([text async for text in result.stream_text(delta=True)])

        self.assertTrue(asyncio.run(run()))
        self.assertEqual(len(self.calls), 1)


class LangchainTests(ClientCase):
    """langchain-openai, told to ask the Responses API."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.module = need("langchain_openai", "langchain-openai")

    def chat(self, model: str = MODEL) -> Any:
        return self.module.ChatOpenAI(model=model, use_responses_api=True)

    def test_text_and_stream(self) -> None:
        for model in (MODEL, THINKER):
            whole = self.chat(model).invoke(QUESTION)
            self.assertTrue(whole.text)
            text = "".join(chunk.text for chunk in self.chat(model).stream(QUESTION))
            self.assertEqual(text, whole.text)

    def test_tools_and_types(self) -> None:
        from langchain_core.messages import HumanMessage, ToolMessage

        tool = {
            "name": "get_weather",
            "description": "Get the weather",
            "parameters": WEATHER["parameters"],
        }
        bound = self.chat(THINKER).bind_tools([tool])
        talk: list[Any] = [HumanMessage("What is the weather?")]
        talk.append(bound.invoke(talk))
        (call,) = talk[-1].tool_calls
        talk.append(ToolMessage("21 degrees", tool_call_id=call["id"]))
        self.assertTrue(bound.invoke(talk).text)
        for method in ("json_schema", "function_calling"):
            typed = self.chat().with_structured_output(Person, method=method)
            self.assertIsInstance(typed.invoke("Who is that?"), Person)


class LitellmTests(ClientCase):
    """litellm, by its own call of the Responses API."""

    @classmethod
    def setUpClass(cls) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        cls.litellm = need("litellm", "litellm")
        cls.litellm.disable_hf_tokenizer_download = True

    def test_text_and_stream(self) -> None:
        fields = {"model": f"openai/{MODEL}", "input": QUESTION, "api_base": SERVER.base_url}
        whole = self.litellm.responses(**fields)
        self.assertEqual(whole.output[0].type, "message")
        last = list(self.litellm.responses(**fields, stream=True))[-1]
        self.assertEqual(last.type, "response.completed")
        messages = [{"role": "user", "content": QUESTION}]
        bridged = self.litellm.completion(
            model=f"openai/responses/{MODEL}", messages=messages, api_base=SERVER.base_url
        )
        self.assertTrue(bridged.choices[0].message.content)


ASKED = {"get_weather": "How is the weather?", "find_city": "And the largest city of Chile?"}
CHAT_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": about,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string"}},
                "required": [key],
            },
        },
    }
    for name, about, key in (
        ("find_city", "Find the largest city of a country.", "country"),
        ("get_weather", "Get the weather of a place.", "city"),
    )
]


def read_message(message: Any) -> tuple[str, list[Any]]:
    """Return the text and the calls of a message in OpenAI's form."""
    calls = [
        (call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()
    ]
    return message.content, calls


class EngineTests(ClientCase):
    """Chats of each engine: a text and two rounds of tools, whole and streamed."""

    def try_each(self, check: Any) -> None:
        """Call `check(model, stream)` for each engine, whole and streamed."""
        for engine, model in ENGINES.items():
            for stream in (False, True):
                if stream or engine != "Qwen":
                    with self.subTest(engine=engine, stream=stream):
                        check(model, stream)

    def hold(self, ask: Any) -> None:
        """Hold a conversation by `ask(messages, tools)`, which returns a text and calls."""
        text, calls = ask([{"role": "user", "content": QUESTION}], None)
        self.assertTrue(text and not calls)
        said: list[Any] = []
        for name, question in ASKED.items():
            said.append({"role": "user", "content": question})
            text, calls = ask(said, CHAT_TOOLS)
            ((id, called, arguments),) = calls
            self.assertEqual(called, name)
            self.assertTrue(all(json.loads(arguments).values()))
            function = {"name": called, "arguments": arguments}
            call = {"id": id, "type": "function", "function": function}
            said.append({"role": "assistant", "content": text or None, "tool_calls": [call]})
            said.append({"role": "tool", "tool_call_id": id, "content": "21"})
            text, calls = ask(said, CHAT_TOOLS)
            self.assertTrue(text and not calls)
            said.append({"role": "assistant", "content": text})

    def test_openai(self) -> None:
        client = need("openai", "openai").OpenAI(max_retries=0)
        self.addCleanup(client.close)

        def check(model: str, stream: bool) -> None:
            def ask(messages: Any, tools: Any) -> Any:
                more = {"tools": tools} if tools else {}
                fields = {"model": model, "messages": messages, **more}
                if not stream:
                    whole = client.chat.completions.create(**fields)
                    self.assertEqual(whole._request_id, whole.id)
                else:
                    with client.chat.completions.stream(**fields) as events:
                        whole = events.get_final_completion()
                counts = whole.usage
                total = counts.prompt_tokens + counts.completion_tokens
                self.assertEqual(counts.total_tokens, total)
                return read_message(whole.choices[0].message)

            with self.stumbles(model):
                self.hold(ask)

        self.try_each(check)

    def stumbles(self, model: str) -> Any:
        """Expect that the numbers which Qwen has as logprobs break a client, as in production."""
        if model != ENGINES["Qwen"]:
            return contextlib.nullcontext()
        return self.assertRaisesRegex(AttributeError, "no attribute 'content'")

    def test_litellm(self) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        litellm = need("litellm", "litellm")
        where = {"api_base": SERVER.base_url, "api_key": "x"}

        def check(model: str, stream: bool) -> None:
            def ask(messages: Any, tools: Any) -> Any:
                fields = {"messages": messages, **({"tools": tools} if tools else {}), **where}
                got = litellm.completion(model=f"together_ai/{model}", **fields, stream=stream)
                if stream:
                    got = litellm.stream_chunk_builder(list(got), messages=messages)
                return read_message(got.choices[0].message)

            self.hold(ask)

        self.try_each(check)

    def test_langchain(self) -> None:
        module = need("langchain_openai", "langchain-openai")

        def check(model: str, stream: bool) -> None:
            def ask(messages: Any, tools: Any) -> Any:
                chat = module.ChatOpenAI(model=model, use_responses_api=False)
                chat = chat.bind_tools(tools) if tools else chat
                got = None if stream else chat.invoke(messages)
                for chunk in chat.stream(messages) if stream else ():
                    got = chunk if got is None else got + chunk
                self.assertTrue(got.usage_metadata["total_tokens"])
                calls = [
                    (call["id"], call["name"], json.dumps(call["args"])) for call in got.tool_calls
                ]
                return got.text, calls

            self.hold(ask)

        self.try_each(check)

    def run_agent(self, ask: Any) -> None:
        """Let an agent answer both questions by `await ask(question, history, tools)`."""
        called: list[str] = []

        def find_city(country: str) -> str:
            """Find the largest city of a country."""
            called.append("find_city")
            return "Lisbon"

        def get_weather(city: str) -> str:
            """Get the weather of a place."""
            called.append("get_weather")
            return "21 degrees"

        async def converse() -> None:
            history = None
            for question in ASKED.values():
                text, history = await ask(question, history, [find_city, get_weather])
                self.assertTrue(text)

        asyncio.run(converse())
        self.assertEqual(called, list(ASKED))

    def test_pydantic_ai(self) -> None:
        ai = need("pydantic_ai", "pydantic-ai-slim")
        models = need("pydantic_ai.models.openai", "pydantic-ai-slim")

        def check(model: str, stream: bool) -> None:
            async def ask(question: str, history: Any, tools: Any) -> Any:
                agent = ai.Agent(models.OpenAIChatModel(model), tools=tools)
                if not stream:
                    result = await agent.run(question, message_history=history)
                    return result.output, result.all_messages()
                async with agent.run_stream(question, message_history=history) as result:
                    texts = [text async for text in result.stream_text(delta=True)]
                    return "".join(texts), result.all_messages()

            with self.stumbles(model):
                self.run_agent(ask)

        self.try_each(check)

    def test_openai_agents(self) -> None:
        agents = need("agents", "openai-agents")
        agents.set_tracing_disabled(True)

        def check(model: str, stream: bool) -> None:
            client = importlib.import_module("openai").AsyncOpenAI()
            chat = agents.OpenAIChatCompletionsModel(model, client)

            async def ask(question: str, history: Any, tools: Any) -> Any:
                offered = [agents.function_tool(tool) for tool in tools]
                agent = agents.Agent("Guide", model=chat, tools=offered)
                items = [*(history or ()), {"role": "user", "content": question}]
                if not stream:
                    result = await agents.Runner.run(agent, items)
                else:
                    result = agents.Runner.run_streamed(agent, items)
                    async for _ in result.stream_events():
                        pass
                return result.final_output, result.to_input_list()

            with self.stumbles(model):
                self.run_agent(ask)

        self.try_each(check)


if __name__ == "__main__":
    unittest.main(warnings="ignore")
