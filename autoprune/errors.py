"""Every exception that AutoPrune raises on purpose.

AutoPruneError
├── ConfigError          a configuration, a space or a command's arguments
│   └── BudgetError      no policy of the space meets the budgets
├── PluginError          a plugin cannot be loaded, clashes or breaks its contract
├── ModelError           a checkpoint or an architecture
├── TextError            a text source, or too few tokens
├── PolicyError          a policy that does not fit its model
├── MethodError          a compression method cannot do what it was asked
├── StoreError           variants on disk
├── ProfileError         a latency profile, or a time that nothing tells
├── RunError             a run folder: its ledger, its lock, its fingerprint
└── ExportError          writing, reloading or verifying an export

A message says what is wrong, where, what was found and what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class AutoPruneError(Exception):
    """The base of every error that AutoPrune raises on purpose."""


class ConfigError(AutoPruneError):
    """A configuration, a space or a command's arguments."""


class BudgetError(ConfigError):
    """No policy of the space meets the budgets."""


class PluginError(AutoPruneError):
    """A plugin cannot be loaded, clashes or breaks its contract."""


class ModelError(AutoPruneError):
    """A checkpoint or an architecture."""


class TextError(AutoPruneError):
    """A text source, or too few tokens."""


class PolicyError(AutoPruneError):
    """A policy that does not fit its model."""


class MethodError(AutoPruneError):
    """A compression method cannot do what it was asked."""


class StoreError(AutoPruneError):
    """Variants on disk."""


class ProfileError(AutoPruneError):
    """A latency profile, or a time that nothing tells."""


class RunError(AutoPruneError):
    """A run folder: its ledger, its lock, its fingerprint."""


class ExportError(AutoPruneError):
    """Writing, reloading or verifying an export."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Describe an unknown name: near misses first, then everything that exists.

    Example:
        >>> unknown_name("method", "wnada", ["magnitude", "wanda"])
        "unknown method 'wnada'. Did you mean 'wanda'? Known: magnitude, wanda"
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}"
