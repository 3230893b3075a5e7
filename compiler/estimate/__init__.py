"""Estimates of a plan: FLOPs, memory, time and disk of each phase, and whether they fit the devices."""
