"""Every public class shows how it is used, and the example runs."""

import doctest
import inspect
import sys
from pathlib import Path

import pytest

import d2llm
from d2llm import connectors, export, train
from d2llm.connectors import haystack, langchain, llama_index
from d2llm.student import Student

PUBLIC = {
    f"{value.__module__}.{name}": value
    for module in (d2llm, connectors, export, train, langchain, llama_index, haystack)
    for name in module.__all__
    if inspect.isclass(value := getattr(module, name)) and not issubclass(value, Exception)
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_class_runs(
    name: str,
    model: d2llm.Model,
    model_folder: Path,
    student_folder: Path,
    minilm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = vars(sys.modules[PUBLIC[name].__module__]) | {
        "d2llm": d2llm,
        "model": model,
        "model_folder": model_folder,
        "student": Student.load(student_folder),
        "backbone": minilm,
        "tmp_path": tmp_path,
    }
    (test,) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=scope)
    assert test.examples, f"{name} has no example in its docstring"
    shown: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=shown.append)
    assert not failed, "".join(shown)
