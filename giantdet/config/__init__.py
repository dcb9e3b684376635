"""One JSON, one run: types, reading, checking, resolving, schema."""
