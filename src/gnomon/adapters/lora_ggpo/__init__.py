"""LoRA-GGPO (doc to be written)."""

from gnomon.adapters.lora_ggpo.callback import FlatLoRACallback, GGPOCallback, MGPOCallback
from gnomon.adapters.lora_ggpo.perturbation import Perturbation, perturbed
from gnomon.adapters.lora_ggpo.report import DoubleDescent, Sharpness, double_descent_report, sharpness
from gnomon.adapters.lora_ggpo.rules import (
    GGPO,
    MGPO,
    ggpo_deviations,
    gradient_norm,
    gradient_row_norms,
    merged_row_norms,
    mgpo_factors,
)

__all__ = [
    "GGPO",
    "MGPO",
    "DoubleDescent",
    "FlatLoRACallback",
    "GGPOCallback",
    "MGPOCallback",
    "Perturbation",
    "Sharpness",
    "double_descent_report",
    "ggpo_deviations",
    "gradient_norm",
    "gradient_row_norms",
    "merged_row_norms",
    "mgpo_factors",
    "perturbed",
    "sharpness",
]
