"""Low-rank projection of gradients, as GaLore introduced it: which side, which basis, back again, onto which shard.

For a gradient G (m x n) and rank r, the *left* side keeps P (m x r) with R = P^T G (r x n), the *right* side keeps
Q (r x n) with R = G Q^T (m x r), and *full* keeps both with R = P^T G Q^T (r x r). A basis is a list of one or two
tensors ``[P]``, ``[Q]`` or ``[P, Q]``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from gnomon.common.linalg import dominant_basis
from gnomon.errors import MethodError, nearest

__all__ = [
    "EXACT_BELOW",
    "FULL",
    "LEFT",
    "PROJ_TYPES",
    "RIGHT",
    "add_low_rank_",
    "back",
    "broadcast_from_first",
    "energy_resolution",
    "factors",
    "gather",
    "gradient_basis",
    "local_part",
    "local_tensor",
    "project",
    "rotate",
    "side_of",
    "total",
]

LEFT, RIGHT, FULL = 0, 1, 2
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
EXACT_BELOW = 512
"""Smaller dimension up to which `refresh="auto"` takes the exact SVD."""


def side_of(shape: tuple[int, int] | torch.Size, proj_type: str = "std") -> int:
    """Return the projected side of an m x n matrix: `LEFT`, `RIGHT` or `FULL`.

    Parameters
    ----------
    shape : (m, n)
    proj_type : {"std", "reverse_std", "left", "right", "full"}, default "std"
        GaLore's names: "std" projects the smaller dimension (the right side of a square matrix), "reverse_std"
        the larger.

    Raises
    ------
    MethodError
        When the name is unknown.

    Examples
    --------
    >>> side_of((20, 12)) == RIGHT, side_of((12, 20)) == LEFT, side_of((12, 20), "reverse_std") == RIGHT
    (True, True, True)
    """
    if proj_type not in PROJ_TYPES:
        raise MethodError(f"proj_type = {proj_type!r}. {nearest(str(proj_type), PROJ_TYPES, noun='projection')}")
    if proj_type in ("left", "right", "full"):
        return {"left": LEFT, "right": RIGHT, "full": FULL}[proj_type]
    tall = shape[0] >= shape[1]
    return RIGHT if tall == (proj_type == "std") else LEFT


def gradient_basis(
    grad: Float[Tensor, "m n"],
    rank: int,
    side: int,
    *,
    refresh: str = "auto",
    previous: list[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return the leading singular vectors of a gradient on one side or both.

    Parameters
    ----------
    grad : Tensor of shape (m, n)
    rank : int
        At most min(m, n).
    side : {LEFT, RIGHT, FULL}
    refresh : {"auto", "exact", "randomized"}, default "auto"
        "exact" is torch.linalg.svd in float32 with LAPACK's signs, as GaLore does it; "randomized" is
        `gnomon.common.linalg.dominant_basis`; "auto" is exact up to min(m, n) = 512.
    previous : list of Tensor, optional
        The basis so far: the start of the randomised one.
    generator : torch.Generator, optional
        Draws the random directions.

    Returns
    -------
    list of Tensor
        P (m, r) and / or Q (r, n) in the gradient's dtype, contiguous.

    Raises
    ------
    MethodError
        When the gradient is not finite.
    """
    work = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
    if refresh == "exact" or (refresh == "auto" and min(grad.shape) <= EXACT_BELOW):
        if not bool(torch.isfinite(work).all()):
            raise MethodError("a gradient holds NaN or infinite entries")
        U, _, Vh = torch.linalg.svd(work, full_matrices=False)
        found = {LEFT: [U[:, :rank]], RIGHT: [Vh[:rank]], FULL: [U[:, :rank], Vh[:rank]]}[side]
        # the slices would keep the whole decomposition alive
        return [part.to(grad.dtype, copy=True).contiguous() for part in found]
    old: list[Tensor | None] = [*previous] if previous else [None, None]
    parts = []
    if side in (LEFT, FULL):
        parts.append(dominant_basis(work, rank, start=old[0], generator=generator))
    if side in (RIGHT, FULL):
        start = old[-1].T if old[-1] is not None else None
        parts.append(dominant_basis(work.T, rank, start=start, generator=generator).T)
    return [part.to(grad.dtype).contiguous() for part in parts]


def project(grad: Float[Tensor, "m n"], basis: list[Tensor], side: int) -> Float[Tensor, "p q"]:
    """Return the gradient's low-rank coordinates R."""
    if side == LEFT:
        return basis[0].T @ grad
    if side == RIGHT:
        return grad @ basis[0].T
    return basis[0].T @ grad @ basis[1].T


def back(low_rank: Float[Tensor, "p q"], basis: list[Tensor], side: int) -> Float[Tensor, "m n"]:
    """Return the full-size matrix of low-rank coordinates, without GaLore's scale."""
    if side == LEFT:
        return basis[0] @ low_rank
    if side == RIGHT:
        return low_rank @ basis[0]
    return basis[0] @ low_rank @ basis[1]


