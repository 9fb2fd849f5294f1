"""Tasks: the loss and the metrics that go with a kind of label."""
