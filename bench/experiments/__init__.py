"""Training experiments on small data. An interrupted experiment resumes where it stopped."""
