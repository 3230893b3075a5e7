"""Tensors in files: reading stored ones, writing weight files and their index."""
