"""llama.cpp runs what the target ``gguf`` writes; needs llama-cpp-python.

It is no dependency, as it takes half an hour to compile. Where it is installed
elsewhere, ``PYTHONPATH`` may name a folder with ``llama_cpp`` and ``diskcache`` in it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.gguf_file import GgufFile
from tiny_exports import Case
from tiny_gguf import TEXT, byte_tokenizer, gguf_case, piece_tokenizer
from torch import Tensor

from autoprune.targets.gguf_model import GgufModel
from autoprune.targets.gguf_reading import MODEL_FILE

llama_cpp = pytest.importorskip("llama_cpp")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IDS = list(range(3, 30))
EIGHT = "rtn(bits=8, symmetric=true)"
FOUR = "rtn(bits=4, group=32, symmetric=true)"
HALF = "channels(keep=0.67, score=magnitude)"
MORE = "channels(keep=0.34, score=magnitude)"
HEAD = "heads(keep=0.5, score=magnitude)"
UNEVEN = {
    "blocks.0.mlp": HALF,
    "blocks.0.attention": HEAD,
    "blocks.2.attention": "drop",
    "blocks.3.mlp": MORE,
    "blocks.4.block": "drop",
    "blocks.5.attention": "drop",
}
MIXED = {
    "embedding": EIGHT,
    "blocks.0.qkv": FOUR,
    "blocks.0.o": "rtn(bits=4, group=32)",
    "blocks.0.gate_up": "rtn(bits=3, group=64)",
    "blocks.0.down": "rtn(bits=5, group=32)",
    "blocks.1.qkv": "mxfp4()",
    "blocks.1.o": "magnitude(pattern=2:4) + rtn(bits=4, group=32)",
    "blocks.1.gate_up": "hqq(bits=4, group=32)",
    "blocks.2.down": "rtn(bits=7)",
    "blocks.3.qkv": "rtn(bits=5, group=32, symmetric=true)",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def written(
    folder: Path, kind: str, policy: dict[str, str] | None = None, **changes: Any
) -> tuple[Case, Any, Any]:
    """Export; give the case, the model as it is loaded again, and llama.cpp's."""
    settings = {"dtype": torch.float32, "num_hidden_layers": 6, **changes}
    case = gguf_case(kind, folder / "dense", policy, **settings)
    exporter = GgufFile().for_model(case.dense, case.job.inventory)
    (folder / "export").mkdir()
    exporter.write(folder / "export", case.job)
    path = str(folder / "export" / MODEL_FILE)
    plain = llama_cpp.GGML_TYPE_F32  # it keeps keys and values in float16 by default
    run = llama_cpp.Llama(
        path,
        n_ctx=64,
        n_threads=1,
        logits_all=True,
        type_k=plain,
        type_v=plain,
        verbose=False,
    )
    return case, GgufFile().load(folder / "export"), run


def gap(run: Any, model: Any) -> float:
    """Compare llama.cpp's logits with transformers' on the same weights."""
    run.eval(IDS)
    theirs: Tensor = torch.tensor(run.scores[: len(IDS)])
    with torch.inference_mode():
        ours = model.float()(torch.tensor([IDS])).logits[0]
    return float((theirs - ours).norm() / ours.norm())


@pytest.mark.parametrize(
    ("kind", "policy", "changes", "most"),
    [
        ("llama", {}, {}, 1e-3),
        ("llama", {}, {"dtype": torch.float16}, 5e-3),
        ("llama", {}, {"dtype": torch.bfloat16}, 3e-2),
        ("llama", {}, {"rope_parameters": LLAMA3}, 1e-3),
        (
            "llama",
            {},
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 500.0,
                    "factor": 2.0,
                }
            },
            1e-3,
        ),
        ("llama", {}, {"attention_bias": True, "mlp_bias": True}, 1e-3),
        ("llama", {"*": EIGHT}, {"dtype": torch.bfloat16}, 0.1),
        ("llama", MIXED, {"dtype": torch.bfloat16}, 0.1),
        ("llama", MIXED, {"dtype": torch.float16}, 0.1),
        ("llama", UNEVEN, {}, 1e-3),
        ("llama", UNEVEN, {"rope_parameters": LLAMA3}, 1e-3),
        (
            "llama",
            {"*": FOUR, "blocks.0.mlp": f"{HALF} + {EIGHT}"},
            {"dtype": torch.bfloat16},
            0.1,
        ),
        (
            "llama",
            {f"blocks.{block}.attention": HEAD for block in range(6)},
            {},
            1e-3,
        ),
        ("mistral", {}, {}, 1e-3),
        ("mistral", UNEVEN, {}, 1e-3),
        ("qwen2", {}, {}, 1e-3),
        ("qwen2", {"*": EIGHT}, {"dtype": torch.bfloat16}, 0.1),
        ("qwen3", {}, {}, 1e-3),
        ("qwen3", {f"blocks.{b}.attention": HEAD for b in range(6)}, {}, 1e-3),
    ],
)
def test_logits_are_those_of_transformers(
    kind: str,
    policy: dict[str, str],
    changes: dict[str, Any],
    most: float,
    tmp_path: Path,
) -> None:
    _, model, run = written(tmp_path, kind, policy, **changes)
    assert gap(run, model) < most


def test_biases_of_different_widths(tmp_path: Path) -> None:
    settings = {"attention_bias": True, "mlp_bias": True}
    policy = {name: text for name, text in UNEVEN.items() if "drop" not in text}
    _, model, run = written(tmp_path, "llama", policy, **settings)
    assert gap(run, model) < 1e-3


@pytest.mark.parametrize("pieces", [False, True])
def test_texts_become_the_same_tokens(pieces: bool, tmp_path: Path) -> None:
    tokenizer = piece_tokenizer(space=True) if pieces else byte_tokenizer()
    _, _, run = written(tmp_path, "llama", tokenizer=tokenizer)
    for text in (TEXT, "the cat", "12 on the 3", "[tag] x<end>", "ñ日本 🦙"):
        found = run.tokenize(text.encode(), add_bos=True, special=True)
        assert found == tokenizer(text).input_ids, text


def test_an_mlp_alone_is_rightly_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp leaves out such an attention in silence; if not, allow it."""
    monkeypatch.setattr(GgufModel, "refuses_policy", lambda *_: None)
    _, model, run = written(tmp_path, "llama", {"blocks.1.mlp": "drop"})
    assert gap(run, model) > 0.05


def test_no_attention_in_the_first_block_is_rightly_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp takes the size of heads from the first block; if not, allow it."""
    monkeypatch.setattr(GgufModel, "refuses_policy", lambda *_: None)
    with pytest.raises(ValueError, match="Failed to load model"):
        written(tmp_path, "llama", {"blocks.0.attention": "drop"})
