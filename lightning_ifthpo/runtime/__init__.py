"""Adapters between the callbacks and a running Trainer: data, losses, processes, precision, loggers."""
