"""The measures of a model on texts: batched, any layers, with what must be known to compare two numbers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gnomon.common.layers import backbone, unwrap
from gnomon.errors import DataError, MethodError, ModelError
from gnomon.evals._inference import check_vocabulary, evaluating, input_device, pad_right
from gnomon.evals.matrix_nuclear_norm.measures import isotropic_mnn, mnn_bounds, without_first
from gnomon.evals.matrix_nuclear_norm.spectra import combine_entropies, measure

__all__ = [
    "RepresentationReport", "RepresentationWarning", "compare_reports", "diff_erank", "representation_report",
]  # fmt: skip

LONGEST_DEFAULT = 2048
"""Truncation of the authors' evaluation of data sets."""

FEW_STATES = "fewer than 2 distinct token states"


class RepresentationWarning(UserWarning):
    """Numbers that cannot be compared as they stand, or texts that were set aside."""


@dataclass(frozen=True)
class RepresentationReport:
    """The measures of every text at every layer asked for.

    Attributes
    ----------
    features : int
        Width d of the hidden states.
    dtype : str
        Data type of the states as the model gave them, such as ``"bfloat16"``; the measures are float32 or
        better.
    layers : tuple of int
        Layers as they were asked for; -1 is the state after the final norm.
    table : DataFrame
        One row per text and layer: ``text, layer, length, mnn, mnn_iso, mnn_over_iso, mnn_low, mnn_high``
        (bounds at this length and width), ``nuclear_norm, matrix_entropy, effective_rank, rankme`` (unless
        left out), ``zero_rows, dropped`` (the reason, or empty). Measures of a dropped text are NaN.
    """

    features: int
    dtype: str
    layers: tuple[int, ...]
    table: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the table."""
        return self.table.copy()

    @property
    def dropped(self) -> dict[int, str]:
        """Texts that have no score: index -> reason."""
        rows = self.table[self.table["dropped"] != ""]
        return {int(k): str(reason) for k, reason in zip(rows["text"], rows["dropped"], strict=True)}

    def values(self, name: str = "mnn", *, layer: int | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        """Return one column of the table at one layer (default: the first asked for), texts in their order.

        Raises
        ------
        MethodError
            When there is no such column or layer.
        """
        layer = self.layers[0] if layer is None else layer
        if layer not in self.layers or name not in self.table:
            raise MethodError(
                f"There is no {name!r} at layer {layer}. Layers: {', '.join(map(str, self.layers))}; columns: "
                f"{', '.join(self.table.columns)}."
            )
        return self.table.loc[self.table["layer"] == layer, name].to_numpy()

    def mean(self, name: str = "mnn", *, layer: int | None = None) -> float:
        """Return the mean of a column over the texts that have a score: for ``"mnn"`` the paper's corpus score."""
        return float(np.nanmean(self.values(name, layer=layer)))

    def matrix_entropy(self, algorithm: Literal["a", "b", "c"] = "a", *, layer: int | None = None) -> float:
        """Return the corpus matrix entropy by one of the three algorithms of `combine_entropies`."""
        entropies = torch.tensor(self.values("matrix_entropy", layer=layer), dtype=torch.float64)
        return combine_entropies(entropies, self.features, algorithm)

    def summary(self) -> dict[str, float]:
        """Return the means as plain floats; with several layers the keys are ``"layer3/mnn"``."""
        measures = [c for c in self.table.columns if c not in ("text", "layer", "zero_rows", "dropped", "length")]
        numbers = {"hidden_size": float(self.features)}
        for layer in self.layers:
            prefix = f"layer{layer}/" if len(self.layers) > 1 else ""
            numbers |= {prefix + name: self.mean(name, layer=layer) for name in measures}
            scored = np.isfinite(self.values("mnn", layer=layer).astype(float))
            numbers[prefix + "texts"] = float(scored.sum())
            numbers[prefix + "dropped"] = float((~scored).sum())
            numbers[prefix + "zero_rows"] = float(self.values("zero_rows", layer=layer).sum())
            numbers[prefix + "mean_length"] = float(self.values("length", layer=layer)[scored].mean())
        return numbers


