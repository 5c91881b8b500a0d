"""Evaluation: answer metrics and the statistics that compare two systems on the same examples."""
