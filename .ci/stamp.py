"""Write into together_fake.py the digest by which `--version` knows it as released.

The README gets the size and the checksum of the file, the manifest its size.

stamp.py            the last thing before a release
stamp.py --check    exit with 1 where the file has changed since it was stamped
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "together_fake.py"
LINE = re.compile(r'^RELEASED = "(\w*)"', re.M)


def rewrite(name: str, pattern: str, value: str) -> None:
    """Put a figure into a file beside the module."""
    path = FILE.with_name(name)
    path.write_text(re.sub(pattern, value, path.read_text("utf-8"), count=1, flags=re.M), "utf-8")


def main() -> int:
    source = FILE.read_text("utf-8")
    (stamped,) = LINE.findall(source)
    digest = hashlib.sha256(LINE.sub('RELEASED = ""', source, count=1).encode()).hexdigest()
    if sys.argv[1:] == ["--check"]:
        return int(stamped != digest)
    FILE.write_text(LINE.sub(f'RELEASED = "{digest}"', source, count=1), "utf-8")
    data = FILE.read_bytes()
    rewrite("README.md", r"(?<=^)[0-9,]+(?= bytes; `python)", f"{len(data):,}")
    rewrite("README.md", r"(?<=^`)[0-9a-f]*(?=`\.$)", hashlib.sha256(data).hexdigest())
    rewrite("manifest.json", r'(?<="size_kb": )[0-9]+', str(len(data) // 1024))
    print(digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
