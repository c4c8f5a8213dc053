"""Hand a trained model over: merged weights, GGUF files, Modelfiles, and the proof that they are that model."""
