"""A byte-level tokenizer with and without a chat template, and tiny language models that use it."""

from __future__ import annotations

from typing import Any

from guerdon.policies.language import LanguagePolicy
from guerdon.tasks.tokens import tiny_llama

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_end|>", "<|im_start|>", "<s>"]


def byte_tokenizer(chat: bool = True, begin: bool = False) -> Any:
    """A token for each byte. ``begin``: every text starts with ``<s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if begin:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        bos_token="<s>" if begin else None,
        extra_special_tokens=["<|im_start|>"],
        padding_side="left",
    )
    if chat:
        tokenizer.chat_template = ("<s>" if begin else "") + CHATML
    return tokenizer


def byte_policy(chat: bool = True, begin: bool = False) -> LanguagePolicy:
    """A tiny Llama over bytes, 64 positions."""
    return LanguagePolicy(tiny_llama(3 + 256, width=16, layers=1), byte_tokenizer(chat, begin))


def said(*turns: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
