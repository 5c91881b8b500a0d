"""Triton kernels of the ops, one file an op; importing one of those files imports triton."""
