"""`d2llm teach --finetune` as a run: what it learns, where it starts, what a kill costs, and what its folder holds."""

import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

from d2llm.bm25 import Bm25
from d2llm.cli import main
from d2llm.embedder import create_student
from d2llm.errors import DataError, MismatchError, ModelError
from d2llm.train import read_recipe, train
from d2llm.train.cache import TeacherCache
from d2llm.train.config import TeacherConfig
from d2llm.train.examples import Example
from d2llm.train.finetune import Run, finetune, save_finetuned
from d2llm.train.hub_loading import load_hub_teacher, load_uncached
from d2llm.train.hub_teachers import HubTeacher
from d2llm.train.losses import ranknet
from d2llm.train.on_stack import OnStack
from d2llm.train.ranking import CandidateList
from d2llm.train.run_log import read_log
from d2llm.train.teach import Start, Teaching
from d2llm.train.teacher import Bm25Teacher, Judgement

WORDS = "median mean mode variance deviation quantile slope intercept range rank sum count".split()
TRAIN, DEV = 16, 6
SMALL: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


@pytest.fixture
def drawn() -> None:
    """Runs draw their curves."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes a second, as long as a run of these."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("d2llm.train.finetune.draw_curves", lambda _, __, target, ___: target.touch())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A passage answers a query if it says that it returns its word: to name the word is not enough."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "qrels").mkdir()
    documents = {f"d{i}": f"it returns the {word} of all {WORDS[i - 1]}" for i, word in enumerate(WORDS)}
    documents |= {
        f"n{i}-{k}": f"it forgets the {word} of all {WORDS[i - k]}" for i, word in enumerate(WORDS) for k in range(2, 6)
    }
    queries = {f"q{i}": f"{verb} the {word}?" for i, (verb, word) in enumerate(
        (verb, word) for verb in ("what returns", "who computes") for word in WORDS)}  # fmt: skip
    for name, texts in (("corpus", documents), ("queries", queries)):
        rows = [json.dumps({"_id": id_, "text": text}) for id_, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    for split, ids in (("train", range(TRAIN)), ("dev", range(TRAIN, TRAIN + DEV))):
        judged = [f"q{i}\td{i % len(WORDS)}\t1" for i in ids]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return folder


@pytest.fixture(scope="module")
def llm(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm") / "qwen3"
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    shutil.copy(minilm / "tokenizer.json", folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, dataset: Path, tiny_bert: Path) -> Path:
    """The teacher is an embedder without a head."""
    path = tmp_path / "recipe.toml"
    path.write_text(f"""
        precision = "fp32"
        recall.steps = 0
        distil.steps = 1
        distil.batch = 4
        distil.candidates = 8
        distil.negatives = 4
        [student]
        backbone = "{tiny_bert}"
        tuning = "frozen"
        [data]
        folder = "{dataset}"
        negatives = 4
        [teacher]
        members = ["reranker"]
        model = "{tiny_bert}"
        cache = "{tmp_path / "judged"}"
        max_length = 160
        calibration_queries = 4
    """)
    return path


def as_llm(llm: Path) -> tuple[str, ...]:
    return ("--set", 'teacher.members=["llm"]', "--set", f"teacher.model={llm}")


def teach(recipe: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["teach", str(recipe), *map(str, arguments)])


ON_STACK = ("--on-stack", "--head", "new")
SHORT = ("--steps", 6, "--batch", 4, "--negatives", 3, "--lr", 1e-3, "--eval-every", 3, "--save-every", 2, "--anyway")


# -- where it starts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["embedder", "llm with a new head", "llm that says yes or no"])
def test_on_a_stack_a_teacher_starts_exactly_as_the_stack(recipe: Path, llm: Path, kind: str) -> None:
    overrides = {} if kind == "embedder" else {"teacher.members": '["llm"]', "teacher.model": str(llm)}
    head: Any = "own" if kind == "llm that says yes or no" else "new"
    teaching = Teaching(read_recipe(recipe, overrides), start=Start(on_stack=True, head=head))
    assert teaching.on_stack is not None
    for example in teaching.examples:
        texts = [*example.positives, *example.negatives]
        stack = teaching.on_stack.stack.judge(example.query, texts).log_odds_K
        assert stack.std() > 0
        assert torch.equal(teaching.teacher.judge(example.query, texts).log_odds_K, stack)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", ["embedder", "llm with a new head", "llm that says yes or no"])
def test_from_a_stack_it_learns_and_the_folder_gives_back_all_of_it(
    recipe: Path, llm: Path, tmp_path: Path, kind: str, tuning: Any
) -> None:
    overrides = {} if kind == "embedder" else {"teacher.members": '["llm"]', "teacher.model": str(llm)}
    head: Any = "own" if kind == "llm that says yes or no" else "new"
    start = Start(on_stack=True, head=head, tuning=tuning)
    teaching = Teaching(read_recipe(recipe, overrides), start=start)
    assert teaching.on_stack is not None
    losses = finetune(teaching.on_stack, teaching.examples, steps=40, batch=8, negatives=4, lr=5e-3, tuning=tuning)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5]), "it learns what the stack does not know"
    save_finetuned(teaching.on_stack, tmp_path / "tuned")
    config = read_recipe(recipe, {**overrides, "teacher.model": str(tmp_path / "tuned")}).teacher
    loaded = load_hub_teacher(config, "cpu", None, teaching.words)
    assert isinstance(loaded, OnStack)
    example = teaching.examples[0]
    texts = [*example.positives, *example.negatives]
    mine, theirs = (teacher.judge(example.query, texts) for teacher in (teaching.on_stack, loaded))
    torch.testing.assert_close(mine.log_odds_K, theirs.log_odds_K, rtol=0, atol=1e-5)
    stack = teaching.on_stack.stack.judge(example.query, texts).log_odds_K
    assert not torch.allclose(theirs.log_odds_K, stack, atol=1e-2)
    assert theirs.features_KT is not None and len(theirs.features_KT) == len(texts)


def test_without_a_head_a_model_is_refused_and_the_way_out_named(recipe: Path, tmp_path: Path) -> None:
    done = teach(recipe, "--finetune", tmp_path / "tuned")
    assert done.exit_code == 1 and "has no weights for classifier.bias, classifier.weight" in done.stderr
    assert "or train a new head: d2llm teach --finetune FOLDER --head new" in done.stderr


def test_a_new_head_is_the_same_in_every_load(llm: Path, minilm: Path, tmp_path: Path) -> None:
    """Also where other layers over the backbone are new: a causal LM as a classifier, a BERT without pooler."""
    BertForSequenceClassification(BertConfig(**SMALL)).bert.save_pretrained(tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, tmp_path / "bert" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    shutil.copy(minilm / "tokenizer.json", tmp_path / "bert")
    for model in (llm, tmp_path / "bert"):
        config = TeacherConfig(members=("reranker",), model=str(model), max_length=64)
        first, second = (load_uncached(config, "cpu", None, head="new") for _ in range(2))
        assert first.identity == second.identity and first.base_digest == second.base_digest
        judged = first.judge("what?", ["this", "that"])
        assert judged.log_odds_K.tolist() == [0.0, 0.0]
    assert judged.features_KT is not None and judged.features_KT.abs().max() > 0, "a pooler of zeros could not learn"


# -- serving -------------------------------------------------------------------------------------------------------


def test_a_student_learns_from_a_teacher_on_a_stack_and_its_cache_holds_no_word_of_the_stack(
    recipe: Path, tmp_path: Path
) -> None:
    done = teach(recipe, "--finetune", tmp_path / "tuned", *ON_STACK, *SHORT, "--json")
    assert done.exit_code == 0, done.stderr
    table = json.loads(done.stdout)["dev_ndcg@10"]
    assert list(table) == ["backbone's cosine, untrained", "stack", "teacher, fine-tuned"]
    assert table["teacher, fine-tuned"] >= table["stack"], "the best state on dev is kept, and the stack was the first"
    again = teach(recipe, "--set", f"teacher.model={tmp_path}/tuned", "--anyway", "--json")
    assert json.loads(again.stdout)["dev_ndcg@10"]["teacher"] == pytest.approx(table["teacher, fine-tuned"])
    assert json.loads(again.stdout)["filled"]["judged"] == 0
    settings = read_recipe(recipe, {"teacher.model": str(tmp_path / "tuned")})
    teacher = train(settings).teacher
    assert isinstance(teacher, OnStack)
    hub = teacher.teacher
    query, texts = "what returns the mean?", [f"it returns the {WORDS[i]} of all {WORDS[i - 1]}" for i in range(5)]
    both, alone = teacher.judge(query, texts), hub.judge(query, texts)
    expected = teacher.stack.judge(query, texts).log_odds_K + alone.log_odds_K
    torch.testing.assert_close(both.log_odds_K, expected)
    # One passage among others: the stack compares them, the cached part must not.
    assert hub.judge(query, texts[:1]).log_odds_K[0] == alone.log_odds_K[0]


def test_a_teacher_on_a_stack_is_refused_without_a_corpus_or_with_another_encoder(
    recipe: Path, tmp_path: Path, tiny_bert: Path
) -> None:
    encoder = shutil.copytree(tiny_bert, tmp_path / "encoder")
    assert teach(recipe, "--finetune", tmp_path / "tuned", *ON_STACK, "--encoder", encoder, *SHORT).exit_code == 0
    config = read_recipe(recipe, {"teacher.model": str(tmp_path / "tuned")}).teacher
    with pytest.raises(DataError, match=r"fine-tuned on a stack, which needs a corpus: set data\.folder"):
        load_hub_teacher(config, "cpu", None)
    model = AutoModel.from_pretrained(encoder)
    model.embeddings.word_embeddings.weight.data.add_(0.01)
    model.save_pretrained(encoder)
    words = Bm25Teacher(Bm25(["a passage"]), ["a passage"])
    with pytest.raises(MismatchError, match=r"fine-tuned on the stack of .*encoder with weights .* Fine-tune again"):
        load_hub_teacher(config, "cpu", None, words)


def test_a_students_folder_can_be_the_stacks_encoder(recipe: Path, tmp_path: Path, tiny_bert: Path) -> None:
    create_student(str(tiny_bert)).save(tmp_path / "student")
    done = teach(recipe, "--finetune", tmp_path / "tuned", *ON_STACK, "--encoder", tmp_path / "student", *SHORT)
    assert done.exit_code == 0, done.stderr
    saved = json.loads((tmp_path / "tuned" / "teacher.json").read_text())
    assert saved["stack"]["encoder"] == str(tmp_path / "student")
    assert list(saved["stack"]["weights"]) == ["cosine", "late-interaction", "bm25"]
    assert "The teacher, fine-tuned against the stack: " in done.stdout and "95 % interval" in done.stdout


# -- a run like any other ------------------------------------------------------------------------------------------


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {str(path.relative_to(folder)) + name: value for path in sorted(folder.rglob("*.safetensors"))
            for name, value in load_file(path).items()}  # fmt: skip


KILLED = ("--steps", 40, "--batch", 4, "--negatives", 3, "--lr", 1e-3, "--eval-every", 7, "--save-every", 4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("embedder", ("--tuning", "full")), ("llm", ("--loss", "ranknet"))],
    ids=["embedder in full", "llm with lora"],
)
def test_a_killed_run_ends_as_an_undisturbed_one_to_the_bit(
    recipe: Path, llm: Path, tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    chosen = as_llm(llm) if kind == "llm" else ()
    arguments = [*map(str, (*ON_STACK, *KILLED, *options, *chosen, "--json", "--anyway"))]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert teach(recipe, *arguments, "--finetune", whole).exit_code == 0
    log = tmp_path / "killed.run" / "log.jsonl"
    for reached in (random.Random(kind).randint(5, 18), 31):
        process = processes.start("teach", recipe, *arguments, "--finetune", killed, folder=tmp_path)
        while not (log.is_file() and any(event["step"] >= reached for event in read_log(log))):
            assert process.is_alive(), "the run ended before it could be killed"
            time.sleep(0.002)
        process.kill()
        process.join()
        assert not killed.exists()
    assert teach(recipe, *arguments, "--finetune", killed).exit_code == 0
    assert not (tmp_path / "killed.run").exists()
    expected, found = weights_of(whole), weights_of(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    events = [[{k: v for k, v in e.items() if k != "tokens/s"} for e in read_log(folder / "log.jsonl")]
              for folder in (whole, killed)]  # fmt: skip
    assert events[0] == events[1]
    saved = [json.loads((folder / "teacher.json").read_text()) for folder in (whole, killed)]
    assert saved[0] == saved[1]


@pytest.mark.usefixtures("drawn")
def test_a_run_leaves_log_curves_and_speed_and_is_not_done_twice(recipe: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    assert teach(recipe, "--finetune", tuned, *ON_STACK, *SHORT).exit_code == 0
    events = read_log(tuned / "log.jsonl")
    assert [e["step"] for e in events if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in events if "dev nDCG@10" in e] == [0, 3, 6]
    assert [e["step"] for e in events if e.get("tokens/s", 0) > 0] == [3, 6]
    assert (tuned / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = weights_of(tuned)
    again = teach(recipe, "--finetune", tuned, *ON_STACK, *SHORT)
    assert again.exit_code == 0 and "is fine-tuned already, by this very command: going on with it" in again.stderr
    assert f"STUDENT --set teacher.model={tuned}" in again.stdout
    assert all(torch.equal(value, weights_of(tuned)[name]) for name, value in before.items())
    other = teach(recipe, "--finetune", tuned, *ON_STACK, *SHORT, "--lr", 1)
    assert other.exit_code == 1 and "exists already" in other.stderr


def test_an_unfinished_run_with_other_options_is_not_continued(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("d2llm.train.finetune.save_finetuned", interrupted)
        teach(recipe, "--finetune", tmp_path / "tuned", *ON_STACK, *SHORT)
    done = teach(recipe, "--finetune", tmp_path / "tuned", *ON_STACK, *SHORT, "--lr", 2e-3)
    assert done.exit_code == 1
    assert "holds an unfinished run with finetuning.lr = 0.001, this one has 0.002" in done.stderr
    begun = tmp_path / "tuned.run" / "recipe.json"
    content = json.loads(begun.read_text())
    content["sha256"]["teacher"] = "other weights"
    begun.write_text(json.dumps(content))
    done = teach(recipe, "--finetune", tmp_path / "tuned", *ON_STACK, *SHORT)
    assert done.exit_code == 1
    assert "holds an unfinished run with sha256.teacher = 'other weights', this one has 'reranker " in done.stderr


def test_the_best_state_on_dev_is_kept(recipe: Path) -> None:
    teaching = Teaching(read_recipe(recipe), start=Start(head="new", tuning="full"))
    scores = iter([0.1, 0.9, 0.3, 0.2])
    states = []

    def evaluate() -> float:
        assert not teaching.hub.model.training, "dropout would be measured"
        states.append([p.detach().clone() for p in teaching.hub.model.parameters()])
        return next(scores)

    options: dict[str, Any] = {"steps": 9, "eval_every": 3, "negatives": 4, "lr": 1e-3, "tuning": "full"}
    finetune(teaching.hub, teaching.examples, run=Run(evaluate=evaluate), **options)
    kept = list(teaching.hub.model.parameters())
    assert all(torch.equal(value, wanted) for value, wanted in zip(kept, states[1], strict=True))
    assert any(not torch.equal(value, last) for value, last in zip(kept, states[-1], strict=True))


# -- what it learns ------------------------------------------------------------------------------------------------


def test_ranknet_is_the_log_loss_of_each_pair_that_the_teacher_orders() -> None:
    scores, target = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[3.0, 1.0, 1.0]])
    expected = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(1.5))) / 2  # the last two are equal
    assert float(ranknet(scores, target)) == pytest.approx(expected, abs=1e-6)
    assert float(ranknet(scores, 100 * target - 7)) == pytest.approx(expected, abs=1e-6), "the order alone"
    assert float(ranknet(scores, torch.zeros(1, 3))) == 0


def test_lists_may_be_of_any_length(recipe: Path) -> None:
    random.seed(0)
    drawn = [CandidateList.labelled(Example("q", ["a", "b"], ["c"] * count)).draw(3) for count in (1, 2, 9)]
    assert [len(d.texts) for d in drawn] == [2, 3, 4]
    assert all(d.texts[0] in "ab" and d.target_K[0] > 0 > d.target_K[1:].max() for d in drawn)
    teaching = Teaching(read_recipe(recipe), start=Start(head="new"))
    examples = [Example(e.query, e.positives, e.negatives[: 1 + i % 4]) for i, e in enumerate(teaching.examples)]
    assert len(finetune(teaching.hub, examples, steps=2, batch=8, negatives=4)) == 2


class Backwards:
    """A teacher that says the contrary of the labels."""

    def judge(self, query: str, candidates: Sequence[str], task: Any = "asymmetric") -> Judgement:
        return Judgement(torch.tensor([2.0 if "forgets" in text else -2.0 for text in candidates]))


@pytest.mark.parametrize("loss", ["listwise", "ranknet", "pointwise"])
def test_each_loss_learns_the_order_of_the_imitated_teacher(recipe: Path, loss: Any) -> None:
    teaching = Teaching(read_recipe(recipe), start=Start(head="new", tuning="full"))

    def agreement(teacher: HubTeacher) -> float:
        """The share of pairs in the right order."""
        right = []
        for example in teaching.examples:
            texts = [*example.positives, *example.negatives]
            mine, theirs = (t.judge(example.query, texts).log_odds_K for t in (teacher, Backwards()))
            right += [
                float((mine[i] - mine[j]) * (theirs[i] - theirs[j]) > 0)
                for i in range(len(texts)) for j in range(i) if theirs[i] != theirs[j]
            ]  # fmt: skip
        return sum(right) / len(right)

    finetune(teaching.hub, teaching.examples, steps=60, batch=8, negatives=4, lr=3e-3, loss=loss, tuning="full",
             imitated=Backwards())  # fmt: skip
    assert agreement(teaching.hub) > 0.75


def test_another_recipes_teacher_can_be_imitated(recipe: Path, tmp_path: Path, llm: Path, dataset: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(
        f'student.backbone = "{llm}"\ndata.folder = "{dataset}"\n'
        f'teacher.members = ["llm"]\nteacher.model = "{llm}"\nteacher.cache = "{tmp_path / "imitated"}"\n'
    )
    options = ("--head", "new", "--loss", "ranknet", *SHORT, "--finetune")
    done = teach(recipe, *options, tmp_path / "tuned", "--imitate", other)
    assert done.exit_code == 0, done.stderr
    assert len(TeacherCache(tmp_path / "imitated")) > 0
    again = teach(recipe, *options, tmp_path / "tuned", "--imitate", other)
    assert again.exit_code == 0 and "by this very command" in again.stderr
    other.write_text(other.read_text() + "teacher.max_length = 40\n")
    changed = teach(recipe, *options, tmp_path / "tuned", "--imitate", other)
    assert changed.exit_code == 1 and "tuned exists already" in changed.stderr
    wrong = teach(recipe, *options, tmp_path / "more", "--imitate", tmp_path / "none.toml")
    assert wrong.exit_code == 1 and "none.toml" in wrong.stderr


def test_what_was_tuned_in_one_way_is_not_tuned_on_in_the_other(recipe: Path, tmp_path: Path) -> None:
    for tuning, other in (("full", "lora"), ("lora", "full")):
        tuned = tmp_path / tuning
        assert teach(recipe, "--finetune", tuned, "--head", "new", "--tuning", tuning, *SHORT).exit_code == 0
        chosen = ("--set", f"teacher.model={tuned}", "--finetune", tmp_path / "more")
        done = teach(recipe, *chosen, "--tuning", other, *SHORT)
        assert done.exit_code == 1 and f"go on with --tuning {tuning}" in done.stderr
        anew = teach(recipe, *chosen, "--head", "new", *SHORT)
        assert anew.exit_code == 1 and "has a head that was trained: go on with --head own" in anew.stderr
    (tmp_path / "full" / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"full is damaged: weights\.safetensors"):
        load_uncached(read_recipe(recipe, {"teacher.model": str(tmp_path / "full")}).teacher, "cpu", None)


# -- labelled pairs ------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[str, ...]:
    rows = [
        {"text_a": f"it returns the {a}", "text_b": f"the {b} is returned", "label": a == b}
        for a in WORDS for b in WORDS if a == b or abs(WORDS.index(a) - WORDS.index(b)) in (1, 2)
    ]  # fmt: skip
    for name, part in (("train", rows[::2]), ("dev", rows[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return ("--set", f'data.pairs=["{tmp_path}/train.jsonl"]', "--set", f"data.dev_pairs={tmp_path}/dev.jsonl")


def without_folder(recipe: Path) -> Path:
    text = recipe.read_text()
    recipe.write_text("\n".join(line for line in text.splitlines() if "folder" not in line and "cache" not in line))
    return recipe


def test_labelled_pairs_are_learned_and_measured_by_ap(recipe: Path, pairs: tuple[str, ...], tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    options = ("--steps", 60, "--batch", 16, "--lr", 3e-3, "--eval-every", 20, "--head", "new", "--tuning", "full")
    done = teach(without_folder(recipe), "--finetune", tuned, *options, *pairs, "--json")
    found = json.loads(done.stdout)["dev_ap"]
    assert found["teacher, fine-tuned"] >= found["teacher"], done.stderr
    events = read_log(tuned / "log.jsonl")
    losses = [event["loss"] for event in events if "loss" in event]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6), "a new head says neither yes nor no"
    assert sum(losses[-5:]) < sum(losses[:5])
    assert [event["step"] for event in events if "dev AP" in event] == [0, 20, 40, 60]
    again = json.loads(teach(recipe, "--set", f"teacher.model={tuned}", *pairs, "--json").stdout)["dev_ap"]
    assert again["teacher"] == pytest.approx(found["teacher, fine-tuned"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--on-stack",), "--on-stack compares the passages of a query: it needs data.folder"),
        (("--loss", "ranknet"), "--loss ranknet compares the passages of a query: labelled pairs need pointwise"),
    ],
)
def test_pairs_have_no_lists(
    recipe: Path, pairs: tuple[str, ...], tmp_path: Path, arguments: Any, message: str
) -> None:
    done = teach(without_folder(recipe), "--finetune", tmp_path / "tuned", "--head", "new", *arguments, *pairs)
    assert done.exit_code == 1 and message in done.stderr


def test_pairs_with_scores_are_no_labels(recipe: Path, pairs: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("train", "dev"):
        rows = [{"text_a": "a", "text_b": "b", "score": score} for score in (0.1, 0.9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = teach(without_folder(recipe), "--finetune", tmp_path / "tuned", "--head", "new", *pairs)
    assert done.exit_code == 1 and "fine-tuned and measured on labels" in done.stderr
