"""Training drafters: a multi-token-prediction drafter learns to foretell its target's next tokens.

Needs the extra ``train``. The target is frozen. Its own text is the teacher, and what the drafter
reads at inference (final states, keys and values) is what it reads here. The loop is in
:mod:`draftwerk.training.trainer`.
"""
