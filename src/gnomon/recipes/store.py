"""The run folder: content-addressed stages, an event log, ``run.json``. Everything in it is whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gnomon.common.files import content_hash, read_json, write_json, write_text
from gnomon.errors import ConfigError

__all__ = ["RunFolder", "changed_keys"]


def changed_keys(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the dotted keys in which two plain values differ, each with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in sorted({*old, *new})
            for line in changed_keys(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in changed_keys(a, b, f"{path}.{i}")
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


class RunFolder:
    """One run on disk.

    Parameters
    ----------
    path : Path
        Created if missing.
    identity : str
        Hash of everything that decides the result.
    recipe : dict
        The recipe as resolved, for the message when another run stands here.
    writes : bool, default True
        False on the other ranks of a distributed run: reads only, no lock.

    Raises
    ------
    ConfigError
        When the folder holds another run, something that is no run, or is in use.
    """

    def __init__(self, path: Path, identity: str, recipe: dict[str, Any], *, writes: bool = True) -> None:
        self.path = path
        self.identity = identity
        self.writes = writes
        self._lock = FileLock(str(path / ".lock"))
        if not writes:
            return
        self._check(recipe)
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{path} is in use by another run. Wait for it, or give another folder with --out."
            ) from error
        for leftover in [*path.glob(".*.part"), *path.glob(".*.old"), *path.glob("stages/*/.*.part")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _check(self, recipe: dict[str, Any]) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a file. Give a folder that is new, empty, or of the same run.")
        if not self.path.is_dir():
            return
        mark = self.path / "identity.json"
        if not mark.is_file():
            if any(p.name != ".lock" for p in self.path.iterdir()):
                raise ConfigError(
                    f"{self.path} is not empty and holds no run. Give a folder that is new, empty, or of the same run."
                )
            return
        old = read_json(mark)
        if old.get("identity") != self.identity:
            lines = changed_keys(old.get("recipe"), recipe)
            what = "; ".join(lines[:5]) if lines else "the data, the model or the version of gnomon changed"
            raise ConfigError(
                f"{self.path} holds a run of another recipe ({what}). Give another folder with --out, "
                "undo the change, or remove the folder."
            )

    def begin(self, recipe: dict[str, Any], recipe_yaml: str) -> None:
        """Write down what this folder is the run of."""
        if self.writes:
            write_json(self.path / "identity.json", {"identity": self.identity, "recipe": recipe})
            write_text(self.path / "recipe.yaml", recipe_yaml)

    def release(self) -> None:
        """Give the folder free for another run."""
        if self.writes:
            self._lock.release()

    def event(self, facts: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        if self.writes:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(dict(facts)) + "\n")

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Replace ``run.json``."""
        if self.writes:
            write_json(self.path / "run.json", run)

    def stage(self, key: str) -> Path:
        """Return the folder of a stage."""
        return self.path / "stages" / key

    def result(self, key: str) -> dict[str, Any] | None:
        """Return what a finished stage reported, or None when it is not finished."""
        file = self.stage(key) / "result.json"
        return read_json(file) if file.is_file() else None

    def has_model(self, key: str) -> bool:
        """Return whether the model a stage ended with is still there."""
        return (self.stage(key) / "model" / "config.json").is_file()

    def measured(self, key: str, question: Any) -> dict[str, Any] | None:
        """Return earlier measurements of a stage's model for the same question (metrics and their options)."""
        file = self.stage(key) / f"metrics-{content_hash(question)}.json"
        return read_json(file) if file.is_file() else None

    def keep_measured(self, key: str, question: Any, answer: Mapping[str, Any]) -> None:
        """Keep measurements."""
        write_json(self.stage(key) / f"metrics-{content_hash(question)}.json", answer)

    def drop_models_except(self, keys: set[str]) -> None:
        """Remove the intermediate models of all stages but `keys`, and every left-over checkpoint."""
        if not self.writes:
            return
        for stage in (self.path / "stages").glob("*"):
            shutil.rmtree(stage / "checkpoints", ignore_errors=True)
            if stage.name not in keys:
                shutil.rmtree(stage / "model", ignore_errors=True)
