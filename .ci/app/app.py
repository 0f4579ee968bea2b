"""A small application: it finds passages, calls tools, streams, and runs a batch."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from openai import AsyncOpenAI, OpenAI
from together import Together

CHAT_MODEL = "openai/gpt-oss-20b"
EMBEDDING_MODEL = "intfloat/multilingual-e5-large-instruct"
PASSAGES = [
    "Herons eat fish, frogs and sometimes small mammals.",
    "The lighthouse was built by the harbour's own masons.",
    "The sky is blue because air scatters short waves most.",
]
WEATHER = {
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


def embed(client: OpenAI, texts: list[str]) -> list[list[float]]:
    answer = client.embeddings.create(model=EMBEDDING_MODEL, input=texts)
    return [item.embedding for item in answer.data]


def find_passage(question: str) -> str:
    """Return the passage that is nearest to a question."""
    query, *vectors = embed(OpenAI(), [question, *PASSAGES])
    scores = [sum(a * b for a, b in zip(query, vector)) for vector in vectors]
    return PASSAGES[scores.index(max(scores))]


def answer_from_passage(question: str) -> str:
    """Answer a question from the nearest passage."""
    messages = [
        {"role": "system", "content": f"Answer from this: {find_passage(question)}"},
        {"role": "user", "content": question},
    ]
    answer = OpenAI().chat.completions.create(model=CHAT_MODEL, messages=messages)
    return answer.choices[0].message.content


def run_agent(question: str, get_weather: Callable[[str], str]) -> str:
    """Let the model call a tool until it answers."""
    client, messages = OpenAI(), [{"role": "user", "content": question}]
    while True:
        message = (
            client.chat.completions.create(model=CHAT_MODEL, messages=messages, tools=[WEATHER])
            .choices[0]
            .message
        )
        if not message.tool_calls:
            return message.content
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


async def stream_endpoint(question: str) -> AsyncIterator[bytes]:
    """Yield an answer as the server-sent events of an endpoint."""
    async with AsyncOpenAI() as client:
        stream = await client.chat.completions.create(
            model=CHAT_MODEL, messages=[{"role": "user", "content": question}], stream=True
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                yield f"data: {json.dumps(chunk.choices[0].delta.content)}\n\n".encode()
    yield b"event: end\ndata:\n\n"


def answer_in_batch(questions: list[str]) -> dict[str, str]:
    """Answer many questions by a batch; return the answers by question."""
    client = Together()
    lines = [
        {
            "custom_id": str(number),
            "body": {"model": CHAT_MODEL, "messages": [{"role": "user", "content": question}]},
        }
        for number, question in enumerate(questions)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "questions.jsonl")
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        file = client.files.upload(path, purpose="batch-api", check=False)
    created = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions")
    job = created.job
    while job.status not in ("COMPLETED", "FAILED", "EXPIRED", "CANCELLED"):
        time.sleep(0.01)
        job = client.batches.retrieve(job.id)
    output = client.files.content(job.output_file_id).text()
    answers = {}
    for line in map(json.loads, output.splitlines()):
        message = line["response"]["body"]["choices"][0]["message"]
        answers[questions[int(line["custom_id"])]] = message["content"]
    return answers
