"""Quantize a graph to int8 so that the vector of a text does not depend on its batch.

onnxruntime's dynamic quantizer takes one range for all activations of a batch, so a text gets another vector in another
batch. Here each row x [K] of activations (a token) has its own range, and each output of a matrix W [K, N] its own
scale:

    x = low + step * q       q in 0..255, low = min(x), step = (max(x) - low) / 255
    W = scale_N * w          w in -64..64
    x @ W = step * scale_N * (q @ w) + low * sum_K(W)

The graph computes `q @ w` in integers, without rounding. Token tables have a scale for each row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel

STEPS = 255
WEIGHT_STEPS = 64
"""Largest absolute value of an int8 weight, half of what int8 can hold. CPUs without VNNI add two products q * w in 16
bits. 2 * 255 * 64 fits; larger weights would saturate, and the vector of a text would depend on the machine."""
TABLE_STEPS = 127
TINY = 1e-12
"""Smallest step. It avoids a division by zero for a row of equal numbers."""


def quantize(model: onnx.ModelProto) -> None:
    """Quantize the tables and the products with constant matrices of a float32 `model` (opset 18 or above), in place.

    Operators without a constant matrix (attention, norms) and stacks of matrices stay in float32. The products use
    onnxruntime's MatMulIntegerToFloat, which runs on CPUs but not on CUDA.
    """
    editor = ONNXModel(model)
    editor.replace_gemm_with_matmul()
    rewriter = _Rewriter(model.graph)
    for node in list(model.graph.node):
        rewriter.take(node)
    del model.graph.node[:]
    model.graph.node.extend(rewriter.nodes)
    del model.graph.value_info[:]  # the shapes and types before quantization
    editor.set_opset_import("com.microsoft", 1)
    editor.clean_initializers()


class _Rewriter:
    """Collects the nodes of a quantized graph, and adds its constants to `graph`."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list[onnx.NodeProto]()
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._rows = set[str]()
        """Names of the activations that are quantized already. Several products can share one input."""

    def take(self, node: onnx.NodeProto) -> None:
        """Add `node`, or the int8 nodes that replace it."""
        left, right = [*node.input, "", ""][:2]
        if node.op_type == "MatMul" and self._is_matrix(right) and left not in self._constants:
            self._multiply(left, right, node.output[0])
        elif node.op_type == "Gather" and self._is_matrix(left) and not any(a.i for a in node.attribute):  # axis 0
            self._look_up(left, right, node.output[0])
        else:
            self.nodes.append(node)

    def _multiply(self, x: str, matrix: str, product: str) -> None:
        """Add the nodes of `product` [.., N] = `x` [.., K] @ `matrix` [K, N]."""
        self._quantize_rows(x, self._constants[matrix].dims[0])
        scales, sums = f"{matrix}/scale", f"{matrix}/sum"
        if scales not in self._constants:
            w_KN, scale_1N = _quantized(self._array(matrix), axis=0, steps=WEIGHT_STEPS)
            self._constant(f"{matrix}/int8", w_KN)
            self._constant(scales, scale_1N[0])
            self._constant(sums, w_KN.sum(0, keepdims=True, dtype=np.int64) * scale_1N)
        unit = self._constant("int8/one", np.float32(1))
        self._add("MatMulIntegerToFloat", [f"{x}/q", f"{matrix}/int8", unit, scales], f"{product}/of_q", ms=True)
        self._add("Mul", [f"{product}/of_q", f"{x}/step"], f"{product}/of_steps")
        self._add("MatMul", [f"{x}/low", sums], f"{product}/of_low")  # [.., 1] @ [1, N]: faster than Mul
        self._add("Add", [f"{product}/of_steps", f"{product}/of_low"], product)

    def _quantize_rows(self, x: str, width: int) -> None:
        """Add the nodes that turn `x` [.., K] into `q` uint8 [.., K], `step` and `low` float32 [.., 1]."""
        if x in self._rows:
            return
        self._rows.add(x)
        last = self._constant("int8/last", np.array([-1]))  # the last axis; as a shape, one flat axis
        self._add("ReduceMax", [x, last], f"{x}/high", keepdims=1)
        self._add("ReduceMin", [x, last], f"{x}/low", keepdims=1)
        self._add("Sub", [f"{x}/high", f"{x}/low"], f"{x}/range")
        self._add("Mul", [f"{x}/range", self._constant("int8/part", np.float32(1 / STEPS))], f"{x}/part")
        self._add("Max", [f"{x}/part", self._constant("int8/tiny", np.float32(TINY))], f"{x}/step")
        self._add("Sub", [x, f"{x}/low"], f"{x}/above")
        # QuantizeLinear has one scale for each row only for a matrix: flatten the other axes into rows.
        shape = self._constant(f"int8/rows{width}", np.array([-1, width]))
        self._add("Reshape", [f"{x}/above", shape], f"{x}/rows")
        self._add("Reshape", [f"{x}/step", last], f"{x}/steps")
        self._add("QuantizeLinear", [f"{x}/rows", f"{x}/steps"], f"{x}/flat", axis=0)
        self._add("Shape", [x], f"{x}/shape")
        self._add("Reshape", [f"{x}/flat", f"{x}/shape"], f"{x}/q")

    def _look_up(self, table: str, ids: str, rows: str) -> None:
        """Add the nodes of `rows` [.., O] = `table` [V, O] at `ids` [..]."""
        if f"{table}/rows" not in self._constants:
            w_VO, scale_V1 = _quantized(self._array(table), axis=1, steps=TABLE_STEPS)
            self._constant(f"{table}/rows", w_VO)
            self._constant(f"{table}/steps", scale_V1)
        self._add("Gather", [f"{table}/rows", ids], f"{rows}/int8")
        self._add("Gather", [f"{table}/steps", ids], f"{rows}/scale")
        self._add("Cast", [f"{rows}/int8"], f"{rows}/float", to=onnx.TensorProto.FLOAT)
        self._add("Mul", [f"{rows}/float", f"{rows}/scale"], rows)

    def _add(self, kind: str, inputs: list[str], output: str, *, ms: bool = False, **attributes: Any) -> None:
        domain = "com.microsoft" if ms else ""
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], output, domain=domain, **attributes))

    def _constant(self, name: str, value: npt.NDArray[Any] | np.float32) -> str:
        """Add `value` to the graph's constants, in float32, int64 or int8, unless `name` is there; return `name`."""
        if name not in self._constants:
            array = np.asarray(value)
            array = array.astype(np.float32) if array.dtype.kind == "f" else array
            self._constants[name] = numpy_helper.from_array(array, name)
            self._graph.initializer.append(self._constants[name])
        return name

    def _array(self, name: str) -> npt.NDArray[Any]:
        return numpy_helper.to_array(self._constants[name])

    def _is_matrix(self, name: str) -> bool:
        tensor = self._constants.get(name)
        return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2


def _quantized(matrix: npt.NDArray[Any], axis: int, steps: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any]]:
    """Return a matrix in int8 and its scales along `axis`, so that `matrix` is about `int8 * scale`."""
    scale = np.maximum(np.abs(matrix).max(axis, keepdims=True), TINY) / steps
    return np.round(matrix / scale).astype(np.int8), scale
