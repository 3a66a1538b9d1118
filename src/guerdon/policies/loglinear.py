"""A log-linear policy over arms that can be enumerated: the smallest policy that generalises from arms it has seen to
arms it has not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from guerdon.errors import ShapeError, UsageError
from guerdon.policies.base import Policy
from guerdon.policies.tabular import CategoricalTable


class LogLinear(CategoricalTable):
    """``log pi(a | x) = log pi_ref(a | x) + phi(x, a) . theta - log Z(x)``, in each of a few named contexts.

    It begins as its reference (``theta`` is 0), and what moves one arm moves all arms with similar features: the
    policy class in which a loss on recorded pairs decides about arms that no pair covers (Song et al., 2024).

    Args:
        contexts: ``C`` names of contexts; `sample`'s prompts are among them.
        features: ``[C, A, d]``, phi.
        reference: ``[C, A]``, log pi_ref (any multiple of the probabilities will do).

    Only ``theta [d]`` trains. Raises `ShapeError` where features, reference and contexts do not fit one another.
    """

    def __init__(self, contexts: Sequence[str], features: Tensor, reference: Tensor) -> None:
        Policy.__init__(self)
        if features.ndim != 3 or features.shape[0] != len(contexts):
            raise ShapeError(
                f"the features have shape {list(features.shape)}, expected [{len(contexts)}, arms, numbers]"
            )
        if reference.shape != features.shape[:2]:
            raise ShapeError(
                f"the reference has shape {list(reference.shape)}, expected {list(features.shape[:2])}"
            )
        self.contexts = list(contexts)
        self._index = {name: i for i, name in enumerate(self.contexts)}
        self.features: Tensor
        self.reference: Tensor
        self.register_buffer("features", features.clone())
        self.register_buffer("reference", reference.log_softmax(-1))
        self.theta = nn.Parameter(features.new_zeros(features.shape[2]))

    @property
    def logits(self) -> Tensor:  # type: ignore[override]
        """``[C, A]``, up to a constant a context; differentiable."""
        return self.reference + self.features @ self.theta

    def save_pretrained(self, folder: str | Path) -> None:
        """``model.safetensors`` and ``config.json``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, str(folder / "model.safetensors"))
        config = {"kind": self.kind, "class": "LogLinear", "contexts": self.contexts}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LogLinear:
        """Read what `save_pretrained` wrote. Raises `UsageError` when there is no such model."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            saved = load_file(str(Path(folder) / "model.safetensors"))
            policy = cls(config["contexts"], saved["features"], saved["reference"])
            policy.load_state_dict(saved)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"no log-linear policy at '{folder}': {reason}") from error
        return policy

    def arms(self) -> Tensor:
        """``[C, A]``: log pi of every arm, without gradient."""
        with torch.no_grad():
            return self.logits.log_softmax(-1)
