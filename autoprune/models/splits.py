"""Deals documents to splits, so that none sees another's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autoprune.policy import digest

SPLITS = ("statistics", "fitness", "choice", "report")
"""A for norms and Hessians, B for trials, C for finalists, D for the user's figures."""

SHARES = {"statistics": 0.60, "fitness": 0.25, "choice": 0.10, "report": 0.05}
"""Part of the tokens that each split gets, where all of them get enough."""

SHORTEST_CUT = 2_000
"""Characters of the shortest pieces that a document is cut into."""


def deal(
    documents: Sequence[str],
    tokenizer: Any,
    *,
    length: int,
    wanted: Mapping[str, int],
    seed: int,
) -> dict[str, list[str]]:
    """Deal documents to all splits; cut them finer while a split goes short."""
    total = sum(map(len, documents))
    best: dict[str, list[str]] = {}
    best_filled = -1.0
    for limit in (total, total // 20, total // 80, SHORTEST_CUT):
        limit = max(limit, SHORTEST_CUT)
        pieces = [piece for document in documents for piece in cut(document, limit)]
        if len(pieces) < len(SPLITS) and limit > SHORTEST_CUT:
            continue  # too few to go round: the count of their tokens can be spared
        sizes = _token_counts(pieces, tokenizer)
        targets = _targets(sum(sizes), length=length, wanted=wanted)
        owners = _owners(sizes, targets, seed)
        needs = {s: min(want * length, targets[s]) for s, want in wanted.items()}
        held = _fill(owners, sizes, needs)
        filled = min(
            [
                min(1.0, held[split] // length / want)
                for split, want in wanted.items()
                if want
            ],
            default=1.0,
        )
        if filled > best_filled:
            best_filled, best = filled, {split: [] for split in SPLITS}
            for piece, owner in zip(pieces, owners, strict=True):
                best[owner].append(piece)
        if filled == 1.0:
            break
    return best


def deal_alike(
    count: int, wanted: Mapping[str, int], seed: int
) -> dict[str, list[int]]:
    """Deal documents of one size, each of which is a window, to all splits.

    Args:
        count: How many there are.
        wanted: Windows that each split wants.
        seed: Of the dealing.

    Returns:
        For each split, indices of documents: as many as its share, or as it needs.

    Example:
        >>> dealt = deal_alike(8, {"statistics": 2, "fitness": 1}, seed=0)
        >>> sorted(index for part in dealt.values() for index in part)
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    every = {split: wanted.get(split, 0) for split in SPLITS}
    order = torch.randperm(count, generator=generator_for("deal", seed)).tolist()
    targets = _targets(count, length=1, wanted=every, spare=0)
    dealt, start, end = {}, 0, 0.0
    for split in SPLITS:
        end += targets[split]
        dealt[split] = order[start : round(end)]
        start = round(end)
    return dealt


def cut(document: str, limit: int) -> list[str]:
    r"""Cut a document into pieces of at most ``limit`` characters.

    At the last blank line that fits, else at the last line or blank, else anywhere; the
    first half of a piece is never cut. A document that fits is given as it is.

    Example:
        >>> cut("One line.\n\nAnother line.\nAnd more.", 18)
        ['One line.', 'Another line.', 'And more.']
    """
    if len(document) <= limit:
        return [document]
    pieces = []
    while len(document) > limit:
        at = limit
        for mark in ("\n\n", "\n", " "):
            found = document.rfind(mark, limit // 2, limit)
            if found >= 0:
                at = found
                break
        pieces.append(document[:at])
        document = document[at:].lstrip()
    pieces.append(document)
    return [piece for piece in (piece.strip("\n") for piece in pieces) if piece.strip()]


def generator_for(purpose: str, seed: int) -> torch.Generator:
    """Make a generator of its own for each purpose, so that none moves another."""
    return torch.Generator().manual_seed(int(digest([purpose, seed]), 16) >> 1)


def _token_counts(pieces: Sequence[str], tokenizer: Any) -> list[int]:
    ids = tokenizer(list(pieces), add_special_tokens=False, verbose=False)["input_ids"]
    return [len(row) for row in ids]


def _targets(
    total: int, *, length: int, wanted: Mapping[str, int], spare: int = 1
) -> dict[str, float]:
    """Give the tokens that each split shall get: its share, or what it needs.

    By default one window more than wanted: tokens beside full windows are lost.
    """
    needs = {
        split: (want + spare) * length if want else 0 for split, want in wanted.items()
    }
    if sum(needs.values()) >= total:
        scale = total / sum(needs.values())
        return {split: need * scale for split, need in needs.items()}
    short: set[str] = set()
    while True:
        rest = total - sum(needs[split] for split in short)
        shares = sum(SHARES[split] for split in SPLITS if split not in short)
        targets = {
            split: needs[split] if split in short else rest * SHARES[split] / shares
            for split in SPLITS
        }
        new = {split for split in SPLITS if targets[split] < needs[split]}
        if not new:
            return targets
        short |= new


def _owners(sizes: Sequence[int], targets: Mapping[str, float], seed: int) -> list[str]:
    """Draw a split for each document, by the room that splits have left for it.

    Documents longer than the smallest split come first, while there is room for them.
    """
    generator = generator_for("deal", seed)
    room = torch.tensor([targets[split] for split in SPLITS], dtype=torch.float64)
    order = torch.randperm(len(sizes), generator=generator).tolist()
    smallest = min((target for target in targets.values() if target), default=0.0)
    order.sort(key=lambda index: sizes[index] <= smallest)
    owners = [""] * len(sizes)
    for index in order:
        fits = torch.where(room >= sizes[index], room, 0.0)
        if fits.sum() > 0:
            owner = int(torch.multinomial(fits, 1, generator=generator))
        else:
            owner = int(room.argmax())
        owners[index] = SPLITS[owner]
        room[owner] -= sizes[index]
    return owners


def _fill(
    owners: list[str], sizes: Sequence[int], needs: Mapping[str, float]
) -> dict[str, int]:
    """Move documents from splits that can spare them to splits below their need.

    Returns:
        The tokens that each split holds then; ``owners`` is changed in place.
    """
    held = dict.fromkeys(SPLITS, 0)
    for owner, size in zip(owners, sizes, strict=True):
        held[owner] += size
    for split in SPLITS:
        while (lacks := needs[split] - held[split]) > 0:
            spare = [
                (size < lacks, abs(size - lacks), index)  # the smallest that suffices
                for index, (owner, size) in enumerate(zip(owners, sizes, strict=True))
                if size and owner != split and held[owner] - size >= needs[owner]
            ]
            if not spare:
                break
            index = min(spare)[-1]
            held[owners[index]] -= sizes[index]
            held[split] += sizes[index]
            owners[index] = split
    return held
