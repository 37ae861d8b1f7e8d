"""Make a student of an embedder as its authors published it: a sentence-transformers model, or a plain transformer.

Dimensions: D backbone width, E width of the recall vector.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn

from d2llm.backbone import load_backbone, load_tokenizer, positions
from d2llm.errors import ModelError
from d2llm.fitting import fit_to_corpus
from d2llm.heads import RecallHeadKind, Weightless
from d2llm.pretrained import absolute, check_path, is_gguf
from d2llm.settings import LARGEST, Count, build
from d2llm.student import STUDENT, Student, StudentConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

MODULES, TRANSFORMER, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
SUPPORTED = "Supported are Transformer, Pooling, any number of Dense, and Normalize, in this order."
POOLINGS: Mapping[str, Weightless] = {
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean",
    "cls": "cls",
    "lasttoken": "last",
    "weightedmean": "weighted_mean",
    "max": "max",
}
"""The student's pooling for each pooling mode of sentence-transformers. A PMA starts as it, except for `max`."""
MEAN_SQRT = "mean_sqrt_len_tokens"
"""The mean times the square root of the number of tokens. At length 1 it is the mean."""
OLD_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The pooling mode that each flag of an older file switches on."""
ACTIVATIONS = {"torch.nn.modules.linear.Identity": False, "torch.nn.modules.activation.Tanh": True}
"""Whether an activation of a Dense is a tanh."""
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
"""How a transformer is called for a text."""
UNSUPPORTED = ("processing_kwargs", "query_expansion", "tokenizer_name_or_path", "config_args", "config_kwargs")
"""Settings of a transformer that would change its token states."""
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of the passages' prompt. The first that has a text is used."""


@dataclass(frozen=True, kw_only=True)
class _Module:
    """An entry of `modules.json`."""

    type: str
    path: str

    @property
    def kind(self) -> str:
        return self.type.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class _Transformer:
    max_seq_length: Count | None = None
    do_lower_case: bool = False
    transformer_task: str = "feature-extraction"
    modality_config: dict[str, Any] = field(default_factory=dict)
    processing_kwargs: dict[str, Any] | None = None
    query_expansion: dict[str, Any] | None = None
    tokenizer_name_or_path: str | None = None
    config_args: dict[str, Any] | None = None
    config_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Pooling:
    pooling_mode: str | list[str] = "mean"
    include_prompt: bool = True
    embedding_dimension: Count | None = None


@dataclass(frozen=True, kw_only=True)
class _Dense:
    in_features: Count
    out_features: Count
    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False
    module_input_name: str = "sentence_embedding"
    module_output_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Prompts:
    prompts: dict[str, str | None] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Map:
    """All Dense modules as one: `weight x + bias`, and a tanh if `kind` says so."""

    weight_ED: Tensor
    bias_E: Tensor
    kind: RecallHeadKind


