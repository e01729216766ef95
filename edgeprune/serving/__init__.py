"""Handing a bundle over to a server for fleets: a model repository of Triton. Neither torch nor onnx, nor a GPU."""

from edgeprune.serving.repository import ServeOptions, write_repository

__all__ = ["ServeOptions", "write_repository"]
