"""`python -m billhook`, and what torchrun starts."""

from billhook.cli import main

main()
