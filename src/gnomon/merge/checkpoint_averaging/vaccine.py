"""Few-shot training in several languages: the joint loss, and the baseline that projects conflicting gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gnomon.errors import MethodError

__all__ = ["gradient_vaccine", "multilingual_loss", "project_gradients"]


def multilingual_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the unweighted mean of the losses of one batch per language.

    Parameters
    ----------
    losses : mapping of str to Tensor
        Language -> scalar.

    Raises
    ------
    MethodError
        When it is empty.

    Examples
    --------
    >>> import torch
    >>> multilingual_loss({"en": torch.tensor(1.0), "de": torch.tensor(3.0)})
    tensor(2.)
    """
    if not losses:
        raise MethodError("There is no loss to average: give one batch's loss per language.")
    return torch.stack(list(losses.values())).mean()


def project_gradients(gradient: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Take out of a gradient g what works against another one o: ``g - min(0, <g, o> / <o, o>) o``.

    Parameters
    ----------
    gradient, other : sequence of Tensor
        The gradients of the same parameters; the inner products run over all of them together.

    Returns
    -------
    list of Tensor
        With <result, o> >= 0; `gradient` itself where it does not conflict, or where o is zero.

    Examples
    --------
    >>> import torch
    >>> project_gradients([torch.tensor([1.0, -1.0])], [torch.tensor([0.0, 2.0])])
    [tensor([1., 0.])]
    """
    inner = sum(float((g.double() * o.double()).sum()) for g, o in zip(gradient, other, strict=True))
    square = sum(float(o.double().square().sum()) for o in other)
    factor = min(0.0, inner / square) if square > 0 else 0.0
    return [g - factor * o if factor else g for g, o in zip(gradient, other, strict=True)]


def gradient_vaccine(
    losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter], generator: torch.Generator
) -> str:
    """Set gradients as the few-shot baseline does: of all languages but one, without what would hurt that one.

    Parameters
    ----------
    losses : mapping of str to Tensor
        Language -> scalar loss of one batch; two languages or more.
    parameters : iterable of Parameter
        Their ``grad`` is replaced.
    generator : torch.Generator
        Draws the language that is left out.

    Returns
    -------
    str
        That language.

    Raises
    ------
    MethodError
        With fewer than two languages.

    Examples
    --------
    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> losses = {"en": (w * torch.tensor([1.0, -1.0])).sum(), "de": w[1] * 2}
    >>> left_out = gradient_vaccine(losses, [w], torch.Generator().manual_seed(0))
    >>> left_out in losses, w.grad is not None
    (True, True)
    """
    if len(losses) < 2:
        raise MethodError(f"The losses are of {len(losses)} language(s): {list(losses)}. One is left out; give two.")
    trained = [p for p in parameters if p.requires_grad]
    languages = list(losses)
    left_out = languages[int(torch.randint(len(languages), (1,), generator=generator))]
    rest = multilingual_loss({name: loss for name, loss in losses.items() if name != left_out})
    gradients = [
        torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in (rest, losses[left_out])
    ]
    for parameter, gradient in zip(trained, project_gradients(*gradients), strict=True):
        parameter.grad = gradient
    return left_out
