"""Consistency models as policies (Oertell et al., 2024, RLCM; Luo et al., 2023, LCM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.policies.denoising import DenoisingPolicy, Transition
from guerdon.policies.schedule import consistency, expand, guidance_embedding, predict


class ConsistencyPolicy(DenoisingPolicy):
    """Jumps to a clean estimate in one step, adds noise, jumps again.

    Step ``j`` at time ``t`` leads to ``t'``: with the consistency function ``f`` the action is drawn from
    ``N(sqrt(ab(t')) f(x, t), (1 - ab(t')) I)``. The picture is ``f`` of the last step, which is no action:
    ``steps`` network calls make ``steps - 1`` transitions.

    There is no two-pass guidance. The scale is embedded: ``w = guidance - 1`` goes in as ``timestep_cond``,
    the same when sampling and when training. A denoiser without that input (``time_cond_proj_dim`` None,
    an LCM made by a LoRA for example) can only be run at guidance 1. Arguments: see `DenoisingPolicy`.
    """

    kind = "consistency"
    default_steps = 4

    def __init__(self, *args: Any, guidance: float | None = None, **kwargs: Any) -> None:
        denoiser = args[0] if args else kwargs["denoiser"]
        embedded = getattr(denoiser.config, "time_cond_proj_dim", None) is not None
        super().__init__(
            *args, guidance=guidance if guidance is not None else 3.0 if embedded else 1.0, **kwargs
        )

    def sample(  # type: ignore[override]
        self,
        prompts: Sequence[str],
        seeds: Tensor,
        group: Tensor | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        ghost: bool = False,
        initial_seeds: Tensor | None = None,
    ) -> Trajectories:
        """Multistep consistency sampling.

        Args:
            prompts, seeds, group: see `Policy.sample`.
            steps: network calls; the grid is `NoiseSchedule.consistency_grid`.
            guidance: the scale to embed; default ``self.guidance``.
            ghost: also record the noise that the published code adds after the last step (it leads back to
                the last time and no reward sees it, so it only adds variance; kept for parity).
            initial_seeds: ``[B]`` seeds of the initial latents alone, to share them within groups.

        Returns trajectories of ``T = steps - 1`` transitions (``steps`` with ``ghost``). One step without
        ``ghost`` has none: then ``T`` is 1, masked.
        Raises `UsageError` for a step count outside the grid, or guidance that the denoiser cannot take.
        """
        steps = self.steps if steps is None else steps
        try:
            times = self.schedule.consistency_grid(steps)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return self._chain(
            prompts,
            seeds,
            group,
            times,
            torch.cat([times[1:], times[-1:]]),
            self.guidance if guidance is None else guidance,
            recorded=steps if ghost else steps - 1,
            image="clean",
            initial_seeds=initial_seeds,
        )

    def _prepare(self, condition: Tensor, guidance: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        width = getattr(self.denoiser.config, "time_cond_proj_dim", None)
        if width is None:
            if bool((guidance != 1).any()):
                raise UsageError(
                    "this consistency model has no guidance input (time_cond_proj_dim); use guidance 1"
                )
            return condition, {}
        embedding = guidance_embedding(guidance - 1, width)
        return condition, {"timestep_cond": embedding.to(self.dtype)}

    def _transition(
        self, state: Tensor, timestep: Tensor, next_timestep: Tensor, prepared: Any, eta: Any
    ) -> Transition:
        condition, options = prepared
        output = self._denoise(state, timestep, condition, **options)
        with torch.autocast(state.device.type, enabled=False):
            clean, _ = predict(output, state, self.levels(timestep), self.schedule)
            clean = consistency(state, clean, timestep, self.schedule)
            level = self.levels(next_timestep)
            return Transition(expand(level.sqrt(), clean) * clean, (1 - level).sqrt(), clean)
