"""The plan: everything that is known before a weight is read."""
