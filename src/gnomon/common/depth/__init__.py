"""What depth does in a model: residual-stream variance, angular distance, block removal, gradients, Jacobians.

All functions take a decoder and token batches (anything `gnomon.common.calibration.as_batches` accepts), run it in
evaluation mode, leave it as it was (modes, gradients, random state) and give one float64 number per block.
"""

from __future__ import annotations

from gnomon.common.depth.gradients import block_jacobian, diagonal_dominance, gradient_norms, jacobian_dominance
from gnomon.common.depth.removal import block_removal_drop, remove_block, skipping_block
from gnomon.common.depth.running import evaluating, token_loss
from gnomon.common.depth.states import (
    angular_distance,
    angular_distances,
    for_plotting,
    output_variance,
    residual_variance,
    stream_statistics,
)

__all__ = [
    "angular_distance",
    "angular_distances",
    "block_jacobian",
    "block_removal_drop",
    "diagonal_dominance",
    "evaluating",
    "for_plotting",
    "gradient_norms",
    "jacobian_dominance",
    "output_variance",
    "remove_block",
    "residual_variance",
    "skipping_block",
    "stream_statistics",
    "token_loss",
]
