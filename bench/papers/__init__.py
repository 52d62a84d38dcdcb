"""The papers' experiments, and the rivals that promise the same: whether adapting the rate keeps its promise."""
