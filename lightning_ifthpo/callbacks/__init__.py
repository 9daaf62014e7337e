"""Callbacks for the Trainer."""

from lightning_ifthpo.callbacks.hypergradient import IFTHypergradient

__all__ = ["IFTHypergradient"]
