import torch

from autoprune.models.recovery_text import with_recovery
from autoprune.models.text import TokenWindows


def splits(count: int) -> dict[str, TokenWindows]:
    ids = torch.arange(count * 4).view(count, 4)
    other = TokenWindows.of(ids + 1000, "report", "text")
    return {"statistics": TokenWindows.of(ids, "statistics", "text"), "report": other}


def test_statistics_have_some_spread_evenly_and_recovery_has_all() -> None:
    given = splits(9)
    found = with_recovery(given, 3)
    assert found["recovery"].ids.tolist() == given["statistics"].ids.tolist()
    assert found["statistics"].ids[:, 0].tolist() == [0, 16, 32]
    assert found["report"] is given["report"]
    assert [found[n].split for n in ("statistics", "recovery")] == [
        "statistics",
        "recovery",
    ]
    assert len({split.fingerprint for split in found.values()}) == 3


def test_a_short_text_gives_statistics_all_there_is() -> None:
    found = with_recovery(splits(2), 8)
    assert torch.equal(found["statistics"].ids, found["recovery"].ids)
