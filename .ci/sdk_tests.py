"""Run together's own tests, those of its API resources, against together_fake.py.

Run as `python .ci/sdk_tests.py` where together 2.42.0 or 3.1.1, pytest, pytest-asyncio, respx,
dirty-equals, aiohttp and httpx-aiohttp are installed: the version that is installed is tested,
with the tests of its source distribution, which pip downloads into a temporary folder.
TOGETHER_FAKE is the file to serve.

The tests ask for objects by ids such as "id". So this file is a plugin of that pytest too:
before each test it resets the server and seeds the objects that the tests take for granted.
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
from typing import Any

import pytest

HERE = pathlib.Path(__file__).resolve().parent
FAKE = os.environ.get("TOGETHER_FAKE") or str(HERE.parent / "together_fake.py")

GROUPS = (
    "chat", "test_completions.py", "test_embeddings.py", "test_images.py", "test_rerank.py",
    "test_files.py", "test_fine_tuning.py", "test_batches.py", "test_evals.py", "test_videos.py",
    "audio",
)  # fmt: skip
GROUPS_OF_2 = ("test_endpoints.py", "endpoints/test_adapters.py")  # with its hardware

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
}


def post(path: str, body: Any = None) -> None:
    """Send JSON to a path of the server under test."""
    url = os.environ["TEST_API_BASE_URL"].removesuffix("/v1") + path
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=10) as response:
        response.read()


@pytest.fixture(autouse=True)
def seed_server() -> None:
    """Empty the server and store what the tests take for granted."""
    post("/__parlel/reset")
    post("/__parlel/seed", SEEDS)


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
    command = [sys.executable, "-m", "pytest", *options, *paths]
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
