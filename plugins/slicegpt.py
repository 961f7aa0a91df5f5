"""SliceGPT: the hidden state is rotated to its principal axes, and the last are cut."""

from collections.abc import Sequence

from autoprune.compression.hidden import HiddenMethod, kept_directions, projected
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.hookspecs import hookimpl
from autoprune.models.hidden_statistics import HiddenStatistics
from autoprune.models.statistics import InputStatistics


class SliceGpt(HiddenMethod):
    """Keep the directions of the hidden state along which calibration tokens lie.

    With ``Q`` the leading eigenvectors of ``sum x xᵀ`` over what all norms read, each
    ``x`` at length 1, the embedding becomes ``E Q``, layers that write the hidden state
    ``Qᵀ W``, and those that read it ``W diag(g) Q`` with the scales ``g`` of their
    norm (Sec. 3.1, 3.3 and 3.4). All matrices lose the same share, the embedding too.

    How we differ: one ``Q`` serves all blocks, in the place of one a block. So the
    residual stream needs no adapters ``Q_lᵀ Q_(l+1)``, which cost back a part of what
    was cut, and the target ``transformers`` writes a plain checkpoint of the same
    class with a smaller ``hidden_size`` that needs no code of its own. Of the freedom
    to rotate within the kept directions we make use where head and embedding are tied:
    there the scales of the last norm become diagonal, and the tie stays. The paper's
    damping, a multiple of the identity, changes no eigenvector and is left out. Widths
    are a multiple of 8 and of the number of heads. Nothing follows in an action, and
    ``packed``, which does not rotate, refuses it.
    """

    name = "slicegpt"
    reference = "Ashkboos et al. 2024, arXiv:2401.15024, Sec. 3"

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting; see ``HiddenMethod``.

        Raises:
            MethodError: If statistics are not those of the hidden state, or a weight
                is not finite.
        """
        if not isinstance(statistics, HiddenStatistics):
            names = ", ".join(source.layer.name for source in sources)
            raise MethodError(
                f"{self.name} acts on the whole model by statistics of its hidden "
                f"state, not on {names} alone"
            )
        return [
            [
                projected(source, statistics.axes[:, : kept_directions(layer, one)])
                for one in settings
            ]
            for source in sources
            for layer in (source.layer,)
        ]


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [SliceGpt()]
