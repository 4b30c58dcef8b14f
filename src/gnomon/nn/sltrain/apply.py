"""Puts sparse plus low-rank layers in the place of a model's linear layers, and writes that into the model's record."""

from __future__ import annotations

import logging
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gnomon.common import surgery
from gnomon.common.layers import family, unwrap, weight_of
from gnomon.errors import GnomonWarning, MethodError, ModelError, NoEffectWarning, nearest
from gnomon.nn.sltrain.functional import support_size
from gnomon.nn.sltrain.layer import SparseLowRankLinear, check_sizes

__all__ = [
    "SLUG",
    "TARGET_MODULES",
    "apply_sltrain",
    "check_gradients",
    "check_options",
    "converted_layers",
    "unfold_sltrain",
]

SLUG = "sltrain"
TARGET_MODULES = ("attn", "mlp", "attention")
Init = Literal["random", "svd"]
log = logging.getLogger("gnomon")


def apply_sltrain(
    model: PreTrainedModel,
    rank: int,
    sparsity: float = 0.03,
    alpha: float | None = None,
    target_modules: list[str] | None = None,
    *,
    init: Init = "random",
    trainable_scale: bool = False,
    from_scratch: bool | None = None,
    seed: int = 0,
) -> Any:
    """Replace the linear layers of attention and MLP by layers with W = (alpha / rank) * B A + S.

    Embeddings, head and norms stay as they are and are trained in full. A head that is tied to the embeddings, or a
    weight that several layers share, is never replaced.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Untrained, or any with ``init="svd"``; changed in place.
    rank : int
        r; the paper: 128 at 60M, 256 at 130M and 350M, 512 at 1B, 1024 at 7B.
    sparsity : float, default 0.03
        Share of the entries of W in the support of S; the paper: 0.03, and 0.05 at 7B.
    alpha : float, optional
        Default: the paper's value at its ranks (32 at 128, 16 at 256, 8 from 512 on), the rank itself up to 32.
    target_modules : list of str, optional
        Layers whose full name contains one of these; default ``["attn", "mlp", "attention"]``. A plain substring, so
        ``"attn"`` matches ``"lm_attn_head"`` too: `converted_layers` gives the names.
    init : {"random", "svd"}, default "random"
        ``"random"``: as in the paper, the weights there are dropped. ``"svd"``: approximate them, see
        `SparseLowRankLinear.from_linear`.
    trainable_scale : bool, default False
        Learn the factor of B A, through a tanh, instead of alpha / rank.
    from_scratch : bool, optional
        True: the weights are untrained, do not look. False: they are trained. Default: they count as trained when
        the model has a ``name_or_path`` (``from_pretrained`` sets it) or a norm's gain is no longer constant.
    seed : int, default 0
        Of supports and initial values. Every layer's depend on the seed and its name alone.

    Returns
    -------
    the model

    Raises
    ------
    MethodError
        An option that is unknown or out of range.
    ModelError
        Applied twice; trained weights that would be dropped; no layer of such a name; a quantised layer or another
        subclass of `nn.Linear` among them; sharded parameters.

    Warns
    -----
    GnomonWarning
        Layers that stay dense (too small for one sparse entry, a shared weight, experts in one tensor), or that have
        more parameters than before.
    NoEffectWarning
        An entry of `target_modules` without a layer.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = apply_sltrain(tiny("llama"), rank=8)
    >>> type(model.model.layers[0].mlp.up_proj).__name__
    'SparseLowRankLinear'
    """
    inner = cast(PreTrainedModel, unwrap(model))
    found, kept = _prepared(inner, rank, sparsity, alpha, target_modules, init, trainable_scale)
    if not surgery.is_replaying():
        if init == "random":
            _check_untrained(inner, from_scratch)
        _warn(inner, found, kept, rank, sparsity, target_modules)
    made: dict[int, SparseLowRankLinear] = {}
    for name, layer in found.items():
        if id(layer) not in made:
            made[id(layer)] = SparseLowRankLinear.from_linear(
                layer,
                rank,
                sparsity,
                alpha,
                init=init,
                trainable_scale=trainable_scale,
                generator=torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63),
            )
        inner.set_submodule(name, made[id(layer)])
        log.debug("%s: %s is sparse plus low-rank now", SLUG, name)
    log.info("%s: replaced %d linear layers of this %r model", SLUG, len(made), family(inner))
    scale = {"trainable_scale": True} if trainable_scale else {"alpha": next(iter(made.values())).alpha}
    targets = list(target_modules or TARGET_MODULES)
    surgery.record(inner, SLUG, {"rank": rank, "sparsity": sparsity, **scale, "target_modules": targets, "seed": seed})
    return model


