"""Text that is always at hand, text from files, and text from the hub."""

import importlib
import json
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from autoprune.errors import TextError
from autoprune.hookspecs import hookimpl
from autoprune.models.splits import SHORTEST_CUT
from autoprune.models.text import JOINT, MOST_CHARACTERS, TextSource


class BuiltinText(TextSource):
    """The language reference that CPython ships for ``help()``: a document a topic.

    English about Python, with examples: some 110,000 tokens. It differs a little
    between versions of Python, and so do figures.
    """

    name = "builtin"

    def documents(self, argument: str) -> list[str]:
        """Give the topics, in the order of their names."""
        if argument:
            raise TextError(
                f"the text 'builtin' takes no argument, found {argument!r}. Did you "
                f"mean 'file:{argument}'?"
            )
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise TextError(
                "this Python lacks the module pydoc_data.topics, which holds the text "
                "'builtin'. Install your system's documentation of Python, or name a "
                "text of your own: 'file:PATH'."
            ) from error
        return [str(topics[name]) for name in sorted(topics)]


class FileText(TextSource):
    r"""Files: ``file:PATH``, a file, a folder, or a pattern such as ``books/*.txt``.

    A ``.jsonl`` file holds one document a line, an object with the field ``text``; any
    other is one document. A folder stands for its ``.txt`` and ``.jsonl`` files.
    """

    name = "file"

    def documents(self, argument: str) -> list[str]:
        """Read the files, in the order of their paths."""
        documents: list[str] = []
        for file in _files(argument):
            if file.suffix == ".jsonl":
                documents.extend(_lines(file))
            else:
                documents.append(_read(file))
        return documents


class HubText(TextSource):
    """Data sets of the hub: ``hub:OWNER/NAME[/CONFIG][:SPLIT[:COLUMN]]``.

    The split is ``train`` and the column ``text`` if nothing else is said. Rows are
    streamed, and no more of them than are read of a long text. Short rows are joined to
    documents of 2,000 characters, since some sets (WikiText) have a row a paragraph.
    """

    name = "hub"

    def documents(self, argument: str) -> list[str]:
        """Read rows, in the data set's order."""
        path, _, rest = argument.partition(":")
        split, _, column = rest.partition(":")
        owner, _, name = path.partition("/")
        name, _, config = name.partition("/")
        if not (owner and name):
            raise TextError(
                f"cannot read 'hub:{argument}'. Write hub:OWNER/NAME, "
                "hub:OWNER/NAME/CONFIG or hub:OWNER/NAME/CONFIG:SPLIT:COLUMN."
            )
        try:
            library = importlib.import_module("datasets")
        except ImportError as error:
            raise TextError(
                f"'hub:{argument}' needs the datasets library, which is not installed: "
                "pip install datasets"
            ) from error
        try:
            rows = library.load_dataset(
                f"{owner}/{name}",
                config or None,
                split=split or "train",
                streaming=True,
            )
            return list(_first(rows, column or "text", argument))
        except TextError:
            raise
        except Exception as error:  # the library and its readers raise anything
            raise TextError(
                f"cannot read 'hub:{argument}': {type(error).__name__}: {error}. Check "
                "the names and the network, or name a text of your own: 'file:PATH'."
            ) from error


@hookimpl
def register_text_sources() -> list[TextSource]:
    """Register all three."""
    return [BuiltinText(), FileText(), HubText()]


def _files(argument: str) -> list[Path]:
    if not argument:
        raise TextError("the text 'file' needs a path: 'file:PATH'")
    path = Path(argument).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for kind in ("txt", "jsonl") for file in path.rglob(f"*.{kind}")]
    else:
        matches = glob(str(path), recursive=True)
        found = [Path(match) for match in matches if Path(match).is_file()]
    if not found:
        what = "folder has no .txt or .jsonl file" if path.is_dir() else "no such file"
        raise TextError(
            f"cannot read 'file:{argument}': {what} (looked in {Path.cwd()}). Name a "
            "file, a folder, or a pattern such as 'books/*.txt'."
        )
    return sorted(found)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{file} is not UTF-8 text: byte {error.start} is "
            f"0x{error.object[error.start]:02x}. Convert it to UTF-8."
        ) from error
    except OSError as error:
        raise TextError(f"cannot read {file}: {error.strerror}") from error


def _lines(file: Path) -> Iterator[str]:
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TextError(f"{file}, line {number}: not JSON: {error}") from error
        yield _text(row, "text", f"{file}, line {number}")


def _first(rows: Any, column: str, argument: str) -> Iterator[str]:
    document, characters = "", 0
    for number, row in enumerate(rows, start=1):
        text = _text(row, column, f"'hub:{argument}', row {number}").strip("\n")
        document += JOINT + text if document else text
        if len(document) >= SHORTEST_CUT:
            yield document
            characters += len(document)
            document = ""
        if characters > MOST_CHARACTERS:
            return
    yield document


def _text(row: Any, field: str, where: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        found = f"fields {', '.join(row)}" if isinstance(row, dict) else repr(row)[:40]
        raise TextError(
            f"{where}: expected an object with a field {field!r} of text, found {found}"
        )
    return value
