"""The communication hook: one gathered message per bucket in place of an all-reduce of gradients."""

# DDP compares a hook's annotations with the classes themselves, so they must not be turned into strings here.

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gnomon.errors import MethodError
from gnomon.optim.econtrol.compressors import Compressor, Identity
from gnomon.optim.econtrol.feedback import Memory, absorb, estimates, message_input
from gnomon.optim.econtrol.state import ErrorFeedback

__all__ = ["econtrol_hook"]


@dataclass
class _Part:
    """One vector of a bucket that is compressed as a whole, with its worker's message."""

    places: list[int]
    gradient: Tensor
    memory: Memory
    compressor: Compressor
    message: tuple[Tensor, ...]


def econtrol_hook(
    state: ErrorFeedback,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Exchange a bucket's gradients by compressed messages and return the averaged estimate.

    Register it with ``state.register(ddp_model)`` or ``ddp_model.register_comm_hook(state, econtrol_hook)``.

    Parameters
    ----------
    state : EControlState or ErrorFeedback
    bucket : GradBucket
        Gradients of one bucket; float32, float64, bfloat16 or float16. Memory is kept in float32 or better.

    Returns
    -------
    Future of Tensor
        The flat bucket, averaged over the processes.

    Raises
    ------
    MethodError
        For sparse or complex gradients; for gradients that are not finite with ``nonfinite="raise"`` (PyTorch hands
        it on as a RuntimeError with the same text).

    Examples
    --------
    >>> from gnomon.optim import EControlState
    >>> state = EControlState(ratio=0.01)
    >>> ddp_model.register_comm_hook(state, econtrol_hook)  # doctest: +SKIP
    """
    group = state.process_group if state.process_group is not None else dist.group.WORLD
    assert group is not None
    world = dist.get_world_size(group)
    buffer, parameters, gradients = bucket.buffer(), bucket.parameters(), bucket.gradients()
    _check(state, parameters, gradients)
    starting = state.iteration < state.start_iter
    last = bucket.is_last()
    state.count(0, 0, 4 * buffer.numel() * 2 * (world - 1) // world)
    new = estimates(state.kind) and any(_is_new(state, p) for p in parameters)
    first = not starting and state.init == "dense" and new
    if starting or first:
        own = [g.detach().clone() for g in gradients] if first else []
        size = 2 * buffer.element_size() * buffer.numel() * (world - 1) // world
        state.count(size, size, 0)
        future = dist.all_reduce(buffer.div_(world), group=group, async_op=True).get_future()

        def averaged(done: torch.futures.Future[Any]) -> Tensor:
            result: Tensor = done.value()[0]
            for p, g, mean in zip(parameters, own, gradients, strict=True) if first else ():
                _remember(state, p, g, mean)
            _advance(state, last)
            return result

        return future.then(averaged)
    healthy = _finite(buffer)
    # what cannot be sent must not change the shape of the message: the others wait for one of this size
    parts = _messages(state, parameters, gradients if healthy else _zeros(gradients), dist.get_rank(group))
    packed = _pack(healthy, parts, buffer.device)
    state.count(packed.numel(), packed.numel() * (world - 1), 0)
    gathered = packed.new_empty(world * packed.numel())
    future = dist.all_gather_single(gathered, packed, group=group, async_op=True).get_future()

    def applied(done: torch.futures.Future[Any]) -> Tensor:
        done.value()
        rows = gathered.view(world, -1)
        bad = rows[:, 0].bool()
        if bool(bad.any()):
            _nonfinite(state, bad, parameters, gradients)
            buffer.fill_(torch.nan)
        else:
            for part, messages in zip(parts, _unpack(rows, parts), strict=True):
                _apply(state, part, parameters, gradients, messages, world)
        _advance(state, last)
        return buffer

    return future.then(applied)


def _check(state: ErrorFeedback, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        if g.is_sparse or g.is_complex():
            what = "sparse" if g.is_sparse else "complex"
            raise MethodError(
                f"the gradient of {state.name_of(p)} is {what}; compression takes dense real gradients. "
                + ("Use sparse=False in the embedding." if g.is_sparse else "Keep complex parameters out of DDP.")
            )


def _is_new(state: ErrorFeedback, parameter: nn.Parameter) -> bool:
    needs = state.kind != "none" and not (state.whole(parameter) and state.kind != "ef21-sgdm")
    return needs and parameter not in state.memory


def _advance(state: ErrorFeedback, last: bool) -> None:
    if last:
        state.iteration += 1


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _remember(state: ErrorFeedback, parameter: nn.Parameter, gradient: Tensor, mean: Tensor) -> None:
    """Start a parameter's memory from an uncompressed exchange."""
    if _is_new(state, parameter):
        state.memory[parameter] = Memory.start(state.kind, _exact(gradient), dense=True)
        if estimates(state.kind):
            state.averages[parameter] = _exact(mean).clone()


def _messages(state: ErrorFeedback, parameters: list[nn.Parameter], gradients: list[Tensor], rank: int) -> list[_Part]:
    """Compress what this process has to say of a bucket."""
    together: list[int] = []
    parts = []
    for place, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        exact = _exact(g)
        if _is_new(state, p):
            state.memory[p] = Memory.start(state.kind, exact, dense=False)
            if estimates(state.kind):
                state.averages[p] = torch.zeros_like(exact)
        if not state.whole(p) and state.granularity == "global":
            together.append(place)
            continue
        whole = state.whole(p)
        # uncompressed, every kind but the one with momentum is the plain average and needs no memory
        compressor = Identity() if whole else state.compressor
        memory = state.memory.get(p, Memory())
        kind = state.kind if memory.h is not None or memory.e is not None else "none"
        x = message_input(kind, exact, memory, eta=state.strength(tuple(p.shape)), beta=state.beta)
        seed = hash((state.seed, state.iteration, rank, place)) % 2**31
        parts.append(_Part([place], exact, memory, compressor, compressor.encode(x.contiguous(), seed)))
    if together:
        parts.append(_bucket_part(state, together, parameters, gradients, rank))
    return parts


def _bucket_part(
    state: ErrorFeedback, places: list[int], parameters: list[nn.Parameter], gradients: list[Tensor], rank: int
) -> _Part:
    """Compress several tensors as one vector; their memories are joined for the moment."""
    memories = [state.memory.get(parameters[i], Memory()) for i in places]

    def joined(name: str) -> Tensor | None:
        held = [getattr(m, name) for m in memories]
        return None if held[0] is None else torch.cat([t.reshape(-1) for t in held])

    memory = Memory(joined("e"), joined("h"), joined("v"))
    flat = torch.cat([_exact(gradients[i]).reshape(-1) for i in places])
    x = message_input(state.kind, flat, memory, eta=state.strength(tuple(flat.shape)), beta=state.beta)
    seed = hash((state.seed, state.iteration, rank, places[0])) % 2**31
    return _Part(places, flat, memory, state.compressor, state.compressor.encode(x, seed))


def _part_out(joined: Memory, name: str, memories: list[Memory]) -> None:
    """Write one joined vector back into the memories of its tensors."""
    flat = getattr(joined, name)
    if flat is None:
        return
    start = 0
    for memory in memories:
        own: Tensor = getattr(memory, name)
        own.copy_(flat[start : start + own.numel()].view_as(own))
        start += own.numel()


def _finite(buffer: Tensor) -> bool:
    # one pass without a copy; only a sum that overflows needs the second look
    return bool(torch.isfinite(buffer.sum(dtype=torch.promote_types(buffer.dtype, torch.float32)))) or bool(
        torch.isfinite(buffer).all()
    )


def _zeros(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) for t in tensors]


