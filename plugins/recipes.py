"""The target ``recipes``: a policy in the words of other tools, without any weights.

llm-compressor, GPTQModel and ModelOpt apply it by themselves, to the dense model and
with their own calibration.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from autoprune.compression.storage import Part, Storage
from autoprune.errors import ExportError
from autoprune.exporting.exporter import Digests, Exporter, ExportJob
from autoprune.exporting.marker import write_marker
from autoprune.hookspecs import hookimpl
from autoprune.models.checkpoints import load_model
from autoprune.models.layers import Inventory
from autoprune.policy import Action, Layer
from autoprune.targets.recipe_llmcompressor import LLMCompressor
from autoprune.targets.recipe_tools import GPTQModel, ModelOpt
from autoprune.targets.recipes import (
    Modules,
    RecipeTool,
    asked_for,
    compare,
    told_left_out,
)

TOOLS: tuple[RecipeTool, ...] = (LLMCompressor(), GPTQModel(), ModelOpt())


class Recipes(Exporter):
    """A file for each tool; what a tool cannot say is told, and left as it is.

    ``autoprune.json`` lists the layers that each file leaves out, with reasons, and the
    algorithms that stand in for others.

    Args:
        modules: What tools meet in a model, once one is known.
    """

    name = "recipes"
    stores = "no weights: the policy for llm-compressor, GPTQModel and ModelOpt"
    loads_in = "llm-compressor, GPTQModel and ModelOpt, which compress by themselves"
    weights = False

    def __init__(self, modules: Modules | None = None) -> None:
        self._modules = modules

    def for_model(self, model: Any, inventory: Inventory) -> "Recipes":
        """Find out which layers are modules of their own."""
        return Recipes(Modules.of(model, inventory))

    def refuses(self, layer: Layer, storage: Storage) -> str | None:
        """Refuse nothing: what cannot be told is left out, and ``notes`` says so."""
        return None

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name no tensors."""
        return {}

    def metadata(self) -> dict[str, str]:
        """Give none."""
        return {}

    def size_bytes(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> int:
        """Give zero: there are no weights."""
        return 0

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell what each file leaves out, as far as formats say."""
        modules = self._modules
        return list(_notes(storages, {}, modules, stand_ins=False)) if modules else []

    def usage(self, folder: str, auto_class: str) -> str:
        """Give the lines with which the tools read their files."""
        return (
            "from llmcompressor import oneshot\n"
            f'oneshot(model=..., dataset=..., recipe="{folder}/recipe.yaml")\n\n'
            "from gptqmodel import QuantizeConfig\n"
            f'QuantizeConfig(**json.load(open("{folder}/gptqmodel_dynamic.json")))\n\n'
            "import modelopt.torch.quantization as mtq\n"
            f'config = yaml.safe_load(open("{folder}/modelopt_config.yaml"))\n'
            'mtq.quantize(model, config["quantize"], forward_loop)'
        )

    def write(self, folder: Path, job: ExportJob) -> Digests:
        """Write a file for each tool, and read them again.

        Raises:
            ExportError: If a file does not say what the policy asks for.
        """
        modules = _modules(job)
        asked, never = asked_for(job.storages, job.actions, modules)
        left = {}
        for tool in TOOLS:
            planned, own = tool.plan(asked, modules)
            text = tool.text(planned, modules)
            (folder / tool.file).write_text(text, encoding="utf-8")
            left[tool.file] = {**never, **own}
        notes = list(_notes(job.storages, job.actions, modules, stand_ins=True))
        write_marker(folder, target=self.name, left_out=left, notes=notes)
        self.check(folder, job)
        return {}

    def check(self, folder: Path, job: ExportJob) -> None:
        """Hold that every file says what the policy asks for, layer by layer.

        Raises:
            ExportError: If one does not, or cannot be read.
        """
        modules = _modules(job)
        asked, _ = asked_for(job.storages, job.actions, modules)
        for tool in TOOLS:
            compare(tool, folder, tool.plan(asked, modules)[0])

    def load(self, folder: Path) -> NoReturn:
        """Refuse: there is nothing to load.

        Raises:
            ExportError: Always.
        """
        raise ExportError(
            f"the recipes in {folder} hold no weights: let one of the tools apply "
            "them, or export the policy to another target"
        )


def _notes(
    storages: Mapping[Layer, Storage],
    actions: Mapping[Layer, Action],
    modules: Modules,
    *,
    stand_ins: bool,
) -> Iterator[str]:
    asked, never = asked_for(storages, actions, modules)
    yield from told_left_out("every file", never)
    for tool in TOOLS:
        planned, left = tool.plan(asked, modules)
        yield from told_left_out(tool.file, left)
        if stand_ins:
            yield from tool.stand_ins(asked, planned)


def _modules(job: ExportJob) -> Modules:
    return Modules.of(load_model(job.checkpoint, job.auto_class), job.inventory)


@hookimpl
def register_exporters() -> list[Exporter]:
    """Register it."""
    return [Recipes()]
