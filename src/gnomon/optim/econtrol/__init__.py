"""EControl: data-parallel training with compressed gradients and a controlled error signal, as a DDP hook.

n workers send a compressed message each instead of their gradient. A compressor C is contractive,
``E ||C(x) - x||^2 <= (1 - delta) ||x||^2``: Top-K and Rand-K (delta = K/d), scaled sign, low rank, rounding. What C
leaves out must come back, or training stops early. Per worker i, with error e, estimate h, gradient g:

    none      C(g)
    EC        c = C(e + g);               e <- e + g - c
    EF21      c = C(g - h);               h <- h + c
    EControl  c = C(eta * e + g - h);     e <- e + g - h - c  (the old h);     h <- h + c

Everyone adds the mean message to a shared estimate (EF21, EControl: ``u <- u + mean c``; the others: ``u = mean c``)
and hands u to the optimizer as the gradient. At the first step h = g, which costs one uncompressed round
(``init="compressed"`` starts at h = 0). EC stalls where workers have different data, since the error of different
gradients is never the same; EF21 has no such error but keeps the noise of every worker; EControl controls how strongly
the error enters, and its noise falls with the number of workers. eta = 0 is EF21, C = identity is plain averaging.

Use

- ``state = EControlState(ratio=0.01); state.register(ddp_model)`` before the first backward pass, or
  ``ddp_model.register_comm_hook(state, econtrol_hook)``; any optimizer. `ErrorFeedback(kind=...)` has the other rules.
- In `transformers.Trainer`: ``callbacks=[EControlCallback(ratio=0.01)]`` under torchrun; in a recipe's train stage:
  ``uses: econtrol``. Memory goes into every checkpoint and comes back on resume.
- `simulate` runs the algorithms on any problem in one process.
- Step size: as without compression times about 0.3. eta: default the compressor's delta within [0.01, 0.3]; the
  proofs' delta/400 is far too small in practice.

Cost: three float32 copies of the gradients per process; selecting the largest entries dominates (a threshold estimated
on 1 % of the entries, same result). Traffic: every process receives (n - 1) messages, a ring all-reduce about
2 * 4 * d bytes, so Top-K with 8 bytes an entry saves traffic only with ``ratio`` below about 1/n, and time only where
the network is slow. ``state.statistics()`` counts bytes.

Memory is keyed by parameter: DDP rebuilds its buckets after the first step. Gradient clipping acts on u. With gradient
accumulation (``no_sync``) the hook sees the accumulated gradient once. float16 with a gradient scaler:
``state.set_scale(scaler.get_scale())`` before each step, or use bfloat16. Not for FSDP, ZeRO, sparse or complex
gradients. Gradients that are not finite stop the round in all processes before they reach the memory.
"""

from __future__ import annotations

from gnomon.optim.econtrol.callback import EControlCallback
from gnomon.optim.econtrol.compressors import (
    Compressor,
    Identity,
    LowRank,
    RandK,
    Rounding,
    ScaledSign,
    TopK,
)
from gnomon.optim.econtrol.hook import econtrol_hook
from gnomon.optim.econtrol.simulation import Simulation, simulate
from gnomon.optim.econtrol.state import EControlState, ErrorFeedback

__all__ = [
    "Compressor",
    "EControlCallback",
    "EControlState",
    "ErrorFeedback",
    "Identity",
    "LowRank",
    "RandK",
    "Rounding",
    "ScaledSign",
    "Simulation",
    "TopK",
    "econtrol_hook",
    "simulate",
]
