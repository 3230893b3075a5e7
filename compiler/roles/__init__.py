"""Names for people: which axes of the graph are heads, experts, widths, the residual stream, the head."""
