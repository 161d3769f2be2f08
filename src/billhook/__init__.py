"""billhook: prune, slice and merge trained neural networks."""
