"""Training of the embedded model vislm-tiny: a LLaVA of 1.7 million parameters that sees generated scenes."""
