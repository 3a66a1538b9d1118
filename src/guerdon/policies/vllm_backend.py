"""Sampling by vLLM, for language models on a GPU: ``policy.sample(..., backend="vllm")``.

vLLM is a server's engine of its own with its own copy of the weights. This adapter starts one engine a policy in this
process, hands it the current weights before it samples, and turns its answers into the arrays that
`guerdon.policies.generation.generate` returns. What differs from guerdon's own sampler:

* A row is drawn with the row's seed, but by vLLM's generator and its kernels: the tokens are others than those of
  guerdon's own sampler, and may change with the version of vLLM or with the rows beside them.
* vLLM's log-probabilities are of its own kernels. So the policy evaluates the answers once more, and ``log_prob`` is
  what training sees.
* ``allowed`` and mixtures with a second model are refused.

It was written against vLLM's documented interface (``LLM``, ``SamplingParams``, ``LLM.apply_model``) and has not been
run by its authors, who had no GPU: treat the first run as a test.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from guerdon.errors import UsageError
from guerdon.policies import lora
from guerdon.policies.generation import Generated

MEMORY = 0.4  # share of the GPU that the engine may take; the rest is for training

_engines: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def generate(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Tensor,
    max_new_tokens: int | Tensor,
    temperature: float | Tensor,
    reference: Any = None,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    min_new_tokens: int = 0,
    mixture: float = 0.0,
) -> Generated:
    """The answers of `guerdon.policies.generation.generate`, by vLLM; see the module for what differs.

    Args:
        policy: a `LanguagePolicy` on a CUDA device.

    Raises `UsageError` when vLLM is not installed or cannot do what is asked.
    """
    if reference is not None or mixture:
        raise UsageError("vLLM samples from one model; leave out backend to mix two")
    if policy.allowed is not None:
        raise UsageError("the vLLM backend does not pass on which tokens are allowed; leave out backend")
    try:
        import vllm
    except ImportError as error:
        raise UsageError("backend='vllm' needs vLLM, which is not installed: pip install vllm") from error
    engine = _engine(policy, vllm)
    limits = torch.as_tensor(max_new_tokens).expand(len(prompts)).tolist()
    heat = torch.as_tensor(temperature, dtype=torch.float32).expand(len(prompts)).tolist()
    settings = [
        vllm.SamplingParams(
            n=1,
            seed=seed,
            max_tokens=limit,
            min_tokens=min_new_tokens,
            temperature=0.0 if greedy else warmth,
            top_k=top_k or -1,
            top_p=top_p,
            stop_token_ids=[int(policy.tokenizer.eos_token_id)],
            detokenize=False,
        )
        for seed, limit, warmth in zip(seeds.tolist(), limits, heat, strict=True)
    ]
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    found = engine.generate(requests, settings, use_tqdm=False)
    answers = [list(request.outputs[0].token_ids) for request in found]
    traj = policy.collate(prompts, answers)
    traj.inputs["temperature"] = torch.tensor(heat, device=traj.mask.device)
    with torch.no_grad():
        log_prob = policy.log_prob(traj)
    return Generated(traj.inputs["step", "token"], log_prob, traj.mask)


def _engine(policy: Any, vllm: Any) -> Any:
    """The policy's engine, with the weights that the policy has now (an adapter that is on, added in)."""
    model = policy.model
    if next(model.parameters()).device.type != "cuda":
        raise UsageError("backend='vllm' is for models on a GPU; leave it out on a CPU")
    if isinstance(model, lora._Without):
        raise UsageError("the vLLM backend cannot switch an adapter off; leave out backend")
    if model not in _engines:
        with tempfile.TemporaryDirectory() as folder:
            policy.save_pretrained(folder)
            if lora.has_lora(model):  # the engine wants whole weights
                model.config.save_pretrained(folder)
            _engines[model] = vllm.LLM(
                model=folder,
                tokenizer=folder,
                load_format="dummy",
                gpu_memory_utilization=MEMORY,
                enforce_eager=True,
            )
    state = lora.merged_state_dict(model) if lora.has_lora(model) else model.state_dict()
    weights = list(state.items())
    _engines[model].apply_model(lambda inner: inner.load_weights(iter(weights)) and None)
    return _engines[model]
