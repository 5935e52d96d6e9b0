"""Ordinary English without a download: prose of the documentation that this Python and our own requirements carry.

    python benchmarks/text.py OUT.jsonl [--characters 5000000]

pydoc's topics, and the docstrings of the standard library and of packages pinned in ``constraints.txt``, read without
importing them. Paragraphs of prose only (no code, tables or signatures), each once, joined to texts of a few hundred
characters. The texts stand in the order of their hashes, so that any number of them mixes all sources; the same
versions give the same bytes.
"""

import argparse
import ast
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGES = (
    *("numpy", "scipy", "torch", "transformers", "transformer_lens"),
    *("sympy", "plotly", "pandas", "pydantic", "datasets", "fsspec"),
)
LONGEST, SHORTEST = 900, 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", type=int, default=5_000_000)
    args = parser.parse_args()
    found = write(args.out, args.characters)
    print(f"{found} characters in {args.out}")
    if found < args.characters:
        sys.exit("there is no more text than that")


def write(out: Path, characters: int) -> int:
    """JSON lines of at least ``characters`` characters, if there are as many; how many there were."""
    done = 0
    with out.open("w", encoding="utf-8") as file:
        for text in texts():
            if done >= characters:
                break
            file.write(json.dumps({"text": text}) + "\n")
            done += len(text)
    return done


def texts() -> list[str]:
    """All texts, in the order of their hashes."""
    seen: set[bytes] = set()
    found: set[str] = set()
    for document in documents():
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", document):
            flat = " ".join(paragraph.split())
            if prose(flat) and (digest := _digest(flat)) not in seen:
                seen.add(digest)
                paragraphs.append(flat)
        found.update(text for text in _joined(paragraphs) if len(text) >= SHORTEST)
    return sorted(found, key=_digest)


def documents() -> Iterator[str]:
    """Docstrings and topics, in the order of their files."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    standard = Path(sysconfig.get_paths()["stdlib"])
    for folder in (standard, *map(_folder, PACKAGES)):
        for file in sorted(folder.rglob("*.py")):
            if "site-packages" not in file.relative_to(folder).parts:
                yield from _docstrings(file)


def prose(paragraph: str) -> bool:
    """Whether it reads as sentences rather than as code, a table, a signature or a list of parameters."""
    plain = sum(c.isalpha() or c == " " for c in paragraph) / max(len(paragraph), 1)
    words = paragraph.split()
    short = sum(word.strip(".,;:()").isalpha() for word in words) / max(len(words), 1)
    begins = paragraph[:1].isupper() and not paragraph.startswith(("Args:", "Returns:", "Parameters"))
    return begins and len(words) >= 8 and plain >= 0.88 and short >= 0.75 and paragraph.endswith((".", ":", "!", "?"))


def _docstrings(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            # Test data of the standard library that is not meant to be read.
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inspect.cleandoc(ast.get_docstring(node, clean=False) or "")


def _joined(paragraphs: list[str]) -> Iterator[str]:
    """Consecutive paragraphs together, as many as stay within ``LONGEST``."""
    text = ""
    for paragraph in paragraphs:
        if text and len(text) + len(paragraph) > LONGEST:
            yield text
            text = ""
        text = f"{text}\n\n{paragraph}" if text else paragraph
    if text:
        yield text


def _folder(package: str) -> Path:
    found = find_spec(package)
    assert found is not None and found.submodule_search_locations, f"{package} is not installed"
    return Path(found.submodule_search_locations[0])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


if __name__ == "__main__":
    main()
