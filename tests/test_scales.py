"""The scales that training chooses: by labels of queries held apart, tested on the other half of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d2llm.iem import SCALED
from d2llm.student import Student
from d2llm.train.examples import Example
from d2llm.train.lessons import Lesson, choose_scales, lessons_of
from d2llm.train.token_states import TokenStates

NAMES = "amber birch cedar delta ember flint grove heron inlet jade kelp lotus maple stone".split()
ABOUT = "the", "of", "a", "is", "and", "with", "for"


def made_lessons(count: int, *, by_name: bool) -> list[Lesson]:
    """Lessons of made-up texts. `by_name`: the positive has the query's names; else a random passage is it."""
    rng = random.Random(0)

    def passage(names: list[str]) -> str:
        return " ".join([*names, *rng.choices(ABOUT, k=12)])

    queries = []
    for _ in range(count):
        names = rng.sample(NAMES, 2)
        others = [passage(rng.sample([name for name in NAMES if name not in names], 2)) for _ in range(6)]
        positive = passage(names) if by_name else others.pop()
        queries.append((Example(" ".join(names), [positive], others[:5]), positive))
    lessons: list[Lesson] = lessons_of(None, queries)
    return lessons


@pytest.fixture
def student(make_student: Callable[..., Student], tiny_bert: Path) -> Student:
    student = make_student(tiny_bert, tuning="frozen", feature_dim=0)
    student.iem.reset()
    return student


def scales(student: Student) -> dict[str, float]:
    return dict(zip(SCALED, student.iem.scales[1].tolist(), strict=True))


def test_words_or_vectors_get_a_scale_where_they_rank_the_positives_higher(student: Student) -> None:
    """The cosine of a random backbone blurs the names."""
    choose_scales(student, TokenStates(student, None), made_lessons(240, by_name=True))
    found = scales(student)
    assert found["cosine"] == 20 and max(found["words"], found["vectors"]) > 0
    assert student.iem.scales[0].tolist() == [20, 0, 0]  # no lesson is symmetric


@pytest.mark.parametrize(("count", "by_name"), [(240, False), (150, True)], ids=["no gain", "too few"])
def test_scales_stay_where_no_gain_is_sure(count: int, by_name: bool, student: Student) -> None:
    choose_scales(student, TokenStates(student, None), made_lessons(count, by_name=by_name))
    assert scales(student) == {"cosine": 20, "words": 0, "vectors": 0}


def test_a_student_without_interaction_keeps_its_cosine(make_student: Callable[..., Student], tiny_bert: Path) -> None:
    student = make_student(tiny_bert, tuning="frozen", interaction="cosine")
    before = student.iem.scales.clone()
    choose_scales(student, TokenStates(student, None), made_lessons(240, by_name=True))
    assert torch.equal(student.iem.scales, before)
