"""Networks other than `model.py`, and views of it for study."""
