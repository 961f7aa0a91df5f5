"""Evaluators that compute instead of measuring: for the search without a model."""

import numpy as np

from autoprune.searching.crew import Crew, Outcome
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.trial import Evaluator, Score

WINDOW = 512
"""Tokens of a window of ``SmoothEvaluator``."""


def follow(judge, evaluator, asked, policy, wanted):
    """Measure what a judge wants measured; give the last score, and if it is whole."""
    course = judge.course(asked, policy, wanted)
    job = next(course)
    while True:
        try:
            job = course.send(job.run(evaluator))
        except StopIteration as ended:
            return ended.value


class FormulaEvaluator(Evaluator):
    """Takes the metrics of a policy from a function."""

    def __init__(self, formula):
        self.formula = formula

    def measure(self, policy, windows=None, *, near=None):
        return Score(self.formula(policy))

    def slopes(self, policy, *, tokens, draws, turn, beside=(), **_):
        raise AssertionError("no strategy of these tests asks for slopes")


class WindowEvaluator(FormulaEvaluator):
    """Takes the KL of every window from a function, and notes what it was asked for."""

    def __init__(self, formula):
        super().__init__(formula)
        self.asked = []

    def measure(self, policy, windows=None, *, near=None):
        self.asked.append(windows)
        found = tuple(float(kl) for kl in self.formula(policy)[:windows])
        return Score({"kl": float(np.mean(found))}, found)


class SmoothEvaluator(Evaluator):
    """A smooth KL of which the slopes are known; windows differ in what they weigh.

    The KL of window j is ``w[j] @ d + (v @ d)**2 / 2`` with the damage d that each
    site's choice does: so the slope of a change c of site s is ``(w[j] + (v @ d) v)[s]
    * c``, and its second order ``v[s]**2 c**2 / 2``.
    """

    def __init__(self, problem, *, windows=8, seed=9):
        rng = np.random.default_rng(seed)
        self.problem = problem
        count = len(problem.space.sites)
        width = max(len(actions) for actions in problem.space.choices.values())
        self.damage = ((np.arange(width) + 1) / width) ** 2
        base = rng.lognormal(0, 1, count)
        self.weights = base * rng.normal(1, 0.1, (windows, count))
        self.curves = rng.normal(0, 0.5, count)
        self.turns = []

    def measure(self, policy, windows=None, *, near=None):
        damage = self.damage[self.problem.space.index(policy)]
        kl = self.weights @ damage + (self.curves @ damage) ** 2 / 2
        found = tuple(kl[:windows].tolist())
        return Score({"kl": float(np.mean(found))}, found)

    def slopes(self, policy, *, tokens, draws, turn, beside=(), part=(0, 1), **_):
        share, shares = part
        self.turns.append(turn)
        now = self.damage[self.problem.space.index(policy)]
        change = self.damage - now[:, None]
        total, count = len(self.weights), max(tokens // WINDOW, shares)
        order = [(turn * count + i) % total for i in range(total)]
        windows = [window for window in order if window not in beside][:count]
        windows = windows[share::shares]
        gradient = self.weights[windows] + (self.curves @ now) * self.curves
        each = gradient[:, :, None] * change
        curvature = (self.curves[:, None] * change) ** 2 / 2
        return SiteSlopes(
            each.mean(0).astype(np.float32),
            (each.std(0) / len(windows) ** 0.5).astype(np.float32),
            curvature.astype(np.float32) * (draws > 0),
            tuple(windows),
        )


class ShuffledCrew(Crew):
    """Workers whose jobs end in an order that chance draws; some lose their worker.

    Jobs are done in this process, so that a test can try thousands of orders.
    """

    def __init__(self, evaluator, size, *, seed=0, lost=0.0):
        self.evaluator = evaluator
        self.size = size
        self.lost = lost
        self.most = 0
        self._rng = np.random.default_rng(seed)
        self._jobs = {}

    def enter(self, plan):
        raise AssertionError("tests of a study have no plans")

    def idle(self):
        return [n for n in range(self.size) if n not in self._jobs]

    def submit(self, worker, job):
        assert worker not in self._jobs
        self._jobs[worker] = job
        self.most = max(self.most, len(self._jobs))

    def wait(self, seconds):
        if not self._jobs:
            return []
        worker = int(self._rng.choice(sorted(self._jobs)))
        job = self._jobs.pop(worker)
        if self._rng.random() < self.lost:
            return [Outcome(worker, lost="killed by a test")]
        try:
            return [Outcome(worker, job.run(self.evaluator))]
        except Exception as error:
            return [Outcome(worker, error=error)]
