"""From a file of rows to batches of few shapes, in an order that a position of a few bytes restores.

Reading order: `table` (CSV, JSON lines, Parquet), `split` (train, validation, test), `classify` (texts and labels to
ids), `batches` (which rows, how wide, in which order), `pipeline` (the stream of batches, on grain).
"""
