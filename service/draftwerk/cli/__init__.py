"""The command line: `draftwerk generate | bench | models | tokenize | demo`."""
