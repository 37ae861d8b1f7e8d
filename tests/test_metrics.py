"""Measures and BM25 against their definitions in loops."""

import ast
import math
import random
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from d2llm.lexical import K1, B, Bm25, words
from d2llm.metrics import evaluate, overlap

Run = dict[str, dict[str, float]]
Qrels = dict[str, dict[str, int]]


def literal_measures(run: Run, qrels: Qrels) -> dict[str, float]:
    mrr = ndcg = recall = 0.0
    for query, judged in qrels.items():
        scores = run.get(query, {})
        ranking = sorted(scores, key=lambda document: -scores[document])
        relevant = {document for document, grade in judged.items() if grade > 0}
        for rank, document in enumerate(ranking[:10], 1):
            if document in relevant:
                mrr += 1 / rank
                break
        gain = sum(
            judged.get(document, 0) / math.log2(rank + 1)
            for rank, document in enumerate(ranking[:10], 1)
            if judged.get(document, 0) > 0
        )
        best = sorted((grade for grade in judged.values() if grade > 0), reverse=True)[:10]
        ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(best, 1))
        ndcg += gain / ideal if ideal else 0.0
        recall += len(relevant & set(ranking[:100])) / len(relevant) if relevant else 0.0
    return {name: value / len(qrels) for name, value in (("MRR@10", mrr), ("nDCG@10", ndcg), ("Recall@100", recall))}


def random_rankings(seed: int) -> tuple[Run, Qrels]:
    """30 queries over 300 documents with graded judgements; one query without a run, one without a positive."""
    rng = random.Random(seed)
    documents = [f"d{i}" for i in range(300)]
    qrels = {f"q{i}": {d: rng.choice([0, 1, 1, 2, 3]) for d in rng.sample(documents, 25)} for i in range(30)}
    qrels["q1"] = {"d1": 0, "d2": 0}
    run = {}
    for query, judged in qrels.items():
        chosen = set(rng.sample(documents, 150)) | set(list(judged)[:5])
        order = sorted(chosen)
        rng.shuffle(order)
        run[query] = {document: -float(place) for place, document in enumerate(order)}  # no ties
    del run["q2"]
    return run, qrels


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_measures_are_those_of_their_definitions(seed: int) -> None:
    run, qrels = random_rankings(seed)
    found, expected = evaluate(run, qrels), literal_measures(run, qrels)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0 < found["MRR@10"] < 1


def test_queries_that_are_not_judged_do_not_count() -> None:
    run, qrels = random_rankings(0)
    assert evaluate({**run, "stray": {"d1": 1.0}}, qrels) == pytest.approx(literal_measures(run, qrels))


def test_a_perfect_run_measures_one_and_an_empty_one_zero() -> None:
    qrels = {"q1": {"a": 2, "b": 1}, "q2": {"c": 1}}
    assert evaluate({q: {d: float(g) for d, g in judged.items()} for q, judged in qrels.items()}, qrels) == {
        "MRR@10": 1.0, "nDCG@10": 1.0, "Recall@100": 1.0,
    }  # fmt: skip
    assert evaluate({}, qrels) == {"MRR@10": 0.0, "nDCG@10": 0.0, "Recall@100": 0.0}


def test_overlap_counts_what_both_have_among_their_first() -> None:
    assert overlap([["a", "b", "c"]], [["b", "a", "d"]], k=2) == 1
    assert overlap([["a", "b", "c"]], [["c", "x", "y"]], k=2) == 0, "c stands third"
    assert overlap([["a"], ["b", "c"]], [["a"], ["b", "z"]], k=10) == pytest.approx(0.75)
    assert overlap([["a", "b"], ["x"]], [["a", "b"], []]) == 1, "nothing to find cannot be missed"
    with pytest.raises(ValueError, match="argument 2 is longer than argument 1"):
        overlap([["a"]], [["a"], ["b"]])


# BM25


def sentences() -> list[str]:
    """Real sentences: the first lines of the standard library's docstrings."""
    found = []
    for name in ("argparse", "subprocess", "pathlib", "threading", "tarfile", "statistics", "textwrap", "shutil"):
        source, texts = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", []
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                texts.append(" ".join(text.split("\n\n")[0].split()))
        found += list(dict.fromkeys(texts))[:45]
    return found


