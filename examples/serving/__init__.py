"""Helpers of 05_serve_qwen3_next.py: a scheduler, the model with its cores replaced, the loop, and the tables."""
