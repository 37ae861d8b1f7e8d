"""Collections of other programs, written by their own writers, become collections of d2llm: in folders, on servers."""
# ruff: noqa: E402  (what is asked for before the imports must come before them)

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

for writer in ("qdrant_client", "qdrant_edge", "langchain_qdrant", "llama_index.vector_stores.qdrant",
               "haystack_integrations.document_stores.qdrant"):  # fmt: skip
    pytest.importorskip(writer)

from passages import TEXTS
from qdrant_client import models
from qdrant_places import PLACES, Place, place_of
from qdrant_server import QdrantServer
from take_over import TEXT_FIELDS, WRITERS, client_at, count_at, expected_payload, make, points_at, uuid_of, vector_of

import d2llm
from d2llm.bad_rows import BadRow
from d2llm.cli import main
from d2llm.connectors import Qdrant, QdrantIndex, read_collection
from d2llm.connectors.take_over import ForeignCollection
from d2llm.errors import ArgumentError, DataError, MismatchError, StoreError

ROOT = Path(__file__).parents[1]
ON_SERVERS = [kind for kind in PLACES if kind != "embedded"]
FIELDS: list[dict[str, Any]] = [
    {"source": ["web", "book"][i % 2], "year": 2018 + i, "price": i / 2, "draft": i % 3 == 0, "note": f"n{i}"}
    for i in range(len(TEXTS))
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path_factory.mktemp("server"), version="1.20.0") as server:
        yield server


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, server: QdrantServer) -> Iterator[Place]:
    with place_of(request.param, tmp_path, server) as place:
        yield place


@pytest.fixture(params=ON_SERVERS)
def on_server(request: pytest.FixtureRequest, tmp_path: Path, server: QdrantServer) -> Iterator[Place]:
    with place_of(request.param, tmp_path, server) as place:
        yield place


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Place]:
    with place_of("embedded", tmp_path) as place:
        yield place


def old_place(place: Place) -> Qdrant:
    """Where the old collections are: on the server, or in a folder of local mode beside that of the new ones."""
    return Qdrant(f"{place.location}-local") if place.embedded else place.qdrant


def where(place: Place) -> dict[str, Any]:
    """The same for `QdrantClient`."""
    return {"path": f"{place.location}-local"} if place.embedded else {"url": place.location}


def write(place: Place, points: Mapping[int | str, Mapping[str, Any]], name: str = "old") -> ForeignCollection:
    """Points with these payloads in a collection, by hand."""
    with client_at(where(place)) as client:
        if not client.collection_exists(place.name(name)):
            make(client, place.name(name))
        if points:
            structs = [
                models.PointStruct(id=id_, vector=vector_of(str(id_)), payload=dict(one)) for id_, one in points.items()
            ]
            client.upsert(place.name(name), structs)
    return ForeignCollection(place.name(name), old_place(place))


def documents(place: Place, name: str = "old", **options: Any) -> Iterator[d2llm.Document]:
    yield from read_collection(place.name(name), old_place(place).location, **options, **place.options)


def command(place: Place, model: Path, *arguments: str | Path, name: str = "old", new: str = "new") -> list[str]:
    """`d2llm index` that takes over the collection `name` into `new`."""
    line: list[object] = ["index", model, "--from-collection", place.name(name), "--qdrant", place.location]
    if place.embedded:
        line += ["--from-qdrant", old_place(place).location]
    else:
        line += ["--grpc-port", place.options.get("grpc_port", 6334) or 0]
    return [*map(str, line), "--collection", place.name(new), *map(str, arguments)]


def take_over(place: Place, model: Path, *arguments: str | Path, **names: str) -> Result:
    return CliRunner().invoke(main, command(place, model, *arguments, **names))


