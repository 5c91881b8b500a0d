"""A folder of adapters that servers and batch jobs share; knows nothing about HTTP."""
