"""What diffusion and consistency policies share: conditions, trajectories, log-probabilities, images.

A denoising step is an action: the state is the noisy latent before it, the action is the next, less noisy
latent, and the policy is the Gaussian that the sampler draws it from (Black et al., 2024, DDPO; Oertell et
al., 2024, RLCM). Both kinds of policy store the states and actions that really happened; log-probabilities
are always computed from those, never from fresh noise.

Layout of the `Trajectories` (``T`` transitions, latents ``[C, H, W]``)::

    inputs["condition"]  [B, L, D]        the encoded prompt
    inputs["guidance"]   [B]              the guidance scale it was sampled with
    inputs["eta"]        [B]              stochasticity of the sampler (diffusion only)
    inputs["step"]       [B, T]           state, next [B, T, C, H, W];
                                          timestep, next_timestep, time_index int64
    outputs["prompt"]    uint8 [B, L]     the prompt as UTF-8 bytes
    outputs["image"]     uint8 [B, H, W, 3]

``state`` and ``next`` are two views of one chain of latents: ``next`` of a step is ``state`` of the one
after it, and memory is spent once.
"""

from __future__ import annotations

import abc
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories, encode_text
from guerdon.errors import ShapeError, UsageError
from guerdon.policies import lora
from guerdon.policies.base import Policy, masked
from guerdon.policies.schedule import NoiseSchedule, expand
from guerdon.randomness import normal

Reduction = Literal["sum", "mean"]
_CACHE_BYTES = 128 * 2**20  # of encoded prompts
_DECODE_ROWS = 16  # latents per call of a VAE, whose activations are far larger than the denoiser's
# rows per call of the denoiser on a CPU: a layer's activations then stay in the cache (64 images of 16x16
# on EPYC cores: 38 ms at once, 34 ms in two pieces on one thread; 26 and 20 ms on two threads)
_CPU_ROWS = 32
_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


class Transition(NamedTuple):
    """One denoising step of ``N`` latents: the Gaussian over the next latent, and the clean estimate."""

    mean: Tensor  # [N, C, H, W]
    std: Tensor  # [N]
    clean: Tensor  # [N, C, H, W]


def gaussian_log_prob(action: Tensor, mean: Tensor, std: Tensor, reduction: Reduction) -> Tensor:
    """Log-density of ``action [*N, C, H, W]`` under a Gaussian of ``mean`` (same shape) and one ``std`` per
    row (``[*N]``, or with trailing ones), summed or averaged over ``C, H, W``: float32 ``[*N]``."""
    rows = action.shape[:-3]
    std = std.reshape(rows).float()
    square = (action.float() - mean.float()).square().flatten(-3).mean(-1)
    log_prob = -square / (2 * std.square()) - std.log() - _HALF_LOG_TAU
    return log_prob if reduction == "mean" else log_prob * math.prod(action.shape[-3:])


