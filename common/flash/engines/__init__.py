"""What runs an attention call: the exact reference, PyTorch, the schedules, the kernels."""
