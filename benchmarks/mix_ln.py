"""Norm placements must cost nothing, and a report on a model's blocks less than what one would write by hand.

Training steps are timed side by side with the stock model at 12 layers of width 512. The report is held against the
straightforward way to the same numbers: all hidden states of all tokens, angles as the diagonal of a product of all
vectors with all, one whole pass for each removed block, and a backward pass for the gradients.
"""

from __future__ import annotations

import argparse
import math

import torch
from timing import check, compare, finish, measure

from gnomon.common.depth import block_removal_drop, gradient_norms, skipping_block, stream_statistics, token_loss
from gnomon.common.models import tiny
from gnomon.nn import apply_norm_placement, layer_report

LAYERS, WIDTH, VOCABULARY = 12, 512, 2048


def build() -> torch.nn.Module:
    return tiny("llama", hidden_size=WIDTH, num_layers=LAYERS, num_heads=8, vocab_size=VOCABULARY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of one step (default: 256)")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    ids = torch.randint(0, VOCABULARY, (2, options.tokens // 2), generator=torch.Generator().manual_seed(0))
    models = {"stock": build()} | {p: apply_norm_placement(build(), p) for p in ("mix", "post", "deepnorm", "sandwich")}

    def step(model: torch.nn.Module) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    steps = {name: (lambda model=model: step(model)) for name, model in models.items()}
    medians = measure(steps, rounds=options.rounds)
    print(f"\nTraining step, {LAYERS} layers of width {WIDTH}, {ids.numel()} tokens")
    for name, seconds in medians.items():
        print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
    for name in ("mix", "post", "deepnorm"):
        check(f"{name} over stock", medians[name] / medians["stock"], at_most=1.05)
    check("sandwich over stock (two norms more a block)", medians["sandwich"] / medians["stock"])

    model = models["mix"].eval()
    more = torch.randint(0, VOCABULARY, (4, options.tokens), generator=torch.Generator().manual_seed(1))
    passes = {
        "one pass": lambda: stream_statistics(model, more),
        "plain forward": lambda: forward(model, more),
        "all hidden states": lambda: naive_states(model, more),
    }
    title = f"Variance and angles of all pairs of blocks, {more.numel()} tokens"
    medians = measure(passes, rounds=max(3, options.rounds // 2))
    print(f"\n{title}")
    for name, seconds in medians.items():
        print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
    check("one pass over plain forward", medians["one pass"] / medians["plain forward"], at_most=1.1)
    check("all hidden states over one pass", medians["all hidden states"] / medians["one pass"], at_least=1.3)
    compare(
        "Loss without each block",
        {"from inside": lambda: block_removal_drop(model, ids), "whole passes": lambda: naive_drops(model, ids)},
        ours="from inside",
        peer="whole passes",
        at_least=1.4,
        rounds=options.rounds,
    )
    compare(
        "The whole report",
        {"layer_report": lambda: layer_report(model, ids), "by hand": lambda: by_hand(model, ids)},
        ours="layer_report",
        peer="by hand",
        at_least=1.25,
        rounds=options.rounds,
    )
    finish()


@torch.no_grad()
def forward(model: torch.nn.Module, ids: torch.Tensor) -> object:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def naive_states(model: torch.nn.Module, ids: torch.Tensor) -> tuple[list[float], list[list[float]]]:
    """Variance and angles from the hidden states of all tokens."""
    last: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    states = [*model(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1], last[0]]
    handle.remove()
    variance = [float(state.var(correction=0)) for state in states[1:]]
    angles = []
    for start in range(LAYERS):
        row = []
        for end in range(start + 1, LAYERS + 1):
            a, b = (torch.nn.functional.normalize(states[i].flatten(0, 1), dim=-1) for i in (start, end))
            cosine = (a @ b.T).diagonal().view(ids.shape)[:, -1]
            row.append(float((cosine.clamp(-1, 1).arccos() / math.pi).mean()))
        angles.append(row)
    return variance, angles


def naive_drops(model: torch.nn.Module, ids: torch.Tensor) -> list[float]:
    """The loss without each block, one whole pass each."""
    whole = token_loss(model, ids)
    drops = []
    for index in range(LAYERS):
        with skipping_block(model, index):
            drops.append(token_loss(model, ids) - whole)
    return drops


def by_hand(model: torch.nn.Module, ids: torch.Tensor) -> object:
    return naive_states(model, ids), gradient_norms(model, ids), naive_drops(model, ids)


if __name__ == "__main__":
    main()
