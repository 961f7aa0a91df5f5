"""All that it takes to measure a policy: model, tokens, variants, metrics."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.storage import Part, Storage, untouched_parts
from autoprune.compression.store import VariantStore, cap_bytes
from autoprune.config import TextConfig
from autoprune.errors import ConfigError, unknown_name
from autoprune.evaluation.metric import Evidence, Measured, Metric, Scene, metrics_of
from autoprune.evaluation.precision import choose_compute_dtype
from autoprune.evaluation.quality import Quality
from autoprune.evaluation.teacher import Teacher
from autoprune.evaluation.teacher_cache import TeacherCache
from autoprune.exporting.exporter import Exporter, ExportJob
from autoprune.exporting.sharded import sharded
from autoprune.models.checkpoints import Checkpoint, cache_dir, load_model, resolve
from autoprune.models.feeding import fed
from autoprune.models.gradients import TaskLoss
from autoprune.models.layers import Inventory, inventory
from autoprune.models.prefix import Prefix
from autoprune.models.recovery_text import with_recovery
from autoprune.models.task import Task, output_layer
from autoprune.models.text import TokenWindows
from autoprune.plugins import Plugins
from autoprune.policy import Action, Layer, Policy
from autoprune.training.recovery import RecoveryMethod
from autoprune.training.schedule import Schedule


@dataclass(eq=False)
class Workbench:
    """A model ready to be compressed and measured.

    Attributes:
        checkpoint: Where the model comes from.
        task: What it is for.
        tokenizer: Its tokenizer.
        inventory: Its blocks, layers and sites.
        stitched: The model; what is on it changes.
        actions: What actions mean.
        exporter: The export target, which decides size.
        exporters: All targets, by name.
        metrics: All metrics, by name.
        splits: Token windows of the splits, by name.
        store: Where variants are kept.
        untouched: Tensors of a plain checkpoint that belong to no layer.
        schedules, recoveries: All of them, by name.
    """

    checkpoint: Checkpoint
    task: Task
    tokenizer: Any
    inventory: Inventory
    stitched: StitchedModel
    actions: Actions
    exporter: Exporter
    exporters: Mapping[str, Exporter]
    metrics: Mapping[str, Metric]
    splits: Mapping[str, TokenWindows]
    store: VariantStore
    untouched: Mapping[str, Part]
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    recoveries: Mapping[str, RecoveryMethod] = field(default_factory=dict)
    _teachers: dict[str, Teacher] = field(default_factory=dict)
    _storages: dict[tuple[Layer, Action], Storage] = field(default_factory=dict)
    _scenes: dict[str | None, Scene] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        plugins: Plugins,
        *,
        model: str,
        task: str,
        text: TextConfig,
        target: str,
        seed: int,
        fuse: bool = True,
        tensor_parallel: int = 1,
        cache: Path | None = None,
    ) -> "Workbench":
        """Load a model and its text.

        Args:
            plugins: Where task, methods, metrics, text and target are looked up.
            model: Folder, hub id, GGUF file or ``demo``.
            task: Name of the task.
            text: Source, window length and windows a split.
            target: Name of the export target.
            seed: Decides which documents go to which split.
            fuse: Layers that runtimes fuse make one site.
            tensor_parallel: GPUs that have to share every layer of an export.
            cache: Folder for models, variants and verdicts; the user's by default.

        Raises:
            PluginError: If a name is unknown.
            ModelError: If the model cannot be loaded.
            TextError: If the text is too short.
        """
        cache = cache or cache_dir()
        kind: Task = plugins.get("tasks", task)
        plugins.get("exporters", target)  # a wrong name is told before a model is read
        checkpoint = resolve(model, cache=cache)
        tokenizer = kind.load_tokenizer(checkpoint)
        splits = kind.load_splits(
            text.source,
            plugins.objects["text_sources"],
            tokenizer,
            length=text.window,
            windows=text.windows,
            seed=seed,
        )
        splits = with_recovery(splits, text.statistics) if text.recovery else splits
        loaded = load_model(checkpoint, kind.auto_class)
        found = inventory(loaded, list(plugins.objects["architectures"].values()))
        found = found if fuse else found.unfused()
        found = fed(loaded, found, kind.feed(tokenizer), splits["statistics"].ids[:1])
        untouched = untouched_parts(loaded, found)  # in the types that are stored
        targets: Mapping[str, Exporter] = plugins.objects["exporters"]
        exporters = sharded(targets, loaded, found, tensor_parallel)
        dtype = choose_compute_dtype(
            kind,
            loaded,
            splits["statistics"],
            tokenizer=tokenizer,
            cache=cache,
            revision=checkpoint.revision,
        )
        return cls(
            checkpoint,
            kind,
            tokenizer,
            found,
            StitchedModel(loaded, found.layers, compute_dtype=dtype),
            Actions(plugins.methods),
            exporters[target],
            exporters,
            metrics_of(kind.name, plugins.objects["metrics"]),
            splits,
            VariantStore(cache / "variants", cap_bytes()),
            untouched,
            plugins.objects["schedules"],
            plugins.objects["recoveries"],
        )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers."""
        return self.inventory.layers

    def per_layer(self, policy: Policy) -> dict[Layer, Action]:
        """Tell the action of every layer; sites that a policy lacks are an error."""
        return policy.per_layer(self.inventory.sites_for(policy))

    def storages(self, policy: Policy) -> dict[Layer, Storage]:
        """Declare what every layer stores under a policy; see ``measure``."""
        pairs = self.per_layer(policy).items()
        for pair in pairs:
            if pair not in self._storages:
                self._storages[pair] = self.actions.storage(*pair)
        return {pair[0]: self._storages[pair] for pair in pairs}

    def bank(self, reference: Policy | None = None) -> VariantBank:
        """Open the bank of variants on a reference policy's inputs, or dense ones."""
        return VariantBank(
            self.stitched,
            self.inventory,
            self.actions,
            self.store,
            self.splits["statistics"],
            self.checkpoint.revision,
            self.per_layer(reference) if reference else {},
            loss=TaskLoss(self.task, self.tokenizer),
        )

    def teacher(self, split: str) -> Teacher:
        """Give the dense model's answers on a split, computed when first asked for."""
        if split not in self._teachers:
            self.stitched.restore()
            self._teachers[split] = Teacher(
                self.task,
                self.stitched.model,
                self.splits[split],
                tokenizer=self.tokenizer,
                cache=TeacherCache.beside(self.store, self.checkpoint.revision),
            )
        return self._teachers[split]

    def scene(self, split: str | None = None) -> Scene:
        """Give what stays the same in all measurements on a split."""
        if split not in self._scenes:
            head = output_layer(self.stitched.model).weight.numel()
            if self.inventory.tied and any(la.input is None for la in self.layers):
                head = 0  # the embedding is the head, and one of the layers
            dense = self.teacher(split).dense if split else None
            self._scenes[split] = Scene(
                self.layers, self.untouched, self.exporter, head, dense
            )
        return self._scenes[split]

    def metric(self, name: str) -> Metric:
        """Look up a metric; ConfigError, with near misses, if there is none."""
        if name not in self.metrics:
            raise ConfigError(unknown_name("metric", name, self.metrics))
        return self.metrics[name]

    def measure(
        self,
        policy: Policy,
        bank: VariantBank,
        split: str,
        *,
        metrics: Sequence[str] | None = None,
        windows: int | None = None,
        known: Quality | None = None,
        prefix: Prefix | None = None,
    ) -> Measured:
        """Put a policy on the model and measure it.

        Args:
            policy: The policy.
            bank: Whose variants to use.
            split: Name of the split.
            metrics: Names; all by default. Where none of them needs the model, no
                variant is made and the model stays as it is.
            windows: How many windows of the split, from the first; None for all.
            known: What the policy scored on the first of them before.
            prefix: What another policy of the bank has left behind its blocks: those
                before the first one that differs are not run again.

        Raises:
            PolicyError: If the policy does not fit the model.
            MethodError: If a step refuses a layer.
            ConfigError: If a metric is unknown; lists near misses.
        """
        bank.check_schedule(policy)
        names = self.metrics if metrics is None else metrics
        wanted = [self.metric(name) for name in names]
        needs_model = any(metric.needs_model for metric in wanted)
        scene = self.scene(split if needs_model else None)
        start = put = time.perf_counter()
        evidence = Evidence(scene, self.storages(policy))
        if needs_model:
            actions = self.per_layer(policy)
            bank.put(actions)
            put = time.perf_counter()
            teacher, model = self.teacher(split), self.stitched.model
            unchanged = prefix.follow(actions) if prefix else 0
            quality = teacher.measure_first(
                model, windows, known, prefix=prefix, unchanged=unchanged
            )
            evidence = replace(
                evidence,
                scene=replace(scene, dense=teacher.dense.first(len(quality.kl))),
                quality=quality,
                model=model,
                tokenizer=self.tokenizer,
                ids=self.splits[split].ids[: len(quality.kl)],
                task=self.task,
            )
        run = time.perf_counter()
        values = {metric.name: metric.measure(evidence) for metric in wanted}
        timings = {"put_s": put - start, "run_s": run - put}
        return Measured(values, evidence.quality, timings)

    def dense_metrics(self, split: str) -> dict[str, float]:
        """Measure the dense model, in the same export target."""
        dense, known = self.dense_policy(), self.teacher(split).dense
        return self.measure(dense, self.bank(), split, known=known).metrics

    def dense_policy(self) -> Policy:
        """Give the policy that leaves every site as it is."""
        return Policy.uniform(self.inventory.sites, Action())

    def job(self, policy: Policy, bank: VariantBank) -> ExportJob:
        """Describe the export of a policy."""
        bank.check_schedule(policy)
        actions = self.per_layer(policy)
        return ExportJob(
            self.checkpoint,
            self.task.auto_class,
            self.inventory,
            self.storages(policy),
            lambda layer: bank.get(layer, actions[layer]),
            actions,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        return self.stitched.dtype
