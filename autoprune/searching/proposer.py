"""What ``search: {proposals: [name]}`` asks for: policies that are tried first."""

from abc import ABC, abstractmethod
from typing import ClassVar

from autoprune.evaluation.workbench import Workbench
from autoprune.searching.problem import Problem, Proposal


class Proposer(ABC):
    """A rule that makes policies of a problem, without any trial of the search.

    Attributes:
        name: Unique, lower case; ``search: {proposals: [name]}`` asks for it.
        reference: The paper, with section or equation.
    """

    name: ClassVar[str]
    reference: ClassVar[str]

    @abstractmethod
    def propose(self, problem: Problem, bench: Workbench) -> list[Proposal]:
        """Make policies within the budgets, each after the name of its origin.

        Called once, before the first trial, and only if it was asked for by name: so
        it may take as long as the user was told.

        Args:
            problem: What may be chosen, and the budgets.
            bench: Model and text. What is on the model may change.

        Raises:
            ConfigError: If the space or the budgets are none that the rule knows.
            BudgetError: If it finds no policy within the budgets.
        """
