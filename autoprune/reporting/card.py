"""The model card of an export: what was done, and what was measured."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

_FIGURES = {
    "perplexity": "Perplexity",
    "kl": "KL to the dense model, nats a token",
    "quality_drop": "Perplexity over dense, minus 1",
    "size_bytes": "Weight file, bytes",
    "compression_ratio": "Compression ratio",
    "sparsity": "Zeros in the compressed layers",
    "model_sparsity": "Zeros in the whole model",
    "bits_per_weight": "Stored bits a weight, compressed layers",
    "gflop_per_token": "GFLOP a token, zeros not counted",
}
"""Metrics by name, as a reader of the card knows them, in their order."""


def model_card(about: Mapping[str, Any]) -> str:
    """Write the model card.

    Args:
        about: What ``policy.json`` of the export holds. ``figures`` has the
            measurements ``dense`` and ``compressed``, ``sizes`` both by target,
            ``rivals`` rows with a ``name`` and a measurement; a part that is missing is
            left out.

    Returns:
        Markdown, with the head that model hubs read.
    """
    model = about.get("model", {})
    source = str(model.get("source", "an unknown model"))
    parts = [
        _head(source, model.get("licence")),
        f"# {_shown(source)}, compressed with AutoPrune",
        _opening(about, _shown(source)),
        "## What was done",
        _actions(about.get("summary", [])),
        _statistics(about.get("statistics")),
        _notes(about.get("notes", []), str(about.get("target"))),
        "## Figures",
        _measured_on(about),
        _figures(about.get("figures", {})),
        _sizes(about.get("sizes", {}), str(about.get("target"))),
        _rivals(about.get("rivals", [])),
        _verified(about.get("verified")),
        "## Load it",
        _load(about),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(source: str, licence: str | None) -> str:
    """Give the lines that hubs read; a base model only if it is one of theirs."""
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["autoprune"]}
    if licence:
        head["license"] = licence
    if _HUB_ID.fullmatch(source):
        head["base_model"] = source
    return f"---\n{yaml.safe_dump(head, sort_keys=True)}---"


def _shown(source: str) -> str:
    """Leave out where on somebody's disk a model was."""
    is_id = _HUB_ID.fullmatch(source)
    return source if is_id else source.rstrip("/\\").replace("\\", "/").split("/")[-1]


def _opening(about: Mapping[str, Any], source: str) -> str:
    revision = about.get("model", {}).get("revision")
    versions = about.get("versions", {})
    made = ", ".join(f"{name} {number}" for name, number in versions.items())
    details = [
        f"revision `{revision}`" if revision else "",
        f"export target `{about.get('target')}`",
        f"seed {about['seed']}" if "seed" in about else "",
        f"made with {made}" if made else "",
    ]
    return (
        f"The model `{source}` under a policy with an action for every site "
        f"({'; '.join(filter(None, details))}). The policy is in `policy.json`, ready "
        "to be applied again with `autoprune apply`."
    )


def _actions(summary: Sequence[Mapping[str, Any]]) -> str:
    """Tell the actions with their counts and their share of the weights."""
    total = sum(row["weights"] for row in summary)
    rows = [
        [
            f"`{row['action']}`",
            row["sites"],
            row["layers"],
            f"{row['weights'] / total:.1%}",
            f"{row['bytes'] * 8 / row['weights']:.2f}",
        ]
        for row in summary
    ]
    return _table(
        ["Action", "Sites", "Layers", "Weights", "Stored bits a weight"], rows
    )


def _statistics(reused: Mapping[str, Any] | None) -> str:
    """Tell whose statistics decided, where they are not the model's own."""
    if not reused:
        return ""
    source = _shown(str(reused.get("model", {}).get("source")))
    return f"Statistics were not taken from this model: those of `{source}` are reused."


def _notes(notes: Sequence[str], target: str) -> str:
    """Tell what the export target made of the actions."""
    return f"In the target `{target}`: {'; '.join(notes)}." if notes else ""


def _measured_on(about: Mapping[str, Any]) -> str:
    text = about.get("text", {})
    if not text:
        return ""
    windows, length = text.get("windows"), text.get("window")
    count = f"{windows} windows of {length} tokens" if windows and length else "text"
    split = f", split `{text['split']}`" if "split" in text else ""
    name = f" (fingerprint `{text['fingerprint']}`)" if "fingerprint" in text else ""
    return f"Measured on {count} of `{text.get('source')}`{split}{name}."


def _figures(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Set the dense and the compressed model side by side."""
    dense, compressed = figures.get("dense", {}), figures.get("compressed", {})
    found = {**dense, **compressed}
    names = [*_FIGURES, *sorted(found.keys() - _FIGURES.keys())]
    rows = [
        [
            _FIGURES.get(name, f"`{name}`"),
            _number(name, dense.get(name, "")),
            _number(name, compressed.get(name, "")),
        ]
        for name in names
        if name in found
    ]
    return _table(["", "Dense", "Compressed"], rows)


def _sizes(sizes: Mapping[str, Mapping[str, int]], target: str) -> str:
    """Tell the size in every target: in some a policy costs more than in others."""
    rows = [
        [
            f"`{name}`{' (this folder)' if name == target else ''}",
            _number("size_bytes", size["dense"]),
            _number("size_bytes", size["compressed"]),
            f"{size['dense'] / size['compressed']:.3f}",
        ]
        for name, size in sizes.items()
    ]
    return _table(["Weight file in target", "Dense", "Compressed", "Ratio"], rows)


def _rivals(rivals: Sequence[Mapping[str, Any]]) -> str:
    """List the plain policies at equal bytes, also where they win."""
    if not rivals:
        return ""
    names = [name for name in ("kl", "perplexity", "size_bytes") if name in rivals[0]]
    rows = [
        [rival["name"], *(_number(name, rival.get(name, "")) for name in names)]
        for rival in rivals
    ]
    table = _table(["Rival", *(_FIGURES[name] for name in names)], rows)
    return f"Plain policies of equal size, on the same tokens:\n\n{table}"


def _verified(verified: Mapping[str, Any] | None) -> str:
    if not verified:
        return ""
    apart = verified.get("logits")
    layers = (
        f", {verified['layers']} layers to the bit" if verified.get("layers") else ""
    )
    logits = "" if apart is None else f", log-probabilities within {apart:.2g} nats"
    return (
        "The folder was loaded again in a fresh process: perplexity "
        f"{_number('perplexity', verified['perplexity'])} (measured before: "
        f"{_number('perplexity', verified['expected_perplexity'])})"
        f"{layers}{logits}, {verified['size_bytes']} bytes of weights, as predicted."
    )


def _load(about: Mapping[str, Any]) -> str:
    runtimes = about.get("loads_in")
    where = f"What loads it: {runtimes}." if runtimes else ""
    return "\n\n".join(
        part
        for part in (
            f"```\n{about['usage']}\n```" if "usage" in about else "",
            where,
            "`autoprune verify FOLDER` checks every file, every layer and the outputs "
            "against `MANIFEST.json`.",
        )
        if part
    )


def _number(name: str, value: Any) -> str:
    if value == "":
        return ""
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if name == "size_bytes" else f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
