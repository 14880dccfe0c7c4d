"""edge-glass: config groups become modules, modules become one task, one loop trains the task anywhere."""

__version__ = "0.1.0"
