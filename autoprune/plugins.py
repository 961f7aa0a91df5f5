"""Loads plugins, checks what they register, refuses clashes, looks up by name.

Built-in methods are plugins like anybody's: modules of ``autoprune_plugins``, found by
entry point. A plugin that breaks is named and left out; it never takes others down.
"""

import importlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import pluggy

from autoprune import hookspecs
from autoprune.errors import PluginError, unknown_name

log = logging.getLogger(__name__)

_BASES = {
    "tasks": "autoprune.models.task:Task",
    "methods": "autoprune.compression.method:CompressionMethod",
    "samplers": "autoprune.searching.strategies:SamplerFactory",
    "metrics": "autoprune.evaluation.metric:Metric",
    "rewards": "autoprune.evaluation.reward:Reward",
    "text_sources": "autoprune.models.text:TextSource",
    "architectures": "autoprune.models.layers:Architecture",
    "layer_kinds": "autoprune.models.kinds:LayerKind",
    "exporters": "autoprune.exporting.exporter:Exporter",
    "latency_backends": "autoprune.latency.device:LatencyBackend",
    "schedules": "autoprune.training.schedule:Schedule",
    "recoveries": "autoprune.training.recovery:RecoveryMethod",
    "formulas": "autoprune.searching.proposer:Proposer",
}
"""What each ``register_*`` hook must return, named by string and imported late."""

_DISABLED = "AUTOPRUNE_DISABLE_PLUGINS"

_BY_HAND = "named by hand"
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_SINGULAR = {kind: kind.removesuffix("s").replace("_", " ") for kind in _BASES}
_SINGULAR["recoveries"] = "recovery"


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """What became of one plugin.

    Attributes:
        name: Name of the entry point, or of the module given by hand.
        module: Where it is defined.
        distribution: The package that brought it, with its version.
        hooks: The hooks it implements.
        objects: ``kind:name`` of every object it registered.
        error: Why it was left out; None if it works.
    """

    name: str
    module: str
    distribution: str
    hooks: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Plugins:
    """Everything that plugins registered, by kind and name."""

    manager: pluggy.PluginManager
    records: tuple[PluginRecord, ...]
    objects: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def get(self, kind: str, name: str) -> Any:
        """Look up an object: ``get("methods", "wanda")``.

        Raises:
            PluginError: If there is none of that name; lists near misses.
        """
        known = self.objects[kind]
        if name not in known:
            broken = [r for r in self.records if r.error]
            hint = "".join(f" Plugin {r.name!r} is broken: {r.error}" for r in broken)
            raise PluginError(unknown_name(_SINGULAR[kind], name, known) + hint)
        return known[name]

    @property
    def methods(self) -> Mapping[str, Any]:
        """Compression methods by name."""
        return self.objects["methods"]

    def notify(self, hook: str, **arguments: Any) -> list[Any]:
        """Call every implementation of a hook; one that raises is logged, not fatal."""
        results = []
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                given = {name: arguments[name] for name in impl.argnames}
                results.append(impl.function(**given))
            except Exception:
                log.exception("plugin %r failed in %s", impl.plugin_name, hook)
        return results


