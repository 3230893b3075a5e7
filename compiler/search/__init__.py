"""Search: the shapes within a budget, priced without reading a weight, and those that enter the first rung."""