def representation_report(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    layers: int | list[int] | Literal["all"] = -1,
    *,
    max_length: int | None = None,
    min_length: int = 2,
    skip_first: int = 0,
    batch_size: int = 8,
    spectra: bool = True,
    add_special_tokens: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> RepresentationReport:
    """Measure how compressed a model's hidden states are on each text.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A decoder or an encoder, with or without a head, in any dtype. It is left as it was.
    tokenizer : PreTrainedTokenizerBase
        Its padding side does not matter, and it needs no pad token.
    texts : sequence of str
        Each text is one sequence and one score.
    layers : int, list of int or "all", default -1
        -1: the last hidden state, after the final norm (the paper's). 0: the embeddings; k: after block k.
    max_length : int, optional
        Tokens after which a text is cut; default 2048 (authors' evaluation) or what the model allows.
    min_length : int, default 2
        Texts with fewer tokens are dropped. With `min_length == max_length` all texts have one length, so
        that scores of different corpora compare.
    skip_first : int, default 0
        Leading tokens that are read by the model but not measured (an attention sink moves the mean).
    batch_size : int, default 8
        Texts per forward pass; changes speed and memory only.
    spectra : bool, default True
        False leaves out the measures that need eigenvalues, which cost far more than the matrix nuclear-norm.
    add_special_tokens : bool, default True
        Whether the tokenizer adds its own, such as a begin-of-text token.
    on_progress : callable, optional
        Called after each batch with the texts done and the texts in all.

    Returns
    -------
    RepresentationReport

    Raises
    ------
    DataError
        When there are no texts, one is no string, or every text was dropped.
    MethodError
        When an option is out of its range.
    ModelError
        When the model gives no `last_hidden_state`, is an encoder-decoder, allows fewer positions than
        `max_length`, or its states are not finite.

    Examples
    --------
    >>> from gnomon.common.models import workbench
    >>> bench = workbench()
    >>> report = representation_report(bench.model, bench.tokenizer, ["def area(r): return 3.14 * r * r"])
    >>> 0 < report.mean("mnn") <= 1
    True
    """
    base = _checked_base(model)
    longest = _checked_options(base, max_length, min_length, skip_first, batch_size)
    tokens = _tokenise(tokenizer, texts, longest, add_special_tokens)
    least = max(min_length, skip_first + 2)
    kept = [k for k in range(len(texts)) if len(tokens[k]) >= least]
    reasons = {k: f"fewer than {least} tokens" for k in range(len(texts)) if len(tokens[k]) < least}
    if not kept:
        raise DataError(f"Every text was dropped: text 0 has {reasons[0]}. Give longer texts or a lower min_length.")
    check_vocabulary(model, (tokens[k] for k in kept))
    kept.sort(key=lambda k: -len(tokens[k]))
    found: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
    with evaluating(model):
        for start in range(0, len(kept), batch_size):
            chosen = kept[start : start + batch_size]
            ids, mask = pad_right([tokens[k] for k in chosen], input_device(model))
            states = _hidden_states(base, ids, mask, layers)
            measured = without_first(mask, skip_first)
            for layer, hidden in states.items():
                _refuse_not_finite(hidden, measured, layer, chosen, base)
                for name, numbers in measure(hidden, measured.to(hidden.device), spectra=spectra).items():
                    column = found.setdefault(layer, {}).setdefault(name, np.full(len(texts), np.nan))
                    column[chosen] = numbers.numpy()
            if on_progress is not None:
                on_progress(min(start + batch_size, len(kept)), len(texts))
    lengths = np.array([max(0, len(t) - skip_first) for t in tokens])
    table = pd.concat([_table(layer, found[layer], lengths, hidden.shape[-1], reasons) for layer in found])
    report = RepresentationReport(
        int(hidden.shape[-1]), str(hidden.dtype).removeprefix("torch."), tuple(found), table.reset_index(drop=True)
    )
    _warn(report)
    return report


def _table(
    layer: int, found: Mapping[str, np.ndarray[Any, Any]], lengths: np.ndarray[Any, Any], features: int,
    reasons: Mapping[int, str],
) -> pd.DataFrame:  # fmt: skip
    scored = np.isfinite(found["mnn"])
    facts = np.full((3, len(lengths)), np.nan)
    for k in np.flatnonzero(scored):
        facts[:, k] = (isotropic_mnn(int(lengths[k]), features), *mnn_bounds(int(lengths[k]), features))
    columns: dict[str, Any] = {"text": np.arange(len(lengths)), "layer": layer, "length": lengths, "mnn": found["mnn"]}
    columns |= {"mnn_iso": facts[0], "mnn_over_iso": found["mnn"] / facts[0], "mnn_low": facts[1], "mnn_high": facts[2]}
    columns |= {name: v for name, v in found.items() if name not in ("mnn", "length", "zero_rows")}
    columns["zero_rows"] = np.nan_to_num(found["zero_rows"]).astype(np.int64)
    columns["dropped"] = [reasons.get(k, "" if ok else FEW_STATES) for k, ok in enumerate(scored)]
    return pd.DataFrame(columns)


def _warn(report: RepresentationReport) -> None:
    scored = report.table[report.table["dropped"] == ""]
    dropped = report.dropped
    if scored.empty:
        raise DataError(f"Every text was dropped: text 0 has {dropped[0]}. Give texts of 2 different tokens or more.")
    if dropped:
        first, reason = next(iter(dropped.items()))
        texts = report.table["text"].nunique()
        warnings.warn(
            f"{len(dropped)} of {texts} texts were dropped; text {first} has {reason}.",
            RepresentationWarning,
            stacklevel=3,
        )
    low, high = scored["length"].min(), scored["length"].max()
    if low != high:
        warnings.warn(
            f"Texts have {low} to {high} tokens at width {report.features}, and the score depends on length / width "
            "before anything learned. Compare mnn_over_iso, or set min_length = max_length.",
            RepresentationWarning,
            stacklevel=3,
        )


def compare_reports(reports: Mapping[str, RepresentationReport]) -> pd.DataFrame:
    """Return the summaries side by side, one row per model; warn where their scores do not compare.

    Parameters
    ----------
    reports : mapping of str to RepresentationReport
        Name -> report.

    Returns
    -------
    DataFrame

    Raises
    ------
    DataError
        When there is nothing to compare.
    """
    if not reports:
        raise DataError("There are no reports to compare.")
    widths = {name: r.features for name, r in reports.items()}
    lengths = {
        name: round(float(r.table.loc[r.table["dropped"] == "", "length"].mean())) for name, r in reports.items()
    }
    for what, found in (("widths", widths), ("mean lengths in tokens", lengths)):
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in found.items())
            warnings.warn(
                f"The models have different {what} ({listed}); their matrix nuclear-norms do not compare. "
                "Compare mnn_over_iso.",
                RepresentationWarning,
                stacklevel=2,
            )
    return pd.DataFrame.from_dict({name: r.summary() for name, r in reports.items()}, orient="index")


