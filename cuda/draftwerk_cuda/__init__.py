"""Draftwerk's CUDA backend: a library that draftwerk's core loads where a GPU is to compute."""

from pathlib import Path

LIBRARY = Path(__file__).with_name("libdraftwerk_cuda.so")
"""The file."""
