"""The folder of snapshots that ``keep="disk"`` fills."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gnomon.errors import DataError
from gnomon.merge.checkpoint_averaging.checkpoints import find_checkpoints, step_of
from gnomon.merge.checkpoint_averaging.offline import average_checkpoints

__all__ = ["SnapshotFolder"]


class SnapshotFolder:
    """``snapshot-STEP`` folders of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: int) -> Path:
        """Return the folder of the snapshot at `step`."""
        return self.root / f"snapshot-{step}"

    def keep_only(self, steps: Sequence[int]) -> None:
        """Remove all others, such as those taken after the checkpoint that training resumes from."""
        for path in find_checkpoints(self.root) if self.root.is_dir() else ():
            if step_of(path) not in steps:
                shutil.rmtree(path)

    def check_present(self, steps: Sequence[int]) -> None:
        """Refuse to resume when a snapshot was removed.

        Raises
        ------
        DataError
            Naming it.
        """
        for step in steps:
            if not self.path(step).is_dir():
                raise DataError(
                    "this snapshot of the run to be resumed is gone. Bring it back, or start a new average with "
                    "resume_from='nothing'.",
                    file=self.path(step),
                )

    def average(self, steps: Sequence[int], out: Path, space: Literal["weights", "delta"]) -> None:
        """Average the snapshots at `steps` into `out`."""
        average_checkpoints([self.path(step) for step in steps], out, space=space)
