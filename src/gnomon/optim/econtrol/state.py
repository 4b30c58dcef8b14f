"""What a process keeps between steps: one memory per parameter, the averaged estimates, and counts of bytes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gnomon.errors import GnomonWarning, MethodError, ModelError
from gnomon.optim.econtrol.compressors import Compressor, Identity, make
from gnomon.optim.econtrol.feedback import Kind, Memory, check_kind, default_eta

__all__ = ["EControlState", "ErrorFeedback"]


class ErrorFeedback:
    """State of `econtrol_hook` for any kind of error feedback.

    Parameters
    ----------
    kind : {"econtrol", "ec", "ef21", "ef21-sgdm", "none"}, default "econtrol"
        ``"ec"`` is classic error feedback; ``"none"`` compresses and forgets.
    compressor : {"topk", "randk", "sign", "lowrank", "rounding", "identity"} or Compressor, default "topk"
    ratio : float, default 0.01
        Share of the entries that Top-K and Rand-K send.
    eta : float in [0, 1], optional
        How strongly EControl sends its error; default the compressor's contraction for the tensor, within
        [0.01, 0.3]. 0 is EF21.
    beta : float in (0, 1], default 0.1
        Weight of the new gradient in the momentum of ``"ef21-sgdm"``.
    init : {"dense", "compressed"}, default "dense"
        ``"dense"`` exchanges the first gradient uncompressed, as the paper has it; ``"compressed"`` starts at zero.
    start_iter : int, default 0
        Steps of plain averaging before compression begins (PowerSGD's convention).
    granularity : {"layerwise", "global"}, default "layerwise"
        Compress each tensor, or the whole bucket as one vector (as the paper's analysis has it).
    dense_below : int, default 1024
        Tensors with fewer entries are averaged uncompressed.
    nonfinite : {"raise", "skip"}, default "raise"
        A gradient with NaN or infinity in any process: raise in all of them, or hand out NaN for the bucket in all
        of them, by which a gradient scaler knows to skip the step. The memory is untouched either way.
    process_group : ProcessGroup, optional
        Default the group of all processes.
    seed : int, default 0
        Of random compressors.

    Raises
    ------
    MethodError
        On an option out of range.

    Examples
    --------
    >>> state = ErrorFeedback("ef21", compressor="topk", ratio=0.05)
    >>> state.kind
    'ef21'
    """

    def __init__(
        self,
        kind: Kind = "econtrol",
        *,
        compressor: str | Compressor = "topk",
        ratio: float = 0.01,
        eta: float | None = None,
        beta: float = 0.1,
        init: Literal["dense", "compressed"] = "dense",
        start_iter: int = 0,
        granularity: Literal["layerwise", "global"] = "layerwise",
        dense_below: int = 1024,
        nonfinite: Literal["raise", "skip"] = "raise",
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        self.kind = check_kind(kind)
        self.compressor = make(compressor, ratio)
        if eta is not None and not 0 <= eta <= 1:
            raise MethodError(f"eta = {eta!r}: allowed is a number from 0 to 1, or None.")
        if not 0 < beta <= 1:
            raise MethodError(f"beta = {beta!r}: allowed is a number above 0 and at most 1.")
        _one_of("init", init, ("dense", "compressed"))
        _one_of("granularity", granularity, ("layerwise", "global"))
        _one_of("nonfinite", nonfinite, ("raise", "skip"))
        if start_iter < 0 or dense_below < 0:
            raise MethodError(
                f"start_iter = {start_iter}, dense_below = {dense_below}: allowed are whole numbers from 0."
            )
        if granularity == "global" and self.compressor.name == "lowrank":
            raise MethodError(
                "compressor = 'lowrank' needs matrices; granularity = 'global' has one vector. Choose one."
            )
        self.eta, self.beta, self.init, self.start_iter = eta, beta, init, start_iter
        self.granularity, self.dense_below, self.nonfinite = granularity, dense_below, nonfinite
        self.process_group, self.seed = process_group, seed
        self.iteration = 0
        self.scale = 1.0
        self.memory: dict[nn.Parameter, Memory] = {}
        self.averages: dict[nn.Parameter, Tensor] = {}
        self._names: dict[nn.Parameter, str] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._sent = self._received = self._plain = 0

    # -- naming and registration

    def register(self, model: nn.Module) -> None:
        """Name the parameters of `model` and register the hook on it, before its first backward pass.

        Raises
        ------
        ModelError
            When `model` is no `DistributedDataParallel`: with FSDP or ZeRO no process sees a whole gradient.
        """
        from gnomon.optim.econtrol.hook import econtrol_hook

        if not isinstance(model, DistributedDataParallel):
            raise ModelError(
                f"{type(model).__name__} takes no communication hook of this kind: gradient compression works with "
                "DistributedDataParallel only (FSDP and ZeRO shard gradients). Wrap the model in it."
            )
        self.name_parameters(model)
        model.register_comm_hook(self, econtrol_hook)

    def name_parameters(self, model: nn.Module) -> None:
        """Give parameters the names `state_dict` writes; a loaded state finds its parameters by them."""
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._names = {parameter: name for name, parameter in inner.named_parameters()}
        for parameter, name in self._names.items():
            self._take_over(parameter, self._waiting.pop(name, None))

    def name_of(self, parameter: nn.Parameter) -> str:
        """Return a parameter's name, for messages."""
        return self._names.get(parameter, f"a parameter of shape {tuple(parameter.shape)}")

    # -- what the hook asks

    def whole(self, parameter: Tensor) -> bool:
        """Return whether a tensor is sent uncompressed."""
        return parameter.numel() < self.dense_below or isinstance(self.compressor, Identity)

    def strength(self, shape: tuple[int, ...]) -> float:
        """Return eta for a tensor of this shape."""
        return default_eta(self.compressor.delta(shape)) if self.eta is None else self.eta

    def set_scale(self, scale: float) -> None:
        """Tell by what the loss is multiplied now (a gradient scaler); the memory follows into the new units."""
        if scale != self.scale:
            factor = scale / self.scale
            for tensor in self._tensors():
                tensor.mul_(factor)
            self.scale = scale

    def _tensors(self) -> list[Tensor]:
        held = [t for m in self.memory.values() for t in (m.e, m.h, m.v) if t is not None]
        return held + list(self.averages.values())

    def memory_bytes(self) -> int:
        """Return the bytes this process keeps: up to three float32 copies of the gradients."""
        return sum(t.nbytes for t in self._tensors())

    def count(self, sent: int, received: int, plain: int) -> None:
        """Add one exchange to the statistics, in bytes."""
        self._sent += sent
        self._received += received
        self._plain += plain

    def statistics(self) -> dict[str, float]:
        """Return bytes over all steps so far, of this process.

        Returns
        -------
        dict
            ``steps``; ``sent_bytes`` (own messages); ``received_bytes`` (those of all others);
            ``allreduce_bytes`` (what a ring all-reduce of float32 gradients would have sent and received each);
            ``ratio`` (received over that: below 1 the compression saves traffic, which with Top-K takes a `ratio`
            below about one over the number of processes).
        """
        ratio = self._received / self._plain if self._plain else float("nan")
        return {
            "steps": self.iteration,
            "sent_bytes": self._sent,
            "received_bytes": self._received,
            "allreduce_bytes": self._plain,
            "ratio": ratio,
        }

    # -- saving

    def state_dict(self) -> dict[str, Any]:
        """Return this process's memory by parameter name; every process has its own.

        Raises
        ------
        MethodError
            When the parameters have no names yet.
        """
        if not self._names and self.memory:
            raise MethodError(
                "the parameters have no names, so the state cannot be saved. Register the hook with "
                "state.register(ddp_model), or call state.name_parameters(model)."
            )
        found: dict[str, dict[str, Tensor]] = {name: dict(parts) for name, parts in self._waiting.items()}
        for parameter, memory in self.memory.items():
            parts = {k: v for k, v in (("e", memory.e), ("h", memory.h), ("v", memory.v)) if v is not None}
            found[self._names[parameter]] = parts
        for parameter, average in self.averages.items():
            found.setdefault(self._names[parameter], {})["average"] = average
        return {
            "kind": self.kind,
            "world_size": _world(self.process_group),
            "iteration": self.iteration,
            "scale": self.scale,
            "bytes": [self._sent, self._received, self._plain],
            "parameters": found,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved memory.

        With another number of processes than it was saved with, errors start at zero and every estimate at the
        average, which keeps the average the mean of the estimates; a warning says so.

        Raises
        ------
        MethodError
            When it was saved by another kind of feedback.
        """
        if state["kind"] != self.kind:
            raise MethodError(
                f"the saved state is of the kind {state['kind']!r}, this one of {self.kind!r}. Use the same."
            )
        world = _world(self.process_group)
        self._waiting = {name: dict(parts) for name, parts in state["parameters"].items()}
        if state["world_size"] != world:
            warnings.warn(
                f"the state was saved with {state['world_size']} processes and is loaded with {world}: errors start at "
                "zero, estimates at their average.",
                GnomonWarning,
                stacklevel=2,
            )
            for parts in self._waiting.values():
                if "e" in parts:
                    parts["e"] = torch.zeros_like(parts["e"])
                for part in ("h", "v"):
                    if part in parts:
                        parts[part] = parts["average"].clone()
        self.iteration, self.scale = int(state["iteration"]), float(state["scale"])
        self._sent, self._received, self._plain = state["bytes"]
        self.memory, self.averages = {}, {}
        for parameter, name in self._names.items():
            self._take_over(parameter, self._waiting.pop(name, None))

    def _take_over(self, parameter: nn.Parameter, parts: dict[str, Tensor] | None) -> None:
        if parts is None:
            return
        own = {k: v.to(parameter.device).clone() for k, v in parts.items()}
        wrong = next((v for v in own.values() if v.shape != parameter.shape), None)
        if wrong is not None:
            raise MethodError(
                f"the saved state of {self.name_of(parameter)} has shape {tuple(wrong.shape)}, the parameter "
                f"{tuple(parameter.shape)}. Load the state of this model."
            )
        average = own.pop("average", None)
        if own:
            self.memory[parameter] = Memory(**own)
        if average is not None:
            self.averages[parameter] = average

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the process group, as PyTorch's own hook states do."""
        warnings.warn(
            "the process group is not saved with this state; set state.process_group after loading.",
            GnomonWarning,
            stacklevel=2,
        )
        return {k: v for k, v in self.__dict__.items() if k != "process_group"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, process_group=None)


class EControlState(ErrorFeedback):
    """State of `econtrol_hook` for EControl; parameters as for `ErrorFeedback`, without `kind` and `beta`.

    Examples
    --------
    >>> state = EControlState(ratio=0.01)
    >>> # ddp = DistributedDataParallel(model); state.register(ddp)
    >>> state.strength((1000,))
    0.01
    """

    def __init__(
        self,
        compressor: str | Compressor = "topk",
        ratio: float = 0.01,
        eta: float | None = None,
        *,
        init: Literal["dense", "compressed"] = "dense",
        start_iter: int = 0,
        granularity: Literal["layerwise", "global"] = "layerwise",
        dense_below: int = 1024,
        nonfinite: Literal["raise", "skip"] = "raise",
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            "econtrol",
            compressor=compressor,
            ratio=ratio,
            eta=eta,
            init=init,
            start_iter=start_iter,
            granularity=granularity,
            dense_below=dense_below,
            nonfinite=nonfinite,
            process_group=process_group,
            seed=seed,
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise MethodError(f"{name} = {value!r}. Allowed: {' or '.join(map(repr, allowed))}.")


def _world(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
