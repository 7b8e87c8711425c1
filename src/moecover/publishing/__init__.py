"""Publishing: a finished pruned model to a repository of the hub."""
