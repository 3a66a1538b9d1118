"""Diffusion models as policies: stochastic DDIM with classifier-free guidance (DDPO, D3PO, PRDP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.policies.denoising import DenoisingPolicy, Transition
from guerdon.policies.schedule import ddim_step, expand, predict


class DiffusionPolicy(DenoisingPolicy):
    """Each DDIM step with ``eta > 0`` is a Gaussian action (Song et al., 2021, eq. 12 and 16).

    Guidance takes two passes, without and with the prompt, in one batch of twice the size, and the same two
    when log-probabilities are computed: without them another policy would be optimised than the one that
    sampled. Arguments: see `DenoisingPolicy`.
    """

    kind = "diffusion"
    default_steps = 20

    def sample(  # type: ignore[override]
        self,
        prompts: Sequence[str],
        seeds: Tensor,
        group: Tensor | None = None,
        *,
        steps: int | None = None,
        eta: float = 1.0,
        guidance: float | None = None,
        initial_seeds: Tensor | None = None,
    ) -> Trajectories:
        """DDIM sampling as diffusers' ``DDIMScheduler`` does it with Stable Diffusion's settings ("leading"
        grid, offset 1, the last step leads to timestep 0).

        Args:
            prompts, seeds, group: see `Policy.sample`.
            steps: number of denoising steps, which is also ``T``.
            eta: 1 draws as DDPM does; 0 is deterministic, and then every step is masked (a deterministic
                step has no log-probability).
            guidance: classifier-free guidance scale; 1 saves the second pass. Default ``self.guidance``.
            initial_seeds: ``[B]`` seeds of the initial latents alone, to share them within groups.

        Raises `UsageError` for a step count outside the grid.
        """
        steps = self.steps if steps is None else steps
        if not 1 <= steps < self.schedule.train_steps:
            raise UsageError(f"a DDIM sampler takes 1 to {self.schedule.train_steps - 1} steps, not {steps}")
        times = self.schedule.ddim_grid(steps)
        return self._chain(
            prompts,
            seeds,
            group,
            times,
            (times - self.schedule.train_steps // steps).clamp(min=0),
            self.guidance if guidance is None else guidance,
            recorded=steps,
            image="next",
            eta=eta,
            initial_seeds=initial_seeds,
        )

    def _prepare(self, condition: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor | None]:
        if bool((guidance == 1).all()):
            return condition, None
        empty = self.encode([""]).to(condition.dtype).expand_as(condition)
        return torch.cat([empty, condition]), guidance

    def _transition(
        self, state: Tensor, timestep: Tensor, next_timestep: Tensor, prepared: Any, eta: Any
    ) -> Transition:
        condition, guidance = prepared
        if guidance is None:
            output = self._denoise(state, timestep, condition)
        else:
            both = self._denoise(torch.cat([state, state]), torch.cat([timestep, timestep]), condition)
            without, output = both.chunk(2)
        with torch.autocast(state.device.type, enabled=False):
            if guidance is not None:
                output = without + expand(guidance, output) * (output - without)
            level, next_level = self.levels(timestep), self.levels(next_timestep)
            clean, noise = predict(output, state, level, self.schedule)
            return Transition(*ddim_step(clean, noise, level, next_level, eta), clean)
