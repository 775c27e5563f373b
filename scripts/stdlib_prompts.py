"""Write prompts for routing traces: one excerpt of each of many modules of the standard library.

`python scripts/stdlib_prompts.py 400 prompts.jsonl`, then `moe-runtime trace record`. A module
gives one excerpt, so a split by sequence never has one module on both sides.
"""

import argparse
import hashlib
import json
import sysconfig
from pathlib import Path

EXCERPT_CHARACTERS = 1000  # about 300 tokens of the demonstration checkpoints
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "encodings", "pydoc_data"}


def excerpts(number: int) -> list[tuple[str, str]]:
    """Names and excerpts of `number` modules, in an order that only the names' spelling decides."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py") if not path.is_symlink()]
    names = [name for name in names if not SKIPPED_FOLDERS & set(name.parts)]
    digests = {name: hashlib.sha256(name.as_posix().encode()).digest() for name in names}
    found: list[tuple[str, str]] = []
    for name in sorted(names, key=digests.__getitem__):
        text = (root / name).read_text(encoding="utf-8", errors="ignore")
        room = len(text) - EXCERPT_CHARACTERS
        if room > 0 and len(found) < number:
            # Anywhere in the file, from the start of a line.
            at = text.rfind("\n", 0, int.from_bytes(digests[name][:8], "big") % room) + 1
            found.append((name.as_posix(), text[at : at + EXCERPT_CHARACTERS]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("number", type=int, help="how many prompts")
    parser.add_argument("output", type=Path, help="the .jsonl file to write")
    arguments = parser.parse_args()
    lines = []
    for name, text in excerpts(arguments.number):
        domain = "test" if "test" in Path(name).parts[0] else "library"
        lines.append(json.dumps({"prompt": text, "domain": domain}) + "\n")
    arguments.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
