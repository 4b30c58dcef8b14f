"""The model as a head of a torch network: log-probabilities of ordered classes, the penalty and its proximal step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor, nn

from gnomon.errors import MethodError

if TYPE_CHECKING:
    from gnomon.estimators.presto.crossvalidated import PRESTOCV
    from gnomon.estimators.presto.estimator import PRESTO

__all__ = ["PrestoHead", "ordered_log_proba"]


def ordered_log_proba(T: Float[Tensor, "*rows b"], floor: float = 1e-3) -> Float[Tensor, "*rows K"]:
    """Return the log-probabilities of K = b + 1 ordered classes from the spacings of their boundaries.

    ``log P_k = log sigma(eta_k) + log sigma(-eta_{k-1}) + log(1 - exp(-T_k))`` with eta the running sum of T. Below
    `floor` the last term goes on along its tangent: crossed boundaries get a finite loss that pulls them apart, the
    loss stays convex, and above the floor nothing changes.

    Parameters
    ----------
    T : Tensor of shape (..., K - 1)
        ``T_1 = eta_1``, ``T_k = eta_k - eta_{k-1}``.
    floor : float, default 1e-3

    Returns
    -------
    Tensor of shape (..., K)

    Examples
    --------
    >>> import torch
    >>> p = ordered_log_proba(torch.tensor([-1.0, 2.0])).exp()
    >>> [round(float(x), 4) for x in p]
    [0.2689, 0.4621, 0.2689]
    """
    eta = T.cumsum(-1)
    below, above = F.logsigmoid(eta), F.logsigmoid(-eta)
    inner = T[..., 1:]
    kept = inner.clamp(min=floor)
    gap = torch.log(-torch.expm1(-kept)) + (inner - kept) / torch.expm1(kept.detach())
    middle = below[..., 1:] + above[..., :-1] + gap
    return torch.cat([below[..., :1], middle, above[..., -1:]], dim=-1)


class PrestoHead(nn.Module):
    """A classification head for ordered classes whose boundaries are shrunk towards proportional odds.

    `forward` returns log-probabilities, so it stands in for a linear head that feeds a cross-entropy: in a
    transformers classifier, ``model.score = PrestoHead(hidden, K)`` and the Trainer need nothing else but
    ``head.attach(optimizer)``, which makes the L1 penalty act.

    Parameters
    ----------
    in_features : int
    num_classes : int
        K, the rare class last.
    lam : float, default 0.0
        Penalty, on the scale of the mean loss.
    l1_ratio : float, default 1.0
        Share of the L1 norm (alpha of `PRESTO`; here `alpha` is the parameter).
    penalize_first : bool, default True
    floor : float, default 1e-3
        Spacing below which the loss continues linearly.

    Attributes
    ----------
    alpha : Parameter of shape (K - 1,)
        Thresholds; they start at equal class frequencies (`start_at_counts` sets others).
    psi : Parameter of shape (K - 1, in_features)
        Slopes of the first boundary, then the differences; they start at zero.
    mean, scale : buffers of shape (in_features,)
        Of the features (`standardise` sets them): the penalty is on standardised features.

    Raises
    ------
    MethodError
        When a size, the penalty or the ratio is not allowed.

    Examples
    --------
    >>> import torch
    >>> head = PrestoHead(8, 3, lam=0.01)
    >>> optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    >>> handle = head.attach(optimizer)
    >>> loss = head.loss(torch.ones(4, 8), torch.tensor([0, 0, 1, 2]))
    >>> loss.backward(); optimizer.step()
    >>> head(torch.ones(4, 8)).shape
    torch.Size([4, 3])
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        lam: float = 0.0,
        l1_ratio: float = 1.0,
        penalize_first: bool = True,
        floor: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1:
            raise MethodError(f"in_features = {in_features}; it must be at least 1.")
        if num_classes < 2:
            raise MethodError(f"num_classes = {num_classes}; ordered classes are 3 or more (2 make a logistic head).")
        if not 0 <= lam < float("inf"):
            raise MethodError(f"lam = {lam!r}; a penalty must be a finite number, 0 or above.")
        if not 0 <= l1_ratio <= 1:
            raise MethodError(f"l1_ratio = {l1_ratio!r}; it must lie in [0, 1].")
        if not floor > 0:
            raise MethodError(f"floor = {floor!r}; it must be positive, such as 0.001.")
        self.in_features, self.num_classes = in_features, num_classes
        self.lam, self.l1_ratio, self.penalize_first, self.floor = lam, l1_ratio, penalize_first, floor
        self.alpha = nn.Parameter(torch.empty(num_classes - 1, device=device, dtype=dtype))
        self.psi = nn.Parameter(torch.zeros(num_classes - 1, in_features, device=device, dtype=dtype))
        self.register_buffer("mean", torch.zeros(in_features, device=device, dtype=dtype))
        self.register_buffer("scale", torch.ones(in_features, device=device, dtype=dtype))
        self.start_at_counts([1.0] * num_classes)

    @classmethod
    def from_estimator(cls, estimator: PRESTO | PRESTOCV, **options: Any) -> PrestoHead:
        """Return a head that gives the probabilities of a fitted estimator, classes in their order.

        Parameters
        ----------
        estimator : PRESTO or PRESTOCV
            Fitted.
        **options
            Of `PrestoHead`. `lam` is 0 unless given: the head's coefficients are those of raw features.

        Returns
        -------
        PrestoHead
        """
        psi = torch.as_tensor(estimator.psi_.T)
        head = cls(psi.shape[1], psi.shape[0] + 1, **options)
        with torch.no_grad():
            head.alpha.copy_(torch.as_tensor(estimator.intercept_))
            head.psi.copy_(psi)
        return head

    @torch.no_grad()
    def start_at_counts(self, counts: Sequence[float] | Tensor) -> None:
        """Set the thresholds to the class frequencies, the optimum while psi is zero.

        Parameters
        ----------
        counts : sequence of K positive numbers

        Raises
        ------
        MethodError
            When there are not K numbers or one is not positive.
        """
        counts = torch.as_tensor(counts, dtype=torch.float64)
        if counts.shape != (self.num_classes,) or not bool((counts > 0).all()):
            raise MethodError(f"counts = {counts.tolist()}; {self.num_classes} positive numbers are needed.")
        self.alpha.copy_(torch.logit(counts.cumsum(0)[:-1] / counts.sum()))

    @torch.no_grad()
    def standardise(self, features: Float[Tensor, "n p"]) -> None:
        """Take mean and standard deviation of the features, to be used from now on.

        Parameters
        ----------
        features : Tensor of shape (n, in_features)
            What the network feeds the head, for rows like those of the training.
        """
        wide = features.to(torch.float64)
        sd = wide.std(dim=0, correction=0)
        self.mean.copy_(wide.mean(dim=0))
        self.scale.copy_(torch.where(sd > 0, sd, 1.0))

    def spacings(self, x: Float[Tensor, "*rows p"]) -> Float[Tensor, "*rows b"]:
        """Return the spacings of the boundaries, in float32 at least."""
        kind = torch.promote_types(self.psi.dtype, torch.float32)
        x = (x.to(kind) - self.mean.to(kind)) / self.scale.to(kind)
        alpha = self.alpha.to(kind)
        delta = torch.cat([alpha[:1], alpha.diff()])
        return F.linear(x, self.psi.to(kind), delta)

    def forward(self, x: Float[Tensor, "*rows p"]) -> Float[Tensor, "*rows K"]:
        """Return log-probabilities of the classes in their order."""
        return ordered_log_proba(self.spacings(x), self.floor)

    def loss(self, x: Float[Tensor, "*rows p"], y: Int[Tensor, "*rows"], *, barrier: float = 0.0) -> Float[Tensor, ""]:
        """Return the mean of ``-log P_y``, to which `prox_step` adds the penalty.

        Parameters
        ----------
        x : Tensor of shape (..., in_features)
        y : integer Tensor of shape (...)
            Classes 0 .. K - 1.
        barrier : float, default 0.0
            Adds ``-barrier sum_k log P_k`` a row, which keeps classes that rows do not belong to from vanishing.

        Returns
        -------
        Tensor
        """
        log_p = self(x)
        own = -log_p.gather(-1, y.unsqueeze(-1)).mean()
        return own - barrier * log_p.sum(-1).mean() if barrier else own

    def proba(self, x: Float[Tensor, "*rows p"]) -> Float[Tensor, "*rows K"]:
        """Return class probabilities; negative ones are set to 0 and the row renormalised."""
        T = self.spacings(x)
        eta = T.cumsum(-1)
        middle = eta[..., 1:].sigmoid() * (-eta[..., :-1]).sigmoid() * -torch.expm1(-T[..., 1:].clamp(min=0))
        p = torch.cat([eta[..., :1].sigmoid(), middle, (-eta[..., -1:]).sigmoid()], dim=-1)
        return p / p.sum(-1, keepdim=True)

    def rare_proba(self, x: Float[Tensor, "*rows p"]) -> Float[Tensor, "*rows"]:
        """Return the probability of the last class, valid for every row."""
        return (-self.spacings(x).sum(-1)).sigmoid()

    def penalty(self) -> Float[Tensor, ""]:
        """Return ``lam sum (l1_ratio |psi| + (1 - l1_ratio) psi^2 / 2)`` over the penalised entries."""
        psi = (self.psi if self.penalize_first else self.psi[1:]).to(torch.promote_types(self.psi.dtype, torch.float32))
        return self.lam * (self.l1_ratio * psi.abs().sum() + 0.5 * (1 - self.l1_ratio) * psi.square().sum())

    @torch.no_grad()
    def prox_step(self, lr: float | Float[Tensor, "b p"]) -> None:
        """Apply the proximal map of the penalty with step size `lr`: soft threshold, then shrink.

        Parameters
        ----------
        lr : float or Tensor of psi's shape
            Step size of the optimizer's step just taken, of each entry where they differ.
        """
        first = 0 if self.penalize_first else 1
        psi = self.psi[first:]
        step = lr[first:] if isinstance(lr, Tensor) else lr
        shrunk = (psi.abs() - step * (self.lam * self.l1_ratio)).clamp(min=0)
        psi.copy_(psi.sign() * shrunk / (1 + step * (self.lam * (1 - self.l1_ratio))))

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Let every step of an optimizer be followed by `prox_step` with the step size that the optimizer took.

        That is the learning rate for SGD, over one minus the momentum if there is one, and for the Adam family the
        learning rate over the root of the second moment, entry by entry: each ends where the penalised optimum is.
        Other optimizers count with their learning rate. Leave psi out of weight decay.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            Holds `psi`.

        Returns
        -------
        RemovableHandle

        Raises
        ------
        MethodError
            When the optimizer does not hold psi.
        """

        def group() -> dict[str, Any] | None:
            return next((g for g in optimizer.param_groups if any(p is self.psi for p in g["params"])), None)

        if group() is None:
            raise MethodError("the optimizer does not hold psi of this head. Give it the head's parameters first.")

        def step(*_: object) -> None:
            found = group()
            if found is not None and self.psi.grad is not None:
                self.prox_step(_step_size(found, optimizer.state[self.psi]))

        return optimizer.register_step_post_hook(step)

    def extra_repr(self) -> str:
        """Return the sizes and the penalty, for printing."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}, lam={self.lam}"


def _step_size(group: dict[str, Any], state: dict[str, Any]) -> float | Tensor:
    """Return what an optimizer multiplies a steady gradient with."""
    lr = float(group["lr"])
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if second is not None and "betas" in group:
        correction = 1 - group["betas"][1] ** float(state["step"])
        size: Tensor = lr / ((second / correction).sqrt() + group.get("eps", 0.0))
        return size
    return lr * (1 - group.get("dampening", 0.0)) / (1 - group.get("momentum", 0.0))