@pytest.mark.parametrize("writer", WRITERS)
def test_ids_payloads_and_filters_are_those_of_the_writer(writer: str, place: Place, model: d2llm.Model) -> None:
    write, prefix = WRITERS[writer]
    name, texts = place.name("old"), list(TEXTS.values())
    write(where(place), name, texts, FIELDS)
    with ForeignCollection(name, old_place(place)) as source:
        assert (source.form.writer, source.count()) == (writer, len(TEXTS))
    old, index = points_at(where(place), name), place("new")
    assert index.add(model, documents(place)).added == len(old) == len(TEXTS)
    new = index.get(old)
    for id_, payload in old.items():
        outer = prefix.removesuffix(".")
        text = texts[int((payload[outer] if outer else payload)["note"].removeprefix("n"))]
        assert new[id_] == expected_payload(writer, payload, text)
    assert sorted(index.ids()) == sorted(old)
    dot = "." * bool(prefix)
    for key, value in (("source", "web"), ("year", 2020), ("draft", True), ("price", 1)):
        number = sum((one[key] == value) for one in FIELDS)
        assert index.count({f"{dot}{prefix}{key}": value}) == number > 0, key
        if key != "price":  # to Qdrant itself, 1 and 1.0 are two values
            assert count_at(where(place), name, prefix + key, value) == number
    assert index.count({f"{dot}{prefix}year": {"gte": 2022}}) == sum(one["year"] >= 2022 for one in FIELDS)
    again = index.add(model, documents(place))
    assert (again.added, again.unchanged) == (0, len(old))


def test_where_llamaindex_keeps_the_text(folder: Place, model: d2llm.Model) -> None:
    """In the node, under two names so far, or beside it. Another `text` of the metadata moves."""
    points: dict[int | str, dict[str, Any]] = {
        1: {"_node_content": json.dumps({"text": "one"}), "_node_type": "TextNode", "text": "of the metadata"},
        2: {"_node_content": json.dumps({"text_resource": {"text": "two"}}), "_node_type": "Node"},
        3: {"_node_content": json.dumps({"text": ""}), "text": "three"},
    }
    source = write(folder, points)
    with source:
        assert source.form.writer == "LlamaIndex"
        found = list(source.documents())
    assert [(document.id, document.text) for document in found] == [("1", "one"), ("2", "two"), ("3", "three")]
    assert found[0].payload == {
        "_node_content": points[1]["_node_content"], "_node_type": "TextNode", "source_text": "of the metadata"
    }  # fmt: skip
    assert found[2].payload == {"_node_content": points[3]["_node_content"]}


def test_a_field_that_is_named(folder: Place, model: d2llm.Model) -> None:
    points: dict[int | str, dict[str, Any]] = {
        7: {"body": {"md": "Seven.", "lang": "en"}, "a.b": "A.", "text": 3, "title": "T"},
        uuid_of(1): {"body": {"md": "One.", "lang": "de"}, "a.b": "B.", "text": "Another.", "title": 5},
    }
    write(folder, points)
    index = folder("new")
    index.add(model, documents(folder, text_field="body.md"))
    assert index.get(["7", uuid_of(1)]) == {
        "7": {"body": {"lang": "en"}, "a.b": "A.", "source_text": 3, "title": "T", "text": "Seven."},
        uuid_of(1): {"body": {"lang": "de"}, "a.b": "B.", "source_text": "Another.", "source_title": 5, "text": "One."},
    }
    assert {document.content for document in documents(folder, text_field="body.md")} == {"T Seven.", "One."}
    assert [document.text for document in documents(folder, text_field="a.b")] == ["A.", "B."]
    assert [document.text for document in documents(folder, text_field=".body.md")] == ["Seven.", "One."]


def test_a_form_that_is_not_known(folder: Place) -> None:
    write(folder, {1: {"body": "x", "page": 3, "meta": {"lang": "en", "tags": []}}, 2: {"page": None, "body": "y"}})
    with pytest.raises(DataError, match=r"collection 'old' at .* has none of the forms that are known .LangChain, .*"
                       r"--text-field; in Python text_field.*: body .string., page .null or number., meta .object., "
                       r"meta.lang .string., meta.tags .list.$"):  # fmt: skip
        next(documents(folder))
    with pytest.raises(ArgumentError, match="text field '': expected a name"):
        next(documents(folder, text_field=""))


