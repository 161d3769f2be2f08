"""What a model is worth and what it costs."""

from billhook.measure.perplexity import evaluate, has_perplexity, perplexity
from billhook.measure.size import folder_size, model_size

__all__ = ["evaluate", "folder_size", "has_perplexity", "model_size", "perplexity"]