def diff_erank(untrained: RepresentationReport, trained: RepresentationReport, *, layer: int | None = None) -> float:
    """Return Diff-eRank: by how much training lowered the mean effective rank (same architecture, same texts).

    Raises
    ------
    MethodError
        When the two reports differ in width or in the texts' lengths.
    """
    same = np.array_equal(untrained.values("length", layer=layer), trained.values("length", layer=layer))
    if untrained.features != trained.features or not same:
        raise MethodError(
            f"Diff-eRank compares one architecture on the same texts; got widths {untrained.features} and "
            f"{trained.features}, and texts of {'the same' if same else 'different'} lengths."
        )
    return untrained.mean("effective_rank", layer=layer) - trained.mean("effective_rank", layer=layer)


def _checked_base(model: nn.Module) -> nn.Module:
    inner, base = unwrap(model), backbone(model)
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False) and getattr(base, "decoder", None) is not None:
        raise ModelError(
            f"{type(inner).__name__} is an encoder-decoder, so it has two last hidden states. Give its encoder: "
            "representation_report(model.get_encoder(), ...)."
        )
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ModelError("The model has a prompt-learning adapter, whose virtual tokens stand outside of its layers.")
    return base


def _checked_options(base: nn.Module, max_length: int | None, min_length: int, skip_first: int, batch_size: int) -> int:
    limit = getattr(getattr(base, "config", None), "max_position_embeddings", None)
    longest = min(limit or LONGEST_DEFAULT, LONGEST_DEFAULT) if max_length is None else max_length
    for name, value, least in (
        ("batch_size", batch_size, 1), ("min_length", min_length, 2), ("skip_first", skip_first, 0),
    ):  # fmt: skip
        if value < least:
            raise MethodError(f"{name} is {value}; it must be {least} or more.")
    if longest < min_length or longest < skip_first + 2:
        raise MethodError(
            f"max_length is {longest}; it must be at least min_length ({min_length}) and skip_first + 2 "
            f"({skip_first + 2})."
        )
    if limit is not None and longest > limit:
        raise ModelError(f"max_length is {longest}, but {type(base).__name__} has {limit} positions. Lower it.")
    return longest


