"""Documents are dealt so that no split sees another's, and each gets its part."""

import pytest
from transformers import PreTrainedTokenizerFast

from autoprune.models.splits import SHARES, SPLITS, cut, deal, deal_alike

LENGTH = 100


def text(number: int, characters: int) -> str:
    """Make a document of that many bytes, that is tokens, in lines of its own."""
    lines = [f"document {number} line {line}" for line in range(characters // 10)]
    return "\n\n".join(lines)[:characters].rstrip()


@pytest.fixture
def documents() -> list[str]:
    """Two hundred documents of 100 to 1,000 tokens: 110,000 in all."""
    return [text(number, 100 + 900 * (number % 10) // 9) for number in range(200)]


def sizes(dealt: dict[str, list[str]]) -> dict[str, int]:
    return {split: sum(map(len, part)) for split, part in dealt.items()}


def test_documents_are_dealt_whole_and_once(
    documents: list[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    dealt = deal(
        documents,
        tiny_tokenizer,
        length=LENGTH,
        wanted=dict.fromkeys(SPLITS, 1),
        seed=0,
    )
    assert sorted(sum(dealt.values(), [])) == sorted(documents)
    for part in dealt.values():
        assert part == sorted(part, key=documents.index)  # the order of the text


@pytest.mark.parametrize("seed", range(5))
def test_shares(
    documents: list[str], tiny_tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    wanted = dict.fromkeys(SPLITS, 1)
    dealt = deal(documents, tiny_tokenizer, length=LENGTH, wanted=wanted, seed=seed)
    held, total = sizes(dealt), sum(map(len, documents))
    for split, share in SHARES.items():
        assert held[split] == pytest.approx(share * total, abs=1000)


def test_same_seed_same_deal(
    documents: list[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    wanted = dict.fromkeys(SPLITS, 1)
    deals = [
        deal(documents, tiny_tokenizer, length=LENGTH, wanted=wanted, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert deals[0] == deals[1]
    assert deals[0] != deals[2]


def test_deal_does_not_move_while_shares_suffice(
    documents: list[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    deals = [
        deal(documents, tiny_tokenizer, length=LENGTH, wanted=wanted, seed=0)
        for wanted in (
            {"statistics": 1, "fitness": 1, "choice": 0, "report": 0},
            {"statistics": 500, "fitness": 200, "choice": 90, "report": 40},
        )
    ]
    assert deals[0] == deals[1]


@pytest.mark.parametrize("seed", range(5))
def test_split_that_wants_more_grows(
    documents: list[str], tiny_tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    wanted = {"statistics": 100, "fitness": 300, "choice": 100, "report": 500}
    dealt = deal(documents, tiny_tokenizer, length=LENGTH, wanted=wanted, seed=seed)
    for split, size in sizes(dealt).items():
        assert size // LENGTH >= wanted[split]


def test_everybody_gets_less_of_a_short_text(
    documents: list[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    wanted = {"statistics": 2200, "fitness": 1100, "choice": 550, "report": 550}
    dealt = deal(documents, tiny_tokenizer, length=LENGTH, wanted=wanted, seed=0)
    for split, size in sizes(dealt).items():  # a quarter of what they want
        assert size / LENGTH == pytest.approx(wanted[split] / 4, rel=0.05)


def test_one_book_is_cut_as_coarsely_as_will_do(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    book = text(0, 400_000)
    wanted = dict.fromkeys(SPLITS, 10)
    dealt = deal([book], tiny_tokenizer, length=LENGTH, wanted=wanted, seed=0)
    pieces = sum(dealt.values(), [])
    assert 20 <= len(pieces) <= 22
    assert all(piece in book for piece in pieces)
    assert sum(map(len, pieces)) == pytest.approx(len(book), rel=0.001)
    assert all(size >= 1000 for size in sizes(dealt).values())


def test_only_long_documents_are_cut(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [text(0, 50_000), *(text(number, 300) for number in range(1, 6))]
    wanted = dict.fromkeys(SPLITS, 20)
    dealt = deal(documents, tiny_tokenizer, length=LENGTH, wanted=wanted, seed=0)
    pieces = sum(dealt.values(), [])
    assert documents[0] not in pieces
    assert set(documents[1:]) <= set(pieces)


@pytest.mark.parametrize(
    ("document", "pieces"),
    [
        ("short\n", ["short\n"]),
        ("aaaaaa\n\nbbbbb\nccccc", ["aaaaaa", "bbbbb", "ccccc"]),
        ("aaaaaa bb ccccccc", ["aaaaaa bb", "ccccccc"]),
        ("a" * 25, ["a" * 10, "a" * 10, "a" * 5]),
        ("a" * 10 + "\n" * 30, ["a" * 10]),
    ],
    ids=["whole", "at lines", "at blanks", "anywhere", "nothing empty"],
)
def test_cut(document: str, pieces: list[str]) -> None:
    assert cut(document, 10) == pieces


@pytest.mark.parametrize(
    ("count", "wanted", "counts"),
    [
        (100, dict.fromkeys(SPLITS, 1), [60, 25, 10, 5]),
        (40, dict.fromkeys(SPLITS, 10), [10, 10, 10, 10]),
        (20, dict.fromkeys(SPLITS, 10), [5, 5, 5, 5]),
        (100, {"statistics": 1, "report": 20}, [51, 21, 8, 20]),
    ],
    ids=str,
)
def test_documents_of_one_size(
    count: int, wanted: dict[str, int], counts: list[int]
) -> None:
    dealt = deal_alike(count, wanted, seed=1)
    assert [len(dealt[split]) for split in SPLITS] == counts
    assert sorted(sum(dealt.values(), [])) == list(range(count))
    assert dealt == deal_alike(count, wanted, seed=1)
    assert dealt != deal_alike(count, wanted, seed=2)
