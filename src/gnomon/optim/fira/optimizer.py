"""The optimizers: Fira over Adam and over RMSProp, and the groups they take."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from gnomon.common import projection
from gnomon.common.projected_groups import check_projected_group, split_parameters
from gnomon.common.projected_optimizer import ProjectedOptimizer
from gnomon.errors import MethodError, nearest
from gnomon.optim.fira.galore import GaLoreAdamW
from gnomon.optim.fira.rmsprop import ProjectedRMSProp
from gnomon.optim.fira.scaling import norm_based_scaling

__all__ = ["Fira", "FiraRMSProp", "low_rank_groups"]

_RESIDUALS = ("authors", "orthogonal")


class _NormBasedScaling(ProjectedOptimizer):
    """Adds to a projected optimizer the scaled residual of the gradient and its limiter."""

    _proj_types = tuple(name for name in projection.PROJ_TYPES if name != "full")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["residual"] not in _RESIDUALS:
            raise MethodError(
                f"residual = {group['residual']!r}. {nearest(str(group['residual']), _RESIDUALS, noun='residual')}"
            )
        if not group["gamma"] >= 1.0:
            raise MethodError(f"gamma = {group['gamma']}; the limiter's growth factor must be 1 or more.")

    def _apply(
        self, group: dict[str, Any], p: Tensor, grad: Tensor, low_rank: Tensor, direction: Tensor, step_size: float
    ) -> None:
        state = self.state[p]
        scaled = norm_based_scaling(
            grad,
            low_rank,
            direction,
            state["side"],
            previous=state.get("residual_norm"),
            alpha=group["alpha"],
            orthogonal=group["residual"] == "orthogonal",
            gamma=group["gamma"],
        )
        state["residual_norm"] = scaled.norm
        self._facts[p] = {"phi": scaled.phi, "limiter": scaled.limiter}
        # maximize negated the coordinates; the gradient itself is negated by its factor
        factor = -1.0 if group["maximize"] else 1.0
        self._add(group, p, scaled.inner, step_size, dense=(grad, scaled.column, factor))

    def diagnostics(self, *, columns: bool = False) -> dict[str, dict[str, Any]]:
        """Return what the last step did to each projected matrix.

        Parameters
        ----------
        columns : bool, default False
            Also return phi itself, under ``"columns"``: one factor per row of a tall, per column of a wide matrix.

        Returns
        -------
        dict of str to dict
            By the parameter's name (its number where the groups have no names): ``phi`` (mean scaling factor),
            ``residual_norm`` (q, the norm the limiter remembers) and ``limiter`` (L; above 1 the residual was
            cut). Empty before the first step.

        Examples
        --------
        >>> import torch
        >>> layer = torch.nn.Linear(20, 12)
        >>> optimizer = Fira(low_rank_groups(torch.nn.ModuleDict({"mlp": layer}), rank=4), lr=0.01)
        >>> layer(torch.ones(1, 20)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.diagnostics()["mlp.weight"])
        ['limiter', 'phi', 'residual_norm']
        """
        found: dict[str, dict[str, Any]] = {}
        number = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                if p in self._facts:
                    phi = self._facts[p]["phi"]
                    facts: dict[str, Any] = {
                        "phi": float(phi.mean()),
                        "residual_norm": float(self.state[p]["residual_norm"]),
                        "limiter": float(self._facts[p]["limiter"]),
                    }
                    if columns:
                        facts["columns"] = phi.clone()
                    found[names[i] if names else str(number)] = facts
                number += 1
        return found


class Fira(_NormBasedScaling, GaLoreAdamW):
    """AdamW with low-rank moments and full-rank updates (NeurIPS 2025).

    Parameters
    ----------
    params : iterable of parameters, (name, parameter) pairs or groups
        Groups from `low_rank_groups`, or dicts with ``rank``, ``update_proj_gap`` (200), ``alpha`` (1.0, also read
        as GaLore's ``scale``), ``proj_type`` ("std"), ``align`` ("none"), ``refresh`` ("auto"). Groups without a
        ``rank`` get ordinary AdamW.
    lr : float, default 1e-3
        The authors pre-train with 0.01 and fine-tune with 1e-4. A tensor of one element is accepted too.
    betas : (float, float), default (0.9, 0.999)
    eps : float, default 1e-6
        Added before the bias correction.
    weight_decay : float, default 0
        Decoupled, applied after the update.
    residual : {"authors", "orthogonal"}, default "authors"
        What of the gradient is scaled: G - alpha * P P^T G (the authors' code, behind all published numbers) or
        G - P P^T G (the paper's text). The same for alpha = 1.
    gamma : float, default 1.01
        Growth of the residual's norm a step before the limiter cuts (the paper's threshold).
    correct_bias : bool, default True
    bits : {32, 8}, default 32
        8 keeps moments of 4096 entries and more in blocks of 8-bit values; projector, q and phi stay exact.
    foreach : bool, optional
        Step the groups without a rank by torch's multi-tensor operations. Default: yes.
    maximize : bool, default False
    seed : int, default 0
        Of the random directions that a randomised refresh adds.

    Raises
    ------
    MethodError
        When a value is out of range, a projected parameter is no matrix or ``proj_type`` is "full".

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(20, 12), "head": torch.nn.Linear(12, 2)})
    >>> optimizer = Fira(low_rank_groups(model, rank=4, alpha=0.25), lr=0.01)
    >>> model["head"](model["mlp"](torch.ones(3, 20))).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[model["mlp"].weight]["exp_avg"].shape
    torch.Size([4, 20])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        residual: Literal["authors", "orthogonal"] = "authors",
        gamma: float = 1.01,
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
            "residual": residual,
            "gamma": gamma,
            "correct_bias": correct_bias,
            "bits": bits,
            "foreach": foreach,
            "maximize": maximize,
            "seed": seed,
        }
        ProjectedOptimizer.__init__(self, params, defaults)


