"""The importance of each index of each axis: samples, activations, scores, and the selection that follows."""
