"""Stubs of the package draftwerk.v1, made from the protos by proto/generate.py."""
