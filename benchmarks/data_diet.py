"""Data Diet: norms of per-row gradients against a plain forward and backward pass, and EL2N against a forward pass.

    python benchmarks/data_diet.py [--rounds 9]

A Llama of 1.3M parameters (16 rows of 64 tokens), one with tied embeddings, and a small convolutional network. The
peers compute the same norms by a loop over rows and by torch.func.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from typing import Any

import torch
from timing import check, compare, finish
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gnomon.claims.data_diet import small_convnet
from gnomon.common.models import tiny
from gnomon.data.data_diet import GradientNorms, el2n
from gnomon.data.data_diet.rows import Batch, aligned_logits, as_batch, row_losses


def plain(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """One forward and one backward pass, as in training."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        logits, targets = aligned_logits(model, batch)
        row_losses(logits, targets).mean().backward()

    return run


def ghost(model: nn.Module, batch: Batch) -> Callable[[], Any]:
    norms = GradientNorms(model)
    norms(batch)  # the check against plain autograd is made once for a data set
    return lambda: norms(batch)


def slow(model: nn.Module, batch: Batch, how: Any) -> Callable[[], Any]:
    norms = GradientNorms(model, how=how)
    return lambda: norms(batch)


def per_row_gradients(model: nn.Module, batch: Batch) -> Callable[[], Any]:
    """The usual torch.func recipe: vmap(grad) over all rows, every gradient in memory."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: Any, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, weights, (), {"input_ids": ids[None], "use_cache": False}).logits
        return nn.functional.cross_entropy(logits[0, :-1].float(), ids[1:])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def run() -> torch.Tensor:
        found = gradients(parameters, batch.targets)
        return sum(g.flatten(1).square().sum(1) for g in found.values()) ** 0.5

    return run


def llama(rows: int = 16, tokens: int = 64, **sizes: Any) -> tuple[nn.Module, Batch]:
    model = tiny("llama", **{"vocab_size": 2048, "hidden_size": 128, "num_layers": 4, **sizes}).eval()
    ids = torch.randint(1, 2048, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return model, as_batch(model, ids)


def language_model(rounds: int) -> None:
    model, batch = llama()
    size = sum(p.numel() for p in model.parameters())
    candidates = {
        "grand": ghost(model, batch),
        "plain forward + backward": plain(model, batch),
        "loop over rows": slow(model, batch, "loop"),
        "torch.func vmap(grad)": per_row_gradients(model, batch),
    }
    exact = candidates["loop over rows"]()
    for name in ("grand", "torch.func vmap(grad)"):
        check(f"{name}: largest relative difference", float((candidates[name]() / exact - 1).abs().max()), at_most=1e-4)
    title = f"GraNd, Llama of {size / 1e6:.1f}M parameters, 16 rows of 64 tokens"
    compare(title, candidates, ours="grand", peer="plain forward + backward", at_most=1.3, rounds=rounds)
    model, batch = llama(tie=True)
    pair = {"grand": ghost(model, batch), "plain forward + backward": plain(model, batch)}
    compare("the same with tied embeddings", pair, ours="grand", peer="plain forward + backward", at_most=1.3,
            rounds=rounds)  # fmt: skip
    model, batch = llama(4, 256, max_positions=256)
    pair = {"grand": ghost(model, batch), "plain forward + backward": plain(model, batch)}
    compare("4 rows of 256 tokens", pair, ours="grand", peer="plain forward + backward", at_most=1.3, rounds=rounds)


def images(rounds: int) -> None:
    model = small_convnet(0).eval()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 3, 32, 32, generator=generator), torch.randint(10, (64,), generator=generator)
    batch = as_batch(model, (x, y))
    candidates = {
        "grand": ghost(model, batch),
        "plain forward + backward": plain(model, batch),
        "loop over rows": slow(model, batch, "loop"),
        "torch.func": slow(model, batch, "func"),
    }
    title = "GraNd, convolutional network of 0.07M parameters, 64 images"
    compare(title, candidates, ours="grand", peer="plain forward + backward", rounds=max(3, rounds // 2))


def forward_only(rounds: int) -> None:
    model, batch = llama()

    @torch.no_grad()
    def floor() -> Any:
        return aligned_logits(model, batch)

    @torch.no_grad()
    def ours() -> Any:
        return el2n(*aligned_logits(model, batch))

    candidates = {"el2n": ours, "forward pass": floor}
    compare("EL2N, Llama of 1.3M parameters", candidates, ours="el2n", peer="forward pass", at_most=1.3, rounds=rounds)
    logits, targets = (part.detach() for part in floor())

    def definition() -> torch.Tensor:
        error = logits.softmax(-1) - nn.functional.one_hot(targets, logits.shape[-1])
        return error.norm(dim=-1).mean(1)

    candidates = {"el2n": lambda: el2n(logits, targets), "softmax - onehot": definition}
    compare("the score alone", candidates, ours="el2n", peer="softmax - onehot", rounds=4 * rounds)
    for name, run in candidates.items():
        with LiveBytes() as count:
            run()
        share = count.peak / (logits.numel() * 4)
        check(f"memory beside the logits, of their size: {name}", share, at_most=0.3 if name == "el2n" else None)


class LiveBytes(TorchDispatchMode):
    """Follows the tensors that operations allocate: how many bytes live at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage()._cdata)  # was there before, and so are its views
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._enter(tensor.untyped_storage())
        return found

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, key, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def memory() -> None:
    """Bytes that live at most while 16 rows are scored, beside the B x P floats of per-row gradients."""
    model, batch = llama(16, 32, hidden_size=384, num_heads=6)
    size = sum(p.numel() for p in model.parameters())
    print(f"\nmemory, Llama of {size / 1e6:.1f}M parameters, 16 rows of 32 tokens")
    peaks = {}
    for name, run in (("grand", ghost(model, batch)), ("plain forward + backward", plain(model, batch))):
        with LiveBytes() as count:
            run()
        peaks[name] = count.peak
        print(f"  {name:<48} {count.peak / 2**20:10.1f} MiB")
        model.zero_grad(set_to_none=True)
    print(f"  {'16 gradients':<48} {16 * size * 4 / 2**20:10.1f} MiB")
    check("memory: grand over plain", peaks["grand"] / peaks["plain forward + backward"], at_most=1.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    language_model(options.rounds)
    images(options.rounds)
    forward_only(options.rounds)
    memory()
    finish()


if __name__ == "__main__":
    main()