def test_the_most_frequent_form_counts(folder: Place) -> None:
    points: dict[int | str, dict[str, Any]] = {i: {"document": f"d{i}", "metadata": {}} for i in range(3)}
    with write(folder, {**points, 3: {"text": "x"}, 4: {}}) as source:
        assert source.form.writer == "mcp-server-qdrant"
    with write(folder, {i: {"document": f"d{i}"} for i in range(5, 9)}) as source:
        assert source.form.writer == "fastembed"
    bad: dict[int | str, dict[str, Any]] = {i: {"text": "x"} for i in range(5, 9)}
    with write(folder, {**bad, **{i: {"text": "x", "document": "d"} for i in range(5)}}) as source:
        assert source.form.writer == "fastembed"  # a few bad points do not make it another form, which all have
    with write(folder, {i: {"other": 1} for i in range(10, 20)}) as source, pytest.raises(DataError, match="none of"):
        next(source.documents())


GOOD = {"page_content": "Good.", "metadata": None}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "without the field": ({"metadata": {"a": 1}}, "no field 'page_content'. It has: metadata"),
    "without a payload": ({}, "no field 'page_content'. It has: no fields"),
    "null": ({"page_content": None}, "expected a string in the field 'page_content', found None"),
    "a number": ({"page_content": 5}, "expected a string in the field 'page_content', found 5"),
    "a list": ({"page_content": ["a"]}, r"expected a string in the field 'page_content', found ['a']"),
    "empty": ({"page_content": " \n"}, "the text in the field 'page_content' is empty"),
    "reserved": ({"page_content": "x", "_d2llm": 1}, "field '_d2llm': d2llm reserves this name"),
    "no room": ({"page_content": "x", "text": 1, "source_text": 2}, "it has the fields 'text' and 'source_text'"),
}


def test_bad_points_stop_or_are_skipped(folder: Place, model_folder: Path, tmp_path: Path) -> None:
    names = dict(enumerate(BAD, 100))
    points: dict[int | str, dict[str, Any]] = {i: GOOD for i in range(11)}
    write(folder, {**points, uuid_of(1): {**GOOD, "page_content": "Better."}})
    write(folder, {id_: BAD[name][0] for id_, name in names.items()})
    stopped = take_over(folder, model_folder)
    assert stopped.exit_code == 1 and "collection old, point 100: no field 'page_content'" in stopped.stderr
    assert folder.names()[0] == []
    rejects = tmp_path / "rejects.jsonl"
    skipped = take_over(folder, model_folder, "--rejects", rejects, "--json")
    assert skipped.exit_code == 0, skipped.output
    report = json.loads(skipped.stdout)
    assert (report["added"], report["skipped"], report["stored"]) == (12, len(BAD), 12)
    for line, (id_, name) in zip(map(json.loads, rejects.read_text().splitlines()), names.items(), strict=True):
        assert line["where"] == f"collection old, point {id_}"
        assert line["row"] == BAD[name][0] and BAD[name][1] in line["reason"], name
    with pytest.raises(BadRow, match="collection old, point 100: no field"):
        list(documents(folder))
    write(folder, {3: BAD["empty"][0]})
    kept = take_over(folder, model_folder, "--on-error", "skip", "--prune")
    assert f"11 unchanged, {len(BAD) + 1} skipped, 0 removed" in kept.stdout and "holds 12." in kept.stdout


def test_a_second_run_follows_the_old_collection(place: Place, model_folder: Path) -> None:
    write(place, {i: {**GOOD, "page_content": f"Text {i}."} for i in range(6)})
    first = take_over(place, model_folder)
    assert first.exit_code == 0, first.output
    assert f"collection '{place.name('old')}' at {old_place(place)}: 6 points, written by LangChain" in first.stderr
    with client_at(where(place)) as client:
        client.delete(place.name("old"), [0, 1])
    write(place, {5: {**GOOD, "page_content": "Changed."}, 6: GOOD})
    kept = take_over(place, model_folder)
    assert "5 documents: 2 stored, 3 unchanged, 0 skipped, 0 removed" in kept.stdout
    pruned = take_over(place, model_folder, "--prune")
    assert "5 documents: 0 stored, 5 unchanged, 0 skipped, 2 removed" in pruned.stdout
    with place("new") as index:
        assert sorted(index.ids()) == ["2", "3", "4", "5", "6"]
        assert index.get(["5"])["5"] == {"metadata": None, "text": "Changed."}


