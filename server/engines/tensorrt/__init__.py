"""TensorRT on NVIDIA GPUs: the backend and the libraries it needs."""