def unfold_sltrain(
    model: PreTrainedModel,
    rank: int,
    sparsity: float = 0.03,
    alpha: float | None = None,
    target_modules: list[str] | None = None,
    *,
    trainable_scale: bool = False,
    seed: int = 0,
) -> Any:
    """Approximate a dense, trained model by sparse plus low-rank layers, for continued training.

    The same as ``apply_sltrain(model, rank, ..., init="svd")``. Not exact: what is lost of a weight is its part
    beyond the rank outside the support. `fold_sltrain` goes the other way, exactly.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Changed in place.
    rank, sparsity, alpha, target_modules, trainable_scale, seed
        As in `apply_sltrain`.

    Returns
    -------
    the model

    Raises
    ------
    MethodError, ModelError
        As `apply_sltrain`.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = unfold_sltrain(tiny("llama"), rank=8)
    """
    return apply_sltrain(
        model, rank, sparsity, alpha, target_modules, init="svd", trainable_scale=trainable_scale, seed=seed
    )


def check_options(
    model: PreTrainedModel,
    rank: int,
    sparsity: float = 0.03,
    alpha: float | None = None,
    target_modules: list[str] | None = None,
    *,
    init: Init = "random",
    trainable_scale: bool = False,
    from_scratch: bool | None = None,
    seed: int = 0,
) -> None:
    """Check the options of `apply_sltrain` against a model, which may be without storage; nothing is changed.

    Raises
    ------
    MethodError, ModelError
        As `apply_sltrain`.
    """
    inner = cast(PreTrainedModel, unwrap(model))
    _prepared(inner, rank, sparsity, alpha, target_modules, init, trainable_scale)


def converted_layers(model: nn.Module) -> dict[str, SparseLowRankLinear]:
    """Return the sparse plus low-rank layers of a model by name.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> list(converted_layers(apply_sltrain(tiny("llama"), rank=8)))[0]
    'model.layers.0.self_attn.q_proj'
    """
    return {name: module for name, module in unwrap(model).named_modules() if isinstance(module, SparseLowRankLinear)}


def check_gradients(model: nn.Module) -> None:
    """Make sure, after a backward pass, that every trainable part of every converted layer has a gradient.

    A is allowed a gradient of zeros as long as B is zero, as it is before the first step.

    Raises
    ------
    ModelError
        When nothing was converted, or a part got no gradient, or zeros; the message names the first ones.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model, ids = apply_sltrain(tiny("llama"), rank=8), torch.arange(8)[None]
    >>> _ = model(input_ids=ids, labels=ids).loss.backward()
    >>> check_gradients(model)
    """
    layers = converted_layers(model)
    if not layers:
        raise ModelError(
            f"This {family(model)!r} model has no sparse plus low-rank layers, so there is nothing to check. Apply "
            "apply_sltrain first."
        )
    missing = []
    for name, layer in layers.items():
        for part in ("A", "B", "values"):
            parameter: nn.Parameter = getattr(layer, part)
            if not parameter.requires_grad or (part == "A" and not bool(layer.B.detach().any())):
                silent = parameter.requires_grad and parameter.grad is None
            else:
                silent = parameter.grad is None or not bool(parameter.grad.any())
            if silent:
                missing.append(f"{name}.{part}")
    if missing:
        raise ModelError(
            f"{len(missing)} parts of this {family(model)!r} model got no gradient in the backward pass: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. They would stay as initialised. Call this "
            "between backward() and zero_grad(), and look for a detach, a frozen block or a layer that is not used."
        )


def _prepared(
    model: PreTrainedModel,
    rank: int,
    sparsity: float,
    alpha: float | None,
    target_modules: list[str] | None,
    init: str,
    trainable_scale: bool,
) -> tuple[dict[str, nn.Linear | Conv1D], dict[str, str]]:
    """Check everything; return the layers to replace by name, and the ones that stay dense with the reason."""
    check_sizes(rank, sparsity, alpha)
    if init not in get_args(Init):
        raise MethodError(f"init = {init!r} is unknown. {nearest(str(init), get_args(Init), noun='init')}")
    if trainable_scale and alpha is not None:
        raise MethodError(
            f"trainable_scale = True learns the factor that alpha = {alpha} would fix. Leave one of the two out."
        )
    if target_modules is not None and (not isinstance(target_modules, (list, tuple)) or not target_modules):
        raise MethodError(
            f"target_modules = {target_modules!r}; it must be a list of parts of module names, such as "
            f"{list(TARGET_MODULES)} (the default)."
        )
    kind = family(model)
    if any(isinstance(module, SparseLowRankLinear) for module in model.modules()):
        raise ModelError(
            f"{SLUG} was applied to this {kind!r} model already. Fold it first with fold_sltrain, or build it anew."
        )
    if not surgery.is_replaying() and surgery.is_recorded(model, SLUG):
        raise ModelError(
            f"The configuration of this {kind!r} model records {SLUG}, but its layers are dense: it was loaded without "
            "them. Load it with gnomon.load_model instead of applying the method again."
        )
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ModelError(f"The parameters of this {kind!r} model are sharded. Apply {SLUG} before fully_shard.")
    return _targets(model, sparsity, target_modules or list(TARGET_MODULES))