def rotate(moment: Float[Tensor, "p q"], old: list[Tensor], new: list[Tensor], side: int) -> Float[Tensor, "p q"]:
    """Express a first moment that was gathered in the old basis in the new one (M <- P_new^T P_old M)."""
    if side in (LEFT, FULL):
        moment = (new[0].T @ old[0]) @ moment
    if side in (RIGHT, FULL):
        moment = moment @ (old[-1] @ new[-1].T)
    return moment


def factors(low_rank: Float[Tensor, "p q"], basis: list[Tensor], side: int) -> tuple[Tensor, Tensor]:
    """Return two matrices whose product is `back(low_rank, basis, side)`."""
    left = basis[0] if side in (LEFT, FULL) else low_rank
    right = low_rank if side == LEFT else basis[-1] if side == RIGHT else low_rank @ basis[1]
    return left, right


def add_low_rank_(
    weight: Float[Tensor, "m n"],
    low_rank: Float[Tensor, "p q"],
    basis: list[Tensor],
    side: int,
    *,
    alpha: float,
    step_size: float,
    dense: tuple[Float[Tensor, "m n"], Float[Tensor, " ..."], float] | None = None,
) -> None:
    """Update a weight in place, W <- W - step_size * (alpha * back(low_rank) + factor * D * v).

    The sum is formed first and added with one rounding, so that a small update is not lost twice in half precision.

    Parameters
    ----------
    weight : Tensor of shape (m, n)
    low_rank, basis, side
        As for `back`.
    alpha, step_size : float
    dense : (D, v, factor), optional
        A second term: a matrix, a vector that broadcasts against it, a number.
    """
    left, right = factors(low_rank, basis, side)
    update = torch.empty_like(weight, memory_format=torch.contiguous_format)
    torch.addmm(update, left, right, beta=0, alpha=alpha, out=update)
    if dense is not None:
        update.addcmul_(dense[0], dense[1], value=dense[2])
    weight.add_(update, alpha=-step_size)


def local_tensor(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return this rank's shard of a DTensor (placed as `like` is, when given), or a plain tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    if isinstance(like, DTensor) and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    return tensor.to_local()


def gather(local: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor whose shard, placed as `like` is, every rank holds (a collective), or `local` itself."""
    if not isinstance(like, DTensor):
        return local
    shape, stride = like.shape, torch.empty(like.shape, device="meta").stride()
    whole = DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return whole.full_tensor()


def total(local: Float[Tensor, " ..."], like: Tensor) -> Float[Tensor, " ..."]:
    """Add up, along the last axis of `like`, what every rank summed over its own shard.

    Parameters
    ----------
    local : Tensor
        Sums over the last axis of this rank's shard: one for each of its rows, or a scalar for a vector.
    like : Tensor of one or two dimensions
        Its placements say what the shards are; for a plain tensor `local` is the answer.

    Returns
    -------
    Tensor of shape like.shape[:-1]
        The same on every rank.
    """
    if not isinstance(like, DTensor):
        return local
    last = like.ndim - 1
    placements = [
        (Partial() if placement.dim % like.ndim == last else Shard(0)) if isinstance(placement, Shard) else Replicate()
        for placement in like.placements
    ]
    shape = like.shape[:last]
    whole = DTensor.from_local(
        local, like.device_mesh, placements, run_check=False, shape=shape, stride=(1,) * len(shape)
    )
    return whole.full_tensor()


def local_part(tensor: Tensor, like: Tensor, rows: int | None, columns: int | None) -> Tensor:
    """Return this rank's part of a replicated tensor whose axes run along those of a sharded weight.

    Parameters
    ----------
    tensor : Tensor
        The same on every rank.
    like : DTensor of two dimensions
        Its placements say which part this rank holds.
    rows, columns : int or None
        Axis of `tensor` that runs along the rows, the columns of `like`; None when it has none.

    Returns
    -------
    Tensor
        Without communication; `tensor` itself when `like` is not sharded.
    """
    if not isinstance(like, DTensor):
        return tensor
    axes = {0: rows, 1: columns}
    placements = []
    for placement in like.placements:
        if type(placement) not in (Shard, Replicate):
            raise MethodError(
                f"A weight is placed as {placement}; projected weights may be sharded by rows or columns or "
                "replicated (FSDP2, HSDP, tensor parallelism one at a time)."
            )
        axis = axes[placement.dim % 2] if isinstance(placement, Shard) else None
        placements.append(Replicate() if axis is None else Shard(axis))
    return distribute_tensor(tensor, like.device_mesh, placements, src_data_rank=None).to_local()


def broadcast_from_first(basis: list[Tensor], parameter: Tensor) -> None:
    """Overwrite a basis by the first rank's, so that no two ranks work in different bases.

    A DTensor's mesh says who shares the parameter; for a plain tensor it is every rank of the default group.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        groups = [mesh.get_group(axis) for axis in range(mesh.ndim)]
    else:
        groups = [dist.distributed_c10d._get_default_group()]
    for group in groups:
        for part in basis:
            dist.broadcast(part, group=group, group_src=0)


def energy_resolution(dtype: torch.dtype) -> float:
    """Return the relative size below which a difference of two sums of squares in `dtype` is rounding noise."""
    return {torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 1e-6)
