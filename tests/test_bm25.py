"""BM25: both engines against the formula in a loop, and what counts as a word."""

import ast
import math
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from d2llm.bm25 import K1, B, Bm25, Engine, tokenize_words
from d2llm.errors import DataError


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
COMMON = [f"widget {text}" if index % 3 else text for index, text in enumerate(CORPUS)]  # a word of most texts
QUERIES = [
    "return the arithmetic mean of the data",
    "open a file for reading",
    "wait for the child process to terminate",
    "thread lock",
    "copy the file permissions",
    "extract all members from an archive archive archive",
    "argument parser",
    "widget standard deviation variance widget",
]

both_engines = pytest.mark.parametrize("engine", ["bm25s", "rank-bm25"])


def literal_bm25(query: str, corpus: list[str], tokenize: Callable[[str], list[str]] = tokenize_words) -> list[float]:
    """The sum over query words of log((N - n + .5) / (n + .5)), or 0, * tf (k1 + 1) / (tf + k1 (1 - b + b |d| / avg)).

    N texts, n of them with the word, tf times in the text d of |d| words.
    """
    texts = [Counter(tokenize(text)) for text in corpus]
    sizes = [sum(counts.values()) for counts in texts]
    average = sum(sizes) / len(sizes)
    scores = [0.0] * len(corpus)
    for word in tokenize(query):
        n = sum(word in counts for counts in texts)
        weight = max(0.0, math.log((len(corpus) - n + 0.5) / (n + 0.5)))
        for index, counts in enumerate(texts):
            tf = counts[word]
            scores[index] += weight * tf * (K1 + 1) / (tf + K1 * (1 - B + B * sizes[index] / average))
    return scores


def test_the_corpus_of_these_tests_is_real() -> None:
    assert len(CORPUS) > 250
    assert all(max(literal_bm25(query, CORPUS)) > 0 for query in QUERIES)


@both_engines
@pytest.mark.parametrize("corpus", [CORPUS, COMMON], ids=["real", "with a common word"])
@pytest.mark.parametrize("query", QUERIES)
def test_each_engine_scores_by_the_formula(query: str, corpus: list[str], engine: Engine) -> None:
    assert Bm25(corpus, engine).scores(query).tolist() == pytest.approx(literal_bm25(query, corpus), rel=1e-5)


@both_engines
def test_a_word_in_more_than_half_of_the_texts_weighs_nothing(engine: Engine) -> None:
    assert not Bm25(COMMON, engine).scores("widget").any()


@both_engines
def test_many_queries_are_ranked_as_each_alone_by_a_full_sort(engine: Engine) -> None:
    bm25 = Bm25(COMMON, engine)
    for query, row in zip(QUERIES, bm25.rank(QUERIES, 25), strict=True):
        scores = bm25.scores(query).tolist()
        best = sorted(range(len(COMMON)), key=lambda index: (-scores[index], index))[:25]
        assert bm25.top(query, 25) == best
        assert row == [index for index in best if scores[index] > 0]


@both_engines
def test_a_text_without_a_word_of_the_query_is_not_ranked(engine: Engine) -> None:
    bm25 = Bm25(["one two", "three four", "five", "two six"], engine)
    assert bm25.rank(["six five", "zyzzyva", ""], 3) == [[2, 3], [], []]
    assert bm25.rank([], 3) == []


def test_both_engines_give_the_same_ranking() -> None:
    assert Bm25(COMMON, "bm25s").rank(QUERIES, 10) == Bm25(COMMON, "rank-bm25").rank(QUERIES, 10)


@both_engines
def test_equal_scores_stand_in_order_of_the_texts_wherever_k_cuts_them(engine: Engine) -> None:
    corpus = ["lock"] * 4 + ["lock lock"] + ["a thread", "the queue", "some timer"] * 9
    bm25 = Bm25(corpus, engine)
    assert bm25.top("lock", 33)[:7] == [4, 0, 1, 2, 3, 5, 6]
    assert [bm25.top("lock", k) for k in (1, 3, 7)] == [[4], [4, 0, 1], [4, 0, 1, 2, 3, 5, 6]]


@both_engines
@pytest.mark.parametrize("query", ["zyzzyva", "zyzzyva flibbertigibbet", "", "?!"])
def test_a_query_without_a_known_word_scores_zero_in_order_of_the_texts(query: str, engine: Engine) -> None:
    bm25 = Bm25(CORPUS, engine)
    assert not bm25.scores(query).any()
    assert bm25.top(query, 3) == [0, 1, 2]


