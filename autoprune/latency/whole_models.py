"""Whole models that recordings time: which ones, and what a point tells of its model.

``model_running`` builds and times them; nothing here needs torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from autoprune.latency.profiles import FIT, VALIDATION, Point
from autoprune.latency.shape import DENSE, SPARSE, Block, ModelShape, llama_shape

ATTENTION, MLP = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    (
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
)
"""The layers of a block, by role."""

UNSTRUCTURED, TWO_OF_FOUR = "unstructured", "2:4"
"""Zeros that a dense kernel multiplies like any number."""


@dataclass(frozen=True, slots=True)
class Variation:
    """A model of Llama's kind, dense or compressed.

    Attributes:
        name: Tells it from the others of its model.
        hidden: Width of the hidden state.
        width: Channels of the MLP.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        vocabulary: Rows of the head.
        blocks: How many.
        attention: Format of the attention's matrices.
        mlp: Format of the MLP's.
        dtype: Type of activations and of what is not compressed.
        zeros: Pattern of zeros in the weights of dense kernels; empty for none.
    """

    name: str
    hidden: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    blocks: int
    attention: str = DENSE
    mlp: str = DENSE
    dtype: str = "bfloat16"
    zeros: str = ""

    @property
    def plain(self) -> bool:
        """True if no kernel but the dense one multiplies."""
        return self.attention == self.mlp == DENSE

    def shape(self) -> ModelShape:
        """Give what its time depends on.

        Zeros in a 2:4 pattern are told as such, though a dense kernel multiplied them:
        a prediction has to see that they gain nothing where no kernel skips them.
        """
        dense = llama_shape(
            hidden=self.hidden,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            vocabulary=self.vocabulary,
            blocks=self.blocks,
            head_dim=self.head_dim,
        )
        patterned = SPARSE if self.zeros == TWO_OF_FOUR else DENSE
        formats = dict.fromkeys(ATTENTION, self.attention)
        formats |= dict.fromkeys(MLP, self.mlp)
        formats = {
            role: patterned if form == DENSE else form for role, form in formats.items()
        }
        blocks = tuple(_in_formats(block, formats) for block in dense.blocks)
        return replace(dense, blocks=blocks)


def _in_formats(block: Block, formats: Mapping[str, str]) -> Block:
    linears = tuple(
        replace(one, format=formats[one.name.rpartition(".")[2]])
        for one in block.linears
    )
    return replace(block, linears=linears)


SMOLLM2_135M = Variation("dense", 576, 1536, 9, 3, 64, 49152, 30, dtype="float32")
LLAMA_1B = Variation("dense", 2048, 8192, 32, 8, 64, 128256, 16)
LLAMA_8B = Variation("dense", 4096, 14336, 32, 8, 128, 128256, 32)

MODELS: Mapping[str, Mapping[str, Variation]] = {
    "cpu": {"smollm2-135m": SMOLLM2_135M},
    "cuda": {"llama-1b": LLAMA_1B, "llama-8b": LLAMA_8B},
}
"""What is recorded on a kind of device, by the model's name."""


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of a model.

    Attributes:
        op: ``model_prefill`` or ``model_decode``.
        batch: Sequences.
        context: Tokens attended to: of a prefill, the prompt.
    """

    op: str
    batch: int
    context: int

    @property
    def tokens(self) -> int:
        """Rows that go through."""
        return self.batch * (self.context if self.op == "model_prefill" else 1)


STEPS: Mapping[str, Sequence[Step]] = {
    "cpu": (Step("model_prefill", 1, 128), Step("model_decode", 1, 256)),
    "cuda": (
        Step("model_decode", 1, 512),
        Step("model_prefill", 1, 512),
        Step("model_decode", 8, 512),
        Step("model_prefill", 1, 2048),
        Step("model_decode", 64, 512),
    ),
}
"""The passes that are timed of every variation."""

FITTED: Mapping[str, Sequence[Step]] = {
    "cpu": (Step("model_prefill", 1, 32), Step("model_prefill", 1, 256)),
    "cuda": (Step("model_prefill", 4, 2048),),
}
"""Further passes of the dense model, to tell what a block does beside products."""


def variations(dense: Variation, kind: str) -> list[Variation]:
    """List what is recorded of a model: dense first, then what compression makes of it.

    Args:
        dense: The model as it is.
        kind: ``cuda`` or ``cpu``.
    """
    group = dense.heads // dense.kv_heads
    groups = max(1, round(dense.kv_heads / 2))
    blocks = max(1, dense.blocks - dense.blocks // 3)
    half = replace(dense, name="width-50%", width=dense.width // 2)
    fewer = replace(
        dense,
        name=f"heads-{groups * group}-of-{dense.heads}",
        heads=groups * group,
        kv_heads=groups,
    )
    shorter = replace(dense, name=f"blocks-{blocks}-of-{dense.blocks}", blocks=blocks)
    both = replace(half, name="width-50%+int8", attention="int8", mlp="int8")
    int8 = replace(dense, name="int8", attention="int8", mlp="int8")
    if kind == "cpu":
        return [
            dense,
            half,
            fewer,
            shorter,
            int8,
            both,
            replace(dense, name="bf16", dtype="bfloat16"),
            replace(dense, name="zeros-2:4", zeros=TWO_OF_FOUR),
            replace(dense, name="zeros-unstructured", zeros=UNSTRUCTURED),
        ]
    rowwise = "fp8-row"
    return [
        dense,
        replace(dense, name="2:4-mlp", mlp=SPARSE),
        half,
        replace(dense, name="fp8", attention=rowwise, mlp=rowwise),
        fewer,
        shorter,
        int8,
        replace(half, name="width-50%+fp8", attention=rowwise, mlp=rowwise),
    ]


def planned(model: str, variation: Variation, step: Step) -> Point:
    """Describe a point before it is timed.

    Args:
        model: Name of the model.
        variation: What is timed of it.
        step: Which pass. The dense model's are there to fit; all others test.
    """
    fitted = variation.plain and variation.name == "dense"
    note = {"model": model, "variation": asdict(variation)}
    return Point(
        op=step.op,
        kernel=f"{model} {variation.name}",
        us=0.0,
        m=step.tokens,
        n=variation.width,
        k=variation.hidden,
        batch=step.batch,
        context=step.context,
        heads=variation.heads,
        kv_heads=variation.kv_heads,
        head_dim=variation.head_dim,
        split=FIT if fitted else VALIDATION,
        note=json.dumps(note, sort_keys=True),
    )


def model_plan(kind: str, models: Mapping[str, Variation] | None = None) -> list[Point]:
    """List the points of whole models, in the order in which they matter."""
    chosen = MODELS[kind] if models is None else models
    found = []
    for model, dense in chosen.items():
        for variation in variations(dense, kind):
            steps = list(STEPS[kind])
            if variation == dense:
                steps += FITTED[kind]
            found += [planned(model, variation, step) for step in steps]
    return found


def variation_of(point: Point) -> Variation:
    """Tell which model a point was taken of."""
    return Variation(**json.loads(point.note)["variation"])


def shape_of(point: Point) -> ModelShape:
    """Give the shape of the model that a point was taken of."""
    return variation_of(point).shape()


def dtype_of(point: Point) -> str:
    """Give the type that the model of a point computes in."""
    return variation_of(point).dtype
