"""A small text-conditional denoiser, its text encoder and its word tokenizer.

Each is called exactly as its big relative is: `Denoiser` as diffusers' ``UNet2DConditionModel``,
`TextEncoder` as transformers' ``CLIPTextModel`` and `WordTokenizer` as a Hugging Face tokenizer. A policy
that drives Stable Diffusion therefore drives these 0.7 M parameters unchanged, and a proof that takes
GPU-days there takes minutes here.

The network is a three-level U-Net with one residual block each way. What makes it learn ShapesWorld in a few
minutes on two cores: three resolutions (with two, position is learned late), at least 24 channels on the
finest level (with fewer, overall brightness drifts), FiLM after each GroupNorm, the pooled caption added to
the time embedding, cross-attention on the two coarse levels only, and an output that starts at zero. It has
no self-attention and no feed-forward layers: they cost most of a diffusers block's time and bought nothing
at this size.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLANKS = str.maketrans(string.punctuation, " " * len(string.punctuation))


@dataclass
class DenoiserConfig:
    """Shape of a `Denoiser`; field names shared with diffusers carry the same meaning."""

    in_channels: int = 3
    sample_size: int = 16  # width and height it is trained at; any multiple of 4 can be run
    block_out_channels: tuple[int, int] = (32, 64)  # finest level; both coarser levels
    cross_attention_dim: int = 64  # width of the text encoder's hidden states
    norm_num_groups: int = 8
    time_frequencies: int = 64  # sinusoids of the timestep
    time_embed_dim: int = 128
    time_cond_proj_dim: int | None = None  # 256 for a consistency model that is told its guidance

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"block_out_channels": list(self.block_out_channels)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DenoiserConfig:
        """Inverse of `to_dict`."""
        return cls(**(values | {"block_out_channels": tuple(values["block_out_channels"])}))


@dataclass
class DenoiserOutput:
    """What ``Denoiser(..., return_dict=True)`` returns."""

    sample: Tensor


class CrossAttention(nn.Module):
    """Pixels ask, words answer. Module names are diffusers', so that LoRA targets
    (``to_q``, ``to_k``, ``to_v``, ``to_out.0``) fit both."""

    def __init__(self, channels: int, context: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, C, H, W = x.shape
        # channels_last makes this permute a view: pixels are already rows of channels
        pixels = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)
        # one head and a dozen words: two plain products beat the fused kernel by 7 % of a training step
        scores = self.to_q(pixels) @ self.to_k(context).transpose(1, 2) * C**-0.5
        mixed = self.to_out[0](scores.softmax(dim=-1) @ self.to_v(context))
        return x + mixed.reshape(B, H, W, C).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU; the second norm is scaled and shifted (FiLM) by
    the time embedding."""

    def __init__(self, inputs: int, outputs: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return self.skip(x) + h


class Denoiser(nn.Module):
    """Predicts the noise in a noisy image, given its timestep and its caption's hidden states."""

    frequencies: Tensor

    def __init__(self, config: DenoiserConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DenoiserConfig()
        fine, coarse = config.block_out_channels
        time, groups = config.time_embed_dim, config.norm_num_groups

        def residual(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, time, groups)

        def attention() -> CrossAttention:
            return CrossAttention(coarse, config.cross_attention_dim, groups)

        frequencies = torch.exp(
            -math.log(10000.0) * torch.arange(config.time_frequencies // 2) / (config.time_frequencies // 2)
        )
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time_embedding = nn.Sequential(
            nn.Linear(config.time_frequencies, time), nn.SiLU(), nn.Linear(time, time)
        )
        self.caption_embedding = nn.Linear(config.cross_attention_dim, time)
        self.cond_proj: nn.Linear | None = None
        if config.time_cond_proj_dim is not None:
            self.cond_proj = nn.Linear(config.time_cond_proj_dim, config.time_frequencies, bias=False)
            self.cond_proj.weight.data.zero_()  # a student starts as its teacher exactly

        self.conv_in = nn.Conv2d(config.in_channels, fine, 3, padding=1)
        self.down_fine = residual(fine, fine)
        self.shrink_fine = nn.Conv2d(fine, fine, 3, stride=2, padding=1)
        self.down_middle, self.attend_down_middle = residual(fine, coarse), attention()
        self.shrink_middle = nn.Conv2d(coarse, coarse, 3, stride=2, padding=1)
        self.down_coarse, self.attend_down_coarse = residual(coarse, coarse), attention()
        self.up_coarse, self.attend_up_coarse = residual(2 * coarse, coarse), attention()
        self.grow_coarse = nn.Conv2d(coarse, coarse, 3, padding=1)
        self.up_middle, self.attend_up_middle = residual(2 * coarse, coarse), attention()
        # convolving before the picture is enlarged costs a quarter of convolving after it
        self.grow_middle = nn.Conv2d(coarse, fine, 3, padding=1)
        self.up_fine = residual(2 * fine, fine)
        self.norm_out = nn.GroupNorm(groups, fine)
        self.conv_out = nn.Conv2d(fine, config.in_channels, 3, padding=1)
        for weight in self.conv_out.parameters():
            nn.init.zeros_(weight)
        # convolutions are 10 % faster on pixels whose channels lie together
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.conv_in.weight.device

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoiserOutput | tuple[Tensor]:
        """Args: ``sample [B, C, H, W]`` noisy images, H and W multiples of 4; ``timestep`` a number or
        ``[B]`` in 0..999; ``encoder_hidden_states [B, L, cross_attention_dim]``; ``timestep_cond
        [B, time_cond_proj_dim]``, see `schedule.guidance_embedding`.

        Returns the predicted noise ``[B, C, H, W]`` as ``.sample``, or ``(noise,)``.
        Raises ``ValueError`` if the image cannot be halved twice or ``timestep_cond`` has no place to go.
        """
        if sample.shape[-1] % 4 or sample.shape[-2] % 4:
            raise ValueError(f"height and width must be multiples of 4, not {tuple(sample.shape[-2:])}")
        context = encoder_hidden_states
        timestep = (
            torch.as_tensor(timestep, device=sample.device).to(sample.dtype).reshape(-1).expand(len(sample))
        )
        angles = timestep[:, None] * self.frequencies.to(sample.dtype)[None]
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        if timestep_cond is not None:
            if self.cond_proj is None:
                raise ValueError("timestep_cond was given, but this denoiser has time_cond_proj_dim None")
            waves = waves + self.cond_proj(timestep_cond.to(sample.dtype))
        embedding = F.silu(self.time_embedding(waves) + self.caption_embedding(context.mean(dim=1)))

        x = sample.contiguous(memory_format=torch.channels_last)
        fine = self.down_fine(self.conv_in(x), embedding)
        middle = self.attend_down_middle(self.down_middle(self.shrink_fine(fine), embedding), context)
        shrunk = self.shrink_middle(middle)
        coarse = self.attend_down_coarse(self.down_coarse(shrunk, embedding), context)
        h = self.up_coarse(torch.cat([coarse, shrunk], dim=1), embedding)
        h = self.attend_up_coarse(h, context)
        h = F.interpolate(self.grow_coarse(h), scale_factor=2.0, mode="nearest")
        h = self.attend_up_middle(self.up_middle(torch.cat([h, middle], dim=1), embedding), context)
        h = F.interpolate(self.grow_middle(h), scale_factor=2.0, mode="nearest")
        h = self.up_fine(torch.cat([h, fine], dim=1), embedding)
        noise = self.conv_out(F.silu(self.norm_out(h))).contiguous()
        return DenoiserOutput(noise) if return_dict else (noise,)


@dataclass
class TextEncoderConfig:
    """Shape of a `TextEncoder`."""

    vocab_size: int
    max_length: int = 16
    hidden_size: int = 64

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TextEncoderConfig:
        """Inverse of `to_dict`."""
        return cls(**values)


@dataclass
class TextEncoderOutput:
    """What a `TextEncoder` returns; indexable as transformers' model outputs are."""

    last_hidden_state: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


class TextEncoder(nn.Module):
    """A vector for each word plus a vector for its place."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Parameter(0.1 * torch.randn(config.max_length, config.hidden_size))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TextEncoderOutput:
        """``input_ids [B, L]`` (L at most ``max_length``) to hidden states ``[B, L, hidden_size]``."""
        return TextEncoderOutput(self.words(input_ids) + self.places[: input_ids.shape[1]])


@dataclass
class TokenizerOutput:
    """What a `WordTokenizer` returns."""

    input_ids: Tensor | list[list[int]]
    attention_mask: Tensor | list[list[int]]

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


@dataclass
class WordTokenizer:
    """Words to numbers, by a fixed list.

    Prompts are lower-cased, stripped of punctuation and split at white space; `aliases` spell a few words
    another way ("gray" as "grey"). A word not in `vocabulary` becomes ``<unk>``. The empty prompt is all
    ``<pad>``: that is the unconditional caption.
    """

    vocabulary: list[str]
    model_max_length: int = 16
    aliases: dict[str, str] = field(default_factory=dict)

    PAD = "<pad>"
    UNKNOWN = "<unk>"

    def __post_init__(self) -> None:
        self.index = {word: number for number, word in enumerate(self.vocabulary)}
        if self.vocabulary[:2] != [self.PAD, self.UNKNOWN] or len(self.index) != len(self.vocabulary):
            raise ValueError("a vocabulary starts with <pad>, <unk> and holds each word once")

    @classmethod
    def from_words(
        cls, words: Iterable[str], model_max_length: int = 16, aliases: dict[str, str] | None = None
    ) -> WordTokenizer:
        """A tokenizer of these words, sorted, after ``<pad>`` and ``<unk>``."""
        return cls([cls.PAD, cls.UNKNOWN, *sorted(set(words))], model_max_length, aliases or {})

    @property
    def pad_token_id(self) -> int:
        """The number of ``<pad>``."""
        return 0

    def __len__(self) -> int:
        return len(self.vocabulary)

    def split(self, prompt: str) -> list[str]:
        """The prompt's words as they are looked up."""
        words = prompt.lower().translate(_BLANKS).split()
        return [self.aliases.get(word, word) for word in words]

    def __call__(
        self,
        text: str | Sequence[str],
        padding: str | bool = "max_length",
        max_length: int | None = None,
        truncation: bool = True,
        return_tensors: str | None = None,
    ) -> TokenizerOutput:
        """``input_ids`` and ``attention_mask`` ``[B, L]`` of one prompt or several.

        ``padding`` is ``"max_length"`` or True/``"longest"``; ``return_tensors`` is ``"pt"`` or None (lists).
        Raises ``ValueError`` if a prompt is too long and ``truncation`` is off.
        """
        limit = max_length or self.model_max_length
        prompts = [text] if isinstance(text, str) else list(text)
        rows = [[self.index.get(word, 1) for word in self.split(prompt)] for prompt in prompts]
        longest = max((len(row) for row in rows), default=0)
        if longest > limit and not truncation:
            raise ValueError(f"a prompt has {longest} words; at most {limit} fit")
        width = limit if padding == "max_length" else min(max(longest, 1), limit)
        mask = [[1] * len(row[:width]) + [0] * (width - len(row[:width])) for row in rows]
        ids = [row[:width] + [0] * (width - len(row[:width])) for row in rows]
        if return_tensors == "pt":
            shape = (len(rows), width)
            return TokenizerOutput(
                torch.tensor(ids, dtype=torch.long).reshape(shape),
                torch.tensor(mask, dtype=torch.long).reshape(shape),
            )
        return TokenizerOutput(ids, mask)

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """The words of one row of ``input_ids``."""
        words = [self.vocabulary[int(number)] for number in ids]
        return " ".join(word for word in words if not (skip_special_tokens and word.startswith("<")))

    def batch_decode(
        self, ids: Iterable[Sequence[int]] | Tensor, skip_special_tokens: bool = True
    ) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row, skip_special_tokens) for row in ids]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {"vocab": self.vocabulary, "max_length": self.model_max_length, "aliases": self.aliases}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WordTokenizer:
        """Inverse of `to_dict`."""
        return cls(list(values["vocab"]), values["max_length"], dict(values.get("aliases", {})))


def save_text_to_image(
    directory: str | Path,
    kind: str,
    denoiser: Denoiser,
    text_encoder: TextEncoder,
    tokenizer: WordTokenizer,
    schedule: dict[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` (keys ``denoiser.*`` and ``text_encoder.*``) into
    ``directory``. Each file is written beside its place and then renamed, so that a reader never sees half.

    ``kind`` is ``"diffusion"`` or ``"consistency"``; ``schedule`` is ``NoiseSchedule.to_dict()``.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "kind": kind,
        "denoiser": denoiser.config.to_dict(),
        "text_encoder": text_encoder.config.to_dict(),
        "tokenizer": tokenizer.to_dict(),
        "schedule": schedule,
    }
    parts = (("denoiser", denoiser), ("text_encoder", text_encoder))
    weights = {
        f"{name}.{key}": value.detach().to("cpu", dtype, memory_format=torch.contiguous_format)
        for name, module in parts
        for key, value in module.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors.tmp")
    (directory / "model.safetensors.tmp").chmod(0o644)  # safetensors writes 0600
    (directory / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "model.safetensors.tmp").replace(directory / "model.safetensors")
    (directory / "config.json.tmp").replace(directory / "config.json")


def load_text_to_image(
    directory: str | Path, device: str | torch.device = "cpu"
) -> tuple[Denoiser, TextEncoder, WordTokenizer, dict[str, Any]]:
    """Read what `save_text_to_image` wrote, weights as float32 and in evaluation mode.

    Returns ``(denoiser, text_encoder, tokenizer, config)``; ``config["schedule"]`` are the fields of a
    `NoiseSchedule`, ``config["kind"]`` is ``"diffusion"`` or ``"consistency"``.
    Raises ``FileNotFoundError`` if the directory holds no such model.
    """
    from safetensors.torch import load_file

    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    weights = {key: value.float() for key, value in load_file(directory / "model.safetensors").items()}
    denoiser = Denoiser(DenoiserConfig.from_dict(config["denoiser"]))
    text_encoder = TextEncoder(TextEncoderConfig.from_dict(config["text_encoder"]))
    for name, module in (("denoiser.", denoiser), ("text_encoder.", text_encoder)):
        module.load_state_dict(
            {key.removeprefix(name): w for key, w in weights.items() if key.startswith(name)}
        )
        module.to(device).eval()
    return denoiser, text_encoder, WordTokenizer.from_dict(config["tokenizer"]), config
