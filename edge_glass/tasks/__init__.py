"""What is trained: a model and its loss as one Module, so that DistributedDataParallel wraps one thing."""
