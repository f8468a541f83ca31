"""What `tools/prepare_data.py` does to data sets before training: check, convert, count; on one machine or on many."""
