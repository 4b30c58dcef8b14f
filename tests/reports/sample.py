"""Build realistic run folders and ledgers for the tests of the reports.

``python tests/reports/sample.py FOLDER`` writes a run with all pieces into FOLDER.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
BLOCKS = 6
PARAMETERS = 3_151_872
METHODS = {"layernorm-scaling": 0, "fira": 0, "dsnot": 1, "eora": 1}
COST = {"layernorm-scaling": 0.42, "fira": 0.31, "dsnot": 1.35, "eora": 0.03}  # perplexity lost without it

RECIPE: dict[str, Any] = {
    "name": "quickstart",
    "model": {"architecture": "llama", "size": "tiny"},
    "data": {"corpus": "python-docs"},
    "seed": 0,
    "stages": [
        {
            "train": {
                "tokens": 300_000,
                "batch_tokens": 4096,
                "learning_rate": 0.002,
                "methods": [
                    {"uses": "layernorm-scaling"},
                    {"uses": "fira", "with": {"rank": 32, "alpha": 1.0, "update_proj_gap": 200}},
                ],
            }
        },
        {
            "compress": {
                "methods": [
                    {"uses": "dsnot", "with": {"sparsity": 0.5}},
                    {"uses": "eora", "with": {"rank": 16}},
                ]
            }
        },
        {"evaluate": {"metrics": ["perplexity", "matrix-nuclear-norm"]}},
    ],
}


def _methods(stage: int, without: str) -> list[dict[str, Any]]:
    options = {"fira": {"rank": 32, "alpha": 1.0}, "dsnot": {"sparsity": 0.5}, "eora": {"rank": 16}}
    return [
        {"uses": slug, "with": options.get(slug, {})} for slug, at in METHODS.items() if at == stage and slug != without
    ]


def _layers(rng: random.Random, without: str) -> list[dict[str, Any]]:
    rows = []
    for block in range(BLOCKS):
        for i, projection in enumerate(PROJECTIONS):
            name = f"model.layers.{block}.{projection}"
            error = math.exp(rng.gauss(-3.2 + 0.25 * block + 0.1 * i, 0.25))
            sparsity = 0.5 + 0.09 * math.sin(block + i)
            if without != "dsnot":
                facts = {"sparsity": sparsity, "error": error}  # relative
                rows.append({"name": name, "method": "dsnot", "facts": facts})
            if without != "eora":
                # per token, in the square of the activations' unit
                facts = {"rank": 16, "error_before": 40 * error, "error_after": 40 * error * rng.uniform(0.5, 0.75)}
                rows.append({"name": name, "method": "eora", "facts": facts})
    return rows


def _train_details(rng: random.Random, worse: float, without: str) -> dict[str, Any]:
    steps = range(1, 601)
    curve = [[s, 2.55 + worse / 13 + 3.0 * math.exp(-s / 90) + rng.gauss(0, 0.035)] for s in steps]
    growth = 1.75 if without == "layernorm-scaling" else 1.18
    return {
        "loss_curve": curve,
        "eval_curve": [[s, curve[s - 1][1] + 0.04] for s in range(100, 601, 100)],
        "depth": [{"block": b, "variance": 0.9 * growth**b * rng.uniform(0.95, 1.05)} for b in range(BLOCKS)],
        "notes": ["The learning rate follows a cosine with 30 warm-up steps."],
    }


def arm(name: str = "all", without: str = "", seed: int = 0) -> dict[str, Any]:
    """Return one arm with its three stages."""
    rng = random.Random(f"{name}-{seed}")
    worse = COST.get(without, 0.0) + rng.gauss(0, 0.05)
    dense = 12.4 + rng.gauss(0, 0.06) + (worse if METHODS.get(without) == 0 else 0.0)
    sparse = 13.1 + worse + rng.gauss(0, 0.03)

    def stage(index: int, kind: str, label: str, perplexity: float, **more: Any) -> dict[str, Any]:
        half = 0.36 + rng.uniform(0, 0.05)
        return {
            "index": index,
            "kind": kind,
            "label": label,
            "key": f"{rng.getrandbits(48):012x}",
            "methods": _methods(index, without) if index < 2 else [],
            "skipped": False,
            "parameters": PARAMETERS,
            "nonzero_parameters": PARAMETERS if index == 0 else 1_702_144,
            "size_bytes": 12_607_488 if index == 0 else 7_215_104,
            "metrics": {
                "perplexity": {"value": perplexity, "low": perplexity - half, "high": perplexity + half},
                **(more.pop("extra", {})),
            },
            "details": {"loss_curve": [], "eval_curve": [], "layers": [], "depth": [], "notes": []},
            **more,
        }

    norms = {
        "mnn": 0.5412 + 0.01 * rng.random(), "hidden_size": 128, "mnn_over_iso": 0.9663 + rng.random() / 99,
        "nuclear_norm": 0.4527 + rng.random() / 99, "effective_rank": 32.9 + rng.random(), "texts": 32,
    }  # fmt: skip
    mnn = {f"matrix-nuclear-norm.{k}": {"value": v, "low": None, "high": None} for k, v in norms.items()}
    stages = [
        stage(
            0, "train", "train", dense, seconds=74.2 + rng.random(), peak_memory_bytes=412_000_000,
            details=_train_details(rng, worse, without),
        ),
        stage(
            1, "compress", "compress", sparse, seconds=9.31 + rng.random(), peak_memory_bytes=268_000_000,
            details={"layers": _layers(rng, without), "notes": []},
        ),
        stage(2, "evaluate", "evaluate", sparse, seconds=3.4, peak_memory_bytes=190_000_000, extra=mnn),
    ]  # fmt: skip
    removed = {"stage": METHODS[without], "method": without} if without else None
    return {"name": name, "without": removed, "seed": seed, "stages": stages}


def _ablation() -> list[dict[str, Any]]:
    intervals = {
        "layernorm-scaling": (-0.62, -0.21),
        "fira": (-0.49, -0.12),
        "dsnot": (-1.61, -1.08),
        "eora": (-0.14, 0.09),
    }
    rows = [
        {
            "method": slug, "stage": METHODS[slug], "metric": "perplexity", "with": 13.1, "without": 13.1 + COST[slug],
            "difference": -COST[slug], "low": low, "high": high, "spread": "seeds", "seeds": 3,
        }
        for slug, (low, high) in intervals.items()
    ]  # fmt: skip
    rows += [
        {
            "method": slug, "stage": stage, "metric": "matrix-nuclear-norm.hidden_size", "with": 128.0,
            "without": 128.0, "difference": 0.0, "low": 0.0, "high": 0.0, "spread": "seeds", "seeds": 3,
        }
        for slug, stage in METHODS.items()
    ]  # fmt: skip
    rows.append(
        {
            "method": "dsnot", "stage": 1, "metric": "matrix-nuclear-norm.mnn", "with": 0.545, "without": 0.538,
            "difference": 0.007, "low": None, "high": None, "spread": "windows", "seeds": 1,
        }
    )  # fmt: skip
    return rows


def run_json(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """Return the run.json of a finished run with every piece: arms, seeds, ablation, quarantine, warnings."""
    arms = [arm(seed=seed) for seed in seeds]
    arms += [arm(f"without {slug}", slug, seed) for slug in METHODS for seed in seeds]
    return {
        "format": 1,
        "name": "quickstart",
        "status": "finished",
        "recipe": RECIPE,
        "recipe_hash": "9f1c20d3a47be5568d0f3b1c",
        "created": "2025-03-14T09:26:53+00:00",
        "finished": "2025-03-14T09:49:07+00:00",
        "seconds": 1334.0,
        "environment": {
            "gnomon": "0.1.0", "python": "3.11.9", "torch": "2.13.0+cpu", "transformers": "5.24.0", "peft": "0.21.2",
            "platform": "Linux-6.1.0-x86_64-with-glibc2.36", "cpu": "AMD EPYC 7B13", "cores": 2,
            "memory_bytes": 16_789_053_440, "gpus": [],
        },
        "data": {
            "source": "python-docs",
            "sha256": "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945",
            "train_tokens": 608_059, "valid_tokens": 32_768, "rows": 4_127, "quarantined": 3,
            "quarantine_file": "quarantine.jsonl",
        },
        "model": {"family": "llama", "parameters": PARAMETERS, "source": "tiny"},
        "seeds": list(seeds),
        "arms": arms,
        "ablation": _ablation(),
        "warnings": ["eora: the calibration text has 64 windows; 128 or more give a steadier estimate."],
    }  # fmt: skip


QUARANTINE = [
    {"row": 18, "reason": "the text is empty", "text": ""},
    {"row": 2204, "reason": "not UTF-8: byte 0xff at 12", "text": "asyncio.\ufffd\ufffd"},
    {"row": 3991, "reason": "the text is a list, not a string", "text": ["a", "b"]},
]

HOSTILE = "</script><img src=x onerror=alert(1)>\"'$\\frac{1}{0}$ & ]]> --> {{ 7*7 }}\u202e\x00\x07"


def hostile_run_json() -> dict[str, Any]:
    """Return a run.json in which every text is an attack on the page."""

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {
                (f"{k} {HOSTILE}" if key in ("facts", "metrics", "with", "environment", "recipe") else k): poison(v, k)
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [poison(entry, key) for entry in value]
        if isinstance(value, str) and key not in ("format", "quarantine_file"):
            return f"{value} {HOSTILE}"
        return value

    raw: dict[str, Any] = poison(run_json((0,)))
    for entry in raw["arms"]:
        for stage in entry["stages"]:  # perplexity keeps its name, so that its picture is drawn
            stage["metrics"] = {k.split(" ")[0]: v for k, v in stage["metrics"].items()} | {HOSTILE: {"value": 1.0}}
            for layer in stage["details"].get("layers", []):
                layer["facts"] = {k.split(" ")[0]: v for k, v in layer["facts"].items()} | {HOSTILE: 1.0}
    return raw


def write_run(folder: Path, raw: dict[str, Any] | None = None) -> Path:
    """Write a run folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(raw if raw is not None else run_json()), encoding="utf-8")
    lines = "\n".join(json.dumps(row) for row in QUARANTINE)
    (folder / "quarantine.jsonl").write_text(lines + "\n", encoding="utf-8")
    return folder


