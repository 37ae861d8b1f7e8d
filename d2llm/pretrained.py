"""Read pretrained models and their tokenizers with transformers: from a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2llm.errors import ModelError, import_extra

GGUF = ".gguf"
"""Suffix of the files of llama.cpp: weights, often of 2 to 8 bits, with their tokenizer."""

MOST = 1e5
"""No weight of a model is this large: half-precision floats, in which models are published, end at 65,504."""
BARS: dict[str, dict[str, Any]] = {
    "transformers.utils.logging": {"_tqdm_active": False},
    "transformers.modeling_gguf_pytorch_utils": {"tqdm": partial(tqdm, disable=True)},
}
"""What transformers shows its bars about loading with, and what shows none."""
_loading = threading.RLock()


def is_gguf(name: str | Path) -> bool:
    """Whether a name is the path of a GGUF file, which need not exist."""
    return Path(name).suffix.lower() == GGUF


def absolute(name: str) -> str:
    """Return the absolute path of a folder or GGUF file. A hub id stays as it is."""
    return str(Path(name).absolute()) if is_gguf(name) or Path(name).is_dir() else name


def load_pretrained(
    auto: Any, name: str, dtype: torch.dtype | None = None, *, role: str = "model", **settings: Any
) -> tuple[Any, set[str]]:
    """Load a model as `auto`, a class of transformers such as `AutoModel`, with weights in `dtype` (None: float32).

    The weights of a GGUF file are unpacked, and checked, since the file has no checksum. Return the model, and the
    names of the weights that the files lack, which transformers has filled with random numbers. `role` says in messages
    what the model is for. `settings` are further arguments of `from_pretrained`.

    Raises:
        ModelError: the model cannot be loaded; names it. Or a GGUF file has weights that are not finite, or above
            `MOST`: it is damaged.
        MissingExtraError: a GGUF file needs the library `gguf`.
    """
    place, options = _source(name, role)
    # Packed weights would be unpacked in every forward pass, and could not be trained or saved. A transformers without
    # this setting always unpacks.
    if options and (unpacking := getattr(transformers, "GgufConfig", None)) is not None:
        options["quantization_config"] = unpacking(dequantize=True)
    options |= {"dtype": dtype or torch.float32, "output_loading_info": True, **settings}
    try:
        with _without_bars():
            model, report = auto.from_pretrained(place, **options)
    except Exception as error:  # transformers and its file readers raise exceptions of any class for a damaged file
        raise _unreadable(f"{role} {name!r}", name, error) from error
    if is_gguf(name):
        _check_weights(model, f"{role} {name!r}")
    return model, {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}


def load_complete(
    auto: Any,
    name: str,
    dtype: torch.dtype | None = None,
    *,
    role: str = "model",
    remedy: str = "Choose another model.",
) -> Any:
    """Load a model as `load_pretrained` does, and check that no weight is missing. `remedy` ends the message if one is.

    Raises:
        ModelError, MissingExtraError: as `load_pretrained`; or the model was not trained as `auto`: names the weights.
    """
    model, missing = load_pretrained(auto, name, dtype, role=role)
    if missing:
        raise ModelError(
            f"{role} {name!r} has no weights for {', '.join(sorted(missing))}: it was not trained as "
            f"{type(model).__name__}. {remedy}"
        )
    return model


def load_causal_lm(name: str, dtype: torch.dtype | None = None, *, role: str = "model") -> Any:
    """Load an LLM with its head from a hub id, a folder or a GGUF file, with weights in `dtype` (None: float32).

    Raises:
        ModelError, MissingExtraError: as `load_complete`.
    """
    return load_complete(AutoModelForCausalLM, name, dtype, role=role)


def load_chat_tokenizer(name: str, *, role: str = "model") -> Any:
    """Load the tokenizer of transformers from a hub id, a folder or a GGUF file, with its chat template if it has one.

    Raises:
        ModelError: the tokenizer cannot be loaded; names the model.
        MissingExtraError: a GGUF file needs the library `gguf`.
    """
    place, options = _source(name, role)
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # as above; transformers 4.57 raises TypeError if a vocabulary file is missing
        raise _unreadable(f"the tokenizer of {role} {name!r}", name, error) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' bars about loading out of what a program prints. Downloads have theirs."""
    with _loading, ExitStack() as stack:  # one load at a time: two would restore what the other has set
        for module, names in BARS.items():
            place = importlib.import_module(module)
            for name, silent in names.items():
                if not hasattr(place, name):  # in another release of transformers
                    continue
                stack.callback(setattr, place, name, getattr(place, name))
                setattr(place, name, silent)
        yield


def _check_weights(model: Any, what: str) -> None:
    """Raise a `ModelError` if a weight is not finite, or is larger than any weight is."""
    for name, weight in model.named_parameters():
        least, most = (float(end) for end in torch.aminmax(weight.detach()))
        if not max(-least, most) <= MOST:  # so NaN is refused too
            raise ModelError(
                f"{what} is damaged: its weights {name} are between {least:.3g} and {most:.3g}, which no model has. "
                "Download the file again."
            )


def check_path(name: str, role: str) -> None:
    """Check that a name that looks like a path, and not like a hub id, is there.

    Raises:
        ModelError: there is no such file or folder.
    """
    looks_like_path = is_gguf(name) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).exists():
        advice = "A GGUF is named by its path, not by a hub id." if is_gguf(name) else "Check the path."
        raise ModelError(f"{role} {name!r}: there is no such file or folder. {advice}")


def _source(name: str, role: str) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` takes for a name: a hub id or folder, and options."""
    check_path(name, role)
    if not is_gguf(name):
        return name, {}
    path = Path(name).absolute()
    import_extra("gguf", "gguf")
    return str(path.parent), {"gguf_file": path.name}


def _unreadable(what: str, name: str, error: Exception) -> ModelError:
    reason = str(error).rstrip(".")
    if is_gguf(name):
        return ModelError(
            f"{what} cannot be read: {reason}. If the file is damaged, download it again. If transformers does not "
            "read this kind of GGUF, take the model's folder with safetensors."
        )
    files = sorted(Path(name).glob("*" + GGUF)) if Path(name).is_dir() else []
    hint = f". To read the GGUF in this folder, name the file: {files[0]}" if files else ""
    return ModelError(f"{what} cannot be loaded from the hub or a folder: {reason}{hint}")
