"""The rules of ReaLHF's published estimator (Mei et al. 2024) as another source of costs, to compare with."""

from __future__ import annotations

from guerdon.engine.cost import Call, CostModel
from guerdon.engine.protocols import Layout
from guerdon.engine.shapes import ModelShape, Workload


class PublishedRules(CostModel):
    """Batches are cut by a rule, not to fit: a pass has as many micro-batches as stages, training twice as many if there is a
    pipeline, and the whole batch is generated at once. Of activations only the input of a stage is counted.

    So a plan's memory is less exact than `CostModel`'s, and what does not fit cannot be made to fit by smaller micro-batches
    or by generating in waves. Communication is counted as everywhere here; the public code leaves it out. Arguments as for
    `CostModel`.
    """

    def activations(
        self, shape: ModelShape, layout: Layout, tokens: float, in_flight: int, trains: bool
    ) -> float:
        """2 bytes a feature of a micro-batch of ``tokens``; without checkpointing, of every layer twice."""
        times = 1 if self.checkpointing or not trains else 2 * shape.layers
        return 2.0 * tokens * shape.hidden * times

    def ways(
        self, kind: str, shape: ModelShape, layout: Layout, work: Workload, only: int | None = None
    ) -> list[Call]:
        """The one way of the rule; none where a micro-batch would be empty."""
        if only is None:
            only = (
                1 if kind == "generate" else 2 * layout.pp if kind == "train" and layout.pp > 1 else layout.pp
            )
        return super().ways(kind, shape, layout, work, only)