def test_what_was_stored_before_an_interruption_is_not_encoded_again(folder: Place, model: d2llm.Model) -> None:
    write(folder, {i: {**GOOD, "page_content": f"Text {i}."} for i in range(6)})
    index = folder("new")
    index.add(model, islice(documents(folder), 4))
    rest = index.add(model, documents(folder))
    assert (rest.added, rest.unchanged, index.count()) == (2, 4, 6)


def test_a_long_text_is_one_document(folder: Place, model: d2llm.Model) -> None:
    text = " ".join(f"Sentence {i} is about refunds." for i in range(200))
    write(folder, {1: {"page_content": text, "metadata": {"n": 1}}, 2: GOOD})
    index = folder("new")
    index.add(model, documents(folder))
    assert (index.info().documents, index.count({".metadata.n": 1})) == (2, 1) < (index.info().passages, 2)
    assert index.get(["1"])["1"] == {"metadata": {"n": 1}, "text": text}
    assert index.add(model, documents(folder)).unchanged == 2


def test_an_alias_gets_a_new_generation(folder: Place, model_folder: Path) -> None:
    write(folder, {i: {**GOOD, "page_content": f"Text {i}."} for i in range(6)})
    for number in (1, 2):
        line = [
            word for word in command(folder, model_folder, "--alias", "live") if word not in ("--collection", "new")
        ]
        done = CliRunner().invoke(main, line)
        assert done.exit_code == 0 and f"live is now live-{number}" in done.stdout, done.output
    assert folder.names() == (["live-2"], {"live": "live-2"})


def test_payload_indexes_and_aliases_of_a_server(on_server: Place, model_folder: Path) -> None:
    WRITERS["LangChain"][0](where(on_server), name := on_server.name("old"), list(TEXTS.values()), FIELDS)
    keyword, whole, text = (models.PayloadSchemaType(kind) for kind in ("keyword", "integer", "text"))
    kinds = {"metadata.source": keyword, "metadata.year": whole, "metadata.draft": models.PayloadSchemaType.BOOL,
             "metadata.note": text, "page_content": text}  # fmt: skip
    for path, kind in kinds.items():
        on_server.client.create_payload_index(name, path, kind)
    steps = models.CreateAlias(collection_name=name, alias_name=on_server.name("live"))
    on_server.client.update_collection_aliases([models.CreateAliasOperation(create_alias=steps)])
    done = take_over(on_server, model_folder, name="live")
    assert done.exit_code == 0, done.output
    assert "not taken over: the payload index metadata.note=text, of a type that d2llm has not" in done.stderr
    assert "page_content=" not in done.stderr
    index = on_server("new")
    found = index.info().payload_indexes
    assert found == {".metadata.source": "keyword", ".metadata.year": "integer", ".metadata.draft": "integer"}
    strict = models.StrictModeConfig(enabled=True, unindexed_filtering_retrieve=False)
    on_server.client.update_collection(on_server.name("new"), strict_mode_config=strict)
    for condition in ({".metadata.source": "web"}, {".metadata.year": {"gte": 2020}}, {".metadata.draft": True}):
        assert index.count(condition) > 0
    with pytest.raises(StoreError, match=r"strict mode allows no filter on '.metadata.note'"):
        index.count({".metadata.note": "n1"})
    assert on_server.names()[1] == {"live": "old"}
    (line,) = [line for line in done.stdout.splitlines() if "still names the old collection" in line]
    _, _, switch = line.partition("any more: d2llm ")
    assert CliRunner().invoke(main, switch.split()).exit_code == 0
    assert on_server.names()[1] == {"live": "new"}


