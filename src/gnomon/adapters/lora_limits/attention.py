"""Attention with a polynomial in place of exp, forward and backward in time linear in the number of tokens.

Letters: n heads (batch and heads flattened), L tokens, d width of a head, k1 features. Scores are q . k of scaled q
and k. With P = D^-1 Phi_Q W Phi_K^T in the place of the softmax weights, O = P V, rho_i = <dO_i, O_i>:

    dS_ij = P_ij (<dO_i, V_j> - rho_i) = P_ij <dO'_i, V'_j>       dO' = [dO, -rho], V' = [V, 1]
    dQ_i = D_i^-1 Phi(Q_i) W T dO'_i          T  = sum_j Phi(K_j) (x) V'_j (x) K_j
    dK_j = Phi(K_j) W T2 V'_j                 T2 = sum_i D_i^-1 Phi(Q_i) (x) dO'_i (x) Q_i
    dV_j = Phi(K_j) W R                       R  = sum_i D_i^-1 Phi(Q_i) (x) dO_i

No L x L matrix is made, and features are made chunk by chunk. Under a causal mask the sums run over the chunks before
(after, for dK and dV), and inside a chunk the weights are those of exp itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gnomon.adapters.lora_limits.features import exp_coefficients, feature_count, monomial_weights, monomials
from gnomon.errors import MethodError

__all__ = ["MAX_FEATURES", "PolyAttention", "poly_attention"]

MAX_FEATURES = 10_000
"""Default of the most features a head may have; 8,385 are those of a head of width 128 at degree 2."""
_CHUNK, _CAUSAL_CHUNK = 512, 128
_STATE_BYTES = 1 << 28  # what the states of the heads worked on together may take


@dataclass(frozen=True)
class _Setting:
    weights: Tensor  # (k1, 1)
    degree: int
    causal: bool
    chunk: int

    def features(self, x: Float[Tensor, "n c d"]) -> Float[Tensor, "n k c"]:
        return monomials(x.transpose(-1, -2), self.degree)


def _outer(x: Float[Tensor, "n c a"], y: Float[Tensor, "n c b"]) -> Float[Tensor, "n c ab"]:
    return (x[..., :, None] * y[..., None, :]).flatten(-2)


def _contract(flat: Float[Tensor, "n c ab"], x: Float[Tensor, "n c a"]) -> Float[Tensor, "n c b"]:
    """Return sum_a flat[a, b] x[a] for every token."""
    return (x[..., None, :] @ flat.unflatten(-1, (x.shape[-1], -1))).squeeze(-2)


def _with_ones(v: Tensor, keep: Tensor | None) -> Tensor:
    """Return V' = [V, 1], all zero where a key is dropped."""
    ones = v.new_ones((*v.shape[:-1], 1)) if keep is None else keep[..., None].to(v.dtype)
    return torch.cat([v if keep is None else v * ones, ones], dim=-1)


