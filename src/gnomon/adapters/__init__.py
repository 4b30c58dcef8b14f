"""PEFT adapters; every name is imported when it is first used.

Importing this package makes the library's adapters known to PEFT, without importing PEFT: at once where PEFT is
imported already, else at the end of its import. `peft.PeftModel.from_pretrained` then loads their folders.
"""

from gnomon._lazy import lazy_attributes as _lazy_attributes
from gnomon.adapters._on_import import register_adapters as _register_adapters
from gnomon.adapters._on_import import when_imported as _when_imported

__getattr__, __dir__ = _lazy_attributes(__name__)

_when_imported("peft", _register_adapters)
