"""examples/cells.py: what several processes add to one file."""

import pytest
from scripts import EXAMPLES, load_script

Cells = load_script(EXAMPLES / "cells.py").Cells


def test_a_cell_is_made_by_one_process(tmp_path):
    ours, theirs = (Cells(tmp_path / "cells.json", {"steps": 2}) for _ in range(2))
    with ours.claim("dense, seed 0") as is_ours, theirs.claim("dense, seed 0") as is_theirs:
        assert is_ours and not is_theirs
        with theirs.claim("dense, seed 1") as is_another_theirs:
            assert is_another_theirs
        ours.write("dense, seed 0", {"loss": 1.0})
    with theirs.claim("dense, seed 0") as is_theirs:
        assert not is_theirs


def test_a_cell_that_failed_can_be_claimed_again(tmp_path):
    cells = Cells(tmp_path / "cells.json", {"steps": 2})
    with pytest.raises(RuntimeError, match="out of memory"), cells.claim("dense"):
        raise RuntimeError("out of memory")
    with cells.claim("dense") as is_ours:
        assert is_ours


def test_a_file_of_other_options_is_refused(tmp_path):
    Cells(tmp_path / "cells.json", {"steps": 2, "batch": 4}).write("dense", {})
    with pytest.raises(SystemExit, match=r"of other options \(steps\)"):
        Cells(tmp_path / "cells.json", {"steps": 3, "batch": 4})
