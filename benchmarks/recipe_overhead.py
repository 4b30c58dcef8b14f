"""The train stage of a recipe against a bare loop with the same model, data and optimizer, at the demo's size."""

import tempfile
from pathlib import Path

import torch
import transformers
from timing import compare, finish

from gnomon.common.corpora import windows
from gnomon.progress import quiet
from gnomon.recipes.prepare import build_model, prepare_data
from gnomon.recipes.schema import load_recipe
from gnomon.recipes.stages.context import StageContext
from gnomon.recipes.stages.train import build_optimizer, steps_of, train

STEPS = 20


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    recipe = load_recipe("quickstart", {"train.tokens": STEPS * 16 * 128})
    stage = recipe.steps[0][1]
    # The methods are the same on both sides; without them only the runner's own cost is left.
    stage = stage.model_copy(update={"methods": [u for u in stage.methods if u.uses == "fira"]})
    data = prepare_data(recipe)
    rows = windows(data.train_tokens, data.context)

    def model() -> torch.nn.Module:
        return build_model(recipe.model, vocab_size=len(data.tokenizer), context=data.context, seed=0)

    def by_recipe() -> None:
        with tempfile.TemporaryDirectory() as work:
            context = StageContext(data, 0, Path(work), "train", quiet(), lambda facts: None, model)
            train(stage, model(), context)

    def by_hand() -> None:
        net = model().train()
        optimizer = build_optimizer(stage, net)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        for step in range(steps_of(stage, data.context)):
            batch = rows[order[step * stage.batch_size : (step + 1) * stage.batch_size]]
            net(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), stage.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    compare(
        f"{STEPS} training steps of the quickstart model with Fira",
        {"recipe runner": by_recipe, "bare loop": by_hand},
        ours="recipe runner",
        peer="bare loop",
        at_most=1.10,
        rounds=5,
    )
    finish()


if __name__ == "__main__":
    main()
