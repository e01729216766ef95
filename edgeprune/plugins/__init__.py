"""The TensorRT plugin from Python's side: build the libraries, find them, load them and prove that they are there."""
