"""What each client needs to find together_fake.py: the README's table, tried with the real ones.

    REQUIRE_CLIENTS='openai together' python .ci/reach.py
    NODE_CLIENTS=FOLDER REQUIRE_CLIENTS='npm:openai' python .ci/reach.py

Every program says hello in a process of its own, with the variables of `server.env`, and has to be
answered here and by nobody else. A client that is not installed is skipped, unless REQUIRE_CLIENTS
names it: then its absence is a failure. NODE_CLIENTS is the folder that has `node_modules`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path = [path for path in sys.path if path != str(HERE)]  # openai-agents is `agents` too
sys.path.append(os.path.dirname(os.environ.get("TOGETHER_FAKE") or HERE))

from together_fake import TogetherAiServer  # noqa: E402

REQUIRED = os.environ.get("REQUIRE_CLIENTS", "").split()
NODE_CLIENTS = Path(os.environ.get("NODE_CLIENTS") or ".").resolve()
TIMEOUT = 120  # seconds that a program may take; some import for a long time
MODEL = "meta-llama/Llama-3.3-70B-Instruct-Turbo"
KEPT = ("PATH", "HOME", "LANG", "SYSTEMROOT", "TMPDIR")  # of this process's variables

# client, as REQUIRE_CLIENTS names it: a program; URL stands for what it is given as an argument
PROGRAMS = [
    ("together", "import together; together.Together().chat.completions.create(**CHAT)"),
    ("openai", "import openai; openai.OpenAI().chat.completions.create(**CHAT)"),
    ("openai", "import openai; openai.chat.completions.create(**CHAT)"),
    (
        "langchain_together",
        "import langchain_together as client; client.ChatTogether(model=MODEL).invoke('hello')",
    ),
    (
        "langchain_openai",
        "import langchain_openai as client; client.ChatOpenAI(model=MODEL).invoke('hello')",
    ),
    (
        "langchain_openai",
        "from langchain_openai import ChatOpenAI as Chat;"
        " Chat(model=MODEL, use_responses_api=True).invoke('hello')",
    ),
    (
        "litellm",
        "import litellm; litellm.completion('together_ai/' + MODEL, CHAT['messages'])",
    ),
    (
        "agents",  # openai-agents; a slash in a model's name would name a provider
        "import agents; agents.set_tracing_disabled(True);"
        " agents.Runner.run_sync(agents.Agent(name='a', model='gpt-oss'), 'hello')",
    ),
    ("pydantic_ai", "from pydantic_ai import Agent; Agent('openai:' + MODEL).run_sync('hello')"),
    (
        "pydantic_ai",
        "from pydantic_ai import Agent; from pydantic_ai.models.openai import OpenAIChatModel;"
        " from pydantic_ai.providers.together import TogetherProvider;"
        " from openai import AsyncOpenAI;"
        " provider = TogetherProvider(openai_client=AsyncOpenAI(base_url=URL));"
        " Agent(OpenAIChatModel(MODEL, provider=provider)).run_sync('hello')",
    ),
    (
        "llama_index.llms.openai_like",
        "from llama_index.llms.openai_like import OpenAILike as Llm;"
        " Llm(model=MODEL, api_base=URL, api_key='x', is_chat_model=True).complete('hello')",
    ),
    (
        "npm:together-ai",
        "import Together from 'together-ai'; await new Together().chat.completions.create(CHAT)",
    ),
    (
        "npm:openai",
        "import OpenAI from 'openai'; await new OpenAI().chat.completions.create(CHAT)",
    ),
    (
        "npm:@openai/agents",
        "import { Agent, run, setTracingDisabled } from '@openai/agents';"
        " setTracingDisabled(true); await run(new Agent({ name: 'a', model: MODEL }), 'hello')",
    ),
    (
        "npm:@ai-sdk/openai",
        "import { openai } from '@ai-sdk/openai'; import { generateText } from 'ai';"
        " await generateText({ model: openai(MODEL), prompt: 'hello' })",
    ),
    (
        "npm:@ai-sdk/togetherai",
        "import { createTogetherAI } from '@ai-sdk/togetherai'; import { generateText } from 'ai';"
        " const together = createTogetherAI({ baseURL: URL });"
        " await generateText({ model: together(MODEL), prompt: 'hello' })",
    ),
]


def is_installed(client: str) -> bool:
    if client.startswith("npm:"):
        return (NODE_CLIENTS / "node_modules" / client[4:]).is_dir()
    try:
        return importlib.util.find_spec(client) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def write_command(client: str, program: str, url: str) -> list[str]:
    """Return the command that runs a program, with the names that it uses defined."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    names = {"MODEL": MODEL, "CHAT": chat, "URL": url}
    lines = [f"{name} = {value!r}; " for name, value in names.items()]
    if not client.startswith("npm:"):
        return [sys.executable, "-c", "".join(lines) + "\n" + program]
    constants = "".join(f"const {line}" for line in lines)
    return ["node", "--input-type=module", "-e", constants + program]


class ReachTests(unittest.TestCase):
    def run_program(self, client: str, program: str) -> None:
        """Run a program, which has to be answered by a new server."""
        with TogetherAiServer(port=0) as server:
            env = {name: os.environ[name] for name in KEPT if name in os.environ}
            env.update(server.env, LITELLM_LOCAL_MODEL_COST_MAP="True", TOGETHER_NO_BANNER="1")
            done = subprocess.run(
                write_command(client, program, server.base_url),
                env=env,
                cwd=NODE_CLIENTS if client.startswith("npm:") else None,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
            self.assertEqual(done.returncode, 0, done.stderr[-2000:])
            statuses = {call.status for call in server.requests}
            self.assertEqual(statuses, {200}, "it was answered by somebody else, or refused")

    def test_each_client(self) -> None:
        for client, program in PROGRAMS:
            if is_installed(client):
                with self.subTest(client=client, program=program):
                    self.run_program(client, program)
            else:
                self.assertNotIn(client, REQUIRED, f"{client} is not installed")


if __name__ == "__main__":
    unittest.main()
