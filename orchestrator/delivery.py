"""The thread that brings MLflow up to date while runs go on, and what is left for after them."""

from __future__ import annotations

import logging
import textwrap
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.tracking import Target, connect, deliver

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

MAX_PAUSE_S = 30.0
"""Between attempts on a store that does not answer."""
ENDING_PAUSE_S = 1.0


class Delivery(threading.Thread):
    """Delivers the records of one folder while its runs go on. Never raises into the run; says once when it cannot."""

    def __init__(self, folder: Path, experiment: str, target: Target, *, every_s: float = 2.0) -> None:
        super().__init__(name="mlflow-delivery", daemon=True)
        self._folder, self._experiment, self._target, self._every_s = folder, experiment, target, every_s
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._deadline = float("inf")
        self._told: set[str] = set()
        self.problem: str | None = None
        """Why the last attempt failed; None when everything on disk is delivered."""

    def run(self) -> None:
        client: MlflowClient | None = None
        pause = self._every_s
        first = True
        while True:
            ending = self._ending.is_set()
            try:
                client = client or connect(self._target)
                hurry = partial(self._must_hurry, began_before=not ending)
                left_out = deliver(client, self._folder, self._experiment, self._target, hurry, first=first)
                first = False
                self._tell_once(left_out)
                self.problem, pause = (left_out[0] if left_out else None), self._every_s
                if ending:
                    if self._must_hurry(began_before=False):
                        self.problem = f"{self._target.shown} is too slow"
                    return
            except Exception as error:  # noqa: BLE001 - whatever MLflow or the network raise must not end a run
                self._note_failure(error)
                pause = min(2 * pause, MAX_PAUSE_S)
            if ending and time.monotonic() + ENDING_PAUSE_S > self._deadline:
                return
            self._wake.wait(ENDING_PAUSE_S if ending else pause)
            self._wake.clear()

    def _must_hurry(self, *, began_before: bool) -> bool:
        """Whether what a pass has not sent is left to the next: what ends a run must not wait behind the metrics of a
        pass that began before, and nothing goes on after the deadline, for another driver may have taken over."""
        return (began_before and self._ending.is_set()) or time.monotonic() > self._deadline

    def _tell_once(self, texts: list[str]) -> None:
        for text in texts:
            if text not in self._told:
                self._told.add(text)
                logger.warning("MLflow at %s: %s", self._target.shown, text)

    def _note_failure(self, error: Exception) -> None:
        if self.problem is None:
            logger.warning(
                "MLflow at %s: %s. Training goes on; records are kept and delivered later.",
                self._target.shown,
                first_line(error),
            )
        self.problem = first_line(error)

    def finish(self, timeout_s: float) -> str | None:
        """Deliver what is left, for `timeout_s` seconds at most, and end. Returns why something is left, or None."""
        self._deadline = time.monotonic() + timeout_s
        self._ending.set()
        self._wake.set()
        if self.ident is None:
            self.start()
        self.join(timeout_s + 1.0)
        if self.is_alive():
            return self.problem or f"{self._target.shown} does not answer"
        return self.problem


def first_line(error: BaseException) -> str:
    """The first line of what an error says, cut to a terminal's width or two."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else type(error).__name__
