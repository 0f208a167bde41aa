"""From a dataset to a model: facts, plan, prepared cases, patches, loss, loop."""
