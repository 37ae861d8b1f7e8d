"""Names of the last release work, and the warning says the new one."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import d2llm
from d2llm import connectors
from d2llm.cli_options import RenamedOptions
from d2llm.connectors.haystack import D2LLMRetriever as HaystackRetriever
from d2llm.connectors.langchain import D2LLMRetriever as LangChainRetriever
from d2llm.connectors.llama_index import D2LLMRetriever as LlamaIndexRetriever
from d2llm.connectors.schema import Metadata
from d2llm.deprecated import MODULES, RenamedWarning, renamed
from d2llm.folder import ModelConfig
from d2llm.search import SearchKeywords, SearchOptions


def test_an_old_module_gives_what_it_held_and_warns_where_it_is_imported(tmp_path: Path) -> None:
    names = {
        "d2llm.data": "read_pairs",
        "d2llm.lexical": "Bm25",
        "d2llm.modeling": "load_backbone",
        "d2llm.query_encoder": "from_tokens",
    }
    assert names.keys() == MODULES.keys()
    script = tmp_path / "script.py"
    lines = [
        f"from {module} import {name}; print({name}.__name__, {name}.__module__)" for module, name in names.items()
    ]
    script.write_text("\n".join(lines))
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    for number, (module, name), shown in zip(range(1, 5), names.items(), ended.stdout.splitlines(), strict=True):
        found, home = shown.split()
        assert found == name and home in MODULES[module]
        assert f"script.py:{number}: RenamedWarning: {module} is called " in ended.stderr and home in ended.stderr


def test_a_module_that_never_was_is_still_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"d2llm\.nothing"):
        __import__("d2llm.nothing")


@pytest.fixture
def searcher(model: d2llm.Model) -> d2llm.Searcher:
    index = d2llm.FlatIndex()
    index.add(model, [{"id": str(number), "text": f"passage {number}"} for number in range(20)])
    return d2llm.Searcher(model, index)


def test_old_search_arguments_mean_what_the_new_ones_do(searcher: d2llm.Searcher) -> None:
    old: dict[str, Any] = {"recall": 3}
    with pytest.warns(RenamedWarning, match="recall is called candidates now") as warned:
        assert searcher.explain("passage", 2, **old).candidates == 3
    assert warned[0].filename == __file__, "it is this line that should change"
    weight: dict[str, Any] = {"words_weight": 7.0}
    with pytest.warns(RenamedWarning, match="words_weight is called bm25_weight now"):
        assert d2llm.Searcher(searcher.model, searcher.index, **weight).options.bm25_weight == 7.0
    with pytest.warns(RenamedWarning), pytest.raises(ValueError, match="k=5, candidates=3"):
        searcher.search("passage", 5, **old)
    with pytest.raises(TypeError, match="recall is the old name of candidates: give candidates alone"):
        searcher.search("passage", 2, candidates=9, **old)
    with pytest.raises(TypeError, match="depth"):
        searcher.search("passage", 2, **{"depth": 9})  # type: ignore[arg-type]  # the wrong name is what is tested


def test_old_retriever_settings_mean_what_the_new_ones_do(searcher: d2llm.Searcher) -> None:
    old: dict[str, Any] = {"recall": 3}
    for make in (
        lambda: LangChainRetriever(searcher=searcher, k=2, **old).candidates,
        lambda: LlamaIndexRetriever(searcher, 2, **old)._options["candidates"],
        lambda: HaystackRetriever("model", "docs", "place", top_k=2, **old).options.candidates,
    ):
        with pytest.warns(RenamedWarning, match="recall is called candidates now"):
            assert make() == 3  # type: ignore[no-untyped-call]  # mypy gives lambdas in a tuple no type
    saved = HaystackRetriever("model", "docs", "place").to_dict()
    saved["init_parameters"]["recall"] = saved["init_parameters"].pop("candidates")
    with pytest.warns(RenamedWarning):
        assert HaystackRetriever.from_dict(saved).options.candidates == 100, "a pipeline that was saved before"


def test_old_collection_options_mean_what_the_new_ones_do(tmp_path: Path) -> None:
    with pytest.warns(RenamedWarning, match=r"d2llm\.connectors\.Words is called d2llm\.connectors\.Bm25Options now"):
        assert connectors.Words is connectors.Bm25Options
    with pytest.warns(RenamedWarning, match="words is called bm25 now"):
        made = connectors.CollectionOptions().changed({"words": {"language": "german"}})
    assert made == connectors.CollectionOptions(bm25=connectors.Bm25Options(language="german"))
    with pytest.raises(TypeError, match="words is the old name of bm25: give bm25 alone"):
        made.changed({"words": None, "bm25": None})


def test_a_collection_of_the_last_release_keeps_its_options() -> None:
    """Nothing but the name in code changed: what is stored has the old one, and earlier releases read it."""
    options = connectors.CollectionOptions(bm25=connectors.Bm25Options(language="german", average_words=7.0))
    config = ModelConfig(embedding_dim=2, feature_bytes=1, precision="fp32", fingerprint="0123")
    stored = Metadata.of(config, options).to_json()
    assert stored["options"]["words"] == {"language": "german", "k": 1.2, "b": 0.75, "average_words": 7.0}
    assert "bm25" not in stored["options"]
    assert Metadata.parse(stored, "kb").options == options


def test_search_options_are_spelled_alike_everywhere() -> None:
    names = {field.name for field in fields(SearchOptions)}
    assert {*SearchKeywords.__annotations__, "k"} == names
    assert names <= set(LangChainRetriever.model_fields)


@click.command(cls=RenamedOptions, renamed={"--old": "--new"})
@click.option("--new", type=int)
@click.argument("words", nargs=-1)
def command(new: int | None, words: tuple[str, ...]) -> None:
    """Show what was read."""
    click.echo(f"{new} {words}")


@pytest.mark.parametrize("typed", [["--old", "3", "a"], ["--old=3", "a"], ["a", "--old", "3"]])
def test_an_old_option_works_and_warns(typed: list[str]) -> None:
    result = CliRunner().invoke(command, typed)
    assert result.stdout == "3 ('a',)\n"
    assert result.stderr == "WARNING: --old is called --new now. The old name will stop working in the next release.\n"
    assert "--old" not in CliRunner().invoke(command, ["--help"]).stdout


def test_an_old_option_beside_its_new_name_is_refused() -> None:
    for typed in (["--old", "3", "--new", "4"], ["--new=4", "--old=3"]):
        result = CliRunner().invoke(command, typed)
        assert result.exit_code == 2 and "--old is the old name of --new: give --new alone" in result.stderr


def test_a_text_that_looks_like_an_old_option_is_left_alone() -> None:
    result = CliRunner().invoke(command, ["--", "--old"])
    assert (result.stdout, result.stderr) == ("None ('--old',)\n", "")


def test_values_without_old_names_stay() -> None:
    assert renamed({"a": 1}, {"b": "a"}) == {"a": 1}
