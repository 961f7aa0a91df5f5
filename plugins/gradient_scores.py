"""Weights by what the loss says of them: gradients, curvature and synaptic flow."""

from math import sqrt

from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.gradients import finite_gradient, gradient_norm
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.scoring import BY_LAYER, BY_ROW, ScoringMethod
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics

SCALE = Parameter(
    "scale", float, 1000.0, "What the norm of the gradient is multiplied by.", 0, 1e9
)


class GradientMagnitude(ScoringMethod):
    """Remove the weights that the loss depends on least: the smallest ``|g|``.

    ``g`` is the gradient of the dense model's mean loss. How we differ: the paper
    grows connections by this score and drops others by size; here it drops them.
    """

    name = "gradient"
    reference = "Evci et al. 2019, RigL, arXiv:1911.11134, Sec. 3"
    needs = frozenset({"gradient"})
    parameters = BY_LAYER

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Score every weight."""
        preconditions.finite_weight(source)
        return finite_gradient(source, "mean").abs()


class Taylor(ScoringMethod):
    """Remove the weights whose removal moves the loss least to first order: ``|w g|``.

    It is SNIP's sensitivity too (Lee et al. 2019, arXiv:1810.02340, Sec. 4), whose
    ranking over all layers is the formula ``snip``. A tile counts as the sum of its
    weights' scores. How we differ: ``g`` is the gradient of the mean loss over all
    windows, where the paper adds up squares batch by batch, which ``fisher`` does.
    """

    name = "taylor"
    reference = "Molchanov et al. 2019, arXiv:1906.10771, Eq. 8"
    needs = frozenset({"gradient"})
    parameters = BY_LAYER

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Score every weight."""
        gradient = finite_gradient(source, "mean")
        return (preconditions.finite_weight(source) * gradient).abs()


class Fisher(ScoringMethod):
    """Remove the weights with the smallest ``h w² / 2``, ``h`` the mean of ``g²``.

    Optimal Brain Damage with the diagonal of the empirical Fisher matrix, window by
    window, in the place of the Hessian's: an estimate of the model's own loss, where
    ``obd`` sees the error of a layer. How we differ: the loss of a window is the mean
    over its positions, so that all scores shrink with the length of the windows.
    """

    name = "fisher"
    reference = "Theis et al. 2018, Fisher pruning, arXiv:1801.05787"
    needs = frozenset({"gradient_square"})
    parameters = BY_LAYER

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Score every weight."""
        # Roots before squares: the square of a small gradient times another may vanish.
        gradient = gradient_norm(source)
        return (preconditions.finite_weight(source) * gradient).square() / 2


class Gblm(ScoringMethod):
    """Remove the weights with the smallest ``|w| (||x|| + scale ||g||)``.

    Wanda's score plus that of the gradient; both are L2 norms, of the input over a
    mean window and of the gradient as a root mean square over the windows, so that
    neither grows with the text. How we differ: the authors' code averages the inputs
    over the windows and adds up the gradients. Their scale of 100 at 128 windows is
    ours of 1131, rounded to 1000.
    """

    name = "gblm"
    reference = "Das et al. 2023, GBLM-Pruner, arXiv:2311.04902, Alg. 1"
    needs = frozenset({"input_norm", "gradient_square"})
    parameters = (*BY_ROW, SCALE)

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Score every weight."""
        gradient = gradient_norm(source)
        assert source.gradient is not None
        norm = preconditions.finite_input_norm([source], statistics)
        inputs = norm / sqrt(source.gradient.windows)
        scale: float = settings["scale"]
        return preconditions.finite_weight(source).abs() * (inputs + scale * gradient)


class Grasp(ScoringMethod):
    """Keep the weights that the norm of the gradient rests on: the largest ``w (H g)``.

    The paper's score of a removal is ``-w (H g)``, and the largest go. Logits are over
    200, as in the authors' code. Made for networks that are yet to be trained: it keeps
    what learning needs, not what was learnt.
    """

    name = "grasp"
    reference = "Wang et al. 2020, arXiv:2002.07376, Sec. 4"
    needs = frozenset({"hessian_gradient"})
    parameters = BY_LAYER

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Score every weight; scores may be negative."""
        product = finite_gradient(source, "hessian_gradient")
        return preconditions.finite_weight(source) * product


class SynFlow(ScoringMethod):
    """Remove the weights that let through least of ones: the smallest ``|w| dR/d|w|``.

    ``R`` is what the sizes of all weights make of an input of ones; no data is seen.
    How we differ: norms count as the constants that they multiply by, and where ``R``
    does not depend on a layer (queries and keys), its own output takes the place of
    ``R``. The paper's rounds make no difference within a layer, as ``R`` is linear in
    it; they do in the formula ``synflow``, which ranks the weights of all layers.
    """

    name = "synflow"
    reference = "Tanaka et al. 2020, arXiv:2006.05467, Sec. 6"
    needs = frozenset({"synaptic_flow"})
    parameters = BY_LAYER

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Score every weight."""
        flow = finite_gradient(source, "flow")
        return (preconditions.finite_weight(source) * flow).abs()


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the methods."""
    return [GradientMagnitude(), Taylor(), Fisher(), Gblm(), Grasp(), SynFlow()]
