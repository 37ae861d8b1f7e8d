"""int8: weights with a scale for each output, activations with a range for each row, so that a text has one vector.

onnxruntime's own dynamic quantizer measures one range for all activations of a batch, and a text's vector then depends
on the texts beside it. Here each row x [K] (a token) of a product with a matrix W [K, N] has a range of its own:

    x = low + step * q       q in 0..255, low = min(x), step = (max(x) - low) / 255
    W = scale_N * w          w in -64..64
    x @ W = step * scale_N * (q @ w) + low * sum_K(W)

`q @ w` is computed in integers, without rounding. Tables of tokens have a scale for each row.
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
"""Half of what int8 holds: CPUs without VNNI add two products q * w in 16 bits, where 2 * 255 * 64 fits. Of larger
weights they would cut off sums, and a text's vector would depend on the machine."""
TABLE_STEPS = 127
TINY = 1e-12
"""The least step: rows of equal numbers have none."""


def quantize(model: onnx.ModelProto) -> None:
    """Quantize the tables and the products with constant matrices of a float32 `model` (opset 18 or above), in place.

    What has no constant matrix (attention, norms), and stacks of matrices, stays in float32. The products are
    onnxruntime's MatMulIntegerToFloat, which CPUs have and CUDA has not.
    """
    whole = ONNXModel(model)
    whole.replace_gemm_with_matmul()
    rewritten = _Rewriter(model.graph)
    for node in list(model.graph.node):
        rewritten.take(node)
    del model.graph.node[:]
    model.graph.node.extend(rewritten.nodes)
    del model.graph.value_info[:]  # shapes and types from before
    whole.set_opset_import("com.microsoft", 1)
    whole.clean_initializers()


class _Rewriter:
    """Collects the nodes of a quantized graph, and adds its constants to `graph`."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list[onnx.NodeProto]()
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._rows = set[str]()
        """Activations that are quantized already: several products share one input."""

    def take(self, node: onnx.NodeProto) -> None:
        """Add `node`, or what stands for it in int8."""
        left, right = [*node.input, "", ""][:2]
        if node.op_type == "MatMul" and self._is_matrix(right) and left not in self._constants:
            self._multiply(left, right, node.output[0])
        elif node.op_type == "Gather" and self._is_matrix(left) and not any(a.i for a in node.attribute):  # axis 0
            self._look_up(left, right, node.output[0])
        else:
            self.nodes.append(node)

    def _multiply(self, x: str, matrix: str, product: str) -> None:
        """product [.., N] = x [.., K] @ matrix [K, N]."""
        self._quantize_rows(x, self._constants[matrix].dims[0])
        scales, sums = f"{matrix}/scale", f"{matrix}/sum"
        if scales not in self._constants:
            w_KN, scale_1N = _quantized(self._array(matrix), axis=0, steps=WEIGHT_STEPS)
            self._constant(f"{matrix}/int8", w_KN)
            self._constant(scales, scale_1N[0])
            self._constant(sums, w_KN.sum(0, keepdims=True, dtype=np.int64) * scale_1N)
        one = self._constant("int8/one", np.float32(1))
        self._add("MatMulIntegerToFloat", [f"{x}/q", f"{matrix}/int8", one, scales], f"{product}/of_q", ms=True)
        self._add("Mul", [f"{product}/of_q", f"{x}/step"], f"{product}/of_steps")
        self._add("MatMul", [f"{x}/low", sums], f"{product}/of_low")  # [.., 1] @ [1, N]: faster than to multiply
        self._add("Add", [f"{product}/of_steps", f"{product}/of_low"], product)

    def _quantize_rows(self, x: str, width: int) -> None:
        """x [.., K] as `q` uint8 [.., K], `step` and `low` float32 [.., 1]."""
        if x in self._rows:
            return
        self._rows.add(x)
        last = self._constant("int8/last", np.array([-1]))  # the last axis, and the shape of what is flat
        self._add("ReduceMax", [x, last], f"{x}/high", keepdims=1)
        self._add("ReduceMin", [x, last], f"{x}/low", keepdims=1)
        self._add("Sub", [f"{x}/high", f"{x}/low"], f"{x}/range")
        self._add("Mul", [f"{x}/range", self._constant("int8/part", np.float32(1 / STEPS))], f"{x}/part")
        self._add("Max", [f"{x}/part", self._constant("int8/tiny", np.float32(TINY))], f"{x}/step")
        self._add("Sub", [x, f"{x}/low"], f"{x}/above")
        # One scale for each row of a matrix is what QuantizeLinear has an axis for.
        shape = self._constant(f"int8/rows{width}", np.array([-1, width]))
        self._add("Reshape", [f"{x}/above", shape], f"{x}/rows")
        self._add("Reshape", [f"{x}/step", last], f"{x}/steps")
        self._add("QuantizeLinear", [f"{x}/rows", f"{x}/steps"], f"{x}/flat", axis=0)
        self._add("Shape", [x], f"{x}/shape")
        self._add("Reshape", [f"{x}/flat", f"{x}/shape"], f"{x}/q")

    def _look_up(self, table: str, ids: str, rows: str) -> None:
        """rows [.., O] = table [V, O] at ids [..]."""
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
        """`value` as a constant of the graph, once, in float32, int64 or int8; returns its `name`."""
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
    """A matrix in int8 and its scales, each of the largest number along `axis`: `matrix = int8 * scale`."""
    scale = np.maximum(np.abs(matrix).max(axis, keepdims=True), TINY) / steps
    return np.round(matrix / scale).astype(np.int8), scale
