"""What may be chosen where: sites x actions, as Optuna sees it and as a policy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution

from autoprune.errors import ConfigError, PolicyError, unknown_name
from autoprune.policy import DENSE, Action, Layer, Policy, Site, digest

Rule = tuple[str, tuple[Action, ...]]
"""A glob over names of sites, and the actions that it allows there."""

Refuses = Callable[[Layer, Action], str | None]
"""Says why an action cannot be done to a layer, or None if it can."""

Refusal = tuple[str, Action, str]
"""A site, an action taken out of it, and the reason."""

NAMED = 5
"""How many sites an error names before it stops."""


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """The actions allowed at every site; frozen for the life of a run.

    Attributes:
        sites: The sites, in the model's order.
        choices: Site name to its actions, at least one each. A site with one is fixed.
        refused: What the rules allowed and a method refused, with the reason.
    """

    sites: tuple[Site, ...]
    choices: Mapping[str, tuple[Action, ...]]
    refused: tuple[Refusal, ...] = ()

    def __post_init__(self) -> None:
        for site in self.sites:
            actions = self.choices.get(site.name, ())
            if not actions or len(set(actions)) < len(actions):
                found = "none" if not actions else ", ".join(map(str, actions))
                raise ConfigError(
                    f"site {site.name!r} needs at least one action and each once, "
                    f"found {found}"
                )
        extra = set(self.choices) - {site.name for site in self.sites}
        if extra:
            raise ConfigError(
                unknown_name("site", min(extra), [site.name for site in self.sites])
            )

    @cached_property
    def fingerprint(self) -> str:
        """A name of 16 hexadecimal digits for sites and choices, in their order."""
        layers = [[s.name, [layer.name for layer in s.layers]] for s in self.sites]
        return digest({"sites": layers, "choices": self._texts})

    @property
    def policies(self) -> int:
        """How many policies the space has, budgets apart."""
        return math.prod(len(self.choices[site.name]) for site in self.sites)

    def distributions(self) -> dict[str, CategoricalDistribution]:
        """Give one Optuna distribution a site; its choices are the actions' texts."""
        return {name: CategoricalDistribution(texts) for name, texts in self._texts}

    def policy(self, params: Mapping[str, str]) -> Policy:
        """Make the policy of Optuna's parameters.

        Raises:
            PolicyError: If a site is missing or has an action that is no choice.
        """
        return self.at(self._indices(params))

    def params(self, policy: Policy) -> dict[str, str]:
        """Give a policy as Optuna's parameters.

        Raises:
            PolicyError: If the space does not hold the policy.
        """
        texts = {site: str(action) for site, action in policy.items()}
        self._indices(texts)
        return {name: texts[name] for name, _ in self._texts}

    def index(self, policy: Policy) -> Int[np.ndarray, " sites"]:
        """Give a policy as the position of its action among each site's choices.

        Raises:
            PolicyError: If the space does not hold the policy.
        """
        return self._indices({site: str(action) for site, action in policy.items()})

    def at(self, indices: Int[np.ndarray, " sites"]) -> Policy:
        """Make the policy of positions, the inverse of ``index``."""
        return Policy(
            {
                site.name: self.choices[site.name][int(position)]
                for site, position in zip(self.sites, indices, strict=True)
            }
        )

    @cached_property
    def _texts(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return tuple(
            (site.name, tuple(str(action) for action in self.choices[site.name]))
            for site in self.sites
        )

    @cached_property
    def _positions(self) -> dict[str, dict[str, int]]:
        return {
            name: {text: i for i, text in enumerate(texts)}
            for name, texts in self._texts
        }

    def _indices(self, texts: Mapping[str, str]) -> NDArray[np.int64]:
        try:
            found = [where[texts[site]] for site, where in self._positions.items()]
        except KeyError:
            raise PolicyError(self._misfit(texts)) from None
        if len(texts) > len(found):
            raise PolicyError(self._misfit(texts))
        return np.array(found, dtype=np.int64)

    def _misfit(self, texts: Mapping[str, str]) -> str:
        for site, positions in self._positions.items():
            if site not in texts:
                return (
                    f"the policy has no action for site {site!r}; it names "
                    f"{len(texts)} of {len(self.sites)} sites. Give every site one."
                )
            if texts[site] not in positions:
                return f"at site {site!r}: " + unknown_name(
                    "action", texts[site], positions
                )
        extra = next(site for site in texts if site not in self._positions)
        return unknown_name("site", extra, self._positions)


def build_space(
    sites: Sequence[Site], rules: Sequence[Rule], refuses: Refuses
) -> SearchSpace:
    """Cross sites with the actions that rules allow, less what methods refuse.

    The last rule whose glob matches a site decides it. A site without a rule, or one
    that refuses every action of its rule, is fixed at dense.

    Args:
        sites: The sites, in the model's order.
        rules: In the order of the configuration.
        refuses: Asked for every layer of a site.

    Raises:
        ConfigError: If a glob matches no site, or every site that a rule decides
            refuses one of its actions.
    """
    decided: dict[str, int] = {}
    for number, (glob, _) in enumerate(rules):
        matched = [site.name for site in sites if fnmatchcase(site.name, glob)]
        if not matched:
            raise ConfigError(
                f"{glob!r} matches none of {len(sites)} sites. They are named "
                f"{_some(sites)}"
            )
        decided.update(dict.fromkeys(matched, number))
    choices: dict[str, tuple[Action, ...]] = {site.name: (DENSE,) for site in sites}
    refused: list[Refusal] = []
    for number, (glob, actions) in enumerate(rules):
        own = [site for site in sites if decided.get(site.name) == number]
        allowed, out = _filter(own, dict.fromkeys(actions), refuses)
        _check_each_used(glob, own, out)
        refused += out
        choices.update({name: kept or (DENSE,) for name, kept in allowed.items()})
    return SearchSpace(tuple(sites), choices, tuple(refused))


def _filter(
    sites: Sequence[Site], actions: Mapping[Action, None], refuses: Refuses
) -> tuple[dict[str, tuple[Action, ...]], list[Refusal]]:
    """Ask every site about every action."""
    allowed: dict[str, tuple[Action, ...]] = {}
    refused: list[Refusal] = []
    for site in sites:
        kept = []
        for action in actions:
            reasons = (refuses(layer, action) for layer in site.layers)
            reason = next((why for why in reasons if why is not None), None)
            if reason is None or action == DENSE:
                kept.append(action)
            else:
                refused.append((site.name, action, reason))
        allowed[site.name] = tuple(kept)
    return allowed, refused


def _check_each_used(
    glob: str, sites: Sequence[Site], refused: Sequence[Refusal]
) -> None:
    """Refuse a rule with an action that none of its sites can do."""
    for action in dict.fromkeys(action for _, action, _ in refused):
        reasons = [(site, why) for site, other, why in refused if other == action]
        if len(reasons) == len(sites):
            site, why = reasons[0]
            raise ConfigError(
                f"none of the {len(sites)} sites of {glob!r} can do '{action}'; "
                f"at {site!r}: {why}"
            )


def _some(sites: Sequence[Site]) -> str:
    names = ", ".join(site.name for site in sites[:NAMED])
    return f"{names} ..." if len(sites) > NAMED else names
