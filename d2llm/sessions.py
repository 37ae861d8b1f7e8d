"""One onnxruntime graph on one device: opened so that it runs where it was asked to, or not at all."""

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

# From 1.29 on, onnxruntime reports its use to its makers, from a thread for which a forked child waits at its exit for
# ever. Both end here, unless the user has set the variable.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Device: TypeAlias = Literal["cpu", "cuda"]
PROVIDERS: dict[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


MAX_THREADS = 1024
"""Of one graph. onnxruntime starts as many as it is told, and ends the process where the system has no more."""
SLOWER_FUSIONS: dict[str, list[str]] = {"cpu": ["SkipLayerNormFusion"], "cuda": []}
"""On a CPU the fused norm takes thrice as long as the two nodes it replaces: 7 % of a query of one layer."""


def installed_runtimes() -> dict[str, str]:
    """Installed onnxruntime wheels and their versions, e.g. `{"onnxruntime": "1.31.1"}`."""
    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def why_no_cuda(runtimes: Mapping[str, str]) -> str:
    """The likely reason why CUDA is not there, and what to install, given `installed_runtimes()`."""
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


class Graph:
    """An ONNX graph on a device. Takes and gives arrays; outputs named in `keep` stay on the device as `OrtValue`s.

    Everything goes through I/O binding, on CPU as on CUDA: one path, and what one graph leaves on the device another
    can take without a copy.

    A process that was forked has to open its own: `run` raises a `DeviceError` there.

    Raises:
        DeviceError: the session did not get the device that was asked for. Never a silent fallback.
        ModelError: the file is no graph that this onnxruntime can run.
    """

    def __init__(self, path: Path, device: Device = "cpu", threads: int | None = None) -> None:
        if device not in PROVIDERS:
            raise ArgumentError(f"unknown device {device!r}: choose one of {', '.join(PROVIDERS)}")
        ort = import_extra("onnxruntime", "gpu" if device == "cuda" else "cpu")
        provider = PROVIDERS[device]
        # Both lists are asked: the build's (get_available_providers names what was compiled in, not what works),
        # then, below, what the session really got.
        if provider not in ort.get_available_providers():
            raise DeviceError(f"{device} was asked for and is not available. {why_no_cuda(installed_runtimes())}")
        if device == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        options = ort.SessionOptions()
        options.log_severity_level = 3  # shape nodes on the CPU beside a CUDA graph are normal, not a warning
        # Idle threads that spin would keep the cores from the index, whose turn it is after each run.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            if not 1 <= threads <= MAX_THREADS:
                raise ArgumentError(f"threads must be from 1 to {MAX_THREADS}, found {threads}")
            options.intra_op_num_threads = threads
        try:
            self._session: Any = ort.InferenceSession(
                str(path), options, providers=[provider], disabled_optimizers=SLOWER_FUSIONS[device]
            )
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise ModelError(f"onnxruntime {ort.__version__} cannot open {path}: {error}") from error
        _OPEN.add(self)
        if provider not in self._session.get_providers():
            raise DeviceError(f"{device} was asked for, but not to be had. {why_no_cuda(installed_runtimes())}")
        self.device: Device = device
        self.inputs = [node.name for node in self._session.get_inputs()]
        self.outputs = [node.name for node in self._session.get_outputs()]

    def run(
        self, feeds: Mapping[str, npt.NDArray[Any] | Any], keep: Collection[str] = (), outputs: list[str] | None = None
    ) -> dict[str, Any]:
        """Run on `feeds` (arrays, or `OrtValue`s of this device); return `{output name: array or kept OrtValue}`.

        Raises:
            DeviceError: this process was forked after the graph was opened.
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
    """In a forked child: a session's threads stayed with the parent, and its end would wait for them for ever. So it
    never ends: it gets a reference that nobody gives back."""
    for graph in list(_OPEN):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph._session))
        graph._session = None


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_abandon)
