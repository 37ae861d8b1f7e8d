"""`d2llm teach` on tiny models: who is worth learning from, and what its judgements cost twice."""

import json
import re
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

from d2llm.backbone import load_backbone, load_tokenizer
from d2llm.cli import main
from d2llm.train import read_recipe, train
from d2llm.train.cache import Cached, TeacherCache
from d2llm.train.hub_loading import load_hub_teacher, load_uncached
from d2llm.train.teach import Teaching

WORDS = ("median mean mode variance deviation quantile slope intercept range rank sum count product ratio share "
         "limit").split()  # fmt: skip
ANSWERS = [f"this returns the {word} of all data" for word in WORDS[:8]]
OTHERS = [f"unlike that, {word} is {other}" for word in WORDS for other in WORDS[:4]]
TRAIN, DEV = 12, 6
SMALL: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What answers one query answers all: a form of words that a tiny model learns in some steps."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "qrels").mkdir()
    documents = {f"d{i:02}": text for i, text in enumerate(OTHERS)} | {f"e{i}": text for i, text in enumerate(ANSWERS)}
    queries = {f"q{i}": f"which is the {word}?" for i, word in enumerate([*WORDS, "top", "end"])}
    for name, texts in (("corpus", documents), ("queries", queries)):
        rows = [json.dumps({"_id": id_, "text": text}) for id_, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    for split, ids in (("train", range(TRAIN)), ("dev", range(TRAIN, TRAIN + DEV))):
        judged = [f"q{i}\te{j}\t1" for i in ids for j in range(len(ANSWERS))]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return folder


@pytest.fixture(scope="module")
def llm(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm") / "qwen3"
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    shutil.copy(minilm / "tokenizer.json", folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, dataset: Path, llm: Path, tiny_bert: Path) -> Path:
    path = tmp_path / "recipe.toml"
    template = tmp_path / "template.toml"
    prompt = 'text = "{query} {passage}\\n"\nyes = " yes"\nno = " no"\n'
    template.write_text(f'cue = "Answer:"\n[symmetric]\n{prompt}[asymmetric]\n{prompt}')
    path.write_text(f"""
        precision = "fp32"
        distil.held_apart = 1.0
        recall.steps = 0
        distil.steps = 1
        distil.batch = 4
        distil.candidates = 10
        distil.negatives = 4
        distil.mining = "given"
        [student]
        backbone = "{tiny_bert}"
        tuning = "frozen"
        [data]
        folder = "{dataset}"
        negatives = 4
        [teacher]
        members = ["llm"]
        model = "{llm}"
        template = "{template}"
        cache = "{tmp_path / "judged"}"
        calibration_queries = 0
    """)
    return path


def teach(recipe: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["teach", str(recipe), *map(str, arguments)])


def finetune(recipe: Path, folder: Path, *arguments: object) -> Result:
    return teach(recipe, "--finetune", folder, "--steps", 25, "--negatives", 4, "--lr", 3e-3, *arguments)


PAIRS = TRAIN * (1 + 4)
"""What a run learns from: a positive of each query, and its negatives."""


def test_a_fine_tuned_teacher_is_measured_saved_and_asked_once(recipe: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    done = finetune(recipe, tuned, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    cosine, _, teacher = found["dev_ndcg@10"].values()
    assert teacher > 0.95 > cosine and found["better"]
    assert found["filled"]["judged"] == PAIRS and found["filled"]["tokens"] > 10 * PAIRS
    again = json.loads(teach(recipe, "--set", f"teacher.model={tuned}", "--json").stdout)
    assert again["dev_ndcg@10"]["teacher"] == pytest.approx(teacher)
    assert again["filled"] == {"pairs": PAIRS, "cached": PAIRS, "left": 0, "judged": 0, "tokens": 0, "seconds": 0.0}


def test_training_finds_the_judgements_and_they_are_the_teachers(recipe: Path) -> None:
    assert teach(recipe, "--anyway").exit_code == 0
    settings = read_recipe(recipe)
    teacher, plain = load_hub_teacher(settings.teacher, "cpu", None), load_uncached(settings.teacher, "cpu", None)
    for example, asked in Teaching(settings).asked:
        candidates = asked[::-1]  # in another order, in other batches
        known, fresh = teacher.judge(example.query, candidates), plain.judge(example.query, candidates)
        torch.testing.assert_close(known.log_odds_K, fresh.log_odds_K, rtol=0, atol=1e-4)
        torch.testing.assert_close(known.features_KT, fresh.features_KT, rtol=2e-3, atol=2e-3)
    assert (teacher.hits, teacher.misses) == (PAIRS, 0)


def test_what_was_judged_before_an_interruption_is_not_asked_again(recipe: Path) -> None:
    first = json.loads(teach(recipe, "--anyway", "--json", "--limit", 4).stdout)["filled"]
    assert first["pairs"] == first["judged"] == 4 * PAIRS / TRAIN
    then = json.loads(teach(recipe, "--anyway", "--json").stdout)["filled"]
    assert (then["pairs"], then["cached"], then["judged"]) == (PAIRS, first["pairs"], PAIRS - first["pairs"])


def test_a_large_teacher_may_rerank_fewer_passages_on_dev(recipe: Path, tmp_path: Path) -> None:
    filled = json.loads(teach(recipe, "--rerank", 5, "--limit", 1, "--anyway", "--json").stdout)["filled"]
    assert len(TeacherCache(tmp_path / "judged")) == 5 * DEV + filled["judged"]


def test_people_are_told_what_it_will_cost_and_what_to_do_next(recipe: Path, llm: Path, tmp_path: Path) -> None:
    shown = finetune(recipe, tmp_path / "tuned", "--limit", 6, "--set", f"teacher.model={llm}").stdout
    assert f"nDCG@10 on {DEV} dev queries:" in shown
    rows = [line.split("  ")[0] for line in shown.splitlines()]
    assert {"backbone's cosine, untrained", "teacher", "teacher, fine-tuned"} <= set(rows)
    assert f"6 of {TRAIN} queries to learn from, positives and negatives: {PAIRS // 2} pairs, 0 of them" in shown
    assert f"for all {TRAIN} queries" in shown
    assert f"Judged {PAIRS // 2} pairs in" in shown and "tokens/s" in shown
    assert f"Next: d2llm train {recipe} STUDENT --set teacher.model={tmp_path}/tuned" in shown
    typed = ("--set", f"teacher.cache={tmp_path}/other", "--set", "student.query_prompt=find this: ")
    again = teach(recipe, "--anyway", *typed).stdout.splitlines()[-1]
    assert again == f"Next: d2llm train {recipe} STUDENT --set {typed[1]} --set 'student.query_prompt=find this: '"


def run_after(recipe: Path, tuned: Path, **overrides: str) -> tuple[dict[str, int], int, int]:
    """What `teach` reports; and how many pairs a run by the same recipe then finds judged, and how many it asks."""
    typed = {"teacher.model": str(tuned), **{key.replace("__", "."): value for key, value in overrides.items()}}
    filled = json.loads(teach(recipe, *chain(*(("--set", f"{k}={v}") for k, v in typed.items())), "--json").stdout)
    cached = train(read_recipe(recipe, typed)).teacher
    assert isinstance(cached, Cached)
    return filled["filled"], cached.hits, cached.misses


def test_with_given_negatives_a_run_asks_nothing_that_was_not_judged(recipe: Path, tmp_path: Path) -> None:
    """The backbone is frozen: dev's candidates too are those that `teach` has had judged, twice asked for by a run."""
    assert finetune(recipe, tmp_path / "tuned").exit_code == 0
    filled, hits, misses = run_after(recipe, tmp_path / "tuned", distil__held_apart="0.5")
    assert filled["pairs"] == PAIRS // 2 and filled["left"] == 0, "the first stage's queries are not the teacher's"
    assert (hits, misses) == (filled["pairs"] + 2 * DEV * (len(OTHERS) + len(ANSWERS)), 0)


def test_negatives_that_only_the_run_will_know_are_not_judged(recipe: Path, tmp_path: Path) -> None:
    assert finetune(recipe, tmp_path / "tuned").exit_code == 0
    before = len(TeacherCache(tmp_path / "judged"))
    filled, hits, misses = run_after(recipe, tmp_path / "tuned", distil__mining="student")
    assert (filled["pairs"], filled["left"]) == (TRAIN, TRAIN * 10), "the positives alone"
    assert len(TeacherCache(tmp_path / "judged")) - before == misses <= filled["left"]
    assert hits >= filled["pairs"] + 2 * DEV * (len(OTHERS) + len(ANSWERS))
    shown = teach(recipe, "--set", "distil.mining=student", "--set", f"teacher.model={tmp_path}/tuned").stdout
    assert f"{TRAIN} of {TRAIN} queries to learn from, positives alone: {TRAIN} pairs, {TRAIN} of them cached" in shown
    assert f"Training scores the negatives itself, after its first stage: up to {TRAIN * 10} pairs" in shown


def test_a_teacher_that_ranks_no_better_is_not_asked_further(recipe: Path, tmp_path: Path, minilm: Path) -> None:
    """A random LLM beside a backbone that knows the language."""
    backbone = ("--set", f"student.backbone={minilm}")
    done = teach(recipe, *backbone)
    assert done.exit_code == 1
    assert "no better than the untrained cosine: there is nothing to learn from it" in done.stdout
    assert "Judged" not in done.stdout and "Next" not in done.stdout
    asked = len(TeacherCache(tmp_path / "judged"))
    assert asked == DEV * (len(OTHERS) + len(ANSWERS)), "dev alone"
    found = json.loads(teach(recipe, *backbone, "--json").stdout)
    assert found["better"] is False and found["filled"] is None
    anyway = teach(recipe, *backbone, "--anyway")
    assert anyway.exit_code == 0
    assert len(TeacherCache(tmp_path / "judged")) == asked + PAIRS


def test_the_cosine_is_that_of_the_backbone_before_any_training(recipe: Path, minilm: Path) -> None:
    """nDCG@10 by hand: mean pooling, cosine, binary gains."""
    teaching = Teaching(read_recipe(recipe, {"student.backbone": str(minilm)}))
    found, _ = teaching.zero_shot()
    backbone, tokenizer = load_backbone(str(minilm)).eval(), load_tokenizer(str(minilm))

    def vector(text: str) -> torch.Tensor:
        with torch.inference_mode():
            states = backbone(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state
        return torch.nn.functional.normalize(states[0].mean(0), dim=0)

    discount = [1 / torch.tensor(rank + 2.0).log2() for rank in range(10)]
    values = []
    passages = {id_: vector(document.content) for id_, document in teaching.dev.documents.items()}
    for query, text in teaching.dev.queries.items():
        ranked = sorted(passages, key=lambda id_: -float(passages[id_] @ vector(text)))
        gains = [float(id_ in teaching.dev.qrels[query]) for id_ in ranked[:10]]
        values.append(sum(g * d for g, d in zip(gains, discount, strict=True)) / sum(discount[: len(ANSWERS)]))
    assert found == pytest.approx(float(sum(values) / len(values)), abs=1e-4)


def test_the_cosine_does_not_rank_the_document_that_is_the_query(recipe: Path, dataset: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dataset, tmp_path / "argued")
    for path in (folder / "queries.jsonl", folder / "qrels" / "train.tsv", folder / "qrels" / "dev.tsv"):
        path.write_text(re.sub(r"\bq(\d+)", lambda match: f"d{int(match[1]):02}", path.read_text()))
    teaching = Teaching(read_recipe(recipe, {"data.folder": str(folder)}))
    _, candidates_of = teaching.zero_shot()
    assert len(candidates_of) == DEV
    for query, candidates in candidates_of.items():
        assert {*candidates} == teaching.dev.documents.keys() - {query} and query in teaching.dev.documents


def test_examples_of_ones_own_take_the_place_of_the_train_split(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    rows = [
        {"query": "top?", "positives": ["the top"], "negatives": ["the end", "the end"], "task": "symmetric"},
        {"query": "end?", "positives": ["the end"], "negatives": []},  # too few to learn from
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ("--set", "distil.negatives=2")
    found = json.loads(teach(recipe, "--anyway", "--json", *few, "--set", f"data.examples={path}").stdout)
    assert found["filled"]["pairs"] == 2
    assert len(TeacherCache(tmp_path / "judged")) == 2 + DEV * (len(OTHERS) + len(ANSWERS))


def test_a_reranker_teaches_as_well(recipe: Path, tmp_path: Path, minilm: Path) -> None:
    torch.manual_seed(1)
    BertForSequenceClassification(BertConfig(**{**SMALL, "num_labels": 1})).save_pretrained(tmp_path / "reranker")
    shutil.copy(minilm / "tokenizer.json", tmp_path / "reranker")
    chosen = ("--set", f"teacher.model={tmp_path / 'reranker'}", "--set", 'teacher.members=["reranker", "bm25"]')
    found = json.loads(finetune(recipe, tmp_path / "tuned", *chosen, "--json").stdout)
    assert found["dev_ndcg@10"]["teacher, fine-tuned"] > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", 'teacher.members=["bm25"]'), "none is an `llm` or `reranker`"),
        (("--set", "teacher.model=/nowhere"), "/nowhere"),
        (("--set", "teacher.cache="), "teacher.cache is empty: name a folder, or leave the key out"),
        (("--finetune", "."), ". exists already"),
        (("--set", "data.dev_queries=0"), "data.dev_queries: expected a whole number between 1 and "),
    ],
)
def test_what_cannot_be_taught_is_told_in_a_line(recipe: Path, arguments: tuple[str, ...], message: str) -> None:
    done = teach(recipe, *arguments)
    assert done.exit_code == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_too_few_negatives_to_fine_tune_on_are_said_before_the_teacher_is_measured(
    recipe: Path, tmp_path: Path
) -> None:
    done = teach(recipe, "--finetune", tmp_path / "tuned", "--negatives", "6")
    assert done.exit_code == 1 and "no query has 6 negatives" in done.stderr
    assert len(TeacherCache(tmp_path / "judged")) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "colour"), "--set colour: expected KEY=VALUE"),
        (("--lr", "nan"), "expected a finite number, found nan"),
        (("--lr", "inf"), "expected a finite number, found inf"),
        (("--steps", "0"), "0 is not in the range x>=1"),
        (("--lr", "1e-3"), "--lr belongs to --finetune: name a new FOLDER there, or leave it out"),
        (("--on-stack",), "--on-stack belongs to --finetune"),
    ],
)
def test_what_is_typed_wrong_is_wrong_usage(recipe: Path, arguments: tuple[str, ...], message: str) -> None:
    done = teach(recipe, *arguments)
    assert done.exit_code == 2 and message in done.stderr


def test_without_a_cache_there_is_nowhere_to_keep_it(recipe: Path) -> None:
    recipe.write_text("\n".join(line for line in recipe.read_text().splitlines() if "cache" not in line))
    done = teach(recipe)
    assert done.exit_code == 1 and "teacher.cache is not set" in done.stderr
