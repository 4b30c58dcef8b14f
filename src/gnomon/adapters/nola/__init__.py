"""NOLA: docs to come."""

from gnomon.adapters._peft import register as _register
from gnomon.adapters.nola.apply import apply_nola
from gnomon.adapters.nola.bases import Bases, contract, mix
from gnomon.adapters.nola.codes import dequantize, quantize
from gnomon.adapters.nola.config import NOLAConfig
from gnomon.adapters.nola.tuner import NOLALinear, NOLAModel, accumulated, quantize_nola

_register("nola", NOLAConfig, NOLAModel)

__all__ = [
    "Bases",
    "NOLAConfig",
    "NOLALinear",
    "NOLAModel",
    "accumulated",
    "apply_nola",
    "contract",
    "dequantize",
    "mix",
    "quantize",
    "quantize_nola",
]
