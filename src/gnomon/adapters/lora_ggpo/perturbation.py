"""Perturbs a model's merged weights from the start of a training step to the end of its backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal
from weakref import WeakSet

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor

from gnomon.adapters.lora_ggpo import backends, rules
from gnomon.adapters.lora_ggpo.backends import Gate, Noise, Undo
from gnomon.adapters.lora_ggpo.layers import (
    check_unmerged,
    checked_pairs,
    exactly,
    is_trained,
    layer_noise,
    layer_seed,
)
from gnomon.adapters.lora_ggpo.momentum import check_optimizer, full, momentum, unwrapped
from gnomon.adapters.lora_ggpo.rules import GGPO, MGPO
from gnomon.common.lora import LoraPair
from gnomon.common.ranks import ranks
from gnomon.errors import GnomonWarning, MethodError, ModelError

__all__ = ["Backend", "Perturbation", "perturbed"]

Backend = Literal["auto", "weight", "functional"]

_MOVED: WeakSet[nn.Module] = WeakSet()
"""The LoRA layers that some perturbation moves now."""


class Perturbation:
    """Moves the merged weights of a LoRA model while a training step computes its loss and gradients.

    Used as a context around the forward and backward pass of every micro-batch. It holds what lasts from step to step:
    the averaged gradient norms of MGPO, the gradient's row norms of GGPO, the number of steps made. `perturbed` makes
    one and keeps it with the optimizer.

    Parameters
    ----------
    model : nn.Module
        With a plain PEFT LoRA; may be wrapped by DistributedDataParallel or sharded by FSDP2.
    optimizer : torch.optim.Optimizer
        Of the adapter. Its steps are watched; MGPO reads its momentum.
    rule : GGPO or MGPO
    backend : {"auto", "weight", "functional"}, default "auto"
        "weight" holds W + eps of every layer during the step. "functional" holds no matrix of that size and works on
        quantised and sharded weights. "auto" takes "weight" for float32 and float64.
    seed : int, default 0
        Of GGPO's noise, together with the step and the layer's name.
    per_rank : bool, default False
        Give every rank noise of its own, averaged by the gradient's reduction.
    adapter : str, optional
        Default the active one.
    scaler : torch.amp.GradScaler, optional
        Whose scale is on the gradients.

    Raises
    ------
    ModelError, MethodError
        When the model, the optimizer or the back-end does not allow it.

    Examples
    --------
    >>> import peft
    >>> from gnomon.common.models import tiny
    >>> model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    >>> ids = torch.ones(1, 4, dtype=torch.long)
    >>> with Perturbation(model.train(), optimizer, MGPO(rho=0.01)) as perturbation:
    ...     model(input_ids=ids, labels=ids).loss.backward()
    >>> optimizer.step()
    >>> perturbation.steps
    1
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        rule: GGPO | MGPO,
        *,
        backend: Backend = "auto",
        seed: int = 0,
        per_rank: bool = False,
        adapter: str | None = None,
        scaler: Any = None,
    ) -> None:
        if backend not in ("auto", "weight", "functional"):
            raise MethodError(f"backend = {backend!r}. Allowed: 'auto', 'weight', 'functional'.")
        self.rule, self.backend, self.seed, self.scaler = rule, backend, seed, scaler
        self.pairs = checked_pairs(model, adapter)
        self.optimizer = unwrapped(optimizer)
        trained = {f"lora_{n} of {p.name}": getattr(p, n.lower()) for p in self.pairs for n in "AB"}
        trained = {name: factor for name, factor in trained.items() if factor.requires_grad}
        check_optimizer(self.optimizer, trained, isinstance(rule, MGPO))
        if isinstance(rule, GGPO):
            rule.sigma_at(0)
        for pair in self.pairs:
            self._backend_of(pair)
        self.rank = ranks().process_index if per_rank else 0
        self.steps = 0
        self.skipped = 0
        self.memory: dict[str, Tensor] = {}
        """By layer: the moving average of its gradient norm (MGPO), the row norms of its last gradient (GGPO)."""
        self._measured: dict[str, Tensor] = {}
        self._ready: dict[str, Any] = {}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._finite: list[Tensor] = []
        self._undo: list[Undo] = []
        self._pending: set[str] = set()
        self._queued = False
        self._watch = self.optimizer.register_step_post_hook(lambda *_: self._stepped())

    # -- the window ------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether the weights are perturbed now."""
        return bool(self._undo)

    def open(self, measure: Literal["after", "in-backward"] = "after") -> None:
        """Perturb every layer until `close`; in evaluation mode the layers stay as they are.

        Parameters
        ----------
        measure : {"after", "in-backward"}, default "after"
            "in-backward" measures the gradients at the end of every backward pass by itself, before anybody clips
            them; with "after" call `measure`.
        """
        self.close()
        check_unmerged(self.pairs)
        self._queued = False
        try:
            for pair in self.pairs:
                if pair.layer in _MOVED:
                    raise MethodError(
                        f"another perturbation of {pair.name} is open. Use one at a time, and call its close() first "
                        "(after a step that failed, say)."
                    )
                _MOVED.add(pair.layer)
                self._undo.append(partial(_MOVED.discard, pair.layer))
                with exactly(pair.b.device):
                    self._factors.setdefault(pair.name, (full(pair.b), full(pair.a)))
                    self._undo.extend(self._move(pair, partial(is_trained, pair)))
                if measure == "in-backward":
                    self._undo.append(pair.layer.register_forward_hook(partial(self._arm, pair.name)).remove)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give every layer its own weight back. Does nothing when closed."""
        while self._undo:
            self._undo.pop()()

    def _backend_of(self, pair: LoraPair) -> Literal["weight", "functional"]:
        base = pair.layer.get_base_layer()
        plain = backends.is_plain(base)
        sharded = plain and isinstance(base.weight, DTensor)
        if self.backend == "weight" and (not plain or sharded or base.weight.is_meta):
            raise ModelError(
                f"backend = 'weight' cannot be used at {pair.name}: its base weight is "
                f"{'sharded' if sharded else 'quantised or offloaded'} ({type(base).__name__}). Use "
                "backend='functional'."
            )
        if self.backend != "auto":
            return self.backend
        wide = plain and not sharded and not base.weight.is_meta and base.weight.dtype.itemsize >= 4
        return "weight" if wide else "functional"

    def _move(self, pair: LoraPair, gate: Gate) -> list[Undo]:
        if isinstance(self.rule, MGPO):
            return self._with_momentum(pair, gate, self.rule)
        return self._with_noise(pair, gate, self.rule)

    def _with_momentum(self, pair: LoraPair, gate: Gate, rule: MGPO) -> list[Undo]:
        if pair.name not in self._ready:
            b, a = self._factors[pair.name]
            stepped = self.steps > 0
            moments = [
                momentum(self.optimizer, factor, f"lora_{n} of {pair.name}", stepped)
                for n, factor in (("B", pair.b), ("A", pair.a))
            ]
            self._ready[pair.name] = None
            if moments[0] is not None and moments[1] is not None:
                found = rules.mgpo_factors(b, a, moments[0], moments[1], pair.scaling, rule, self.memory.get(pair.name))
                self._ready[pair.name] = found[:2]
                self._finite.append(found[2])
        if self._ready[pair.name] is None:
            return []
        left, right = self._ready[pair.name]
        if self._backend_of(pair) == "functional":
            return [backends.add_low_rank(pair, left, right, gate)]
        weight = pair.weight.detach()
        wide = left.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        moved = torch.addmm(weight.to(wide.dtype), wide, right.to(wide)).to(weight.dtype)
        return [backends.swap_weight(pair, moved, gate)]

    def _with_noise(self, pair: LoraPair, gate: Gate, rule: GGPO) -> list[Undo]:
        sigma = rule.sigma_at(self.steps)
        if sigma == 0:
            return []

        def make() -> Noise:
            if pair.name not in self._ready:
                self._ready[pair.name] = layer_noise(
                    pair,
                    self._factors[pair.name],
                    self.memory.get(pair.name),
                    sigma,
                    rule.beta,
                    layer_seed(self.seed, self.rank, self.steps, pair.name),
                )
            found: Noise = self._ready[pair.name]
            return found

        if self._backend_of(pair) == "functional":
            return [backends.add_noise(pair, make, gate)]
        weight = pair.weight.detach()
        return [backends.swap_weight(pair, make().added_to(weight, weight.dtype), gate)]

    # -- what is learnt from the gradients -------------------------------------------------------------------------

    def _arm(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad and torch.is_grad_enabled():
            output.register_hook(partial(self._due, name))

    def _due(self, name: str, grad: Tensor) -> None:
        self._pending.add(name)
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._behind_the_others)

    def _behind_the_others(self) -> None:
        # DDP finishes its reduction in such a callback too, and may have asked for it later than we did.
        Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        names, self._pending, self._queued = self._pending, set(), False
        if GradientState().sync_gradients:
            self.measure(names)

    def measure(self, names: set[str] | None = None) -> None:
        """Read the accumulated gradients of the factors, before they are clipped; used once the optimizer has stepped.

        Parameters
        ----------
        names : set of str, optional
            Layers to read; default all.
        """
        if isinstance(self.rule, GGPO) and (self.rule.beta == 0 or self.rule.sigma == 0):
            return
        norm = rules.gradient_norm if isinstance(self.rule, MGPO) else rules.gradient_row_norms
        scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        for pair in self.pairs:
            if (names is None or pair.name in names) and not (pair.a.grad is None and pair.b.grad is None):
                with exactly(pair.b.device):
                    b, a = self._factors.get(pair.name) or (full(pair.b), full(pair.a))
                    b_grad = torch.zeros_like(b) if pair.b.grad is None else full(pair.b.grad)
                    a_grad = torch.zeros_like(a) if pair.a.grad is None else full(pair.a.grad)
                    self._measured[pair.name] = norm(b, a, b_grad, a_grad, pair.scaling) / scale

    def _stepped(self) -> None:
        """Take over what was measured: the optimizer has made its step."""
        for name, value in self._measured.items():
            if isinstance(self.rule, MGPO):
                self.memory[name] = rules.next_average(self.memory.get(name), value, self.rule.beta)
            else:
                old = self.memory.get(name, torch.zeros_like(value))
                self.memory[name] = torch.where(torch.isfinite(value).all(), value, old)
        if self._finite:
            bad = int((~torch.stack([x.to(self._finite[0].device) for x in self._finite])).sum())
            if bad and not self.skipped:
                warnings.warn(
                    f"step {self.steps}: the momentum of {bad} layers is not finite; they were not perturbed. Further "
                    "such steps are counted in `skipped` without a word.",
                    GnomonWarning,
                    stacklevel=2,
                )
            self.skipped += bad
        self.steps += 1
        self._forget()

    def _forget(self) -> None:
        self._measured, self._ready, self._factors, self._finite = {}, {}, {}, []

    def detach(self) -> None:
        """Close, and stop watching the optimizer."""
        self.close()
        self._watch.remove()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what lasts from step to step, as tensors on the CPU; equal on every rank."""
        memory = {name: value.cpu() for name, value in self.memory.items()}
        return {"rule": type(self.rule).__name__, "steps": self.steps, "skipped": self.skipped, "memory": memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises
        ------
        MethodError
            When it is of another rule or another model.
        """
        if state["rule"] != type(self.rule).__name__:
            raise MethodError(f"the state is of {state['rule']}, not of {type(self.rule).__name__}. Use the same rule.")
        pairs = {pair.name: pair for pair in self.pairs}
        unknown = sorted(set(state["memory"]) - set(pairs))
        if unknown:
            raise MethodError(
                f"the state has the layer {unknown[0]}, which this adapter has not. Attach the same LoRA."
            )
        self.close()
        self._forget()
        self.steps, self.skipped = int(state["steps"]), int(state["skipped"])
        self.memory = {name: value.to(pairs[name].b.device) for name, value in state["memory"].items()}

    def __enter__(self) -> Perturbation:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            self.measure()


_KEPT = "_gnomon_perturbation"


def perturbed(
    model: nn.Module,
    optimizer: Any,
    rule: GGPO | MGPO | None = None,
    *,
    backend: Backend = "auto",
    seed: int = 0,
    per_rank: bool = False,
    adapter: str | None = None,
    scaler: Any = None,
) -> Perturbation:
    """Return the context inside which one forward and backward pass sees perturbed weights.

    The perturbation is made at the first call and kept with the optimizer, so that further calls go on from it; a call
    with other options starts anew. Put every micro-batch of a step into such a context, the forward pass too. Clip
    gradients after it.

    Parameters
    ----------
    model, optimizer, backend, seed, per_rank, adapter, scaler
        As for `Perturbation`.
    rule : GGPO or MGPO, optional
        Default ``GGPO()``.

    Returns
    -------
    Perturbation

    Examples
    --------
    >>> import peft
    >>> from gnomon.common.models import tiny
    >>> model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    >>> ids = torch.ones(1, 4, dtype=torch.long)
    >>> for _ in range(2):
    ...     with perturbed(model, optimizer, GGPO(sigma=0.03)) as perturbation:
    ...         model(input_ids=ids, labels=ids).loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> perturbation.steps
    2
    """
    rule = GGPO() if rule is None else rule
    inner = unwrapped(optimizer)
    options = (id(model), rule, backend, seed, per_rank, adapter)
    kept: tuple[Any, Perturbation] | None = getattr(inner, _KEPT, None)
    if kept is None or kept[0] != options:
        if kept is not None:
            kept[1].detach()
        made = Perturbation(
            model, inner, rule, backend=backend, seed=seed, per_rank=per_rank, adapter=adapter, scaler=scaler
        )
        kept = (options, made)
        setattr(inner, _KEPT, kept)
    kept[1].scaler = scaler
    return kept[1]
