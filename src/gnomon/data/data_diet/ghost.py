"""Exact norms of per-row gradients from one forward and one backward pass, without forming the gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.tensor import DTensor

from gnomon.common.depth import evaluating
from gnomon.data.data_diet.formulas import Outer, Rule, rule_of, squares_of, tie
from gnomon.data.data_diet.persample import functional_squares, looped_squares
from gnomon.data.data_diet.rows import Batch, Loss, aligned_logits, as_batch, device_of, row_losses
from gnomon.errors import GnomonWarning, MethodError, ModelError, nearest

__all__ = ["GradientNorms", "How", "grand"]

How = Literal["ghost", "func", "loop"]


def grand(
    model: nn.Module,
    batch: Any,
    *,
    how: How = "ghost",
    loss: Loss | None = None,
    shift: bool | None = None,
    check: bool = True,
) -> Float[Tensor, " rows"]:
    """Return GraNd of every row: the L2 norm of the gradient of its own loss over all trainable parameters.

    Evaluation mode is forced and restored; ``.grad`` is left alone; autocast is off.

    Parameters
    ----------
    model : nn.Module
        A classifier or a causal language model. Parameters with ``requires_grad=False`` do not count.
    batch : pair, mapping or LongTensor
        See `as_batch`. A row's loss is the cross-entropy (of tokens: their mean), for floating labels the squared
        error.
    how : {"ghost", "func", "loop"}, default "ghost"
        ``"ghost"``: one backward pass for the batch and a formula a layer. ``"func"``: `torch.func`, per-row
        gradients in memory. ``"loop"``: one backward pass a row. All three are exact.
    loss : callable, optional
        ``(logits, targets) -> (rows,)`` in place of these losses.
    shift : bool, optional
        The logits at t predict the label at t + 1; default: for causal language models.
    check : bool, default True
        Hold one row of the batch against plain autograd; parameters that differ (a layer used in a way the formulas
        do not know) are counted row by row instead.

    Returns
    -------
    Tensor (rows,)
        float32, or float64 for a float64 model.

    Raises
    ------
    ModelError
        No trainable parameter, sharded parameters, or a batch norm without running statistics.
    DataError
        When the batch has no labels.

    Examples
    --------
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> grand(layer, (torch.tensor([[3.0, 4.0]]), torch.tensor([0])))
    tensor([3.5355])
    """
    norms = GradientNorms(model, how=how, loss=loss, check=check)
    return norms(as_batch(model, batch, shift=shift).to(device_of(model)))


@dataclass
class _Call:
    """One call of a module that owns trainable parameters."""

    module: nn.Module
    names: dict[str, int]  # parameter name in the module -> id
    x: Tensor | None
    version: int
    edge: GradientEdge
    rule: tuple[str, Rule] | None


@dataclass
class _Gathered:
    """What has come together for one parameter."""

    calls: list[_Call]
    parts: list[Any] = field(default_factory=list)


class GradientNorms:
    """`grand` for many batches of one model: the check against plain autograd is made once, on the first.

    Parameters
    ----------
    model : nn.Module
    how, loss, check
        As for `grand`.

    Attributes
    ----------
    formulas : dict of str to str
        Of each parameter met so far, how its norm was found: ``"linear"``, ``"embedding"``, ``"tied"``,
        ``"convolution"``, ``"norm"``, or ``"row by row"``.
    """

    def __init__(self, model: nn.Module, *, how: How = "ghost", loss: Loss | None = None, check: bool = True) -> None:
        if how not in get_args(How):
            raise MethodError(f"how = {how!r} is unknown. {nearest(str(how), get_args(How), noun='way')}")
        self.model = _bare(model)
        self.how, self.loss, self.check = how, loss, check
        self.trainable = {id(p): (name, p) for name, p in self.model.named_parameters() if p.requires_grad}
        _check_model(self.model, [p for _, p in self.trainable.values()], loss)
        self.formulas: dict[str, str] = {}
        self._distrusted: set[int] = set()
        self._vectorised = True
        self._places: Sequence[int] | None = None

    def __call__(self, batch: Batch, places: Sequence[int] | None = None) -> Float[Tensor, " rows"]:
        """Return the norm of every row of a batch, (rows,); `places` are the rows' numbers, for messages."""
        self._places = places
        with evaluating(self.model), torch.autocast(device_of(self.model).type, enabled=False):
            if self.how != "ghost":
                squares = self._row_by_row(list(self.trainable), batch, self.how)
            else:
                squares = self._ghost(batch)
        return squares.sqrt()

    def _ghost(self, batch: Batch) -> Tensor:
        found, other = self._pass(batch)
        if self.check:
            self.check = False
            wrong = self._compare(batch, found, set(self.trainable) - set(other))
            if wrong:
                self._distrusted |= wrong
                found, other = self._pass(batch)
        total = next(iter(self.trainable.values()))[1].new_zeros(len(batch), dtype=_sum_dtype(self.trainable))
        for squares in found.values():
            total += squares
        if other:
            total += self._row_by_row(other, batch, "func")
            self.formulas |= {self.trainable[p][0]: "row by row" for p in other}
        return total

    def _pass(self, batch: Batch) -> tuple[dict[int, Tensor], list[int]]:
        """Run forward and backward; return the squares by parameter and the parameters no formula covers."""
        met: list[_Call] = []
        with torch.enable_grad(), _recording(self.model, set(self.trainable), met, len(batch)):
            logits, targets = aligned_logits(self.model, batch)
            total = row_losses(logits, targets, self.loss, places=self._places).sum()
        del logits
        if total.grad_fn is None:
            raise ModelError("The loss does not depend on any trainable parameter. Unfreeze some, or score by 'el2n'.")
        calls = [call for call in met if call.rule is not None]
        uses, depth = _walk(total.grad_fn, {call.edge.node for call in calls})
        live = [call for call in calls if call.edge.node in depth]
        gathered: dict[int, _Gathered] = {}
        other: list[int] = []
        owners: dict[int, list[_Call]] = {}
        for call in live:
            for p in call.names.values():
                owners.setdefault(p, []).append(call)
        for p in self.trainable:
            mine, count = owners.get(p, []), uses.get(p, 0)
            if count and count == len(mine) and p not in self._distrusted and _combine(mine):
                gathered[p] = _Gathered(mine)
                self.formulas[self.trainable[p][0]] = _formula(mine)
            elif count or p in self._distrusted:
                other.append(p)
        return self._backward(total, live, depth, gathered, len(batch)), other

    def _backward(
        self, total: Tensor, live: list[_Call], depth: dict[Any, bool], gathered: dict[int, _Gathered], rows: int
    ) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def arrived(call: _Call, grad: Tensor | None) -> None:
            if grad is not None and call.x is not None and any(p in gathered for p in call.names.values()):
                self._enter(call, grad.detach(), gathered, found, rows)

        # only the deepest calls are asked for: the pass then runs through all others, and stops there
        ends = [call for call in live if not depth[call.edge.node]]
        handles = [
            call.edge.node.register_prehook(lambda grads, call=call: arrived(call, grads[call.edge.output_nr]))
            for call in live
            if depth[call.edge.node]
        ]
        try:
            grads = torch.autograd.grad(total, [call.edge for call in ends], allow_unused=True) if ends else ()
            for call, grad in zip(ends, grads, strict=True):
                arrived(call, grad)
        finally:
            for handle in handles:
                handle.remove()
        for p, part in gathered.items():  # calls whose gradient is zero by construction never arrive
            if p not in found and part.parts:
                found[p] = squares_of(part.parts)
        return found

    def _enter(
        self, call: _Call, grad: Tensor, gathered: dict[int, _Gathered], found: dict[int, Tensor], rows: int
    ) -> None:
        """Turn one call's input and output gradient into squares, or keep them until the parameter's others came."""
        assert call.x is not None
        assert call.rule is not None
        if call.x._version != call.version:
            raise ModelError(
                f"The input of a {type(call.module).__name__} was changed in place after its call, so its gradient "
                "cannot be computed. Replace the in-place operation, or use how='loop'."
            )
        parts = call.rule[1](call.module, call.x, grad, rows)
        call.x = None
        for name, p in call.names.items():
            if p not in gathered:
                continue
            mine = gathered[p]
            mine.parts.append(_reduced(parts[name], mine.calls, rows))
            if len(mine.parts) == len(mine.calls):
                found[p] = squares_of(mine.parts)
                mine.parts = []

    def _compare(self, batch: Batch, found: dict[int, Tensor], covered: set[int]) -> set[int]:
        """Return the parameters whose squares differ from plain autograd's on one row; what was not found counts 0."""
        place = len(batch) // 2
        with torch.enable_grad():
            logits, targets = aligned_logits(self.model, batch.row(place))
            loss = row_losses(logits, targets, self.loss).sum()
        chosen = [p for p in self.trainable if p in covered]
        grads = torch.autograd.grad(loss, [self.trainable[p][1] for p in chosen], allow_unused=True)
        exact = [0.0 if g is None else float(_to_dense(g).double().square().sum()) for g in grads]
        low = any(self.trainable[p][1].dtype in (torch.bfloat16, torch.float16) for p in chosen)
        relative, floor = (0.2, 1e-3) if low else (0.01, 1e-6)
        slack = floor * sum(exact)
        return {
            p
            for p, value in zip(chosen, exact, strict=True)
            if not abs((float(found[p][place]) if p in found else 0.0) - value) <= relative * value + slack
        }

    def _row_by_row(self, parameters: Sequence[int], batch: Batch, how: How) -> Tensor:
        names = [self.trainable[p][0] for p in parameters]
        if how == "func" and self._vectorised:
            try:
                return functional_squares(self.model, names, batch, self.loss)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                self._vectorised = False
                warnings.warn(
                    f"torch.func cannot run {type(self.model).__name__} row by row ({_first_line(error)}), so the "
                    f"gradients of {_shown(names)} take one backward pass a row. The numbers are the same.",
                    GnomonWarning,
                    stacklevel=5,
                )
        return looped_squares(self.model, names, batch, self.loss)


