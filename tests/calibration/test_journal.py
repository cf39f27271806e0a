"""Findings survive a kill, and journals do not mix."""

from __future__ import annotations

import pytest

from vislm.calibration.journal import open_journal
from vislm.errors import RunFolderError


def test_findings_come_back(tmp_path) -> None:
    path = tmp_path / "new" / "a.journal"
    with open_journal(path, {"what": "act", "seed": 0}) as journal:
        assert journal.found == {}
        journal.add({"2/0": [0.5], "2/1": [0.25]})
    with open_journal(path, {"what": "act", "seed": 0}) as journal:
        assert journal.found == {"2/0": [0.5], "2/1": [0.25]}
        journal.add({"2/2": [1.0]})
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_line_is_cut_off(tmp_path, cut: int) -> None:
    path = tmp_path / "a.journal"
    with open_journal(path, {"seed": 0}) as journal:
        journal.add({"2/0": [0.5]})
        journal.add({"2/1": [0.25]})
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    with open_journal(path, {"seed": 0}) as journal:
        assert "2/1" not in journal.found
        journal.add({"2/1": [0.25]})
    if cut <= 30:
        assert path.read_bytes() == data


def test_a_kill_before_the_first_line(tmp_path) -> None:
    path = tmp_path / "a.journal"
    path.write_bytes(b'{"see')
    with open_journal(path, {"seed": 0}) as journal:
        journal.add({"2/0": 1})
    with open_journal(path, {"seed": 0}) as journal:
        assert journal.found == {"2/0": 1}


def test_other_searches_are_refused_by_field(tmp_path) -> None:
    path = tmp_path / "a.journal"
    with open_journal(path, {"what": "act", "seed": 0}):
        pass
    with pytest.raises(RunFolderError, match="seed: 0 there, 1 now"), open_journal(path, {"what": "act", "seed": 1}):
        pass
    with pytest.raises(RunFolderError, match="beta: None there"):
        with open_journal(path, {"what": "act", "seed": 0, "beta": 0.4}):
            pass


@pytest.mark.parametrize("text", ['{"seed": 0}\nnothing\n', '{"seed": 0}\n{"key": 1}\n', "nothing\n", "[]\n"])
def test_damage(tmp_path, text: str) -> None:
    path = tmp_path / "a.journal"
    path.write_text(text)
    with pytest.raises(RunFolderError, match=r"damaged|no fingerprint"), open_journal(path, {"seed": 0}):
        pass


def test_one_process_at_a_time(tmp_path) -> None:
    path = tmp_path / "a.journal"
    with open_journal(path, {}), pytest.raises(RunFolderError, match="another process"), open_journal(path, {}):
        pass
