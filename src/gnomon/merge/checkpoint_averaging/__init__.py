"""Checkpoint averaging: one robust model from a fine-tuning run, without choosing among its snapshots.

The weights a run ends with depend on the learning rate, the schedule and the last batches; the mean of the snapshots
taken along the way hardly does. That matters most where there is no data to choose a snapshot by, as in zero-shot
cross-lingual transfer: the source language's development score is a poor guide to the target language.

## Method

- **Checkpoint averaging (CA)**: theta = (1/N) sum_i theta_i over ALL trained parameters, encoder and task head, of N
  equidistant snapshots of one run: one per epoch, the first included (10 epochs, 10 snapshots). Nothing is selected.
  It is not an exponential moving average: early snapshots weigh as much as late ones.
- **Run averaging (RA)**, over R independent runs: they end in different basins mainly because their task heads are
  drawn at random. So run one trains everything; each further run starts from the pre-trained encoder again, takes
  the first one's final head, freezes it, and fine-tunes the encoder. RA(LAST) is the mean of the last weights, RA(CA)
  of all R N snapshots. The soup variant shares only the head's first values.
- **Accumulation**: theta <- theta (k - 1)/k + theta_k/k adds run after run, of any hyperparameters, and stops when
  that stops helping.

The rules it is compared with: LAST, the last snapshot; S-DEV, the best on source-language development data; T-DEV,
the best on target-language data, an oracle.

## Use

```python
from gnomon.merge import CheckpointAveraging, average_checkpoints, run_average, xlt_report

Trainer(model, args, train_dataset=data, callbacks=[CheckpointAveraging()]).train()   # the model is the average
average_checkpoints("out", "out-average")                       # all checkpoint-STEP of a run, from disk to disk
average_checkpoints(["out/checkpoint-100", "out/checkpoint-200"], "out-average", weights=[0.25, 0.75])
run_average(model, train_fn, seeds=[42, 43, 44], share_head="frozen")
print(xlt_report(runs))                                         # LAST, S-DEV, CA, T-DEV over seeds and settings
```

In your own loop: `RunningAverage().update(model.state_dict())` at each snapshot, or `average_states(states)`.

In a recipe it joins a train stage (`{uses: checkpoint-averaging, with: {snapshots: 10}}`) as the callback, or a merge
stage, where the present model is averaged with the stage's `models`.

The authors fine-tune XLM-R for 10 epochs with batch 32, AdamW at 2e-5, weight decay 0.05, eps 1e-8, linear decay with
10 % warm-up, 5 seeds; few-shot runs on NLI take two snapshots an epoch (`per_epoch=2`). Expect robustness rather than
a gain at every setting: with a small rate that decays, the early snapshots are under-trained and the average can lose
a point against the last; with a large constant rate it saves the runs that end badly.

## Options that matter

- `every`, `per_epoch`, `snapshots`: equidistant snapshots by epochs or steps. `snapshots=10` spreads ten over a run
  that is counted in steps; `"auto"` does so when there are fewer than two whole epochs.
- `keep="online"` holds one running mean and needs no disk. `keep="disk"` also saves every snapshot as a model, for
  `score_run` and `last_k`.
- `load_at_end=True`: the average takes the model's place after training, after `load_best_model_at_end`. With False
  it is saved under `output_dir/average` and the model stays what it was.
- Resuming: mean and count are written into each checkpoint; a run that was killed and resumed gives the same average
  bit for bit.
- `space="delta"` for LoRA: mean_i B_i A_i is not mean B times mean A. Factors may be averaged within one run; for
  adapters of different runs average the products, factored again by truncated SVD (`rank`), or merged into `base`.

## Cost

Training is unchanged. Online: one float32 copy of the trained parameters in main memory, one pass over them at each
snapshot. Offline: one pass over N times the model's bytes; the memory is an accumulator and N read buffers of at most
262,144 elements each, whatever the model's size (`space="delta"`: the adapters' factors).

**DDP**: the first rank keeps the mean and gives it to the others at the end. **FSDP2**: each rank averages its own
shards, the first one writes; a run may resume on another number of ranks. FSDP1 and DeepSpeed ZeRO-3 take weights
apart and are refused: average consolidated checkpoints. **Gradient accumulation**: snapshots follow optimizer steps.
**Tied weights** are averaged once and stay tied. **BatchNorm**: run `torch.optim.swa_utils.update_bn` afterwards.

## Does not compose with

Going on training from the average with the old optimizer: its moments belong to other weights. Quantised weights
(codes have no mean; average first). Runs that start from different weights: their average does not work at all, and
warnings say so where it can be seen (`run_average` compares the starts, `average_checkpoints` the directions of
matrices). Few-shot runs that start from a zero-shot model: the authors start all of them from one LAST model;
starting from its average is another experiment.

## Where it differs from the authors' code

- Sums are kept in float32 (float64 for float64 weights) and cast at the end; the authors scale and add in the
  checkpoint's own dtype, which in bfloat16 loses most of what averaging gains.
- Integer tensors come from the last checkpoint; the authors take the one their directory listing names first.
- Checkpoints are sorted by step as a number, not as text, and what does not belong together is refused.
- The running form mean + (theta - mean)/k: snapshots that are equal stay exactly what they are.
"""

from gnomon.merge.checkpoint_averaging.callback import CheckpointAveraging
from gnomon.merge.checkpoint_averaging.checkpoints import find_checkpoints
from gnomon.merge.checkpoint_averaging.lora import mean_delta
from gnomon.merge.checkpoint_averaging.offline import average_checkpoints
from gnomon.merge.checkpoint_averaging.protocol import XltReport, XltRow, XltRun, score_run, xlt_report
from gnomon.merge.checkpoint_averaging.running import RunningAverage, average_states
from gnomon.merge.checkpoint_averaging.runs import AccumulatedRuns, AveragedRuns, accumulate_runs, run_average
from gnomon.merge.checkpoint_averaging.vaccine import gradient_vaccine, multilingual_loss, project_gradients

__all__ = [
    "AccumulatedRuns",
    "AveragedRuns",
    "CheckpointAveraging",
    "RunningAverage",
    "XltReport",
    "XltRow",
    "XltRun",
    "accumulate_runs",
    "average_checkpoints",
    "average_states",
    "find_checkpoints",
    "gradient_vaccine",
    "mean_delta",
    "multilingual_loss",
    "project_gradients",
    "run_average",
    "score_run",
    "xlt_report",
]
