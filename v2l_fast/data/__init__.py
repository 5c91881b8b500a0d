"""Datasets: manifests, readers of their videos, samples, and what is computed over many videos."""
