"""The words of GPTQModel and ModelOpt for a policy.

What they read was looked up in their released sources (GPTQModel 7.7.0, ModelOpt
0.47.0); the files were accepted by these versions.
"""

import json
import re
from collections import Counter
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


class GPTQModel(RecipeTool):
    """GPTQModel: a ``QuantizeConfig`` whose map ``dynamic`` has a rule for each layer.

    Rules are regular expressions of whole names; ``-:`` before one leaves a layer as it
    is. It only rounds, to whole numbers, with GPTQ.
    """

    name = "GPTQModel"
    file = "gptqmodel_dynamic.json"

    def own(self, method: str) -> Collection[str]:
        """Give its name for a method: GPTQ is all it does here."""
        return {"gptq"} if method == "gptq" else ()

    def translate(
        self, treatment: Treatment, shape: tuple[int, int]
    ) -> Treatment | str:
        """Give whole numbers, rounded by GPTQ, or say what else a layer asks for."""
        if treatment.pruner is not None:
            return f"{self.name} does not prune, and would fill the zeros again"
        bits, group = treatment.bits or 0, treatment.group
        if treatment.code != "int" or not 2 <= bits <= 8:
            return f"{self.name} has whole numbers of 2 to 8 bits, no {treatment.code}"
        if group is not None and shape[1] % group:
            return f"{shape[1]} inputs are no multiple of groups of {group}"
        return replace(treatment, quantizer="gptq")

    def text(self, planned: Mapping[str, Treatment], modules: Modules) -> str:
        """Write the map; layers that are left out come first, as it sorts them."""
        left = [name for name in modules.shapes if name not in planned]
        rules: dict[str, Any] = {f"-:{_pattern(name)}": {} for name in left}
        for name, treatment in planned.items():
            rules[f"+:{_pattern(name)}"] = _rule(treatment)
        common = Counter(json.dumps(_rule(one)) for one in planned.values())
        base = common.most_common(1)[0][0] if common else json.dumps(_rule(_DEFAULT))
        data = {**json.loads(base), "dynamic": rules}
        return json.dumps(data, indent=1) + "\n"

    def parse(self, text: str) -> Treatments:
        """Read the map again."""
        found: Treatments = {}
        for pattern, rule in json.loads(text)["dynamic"].items():
            if pattern.startswith("+:"):
                group = rule["group_size"]
                found[_name(pattern[2:])] = Treatment(
                    quantizer="gptq",
                    bits=rule["bits"],
                    group=None if group == -1 else group,
                    symmetric=rule["sym"],
                )
        return found


_DEFAULT = Treatment(bits=4, group=128)


def _rule(treatment: Treatment) -> dict[str, Any]:
    return {
        "bits": treatment.bits,
        "group_size": treatment.group or -1,
        "sym": treatment.symmetric,
    }


def _pattern(name: str) -> str:
    return f"^{re.escape(name)}$"


def _name(pattern: str) -> str:
    return re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))


_E4M3, _E2M1, _E8M0 = [4, 3], [2, 1], [8, 0]
"""Bits of exponent and mantissa, which is how it spells small floats."""

_FLOATS: dict[str, dict[str, Any]] = {
    "fp8_e4m3": {"num_bits": _E4M3},
    "fp8_e4m3_tensor": {"num_bits": _E4M3, "axis": None},
    "nvfp4": {
        "num_bits": _E2M1,
        "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": _E4M3},
    },
    "mxfp4": {
        "num_bits": _E2M1,
        "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": _E8M0},
    },
}
"""What ModelOpt calls number formats; where nothing more is said, by row or group."""

_SPARSE = {"sparsegpt": "sparsegpt", "magnitude": "sparse_magnitude"}
_CALIBRATION = {
    "awq": "awq_lite",
    "gptq": "gptq",
    **dict.fromkeys(("fp8", "int8_dynamic", "mxfp4", "nvfp4", "rtn"), "max"),
}
_QUANTIZER = ".weight_quantizer"


