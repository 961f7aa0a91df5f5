"""A method from a separate pip package works like a built-in one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from tiny_runs import space_of, write_text

pytestmark = [pytest.mark.slow, pytest.mark.ci]

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "autoprune-stripes"
version = "0.3"

[project.entry-points.autoprune]
stripes = "autoprune_stripes"

[tool.setuptools]
py-modules = ["autoprune_stripes"]
"""

MODULE = '''
"""Keeps every n-th column: a method that needs nothing but autoprune's public names."""

import torch

from autoprune import CompressionMethod, MethodError, Parameter, hookimpl


class Stripes(CompressionMethod):
    name = "stripes"
    reference = "none"
    parameters = (Parameter("every", int, 2, "Columns between two kept.", 2, 16),)

    def refuses(self, layer, previous, settings):
        columns, every = layer.shape[1], settings["every"]
        if columns % every:
            return f"every={every} does not divide its {columns} inputs"
        return None

    def storage(self, layer, previous, settings):
        return previous.masked(layer.numel // settings["every"], "bitmap")

    def compress(self, sources, statistics, settings):
        for source in sources:
            if not source.variant.weight.isfinite().all():
                raise MethodError(f"{source.layer.name} holds NaN or infinite weights")
        return [[self._stripe(s.variant, one["every"]) for one in settings]
                for s in sources]

    def _stripe(self, variant, every):
        kept = torch.zeros_like(variant.weight, dtype=torch.bool)
        kept[:, ::every] = True
        return variant.pruned(variant.weight, kept)


@hookimpl
def register_methods():
    return [Stripes()]
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package into a folder of its own, offline."""
    source = tmp_path_factory.mktemp("stripes")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "autoprune_stripes.py").write_text(MODULE)
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return target


def run_with(site: Path, code: str, *arguments: str) -> str:
    """Run code in a fresh Python that sees the package; give what it prints."""
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_not_there_without_the_package(tmp_path: Path) -> None:
    code = "import autoprune; print('stripes' in autoprune.load_plugins().methods)"
    assert run_with(tmp_path, code) == "False\n"


def test_it_stands_among_the_plugins(site: Path) -> None:
    code = """
    import autoprune
    for record in autoprune.load_plugins().records:
        if record.name == "stripes":
            print(record)
    """
    told = run_with(site, code)
    assert "distribution='autoprune-stripes 0.3'" in told
    assert "objects=('methods:stripes',), error=None" in told


def test_it_is_named_refused_priced_and_made(site: Path, tiny_checkpoint: Path) -> None:
    code = """
    import sys
    from pathlib import Path
    import torch
    import autoprune
    from autoprune.compression.actions import Actions
    from autoprune.compression.apply import StitchedModel
    from autoprune.compression.bank import VariantBank
    from autoprune.compression.store import VariantStore
    from autoprune.models.checkpoints import load_model, resolve
    from autoprune.models.layers import inventory
    from autoprune.models.text import TokenWindows

    folder, cache = map(Path, sys.argv[1:])
    plugins = autoprune.load_plugins()
    actions = Actions(plugins.methods)
    checkpoint = resolve(str(folder), cache=cache)
    model = load_model(checkpoint)
    found = inventory(model, list(plugins.objects["architectures"].values()))
    stitched = StitchedModel(model, found.layers)
    ids = torch.arange(96).view(3, 32)
    tokens = TokenWindows(ids, "statistics", "test", "0" * 16)
    store = VariantStore(cache / "variants", 10**9)
    bank = VariantBank(stitched, found, actions, store, tokens, checkpoint.revision)
    layer = found.layer("model.layers.0.mlp.down_proj")

    parse = autoprune.Action.parse
    action = actions.canonical(parse("stripes(every=4) + rtn(bits=4, group=16)"))
    storage, variant = actions.storage(layer, action), bank.get(layer, action)
    assert variant.storage == storage
    parts = variant.pack().values()
    assert sum(part.nbytes for part in parts) == storage.nbytes
    bank.put({layer: action})
    weight = model.model.layers[0].mlp.down_proj.weight
    print(action, "|", storage.kept, weight.count_nonzero(0).gt(0).sum().item())
    print(actions.refuses(layer, parse("stripes(every=3)")))
    for text in ("stripes(evry=2)", "stripes(every=99)", "strips"):
        try:
            actions.canonical(parse(text))
        except autoprune.AutoPruneError as error:
            print(error)
    """
    told = run_with(site, code, str(tiny_checkpoint), str(site / "cache")).splitlines()
    # Of 64 x 128 weights a quarter is kept: 32 of 128 columns.
    assert told[0] == "stripes(every=4) + rtn(bits=4, group=16) | 2048 32"
    assert told[1] == "every=3 does not divide its 128 inputs"
    assert told[2].startswith(
        "unknown parameter of stripes 'evry'. Did you mean 'every'"
    )
    assert "stripes(every=...) lies from 2 to 16, found 99" in told[3]
    assert told[4].startswith("unknown method 'strips'. Did you mean 'stripes'?")


def test_a_search_names_it_and_runs_with_it(
    site: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """In a fresh Python, from a YAML file to an export that a third Python loads."""
    space = {
        "space": [{"actions": ["stripes(every=[2, 4])", "rtn(bits=4, group=16)"]}],
        "objective": {"budgets": {"size_bytes": "70%"}},
        "search": {"trials": 5, "finalists": 2},
    }
    path = tmp_path / "space.yaml"
    path.write_text(
        yaml.safe_dump(space_of(tiny_checkpoint, write_text(tmp_path), **space))
    )
    code = """
    import json, sys
    from pathlib import Path
    import autoprune

    path = Path(sys.argv[1])
    result = autoprune.search(path, path.parent / "run")
    (report,) = autoprune.export(path.parent / "run", trial=0)
    print(json.dumps({
        "states": result.trials["state"].tolist(),
        "actions": result.trials.filter(like="site.").stack().unique().tolist(),
        "exported": [str(a) for a in report.policy.values()],
        "predicted": result.trials["size_bytes"][0],
        "size": report.size_bytes,
    }))
    wrong = path.read_text().replace("stripes", "stirpes")
    path.with_name("wrong.yaml").write_text(wrong)
    try:
        autoprune.search(path.with_name("wrong.yaml"), path.parent / "wrong")
    except autoprune.ConfigError as error:
        print(error)
    """
    told, error = run_with(site, code, str(path)).splitlines()
    found = json.loads(told)
    assert found["states"] == ["complete"] * 5
    assert {"stripes", "stripes(every=4)"} & set(found["actions"])
    assert "stripes" in found["exported"]
    assert found["size"] == found["predicted"]
    assert "unknown method 'stirpes'. Did you mean 'stripes'?" in error


def test_its_method_keeps_the_contract(site: Path, tmp_path: Path) -> None:
    """The contract tests that AutoPrune ships, run on the installed package."""
    (tmp_path / "test_stripes.py").write_text(
        dedent("""
        import pytest
        from autoprune.testing import MethodContract
        from autoprune_stripes import Stripes

        class TestStripes(MethodContract):
            @pytest.fixture
            def method(self):
                return Stripes()

            @pytest.fixture(params=[{}, {"every": 4}], ids=str)
            def params(self, request):
                return request.param
        """)
    )
    code = """
    import pytest, sys
    given = ["-q", "-p", "no:cacheprovider", "--rootdir", sys.argv[1], sys.argv[1]]
    sys.exit(pytest.main(given))
    """
    told = run_with(site, code, str(tmp_path))
    assert " passed" in told
    assert "failed" not in told
