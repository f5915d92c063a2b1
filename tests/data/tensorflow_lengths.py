"""Episode lengths of the dataset that `tensorflow_side.py` writes (apart, because tests may not import TensorFlow)."""

LENGTHS = (12, 5, 23, 9, 8, 31, 17, 10, 26)  # the second is shorter than a chunk
UNNAMED = 3  # the episode without an instruction
