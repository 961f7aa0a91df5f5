"""Windows of tokens from named sources, in four splits that share no document.

The protocol is the field's: the documents of a split are joined with blank lines,
tokenized once, and cut into windows without overlap; the tail is dropped. Windows after
the first begin without a fresh BOS token.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from autoprune.errors import TextError, unknown_name
from autoprune.models.splits import SPLITS as SPLITS  # part of this module's face
from autoprune.models.splits import cut, deal, generator_for

log = logging.getLogger(__name__)

JOINT = "\n\n"
"""What stands between two documents."""

MOST_CHARACTERS = 16_000_000
"""Characters that are read of a long text: about 8,000 windows of 512 tokens."""


class TextSource(ABC):
    """Where text comes from. An object has no state.

    Attributes:
        name: Unique, lower case: what stands before the colon in ``file:PATH``.
    """

    name: ClassVar[str]

    @abstractmethod
    def documents(self, argument: str) -> list[str]:
        """Read the documents, always in the same order.

        Args:
            argument: What stands behind the colon; empty without one.

        Raises:
            TextError: If there is no such text, or it cannot be read.
        """


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of tokens, in the order of the text.

    Attributes:
        ids: Token numbers.
        split: One of ``SPLITS``.
        source: The text, as it was named.
        fingerprint: 16 hexadecimal digits of ``ids`` and their shape.
    """

    ids: Int[Tensor, "windows length"]
    split: str
    source: str
    fingerprint: str

    @classmethod
    def of(
        cls, ids: Int[Tensor, "windows length"], split: str, source: str
    ) -> "TokenWindows":
        """Name windows by what is in them."""
        ids = ids.contiguous()
        content = hashlib.sha256(f"{tuple(ids.shape)}".encode())
        content.update(ids.numpy().tobytes())
        return cls(ids, split, source, content.hexdigest()[:16])


def load_splits(
    text: str,
    sources: Mapping[str, TextSource],
    tokenizer: Any,
    *,
    length: int,
    windows: Mapping[str, int],
    seed: int,
) -> dict[str, TokenWindows]:
    """Read a text and deal it to the splits, so that none sees another's documents.

    Documents are dealt at random to match the shares 60, 25, 10 and 5 %. Where a share
    holds less than the windows wanted, it grows at the cost of splits with more than
    they need; where the whole text holds less than all windows wanted, every split
    gets fewer, in proportion, and a warning says so. Documents stay whole, unless a
    split would go short for it: as of a single book. Then the long ones are cut at
    blank lines, as coarsely as will do, into pieces that count as documents.

    Of more windows than wanted, some are chosen at random and kept in order. Of a text
    over 16 million characters, or twice what is wanted, documents chosen at random are
    read.

    Args:
        text: ``name`` or ``name:argument`` of a source.
        sources: Sources by name.
        tokenizer: A tokenizer of transformers.
        length: Tokens of a window, at least 2.
        windows: How many windows each split wants; one without an entry, or with 0, is
            left out, but still keeps its share of the documents.
        seed: Of the dealing and of the choice; the same seed gives the same windows.

    Raises:
        TextError: If the source or a split is unknown, the text is empty, or a split
            gets not one window.
    """
    wanted = _wanted(windows, length)
    documents = _documents(text, sources, limit=10 * length * sum(wanted.values()))
    dealt = deal(documents, tokenizer, length=length, wanted=wanted, seed=seed)
    tokens = {
        split: _tokenize(JOINT.join(part), tokenizer) for split, part in dealt.items()
    }
    _check_enough(text, tokens, length=length, wanted=wanted)
    return {
        split: _windows(tokens[split], split, text, length=length, want=want, seed=seed)
        for split, want in wanted.items()
        if want
    }


def _wanted(windows: Mapping[str, int], length: int) -> dict[str, int]:
    for split, count in windows.items():
        if split not in SPLITS:
            raise TextError(unknown_name("split", split, SPLITS))
        if count < 0:
            raise TextError(
                f"split {split!r} cannot have {count} windows; ask for 0 up"
            )
    if length < 2:
        raise TextError(f"a window has at least 2 tokens, found length {length}")
    return {split: windows.get(split, 0) for split in SPLITS}


def read_documents(text: str, sources: Mapping[str, TextSource]) -> list[str]:
    """Read all documents of a text that are not empty.

    Args:
        text: ``name`` or ``name:argument`` of a source.
        sources: Sources by name.

    Raises:
        TextError: If the source is unknown, or there is no document.
    """
    name, _, argument = text.partition(":")
    if name not in sources:
        raise TextError(unknown_name("text source", name, sources))
    documents = [d for d in sources[name].documents(argument) if d.strip()]
    if not documents:
        raise TextError(
            f"the text {text!r} is empty: there is no document with a letter in it. "
            "Name another text, such as 'builtin'."
        )
    return documents


def _documents(
    text: str, sources: Mapping[str, TextSource], *, limit: int
) -> list[str]:
    documents = read_documents(text, sources)
    limit = max(limit, MOST_CHARACTERS)
    if sum(map(len, documents)) <= limit:
        return documents
    pieces = [piece for d in documents for piece in cut(d, limit // 100)]
    kept, read = [], 0
    for index in torch.randperm(
        len(pieces), generator=generator_for("read", 0)
    ).tolist():
        read += len(pieces[index])
        if read > limit:
            break
        kept.append(index)
    log.info("%s: read %d of %d documents", text, len(kept), len(pieces))
    return [pieces[index] for index in sorted(kept)]


def _tokenize(text: str, tokenizer: Any) -> Int[Tensor, " tokens"]:
    if not text:
        return torch.empty(0, dtype=torch.int64)
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _check_enough(
    text: str,
    tokens: Mapping[str, Int[Tensor, " _"]],
    *,
    length: int,
    wanted: Mapping[str, int],
) -> None:
    counts = {split: len(tokens[split]) // length for split in SPLITS}
    found = ", ".join(f"{split} {len(tokens[split])}" for split in SPLITS)
    empty = [split for split, want in wanted.items() if want and not counts[split]]
    if empty:
        raise TextError(
            f"the text {text!r} is too short: split {empty[0]!r} has not one window of "
            f"{length} tokens. Tokens by split: {found}; needed: "
            f"{length} in each. Take a shorter window or more text."
        )
    short = [split for split, want in wanted.items() if counts[split] < want]
    if short:
        log.warning(
            "%s is short: %s of %d tokens each. Tokens by split: %s",
            text,
            ", ".join(f"{s} has {counts[s]} of {wanted[s]} windows" for s in short),
            length,
            found,
        )


def _windows(
    tokens: Int[Tensor, " tokens"],
    split: str,
    source: str,
    *,
    length: int,
    want: int,
    seed: int,
) -> TokenWindows:
    count = len(tokens) // length
    ids = tokens[: count * length].view(count, length)
    if count > want:
        chosen = torch.randperm(count, generator=generator_for(split, seed))[:want]
        ids = ids[chosen.sort().values]
    return TokenWindows.of(ids.clone(), split, source)
