"""Reports: a run folder becomes one self-contained HTML page, the claims' results become the ledger page."""

from gnomon._lazy import lazy_attributes as _lazy_attributes

__getattr__, __dir__ = _lazy_attributes(
    __name__,
    {
        "write_comparison": "gnomon.reports.comparison:write_comparison",
        "write_ledger": "gnomon.reports.ledger:write_ledger",
        "write_report": "gnomon.reports.page:write_report",
    },
    submodules=("comparison", "ledger", "page", "pictures", "reading", "tables", "words"),
)
