"""The command line: `draftwerk generate | chat | serve | bench | models | tokenize | demo`."""
