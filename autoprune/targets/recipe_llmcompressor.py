"""The words of llm-compressor for a policy: a recipe of modifiers.

What it reads was looked up in its released sources (llm-compressor 0.14.0.1, with
compressed-tensors 0.19.0), which also accepted and ran the recipes.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import yaml

from autoprune.targets.recipes import (
    LeftOut,
    Modules,
    RecipeTool,
    Treatment,
    Treatments,
)

_GPTQ, _ROUND = "GPTQModifier", "QuantizationModifier"
_AWQ = "AWQModifier"
_SPARSEGPT, _WANDA = "SparseGPTModifier", "WandaPruningModifier"

_PRUNERS = {"sparsegpt": _SPARSEGPT, "wanda": _WANDA}
_QUANTIZERS = {
    "awq": _AWQ,
    "gptq": _GPTQ,
    **dict.fromkeys(("fp8", "int8_dynamic", "mxfp4", "nvfp4", "rtn"), _ROUND),
}

_FLOATS: dict[str, dict[str, Any]] = {
    "fp8_e4m3": {"num_bits": 8},
    "fp8_e4m3_tensor": {"num_bits": 8, "strategy": "tensor"},
    "nvfp4": {
        "num_bits": 4,
        "strategy": "tensor_group",
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    },
    "mxfp4": {
        "num_bits": 4,
        "strategy": "group",
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    },
}


_FUSED = (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"))
"""Layers of one module that have to be in NVFP4 all together, or not at all."""


class LLMCompressor(RecipeTool):
    """llm-compressor: a stage of modifiers, each with the layers that it is for.

    Modifiers that prune come first, one for each sparsity and pattern; then those that
    round, one for each algorithm, with a group of layers for each format. Layers are
    named one by one. The recipe is for ``oneshot``.

    Two of its modifiers do less than their names say (both tried): what
    ``MagnitudePruningModifier`` removes comes back when ``oneshot`` ends, and
    ``GPTQModifier`` fills zeros again. So Wanda's stands in for the first, and for the
    second, where a layer is pruned, the one that rounds to the nearest.
    """

    name = "llm-compressor"
    file = "recipe.yaml"

    def own(self, method: str) -> Collection[str]:
        """Give its names for a method."""
        return {_PRUNERS.get(method, ""), _QUANTIZERS.get(method, "")}

    def plan(
        self, treatments: Mapping[str, Treatment], modules: Modules
    ) -> tuple[Treatments, LeftOut]:
        """Tell each layer in its words; layers that it fuses share NVFP4.

        AWQ scales what several layers read: where not all of them ask for it, those
        that do are rounded without.
        """
        planned, left = super().plan(treatments, modules)
        fine = {name for name, one in planned.items() if one.code == "nvfp4"}
        for name in sorted(fine):
            stem, _, last = name.rpartition(".")
            group = next((one for one in _FUSED if last in one), ())
            beside = {f"{stem}.{one}" for one in group} & modules.shapes.keys()
            if not beside <= fine:
                del planned[name]
                left[name] = (
                    f"{self.name} wants all of {', '.join(group)} in NVFP4, or none"
                )
        smooth = {name for _, names in _smoothed(planned, modules) for name in names}
        for name, one in planned.items():
            if one.quantizer == _AWQ and name not in smooth:
                planned[name] = replace(one, quantizer=_ROUND)
        return planned, left

    def translate(
        self, treatment: Treatment, shape: tuple[int, int]
    ) -> Treatment | str:
        """Give its modifiers, or say what it lacks."""
        pruner, quantizer = treatment.pruner, treatment.quantizer
        if pruner is not None:
            other = _WANDA if pruner == "magnitude" else _SPARSEGPT
            pruner = _PRUNERS.get(pruner, other)
        if quantizer is not None:
            whole = treatment.code in ("int", "int_tensor")
            if not whole and treatment.code not in _FLOATS:
                return f"{self.name} has no {treatment.code}"
            if treatment.group is not None and shape[1] % treatment.group:
                return f"{shape[1]} inputs are no multiple of {treatment.group}"
            quantizer = _QUANTIZERS.get(quantizer, _GPTQ if whole else _ROUND)
            if pruner is not None and quantizer == _GPTQ:
                quantizer = _ROUND
        return replace(treatment, pruner=pruner, quantizer=quantizer)

    def text(self, planned: Mapping[str, Treatment], modules: Modules) -> str:
        """Write the recipe."""
        groups: dict[str, Any] = {}
        for key, names in _together(planned, _pruning).items():
            modifier, arguments = _pruning_modifier(planned[names[0]])
            name = f"{key}_modifiers"
            groups[name] = {modifier: {**arguments, "targets": names}}
        for modifier in (_AWQ, _GPTQ, _ROUND):
            mine = {n: one for n, one in planned.items() if one.quantizer == modifier}
            if mine:
                groups |= _rounding_modifiers(modifier, mine, modules)
        return yaml.safe_dump({"autoprune_stage": groups}, sort_keys=False)

    def parse(self, text: str) -> Treatments:
        """Read the recipe again."""
        found: Treatments = {}
        for group, modifiers in yaml.safe_load(text)["autoprune_stage"].items():
            awq = _AWQ in modifiers or group.startswith("awq")
            for modifier, arguments in modifiers.items():
                for name in arguments.get("targets", ()):
                    found[name] = _read_pruning(modifier, arguments)
                for scheme in arguments.get("config_groups", {}).values():
                    for name in scheme["targets"]:
                        base = found.get(name, Treatment())
                        own = _AWQ if awq else modifier
                        told = _read_weights(scheme["weights"], base)
                        found[name] = replace(told, quantizer=own)
        return found


def _together(planned: Mapping[str, Treatment], key: Any) -> dict[str, list[str]]:
    """Bring layers of one treatment together, in order."""
    found: dict[str, list[str]] = {}
    for name, treatment in planned.items():
        if (word := key(treatment)) is not None:
            found.setdefault(word, []).append(name)
    return found


def _pruning(treatment: Treatment) -> str | None:
    """Name what a modifier that prunes is for; None if nothing is pruned."""
    if treatment.pruner is None:
        return None
    what = (treatment.pattern or f"{treatment.sparsity}").replace(":", "_of_")
    return f"{treatment.pruner.removesuffix('Modifier').lower()}_{what}"


def _pruning_modifier(treatment: Treatment) -> tuple[str, dict[str, Any]]:
    assert treatment.pruner is not None
    structure = "0:0"
    if treatment.pattern:  # there N of M are removed, not kept
        keep, of = map(int, treatment.pattern.split(":"))
        structure = f"{of - keep}:{of}"
    return treatment.pruner, {
        "sparsity": treatment.sparsity,
        "mask_structure": structure,
    }


def _read_pruning(modifier: str, arguments: Mapping[str, Any]) -> Treatment:
    gone, of = map(int, arguments["mask_structure"].split(":"))
    pattern = f"{of - gone}:{of}" if of else None
    return Treatment(modifier, arguments["sparsity"], pattern)


def _smoothed(
    planned: Mapping[str, Treatment], modules: Modules
) -> list[tuple[str, tuple[str, ...]]]:
    """Give what AWQ scales: outputs that only layers read which ask for it."""
    awq = {name for name, one in planned.items() if one.quantizer == _AWQ}
    return [pair for pair in modules.smoothed if awq.issuperset(pair[1])]


def _rounding_modifiers(
    modifier: str, mine: Mapping[str, Treatment], modules: Modules
) -> dict[str, Any]:
    """Give the modifiers that round some layers; AWQ needs another one behind it."""
    schemes: dict[str, Any] = {}
    for index, names in enumerate(_together(mine, _scheme).values()):
        weights = _weights(mine[names[0]])
        schemes[f"group_{index}"] = {"targets": names, "weights": weights}
    groups: dict[str, Any] = {}
    if modifier == _AWQ:
        mappings = [
            {"smooth_layer": maker, "balance_layers": list(takers)}
            for maker, takers in _smoothed(mine, modules)
        ]
        scales, rounds = {"mappings": mappings}, {"config_groups": schemes}
        groups["awq_modifiers"] = {_AWQ: scales, _ROUND: rounds}
    else:
        key = modifier.removesuffix("Modifier").lower()
        groups[f"{key}_modifiers"] = {modifier: {"config_groups": schemes}}
    return groups


def _scheme(treatment: Treatment) -> str:
    return str(_weights(treatment))


def _weights(treatment: Treatment) -> dict[str, Any]:
    """Give a scheme's arguments for weights."""
    whole = treatment.code in ("int", "int_tensor")
    known = _FLOATS.get(treatment.code, {"num_bits": treatment.bits})
    strategy = "channel" if treatment.group is None else "group"
    if treatment.code == "int_tensor":
        strategy = "tensor"
    found = {
        "strategy": strategy,
        "type": "int" if whole else "float",
        "symmetric": treatment.symmetric,
        "dynamic": False,
        **known,
    }
    return (
        found if treatment.group is None else {**found, "group_size": treatment.group}
    )


def _read_weights(weights: Mapping[str, Any], base: Treatment) -> Treatment:
    """Read a scheme's arguments for weights again."""
    kind, strategy = weights["type"], weights["strategy"]
    if kind == "int":
        code = "int_tensor" if strategy == "tensor" else "int"
    elif weights["num_bits"] == 8:
        code = "fp8_e4m3_tensor" if strategy == "tensor" else "fp8_e4m3"
    else:
        code = "nvfp4" if strategy == "tensor_group" else "mxfp4"
    return replace(
        base,
        bits=weights["num_bits"],
        group=weights.get("group_size"),
        symmetric=weights["symmetric"],
        code=code,
    )
