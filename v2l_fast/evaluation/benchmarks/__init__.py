"""Manifests of the paper's nine benchmarks from their published annotation files."""
