"""Errors a user can act on.

Every message is one line that names the file or argument, the offending value and the remedy.
The command line prints it as it is and exits with code 1; anything else is a bug and keeps its
traceback.
"""


class V2LError(Exception):
    """Base of all errors that v2l_fast raises on purpose."""


class ConfigError(V2LError, ValueError):
    """A configuration value, or a combination of them, cannot work."""


class VideoError(V2LError, ValueError):
    """A video cannot be read, decoded or sampled."""


class CheckpointError(V2LError, ValueError):
    """A checkpoint is broken, unsafe, incomplete or does not fit the model."""


class AdapterError(V2LError, ValueError):
    """An adapter is broken or does not belong to this model."""
