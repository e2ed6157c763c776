"""Using a model: `generate` (a language model writes), on `sampling` (the next token) and `text` (ids to pieces)."""
