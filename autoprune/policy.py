"""What is searched: steps, actions, policies. Frozen, and without torch.

An action is written as its steps in order, ``sparsegpt(pattern=2:4) + gptq(bits=4)``;
``dense`` has none. The text is the identity: two actions are equal when it is equal.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from autoprune.errors import PolicyError
from autoprune.sites import Layer as Layer
from autoprune.sites import Site as Site

Value = int | float | bool | str
"""A parameter of a step."""

POLICY_FORMAT = 1  # of the policy file; a reader refuses a newer one
ONE_SHOT = "one-shot"
"""The schedule that applies all steps once and trains nothing."""

_STEP = re.compile(r"\s*([a-z][\w-]*)\s*(?:\(([^()]*)\))?\s*")
_LIST = re.compile(r"\[([^\[\]]*)\]")
_WORD = re.compile(r"[\w.:%+-]+")
_PLUS = re.compile(r"\+(?![^()]*\))")  # outside of parentheses, where 1e+20 may stand


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A method with its parameters: ``sparsegpt(pattern=2:4)``.

    Two steps are equal when their texts are; ``bits=4`` is not ``bits=4.0``.

    Attributes:
        method: Name of the method.
        params: Sorted pairs of a parameter's name and value.
    """

    method: str
    params: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        inner = ", ".join(
            f"{name}={format_value(value)}" for name, value in self.params
        )
        return f"{self.method}({inner})" if inner else self.method

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass(frozen=True, slots=True)
class Action:
    """The steps done at a site, in order; ``dense`` has none.

    Example:
        >>> str(Action.parse("sparsegpt(pattern=2:4)+gptq(group=64, bits=4)"))
        'sparsegpt(pattern=2:4) + gptq(bits=4, group=64)'
    """

    steps: tuple[Step, ...] = ()

    @classmethod
    def parse(cls, text: Any) -> "Action":
        """Read an action from its text.

        Raises:
            PolicyError: If the text is no action; the message quotes the bad part.
        """
        if not isinstance(text, str):
            raise PolicyError(
                f"an action is text such as 'wanda(sparsity=0.5)', found {text!r}"
            )
        if text.strip() == "dense":
            return cls()
        return cls(tuple(_parse_step(part, text) for part in _PLUS.split(text)))

    @classmethod
    def parse_all(cls, text: str) -> "tuple[Action, ...]":
        """Read several actions: a list in a parameter stands for one action each.

        Raises:
            PolicyError: If one of them is no action, or a list is not closed.

        Example:
            >>> [str(a) for a in Action.parse_all("rtn(bits=[4, 8], group=64)")]
            ['rtn(bits=4, group=64)', 'rtn(bits=8, group=64)']
        """
        pieces = _LIST.split(text)  # text, list, text, list, ..., text
        lists = [[item.strip() for item in found.split(",")] for found in pieces[1::2]]
        actions = []
        for chosen in product(*lists):
            filled = [*chosen, ""]
            joined = zip(pieces[::2], filled, strict=True)
            actions.append(cls.parse("".join(part + item for part, item in joined)))
        return tuple(actions)

    def __str__(self) -> str:
        return " + ".join(str(step) for step in self.steps) if self.steps else "dense"


DENSE = Action()
"""The action that leaves a site as it is."""


