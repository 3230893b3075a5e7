"""From a configuration to an ATen graph, without weights."""
