"""The sources of text, and what they say of text that they cannot read."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from autoprune_plugins.text_sources import BuiltinText, FileText, HubText
from autoprune_plugins.text_sources import register_text_sources as register

from autoprune.errors import TextError


def test_names() -> None:
    assert [source.name for source in register()] == ["builtin", "file", "hub"]


def test_builtin_is_english_about_python() -> None:
    documents = BuiltinText().documents("")
    assert documents == BuiltinText().documents("")
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000
    assert any(
        "assert" in document and "statement" in document for document in documents
    )


def test_builtin_takes_no_argument() -> None:
    with pytest.raises(TextError, match="no argument, found 'x.txt'.*'file:x.txt'"):
        BuiltinText().documents("x.txt")


def test_builtin_of_a_stripped_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TextError, match=r"lacks the module pydoc_data\.topics"):
        BuiltinText().documents("")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two text files, one of them below; two lines of JSON; something else."""
    (tmp_path / "b.txt").write_text("\ufeffEnglish – with a mark", encoding="utf-8")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c.txt").write_text("below")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one\\u2028"}\n\n{"text": "two", "n": 2}\n'
    )
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    return tmp_path


@pytest.mark.parametrize(
    ("argument", "documents"),
    [
        ("b.txt", ["English – with a mark"]),
        ("a.jsonl", ["one\u2028", "two"]),
        ("", ["one\u2028", "two", "English – with a mark", "below"]),
        ("*.txt", ["English – with a mark"]),
        ("**/*.txt", ["English – with a mark", "below"]),
    ],
    ids=["text", "lines of JSON", "folder", "pattern", "deep pattern"],
)
def test_file(folder: Path, argument: str, documents: list[str]) -> None:
    assert FileText().documents(str(folder / argument)) == documents


def test_file_of_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert FileText().documents("~/below/c.txt") == ["below"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nowhere.txt", r"'file:.*nowhere\.txt': no such file"),
        ("*.md", r"'file:.*\*\.md': no such file"),
        ("empty", "empty': folder has no .txt or .jsonl file"),
        ("image.png", r"image\.png is not UTF-8 text: byte 0 is 0x89"),
    ],
    ids=["file", "pattern", "folder", "other"],
)
def test_file_that_cannot_be_read(folder: Path, argument: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(TextError, match=message):
        FileText().documents(str(folder / argument))


def test_file_without_a_path() -> None:
    with pytest.raises(TextError, match="'file:PATH'"):
        FileText().documents("")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "line 2: not JSON"),
        (
            '{"content": "x"}',
            "line 2: expected .* field 'text' .*, found fields content",
        ),
        ('{"text": 3}', "line 2: expected .* field 'text' .*, found fields text"),
        ('"x"', "line 2: expected an object .*, found 'x'"),
    ],
    ids=["broken", "another field", "a number", "no object"],
)
def test_bad_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(TextError, match=rf"bad\.jsonl, {message}"):
        FileText().documents(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("argument", ["", "wikitext", "/name:train"])
def test_hub_names(argument: str) -> None:
    with pytest.raises(TextError, match=f"'hub:{argument}'. Write hub:OWNER/NAME"):
        HubText().documents(argument)


def test_hub_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        TextError, match="'hub:owner/name' needs .*pip install datasets"
    ):
        HubText().documents("owner/name")


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="datasets is an extra of users"
)
def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a folder of that name for the data set."""
    rows = [{"line": f"line {number} " + "word " * 100} for number in range(10)]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(
        "\n".join(map(json.dumps, rows))
    )
    monkeypatch.chdir(tmp_path)
    documents = HubText().documents("owner/name:train:line")
    assert "\n\n".join(documents) == "\n\n".join(row["line"] for row in rows)
    assert len(documents) == 3  # of 2,000 characters, but for the last
    with pytest.raises(TextError, match="row 1: expected .* field 'text'"):
        HubText().documents("owner/name")
    with pytest.raises(TextError, match="cannot read 'hub:owner/other'"):
        HubText().documents("owner/other")
