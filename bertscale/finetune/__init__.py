"""Makes task models of an encoder and labelled examples."""
