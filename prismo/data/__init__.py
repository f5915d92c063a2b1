"""Robot data: RLDS folders read without TensorFlow, images, normalisation, order, batches (start at `dataset.py`)."""
