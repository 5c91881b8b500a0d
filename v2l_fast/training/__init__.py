"""Training of hypernetworks: data, loss, schedule, checkpoints and the loop that joins them."""
