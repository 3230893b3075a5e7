"""Writes the student: checkpoint, model card, program, training plan."""
