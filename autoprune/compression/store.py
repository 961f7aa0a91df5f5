"""Variants on disk: what of them does not follow from the dense weight."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path

from torch import Tensor

from autoprune.compression.derived import Derived, derived_from, with_derived
from autoprune.compression.files import TensorFiles
from autoprune.compression.memory import WeightMemory, memory_bytes
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import StoreError

DEFAULT_CAP_GB = 20.0
"""Most gigabytes of variants that the cache keeps, unless the user says otherwise."""


def cap_bytes() -> int:
    """Read the store's cap from ``AUTOPRUNE_STORE_GB``.

    Raises:
        StoreError: If it is no positive number.
    """
    text = os.environ.get("AUTOPRUNE_STORE_GB", str(DEFAULT_CAP_GB))
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < math.inf:
        raise StoreError(
            f"AUTOPRUNE_STORE_GB must be a positive number of gigabytes, found {text!r}"
        )
    return int(gigabytes * 1e9)


class VariantStore:
    """A folder of variants, safe for several processes; see ``TensorFiles``.

    Values and codes that follow from the layer's dense weight are not stored; see
    ``derived``.

    Args:
        folder: Where the files are; made if absent.
        cap_bytes: Most bytes that the files may take.

    Attributes:
        files: The files.
        memory: Unpacked weights that are held beside the files.

    Raises:
        StoreError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        self.files = TensorFiles(folder, cap_bytes, what="variant")
        self.memory = WeightMemory(memory_bytes())

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.files.folder

    @property
    def cap_bytes(self) -> int:
        """Most bytes that the files may take."""
        return self.files.cap_bytes

    @cap_bytes.setter
    def cap_bytes(self, cap_bytes: int) -> None:
        self.files.cap_bytes = cap_bytes

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def share_weights(self) -> None:
        """Hold unpacked weights in files from now on, one time for all processes.

        Worth it where several processes evaluate on one machine. The folder ``weights``
        beside this one then takes as much disk as the weights would take memory.

        Raises:
            StoreError: If the folder cannot be made.
        """
        cap = memory_bytes()
        files = TensorFiles(self.folder.parent / "weights", cap, what="weight")
        self.memory = WeightMemory(cap, files)

    def get(
        self, key: str, dense: Callable[[], Tensor] | None = None
    ) -> Variant | None:
        """Read a variant, or None if it is absent or was damaged.

        Args:
            key: Its content key.
            dense: Gives the layer's dense weight, if the variant was put with it.

        Raises:
            StoreError: If a file that is there cannot be read.
        """
        content = self.files.read(key)
        if content is None:
            return None
        fields = json.loads(content.facts)
        lacks = fields.pop("derived", None)
        storage = Storage(**fields | {"shape": tuple(fields["shape"])})
        variant = Variant.unpack(storage, content.tensors)
        return (
            self._complete(key, variant, Derived(*lacks), dense) if lacks else variant
        )

    def _complete(
        self,
        key: str,
        variant: Variant,
        derived: Derived,
        dense: Callable[[], Tensor] | None,
    ) -> Variant | None:
        if dense is None:
            raise StoreError(
                f"the variant {self.files.path(key)} is stored without what follows "
                "from its layer's dense weight. Give that weight to read it"
            )
        found = with_derived(variant, derived, dense())
        if found is None:
            self.files.discard(key, "it does not fit the dense weight")
        return found

    def put(
        self,
        key: str,
        variant: Variant,
        *,
        about: str = "",
        dense: Tensor | None = None,
    ) -> None:
        """Write a variant.

        Args:
            key: Its content key.
            variant: The variant.
            about: What it is, for people who open the file.
            dense: The layer's dense weight in its own type; None to store all parts.

        Raises:
            StoreError: If the disk is full or the folder cannot be written.
        """
        parts, facts = variant.pack(), asdict(variant.storage)
        derived = None if dense is None else derived_from(variant, dense)
        if derived is not None:
            del parts[derived.name]
            facts["derived"] = astuple(derived)
        self.files.write(key, parts, facts=json.dumps(facts), about=about)

    def shrink(self) -> int:
        """Hold the cap; see ``TensorFiles.shrink``."""
        return self.files.shrink()
