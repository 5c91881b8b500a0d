"""Looking into adapters and what they cost: ablations, attribution, sweeps, efficiency.

Every analysis is a function from a model and examples to a JSON-ready record, which the command
line writes beside a table (CSV) and a plot. None knows a data set: scores are callables.
"""