def _inside(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(q . k - m) inside one causal chunk, and m, per query the largest of 0 and its scores."""
    scores = q @ k.transpose(-1, -2)
    scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=0.0)
    return (scores - top).exp(), top


def _forward(
    q: Float[Tensor, "n L d"], k: Float[Tensor, "n L d"], vones: Float[Tensor, "n L e"], setting: _Setting
) -> tuple[Float[Tensor, "n L v"], Float[Tensor, "n L 1"]]:
    """Return O and the normaliser D (of exp(-m) times the weights, where causal)."""
    out, norm = torch.empty_like(vones[..., :-1]), torch.empty_like(vones[..., :1])
    parts = [slice(i, i + setting.chunk) for i in range(0, q.shape[1], setting.chunk)]
    state = torch.zeros((), dtype=q.dtype, device=q.device)
    if not setting.causal:
        for part in parts:
            state = state + setting.features(k[:, part]) @ vones[:, part]
        state = state * setting.weights
    for number, part in enumerate(parts):
        far = setting.features(q[:, part]).transpose(-1, -2) @ state if state.dim() else None
        if setting.causal:
            near, top = _inside(q[:, part], k[:, part])
            total = near @ vones[:, part]
            total = total if far is None else total + (-top).exp() * far
            if number + 1 < len(parts):
                state = state + setting.weights * (setting.features(k[:, part]) @ vones[:, part])
        else:
            assert far is not None
            total = far
        norm[:, part] = total[..., -1:]
        out[:, part] = total[..., :-1] / torch.where(total[..., -1:] == 0, 1.0, total[..., -1:])
    return out, norm


def _backward_queries(q: Tensor, k: Tensor, vones: Tensor, dones: Tensor, inverse: Tensor, setting: _Setting) -> Tensor:
    """Return dQ: the chained product from the left, over growing sums where causal."""
    grad = torch.zeros_like(q)
    parts = [slice(i, i + setting.chunk) for i in range(0, q.shape[1], setting.chunk)]
    state = torch.zeros((), dtype=q.dtype, device=q.device)
    if not setting.causal:
        for part in parts:
            state = state + setting.features(k[:, part]) @ _outer(vones[:, part], k[:, part])
        state = state * setting.weights
    for number, part in enumerate(parts):
        scale = inverse[:, part]
        if setting.causal:
            near, top = _inside(q[:, part], k[:, part])
            scores = near * scale * (dones[:, part] @ vones[:, part].transpose(-1, -2))
            grad[:, part] = scores @ k[:, part]
            scale = scale * (-top).exp()
        if state.dim():
            chained = setting.features(q[:, part]).transpose(-1, -2) @ state
            grad[:, part] += _contract(chained, dones[:, part] * scale)
        if setting.causal and number + 1 < len(parts):
            added = setting.features(k[:, part]) @ _outer(vones[:, part], k[:, part])
            state = state + setting.weights * added
    return grad


def _backward_keys(
    q: Tensor, k: Tensor, vones: Tensor, dones: Tensor, inverse: Tensor, setting: _Setting, keys: bool
) -> tuple[Tensor | None, Tensor]:
    """Return dK (None where `keys` is False: its sums are then left out) and dV."""
    grad_k, grad_v = torch.zeros_like(k) if keys else None, torch.zeros_like(vones[..., :-1])
    parts = [slice(i, i + setting.chunk) for i in range(0, q.shape[1], setting.chunk)]
    width, split = grad_v.shape[-1], vones.shape[-1] * k.shape[-1]

    def sums(part: slice, scale: Tensor) -> Tensor:
        """T2 and R side by side, of one chunk of queries."""
        scaled = dones[:, part] * scale
        pieces = [_outer(scaled, q[:, part])] if keys else []
        return setting.weights * (setting.features(q[:, part]) @ torch.cat([*pieces, scaled[..., :width]], dim=-1))

    state = torch.zeros((), dtype=q.dtype, device=q.device)
    if not setting.causal:
        for part in parts:
            state = state + sums(part, inverse[:, part])
    for number, part in reversed(list(enumerate(parts))):
        scale = inverse[:, part]
        if state.dim():
            chained = setting.features(k[:, part]).transpose(-1, -2) @ state
            grad_v[:, part] += chained[..., -width:]
            if grad_k is not None:
                grad_k[:, part] += _contract(chained[..., :split], vones[:, part])
        if setting.causal:
            near, top = _inside(q[:, part], k[:, part])
            weights = near * scale
            grad_v[:, part] += weights.transpose(-1, -2) @ dones[:, part, :width]
            if grad_k is not None:
                scores = weights * (dones[:, part] @ vones[:, part].transpose(-1, -2))
                grad_k[:, part] += scores.transpose(-1, -2) @ q[:, part]
            if number:
                state = state + sums(part, scale * (-top).exp())
    return grad_k, grad_v * vones[..., -1:]


def _together(n: int, setting: _Setting, k: Tensor, v: Tensor) -> list[slice]:
    """Divide the heads so that the states of those worked on together stay within `_STATE_BYTES`."""
    state = len(setting.weights) * (v.shape[-1] + 1) * (k.shape[-1] + 1) * k.element_size()
    size = max(1, _STATE_BYTES // state)
    return [slice(i, i + size) for i in range(0, n, size)]


class _PolyAttention(torch.autograd.Function):
    """O = P V of scaled and centred (n, L, d) tensors; backward by the chained products."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, setting: _Setting) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            found = [
                _forward(q[i], k[i], _with_ones(v[i], None if keep is None else keep[i]), setting)
                for i in _together(len(q), setting, k, v)
            ]
        out, norm = (torch.cat([pair[which] for pair in found]) for which in (0, 1))
        if not bool((norm >= 0).all()):
            raise MethodError(
                f"a normaliser is {float(norm.min()):.3g}: the polynomial is not positive at all scores, so its rows "
                "are no weights. Leave span out (the Taylor polynomial of an even degree is positive), or widen it."
                if not bool(norm.isnan().any())
                else "a normaliser is NaN: q, k or v hold NaN or infinity, or the scores are too large for float32. "
                "Look at their norms with lora_norm_bound."
            )
        ctx.setting = setting
        ctx.save_for_backward(q, k, v, keep, out, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keep, out, norm = ctx.saved_tensors
        found: list[list[Tensor | None]] = [[], [], []]
        with torch.autocast(q.device.type, enabled=False):
            for i in _together(len(q), ctx.setting, k, v):
                vones = _with_ones(v[i], None if keep is None else keep[i])
                dones = torch.cat([grad[i], -(grad[i] * out[i]).sum(-1, keepdim=True)], dim=-1)
                inverse = torch.where(norm[i] == 0, 0.0, 1.0 / norm[i])
                shared = (q[i], k[i], vones, dones, inverse, ctx.setting)
                if ctx.needs_input_grad[0]:
                    found[0].append(_backward_queries(*shared))
                if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                    grad_k, grad_v = _backward_keys(*shared, keys=ctx.needs_input_grad[1])
                    found[1].append(grad_k)
                    found[2].append(grad_v)
        joined = [torch.cat(part) if part and part[0] is not None else None for part in found]  # type: ignore[arg-type]
        return (*joined, None, None)


def _checked(q: Tensor, k: Tensor, v: Tensor, degree: int, chunk: int | None, key_mask: Tensor | None) -> None:
    if not isinstance(degree, int) or isinstance(degree, bool) or degree < 2 or degree % 2:
        raise MethodError(
            f"degree = {degree!r}: give an even number of at least 2. The Taylor polynomial of an odd degree is "
            "negative for some scores, and rows would be no weights."
        )
    if not (q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[-1] == k.shape[-1]):
        raise MethodError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: give (batch, heads, tokens, width), with "
            "one width for q and k."
        )
    if k.shape[:3] != v.shape[:3] or k.shape[2] != q.shape[2] or q.shape[1] % max(1, k.shape[1]) or not q.numel():
        raise MethodError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: k and v need the same heads and tokens, all "
            "three the same number of tokens (at least 1), and the heads of q are a multiple of those of k."
        )
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        raise MethodError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: give floating-point tensors.")
    if chunk is not None and chunk < 1:
        raise MethodError(f"chunk = {chunk}: a chunk has at least 1 token.")
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (k.shape[0], k.shape[2])):
        raise MethodError(
            f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}: give booleans of shape {(k.shape[0], k.shape[2])} "
            "(batch, tokens), True for keys to keep."
        )


