"""Ways to choose a worker, all asked and answering alike, so that a comparison runs the same code."""
