"""Accuracy of completions: the share of prompts that a model completes with exactly the wanted text.

The model continues each prompt greedily until its end token. Both texts are compared without the white space around
them and, by default, as they are written. The interval is Wilson's for a share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from gnomon.common.layers import unwrap
from gnomon.errors import DataError, MethodError
from gnomon.evals._inference import check_vocabulary, evaluating, input_device

__all__ = ["ExactMatch", "exact_match"]


@dataclass(frozen=True)
class ExactMatch:
    """How many completions were right.

    Attributes
    ----------
    value, low, high : float
        Share of right completions, 0 to 1, and its Wilson interval.
    completions : list of str
        What the model wrote.
    right : list of bool
    """

    value: float
    low: float
    high: float
    completions: list[str] = field(repr=False)
    right: list[bool] = field(repr=False)

    def summary(self) -> dict[str, float]:
        """Return the numbers as plain floats."""
        return {"accuracy": self.value, "accuracy_low": self.low, "accuracy_high": self.high}


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    ignore_case: bool = False,
    batch_size: int = 32,
    confidence: float = 0.95,
) -> ExactMatch:
    """Let a model complete prompts and compare with the wanted completions.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A causal language model; left as it was.
    tokenizer : transformers tokenizer
    prompts, completions : sequence of str
        Of the same length.
    max_new_tokens : int, optional
        Default: tokens of the longest wanted completion, and two more.
    ignore_case : bool, default False
    batch_size : int, default 32
        Changes speed and memory only.
    confidence : float, default 0.95
        Level of the interval.

    Returns
    -------
    ExactMatch

    Raises
    ------
    DataError
        When there are no prompts, their number is not that of the completions, a prompt has no tokens, or a token is
        not in the model's vocabulary.
    MethodError
        When an option is out of its range.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> from gnomon.common.text import byte_tokenizer
    >>> exact_match(tiny("llama", vocab_size=257), byte_tokenizer(), ["a: "], ["b"]).value
    0.0
    """
    for name, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if number is not None and number < 1:
            raise MethodError(f"{name} is {number}; it must be 1 or more.")
    if not 0 < confidence < 1:
        raise MethodError(f"confidence is {confidence}; it must lie between 0 and 1, such as 0.95.")
    if len(prompts) != len(completions) or not prompts:
        raise DataError(
            f"{len(prompts)} prompts and {len(completions)} completions. Give one completion to each prompt."
        )
    ids = [torch.tensor(tokenizer(prompt, verbose=False)["input_ids"], dtype=torch.long) for prompt in prompts]
    empty = next((i for i, row in enumerate(ids) if not len(row)), None)
    if empty is not None:
        raise DataError(f"prompt {empty} has no tokens. Give every prompt some text.")
    check_vocabulary(model, ids)
    if max_new_tokens is None:
        wanted = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in completions]
        max_new_tokens = max(map(len, wanted)) + 2
    written: list[str] = [""] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for i, text in zip(
                chosen, _complete(model, tokenizer, [ids[i] for i in chosen], max_new_tokens), strict=True
            ):
                written[i] = text
    right = [_plain(a, ignore_case) == _plain(b, ignore_case) for a, b in zip(written, completions, strict=True)]
    interval = binomtest(sum(right), len(right)).proportion_ci(confidence, method="wilson")
    return ExactMatch(sum(right) / len(right), float(interval.low), float(interval.high), written, right)


def _plain(text: str, ignore_case: bool) -> str:
    return text.strip().casefold() if ignore_case else text.strip()


def _complete(model: nn.Module, tokenizer: Any, rows: list[Tensor], max_new_tokens: int) -> list[str]:
    """Continue prompts greedily; padding stands on the left, so that all continue at the same place."""
    longest, device = max(map(len, rows)), input_device(model)
    end = tokenizer.eos_token_id
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or 0)
    ids = torch.full((len(rows), longest), filler)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    generate: Any = getattr(model, "generate", None) or unwrap(model).generate
    made = generate(  # PEFT's takes keywords only
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=end,
        pad_token_id=filler,
    )
    return [str(text) for text in tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)]
