"""Orders of methods that the literature leads one to expect, checked on the cells.

From the papers of the methods and their reproductions; on a model of 135 M parameters
an order of larger models need not hold, so what fails is told and not hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Order:
    """One cell is expected to have the smaller KL.

    Attributes:
        better: Name of a cell.
        worse: Name of another.
        source: Who says so.
    """

    better: str
    worse: str
    source: str

    def told(self, cells: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Say whether it holds; None while one of the two is not measured."""
        figures = [cells.get(name, {}).get("kl") for name in (self.better, self.worse)]
        if None in figures:
            return None
        verdict = "holds" if figures[0] <= figures[1] else "does not hold"
        return (
            f"{verdict}: {self.better} {figures[0]:.4g} <= {self.worse} "
            f"{figures[1]:.4g} ({self.source})"
        )


def verdicts(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check every order whose cells are there, and count those that hold."""
    found = [told for order in ORDERS if (told := order.told(cells)) is not None]
    held = sum(told.startswith("holds") for told in found)
    summary = f"{held} of {len(found)} expected orders hold; {len(ORDERS)} are known"
    return [*found, summary]


def _at(levels: str, better: str, worse: str, source: str) -> list[Order]:
    pairs = [(f"{better}-{level}", f"{worse}-{level}") for level in levels.split()]
    return [Order(first, second, source) for first, second in pairs]


_GATES = "algorithms.md 4.5"
ORDERS: tuple[Order, ...] = (
    *_at("50 2-4 70", "sparsegpt", "wanda", f"{_GATES}; small models"),
    *_at("50 2-4 70", "wanda", "magnitude", "Sun et al. 2023, Tab. 2"),
    *_at("50 70", "magnitude", "magnitude-layer", _GATES),
    *_at("50", "wanda", "wanda-layer", "Sun et al. 2023, Tab. 7"),
    *_at("50 2-4 70", "magnitude", "random", "the control"),
    *_at("50 2-4 70", "ria", "magnitude", "Zhang et al. 2024"),
    *_at("50 2-4", "ria", "wanda", "Zhang et al. 2024, Tab. 1"),
    *_at("70", "wanda-dsnot", "wanda", "Zhang et al. 2023, Tab. 1"),
    *_at("70", "magnitude-dsnot", "magnitude", "Zhang et al. 2023, Tab. 1"),
    *_at("70 2-4", "alps", "sparsegpt", "Meng et al. 2024, Tab. 2"),
    *_at("70 2-4", "admm", "wanda", "Boza 2024, Tab. 1"),
    *_at("50 2-4 70", "gblm", "magnitude", "Das et al. 2023, Tab. 2"),
    *_at("50 2-4 70", "gblm", "wanda", "Das et al. 2023, Tab. 2"),
    *_at("50 2-4 70", "taylor", "gradient", "Molchanov et al. 2019: the size counts"),
    *_at("50", "sparsegpt", "magnitude-1x8", "tiles cost quality"),
    *_at("50", "wanda", "wanda-1x8", "tiles cost quality"),
    *_at("50", "wanda-1x8", "magnitude-1x8", "Sun et al. 2023, by analogy"),
    *[
        Order(f"{method}-{better}", f"{method}-{worse}", _GATES)
        for method in ("magnitude", "wanda", "sparsegpt")
        for better, worse in (("50", "4-8"), ("4-8", "2-4"), ("50", "70"))
    ],
    *_at("50 2-4", "obc-attention", "sparsegpt-attention", "Frantar and Alistarh 2022"),
    *_at("50 2-4", "sparsegpt-attention", "wanda-attention", _GATES),
    *_at("50 2-4", "wanda-attention", "magnitude-attention", _GATES),
    *_at("4bit 3bit", "gptq", "rtn", _GATES),
    *_at("4bit 3bit", "awq", "rtn", "Lin et al. 2023, Tab. 4"),
    *_at("4bit 3bit", "hqq", "rtn", "Badri and Shaji 2023"),
    *_at("4bit 3bit", "gptq", "gptq-in-order", _GATES),
    *_at("8bit 4bit 3bit", "slim_quant", "rtn-symmetric", "Mozaffari 2024, Tab. 1"),
    *_at("8bit 4bit 3bit", "slim_quant", "rtn", "without zero points, as above"),
    *_at("4bit", "nf4", "mxfp4", "finer scales"),
    *_at("4bit", "nvfp4", "mxfp4", "NVIDIA 2025: groups of 16, finer scales"),
    *_at("8bit", "int8_dynamic", "fp8", "one exponent does for most rows"),
    *[
        Order(f"{method}-{more}", f"{method}-{fewer}", "more bits")
        for method in ("rtn", "gptq", "awq", "hqq", "smoothquant")
        for more, fewer in (("8bit", "4bit"), ("4bit", "3bit"))
    ],
    *_at("mlp-25", "ziplm", "channels", "Kurtic et al. 2023"),
    *_at("mlp-25", "ziplm", "channels-magnitude", "Kurtic et al. 2023"),
    *_at("mlp-25", "channels", "channels-magnitude", "An et al. 2023, Tab. 1"),
    *_at("mlp-25", "flap", "channels-magnitude", "An et al. 2023, Tab. 1"),
    *_at("mlp-25", "taylor_channels", "channels-magnitude", "Ma et al. 2023, Tab. 1"),
    *_at("heads-33", "taylor_heads", "heads-magnitude", "Ma et al. 2023, Tab. 1"),
    *_at("heads-33", "ziplm", "heads", "Kurtic et al. 2023"),
    *_at("heads-33", "ziplm", "heads-magnitude", "Kurtic et al. 2023"),
    *_at("heads-33", "flap", "heads", "An et al. 2023, Tab. 1"),
    Order("drop-similar-25", "drop-spaced-25", "Men et al. 2024"),
    *_at("joint-3.3", "sparsegpt-at-once", "sparsegpt-rtn", _GATES),
    *_at("joint-3.3", "sparsegpt-gptq", "sparsegpt-rtn", "Frantar et al. 2022"),
    *_at("joint-3.3", "sparsegpt-gptq", "wanda-gptq", _GATES),
    *_at("joint-3.3", "wanda-gptq", "wanda-rtn", "Frantar et al. 2022"),
    *_at("joint-3.3", "wanda-rtn", "magnitude-rtn", "Sun et al. 2023"),
    *_at("joint-8bit", "jsq", "wanda-smoothquant", "Guo et al. 2024, Tab. 1"),
    *_at("joint-8bit", "jsq", "sparsegpt-smoothquant", "Guo et al. 2024, Tab. 1"),
    *_at("attention-joint-3.3", "obc-at-once", "sparsegpt-at-once", "OBC, Sec. 6"),
    *_at("4.1", "rtn-eora", "rtn-slim_lora", "Liu et al. 2024: the Hessian says more"),
    *_at("4.1", "gptq-eora", "rtn-eora", "Liu et al. 2024, Tab. 1"),
    Order("gptq-eora-4.1", "gptq-3bit", "Liu et al. 2024, Tab. 1"),
    Order("rtn-slim_lora-4.1", "rtn-3bit", "Mozaffari et al. 2024"),
    Order("wanda-rtn-slim_lora-4.1", "wanda-rtn-joint-3.3", "Mozaffari 2024"),
    Order("wanda-rtn-eora-4.1", "wanda-rtn-joint-3.3", "Liu et al. 2024"),
    *_at("75 50", "activation_svd", "svd", "Wang et al. 2024, Tab. 1"),
)
