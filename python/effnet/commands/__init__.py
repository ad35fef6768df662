"""The ``effnet`` command: a file a command, each with ``add`` (its options) and ``run``."""
