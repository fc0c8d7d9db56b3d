"""Files of long runs: whatever was cut off, what is whole is read again; several processes may write one file."""

from __future__ import annotations

import json
import multiprocessing

from hypothesis import given
from hypothesis import strategies as st

from visearch.journal import append_line, read_lines
from visearch.report import write_json


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers()), max_size=4), st.data())
def test_a_journal_goes_on_wherever_it_was_cut(tmp_path_factory, contents, data):
    path = tmp_path_factory.mktemp("journal") / "runs.jsonl"
    for content in contents:
        append_line(path, json.dumps(content))
    whole = path.read_bytes() if contents else b""
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = contents[: whole[:cut].count(b"\n")]
    assert list(read_lines(path, mend=True)) == list(enumerate(kept, 1))
    append_line(path, '"next"')
    assert list(read_lines(path)) == list(enumerate([*kept, "next"], 1))


def _write(path, number: int) -> None:
    for _ in range(300):
        write_json(path, {"number": number})


def test_processes_write_one_file_without_losing_each_others(tmp_path):
    """As the parts of one comparison do with its settings."""
    path, fork = tmp_path / "config.json", multiprocessing.get_context("fork")
    workers = [fork.Process(target=_write, args=(path, number)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert json.loads(path.read_text())["number"] in (0, 1) and list(tmp_path.iterdir()) == [path]
