"""Which block gets which placement, and DeepNorm's two constants: arithmetic alone, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from gnomon.errors import MethodError, nearest

__all__ = ["MODEL_TYPE", "SLUG", "BlockPlacement", "Placement", "block_placements", "check_choice",
           "deepnorm_constants", "post_layer_count"]  # fmt: skip

SLUG = "mix-ln"
MODEL_TYPE = "mix_ln_llama"
Placement = Literal["mix", "pre", "post", "pre_post", "sandwich", "deepnorm"]
BlockPlacement = Literal["pre", "post", "sandwich", "deepnorm"]
_COUNTED = ("mix", "pre_post")  # placements with a number of Post-LN blocks


def post_layer_count(num_layers: int, post_ratio: float) -> int:
    """Return the number of Post-LN blocks, ``floor(post_ratio * num_layers)``.

    A product that misses a whole number by rounding alone (0.29 * 100) counts as that number.

    Raises
    ------
    MethodError
        When `post_ratio` is not between 0 and 1.

    Examples
    --------
    >>> [post_layer_count(n, r) for n, r in ((12, 0.25), (24, 0.25), (32, 0.0625), (100, 0.29))]
    [3, 6, 2, 29]
    """
    if not 0.0 <= post_ratio <= 1.0:
        raise MethodError(
            f"post_ratio = {post_ratio}. It is the fraction of blocks that are Post-LN and lies between 0 and 1; the "
            "paper uses 0.25."
        )
    return math.floor(post_ratio * num_layers + 1e-9)


def check_choice(
    placement: Any,
    post_ratio: float,
    num_post_layers: int | None,
    layer_placements: Sequence[str] | None,
    residual_scale: float | None,
) -> None:
    """Refuse unknown and contradictory choices that can be told without a model."""
    if placement not in get_args(Placement):
        known = get_args(Placement)
        raise MethodError(f"placement = {placement!r} is unknown. {nearest(str(placement), known, noun='placement')}")
    post_layer_count(1, post_ratio)
    if num_post_layers is not None and placement not in _COUNTED and layer_placements is None:
        raise MethodError(
            f"num_post_layers = {num_post_layers} goes with placement 'mix' or 'pre_post'; {placement!r} treats all "
            "blocks alike. Leave it out."
        )
    if num_post_layers is not None and num_post_layers < 0:
        raise MethodError(f"num_post_layers = {num_post_layers}. It must be between 0 and the number of blocks.")
    for kind in layer_placements or ():
        if kind not in get_args(BlockPlacement):
            known = get_args(BlockPlacement)
            raise MethodError(f"layer_placements holds {kind!r}. {nearest(str(kind), known, noun='block placement')}")
    if residual_scale is not None:
        if placement != "deepnorm" and "deepnorm" not in (layer_placements or ()):
            raise MethodError(
                f"residual_scale = {residual_scale} is DeepNorm's factor; placement = {placement!r} has none. "
                "Leave it out."
            )
        if not (math.isfinite(residual_scale) and residual_scale > 0):
            raise MethodError(f"residual_scale = {residual_scale}. It must be a finite number over 0.")


def block_placements(
    num_layers: int, placement: Placement = "mix", post_ratio: float = 0.25, num_post_layers: int | None = None
) -> list[BlockPlacement]:
    """Return the placement of every block, first block first.

    Parameters
    ----------
    num_layers : int
    placement : str, default "mix"
        ``"mix"``: the first P blocks are Post-LN, the others Pre-LN. ``"pre_post"``: the last P are Post-LN.
        The others treat all blocks alike.
    post_ratio : float, default 0.25
        P as a fraction of the blocks, rounded down.
    num_post_layers : int, optional
        P itself.

    Returns
    -------
    list of {"pre", "post", "sandwich", "deepnorm"}

    Raises
    ------
    MethodError
        When an argument is unknown or out of range.

    Examples
    --------
    >>> block_placements(4)
    ['post', 'pre', 'pre', 'pre']
    >>> block_placements(4, "pre_post", num_post_layers=1)
    ['pre', 'pre', 'pre', 'post']
    """
    check_choice(placement, post_ratio, num_post_layers, None, None)
    if placement not in _COUNTED:
        return [placement] * num_layers  # type: ignore[list-item]
    count = post_layer_count(num_layers, post_ratio) if num_post_layers is None else num_post_layers
    if count > num_layers:
        raise MethodError(
            f"num_post_layers = {count}, but the model has {num_layers} blocks. Allowed: 0 to {num_layers}; the paper "
            f"uses a quarter of the blocks, here {num_layers // 4}."
        )
    post: list[BlockPlacement] = ["post"] * count
    pre: list[BlockPlacement] = ["pre"] * (num_layers - count)
    return post + pre if placement == "mix" else pre + post


def deepnorm_constants(num_layers: int) -> tuple[float, float]:
    """Return DeepNorm's residual factor ``(2L)^(1/4)`` and initial gain ``(8L)^(-1/4)`` of a decoder of L blocks.

    Examples
    --------
    >>> [round(value, 4) for value in deepnorm_constants(8)]
    [2.0, 0.3536]
    """
    return (2 * num_layers) ** 0.25, (8 * num_layers) ** -0.25