def check_budget(dim: int, width: int, degree: int, max_features: int, element: int = 4) -> None:
    """Refuse a number of features beyond the budget; the message gives it and the memory it needs."""
    count = feature_count(dim, degree)
    if count > max_features:
        state = count * (width + 1) * dim * element
        raise MethodError(
            f"a head of width {dim} has {count:,} features at degree {degree}, and their sums take "
            f"{state / 2**20:,.0f} MiB a head; at most {max_features:,} are allowed (max_features). Take degree=2 "
            f"({feature_count(dim, 2):,} features), project the heads to a smaller width, or use exact attention."
        )


def poly_attention(
    q: Float[Tensor, "b h L d"],
    k: Float[Tensor, "b g L d"],
    v: Float[Tensor, "b g L e"],
    degree: int = 2,
    *,
    center: bool = True,
    causal: bool = False,
    key_mask: Bool[Tensor, "b L"] | None = None,
    scale: float | None = None,
    span: float | None = None,
    chunk: int | None = None,
    max_features: int = MAX_FEATURES,
) -> Float[Tensor, "b h L e"]:
    """Attention with the Taylor polynomial of exp, in time and memory linear in the number of tokens.

    The backward pass puts the polynomial weights into the gradient of softmax attention. It approximates the exact
    gradient; it is not the derivative of the polynomial, whose own is one degree lower.

    Parameters
    ----------
    q, k, v : Tensor (batch, heads, tokens, width)
        k and v may have fewer heads (grouped queries). Computed in float32 or float64; the result has the dtype of v.
    degree : int, default 2
        g, even.
    center : bool, default True
        Subtract the mean of the kept keys from all keys. Softmax does not change by it, and the scores become smaller.
        With a causal mask the mean includes later keys, so that the error of the approximation at a token (not its
        exact part) depends on them; False avoids this.
    causal : bool, default False
        Each query sees the keys up to its own place: exp inside chunks, polynomial between them.
    key_mask : Tensor of bool (batch, tokens), optional
        True for keys to keep. A query that sees no key gives zeros.
    scale : float, optional
        Default 1 / sqrt(width).
    span : float, optional
        Interpolate exp at the Chebyshev points of [-span, span] instead; see `exp_coefficients`. Normalisers are
        checked, since this polynomial may be negative.
    chunk : int, optional
        Tokens worked on at a time; default 512, causal 128. Causal results depend on it (one chunk is exact attention).
    max_features : int, default 10,000

    Returns
    -------
    Tensor (batch, heads, tokens, width of v)

    Raises
    ------
    MethodError
        When shapes, degree or another option do not fit, the features are more than `max_features`, or a normaliser is
        negative or not a number.

    Examples
    --------
    >>> q, k, v = (0.5 * torch.randn(1, 2, 64, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    >>> exact = nn.functional.scaled_dot_product_attention(q, k, v)
    >>> bool((poly_attention(q, k, v, 4) - exact).norm() < 1e-2 * exact.norm())
    True
    """
    _checked(q, k, v, degree, chunk, key_mask)
    wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.promote_types(v.dtype, torch.float32))
    check_budget(q.shape[-1], v.shape[-1], degree, max_features, 8 if wide == torch.float64 else 4)
    batch, heads, tokens, dim = q.shape
    root = (dim**-0.5 if scale is None else scale) ** 0.5
    keep = None if key_mask is None else key_mask
    keys = _centred(k.to(wide), keep, center) * root
    groups = heads // k.shape[1]
    flat = [x.repeat_interleave(groups, 1).flatten(0, 1) for x in (keys, v.to(wide))]
    weights = monomial_weights(dim, exp_coefficients(degree, span))
    setting = _Setting(
        torch.as_tensor(weights, dtype=wide, device=q.device)[:, None],
        degree,
        causal,
        min(tokens, chunk or (_CAUSAL_CHUNK if causal else _CHUNK)),
    )
    mask = None if keep is None else keep.repeat_interleave(heads, 0)
    out: Tensor = _PolyAttention.apply((q.to(wide) * root).flatten(0, 1), *flat, mask, setting)
    return out.unflatten(0, (batch, heads)).to(v.dtype)


