"""The mark by which workers elsewhere know that they see the store of a run."""

import os
import re
import shutil
import time

import pytest
import torch

from autoprune.compression.files import TensorFiles
from autoprune.errors import RunError, StoreError
from autoprune.searching.store_mark import StoreMark


def test_store_that_has_the_mark_passes(tmp_path):
    mark = StoreMark.make(tmp_path)
    mark.put()
    mark.check(tmp_path)
    mark.remove()
    mark.remove()
    assert list(tmp_path.iterdir()) == []


def test_other_store_is_refused_by_name_and_a_copy_from_before_too(tmp_path):
    shared, other = tmp_path / "shared", tmp_path / "other"
    first = StoreMark.make(shared)
    first.put()
    shutil.copytree(shared, other)
    mark = StoreMark.make(shared)
    mark.put()
    why = f"does not see the run's store {shared}, its own is {other}"
    with pytest.raises(RunError, match=f"{re.escape(why)}.*Set AUTOPRUNE_CACHE"):
        mark.check(other)


def test_mark_comes_back_into_a_store_that_was_deleted(tmp_path):
    store = tmp_path / "store"
    mark = StoreMark.make(store)
    mark.put()
    shutil.rmtree(store)
    mark.put()
    mark.check(store)


def test_mark_that_a_killed_run_left_goes_with_the_next_one(tmp_path):
    old, young = StoreMark.make(tmp_path), StoreMark.make(tmp_path)
    old.put()
    young.put()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / old.name, (two_days_ago, two_days_ago))
    StoreMark.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [young.name]


def test_mark_neither_counts_nor_is_evicted(tmp_path):
    files = TensorFiles(tmp_path, 10**6, what="variant")
    mark = StoreMark.make(tmp_path)
    mark.put()
    files.write("a" * 64, {"values": torch.ones(8)})
    files.cap_bytes = 1
    files.shrink()
    mark.check(tmp_path)
    assert list(tmp_path.glob("*/*")) == []


def test_store_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot mark the store .*file/store for"):
        StoreMark.make(tmp_path / "file" / "store").put()
