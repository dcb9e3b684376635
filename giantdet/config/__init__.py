"""The configuration of a run, one JSON file: types, reading, checks, resolution and schema."""
