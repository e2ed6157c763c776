"""The model zoo in Flax Linen: plain apply functions over plain params, which know nothing of fine-tuning.

Reading order: `model` (what every model offers), `output` (what a call returns), `layers` (shared by the families),
`encoder` (the BERT family), `decoder_config`, `decoder_layers` and `decoder` with `rope`, `cache` and `moe` (language
models), `t5`, `loss`. Reading and writing checkpoints is `jpeft.interop`.
"""
