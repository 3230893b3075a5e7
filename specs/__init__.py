"""The spec language."""
