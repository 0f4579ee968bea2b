"""The application, tested with pytest, pytest-asyncio and the README's one line in conftest.py."""

import app
import pytest


def test_retrieval(together_fake):
    assert app.find_passage("What do herons eat?") == app.PASSAGES[0]
    together_fake.reply("Fish.", system_message="Herons eat", user_message="herons")
    assert app.answer_from_passage("What do herons eat?") == "Fish."
    together_fake.assert_called("embedding", times=2)


def test_tools(together_fake):
    together_fake.reply("It rains.", has_tool_result=True)
    asked = []
    assert (
        app.run_agent("the weather in Rome", lambda city: asked.append(city) or "rain")
        == "It rains."
    )
    assert len(asked) == 1
    assert "rain" in together_fake.requests[-1].body["messages"][-1]["content"]


@pytest.mark.asyncio
async def test_streaming(together_fake):
    together_fake.reply("Good morning!", chunk_size=5)
    events = [event async for event in app.stream_endpoint("hello")]
    assert events[:2] == [b'data: "Good "\n\n', b'data: "morni"\n\n']
    assert events[-1] == b"event: end\ndata:\n\n"


@pytest.mark.together_fake(instant_jobs=True)
def test_batch(together_fake):
    together_fake.reply("Masons.", user_message="lighthouse")
    answers = app.answer_in_batch(["Who built the lighthouse?", "Why is the sky blue?"])
    assert answers["Who built the lighthouse?"] == "Masons."
    assert answers["Why is the sky blue?"]


@pytest.mark.parametrize("number", range(8))
@pytest.mark.together_fake(on_miss="error")
def test_tests_are_apart(together_fake, number, request):
    together_fake.reply(str(number), user_message="number")
    message = {"role": "user", "content": "which number"}
    answer = app.OpenAI().chat.completions.create(model=app.CHAT_MODEL, messages=[message])
    assert answer.choices[0].message.content == str(number)
    (call,) = together_fake.requests
    assert call.test == request.node.nodeid