class FiraRMSProp(_NormBasedScaling, ProjectedRMSProp):
    """Fira over RMSProp: no bias correction, no weight decay.

    Parameters
    ----------
    params : iterable of parameters, (name, parameter) pairs or groups
        As for `Fira`; groups without a ``rank`` get ordinary RMSProp.
    lr : float, default 1e-3
        A tensor of one element is accepted too.
    smoothing : float, default 0.9
        Decay of the second moment.
    eps : float, default 1e-6
    weight_decay : float, default 0
        Accepted for the sake of shared code and ignored, with a warning.
    momentum : float, default 0
    centered : bool, default False
        Normalise by the variance instead of the second moment.
    residual, gamma, bits, maximize, seed
        As for `Fira`.

    Raises
    ------
    MethodError
        When a value is out of range, a projected parameter is no matrix or ``proj_type`` is "full".

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(20, 12)
    >>> optimizer = FiraRMSProp([{"params": [layer.weight], "rank": 4}, {"params": [layer.bias]}], lr=0.01)
    >>> layer(torch.ones(1, 20)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[layer.weight]["square_avg"].shape
    torch.Size([4, 20])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        smoothing: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.0,
        centered: bool = False,
        residual: Literal["authors", "orthogonal"] = "authors",
        gamma: float = 1.01,
        bits: int = 32,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "smoothing": smoothing,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "residual": residual,
            "gamma": gamma,
            "bits": bits,
            "foreach": None,
            "maximize": maximize,
            "seed": seed,
        }
        ProjectedOptimizer.__init__(self, params, defaults)


def low_rank_groups(
    model: nn.Module,
    rank: int = 8,
    *,
    update_proj_gap: int = 200,
    alpha: float = 1.0,
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std",
    target_modules: list[str] | tuple[str, ...] | str = ("attn", "mlp"),
    align: Literal["none", "rotate"] = "none",
    refresh: Literal["auto", "exact", "randomized"] = "auto",
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a projected group and an ordinary one.

    Parameters
    ----------
    model : nn.Module
        LoRA factors of a PEFT model count as linear layers, as in the authors' fine-tuning.
    rank : int, default 8
        128 to 512 for pre-training (a quarter of the hidden size), 8 to 64 for fine-tuning.
    update_proj_gap : int, default 200
        Steps between two projectors.
    alpha : float, default 1.0
        Scale of the projected update; the authors pre-train with 0.25 (0.0625 from 1B parameters on).
    proj_type : {"std", "reverse_std", "left", "right", "full"}, default "std"
        "std" projects a matrix's smaller dimension. "full" projects both and works with GaLore only.
    target_modules : list of str or str, default ("attn", "mlp")
        Parts of names of linear layers, regular expressions or "all-linear", as the Trainer's
        ``optim_target_modules``.
    align : {"none", "rotate"}, default "none"
        What happens to the first moment when the projector changes: kept as it is (the authors), or expressed
        in the new basis.
    refresh : {"auto", "exact", "randomized"}, default "auto"
        Exact SVD, or subspace iteration warm-started from the old projector; "auto" is exact up to a smaller
        dimension of 512.

    Returns
    -------
    list of dict
        Two parameter groups (one, when every trainable parameter is projected) with named parameters.

    Raises
    ------
    ModelError
        When no trainable linear layer matches.
    MethodError
        When an option is out of range.

    Examples
    --------
    >>> import torch
    >>> groups = low_rank_groups(torch.nn.ModuleDict({"mlp": torch.nn.Linear(20, 12)}), rank=4)
    >>> [name for name, _ in groups[0]["params"]], groups[0]["rank"]
    (['mlp.weight'], 4)
    """
    targets, rest = split_parameters(model, target_modules)
    names = {id(p): f"parameter {name!r}" for name, p in targets}
    options = {
        "rank": rank,
        "update_proj_gap": update_proj_gap,
        "alpha": alpha,
        "proj_type": proj_type,
        "align": align,
        "refresh": refresh,
    }
    check_projected_group(
        {"params": [p for _, p in targets], **options}, lambda p: names[id(p)], "low_rank_groups", warn=False
    )
    groups: list[dict[str, Any]] = [{"params": targets, **options}]
    return [*groups, {"params": rest}] if rest else groups
