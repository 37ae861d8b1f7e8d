"""Pretrained models from GGUF files, the real one of SmolLM2 among them."""

import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers.utils import logging as bars

from d2llm.errors import MissingExtraError, ModelError
from d2llm.pretrained import load_causal_lm, load_chat_tokenizer


def test_a_gguf_is_an_llm_that_answers_in_its_chat_format(smollm: Path) -> None:
    model, tokenizer = load_causal_lm(str(smollm)), load_chat_tokenizer(str(smollm))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id, "it ends its answer by itself"
    weight = next(model.parameters())
    assert weight.dtype == torch.float32 and weight.requires_grad, "unpacked, so that it can be trained and saved"


def cut(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


def cut_short(path: Path, content: bytes) -> None:
    path.write_bytes(content[:1000])


def unknown(path: Path, content: bytes) -> None:
    writer = gguf.GGUFWriter(str(path), "rwkv7")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (cut, "cannot be read: .* damaged, download it again"),
        (cut_short, "cannot be read: .* damaged, download it again"),
        (lambda path, content: path.write_bytes(b"no such thing"), "it is not a GGUF file. If the file is damaged"),
        (unknown, "architecture rwkv7 is not supported yet. .* take the model's folder with safetensors"),
        (lambda path, content: None, "there is no such file"),
    ],
    ids=["cut", "cut short", "of another format", "of an unknown architecture", "missing"],
)
def test_a_gguf_that_cannot_be_read_is_named_with_the_way_out(
    write: Callable[[Path, bytes], None], message: str, smollm: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write(path, smollm.read_bytes())
    for load in (load_causal_lm, load_chat_tokenizer):
        with pytest.raises(ModelError, match=f"generator '.*model.gguf'.*{message}"):
            load(str(path), role="generator")
    if path.exists():
        with pytest.raises(ModelError, match=r"To read the GGUF in this folder, name the file: .*model\.gguf"):
            load_causal_lm(str(tmp_path))


def test_a_gguf_without_its_extra_is_told_the_pip_line(smollm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'd2llm\[gguf\]'"):
        load_causal_lm(str(smollm))


WIDTH = 32


def write_llama(path: Path) -> None:
    """A Llama of one layer, by llama.cpp's own writer, its matrices in 8 bits."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WIDTH)
    matrices = [f"attn_{name}" for name in ("q", "k", "v", "output")] + [
        f"ffn_{name}" for name in ("gate", "up", "down")
    ]
    for name in ["token_embd.weight", "output.weight", *(f"blk.0.{matrix}.weight" for matrix in matrices)]:
        weights = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("scale", [np.nan, np.inf, 6e4], ids=["not a number", "infinite", "too large"])
def test_a_gguf_that_is_damaged_in_the_middle_is_refused(scale: float, tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    write_llama(path)
    assert load_causal_lm(str(path)).lm_head.weight.isfinite().all()
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == "blk.0.ffn_up.weight")
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(np.float16(scale).tobytes())  # the scale of the first block
    with pytest.raises(
        ModelError, match=r"llama.gguf' is damaged: its weights .*mlp.up_proj.* Download the file again"
    ):
        load_causal_lm(str(path))


def test_loading_shows_no_bar_and_leaves_those_of_the_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "_tqdm_active", True)  # fuzz.py, which other tests read, switches them off
    path = tmp_path / "llama.gguf"
    write_llama(path)
    load_causal_lm(str(path)).save_pretrained(tmp_path / "folder")
    capsys.readouterr()
    for place in (path, tmp_path / "folder"):
        load_causal_lm(str(place))
        assert capsys.readouterr() == ("", "")
    assert bars.is_progress_bar_enabled()
    list(bars.tqdm(range(3), desc="bars of the program"))
    assert "bars of the program" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["./no-such-folder", "/models/llama", "~/llama", "models/llama/final", "models/x.gguf"]
)
def test_a_name_that_looks_like_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    for load in (load_causal_lm, load_chat_tokenizer):
        with pytest.raises(ModelError, match=f"^teacher '{name}': there is no such file or folder"):
            load(name, role="teacher")