def _pack(healthy: bool, parts: list[_Part], device: torch.device) -> Tensor:
    """Join all messages of a bucket into bytes, with a first byte that tells of values that are not finite."""
    bad = torch.tensor([not healthy], dtype=torch.uint8, device=device)
    flat = [t.contiguous().view(torch.uint8).reshape(-1) for part in parts for t in part.message]
    return torch.cat([bad, *flat])


def _unpack(rows: Tensor, parts: list[_Part]) -> list[list[tuple[Tensor, ...]]]:
    """Return, per part, the messages of all processes."""
    found = []
    start = 1
    for part in parts:
        ends = []
        for tensor in part.message:
            ends.append((start, start + tensor.nbytes))
            start += tensor.nbytes
        found.append(
            [
                tuple(
                    # a copy begins at an aligned address, which a view as a wider type needs
                    row[a:b].clone().view(t.dtype).view(t.shape)
                    for (a, b), t in zip(ends, part.message, strict=True)
                )
                for row in rows
            ]
        )
    return found


def _apply(
    state: ErrorFeedback,
    part: _Part,
    parameters: list[nn.Parameter],
    gradients: list[Tensor],
    messages: list[tuple[Tensor, ...]],
    world: int,
) -> None:
    """Update memory and averages of one part and put the estimate in the gradients' place."""
    kind = state.kind if part.memory.h is not None or part.memory.e is not None else "none"
    absorb(kind, part.gradient, part.memory, part.compressor, part.message, beta=state.beta)
    owners = [parameters[i] for i in part.places]
    if len(owners) > 1 or state.granularity == "global":
        memories = [state.memory[p] for p in owners if p in state.memory]
        for name in ("e", "h", "v"):
            if memories:
                _part_out(part.memory, name, memories)
    if estimates(kind) and len(owners) == 1 and part.gradient.shape == owners[0].shape:
        mean = state.averages[owners[0]]
        for message in messages:
            part.compressor.add(mean, message, 1 / world)
        gradients[part.places[0]].copy_(mean)
        return
    if estimates(kind):
        mean = torch.cat([state.averages[p].reshape(-1) for p in owners]).view_as(part.gradient)
    else:
        mean = torch.zeros_like(part.gradient)
    for message in messages:
        part.compressor.add(mean, message, 1 / world)
    start = 0
    for p, place in zip(owners, part.places, strict=True):
        own = mean.reshape(-1)[start : start + p.numel()].view_as(p)
        start += p.numel()
        if estimates(kind):
            state.averages[p].copy_(own)
        gradients[place].copy_(own)


def _nonfinite(state: ErrorFeedback, bad: Tensor, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    if state.nonfinite == "skip":
        return
    names = [state.name_of(p) for p, g in zip(parameters, gradients, strict=True) if not torch.isfinite(g).all()]
    here = f"; here: {', '.join(names)}" if names else ""
    ranks = ", ".join(str(i) for i in torch.nonzero(bad).flatten().tolist())
    raise MethodError(
        f"gradients are not finite in process {ranks}{here}. One such value would stay in the memory for ever, so the "
        "round was stopped. Lower the learning rate, or set nonfinite='skip' to leave such a step to a gradient scaler."
    )
