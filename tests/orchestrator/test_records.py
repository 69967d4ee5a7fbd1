from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_core.config import ConfigError
from orchestrator import records
from orchestrator.records import AppendOnly, Journal, Ledger, RunRecord


def record(**changes: object) -> RunRecord:
    values = {"run_id": "r1", "experiment": "e", "recipe": "quickstart", "seed": 3, "config": {"pretrain.seed": 3}}
    return RunRecord(**(values | changes))  # type: ignore[arg-type]


def test_journal_gives_back_every_metric_by_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.log(10, {"train/loss": 6.5})
    journal.log(0, {"train/loss": 7.0, "eval/knn_top1": 60})
    journal.close()
    assert records.read_curves(tmp_path) == {"train/loss": [(0, 7.0), (10, 6.5)], "eval/knn_top1": [(0, 60.0)]}


def test_journal_keeps_the_first_value_of_a_repeated_step_also_after_reopening(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.log(0, {"a": 1.0})
    journal.log(0, {"a": 2.0, "b": 3.0})
    journal.close()
    journal = Journal(tmp_path)  # a run resumed from the checkpoint at step 0 repeats it
    journal.log(0, {"a": 4.0})
    journal.log(1, {"a": 5.0})
    journal.close()
    assert records.read_curves(tmp_path) == {"a": [(0, 1.0), (1, 5.0)], "b": [(0, 3.0)]}
    lines = [line["metrics"] for _, line in records.read_lines(tmp_path / records.METRICS_FILE)]
    assert lines == [{"a": 1.0}, {"b": 3.0}, {}, {"a": 5.0}]  # nothing new is a sign of life


def test_values_that_are_not_finite_survive(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.log(0, {"a": math.nan, "b": math.inf})
    journal.close()
    curves = records.read_curves(tmp_path)
    assert math.isnan(curves["a"][0][1])
    assert curves["b"] == [(0, math.inf)]


@given(cut=st.integers(min_value=0, max_value=200))
def test_a_line_cut_short_is_ignored_by_readers_and_removed_by_the_next_writer(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "lines.jsonl"
    file = AppendOnly(path)
    for i in range(5):
        file.append({"i": i, "text": "two\nlines"})
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    assert [entry["i"] for _, entry in records.read_lines(path)] == list(range(complete))
    file = AppendOnly(path)
    file.append({"i": 99, "text": ""})
    file.close()
    assert [entry["i"] for _, entry in records.read_lines(path)] == [*range(complete), 99]


def test_offsets_resume_reading_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    file = AppendOnly(path)
    for i in range(4):
        file.append({"i": i})
    offsets = [offset for offset, _ in records.read_lines(path)]
    assert offsets[-1] == path.stat().st_size
    for seen, offset in enumerate([0, *offsets]):
        assert [entry["i"] for _, entry in records.read_lines(path, offset)] == list(range(seen, 4))
    file.close()


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert list(records.read_lines(tmp_path / "none.jsonl")) == []
    assert records.read_curves(tmp_path) == {}
    assert records.read_states(tmp_path) == {}


def test_ledger_tells_the_last_word_on_each_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record("a", "started")
    ledger.record("b", "started")
    ledger.record("a", "failed", "out of memory")
    ledger.close()
    ledger = Ledger(tmp_path)
    ledger.record("b", "finished")
    ledger.close()
    states = records.read_states(tmp_path)
    assert (states["a"].event, states["a"].reason) == ("failed", "out of memory")
    assert states["b"].event in records.FINAL_EVENTS
    assert states["a"].event not in records.FINAL_EVENTS
    assert states["a"].time <= states["b"].time <= time.time()


def test_run_record_survives_the_disk(tmp_path: Path) -> None:
    written = record(
        changes={"pretrain.teacher.temp": 0.07}, derived={"lr": 1e-3}, sweep="s", git_commit="c", data_digest="d"
    )
    written.write(tmp_path / "new" / "folder")
    assert RunRecord.read(tmp_path / "new" / "folder") == written


def test_labels_are_what_a_run_has_beside_its_configuration(tmp_path: Path) -> None:
    assert record(paper_setting="unused").labels == {}
    written = record(row="swav", method="swav", paper={"eval/knn_top1": 64.7}, paper_setting="ImageNet")
    written.write(tmp_path)
    assert RunRecord.read(tmp_path).labels == {
        "row": "swav",
        "method": "swav",
        "paper/eval/knn_top1": 64.7,
        "paper/setting": "ImageNet",
    }


def test_write_json_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    records.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]  # no temporary file stays
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_killed_writer_leaves_a_readable_journal(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from orchestrator.records import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); step = 0\n"
        "while True:\n"
        "    journal.log(step, {'a': step, 'b': -step}); step += 1\n"
        "    print(step, flush=True) if step == 200 else None\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline() if not records.read_curves(tmp_path) else time.sleep(0.3)
            process.send_signal(signal.SIGKILL)
        curves = records.read_curves(tmp_path)
        steps = [step for step, _ in curves["a"]]
        assert len(steps) >= 200
        assert steps == list(range(len(steps)))
        assert curves["b"] == [(step, -float(step)) for step in steps]


def test_a_folder_has_one_writer_of_its_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run-1")
    with pytest.raises(ConfigError, match="run-1: another process is working on it"):
        Ledger(tmp_path / "run-1")
    ledger.close()
    Ledger(tmp_path / "run-1").close()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"run_id": "a", "no_such_field": 1}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json: damaged: "):
        RunRecord.read(tmp_path)
