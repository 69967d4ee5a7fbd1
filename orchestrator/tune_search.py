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
        together: Whether the next trials follow from all that were handed out before, so that Tune has to wait for
            these to end.
    """

    def __init__(
        self, run_dirs: Iterable[str], more: Callable[[], list[str]], launcher: str, *, together: bool = False
    ) -> None:
        super().__init__()
        self._together = together
        self._running: set[str] = set()
        self._waiting = deque(run_dirs)
        self._more = more
        self._launcher = launcher

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps a copy of its searcher for `Tuner.restore`, which is never used here."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """The parameters of the next trial; None for later, or Tune's word for the end."""
        if not self._waiting and self._together and self._running:
            return None
        if not self._waiting:
            self._waiting.extend(self._more())
        if not self._waiting:
            return Searcher.FINISHED
        self._running.add(trial_id)
        return {"run_dir": self._waiting.popleft(), "launcher": self._launcher}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """What became of it is in the ledger as soon as Tune has told its callbacks, before it asks again."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing, as in `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as in `__getstate__`."""