def _entry(slug: str, claim: str, says: str, figure: str, verdict: str, **more: Any) -> dict[str, Any]:
    return {
        "slug": slug, "id": claim, "says": says, "paper_figure": figure, "paper": None, "unit": "perplexity",
        "scale": "small", "relations": [], "verdict": verdict, "seconds": 141.0,
        "run_at": "2025-03-14T10:02:11+00:00", **more,
    }  # fmt: skip


def ledger_json() -> dict[str, Any]:
    """Return a ledger with one entry for each verdict."""
    return {
        "format": 1,
        "environment": run_json((0,))["environment"],
        "entries": [
            _entry(
                "fira", "beats-galore", "lower loss than GaLore at the same optimizer memory",
                "LLaMA-60M on C4: perplexity 31.06 against 34.88", "reproduced",
                paper={"fira": 31.06, "galore": 34.88}, unit="validation loss, nats per token",
                arms={"fira": {"0": 2.812, "1": 2.834, "2": 2.829}, "galore": {"0": 3.011, "1": 2.987, "2": 3.026}},
                relations=[{
                    "text": "fira < galore by 0.12", "gap": 0.183, "low": 0.153, "high": 0.199, "margin": 0.12,
                    "verdict": "reproduced",
                }],
            ),
            _entry(
                "layernorm-scaling", "tames-variance", "the variance of deep layers stays bounded",
                "LLaMA-1B: variance of the last block about 3 against 60", "same direction",
                arms={"scaled": {"0": 1.9, "1": 2.0, "2": 2.1}, "pre": {"0": 2.6, "1": 2.7, "2": 2.5}},
                relations=[{
                    "text": "scaled < 0.5 * pre", "gap": 0.6, "low": 0.4, "high": 0.7, "margin": 1.3,
                    "verdict": "same direction",
                }],
            ),
            _entry(
                "matrix-nuclear-norm", "falls-with-size", "the norm falls as models grow",
                "Cerebras-GPT: 0.53 at 111M, 0.39 at 13B", "contradicted", unit="mnn",
                arms={"small": {"0": 0.558}, "large": {"0": 0.923}},
                relations=[{
                    "text": "large < small", "gap": -0.365, "low": -0.38, "high": -0.35, "margin": 0.0,
                    "verdict": "contradicted",
                }],
            ),
            _entry(
                "eora", "beats-svd", "lower error than plain SVD at one rank", "Llama-3 8B, 2:4: 11.07 against 12.41",
                "not visible at this scale", arms={"eora": {"0": 13.1, "1": 13.0}, "svd": {"0": 13.1, "1": 13.1}},
                relations=[{
                    "text": "eora < svd", "gap": 0.05, "low": -0.02, "high": 0.1, "margin": 0.0,
                    "verdict": "not visible at this scale",
                }],
            ),
        ],
    }  # fmt: skip


if __name__ == "__main__":
    from gnomon.reports import write_report

    print(write_report(write_run(Path(sys.argv[1]))))
