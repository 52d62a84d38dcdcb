"""Training experiments on small data: the tasks, and runs that go on where they were interrupted."""
