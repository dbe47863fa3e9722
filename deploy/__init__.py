"""A network with its policy as a folder that runs without PyTorch, and what runs it."""
