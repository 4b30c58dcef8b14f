"""Data Diet: placeholder."""

from __future__ import annotations

from gnomon.data.data_diet.callback import DataDietCallback, IndexCollator, with_row_ids
from gnomon.data.data_diet.forgetting import ForgettingTable, forgetting_scores
from gnomon.data.data_diet.ghost import GradientNorms, grand
from gnomon.data.data_diet.noise import noise_auc, noise_report, permute_labels
from gnomon.data.data_diet.scorer import ExampleScorer
from gnomon.data.data_diet.scores import el1, el2n, margin, sum_margin
from gnomon.data.data_diet.scoring import score_examples
from gnomon.data.data_diet.selection import prune_by_score, select
from gnomon.data.data_diet.table import ScoreTable
from gnomon.data.data_diet.training import Reading, SubsetTrial, TrainingPlan
from gnomon.data.data_diet.windows import select_windows

__all__ = [
    "DataDietCallback",
    "ExampleScorer",
    "ForgettingTable",
    "GradientNorms",
    "IndexCollator",
    "Reading",
    "ScoreTable",
    "SubsetTrial",
    "TrainingPlan",
    "el1",
    "el2n",
    "forgetting_scores",
    "grand",
    "margin",
    "noise_auc",
    "noise_report",
    "permute_labels",
    "prune_by_score",
    "score_examples",
    "select",
    "select_windows",
    "sum_margin",
    "with_row_ids",
]