class DenoisingPolicy(Policy):
    """A text-conditional denoiser and the sampler that makes it a policy.

    Args:
        denoiser: guerdon's `Denoiser` or diffusers' ``UNet2DConditionModel``; the part that learns.
        text_encoder: `TextEncoder` or transformers' ``CLIPTextModel``; frozen.
        tokenizer: `WordTokenizer` or a Hugging Face tokenizer.
        schedule: the noise levels that the denoiser was trained at.
        vae: diffusers' ``AutoencoderKL``, frozen; None when latents are pixels in [-1, 1].
        guidance: default guidance scale (1 is none).
        steps: default number of sampling steps.
        size: edge of the images in pixels; None takes what the denoiser was trained at.
        event_reduction: join the log-densities of pixels by their "mean" (as published for RLCM, DDPO,
            D3PO) or their "sum" (the true density, as in PRDP).
        source: the name or path that the weights were loaded from, so that a LoRA can name its base.

    Everything is in evaluation mode, always: dropout would make ratios differ from 1 before any update.
    """

    markov = True
    default_steps: int = 20

    def __init__(
        self,
        denoiser: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        schedule: NoiseSchedule | None = None,
        vae: nn.Module | None = None,
        *,
        guidance: float = 3.0,
        steps: int | None = None,
        size: int | None = None,
        event_reduction: Reduction = "mean",
        source: str | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = text_encoder.requires_grad_(False)
        self.vae = None if vae is None else vae.requires_grad_(False)
        self.tokenizer = tokenizer
        self.schedule = schedule or NoiseSchedule()
        self.guidance = guidance
        self.steps = steps or self.default_steps
        self.event_reduction = event_reduction
        self.source = source
        config: Any = denoiser.config
        factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)  # type: ignore[union-attr,arg-type]
        self.size = size or config.sample_size * factor
        if self.size % factor:
            raise UsageError(f"images of {self.size} pixels do not fit: the VAE needs a multiple of {factor}")
        self.latent_shape = (config.in_channels, self.size // factor, self.size // factor)
        # a plain attribute, not a buffer: `.half()` must not round the noise levels
        self._alpha_bar = self.schedule.alpha_bar()
        self._conditions: OrderedDict[str, Tensor] = OrderedDict()
        self.eval()

    # -- module ------------------------------------------------------------------------------------------

    @property
    def core(self) -> nn.Module:
        """The denoiser."""
        return self.denoiser

    def core_changed(self) -> None:
        """After an update of the full weights they are no longer those of ``source``."""
        if not lora.has_lora(self.denoiser):
            self.source = None

    def train(self, mode: bool = True) -> DenoisingPolicy:
        """Stay in evaluation mode whatever ``mode`` says (see the class)."""
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_conditions": OrderedDict()}  # copies need not carry the cache

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        first: Any = self.denoiser.conv_in  # the one layer that every denoiser has
        return first.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser's weights are (an adapter's may differ)."""
        first: Any = self.denoiser.conv_in
        return first.weight.dtype

    def levels(self, timestep: Tensor) -> Tensor:
        """``alpha_bar`` at integer timesteps (any shape), float32 on their device."""
        if self._alpha_bar.device != timestep.device:
            self._alpha_bar = self._alpha_bar.to(timestep.device)
        return self._alpha_bar[timestep]

    # -- prompts -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """``[B, L, D]`` hidden states of the prompts, without gradient. Remembered per prompt."""
        cache = self._conditions
        if cache and next(iter(cache.values())).device != self.device:
            cache.clear()
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
        if missing:
            limit = min(
                self.tokenizer.model_max_length,  # CLIP's tokenizer may say 1e30
                getattr(self.text_encoder.config, "max_position_embeddings", 2**30),
            )
            tokens = self.tokenizer(
                missing, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            )
            options = {}
            if getattr(self.text_encoder.config, "use_attention_mask", False):
                options["attention_mask"] = tokens.attention_mask.to(self.device)
            # remembered conditions must not depend on the precision that happened to be on
            with torch.autocast(self.device.type, enabled=False):
                hidden = self.text_encoder(tokens.input_ids.to(self.device), **options)[0]
            cache.update(zip(missing, hidden.unbind(0), strict=True))
        found = []
        for prompt in prompts:
            cache.move_to_end(prompt)
            found.append(cache[prompt])
        room = max(1, _CACHE_BYTES // found[0].nbytes)
        while len(cache) > room:
            cache.popitem(last=False)
        return torch.stack(found)

    # -- one step ----------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _prepare(self, condition: Tensor, guidance: Tensor) -> Any:
        """What the denoiser needs besides latents and times, made once for a whole chain of steps.
        ``condition [N, L, D]``, ``guidance [N]``."""

    @abc.abstractmethod
    def _transition(
        self, state: Tensor, timestep: Tensor, next_timestep: Tensor, prepared: Any, eta: Any
    ) -> Transition:
        """The Gaussian over the next latent: ``state [N, C, H, W]``, times ``[N]`` int64."""

    def _denoise(self, state: Tensor, timestep: Tensor, condition: Tensor, **options: Tensor) -> Tensor:
        """The denoiser's raw output as float32, whatever precision it computes in."""
        arguments = {"sample": state.to(self.dtype), "timestep": timestep}
        arguments |= {"encoder_hidden_states": condition.to(self.dtype), **options}
        compiled = getattr(self.denoiser, "_compiled_call_impl", None) is not None
        learning = torch.is_grad_enabled()  # pieces win nothing there: the backward pass walks them all again
        if state.device.type != "cpu" or compiled or learning or len(state) <= _CPU_ROWS:
            return self.denoiser(**arguments, return_dict=False)[0].float()
        pieces = zip(*(value.split(_CPU_ROWS) for value in arguments.values()), strict=True)
        outputs = [
            self.denoiser(**dict(zip(arguments, piece, strict=True)), return_dict=False)[0]
            for piece in pieces
        ]
        return torch.cat(outputs).float()

    # -- sampling ----------------------------------------------------------------------------------------

    def _chain(
        self,
        prompts: Sequence[str],
        seeds: Tensor,
        group: Tensor | None,
        times: Tensor,
        next_times: Tensor,
        guidance: float,
        recorded: int,
        image: Literal["clean", "next"],
        eta: float | None = None,
        initial_seeds: Tensor | None = None,
    ) -> Trajectories:
        """Denoise along ``times [S]`` and record the first ``recorded`` transitions.

        ``next_times [S]`` are where each step leads; the picture is the last step's clean estimate or its
        next latent. Steps of standard deviation zero are stored but masked.
        """
        rows, steps, slots = len(prompts), len(times), max(recorded, 1)
        if len(seeds) != rows:
            raise ShapeError(f"{rows} prompts but {len(seeds)} seeds: each row needs one of its own")
        device, shape = self.device, self.latent_shape
        noise = normal(seeds, (steps + 1, *shape), device)
        # one block of latents, step-major so that each step writes a contiguous piece
        chain = torch.empty((slots + 1, rows, *shape), device=device)
        chain[0] = noise[:, 0] if initial_seeds is None else normal(initial_seeds, shape, device)
        log_prob = torch.zeros((rows, slots), device=device)
        mask = torch.zeros((rows, slots), dtype=torch.bool, device=device)
        scale = torch.full((rows,), float(guidance), device=device)
        times, next_times = times.to(device), next_times.to(device)

        with torch.no_grad(), lora.merged(self.denoiser):
            condition = self.encode(prompts)
            prepared = self._prepare(condition, scale)
            state = chain[0]
            for j in range(steps):
                here, there = times[j].expand(rows), next_times[j].expand(rows)
                mean, std, clean = self._transition(state, here, there, prepared, eta)
                if j >= recorded:
                    break  # the last step of a consistency sampler only gives the picture
                following = torch.addcmul(mean, expand(std, mean), noise[:, j + 1])
                chain[j + 1] = following
                state = chain[j + 1]
                real = std > 0
                mask[:, j] = real
                log_prob[:, j] = masked(gaussian_log_prob(state, mean, std, self.event_reduction), real)
            if recorded == 0:
                chain[1] = clean
            picture = self.decode(clean if image == "clean" else state)

        states = chain.transpose(0, 1)
        index = torch.arange(slots, device=device)
        step = TensorDict(
            {
                "state": states[:, :-1],
                "next": states[:, 1:],
                "timestep": times[:slots].expand(rows, slots),
                "next_timestep": next_times[:slots].expand(rows, slots),
                "time_index": index.expand(rows, slots),
            },
            batch_size=[rows, slots],
        )
        inputs = TensorDict({"condition": condition, "guidance": scale, "step": step}, batch_size=[rows])
        if eta is not None:
            inputs["eta"] = torch.full((rows,), float(eta), device=device)
        outputs = TensorDict({"prompt": encode_text(prompts).to(device), "image": picture}, batch_size=[rows])
        if group is not None:
            group = group.to(device)
        return Trajectories(inputs, log_prob, mask, outputs=outputs, group=group, batch_size=[rows])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """``uint8 [B, H, W, 3]`` images of latents ``[B, C, H, W]``: VAE, then from [-1, 1] to 0..255."""
        if self.vae is not None:
            vae: Any = self.vae
            config = vae.config
            latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
            latents = latents.to(next(vae.parameters()).dtype)
            parts = [vae.decode(part, return_dict=False)[0] for part in latents.split(_DECODE_ROWS)]
            latents = torch.cat(parts).float()
        pixels = (latents * 0.5 + 0.5).clamp(0, 1).mul(255).round()
        return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    # -- probabilities -----------------------------------------------------------------------------------

    def distribution(self, traj: Trajectories) -> TensorDict:
        """``mean [B, T, C, H, W]`` and ``std [B, T, 1, 1, 1]`` of each step's Gaussian, differentiable.

        All steps of all rows go through the denoiser in one batch; masked ones are left out (there ``mean``
        is 0 and ``std`` 1).
        """
        mask, inputs = traj.mask, traj.inputs
        rows, slots = mask.shape
        step = inputs["step"]
        real = None if bool(mask.all()) else mask.reshape(-1).nonzero()[:, 0]
        if real is not None and not len(real):
            state = step["state"]
            return TensorDict(
                {"mean": torch.zeros_like(state), "std": state.new_ones(rows, slots, 1, 1, 1)},
                batch_size=[rows, slots],
            )

        def flat(values: Tensor) -> Tensor:
            values = values.flatten(0, 1)
            return values if real is None else values[real]

        def per_row(values: Tensor) -> Tensor:
            return flat(values[:, None].expand(rows, slots, *values.shape[1:]))

        eta = per_row(inputs["eta"]) if "eta" in inputs.keys() else None  # noqa: SIM118 (a TensorDict)
        prepared = self._prepare(per_row(inputs["condition"]), per_row(inputs["guidance"]))
        mean, std, _ = self._transition(
            flat(step["state"]), flat(step["timestep"]), flat(step["next_timestep"]), prepared, eta
        )
        if real is not None:
            everything = mean.new_zeros((rows * slots, *mean.shape[1:]))
            mean = everything.index_put((real,), mean)
            std = std.new_ones(rows * slots).index_put((real,), std)
        return TensorDict(
            {"mean": mean.unflatten(0, (rows, slots)), "std": std.reshape(rows, slots, 1, 1, 1)},
            batch_size=[rows, slots],
        )

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        """``[B, T]`` float32 log-probability of the stored ``next`` latents, zero where masked; averaged or
        summed over ``C, H, W`` as ``event_reduction`` says."""
        if distribution is None:
            distribution = self.distribution(traj)
        action = traj.inputs["step", "next"]
        return masked(
            gaussian_log_prob(action, distribution["mean"], distribution["std"], self.event_reduction),
            traj.mask,
        )

    def log_ratio(self, traj: Trajectories, distribution: TensorDict, reference: TensorDict) -> Tensor:
        """``[B, T]`` log of this policy's density over a ``reference``'s at the stored steps, both given as
        `distribution` returns them (equal ``std``).

        ``((mean - mean_ref) (2 a - mean - mean_ref)) / (2 std^2)``: unlike the difference of two large
        log-probabilities this keeps its digits when pixels are summed, and is exactly 0 for equal means.
        """
        action, mean, other = traj.inputs["step", "next"], distribution["mean"], reference["mean"]
        product = ((mean - other) * (2 * action - mean - other)).flatten(-3)
        total = product.mean(-1) if self.event_reduction == "mean" else product.sum(-1)
        std = distribution["std"].reshape(traj.mask.shape)
        return masked(total / (2 * std.square()), traj.mask)

    # -- files -------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What a loader needs beyond the weights, as JSON values."""
        return {
            "kind": self.kind,
            "guidance": self.guidance,
            "steps": self.steps,
            "size": self.size,
            "event_reduction": self.event_reduction,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy so that `guerdon.policies.pretrained.load_policy` reads it back.

        guerdon's own denoiser: ``config.json`` and ``model.safetensors`` with an adapter folded in (and, for
        whoever wants it apart, the adapter in peft's format). diffusers' parts: a diffusers pipeline folder;
        for a LoRA on a known base only ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights``.
        """
        from guerdon.policies.saving import save_policy

        save_policy(self, folder)
