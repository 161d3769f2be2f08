"""Networks, data and training loops of the tasks that `billhook train` knows; nothing of the library needs them."""

from billhook.tasks.images import Images, load_images
from billhook.tasks.loop import Training
from billhook.tasks.networks import NETWORKS, network

__all__ = ["NETWORKS", "Images", "Training", "load_images", "network"]
