"""A trial's parameters set at once: as if they had been suggested one by one."""

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError

from autoprune.searching.books import Books

DISTRIBUTIONS = {
    name: optuna.distributions.CategoricalDistribution(["low", "middle", "high"])
    for name in ("one", "two", "three")
}
CHOSEN = {"one": "high", "two": "low", "three": "middle"}


def study_in(storage):
    return optuna.create_study(storage=storage, directions=["minimize"])


def test_as_if_suggested_one_by_one():
    theirs = study_in(optuna.storages.InMemoryStorage())
    theirs.enqueue_trial(CHOSEN)
    one = theirs.ask(DISTRIBUTIONS)
    theirs.tell(one, 1.0)
    storage = Books()
    ours = study_in(storage)
    other = ours.ask()
    storage.set_trial_params(other._trial_id, CHOSEN, DISTRIBUTIONS)
    ours.tell(other.number, 1.0)
    (suggested,), (at_once,) = theirs.trials, ours.trials
    assert at_once.params == suggested.params == CHOSEN
    assert list(at_once.params) == list(suggested.params)
    assert at_once.distributions == suggested.distributions
    assert ours.best_params == CHOSEN
    assert optuna.search_space.intersection_search_space(ours.trials) == DISTRIBUTIONS


def test_a_finished_trial_is_left_alone():
    storage = Books()
    study = study_in(storage)
    asked = study.ask()
    study.tell(asked.number, 1.0)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_params(asked._trial_id, CHOSEN, DISTRIBUTIONS)
