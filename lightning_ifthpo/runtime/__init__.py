"""What the callbacks need of a running Trainer; nothing here knows of hypergradients."""
