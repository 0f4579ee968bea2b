"""The application, tested with unittest alone."""

import unittest

import app

from together_fake import TogetherTestCase


class AppTest(TogetherTestCase, instant_jobs=True):
    def test_retrieval(self):
        self.server.reply("Fish.", system_message="Herons eat", user_message="herons")
        self.assertEqual(app.answer_from_passage("What do herons eat?"), "Fish.")
        self.server.assert_all_used()

    def test_tools(self):
        self.server.reply("It rains.", has_tool_result=True)
        self.assertEqual(app.run_agent("the weather in Rome", lambda city: "rain"), "It rains.")

    def test_batch(self):
        self.server.reply("Masons.", user_message="lighthouse")
        answers = app.answer_in_batch(["Who built the lighthouse?", "Why is the sky blue?"])
        self.assertEqual(answers["Who built the lighthouse?"], "Masons.")


class StreamTest(TogetherTestCase, unittest.IsolatedAsyncioTestCase):
    async def test_streaming(self):
        self.server.reply("Good morning!")
        events = [event async for event in app.stream_endpoint("hello")]
        self.assertEqual(events[-1], b"event: end\ndata:\n\n")
        self.assertIn(b"morning", b"".join(events))


if __name__ == "__main__":
    unittest.main()
