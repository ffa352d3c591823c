"""Bundle -> TensorRT engine: the graph is lowered, then parsed and built."""