def load_plugins(extra: Iterable[str] = ()) -> Plugins:
    """Load every installed plugin, and modules named by hand.

    ``AUTOPRUNE_DISABLE_PLUGINS`` leaves plugins out: names of entry points or modules,
    comma-separated.

    Args:
        extra: Importable modules, such as ``my_package.my_module``; one that is
            installed as a plugin anyway is not loaded twice.

    Raises:
        PluginError: If two plugins register the same name, or one named by hand breaks.
            A broken installed plugin is recorded instead.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    disabled = {name.strip() for name in os.environ.get(_DISABLED, "").split(",")}
    points = entry_points(group=hookspecs.PROJECT)
    records: list[PluginRecord] = []
    for point in sorted(points, key=lambda point: (point.name, point.value)):
        again = point.value in {record.module for record in records}
        if disabled.isdisjoint({point.name, point.value}) and not again:
            origin = f"{point.dist.name} {point.dist.version}" if point.dist else "?"
            record = PluginRecord(point.name, point.value, origin)
            records.append(_load(manager, record, point.load))
    for module in dict.fromkeys(extra):
        if not disabled.isdisjoint({module}) or module in {r.module for r in records}:
            continue
        record = PluginRecord(module, module, _BY_HAND)
        record = _load(manager, record, partial(importlib.import_module, module))
        records.append(record)
    objects, records = _collect(manager, records)
    if kinds := objects["layer_kinds"]:
        importlib.import_module("autoprune.models.kinds").learn(kinds.values())
    for record in records:
        if record.error and record.distribution == _BY_HAND:
            raise PluginError(f"cannot load plugin {record.module!r}: {record.error}")
    return Plugins(manager, tuple(records), objects)


def _load(
    manager: pluggy.PluginManager, record: PluginRecord, load: Callable[[], Any]
) -> PluginRecord:
    try:
        plugin = load()
        # By module: two packages may each have an entry point called "methods".
        manager.register(plugin, name=record.module)
    except (Exception, SystemExit) as error:
        return _left_out(manager, record, error)
    callers = manager.get_hookcallers(plugin) or []
    known = [hook.__name__ for hook in hookspecs.HOOKS]
    for caller in callers:
        if not caller.has_spec():
            reason = PluginError(unknown_name("hook", caller.name, known))
            return _left_out(manager, record, reason)
    if not callers:
        reason = PluginError("it implements no hook. Mark functions with @hookimpl")
        return _left_out(manager, record, reason)
    return replace(record, hooks=tuple(sorted(caller.name for caller in callers)))


def _left_out(
    manager: pluggy.PluginManager, record: PluginRecord, error: BaseException
) -> PluginRecord:
    """Take a broken plugin's hooks away, and say why."""
    if manager.has_plugin(record.module):
        manager.unregister(name=record.module)
    kind = "" if isinstance(error, PluginError) else f"{type(error).__name__}: "
    log.warning("plugin %r is left out: %s%s", record.name, kind, error)
    return replace(record, hooks=(), error=f"{kind}{error}")


def _collect(
    manager: pluggy.PluginManager, records: Sequence[PluginRecord]
) -> tuple[dict[str, dict[str, Any]], list[PluginRecord]]:
    """Call the ``register_*`` hooks, plugin by plugin, and refuse clashes."""
    objects: dict[str, dict[str, Any]] = {kind: {} for kind in _BASES}
    owners: dict[tuple[str, str], PluginRecord] = {}
    collected = []
    for record in records:
        try:
            registered = [] if record.error else _registered(manager, record)
        except (Exception, SystemExit) as error:
            collected.append(_left_out(manager, record, error))
            continue
        for kind, item in registered:
            if other := owners.get((kind, item.name)):
                raise PluginError(
                    f"two plugins register the {_SINGULAR[kind]} {item.name!r}: "
                    f"{other.module} ({other.distribution}) and {record.module} "
                    f"({record.distribution}). Uninstall one, or leave one out: set "
                    f"{_DISABLED} to {other.module} or to {record.module}"
                )
            owners[kind, item.name] = record
            objects[kind][item.name] = item
        names = tuple(f"{kind}:{item.name}" for kind, item in registered)
        collected.append(replace(record, objects=names))
    return objects, collected


def _registered(
    manager: pluggy.PluginManager, record: PluginRecord
) -> list[tuple[str, Any]]:
    """Give what one plugin registers, each with its kind; checked."""
    registered = []
    for kind, base in _BASES.items():
        caller = getattr(manager.hook, f"register_{kind}")
        module, _, name = base.partition(":")
        for impl in caller.get_hookimpls():
            if impl.plugin_name == record.module:
                expected = getattr(importlib.import_module(module), name)
                items = impl.function()
                _check(items, f"register_{kind}", expected)
                registered += [(kind, item) for item in items]
    return registered


def _check(items: Any, hook: str, expected: type) -> None:
    if not isinstance(items, list | tuple):
        raise PluginError(
            f"{hook} must return a list of {expected.__name__} objects, found {items!r}"
        )
    seen = set()
    for item in items:
        if not isinstance(item, expected):
            raise PluginError(
                f"{hook} must return {expected.__name__} objects, found {item!r}"
            )
        name = getattr(item, "name", None)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PluginError(
                f"{hook} returned {item!r}, whose name {name!r} is not lower case "
                "letters, digits, '_' and '-'"
            )
        if name in seen:
            raise PluginError(f"{hook} returned two objects named {name!r}")
        seen.add(name)
