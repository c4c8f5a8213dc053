"""What fastft knows of each model family, as frozen records."""
