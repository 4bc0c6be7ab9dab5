"""Bases of what is handed to Ray Tune: nothing of it is saved, and anything can stop the experiment."""

from __future__ import annotations

from typing import Any, Self

from ray import tune


class Unsaved:
    """Goes first among the bases of what is handed to Tune, which saves its parts to restore an experiment, and copies
    them: ours are never restored, and talk to each other as they are."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the ledger, or the journal of a search, knows what is done."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: nothing was saved."""


class Stop(Unsaved, tune.Stopper):
    """Ends the experiment, once there is a reason."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def because(self, reason: str) -> None:
        """End the experiment; the first reason is kept."""
        self.reason = self.reason or reason

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.stop_all()

    def stop_all(self) -> bool:
        return self.reason is not None
