"""Training, export and the autograd references: the only place that imports torch."""
