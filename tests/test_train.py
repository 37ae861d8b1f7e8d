"""The training run and its teachers, on a tiny backbone and real sentences."""

import inspect
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path

import processes
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]  # no types
from torch import Tensor

from d2llm.backbone import load_backbone
from d2llm.beir import RetrievalData, read_run
from d2llm.bm25 import Bm25
from d2llm.errors import ArgumentError, DataError, ModelError, OutputExistsError
from d2llm.metrics import evaluate
from d2llm.student import Encoded, Student, StudentConfig
from d2llm.train import read_recipe, train
from d2llm.train.cache import Cached
from d2llm.train.checkpoint import Checkpoint, with_digests
from d2llm.train.config import OLD_KEYS, Recipe
from d2llm.train.data import sample
from d2llm.train.dev import RERANKED, measure_retrieval, score_pairs
from d2llm.train.examples import Example, examples_of, write_examples
from d2llm.train.losses import DivergedError
from d2llm.train.mining import load_bi_encoder, mine
from d2llm.train.on_stack import own_weights
from d2llm.train.run_log import RunLog, read_log
from d2llm.train.teacher import (
    BackboneCrossEncoder,
    BiEncoderTeacher,
    Bm25Teacher,
    Judgement,
    LateInteraction,
    Stack,
    TokenStates,
    standardise,
)
from d2llm.types import Document, Task

SENTENCES = [
    " ".join(line.split())
    for module in (statistics, inspect, json)
    for _, thing in sorted(vars(module).items())
    for line in (inspect.getdoc(thing) or "").split("\n\n")
    if callable(thing) and len(line.split()) > 6
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries are the first words of a sentence, passages the whole: overlap in words makes it learnable."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "qrels").mkdir()
    texts = list(dict.fromkeys(SENTENCES))[:120]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts))
    )
    queries = [" ".join(text.split()[2:7]) for text in texts]
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": t}) + "\n" for i, t in enumerate(queries))
    )
    for split, ids in {"train": range(80), "dev": range(80, 120)}.items():
        rows = "".join(f"q{i}\td{i}\t1\n" for i in ids)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder


def recipe(tmp_path: Path, dataset: Path, backbone: Path, **overrides: object) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(f"""
        recall.steps = 6
        recall.batch = 8
        distil.steps = 6
        distil.batch = 8
        distil.candidates = 12
        distil.eval_every = 3
        precision = "fp32"
        [student]
        backbone = "{backbone}"
        document_max_length = 48
        feature_dim = 24
        [data]
        folder = "{dataset}"
        dev_documents = 40
    """)
    return read_recipe(path, {key.replace("__", "."): str(value) for key, value in overrides.items()})


@pytest.fixture
def drawn() -> None:
    """Runs draw their curves."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes a second, as long as a run of these."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("d2llm.train.run_log.draw_curves", lambda *_: None)


STACK = {"teacher.members": '["cosine", "late-interaction", "bm25"]', "teacher.calibration_queries": 20}


@pytest.mark.parametrize(
    ("tuning", "overrides"),
    [
        ("frozen", {"recall.steps": 0}),
        ("lora", {}),
        ("full", {}),
        ("lora", {"distil.backbone": "live", "distil.held_apart": 0}),
        ("lora", {**STACK, "preset": "paper"}),
        ("lora", {**STACK, "preset": "official", "gradient_checkpointing": "true"}),
    ],
    ids=["frozen", "lora", "full", "lora-live", "paper", "official"],
)
def test_a_run_leaves_a_student_that_ranks_no_worse_on_dev_than_before_distillation(
    tmp_path: Path, dataset: Path, tiny_bert: Path, tuning: str, overrides: dict[str, object]
) -> None:
    settings = recipe(tmp_path, dataset, tiny_bert, student__tuning=tuning, **overrides)
    result = train(settings, tmp_path / "student")
    if settings.student.start == "mean":  # in the paper's form the score does not start as the cosine
        assert result.dev["student by IEM"] >= result.dev["before distillation by cosine"]
    loaded = Student.load(tmp_path / "student")
    texts = SENTENCES[:5]
    for ours, theirs in zip(result.student.encode(texts, "query"), loaded.eval().encode(texts, "query"), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert loaded.provenance["dev"] == result.dev


def test_the_same_seed_gives_the_same_student_and_another_seed_another(
    tmp_path: Path, dataset: Path, tiny_bert: Path
) -> None:
    hashes = []
    for seed in (1, 1, 2):
        result = train(recipe(tmp_path, dataset, tiny_bert, seed=seed, student__tuning="full"))
        hashes.append(result.student.weights_sha256())
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_frozen_run_leaves_the_backbone_untouched(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    before = Student.create(StudentConfig(backbone=str(tiny_bert), tuning="frozen")).backbone.state_dict()
    after = train(recipe(tmp_path, dataset, tiny_bert, student__tuning="frozen", recall__steps=0)).student
    for name, value in after.backbone.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_teacher_that_ranks_no_better_is_found_out(
    tmp_path: Path, dataset: Path, tiny_bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stack of the cosine alone orders candidates as the cosine does."""
    settings = recipe(
        tmp_path, dataset, tiny_bert, student__tuning="frozen", recall__steps=0, teacher__members='["cosine"]'
    )
    result = train(settings)
    assert result.dev["teacher"] <= result.dev["before distillation by cosine"]
    assert not result.taught
    assert "it has nothing to teach" in caplog.text


