"""Export attention as one node, onnxruntime's MultiHeadAttention.

torch's exporter writes attention as ten nodes, and each of them copies the weights [B, H, L, L] of a layer. With one
node, a CPU copies them less often, and CUDA can choose a kernel that never stores them.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention
from onnxscript.values import Op, Opset

MASKED = -3e38
"""What a forbidden key adds to its logit. It is finite: a padded row may see no key at all, and the softmax of a row of
infinities is NaN, which the next layer would carry into other rows."""


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate torch's attention of `query`, `key` and `value` [B, H, L, D] with a boolean `attn_mask`.

    Attention without a boolean mask, or with fewer heads of keys than of queries, is left to torch's exporter.
    """
    if attn_mask is None or attn_mask.dtype != onnx.TensorProto.BOOL or query.shape[1] != key.shape[1]:
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    heads = query.shape[1]
    q_BLO, k_BLO, v_BLO = (_heads_joined(each) for each in (query, key, value))
    bias = op.Where(attn_mask, _constant(value_float=0.0), _constant(value_float=MASKED))
    out_BLO = _MULTI_HEAD(q_BLO, k_BLO, v_BLO, None, None, bias, num_heads=heads, scale=scale or 0.0)
    return op.Transpose(op.Reshape(out_BLO, _constant(value_ints=[0, 0, heads, -1])), perm=[0, 2, 1, 3])


def _heads_joined(x_BHLD: Any) -> Any:
    return op.Reshape(op.Transpose(x_BHLD, perm=[0, 2, 1, 3]), _constant(value_ints=[0, 0, -1]))


def _constant(**value: Any) -> Any:
    return op.Constant(**value)


def _multi_head_attention() -> Op:
    """Return onnxruntime's operator. onnx has no schema for it, and onnxscript calls none without."""
    optional = OpSchema.FormalParameterOption.Optional
    names = ["query", "key", "value", "bias", "key_padding_mask", "attention_bias"]
    schema = OpSchema(
        *("MultiHeadAttention", "com.microsoft", 1),
        inputs=[OpSchema.FormalParameter(name, "T", param_option=optional) for name in names],
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[
            OpSchema.Attribute("num_heads", OpSchema.AttrType.INT, required=True),
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, required=False),
        ],
    )
    return Op(Opset(schema.domain, schema.since_version), schema.name, schema)


_MULTI_HEAD = _multi_head_attention()
TRANSLATIONS: dict[Any, Any] = {torch.ops.aten.scaled_dot_product_attention.default: attention}
"""How torch's exporter translates operators, where it is not its own way."""
