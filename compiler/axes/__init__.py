"""The dimension analysis: which axes of a graph belong together, and what is kept of them."""
