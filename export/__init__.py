"""Export a student to a model folder of ONNX graphs, which are verified against torch before the folder appears."""

from .onnx import add_query_encoder, export

__all__ = ["add_query_encoder", "export"]
