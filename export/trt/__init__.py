"""Building TensorRT engines of a bundle's graphs, and proving what they became."""
