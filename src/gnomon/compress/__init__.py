"""Pruning, quantisation, distillation, repair of what they break; every name is imported when it is first used."""

from gnomon._lazy import lazy_attributes as _lazy_attributes

__getattr__, __dir__ = _lazy_attributes(__name__)
