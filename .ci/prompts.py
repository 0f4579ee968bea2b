"""Run programs that read their answers by a form of their own against together_fake.py, unscripted.

Run as `python .ci/prompts.py` where deepeval, inspect-ai, baml-py or langchain are installed: those
that are missing are skipped, unless REQUIRE_CLIENTS names them, separated by blanks. TOGETHER_FAKE
is the file to serve.
"""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
from typing import Any, Literal

HERE = pathlib.Path(__file__).resolve().parent
FAKE = os.environ.get("TOGETHER_FAKE") or str(HERE.parent / "together_fake.py")
MODEL = "meta-llama/Llama-3.3-70B-Instruct-Turbo"
QUESTION = "What are the opening hours of the museum in Oslo?"
ANSWER = "The museum in Oslo opens at nine. It closes at five. I think it is the best one."
CONTEXT = ["The museum in Oslo is open from nine to five.", "Entry is free on Sundays."]

os.environ.update(
    DEEPEVAL_TELEMETRY_OPT_OUT="YES",
    DEEPEVAL_DISABLE_DOTENV="1",
    ERROR_REPORTING="NO",
    DO_NOT_TRACK="1",
    BAML_LOG="warn",
)


def load_fake() -> Any:
    """Import the file that is tested."""
    spec = importlib.util.spec_from_file_location("together_fake", FAKE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["together_fake"] = module
    spec.loader.exec_module(module)
    return module


def need(name: str) -> Any:
    """Import a package, or skip; fail where it has to be there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if name.partition(".")[0] in os.environ.get("REQUIRE_CLIENTS", "").split():
            raise
        raise unittest.SkipTest(f"{name} is not installed") from None


class PromptCase(unittest.TestCase):
    """A test with a server of its own, and a folder that goes with it."""

    def setUp(self) -> None:
        self.server = load_fake().TogetherAiServer(port=0).start()
        self.addCleanup(self.server.stop)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        self.folder = pathlib.Path(folder.name)

    def tearDown(self) -> None:
        for call in self.server.requests:
            self.assertEqual(call.status, 200, call.error)


class DeepevalTests(PromptCase):
    """Metrics that let a model judge: each ends with a score from 0 to 1."""

    def metrics(self) -> dict[str, Any]:
        metrics = need("deepeval.metrics")
        cases = need("deepeval.test_case")
        params = getattr(cases, "SingleTurnParams", None) or cases.LLMTestCaseParams
        judge = need("deepeval.models").LocalModel(
            model=MODEL, api_key="parlel-together", base_url=self.server.base_url
        )
        plain = {"model": judge, "async_mode": False}
        shown = {"evaluation_params": [params.INPUT, params.ACTUAL_OUTPUT]}
        return {
            "answer relevancy": metrics.AnswerRelevancyMetric(**plain),
            "faithfulness": metrics.FaithfulnessMetric(**plain),
            "hallucination": metrics.HallucinationMetric(**plain),
            "bias": metrics.BiasMetric(**plain),
            "toxicity": metrics.ToxicityMetric(**plain),
            "summarization": metrics.SummarizationMetric(**plain),
            "contextual precision": metrics.ContextualPrecisionMetric(**plain),
            "contextual recall": metrics.ContextualRecallMetric(**plain),
            "contextual relevancy": metrics.ContextualRelevancyMetric(**plain),
            "prompt alignment": metrics.PromptAlignmentMetric(["Answer in English."], **plain),
            "g-eval": metrics.GEval(name="Right", criteria="Is it right?", **shown, **plain),
            "strict g-eval": metrics.GEval(
                name="Right", criteria="Is it right?", strict_mode=True, **shown, **plain
            ),
        }

    def test_metrics(self) -> None:
        case = need("deepeval.test_case").LLMTestCase(
            input=QUESTION,
            actual_output=ANSWER,
            expected_output="From nine to five.",
            context=CONTEXT,
            retrieval_context=CONTEXT,
        )
        for name, metric in self.metrics().items():
            with self.subTest(metric=name):
                metric.measure(case, _show_indicator=False)
                self.assertGreaterEqual(metric.score, 0)
                self.assertLessEqual(metric.score, 1)
        self.assertTrue(all(call.form for call in self.server.requests))


class InspectTests(PromptCase):
    """Tasks that end with a sample that was scored, without an error."""

    def evaluate(self, task: Any) -> Any:
        inspect = need("inspect_ai")
        model = need("inspect_ai.model").get_model(
            "openai/" + MODEL,
            base_url=self.server.base_url,
            api_key="parlel-together",
            responses_api=False,
        )
        log = inspect.eval(
            task, model=model, model_roles={"grader": model}, display="none", log_dir="logs"
        )[0]
        self.assertEqual(log.status, "success", log.error)
        return log.samples[0]

    def task(self, target: str, solver: Any, scorer: Any, **more: Any) -> Any:
        sample = need("inspect_ai.dataset").Sample(input=QUESTION, target=target, **more)
        return need("inspect_ai").Task(dataset=[sample], solver=solver, scorer=scorer)

    def test_multiple_choice(self) -> None:
        need("inspect_ai")
        solvers, scorers = need("inspect_ai.solver"), need("inspect_ai.scorer")
        for options in ({}, {"cot": True}, {"multiple_correct": True}):
            with self.subTest(options=options):
                solver = solvers.multiple_choice(**options)
                choices = ["nine", "ten", "noon"]
                sample = self.evaluate(self.task("A", solver, scorers.choice(), choices=choices))
                self.assertTrue(set(sample.scores["choice"].answer) <= set("ABC, "))
                self.assertTrue(sample.scores["choice"].answer)

    def test_graded_by_a_model(self) -> None:
        need("inspect_ai")
        solvers, scorers = need("inspect_ai.solver"), need("inspect_ai.scorer")
        for scorer in (
            scorers.model_graded_qa(),
            scorers.model_graded_fact(),
            scorers.model_graded_qa(partial_credit=True),
        ):
            sample = self.evaluate(self.task("nine", solvers.generate(), scorer))
            (score,) = sample.scores.values()
            self.assertIn(score.value, ("C", "P", "I"), score.explanation)

    def test_basic_agent(self) -> None:
        need("inspect_ai")
        solvers, scorers = need("inspect_ai.solver"), need("inspect_ai.scorer")
        tools = need("inspect_ai.tool")

        @tools.tool
        def look_up_hours() -> Any:
            async def execute(museum: str) -> str:
                """Look up the opening hours of a museum.

                Args:
                    museum: its name
                """
                return "nine to five"

            return execute

        solver = solvers.basic_agent(tools=[look_up_hours()], message_limit=20)
        sample = self.evaluate(self.task("nine", solver, scorers.includes()))
        self.assertIsNone(sample.limit)
        called = [
            call.function
            for message in sample.messages
            for call in getattr(message, "tool_calls", None) or ()
        ]
        self.assertEqual(called[-1], "submit", called)


BAML = """
client<llm> Fake {
  provider openai-generic
  options {
    base_url env.FAKE_URL
    api_key "parlel-together"
    model "MODEL"
  }
}
enum Mood {
  HAPPY
  SAD @description("not happy")
  ANGRY
}
class Address {
  city string
  zip string?
}
class Person {
  name string @description("as it appears in the text")
  age int
  mood Mood
  emails string[]
  address Address
}
class Node {
  value int
  next Node?
}
class Receipt {
  total float
  paid bool
  kind "cash" | "card"
  items map<string, int>
}
"""


FUNCTION = """
function NAME(text: string) -> TYPE {
  client Fake
  prompt #"
    TASK
    {{ ctx.output_format }}
    {{ _.role("user") }}
    {{ text }}
  "#
}
"""
FUNCTIONS = (  # name, type in BAML, what it is in Python, task
    ("Extract", "Person", object, "Extract the person."),
    ("Many", "Person[]", list, "Extract all persons."),
    ("Classify", "Mood", enum.Enum, "How does the writer feel?"),
    ("Count", "int", int, "How many words are there?"),
    ("Share", "float", float, "What share of it is true?"),
    ("Check", "bool", bool, "Is it true?"),
    ("Chain", "Node", object, "Make a chain of numbers."),
    ("Read", "Receipt", object, "Read the receipt."),
    ("Pick", '"left" | "right"', str, "Which way?"),
)


class BamlTests(PromptCase):
    """Functions whose prompts tell the form of their results, as BAML writes it."""

    def test_nine_functions(self) -> None:
        need("baml_py")
        source = self.folder / "baml_src"
        source.mkdir()
        generator = """generator target {
          output_type "python/pydantic"
          output_dir "../"
          version "VERSION"
          default_client_mode sync
        }"""
        version = importlib.metadata.version("baml-py")
        text = BAML.replace("MODEL", MODEL) + generator.replace("VERSION", version)
        for name, kind, _, task in FUNCTIONS:
            text += FUNCTION.replace("NAME", name).replace("TYPE", kind).replace("TASK", task)
        (source / "main.baml").write_text(text)
        cli = pathlib.Path(sys.executable).parent / "baml-cli"
        made = subprocess.run([cli, "generate", "--from", source], capture_output=True, text=True)
        self.assertEqual(made.returncode, 0, made.stdout + made.stderr)
        os.environ["FAKE_URL"] = self.server.base_url
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.path.remove, str(self.folder))
        client = importlib.import_module("baml_client").b
        said = "Anna Berg of Oslo is thirty."
        for name, _, kind, _ in FUNCTIONS:
            with self.subTest(function=name):
                self.assertIsInstance(getattr(client, name)(said), kind)


class LangchainTests(PromptCase):
    """Parsers that put their instructions into the prompt."""

    def parse(self, parser: Any, question: str = "Tell me about Oslo.") -> Any:
        openai = need("langchain_openai")
        prompts = need("langchain_core.prompts")
        model = openai.ChatOpenAI(
            model=MODEL, base_url=self.server.base_url, api_key="parlel-together"
        )
        prompt = prompts.PromptTemplate.from_template("{question}\n\n{instructions}")
        chain = prompt | model | parser
        return chain.invoke(
            {"question": question, "instructions": parser.get_format_instructions()}
        )

    def test_json_and_pydantic(self) -> None:
        parsers = need("langchain_core.output_parsers")
        pydantic = need("pydantic")

        class Place(pydantic.BaseModel):
            name: str
            kind: Literal["city", "village"]
            people: int = pydantic.Field(ge=1, le=5)
            rating: float = pydantic.Field(description="between 0 and 1")
            rivers: list[str]

        got = self.parse(parsers.PydanticOutputParser(pydantic_object=Place))
        self.assertTrue(0 <= got.rating <= 1)
        got = self.parse(parsers.JsonOutputParser(pydantic_object=Place))
        Place.model_validate(got)
        got = self.parse(parsers.JsonOutputParser(), "Where is Oslo? Give the keys city, country.")
        self.assertEqual(set(got), {"city", "country"})

    def test_lists(self) -> None:
        parsers = need("langchain_core.output_parsers")
        for parser in (
            parsers.CommaSeparatedListOutputParser(),
            parsers.NumberedListOutputParser(),
            parsers.MarkdownListOutputParser(),
        ):
            with self.subTest(parser=type(parser).__name__):
                self.assertGreater(len(self.parse(parser)), 1)


if __name__ == "__main__":
    unittest.main()
