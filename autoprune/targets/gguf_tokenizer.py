"""A tokenizer as the key-values of GGUF that llama.cpp makes its own tokenizer from.

llama.cpp has the rules that split text before merging built in, by name. They are told
here by what ``tokenizer.json`` says, not by the model's name; one that is not known is
refused, as another rule would give other tokens in silence.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from autoprune.errors import ExportError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_SPLITTERS: dict[tuple[str, ...], str] = {
    ("digits", "words"): "smollm",
    ("words",): "gpt-2",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _SPACES, "bytes"): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _SPACES, "bytes"): "qwen2",
}
"""llama.cpp's names of splitting rules (``llama-vocab.cpp``), by the rules' steps.

``digits`` cuts off every digit, ``words`` is GPT-2's own expression, ``bytes`` splits
nothing; any other step is a regular expression.
"""

_WHOLE_FIRST = {"llama-bpe"}
"""Rules with which llama.cpp takes a piece that is a token itself without merging."""

_SPACE = "▁"
"""What SentencePiece writes for a space."""

_TYPES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: ``gpt2`` for merges of bytes, ``llama`` for SentencePiece.
        pre: llama.cpp's name of the splitting rule.
        tokens: By their ids.
        types: What kind each token is.
        merges: Pairs in the order in which they are merged; for ``gpt2``.
        scores: Larger is merged first; for ``llama``.
        special: Ids of special tokens, by the names of their keys.
        flags: Whether tokens or a space are put before or after a text.
        template: Of a chat; None if there is none.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    template: str | None = None

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the key-values to a file that is being written."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Read a tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers.
        size: Rows of the model's embedding; tokens beyond the tokenizer's are unused.

    Raises:
        ExportError: If llama.cpp could not tokenize alike, or it is not known to.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError("the tokenizer has no tokenizer.json, which is read here")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model.get("type") != "BPE" or not model.get("merges"):
        raise ExportError(
            f"the tokenizer is of type {model.get('type')!r} with "
            f"{len(model.get('merges') or ())} merges; only BPE with merges is written"
        )
    pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(data, size, pieces=pieces)
    flags = _flags(tokenizer)
    special = _special(tokenizer, size)
    template = tokenizer.chat_template
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": special,
        "template": template if isinstance(template, str) else None,
    }
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]
    ]
    if pieces:
        flags |= {"add_space_prefix": _space_prefix(data)}
        scores = _scores(tokens, merges)
        return Vocabulary("llama", "default", scores=scores, flags=flags, **common)
    flags |= {"add_space_prefix": False}
    pairs = [f"{left} {right}" for left, right in merges]
    return Vocabulary("gpt2", _splitter(data), merges=pairs, flags=flags, **common)


def _splitter(data: Mapping[str, Any]) -> str:
    """Name the rule that splits text before merging."""
    given = data.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    name = _SPLITTERS.get(tuple(map(_step, steps)))
    plain = data.get("normalizer") in (None, {"type": "NFC"})
    whole = bool(data["model"].get("ignore_merges"))
    if name is None or not plain or whole != (name in _WHOLE_FIRST):
        known = ", ".join(sorted(_SPLITTERS.values()))
        raise ExportError(
            "the tokenizer splits or normalizes text by a rule that is none of "
            f"llama.cpp's that are known here ({known}): {json.dumps(given)[:200]}"
        )
    return name


def _step(step: Mapping[str, Any]) -> str:
    """Give a step of a splitting rule in short; empty for one that is not known."""
    kind = step.get("type")
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "words" if step.get("use_regex", True) else "bytes"
    isolated = step.get("behavior") == "Isolated" and not step.get("invert")
    if kind == "Split" and isolated:
        return str(step.get("pattern", {}).get("Regex", ""))
    return ""


def _tokens(
    data: Mapping[str, Any], size: int, *, pieces: bool
) -> tuple[list[str], list[int]]:
    """List the tokens by their ids, and what kind each is."""
    found: dict[int, tuple[str, TokenType]] = {}
    for text, index in data["model"]["vocab"].items():
        byte = pieces and len(text) == 6 and text.startswith("<0x")
        kind = TokenType.BYTE if byte else TokenType.NORMAL
        unknown = pieces and text == data["model"].get("unk_token")
        found[index] = text, TokenType.UNKNOWN if unknown else kind
    for added in data.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if found.get(added["id"], ("", kind))[1] is not TokenType.UNKNOWN:
            found[added["id"]] = added["content"], kind
    if max(found) >= size:
        raise ExportError(
            f"the tokenizer has ids up to {max(found)}, the embedding {size} rows"
        )
    filled = [found.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(size)]
    return [text for text, _ in filled], [int(kind) for _, kind in filled]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Give each piece a score, so that what is merged first has the largest."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _space_prefix(data: Mapping[str, Any]) -> bool:
    """Tell whether a text gets a space before it.

    Raises:
        ExportError: If spaces are written otherwise than llama.cpp does.
    """
    first, given = data.get("normalizer") or {}, data.get("pre_tokenizer")
    steps = first.get("normalizers", [first] if first else [])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if given is None and steps in ([prepend, replace], [replace]):
        return len(steps) == 2
    if not steps and given and given.get("type") == "Metaspace":
        scheme = given.get("prepend_scheme")
        plain = given.get("replacement") == _SPACE and not given.get("split")
        if plain and scheme in ("first", "always", "never"):
            return bool(scheme != "never")
    raise ExportError(
        "the tokenizer writes spaces otherwise than SentencePiece in llama.cpp: "
        f"{json.dumps([first, given])[:200]}"
    )


def _flags(tokenizer: Any) -> dict[str, bool]:
    """Tell which special tokens are put around a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for bos in (False, True):
        for eos in (False, True):
            before = [tokenizer.bos_token_id] if bos else []
            after = [tokenizer.eos_token_id] if eos else []
            if full == [*before, *plain, *after]:
                return {"add_bos_token": bos, "add_eos_token": eos}
    raise ExportError(
        f"the tokenizer puts other tokens around a text than one to begin and one to "
        f"end it: {plain} becomes {full}"
    )


def _special(tokenizer: Any, size: int) -> dict[str, int]:
    """Give the ids of special tokens, by the names that GGUF has for them."""
    found = {}
    for name, key in _TYPES.items():
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None and index < size:
            found[key] = int(index)
    if "eos" not in found:
        raise ExportError(
            "the tokenizer has no token that ends a text; llama.cpp would take number "
            "11 for it. Set eos_token in tokenizer_config.json"
        )
    return found