def test_two_processes_take_over_the_same_collection(server: QdrantServer, tmp_path: Path, model_folder: Path) -> None:
    with place_of("grpc", tmp_path, server) as place:
        write(place, {i: {**GOOD, "page_content": f"Text {i}.", "metadata": {"n": i}} for i in range(700)})
        line = [sys.executable, "-m", "d2llm", *command(place, model_folder, "--json", "--prune")]
        jobs = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        for job in jobs:
            output, errors = job.communicate()
            made_by_the_other = "another process just made the collection" in errors  # and says to run it again
            assert made_by_the_other if job.returncode else json.loads(output)["stored"] == 700, errors
        assert any(job.returncode == 0 for job in jobs)
        index = place("new")
        assert sorted(map(int, index.ids())) == list(range(700))
        assert index.count({".metadata.n": {"gte": 350}}) == 350
        last = json.loads(take_over(place, model_folder, "--json").stdout)
        assert (last["added"], last["unchanged"]) == (0, 700)


def test_a_server_that_fails_for_a_moment_is_read_on(tmp_path: Path, model: d2llm.Model) -> None:
    with QdrantServer(tmp_path / "server", version="1.20.0") as server, place_of("grpc", tmp_path, server) as place:
        write(place, {i: GOOD for i in range(600)})
        server.faults.add("503", times=3, on=("scroll", "count", "get_collection"))
        assert sum(1 for _ in documents(place)) == 600
        assert len(server.faults.struck) == 3


def test_what_cannot_be_a_source(place: Place, model_folder: Path, model: d2llm.Model) -> None:
    write(place, {1: GOOD})
    with place("ours") as index:
        index.add(model, [{"id": "a", "text": "x"}])
    known = ", ".join(map(place.name, ["old"] if place.embedded else ["old", "ours"]))
    missing = take_over(place, model_folder, name="nothing")
    assert missing.exit_code == 1 and f"no collection '{place.name('nothing')}' at {old_place(place)}" in missing.stderr
    assert place.name("old") in missing.stderr.partition("There are: ")[2], known
    if place.embedded:
        ours = ForeignCollection("ours", place.qdrant)
    else:
        ours = ForeignCollection(place.name("ours"), place.qdrant)
        itself = take_over(place, model_folder, new="old")
        assert itself.exit_code == 2 and "would be indexed into itself" in itself.stderr
        with place("new") as index:
            index.add(model, documents(place))
    with ours, pytest.raises(MismatchError, match="d2llm collection migrate"):
        next(ours.documents())


def test_an_empty_collection_and_a_used_name(folder: Place, model_folder: Path) -> None:
    write(folder, {})
    empty = take_over(folder, model_folder)
    assert empty.exit_code == 1 and "collection 'old' at" in empty.stderr and "has no points" in empty.stderr


def test_folders_that_are_not_local_mode(folder: Place, model_folder: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    for location in (nothing, tmp_path):
        with pytest.raises(StoreError, match=r"is no folder of qdrant-client's local mode: it has no meta\.json"):
            next(read_collection("old", location))
    assert not nothing.exists()
    write(folder, {1: GOOD})
    with client_at(where(folder)), pytest.raises(StoreError, match="is open elsewhere: close the client that uses it"):
        next(documents(folder))
    assert len(list(documents(folder))) == 1
    (Path(where(folder)["path"]) / "meta.json").write_text("{")
    with pytest.raises(StoreError, match="-local cannot be read: "):
        next(documents(folder))


def test_one_folder_holds_both(folder: Place, model_folder: Path) -> None:
    """What --qdrant names may be the folder of local mode itself."""
    write(folder, {1: GOOD})
    shared = where(folder)["path"]
    line = ["index", str(model_folder), "--from-collection", "old", "--qdrant", shared, "--collection"]
    for _ in range(2):
        done = CliRunner().invoke(main, [*line, "new"])
        assert done.exit_code == 0, done.output
    with QdrantIndex("new", shared) as index:
        assert index.get(["1"]) == {"1": {"metadata": None, "text": "Good."}}
    itself = CliRunner().invoke(main, [*line, "old"])
    assert itself.exit_code == 2 and "would be indexed into itself" in itself.stderr
    ours = CliRunner().invoke(main, [*line[:3], "new", *line[4:], "other"])
    assert ours.exit_code == 1 and "d2llm collection migrate new" in ours.stderr


def test_a_server_that_is_not_there(folder: Place, model_folder: Path) -> None:
    nowhere = ["--from-collection", "old", "--from-qdrant", "http://127.0.0.1:9", "--from-grpc-port", "0"]
    line = ["index", str(model_folder), *nowhere, "--qdrant", folder.location, "--collection", "new"]
    refused = CliRunner().invoke(main, line)
    assert refused.exit_code == 1 and "cannot reach Qdrant at http://127.0.0.1:9" in refused.stderr
    assert folder.names()[0] == []


def test_options_that_contradict_one_another(tmp_path: Path) -> None:
    target = ["--qdrant", str(tmp_path), "--collection", "new"]
    cases = {
        "name either a CORPUS, or a collection": ["index", "m", *target],
        "name either a CORPUS": ["index", "m", "corpus.jsonl", "--from-collection", "old", *target],
        "--text-field is for --from-collection": ["index", "m", "corpus.jsonl", "--text-field", "x", *target],
        "--from-qdrant is for --from-collection": ["index", "m", "corpus.jsonl", "--from-qdrant", "x", *target],
        "leave --engine ray out": ["index", "m", "--from-collection", "old", "--engine", "ray", *target],
        "collection '': expected a name": ["index", "m", "--from-collection", "", *target],
    }
    for message, line in cases.items():
        refused = CliRunner().invoke(main, line)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()), message


