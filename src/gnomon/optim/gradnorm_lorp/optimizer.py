"""The optimizer: the two weight-normalised steps and the projected Adam of the adapter form."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gnomon.common import projection
from gnomon.common.projected_adam import ProjectedAdam
from gnomon.common.projected_optimizer import ProjectedOptimizer
from gnomon.common.tensors import wide
from gnomon.errors import GnomonWarning, MethodError, nearest
from gnomon.optim.gradnorm_lorp.weight_norm import (
    ZERO_ROW,
    inner,
    magnitude_gradient,
    new_magnitudes,
    squares,
    tangent,
)

__all__ = ["GradNormLoRP"]

_MODES = ("weightnorm", "authors")


class GradNormLoRP(ProjectedAdam):
    """Adam on row magnitudes and on projected row directions of each weight (AAAI 2025).

    Parameters
    ----------
    params : iterable of parameters, (name, parameter) pairs or groups
        Groups from `gradnorm_lorp_groups`, or dicts with ``rank``, ``update_proj_gap`` (200), ``alpha`` (1.0, the
        authors' ``scale``, also read under that name), ``proj_type`` ("std"), ``align`` ("none"), ``refresh``
        ("auto"), ``weight_norm`` (true; false steps the weights by the projected Adam alone, as the factors of a
        DoRA need it) and ``fan_in_fan_out`` (false; true for weights stored as (in, out), so that the norm runs
        over the inputs). Groups without a ``rank`` get ordinary AdamW, except in the mode "authors".
    lr : float, default 1e-3
        The authors fine-tune with 3e-5 and pre-train with 0.01. Mode "weightnorm" steps rows of norm 1, so its
        learning rate is not interchangeable with the others'. A tensor of one element is accepted too.
    betas : (float, float), default (0.9, 0.999)
    eps : float, default 1e-6
        Added before the bias correction.
    weight_decay : float, default 0
        Decoupled, after the update. The mode "authors" decays v and g, as their code does.
    mode : {"weightnorm", "authors"}, default "weightnorm"
        "weightnorm": magnitude and direction are read off the weight at every step; nothing but the moments and the
        projector is stored. "authors": the released optimizer, which keeps a full copy v of every weight (its
        state is larger than GaLore's), forgets the magnitude after one step and treats the groups without a rank in
        the same way at full rank.
    correct_bias : bool, default True
    bits : {32, 8}, default 32
        8 keeps the moments of directions with 4096 entries and more in blocks of 8-bit values (by bitsandbytes where
        it is installed); the projector, the magnitudes' moments and v stay in full precision.
    foreach : bool, optional
        Step groups of ordinary AdamW by torch's multi-tensor operations. Default: yes.
    maximize : bool, default False
    seed : int, default 0
        Of the random directions that a randomised refresh adds.

    Raises
    ------
    MethodError
        When a value is out of range, or a parameter that is to be normalised has more than two dimensions.

    Examples
    --------
    >>> layer = torch.nn.Linear(20, 12)
    >>> groups = [{"params": [layer.weight], "rank": 4}, {"params": [layer.bias]}]
    >>> optimizer = GradNormLoRP(groups, lr=0.03)
    >>> layer(torch.ones(1, 20)).sum().backward()
    >>> optimizer.step()
    >>> {name: tuple(x.shape) for name, x in optimizer.state[layer.weight].items() if torch.is_tensor(x)}
    {'proj': (12, 4), 'exp_avg': (4, 20), 'exp_avg_sq': (4, 20), 'magnitude_avg': (12,), 'magnitude_avg_sq': (12,)}
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        mode: Literal["weightnorm", "authors"] = "weightnorm",
        correct_bias: bool = True,
        bits: int = 32,
        foreach: bool | None = None,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "mode": mode,
            "correct_bias": correct_bias,
            "bits": bits,
            "foreach": foreach,
            "maximize": maximize,
            "seed": seed,
            "weight_norm": True,
            "fan_in_fan_out": False,
        }
        ProjectedOptimizer.__init__(self, params, defaults)

    def _start_over(self) -> None:
        super()._start_over()
        self._told: set[str] = set()

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["mode"] not in _MODES:
            raise MethodError(f"mode = {group['mode']!r}. {nearest(str(group['mode']), _MODES, noun='mode')}")
        super()._check_group(group)
        if not (group["mode"] == "authors" and group["weight_norm"]):
            return
        for p in group["params"]:
            if p.ndim > 2:
                raise MethodError(
                    f"{self._name(p)} has the shape {tuple(p.shape)}; the mode 'authors' normalises the rows of "
                    "matrices and whole vectors. Give it to a group with 'weight_norm': False (ordinary AdamW), or "
                    "take the mode 'weightnorm'."
                )

    # ---- the steps ------------------------------------------------------------------------------------------

    def _step_projected(self, group: dict[str, Any], p: Tensor) -> None:
        if not group["weight_norm"]:
            super()._step_projected(group, p)
        elif group["mode"] == "authors":
            self._step_authors(group, p)
        else:
            self._step_weight_norm(group, p)

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if group["mode"] != "authors" or not group["weight_norm"]:
            super()._step_plain(group, params)
            return
        for p in params:
            if p.ndim == 0:  # a number has no direction
                super()._step_plain(group, [p])
            else:
                self._step_authors(group, p)

    def _step_weight_norm(self, group: dict[str, Any], p: Tensor) -> None:
        """W <- g' normalise(u - s alpha back(N)), with g = ||W||, u = W / g by row and g' = g - s N_g.

        The rows of u are never formed: g u' = W - s alpha (g back(N)), whose rows are brought to the norm g'.
        """
        weight, grad = _rows_first(group, p.detach(), p.grad)
        W, G = projection.local_tensor(weight), projection.local_tensor(grad, weight)
        norms = projection.total(squares(W), weight).sqrt_()
        magnitude, scale = self._magnitude_gradient(group, p, projection.total(inner(G, W), weight), norms)
        direction = tangent(W, G, _along(scale, weight), _along(magnitude, weight))
        direction = self._project(group, p, projection.gather(direction, weight))[1]
        step_size = self._step_size(group, self.state[p]["step"])
        magnitudes = self._step_magnitudes(group, p, magnitude, norms, step_size)
        lr = float(group["lr"])
        if lr == 0.0:
            return
        left, right = projection.factors(*self._local(p, weight, direction), self.state[p]["side"])
        work = wide(W)
        work.addmm_(
            left.to(work.dtype) * _along(scale, weight), right.to(work.dtype), alpha=-step_size * group["alpha"]
        )
        lengths = projection.total(squares(work), weight).sqrt_()
        ratio = _ratio(magnitudes, lengths, norms) * (1.0 - lr * group["weight_decay"])
        work.mul_(_along(ratio, weight))
        if work is not W:  # one rounding for all of it
            W.copy_(work)

    def _step_authors(self, group: dict[str, Any], p: Tensor) -> None:
        """v <- v - s alpha back(N), g' = ||v|| - s N_g with the norm from before, W <- g' v / ||v||."""
        state = self.state[p]
        if "direction" not in state:
            state["direction"] = p.detach().clone(memory_format=torch.contiguous_format)
        weight, v, grad = _rows_first(group, p.detach(), state["direction"], p.grad)
        V, G = projection.local_tensor(v), projection.local_tensor(grad, v)
        norms = projection.total(squares(V), v).sqrt_()
        magnitude, _ = self._magnitude_gradient(group, p, projection.total(inner(G, V), v), norms)
        if "rank" in group:
            direction = self._project(group, p, projection.gather(G, v))[1]
        else:
            state["step"] += 1
            own = projection.local_tensor(p.grad, p)  # type: ignore[arg-type]
            direction = self._directions_of(group, [p], [p], [-own if group["maximize"] else own])[0]
        step_size = self._step_size(group, state["step"])
        magnitudes = self._step_magnitudes(group, p, magnitude, norms, step_size)
        lr = float(group["lr"])
        if lr == 0.0:
            return
        if "rank" in group:
            low_rank, basis = self._local(p, v, direction)
            projection.add_low_rank_(V, low_rank, basis, state["side"], alpha=group["alpha"], step_size=step_size)
        else:
            projection.local_tensor(state["direction"]).add_(direction, alpha=-step_size)
        if group["weight_decay"] > 0:
            decay = 1.0 - lr * group["weight_decay"]
            V.mul_(decay)
            magnitudes = magnitudes * decay
        lengths = projection.total(squares(V), v).sqrt_()
        projection.local_tensor(weight).copy_(wide(V) * _along(_ratio(magnitudes, lengths, norms), v))

    # ---- magnitudes -----------------------------------------------------------------------------------------

    def _magnitude_gradient(
        self, group: dict[str, Any], p: Tensor, product: Tensor, norms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Check the gradient through its products with the rows and return dL/dg and the scale of G in dL/dv."""
        step = self.state[p]["step"]
        if not bool(torch.isfinite(product).all()):
            raise MethodError(
                f"The gradient of {self._name(p)} holds NaN or infinite entries at step {step}; the weight was left as "
                "it is. Skip such steps (torch.amp.GradScaler does), lower the learning rate or clip."
            )
        if step % group.get("update_proj_gap", 200) == 0 and "zero rows" not in self._told:
            zero = int((norms <= ZERO_ROW).sum())
            if zero:
                self._told.add("zero rows")
                self._warn(
                    f"{zero} of {norms.numel()} rows of {self._name(p)} are zero and have no direction; such rows are "
                    "stepped by Adam without normalisation. (Further parameters are not reported.)"
                )
        return magnitude_gradient(product, norms)

    def _step_magnitudes(
        self, group: dict[str, Any], p: Tensor, gradient: Tensor, norms: Tensor, step_size: float
    ) -> Tensor:
        """Adam on the magnitudes, whose moments are never quantised; return the new ones."""
        state = self.state[p]
        names = {"exp_avg": "magnitude_avg", "exp_avg_sq": "magnitude_avg_sq"}
        for name in names.values():
            state.setdefault(name, torch.zeros_like(gradient))
        moments = {own: [state[name]] for own, name in names.items()}
        direction = self._directions(group, moments, [-gradient if group["maximize"] else gradient])[0]
        magnitudes, crossed = new_magnitudes(norms, direction, step_size)
        if "sign" not in self._told and bool(crossed.any()):
            self._told.add("sign")
            self._warn(
                f"A step would have turned the magnitude of {int(crossed.sum())} rows of {self._name(p)} negative and "
                f"flipped them; they were set to a small positive value at step {state['step'] - 1}. Lower the "
                "learning rate. (Further ones are not reported.)"
            )
        return magnitudes

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, GnomonWarning, stacklevel=9)


def _rows_first(group: dict[str, Any], *tensors: Any) -> list[Any]:
    """Return views in the layout (out, in)."""
    return [x.t() if group["fan_in_fan_out"] and x.ndim == 2 else x for x in tensors]


def _along(values: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of one value a row, shaped to multiply the rows of its shard."""
    if like.ndim == 1:
        return values[None]
    return projection.local_part(values, like, rows=0, columns=None)[:, None]


def _ratio(magnitudes: Tensor, lengths: Tensor, norms: Tensor) -> Tensor:
    """Return what brings rows of these lengths to their magnitudes; 1 for rows that had no direction or lost it."""
    alive = (norms > ZERO_ROW) & (lengths > 0)
    return torch.where(alive, magnitudes / torch.where(alive, lengths, 1.0), torch.ones_like(norms))