def _centred(k: Tensor, keep: Tensor | None, center: bool) -> Tensor:
    """Return the keys, the dropped ones zero, minus the mean of the kept ones; the mean gets no gradient of its own.

    The gradients of all keys add up to zero, whether the weights are exact or not, so nothing would flow through it.
    """
    if keep is not None:
        k = k * keep[:, None, :, None]
    if not center:
        return k
    count = k.shape[2] if keep is None else keep.sum(1).clamp(min=1)[:, None, None, None]
    centred = k - (k.sum(2, keepdim=True) / count).detach()
    return centred if keep is None else centred * keep[:, None, :, None]


class PolyAttention(nn.Module):
    """`poly_attention` as a module without parameters.

    Parameters
    ----------
    degree : int, default 2
    center : bool, default True
    causal : bool, default False
    **options
        `scale`, `span`, `chunk`, `max_features` of `poly_attention`.

    Examples
    --------
    >>> attention = PolyAttention(2, causal=True)
    >>> attention(*torch.zeros(3, 1, 2, 8, 4)).shape
    torch.Size([1, 2, 8, 4])
    """

    def __init__(self, degree: int = 2, center: bool = True, *, causal: bool = False, **options: Any) -> None:
        super().__init__()
        unknown = set(options) - {"scale", "span", "chunk", "max_features"}
        if unknown:
            raise MethodError(
                f"unknown option {sorted(unknown)[0]!r}. Allowed: degree, center, causal, scale, span, chunk, "
                "max_features."
            )
        probe = torch.zeros(1, 1, 1, 1)
        _checked(probe, probe, probe, degree, options.get("chunk"), None)
        self.degree, self.center, self.causal, self.options = degree, center, causal, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Return the attention of q, k, v (batch, heads, tokens, width)."""
        return poly_attention(
            q, k, v, self.degree, center=self.center, causal=self.causal, key_mask=key_mask, **self.options
        )

    def extra_repr(self) -> str:
        """Return the options, for printing."""
        more = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"degree={self.degree}, center={self.center}, causal={self.causal}{more}"
