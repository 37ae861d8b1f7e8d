"""From a student to a model folder: ONNX graphs, checked against torch before they are published."""

from .onnx import export

__all__ = ["export"]
