"""The driver's side of a run or sweep: launch it in a thread, show it, deliver its record, notice when it stalls or is
interrupted, and leave nothing undone whichever way it ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from orchestrator.delivery import Delivery
from orchestrator.errors import RunFailed
from orchestrator.progress import Progress, RunProgress
from orchestrator.records import Event, Ledger, read_states
from orchestrator.runs import deliver_command
from orchestrator.tracking import Target

INTERRUPTED_DELIVERY_S = {signal.SIGTERM: 2.0, signal.SIGINT: 10.0}
"""How long an interrupted driver tries to tell MLflow; `ray job stop` leaves 3 s between SIGTERM and SIGKILL."""
FINAL_DELIVERY_S = 30.0
START_DELIVERY_S = 20.0
"""How long the first delivery waits for a run to start."""
STOP_S = 5.0
"""How long a driver that gives up waits for `launch` to have stopped."""


class _Interruption(threading.Event):
    """Set when a signal came."""

    delivery_s = INTERRUPTED_DELIVERY_S[signal.SIGINT]


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """An event that SIGINT (Ctrl-C) and SIGTERM (`ray job stop`) set, instead of ending the process."""
    interrupted = _Interruption()

    def note(number: int, frame: FrameType | None) -> None:
        interrupted.delivery_s = INTERRUPTED_DELIVERY_S[signal.Signals(number)]
        interrupted.set()

    if threading.current_thread() is not threading.main_thread():  # handlers belong to the main thread
        yield interrupted
        return
    before = {number: signal.signal(number, note) for number in INTERRUPTED_DELIVERY_S}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(
    launch: Callable[[], None],
    *,
    ledger: Ledger,
    folder: Path,
    runs: list[RunProgress],
    experiment: str,
    target: Target,
    start_timeout_s: float,
    describe_cluster: Callable[[], str] = lambda: "no Ray",
    stop: Callable[[], None] | None = None,
) -> None:
    """Run `launch` to its end in a thread of its own, with display, delivery, stall watch and signals around it.

    Args:
        launch: Blocks until all runs ended, and writes their events to the ledger.
        ledger: Of `folder`; its own entry (`folder.name`) is written by the caller where there is one.
        start_timeout_s: A run that was started this long ago and has recorded nothing is taken to hang.
        describe_cluster: What to add to the message about a run that hangs.
        stop: Makes `launch` end soon. None where only what the caller does next, such as leaving Ray, ends it.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came; every unfinished run is marked interrupted, on disk and in MLflow.
        RunFailed: A run stalled before its first step.
        Exception: Whatever `launch` raised.
    """
    error: list[BaseException] = []
    done = threading.Event()

    def target_function() -> None:
        try:
            launch()
        except BaseException as problem:  # noqa: BLE001 - handed to the caller's thread below
            error.append(problem)
        finally:
            done.set()

    def give_up(event: Event, reason: str, delivery_s: float) -> None:
        if stop is not None:
            stop()
        _close_open_runs(ledger, folder, runs, event, reason)
        ledger.close()  # what the end of this driver does to its runs must not be written down as theirs
        delivery.finish(delivery_s)
        if stop is not None:
            thread.join(STOP_S)

    delivery = Delivery(folder, experiment, target)
    began = time.monotonic()
    with _interruptible() as interrupted:
        thread = threading.Thread(target=target_function, name="launch", daemon=True)
        with Progress(folder, runs) as progress:
            thread.start()
            while not done.wait(0.25) and not interrupted.is_set():
                progress.update()
                # Not before a run starts: the imports of MLflow and those of Ray would be in each other's way.
                if delivery.ident is None and (
                    any(run.state != "waiting" for run in runs) or time.monotonic() > began + START_DELIVERY_S
                ):
                    delivery.start()
                stalled = _stalled(folder, runs, start_timeout_s)
                if stalled:
                    reason = f"no first step within {start_timeout_s:g} s (cluster: {describe_cluster()})"
                    give_up("failed", reason, FINAL_DELIVERY_S)
                    raise RunFailed(f"{', '.join(stalled)}: {reason}")
            # The same signal may have ended processes that `launch` needs, so that its error is a part of it.
            if interrupted.is_set() and (error or not done.is_set()):
                give_up("interrupted", "by the user or the cluster", interrupted.delivery_s)
                raise KeyboardInterrupt
    if error:
        _close_open_runs(ledger, folder, runs, "failed", f"{type(error[0]).__name__}: {error[0]}")
    left = delivery.finish(FINAL_DELIVERY_S)
    if left:
        progress.say(f"MLflow at {target.shown} has not everything yet ({left}); later: {deliver_command(folder)}")
    if error:
        raise error[0]


def _close_open_runs(ledger: Ledger, folder: Path, runs: list[RunProgress], event: Event, reason: str) -> None:
    states = read_states(folder)
    for run_id in dict.fromkeys([*(run.run_id for run in runs), folder.name]):
        if run_id in states and states[run_id].event == "started":
            ledger.record(run_id, event, reason)


def _stalled(folder: Path, runs: list[RunProgress], timeout_s: float) -> list[str]:
    now = time.time()
    states = read_states(folder)
    return [
        run.run_id
        for run in runs
        if run.run_id in states
        and states[run.run_id].event == "started"
        and now - states[run.run_id].time > timeout_s
        and (run.last_record is None or run.last_record < states[run.run_id].time)
    ]
