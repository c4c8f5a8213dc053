"""Training steps, trainers and the record a run leaves."""