def _tokenise(tokenizer: Any, texts: Sequence[str], longest: int, special: bool) -> list[Tensor]:
    if isinstance(texts, str):
        raise DataError("texts is one string; give a list of strings, each of which gets a score.")
    texts = list(texts)
    if not texts:
        raise DataError("There are no texts to measure. Give a list of strings.")
    for row, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(f"texts must be strings; got {type(text).__name__}.", file="texts", row=row)
    encoded = tokenizer(
        texts, truncation=True, max_length=longest, add_special_tokens=special, padding=False, verbose=False
    )
    return [torch.tensor(ids, dtype=torch.long) for ids in encoded["input_ids"]]


def _hidden_states(
    base: nn.Module, ids: Tensor, mask: Tensor, layers: int | list[int] | Literal["all"]
) -> dict[int, Tensor]:
    """Return layer -> states; -1 and the last index are the state after the final norm."""
    options: dict[str, Any] = {"output_hidden_states": True} if layers != -1 else {}
    if "use_cache" in inspect.signature(base.forward).parameters:
        options["use_cache"] = False
    output = base(input_ids=ids, attention_mask=mask, return_dict=True, **options)
    last: Tensor | None = getattr(output, "last_hidden_state", None)
    if last is None:
        raise ModelError(
            f"{type(base).__name__} gives no last_hidden_state (it returned a {type(output).__name__}). Use a "
            "transformers model, or call matrix_nuclear_norm on the states yourself."
        )
    if layers == -1:
        return {-1: last}
    every = [*output.hidden_states[:-1], last]
    asked = range(len(every)) if layers == "all" else [layers] if isinstance(layers, int) else layers
    for layer in asked:
        if not isinstance(layer, int) or not -len(every) <= layer < len(every):
            raise MethodError(
                f"layers names {layer!r}; this model has 0 (embeddings) to {len(every) - 1} (after the final norm), "
                "-1 is the last, and 'all' takes every one."
            )
    if not asked:
        raise MethodError("layers is empty; give at least one, such as -1.")
    return {layer: every[layer] for layer in asked}


def _refuse_not_finite(hidden: Tensor, mask: Tensor, layer: int, texts: list[int], base: nn.Module) -> None:
    bad = ((~torch.isfinite(hidden)).any(-1) & mask.to(hidden.device)).any(1).nonzero()
    if len(bad):
        raise ModelError(
            f"The hidden states of {type(base).__name__} at layer {layer} hold NaN or infinity on text "
            f"{texts[int(bad[0])]}. Run the model in float32 or bfloat16."
        )
