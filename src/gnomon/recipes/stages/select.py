"""The select stage: choose the training rows that the stages after it see."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import torch

from gnomon.common.corpora import windows
from gnomon.common.files import write_bytes
from gnomon.errors import DataError
from gnomon.recipes.schema import SelectStage
from gnomon.recipes.stages.context import StageContext

__all__ = ["SELECTED", "select"]

SELECTED = "rows.npy"


def select(stage: SelectStage, model: Any, context: StageContext) -> tuple[Any, dict[str, Any]]:
    """Apply the stage's methods in order, each to the rows that the one before it kept.

    A method is offered `model` and `rows`, int64 (rows, context), and returns the numbers of the rows to keep. They
    are written as numbers of the windows of the whole text.
    """
    total = len(windows(context.data.train_tokens, context.data.context))
    kept = context.kept()
    kept = torch.arange(total) if kept is None else kept
    notes = []
    for use in stage.methods:
        rows = windows(context.data.train_tokens, context.data.context)[kept]
        chosen, _ = context.call(use, model, {"rows": rows})
        chosen = torch.as_tensor(chosen, dtype=torch.int64).unique(sorted=True)
        if not len(chosen):
            raise DataError(f"{use.uses} kept none of {len(kept)} training rows. Let it keep more.")
        notes.append(f"{use.uses} kept {len(chosen):,} of {len(kept):,} rows of {context.data.context} tokens")
        kept = kept[chosen]
    buffer = BytesIO()
    np.save(buffer, kept.numpy())
    write_bytes(context.work / SELECTED, buffer.getvalue())
    return model, {"notes": notes, "rows": total, "kept": len(kept)}
