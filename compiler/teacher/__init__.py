"""The teacher before it is a graph: where it lies, what it consists of, what a result depends on."""
