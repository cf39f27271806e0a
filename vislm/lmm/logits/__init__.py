"""Acting on next-token logits: contrast streams, beam search, drafts."""
