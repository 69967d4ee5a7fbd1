"""Hands Ray Tune the trials of a search, one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from ray.tune.search import Searcher


class RecordedSearch(Searcher):
    """Runs in the driver, in Tune's loop. Knows nothing itself: what to try next follows from the records on disk.

    Args:
        run_dirs: Of trials that are written down and still have to run.
        more: Writes down the next trials and returns their run folders; none where the search is over.
        launcher: Of all trials.
    """

    def __init__(self, run_dirs: Iterable[str], more: Callable[[], list[str]], launcher: str) -> None:
        super().__init__()
        self._waiting = deque(run_dirs)
        self._more = more
        self._launcher = launcher

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps a copy of its searcher for `Tuner.restore`, which is never used here."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """The parameters of the next trial, or Tune's word for the end."""
        if not self._waiting:
            self._waiting.extend(self._more())
        if not self._waiting:
            return Searcher.FINISHED
        return {"run_dir": self._waiting.popleft(), "launcher": self._launcher}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to remember: the ledger says so as soon as Tune has told its callbacks, before it asks again."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing, as in `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as in `__getstate__`."""
