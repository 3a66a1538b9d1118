"""Times of single layers of a real transformer, measured, and a cost model that puts calls together from them.

ReaLHF's profiler (Mei et al. 2024, section 5.1): embedding, one block and output layer are timed for several batches and
lengths and numbers of tensor shards, and everything between is interpolated. One process measures all shards: a tensor shard
computes the same on its own. Communication comes from a `ClusterSpec`, measured (`ClusterSpec.measure`) or written down.

    profile = LayerProfile.measure(model, tps=(1, 2), batches=(1, 4, 16), lengths=(32, 64))
    costs = ProfiledCost(ClusterSpec.measure(processes=2), [profile])
    plan = search_plan(graph, costs.cluster, workload, shapes, costs=costs)
"""

from __future__ import annotations

import json
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.cost import CostModel
from guerdon.engine.protocols import Layout
from guerdon.engine.shapes import ModelShape
from guerdon.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from guerdon.engine.sharded import Blueprint, ShardedTransformer

PARTS = ("block", "ends")
"""One block; embedding and output layer together, log-probabilities included."""

OPS = ("forward", "backward", "decode")
"""A pass without gradients (a prefill too); what a pass with gradients takes beyond that; one token for each sequence."""


@dataclass(frozen=True)
class Point:
    """One measured time: ``seconds`` of ``op`` on ``part`` with ``tp`` shards, for ``batch`` sequences of ``length`` tokens
    (decoding: with so many tokens before)."""

    part: str
    op: str
    tp: int
    batch: int
    length: int
    seconds: float

    @property
    def work(self) -> int:
        """What times are interpolated over: tokens, or sequences while decoding."""
        return self.batch if self.op == "decode" else self.batch * self.length


