"""From a student to a model folder: ONNX graphs, checked against torch before they are published."""

from .onnx import add_query_encoder, export

__all__ = ["add_query_encoder", "export"]
