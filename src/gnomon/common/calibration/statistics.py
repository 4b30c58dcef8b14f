"""What compression methods need to know of the inputs of one linear layer, accumulated as they stream by."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gnomon.errors import MethodError

__all__ = ["LayerInputs"]


class LayerInputs:
    """Streaming statistics of the inputs of one linear layer.

    Sums are kept in float64 (float32 where the device has none), the Gram matrix in float32 (float64 when
    the inputs are float64); half-precision inputs are up-cast first. Padding never enters.

    Parameters
    ----------
    features : int
        Width of the layer's input.
    gram : bool, default True
        Whether to keep X^T X; the rest costs five vectors.

    Attributes
    ----------
    sequences, tokens : int
        How many were seen.
    sums, squares, abs_sums : Tensor (in,)
        Sum of x, of x^2 and of |x| over all tokens.
    variance : Tensor (in,)
        Population variance of a feature inside a sequence, averaged over sequences with their token counts
        as weights; differences between the means of sequences do not enter.
    gram : Tensor (in, in) or None
        X^T X summed over all tokens.

    Examples
    --------
    >>> inputs = LayerInputs.from_tensor(torch.ones(2, 3, 4))
    >>> inputs.sequences, inputs.tokens, inputs.mean_sum.tolist(), inputs.variance.tolist()
    (2, 6, [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, features: int, *, gram: bool = True) -> None:
        self.features = features
        self.sequences = 0
        self.tokens = 0
        self.sums: Float[Tensor, " in"] = torch.zeros(features, dtype=torch.float64)
        self.squares: Float[Tensor, " in"] = torch.zeros(features, dtype=torch.float64)
        self.abs_sums: Float[Tensor, " in"] = torch.zeros(features, dtype=torch.float64)
        self._within = torch.zeros(features, dtype=torch.float64)
        self._keep_gram = gram
        self.gram: Float[Tensor, "in in"] | None = None

    @classmethod
    def from_tensor(
        cls,
        x: Float[Tensor, "sequences tokens in"],
        mask: Bool[Tensor, "sequences tokens"] | None = None,
        gram: bool = True,
    ) -> LayerInputs:
        """Return the statistics of a whole set of inputs.

        Parameters
        ----------
        x : Tensor (sequences, tokens, in) or (tokens, in)
            Inputs; two dimensions are one sequence.
        mask : Tensor (sequences, tokens), optional
            True or 1 for tokens, False or 0 for padding.
        gram : bool, default True
            Whether to compute X^T X.

        Raises
        ------
        MethodError
            When `x` has another shape, the mask does not fit, or a token's value is NaN or infinite.
        """
        if x.dim() not in (2, 3):
            raise MethodError(
                f"Layer inputs have shape {tuple(x.shape)}. Give (sequences, tokens, in) or (tokens, in)."
            )
        inputs = cls(x.shape[-1], gram=gram)
        inputs.update(x, mask)
        return inputs

    @property
    def mean_sum(self) -> Float[Tensor, " in"]:
        """S_j: the sum of x_j over a sequence, averaged over sequences."""
        return self.sums / max(self.sequences, 1)

    @property
    def mean_square(self) -> Float[Tensor, " in"]:
        """q_j: the sum of x_j^2 over a sequence, averaged over sequences."""
        return self.squares / max(self.sequences, 1)

    @property
    def variance(self) -> Float[Tensor, " in"]:
        """V_j: the population variance of x_j inside a sequence, averaged with token counts as weights."""
        return self._within / max(self.tokens, 1)

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "sequences tokens in"],
        mask: Bool[Tensor, "sequences tokens"] | None = None,
        *,
        name: str = "",
        sequences: int | None = None,
    ) -> None:
        """Add inputs to the statistics.

        Parameters
        ----------
        x : Tensor (sequences, tokens, in) or (tokens, in)
            Inputs; two dimensions are one sequence.
        mask : Tensor (sequences, tokens), optional
            True or 1 for tokens, False or 0 for padding. What stands at padding does not matter, not even
            NaN.
        name : str, optional
            The layer, for error messages.
        sequences : int, optional
            How many sequences these are, where the shape does not tell: tokens routed to an expert.

        Raises
        ------
        MethodError
            When the width or the mask does not fit, or a token's value is NaN or infinite.
        """
        layer = f"Layer {name!r}" if name else "The layer"
        x = x.detach() if x.dim() == 3 else x.detach().unsqueeze(0)
        if x.dim() != 3 or x.shape[-1] != self.features:
            raise MethodError(
                f"{layer}: inputs of shape {tuple(x.shape)} do not end in the {self.features} features seen before."
            )
        if mask is not None:
            mask = mask.bool() if mask.dim() == 2 else mask.bool()[None]
            if mask.shape != x.shape[:2]:
                raise MethodError(
                    f"{layer}: the mask has shape {tuple(mask.shape)}, the inputs {tuple(x.shape)}. The mask "
                    f"must be {tuple(x.shape[:2])}."
                )
        parts = [row if mask is None else row[mask[i]] for i, row in enumerate(x)]
        parts = [part for part in parts if len(part)]
        if not parts:
            return
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        for vector in ("sums", "squares", "abs_sums", "_within"):
            setattr(self, vector, getattr(self, vector).to(x.device, wide))
        for part in parts:
            values = part.to(wide)
            absolute = values.abs().sum(0)
            if not bool(torch.isfinite(absolute).all()):
                bad = int((~torch.isfinite(part)).any(0).sum())
                raise MethodError(
                    f"{layer}: its inputs hold NaN or infinite values ({bad} of {self.features} "
                    "features). The model overflows on the calibration set; run it in bfloat16 or float32 and "
                    "check its weights."
                )
            self.abs_sums += absolute
            self.sums += values.sum(0)
            self.squares += values.square().sum(0)
            self._within += (values - values.mean(0)).square_().sum(0)
        self.sequences += len(parts) if sequences is None else sequences
        self.tokens += sum(len(part) for part in parts)
        if self._keep_gram:
            self._add_gram(parts)

    def _add_gram(self, parts: list[Tensor]) -> None:
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        flat = flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32)
        if self.gram is None:
            self.gram = torch.zeros(self.features, self.features, dtype=flat.dtype, device=flat.device)
        self.gram = self.gram.to(flat.device, torch.promote_types(self.gram.dtype, flat.dtype))
        self.gram.addmm_(flat.t().to(self.gram.dtype), flat.to(self.gram.dtype))

    def merge(self, other: LayerInputs) -> LayerInputs:
        """Add the statistics of another part of the calibration set (other rank, other file); return `self`.

        Raises
        ------
        MethodError
            When the two have different widths, or only one holds a Gram matrix.
        """
        if other.features != self.features or (other._keep_gram != self._keep_gram):
            raise MethodError(
                f"Cannot merge statistics of {other.features} features (gram: {other._keep_gram}) into "
                f"{self.features} features (gram: {self._keep_gram}). Collect both for the same layer in "
                "the same way."
            )
        for vector in ("sums", "squares", "abs_sums", "_within"):
            mine, theirs = getattr(self, vector), getattr(other, vector)
            setattr(self, vector, mine + theirs.to(mine.device, mine.dtype))
        self.sequences += other.sequences
        self.tokens += other.tokens
        if other.gram is not None:
            self.gram = other.gram.clone() if self.gram is None else self.gram + other.gram.to(self.gram)
        return self
