"""Calibration: streaming statistics of the inputs of linear layers, collected block by block.

`as_batches` brings any form of calibration data into one; `LayerInputs` holds what compression methods
need to know of one layer's inputs; `walk_blocks` runs the data through a model one block at a time and
hands the statistics of each block to a visitor that may change it.

Nothing is named per family: what the model passes to each of its blocks (masks, rotary embeddings, caches,
anything else) is recorded by running it once with the blocks left out, and replayed.
"""

from __future__ import annotations

from gnomon.common.calibration.batches import as_batches
from gnomon.common.calibration.statistics import LayerInputs
from gnomon.common.calibration.walk import walk_blocks

__all__ = ["LayerInputs", "as_batches", "walk_blocks"]