class ModelOpt(RecipeTool):
    """NVIDIA ModelOpt: arguments of ``mts.sparsify`` and of ``mtq.quantize``.

    Its file is YAML, because JSON has no numbers as keys, which ``block_sizes`` needs.
    It has one algorithm for all layers, either way, and prunes 2:4 only.
    """

    name = "ModelOpt"
    file = "modelopt_config.yaml"

    def own(self, method: str) -> Collection[str]:
        """Give its names for a method."""
        return {_SPARSE.get(method, ""), _CALIBRATION.get(method, "")}

    def plan(
        self, treatments: Mapping[str, Treatment], modules: Modules
    ) -> tuple[Treatments, LeftOut]:
        """Tell each layer in its words; what most layers ask for is done to all."""
        planned, left = super().plan(treatments, modules)
        pruner = _most(one.pruner for one in planned.values())
        quantizer = _most(one.quantizer for one in planned.values())
        if quantizer == "gptq" and any(one.pruner for one in planned.values()):
            quantizer = "max"  # GPTQ would fill zeros again
        common = {
            name: replace(
                one,
                pruner=one.pruner and pruner,
                quantizer=one.quantizer and quantizer,
            )
            for name, one in planned.items()
        }
        return common, left

    def translate(
        self, treatment: Treatment, shape: tuple[int, int]
    ) -> Treatment | str:
        """Give its algorithms and formats, or say what it lacks."""
        pruner, quantizer = treatment.pruner, treatment.quantizer
        if pruner is not None:
            if treatment.pattern != "2:4":
                kind = treatment.pattern or "unstructured zeros"
                return f"{self.name} prunes 2:4 only, no {kind}"
            if shape[0] % 8 or shape[1] % 16:
                return f"{self.name} prunes multiples of 8 x 16 only, not {shape}"
            pruner = _SPARSE.get(pruner, "sparsegpt")
        if quantizer is not None:
            whole = treatment.code in ("int", "int_tensor")
            if not whole and treatment.code not in _FLOATS:
                return f"{self.name} has no {treatment.code}"
            if not treatment.symmetric:
                return f"{self.name} rounds weights without zero points"
            if treatment.group is not None and shape[1] % treatment.group:
                return f"{shape[1]} inputs are no multiple of {treatment.group}"
            quantizer = _CALIBRATION.get(quantizer, "max")
        return replace(treatment, pruner=pruner, quantizer=quantizer)

    def text(self, planned: Mapping[str, Treatment], modules: Modules) -> str:
        """Write both arguments."""
        pruned = [name for name, one in planned.items() if one.pruner]
        rounded = {name: one for name, one in planned.items() if one.quantizer}
        data: dict[str, Any] = {}
        if pruned:
            rules: dict[str, Any] = {"*": None, **{name: {} for name in pruned}}
            mode = planned[pruned[0]].pruner
            data["sparsify"] = {"mode": [[mode, {"nn.Linear": rules}]]}
            data["sparsify"]["pattern"] = "2:4 sparsity"
        if rounded:
            entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
            for name, one in rounded.items():
                entry = {"quantizer_name": f"{name}{_QUANTIZER}", "cfg": _numerics(one)}
                entries.append(entry)
            method = next(iter(rounded.values())).quantizer
            data["quantize"] = {"quant_cfg": entries, "algorithm": method}
        return yaml.dump(data, Dumper=_Plain, sort_keys=False)

    def parse(self, text: str) -> Treatments:
        """Read both arguments again."""
        data = yaml.safe_load(text) or {}
        found: Treatments = {}
        if "sparsify" in data:
            mode, rules = data["sparsify"]["mode"][0]
            for name, rule in rules["nn.Linear"].items():
                if rule is not None:
                    found[name] = Treatment(mode, 0.5, "2:4")
        for entry in data.get("quantize", {}).get("quant_cfg", ()):
            if "cfg" in entry:
                name = entry["quantizer_name"].removesuffix(_QUANTIZER)
                method = data["quantize"]["algorithm"]
                told = _told(entry["cfg"], found.get(name, Treatment()))
                found[name] = replace(told, quantizer=method)
        return found


class _Plain(yaml.SafeDumper):
    """Writes what comes twice twice, and not as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        """Tell that nothing is an alias."""
        return True


def _most(names: Any) -> str | None:
    """Give the name that comes most often, of those that are there."""
    counts = Counter(name for name in names if name)
    return counts.most_common(1)[0][0] if counts else None


def _numerics(treatment: Treatment) -> dict[str, Any]:
    """Tell what codes mean, and which weights share a scale."""
    if treatment.code == "int_tensor":
        return {"num_bits": treatment.bits, "axis": None}
    known = _FLOATS.get(treatment.code, {"num_bits": treatment.bits})
    if len(known) > 1:
        return known
    if treatment.group is None:
        return {**known, "axis": 0}
    return {**known, "block_sizes": {-1: treatment.group, "type": "static"}}


def _told(numerics: Mapping[str, Any], base: Treatment) -> Treatment:
    """Read what codes mean again."""
    bits, sizes = numerics["num_bits"], numerics.get("block_sizes", {})
    group = sizes.get(-1)
    whole = isinstance(bits, int)
    if "axis" in numerics and numerics["axis"] is None:
        code = "int_tensor" if whole else "fp8_e4m3_tensor"
    elif whole or bits == _E4M3:
        code = "int" if whole else "fp8_e4m3"
    else:
        code = "nvfp4" if sizes["scale_bits"] == _E4M3 else "mxfp4"
    count = bits if whole else 1 + sum(bits)
    return replace(base, bits=count, group=group, code=code)
