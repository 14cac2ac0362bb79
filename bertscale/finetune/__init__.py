"""An encoder and labelled texts -> a classifier."""
