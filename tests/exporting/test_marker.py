"""Which exporter reads a folder."""

from pathlib import Path

import pytest
from autoprune_plugins.packed import Packed
from tiny_exports import tiny_case
from tiny_models import tiny

from autoprune.errors import ExportError, PluginError
from autoprune.exporting.marker import exporter_of, read_marker, write_marker
from autoprune.plugins import load_plugins


def test_the_marker_names_the_exporter(tmp_path: Path) -> None:
    case, folder = tiny_case("llama", tmp_path / "dense"), tmp_path / "export"
    folder.mkdir()
    Packed().write(folder, case.job)
    assert exporter_of(folder, load_plugins()).name == "packed"


def test_a_plain_folder_is_read_by_transformers(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    assert exporter_of(tmp_path, load_plugins()).name == "transformers"


def test_a_target_without_its_plugin_is_told(tmp_path: Path) -> None:
    write_marker(tmp_path, target="packd")
    with pytest.raises(PluginError, match="unknown exporter 'packd'.*'packed'"):
        exporter_of(tmp_path, load_plugins())


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_no_export_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match=rf"(no folder|cannot read) .*{name}"):
        exporter_of(tmp_path / name, load_plugins())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_marker(tmp_path, target="mine", layers={"a": [1]})
    marker = read_marker(tmp_path, target="mine", needs={"layers": dict})
    assert marker["layers"] == {"a": [1]}
    with pytest.raises(ExportError, match="'sha256' is None, expected str"):
        read_marker(tmp_path, needs={"sha256": str})