def test_documents_as_json_lines(place: Place, model: d2llm.Model) -> None:
    """Of a collection of either kind, so that they can be indexed or fitted to."""
    write(place, {1: {**GOOD, "_id": 5}, 2: {**GOOD, "page_content": "Two.", "title": "T"}, 3: {}})
    with place("ours") as index:
        index.add(model, documents(place, on_error=lambda _: None))
    printed = {}
    for name, qdrant in (("old", old_place(place)), ("ours", place.qdrant)):
        line = ["collection", "documents", place.name(name), "--qdrant", str(qdrant.location), "--grpc-port"]
        done = CliRunner().invoke(main, [*line, str(place.options.get("grpc_port", 6334) or 0)])
        assert done.exit_code == 0, done.output
        printed[name] = sorted(map(json.loads, done.stdout.splitlines()), key=lambda row: str(row["_id"]))
        assert ("no field" in done.stderr) == (name == "old")
    assert printed["ours"] == printed["old"] == [
        {"_id": "1", "metadata": None, "text": "Good."},
        {"_id": "2", "metadata": None, "text": "Two.", "title": "T"},
    ]  # fmt: skip


def test_the_three_commands_of_the_docs(tmp_path: Path, tiny_bert: Path) -> None:
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = text.partition("## From your LangChain collection to rescored search in three commands")[2]
    made, commands = re.findall(r"```(?:python)?\n(.+?)```", section, re.DOTALL)[:2]
    fake = "from langchain_core.embeddings import DeterministicFakeEmbedding\n"
    fake += "embeddings = DeterministicFakeEmbedding(size=384)\n"
    subprocess.run([sys.executable, "-c", fake + made], cwd=tmp_path, check=True)
    lines = commands.replace("\\\n", " ").splitlines()
    assert [re.findall("d2llm[a-z-]* [a-z]+", line) for line in lines] == [
        ["d2llm collection", "d2llm-export onnx"], ["d2llm index"], ["d2llm search"]
    ]  # fmt: skip
    python = shlex.quote(sys.executable)
    script = f"""set -eo pipefail
        d2llm() {{ {python} -P -m d2llm "$@"; }}
        d2llm-export() {{ {python} -P -c 'from d2llm.cli import export_main; export_main()' "$@"; }}
        """ + "\n".join(lines).replace("sentence-transformers/all-MiniLM-L6-v2", shlex.quote(str(tiny_bert)))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 points, written by LangChain, with their text in 'page_content'" in done.stderr
    first = done.stdout.partition("  1. ")[2].splitlines()
    assert "Money is returned within ten days" in first[1]


def test_every_form_has_a_field_for_the_text() -> None:
    assert {*TEXT_FIELDS, "LlamaIndex"} == {*WRITERS}
