"""English text that comes with the running Python: docstrings, comments and help topics of its library and of pip.

The library's source code is a second, separate text: with it, a model learns the names that the English speaks of.

Every document belongs to a source (a file or a module), and whole sources are held out, so that held-out text was
written elsewhere than the text trained on. Paragraphs that occur in both are dropped from the held-out side.
"""

import ast
import builtins
import importlib
import inspect
import itertools
import re
import sys
import sysconfig
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "config", "lib2to3"}
_COMMENT = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z]{2,}")
_HELD_OUT_SHARE = 25  # one source in so many


@frozen
class Document:
    """A piece of text; `name` is what it documents (a dotted name), or empty."""

    source: str
    name: str
    text: str


def is_held_out(source: str) -> bool:
    """Whether the texts of this source are kept for evaluation (a fixed function of the name)."""
    return zlib.crc32(source.encode()) % _HELD_OUT_SHARE == 0


def is_english(text: str) -> bool:
    """Whether `text` reads like prose: mostly letters and spaces, several words, no wall of symbols."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(_WORD.findall(text)) >= 5 and letters >= 0.72 * len(text) and text.isascii()


def documents() -> list[Document]:
    """Return the library's texts, in a fixed order, without duplicates (about 4 MB with Python 3.11)."""
    found: list[Document] = []
    seen: set[str] = set()
    for document in [*_topics(), *_python_files(), *_compiled_modules()]:
        if document.text not in seen and is_english(document.text):
            seen.add(document.text)
            found.append(document)
    return found


def split(all_documents: list[Document]) -> tuple[list[Document], list[str]]:
    """Divide into documents to train on and held-out texts; no held-out paragraph occurs in the former."""
    train = [document for document in all_documents if not is_held_out(document.source)]
    known = {part for document in train for part in _paragraphs(document.text)}
    held = [document for document in all_documents if is_held_out(document.source)]
    texts = ["\n\n".join(p for p in _paragraphs(document.text) if p not in known) for document in held]
    return train, [text for text in texts if len(text) >= 80]


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def _topics() -> Iterator[Document]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(f"topic {name}", name, inspect.cleandoc(text))


def code() -> list[str]:
    """Return the source code of the library's modules (without its tests) whose texts are not held out."""
    return [
        text
        for source, text in _library_files()
        if not source.startswith("test/") and "/test" not in source and not is_held_out(source) and text.isascii()
    ]


def _library_files() -> Iterator[tuple[str, str]]:
    """Relative path and text of the library's Python files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if _SKIPPED_FOLDERS & {part.split("-")[0] if part.startswith("config") else part for part in parts}:
            continue
        try:
            yield "/".join(parts), path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # some test files are broken on purpose


def _bundled_files() -> Iterator[tuple[str, str]]:
    """Relative path and text of the Python files in the wheels that `ensurepip` carries."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "ensurepip" / "_bundled"
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".py")):
                yield name, archive.read(name).decode("utf-8", "replace")


def _python_files() -> Iterator[Document]:
    for source, text in itertools.chain(_library_files(), _bundled_files()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # test files hold invalid escapes on purpose
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue  # some test files are broken on purpose
        module = source.replace("/", ".")[:-3].removesuffix(".__init__")
        yield from _docstrings(tree, source, module)
        for block in _COMMENT.findall(text):
            lines = [line.strip().lstrip("#") for line in block.splitlines()]
            yield Document(source, "", inspect.cleandoc("\n".join(lines)).strip("-=* \n"))


def _docstrings(node: ast.AST, source: str, name: str) -> Iterator[Document]:
    text = ast.get_docstring(node)
    if text:
        yield Document(source, name, text)
    for child in ast.walk(node) if isinstance(node, ast.If | ast.Try) else ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, source, f"{name}.{child.name}")


def _compiled_modules() -> Iterator[Document]:
    """Docstrings of what is written in C: the built-in types and the modules compiled into the interpreter."""
    modules = [builtins, *(importlib.import_module(name) for name in sorted(sys.builtin_module_names))]
    for module in modules:
        for name, value in sorted(vars(module).items()):
            yield from _described(value, module.__name__, f"{module.__name__}.{name}")
            if inspect.isclass(value):
                for method, function in sorted(vars(value).items()):
                    yield from _described(function, module.__name__, f"{module.__name__}.{name}.{method}")


def _described(value: object, source: str, name: str) -> Iterator[Document]:
    text = getattr(value, "__doc__", None)
    if isinstance(text, str) and (inspect.isclass(value) or inspect.isroutine(value)):
        yield Document(f"compiled {source}", name.removeprefix("builtins."), inspect.cleandoc(text))
