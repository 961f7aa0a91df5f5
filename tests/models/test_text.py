"""Windows follow the protocol, and bad requests are told apart."""

import logging
from collections.abc import Mapping

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoprune.errors import TextError
from autoprune.models import text as text_module
from autoprune.models.splits import SPLITS
from autoprune.models.text import TextSource, TokenWindows, load_splits

WINDOWS = {"statistics": 8, "fitness": 4, "choice": 2, "report": 2}


class Letters(TextSource):
    """Documents of one letter each, ``letters:COUNTxSIZE``."""

    name = "letters"

    def documents(self, argument: str) -> list[str]:
        count, size = map(int, argument.split("x"))
        return [chr(0x100 + number) * size for number in range(count)]


class Blank(TextSource):
    name = "blank"

    def documents(self, argument: str) -> list[str]:
        return ["", " \n\t"]


SOURCES = {"letters": Letters(), "blank": Blank()}


def load(
    tokenizer: PreTrainedTokenizerFast,
    text: str = "letters:200x40",
    *,
    length: int = 50,
    windows: Mapping[str, int] = WINDOWS,
    seed: int = 0,
) -> dict[str, TokenWindows]:
    return load_splits(
        text, SOURCES, tokenizer, length=length, windows=windows, seed=seed
    )


def test_windows_as_wanted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    splits = load(tiny_tokenizer)
    assert tuple(splits) == SPLITS
    for split, tokens in splits.items():
        assert tokens.ids.shape == (WINDOWS[split], 50)
        assert tokens.ids.dtype == torch.int64
        assert (tokens.split, tokens.source) == (split, "letters:200x40")


def test_no_document_in_two_splits(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    splits = load(tiny_tokenizer, windows=dict.fromkeys(SPLITS, 60))
    letters = [
        set(tiny_tokenizer.decode(tokens.ids.flatten())) - {"\n", "\ufffd"}
        for tokens in splits.values()
    ]
    assert all(letters)
    assert sum(map(len, letters)) == len(set.union(*letters))


def test_protocol(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """One window after the other of the joined text, the tail dropped."""
    splits = load(tiny_tokenizer, "letters:60x40", windows={"statistics": 10**6})
    tokens = splits["statistics"].ids
    documents = Letters().documents("60x40")
    whole = "\n\n".join(documents)
    ids = torch.tensor(tiny_tokenizer(whole, verbose=False)["input_ids"])
    count = len(ids) // 50
    assert torch.equal(tokens, ids[: count * 50].view(count, 50))


def test_tokenized_once_with_one_bos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    class Beginning:
        """Sets a BOS before every text, as Llama's tokenizers do."""

        def __call__(
            self,
            texts: str | list[str],
            *,
            add_special_tokens: bool = True,
            **_: object,
        ) -> dict[str, list[int] | list[list[int]]]:
            if isinstance(texts, list):
                assert not add_special_tokens
                return {"input_ids": [[1] * len(text) for text in texts]}
            return {"input_ids": [0] + [1] * len(texts)}

    splits = load_splits(
        "letters:200x40",
        SOURCES,
        Beginning(),
        length=50,
        windows=dict.fromkeys(SPLITS, 10**6),
        seed=0,
    )
    for tokens in splits.values():
        assert (tokens.ids == 0).nonzero().tolist() == [[0, 0]]


def test_chosen_windows_keep_their_order(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    wanted = {"statistics": 60, "fitness": 1, "choice": 1, "report": 1}
    everything = load(tiny_tokenizer, windows=wanted | {"statistics": 90})["statistics"]
    some = load(tiny_tokenizer, windows=wanted)["statistics"]
    rows = {tuple(row): index for index, row in enumerate(everything.ids.tolist())}
    indices = [rows[tuple(row)] for row in some.ids.tolist() if tuple(row) in rows]
    assert len(some.ids) == 60
    assert len(set(indices)) > 30
    assert indices == sorted(indices)


def test_fingerprint_is_of_seed_and_content(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    first, same, other = (load(tiny_tokenizer, seed=seed) for seed in (1, 1, 2))
    backwards = load(tiny_tokenizer, windows=dict(reversed(WINDOWS.items())), seed=1)
    for split in SPLITS:
        assert len(first[split].fingerprint) == 16
        assert first[split].fingerprint == same[split].fingerprint
        assert first[split].fingerprint == backwards[split].fingerprint
        assert first[split].fingerprint != other[split].fingerprint


def test_split_that_is_not_wanted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    everything = load(tiny_tokenizer)
    some = load(tiny_tokenizer, windows={"fitness": 4, "report": 0})
    assert list(some) == ["fitness"]
    assert some["fitness"].fingerprint == everything["fitness"].fingerprint


def test_short_text_is_told(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    splits = load(tiny_tokenizer, windows=dict.fromkeys(SPLITS, 1000))
    assert 70 <= len(splits["report"].ids) <= 90  # a quarter of 16,400 tokens
    assert "letters:200x40 is short: statistics has" in caplog.text


def test_long_text_is_read_in_part(
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(text_module, "MOST_CHARACTERS", 4_000)
    splits = load(tiny_tokenizer, windows={"report": 1})
    assert len(splits["report"].ids) == 1
    assert "read 100 of 200 documents" in caplog.text


def test_unknown_source(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="source 'leters'.*Did you mean 'letters'"):
        load(tiny_tokenizer, "leters:3x4")


def test_unknown_split(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="split 'fitnes'.*Did you mean 'fitness'"):
        load(tiny_tokenizer, windows={"fitnes": 1})


def test_negative_windows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="'fitness' cannot have -1 windows"):
        load(tiny_tokenizer, windows={"fitness": -1})


def test_window_too_short(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="at least 2 tokens, found length 1"):
        load(tiny_tokenizer, length=1)


def test_empty_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="text 'blank' is empty"):
        load(tiny_tokenizer, "blank")


def test_text_too_short(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        TextError,
        match=r"'letters:3x20' is too short.*window of 50 .*statistics \d+.*"
        r"report \d+; needed: 50 in each.*shorter window or more text",
    ):
        load(tiny_tokenizer, "letters:3x20")
