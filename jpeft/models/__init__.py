"""The model zoo in Flax Linen: plain apply functions over plain params, which know nothing of fine-tuning.

Reading order: `model` (what every model offers), `output` (what a call returns), `layers` (shared by the families),
`encoder` (the BERT family). Reading and writing checkpoints is `jpeft.interop`.
"""
