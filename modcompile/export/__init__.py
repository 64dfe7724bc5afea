"""ONNX export: one file of standard ops, plus the nodes of domain ``modcompile`` with their function bodies."""

__all__ = ["export_onnx"]

from modcompile.export.onnx_file import export_onnx
