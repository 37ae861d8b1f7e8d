"""Open and run an ONNX graph with onnxruntime on the requested device, without fallback to another one."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from d2llm.errors import ArgumentError, DeviceError, ModelError, import_extra

# From 1.29 on, onnxruntime sends telemetry from a thread, and a forked child waits for this thread forever when it
# exits. Turn telemetry off unless the user has set the variable.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Device: TypeAlias = Literal["cpu", "cuda"]
PROVIDERS: dict[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


THREAD_TOKENS = 256
"""Number of tokens of a batch, padding included, for each CPU thread. A thread's share of the activations then stays in
its core's cache: one core encodes batches of 256 tokens 1.5 (fp32) to 1.6 (int8) times as fast as of 4,096."""
BATCH_TOKENS: dict[str, int] = {"cpu": 4096, "cuda": 32768}
"""Largest number of tokens in a batch, padding included, by device: CUDA needs large batches."""
MAX_THREADS = 1024
"""Largest number of CPU threads of one graph. onnxruntime starts as many threads as requested, and aborts the process
if the system refuses one."""
SLOWER_FUSIONS: dict[str, list[str]] = {"cpu": ["SkipLayerNormFusion"], "cuda": []}
"""Graph fusions to turn off on each device. On a CPU the fused norm takes three times as long as the two nodes that it
replaces: 7 % of the time of a query in an encoder of one layer."""


def installed_runtimes() -> dict[str, str]:
    """Return the installed onnxruntime packages and their versions, e.g. `{"onnxruntime": "1.31.1"}`."""
    versions = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def why_no_cuda(runtimes: Mapping[str, str]) -> str:
    """Return the likely reason why CUDA is not available, and what to install. `runtimes` are the
    `installed_runtimes()`."""
    if "onnxruntime-gpu" not in runtimes:
        return "onnxruntime-gpu is not installed: pip uninstall -y onnxruntime && pip install 'd2llm[gpu]'"
    if "onnxruntime" in runtimes:
        return (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'd2llm[gpu]'"
        )
    return (
        f"onnxruntime-gpu {runtimes['onnxruntime-gpu']} did not find a GPU with the CUDA and cuDNN versions it was "
        "built for: pip install 'onnxruntime-gpu[cuda,cudnn]', and check nvidia-smi"
    )


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Graph:
    """An ONNX graph on a device, with arrays as inputs and outputs.

    Inputs and outputs go through onnxruntime's I/O binding on every device. So an output can stay on the device, and
    another graph can read it without a copy.

    A graph does not survive a fork: `run` raises a `DeviceError` in a forked child. Open the graph in the child.

    Raises:
        DeviceError: the session did not get the requested device. There is no silent fallback.
        ModelError: this onnxruntime cannot run the file.
        ArgumentError: an unknown device, or a number of threads out of range.
    """

    def __init__(self, path: Path, device: Device = "cpu", threads: int | None = None) -> None:
        if device not in PROVIDERS:
            raise ArgumentError(f"unknown device {device!r}: choose one of {', '.join(PROVIDERS)}")
        ort = import_extra("onnxruntime", "gpu" if device == "cuda" else "cpu")
        provider = PROVIDERS[device]
        # get_available_providers lists what the build contains, not what works: the session is checked as well, below.
        if provider not in ort.get_available_providers():
            raise DeviceError(f"the device {device} is not available: {why_no_cuda(installed_runtimes())}")
        if device == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        options = ort.SessionOptions()
        options.log_severity_level = 3  # hides warnings about shape nodes on the CPU, which are normal for CUDA
        # Idle threads must not spin: the index needs the cores between two runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            if not 1 <= threads <= MAX_THREADS:
                raise ArgumentError(f"threads must be from 1 to {MAX_THREADS}, found {threads}")
            options.intra_op_num_threads = threads
        try:
            self._session: Any = ort.InferenceSession(
                str(path), options, providers=[provider], disabled_optimizers=SLOWER_FUSIONS[device]
            )
        except Exception as error:  # onnxruntime's errors have no common base class
            raise ModelError(f"onnxruntime {ort.__version__} cannot open {path}: {error}") from error
        _OPEN.add(self)
        if provider not in self._session.get_providers():
            raise DeviceError(f"onnxruntime could not use the device {device}: {why_no_cuda(installed_runtimes())}")
        self.device: Device = device
        self.threads = threads or _cores()
        self.inputs = [node.name for node in self._session.get_inputs()]
        self.outputs = [node.name for node in self._session.get_outputs()]

    @property
    def batch_tokens(self) -> int:
        """The largest number of tokens in a batch of texts, padding included."""
        most = BATCH_TOKENS[self.device]
        return most if self.device == "cuda" else min(most, THREAD_TOKENS * self.threads)

    @property
    def batches_at_a_time(self) -> int:
        """The number of batches to run at the same time. On a CPU, the second one fills the cores where the first one
        waits for its slowest thread."""
        return 1 if self.device == "cuda" or self.threads == 1 else 2

    def run(
        self, feeds: Mapping[str, npt.NDArray[Any] | Any], keep: Collection[str] = (), outputs: list[str] | None = None
    ) -> dict[str, Any]:
        """Run the graph on `feeds`, arrays or `OrtValue`s of this device; return its outputs by name.

        `outputs` are the outputs to compute, by default all. Outputs in `keep` stay on the device as `OrtValue`s; the
        others are arrays.

        Raises:
            DeviceError: the process was forked after it opened the graph.
        """
        names, session = outputs or self.outputs, self._session
        if session is None:
            raise DeviceError("the model was loaded before this process was forked: load it after the fork")
        binding = session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, self.device if name in keep else "cpu")
        session.run_with_iobinding(binding)
        return {
            name: value if name in keep else value.numpy()
            for name, value in zip(names, binding.get_outputs(), strict=True)
        }


_OPEN: weakref.WeakSet[Graph] = weakref.WeakSet()


def _abandon() -> None:
    """Make the open graphs unusable in a forked child.

    The threads of a session exist only in the parent, so the destructor of the session would wait for them forever in
    the child. An extra reference to the session keeps the destructor from running.
    """
    for graph in list(_OPEN):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph._session))
        graph._session = None


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_abandon)
