"""Data and models that more than one experiment trains."""
