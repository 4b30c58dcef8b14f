"""A Trainer callback that logs the gradient norm of every block and says when a run has collapsed."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gnomon.common.layers import decoder_blocks, unwrap
from gnomon.common.trainer_logs import add_to_logs, is_measured
from gnomon.errors import GnomonWarning, MethodError
from gnomon.nn.mix_ln.blocks import placement_of

__all__ = ["BlockGradientMonitor", "unigram_entropy"]

_LEAST_WARMUP = 0.02  # fraction of the steps; Post-LN blocks need it, the paper has 0.1
_SETTLED = 0.2  # fraction of the steps after which a loss at the unigram level is no longer a start
_MARGIN = 0.05  # nats


def unigram_entropy(counts: Tensor) -> float:
    """Return the entropy of token frequencies in nats: the loss of a model that has learned these and nothing else.

    Parameters
    ----------
    counts : Tensor (vocabulary,)

    Examples
    --------
    >>> round(unigram_entropy(torch.tensor([2, 1, 1, 0])), 4)
    1.0397
    """
    share = counts.double()[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum())


class BlockGradientMonitor(TrainerCallback):
    """Logs the L2 norm of the loss gradient over all parameters of each block, before clipping.

    Values are taken in the steps whose metrics the Trainer logs; other steps cost an idle hook a parameter. They go
    into the log entry of the step (``state.log_history``, ``trainer_state.json``), into the ``logs`` that callbacks
    behind this one receive, and into `history`. With ``fp16`` the norms are those of the scaled loss, under DDP
    those of a rank's own batches.

    Two things about Post-LN blocks are said as a `GnomonWarning`, once: a warm-up under 2 % of the steps, and, after
    a fifth of the steps, a training loss that is not under the entropy of the token frequencies, which means that
    the run has collapsed (perplexity about 1400 with the paper's tokenizer).

    Parameters
    ----------
    every : int, optional
        Measure every so many optimizer steps instead of in the steps the Trainer logs.
    prefix : str, default "gradient_norm"
        Values are named ``<prefix>/block_<l>`` with l from 1.
    collapse : bool, default True
        Whether to count tokens and look for a collapsed run.

    Attributes
    ----------
    history : list of dict
        One entry a measured step: ``{"step": ..., "gradient_norm/block_1": ..., ...}``.
    collapsed_at : int or None
        The step at which a collapsed run was noticed.

    Raises
    ------
    MethodError
        When `every` is under 1.

    Examples
    --------
    >>> BlockGradientMonitor(every=10).history
    []
    """

    def __init__(self, *, every: int | None = None, prefix: str = "gradient_norm", collapse: bool = True) -> None:
        if every is not None and every < 1:
            raise MethodError(
                f"every = {every}. It must be at least 1 optimizer step; None follows the Trainer's logs."
            )
        self.every = every
        self.prefix = prefix
        self.collapse = collapse
        self.history: list[dict[str, float]] = []
        self.collapsed_at: int | None = None
        self.active = False
        self._blocks = 0
        self._counts: Tensor | None = None
        self._squares: dict[tuple[int, int], Tensor] = {}
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put a hook on every parameter of every block, and look at the warm-up."""
        self._remove()
        model = kwargs["model"]
        blocks = decoder_blocks(model)
        self._blocks = len(blocks)
        for index, block in enumerate(blocks):
            for number, parameter in enumerate(p for p in block.parameters() if p.requires_grad):
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._observer(index, number)))
        if self.collapse:
            self._counts = None
            self._handles.append(unwrap(model).register_forward_pre_hook(self._count, with_kwargs=True))
        post = [placement_of(block) for block in blocks if placement_of(block) in ("post", "deepnorm")]
        warmup = args.get_warmup_steps(state.max_steps)
        if post and warmup < _LEAST_WARMUP * state.max_steps:
            warnings.warn(
                f"Warm-up takes {warmup} of {state.max_steps} steps, and {len(post)} blocks are Post-LN: under "
                f"{_LEAST_WARMUP:.0%} such runs tend to collapse. The paper warms up over 10 % "
                f"(warmup_steps={math.ceil(0.1 * state.max_steps)}).",
                GnomonWarning,
                stacklevel=2,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide whether this optimizer step is measured."""
        self._squares.clear()
        self.active = is_measured(args, state, self.every)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the values of this step."""
        if not self.active:
            return
        self.active = False
        totals = [0.0] * self._blocks
        for (index, _), square in sorted(self._squares.items()):
            whole = square.full_tensor() if hasattr(square, "full_tensor") else square
            totals[index] += float(whole)
        values = {f"{self.prefix}/block_{i + 1}": total**0.5 for i, total in enumerate(totals)}
        self.history.append({"step": state.global_step, **values})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to the Trainer's entry of the same step, and look at its loss."""
        if logs is None or "loss" not in logs:
            return
        self._look_for_collapse(float(logs["loss"]), state)
        if self.history and self.history[-1]["step"] == state.global_step:
            add_to_logs(state, logs, {k: v for k, v in self.history[-1].items() if k != "step"})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        self._remove()

    def _look_for_collapse(self, loss: float, state: TrainerState) -> None:
        if self._counts is None or self.collapsed_at is not None or state.global_step < _SETTLED * state.max_steps:
            return
        level = unigram_entropy(self._counts)
        if loss < level - _MARGIN:
            return
        self.collapsed_at = state.global_step
        warnings.warn(
            f"At step {state.global_step} of {state.max_steps} the training loss is {loss:.3f} (perplexity "
            f"{math.exp(min(loss, 50.0)):.0f}); the frequencies of the tokens alone give {level:.3f}. The run has "
            "collapsed, as Post-LN blocks do at too high a learning rate. Lower the learning rate, warm up longer, or "
            "make fewer blocks Post-LN.",
            GnomonWarning,
            stacklevel=2,
        )

    def _count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Count the tokens of a training batch: the labels, or the inputs where there are none."""
        ids = kwargs.get("labels", kwargs.get("input_ids"))
        if not module.training or not isinstance(ids, Tensor):
            return
        size = int(unwrap(module).get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        counts = torch.bincount(ids[ids >= 0].flatten(), minlength=size)
        self._counts = counts if self._counts is None else self._counts + counts

    def _observer(self, index: int, number: int) -> Any:
        def observe(parameter: Tensor) -> None:
            if self.active and parameter.grad is not None:
                self._squares[index, number] = parameter.grad.detach().float().square().sum()

        return observe

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.active = False