@both_engines
def test_an_unknown_word_changes_nothing(engine: Engine) -> None:
    bm25 = Bm25(CORPUS, engine)
    assert bm25.scores("zyzzyva thread lock").tolist() == bm25.scores("thread lock").tolist()


@both_engines
def test_a_text_without_words_is_never_found(engine: Engine) -> None:
    bm25 = Bm25(["?!", "...", "thread lock", "a word", "another"], engine)
    assert bm25.top("thread", 1) == [2]
    assert not bm25.scores("thread")[:2].any()


@both_engines
@pytest.mark.parametrize("corpus", [[], ["?!", "..."]])
def test_texts_without_any_word_are_refused(corpus: list[str], engine: Engine) -> None:
    with pytest.raises(DataError, match=f"none of {len(corpus)} texts has any"):
        Bm25(corpus, engine)


def test_more_results_than_texts_give_all_texts() -> None:
    assert sorted(Bm25(["a b", "b c", "c d"]).top("b", 10)) == [0, 1, 2]


# words


def test_stems_make_one_word_of_its_forms() -> None:
    snowball = pytest.importorskip("Stemmer")
    texts = ["Refunds were taking five days.", "We ship on Mondays.", "Ask us anything, day or night."]
    assert Bm25(texts).rank(["refund takes"], 3) == [[]]
    assert Bm25(texts, stems="english").rank(["refund takes"], 3) == [[0]]
    stemmed = [" ".join(snowball.Stemmer("english").stemWords(tokenize_words(text))) for text in [*texts, "shipping"]]
    expected = Bm25(stemmed[:3]).scores(stemmed[3])
    assert Bm25(texts, stems="english").scores("shipping").tolist() == expected.tolist() != [0, 0, 0]
    with pytest.raises(ValueError, match="no stems of the language 'klingon': choose one of arabic, "):
        Bm25(texts, stems="klingon")


def test_words_are_lower_case_and_without_stop_words() -> None:
    assert tokenize_words("The Lock is in a Thread_pool, v2.5 — naïve CAFÉ!") == [
        *("lock", "thread", "pool", "v2", "5", "naïve", "café"),
    ]  # fmt: skip


def test_a_text_of_stop_words_keeps_them() -> None:
    assert tokenize_words("To be, or not to be") == ["to", "be", "or", "not", "to", "be"]
    assert Bm25(["to be or not to be", "the lock", "one", "two"]).top("to be", 1) == [0]


def test_the_same_word_written_in_two_ways_is_one_word() -> None:
    assert tokenize_words("nai\u0308ve \uff56\uff12 ｶﾞ") == ["naïve", "v2", "ガ"]


@pytest.mark.parametrize("text", ["हिन्दी भाषा", "தமிழ் மொழி", "العَرَبِيَّة لغة", "שָׁלוֹם עולם"], ids=["hi", "ta", "ar", "he"])
def test_vowel_signs_do_not_end_a_word(text: str) -> None:
    assert tokenize_words(text) == text.split()


def test_scripts_without_spaces_are_read_as_characters_and_pairs() -> None:
    assert tokenize_words("机器学习 model 3号") == ["机", "器", "学", "习", "机器", "器学", "学习", "model", "3", "号"]
    assert tokenize_words("猫・犬") == ["猫", "犬"], "no pair spans a dot"


SCATTERED = {
    # A query, a text that has it as a word, and a shorter one that has its characters alone.
    "zh": (
        "天气",
        "他每天早上都会先看一看当地的天气预报再出门上班",
        "今天空气好",
        ["训练数据", "查询和段落", "机器学习模型"],
    ),
    "ja": (
        "電話",
        "会議の前に担当者へ電話をかけて予定をもう一度確認した",
        "電車で話す",
        ["犬と猫", "新しい本", "雨が降る"],
    ),
    "th": ("ตาก", "แม่เอาเสื้อผ้าที่ซักเสร็จแล้วออกไปตากแดดหลังบ้าน", "กาแฟตู้", ["หมูสับ", "ฝนลงเม็ด", "ปูนิ่ม"]),
}


@pytest.mark.parametrize("language", SCATTERED)
def test_a_word_counts_for_more_than_its_characters_scattered(language: str) -> None:
    query, whole, scattered, others = SCATTERED[language]
    corpus = [scattered, whole, *others]
    alone = literal_bm25(query, corpus, list)
    assert alone[0] > alone[1] > 0, "by single characters the wrong text is first"
    assert Bm25(corpus).top(query, 2) == [1, 0]


def test_a_word_of_one_character_is_found_inside_a_run() -> None:
    assert Bm25(["我家的猫很可爱", "今天天气很好", "训练数据", "查询和段落"]).top("猫", 1) == [0]
