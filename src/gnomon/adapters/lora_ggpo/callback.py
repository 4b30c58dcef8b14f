"""GGPO, MGPO and Flat-LoRA in `transformers.Trainer` and the trainers built on it."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback

from gnomon.adapters.lora_ggpo.momentum import set_momentum, unwrapped
from gnomon.adapters.lora_ggpo.perturbation import Backend, Perturbation
from gnomon.adapters.lora_ggpo.rules import GGPO, MGPO
from gnomon.common.trainer_logs import add_to_logs
from gnomon.errors import GnomonWarning, ModelError

__all__ = ["FlatLoRACallback", "GGPOCallback", "MGPOCallback"]


class _Callback(TrainerCallback):
    """Opens a perturbation when a step begins and closes it before the optimizer's step."""

    name = ""

    def __init__(self, rule: GGPO | MGPO, backend: Backend, seed: int, per_rank: bool, adapter: str | None) -> None:
        self.rule = rule
        self._options: dict[str, Any] = {
            "backend": backend,
            "seed": seed,
            "per_rank": per_rank,
            "adapter": adapter,
        }
        self.perturbation: Perturbation | None = None

    def close(self) -> None:
        """Take the perturbation off; needed only after a training step that failed."""
        if self.perturbation is not None:
            self.perturbation.close()

    def _rule(self, optimizer: Any, steps: int) -> GGPO | MGPO:
        return self.rule

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Find the LoRA layers, refuse what cannot be perturbed, go on from a checkpoint when training resumes."""
        if getattr(args, "deepspeed", None):
            raise ModelError(
                "DeepSpeed keeps gradients and momenta to itself. Train with DDP or FSDP2, or without this callback."
            )
        if model is None or optimizer is None:
            raise ModelError(f"{type(self).__name__} was given no model or optimizer. Use it in transformers.Trainer.")
        if self.perturbation is not None:
            self.perturbation.detach()
        scaler = getattr(optimizer, "scaler", None)
        rule = self._rule(optimizer, int(state.max_steps))
        self.perturbation = Perturbation(model, optimizer, rule, scaler=scaler, **self._options)
        self.perturbation.steps = int(state.global_step)
        if state.global_step:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self._file
            if file.is_file():
                self.perturbation.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            else:
                warnings.warn(
                    f"There is no {file}, so the gradient norms are averaged anew from step {state.global_step}.",
                    GnomonWarning,
                    stacklevel=2,
                )

    @property
    def _file(self) -> str:
        return f"{self.name}.pt"

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Perturb the weights for all micro-batches of the step."""
        if self.perturbation is not None:
            self.perturbation.open(measure="in-backward")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the weights back."""
        self.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the weights back, should a trainer leave out the event before."""
        self.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the perturbation's size to the logs."""
        if self.perturbation is not None and logs is not None and "loss" in logs:
            add_to_logs(state, logs, self._figures(self.perturbation))

    def _figures(self, perturbation: Perturbation) -> dict[str, float]:
        return {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what lasts from step to step into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.perturbation is not None and state.is_world_process_zero and folder.is_dir():
            part = folder / f"{self._file}.part"
            torch.save(self.perturbation.state_dict(), part)
            os.replace(part, folder / self._file)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take everything off the model and the optimizer."""
        if self.perturbation is not None:
            self.perturbation.detach()


class GGPOCallback(_Callback):
    """Trains a LoRA at randomly perturbed merged weights (GGPO).

    Parameters
    ----------
    sigma : float, default 0.03
        Size of the noise against the norm of a row of the merged weight.
    beta : float, default 0.01
        Weight of the gradient's squared row norm, in [0, 1).
    ramp : {"none", "cosine"}, default "none"
        "cosine" lets sigma rise from 0 over the training, as Flat-LoRA does.
    backend : {"auto", "weight", "functional"}, default "auto"
        See `Perturbation`.
    seed : int, default 0
    per_rank : bool, default False
        Noise of its own on every rank.
    adapter : str, optional
        Default the active one.

    Raises
    ------
    MethodError
        When a value is outside its range; at the start of training, when the optimizer is not the adapter's.
    ModelError
        At the start of training, when the model has no plain LoRA or cannot be perturbed so.

    Examples
    --------
    >>> callback = GGPOCallback(sigma=0.03, beta=0.01)
    >>> # Trainer(model=peft_model, ..., callbacks=[callback])
    """

    name = "lora-ggpo"

    def __init__(
        self,
        sigma: float = 0.03,
        beta: float = 0.01,
        ramp: Literal["none", "cosine"] = "none",
        backend: Backend = "auto",
        seed: int = 0,
        per_rank: bool = False,
        adapter: str | None = None,
    ) -> None:
        super().__init__(GGPO(sigma, beta, ramp), backend, seed, per_rank, adapter)

    def _rule(self, optimizer: Any, steps: int) -> GGPO:
        assert isinstance(self.rule, GGPO)
        return GGPO(self.rule.sigma, self.rule.beta, self.rule.ramp, max(1, steps))

    def _figures(self, perturbation: Perturbation) -> dict[str, float]:
        assert isinstance(perturbation.rule, GGPO)
        return {"ggpo_sigma": perturbation.rule.sigma_at(max(0, perturbation.steps - 1))}


class FlatLoRACallback(GGPOCallback):
    """Flat-LoRA: GGPO without the gradient term, sigma rising with a cosine.

    Parameters
    ----------
    sigma : float, default 0.05
        The value at the end of training (the authors' rho).
    backend, seed, per_rank, adapter
        As for `GGPOCallback`.

    Examples
    --------
    >>> FlatLoRACallback().rule.beta
    0.0
    """

    name = "flat-lora"

    def __init__(
        self,
        sigma: float = 0.05,
        backend: Backend = "auto",
        seed: int = 0,
        per_rank: bool = False,
        adapter: str | None = None,
    ) -> None:
        super().__init__(sigma, 0.0, "cosine", backend, seed, per_rank, adapter)


class MGPOCallback(_Callback):
    """Trains a LoRA at merged weights moved along the optimizer's momentum (MGPO).

    Parameters
    ----------
    rho : float, default 0.05
        Length of a layer's perturbation before the division by its averaged gradient norm.
    beta : float, default 0.9
        Of that average, in [0, 1).
    mu : float, optional
        Sets the optimizer's beta1 (or SGD's momentum) to it; the authors use 0.9 and 0.8. Default: as it is.
    sign : {-1, 1}, default -1
        -1 looks ahead, as the authors do; +1 ascends.
    backend : {"auto", "weight", "functional"}, default "auto"
        See `Perturbation`.
    adapter : str, optional
        Default the active one.

    Raises
    ------
    MethodError
        When a value is outside its range; at the start of training, when the optimizer keeps no momentum that could be
        read.
    ModelError
        At the start of training, when the model has no plain LoRA or cannot be perturbed so.

    Examples
    --------
    >>> callback = MGPOCallback(rho=0.01, beta=0.8, mu=0.8)
    >>> # Trainer(model=peft_model, ..., callbacks=[callback])
    """

    name = "mgpo"

    def __init__(
        self,
        rho: float = 0.05,
        beta: float = 0.9,
        mu: float | None = None,
        sign: Literal[-1, 1] = -1,
        backend: Backend = "auto",
        adapter: str | None = None,
    ) -> None:
        super().__init__(MGPO(rho, beta, sign), backend, 0, False, adapter)
        self.mu = mu

    def _rule(self, optimizer: Any, steps: int) -> GGPO | MGPO:
        if self.mu is not None:
            set_momentum(unwrapped(optimizer), self.mu)
        return self.rule

    def _figures(self, perturbation: Perturbation) -> dict[str, float]:
        norms = [float(value) for value in perturbation.memory.values()]
        found = {"mgpo_skipped": float(perturbation.skipped)}
        if norms:
            found["mgpo_gradient_norm"] = math.fsum(norms) / len(norms)
        return found
