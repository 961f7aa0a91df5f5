"""Tables about exports, and the README's table of targets."""

import re
from pathlib import Path

from rich.console import Console

from autoprune.exporting.verification import Verification
from autoprune.plugins import load_plugins
from autoprune.reporting.export_tables import (
    targets_markdown,
    targets_table,
    verified_table,
)

README = Path(__file__).parents[2] / "README.md"


def shown(table: object) -> str:
    console = Console(width=100, record=True, file=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def data() -> list[dict[str, str]]:
    found = load_plugins().objects["exporters"]
    keys = ("name", "stores", "loads_in")
    return [{key: getattr(found[name], key) for key in keys} for name in sorted(found)]


def test_the_readme_has_the_table_of_targets() -> None:
    between = (
        r"<!-- autoprune targets --markdown -->\n\n(.*?)\n\n<!-- end of targets -->"
    )
    match = re.search(between, README.read_text(), re.DOTALL)
    assert match
    printed = targets_markdown(data())
    assert match[1] == printed, "put what `autoprune targets --markdown` prints there"


def test_every_target_is_listed_for_people() -> None:
    text = shown(targets_table(data()))
    assert all(one["name"] in text for one in data())
    assert "llama.cpp" in text


def test_what_a_check_found_is_told() -> None:
    exact = shown(verified_table(Verification(9.5, 9.5, 10**6, 3.0, 14), title="x"))
    assert "14 to the bit" in exact and "1.00 MB" in exact
    apart = Verification(9.6, 9.5, 10**6, 3.0, 0, 0.012)
    text = shown(verified_table(apart, title="x"))
    assert "within 0.012 nats" in text and "not compared" in text
