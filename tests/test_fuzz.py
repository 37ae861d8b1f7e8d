"""A short run of benchmarks/fuzz.py."""

from pathlib import Path

import pytest
from conftest import MakeStudent
from fuzz import KINDS, fuzz


@pytest.fixture(scope="module")
def tiny_student(make_student: MakeStudent, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "tiny"
    make_student(tiny_bert, tuning="lora").save(folder)
    return folder


@pytest.mark.filterwarnings("ignore::d2llm.deprecated.RenamedWarning")  # old keys of recipes are among the inputs
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_ends_in_a_traceback_or_comes_back_different(kind: str, model_folder: Path, tiny_student: Path) -> None:
    outcome = fuzz(kind, 30, model_folder, tiny_student)
    assert not outcome.failure, outcome.failure
    assert outcome.accepted and outcome.refused  # otherwise the inputs are of one sort and show little
