"""GaLore: Adam in the low-rank coordinates, projected back; Fira's base and its baseline."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from gnomon.common.projected_adam import ProjectedAdam

__all__ = ["GaLoreAdamW"]


class GaLoreAdamW(ProjectedAdam):
    """AdamW whose groups with a ``rank`` keep their moments in a projection of the gradient (GaLore, ICML 2024).

    The arithmetic is that of the Hugging Face AdamW GaLore was released with: eps is added before the bias
    correction and decoupled weight decay comes after the update.

    Parameters
    ----------
    params : iterable of parameters, (name, parameter) pairs or groups
        Groups from `low_rank_groups`, or dicts with ``rank``, ``update_proj_gap``, ``alpha`` (or GaLore's
        ``scale``), ``proj_type``.
    lr : float, default 1e-3
        A tensor of one element is accepted too.
    betas : (float, float), default (0.9, 0.999)
    eps : float, default 1e-6
    weight_decay : float, default 0
    correct_bias : bool, default True
        Adam's bias correction.
    bits : {32, 8}, default 32
        8 keeps moments of 4096 entries and more in blocks of 8-bit values; the projector stays in full precision.
    foreach : bool, optional
        Step the groups without a rank by torch's multi-tensor operations. Default: yes.
    maximize : bool, default False
    seed : int, default 0
        Of the random directions that a randomised refresh adds.

    Raises
    ------
    MethodError
        When a value is out of range or a projected parameter is no matrix.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(20, 12)
    >>> optimizer = GaLoreAdamW([{"params": [layer.weight], "rank": 4}, {"params": [layer.bias]}], lr=0.01)
    >>> layer(torch.ones(1, 20)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[layer.weight]["exp_avg"].shape
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
            "correct_bias": correct_bias,
            "bits": bits,
            "foreach": foreach,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults)
