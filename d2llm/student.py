"""The student in torch: backbone, PMA, recall head and IEM. Training and export use it; the runtime never imports it.

Dimensions: B texts of a batch, L tokens, D backbone width, E width of the recall vector, H columns of the features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from d2llm.backbone import (
    Backbone,
    check_length,
    is_rotary,
    load_adapters,
    load_backbone,
    load_tokenizer,
    pad,
    token_states,
)
from d2llm.errors import ArgumentError, DataError, ModelError
from d2llm.features import Layout, TokenVectors, Words
from d2llm.files import new_folder
from d2llm.folder import TOKENIZER, reading
from d2llm.heads import PMA, PMAStart, Pooling, RecallHead, RecallHeadKind, Start, Weightless
from d2llm.iem import IEM, Inputs
from d2llm.saved import (
    adapted_sha256,
    backbone_digest,
    is_of_earlier_form,
    load_head_weights,
    read_description,
    weights_sha256,
)
from d2llm.settings import LARGEST, Count, Range, Share, Whole, check_fields
from d2llm.tokens import QUERY_WORDS, batches_of, token_ids
from d2llm.types import StrPath, strings

Tuning = Literal["frozen", "lora", "full"]
STUDENT, HEADS, ADAPTER, BACKBONE = "student.json", "heads.safetensors", "adapter", "backbone"
PASSAGE_SIDE = ("backbone.", "pma.", "recall_head.", "words.", "token_vectors.", "iem.passage.")
"""Prefixes of the names of the weights that encode passages."""
CPU_TOKENS, GPU_TOKENS = 1024, 32768
"""Tokens of a batch for each thread of a CPU, whose caches then hold the activations; and those for a GPU."""
QUERY_VECTORS = 32
"""Vectors of a query's features. A query of more tokens has the means of several tokens as vectors."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The architecture of a student, its prompts and its length limits.

    Example:
        >>> from d2llm.student import StudentConfig
        >>> config = StudentConfig(backbone="sentence-transformers/all-MiniLM-L6-v2", query_max_length=32)
        >>> config.tuning, config.pooling, config.query_max_length
        ('lora', 'pma', 32)

    Raises:
        ArgumentError: a value has the wrong type or is out of range; names the field.
    """

    backbone: str
    """Hugging Face id, local folder or GGUF file of an encoder or a causal LM."""
    tuning: Tuning = "lora"
    """Which backbone weights are trained: none (`frozen`), LoRA adapters (`lora`) or all (`full`). The heads are always
    trained."""
    lora_rank: Count = 16
    """Rank of the LoRA adapters."""
    lora_alpha: Count = 32
    """Scale of the LoRA adapters: their update is multiplied by lora_alpha / lora_rank."""
    lora_dropout: Share = 0.0
    """Dropout on the input of the LoRA adapters."""
    start: Start = "mean"
    """Initialization of the heads. `mean`: PMA starts as the pooling `pma_start` and the IEM score as the scaled
    cosine, so the student starts as good as the pretrained embedder. `paper`: the paper's layers, initialized at
    random."""
    pma_heads: Count = 1
    """Attention heads of the PMA, the pooling by one learned query. They must divide the backbone's width."""
    pma_start: Literal["mean", "cls", "last", "weighted_mean"] = "mean"
    """The pooling that PMA starts as, with `start = "mean"`: the backbone's own. `cls` is the first token, `last` the
    last one, and `weighted_mean` gives later tokens more weight."""
    embedding_dim: Count | None = None
    """E, the width of the recall vector. None keeps the backbone's width."""
    recall_head: RecallHeadKind = "linear"
    """The layer that makes recall vectors of `embedding_dim` numbers: `linear` has no bias, `affine` has one, `tanh` is
    `affine` with a tanh after it. Published embedders have all three."""
    feature_dim: Whole = 64
    """F, the width of the two projections that the MLP of the IEM reads. 0 leaves the MLP out."""
    iem_inputs: Inputs = "comparison"
    """What the MLP reads of the projections u and v. `comparison`: u, v, u * v and |u - v|. `sum`: ReLU(u + v), the
    paper's first layer."""
    feature_bytes: Count = 1024
    """Largest size of a passage's features. `lexical_slots` and `vectors` share what the projection leaves."""
    lexical_slots: Whole | None = None
    """Words by name that a passage keeps (see `Words`), 3 bytes each. 0 is none. None keeps as many as 95 % of the
    passages have that the student is fitted to, in at most half of the bytes."""
    vectors: Whole | None = None
    """Vectors of a passage (see `TokenVectors`), vector_dim / 2 bytes each. 0 is none. None takes the bytes that are
    left."""
    vector_dim: Annotated[int, Range(2, LARGEST)] = 48
    """Width of each vector, an even number."""
    pooling: Literal["pma", Weightless] = "pma"
    """How token states become one vector. `mean` and `last` (the EOS of a causal LM) are the paper's ablations. `max`
    is for embedders that pool so, which `pma` cannot start as. These and `cls` and `weighted_mean` are not trained."""
    interaction: Literal["iem", "cosine"] = "iem"
    """How a query and a passage are scored. `cosine` scores by the scaled cosine without the IEM, as in the paper's
    ablation."""
    query_prompt: str = ""
    """Text put before every query."""
    document_prompt: str = ""
    """Text put before every passage."""
    query_max_length: Count = 64
    """Longest query in tokens, prompt and special tokens included. Longer ones are cut."""
    document_max_length: Count = 256
    """Longest passage in tokens, prompt and special tokens included. Longer ones are cut."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.vector_dim % 2:
            raise ArgumentError(f"vector_dim must be even, found {self.vector_dim}: two numbers share a byte")
        if (size := self.layouts()[1].bytes) > self.feature_bytes:
            raise ArgumentError(
                f"feature_dim, lexical_slots and vectors take {size} bytes, feature_bytes is {self.feature_bytes}: "
                "lower them, or raise feature_bytes"
            )

    def layouts(self) -> tuple[Layout, Layout]:
        """The layouts of a query's and a passage's features."""
        iem = self.interaction == "iem"
        words, vectors = (value or 0 if iem else 0 for value in (self.lexical_slots, self.vectors))
        dim = self.vector_dim if vectors else 0
        projection = self.feature_dim if iem else 0
        if not (words or vectors or projection):
            words = 1  # graphs and indexes have no arrays without columns
        query = Layout(projection, QUERY_VECTORS if vectors else 0, dim, QUERY_WORDS if words else 0)
        return query, Layout(projection, vectors, dim, words)


class Encoded(NamedTuple):
    """The encoding of B texts. It holds the features of both sides, whichever side the texts belong to."""

    vectors_BE: Tensor
    """Recall vectors of length 1."""
    query_features_BH: Tensor
    passage_features_BH: Tensor


class Student(nn.Module):
    """The model that is trained: a backbone with PMA, recall head and IEM, and its tokenizer.

    Make a new student with `Student.create`, and read a saved one with `Student.load`.

    Example:
        >>> from d2llm.student import Student
        >>> encoded = student.encode(["How do I read a file?", "open(path).read()"], side="document")
        >>> encoded.vectors_BE.shape == (2, student.embedding_dim)
        True
        >>> student.save(tmp_path / "copy")
        >>> Student.load(tmp_path / "copy").weights_sha256() == student.weights_sha256()
        True
    """

    def __init__(self, config: StudentConfig, backbone: Backbone, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.backbone, self.tokenizer = config, backbone, tokenizer
        self.provenance: dict[str, Any] = {}
        self._merged_sha256: str | None = None
        """Digest of the backbone and its LoRA adapters, taken before `merge_lora` merged them."""
        dim = int(backbone.config.hidden_size)
        self.dim = dim
        pma_start: PMAStart = "paper" if config.start == "paper" else config.pma_start
        self.pma: PMA | Pooling = (
            PMA(dim, config.pma_heads, pma_start) if config.pooling == "pma" else Pooling(config.pooling)
        )
        self.recall_head: nn.Module = nn.Identity()
        if config.embedding_dim is not None:
            self.recall_head = RecallHead(dim, config.embedding_dim, config.recall_head)
        cosine = config.interaction == "cosine"
        self.iem = IEM(dim, *config.layouts(), start="mean" if cosine else config.start, inputs=config.iem_inputs)
        if cosine:
            self.iem.requires_grad_(False)
        # Texts yield ids of the tokenizer, but exporters trace with any id of the backbone's vocabulary.
        self.words = Words(max(tokenizer.get_vocab_size(), int(backbone.config.vocab_size)))
        self.token_vectors = TokenVectors(dim, config.vector_dim)
        self.rotary = is_rotary(backbone)
        for side in ("query", "document"):
            prompt, max_length = self._prompt_and_limit(side)
            check_length(f"{side}_max_length", max_length, tokenizer, prompt, backbone)

    @property
    def embedding_dim(self) -> int:
        """E, the width of the recall vector."""
        return self.config.embedding_dim or self.dim

    def tokens(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Return the backbone's last hidden states [B, L, D]."""
        return token_states(self.backbone, self.rotary, input_ids_BL, attention_mask_BL)

    def heads(self, tokens_BLD: Tensor, mask_BL: Tensor, ids_BL: Tensor) -> Encoded:
        """Pool token states [B, L, D], then compute recall vectors and the features of both sides from them."""
        tokens_BLD = tokens_BLD.to(self.token_vectors.seed.dtype)
        pooled_BD = self.pma(tokens_BLD, mask_BL)
        scaled_BD = pooled_BD
        if self.config.start == "mean":  # set the norm that the paper's last LN would give
            scaled_BD = F.normalize(pooled_BD, dim=-1) * self.dim**0.5
        vectors_BE = F.normalize(self.recall_head(pooled_BD), dim=-1)
        word_BL = mask_BL * (self.words.idf(ids_BL) > 0).to(pooled_BD.dtype)
        features = []
        sides = (self.iem.query, self.words.query), (self.iem.passage, self.words.passage)
        for layout, (project, name_words) in zip(self.iem.layouts, sides, strict=True):
            columns = [] if project is None else [project(scaled_BD)]
            if layout.vectors:
                columns.append(self.token_vectors(tokens_BLD, word_BL, layout.vectors).flatten(1))
            if layout.words:
                columns.append(name_words(ids_BL, mask_BL, layout.words))
            features.append(torch.cat(columns, dim=-1))
        return Encoded(vectors_BE, *features)

    def forward(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Encoded:
        """Encode token ids [B, L]; the result holds the features of both sides."""
        return self.heads(self.tokens(input_ids_BL, attention_mask_BL), attention_mask_BL, input_ids_BL)

    def encodings(self, texts: Sequence[str], side: Literal["query", "document"]) -> list[list[int]]:
        """Return the token ids of `texts`, with the side's prompt and truncated to its limit, as the runtime does.

        Raises:
            DataError: a text is empty or blank, or cannot be written as UTF-8.
            TypeError: `texts` is a single string, or a text is not a string.
        """
        prompt, max_length = self._prompt_and_limit(side)
        texts = list(strings(texts))
        empty = next((index for index, text in enumerate(texts) if not text.strip()), None)
        if empty is not None:
            raise DataError(f"text {empty} of {len(texts)} is empty: there is nothing to encode")
        return token_ids(self.tokenizer, texts, prompt, max_length)

    def _prompt_and_limit(self, side: str) -> tuple[str, int]:
        """Return the prompt of a side and its length limit in tokens."""
        if side == "query":
            return self.config.query_prompt, self.config.query_max_length
        return self.config.document_prompt, self.config.document_max_length

    def resize(self, config: StudentConfig) -> None:
        """Take over another number of words and vectors. No weight depends on them."""
        self.config = config
        self.iem.resize(*config.layouts())

    @torch.inference_mode()
    def encode(
        self, texts: Sequence[str], side: Literal["query", "document"], batch_tokens: int | None = None
    ) -> Encoded:
        """Encode any number of texts without gradients, in eval mode, in batches of similar length.

        The student's device computes; the result is float32 on the CPU, in the order of `texts`. A batch has at most
        `batch_tokens` tokens, padding included; None takes the student's own `batch_tokens`.

        Raises:
            DataError, TypeError: as `encodings`.
        """
        was_training = self.training
        self.eval()
        ids = self.encodings(texts, side)
        batches = list(batches_of([len(row) for row in ids], batch_tokens or self.batch_tokens))
        inverse = torch.tensor(list(chain(*batches))).argsort()
        parts = [self(*pad([ids[index] for index in batch], self.device)) for batch in batches]
        self.train(was_training)
        return Encoded(*(torch.cat(tensors).float().cpu()[inverse] for tensors in zip(*parts, strict=True)))

    @property
    def batch_tokens(self) -> int:
        """The largest number of tokens in a batch that is encoded without gradients, padding included."""
        return CPU_TOKENS * torch.get_num_threads() if self.device.type == "cpu" else GPU_TOKENS

    @property
    def device(self) -> torch.device:
        """The device of the heads."""
        return self.token_vectors.seed.device

    @classmethod
    def create(cls, config: StudentConfig) -> Student:
        """Make a new student on a pretrained backbone, with untrained heads.

        Raises:
            ModelError: the backbone cannot be loaded, or has no fast tokenizer.
            ArgumentError: a length limit or the number of PMA heads does not suit the backbone.
        """
        backbone = load_backbone(config.backbone)
        if config.tuning == "lora":
            from peft import LoraConfig, get_peft_model

            settings = LoraConfig(
                r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                target_modules="all-linear",
            )  # fmt: skip
            backbone = get_peft_model(backbone, settings)
        elif config.tuning == "frozen":
            backbone.requires_grad_(False)
        return cls(config, backbone, load_tokenizer(config.backbone))

    def save(self, folder: StrPath, beside: Sequence[Path] = ()) -> None:
        """Write a student folder atomically: config, heads, tokenizer and the trained part of the backbone.

        The trained part is the LoRA adapters (`lora`), the whole backbone (`full`) or nothing (`frozen`). `load` reads
        the other backbone weights from where the config says, and knows them by their digest. `beside` are files to
        copy into `folder`.

        Raises:
            OutputExistsError: `folder` exists and is not empty.
            ModelError: the LoRA adapters were merged.
        """
        if self._merged_sha256 is not None:
            raise ModelError("the student's LoRA adapters are merged into its backbone: save it before merge_lora()")
        with new_folder(Path(folder)) as staging:
            heads = {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}
            save_file({name: value.detach().cpu().contiguous() for name, value in heads.items()}, staging / HEADS)
            self.tokenizer.no_truncation()
            self.tokenizer.save(str(staging / TOKENIZER))
            if self.config.tuning == "lora":
                self.backbone.save_pretrained(staging / ADAPTER, save_embedding_layers=False)  # they are not adapted
            elif self.config.tuning == "full":
                self.backbone.save_pretrained(staging / BACKBONE)
            digest = "" if self.config.tuning == "full" else backbone_digest(self.backbone)
            content = {"config": asdict(self.config), "provenance": self.provenance, "backbone": digest}
            (staging / STUDENT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            for path in beside:
                shutil.copy(path, staging)

    @classmethod
    def load(cls, folder: StrPath) -> Student:
        """Read a student folder.

        Raises:
            ModelError: the folder is not a student, was made by an earlier version, is incomplete or damaged, or its
                backbone cannot be loaded or has other weights than it had; names the file.
        """
        folder = Path(folder)
        if not (folder / STUDENT).is_file():
            raise ModelError(
                f"{folder} is not a student folder: it has no {STUDENT}. Train a student with: "
                "d2llm train RECIPE STUDENT, or make one of a published embedder with: d2llm init EMBEDDER STUDENT"
            )
        remedy = "Restore the folder, or train the student again."
        if is_of_earlier_form(folder, STUDENT, "product", HEADS, remedy):
            raise ModelError(
                f"{folder} was made by an earlier d2llm: train it again, or make it again with d2llm init EMBEDDER"
            )
        with reading(folder, STUDENT, remedy) as path:
            config, content = read_description(path, StudentConfig)
        with reading(folder, TOKENIZER, remedy) as path:
            tokenizer = Tokenizer.from_file(str(path))
        backbone = _load_backbone(folder, config, content.backbone, remedy)
        with reading(folder, STUDENT, remedy):  # its config may not suit the backbone
            student = cls(config, backbone, tokenizer)
        with reading(folder, HEADS, remedy) as path:
            load_head_weights(student, load_file(path))
        student.provenance = content.provenance
        return student

    def query_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that encode queries: of backbone, PMA, recall head, token vectors, query projection."""
        for module in (self.backbone, self.pma, self.recall_head, self.token_vectors, self.iem.query):
            if module is not None:
                yield from module.parameters()

    def merge_lora(self) -> None:
        """Merge the LoRA adapters into the backbone's weights, in place. `weights_sha256` stays the same."""
        if self._has_adapters:
            self._merged_sha256 = adapted_sha256(self.backbone)
            self.backbone = self.backbone.merge_and_unload()

    @property
    def _has_adapters(self) -> bool:
        return self.config.tuning == "lora" and hasattr(self.backbone, "merge_and_unload")

    def weights_sha256(self, *, whole: bool = False) -> str:
        """Return a digest (64 hex digits) of the weights that encode passages: backbone, PMA, recall head, words,
        token vectors and the IEM's passage projection. With `whole`, it covers the rest of the IEM too.

        The digest covers the stored weights: a backbone and its LoRA adapters count separately, also after
        `merge_lora`. It is the same on every machine, while the last bits of merged weights are not. It also covers
        what the PMA started as, which changes the vectors without a weight.
        """
        # Earlier versions had the starts of `Start` alone, and a digest without them.
        start = self.pma.start if isinstance(self.pma, PMA) and self.pma.start not in get_args(Start) else ""
        weights = {name: w for name, w in self.state_dict().items() if whole or name.startswith(PASSAGE_SIDE)}
        adapted = adapted_sha256(self.backbone) if self._has_adapters else self._merged_sha256
        if adapted is None:
            return weights_sha256(weights, start)
        heads = {name: weight for name, weight in weights.items() if not name.startswith("backbone.")}
        return weights_sha256(heads, adapted + start)


def _load_backbone(folder: Path, config: StudentConfig, digest: str, remedy: str) -> Backbone:
    """The backbone of the student in `folder`, with its adapters. `digest` is that of one that lies elsewhere."""
    if config.tuning == "full":
        with reading(folder, BACKBONE, remedy) as path:
            return load_backbone(str(path))
    backbone = load_backbone(config.backbone).requires_grad_(False)
    if digest not in ("", backbone_digest(backbone)):  # earlier versions kept no digest
        raise ModelError(
            f"the backbone {config.backbone} has other weights than when {folder} was made, and the rest of the "
            "student does not suit them. Restore the backbone's files, or make the student again"
        )
    if config.tuning == "lora":
        with reading(folder, ADAPTER, remedy) as path:
            return load_adapters(backbone, path)
    return backbone
