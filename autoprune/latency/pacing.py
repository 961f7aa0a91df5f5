"""How long a recording takes, guessed beforehand."""

from autoprune.latency.profiles import Point

_FIXED_S = {"cuda": 0.03, "cpu": 0.17}
_SEARCH_S = 0.2
_SPEED = {"cuda": 4e14, "cpu": 7e10}
_CALLS = {"cuda": 14.0, "cpu": 7.0}


def seconds_of(point: Point, kind: str) -> float:
    """Guess how long it takes to time a point, for plans that are shown.

    Times that a call takes at least as much as a batch are counted; all else is a
    fixed cost, larger where algorithms are searched.
    """
    flop = 2.0 * point.m * point.n * point.k
    if point.op.startswith("attn_"):
        flop = 4.0 * point.m * point.context * point.heads * point.head_dim
    elif point.op.startswith("model_"):
        # A variation is built once, and passed several times, in rounds on a CPU.
        return 0.8 if kind == "cuda" else 1.0 + 11 * max(0.06, point.m * 0.004)
    one = flop / _SPEED[kind]
    searched = _SEARCH_S if point.kernel.startswith("cslt") else 0.0
    return _FIXED_S[kind] + searched + one * _CALLS[kind]
