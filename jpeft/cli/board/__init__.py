"""The comparison board: many methods on the same tasks, one run for each seed, in one resumable table.

Reading order: `config` (what is compared), `results` (the file that it grows in), `bench` (one run after the other),
`table` and `plot` (what is made of it).
"""