CORPUS = sentences()
QUERIES = [
    "return the arithmetic mean of the data",
    "open a file for reading",
    "wait for the child process to terminate",
    "thread lock",
    "copy the file permissions",
    "extract all members from an archive archive archive",
    "argument parser",
    "standard deviation variance",
]


def literal_bm25(query: str, corpus: list[str]) -> list[float]:
    """Robertson's formula: sum over query words of log((N - n + .5) / (n + .5)) * tf / (tf + k1 (1 - b + b |d| / avg))."""  # noqa: E501
    texts = [Counter(words(text)) for text in corpus]
    sizes = [sum(counts.values()) for counts in texts]
    average = sum(sizes) / len(sizes)
    scores = [0.0] * len(corpus)
    for word in words(query):
        n = sum(word in counts for counts in texts)
        weight = max(0.0, math.log((len(corpus) - n + 0.5) / (n + 0.5)))
        for index, counts in enumerate(texts):
            tf = counts[word]
            scores[index] += weight * tf / (tf + K1 * (1 - B + B * sizes[index] / average)) if tf else 0.0
    return scores


def test_the_corpus_of_these_tests_is_real() -> None:
    assert len(CORPUS) > 250
    assert all(max(literal_bm25(query, CORPUS)) > 0 for query in QUERIES)


@pytest.mark.parametrize("engine", ["bm25s", "rank-bm25"])
@pytest.mark.parametrize("query", QUERIES)
def test_each_engine_ranks_as_the_formula(query: str, engine: str) -> None:
    expected = literal_bm25(query, CORPUS)
    top = Bm25(CORPUS, engine).top(query, 10)  # type: ignore[arg-type]  # wider than its hint
    best = sorted(expected, reverse=True)[:10]
    assert [expected[index] for index in top] == pytest.approx(best, rel=1e-5), "equal scores may change places"
    assert len(set(top)) == 10


@pytest.mark.parametrize("query", QUERIES)
def test_both_engines_give_the_same_top_ten(query: str) -> None:
    assert Bm25(CORPUS, "bm25s").top(query, 10) == Bm25(CORPUS, "rank-bm25").top(query, 10)


@pytest.mark.parametrize("engine", ["bm25s", "rank-bm25"])
@pytest.mark.parametrize("query", ["zyzzyva", "zyzzyva flibbertigibbet", "", "?!"])
def test_a_query_without_a_known_word_scores_zero_in_order_of_the_texts(query: str, engine: str) -> None:
    bm25 = Bm25(CORPUS, engine)  # type: ignore[arg-type]  # wider than its hint
    assert not bm25.scores(query).any()
    assert bm25.top(query, 3) == [0, 1, 2]


@pytest.mark.parametrize("engine", ["bm25s", "rank-bm25"])
def test_an_unknown_word_changes_nothing(engine: str) -> None:
    bm25 = Bm25(CORPUS, engine)  # type: ignore[arg-type]  # wider than its hint
    assert bm25.scores("zyzzyva thread lock").tolist() == bm25.scores("thread lock").tolist()


@pytest.mark.parametrize("engine", ["bm25s", "rank-bm25"])
def test_a_text_without_words_is_never_found(engine: str) -> None:
    bm25 = Bm25(["?!", "...", "thread lock", "a word", "another"], engine)  # type: ignore[arg-type]  # wider than its hint
    assert bm25.top("thread", 1) == [2]
    assert not bm25.scores("thread")[:2].any()


def test_more_results_than_texts_give_all_texts() -> None:
    assert sorted(Bm25(["a b", "b c", "c d"]).top("b", 10)) == [0, 1, 2]


def test_words_are_lower_case_and_without_stop_words() -> None:
    assert words("The Lock is in a Thread_pool, v2.5 — naïve CAFÉ!") == [
        *("lock", "thread", "pool", "v2", "5", "naïve", "café"),
    ]  # fmt: skip


def test_a_text_of_stop_words_keeps_them() -> None:
    assert words("To be, or not to be") == ["to", "be", "or", "not", "to", "be"]
    assert Bm25(["to be or not to be", "the lock", "one", "two"]).top("to be", 1) == [0]


def test_chinese_is_read_by_character_and_is_found() -> None:
    assert words("机器学习 model 3号") == ["机", "器", "学", "习", "model", "3", "号"]
    assert Bm25(["机器学习模型", "今天天气很好", "训练数据", "查询和段落"]).top("天气", 1) == [1]
