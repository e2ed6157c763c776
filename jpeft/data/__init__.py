"""From a file of rows to batches of few shapes, in an order that a position of a few bytes restores.

Reading order: `table` (CSV, JSON lines, Parquet), `rows` (conversations, templates over columns, files of text),
`split` (train, validation, test); rows to ids: `classify` (texts and labels), `sft` (conversations, completions, plain
text, in pieces made by `turns`), `seq2seq` (texts and what they become), `tags` (words with a tag each), `groups`
(texts that are compared); `epochs` (which rows, how wide, in which order), of which `batches`, `packing`, `seq2seq`,
`tags` and `groups` have the kinds; `pipeline` (the stream of batches, on grain).
"""
