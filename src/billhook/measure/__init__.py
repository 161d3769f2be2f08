"""What a model is worth and what it costs."""

from billhook.measure.perplexity import evaluate, perplexity
from billhook.measure.size import folder_size, model_size

__all__ = ["evaluate", "folder_size", "model_size", "perplexity"]
