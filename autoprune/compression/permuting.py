"""Which layers may have their inputs in another order, at no cost at run time."""

from autoprune.policy import Layer


def refuse_permuting(layer: Layer) -> str | None:
    """Say why the inputs of a layer cannot stand in another order, or None if they can.

    The channels of an MLP are all treated alike between the layers that make them and
    the one that takes them, so an order can be folded into the rows of its makers.
    """
    cut = layer.cut
    if cut is None or cut.axis != "columns":
        return (
            "its inputs cannot be permuted: they are no channels of an MLP, and what "
            "makes them has other readers, as the residual stream has"
        )
    if cut.kind != "channels":
        return (
            f"its inputs cannot be permuted: they belong to {cut.kind}, of which "
            "several share the rows of one value"
        )
    return None
