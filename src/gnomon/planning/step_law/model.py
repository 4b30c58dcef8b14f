"""From a model to its hyper-parameters, and from these to the Trainer's arguments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnomon.errors import MethodError
from gnomon.planning.step_law.law import Hyperparameters, step_law, whole

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["from_model", "training_arguments"]


def from_model(model_or_config: Any, n_tokens: float, seq_len: int = 2048, **options: Any) -> Hyperparameters:
    """Predict peak learning rate, batch and steps for a model, counting its parameters as the law does.

    Parameters
    ----------
    model_or_config : PreTrainedModel, PeftModel, PreTrainedConfig, str or Path
        A decoder, its configuration, or a folder or hub id with one. Embeddings, head and norms are not counted; of a
        mixture of experts all experts are.
    n_tokens : float
        Training tokens.
    seq_len : int, default 2048
        Tokens in one sequence.
    **options
        Of `step_law`: ``micro_batch``, ``devices``, ``batch_tokens``, ``variant``, ...

    Returns
    -------
    Hyperparameters

    Raises
    ------
    ModelError
        When there is no decoder to count.
    MethodError
        As `step_law`.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> small = LlamaConfig(hidden_size=960, intermediate_size=9368, num_hidden_layers=7, num_attention_heads=15)
    >>> from_model(small, n_tokens=20e9).n_params
    214663680.0
    """
    from gnomon.planning.step_law.counting import count_parameters

    if isinstance(model_or_config, (str, Path)):
        from gnomon.common.models import load_config  # transformers is slow to import

        model_or_config = load_config(model_or_config)
    counted = count_parameters(model_or_config)
    return step_law(counted.non_embedding, n_tokens, seq_len, moe=counted.moe, **options)


def training_arguments(
    plan: Hyperparameters,
    output_dir: str | Path,
    *,
    micro_batch: int | None = None,
    devices: int | None = None,
    **more: Any,
) -> TrainingArguments:
    """Return `transformers.TrainingArguments` that train as the plan says, in the setting of the paper.

    That is AdamW (0.9, 0.95, 1e-8) with weight decay 0.1, gradients clipped at 1.0, 2000 warm-up steps (at most a
    tenth of all) and cosine decay to the fixed learning rate 1e-5. With a final rate tied to the peak, such as a
    tenth of it, the best peak is lower than the law says.

    Parameters
    ----------
    plan : Hyperparameters
        With a batch of whole sequences that `micro_batch` and `devices` divide: call `step_law` with these two.
    output_dir : str or Path
        The Trainer's output folder.
    micro_batch : int, optional
        Sequences in one pass of one device; default the plan's, else 1.
    devices : int, optional
        Number of processes the Trainer will run on; default the plan's, else 1.
    **more
        Further arguments, which win over those set here.

    Returns
    -------
    TrainingArguments

    Raises
    ------
    MethodError
        When the plan's batch is no multiple of ``seq_len * micro_batch * devices``.

    Examples
    --------
    >>> arguments = training_arguments(step_law(1e9, 1e11, micro_batch=8, devices=16), "out", use_cpu=True)
    >>> arguments.gradient_accumulation_steps, arguments.max_steps
    (4, 95368)
    """
    from transformers import TrainingArguments

    micro = whole("micro_batch", (plan.micro_batch or 1) if micro_batch is None else micro_batch)
    world = whole("devices", (plan.devices or 1) if devices is None else devices)
    unit = plan.seq_len * micro * world
    if plan.batch_tokens % unit:
        raise MethodError(
            f"the plan's batch of {plan.batch_tokens} tokens is no multiple of {unit} ({plan.seq_len} tokens x "
            f"{micro} sequences x {world} devices). Plan with step_law(..., micro_batch={micro}, devices={world})."
        )
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "learning_rate": plan.lr,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": plan.batch_tokens // unit,
        "max_steps": plan.steps,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": min(1e-5, plan.lr)},
        "warmup_steps": min(2000, math.floor(0.1 * plan.steps)),
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
    }
    return TrainingArguments(**{**settings, **more})