def _bare(model: nn.Module) -> nn.Module:
    """Take off what only serves training: DDP's buckets and the compiled wrapper, not adapters."""
    inner: Any = model
    while hasattr(inner, "_orig_mod") or isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    found: nn.Module = inner
    return found


def _check_model(model: nn.Module, parameters: list[nn.Parameter], loss: Loss | None) -> None:
    if loss is None and getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification":
        raise ModelError(
            "A multi-label model has no cross-entropy over classes. Give its loss by row: loss=lambda logits, labels: "
            "binary_cross_entropy_with_logits(logits, labels, reduction='none').mean(1)."
        )
    if not parameters:
        raise ModelError(
            f"No parameter of {type(model).__name__} is trainable, so no gradient has a norm. Unfreeze parameters "
            "(requires_grad_(True)), or score by method='el2n'."
        )
    if any(isinstance(p, DTensor) for p in parameters):
        raise ModelError(
            "The parameters are sharded (FSDP): norms of per-row gradients need whole layers. Score by method='el2n', "
            "or score an unsharded copy."
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"The batch norm {name!r} has no running statistics, so rows depend on each other and none has a "
                "gradient of its own. Build it with track_running_stats=True."
            )


@contextmanager
def _recording(model: nn.Module, trainable: set[int], calls: list[_Call], rows: int) -> Iterator[None]:
    """Note every call of a module that owns trainable parameters."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        names = {n: id(p) for n, p in module._parameters.items() if p is not None and id(p) in trainable}
        rule = rule_of(module, x, output, rows)
        changed = None
        if isinstance(module, nn.Embedding) and rule is not None and len(output) == 1 < rows:
            changed = output = output.expand(rows, *output.shape[1:])  # positions shared by all rows
        calls.append(_Call(module, names, x.detach(), x._version, get_gradient_edge(output), rule))
        return changed

    handles = [
        # first of all hooks: others may change what the layer returned
        module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        for module in model.modules()
        if any(p is not None and id(p) in trainable for p in module._parameters.values())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _walk(root: Any, marked: set[Any]) -> tuple[dict[int, int], dict[Any, bool]]:
    """Go through the graph of a loss.

    Returns
    -------
    (dict, dict)
        How often each parameter (by id) is used; and of every node whether a marked one lies beneath it.
    """
    uses: dict[int, int] = {}
    beneath: dict[Any, bool] = {}
    stack = [(root, False)]
    while stack:
        node, left = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if left:
            beneath[node] = any(child in marked or beneath[child] for child in children)
            continue
        if node in beneath:
            continue
        beneath[node] = False
        stack.append((node, True))
        for child in children:
            if hasattr(child, "variable"):
                uses[id(child.variable)] = uses.get(id(child.variable), 0) + 1
            if child not in beneath:
                stack.append((child, False))
    return uses, beneath


def _combine(calls: list[_Call]) -> bool:
    """Tell whether the contributions of several calls can be added by a formula."""
    kinds = {_kind(call) for call in calls}
    return None not in kinds and (len(kinds) == 1 or kinds == {"outer", "lookup"})


def _kind(call: _Call) -> str | None:
    """What a call adds to its parameters; a weight and the bias beside it never share a parameter."""
    if call.rule is None:
        return None
    if call.rule[0] == "linear":
        return "outer" if isinstance(call.module, nn.Linear) else "transposed"
    return {"embedding": "lookup", "convolution": "convolution", "norm": "vector"}[call.rule[0]]


def _formula(calls: list[_Call]) -> str:
    names = {call.rule[0] for call in calls if call.rule is not None}
    return names.pop() if len(names) == 1 else "tied"


def _reduced(part: Any, calls: list[_Call], rows: int) -> Any:
    """Shrink the gradient of a tied head at once when the ids of the embedding are known."""
    ids = [call.x for call in calls if isinstance(call.module, nn.Embedding)]
    heads = sum(not isinstance(call.module, nn.Embedding) for call in calls)
    if isinstance(part, Outer) and heads == 1 and ids and all(x is not None for x in ids):
        return tie(part, torch.cat([x.reshape(len(x), -1).expand(rows, -1) for x in ids if x is not None], 1))
    return part


def _sum_dtype(trainable: dict[int, tuple[str, nn.Parameter]]) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for _, p in trainable.values()) else torch.float32


def _to_dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