def test_an_existing_student_is_not_overwritten(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "precious").write_text("kept")
    settings = recipe(tmp_path, dataset, tiny_bert, distil__steps=1, recall__steps=1)
    with pytest.raises(ModelError, match="exists already"):
        train(settings, tmp_path / "student")
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["precious"]


def test_a_data_folder_without_positives_is_refused(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / name).write_text((dataset / name).read_text())
    (tmp_path / "qrels").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    with pytest.raises(DataError, match="no query with a positive passage"):
        train(recipe(tmp_path, tmp_path, tiny_bert))


def test_too_few_negatives_are_named_with_the_way_out(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    given = recipe(tmp_path, dataset, tiny_bert, distil__mining="given", data__examples=tuples(tmp_path, 3))
    with pytest.raises(DataError, match=r"no query has 7 hard negatives: lower distil\.negatives, or have more mined"):
        train(given, tmp_path / "student")
    assert not (tmp_path / "student.run").exists(), "the first stage began"


def test_what_does_not_suit_the_backbone_is_said_before_the_data_is_read(
    tmp_path: Path, dataset: Path, tiny_bert: Path
) -> None:
    for key, name in (("student__document_max_length", "document_max_length"), ("teacher__max_length", "max_length")):
        wrong = recipe(tmp_path, tmp_path / "nowhere", tiny_bert, teacher__members='["cross-encoder"]', **{key: 513})
        with pytest.raises(ArgumentError, match=f"{name} = 513 is more than the 512 tokens"):
            train(wrong, tmp_path / "student")


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    wild = recipe(tmp_path, dataset, tiny_bert, lr__backbone=1e30, student__tuning="full")
    with pytest.raises(DivergedError, match=r"the loss is nan at step \d \(recall nan\): lower the learning rates"):
        train(wild, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_plain_bi_encoder_is_a_run_without_distillation(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    plain = {"distil.held_apart": 0.0, "distil.steps": 0, "student__interaction": "cosine", "student__tuning": "full"}
    result = train(recipe(tmp_path, dataset, tiny_bert, **plain), str(tmp_path / "student"))
    assert (
        result.dev["student by IEM"] == result.dev["student by cosine"] == result.dev["before distillation by cosine"]
    )
    assert {e["stage"] for e in read_log(tmp_path / "student" / "log.jsonl") if "loss" in e} == {"encoder"}


def test_a_stack_without_queries_to_weigh_it_is_refused(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    with pytest.raises(DataError, match=r"no query is left to weigh .* raise teacher\.calibration_queries"):
        train(recipe(tmp_path, dataset, tiny_bert, recall__steps=1, teacher__calibration_queries=0))


@pytest.mark.parametrize(
    "ablation",
    [
        {"loss__contrastive_imitation": 0.0, "loss__contrastive": 1.0},
        {"loss__rank_imitation_ph": 0.0},
        {"loss__rank_imitation_hi": 0.0},
        {"student__pooling": "mean"},
        {"student__pooling": "last"},
        {"student__interaction": "cosine", "loss__recall": 1.0},
    ],
    ids=["-CI+CL", "-RI_PH", "-RI_HI", "PMA to mean", "PMA to EOS", "IEM to cosine"],
)
def test_each_ablation_of_the_paper_is_a_flag_and_trains(
    tmp_path: Path, dataset: Path, tiny_bert: Path, ablation: dict[str, object]
) -> None:
    settings = recipe(
        tmp_path, dataset, tiny_bert, student__tuning="lora", recall__steps=1, distil__steps=2,
        **{**STACK, "preset": "paper", **ablation},
    )  # fmt: skip
    train(settings, tmp_path / "student")
    terms = (
        read_log(tmp_path / "student" / "log.jsonl")[-1].keys()
        | read_log(tmp_path / "student" / "log.jsonl")[-2].keys()
    )
    for key, weight in ablation.items():
        if key.startswith("loss__"):
            assert (key.removeprefix("loss__") in terms) == (weight != 0.0)


# -- a run that is interrupted, watched, or shared -----------------------------------------------------------------


def losses_of(folder: Path) -> dict[tuple[str, int], float]:
    return {(e["stage"], e["step"]): e["loss"] for e in read_log(folder / "log.jsonl") if "loss" in e}


RESUMED = {"save_every": 2, "student__tuning": "full", "distil.backbone": "live", "student__document_max_length": 48}


@pytest.mark.parametrize("reached", [("encoder", 3), ("distillation", 4)], ids=["first stage", "second stage"])
def test_a_killed_run_goes_on_with_the_losses_it_would_have_had(
    tmp_path: Path, dataset: Path, tiny_bert: Path, reached: tuple[str, int]
) -> None:
    settings = recipe(tmp_path, dataset, tiny_bert, **RESUMED)
    train(settings, tmp_path / "whole")
    overrides = [f"--set={key.replace('__', '.')}={value}" for key, value in RESUMED.items()]
    process = processes.start("train", "recipe.toml", "student", "--json", *overrides, folder=tmp_path)
    while reached not in (losses_of(tmp_path / "student.run") if (tmp_path / "student.run/log.jsonl").exists() else {}):
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "student").exists()
    resumed = train(settings, tmp_path / "student")
    # Token states are kept in fp16: a last bit that falls the other way is seen at 1e-4.
    assert losses_of(tmp_path / "student") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-3)
    assert len(losses_of(tmp_path / "student")) == settings.recall.steps + settings.distil.steps
    whole = Student.load(tmp_path / "whole")
    for name, value in resumed.student.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "student.run").exists()


def test_a_run_that_ends_between_the_stages_goes_on_with_the_losses_it_would_have_had(
    tmp_path: Path, dataset: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage leaves gradients on the pooling, which it does not train. They are no part of the second one."""
    settings = recipe(tmp_path, dataset, tiny_bert, precision="fp32")
    train(settings, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("d2llm.train.trainer.distil", interrupted)
        train(settings, tmp_path / "student")
    train(settings, tmp_path / "student")
    assert losses_of(tmp_path / "student") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-6)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_goes_on_stands_in_tensorboard_once(tmp_path: Path) -> None:
    """Killed after step 5, of which the checkpoint is step 3; then killed again in the second stage."""
    killed = RunLog(tmp_path, encoder_steps=6)
    killed.rewind("encoder", -1)
    for step in range(6):
        killed.write("encoder", step, {"loss": 10.0 + step})
    killed.close()  # so that all of it is on disk
    again = RunLog(tmp_path, encoder_steps=6)
    again.rewind("encoder", 3)
    for step in (4, 5, 6):
        again.write("encoder", step, {"loss": 20.0 + step})
    again.rewind("distillation", -1)
    for step in range(3):
        again.write("distillation", step, {"loss": 30.0 + step, "dev": 0.5})
    again.close()
    last = RunLog(tmp_path, encoder_steps=6)
    last.rewind("distillation", 1)
    last.write("distillation", 2, {"loss": 42.0, "dev": 0.75})
    last.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=False).Reload()
    found = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    encoder = [10.0, 11.0, 12.0, 13.0, 24.0, 25.0, 26.0]
    assert found == {
        "encoder/loss": list(enumerate(encoder)),
        "distillation/loss": [(6, 30.0), (7, 31.0), (8, 42.0)],
        "distillation/dev": [(6, 0.5), (7, 0.5), (8, 0.75)],
    }
    assert [event["loss"] for event in read_log(tmp_path / "log.jsonl")] == [*encoder, 30.0, 31.0, 42.0]


def test_an_unfinished_run_of_another_recipe_is_not_continued(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    Checkpoint(tmp_path / "student.run", asdict(recipe(tmp_path, dataset, tiny_bert, seed=1))).save({})
    with pytest.raises(
        DataError, match=r"unfinished run with seed = 1, this one has 2: continue with the former settings"
    ):
        train(recipe(tmp_path, dataset, tiny_bert, seed=2), tmp_path / "student")


def test_an_unfinished_run_on_other_data_is_not_continued(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    copied = shutil.copytree(dataset, tmp_path / "data")
    other = load_backbone(str(tiny_bert))
    before = with_digests(recipe(tmp_path, copied, tiny_bert), other)
    Checkpoint(tmp_path / "student.run", before).save({})
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    with pytest.raises(DataError, match=r"unfinished run with sha256.student.backbone = '\w+', this one has '"):
        Checkpoint(tmp_path / "student.run", with_digests(recipe(tmp_path, copied, tiny_bert), other))
    with open(copied / "corpus.jsonl", "a", encoding="utf-8") as file:
        file.write('{"_id": "one more", "text": "One more document."}\n')
    with pytest.raises(DataError, match=r"unfinished run with sha256.data.folder/corpus.jsonl = '\w+', this one has '"):
        train(recipe(tmp_path, copied, tiny_bert), tmp_path / "student")


def test_an_unfinished_run_with_a_teacher_that_has_changed_is_not_continued(
    tmp_path: Path, dataset: Path, tiny_bert: Path, minilm: Path
) -> None:
    members = {"teacher__members": '["cosine", "bi-encoder"]', "teacher__bi_encoders": f'["{tiny_bert}"]'}
    settings = recipe(tmp_path, dataset, tiny_bert, student__tuning="frozen", recall__steps=0, **members)
    before = Checkpoint(tmp_path / "student.run", with_digests(settings, load_backbone(str(tiny_bert))))
    before.add_digest("teacher", own_weights(BiEncoderTeacher(load_bi_encoder(str(minilm)), None)))
    before.save({})
    with pytest.raises(DataError, match=r"unfinished run with sha256.teacher = '\w+', this one has '\w+': continue"):
        train(settings, tmp_path / "student")


@pytest.mark.parametrize("name", ["", "notes.txt", "README.md"])
def test_what_somebody_else_keeps_where_a_run_would_be_is_not_touched(name: str, tmp_path: Path) -> None:
    theirs = tmp_path / "student.run" / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("mine")
    if name:
        (tmp_path / "student.run" / "tensorboard").mkdir()  # other programs have one too
    with pytest.raises(OutputExistsError, match=r"student.run exists already, and is not an unfinished run.*rename it"):
        Checkpoint(tmp_path / "student.run", {"seed": 1})
    assert theirs.read_text() == "mine"


@pytest.mark.parametrize("left", ["recipe.json", "log.jsonl", "tensorboard", "backbone.dev.run", None])
def test_what_a_killed_run_left_is_continued(left: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "student.run"
    folder.mkdir()
    if left is not None:
        (folder / left).write_text('{"seed": 1}')
    Checkpoint(folder, {"seed": 1}).remove()
    assert not folder.exists()


def test_a_disk_without_room_for_a_state_is_named(tmp_path: Path) -> None:
    here, there = processes.FORKS.Pipe()
    process = processes.FORKS.Process(target=save_without_room, args=(tmp_path / "student.run", there), daemon=True)
    process.start()
    assert f"File too large: '{tmp_path / 'student.run' / 'state.pt'}'" in here.recv()
    process.join()
    assert Checkpoint(tmp_path / "student.run", {"seed": 1}).load() == {"step": 1}, "the state before is whole"


def save_without_room(folder: Path, said: Connection) -> None:
    """Save a state, and one for which there is no room. The limit of a file stands for that of a disk."""
    checkpoint = Checkpoint(folder, {"seed": 1})
    checkpoint.save({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    with pytest.raises(OSError) as error:
        checkpoint.save({"weights": torch.zeros(2**18)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said.send(str(error.value))


def test_what_somebody_else_puts_into_a_run_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint(tmp_path / "student.run", {"seed": 1})
    checkpoint.save({})
    notes = tmp_path / "student.run" / "notes.txt"
    notes.write_text("mine")
    checkpoint.remove()
    assert [*(tmp_path / "student.run").iterdir()] == [notes]
    assert "student.run is kept: it holds files that the run did not write" in caplog.text


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "student.run", {"seed": 1}).save({})
    (tmp_path / "student.run" / "state.pt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"student.run is damaged: state.pt \(EOFError\).*Remove the folder"):
        Checkpoint(tmp_path / "student.run", {"seed": 1}).load()


def test_an_unfinished_run_of_another_version_is_not_continued(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "student.run", {"seed": 1, "encoder_steps": 3}).save({})
    named = r"unfinished run of another version of d2llm, whose recipes differ in encoder_steps: finish it with that"
    with pytest.raises(DataError, match=named):
        Checkpoint(tmp_path / "student.run", {"seed": 1, "recall": {"steps": 3}})


def test_an_unfinished_run_of_the_last_release_is_continued(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    """Its recipe has keys that are grouped into tables now."""
    settings = recipe(tmp_path, dataset, tiny_bert)
    old = asdict(settings)
    for key, (table, name) in {key: new.split(".") for key, new in OLD_KEYS.items()}.items():
        old[key] = old[table].pop(name)
    Checkpoint(tmp_path / "student.run", old).save({"stage": "encoder", "step": 2})
    reached = Checkpoint(tmp_path / "student.run", asdict(settings), OLD_KEYS).load()
    assert reached == {"stage": "encoder", "step": 2}


def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run", {"seed": 1})
    checkpoint.save({"step": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"step": 2, "weights": torch.zeros(1000), "last": lambda: None})
    assert Checkpoint(tmp_path / "run", {"seed": 1}).load() == {"step": 1}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock", "recipe.json", "state.pt"]


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    """From before its first step, and until it ends, however it ends."""
    folder, settings = tmp_path / "student.run", recipe(tmp_path, dataset, tiny_bert)
    early = Checkpoint(folder, {"seed": 1})  # it began when nobody was there
    here, there = processes.FORKS.Pipe()
    other = processes.FORKS.Process(target=hold, args=(folder, there), daemon=True)
    other.start()
    assert here.recv() == "held"
    before = sorted(folder.iterdir())
    verbs: list[Callable[[], object]] = [
        lambda: train(settings, tmp_path / "student"),
        lambda: early.save({"step": 1}),
    ]
    for verb in verbs:
        with pytest.raises(DataError, match=r"student.run is in use: another process is at this run. Wait for it"):
            verb()
    assert sorted(folder.iterdir()) == before
    other.kill()
    other.join()
    early.save({"step": 1})
    assert Checkpoint(folder, {"seed": 1}).load() == {"step": 1}
    early.remove()
    assert not folder.exists()


def hold(folder: Path, said: Connection) -> None:
    """Hold a run until the process is killed."""
    checkpoint = Checkpoint(folder, {"seed": 1})
    checkpoint.hold()
    said.send("held")
    said.recv()


@pytest.mark.parametrize("name", ["recipe.json", "state.pt", "encoder.pt"])
def test_a_damaged_checkpoint_is_named(name: str, tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    settings = recipe(tmp_path, dataset, tiny_bert)
    checkpoint = Checkpoint(tmp_path / "student.run", asdict(settings))
    checkpoint.save({"stage": "encoder", "step": 2})
    if name == "encoder.pt":
        checkpoint.save({}, name)
    file = tmp_path / "student.run" / name
    file.write_bytes(file.read_bytes()[:20])
    named = rf"(?s)student\.run is damaged: {name} \(.*Remove the folder to start anew"
    with pytest.raises(ModelError, match=named):
        train(settings, tmp_path / "student")


def test_a_run_that_failed_before_it_began_stands_in_nobodys_way(
    tmp_path: Path, dataset: Path, tiny_bert: Path
) -> None:
    with pytest.raises(DataError, match="nowhere: not a folder"):
        train(recipe(tmp_path, tmp_path / "nowhere", tiny_bert), tmp_path / "student")
    assert not (tmp_path / "student.run").exists()
    train(recipe(tmp_path, dataset, tiny_bert, recall__steps=1, distil__steps=1), tmp_path / "student")


def test_two_processes_share_each_batch_and_agree_on_every_weight(
    tmp_path: Path, dataset: Path, tiny_bert: Path
) -> None:
    recipe(tmp_path, dataset, tiny_bert)
    script = tmp_path / "share.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom accelerate import PartialState\n"
        "from d2llm.train import read_recipe, train\n"
        "result = train(read_recipe(Path('recipe.toml'), {'student.tuning': 'full'}), Path('student'))\n"
        "Path(f'digest{PartialState().process_index}').write_text(result.student.weights_sha256())\n"
    )
    # What `accelerate launch` starts; its own command wants MPI where there are processors alone.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    subprocess.run(launch, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "digest0").read_text() == (tmp_path / "digest1").read_text()
    assert Student.load(tmp_path / "student").weights_sha256() == (tmp_path / "digest0").read_text()
    alone = train(recipe(tmp_path, dataset, tiny_bert, student__tuning="full")).student.weights_sha256()
    assert alone != (tmp_path / "digest0").read_text(), "each process took the whole batch"


@pytest.mark.usefixtures("drawn")
def test_a_run_leaves_a_log_curves_and_a_card(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    result = train(recipe(tmp_path, dataset, tiny_bert, student__tuning="full"), tmp_path / "student")
    events = read_log(tmp_path / "student" / "log.jsonl")
    assert [e["step"] for e in events if "loss" in e] == 2 * list(range(1, 7))
    assert [e["step"] for e in events if "dev student by IEM" in e] == [0, 3, 6]
    assert (tmp_path / "student" / "curves.png").read_bytes().startswith(b"\x89PNG")
    dev = RetrievalData.load(dataset, "dev")
    ranking = read_run(tmp_path / "student" / "teacher.dev.run", dev)
    assert evaluate(ranking, dev.qrels)["nDCG@10"] == pytest.approx(result.dev["teacher on the student's candidates"])
    untrained = evaluate(read_run(tmp_path / "student" / "backbone.dev.run", dev), dev.qrels)["nDCG@10"]
    assert untrained == pytest.approx(events[0]["dev backbone by cosine"])
    card = (tmp_path / "student" / "README.md").read_text()
    for said in (
        dataset.name,
        "cosine + late-interaction + bm25",
        f"| student by IEM | {result.dev['student by IEM']:.4f} |",
    ):
        assert said in card


def test_without_a_first_stage_the_untrained_backbone_is_measured_all_the_same(
    tmp_path: Path, dataset: Path, tiny_bert: Path
) -> None:
    settings = recipe(tmp_path, dataset, tiny_bert, student__tuning="frozen", recall__steps=0, distil__steps=2)
    result = train(settings, tmp_path / "student")
    dev = RetrievalData.load(dataset, "dev")
    untrained = evaluate(read_run(tmp_path / "student" / "backbone.dev.run", dev), dev.qrels)["nDCG@10"]
    assert untrained == pytest.approx(read_log(tmp_path / "student" / "log.jsonl")[0]["dev backbone by cosine"])
    assert untrained == pytest.approx(result.dev["before distillation by cosine"]), "nothing was trained in between"


# -- judged pairs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """How much two texts have in common, as the share of words that the second took from the first."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rng, rows = random.Random(0), []
    for index, text in enumerate(list(dict.fromkeys(SENTENCES))[:100]):
        words, others = text.split()[:8], SENTENCES[(index + 50) % 100].split()
        shared = index % 5
        second = rng.sample(words, min(2 * shared, len(words))) + others[: 8 - 2 * shared]
        rows.append({"text_a": " ".join(words), "text_b": " ".join(second), "score": shared})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_alone_train_the_symmetric_branch(tmp_path: Path, dataset: Path, tiny_bert: Path, pairs: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f"""
        recall.steps = 0
        distil.steps = 40
        distil.eval_every = 20
        lr.iem = 5e-3
        [student]
        backbone = "{tiny_bert}"
        tuning = "frozen"
        [data]
        pairs = ["{pairs}"]
        dev_pairs = "{pairs}"
    """)
    result = train(read_recipe(path), tmp_path / "student")
    assert result.teacher is None
    assert result.dev["student by IEM, pairs"] > result.dev["before distillation by IEM, pairs"] + 0.02


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whether the second text follows from the first: it does if it leaves words out, not if it adds some."""
    path, rows = tmp_path_factory.mktemp("labelled") / "labelled.jsonl", []
    for index, text in enumerate(list(dict.fromkeys(SENTENCES))[:100]):
        whole, part = " ".join(text.split()[:10]), " ".join(text.split()[:4])
        first, second, label = (whole, part, True) if index % 2 else (part, whole, False)
        rows.append({"text_a": first, "text_b": second, "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled_recipe(pairs: Path, backbone: Path, **overrides: object) -> Recipe:
    values = {"data.pairs": f'["{pairs}"]', "data.dev_pairs": pairs, "student.backbone": backbone, "distil.steps": 60,
              "distil.eval_every": 60, "data.pairs_batch": 32, "student.feature_dim": 32}  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return read_recipe("pairs", {key: str(value) for key, value in values.items()})


def test_labelled_pairs_teach_a_direction_which_the_cosine_cannot_tell(
    tmp_path: Path, tiny_bert: Path, labelled: Path
) -> None:
    result = train(labelled_recipe(labelled, tiny_bert), tmp_path / "student")
    assert result.dev["student by cosine, pairs"] < 0.7
    assert result.dev["student by IEM, pairs"] > 0.95
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    first = result.student.encode([row["text_a"] for row in rows], "query")
    second = result.student.encode([row["text_b"] for row in rows], "document")
    with torch.inference_mode():
        scores_N, _ = score_pairs(result.student.iem, first, second)
    right = sum((score > 0) == row["label"] for score, row in zip(scores_N.tolist(), rows, strict=True))
    assert right > 90, "the scores are log-odds: 0 tells the labels apart"


def test_the_first_step_of_labelled_pairs_is_no_worse_than_guessing(
    tiny_bert: Path, labelled: Path, tmp_path: Path
) -> None:
    train(labelled_recipe(labelled, tiny_bert, distil__steps=1), tmp_path / "student")
    first = next(entry for entry in read_log(tmp_path / "student" / "log.jsonl") if "loss" in entry)
    assert first["loss"] < math.log(2) + 0.15, "without calibration the scaled cosine is taken for log-odds"


def test_without_the_mlp_labelled_pairs_train_the_cosine(tiny_bert: Path, labelled: Path) -> None:
    result = train(labelled_recipe(labelled, tiny_bert, student__interaction="cosine", distil__steps=2))
    assert result.dev.keys() >= {"student by cosine, pairs"}


@pytest.mark.parametrize(
    ("judgement", "found"),
    [({"label": "entailment"}, r"the same label \(entailment\)"), ({"label": 0}, r"the same label \(no entailment\)"),
     ({"score": 2.5}, "the score 2.5")],
)  # fmt: skip
def test_pairs_of_one_judgement_are_refused(
    tmp_path: Path, tiny_bert: Path, judgement: dict[str, object], found: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text_a": text, "text_b": text, **judgement}) + "\n" for text in "ab"))
    with pytest.raises(DataError, match=rf"pairs\.jsonl: all 2 pairs have {found}, so there is nothing to tell apart"):
        train(labelled_recipe(path, tiny_bert))


def test_retrieval_and_pairs_train_one_student(tmp_path: Path, dataset: Path, tiny_bert: Path, pairs: Path) -> None:
    settings = recipe(tmp_path, dataset, tiny_bert, data__pairs=f'["{pairs}"]', data__dev_pairs=str(pairs))
    result = train(settings, tmp_path / "student")
    assert {"student by IEM", "student by IEM, pairs", "teacher"} <= result.dev.keys()
    terms = [e for e in read_log(tmp_path / "student" / "log.jsonl") if "loss" in e]
    assert all("pairs" in e for e in terms) and "recall" in terms[0] and "listwise_imitation" in terms[-1]


def tuples(folder: Path, negatives: int) -> Path:
    """Forty training tuples with that many negatives each."""
    texts = list(dict.fromkeys(SENTENCES))[:40]
    rows = [Example(" ".join(t.split()[1:6]), [t], [n for n in texts if n != t][:negatives]) for t in texts]
    write_examples(folder / "tuples.jsonl", rows)
    return folder / "tuples.jsonl"


def test_mined_tuples_take_the_place_of_the_train_split(tmp_path: Path, dataset: Path, tiny_bert: Path) -> None:
    settings = recipe(tmp_path, dataset, tiny_bert, data__examples=tuples(tmp_path, 12), distil__mining="given")
    assert train(settings).dev.keys() >= {"teacher", "student by IEM"}


# -- the recipes that are shipped -----------------------------------------------------------------------------------


RECIPES = Path(__file__).parent.parent / "train" / "recipes"
SHORTER = {"recall.steps": "2", "recall.batch": "8", "distil.steps": "2", "distil.batch": "8", "distil.eval_every": "1",
           "distil.candidates": "20", "precision": "fp32", "data.dev_queries": "10", "data.dev_documents": "20",
           "student.document_max_length": "48"}  # fmt: skip


@pytest.mark.parametrize("name", sorted({path.stem for path in RECIPES.glob("*.toml")} - {"pairs"}))
def test_a_shipped_recipe_runs_with_small_models_of_its_kind(
    tmp_path: Path, dataset: Path, tiny_qwen3: Path, tiny_bert: Path, tiny_llm: Path, name: str
) -> None:
    backbone = tiny_bert if name == "minilm" else tiny_qwen3
    overrides = {**SHORTER, "student.backbone": str(backbone), "data.folder": str(dataset)}
    if name == "paper-7b":  # 32 heads are too many for a width of 64
        tuples = tmp_path / "tuples.jsonl"
        data = RetrievalData.load(dataset, "train")
        corpus = [document.content for document in data.documents.values()]
        write_examples(tuples, mine(examples_of(data), corpus, [Bm25(corpus).rank], negatives=8).examples)
        overrides |= {"student.pma_heads": "4", "data.examples": str(tuples), "recall.steps": "0"}
    taught = name in ("paper-7b", "qwen3-0.6b")  # by an LLM
    if taught:
        overrides |= {"teacher.model": str(tiny_llm), "teacher.cache": str(tmp_path / "cache")}
    settings = read_recipe(RECIPES / f"{name}.toml", overrides)
    result = train(settings, tmp_path / "student")
    assert result.dev.keys() >= {"teacher", "student by cosine", "student by IEM"}
    config = Student.load(tmp_path / "student").config
    assert config.layouts()[1].bytes <= config.feature_bytes  # the corpus divided them
    assert config == replace(settings.student, lexical_slots=config.lexical_slots, vectors=config.vectors)
    if taught:
        assert isinstance(result.teacher, Cached) and result.teacher.misses > 0
        again = train(settings, tmp_path / "again")
        assert isinstance(again.teacher, Cached) and again.teacher.hits > 0
        if name == "paper-7b":
            assert again.teacher.misses == 0, "the cache was there to be used"


# -- teachers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tiny_bert: Path) -> Student:
    return Student.create(StudentConfig(backbone=str(tiny_bert), tuning="frozen")).eval()


def test_late_interaction_is_the_mean_of_each_query_tokens_best_cosine(student: Student) -> None:
    query, passages = "return the median", SENTENCES[:3]
    found = LateInteraction(TokenStates(student, None)).judge(query, passages).log_odds_K
    states = TokenStates(student, None)
    for passage, score in zip(passages, found.tolist(), strict=True):
        best = []
        for q in states.of(query, "query"):
            cosines = [float(q @ p / (q.norm() * p.norm())) for p in states.of(passage, "document")]
            best.append(max(cosines))
        assert score == pytest.approx(sum(best) / len(best), abs=1e-4)


def test_token_states_do_not_depend_on_what_else_is_in_the_batch(student: Student) -> None:
    together, alone = TokenStates(student, None), TokenStates(student, None)
    together.compute(SENTENCES[:40], "document")
    for text in SENTENCES[:3]:
        torch.testing.assert_close(together.of(text, "document"), alone.of(text, "document"), rtol=0, atol=2e-3)


def test_token_states_are_free_of_dropout_and_leave_the_student_as_it_was(student: Student) -> None:
    student.train()
    states = TokenStates(student, None)
    states.compute(SENTENCES[:4], "document")
    assert student.training
    student.eval()
    again = TokenStates(student, None)
    again.compute(SENTENCES[:4], "document")
    for text in SENTENCES[:4]:
        torch.testing.assert_close(states.of(text, "document"), again.of(text, "document"), rtol=0, atol=0)


def test_token_states_of_a_text_are_computed_once_for_both_sides(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, rows = TokenStates(student, None), 0
    tokens = student.tokens

    def counted(ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        nonlocal rows
        rows += len(ids_BL)
        return tokens(ids_BL, mask_BL)

    monkeypatch.setattr(student, "tokens", counted)
    texts = ["one", "two words"]
    for side in ("query", "document"):
        states.compute(texts, side)
    assert rows == 2
    torch.testing.assert_close(states.of("one", "query"), states.of("one", "document"), rtol=0, atol=0)


def test_a_stack_trusts_the_member_that_knows() -> None:
    class Knowing:
        def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
            return Judgement(torch.tensor([float(query in text) for text in candidates]))

    class Guessing:
        def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
            return Judgement(torch.tensor([float(len(text) % 7) for text in candidates]))

    examples = [
        Example(t.split()[0], [t], [s for s in SENTENCES[40:50] if t.split()[0] not in s]) for t in SENTENCES[:30]
    ]
    stack = Stack({"guessing": Guessing(), "knowing": Knowing()})
    stack.fit(examples)
    assert stack.weights[1] > 5 * abs(stack.weights[0])
    assert stack.judge("median", ["the median of data", "something else"]).log_odds_K.diff() < 0


def test_another_bi_encoder_teaches_by_its_cosine(tmp_path: Path, dataset: Path, tiny_bert: Path, minilm: Path) -> None:
    student = load_bi_encoder(str(minilm))
    texts = SENTENCES[:4]
    found = BiEncoderTeacher(student, None).judge("median of data", texts).log_odds_K
    query, passages = student.encode(["median of data"], "query"), student.encode(texts, "document")
    torch.testing.assert_close(found, passages.vectors_BE @ query.vectors_BE[0], rtol=0, atol=1e-5)
    members = {"teacher__members": '["cosine", "bi-encoder"]', "teacher__bi_encoders": f'["{minilm}"]'}
    result = train(recipe(tmp_path, dataset, tiny_bert, student__tuning="frozen", recall__steps=0, **members))
    assert result.dev["teacher"] > result.dev["before distillation by cosine"] + 0.1, "MiniLM knows more than chance"
    with pytest.raises(DataError, match=r"'bi-encoder' when teacher\.bi_encoders names some"):
        recipe(tmp_path, dataset, tiny_bert, teacher__members='["bi-encoder"]')


def test_standardise_of_equal_scores_is_zero_not_nan() -> None:
    assert standardise(torch.full((4,), 3.3)).tolist() == [0, 0, 0, 0]


def test_the_lexical_teacher_gives_bm25_scores(student: Student) -> None:
    corpus = SENTENCES[:30]
    bm25 = Bm25(corpus)
    scores = Bm25Teacher(bm25, corpus).judge("median of data", [corpus[7], corpus[3]]).log_odds_K
    assert scores.tolist() == pytest.approx([bm25.scores("median of data")[7], bm25.scores("median of data")[3]])


def test_a_cross_encoder_learns_to_put_the_positive_first(tiny_bert: Path) -> None:
    torch.manual_seed(0)
    student = Student.create(StudentConfig(backbone=str(tiny_bert), tuning="frozen"))
    texts = list(dict.fromkeys(SENTENCES))[:16]
    examples = [Example(" ".join(t.split()[:6]), [t], [s for s in texts if s != t][:7]) for t in texts[:8]]

    def first(teacher: BackboneCrossEncoder) -> float:
        scores = [teacher.judge(e.query, [*e.positives, *e.negatives]).log_odds_K for e in examples]
        return sum(float(row.log_softmax(0)[0]) for row in scores) / len(scores)

    teacher = BackboneCrossEncoder(student, 64, None)
    before = first(teacher)
    teacher.fit(examples, steps=30, batch=8, negatives=5, seed=0)
    assert first(teacher) > before + 0.1


def test_a_cross_encoder_reads_all_of_the_shorter_text(student: Student) -> None:
    teacher = BackboneCrossEncoder(student, 24, None)
    long, short = "one two three " * 50, "what is the median of data"

    def score(query: str, passage: str) -> float:
        return float(teacher.judge(query, [passage]).log_odds_K[0])

    assert score(short, long) == score(short, long + "and a tail that is cut")
    assert score(short, long) != score(short + " sets", long)
    assert score(long, short) == score(long + "and a tail that is cut", short)
    assert score(long, short) != score(long, short + " sets")


def test_a_cross_encoder_starts_from_merged_lora(tiny_bert: Path) -> None:
    student = Student.create(StudentConfig(backbone=str(tiny_bert), tuning="lora"))
    plain = BackboneCrossEncoder(student, 64, None).judge("median", SENTENCES[:4]).log_odds_K
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    adapted = BackboneCrossEncoder(student, 64, None).judge("median", SENTENCES[:4]).log_odds_K
    assert (adapted - plain).abs().max() > 1e-3
    assert any("lora_" in name for name, _ in student.named_parameters())  # the student itself stays unmerged


class Cosine(torch.nn.Module):
    """An IEM that gives back the cosine, backwards."""

    def forward(self, query_QH: Tensor, passage_QKH: Tensor, cosine_QK: Tensor, task_Q: Tensor) -> Tensor:
        assert passage_QKH.shape[:2] == cosine_QK.shape
        return -cosine_QK


def test_dev_is_measured_without_the_document_that_is_the_query() -> None:
    count = RERANKED + 20
    ids = [f"d{i}" for i in range(count)]
    documents = {id_: Document(id_, "text") for id_ in ids}
    queries = {id_: "x" for id_ in ("d0", "d1", "q2")}
    qrels = {"d0": {"d5": 1}, "d1": {"d1": 1}, "q2": {"d2": 1}}
    torch.manual_seed(0)
    vectors_NE = torch.nn.functional.normalize(torch.randn(count, 8), dim=1)
    passages, asked = Encoded(vectors_NE, vectors_NE, vectors_NE), Encoded(*[vectors_NE[:3]] * 3)
    by_cosine, by_iem, candidates = measure_retrieval(
        Cosine(), RetrievalData(documents, queries, qrels), asked, passages
    )
    for row, query in enumerate(queries):
        order = (vectors_NE @ vectors_NE[row]).argsort(descending=True).tolist()
        assert order[0] == row, "each is nearest to itself"
        expected = [ids[i] for i in order if ids[i] != query or query == "d1"][:RERANKED]
        assert candidates[query] == expected
        for found, ranking in ((by_cosine, expected), (by_iem, expected[::-1])):
            place = ranking.index(next(iter(qrels[query]))) if next(iter(qrels[query])) in ranking else 99
            assert found[row] == pytest.approx(1 / math.log2(place + 2) if place < 10 else 0.0)


def test_dev_is_sampled_with_its_positives() -> None:
    documents = {f"d{i}": Document(f"d{i}", "text") for i in range(100)}
    data = RetrievalData(documents, {f"q{i}": "x" for i in range(20)}, {f"q{i}": {f"d{i}": 1} for i in range(20)})
    small = sample(data, 5, 10, random.Random(0))
    assert len(small.queries) == len(small.qrels) == 5
    assert len(small.documents) == 15
    assert all(d in small.documents for judged in small.qrels.values() for d in judged)
