"""What the README shows for test runners, tried on the small application in .ci/app.

    runners.py pytest PYTHON   one with pytest, pytest-xdist, pytest-asyncio, openai and together
    runners.py node FOLDER     in which vitest, jest, openai and together-ai are installed

The set-up is taken from the README, word for word. TOGETHER_FAKE is the file (together_fake.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FAKE = Path(os.environ.get("TOGETHER_FAKE") or CHECKOUT / "together_fake.py")
README = (CHECKOUT / "README.md").read_text("utf-8")
TIMEOUT = 300  # seconds for one run

DOCTEST = '''"""A module with an example.

>>> getfixture("together_fake").reply("Hi!").normal["content"]
'Hi!'
"""
'''
SNAPSHOT = """from app import OpenAI
from inline_snapshot import snapshot

def test_snapshot(together_fake):
    message = {"role": "user", "content": "hello"}
    answer = OpenAI().chat.completions.create(model="m", messages=[message], max_tokens=4)
    assert answer.choices[0].message.content == snapshot()
"""
PARALLEL = """import { beforeEach, expect, test } from '%s';
import OpenAI from 'openai';
import Together from 'together-ai';
import { calls, reply, reset } from './fake.mjs';

beforeEach(reset);
for (let number = 0; number < 15; number += 1)
  test(`test ${number}`, async () => {
    const said = `%s ${number}`;
    await reply({ userMessage: 'who' }, { content: said }, { times: 2 });
    for (const client of [new OpenAI(), new Together()]) {
      const messages = [{ role: 'user', content: 'who?' }];
      const answer = await client.chat.completions.create({ model: 'm', messages });
      expect(answer.choices[0].message.content).toBe(said);
    }
    expect((await calls()).length).toBe(2);
  });
"""


def find_blocks(language: str) -> list[str]:
    """Return the README's pieces of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def run(folder: Path, command: Sequence[str], *wanted: str, **variables: str) -> None:
    """Run a command that must succeed and say these things."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "CI": "true", "NO_COLOR": "1", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    missing = [words for words in wanted if not re.search(words, done.stdout)]
    if done.returncode or missing:
        print(done.stdout)
        sys.exit(f"{' '.join(command)}: status {done.returncode}, {missing} not said")
    print(f"{' '.join(map(str, command[-4:]))}: ok", flush=True)


def copy_application(folder: Path, pattern: str) -> None:
    for path in (CHECKOUT / ".ci" / "app").glob(pattern):
        shutil.copy(path, folder)
    shutil.copy(FAKE, folder / "together_fake.py")


def try_pytest(folder: Path, python: str) -> None:
    copy_application(folder, "*.py")
    (line,) = re.findall(r"conftest\.py` at the root: `(.+?)`", README)
    (folder / "conftest.py").write_text(line + "\n")
    (example,) = (block for block in find_blocks("python") if "(together_fake):" in block)
    (folder / "test_readme.py").write_text(example)
    (folder / "documented.py").write_text(DOCTEST)
    count = 16  # 12 of the application, 4 of it by unittest
    count += len(re.findall("^def test", example, re.M)) + 1  # of the README, and one doctest
    options = ["-q", "-p", "no:cacheprovider", "-W", "error::pytest.PytestWarning"]
    options += ["-W", "ignore:The configuration option"]  # of pytest-asyncio is not set
    has_snapshots = not subprocess.run(
        [python, "-c", "import inline_snapshot"], stderr=subprocess.DEVNULL
    ).returncode
    if has_snapshots:
        snapshot = folder / "test_snapshot.py"
        snapshot.write_text(SNAPSHOT)
        command = [python, "-m", "pytest", snapshot.name, "--inline-snapshot=create"]
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, timeout=TIMEOUT)
        assert "snapshot()" not in snapshot.read_text(), "no snapshot was made"
    command = [python, "-m", "pytest", *options, "--doctest-modules"]
    run(folder, command, rf"\n{count + has_snapshots} passed")
    run(folder, [*command, "-n", "2"], rf"\n{count + has_snapshots} passed")
    run(folder, [python, "-m", "unittest", "-q", "test_app_unittest"], r"Ran 4 tests", r"\nOK")


def try_node(folder: Path, packages: str) -> None:
    copy_application(folder, "*.ts")
    python = os.environ.get("PYTHON") or sys.executable
    for name in ("together-fake.mjs", "fake.mjs"):
        (block,) = (block for block in find_blocks("js") if block.startswith(f"// {name}\n"))
        (folder / name).write_text(block.replace("'python3'", json.dumps(python)))
    (folder / "node_modules").symlink_to(Path(packages, "node_modules"))
    (folder / "package.json").write_text('{"scripts": {"test": "vitest run app.test.ts"}}')
    (step,) = (block for block in find_blocks("yaml") if "npm test" in block)
    command = step.removeprefix("- run: ").split()
    run(folder, [python, *command[1:]], r"Tests +4 passed")
    setup = "globalSetup: './together-fake.mjs'"
    (folder / "vitest.config.mjs").write_text(f"export default {{ test: {{ {setup} }} }};\n")
    match = "testMatch: ['**/*.test.mjs'], transform: {}"
    (folder / "jest.config.mjs").write_text(f"export default {{ {setup}, {match} }};\n")
    run(folder, ["npx", "vitest", "run", "app.test.ts"], r"Tests +4 passed")
    for runner, command in (
        ("vitest", ["npx", "vitest", "run", ".test.mjs"]),
        ("@jest/globals", ["npx", "jest"]),
    ):
        for name in "abc":
            (folder / f"{name}.test.mjs").write_text(PARALLEL % (runner, name))
        run(folder, command, r"Tests:? +45 passed", NODE_OPTIONS="--experimental-vm-modules")


def main() -> None:
    kind, place = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        {"pytest": try_pytest, "node": try_node}[kind](Path(folder).resolve(), place)


if __name__ == "__main__":
    main()
