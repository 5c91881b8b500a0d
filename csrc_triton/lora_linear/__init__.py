"""A frozen linear layer with a LoRA adapter of its own for every example of the batch."""
