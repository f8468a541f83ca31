"""The tasks of `tools/prepare_data.py` before training: check, convert, count and embed; on one machine or on many."""