def create_student(name: str, *, max_length: int | None = None, corpus: Sequence[str] = ()) -> Student:
    """Make an untrained student of an embedder. Its recall vectors are those that sentence-transformers computes.

    `name` is the hub id or folder of a sentence-transformers model, or of a plain transformer, which gets mean pooling,
    as does a GGUF file. `max_length` is the limit of queries and passages in tokens; None keeps the embedder's own.
    Words and vectors are fitted to the passages of `corpus`; without passages the student has none, and the score is
    the scaled cosine. What had to be assumed is logged as warnings. The same arguments give the same student, with the
    same digest, so models that are exported from it share their collections.

    Example:
        >>> from d2llm.embedder import create_student
        >>> embedder = create_student(str(backbone))
        >>> embedder.config.pooling, embedder.config.query_max_length, embedder.embedding_dim
        ('pma', 256, 384)
        >>> embedder.config.pma_start
        'mean'

    Raises:
        ModelError: the embedder cannot be loaded, lacks a file or a fast tokenizer, or has a module, an order of
            modules, a pooling or a setting that a student cannot have; names it.
        ArgumentError: `max_length` does not suit the embedder.
        DataError: a passage of `corpus` is empty, or the tokenizer knows no word of the corpus.
    """
    local = is_gguf(name) or Path(name).is_dir()
    name = absolute(name)  # the student refers to it, from whichever folder it is read
    check_path(name, "embedder")
    modules = _read_modules(name)
    transformer_name, settings = (name, _Transformer()) if not modules else _read_transformer(name, modules[0])
    backbone, tokenizer = load_backbone(transformer_name), load_tokenizer(transformer_name)
    backbone_config: Any = backbone.config
    if backbone_config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder, which is not supported: choose an encoder or a causal LM")
    if settings.do_lower_case:
        _lower_case(tokenizer)
    query_prompt, document_prompt = _read_prompts(name, modules)
    dense = _read_dense(name, modules, backbone_config.hidden_size)
    scalable = dense is None or dense.kind == "linear"
    pooling = _read_pooling(name, modules, backbone_config.hidden_size, bool(query_prompt or document_prompt), scalable)
    limit = max_length or _limit(transformer_name, settings, backbone)
    config = StudentConfig(
        backbone=transformer_name,
        tuning="frozen",
        pooling="max" if pooling == "max" else "pma",
        pma_start="mean" if pooling == "max" else pooling,
        embedding_dim=None if dense is None else len(dense.weight_ED),
        recall_head="linear" if dense is None else dense.kind,
        feature_dim=0,
        lexical_slots=None if corpus else 0,
        vectors=None if corpus else 0,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        query_max_length=limit,
        document_max_length=limit,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student(config, backbone.requires_grad_(False), tokenizer)
    if dense is not None:
        _copy(dense, student.recall_head)
    if corpus:
        fit_to_corpus(student, corpus)
    student.provenance = {"embedder": Path(name).name if local else name, "trained": False}
    return student.eval()


def is_embedder(name: str) -> bool:
    """Whether `name` is the folder of a published embedder or a GGUF file, or can be a hub id. A student is none."""
    folder = Path(name)
    if is_gguf(name):
        return True
    if folder.exists():
        return not (folder / STUDENT).is_file() and any((folder / file).is_file() for file in (MODULES, "config.json"))
    return not folder.is_absolute() and len(folder.parts) <= 2


def _read_modules(name: str) -> list[_Module]:
    """Return the modules of an embedder, or none of a plain transformer."""
    path = None if is_gguf(name) else _find(name, MODULES)
    if path is None:
        if Path(name).is_dir() and _find(name, "config.json") is None:
            is_student = (Path(name) / STUDENT).is_file()
            found = "it is a student" if is_student else f"it has neither {MODULES} nor config.json"
            raise ModelError(f"{name} is not an embedder: {found}")
        logger.warning("%s has no %s: mean pooling is assumed, without prompts", name, MODULES)
        return []
    content = _json(path)
    if not isinstance(content, list):
        raise ModelError(f"{path} is damaged: it is not a list of modules")
    modules = [_build(_Module, entry, path) for entry in content]
    for module in modules:
        if module.kind not in KINDS or not module.type.startswith("sentence_transformers."):
            raise ModelError(f"{name} has the module {module.type}, which is not supported. {SUPPORTED}")
    kinds = [module.kind for module in modules]
    middle = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Dense" for kind in middle):
        raise ModelError(f"{name} has the modules {', '.join(kinds)}, which are not supported. {SUPPORTED}")
    return modules


def _read_transformer(name: str, module: _Module) -> tuple[str, _Transformer]:
    """Return the hub id or folder of an embedder's transformer, and its settings."""
    if module.path and not Path(name).is_dir():
        raise ModelError(
            f"{name} keeps its transformer in the folder {module.path}: download the whole model and give its folder"
        )
    path = _find(name, f"{module.path}/{TRANSFORMER}".lstrip("/"))
    settings = _Transformer() if path is None else _build(_Transformer, _json(path), path)
    text = settings.modality_config.get("text", FORWARD)
    other = {key: getattr(settings, key) for key in UNSUPPORTED}
    other |= {
        "transformer_task": settings.transformer_task != "feature-extraction" and settings.transformer_task,
        "modality_config": text != FORWARD and text,
    }
    for key, value in other.items():
        if value:
            raise ModelError(f"{path} sets {key} to {value!r}, which is not supported")
    return str(Path(name) / module.path) if module.path else name, settings


def _read_pooling(name: str, modules: Sequence[_Module], width: int, prompted: bool, scalable: bool) -> Weightless:
    """Return the pooling of an embedder. `prompted` tells whether the embedder has a prompt, `scalable` whether the
    length of a pooled vector has no influence on the direction of the embedder's vector."""
    if not modules:
        return "mean"
    path = _require(name, f"{modules[1].path}/config.json")
    content = _json(path)
    old = [mode for key, mode in OLD_POOLING_KEYS.items() if isinstance(content, dict) and content.get(key)]
    settings = _build(_Pooling, {"pooling_mode": old or "mean", **content} if isinstance(content, dict) else content,
                      path, {"word_embedding_dimension": "embedding_dimension"})  # fmt: skip
    modes = settings.pooling_mode if isinstance(settings.pooling_mode, list) else [settings.pooling_mode]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ModelError(
            f"{path} pools by {' and '.join(modes)}, which is not supported. Supported is one of {', '.join(POOLINGS)}."
        )
    if modes[0] == MEAN_SQRT and not scalable:
        raise ModelError(
            f"{path} pools by {MEAN_SQRT} before a Dense with bias or tanh, which is not supported: a student pools by "
            "the mean, which has the same direction but another length"
        )
    if settings.embedding_dimension not in (None, width):
        raise ModelError(
            f"{path} pools token states of {settings.embedding_dimension} numbers, the transformer's have {width}"
        )
    if prompted and not settings.include_prompt:
        raise ModelError(
            f"{path} sets include_prompt to false, which is not supported for an embedder with prompts: a student "
            "pools the tokens of the prompt too"
        )
    return POOLINGS[modes[0]]


def _read_dense(name: str, modules: Sequence[_Module], width: int) -> _Map | None:
    """Return the Dense modules of an embedder as one map from pooled vectors of `width` numbers, or None if it has
    none."""
    weight, bias, tanh = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64), False
    folders = [module.path for module in modules if module.kind == "Dense"]
    for folder in folders:
        path = _require(name, f"{folder}/config.json")
        settings = _build(_Dense, _json(path), path)
        if tanh or settings.activation_function not in ACTIVATIONS:
            raise ModelError(
                f"{path} has the activation {settings.activation_function}{' after a tanh' if tanh else ''}, which is "
                "not supported. Supported are Identity, and Tanh in the last Dense."
            )
        outputs = (settings.module_input_name, settings.module_output_name or settings.module_input_name)
        if settings.use_residual or set(outputs) != {"sentence_embedding"}:
            raise ModelError(f"{path} has a residual, or does not map sentence_embedding, which is not supported")
        if settings.in_features != len(weight):
            raise ModelError(f"{path} reads vectors of {settings.in_features} numbers, but is given {len(weight)}")
        own_weight, own_bias = _read_weights(name, folder, (settings.out_features, settings.in_features))
        weight, bias = own_weight @ weight, own_weight @ bias + own_bias
        tanh = ACTIVATIONS[settings.activation_function]
    if not folders:
        return None
    kind: RecallHeadKind = "tanh" if tanh else "affine" if bias.any() else "linear"
    return _Map(weight_ED=weight, bias_E=bias, kind=kind)


