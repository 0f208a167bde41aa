"""A hospital's side: studies found, checked and chosen from, and pipelines run over all of them."""
