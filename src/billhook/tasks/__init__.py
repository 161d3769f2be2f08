"""Networks, data and a training loop of the tasks that `billhook train` knows; nothing of the library needs them."""

from billhook.tasks.images import Classification, Images, load_images
from billhook.tasks.loop import Training
from billhook.tasks.networks import NETWORKS, network
from billhook.tasks.photos import Enlarging, Photos, load_photos
from billhook.tasks.task import Task
from billhook.tasks.text import Writing, load_text

__all__ = [
    "NETWORKS",
    "Classification",
    "Enlarging",
    "Images",
    "Photos",
    "Task",
    "Training",
    "Writing",
    "load_images",
    "load_photos",
    "load_text",
    "network",
]