@dataclass(frozen=True)
class Policy(Mapping[str, Action]):
    """An action for every site, and a schedule: what is searched and applied.

    Attributes:
        actions: Site name to action, in the order of the sites.
        schedule: When and how often steps are applied, and what recovers quality
            after: ``one-shot``, ``iterative(rounds=3) + lora(tokens=65536)``. Its names
            are those of plugins, as an action's are.
    """

    actions: Mapping[str, Action]
    schedule: str = ONE_SHOT

    def __getitem__(self, site: str) -> Action:
        return self.actions[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.actions)

    def __len__(self) -> int:
        return len(self.actions)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """A name of 16 hexadecimal digits for what the policy does."""
        return digest(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Give the policy as plain data, ready for JSON."""
        # Hundreds of sites share few actions: each is written, and read, once.
        distinct = {id(action): action for action in self.actions.values()}
        texts = {key: str(action) for key, action in distinct.items()}
        return {
            "format": POLICY_FORMAT,
            "schedule": self.schedule,
            "actions": {site: texts[id(x)] for site, x in self.actions.items()},
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Policy":
        """Read a policy from plain data.

        Raises:
            PolicyError: If keys are missing or of the wrong kind, an action or the
                schedule cannot be read, or the format is newer than this reader.
        """
        if not isinstance(data, Mapping) or "actions" not in data:
            raise PolicyError("not a policy: it has no 'actions'. Expected policy.json")
        if not isinstance(found := data["actions"], Mapping):
            wrong = f"'actions' gives an action for every site, found {found!r}"
            raise PolicyError(f"not a policy: {wrong}")
        version = data.get("format", POLICY_FORMAT)
        if type(version) is not int or not 1 <= version <= POLICY_FORMAT:
            raise PolicyError(
                f"the policy has format {version!r}, this AutoPrune reads up to "
                f"{POLICY_FORMAT}. Update AutoPrune."
            )
        schedule = data.get("schedule", ONE_SHOT)
        try:
            schedule = str(Action.parse(schedule))
        except PolicyError as error:
            raise PolicyError(f"not a policy: its schedule: {error}") from error
        read: dict[str, Action] = {}
        for text in data["actions"].values():
            if not isinstance(text, str) or text not in read:
                read[text] = Action.parse(text)
        return cls({site: read[text] for site, text in found.items()}, schedule)

    @classmethod
    def uniform(cls, sites: tuple[Site, ...], action: Action) -> "Policy":
        """Give every site the same action."""
        return cls({site.name: action for site in sites})

    def per_layer(self, sites: tuple[Site, ...]) -> dict[Layer, Action]:
        """Tell the action of every layer; those of a site may each have their own.

        Raises:
            PolicyError: If the policy and the sites do not name the same places.
        """
        named: dict[Layer, str] = {}
        missing: list[str] = []
        for site in sites:
            parts = {layer: site.part(layer) for layer in site.layers}
            if site.name in self.actions:
                named |= dict.fromkeys(site.layers, site.name)
            elif self.actions.keys() >= set(parts.values()):
                named |= parts
            else:
                missing.append(site.name)
        used = set(named.values())
        extra = [name for name in self.actions if name not in used]
        if missing or extra:
            first = [f"first without an action: {missing[0]!r}"] if missing else []
            first += [f"first that the model lacks: {n!r}" for n in extra[:1]]
            raise PolicyError(
                f"policy covers {len(sites) - len(missing)} of {len(sites)} sites and "
                f"names {len(extra)} others; {'; '.join(first)}. Give every site an "
                "action, or 'dense' to leave it unchanged."
            )
        return {layer: self.actions[name] for layer, name in named.items()}


def format_value(value: Value) -> str:
    """Write a parameter's value as it stands in an action."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_value(text: str) -> Value:
    """Read a parameter's value: a truth value, a number, or else a word (``2:4``)."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def digest(data: Any) -> str:
    """Name plain data by 16 hexadecimal digits; the order of keys does not matter."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parse_step(part: str, whole: str) -> Step:
    match = _STEP.fullmatch(part)
    if not match or match[1] == "dense":
        raise PolicyError(
            f"cannot read {part.strip()!r} in the action {whole!r}. Write steps as "
            "'method(name=value, name=value)', joined by ' + '; 'dense' stands alone."
        )
    params: dict[str, Value] = {}
    for item in filter(None, (piece.strip() for piece in (match[2] or "").split(","))):
        name, _, value = (piece.strip() for piece in item.partition("="))
        if not name.isidentifier() or not _WORD.fullmatch(value) or name in params:
            raise PolicyError(
                f"cannot read {item!r} in the action {whole!r}: expected name=value, "
                "each name once"
            )
        params[name] = parse_value(value)
    return Step(match[1], tuple(sorted(params.items())))
