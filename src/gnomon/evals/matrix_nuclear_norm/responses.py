"""Scoring a model by its own answers: generate, then measure the states of the response text alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.common.layers import unwrap
from gnomon.errors import DataError, MethodError, ModelError
from gnomon.evals._inference import check_vocabulary, evaluating, input_device
from gnomon.evals.matrix_nuclear_norm.report import RepresentationReport, representation_report

__all__ = ["ScoredResponses", "generate_responses", "score_responses"]


@dataclass(frozen=True)
class ScoredResponses:
    """What the model answered, and the measures of these answers."""

    responses: list[str]
    report: RepresentationReport

    def summary(self) -> dict[str, float]:
        """Return the report's means as plain floats."""
        return self.report.summary()


def score_responses(
    model: nn.Module,
    tokenizer: Any,
    instructions: Sequence[str],
    *,
    temperature: float = 0.7,
    max_new_tokens: int = 1000,
    chat_template: bool = True,
    seed: int = 0,
    batch_size: int = 8,
    **report_options: Any,
) -> ScoredResponses:
    """Let a model answer and measure its states on the answers, which it reads without the instructions.

    Parameters
    ----------
    model, tokenizer
        A causal language model and its tokenizer.
    instructions : sequence of str
        One prompt each.
    temperature : float, default 0.7 (authors' evaluation)
        0 is greedy decoding.
    max_new_tokens : int, default 1000 (authors' evaluation)
        Less where the model has too few positions.
    chat_template : bool, default True
        Use the tokenizer's chat template where it has one.
    seed : int, default 0
        Seeds the sampling; the global random state is left as it was.
    batch_size : int, default 8
        Prompts at a time. With a temperature above 0 it changes which responses are drawn.
    **report_options
        For `representation_report`. Responses are not cut unless the model has too few positions.

    Returns
    -------
    ScoredResponses

    Raises
    ------
    DataError, MethodError, ModelError
        As `representation_report`; also when a prompt leaves no room for an answer.
    """
    responses = generate_responses(
        model, tokenizer, instructions, temperature=temperature, max_new_tokens=max_new_tokens,
        chat_template=chat_template, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    limit = getattr(getattr(unwrap(model), "config", None), "max_position_embeddings", None)
    report_options.setdefault("max_length", limit)
    return ScoredResponses(
        responses, representation_report(model, tokenizer, responses, batch_size=batch_size, **report_options)
    )


def generate_responses(
    model: nn.Module,
    tokenizer: Any,
    instructions: Sequence[str],
    *,
    temperature: float = 0.7,
    max_new_tokens: int = 1000,
    chat_template: bool = True,
    seed: int = 0,
    batch_size: int = 8,
) -> list[str]:
    """Return the model's answers as text, without the prompts; parameters and errors as in `score_responses`."""
    _check(instructions, temperature, max_new_tokens, batch_size)
    generator: Any = model if hasattr(model, "generate") else unwrap(model)
    if not hasattr(generator, "generate"):
        raise ModelError(f"{type(unwrap(model)).__name__} cannot generate. Load it with AutoModelForCausalLM.")
    device = input_device(model)
    prompts = [_prompt(tokenizer, text, chat_template) for text in instructions]
    check_vocabulary(model, prompts)
    limit = getattr(generator.config, "max_position_embeddings", None)
    ends = generator.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    responses: list[str] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(model):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            ids, mask = _pad_left(prompts[start : start + batch_size], device)
            room = max_new_tokens if limit is None else min(max_new_tokens, limit - ids.shape[1])
            if room < 1:
                raise DataError(f"A prompt of {ids.shape[1]} tokens leaves no room in {limit} positions. Shorten it.")
            output = generator.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=room, pad_token_id=0, **sampling
            )
            responses += [_text(tokenizer, row.tolist(), ends) for row in output[:, ids.shape[1] :]]
    return responses


def _check(instructions: Sequence[str], temperature: float, max_new_tokens: int, batch_size: int) -> None:
    if isinstance(instructions, str) or not all(isinstance(text, str) for text in instructions):
        raise DataError("instructions must be a list of strings.")
    if not instructions:
        raise DataError("There are no instructions. Give a list of strings.")
    if not temperature >= 0:
        raise MethodError(f"temperature is {temperature}; it must be 0 (greedy) or more.")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise MethodError(f"{name} is {value}; it must be 1 or more.")


def _prompt(tokenizer: Any, text: str, chat_template: bool) -> Tensor:
    special = True
    if chat_template and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        special = False  # the template wrote them
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids:
        raise DataError("An instruction has no tokens. Remove empty instructions.")
    return torch.tensor(ids, dtype=torch.long)


def _pad_left(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_side="left")
    width = ids.shape[1]
    lengths = torch.tensor([len(p) for p in prompts])
    return ids.to(device), (torch.arange(width) >= width - lengths[:, None]).long().to(device)


def _text(tokenizer: Any, tokens: list[int], ends: set[int]) -> str:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return str(tokenizer.decode(tokens[:stop], skip_special_tokens=True))