def _targets(
    model: PreTrainedModel, sparsity: float, wanted: list[str]
) -> tuple[dict[str, nn.Linear | Conv1D], dict[str, str]]:
    kind, head = family(model), model.get_output_embeddings()
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found: dict[str, nn.Linear | Conv1D] = {}
    kept: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (nn.Linear, Conv1D)) or not any(part in name for part in wanted):
            continue
        if module is head:
            kept[name] = "it is the head of the model"
            continue
        if type(module) not in (nn.Linear, Conv1D):
            raise ModelError(
                f"{name!r} of this {kind!r} model is a {type(module).__name__}, a subclass of {_base(module)}: "
                f"quantised or otherwise special layers cannot be replaced. Build the model with plain nn.Linear "
                "layers, or leave it out by target_modules."
            )
        weight: Tensor = weight_of(module)
        if owners[id(module.weight)] > 1:
            kept[name] = "its weight is shared with another module"
        elif support_size(weight.shape[0], weight.shape[1], sparsity) == 0:
            kept[name] = f"{weight.shape[0]} x {weight.shape[1]} entries are too few for sparsity = {sparsity}"
        else:
            found[name] = module
    if not found:
        linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
        reason = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:3])
        raise ModelError(
            f"{SLUG} found no linear layer to replace in this {kind!r} model ({type(model).__name__}): none of "
            f"target_modules = {wanted} is part of the name of a layer"
            f"{' that can be replaced (' + reason + ')' if kept else ''}. Its linear layers: "
            f"{', '.join(linear[:4]) or 'none'}{', ...' if len(linear) > 4 else ''}."
        )
    return found, kept


def _base(module: nn.Module) -> str:
    return "Conv1D" if isinstance(module, Conv1D) else "nn.Linear"


def _check_untrained(model: PreTrainedModel, from_scratch: bool | None) -> None:
    """Refuse trained weights, which would be dropped."""
    if from_scratch:
        return
    reason = "from_scratch = False says so" if from_scratch is False else None
    origin = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    if reason is None and origin:
        reason = f"it was loaded from {origin!r}"
    if reason is None:
        for name, module in model.named_modules():
            gain = getattr(module, "weight", None) if "norm" in type(module).__name__.lower() else None
            if not isinstance(gain, Tensor) or gain.is_meta or gain.numel() == 0:
                continue
            if not bool((gain == gain.view(-1)[0]).all()):
                reason = f"the gains of {name!r} are no longer constant"
                break
    if reason is not None:
        raise ModelError(
            f"This {family(model)!r} model is trained ({reason}), and {SLUG} would drop the weights of its linear "
            "layers. Use init='svd' (or unfold_sltrain) to approximate them, or say from_scratch=True if the weights "
            "are random after all."
        )


def _warn(
    model: PreTrainedModel,
    found: Mapping[str, nn.Linear | Conv1D],
    kept: Mapping[str, str],
    rank: int,
    sparsity: float,
    target_modules: list[str] | None,
) -> None:
    kind, wanted = family(model), target_modules or list(TARGET_MODULES)
    larger = []
    for name, layer in found.items():
        m, n = weight_of(layer).shape
        if rank * (m + n) + support_size(m, n, sparsity) >= m * n:
            larger.append(f"{name} ({m} x {n})")
    if larger:
        warnings.warn(
            f"With rank = {rank} and sparsity = {sparsity}, {len(larger)} layers have no fewer parameters than before, "
            f"r (m + n) + k >= m n: {', '.join(larger[:3])}{', ...' if len(larger) > 3 else ''}. Lower the rank, or "
            "leave these layers out by target_modules.",
            GnomonWarning,
            stacklevel=3,
        )
    kept = dict(kept) | {
        name: "its experts stand in one tensor, and only nn.Linear and Conv1D are replaced"
        for name, module in model.named_modules()
        if any(part in name for part in wanted) and any(p.dim() == 3 for p in module.parameters(recurse=False))
    }
    if kept:
        some = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:3])
        warnings.warn(
            f"{len(kept)} modules of this {kind!r} model stay dense. {some}{'; ...' if len(kept) > 3 else ''}.",
            GnomonWarning,
            stacklevel=3,
        )
    idle = [part for part in target_modules or () if not any(part in name for name in [*found, *kept])]
    if idle:
        warnings.warn(
            f"target_modules: {', '.join(map(repr, idle))} is part of no linear layer's name in this {kind!r} model.",
            NoEffectWarning,
            stacklevel=3,
        )
