"""A recipe: everything that decides a training run, read from TOML.

Every field has a type and a docstring. `d2llm train --keys` prints them from here (train/keys.py).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

from d2llm.deprecated import renamed, warn
from d2llm.errors import ArgumentError, DataError
from d2llm.readers import beir_file
from d2llm.settings import LARGEST, Count, Positive, Range, Seed, Share, Weight, Whole, build, check_fields
from d2llm.student import StudentConfig
from d2llm.types import StrPath

from .precision import ComputeDtype
from .presets import preset_values
from .prompts import read_template

T = TypeVar("T")
BEIR = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv")
"""What a folder of training data holds."""
MEMBERS = ("cosine", "late-interaction", "bm25", "bi-encoder", "cross-encoder", "llm", "reranker")

OLD_KEYS = {
    "encoder_steps": "recall.steps",
    "encoder_batch": "recall.batch",
    "held_apart": "distil.held_apart",
    "distil_steps": "distil.steps",
    "distil_batch": "distil.batch",
    "distil_candidates": "distil.candidates",
    "distil_mining": "distil.mining",
    "distil_negatives": "distil.negatives",
    "distil_backbone": "distil.backbone",
    "eval_every": "distil.eval_every",
    "encoder_lr": "lr.backbone",
    "pooling_lr": "lr.pooling",
    "iem_lr": "lr.iem",
    "scale_lr": "lr.scale",
    "pairs_batch": "data.pairs_batch",
}
"""Keys of the last release, `{old: new}`."""
OLD_PRESET = "loss.preset"
"""A key of the last release. It set the losses alone, `preset` sets all that a preset stands for."""
OLD_PRODUCT, INPUTS = "student.product", "student.iem_inputs"
"""A key of the last release, and the key that has its meaning now: `false` is `sum`, `true` is `comparison`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The training data: judged queries (`folder`), judged pairs of texts (`pairs`), or both."""

    folder: str | None = None
    """A BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/train.tsv` and `qrels/dev.tsv`."""
    examples: str | None = None
    """A JSONL file of queries with positives and hard negatives, as `d2llm mine` writes it. It replaces the train split
    of `folder`."""
    negatives: Whole = 15
    """Hard negatives for each query, the best passages by BM25. Not used with `examples`, which has its own."""
    dev_queries: Count = 200
    """The dev set is this many queries of the dev split, drawn at random."""
    dev_documents: Whole = 2000
    """The dev corpus is the judged passages of these queries and this many other passages."""
    pairs: tuple[str, ...] = ()
    """JSONL files of judged pairs (`text_a`, `text_b`, and `score` or `label`). They train the symmetric branch, in
    every step of both stages."""
    pairs_batch: Annotated[int, Range(2, LARGEST)] = 32
    """Judged pairs in one step. At least 2: the loss compares the order of pairs."""
    dev_pairs: str | None = None
    """A file of judged pairs to measure on: by Spearman if they have scores, by average precision (AP) if they have
    labels. The best state is then the one with the highest mean of nDCG@10 and this figure."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.folder is None and (self.examples is not None or not self.pairs):
            raise ArgumentError("data: set data.folder (retrieval), data.pairs (pairs of texts), or both")
        if self.pairs and self.folder is None and self.dev_pairs is None:
            raise ArgumentError("data.pairs without data.folder needs data.dev_pairs: the best state is chosen on dev")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The teacher: one scorer, or a stack of scorers that logistic regression weighs on queries set aside for it."""

    members: tuple[str, ...] = ("cosine", "late-interaction", "bm25")
    """The scorers. `cosine` (the student's own), `late-interaction` (MaxSim over the student's token states) and `bm25`
    cost no training. `cross-encoder` is the student's backbone over both texts, fine-tuned within the run.
    `bi-encoder` stands for each of `bi_encoders`. `llm` (a yes/no prompt) and `reranker` (a cross-encoder of the hub)
    are the model named in `model`; name at most one of the two."""
    bi_encoders: tuple[str, ...] = ()
    """Embedders (hub id, folder or GGUF file), each read with its own pooling and prompts, or student folders. Choose
    models that were not trained on these queries: the stack would trust what they have memorised."""
    model: str | None = None
    """Hugging Face id, folder or GGUF file of the `llm` or `reranker`; also a folder that `d2llm teach --finetune`
    made."""
    template: str = "paper-en"
    """Prompt of the `llm`: `paper-en`, `paper-zh`, `qwen3-reranker`, or a TOML file with the tables `symmetric` and
    `asymmetric`. Each has `text` (with {query} and {passage}), `yes` and `no`; `system` and `cue` may stand above."""
    chat_template: bool = False
    """Whether to send the prompt through the tokenizer's chat template."""
    max_length: Count = 192
    """Longest input of the `llm`, `reranker` or `cross-encoder`, in tokens of prompt, query and passage. Only the
    passage is cut."""
    batch_tokens: Count = 16384
    """Tokens, padding included, in one forward pass of the `llm` or `reranker`."""
    cache: str | None = None
    """A folder that keeps the scores of the `llm` or `reranker`. Recipes and processes may share it."""
    calibration_queries: Whole = 200
    """Training queries that are set aside to weigh the members. At most a quarter of all."""
    cross_encoder_steps: Whole = 300
    """Fine-tuning steps of the `cross-encoder`."""
    cross_encoder_batch: Count = 8
    """Queries in one of these steps."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.cache == "":  # the working folder would fill up
            raise ArgumentError("teacher.cache is empty: name a folder, or leave the key out")
        if not self.members:
            raise ArgumentError(f"teacher.members is empty: choose from {', '.join(MEMBERS)}")
        if unknown := set(self.members) - set(MEMBERS):
            raise ArgumentError(f"teacher.members: {sorted(unknown)} unknown: choose from {', '.join(MEMBERS)}")
        if ("bi-encoder" in self.members) != bool(self.bi_encoders):
            raise ArgumentError("teacher.members has 'bi-encoder' when teacher.bi_encoders names some, and only then")
        named = {"llm", "reranker"} & set(self.members)
        if len(named) > 1:
            raise ArgumentError("teacher.members: `llm` and `reranker` are both the one teacher.model: name one")
        if named and self.model is None:
            raise ArgumentError(
                f"teacher.members has {named.pop()!r}: set teacher.model to its hub id, folder or GGUF file"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallConfig:
    """The first stage: backbone and recall head learn recall (InfoNCE) on one part of the training queries."""

    steps: Whole = 100
    """Training steps; 0 leaves the stage out."""
    batch: Count = 32
    """Queries in one step. Each stands against one positive and one hard negative of every query in the batch."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilConfig:
    """The second stage: the student learns from the teacher on the queries held apart from the first stage."""

    held_apart: Share = 0.5
    """Share of the training queries, without those for calibration, that the first stage leaves to the second one. On
    queries that the encoder has learned, the IEM would only learn to undo that. If the share leaves a stage without
    queries, that stage uses all of them."""
    steps: Whole = 300
    """Training steps. With 0, the scales of the score are calibrated all the same, but no weight is trained."""
    batch: Count = 32
    """Queries in one step."""
    mining: Literal["student", "given"] = "student"
    """Where a query's candidates come from. `student`: the student's own recall after the first stage, which is what
    it will rank when it serves. `given`: the negatives of `data.examples` (else BM25's), which `d2llm teach` can have
    judged ahead."""
    candidates: Count = 50
    """With mining = "student", the passages of each query's recall that the teacher scores, once."""
    negatives: Count = 7
    """Of these candidates, how many stand against the positive in one step. Each step draws them anew."""
    backbone: Literal["frozen", "live"] = "frozen"
    """`frozen`: token states are computed once and the heads learn. `live`: the backbone learns too, at its full
    cost."""
    eval_every: Count = 100
    """Steps between two measurements on dev. The state that is best on dev is kept."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRates:
    """Peak learning rates. They rise over the first tenth of a stage's steps, then fall to zero."""

    backbone: Positive = 5e-5
    """For the backbone, or its LoRA adapters."""
    pooling: Positive = 1e-4
    """For the recall head, and for the pooling where student.start = "mean"."""
    iem: Positive = 2e-4
    """For weights that start at random: the IEM, and the pooling where student.start = "paper"."""
    scale: Positive = 1e-2
    """For the scales of the parts of the score: cosine, words and vectors."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights and forms of the losses in the second stage; weight 0 switches a loss off. The first stage has the recall
    loss, at weight 1, and the loss of pairs."""

    recall: Weight = 0.1
    """InfoNCE on the cosine."""
    margin_mse: Weight = 0.0
    """Squared difference between the margins of the scaled cosine and those of the teacher (Margin-MSE)."""
    listwise_imitation: Weight = 1.0
    """KL divergence from the teacher's distribution over a query's candidates to the student's."""
    contrastive: Weight = 0.0
    """InfoNCE on IEM scores, from labels alone. In place of contrastive_imitation it is the paper's ablation
    -CI+CL."""
    in_batch: Weight = 0.0
    """InfoNCE on IEM scores against the other queries' positives, a loss that the authors' code adds."""
    contrastive_imitation: Weight = 0.0
    """The paper's CI: contrastive learning weighted by the teacher. Off by default: it multiplies scores by
    probabilities, which disturbs a score that starts as a good one."""
    rank_imitation_ph: Weight = 0.0
    """The paper's RI_PH: one minus the Pearson correlation with the teacher over the positive and the hard
    negatives."""
    rank_imitation_hi: Weight = 0.0
    """The paper's RI_HI: a hard negative should score above an in-batch negative where the teacher says so."""
    feature_imitation: Weight = 0.0
    """The paper's FI: the cosines among a query's pair features should be the teacher's. Only for a teacher that has
    features: an `llm`, `reranker` or `cross-encoder` alone."""
    pairs: Weight = 1.0
    """The loss of a batch of judged pairs. For scores it is RI_PH, with the judgements as the teacher. For labels it is
    the binary cross-entropy of the IEM's score; by cosine, and without the MLP, it is RI_PH too."""
    temperature: Positive = 0.05
    """Temperature of the recall loss, in both stages."""
    ci_positive_in_denominator: bool = True
    """CI's denominator holds the positive too, as in the authors' code. The paper prints negatives alone."""
    ph_on_probabilities: bool = False
    """RI_PH compares with the teacher's probabilities, as the authors' code does, instead of its log-odds."""
    hi_weight: Literal["probability", "ndcg"] = "probability"
    """RI_HI's weight of a pair of negatives. `probability`: the difference of the teacher's probabilities, as in the
    authors' code. `ndcg`: that difference times the difference of their DCG discounts, our reading of the paper."""
    fi_squared: bool = False
    """FI is the mean square, as in the authors' code, instead of the norm that the paper prints."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A training run in two stages. `read_recipe` reads one from TOML; presets are applied there.

    First the encoder learns recall (`recall.steps`: backbone and heads, recall loss alone) on one part of the queries.
    Then the student learns from the teacher on the queries held apart. Judged pairs go into every step of both stages.

    Example:
        >>> recipe = Recipe(
        ...     student=StudentConfig(backbone="sentence-transformers/all-MiniLM-L6-v2", tuning="full"),
        ...     data=DataConfig(folder="my-beir-folder"),
        ...     distil=DistilConfig(steps=500, backbone="live"),
        ... )
        >>> recipe.distil.steps, recipe.recall.steps, recipe.teacher.members
        (500, 100, ('cosine', 'late-interaction', 'bm25'))
    """

    student: StudentConfig
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    lr: LearningRates = field(default_factory=LearningRates)
    loss: LossConfig = field(default_factory=LossConfig)
    gradient_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass: less memory, a third more time."""
    save_every: Count = 50
    """Steps between two checkpoints of the run. A killed run goes on from the last one."""
    precision: ComputeDtype = "auto"
    """`auto`: bf16 on a GPU or a CPU with instructions for it (AMX, AVX-512 BF16), else fp32."""
    seed: Seed = 0
    """Seed of everything random: the split of the queries, batches, initial weights."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_negatives()
        if self.recall.steps and self.student.tuning == "frozen":
            raise ArgumentError(
                f"recall.steps = {self.recall.steps} trains the backbone, student.tuning = 'frozen' forbids it: "
                "set recall.steps = 0, or student.tuning to 'lora' or 'full'"
            )
        if self.distil.backbone == "live" and self.student.tuning == "frozen":
            raise ArgumentError(
                "distil.backbone = 'live' trains the backbone, student.tuning = 'frozen' forbids it: "
                "set distil.backbone = 'frozen', or student.tuning to 'lora' or 'full'"
            )

    if not TYPE_CHECKING:  # a type checker should refuse the old names

        def __getattr__(self, name: str) -> Any:
            """The value of a key by its name of the last release."""
            if name not in OLD_KEYS:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            warn(f"Recipe.{name}", f"Recipe.{OLD_KEYS[name]}")
            return attrgetter(OLD_KEYS[name])(self)

    def check_files(self) -> None:
        """See that the files and folders which the recipe names exist: cheap, and sooner than a run would find out.

        Raises:
            DataError: one does not exist; names its key.
        """
        if (folder := self.data.folder) is not None and not os.path.isdir(folder):
            raise DataError(f"data.folder = {folder!r}: no such folder, expected a BEIR folder ({', '.join(BEIR)})")
        for key, path in self.files():
            if not path.exists():
                raise DataError(f"{key}: {path}: no such file")
        if "llm" in self.teacher.members:
            read_template(self.teacher.template)

    def files(self) -> list[tuple[str, Path]]:
        """The files with data that the recipe names, each with its key."""
        data, folder = self.data, self.data.folder
        named = [("data.examples", data.examples), ("data.dev_pairs", data.dev_pairs)]
        named += [("data.pairs", path) for path in data.pairs]
        files = [(key, Path(path)) for key, path in named if path is not None and path != "-"]
        return files + [("data.folder", beir_file(Path(folder), name)) for name in BEIR if folder is not None]

    def _check_negatives(self) -> None:
        key, mined = "distil.candidates", self.distil.candidates
        if self.distil.mining == "given":
            key, mined = "data.negatives", self.data.negatives
            if self.data.examples is not None:
                return  # they have their own, counted when they are read
        if self.data.folder is not None and self.distil.negatives > mined:
            raise ArgumentError(
                f"distil.negatives = {self.distil.negatives} are drawn from {key} = {mined}: lower it, or raise {key}"
            )


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with d2llm, `{name: its first comment}`."""
    files = sorted((resources.files("d2llm.train") / "recipes").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".toml"): file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for file in files
        if file.name.endswith(".toml")
    }


def _find(recipe: StrPath) -> Traversable:
    """The file of that path, or else the shipped recipe of that name."""
    path = Path(recipe)
    if path.is_file():
        return path
    names = shipped_recipes()
    if str(recipe) not in names:
        found = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{recipe}: {found}, and no shipped recipe has this name ({', '.join(names)})")
    return resources.files("d2llm.train") / "recipes" / f"{recipe}.toml"


def read_recipe(path: StrPath, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe: a TOML file or, if no such file exists, the shipped recipe of that name, such as `minilm`.

    Values of `overrides`, such as `{"student.backbone": "my/model", "recall.steps": "10"}`, win over those of the file.

    Raises:
        DataError: no such file or recipe, broken TOML, an unknown or missing key, a value of another type or out of
            range; names file and key.
    """
    file = _find(path)
    try:
        written = _flat(tomllib.loads(file.read_text(encoding="utf-8")))
        typed = _flat({key: _value(text) for key, text in (overrides or {}).items()})
        try:
            written, typed = (_with_inputs(renamed(layer, OLD_KEYS)) for layer in (written, typed))
        except TypeError as error:
            raise ArgumentError(str(error)) from error
        if OLD_PRESET in {**written, **typed}:
            if any("preset" in layer and OLD_PRESET in layer for layer in (written, typed)):
                raise ArgumentError(f"{OLD_PRESET} is the old name of preset: give preset alone")
            warn(OLD_PRESET, 'preset (at the top of the recipe, where it sets more: see "d2llm train --keys")')
        return _build({**written, **typed})
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML ({error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from error


def read_settings(kind: type[T], overrides: Mapping[str, str]) -> T:
    """A dataclass of settings at its defaults, except for `overrides`, whose values are read as TOML.

    Raises:
        ArgumentError: an unknown key, a value of another type or out of range; names it.
    """
    return build(kind, {key: _value(text) for key, text in overrides.items()})


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def _with_inputs(layer: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe, with `student.iem_inputs` in the place of `student.product`."""
    if not isinstance(layer.get(OLD_PRODUCT), bool):
        return layer  # without the key, or with a value that it never had
    current = renamed(layer, {OLD_PRODUCT: INPUTS})
    return {**current, INPUTS: "comparison" if current[INPUTS] else "sum"}


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Tables as keys with dots: `{"recall": {"steps": 1}}` becomes `{"recall.steps": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        table = value if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": inner for name, inner in table.items()} or {key: value}
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with dots as tables."""
    content: dict[str, Any] = {}
    for key, value in flat.items():
        *tables, name = key.split(".")
        table = content
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ArgumentError(f"{key}: {part} is a value, not a table")
        if value == {}:  # an empty table takes nothing away
            table.setdefault(name, {})
        else:
            table[name] = value
    return content


def _build(written: dict[str, Any]) -> Recipe:
    """The recipe of `written`, keys with dots, over what its preset stands for."""
    values = preset_values(written.pop("preset", "d2llm"), "preset")
    if OLD_PRESET in written:  # it sets the losses alone
        losses = preset_values(written.pop(OLD_PRESET), OLD_PRESET)
        values = {key: value for key, value in values.items() if not key.startswith("loss.")}
        values |= {key: value for key, value in losses.items() if key.startswith("loss.")}
    content = _nested({**values, **written})
    for name, kind in get_type_hints(Recipe).items():
        if isinstance(kind, type) and is_dataclass(kind):
            content[name] = build(kind, content.get(name, {}), f"{name}.")
    return build(Recipe, content)
