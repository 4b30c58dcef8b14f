"""gnomon: the published methods that shape a language model, each a plug-in to the tools people already use.

Nothing heavy is imported until a name is used.
"""

from gnomon._lazy import lazy_attributes as _lazy_attributes
from gnomon.catalog import PILLARS as _PILLARS

__version__ = "0.1.0"

__getattr__, __dir__ = _lazy_attributes(
    __name__,
    {
        "load_model": "gnomon.common.models:load_model",
        "save_model": "gnomon.common.models:save_model",
        "run": "gnomon.cli.job:run",
    },
    submodules=("catalog", "claims", "common", "recipes", "reports", *_PILLARS),
)
