"""Observing and editing a running large multimodal model (LMM).

``session.attach`` runs any supported transformers model under interventions; ``model.load_lmm`` adds a processor and
questions in plain text.
"""
