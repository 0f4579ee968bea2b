"""Vendor together_fake.py into a repository with the linters' defaults; nothing may complain.

    guest.py FOLDER    the environment's bin, with all the tools below

The repository has what the README says to paste, and a module and a test of its own that are clean.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text("utf-8")

TEST = '''"""Tests of this repository."""

from together_fake import TogetherAiServer, TogetherTestCase


class GreetingTest(TogetherTestCase, on_miss="error"):
    """Greetings."""

    def test_greeting(self) -> None:
        """A scripted greeting is known."""
        self.server.reply("Hi!", user_message="hello", times=1)
        server: TogetherAiServer = self.server
        self.assertTrue(server.base_url.endswith("/v1"))
'''
CHECKS = """
ruff check .
ruff check together_fake.py test_greeting.py
ruff format --check .
black --check .
black --check together_fake.py test_greeting.py
mypy .
mypy --strict test_greeting.py
pyright
codespell
bandit -q -c pyproject.toml -r .
vulture .
coverage run -m unittest -q
coverage report --fail-under 100
"""


def find_block(language: str, words: str) -> str:
    """Return the README's piece of code in a language that has these words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)
    (block,) = (block for block in blocks if words in block)
    return block


def main() -> int:
    tools, failed = Path(sys.argv[1]).resolve(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
        shutil.copy(CHECKOUT / "together_fake.py", folder)
        (folder / "test_greeting.py").write_text(TEST)
        (folder / "pyproject.toml").write_text(find_block("toml", "[tool.ruff]"))
        subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
        for check in CHECKS.strip().splitlines():
            tool, *options = check.split()
            done = subprocess.run(
                [tools / tool, *options], cwd=folder, capture_output=True, text=True, timeout=300
            )
            print(f"{check}: {'ok' if done.returncode == 0 else done.stdout + done.stderr}")
            failed += done.returncode != 0
        scan = [tools / "detect-secrets", "scan"]
        found = json.loads(subprocess.check_output(scan, cwd=folder))["results"]
        print(f"detect-secrets scan: {found or 'ok'}")
    return 1 if failed or found else 0


if __name__ == "__main__":
    sys.exit(main())