def _read_weights(name: str, folder: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a Dense in float64; a Dense without bias gives zeros."""
    path = _find(name, f"{folder}/model.safetensors") or _require(name, f"{folder}/pytorch_model.bin")
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        weight = weights["linear.weight"].double()
        bias = weights["linear.bias"].double() if "linear.bias" in weights else weight.new_zeros(len(weight))
    except Exception as error:  # safetensors and pickle have their own error classes for a damaged file
        raise ModelError(f"{path} is damaged ({error}): download the embedder again") from error
    if weight.shape != shape or bias.shape != shape[:1]:
        raise ModelError(f"{path} has a weight of shape {tuple(weight.shape)}, config.json says {shape}")
    return weight, bias


@torch.no_grad()
def _copy(dense: _Map, head: nn.Module) -> None:
    assert isinstance(head, nn.Linear)
    head.weight.copy_(dense.weight_ED)
    if head.bias is not None:
        head.bias.copy_(dense.bias_E)


def _read_prompts(name: str, modules: Sequence[_Module]) -> tuple[str, str]:
    """Return the prompts of queries and passages, as `encode_query` and `encode_document` of sentence-transformers
    choose them."""
    path = _find(name, PROMPTS) if modules else None
    if path is None:
        return "", ""
    settings = _build(_Prompts, _json(path), path)
    prompts, default = {key: text for key, text in settings.prompts.items() if text}, settings.default_prompt_name
    if default is not None and default not in settings.prompts:
        known = ", ".join(settings.prompts) or "none"
        raise ModelError(f"{path}: default_prompt_name is {default!r}, but the prompts are: {known}")
    used = ["query", *DOCUMENT_PROMPTS]
    if default in prompts and default not in used:
        logger.warning("%s: its default prompt %r is put before no text, as in encode_query and encode_document",
                       name, default)  # fmt: skip
    if modules[-1].kind != "Normalize" and settings.similarity_fn_name not in (None, "cosine"):
        logger.warning("%s compares by %s: a student compares by cosine", name, settings.similarity_fn_name)
    return prompts.get("query", ""), next((prompts[key] for key in DOCUMENT_PROMPTS if key in prompts), "")


def _limit(name: str, settings: _Transformer, backbone: nn.Module) -> int:
    """Return the longest text that an embedder reads, in tokens."""
    config: Any = backbone.config
    limits = [positions(backbone), settings.max_seq_length]
    if settings.max_seq_length is None:
        path = _find(name, "tokenizer_config.json")
        content = {} if path is None else _json(path)
        longest = content.get("model_max_length", LARGEST)
        if not isinstance(longest, int | float):
            raise ModelError(f"{path} is damaged (model_max_length is {longest!r}): download the embedder again")
        limits += [int(longest), getattr(config, "max_position_embeddings", None)]
    known = [limit for limit in limits if limit is not None and 0 < limit < LARGEST]
    if not known:
        raise ModelError(f"{name} has no limit of tokens: give one with --max-length")
    return min(known)


def _lower_case(tokenizer: Tokenizer) -> None:
    """Make a tokenizer write texts in lower case before anything else."""
    after = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *after])


def _find(name: str, file: str) -> Path | None:
    """Return the path of a file of a hub id or folder, or None if it has no such file.

    Raises:
        ModelError: there is no such folder, and the hub cannot be asked.
    """
    if Path(name).exists():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, file))
    except LocalEntryNotFoundError as error:  # the hub is out of reach, and the cache has no such file
        raise ModelError(f"{name!r} is no folder, and cannot be loaded from the hub: {error}") from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{name!r} is no folder, and cannot be loaded from the hub: {error}") from error


def _require(name: str, file: str) -> Path:
    path = _find(name, file)
    if path is None:
        raise ModelError(f"{name} is incomplete: {file} is missing. Download the embedder again.")
    return path


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}): download the embedder again") from error


def _build(kind: type[T], content: Any, path: Path, old_names: Mapping[str, str] | None = None) -> T:
    """Make the dataclass `kind` of the keys in `content` that it knows. `old_names` is `{old: new}`."""
    names = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]  # `type[T]` cannot say that T is a dataclass
    try:
        known = {(old_names or {}).get(key, key): value for key, value in dict(content).items()}
        return build(kind, {key: value for key, value in known.items() if key in names})
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}): download the embedder again") from error
