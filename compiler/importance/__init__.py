"""What each index of each axis is worth: samples, activations, scores, and the selection that follows."""
