"""Run together's own tests, those of its API resources, against together_fake.py.

Run as `python .ci/sdk_tests.py` where together 2.42.0 or 3.1.1, pytest, pytest-asyncio, respx,
dirty-equals, aiohttp and httpx-aiohttp are installed: the version that is installed is tested,
with the tests of its source distribution, which pip downloads into a temporary folder.
TOGETHER_FAKE is the file to serve.

The tests ask for objects by ids such as "id". So this file is a plugin of that pytest too:
before each test it resets the server and seeds the objects that the tests take for granted, and
the tests that production's own bodies fail must fail here too, for that reason alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Generator
from typing import Any

import pytest
from together import APIResponseValidationError

HERE = pathlib.Path(__file__).resolve().parent
FAKE = os.environ.get("TOGETHER_FAKE") or str(HERE.parent / "together_fake.py")

GROUPS = (
    "chat", "test_completions.py", "test_embeddings.py", "test_images.py", "test_rerank.py",
    "test_files.py", "test_fine_tuning.py", "test_batches.py", "test_evals.py", "test_videos.py",
    "audio", "test_models.py", "test_projects.py",
)  # fmt: skip
# Those of 2.x alone, with its hardware.
GROUPS_OF_2 = ("test_endpoints.py", "endpoints/test_adapters.py", "models/test_uploads.py")
# Of the models of 3.x, its registry is not emulated but for the list of a project's.
REGISTRY = "not (list_files or list_org_scoped or list_revisions)"
SUPPORTED = "list_supported or retrieve_supported"
CHOSEN_OF_3 = ("-k", f"not test_models or {SUPPORTED} or (list and {REGISTRY})")

# Of the tests that ask for an image, those whose client validates strictly; it misses the type
# that production does not send with one.
STUMBLING = re.compile(r"test_images\.py::.*generate.*\[(strict|aiohttp)\]$")
MISSING = ({"type"}, {"type", "url"})  # the other member of the union wants an address too

TRAINING_FILES = ("id", "training_file", "validation_file")
BATCH_LINE = '{"custom_id": "1", "body": {}}\n'
TRAINING_LINE = '{"text": "x"}\n'
ENDPOINTS = ("endpoint-d23901de-ef8f-44bf-b3e7-de9c1ca8f2d7", "endpointId")
SEEDS: dict[str, list[dict[str, Any]]] = {
    "files": [
        *({"id": id, "content": TRAINING_LINE} for id in TRAINING_FILES),
        {"id": "file-abc123def456ghi789", "purpose": "batch-api", "content": BATCH_LINE},
    ],
    "fine_tunes": [{"id": "id"}, {"id": "ft_id", "status": "completed"}],
    "batches": [{"id": "batch_job_abc123def456"}],
    "evaluations": [{"workflow_id": "id"}],
    "videos": [{"id": "id"}],
    "endpoints": [{"id": id} for id in ENDPOINTS],
    "jobs": [{"job_id": "job-a15dad11-8d8e-4007-97c5-a211304de284"}],
}


def ask(path: str, body: Any = None) -> Any:
    """Send JSON to a path of the server under test, or get what is there; return the answer's."""
    url = os.environ["TEST_API_BASE_URL"].removesuffix("/v1") + path
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Authorization": "Bearer x"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


@pytest.fixture(autouse=True)
def seed_server() -> None:
    """Empty the server and store what the tests take for granted."""
    ask("/__parlel/reset", {})
    ask("/__parlel/seed", SEEDS)
    listed = ask("/v2/supported-models?limit=1")["data"][0]
    match = {"endpoint": "GET /v2/supported-models/id"}
    ask("/__parlel/fixtures", {"fixtures": [{"match": match, "response": {"json": listed}}]})


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Expect the failure of a test that stumbles over what production sends, and no other."""
    if not STUMBLING.search(pyfuncitem.nodeid):
        return (yield)
    try:
        yield
    except APIResponseValidationError as error:
        problems: Any = error.__cause__
        assert {problem["loc"][-1] for problem in problems.errors()} in MISSING, problems
        pytest.xfail("production sends an image without its type")
    pytest.fail("production's form passes here: take this test off the list")


def fetch_tests(version: str, folder: str) -> pathlib.Path:
    """Unpack the source distribution of together and return where."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    sources = ["--no-deps", "--no-binary", "together", f"together=={version}"]
    subprocess.run([*pip, "-d", folder, *sources], check=True)
    (archive,) = pathlib.Path(folder).glob("together-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)
    return archive.with_name(f"together-{version}")


def run_tests(source: pathlib.Path, version: str, url: str) -> int:
    """Run the groups that together_fake.py answers; return pytest's exit status."""
    second = version.startswith("2.")
    groups = [*GROUPS, *(GROUPS_OF_2 if second else ())]
    # The options of the project itself hold, but for its -n auto.
    options = ["-q", "-o", "addopts=--tb=short", "-p", "no:cacheprovider", "-p", "sdk_tests"]
    settings = {
        "TEST_API_BASE_URL": url + ("/v1" if second else ""),
        "PYTHONPATH": str(HERE),
        "TOGETHER_TELEMETRY_DISABLED": "1",
    }
    paths = [f"tests/api_resources/{group}" for group in groups]
    command = [sys.executable, "-m", "pytest", *options, *(() if second else CHOSEN_OF_3), *paths]
    return subprocess.run(command, cwd=source, env={**os.environ, **settings}).returncode


def main() -> int:
    version = importlib.metadata.version("together")
    command = [sys.executable, FAKE, "--port", "0", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        source = fetch_tests(version, folder)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout
                line = server.stdout.readline()
                found = re.search(r"http://127\.0\.0\.1:\d+", line)
                assert found, f"together_fake.py said {line!r}, not where it listens"
                return run_tests(source, version, found[0])
            finally:
                server.terminate()


if __name__ == "__main__":
    sys.exit(main())
