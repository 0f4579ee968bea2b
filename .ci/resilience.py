"""What clients do when production fails them: each fault of `FAULTS`, and the server's verdict.

    python .ci/resilience.py [--write] NAME=PYTHON ... NAME=node:FOLDER ...

NAME is a client below; PYTHON an interpreter that has it, FOLDER one with its node_modules. The
table is compared with that of the README, which --write replaces.

A program asks a question as a stream, then sends what it was given with a second question, as
everybody does. A cell says what became of that:

    ok              it had the whole answer, and nothing was wrong
    raises          the client raised an error, as it should where no other try can help
    raises at once  it did so though another try might have helped
    takes half      it gave half an answer for a whole one
    passes on       it gave the program what came, a call that makes no sense
    (a wrong)       what else the verdict names, see `WRONGS`
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

MODEL = "meta-llama/Llama-3.3-70B-Instruct-Turbo"
KEY = "parlel-together"
SECONDS = 2.5  # of a client's patience
LIMIT = 120  # seconds for one fault
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
START = "| fault |"


# --- The program, run with the client's own Python: a fault's name a line in, an outcome a line out


def fold(chunks: list) -> tuple[str, list]:
    """Return the text and the tool calls of a stream's chunks, as a program joins them."""
    text, calls = "", {}
    for chunk in chunks:
        for choice in chunk.choices or ():
            text += choice.delta.content or ""
            for part in choice.delta.tool_calls or ():
                call = calls.setdefault(part.index or 0, {"id": None, "name": "", "arguments": ""})
                call["id"] = part.id or call["id"]
                call["name"] += (part.function and part.function.name) or ""
                call["arguments"] += (part.function and part.function.arguments) or ""
    return text, list(calls.values())


def judge_call(call: dict) -> str:
    """Say what is wrong with a tool call, if anything is."""
    try:
        arguments = json.loads(call["arguments"])
    except ValueError:
        return "passes on"
    known = call["name"] == "get_weather" and isinstance(arguments.get("city"), str)
    return "" if known else "passes on"


async def converse(ask, with_tools: bool) -> str:
    """Have a conversation of two questions; return what became of it."""
    messages = [{"role": "user", "content": "Tell me about the weather in Rome."}]
    more = {"tools": [TOOL]} if with_tools else {}
    text, calls = fold(await ask(messages, more))
    if with_tools and (not calls or any(map(judge_call, calls))):
        return "passes on"
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
    await ask(messages, {})
    return "ok"


def make_asker(name: str, url: str):
    """Return what asks a client for a stream, and returns its chunks."""
    options = {"base_url": url, "api_key": KEY, "timeout": SECONDS}
    if name == "litellm":
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        import litellm

        litellm.suppress_debug_info = True
        options = {"api_base": url, "api_key": KEY, "timeout": SECONDS}

        async def ask(messages, more):
            model = "openai/" + MODEL
            return list(litellm.completion(model, messages, stream=True, **options, **more))

        return ask
    module = __import__(name.split()[0])
    kind = {"openai": "OpenAI", "together": "Together"}[name.split()[0]]
    if name.endswith("async"):
        client = getattr(module, "Async" + kind)(**options)

        async def ask(messages, more):
            create = client.chat.completions.create
            stream = await create(model=MODEL, messages=messages, stream=True, **more)
            return [chunk async for chunk in stream]

        return ask
    client = getattr(module, kind)(**options)

    async def ask(messages, more):
        create = client.chat.completions.create
        return list(create(model=MODEL, messages=messages, stream=True, **more))

    return ask


async def run_program(name: str, url: str) -> None:
    ask = make_asker(name, url)
    for line in sys.stdin:
        fault, with_tools = json.loads(line)
        try:
            outcome = await converse(ask, with_tools)
        except Exception as error:
            outcome = "raises"
            print(f"{name}, {fault}: {error!r:.200}", file=sys.stderr)
        print(json.dumps(outcome), flush=True)


# --- The server and its verdict


def describe(outcome: str, wrongs: list[str]) -> str:
    """Return the cell for an outcome and a verdict."""
    if outcome == "raises" and "no_retry" in wrongs:
        outcome = "raises at once"
    if "half_answer_taken" in wrongs:
        outcome = "takes half"
    others = [name for name in wrongs if name not in ("no_retry", "half_answer_taken")]
    return ", ".join([outcome, *others])


def run_client(name: str, runner: str) -> dict[str, str]:
    """Return the cell of each fault for one client."""
    from together_fake import FAULTS, TogetherAiServer

    cells = {}
    command = [runner, __file__, "--program", name]
    if runner.startswith("node:"):
        script = Path(runner[5:], "resilience.mjs")
        script.write_text((HERE / "resilience.mjs").read_text("utf-8"), "utf-8")
        command = ["node", str(script), name]
    with TogetherAiServer(port=0) as server:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command.append(server.base_url)
        with subprocess.Popen(command, **pipes, stderr=subprocess.DEVNULL) as program:
            for fault, words in FAULTS.items():
                server.reset()
                with server.fault(fault):
                    program.stdin.write(json.dumps([fault, "body" in words]) + "\n")
                    program.stdin.flush()
                    outcome = json.loads(program.stdout.readline())
                found = server.verdict()
                cells[fault] = describe(outcome, sorted({each.name for each in found}))
            program.stdin.close()
    return cells


def write_table(columns: dict[str, dict[str, str]]) -> str:
    """Return the table, with one column for clients that do the same."""
    groups: dict[tuple, list[str]] = {}
    for name, cells in columns.items():
        groups.setdefault(tuple(cells.items()), []).append(name)
    lines = [f"{START} " + " | ".join(", ".join(names) for names in groups.values()) + " |"]
    lines.append("| --- |" + " --- |" * len(groups))
    for fault in next(iter(columns.values())):
        cells = " | ".join(dict(key)[fault] for key in groups)
        lines.append(f"| `{fault}` | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", nargs=2, metavar=("NAME", "URL"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("clients", nargs="*", metavar="NAME=RUNNER")
    options = parser.parse_args()
    if options.program:
        asyncio.run(run_program(*options.program))
        return 0
    clients = dict(each.split("=", 1) for each in options.clients)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = pool.map(run_client, clients, clients.values())
        table = write_table(dict(zip(clients, results)))
    print(table)
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    before, start, rest = text.partition(START)
    old, _, after = (start + rest).partition("\n\n")
    if options.write:
        readme.write_text(f"{before}{table}\n{after}", "utf-8")
    if old + "\n" == table:
        return 0
    print("the table of the README differs")
    return 0 if options.write else 1


if __name__ == "__main__":
    sys.exit(main())
