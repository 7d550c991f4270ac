"""The files of numbers that the runner's tests read."""

from pathlib import Path

import pytest

from tests.helpers.number_stages import NUM_FILES


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    folder = tmp_path / "numbers"
    folder.mkdir()
    for number in range(NUM_FILES):
        (folder / f"{number:05d}.txt").write_text(" ".join(str(number * 10 + i) for i in range(10)))
    return folder
