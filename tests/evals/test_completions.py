"""Accuracy of completions, on models whose answers are known."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from gnomon.common.models import tiny
from gnomon.common.text import byte_tokenizer
from gnomon.errors import DataError, MethodError
from gnomon.evals.completions import exact_match

TOKENIZER = byte_tokenizer()
PROMPTS = ["a", "some more: ", "the longest of all prompts here: ", "x y"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama", vocab_size=257, hidden_size=32, num_layers=2).eval()


def greedy(model: nn.Module, prompt: str, tokens: int) -> str:
    """One token at a time, no cache, no batch."""
    ids = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == TOKENIZER.eos_token_id:
            break
        ids.append(best)
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_writes_what_a_plain_greedy_loop_writes(family: str, batch_size: int) -> None:
    model = tiny(family, vocab_size=257, hidden_size=32, num_layers=2).eval()
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    wanted = [expected[0], "no", expected[2], expected[3]]
    found = exact_match(model, TOKENIZER, PROMPTS, wanted, max_new_tokens=6, batch_size=batch_size)
    assert found.completions == expected
    assert found.right == [True, False, True, True]
    assert found.value == 0.75
    interval = binomtest(3, 4).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == (interval.low, interval.high)
    assert found.summary() == {"accuracy": 0.75, "accuracy_low": interval.low, "accuracy_high": interval.high}


def test_white_space_does_not_count_and_case_only_when_asked(model: nn.Module) -> None:
    class Same(nn.Module):
        """Writes "Ab " whatever it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.get_input_embeddings()

        def generate(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.cat([input_ids, torch.tensor([TOKENIZER("Ab ")["input_ids"]] * len(input_ids))], dim=1)

    assert exact_match(Same(), TOKENIZER, ["p", "q"], ["Ab", "ab"]).right == [True, False]
    assert exact_match(Same(), TOKENIZER, ["p", "q"], [" AB", "ab"], ignore_case=True).value == 1.0


def test_the_model_and_the_random_state_are_left_as_they_were(model: nn.Module) -> None:
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    exact_match(model, TOKENIZER, PROMPTS, ["b"] * 4)
    assert model.training
    model.eval()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], []), DataError, "1 prompts and 0 completions"),
        (([], []), DataError, "0 prompts"),
        (([""], ["b"]), DataError, "prompt 0 has no tokens"),
        ((["a"], ["b"], {"batch_size": 0}), MethodError, "batch_size is 0"),
        ((["a"], ["b"], {"max_new_tokens": 0}), MethodError, "max_new_tokens is 0"),
        ((["a"], ["b"], {"confidence": 1.0}), MethodError, "confidence is 1.0"),
    ],
)
def test_messages(model: nn.Module, arguments: tuple, error: type, message: str) -> None:
    prompts, completions, *options = arguments
    with pytest.raises(error, match=message):
        exact_match(model, TOKENIZER, prompts, completions, **(options[0] if options else {}))
