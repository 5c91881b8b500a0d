"""Evaluation: a video in context against its adapter, with controls, a judge and intervals."""