@dataclass(frozen=True)
class LayerProfile:
    """Measured times of one shape of model on one kind of device.

    Args:
        shape: of the model.
        points: the times.
        optimiser: seconds of Adam's step for one weight.
        device: where it was measured, for reports.
    """

    shape: ModelShape
    points: tuple[Point, ...]
    optimiser: float
    device: str = "cpu"

    @staticmethod
    def measure(
        model: nn.Module | Blueprint,
        tps: Sequence[int] = (1, 2, 4, 8),
        batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
        lengths: Sequence[int] = (128, 256, 512),
        *,
        device: str = "cpu",
        repeats: int = 5,
        most: int | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> LayerProfile:
        """Time the layers of ``model`` here and now.

        Args:
            model: a transformers model that `guerdon.engine.sharded.describe` knows, or a blueprint.
            tps: numbers of tensor shards; those that do not divide the heads are left out.
            batches, lengths: of the passes; pairs of more than ``most`` tokens are left out.
            repeats: the median of so many is taken, after one to warm up.

        Raises `UsageError` for a model that cannot be split, and where nothing is left to measure.
        """
        from guerdon.engine.sharded import Blueprint

        blueprint = model if isinstance(model, Blueprint) else Blueprint.of(model)
        shape = blueprint.shape("profiled")
        tps = [tp for tp in tps if shape.heads % tp == 0 and shape.kv_heads % tp == 0]
        longest = blueprint.architecture.longest or max(lengths, default=0)
        pairs = [(b, s) for s in lengths if s <= longest for b in batches if most is None or b * s <= most]
        if not tps or not pairs:
            raise UsageError(
                f"there is nothing to profile of '{shape.name}': no tp divides its heads, or no batch is left"
            )
        points: list[Point] = []
        for number, tp in enumerate(tps):
            bench = _Bench(blueprint, tp, device, repeats)
            for done, (batch, length) in enumerate(pairs):
                points += bench.points(batch, length)
                if progress is not None:
                    progress((number + (done + 1) / len(pairs)) / len(tps))
        return LayerProfile(shape, tuple(points), _Bench(blueprint, 1, device, repeats).optimiser(), device)

    def seconds(self, part: str, op: str, tp: int, work: float, length: float) -> float:
        """Of one op, between the measured points: linear in tokens (or sequences) and in the length, beyond the largest batch
        in proportion, below the smallest along the first two points. Raises `UsageError` for what was not measured."""
        key = part, op, tp
        if key not in self._curves:
            known = sorted({str(shards) for _, _, shards in self._curves})
            raise UsageError(
                f"the profile of '{self.shape.name}' has no {part} {op} with tp={tp}; {nearest(str(tp), known)}"
            )
        curves = self._curves[key]
        lengths = list(curves)
        at = [_line(*curves[s], work) for s in lengths]
        if len(lengths) == 1:
            return at[0]
        i = min(max(bisect_left(lengths, length), 1), len(lengths) - 1)
        share = (length - lengths[i - 1]) / (lengths[i] - lengths[i - 1])
        return max(at[i - 1] + share * (at[i] - at[i - 1]), 0.0)

    @cached_property
    def _curves(self) -> dict[tuple[str, str, int], dict[int, tuple[list[float], list[float]]]]:
        """(part, op, tp) -> length -> (work, seconds), all ascending; seconds never fall with more work."""
        found: dict[tuple[str, str, int], dict[int, tuple[list[float], list[float]]]] = {}
        for p in sorted(self.points, key=lambda p: (p.length, p.work)):
            works, seconds = found.setdefault((p.part, p.op, p.tp), {}).setdefault(p.length, ([], []))
            works.append(p.work)
            seconds.append(max(p.seconds, seconds[-1] if seconds else 0.0))
        return found

    def to_json(self, path: str | Path | None = None) -> str:
        """The profile as JSON text, also written to ``path`` if one is given."""
        values = {"shape": asdict(self.shape), "device": self.device, "optimiser": self.optimiser}
        points = [[p.part, p.op, p.tp, p.batch, p.length, p.seconds] for p in self.points]
        text = json.dumps({**values, "points": points}, indent=None) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @staticmethod
    def from_json(path: str | Path) -> LayerProfile:
        """The profile in a file. Raises `DataError`."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            points = tuple(
                Point(str(p), str(o), int(t), int(b), int(s), float(x))
                for p, o, t, b, s, x in values["points"]
            )
            shape = ModelShape(**values["shape"])
            return LayerProfile(shape, points, float(values["optimiser"]), str(values["device"]))
        except OSError as error:
            raise DataError(f"cannot read the profile {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no profile of layers ({error!r}); write one with LayerProfile.to_json"
            ) from error


def _line(x: list[float], y: list[float], at: float) -> float:
    """The value at ``at`` of the line through the points."""
    if len(x) == 1 or at > x[-1]:
        return y[-1] * at / x[-1]
    i = max(bisect_left(x, at), 1)
    value = y[i - 1] + (at - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])
    return max(value, 0.0)


class _Bench:
    """Times the first blocks and the ends of a model with one of ``tp`` shards of its weights."""

    def __init__(self, blueprint: Blueprint, tp: int, device: str, repeats: int) -> None:
        from guerdon.engine.shards import Mesh

        self.blueprint, self.tp, self.device, self.repeats = blueprint, tp, device, repeats
        self.shape = blueprint.shape("profiled")
        self.blocks = min(2, self.shape.layers)
        store = blueprint.cut(Mesh(Layout(1, 1, tp)), 0)
        self.weights = {name: view.to(device).requires_grad_() for name, view in store.views.items()}
        self.middle, self.outside = self._part(1, 3, self.blocks), self._part(0, 1, 0)

    def _part(self, stage: int, stages: int, layers: int) -> ShardedTransformer:
        from guerdon.engine.sharded import ShardedTransformer
        from guerdon.engine.shards import Groups, Place, Share

        place = Place(stage=stage, stages=stages, index=0, shards=self.tp)
        weights = {name: [weight] for name, weight in self.weights.items()}
        parameters, shares = self.blueprint.parameters, [Share(0, self.tp)]
        part = ShardedTransformer(self.blueprint.architecture, parameters, place, Groups(), weights, shares)
        part.layers = range(layers)
        return part

    def points(self, batch: int, length: int) -> list[Point]:
        """Every op for one batch and length."""
        import torch

        token = torch.zeros((batch, length), dtype=torch.int64, device=self.device)
        hidden = torch.randn((batch, length, self.shape.hidden), device=self.device) * 0.1
        found = []
        for part, x, share in ((self.middle, hidden, self.blocks), (self.outside, token, 1)):
            name = "block" if part is self.middle else "ends"
            plain = self._time(partial(self._pass, part, x, False)) / share
            whole = self._time(partial(self._pass, part, x, True)) / share
            step = self._time(self._decode(part, x[:, :1], length)) / share
            for op, seconds in (
                ("forward", plain),
                ("backward", max(whole - plain, plain)),
                ("decode", step),
            ):
                found.append(Point(name, op, self.tp, batch, length, seconds))
        return found

    def _pass(self, part: ShardedTransformer, x: torch.Tensor, gradients: bool) -> None:
        import torch

        from guerdon.engine.sharded import look

        position, allowed = look(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), None)
        with torch.set_grad_enabled(gradients):
            x = x.detach().requires_grad_(gradients and x.is_floating_point())
            out = part(x, position, allowed)
            if part is self.outside:
                out = out.float().log_softmax(-1)
            if gradients:
                out.sum().backward()
                for weight in self.weights.values():
                    weight.grad = None

    def _decode(self, part: ShardedTransformer, x: torch.Tensor, context: int) -> Callable[[], None]:
        """One token more after ``context``; each time from the same cache."""
        import torch

        from guerdon.engine.sharded import look

        a, batch = self.blueprint.architecture, x.shape[0]
        shape = (batch, a.kv_heads // self.tp, context, a.size)
        filled = {layer: (torch.randn(shape, device=self.device),) * 2 for layer in part.layers}
        mask = torch.ones((batch, context + 1), dtype=torch.bool, device=self.device)
        last = (a.longest or context + 1) - 1

        @torch.no_grad()
        def step() -> None:
            position, allowed = look(mask, None, 1)
            out = part(x.detach(), position.clamp(max=last), allowed, dict(filled))
            if part is self.outside:
                out.float().log_softmax(-1)

        return step

    def _time(self, once: Callable[[], None]) -> float:
        import torch

        times = []
        for _ in range(self.repeats + 1):
            if self.device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            once()
            if self.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def optimiser(self) -> float:
        """Seconds of Adam's step a weight."""
        import torch

        adam = torch.optim.Adam(self.weights.values(), lr=1e-9)
        for weight in self.weights.values():
            weight.grad = torch.ones_like(weight)
        seconds = self._time(lambda: adam.step() and None)
        return seconds / sum(weight.numel() for weight in self.weights.values())


class ProfiledCost(CostModel):
    """A cost model whose computing was measured; memory and communication are those of `CostModel`.

    Args:
        cluster: bandwidths, latencies and memory.
        profiles: one for each shape of model that is asked for.
        sharded_optimiser: whether replicas share the optimiser's work and states (ZeRO stage 1).
        others: of `CostModel`: bytes of weights, gradients, states and activations, checkpointing.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        profiles: Sequence[LayerProfile],
        sharded_optimiser: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(cluster, **others)
        self.sharded_optimiser = sharded_optimiser
        self._profiles = {replace(profile.shape, name=""): profile for profile in profiles}

    def profile(self, shape: ModelShape) -> LayerProfile:
        """The one of a shape, whatever its name. Raises `UsageError` where there is none."""
        found = self._profiles.get(replace(shape, name=""))
        if found is None:
            raise UsageError(
                f"no profile is of the shape of '{shape.name}'; measure one with LayerProfile.measure"
            )
        return found

    def layer_compute(
        self, shape: ModelShape, tokens: float, context: float, tp: int, times: int = 1
    ) -> float:
        """Forward, or with ``times=2`` backward."""
        op = "forward" if times == 1 else "backward"
        return self.profile(shape).seconds("block", op, tp, tokens, context)

    def ends_compute(self, shape: ModelShape, tokens: float, tp: int, times: int = 1) -> float:
        """With the sum of the embeddings and the gathering of the shards' logits, or their way back."""
        found = self.profile(shape)
        op = "forward" if times == 1 else "backward"
        length = max(p.length for p in found.points)  # these ops do not look at other tokens
        outputs = 1 if shape.scalar else shape.vocabulary
        wide = self.activation_bytes * tokens
        talk = self.cluster.all_reduce(wide * shape.hidden, tp)
        if times == 1:
            talk += self.cluster.all_gather(wide * outputs, tp)
        return found.seconds("ends", op, tp, tokens, length) + talk

    def decode_compute(self, shape: ModelShape, sequences: float, context: float, tp: int) -> float:
        """A block, measured."""
        return self.profile(shape).seconds("block", "decode", tp, sequences, context)

    def decode_ends(self, shape: ModelShape, sequences: float, tp: int) -> float:
        """Measured, with what the shards say to one another."""
        found = self.profile(shape)
        length = max(p.length for p in found.points)
        wide = self.activation_bytes * sequences
        talk = self.cluster.all_reduce(wide * shape.hidden, tp, small=True)
        talk += self.cluster.all_gather(wide * (1 if shape.scalar else shape.vocabulary), tp)
        return found.seconds("ends", "decode", tp, sequences, length) + talk

    def optimise(self, shape: ModelShape, layout: Layout) -> float:
        """Measured seconds a weight, for the weights that this process updates."""
        share = layout.world_size if self.sharded_optimiser else layout.pp * layout.tp
        return self.profile(shape).optimiser * shape.parameters / share

    def resident(self, shape: ModelShape, layout: Layout, trains: bool) -> float:
        """As `CostModel.resident`; without a shared optimiser each replica holds all states of its shard."""
        alone = Layout(1, layout.pp, layout.tp)
        return super().resident(shape, layout if self.sharded_optimiser else alone, trains)
