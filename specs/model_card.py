"""The parts of a student's model card that the compiler writes and training replaces."""

TAGS = "tags: [minitron, pruned]"
DISTILLED_TAGS = "tags: [minitron, pruned, distilled]"
UNDISTILLED = "This is the starting point of distillation; on its own it is worse than it will be."
"""The sentence of a card that is true until the student is trained."""
