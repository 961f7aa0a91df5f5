import resource
import subprocess
import sys

import pytest

from autoprune.errors import ConfigError
from autoprune.searching.memory_limit import held_memory, share_of

HOLDS = """
from autoprune.searching.memory_limit import held_memory
import torch
with held_memory(500e6):
    try:
        torch.ones(200_000_000)
    except RuntimeError as error:
        print("refused", "allocate" in str(error))
print(len(torch.ones(200_000_000)))
"""


def test_memory_is_shared_out_among_workers_and_their_driver():
    assert share_of(1e12, 3) == 25e10


def test_workers_that_do_not_fit_are_refused_with_how_many_do():
    mine = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = "9 workers and this process take about .* GB each.*at most 2 fit"
    with pytest.raises(ConfigError, match=message):
        share_of(3.5 * mine, 9)
    with pytest.raises(ConfigError, match="none fits beside this process"):
        share_of(1e6, 1)


def test_what_asks_for_more_fails_and_later_does_not():
    found = subprocess.run(
        [sys.executable, "-c", HOLDS], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["refused", "True", "200000000"]


def test_without_a_limit_nothing_changes():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with held_memory(None):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
